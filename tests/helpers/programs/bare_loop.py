"""A training loop as anyone would write it by hand: `bare_loop.py BATCH_SIZE WARMUP STEPS` prints its seconds as JSON.

It shares nothing with the engine. It gets the allocator setting that trainers have, since that is worth more than what
is compared, and the same synthetic data set.
"""

import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from datasets import synthetic
from launch.machine import keep_freed_memory
from trainers import models

BATCH_SIZE, WARMUP, STEPS = map(int, sys.argv[1:])

torch.set_num_threads(1)
keep_freed_memory()
train, _ = synthetic.load(num_test=10)
torch.manual_seed(0)
model = models.build("net", num_classes=10).train()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
loss_function = nn.CrossEntropyLoss()


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches without end."""
    while True:
        for indices in torch.randperm(len(train)).split(BATCH_SIZE):
            if len(indices) == BATCH_SIZE:
                yield train.inputs[indices].float().mul_(1 / 127.5).sub_(1), train.targets[indices]


def cpu_seconds() -> float:
    """What this process has used so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


began = used = 0.0
for step, (images, labels) in enumerate(batches()):
    if step == WARMUP:
        began, used = time.perf_counter(), cpu_seconds()
    if step == WARMUP + STEPS:
        break
    loss = loss_function(model(images), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
print(json.dumps({"seconds": time.perf_counter() - began, "cpu_seconds": cpu_seconds() - used}))
