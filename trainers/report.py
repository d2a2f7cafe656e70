"""Runs side by side: one page with all in it, to be opened in a browser or sent, or a table.

    python trainers/report.py runs/first runs/second              # report.html: curves, classes, pictures, differences
    python trainers/report.py --table runs --sort accuracy        # all runs below a folder, one per line; or --csv"""

import base64
import contextlib
import csv
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

if not __package__:  # run by path: our packages, not others of the same names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import jinja2
import tyro
from PIL import Image

from launch.command_line import run
from launch.errors import UsageError, nearest, printable, say
from launch.files import read_lines, read_object, replace_file

FILES = ("config", "environment", "result", "status")
COLUMNS = ("run", "state", "step", "accuracy", "accuracy_top5", "loss", "samples_per_second", "train_seconds",
           "data_wait_share", "world_size", "device", "model", "batch_size", "learning_rate", "seed", "started")
CURVES = ("step", "seconds", "loss", "accuracy", "accuracy_top5")  # what the page draws of a line of metrics.jsonl
MOST_POINTS = 300  # of a curve
PICTURE_SIZE, PICTURES_SIZE, PICTURE_QUALITY = 800, 2000, 60  # pixels of one, of all in a square, and WebP's quality


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Show runs side by side."""
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Run folders, such as runs/*. What one lacks, or holds damaged, is shown as missing."""
    out: Path = Path("report.html")
    """The page, or a folder for it."""
    table: Path | None = None
    """Print a table of all runs below this folder."""
    sort: str = "run"
    """Column of the table to sort by: numbers from the largest, texts from a."""
    csv: bool = False
    """Print the table as CSV."""


def read_run(path: Path) -> dict[str, Any]:
    """The JSON files of a run folder by name, each empty if it is missing or damaged, and the name of the run."""
    return {"name": str(path), **{name: read_object(path / f"{name}.json") or {} for name in FILES}}


def read_curves(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of metrics.jsonl by split, evenly thinned out; without those that are damaged."""
    curves: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    with contextlib.suppress(OSError):
        for _, line in read_lines(path):
            if line["split"] in curves:
                curves[line["split"]].append({name: line.get(name) for name in CURVES})
    return {split: lines[::len(lines) // MOST_POINTS + 1] + lines[-1:] for split, lines in curves.items()}


def read_picture(path: Path, size: int) -> str | None:
    """A picture, made small, as an address that holds it all; None if there is none that can be read."""
    buffer = io.BytesIO()
    try:
        with Image.open(path if path.is_file() else "") as picture:
            picture.thumbnail((size, size))
            picture.convert("RGB").save(buffer, "WEBP", quality=PICTURE_QUALITY)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # what Pillow raises for damaged files
        return None
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def table(folder: Path, *, sort: str, as_csv: bool) -> str:
    """One line for each run below a folder. UsageError for an unknown column."""
    if sort not in COLUMNS:
        raise UsageError(f"--sort {sort}: unknown; choose {', '.join(COLUMNS)}{nearest(sort, COLUMNS)}")
    runs = [read_run(path) for path in sorted({file.parent for name in FILES for file in folder.rglob(f"{name}.json")})]
    rows = [{**run["config"], "loss": None, **run["environment"], **run["result"], **run["status"],
             "run": str(Path(run["name"]).relative_to(folder))} for run in runs]  # the config's loss is a flag
    rows.sort(key=lambda row: order_of(row.get(sort)))
    cells = [[*COLUMNS], *([text_of(row.get(name), exact=as_csv) for name in COLUMNS] for row in rows)]
    if as_csv:
        csv.writer(buffer := io.StringIO(), lineterminator="\n").writerows(cells)
        return buffer.getvalue().rstrip("\n")
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


def order_of(value: Any) -> tuple[int, float, str]:
    """Numbers from the largest, then texts from a, then what is missing."""
    if isinstance(value, int | float) and value == value:  # not NaN
        return 0, -value, ""
    return (1, 0.0, value) if isinstance(value, str) else (2, 0.0, "")


def text_of(value: Any, *, exact: bool) -> str:
    """A value in a table; of a number four digits unless `exact`."""
    if isinstance(value, float) and not exact:
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else printable(str(value))


def main(config: ReportConfig) -> None:
    """Print the table, or write the page and print its path."""
    for path in config.runs if config.table is None else [config.table]:
        if not path.is_dir():
            raise UsageError(f"{path}: no such folder; give run folders, such as runs/NAME")
    if config.table is not None:
        return say(table(config.table, sort=config.sort, as_csv=config.csv))
    if not config.runs:
        raise UsageError("no runs given; name run folders, or use --table runs")
    out = config.out / "report.html" if config.out.is_dir() else config.out
    size = min(PICTURE_SIZE, int(PICTURES_SIZE / len(config.runs) ** 0.5))
    runs = [{**read_run(path), "curves": read_curves(path / "metrics.jsonl"),
             "picture": read_picture(path / "predictions.png", size)} for path in config.runs if path.name != "mlruns"]
    template = jinja2.Environment(autoescape=True).from_string(Path(__file__).with_suffix(".html").read_text("utf-8"))
    page = template.render(runs=runs, data=jinja2.utils.htmlsafe_json_dumps(runs, separators=(",", ":")))
    try:
        replace_file(out, page.encode(errors="replace"))
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written ({error.strerror}); choose another") from None
    say(str(out))


if __name__ == "__main__":
    run(main, ReportConfig)
