"""Running the commands: which set-up when, one process tree each, and the error of one that fails."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from launch.bench.setups import Setup, command, environment
from launch.errors import to_stderr
from launch.files import read_object

FEWEST_STEPS, MOST_STEPS = 10, 2000
STOP_SECONDS = 10  # for a process tree to leave after SIGTERM


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
        error = execute(words, environment(job.setup), Path(folder, "log"), timeout_seconds)
        figures = None if error else (read_object(Path(folder, "run", "result.json")) or {}).get("benchmark")
    return {"setup": job.setup.name, "batch_size": job.batch_size, "scalings": list(job.scalings),
            "command": " ".join(words), "wall_seconds": time.perf_counter() - began, "benchmark": figures,
            "error": error if error or figures else "exit code 0, but no figures in result.json"}


def execute(words: list[str], variables: dict[str, str], log: Path, timeout_seconds: float) -> str | None:
    """Run a command in a session of its own, so that Ctrl-C reaches the benchmark alone; how it failed, or None."""
    with open(log, "wb") as file:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=variables,
                                   start_new_session=True)
        try:
            code = process.wait(timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            return f"still running after {timeout_seconds:.0f} s"
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    if process.poll() is None:
                        os.killpg(process.pid, number)
                        process.wait(timeout=STOP_SECONDS)
    return None if code == 0 else f"exit code {code}: {error_in(log.read_text(errors='replace'))}"


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
        wanted = round(seconds * figures["steps"] / figures["seconds"]) if figures else FEWEST_STEPS
        steps = max(FEWEST_STEPS, min(MOST_STEPS, wanted))
    return (max(5, steps // 5) if warmup_steps is None else warmup_steps), steps


def run_rounds(jobs: list[Job], *, rounds: int, steps: str, run: Callable[..., dict[str, Any]]
               ) -> Iterator[dict[str, Any]]:
    """Every job once per round, in rotating order; a job that failed once is not tried again."""
    failed = set()
    turns = [(number, job) for number in range(rounds) for job in rotated(jobs, number)]
    bar = tqdm(turns, unit="run", disable=not sys.stderr.isatty(), dynamic_ncols=True)
    for number, job in bar:
        bar.set_description(f"round {number + 1}: {job.setup.name}, batch {job.batch_size}")
        if job.key not in failed:
            result = {**run(job, steps=steps), "round": number}
            if result["error"]:
                failed.add(job.key)
                ended = f"failed ({result['error']})"
            else:
                rate = result["benchmark"]["samples_per_second"]
                ended = f"{rate:,.0f} samples/s, {result['wall_seconds']:.0f} s in all"
            if result["error"] or bar.disable:
                bar.clear()
                to_stderr(f"round {number + 1} of {rounds}, {job.setup.name}, batch {job.batch_size}: {ended}")
            yield result
