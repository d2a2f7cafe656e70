"""From a config dataclass to flags, checked numbers and --help; from an error to one line and an exit code."""

import argparse
import contextlib
import gc
import inspect
import io
import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NoReturn

import tyro
import yaml

from launch import errors, stop
from launch.errors import UsageError, check_numbers, nearest

HELP_COLUMN = 27  # where the explanations of --help stand
OF_ONE_RUN = ("run_name", "resume", "evaluate")  # all three are in a run's config.json; another run has its own


def parse(config_class: type, *, recipes: Mapping[str, Mapping[str, Any]] | None = None,
          args: Sequence[str] | None = None) -> Any:
    """A config from flags (in hyphens or underscores) over `--config FILE` over `--recipe NAME`, all checked."""
    args, old = list(sys.argv[1:] if args is None else args), getattr(config_class, "OLD_SPELLINGS", {})
    without_value = [following.startswith("-") for following in [*args[1:], "-"]]
    args = [new for word, alone in zip(args, without_value, strict=False)
            for new in (old.get(word.replace("_", "-"), [word]) if alone else [word])]
    default = config_class()
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("recipe", "model", "loss", "config"):
        first.add_argument(f"--{name}", nargs="?")
    given = first.parse_known_args(args)[0]
    file = at_home(Path(given.config)) if given.config is not None and hasattr(default, "config") else None
    flags = read_flags(file, config_class) if file is not None else {}
    if recipes:
        name, model, loss = (getattr(given, flag) or flags.get(flag) for flag in ("recipe", "model", "loss"))
        name = name or default.recipe
        if name not in recipes:
            raise UsageError(f"--recipe {name}: unknown; choose from {', '.join(recipes)}{nearest(name, recipes)}")
        is_its_own = model in (None, recipes[name].get("model", getattr(default, "model", None)))
        left_out = (*(() if is_its_own else default.OF_A_MODEL), *(default.OF_A_LOSS if loss and ":" in loss else ()))
        settings = {flag: value for flag, value in recipes[name].items() if flag not in left_out}
        default = replace(default, **settings, recipe=name)
    if file is not None:
        try:
            default = from_words(config_class, as_words(flags, config_class), default)
        except UsageError as error:
            raise UsageError(f"--config {file}: {error}") from None
    config = from_words(config_class, args, default)
    values = {field.name: at_home(getattr(config, field.name)) for field in fields(config)}
    names = (word.partition("=")[0][2:].replace("-", "_") for word in args if word.startswith("--"))
    stated = {"given": tuple(dict.fromkeys(names)), "in_file": tuple(flags)} if "given" in values else {}
    return replace(config, **{**values, **stated})


def read_flags(path: Path, config_class: type) -> dict[str, Any]:
    """The flags that a file states: a run's config.json, other JSON, or YAML by hand, old spellings translated."""
    kind, read = ("YAML", yaml.safe_load) if path.suffix.lower() in (".yaml", ".yml") else ("JSON", json.loads)
    try:
        stated = read(path.read_text(encoding="utf-8-sig"))  # with or without a mark of Windows
    except OSError as error:
        raise UsageError(f"--config {path}: cannot be read ({error.strerror}); name a JSON or YAML file") from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"--config {path}: is no {kind} ({reason}); write a line `epochs: 5` for each flag in a .yaml "
                         f"file, or use the config.json of a run") from None
    if not isinstance(stated, dict) or not all(isinstance(name, str) for name in stated):
        raise UsageError(f"--config {path}: must map names of flags to values, such as `epochs: 5`")
    flags = {name.removeprefix("--").replace("-", "_"): value for name, value in stated.items()}
    left_out = {"config", *(OF_ONE_RUN if flags.keys() >= set(OF_ONE_RUN) else ())}
    translated = getattr(config_class, "translated", dict)(flags)
    return {name: value for name, value in translated.items() if name not in left_out}


def as_words(flags: Mapping[str, Any], config_class: type) -> list[str]:
    """Flags as a command line gives them, so that one parser checks both; UsageError for what no command line can."""
    words: list[str] = []
    for name, value in flags.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(getattr(config_class, name, None), bool):
            if not isinstance(value, bool):
                raise UsageError(f"{flag} {value}: must be true or false")
            words.append(flag if value else f"--no-{flag[2:]}")
        elif any(isinstance(item, list | dict) for item in (value if isinstance(value, list) else [value])):
            raise UsageError(f"{flag}: must be one value or a list of values")
        elif isinstance(value, list) or not str(value).startswith("-"):
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
        else:
            words.append(f"{flag}={value}")
    return words


def from_words(config_class: type, args: Sequence[str], default: Any) -> Any:
    """tyro's reading of a command line over a config; UsageError with the nearest flag, or SystemExit by --help."""
    printed, complaint = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaint):
            config = tyro.cli(config_class, args=args, default=default, compact_help=False)
    except SystemExit as ended:
        if ended.code not in (0, None):
            raise UsageError(plain_text(complaint.getvalue())) from None
        if errors.launched_rank() == 0:
            width, text = max(60, min(120, shutil.get_terminal_size().columns)), printed.getvalue()
            is_help = not any(word.startswith("--tyro-") for word in args)  # but a script for a shell, as it is
            errors.say((grouped_help(text, config_class, width=width) if is_help else text).rstrip("\n"))
        raise
    check_numbers(config)
    return config


def at_home(value: Any) -> Any:
    """A path, or several, with a leading `~` replaced: a shell leaves it in `--data-dir=~/photos`."""
    if isinstance(value, tuple):
        return tuple(at_home(item) for item in value)
    return Path(os.path.expanduser(value)) if isinstance(value, Path) else value


def grouped_help(text: str, config_class: type, *, width: int) -> str:
    """tyro's --help with each flag under its title, by `TITLES` of the class that had it first; then two examples."""
    text = "\n".join(line.rstrip() for line in text.splitlines() if not re.match(r" \S", line))  # without tyro's titles
    usage, *flags = re.split(r"\n(?=  [^\sa-z])", text)  # a small letter goes on with the choices of a flag
    own = usage.split()[1]  # the path of the command
    titles: dict[str, str] = {}
    for base in reversed(config_class.__mro__):
        title = own
        for name in inspect.get_annotations(base):
            title = base.__dict__.get("TITLES", {}).get(name, title)
            titles.setdefault(name, title)
    order = [title for base in config_class.__mro__ for title in base.__dict__.get("TITLES", {}).values()]
    indent = " " * HELP_COLUMN
    groups: dict[str, list[str]] = {title: [] for title in (own, *order, *titles.values())}
    for flag in flags:
        header, _, explained = re.sub(r"\{None\}\|", "", flag).strip().partition("  ")
        header, _, rest = header.partition("\n")
        explained = re.sub(r" \(default: (None)?\)$", "", " ".join(f"{rest} {explained}".split()))
        body = textwrap.fill(explained, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
        head = f"  {header}"
        names = [name.replace("-", "_") for name in re.findall(r"--([\w-]+)", header)]
        title = next((titles[name] for name in names if name in titles), own)
        groups[title].append((head + body[len(head):] if len(head) < HELP_COLUMN else f"{head}\n{body}").rstrip())
    parts = [f"{title}:\n" + "\n".join(blocks) for title, blocks in groups.items() if blocks]
    examples, docstring = ["Examples:"], (sys.modules[config_class.__module__].__doc__ or "").replace("\\\n", "")
    for command in re.findall(r"^    ((?:python|torchrun) .*)$", docstring, re.MULTILINE)[:2]:
        words, _, purpose = command.partition("  ")
        wrapped = textwrap.wrap(" ".join(words.split()), width - 4, break_on_hyphens=False, subsequent_indent="    ")
        purpose = purpose.strip().removeprefix("#").strip()
        examples += [f"  # {purpose}"] * bool(purpose) + ["  " + " \\\n  ".join(wrapped)]
    return "\n\n".join([*usage.split("\n\n")[:2], *parts, "\n".join(examples)]) + "\n"


def plain_text(boxed: str) -> str:
    """tyro's framed error message on one line: what is wrong, then the nearest flag if it names one."""
    text = re.sub(r"\x1b\[[0-9;]*m|\[/?bold\]|[│╭╮╰╯─]|^ *-+ *$", "", boxed, flags=re.MULTILINE)
    text = re.split(r"(?:Argument|For full) helptext", text.partition("\n")[2])[0]  # below the frame's title
    message, _, suggested = text.partition("Perhaps you meant")
    if flags := re.findall(r"--[^ ,]+", "".join(suggested.split("\n")[1:2])):
        message = f"{message.rstrip()}; did you mean {max(flags, key=len)}?"  # not its short alias
    message = " ".join(message.split())
    return f"{message[:1].lower()}{message[1:]}; see --help"


def run(main: Callable[[Any], Any], config_class: type, *,
        recipes: Mapping[str, Mapping[str, Any]] | None = None, prints_results: bool = False) -> NoReturn:
    """Parse the flags, call `main`, exit: with the code that it returns, 0 for anything else, or that of its error.
    `prints_results`: it is one process, whatever its environment says, and stdout waits for a reader, however slow."""
    gc.freeze()  # what was imported stays, and need not be looked through again: 0.14 s each time
    gc.enable()
    errors.drop_unread_output("stderr", *() if prints_results else ("stdout",))
    os.environ.pop("MPLBACKEND", None)  # every notebook sets it, to what may not be installed here
    code = in_one_line(lambda: main(parse(config_class, recipes=recipes)), is_alone=prints_results)
    sys.exit(code if isinstance(code, int) else 0)


def in_one_line(call: Callable[[], Any], *, is_alone: bool = False) -> Any:
    """What `call` returns; a stop or user's error ends the process: all found it before they met, and rank 0 speaks."""
    try:
        return call()
    except stop.Stopped:
        sys.exit(errors.EXIT_PREEMPTED)
    except Exception as error:
        line = errors.user_line(error)
        if line is None:
            raise
        speaks = getattr(error, "speaks", None)
        if is_alone or (errors.launched_rank() == 0 if speaks is None else speaks):
            errors.report_error(line)
        sys.exit(error.exit_code)  # pyright: ignore[reportAttributeAccessIssue]
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + SIGINT, as a shell reports it
