"""The network, tried on blank inputs of the real size: once in eval mode and, before training, once in train mode.
Inputs that are dicts or tuples of tensors are taken as they are: lengths and indices among them must fit each other."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from launch.errors import UsageError, first_line, is_users
from launch.failure import translated
from trainers.engine.parallel import buffers_kept
from trainers.engine.step import TrainStep
from trainers.engine.task import Batch, apply
from trainers.engine.user_code import is_reference

ENOUGH_SAMPLES = 2  # behave as any larger micro-batch does; one may have no variance to normalise by


def tried_first(step: TrainStep, batches: Iterator[Batch], flags: Mapping[str, Any]) -> Iterator[Batch]:
    """The batches; before the first is handed out, the network is tried on blanks of its shape, or UsageError."""
    for first in batches:
        try_network(step, first, flags)
        yield first
        yield from batches


@torch.no_grad()
def try_network(step: TrainStep, batch: Batch, flags: Mapping[str, Any]) -> None:
    """Raises as above. Buffers and random generators are left as they were. A compiled model is tried as written."""
    inputs, single = batch[0], isinstance(batch[0], Tensor)
    inputs = (torch.zeros_like(inputs[:ENOUGH_SAMPLES], device=step.world.device) if single else
              step.to_device(inputs, ())[0])
    network, size = step.network, " x ".join(map(str, inputs.shape[1:])) if single else f"a {type(inputs).__name__}"
    devices = [step.world.device] if step.world.device.type == "cuda" else []

    def attempt(set_mode: Callable[[], object], explain: Callable[[str], str]) -> None:
        set_mode()
        try:
            with torch.random.fork_rng(devices), step.precision.autocast():
                apply(network.forward, inputs)  # not network(): what torch.compile makes of two samples is of no use
        except Exception as error:  # whatever a network does with inputs that it was not made for
            if is_users(translated(error)) or is_reference(flags.get("model")):  # of their code: their line is named
                raise
            raise UsageError(explain(first_line(error))) from None

    model, remedy = f"--model {flags.get('model')}:", "choose a model for this size"
    if flags.get("evaluate") is not None:
        model, remedy = f"--evaluate {flags['evaluate']}: its network", "use the trainer and size that made it"
    with buffers_kept(network):
        attempt(network.eval, lambda reason: f"{model} cannot take inputs of {size} ({reason}); {remedy}")
        if flags.get("evaluate") is None:
            attempt(step.train_mode, lambda reason: few_samples(reason, flags) if single and len(inputs) == 1 else
                    f"{model} fails in training on inputs of {size} ({reason}); choose another")


def few_samples(reason: str, flags: Mapping[str, Any]) -> str:
    """The line for a network that cannot be trained on one sample at a time."""
    flag, remedy = f"--batch-size {flags.get('batch_size')}", "raise it, or use fewer ranks"
    if flags.get("accumulation_steps", 1) > 1:
        flag, remedy = f"--accumulation-steps {flags['accumulation_steps']}", "lower it, or raise --batch-size"
    return (f"{flag}: leaves one sample per rank and micro-batch, on which --model {flags.get('model')} cannot be "
            f"trained ({reason}); {remedy}")
