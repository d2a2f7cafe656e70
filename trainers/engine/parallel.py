"""One process, DataParallel or DistributedDataParallel: wrapping, unwrapping, and when gradients are averaged."""

import contextlib
import inspect
import itertools
from collections.abc import Iterator
from typing import Literal

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DataParallel, DistributedDataParallel

from launch.errors import UsageError
from launch.process_group import World
from trainers.engine.task import Batch, Loss

ParallelName = Literal["auto", "none", "dp", "ddp"]
COMM_HOOKS = {"bf16": default_hooks.bf16_compress_hook, "fp16": default_hooks.fp16_compress_hook}
# torch 2.15 renamed broadcast_buffers and deprecates the old name
BUFFERS_ARGUMENT = next(name for name in ("forward_sync_buffers", "broadcast_buffers")
                        if name in inspect.signature(DistributedDataParallel.__init__).parameters)


def choose_parallel(name: ParallelName, world: World, *, num_gpus: int) -> tuple[Literal["none", "dp", "ddp"], str]:
    """What `--parallel` comes to here, and a sentence where that is not what was asked for; or UsageError."""
    if name == "auto":
        return ("ddp" if world.backend is not None else "none"), ""
    if name == "ddp" and world.backend is None:
        raise UsageError("--parallel ddp: no launcher started this process; use torchrun --standalone "
                         "--nproc_per_node=N, or --parallel none")
    if name != "ddp" and world.world_size > 1:
        raise UsageError(f"--parallel {name}: {world.world_size} ranks would train apart; use ddp, or one process")
    if name == "dp" and (world.device.type != "cuda" or num_gpus < 2):
        found = "one GPU" if world.device.type == "cuda" else "no GPU"
        return "none", f"DataParallel has nothing to split on {found}; training as --parallel none"
    return name, ""


def parallelize(model: nn.Module, parallel: Literal["none", "dp", "ddp"], world: World, *, comm_hook: str = "none",
                find_unused_parameters: bool = False) -> nn.Module:
    """Wrap a model on its device. DDP broadcasts no buffers later: evaluation takes rank 0's (metrics.sync_buffers)."""
    if parallel == "dp":
        return DataParallel(model)
    if parallel == "none" or not any(parameter.requires_grad for parameter in model.parameters()):
        return model
    wrapped = DistributedDataParallel(
        model, device_ids=[world.device.index] if world.device.type == "cuda" else None, gradient_as_bucket_view=True,
        find_unused_parameters=find_unused_parameters, **{BUFFERS_ARGUMENT: False})  # pyright: ignore
    if comm_hook != "none":
        wrapped.register_comm_hook(state=None, hook=COMM_HOOKS[comm_hook])
    return wrapped


def unwrap(model: nn.Module) -> nn.Module:
    """The network itself, whose parameter names carry no `module.` prefix."""
    return model.module if isinstance(model, DataParallel | DistributedDataParallel) else model


def gradient_sync(model: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[object]:
    """The context of one micro-batch: DDP averages gradients on the last one only (`no_sync` on the others)."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else contextlib.nullcontext()


def warmed_up(model: nn.Module, world: World, batches: Iterator[Batch], *, loss: Loss) -> Iterator[Batch]:
    """The batches, the first run forward and backward where that prepares something: torch.compile's kernels, cuDNN's
    choice, or DDP's layout of gradients, by which three or more ranks add them up. The model is left as it was."""
    prepares = (world.device.type == "cuda" or unwrap(model)._compiled_call_impl is not None
                or (isinstance(model, DistributedDataParallel) and world.world_size > 2))
    first = next(batches, None) if prepares else None
    if first is None:
        return batches
    with buffers_kept(model):
        loss(*first).backward()
    model.zero_grad()
    return itertools.chain([first], batches)


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put a model's buffers, such as BatchNorm's running statistics, back to what they were before the block."""
    before = [buffer.clone() for buffer in model.buffers()]
    yield
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)


def synchronize(device: torch.device) -> None:
    """Wait for the device; only where a time is taken."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
