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
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import tyro

from launch.errors import EXIT_DONE, EXIT_PREEMPTED, UsageError, launched_rank, to_stderr, user_line
from launch.stop import Stopped


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


def run(main: Callable[[Any], Any], config_class: type, *,
        recipes: Mapping[str, Mapping[str, Any]] | None = None) -> NoReturn:
    """Parse the flags, call `main`, exit: with the code that it returns, 0 for anything else, or that of its error.

    Errors inside `process_group()` are shown there by the one rank that failed first; what reaches this function was
    found before the ranks met, by all of them alike, so rank 0 speaks.
    """
    try:
        code = main(parse(config_class, recipes=recipes))
        sys.exit(code if isinstance(code, int) else EXIT_DONE)
    except Stopped:
        sys.exit(EXIT_PREEMPTED)
    except Exception as error:
        line = user_line(error)
        if line is None:
            raise
        speaks = getattr(error, "speaks", None)
        if launched_rank() == 0 if speaks is None else speaks:
            to_stderr(line)
        sys.exit(error.exit_code)  # pyright: ignore[reportAttributeAccessIssue]
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + SIGINT, as a shell reports it
