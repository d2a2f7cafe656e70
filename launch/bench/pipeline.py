"""`--pipeline`: images/s of ways to load and augment, each a process of datasets/pipeline_speed.py, interleaved."""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from launch import files, launcher, stop
from launch.bench import runs, table
from launch.errors import UsageError, say, to_stderr

Measure = Callable[[], dict[str, Any]]  # as run_job does: `benchmark` and `error`
SCRIPT = files.ROOT / "datasets" / "pipeline_speed.py"
MEANING = {"pil": "PIL transforms, {} workers", "v2": "v2 tensor transforms, {} workers",
           "batch": "whole batch at once (ours)"}
PACKS = {"a pack, short side 256, quality 90": ["--resize", "256", "--quality", "90"],
         "a raw pack, 256": ["--raw", "256"]}
TRAINED = "2 workers, a trivial network trained"  # the whole loop
TRAINERS_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2147483647"}  # as keep_freed_memory does there
START_SECONDS = 120  # for torch to be imported and workers to start on a slow disk


def variants(cores: int) -> list[str]:
    """What is compared: without workers, and with one, two, … up to one per core."""
    workers = sorted({0, 1, 2, cores})
    return [*(f"pil:{count}" for count in workers), *(f"v2:{count}" for count in workers), "batch"]


def photo_measures(data_dir: Path, folder: Path, *, seconds: float, batch_size: int) -> dict[str, Measure]:
    """What is compared on photographs: one worker from a folder and packs, made in `folder`; two in a whole loop."""
    peers = ["torchvision", *(["timm"] if find_spec("timm") else [])]
    measure = partial(images_per_second, seconds=seconds, batch_size=batch_size)
    measures: dict[str, Measure] = {f"{peer}, a folder": partial(measure, f"{peer}:1", data_dir=data_dir)
                                    for peer in [*peers, "ours"]}
    for number, (name, flags) in enumerate(PACKS.items()):
        to_stderr(f"packing {name}")
        pack = [sys.executable, str(files.ROOT / "datasets" / "pack.py"), "--data-dir", str(data_dir), *flags]
        error, _ = runs.execute([*pack, "--out", str(folder / str(number))], dict(os.environ), float("inf"))
        if error:
            raise UsageError(f"--data-dir {data_dir}: cannot be packed ({error}); correct that first")
        measures[f"ours, {name}"] = partial(measure, "ours:1", data_dir=folder / str(number))
    measures |= {f"{peer}, {TRAINED}": partial(measure, f"{peer}:2+network", data_dir=data_dir) for peer in peers}
    trained = ["--data-dir", str(data_dir), "--model", f"{SCRIPT}:mean_color", "--workers", "2", "--image-size", "224",
               "--random-crop", "0.08", "--shift", "0", "--flip", "random"]
    job = runs.Job(setup=runs.parse_setup("cpu:1"), batch_size=batch_size, scalings=("strong",))
    return {**measures, f"ours, {TRAINED}": partial(runs.run_job, job, "image_folder", trained, steps="10:20",
                                                    timeout_seconds=START_SECONDS + 60 * seconds)}


def images_per_second(name: str, *, seconds: float, batch_size: int, data_dir: Path | None = None) -> dict[str, Any]:
    """What one process measured, or how it failed."""
    words = [sys.executable, str(SCRIPT), name, "--seconds", str(seconds), "--batch-size", str(batch_size),
             *(["--data-dir", str(data_dir)] if data_dir else [])]
    memory = TRAINERS_MEMORY if name.startswith(("ours", "batch")) else {}
    error, printed = runs.execute(words, {**os.environ, **memory}, START_SECONDS + 3 * seconds)
    figures = None if error else {"samples_per_second": json.loads(printed.splitlines()[-1])["images_per_second"]}
    return {"error": error, "benchmark": figures}


def benchmark_pipeline(output_dir: Path, *, rounds: int, seconds: float, batch_size: int, data_dir: Path | None) -> int:
    """Run all, print a table, write pipeline.json and pipeline.md; the exit code."""
    rates: dict[str, dict[int, float]] = {}
    errors = []
    work = (f"random resized crop to 224, flip and normalise of {data_dir} by one worker, where not said otherwise"
            if data_dir else "random crop, flip and normalise of 32x32 images")
    how = {"seconds": seconds, "batch_size": batch_size}
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".packs-") as folder:
        try:
            each: dict[str, Measure] = photo_measures(data_dir, Path(folder), **how) if data_dir else {
                name: partial(images_per_second, name, **how) for name in variants(launcher.usable_cores())}
            for name, result in runs.run_rounds(each, rounds):
                if result["error"]:
                    errors.append(f"{name}: {result['error']}")
                else:
                    rates.setdefault(name, {})[result["round"]] = result["benchmark"]["samples_per_second"]
        except stop.Stopped:
            to_stderr("stopped: finished runs are kept")
            errors.append("stopped")
    rows = [{"variant": name, "images_per_second": median(found.values()), "slowest_round": min(found.values()),
             "fastest_round": max(found.values()), "rounds": len(found)} for name, found in rates.items()]
    results = {"format": 1, "batch_size": batch_size, "machine": runs.this_machine(), "rows": rows, "errors": errors}
    page = (f"# Input pipeline\n\n{work}, batch {batch_size}, one thread per process\n\n"
            f"{table.as_table(pipeline_cells(rates))}\n")
    files.replace_file(output_dir / "pipeline.json", json.dumps(results, indent=1).encode() + b"\n")
    files.replace_file(output_dir / "pipeline.md", page.encode())
    say(f"\n{page}\nwritten to {output_dir}/pipeline.json, .md")
    return 130 if errors[-1:] == ["stopped"] else int(bool(errors))


def pipeline_cells(rates: Mapping[str, Mapping[int, float]]) -> table.Cells:
    """Header and rows, each relative to the first in the same rounds; photographs to timm's, or else torchvision's."""
    peers = {TRAINED in name: name for name in rates if name.startswith(("torchvision", "timm"))}  # the last one stays
    relative = f"x {peers[False].partition(',')[0]}" if False in peers else "relative"
    cells = [["pipeline", "images/s", "min - max", f"{relative} (rounds)"]]
    for name, by_round in rates.items():
        kind, _, workers = name.partition(":")
        base = rates.get(peers.get(TRAINED in name, "") if peers else next(iter(rates)), {})
        ratios = sorted(rate / base[number] for number, rate in by_round.items() if number in base)
        cells.append([MEANING.get(kind, kind).format(workers), f"{median(by_round.values()):,.0f}",
                      f"{min(by_round.values()):,.0f} - {max(by_round.values()):,.0f}",
                      f"{median(ratios):.2f} ({ratios[0]:.2f} - {ratios[-1]:.2f})" if ratios else ""])
    return cells
