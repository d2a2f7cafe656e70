"""From a config dataclass to checked flags, and from an error to one line and an exit code.

A trainer ends with

    if __name__ == "__main__":
        run(main, CifarConfig, recipes=RECIPES)

`parse` derives the flags from the dataclass (hyphens or underscores, field docstrings as help) and `run` turns
whatever goes wrong into `ERROR <kind>: <flag or file> <value>: <rule>; <remedy>` on stderr, from one rank.
"""

import contextlib
import difflib
import io
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import tyro

EXIT_DONE = 0
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: the same command, run again, goes on


class RunError(Exception):
    """What a user can cause: shown as one line, without a traceback. `exit_code` is what the process returns."""

    kind = "run"
    exit_code = 1
    reporter: bool | None = None
    """Whether this rank is the one to report it; None where all ranks find the same, and rank 0 speaks."""


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


def one_line(error: Exception) -> str | None:
    """`ERROR <kind>: <message>` for an error that carries a kind and an exit code, else None: it is our bug.

    Any exception with those two attributes counts, so that datasets/ need not import launch/.
    """
    kind = getattr(error, "kind", None)
    if kind is None or not hasattr(error, "exit_code"):
        return None
    return f"ERROR {kind}: {' '.join(str(error).split())}"


def launched_rank() -> int:
    """The rank that torchrun or srun gave this process; 0 when neither did, or what they gave is no number."""
    text = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    return int(text) if text.isdecimal() else 0


def parse(config_class: type, *, recipes: Mapping[str, Mapping[str, Any]] | None = None,
          args: Sequence[str] | None = None) -> Any:
    """A config from command-line flags; `--recipe NAME` first replaces the defaults by those of the recipe.

    Raises:
        UsageError: for flags that do not parse, naming the nearest that exists.
        SystemExit: with code 0, after `--help` was printed (by rank 0 alone).
    """
    args = list(sys.argv[1:] if args is None else args)
    default = config_class()
    if recipes:
        name = recipe_named_in(args, default.recipe)
        if name not in recipes:
            raise UsageError(f"--recipe {name}: unknown; choose from {', '.join(recipes)}{nearest(name, recipes)}")
        default = replace(default, recipe=name, **recipes[name])
    printed, complaint = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaint):
            return tyro.cli(config_class, args=args, default=default, compact_help=False)
    except SystemExit as stop:
        if stop.code in (0, None):
            if launched_rank() == 0:
                sys.stdout.write(printed.getvalue())
            raise
        raise UsageError(plain_text(complaint.getvalue())) from None


def recipe_named_in(args: Sequence[str], default: str) -> str:
    """The value of the last `--recipe NAME` or `--recipe=NAME` among the flags."""
    name = default
    for position, word in enumerate(args):
        if word == "--recipe" and position + 1 < len(args):
            name = args[position + 1]
        elif word.startswith("--recipe="):
            name = word.partition("=")[2]
    return name


def nearest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """`; did you mean X?` for a mistyped name, or nothing when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def plain_text(boxed: str) -> str:
    """tyro's framed error message on one line: what is wrong, then the nearest flag if it names one."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip("│╭╮╰╯ \n") for line in boxed.splitlines()]
    text, in_suggestion = [], False
    for line in lines[1:]:  # the first is the frame's title
        if set(line) <= {"─", "-"}:
            continue
        if line.startswith(("Argument helptext", "For full helptext")):
            break
        if line.startswith("Perhaps you meant"):
            in_suggestion = True
        elif in_suggestion:
            text.append(f"; did you mean {line.split()[0].rstrip(',')}?")
            break
        else:
            text.append(line)
    message = " ".join(text).replace(" ;", ";")
    return f"{message[:1].lower()}{message[1:]}; see --help"


def report(line: str) -> None:
    """Write one whole line to stderr, in one write so that ranks sharing a terminal do not mix theirs."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a closed terminal must not hide the exit code
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def run(main: Callable[[Any], int | None], config_class: type, *,
        recipes: Mapping[str, Mapping[str, Any]] | None = None) -> NoReturn:
    """Parse the flags, call `main`, exit with its code or with that of the error it raised.

    Errors inside `process_group()` are reported there by the one rank that failed first; what reaches this
    function was found before the ranks met, by all of them alike, so rank 0 speaks.
    """
    try:
        sys.exit(main(parse(config_class, recipes=recipes)) or EXIT_DONE)
    except Exception as error:
        line = one_line(error)
        if line is None:
            raise
        reporter = getattr(error, "reporter", None)
        if launched_rank() == 0 if reporter is None else reporter:
            report(line)
        sys.exit(error.exit_code)  # pyright: ignore[reportAttributeAccessIssue]
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + SIGINT, as a shell reports it
