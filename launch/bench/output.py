"""The files of a benchmark, tried before anything is run, and written after every run."""

import json
from pathlib import Path
from typing import Any

from launch.bench.charts import draw
from launch.bench.table import markdown_page
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


def write_results(results: dict[str, Any], folder: Path) -> None:
    """benchmark.json, whole at any time."""
    replace_file(folder / "benchmark.json", (json.dumps(results, indent=1) + "\n").encode())


def write_pictures(results: dict[str, Any], folder: Path) -> None:
    """benchmark.md and benchmark.png."""
    replace_file(folder / "benchmark.md", markdown_page(results).encode())
    if any(row["samples_per_second"] for row in results["rows"]):
        draw(results, folder / "benchmark.png")
