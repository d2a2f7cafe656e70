"""Long work that one rank of each node does before training, while the others wait: for as long as it takes."""

import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from launch.errors import is_users
from launch.process_group import World, barrier, gather
from launch.stop import StopRequest
from trainers.engine.config import TrainConfig

SLICE_SECONDS = 0.5  # between two meetings of the ranks


def finish_together(world: World, work: Generator[Any] | None, stop: StopRequest) -> bool:
    """Run `work` to its end, on the ranks that have some; returns on all ranks together.

    They meet twice a second, not once at the end: so the collective timeout need not allow for the whole work, a stop
    is noticed while it goes on, and an error of one rank is raised on all.

    Returns:
        False if any rank was asked to stop; its work is then closed unfinished.
    """
    done = work is None
    while True:
        error: Exception | None = None
        if work is not None and not done:
            try:
                done = advance(work, world, seconds=SLICE_SECONDS)
            except Exception as problem:
                if not is_users(problem):
                    raise
                error = problem
        world.watchdog.mark("data")
        reports = gather(world, (done, bool(stop), error))
        for _, _, problem in reports:
            if problem is not None:
                raise problem
        if any(stopped for _, stopped, _ in reports):
            if work is not None:
                work.close()
            return False
        if all(finished for finished, _, _ in reports):
            return True


def advance(work: Generator[Any], world: World, *, seconds: float) -> bool:
    """Take items for a while, each a sign of life; whether that was the last of them."""
    until = time.monotonic() + seconds
    for _ in work:
        world.watchdog.mark("data")
        if time.monotonic() > until:
            return False
    return True


def download_once(config: TrainConfig, world: World, download: Callable[[Path], None]) -> None:
    """With `--download`, have one rank of each node fetch the data while the others wait."""
    if not config.download:
        return
    if world.local_rank == 0:
        download(config.data_dir)
    barrier(world)
