"""`--pipeline`: images/s of ways to load and augment, each a process of datasets/pipeline_speed.py, interleaved."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from launch.bench.runs import error_in, rotated
from launch.bench.setups import Hardware
from launch.bench.table import Cells, as_table, write_json
from launch.errors import say, to_stderr
from launch.files import ROOT, replace_file

SCRIPT = ROOT / "datasets" / "pipeline_speed.py"
START_SECONDS = 120  # for torch to be imported and workers to start on a slow disk


def variants(cores: int) -> list[str]:
    """What is compared: without workers, and with one, two, … up to one per core."""
    workers = sorted({0, 1, 2, cores})
    return [*(f"pil:{count}" for count in workers), *(f"v2:{count}" for count in workers), "batch"]


def benchmark_pipeline(output_dir: Path, *, rounds: int, seconds: float, batch_size: int) -> int:
    """Run all, print a table, write pipeline.json and pipeline.md; the exit code."""
    hardware = Hardware.here()
    names, rates, errors = variants(hardware.cores), {}, []
    try:
        for number in range(rounds):
            for name in rotated(names, number):
                rate = images_per_second(name, seconds=seconds, batch_size=batch_size)
                if isinstance(rate, str):
                    errors.append(f"{name}: {rate}")
                else:
                    rates.setdefault(name, []).append(rate)
                shown = rate if isinstance(rate, str) else f"{rate:,.0f} images/s"
                to_stderr(f"round {number + 1} of {rounds}, {name}: {shown}")
    except KeyboardInterrupt:
        to_stderr("stopped: finished runs are kept")
        errors.append("stopped by Ctrl-C")
    rows = [row(name, rates[name]) for name in names if name in rates]
    results = {"format": 1, "batch_size": batch_size, "machine": hardware.record(), "rows": rows, "errors": errors}
    page = (f"# Input pipeline\n\nrandom crop, flip and normalise of 32x32 images, batch {batch_size}, one thread per "
            f"process\n\n{as_table(pipeline_cells(rows))}\n")
    write_json(results, output_dir / "pipeline.json")
    replace_file(output_dir / "pipeline.md", page.encode())
    say(f"\n{page}\nwritten to {output_dir}/pipeline.json, .md")
    return 130 if errors[-1:] == ["stopped by Ctrl-C"] else int(bool(errors))


def images_per_second(name: str, *, seconds: float, batch_size: int) -> float | str:
    """What one process measured, or how it failed."""
    words = [sys.executable, str(SCRIPT), name, "--seconds", str(seconds), "--batch-size", str(batch_size)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=START_SECONDS + 3 * seconds)
        return float(json.loads(done.stdout)["images_per_second"])
    except subprocess.TimeoutExpired:
        return f"still running after {START_SECONDS + 3 * seconds:.0f} s"
    except (ValueError, KeyError):
        return f"exit code {done.returncode}: {error_in(done.stderr)}"


def row(name: str, rates: Sequence[float]) -> dict[str, Any]:
    """Median and spread of one variant."""
    return {"variant": name, "images_per_second": median(rates), "slowest_round": min(rates),
            "fastest_round": max(rates), "rounds": len(rates)}


def pipeline_cells(rows: Sequence[dict[str, Any]]) -> Cells:
    """Header and rows, relative to the first."""
    meaning = {"pil": "PIL transforms, {} workers", "v2": "v2 tensor transforms, {} workers",
               "batch": "whole batch at once (ours)"}
    cells = [["pipeline", "images/s", "min - max", "relative"]]
    for one in rows:
        kind, _, workers = one["variant"].partition(":")
        cells.append([meaning[kind].format(workers), f"{one['images_per_second']:,.0f}",
                      f"{one['slowest_round']:,.0f} - {one['fastest_round']:,.0f}",
                      f"{one['images_per_second'] / rows[0]['images_per_second']:.2f}"])
    return cells
