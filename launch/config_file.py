"""Flags from a file: JSON as a run's config.json is written, or YAML by hand."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from launch.errors import UsageError

OF_ONE_RUN = ("run_name", "resume", "evaluate")  # all three are in a run's config.json; another run has its own


def read_flags(path: Path, config_class: type) -> dict[str, Any]:
    """The flags that a file states, by name, old spellings translated.

    What made a run unique (its name, `--resume`, `--evaluate`) is left out of a config.json that a run wrote, and
    `config` always.

    Raises:
        UsageError: if the file cannot be read, or does not map names of flags to values.
    """
    is_yaml = path.suffix.lower() in (".yaml", ".yml")
    try:
        text = path.read_text(encoding="utf-8")
        stated = yaml.safe_load(text) if is_yaml else json.loads(text)
    except OSError as error:
        raise UsageError(f"--config {path}: cannot be read ({error.strerror}); name a JSON or YAML file") from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        kind, reason = "YAML" if is_yaml else "JSON", " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"--config {path}: is no {kind} ({reason}); write a line `epochs: 5` for each flag in a "
                         f".yaml file, or use the config.json of a run") from None
    if not isinstance(stated, dict) or not all(isinstance(name, str) for name in stated):
        raise UsageError(f"--config {path}: must map names of flags to values, such as `epochs: 5`")
    flags = {name.removeprefix("--").replace("-", "_"): value for name, value in stated.items()}
    translated = getattr(config_class, "translated", dict)
    left_out = {"config", *(OF_ONE_RUN if flags.keys() >= set(OF_ONE_RUN) else ())}
    return {name: value for name, value in translated(flags).items() if name not in left_out}


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
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
        else:
            words += [f"{flag}={value}"] if str(value).startswith("-") else [flag, str(value)]
    return words
