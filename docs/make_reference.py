"""Write the tables of flags of docs/reference.md from the configs; tests/test_docs.py checks that they are up to date.

    python docs/make_reference.py
"""

import ast
import importlib
import inspect
import itertools
import re
import sys
import textwrap
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

if __name__ == "__main__":  # run by path: our packages, not others of the same names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.errors import LARGEST, AtLeast, rules_of
from trainers.augment_flags import AugmentFlags
from trainers.engine.config import TrainConfig
from trainers.engine.schedule import ScheduleFlags

PAGE = Path(__file__).with_name("reference.md")
BEGIN, END = "<!-- flags: written by docs/make_reference.py -->\n", "<!-- end of flags -->\n"
COMMANDS = {
    "trainers/cifar.py": "CifarConfig", "trainers/mnist.py": "MnistConfig",
    "trainers/fashion_mnist.py": "FashionMnistConfig", "trainers/image_folder.py": "ImageFolderConfig",
    "trainers/custom.py": "CustomConfig", "trainers/regression.py": "RegressionConfig",
    "trainers/predict.py": "PredictConfig", "trainers/report.py": "ReportConfig",
    "trainers/split_demo.py": "SplitConfig", "launch/benchmark.py": "BenchmarkConfig",
    "launch/doctor.py": "DoctorConfig",
}


def explanations(config_class: type) -> dict[str, str]:
    """The docstring below each field of one class, on one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body[0].body  # pyright: ignore
    return {field.target.id: " ".join(text.value.value.split()) for field, text in itertools.pairwise(body)
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)}


def values(hint: Any) -> str:
    """What a flag of this type takes: `a|b`, `INT`, `TEXT …`; nothing for one that is on or off."""
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    parts = [part for part in get_args(hint) if part not in (type(None), Ellipsis)]
    if get_origin(hint) is tuple:
        return f"{values(parts[0])} …" if Ellipsis in get_args(hint) else " ".join(map(values, parts))
    if parts:  # a union, or Annotated with its rule
        return values(parts[0])
    return {bool: "", int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}.get(hint, "TEXT")


def shown(value: Any) -> str:
    """A default, as one would type it; nothing for off."""
    if value is None or value == ():
        return ""
    if isinstance(value, bool):
        return "on" if value else ""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def as_typed(name: str, value: Any) -> str:
    """A flag with its value, as on a command line."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {shown(value)}"


def rule_text(rule: AtLeast) -> str:
    """The range of a number, without an end that nobody meets."""
    text = rule.text().removeprefix("must be ")
    return text if rule.most < LARGEST // 1000 or rule.below is not None else re.sub(r" and at most [\d,]+", "", text)


def rows(config_class: type, names: list[str]) -> list[str]:
    """One row of a table for each of these fields."""
    hints, rules = get_type_hints(config_class), dict(rules_of(config_class))
    told: dict[str, str] = {}
    for base in reversed(config_class.__mro__[:-1]):
        told |= explanations(base)
    lines = ["| flag | default | meaning |", "|---|---|---|"]
    for field in fields(config_class):
        if field.name in names:
            default = field.default if field.default is not MISSING else None
            flag = " ".join(filter(None, [f"--{field.name.replace('_', '-')}", values(hints[field.name])]))
            flag = flag.replace("--", "--no-", 1) if default is True else flag
            rule = f" ({rule_text(rules[field.name])})" if field.name in rules else ""
            cells = [f"`{flag}`".replace("|", "\\|"), f"`{shown(default)}`" if shown(default) else "",
                     (told.get(field.name, "") + rule).replace("|", "\\|")]
            lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    return [*lines, ""]


def tables() -> str:
    """All tables: of every trainer, of the image trainers, then each command's own flags and other defaults."""
    hidden = {"given", "in_file"}
    common = [field.name for field in fields(TrainConfig) if field.name not in hidden]
    of_images = [field.name for field in fields(AugmentFlags) if field.name not in [*common, *hidden]]
    text = ["## Flags of every trainer", ""]
    titles = ScheduleFlags.TITLES | TrainConfig.TITLES
    title, groups = "General", dict[str, list[str]]()
    for name in ["", *common]:
        title = titles.get(name, title)
        groups.setdefault(title, []).append(name)
    for title, names in groups.items():
        text += [f"### {title}", "", *rows(TrainConfig, names)] if any(names) else []
    text += ["## Flags of the image trainers", "", *rows(AugmentFlags, [*of_images, "loss"])]
    for path, name in COMMANDS.items():
        module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
        config_class = getattr(module, name)
        base = next(base for base in (AugmentFlags, TrainConfig, object) if issubclass(config_class, base))
        known = {field.name: field.default for field in fields(base)} if base is not object else {}
        own = [field.name for field in fields(config_class) if field.name not in known and field.name not in hidden]
        changed = {field.name: field.default for field in fields(config_class)
                   if field.name in known and field.default != known[field.name]}
        told = explanations(config_class)
        text += [f"## `{path}`", "", *(rows(config_class, [*own, *(name for name in told if name in changed)]))]
        other = ", ".join(f"`{as_typed(key, value)}`" for key, value in changed.items()
                          if key not in told and shown(value))
        text += [f"Other defaults: {other}.", ""] if other else []
        for recipe, settings in getattr(module, "RECIPES", {}).items():
            flags = " ".join(as_typed(key, value) for key, value in settings.items())
            text += [f"- `--recipe {recipe}`: `{flags}`"]
        text += [""] if hasattr(module, "RECIPES") else []
    return "\n".join(text)


def page(old: str) -> str:
    """The page with its tables as they are today."""
    before, _, rest = old.partition(BEGIN)
    return f"{before}{BEGIN}\n{tables()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{PAGE}: {len(re.findall('^[|] `--', PAGE.read_text(), re.MULTILINE))} flags")
