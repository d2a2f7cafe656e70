"""What a user can cause: the kinds of errors, their exit codes, how a line is printed, and the ranges of numbers."""

import contextlib
import difflib
import io
import json
import os
import re
import select
import stat
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass, fields
from functools import partial
from typing import Any, TextIO, get_type_hints

PATIENCE_SECONDS = 1.0  # for a reader of stdout or stderr to take what is printed
LARGEST = 2**31 - 1  # of a C int
MOST_SECONDS = LARGEST // 1000  # poll() takes milliseconds as a C int
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: the same command, run again, resumes
# with these a file's name could begin a line of its own, or colour, move or turn round what is printed
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class RunError(Exception):
    """What a user can cause: shown as one line, without a traceback. `exit_code` is what the process returns."""
    kind, exit_code = "run", 1
    speaks: bool | None = None  # whether this rank prints it; None where all ranks find the same, and rank 0 does


class UsageError(RunError):
    """A flag, or a combination of flags, that cannot work."""
    kind, exit_code = "usage", 2


class CheckpointError(RunError):
    """A checkpoint or run folder that cannot be written, read or used."""
    kind, exit_code = "checkpoint", 4


class DeviceError(RunError):
    """A device, backend or environment that is not there."""
    kind, exit_code = "device", 5


class DistributedError(RunError):
    """Ranks that cannot find, or have lost, each other."""
    kind, exit_code = "distributed", 6


class NumericError(RunError):
    """A loss that is no longer a number."""
    kind, exit_code = "numeric", 7


def is_users(error: BaseException) -> bool:
    """Whether a user can cause it, and no bug of ours: datasets/, which does not import this, has such errors too."""
    return hasattr(error, "kind") and hasattr(error, "exit_code")


def user_line(error: BaseException) -> str | None:
    """`ERROR <kind>: <message>` for an error that a user can cause; None for a bug of ours."""
    return f"ERROR {error.kind}: {printable(' '.join(str(error).split()))}" if is_users(error) else None  # pyright: ignore


def printable(text: str, *, keep: str = "") -> str:
    r"""A text whose control characters, and what no encoding knows, are escapes such as \x1b, less those in `keep`."""
    return UNPRINTABLE.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for a mistyped name, or nothing when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def launched_rank() -> int:
    """The rank that torchrun or srun gave this process; 0 when neither did, or what they gave is no number."""
    text = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    return int(text) if text.isdecimal() else 0


def encodable(text: str, stream: TextIO) -> str:
    r"""A text whose letters that the stream's encoding lacks are escapes such as \u732b: stdout would refuse them."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


class PatientFile(io.FileIO):
    """A pipe or terminal whose reader may have stopped reading, or left: what it does not take in time is dropped."""
    _is_full = False

    def write(self, data: Any) -> int:
        """Write what the file has room for, or drop the data."""
        self._is_full = not select.select([], [self], [], 0 if self._is_full else PATIENCE_SECONDS)[1]
        if not self._is_full:
            with contextlib.suppress(OSError):  # else Python would exit with 120, unable to flush at its end
                return super().write(bytes(data[:select.PIPE_BUF]))
        return len(data)


def drop_unread_output(*names: str) -> None:
    """Have no print, of whichever library, wait without end for the reader of stdout or stderr."""
    for name in () if hasattr(sys, "ps1") else names:  # a notebook's %run keeps the cell's
        stream = getattr(sys, name)
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                file = io.BufferedWriter(PatientFile(stream.fileno(), "w", closefd=False))
                setattr(sys, name, io.TextIOWrapper(file, stream.encoding, stream.errors, line_buffering=True))


def to_stderr(line: str) -> None:
    """Write one whole line to stderr, in one write so that ranks sharing a terminal do not mix theirs."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a closed terminal must not hide the exit code
        sys.stderr.write(encodable(f"{printable(line)}\n", sys.stderr))
        sys.stderr.flush()


def report_error(line: str) -> None:
    """Print the line of an error, and leave it where torchrun looks for what to show of a failed rank."""
    to_stderr(line)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        a_second_ago = int(time.time()) - 1  # torchrun shows the earliest, and others may end within this second
        with contextlib.suppress(OSError), open(path, "w") as file:
            json.dump({"message": {"message": line, "extraInfo": {"timestamp": a_second_ago}}}, file)


def say(text: str, *, is_result: bool = False) -> None:
    """Print to stdout, until its reader has gone away; UsageError for a result that has no room, as on a full disk."""
    try:
        print(encodable(printable(text, keep="\n\t"), sys.stdout), flush=True)
    except (OSError, ValueError) as error:
        sys.stdout = open(os.devnull, "w")
        if is_result and isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            raise UsageError(f"stdout: cannot be written ({error.strerror}); send it to another file") from None


@dataclass(frozen=True)
class AtLeast:
    """Numbers from `low` to `most`, without `below` itself. NaN and infinity are in no range."""
    low: float
    _: KW_ONLY
    most: float = LARGEST
    below: float | None = None
    such_as: float | None = None  # a value that works, for the message
    start: str = "at least"

    def text(self) -> str:
        """The rule in words."""
        end = f"at most {self.most:,}" if self.below is None else f"below {self.below}"
        return f"must be {self.start} {self.low:,} and {end}" + (f"; try {self.such_as}" if self.such_as else "")


Above = partial(AtLeast, start="above")  # the same without `low` itself


def check_number(flag: str, number: float, rule: AtLeast) -> None:
    """Hold one number to its rule: `FLAG NUMBER: rule` as a UsageError if it breaks it."""
    starts = rule.low < number if rule.start == "above" else rule.low <= number  # NaN compares false with everything
    if not (starts and number <= rule.most and (rule.below is None or number < rule.below)):
        raise UsageError(f"{flag} {number}: {rule.text()}")


def rules_of(config_class: type) -> Iterator[tuple[str, AtLeast]]:
    """Each field that has a rule, with it."""
    hints = get_type_hints(config_class, include_extras=True)
    for field in fields(config_class):
        notes = getattr(hints[field.name], "__metadata__", ())
        yield from ((field.name, note) for note in notes if isinstance(note, AtLeast))


def check_numbers(config: Any) -> None:
    """Hold the numbers of a config to the rules beside their fields; None is off, and each number of a tuple counts."""
    for name, rule in rules_of(type(config)):
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else () if value is None else (value,):
            check_number(f"--{name.replace('_', '-')}", number, rule)
