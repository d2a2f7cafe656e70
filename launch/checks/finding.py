"""One line of the doctor's page."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the page."""

    check: str
    state: Literal["OK", "WARN", "FAIL"]
    text: str
    fix: str = ""
    """What to do about it; empty for OK."""
    host: str = ""
    """Where it was found; empty for the machine of rank 0, and for what concerns the job."""


def ok(check: str, text: str) -> Finding:
    """Nothing to do."""
    return Finding(check=check, state="OK", text=text)


def warn(check: str, text: str, fix: str) -> Finding:
    """Works, but slowly, or not for long."""
    return Finding(check=check, state="WARN", text=text, fix=fix)


def warn_if(bad: bool, check: str, text: str, fix: str) -> Finding:
    """One of the two."""
    return warn(check, text, fix) if bad else ok(check, text)


def fail(check: str, text: str, fix: str) -> Finding:
    """Training would not start, or would lose something."""
    return Finding(check=check, state="FAIL", text=text, fix=fix)
