"""What is each set-up worth for my model on this machine? Times the real commands; docs/reference.md tells the rest.

    python launch/benchmark.py                                            # everything this machine has
    python launch/benchmark.py --model resnet18 --batch-size 512 --setups cpu:1 cpu:2 gpu:1 dp:8 ddp:2 ddp:8+bf16
    python launch/benchmark.py --pipeline --data-dir photos               # images/s of ways to load photographs"""

import json
import shlex
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from launch import command_line, files, stop
from launch.bench import pipeline, runs, summary, table
from launch.errors import MOST_SECONDS, Above, AtLeast, UsageError, nearest, say, to_stderr


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Time the real training commands: CPU ranks, one GPU, DataParallel, DDP."""
    setups: tuple[str, ...] = ()
    """What to compare: cpu:N, gpu:1, dp:N, ddp:N, with options as in ddp:2+bf16. Default: all this machine has."""
    model: str = "net"
    """Network, as the trainer's --model takes it."""
    trainer: str = "cifar"
    """Which of trainers/ to run."""
    recipe: str = "blitz"
    """The trainer's --recipe."""
    dataset: str = "synthetic"
    """The trainer's --dataset."""
    learning_rate: Annotated[float, AtLeast(0)] = 0.01
    """High enough to expose a set-up that learns something else, and too low for rounding errors to grow."""
    trainer_flags: str = ""
    """More flags for every command, as one string after =, as in --trainer-flags="--width 64 --optimizer adam"."""
    batch_size: Annotated[int, AtLeast(1)] = 128
    """GLOBAL batch of strong scaling."""
    rank_batch_size: Annotated[int | None, AtLeast(1)] = None
    """Batch per device of weak scaling. Default: --batch-size."""
    scaling: Literal["strong", "weak", "both"] = "both"
    """strong: more devices share one batch. weak: each device brings its own."""
    baseline: str | None = None
    """What speed-ups refer to, one of --setups. Default: the slowest that uses one device."""
    threads: Annotated[int, AtLeast(1, most=1024)] = 1
    """Threads per rank, unless a set-up has +threads=T."""
    rounds: Annotated[int, AtLeast(1)] = 7
    """How often each set-up is run."""
    seconds: Annotated[float, Above(0, most=MOST_SECONDS)] = 2.5
    """About how long each timed window takes on the first set-up; gives the number of steps, the same for all."""
    steps: Annotated[int | None, AtLeast(1)] = None
    """Steps to time, instead of --seconds."""
    warmup_steps: Annotated[int | None, AtLeast(0)] = None
    """Steps to leave out. Default: a fifth of the timed ones, at least 5."""
    seed: Annotated[int, AtLeast(-2**63, most=2**64 - 1)] = 0
    """Of weights and samples, the same for every set-up."""
    output_dir: Path = Path("benchmark")
    """Where benchmark.json, .md and .png are written."""
    compare: Path | None = None
    """An older benchmark.json: print ratios and which are beyond the noise."""
    report: Path | None = None
    """Show this benchmark.json, run nothing."""
    pipeline: bool = False
    """Compare ways to load and augment images instead of set-ups."""
    data_dir: Path | None = None
    """With --pipeline: a folder of photographs as image_folder.py takes it, which is packed for the comparison."""
    timeout: Annotated[float, Above(0, most=MOST_SECONDS)] = 1800
    """Seconds after which a run is ended as failed."""


def main(config: BenchmarkConfig) -> int:
    """Check everything, run, summarise; returns the exit code."""
    old = table.read_results(config.compare) if config.compare else None
    if config.report is not None:
        results, code = table.read_results(config.report), 0
        say(table.page(results))
    else:
        check(config)
        table.check_output_dir(config.output_dir)
        stop.catch_signals()  # Ctrl-C and a batch system's stop keep what was finished
        if config.pipeline:
            return pipeline.benchmark_pipeline(config.output_dir, rounds=config.rounds, seconds=config.seconds,
                                               batch_size=config.batch_size, data_dir=config.data_dir)
        machine = runs.this_machine()
        jobs, missing = jobs_of(config, machine)
        results = {
            "format": table.FORMAT, "complete": False, "command": shlex.join(["python", *sys.argv]), "machine": machine,
            **{name: getattr(config, name) for name in ("trainer", "model", "recipe", "dataset")}, "not_run": missing}
        code = measure_all(config, jobs, results)
    if old is not None and "rows" in results:
        say(table.comparison(old, results))
    return code


def check(config: BenchmarkConfig) -> None:
    """UsageError for a trainer that does not exist or cannot measure."""
    trainers = sorted(path.stem for path in (files.ROOT / "trainers").glob("*.py")
                      if "begin_script(" in path.read_text(encoding="utf-8"))  # those that train, and know --measure
    if config.trainer not in trainers:
        raise UsageError(f"--trainer {config.trainer}: there is none of that name{nearest(config.trainer, trainers)}; "
                         f"choose from {', '.join(trainers)}")


def jobs_of(config: BenchmarkConfig, machine: dict[str, Any]) -> tuple[list[runs.Job], list[dict[str, Any]]]:
    """What will be run, and why the rest cannot be here; UsageError if nothing can, or not the baseline."""
    setups = [runs.parse_setup(text, threads=config.threads) for text in config.setups or runs.everything(machine)]
    jobs, missing = [], {}
    for job in runs.plan(setups, batch_size=config.batch_size, scaling=config.scaling,
                         rank_batch_size=config.rank_batch_size or config.batch_size):
        if why := runs.why_not(job.setup, machine, job.batch_size):
            missing[job.setup.name, why] = {"setup": job.setup.name, "batch_size": job.batch_size, "why": why}
        else:
            jobs.append(job)
    for name, why in missing:
        to_stderr(f"not run: {name}: {why}")
    if not jobs:
        raise UsageError(f"--setups {' '.join(setup.name for setup in setups)}: none can be run here "
                         f"({next(iter(missing.values()))['why']}); try cpu:1")
    names = list(dict.fromkeys(job.setup.name for job in jobs))
    if config.baseline is not None and config.baseline not in names:
        raise UsageError(f"--baseline {config.baseline}: is not among what is run; choose from {', '.join(names)}")
    return jobs, list(missing.values())


def measure_all(config: BenchmarkConfig, jobs: list[runs.Job], results: dict[str, Any]) -> int:
    """All rounds, with benchmark.json rewritten after every run; then the table, the Markdown and the picture."""
    # recipe blitz is without oneDNN, which is faster at its batch of 4 and twice as slow at 128
    flags = ["--onednn", "--model", config.model, "--recipe", config.recipe, "--dataset", config.dataset,
             "--learning-rate", str(config.learning_rate), "--seed", str(config.seed)]
    flags += shlex.split(config.trainer_flags)
    run_one = partial(runs.run_job, trainer=config.trainer, flags=flags, timeout_seconds=config.timeout)
    cores, finished = results["machine"]["cores"], list[dict[str, Any]]()
    wanted = {job.setup.name: job.setup.ranks * job.setup.threads for job in jobs if job.setup.kind == "cpu"}

    def update() -> None:
        results.update(summary.summarise(jobs, finished, baseline=config.baseline), runs=finished)
        results["warnings"] = [*(f"{name}: {number} threads on {cores} cores; they take turns"
                                 for name, number in wanted.items() if number > cores),
                               *summary.warnings_of(results["rows"], rounds=config.rounds)]
        files.replace_file(config.output_dir / "benchmark.json", json.dumps(results, indent=1).encode() + b"\n")

    try:
        warmup, steps = runs.calibrate(jobs, steps=config.steps, warmup_steps=config.warmup_steps,
                                       seconds=config.seconds, run=run_one)
        results["method"] = {
            "steps": steps, "warmup_steps": warmup, "rank_batch_size": config.rank_batch_size or config.batch_size,
            **{name: getattr(config, name) for name in ("rounds", "threads", "seed", "batch_size")}}
        measures = {f"{job.setup.name}, batch {job.batch_size}": partial(run_one, job, steps=f"{warmup}:{steps}")
                    for job in jobs}
        for _, result in runs.run_rounds(measures, config.rounds):
            finished.append(result)
            update()
        results["complete"] = True
    except stop.Stopped:
        if not finished:
            say("stopped before the first run was finished: nothing is written")
            return 130
        say(f"stopped: {len(finished)} finished runs are kept")
    update()
    text, folder = table.page(results), config.output_dir
    files.replace_file(folder / "benchmark.md", f"{text}\n\n![bars and scaling curves](benchmark.png)\n".encode())
    if summary.measured(results["rows"]):
        table.draw(results, folder / "benchmark.png")
    say(f"\n{text}\n\nwritten to {folder}/benchmark.json, .md, .png")
    wrong = any(row["error"] or row["verdict"] == "WRONG" for row in results["rows"])
    return int(wrong) if results["complete"] else 130


if __name__ == "__main__":
    command_line.run(main, BenchmarkConfig)
