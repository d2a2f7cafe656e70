"""Recipes: the named sets of flags of `--recipe NAME`, one YAML file for each trainer."""

from pathlib import Path
from typing import Any

import yaml


def read(trainer: str) -> dict[str, dict[str, Any]]:
    """A trainer's recipes, the default first, each its flags by name. What begins with a dot only lends to others."""
    stated = yaml.safe_load(Path(__file__).with_name(f"{trainer}.yaml").read_text("utf-8"))
    return {name: {flag: tuple(value) if isinstance(value, list) else value for flag, value in flags.items()}
            for name, flags in stated.items() if not name.startswith(".")}
