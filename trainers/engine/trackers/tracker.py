"""The protocol of experiment trackers, and the thread that each gets: one that fails or hangs costs one WARNING."""

import importlib
import json
import queue
import threading
import time
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

from launch.errors import first_line, to_stderr
from launch.files import read_lines, read_object, replace_file

TrackerName = Literal["wandb", "mlflow", "trackio", "tensorboard"]
START_SECONDS = 5.0  # that training waits for a tracker to start, so that its import is not among the timed steps


class TrackedRun(NamedTuple):
    """A run to follow: its folder, the trainer, all flags, and the id in the tracker if it was followed before."""
    path: Path
    project: str
    config: Mapping[str, Any]
    id: str | None = None


class Tracker(NamedTuple):
    """What `start(TrackedRun)` of each file here returns; an error in a function is told in one WARNING."""
    id: str
    log: Callable[[int, Mapping[str, float]], object]  # a step, and values by names such as train/loss
    finish: Callable[[str], object]  # the process ends, with the run DONE, PREEMPTED or FAILED
    forgets: bool = False  # what it was told, if it cannot finish; the next process tells it again


class TrackerThread:
    """One tracker, at work beside the training loop from the first line on."""

    def __init__(self, name: TrackerName, run: TrackedRun) -> None:
        self.name, self.run, self._state = name, run, "FAILED"
        self._lines: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()  # None is the end
        self._ready, self._warning = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def log(self, line: Mapping[str, Any]) -> None:
        """Hand over a line that metrics.jsonl has already."""
        self._lines.put(line)
        if self._thread.ident is None:
            self._thread.start()
            self._ready.wait(START_SECONDS)

    def close(self, state: str, *, until: float) -> None:
        """Let it finish until then (in time.monotonic), or leave it behind."""
        self._state = state
        self._lines.put(None)
        if self._thread.ident is not None:
            self._thread.join(max(0.0, until - time.monotonic()))
            if self._thread.is_alive():
                self._warn("no answer")

    def _warn(self, reason: str) -> None:
        if self._warning.acquire(blocking=False):  # both threads may have one to say, and the first is enough
            to_stderr(f"WARNING --track {self.name}: {reason}; the run does without")

    def _follow(self) -> None:
        try:
            self._tell_all(self.run.path / "trackers" / f"{self.name}.json")
        except (Exception, SystemExit) as error:  # whatever a package does that is not ours
            self._warn(f"{type(error).__name__}: {first_line(error)}")
        self._ready.set()

    def _tell_all(self, record: Path) -> None:
        """Start the tracker, tell it the lines that it has not had, by the record of runs before, and finish it."""
        record.parent.mkdir(exist_ok=True)
        before = read_object(record) or {"last": {}}
        start = importlib.import_module(f"trainers.engine.trackers.{self.name}").start
        tracker: Tracker = start(self.run._replace(id=before.get("id")))
        last: dict[str, int] = dict(before["last"]) if tracker.id == before.get("id") else {}  # step, by split
        def keep(steps: Mapping[str, int]) -> None:
            replace_file(record, json.dumps({"id": tracker.id, "last": steps}).encode())
        keep(last)
        self._ready.set()
        past = [line for _, line in read_lines(self.run.path / "metrics.jsonl")]
        for line in chain(past, iter(self._lines.get, None)):
            if line["step"] > last.get(line["split"], -1):
                last[line["split"]] = line["step"]
                if not tracker.forgets:
                    keep(last)  # before it is told: never twice
                tracker.log(line["step"], values_of(line))
        tracker.finish(self._state)
        keep(last)


def values_of(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl, by names such as `train/loss` and `gradient_norm/conv1`."""
    left_out = {"step", "epoch", "seconds"} | (set() if line["split"] == "train" else {"learning_rate"})
    values: dict[str, float] = {f"{line['split']}/{name}": value for name, value in line.items()
                                if isinstance(value, int | float) and name not in left_out}
    return values | {f"gradient_norm/{name}": norm for name, norm in line.get("gradient_norms", {}).items()}
