"""What a run has behind it, for its checkpoints: per-epoch figures, best evaluation, training time; and its data."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from launch.errors import CheckpointError, to_stderr
from launch.process_group import World, from_main
from trainers.engine import once_per_node, parallel
from trainers.engine.metrics import BestName, Evaluation, score

MOST_WAIT = 0.2  # share of training that may pass in waits for data without a warning
FEW_SECONDS = 1.0  # of waiting, which nobody minds


@dataclass
class History:
    """Empty at the start, or as a checkpoint left it. The same on every rank, but for the seconds."""
    epochs: list[dict[str, Any]] = field(default_factory=list)  # of each: step, seconds, loss and accuracy by split
    best: dict[str, Any] | None = None  # accuracy, accuracy_top5, loss and step of the best evaluation
    train_seconds: float = 0.0  # of all steps: no evaluation, checkpoint or report is in it
    warm_up_seconds: float = 0.0  # of this process, before its first step: compilation, choice of kernels
    data_wait_seconds: float = 0.0  # of the steps, what this rank has waited for data
    data_wait_share: float | None = None  # of the rank that has waited longest, after an epoch
    samples_here: int = 0  # over all ranks, that this process has taken part in training on
    has_warned: bool = False  # of waits for data
    running_since: float = 0.0
    lap: tuple[int, float] = (0, 0.0)  # samples and seconds at the last report

    def start_clock(self) -> None:
        """Steps begin."""
        self.running_since = time.perf_counter()

    def end_warm_up(self, device: torch.device) -> None:
        """What has passed was no step; the clock runs from now."""
        parallel.synchronize(device)
        self.warm_up_seconds = time.perf_counter() - self.running_since
        self.start_clock()

    def pause_clock(self, device: torch.device) -> None:
        """Wait for the device and add what has passed; the clock runs on from now."""
        parallel.synchronize(device)
        self.train_seconds += time.perf_counter() - self.running_since
        self.start_clock()

    def lap_samples_per_second(self) -> float:
        """The speed since this was last asked for."""
        samples, seconds = self.lap
        self.lap = (self.samples_here, self.train_seconds)
        return (self.samples_here - samples) / max(self.train_seconds - seconds, 1e-9)

    def has_recorded(self, step: int) -> bool:
        """Whether the epoch that ends at this step, complete or cut short, is recorded."""
        return bool(self.epochs) and self.epochs[-1]["step"] == step

    def record(self, *, epoch: int, step: int, train_loss: float, train_accuracy: float | None,
               evaluation: Evaluation | None, split: str = "test", by: BestName = "accuracy") -> bool:
        """Add the line of an epoch, evaluated on a split; returns whether that is the best so far, by such a figure."""
        figures = evaluation.summary() if evaluation is not None else {}
        self.epochs.append({
            "epoch": epoch, "step": step, "train_loss": train_loss, "train_accuracy": train_accuracy,
            **{f"{split}_{name}": figures.get(name) for name in ("loss", "accuracy", "accuracy_top5")},
            "seconds": self.train_seconds})
        is_best = evaluation is not None and (self.best is None or score(figures, by) > score(self.best, by))
        if is_best:
            self.best = {**figures, "step": step}
        return is_best

    def evaluations_since_best(self, split: str) -> int:
        """How many evaluations have followed the best one."""
        best = self.best["step"] if self.best is not None else 0
        return sum(line["step"] > best and line.get(f"{split}_loss") is not None for line in self.epochs)

    def record_wait(self, seconds: float, remedy: str) -> str | None:
        """Keep what the slowest rank has waited; returns a warning, once, if there is a remedy for that much."""
        self.data_wait_share = share = seconds / self.train_seconds
        if not remedy or share <= MOST_WAIT or seconds < FEW_SECONDS or self.has_warned:
            return None
        self.has_warned = True
        return f"WARNING data: training has waited for data for {100 * share:.0f} % of its time; {remedy}"

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, beside the best."""
        return {name: getattr(self, name) for name in ("epochs", "train_seconds", "data_wait_seconds")}

    def load_state(self, state: Mapping[str, Any], *, best: dict[str, Any] | None) -> None:
        """Resume from a checkpoint."""
        self.epochs, self.best, self.train_seconds = state["epochs"], best, state["train_seconds"]
        self.data_wait_seconds = state.get("data_wait_seconds", 0.0)
        self.lap = (0, self.train_seconds)


class DataRecord:
    """What checkpoints record of a training set, None or with a `fingerprint()`: the names of classes and, of files,
    `sizes_and_times()`. That may take minutes: rank 0 looks in a thread; a resumed run compares, then saves."""

    def __init__(self, world: World, dataset: Any, class_names: tuple[str, ...] = ()) -> None:
        self.world, self.dataset, self.class_names = world, dataset, class_names
        self.has_files = hasattr(dataset, "sizes_and_times")  # whose fingerprint is None until they were looked at
        self.fingerprint: str | None = None if dataset is None or self.has_files else dataset.fingerprint()
        self._files, self._text = dict[str, list[int]](), "{}"
        self._before: tuple[Mapping[str, Any], Path] | None = None
        self._looking = once_per_node.in_thread(self._look) if self.has_files and world.is_main else iter(())
        next(self._looking, None)  # starts it

    def _look(self) -> None:
        self.dataset.sizes_and_times(self._files)
        self._text, self.fingerprint = json.dumps(self._files), self.dataset.fingerprint(self._files)

    def state(self) -> dict[str, Any]:
        """The part of a checkpoint; both entries are optional when read."""
        return {"class_names": list(self.class_names), "files": self._text}

    def expect(self, state: Mapping[str, Any], source: Path) -> None:
        """Remember a checkpoint for `settle`; raises CheckpointError if its classes have other names."""
        self._before = state, source
        if (was := saved_class_names(state)) not in ((), self.class_names):
            raise self._refused(f"its classes have other names ({', '.join(sorted({*was} ^ {*self.class_names})[:5])})")

    def settle(self) -> None:
        """Before the first save: CheckpointError if a file is new, gone or of another size. A collective."""
        if self.has_files:
            self.has_files = False
            from_main(self.world, self._compare)

    def _compare(self) -> None:
        for step in self._looking:
            if step is not once_per_node.STILL:  # else a file system hangs, and the watchdog is to say so
                self.world.watchdog.mark("data")
        if self._before is None:
            return
        state = self._before[0]
        try:  # the size and time of each file; none in a checkpoint of before they were recorded
            was = {name: [int(size), int(time)] for name, (size, time) in json.loads(state.get("files", "{}")).items()}
        except (ValueError, TypeError, AttributeError):
            was = {}
        for name in sorted({*was, *self._files}) if was else ():
            before, now = (files.get(name, ["absent"])[0] for files in (was, self._files))
            if before != now:  # -1 of one that cannot be read
                raise self._refused(f"{self.dataset.folder / name}: its size was {before} and is {now}")
        if (digest := state["fingerprint"].get("dataset")) != self.fingerprint:
            raise self._refused(f"dataset was {digest} and is {self.fingerprint}")
        if touched := [name for name, seen in self._files.items() if was and was[name] != seen]:
            to_stderr(f"WARNING data: {self.dataset.folder / touched[0]}: written since the checkpoint, the first of "
                      f"{len(touched):,}, all of the sizes that they had; if they are no copies, start another run")

    def _refused(self, difference: str) -> CheckpointError:
        assert self._before is not None
        return CheckpointError(f"{self._before[1]}: does not fit this run: {difference}; use the data it was made "
                               f"with, or another --run-name")


def saved_class_names(state: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes in a checkpoint; none in one of before they were recorded."""
    return tuple(map(str, state.get("class_names") or ()))
