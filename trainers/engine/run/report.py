"""What a run prints and leaves for people, on rank 0 and untimed: metrics.jsonl, for trackers too, pictures, a bar."""

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from launch.errors import first_line, to_stderr
from launch.stop import Stopped
from trainers.engine.run import pictures
from trainers.engine.run.folder import RunFolder
from trainers.engine.trackers.tracker import TrackerThread

SHARE = 0.05  # of the run's time that drawing may take
LINE_SECONDS = 10.0  # between two plain lines
BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}"  # all of it in 80 columns
CLOSE_SECONDS = {"DONE": 20.0, "PREEMPTED": 5.0, "FAILED": 5.0}  # for all trackers together


class Report:
    """Writes for one run on rank 0; on other ranks every method does nothing."""

    def __init__(self, folder: RunFolder, *, pictures: bool = True, trackers: Sequence[TrackerThread] = ()) -> None:
        self.folder, self.draws, self.trackers = folder, pictures and folder.is_main, trackers if folder.is_main else ()
        self._drawn_at, self._cost_seconds = time.monotonic(), 1.0  # of the first drawing, which imports matplotlib
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
        """Draw curves.png, if `always` or if drawing has not taken more than its share of the time."""
        began = time.monotonic()
        if self.draws and epochs and (always or (began - self._drawn_at) * SHARE >= self._cost_seconds):
            with self.optional("--pictures"):
                png = pictures.curves(epochs, steps_per_epoch=steps_per_epoch, title=self.folder.path.name)
                self.folder.write_bytes("curves.png", png)
            self._drawn_at = time.monotonic()
            self._cost_seconds = self._drawn_at - began

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Tell the trackers how the run ends, and wait for them, but not for long."""
        state = "DONE" if kind is None else "PREEMPTED" if kind is Stopped else "FAILED"
        until = time.monotonic() + CLOSE_SECONDS[state]
        for tracker in self.trackers:
            tracker.close(state, until=until)


class Progress:
    """Steps done, with the latest loss, accuracy and speed; redrawn by time, not at every step."""

    def __init__(self, *, shown: bool, total_steps: int, step: int) -> None:
        self.shown, self.total_steps, self.step, self.figures = shown, total_steps, step, ""
        self._printed_at, on_terminal = time.monotonic(), shown and sys.stderr is not None and sys.stderr.isatty()
        self._bar = tqdm(total=total_steps, initial=step, bar_format=BAR, mininterval=0.5, dynamic_ncols=True,
                         disable=not on_terminal)
        self.close = self._bar.close  # it stays on the screen

    def advance(self) -> None:
        """Count one more step; prints only when it is time to."""
        self.step += 1
        self._bar.update()
        if self.shown and self._bar.disable and time.monotonic() - self._printed_at > LINE_SECONDS:
            self._printed_at = time.monotonic()
            self.line_above(f"step {self.step}/{self.total_steps}{self.figures}")

    def show_figures(self, *, loss: float, accuracy: float | None, samples_per_second: float,
                     seconds_left: float) -> None:
        """Show these beside the number of steps from now on."""
        percent = f"  accuracy {100 * accuracy:.2f} %" if accuracy is not None else ""
        figures = f"loss {loss:.4f}{percent}  {samples_per_second:,.0f} samples/s"
        self.figures = f"  {figures}  ETA {seconds_left:.0f} s"
        self._bar.set_postfix_str(figures, refresh=False)

    def line_above(self, text: str) -> None:
        """Print a line above the bar."""
        if not self._bar.disable:
            with contextlib.suppress(OSError, ValueError):  # a closed stderr must not end a run
                self._bar.write(text, file=sys.stderr)
        elif self.shown:
            to_stderr(text)


def epoch_text(line: dict[str, Any], *, samples_per_second: float) -> str:
    """An epoch's figures in one line, aligned with those of other epochs; blank where there was no evaluation."""
    split = "validation" if "validation_loss" in line else "test"
    parts = [f"{'epoch ' + str(line['epoch']) + ':':<10}train loss {line['train_loss']:7.4f}"]
    names, scale, form = ["train accuracy", f"{split} accuracy"], 100, "{} {:6.2f} %"
    if line["train_accuracy"] is None:
        names, scale, form = [f"{split} loss"], 1, "{} {:10.6f}"
    for name in names:
        value = line[name.replace(" ", "_")]
        text = form.format(name, scale * (value or 0.0))
        parts.append(" " * len(text) if value is None else text)
    return "  ".join([*parts, f"{line['seconds']:7.1f} s", f"{samples_per_second:8,.0f} samples/s"])
