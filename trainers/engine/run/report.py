"""What a run leaves for people: lines of metrics.jsonl, which trackers get too, and pictures in the run folder.

On rank 0 only, and outside the timed steps. Drawing is paced: it may take a twentieth of the run's time, so that
short epochs are not slowed by their own picture; the last one is always drawn. Only the lines are needed: of pictures
and trackers the first failure is a warning, others are silent, and the run continues.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launch.errors import first_line, to_stderr
from launch.stop import Stopped
from trainers.engine.metrics import Evaluation
from trainers.engine.run import pictures
from trainers.engine.run.folder import RunFolder
from trainers.engine.trackers.tracker import TrackerThread

FIRST_COST_SECONDS = 1.0  # of the first drawing, which imports matplotlib
SHARE = 0.05  # of the run's time that drawing may take
CLOSE_SECONDS = {"DONE": 20.0, "PREEMPTED": 5.0, "FAILED": 5.0}  # for all trackers together


class Report:
    """Writes for one run on rank 0; on other ranks every method does nothing."""

    def __init__(self, folder: RunFolder, *, pictures: bool = True, trackers: Sequence[TrackerThread] = ()) -> None:
        self.folder, self.draws, self.trackers = folder, pictures and folder.is_main, trackers if folder.is_main else ()
        self._drawn_at, self._cost_seconds = time.monotonic(), FIRST_COST_SECONDS
        self._failed: set[str] = set()

    @contextlib.contextmanager
    def optional(self, what: str) -> Iterator[None]:
        """A part of the report that must not cost the run, however it fails: that is one WARNING."""
        try:
            yield
        except (Exception, Stopped) as error:
            if what not in self._failed:
                to_stderr(f"WARNING {what}: {type(error).__name__}: {first_line(error)}; the run does without")
            self._failed.add(what)

    def line(self, line: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl, and tell the trackers."""
        self.folder.append_metrics(line)
        for tracker in self.trackers:
            tracker.log(line)

    def curves(self, epochs: Sequence[dict[str, Any]], *, steps_per_epoch: int, always: bool = False) -> None:
        """Draw curves.png, if it is time to or `always`."""
        waited = time.monotonic() - self._drawn_at
        if not self.draws or not epochs or not (always or waited * SHARE >= self._cost_seconds):
            return
        began = time.monotonic()
        with self.optional("--pictures"):
            png = pictures.curves(epochs, steps_per_epoch=steps_per_epoch, title=self.folder.path.name)
            self.folder.write_bytes("curves.png", png)
        self._drawn_at = time.monotonic()
        self._cost_seconds = self._drawn_at - began

    def confusion_matrix(self, evaluation: Evaluation, class_names: Sequence[str]) -> None:
        """Draw confusion_matrix.png, where there are classes."""
        if self.draws and evaluation.confusion_matrix is not None and evaluation.accuracy is not None:
            title = f"{100 * evaluation.accuracy:.2f} % of {evaluation.num_samples} test samples"
            with self.optional("--pictures"):
                png = pictures.confusion_matrix(evaluation.confusion_matrix, class_names, title=title)
                self.folder.write_bytes("confusion_matrix.png", png)

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Tell the trackers how the run ends, and wait for them, but not for long."""
        state = "DONE" if kind is None else "PREEMPTED" if kind is Stopped else "FAILED"
        until = time.monotonic() + CLOSE_SECONDS[state]
        for tracker in self.trackers:
            tracker.close(state, until=until)
