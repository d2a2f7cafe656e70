"""Long work that one rank of each node does before training, while the others wait: downloads, folders, packs, caches.
A function runs in a thread, a generator here, a bit at a time: `once_per_node(world, fill(packing), folder=cache_dir)`.
"""

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeVar

from launch.errors import is_users
from launch.process_group import World, barrier, from_main, gather
from launch.stop import Stopped, StopRequest, stop_request
from launch.watchdog import context_switches

T = TypeVar("T")
SLICE_SECONDS = 0.5  # between two exchanges of the ranks
DONE = object()  # in place of a step of a generator that has come to its end
STILL = object()  # in place of a step of one that has not moved


def once_per_node(world: World, work: Callable[[], object] | Generator[Any], *,
                  folder: Path | None = None, stop: StopRequest | None = None) -> None:
    """Run `work` to its end on local rank 0 of every node; returns on all ranks together. With a `folder`, on one rank
    of all those that see it: a file system may be shared by nodes. The ranks exchange how far they are twice a second:
    so a stop is noticed while it runs, and an error of one rank is raised on all. After a stop a generator is closed; a
    function is left to end with the process, so it must keep what it writes in a temporary folder until it is whole."""
    stop = stop_request() if stop is None else stop
    steps = work if isinstance(work, Generator) else in_thread(work)
    done = not does_it(world, folder)
    while True:
        error, until = None, time.monotonic() + SLICE_SECONDS
        try:
            while not done and time.monotonic() < until:
                step = next(steps, DONE)
                done = step is DONE
                if step is not STILL:
                    world.watchdog.mark("data")
        except Exception as problem:
            if not is_users(problem):
                raise
            error = problem
        if done:
            world.watchdog.mark("reduce")
        finished, stopped, problems = zip(*gather(world, (done, bool(stop), error)), strict=True)
        for problem in filter(None, problems):
            raise problem
        if any(stopped):
            steps.close()
            stop.ask("another rank was asked to stop")
            raise Stopped(stop.reason)
        if all(finished):
            return


def does_it(world: World, folder: Path | None) -> bool:
    """Whether this rank does the work. A collective."""
    leads = world.local_rank == 0
    leaders = [rank for rank, each in enumerate(gather(world, leads)) if each]
    if folder is None or len(leaders) == 1:
        return leads
    token = from_main(world, lambda: uuid.uuid4().hex)
    names = [folder / f".{token}-{rank}" for rank in leaders if rank <= world.rank]
    if leads:
        with contextlib.suppress(OSError):  # which the work itself will meet
            folder.mkdir(parents=True, exist_ok=True)
            names[-1].touch()
    barrier(world)
    leads = leads and not any(name.exists() for name in names[:-1])
    barrier(world)
    if names:
        names[-1].unlink(missing_ok=True)
    return leads


def found_once(world: World, find: Callable[[], T], *, folder: Path, digest: Callable[[T], str]) -> T | None:
    """What `find` finds in a folder, in which nothing is written: by one rank of all those that see it, and handed to
    every rank by rank 0. None if folders of that name on several file systems differ by `digest`."""
    place, found = None, list[T]()
    with contextlib.suppress(OSError):  # which `find` itself will meet
        status = os.stat(folder)
        place = status.st_ino, status.st_mtime_ns  # of a copy on another disk they are others
    leads = gather(world, place).index(place) == world.rank
    once_per_node(world, lambda: found.append(find()) if leads else None)
    digests = {each for each in gather(world, digest(*found) if found else None) if each is not None}
    return from_main(world, lambda: found[0]) if len(digests) == 1 else None


def in_thread(work: Callable[[], object]) -> Generator[object]:
    """Run a function in a thread; yields while it lives, STILL where it waits, and raises what it raised."""
    errors, switches = [], ""

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="once-per-node", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(SLICE_SECONDS / 5)
        before, switches = switches, context_switches(thread.native_id or 0)
        yield STILL if switches and switches == before else None
    for error in errors:
        raise error
