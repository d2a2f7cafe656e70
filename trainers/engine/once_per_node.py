"""Long work that one rank of each node does while others wait: downloads, packs, caches; in a thread or bit by bit."""

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeVar

from launch.errors import is_users
from launch.process_group import World, from_main, gather
from launch.stop import Stopped, StopRequest, stop_request
from launch.watchdog import context_switches

T = TypeVar("T")
SLICE_SECONDS = 0.5  # between two exchanges of the ranks
DONE = object()  # in place of a step of a generator that has come to its end
STILL = object()  # in place of a step of one that has not moved


def once_per_node(world: World, work: Callable[[], object] | Generator[Any], *,
                  folder: Path | None = None, stop: StopRequest | None = None) -> None:
    """Run `work` to its end on local rank 0 of every node, with a `folder` on one of all that see it; returns on all
    ranks together. A stop or an error of one is raised on all within a second; what `work` writes is whole or none."""
    stop = stop_request() if stop is None else stop
    steps = work if isinstance(work, Generator) else in_thread(work)
    done = not (world.local_rank == 0 if folder is None else is_first_to_write(world, folder))
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


def is_first(world: World, place: Path) -> bool:
    """Whether this is the first rank that sees one folder: on another disk it has another number, or time."""
    identity = None
    with contextlib.suppress(OSError):  # which the work itself will meet
        status = os.stat(place)
        identity = status.st_ino, status.st_mtime_ns
    return gather(world, identity).index(identity) == world.rank


def is_first_to_write(world: World, folder: Path) -> bool:
    """The same by a new folder below it: others may write into this one meanwhile, or disks be copies of each other."""
    mark = folder / f".{from_main(world, lambda: uuid.uuid4().hex)}"
    with contextlib.suppress(OSError):
        mark.mkdir(parents=True, exist_ok=True)
    first = is_first(world, mark)
    with contextlib.suppress(OSError):  # another rank was faster
        mark.rmdir()
    return first


def found_once(world: World, find: Callable[[], T], *, folder: Path, digest: Callable[[T], str]) -> T | None:
    """What one rank of all that see a folder finds in it, for every rank; None if file systems differ by `digest`."""
    found, leads = list[T](), is_first(world, folder)
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
