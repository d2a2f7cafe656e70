"""`--pipeline`: images/s of ways to load and augment, each a process of datasets/pipeline_speed.py, interleaved."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from launch.bench.runs import Job, error_in, parse_setup, rotated, run_job, this_machine
from launch.bench.table import Cells, as_table
from launch.errors import UsageError, say, to_stderr
from launch.files import ROOT, replace_file
from launch.launcher import usable_cores

Measure = Callable[..., "float | str"]  # of seconds: images/s, or how it failed

SCRIPT = ROOT / "datasets" / "pipeline_speed.py"
TRAINED = "2 workers, a trivial network trained"  # the whole loop
TRAINERS_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2147483647"}  # as keep_freed_memory does there
START_SECONDS = 120  # for torch to be imported and workers to start on a slow disk


def variants(cores: int) -> list[str]:
    """What is compared: without workers, and with one, two, … up to one per core."""
    workers = sorted({0, 1, 2, cores})
    return [*(f"pil:{count}" for count in workers), *(f"v2:{count}" for count in workers), "batch"]


def photo_variants(data_dir: Path, folder: Path, batch_size: int) -> dict[str, Measure]:
    """What is compared on photographs: one worker from a folder and packs, made in `folder`; two in a whole loop."""
    peers = ["torchvision", *(["timm"] if find_spec("timm") else [])]
    packs = {"a pack, short side 256, quality 90": ["--resize", "256", "--quality", "90"],
             "a raw pack, 256": ["--raw", "256"]}
    measure = partial(images_per_second, batch_size=batch_size)
    measures: dict[str, Measure] = {f"{peer}, a folder": partial(measure, f"{peer}:1", data_dir=data_dir)
                                    for peer in [*peers, "ours"]}
    for number, (name, flags) in enumerate(packs.items()):
        to_stderr(f"packing {name}")
        words = [sys.executable, str(ROOT / "datasets" / "pack.py"), "--data-dir", str(data_dir), *flags]
        done = subprocess.run([*words, "--out", str(folder / str(number))], capture_output=True, text=True)
        if done.returncode:
            raise UsageError(f"--data-dir {data_dir}: cannot be packed ({error_in(done.stderr)}); correct that first")
        measures[f"ours, {name}"] = partial(measure, "ours:1", data_dir=folder / str(number))
    measures |= {f"{peer}, {TRAINED}": partial(measure, f"{peer}:2+network", data_dir=data_dir) for peer in peers}
    return {**measures, f"ours, {TRAINED}": partial(trained_per_second, data_dir, batch_size)}


def trained_per_second(data_dir: Path, batch_size: int, *, seconds: float) -> float | str:
    """What the whole trainer does with two workers and a network that costs nothing, or how it failed."""
    flags = ["--data-dir", str(data_dir), "--model", f"{SCRIPT}:MeanColor", "--workers", "2", "--image-size", "224",
             "--random-crop", "0.08", "--shift", "0", "--flip", "random"]
    job = Job(setup=parse_setup("cpu:1"), batch_size=batch_size, scalings=("strong",))
    done = run_job(job, "image_folder", flags, steps="10:20", timeout_seconds=START_SECONDS + 60 * seconds)
    return done["error"] or float(done["benchmark"]["samples_per_second"])


def benchmark_pipeline(output_dir: Path, *, rounds: int, seconds: float, batch_size: int, data_dir: Path | None) -> int:
    """Run all, print a table, write pipeline.json and pipeline.md; the exit code."""
    rates: dict[str, dict[int, float]] = {}
    errors = []
    work = (f"random resized crop to 224, flip and normalise of {data_dir} by one worker, where not said otherwise"
            if data_dir else "random crop, flip and normalise of 32x32 images")
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".packs-") as folder:
        each: dict[str, Measure] = photo_variants(data_dir, Path(folder), batch_size) if data_dir else {
            name: partial(images_per_second, name, batch_size=batch_size) for name in variants(usable_cores())}
        try:
            turns = [(number, name) for number in range(rounds) for name in rotated(list(each), number)]
            for number, name in turns:
                rate = each[name](seconds=seconds)
                shown = rate if isinstance(rate, str) else f"{rate:,.0f} images/s"
                to_stderr(f"round {number + 1} of {rounds}, {name}: {shown}")
                if isinstance(rate, str):
                    errors.append(f"{name}: {rate}")
                else:
                    rates.setdefault(name, {})[number] = rate
        except KeyboardInterrupt:
            to_stderr("stopped: finished runs are kept")
            errors.append("stopped by Ctrl-C")
    rows = [row(name, list(rates[name].values())) for name in each if name in rates]
    results = {"format": 1, "batch_size": batch_size, "machine": this_machine(), "rows": rows, "errors": errors}
    cells = [[*left, *right] for left, right in zip(pipeline_cells(rows), peer_cells(rates), strict=True)]
    page = f"# Input pipeline\n\n{work}, batch {batch_size}, one thread per process\n\n{as_table(cells)}\n"
    replace_file(output_dir / "pipeline.json", json.dumps(results, indent=1).encode() + b"\n")
    replace_file(output_dir / "pipeline.md", page.encode())
    say(f"\n{page}\nwritten to {output_dir}/pipeline.json, .md")
    return 130 if errors[-1:] == ["stopped by Ctrl-C"] else int(bool(errors))


def images_per_second(name: str, *, seconds: float, batch_size: int, data_dir: Path | None = None) -> float | str:
    """What one process measured, or how it failed."""
    words = [sys.executable, str(SCRIPT), name, "--seconds", str(seconds), "--batch-size", str(batch_size),
             *(["--data-dir", str(data_dir)] if data_dir else [])]
    ours = {**os.environ, **TRAINERS_MEMORY} if name.startswith(("ours", "batch")) else None
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=START_SECONDS + 3 * seconds, env=ours)
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
    meaning: dict[str, str] = {"pil": "PIL transforms, {} workers", "v2": "v2 tensor transforms, {} workers",
               "batch": "whole batch at once (ours)"}
    cells = [["pipeline", "images/s", "min - max", "relative"]]
    for one in rows:
        kind, _, workers = one["variant"].partition(":")
        cells.append([(meaning.get(kind) or kind).format(workers), f"{one['images_per_second']:,.0f}",
                      f"{one['slowest_round']:,.0f} - {one['fastest_round']:,.0f}",
                      f"{one['images_per_second'] / rows[0]['images_per_second']:.2f}"])
    return cells


def peer_cells(rates: Mapping[str, Mapping[int, float]]) -> Cells:
    """Header and rows of what each is to timm's loader, or else torchvision's, in the same work and the same rounds."""
    peers = {TRAINED in name: name for name in rates if name.startswith(("torchvision", "timm"))}  # the last one stays
    cells = [[f"x {name.partition(',')[0]} (rounds)" for name in list(peers.values())[:1]]]
    for name, by_round in rates.items():
        base = rates.get(peers.get(TRAINED in name, ""), {})
        ratios = sorted(rate / base[number] for number, rate in by_round.items() if number in base)
        cells.append([f"{median(ratios):.2f} ({ratios[0]:.2f} - {ratios[-1]:.2f})" if ratios else ""] * bool(peers))
    return cells
