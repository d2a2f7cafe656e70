"""Who may write to a run folder: one live process, and of two incarnations of a job the later one.

`lock` is locked by the owner as long as it lives. `owner.json` says who it is and holds the fencing token: a number
that every new owner raises. A process that was cut off while its job restarted elsewhere finds a higher number there
and writes nothing more. `heartbeat.json` shows that the owner is alive to hosts that the file lock does not reach; it
is a file of its own so that a late heartbeat of an old owner cannot undo the claim of a new one.
"""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from launch.errors import CheckpointError
from launch.files import read_object, replace_file
from launch.launcher import given_run_id, job_identity, launcher_identity

BEAT_SECONDS = 2.0  # how often an owner shows that it is alive


class Ownership:
    """One process's claim on a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.incarnation = 0
        """The fencing token; 0 while nothing is claimed."""
        self._lock_file: Any = None
        self._writing = threading.Lock()  # the watchdog's thread beats while the main thread may release
        self._beat_at = 0.0
        self._num_beats = 0

    def claim(self) -> None:
        """Become the owner of the folder, which exists.

        Raises:
            CheckpointError: if another live process owns it.
            OSError: if it cannot be written.
        """
        self._lock_file = open(self.path / "lock", "a+")
        try:  # a POSIX lock: not inherited by loader workers, released by the kernel however the process ends
            fcntl.lockf(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except OSError as error:
            locked = error.errno not in (errno.EAGAIN, errno.EACCES)  # anything else: no locks on this file system
        previous = read_object(self.path / "owner.json") or {}  # after the lock: its holder may just have written it
        mine = this_process()
        if not is_restart_of(previous, mine) and (not locked or beats_from_elsewhere(self.path, previous)):
            raise CheckpointError(f"{self.path}: in use by pid {previous.get('pid')} on {previous.get('host')}; "
                                  f"wait for it, or choose another --run-name")
        self.incarnation = incarnation_of(previous) + 1
        self._write_owner(mine, released=False)

    def _write_owner(self, mine: Mapping[str, Any], *, released: bool) -> None:
        owner = {"incarnation": self.incarnation, **mine, "released": released}
        replace_file(self.path / "owner.json", (json.dumps(owner) + "\n").encode())

    def beat(self) -> None:
        """Show other hosts that the owner is alive, at most every two seconds; called from the watchdog's thread."""
        with self._writing:
            if not self.incarnation or time.monotonic() - self._beat_at < BEAT_SECONDS:
                return
            self._beat_at = time.monotonic()
            self._num_beats += 1
            text = json.dumps({"incarnation": self.incarnation, "beats": self._num_beats})
            with contextlib.suppress(OSError):  # a full disk is noticed by whoever writes something that matters
                if self.holds():
                    replace_file(self.path / "heartbeat.json", (text + "\n").encode())

    def holds(self) -> bool:
        """Whether no later incarnation has taken the folder over. A damaged or missing owner.json is nobody's claim."""
        return incarnation_of(read_object(self.path / "owner.json") or {}) <= self.incarnation

    def check(self) -> None:
        """The fence, called before every write: raises CheckpointError if a later incarnation owns the folder."""
        if not self.holds():
            owner = read_object(self.path / "owner.json") or {}
            raise CheckpointError(f"{self.path}: a later incarnation, pid {owner.get('pid')} on {owner.get('host')}, "
                                  f"owns this run; this one writes nothing more")

    def release(self) -> None:
        """Stop being the owner, so that the next process need not wait for heartbeats to fail."""
        with self._writing:
            if self.incarnation and self.holds():
                with contextlib.suppress(OSError):  # then the next owner, if on another host, waits five seconds
                    self._write_owner(this_process(), released=True)
            self.incarnation = 0
            if self._lock_file is not None:
                self._lock_file.close()
                self._lock_file = None


def unnamed_run(output_dir: Path, trainer: str, recipe: str) -> str:
    """The name of the run folder where the user gave none: trainer, recipe and an id. Rank 0 only.

    An id that Slurm or the user gave makes the same name in every start of the job. Else the id is the present time,
    and the folder is created here, with `-2`, `-3` ... where another launcher's has that name. A restart by the same
    torchrun finds its folder by `launcher` in owner.json. Raises CheckpointError if the folder cannot be created.
    """
    kind, given = (re.sub(r"[^A-Za-z0-9._-]", "_", part) for part in (f"{trainer}-{recipe}", given_run_id() or ""))
    if given:
        return f"{kind}-{given}"
    launcher = launcher_identity()
    for folder in output_dir.glob(f"{kind}-*") if launcher is not None else ():
        if (read_object(folder / "owner.json") or {}).get("launcher") == launcher:
            return folder.name
    name = f"{kind}-{now()}"
    with output_dir_writable(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        for candidate in itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2))):
            with contextlib.suppress(FileExistsError):
                (output_dir / candidate).mkdir()
                break
        owner = {"incarnation": 0, "launcher": launcher}
        replace_file(output_dir / candidate / "owner.json", json.dumps(owner).encode())
    return candidate


def now() -> str:
    """The present time, as `20261121-041530`."""
    return f"{datetime.now():%Y%m%d-%H%M%S}"


@contextlib.contextmanager
def output_dir_writable(output_dir: Path) -> Iterator[None]:
    """Raises CheckpointError for a run folder that cannot be created or claimed."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"--output-dir {output_dir}: cannot be written ({error.strerror}: {error.filename}); "
                              f"choose a folder that can") from None


def this_process() -> dict[str, Any]:
    """What owner.json says of its writer."""
    return {"host": socket.gethostname(), "pid": os.getpid(), **job_identity(), "launcher": launcher_identity()}


def incarnation_of(owner: Mapping[str, Any]) -> int:
    """The fencing token in an owner.json; 0 if it holds none."""
    number = owner.get("incarnation")
    return number if isinstance(number, int) else 0


def is_restart_of(previous: Mapping[str, Any], mine: Mapping[str, Any]) -> bool:
    """Whether this is the same job, started again: then the earlier incarnation is dead or cut off."""
    restart = previous.get("restart")
    return (mine["job"] is not None and previous.get("job") == mine["job"] and isinstance(restart, int)
            and mine["restart"] > restart)


def beats_from_elsewhere(path: Path, previous: Mapping[str, Any]) -> bool:
    """Whether an owner on another host, which a file lock may not reach, still writes heartbeats. Waits for one."""
    if previous.get("released", True) or previous.get("host") == socket.gethostname():
        return False
    before = read_object(path / "heartbeat.json")
    time.sleep(2.5 * BEAT_SECONDS)
    return read_object(path / "heartbeat.json") != before
