"""What launch/doctor.py says of one thing that it checked."""

from dataclasses import dataclass, field
from functools import partial
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One line of the page."""
    check: str
    state: Literal["OK", "WARN", "FAIL"] = field(kw_only=True)
    text: str
    fix: str = ""  # what to do about it; empty for OK
    host: str = ""  # where it was found; empty for the machine of rank 0, and for what concerns the job


ok = partial(Finding, state="OK")
warn = partial(Finding, state="WARN")  # works, but slowly, or not for long
fail = partial(Finding, state="FAIL")  # training would not start, or would lose something


def warn_if(bad: bool, check: str, text: str, fix: str) -> Finding:
    """One of the two."""
    return warn(check, text, fix) if bad else ok(check, text)
