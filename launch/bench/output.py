"""The files of a benchmark, tried before anything is run, and what is printed."""

import json
import sys
from pathlib import Path
from typing import Any

from launch.bench.charts import draw
from launch.bench.table import markdown_report
from launch.errors import UsageError
from launch.files import replace_file

NAMES = ("benchmark.json", "benchmark.md", "benchmark.png")


def check_output_dir(folder: Path) -> None:
    """Make the folder and try to write there.

    Raises:
        UsageError: if one of the files could not be written later.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in NAMES:
            trial = folder / f".{name}.trial"
            trial.write_bytes(b"")
            trial.unlink()
            if (folder / name).is_dir():
                raise IsADirectoryError(21, f"{name} is a folder")
    except OSError as error:
        raise UsageError(f"--output-dir {folder}: cannot be written ({error.strerror}); choose another") from None


def write_report(report: dict[str, Any], folder: Path) -> None:
    """benchmark.json, whole at any time."""
    replace_file(folder / "benchmark.json", (json.dumps(report, indent=1) + "\n").encode())


def write_pictures(report: dict[str, Any], folder: Path) -> None:
    """benchmark.md and benchmark.png."""
    replace_file(folder / "benchmark.md", markdown_report(report).encode())
    if any(row["samples_per_second"] for row in report["rows"]):
        draw(report, folder / "benchmark.png")


def say(text: str) -> None:
    """Print to stdout."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
