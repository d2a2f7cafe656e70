"""What can be compared, as docs/reference.md explains it; the command of each set-up, when it runs, and its errors."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from launch import files, launcher, stop
from launch.errors import AtLeast, UsageError, check_number, nearest, to_stderr
from launch.machine import environment_record, processor

COUNT = AtLeast(1, most=1024)  # devices of a set-up, threads of a rank
OPTIONS: dict[str, dict[str, Any]] = {
    "bf16": {"precision": "bf16"}, "fp16": {"precision": "fp16"}, "channels-last": {"channels_last": True},
    "compile": {"compile": True}, "gloo": {"gloo": True}}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One column of the comparison."""
    name: str
    kind: str  # cpu, gpu, dp or ddp
    devices: int  # ranks, or GPUs of a DataParallel
    precision: str = "fp32"
    compile: bool = False
    channels_last: bool = False
    gloo: bool = False
    threads: int = 1  # per rank

    @property
    def ranks(self) -> int:
        """Processes."""
        return 1 if self.kind in ("gpu", "dp") else self.devices

    @property
    def launched(self) -> bool:
        """Whether torchrun starts it."""
        return self.kind == "ddp" or self.ranks > 1


def this_machine() -> dict[str, Any]:
    """What a benchmark's figures hold for: what this process may use, and all that a run would record."""
    return {"processor": processor(), "cores": launcher.usable_cores(), **environment_record()}


def parse_setup(text: str, *, threads: int = 1) -> Setup:
    """`ddp:2+bf16` as a Setup, `threads` per rank unless it has `+threads=T`; UsageError for anything unknown."""
    head, *options = text.split("+")
    match = re.fullmatch(r"(cpu|gpu(?=:1$)|dp|ddp):([1-9]\d*)", head)
    if match is None:
        raise UsageError(f"--setups {text}: unknown; must be cpu:N, dp:N, ddp:N or gpu:1, with options such as +bf16"
                         f"{nearest(head.partition(':')[0], ('cpu', 'gpu', 'dp', 'ddp'))}")
    check_number(f"--setups {text}: {match[1]}", devices := int(match[2][:20]), COUNT)
    setup = Setup(name=text, kind=match[1], devices=devices, threads=threads)
    for option in options:
        if count := re.fullmatch(r"threads=([1-9]\d*)", option):
            setup = replace(setup, threads=int(count[1][:20]))
            check_number(f"--setups {text}: threads", setup.threads, COUNT)
        elif option in OPTIONS:
            setup = replace(setup, **OPTIONS[option])
        else:
            raise UsageError(f"--setups {text}: no option {option!r}; choose from {', '.join(OPTIONS)}, threads=2"
                             f"{nearest(option, OPTIONS)}")
    if setup.gloo and setup.kind != "ddp":
        raise UsageError(f"--setups {text}: +gloo is for ddp:N; leave it out")
    return setup


def everything(machine: dict[str, Any]) -> list[str]:
    """All that this machine has, and what it lacks of one GPU and two, to be shown as not run."""
    several = [count for count in powers_up_to(len(machine["gpus"])) if count > 1] or [2]
    return [*(f"cpu:{count}" for count in powers_up_to(machine["cores"])), "gpu:1",
            *(f"{kind}:{count}" for kind in ("dp", "ddp") for count in several)]


def powers_up_to(most: int) -> list[int]:
    """1, 2, 4, … and `most` itself."""
    return sorted({2**exponent for exponent in range(most.bit_length())} | ({most} - {0}))


def why_not(setup: Setup, machine: dict[str, Any], batch_size: int) -> str | None:
    """Why this machine cannot run it at that global batch, or None if it can."""
    num_gpus, needed, kind = len(machine["gpus"]), 1 if setup.gloo else setup.devices, setup.kind
    reasons = {
        f"needs {needed} GPU{'s' * (needed > 1)}, this machine has {num_gpus or 'none'}":
            kind != "cpu" and num_gpus < needed,
        "DataParallel has nothing to split on one GPU": kind == "dp" and setup.devices < 2,
        "DataParallel's copies of a compiled model would all run the original": kind == "dp" and setup.compile,
        "fp16 on a CPU is no faster than fp32: use bf16": kind == "cpu" and setup.precision == "fp16",
        f"a global batch of {batch_size} does not divide over {setup.devices} ranks": batch_size % setup.devices > 0}
    return next((reason for reason, is_so in reasons.items() if is_so), None)


def command(setup: Setup, trainer: str, flags: list[str]) -> list[str]:
    """The command line: the trainer under python, or under torchrun."""
    starter = [str(files.ROOT / "launch" / "torchrun.py"), "--standalone", f"--nproc-per-node={setup.ranks}"]
    parallel = "dp" if setup.kind == "dp" else "ddp" if setup.launched else "none"
    return [sys.executable, *(starter if setup.launched else []), str(files.ROOT / "trainers" / f"{trainer}.py"),
            *flags, "--device", "cpu" if setup.kind == "cpu" else "cuda", "--parallel", parallel,
            "--backend", "gloo" if setup.gloo or setup.kind == "cpu" else "auto", "--precision", setup.precision,
            "--compile" if setup.compile else "--no-compile",
            "--channels-last" if setup.channels_last else "--no-channels-last", "--threads", str(setup.threads)]


def environment(setup: Setup) -> dict[str, str]:
    """This environment for the command: no launcher's variables, and for DataParallel just its GPUs."""
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_", "TORCHELASTIC_", "SLURM_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    if setup.kind == "dp":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(setup.devices)))
        kept["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[: setup.devices])
    return kept


@dataclass(frozen=True, kw_only=True)
class Job:
    """One set-up at one global batch, run once per round."""
    setup: Setup
    batch_size: int
    scalings: tuple[str, ...]  # which curves it is a point of: one device at the base batch is the start of both

    @property
    def key(self) -> tuple[str, int]:
        """What tells jobs apart."""
        return self.setup.name, self.batch_size


def plan(setups: list[Setup], *, batch_size: int, rank_batch_size: int, scaling: str) -> list[Job]:
    """The jobs: each set-up at the fixed global batch, at the fixed batch per device, or both."""
    wanted: dict[tuple[str, int], Job] = {}
    for setup in setups:
        for name, size in (("strong", batch_size), ("weak", rank_batch_size * setup.devices)):
            if scaling in (name, "both"):
                before = wanted[setup.name, size].scalings if (setup.name, size) in wanted else ()
                wanted[setup.name, size] = Job(setup=setup, batch_size=size, scalings=(*before, name))
    return list(wanted.values())


def rotated(jobs: list[Any], round_number: int) -> list[Any]:
    """A B C, then B C A, …: no set-up always runs first, when the machine is coolest, or last."""
    start = round_number % len(jobs)
    return [*jobs[start:], *jobs[:start]]


def run_job(job: Job, trainer: str, flags: list[str], *, steps: str, timeout_seconds: float) -> dict[str, Any]:
    """Run the trainer once; `benchmark` holds the figures that it measured, None if it failed, and `error` how."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        words = command(job.setup, trainer, [*flags, "--batch-size", str(job.batch_size), "--measure", steps,
                                             "--output-dir", folder, "--run-name", "run"])
        began = time.perf_counter()
        error, _ = execute(words, environment(job.setup), timeout_seconds)
        figures = None if error else (files.read_object(Path(folder, "run", "result.json")) or {}).get("benchmark")
    return {"setup": job.setup.name, "batch_size": job.batch_size, "scalings": list(job.scalings),
            "command": " ".join(words), "wall_seconds": time.perf_counter() - began, "benchmark": figures,
            "error": error if error or figures else "exit code 0, but no figures in result.json"}


def execute(words: list[str], variables: dict[str, str], timeout_seconds: float) -> tuple[str | None, str]:
    """Run a command in a session of its own, which Ctrl-C does not reach: how it failed, or None; what it printed."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=variables,
                                   start_new_session=True)
        try:
            for _ in stop.moments(timeout_seconds, patience=0):
                if process.poll() is not None:
                    break
            else:
                return f"still running after {timeout_seconds:.0f} s", ""
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    if process.poll() is None:
                        os.killpg(process.pid, number)
                        process.wait(timeout=10)
        log.seek(0)
        printed = log.read().decode(errors="replace")
    return f"exit code {process.returncode}: {error_in(printed)}" if process.returncode else None, printed


def error_in(log: str) -> str:
    """What a failed run printed: its own error line, or else the last exception of any rank."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR ")]
    exceptions = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception", "Killed"))
                  and "ChildFailedError" not in line]
    return (errors or exceptions[-1:] or lines[-1:] or ["no output"])[0][:300]


def calibrate(jobs: list[Job], *, steps: int | None, warmup_steps: int | None, seconds: float,
              run: Callable[..., dict[str, Any]]) -> tuple[int, int]:
    """(warm-up, timed) steps, the same for every set-up: what the first that runs at all does in `seconds`."""
    if steps is None:
        to_stderr("calibrating: how many steps to time")
        figures = next(filter(None, (run(job, steps="3:10")["benchmark"] for job in jobs)), None)
        steps = max(10, min(2000, round(seconds * figures["steps"] / figures["seconds"]) if figures else 10))
    return (max(5, steps // 5) if warmup_steps is None else warmup_steps), steps


def run_rounds(measures: Mapping[str, Callable[[], dict[str, Any]]], rounds: int
               ) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every measure once per round, in rotating order, by name and as `run_job`; one that failed is not tried again."""
    failed = set()
    turns = [(number, name) for number in range(rounds) for name in rotated(list(measures), number)]
    bar = tqdm(turns, unit="run", disable=not sys.stderr.isatty(), dynamic_ncols=True)
    for number, name in bar:
        bar.set_description(f"round {number + 1}: {name}")
        if name not in failed:
            result = measures[name]()
            if result["error"]:
                failed.add(name)
            if result["error"] or bar.disable:
                bar.clear()
                rate = (result["benchmark"] or {}).get("samples_per_second")
                ended = f"{rate:,.0f} samples/s" if rate else f"failed ({result['error']})"
                to_stderr(f"round {number + 1} of {rounds}, {name}: {ended}")
            yield name, {**result, "round": number}
