"""All rounds of all jobs, one after the other, with a progress bar on a terminal and lines elsewhere."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm

from launch.bench.runs import Job, rotated, run_job

FEWEST_STEPS, MOST_STEPS = 10, 2000
CALIBRATION = "3:10"  # steps left out, steps timed: enough for the order of magnitude that is asked of it


def calibrate(jobs: Sequence[Job], *, steps: int | None, warmup_steps: int | None, seconds: float, trainer: str,
              flags: Sequence[str], threads: int, timeout_seconds: float) -> tuple[int, int]:
    """(warm-up, timed) steps, the same for every set-up: what the first that runs at all does in `seconds`."""
    if steps is None:
        steps = FEWEST_STEPS
        for job in jobs:
            note("calibrating: how many steps to time")
            figures = run_job(job, trainer, flags, steps=CALIBRATION, threads=threads,
                              timeout_seconds=timeout_seconds)["benchmark"]
            if figures is not None:
                steps = round(seconds * figures["steps"] / figures["seconds"])
                break
        steps = max(FEWEST_STEPS, min(MOST_STEPS, steps))
    return (max(5, steps // 5) if warmup_steps is None else warmup_steps), steps


def run_rounds(jobs: Sequence[Job], *, rounds: int, steps: str, trainer: str, flags: Sequence[str], threads: int,
               timeout_seconds: float) -> Iterator[dict[str, Any]]:
    """Every job once a round, in rotating order; a job that failed once is not tried again."""
    failed = set()
    on_terminal = sys.stderr.isatty()
    with tqdm(total=rounds * len(jobs), unit="run", disable=not on_terminal, dynamic_ncols=True) as bar:
        for number in range(rounds):
            for job in rotated(jobs, number):
                if job.key not in failed:
                    bar.set_description(f"round {number + 1}: {job.setup.name}, batch {job.batch_size}")
                    result = {**run_job(job, trainer, flags, steps=steps, threads=threads,
                                        timeout_seconds=timeout_seconds), "round": number}
                    if result["error"]:
                        failed.add(job.key)
                    if result["error"] or not on_terminal:
                        bar.clear()
                        note(f"round {number + 1} of {rounds}, {job.setup.name}, batch {job.batch_size}: "
                             f"{outcome(result)}")
                    yield result
                bar.update()


def outcome(result: dict[str, Any]) -> str:
    """How a run ended, in a few words."""
    if result["error"]:
        return f"failed ({result['error']})"
    return f"{result['benchmark']['samples_per_second']:,.0f} samples/s, {result['wall_seconds']:.0f} s in all"


def note(text: str) -> None:
    """A line about the progress."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
