"""The benchmark against a loop that anyone would write by hand: the same model, batch, data and thread."""

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from launch.bench.runs import plan, run_job
from launch.bench.setups import parse_setup
from launch.bench.summary import is_busy
from tests.helpers.processes import ROOT, execute

ROUNDS = 5
BATCH_SIZE, WARMUP, STEPS = 128, 30, 300
AGREEMENT = 0.05
# The loop shares nothing with the engine. It gets the allocator setting that trainers have, since that is worth more
# than what is compared here, and the same drawn data set.
BARE_LOOP = f"""
import json, resource, sys, time
sys.path.insert(0, {str(ROOT)!r})
import torch
from torch import nn
from datasets import synthetic
from launch.machine import keep_freed_memory
from trainers import models

torch.set_num_threads(1)
keep_freed_memory()
train, _ = synthetic.load(num_test=10)
torch.manual_seed(0)
model = models.build("net", num_classes=10).train()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
loss_function = nn.CrossEntropyLoss()

def batches():
    while True:
        for indices in torch.randperm(len(train)).split({BATCH_SIZE}):
            if len(indices) == {BATCH_SIZE}:
                yield train.inputs[indices].float().mul_(1 / 127.5).sub_(1), train.targets[indices]

def cpu_seconds():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime

for step, (images, labels) in enumerate(batches()):
    if step == {WARMUP}:
        began, used = time.perf_counter(), cpu_seconds()
    if step == {WARMUP + STEPS}:
        break
    loss = loss_function(model(images), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
print(json.dumps({{"seconds": time.perf_counter() - began, "cpu_seconds": cpu_seconds() - used}}))
"""


def bare_loop(script: Path) -> dict[str, float]:
    done = execute([sys.executable, str(script)], timeout=120)
    assert done.code == 0, done.err
    return json.loads(done.out)


def benchmarked() -> dict[str, Any]:
    job = plan([parse_setup("cpu:1")], batch_size=BATCH_SIZE, rank_batch_size=BATCH_SIZE, scaling="strong")[0]
    flags = ["--onednn", "--model", "net", "--recipe", "blitz", "--dataset", "synthetic", "--learning-rate", "0.05"]
    result = run_job(job, "cifar", flags, steps=f"{WARMUP}:{STEPS}", threads=1, timeout_seconds=120)
    assert result["error"] is None, result["error"]
    return result["benchmark"]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_one_cpu_process_is_as_fast_as_a_loop_written_by_hand(tmp_path: Path, record_property: Any) -> None:
    """Both by turns. CPU time is compared always, and wall time where nothing else had the machine."""
    script = tmp_path / "bare_loop.py"
    script.write_text(BARE_LOOP)
    bare, ours = [], []
    for number in range(ROUNDS):
        order = [(bare, lambda: bare_loop(script)), (ours, benchmarked)]
        for results, measure in order[:: 1 if number % 2 == 0 else -1]:
            results.append(measure())
    cpu = median(hand["cpu_seconds"] / one["cpu_seconds"][0] for hand, one in zip(bare, ours, strict=True))
    wall = median(hand["seconds"] / one["seconds"] for hand, one in zip(bare, ours, strict=True))
    busy = any(is_busy(one, parse_setup("cpu:1")) for one in ours)
    speed = median(one["samples_per_second"] for one in ours)
    text = (f"cpu:1 {speed:,.0f} samples/s; relative to the bare loop: {cpu:.3f} by CPU time, {wall:.3f} by wall time"
            f"{', machine busy' if busy else ''}")
    record_property("agreement", text)
    print(text)
    assert cpu == pytest.approx(1, abs=AGREEMENT), text
    if not busy:
        assert wall == pytest.approx(1, abs=AGREEMENT), text
