"""How fast the trainer is beside hand-written peers: `python tests/performance/run.py [--rows 2,6,7,11] [--rounds 5]`.

Every side of a row is a process (or a torchrun) of its own with one thread per rank and a fixed number of steps. All
sides run once per round, in rotating order, and a row's figure is the median over rounds of the ratio within a round.
Prints a Markdown table. Nothing is asserted: a shared machine's timings are a report, not a test.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy  # noqa: E402  path set first
import torch  # noqa: E402

from datasets.keyed_random import Purpose  # noqa: E402
from datasets.samples import generators_kept, seed_sample  # noqa: E402
from launch.bench.runs import environment, parse_setup, plan, rotated, run_job  # noqa: E402
from launch.bench.table import as_table  # noqa: E402

HERE = ROOT / "tests" / "performance"
BLITZ = "--recipe blitz --dataset synthetic --learning-rate 0.01"
LIMIT_SECONDS = 900
Side = Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: what runs by turns, and the figure that these give."""

    what: str
    goal: str
    sides: Mapping[str, Side]
    figure: Callable[[Mapping[str, float]], float]


def trainer(flags: str, *, batch: int, steps: int, setup: str = "cpu:1", name: str = "cifar") -> float:
    """Samples per second of the whole loop of one of trainers/."""
    job = plan([parse_setup(setup)], batch_size=batch, rank_batch_size=batch, scaling="strong")[0]
    done = run_job(job, name, flags.split(), steps=f"{max(5, steps // 5)}:{steps}", timeout_seconds=LIMIT_SECONDS)
    if done["error"]:
        raise RuntimeError(f"{flags}: {done['error']}")
    return float(done["benchmark"]["samples_per_second"])


def output_of(words: list[str], ranks: int = 1) -> str:
    """The last line that a command, under torchrun where it has several ranks, prints."""
    setup = parse_setup(f"cpu:{ranks}")
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if setup.launched else []
    done = subprocess.run([sys.executable, *torchrun, *words], env=environment(setup), capture_output=True, text=True,
                          timeout=LIMIT_SECONDS)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout.splitlines()[-1]


def peer(name: str, *, ranks: int = 1, **options: Any) -> float:
    """Samples per second of one of peers.py."""
    words = [str(HERE / "peers.py"), name, *(f"{key}={value}" for key, value in options.items())]
    return float(json.loads(output_of(words, ranks))["samples_per_second"])


def pipeline(variant: str) -> float:
    """Images per second of a way to load and augment."""
    words = [str(ROOT / "datasets" / "pipeline_speed.py"), variant, "--seconds", "2"]
    return float(json.loads(output_of(words))["images_per_second"])


def seconds_to_first_step() -> float:
    """From `python` to the end of the first step."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.time()
        words = [str(HERE / "special.py"), "first", "cifar", *BLITZ.split(), "--threads", "1", "--output-dir", folder]
        return float(output_of(words)) - began


def seconds_to_import() -> float:
    """From `python` to torch and torchvision."""
    began = time.time()
    return float(output_of(["-c", "import torch, torchvision, time; print(time.time())"])) - began


def microseconds_of_keys(batch: int, repeats: int = 2000) -> float:
    """What it costs a sample that its generators begin where it does, and draw, in batches of so many."""
    began = time.perf_counter()
    for _ in range(repeats):
        with generators_kept():
            for sample in range(batch):
                seed_sample(0, 0, Purpose.TRAIN_SAMPLE, sample)
                _ = torch.rand(()), random.random(), numpy.random.random()
    return 1e6 * (time.perf_counter() - began) / (repeats * batch)


def over_best(figures: Mapping[str, float]) -> float:
    """Ours over the best of the others."""
    return figures["ours"] / max(value for name, value in figures.items() if name != "ours")


def step_ratio(figures: Mapping[str, float]) -> float:
    """The time of our step over that of the other's."""
    return figures["bare"] / figures["ours"]


def time_ratio(epochs: int, theirs: int) -> Callable[[Mapping[str, float]], float]:
    """The time of so many epochs of ours over that of so many of the tutorial's, on as many samples."""
    return lambda rates: (epochs / rates["ours"]) / (theirs / rates["tutorial"])


def usual_peers(**options: Any) -> dict[str, Side]:
    """Plain DDP, Lightning Fabric and accelerate, those that are installed, by number of workers."""
    packages = {"ddp": "torch", "fabric": "lightning", "accelerate": "accelerate"}
    kinds = [kind for kind, package in packages.items() if find_spec(package)]
    return {f"{kind}, {workers} workers": partial(peer, kind, ranks=2, workers=workers, **options)
            for kind in kinds for workers in (0, 1, 2)}


def two_to_one(model: str, goal: str, *, batch: int, steps: int, flags: str, options: str = "") -> Row:
    """Two ranks against one at the same global batch."""
    sides = {name: partial(trainer, flags, batch=batch, steps=steps, setup=f"cpu:{ranks}{options}")
             for name, ranks in (("ours", 2), ("one rank", 1))}
    return Row(what=f"2 ranks against 1, {model} at {batch}", goal=goal, sides=sides, figure=over_best)


def bf16(model: str) -> Row:
    """bf16 with channels last against fp32."""
    flags = f"{BLITZ} --onednn --model {model}"
    return Row(what=f"bf16 + channels_last against fp32, {model}", goal=">= 2.8",
               sides={"ours": partial(trainer, flags, batch=128, steps=10, setup="cpu:1+bf16+channels-last"),
                      "fp32": partial(trainer, flags, batch=128, steps=10)}, figure=over_best)


def against_bare(what: str, goal: str, flags: str, *, batch: int, steps: int, **options: Any) -> Row:
    """The trainer's step against that of a bare loop."""
    return Row(what=what, goal=goal, figure=step_ratio, sides={
        "ours": partial(trainer, flags, batch=batch, steps=steps),
        "bare": partial(peer, "bare", batch=batch, steps=steps, **options)})


def all_rows() -> dict[str, list[Row]]:
    """By number."""
    fast, both = "--recipe fast --dataset synthetic", "cpu:2+bf16+channels-last"
    resnet = f"{BLITZ} --onednn --model resnet18"
    return {
        "1": [Row(what="blitz at batch 4 against the tutorial's loop", goal=">= 3.3", figure=over_best, sides={
            "ours": partial(trainer, BLITZ, batch=4, steps=4000), "tutorial": partial(peer, "tutorial", steps=1500)})],
        "2": [Row(what="net at 128, 2 ranks, against plain DDP and others", goal=">= 2.5", figure=over_best, sides={
            "ours": partial(trainer, f"{BLITZ} --onednn", batch=128, steps=300, setup="cpu:2"),
            **usual_peers(batch=128, steps=60)})],
        "3": [Row(what=f"resnet18 at 128, {ranks} rank{'s' * (ranks > 1)}, against {name}", goal=">= 1.0",
                  figure=over_best, sides={
                      "ours": partial(trainer, resnet, batch=128, steps=6, setup=f"cpu:{ranks}"), name: other})
              for ranks, name, other in (
                  (1, "a bare loop", partial(peer, "bare", batch=128, steps=6, model="resnet18")),
                  (2, "plain DDP", partial(peer, "ddp", ranks=2, batch=128, steps=6, model="resnet18")))],
        "4": [bf16("resnet18"), bf16("resnet9")],
        "5": [two_to_one("resnet18", ">= 1.9", batch=128, steps=6, flags=resnet),
              two_to_one("resnet9", ">= 1.9", batch=128, steps=6, flags=resnet.replace("resnet18", "resnet9")),
              two_to_one("fast", ">= 1.9", batch=1024, steps=8, flags=fast, options="+bf16+channels-last"),
              two_to_one("net", ">= 1.5", batch=128, steps=300, flags=f"{BLITZ} --onednn")],
        "6": [against_bare("step against a bare loop, batch 128", "<= 1.02", f"{BLITZ} --onednn", batch=128, steps=300),
              against_bare("step against a bare loop, batch 4", "<= 1.06", BLITZ, batch=4, steps=4000, onednn=0)],
        "7": [Row(what="whole-batch augmentation against PIL in a DataLoader", goal=">= 25", figure=over_best,
                  sides={"ours": partial(pipeline, "batch"), "pil": partial(pipeline, "pil:0")})],
        **{number: [Row(what=f"CIFAR-10: {epochs} epochs of fast{flags}, 2 ranks, over the tutorial's 2 on 2 cores",
                        goal=goal, figure=time_ratio(epochs, 2), sides={
                            "ours": partial(trainer, fast + flags, batch=1024, steps=8, setup=both),
                            "tutorial": partial(peer, "tutorial", steps=3000, threads=2)})]
           for number, epochs, flags, goal in (("8", 5, "", "<= 3.5"), ("9", 4, " --width 32", "<= 1.0"))},
        "10": [Row(what="MNIST: 3 epochs of fast, 2 ranks, over the tutorial's 5", goal="<= 0.7",
                   figure=time_ratio(3, 5), sides={
                       "ours": partial(trainer, fast, name="mnist", batch=512, steps=100, setup=both),
                       "tutorial": partial(peer, "mnist", steps=200)})],
        "11": [Row(what="seconds to the first step, beyond `import torch, torchvision`", goal="<= 1.0",
                   figure=lambda seconds: seconds["ours"] - seconds["imports"],
                   sides={"ours": seconds_to_first_step, "imports": seconds_to_import})],
        "keys": [Row(what="microseconds a sample for generators keyed by it, in batches of 12", goal="",
                     figure=lambda microseconds: microseconds["of 12"],
                     sides={f"of {batch}": partial(microseconds_of_keys, batch) for batch in (12, 1)})],
    }


def measure(row: Row, rounds: int) -> list[str]:
    """A row's cells: the figure's median and spread, and the medians of its sides."""
    values: dict[str, list[float]] = {name: [] for name in row.sides}
    figures = []
    for number in range(rounds):
        found = {name: row.sides[name]() for name in rotated(list(row.sides), number)}
        figures.append(row.figure(found))
        for name, value in found.items():
            values[name].append(value)
        sys.stderr.write(f"{row.what}: {figures[-1]:.2f}\n")
    sides = ", ".join(f"{name} {median(each):,.4g}" for name, each in values.items())
    return [row.what, row.goal, f"{median(figures):.2f}", f"{min(figures):.2f} - {max(figures):.2f}", sides]


def main() -> None:
    """Measure the rows asked for and print them."""
    rows = all_rows()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(rows), help=f"of {', '.join(rows)}")
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    chosen = [(number, row) for number in flags.rows.split(",") for row in rows[number]]
    cells = [["row", "what", "goal", "median", "rounds", "sides: samples/s, or seconds"]]
    for number, row in chosen:
        cells.append([number, *measure(row, flags.rounds)])
    print(as_table(cells))


if __name__ == "__main__":
    main()
