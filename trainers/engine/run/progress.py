"""What a run prints: a progress bar on a terminal, plain lines elsewhere; on rank 0 only."""

import contextlib
import sys
import time
from typing import Any

from tqdm import tqdm

from launch.errors import to_stderr

LINE_SECONDS = 10.0  # between two plain lines


class Progress:
    """Steps done, with the latest loss, accuracy and speed; redrawn by time, not at every step."""

    def __init__(self, *, shown: bool, total_steps: int, step: int) -> None:
        self.shown = shown
        self.total_steps, self.step = total_steps, step
        self.figures = ""
        self._printed_at = time.monotonic()
        self._bar = None
        if shown and sys.stderr is not None and sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=step, unit="step", mininterval=0.5, dynamic_ncols=True)

    def advance(self) -> None:
        """Count one more step; prints only when it is time to."""
        self.step += 1
        if self._bar is not None:
            self._bar.update()
        elif self.shown and time.monotonic() - self._printed_at > LINE_SECONDS:
            self._printed_at = time.monotonic()
            self.line_above(f"step {self.step}/{self.total_steps}{self.figures}")

    def show_figures(self, *, loss: float, accuracy: float | None, samples_per_second: float,
                     seconds_left: float) -> None:
        """Show these beside the number of steps from now on."""
        percent = f"  accuracy {100 * accuracy:.2f} %" if accuracy is not None else ""
        self.figures = f"  loss {loss:.4f}{percent}  {samples_per_second:,.0f} samples/s"
        if self._bar is not None:
            self._bar.set_postfix_str(self.figures.strip(), refresh=False)
        else:
            self.figures += f"  ETA {seconds_left:.0f} s"

    def line_above(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            with contextlib.suppress(OSError, ValueError):  # a closed stderr must not end a run
                self._bar.write(text, file=sys.stderr)
        elif self.shown:
            to_stderr(text)

    def close(self) -> None:
        """End the bar, which stays on the screen."""
        if self._bar is not None:
            self._bar.close()


def epoch_text(line: dict[str, Any], *, samples_per_second: float) -> str:
    """An epoch's figures in one line, aligned with those of other epochs; blank where there was no evaluation."""
    split = "validation" if "validation_loss" in line else "test"
    measure = "loss" if line["train_accuracy"] is None else "accuracy"
    parts = [f"{'epoch ' + str(line['epoch']) + ':':<10}train loss {line['train_loss']:7.4f}"]
    for name in [f"{split} loss"] if measure == "loss" else ["train accuracy", f"{split} accuracy"]:
        value = line[name.replace(" ", "_")]
        text = "" if value is None else f"{name} {value:10.6f}" if measure == "loss" else f"{name} {100 * value:6.2f} %"
        parts.append(text.ljust(len(name) + (11 if measure == "loss" else 9)))
    return "  ".join([*parts, f"{line['seconds']:7.1f} s", f"{samples_per_second:8,.0f} samples/s"])
