"""What a run leaves for people: lines of metrics.jsonl, TensorBoard events, and pictures in the run folder.

On rank 0 only, and outside the timed steps. Drawing is paced: it may take a twentieth of the run's time, so that
short epochs are not slowed by their own picture; the last one is always drawn. Only the lines are needed: of pictures
and events the first failure is a warning, others are silent, and the run continues.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launch.errors import first_line, to_stderr
from launch.stop import Stopped
from trainers.engine.metrics import Evaluation
from trainers.engine.run import pictures
from trainers.engine.run.folder import RunFolder

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FIRST_COST_SECONDS = 1.0  # of the first drawing, which imports matplotlib
SHARE = 0.05  # of the run's time that drawing may take
SCALARS = ("loss", "accuracy", "accuracy_top5", "learning_rate", "samples_per_second")


class Report:
    """Writes for one run on rank 0; on other ranks every method does nothing."""

    def __init__(self, folder: RunFolder, *, pictures: bool = True, tensorboard: bool = False) -> None:
        self.folder, self.draws, self.tensorboard = folder, pictures and folder.is_main, tensorboard and folder.is_main
        self._writer: SummaryWriter | None = None
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
        """Add a line to metrics.jsonl, and its numbers to TensorBoard."""
        self.folder.append_metrics(line)
        if self.tensorboard and "--tensorboard" not in self._failed:
            with self.optional("--tensorboard"):
                self._add_events(line)

    def _add_events(self, line: Mapping[str, Any]) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            threading.excepthook = without_tensorboards(threading.excepthook)
            self._writer = SummaryWriter(str(self.folder.path / "tensorboard"), flush_secs=10,
                                         purge_step=line["step"])  # hides what a killed run wrote from there on
        for name in SCALARS:
            if line.get(name) is not None and not (name == "learning_rate" and line["split"] != "train"):
                self._writer.add_scalar(f"{line['split']}/{name}", line[name], line["step"])
        for name, norm in line.get("gradient_norms", {}).items():
            self._writer.add_scalar(f"gradient_norm/{name}", norm, line["step"])

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

    def close(self) -> None:
        """Finish the event file."""
        if self._writer is not None:
            with self.optional("--tensorboard"):
                self._writer.close()


def without_tensorboards(show: Callable[[threading.ExceptHookArgs], object]) -> Callable[..., object]:
    """What shows the errors of threads, less those of TensorBoard's: its next event raises them again."""
    return lambda error: type(error.thread).__module__.startswith("tensorboard") or show(error)
