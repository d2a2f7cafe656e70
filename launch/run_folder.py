"""The run folder `runs/<name>/`: who owns it, what was asked, how far it is, what came out.

One run has one folder and one owner. A second process is told who has it; a process that was cut off while its job
restarted elsewhere finds that a later incarnation owns the run, and writes nothing more. Rank 0 alone writes, and
every file but metrics.jsonl is replaced in one step, so a reader never sees half of one.
"""

import fcntl
import json
import os
import socket
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from launch.command_line import CheckpointError, UsageError
from launch.launcher import job_identity
from launch.machine import environment_record

BEAT_SECONDS = 2.0  # how often an owner shows that it is alive, to hosts that its file lock may not reach
GROWING = ("epochs", "max_steps")  # a run that is DONE goes on when one of these grew


class RunFolder:
    """Rank 0's view of its run; on other ranks every writing method does nothing."""

    def __init__(self, path: Path, *, is_main: bool) -> None:
        self.path = path
        self.is_main = is_main
        self.incarnation = 0
        self._lock_file: Any = None
        self._beat_at = 0.0
        self._num_beats = 0

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    def claim(self) -> None:
        """Create the folder and become its owner. Rank 0 only, before data is loaded.

        Raises:
            CheckpointError: if it cannot be written, or another live process owns it.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock_file = open(self.path / "lock", "a+")
        except OSError as error:
            raise CheckpointError(f"--output-dir {self.path.parent}: cannot be written ({error.strerror}); "
                                  f"choose a folder that can") from None
        previous = self.read_json("owner.json") or {}
        locked = self._try_lock()
        if not is_restart_of(previous, job_identity()) and (not locked or beats_from_elsewhere(self.path, previous)):
            raise CheckpointError(f"{self.path}: in use by pid {previous.get('pid')} on {previous.get('host')}; "
                                  f"wait for it, or choose another --run-name")
        self.incarnation = int(previous.get("incarnation", 0)) + 1
        self._write_owner()

    def _try_lock(self) -> bool:
        """A POSIX lock: not inherited by loader workers, released by the kernel however the process ends."""
        try:
            fcntl.lockf(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            return error.errno not in (11, 13)  # EAGAIN, EACCES: held; anything else: no locks on this file system

    def _write_owner(self, *, released: bool = False) -> None:
        owner = {"incarnation": self.incarnation, "host": socket.gethostname(), "pid": os.getpid(),
                 "beats": self._num_beats, "released": released, **job_identity()}
        replace_file(self.path / "owner.json", (json.dumps(owner) + "\n").encode())

    def beat(self) -> None:
        """Show other hosts that the owner lives; called from the watchdog's thread."""
        if self.is_main and self.incarnation and time.monotonic() - self._beat_at > BEAT_SECONDS:
            self._beat_at = time.monotonic()
            self._num_beats += 1
            try:
                if self.owns():
                    self._write_owner()
            except OSError:
                pass  # a full disk is reported by whoever writes something that matters

    def owns(self) -> bool:
        """Whether no later incarnation has taken the run over."""
        owner = self.read_json("owner.json")
        return owner is None or owner["incarnation"] == self.incarnation

    def check_fence(self) -> None:
        """Called before every write.

        Raises:
            CheckpointError: if a later incarnation owns the run.
        """
        if not self.owns():
            owner = self.read_json("owner.json") or {}
            raise CheckpointError(f"{self.path}: a later incarnation, pid {owner.get('pid')} on {owner.get('host')}, "
                                  f"owns this run; this one writes nothing more")

    def release(self) -> None:
        """Give the run up; the next process need not wait for heartbeats to fail."""
        if self.is_main and self.incarnation and self.owns():
            self._write_owner(released=True)
        if self._lock_file is not None:
            self._lock_file.close()
        self.incarnation = 0

    def read_json(self, name: str) -> Any:
        """The content of a JSON file of the folder, or None if it is missing or damaged."""
        try:
            return json.loads((self.path / name).read_text())
        except (OSError, ValueError):
            return None

    def write_json(self, name: str, content: Any) -> None:
        """Replace a JSON file of the folder.

        Raises:
            CheckpointError: if a later incarnation owns the run, or the disk refuses.
        """
        if not self.is_main:
            return
        self.check_fence()
        try:
            replace_file(self.path / name, (json.dumps(content, indent=2) + "\n").encode())
        except OSError as error:
            raise CheckpointError(f"{self.path / name}: cannot be written ({error.strerror}); free some space or "
                                  f"choose another --output-dir") from None

    def write_status(self, state: str, *, step: int = 0, epoch: int = 0, reason: str = "") -> None:
        """Replace status.json: RUNNING, PREEMPTED, DONE or FAILED."""
        self.write_json("status.json", {"state": state, "step": step, "epoch": epoch, "reason": reason})

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl, in one write.

        Raises:
            CheckpointError: as write_json.
        """
        if not self.is_main:
            return
        self.check_fence()
        try:
            with open(self.path / "metrics.jsonl", "a") as file:
                file.write(json.dumps(dict(line)) + "\n")
        except OSError as error:
            raise CheckpointError(f"{self.path}/metrics.jsonl: cannot be written ({error.strerror}); "
                                  f"free some space") from None

    def truncate_metrics(self, step: int) -> None:
        """Drop the lines of steps after `step`, which the resumed run will write again, and any half-written line."""
        path = self.path / "metrics.jsonl"
        if not self.is_main or not path.exists():
            return
        kept = []
        for text in path.read_text().splitlines():
            try:
                if json.loads(text)["step"] <= step:
                    kept.append(text + "\n")
            except (ValueError, KeyError, TypeError):
                continue  # cut off in the middle by a kill
        self.check_fence()
        replace_file(path, "".join(kept).encode())

    def set_aside(self) -> None:
        """Start over in this folder: what an earlier run left is kept beside it, not overwritten."""
        for name in ("checkpoints", "metrics.jsonl"):
            path = self.path / name
            if self.is_main and path.exists() and (path.is_file() or any(path.iterdir())):
                path.rename(self.path / f"before-{self.incarnation}-{name}")
        self.checkpoints.mkdir(exist_ok=True)

    def begin(self, config: Mapping[str, Any], *, may_change: Collection[str], world: Mapping[str, Any]) -> bool:
        """Record what is asked, unless the run is DONE and nothing more is asked of it.

        Returns:
            False if there is nothing left to do.

        Raises:
            UsageError: if a flag that alters the run differs from what the run was started with.
        """
        before, status = self.read_json("config.json"), self.read_json("status.json") or {}
        if before is not None and (self.path / "checkpoints").exists() and config.get("resume") != "never":
            changed = [name for name in config if name not in may_change and config[name] != before.get(name)]
            if changed:
                pairs = ", ".join(f"--{name.replace('_', '-')} {config[name]} (was {before.get(name)})"
                                  for name in changed[:3])
                raise UsageError(f"{pairs}: would alter the run in {self.path}; use the flags it was started with, "
                                 f"or another --run-name")
            if status.get("state") == "DONE" and not any(grew(config, before, name) for name in GROWING):
                return False
        self.write_json("config.json", dict(config))
        self.write_json("environment.json", {**environment_record(), **world})
        self.write_status("RUNNING", step=status.get("step", 0), epoch=status.get("epoch", 0))
        return True


def grew(config: Mapping[str, Any], before: Mapping[str, Any], name: str) -> bool:
    """Whether a limit was raised, or taken away (None is no limit)."""
    now, then = config.get(name), before.get(name)
    return then is not None and (now is None or now > then)


def replace_file(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Write a file that is whole or absent: a temporary in the same folder, then os.replace.

    With `durable`, the content and the folder entry are on the disk before this returns.

    Raises:
        OSError: as the file system says; the temporary is removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put a folder's entries on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_restart_of(previous: Mapping[str, Any], mine: Mapping[str, Any]) -> bool:
    """Whether this is the same job, started again: then the earlier incarnation is dead or cut off."""
    return mine["job"] is not None and previous.get("job") == mine["job"] and mine["restart"] > previous["restart"]


def beats_from_elsewhere(path: Path, previous: Mapping[str, Any]) -> bool:
    """Whether an owner on another host, which a file lock may not reach, is seen to be alive."""
    if previous.get("released", True) or previous.get("host") == socket.gethostname():
        return False
    time.sleep(2.5 * BEAT_SECONDS)
    try:
        return json.loads((path / "owner.json").read_text())["beats"] != previous["beats"]
    except (OSError, ValueError, KeyError):
        return False
