"""These trainers as a library, importable from anywhere after `pip install -e .`: README.md, "Your own model and data".

    from torchrun_trainers import train
    train(Net, (train_set, test_set), loss=my_loss, epochs=3)
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
for name in ("datasets", "launch", "trainers"):
    found = [Path(path) for path in getattr(sys.modules.get(name), "__path__", [])]
    if name in sys.modules and ROOT / name not in found:
        raise ImportError(f"torchrun_trainers: another package called {name} is imported already "
                          f"({next(iter(found), '?')}); import torchrun_trainers before it, or use that one in a "
                          f"program of its own")
sys.path[:] = [str(ROOT), *(path for path in sys.path if path != str(ROOT))]

import torch
from torch import nn

from datasets.order import ResumableSampler, epoch_order, evaluation_indices
from datasets.samples import Reading, Splits, generators_kept, sample_loaders, seed_sample
from launch.command_line import in_one_line
from launch.errors import UsageError, to_stderr
from launch.process_group import World, process_group
from launch.stop import ignore_signals, stop_request
from trainers import custom
from trainers.engine.checkpoints.files import prune, sweep
from trainers.engine.checkpoints.load import newest_good
from trainers.engine.checkpoints.save import write_checkpoint
from trainers.engine.metrics import Evaluation, EvaluationSums, sync_buffers
from trainers.engine.parallel import parallelize, unwrap
from trainers.engine.task import apply, logits_of, map_tensors
from trainers.engine.user_code import Reference, call

__all__ = ["Checkpoints", "ResumableSampler", "World", "ddp", "epoch_order", "evaluate", "evaluation_indices",
           "generators_kept", "loaders", "process_group", "seed_sample", "train"]


def train(model: Any, data: Any, *, loss: Any = None, metric: Any = None, collate: Any = None, **flags: Any
          ) -> dict[str, Any]:
    """A complete training, as trainers/custom.py does it; returns what result.json holds.

    Args:
        model: a network, or a class or function that makes one from `num_classes` and `image_size` if it asks for them.
        data: (train, test) or (train, validation, test), map-style data sets; or a function of `data_dir`.
        flags: of trainers/custom.py, such as `epochs=3, run_name="mine"`.

    An error is one line and ends the process with its exit code; a stop exits with 75 once all is saved.
    """
    def run() -> dict[str, Any]:
        config = custom.CustomConfig(dataset="given", model=getattr(model, "__name__", type(model).__name__), **flags)
        found = call(data, {"data_dir": config.data_dir}) if callable(data) else data
        splits = custom.splits_in(found, collate, "given")
        check_workers(splits, config.num_workers())
        script = getattr(sys.modules["__main__"], "__file__", None) or "notebook.py"
        reference = Reference("--data", f"{script}:{type(splits.train).__name__}")
        return custom.main(config, custom.Given(splits=splits, model=model, loss=loss, metric=metric,
                                                explain=reference.explain))

    return in_one_line(run)


def check_workers(splits: Splits, workers: int) -> None:
    """Raise UsageError where a worker, a new process, could not find the class of a data set: in a notebook."""
    homeless = getattr(sys.modules["__main__"], "__file__", None) is None
    mine = [type(each).__name__ for each in splits.present().values()
            if "__main__" in (getattr(type(each), "__module__", ""), getattr(each, "__module__", ""))]
    if workers and homeless and mine:
        raise UsageError(f"workers={workers}: {mine[0]} is defined in a notebook, where no worker finds it; move it to "
                         f"a .py file and import that, or use workers=0")


def loaders(train: Any, test: Any, world: World, *, batch_size: int, seed: int = 0, workers: int = 0) -> Any:
    """(training, evaluation) loader of this rank: `batches(epoch, samples_consumed)`, and an iterable, of tensors.

    `batch_size` is global. Every sample is read under a key of its own, so its random choices depend on nothing else.
    """
    if batch_size % world.world_size:
        raise UsageError(f"batch_size={batch_size}: not divisible by {world.world_size} ranks")
    splits = Splits(train=train, test=test)
    check_workers(splits, workers)
    found = sample_loaders(Reading(functools.partial(Splits, *splits), seed=seed), batch_size=batch_size, seed=seed,
                           rank_batch_size=batch_size // world.world_size, workers=workers,
                           prepare_worker=ignore_signals, warn=to_stderr, **world.shard)
    return found["train"], found["test"]


def ddp(model: nn.Module, world: World) -> nn.Module:
    """The network on its device, under DistributedDataParallel where there are other ranks to learn with."""
    return parallelize(model.to(world.device), "none" if world.backend is None else "ddp", world)


@torch.no_grad()
def evaluate(model: nn.Module, test: Any, world: World, *, num_classes: int | None,
             loss: Callable[..., Any] = nn.functional.cross_entropy) -> Evaluation:
    """Loss, accuracy and confusion matrix over every test sample once, on any number of ranks; Stopped if asked to."""
    network, sums = unwrap(model), EvaluationSums(world.device, num_classes=num_classes)
    sync_buffers(network, world)
    network.eval()
    for inputs, targets in test:
        inputs, targets = (map_tensors(lambda tensor: tensor.to(world.device), each) for each in (inputs, targets))
        outputs = apply(network, inputs)
        sums.update(loss(outputs, targets), logits_of(outputs), targets)
    network.train()
    return sums.reduce(world, stop_request())


class Checkpoints:
    """The checkpoints of a loop of one's own: whole or absent, the newest two kept. Rank 0 writes, every rank reads."""

    def __init__(self, folder: str | Path, world: World) -> None:
        self.folder, self.world = Path(folder), world
        if world.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            sweep(self.folder)

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, step: int, epoch: int,
             samples_consumed: int) -> None:
        """Write where the run is, durably; CheckpointError or OSError if that cannot be done."""
        if self.world.is_main:
            write_checkpoint(self.folder, {
                "format": 1, "model": unwrap(model).state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                "epoch": epoch, "samples_consumed": samples_consumed, "scaler": {}, "ema": None, "best": None,
                "history": {"epochs": [], "running": [[0.0, 0.0, 0.0]], "train_seconds": 0.0}, "config": {},
                "fingerprint": {}})
            prune(self.folder, keep=2)

    def resume(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, int, int]:
        """Load the newest that is whole; returns its (step, epoch, samples_consumed), zeros if there is none."""
        damaged, _, state = newest_good(self.folder)
        for path, reason in damaged.items() if self.world.is_main else ():
            to_stderr(f"WARNING checkpoint: {path}: {reason}; using an older one, or none")
        if state is None:
            return 0, 0, 0
        unwrap(model).load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return state["step"], state["epoch"], state["samples_consumed"]
