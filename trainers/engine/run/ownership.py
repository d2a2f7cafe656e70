"""Who may write to a run folder: one live process, of two incarnations the later. The owner locks `lock`; `owner.json`
has its fencing token: who does not find its own there writes no more. `heartbeat.json` shows others that it lives."""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import re
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.errors import CheckpointError, UsageError, printable
from launch.files import read_object, replace_file, writing
from launch.launcher import REQUEUE, given_run_id, job_identity, launcher_identity, parent_of, slurm_job
from trainers.engine.config import TrainConfig

MOST_NAME_BYTES = 255  # NAME_MAX of Linux file systems
BEAT_SECONDS = 2.0  # how often an owner shows that it is alive


class Ownership:
    """One process's claim on a folder."""

    def __init__(self, path: Path) -> None:
        self.path, self._beat_at = path, 0.0
        self.incarnation, self._word = 0, ""  # the fencing token; 0 while nothing is claimed
        self._lock_file: Any = None
        self._writing = threading.Lock()  # the watchdog's thread beats while the main thread may release

    def claim(self) -> None:
        """Own the folder, which exists; CheckpointError if another live process does, OSError if it is read-only."""
        self._lock_file = open(self.path / "lock", "a+")
        try:  # a POSIX lock: not inherited by loader workers, released by the kernel however the process ends
            fcntl.lockf(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except OSError as error:  # None: the file system has no locks
            locked = False if error.errno in (errno.EAGAIN, errno.EACCES) else None
        previous = read_object(self.path / "owner.json") or {}  # after the lock: its holder may just have written it
        if not replaces(previous, this_process()) and (
                locked is False or still_beats(self.path, previous, locked=bool(locked))):
            raise CheckpointError(f"{self.path}: in use by pid {previous.get('pid')} on {previous.get('host')}; "
                                  f"wait for it, or choose another --run-name")
        number = previous.get("incarnation")
        self.incarnation, self._word = (number if isinstance(number, int) else 0) + 1, secrets.token_hex(8)
        self._write_owner(released=False)

    def _write_owner(self, *, released: bool) -> None:
        owner = {"incarnation": self.incarnation, "word": self._word, **this_process(), "released": released}
        replace_file(self.path / "owner.json", (json.dumps(owner) + "\n").encode())

    def beat(self) -> None:
        """Show other hosts that the owner is alive, at most every two seconds; called from the watchdog's thread."""
        with self._writing:
            if self.incarnation and time.monotonic() - self._beat_at >= BEAT_SECONDS:
                self._beat_at = time.monotonic()  # never twice the same
                text = json.dumps({"incarnation": self.incarnation, "beat_at": self._beat_at}) + "\n"
                with contextlib.suppress(OSError):  # a full disk is noticed by whoever writes something that matters
                    if self.holds():
                        replace_file(self.path / "heartbeat.json", text.encode())

    def holds(self) -> bool:
        """Whether owner.json holds this claim's own token. A claim that is missing or damaged is lost."""
        owner = read_object(self.path / "owner.json") or {}
        return (owner.get("incarnation", 0), owner.get("word", "")) == (self.incarnation, self._word)

    def check(self) -> None:
        """The fence, called right before every change: raises CheckpointError if this process has lost the folder."""
        if self.holds():
            return
        if (owner := read_object(self.path / "owner.json")) is None:
            raise CheckpointError(f"{self.path}: owner.json was deleted or damaged while this process used the folder, "
                                  f"so that it writes nothing more; start the same command again")
        raise CheckpointError(f"{self.path}: a later incarnation, pid {owner.get('pid')} on {owner.get('host')}, owns "
                              f"this run; this one writes nothing more")

    def release(self) -> None:
        """Stop being the owner, so that the next process need not wait for heartbeats to fail."""
        with self._writing:
            if self.incarnation and self.holds():
                with contextlib.suppress(OSError):  # then the next owner, if on another host, waits five seconds
                    self._write_owner(released=True)
            self.incarnation = 0
            if self._lock_file is not None:
                self._lock_file.close()


def check_run_name(name: str | None) -> None:
    """UsageError for what cannot be the name of one folder in `--output-dir`."""
    text = name or ""
    too_long = len(text.encode(errors="surrogatepass")) > MOST_NAME_BYTES
    if too_long or text in (".", "..") or re.search(r"[/\x00-\x1f\x7f]", text):
        shown = printable(text if len(text) <= 60 else f"{text[:60]}... ({len(text)} characters)")
        raise UsageError(f"--run-name {shown}: must name one folder: no / or control characters, not .., at most "
                         f"{MOST_NAME_BYTES} bytes; say with --output-dir where the folder is to lie")


def unnamed_run(output_dir: Path, trainer: str, recipe: str, config: Mapping[str, Any] | None = None) -> str:
    """The name of a run folder without `--run-name`: trainer, recipe, an id. That is `--rdzv-id`; a Slurm job's, with
    `2-` ... before it for other flags; or the time, with `-2` ... where a folder is another launcher's."""
    kind, given = (re.sub(r"[^A-Za-z0-9._-]", "_", part) for part in (f"{trainer}-{recipe}", given_run_id() or ""))
    launcher = launcher_identity()
    if given and slurm_job() is None:
        return f"{kind}-{given}"
    for folder in output_dir.glob(f"{kind}-*") if launcher is not None and not given else ():
        if (read_object(folder / "owner.json") or {}).get("launcher") == launcher:
            return folder.name
    first, config = f"{kind}-{given or time.strftime('%Y%m%d-%H%M%S')}", config or {}
    others = (f"{kind}-{number}-{given}" if given else f"{first}-{number}" for number in itertools.count(2))
    content = {"owner.json": {"incarnation": 0, "launcher": launcher}, **({"config.json": config} if given else {})}
    with writing(f"--output-dir {output_dir}"):
        output_dir.mkdir(parents=True, exist_ok=True)
        return next(name for name in itertools.chain([first], others)
                    if (given and has_flags(output_dir / name, config)) or created(output_dir / name, content))


def read_config(folder: Path) -> dict[str, Any] | None:
    """The flags that a run was started with, in the spelling of today; None if they are missing or damaged."""
    saved = read_object(folder / "config.json")
    return None if saved is None else TrainConfig.translated(saved)


def has_flags(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether a run was started with exactly these flags: those that both know."""
    saved = read_config(folder)
    return saved is not None and all(saved[name] == value for name, value in config.items() if name in saved)


def created(folder: Path, content: Mapping[str, Mapping[str, Any]]) -> bool:
    """Create a folder with these files in it, all in one step; False if there is one that is not empty."""
    temporary = folder.with_name(f".{secrets.token_hex(8)}.tmp")
    temporary.mkdir()
    try:
        for name, value in content.items():
            replace_file(temporary / name, (json.dumps(value, indent=2) + "\n").encode())
        os.rename(temporary, folder)
        return True
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        return False


def this_process() -> dict[str, Any]:
    """What owner.json says of its writer."""
    return {"host": socket.gethostname(), "pid": os.getpid(), **job_identity(), "launcher": launcher_identity()}


def is_restart_of(previous: Mapping[str, Any], mine: Mapping[str, Any]) -> bool:
    """Whether both go by the same job's name, and this is a later start of it. Two launchers may have one name."""
    return (mine["job"] is not None and previous.get("job") == mine["job"]
            and isinstance(previous.get("restart"), int) and mine["restart"] > previous["restart"])


def replaces(previous: Mapping[str, Any], mine: Mapping[str, Any]) -> bool:
    """Whether this is certainly the same job, queued again by Slurm or restarted by the same torchrun."""
    launcher = mine["launcher"] or {}
    return is_restart_of(previous, mine) and (
        mine["restart"] // REQUEUE > previous["restart"] // REQUEUE
        or (launcher.get("started") is not None and launcher == previous.get("launcher")))


def still_beats(path: Path, previous: Mapping[str, Any], *, locked: bool) -> bool:
    """Whether an owner still writes heartbeats; waits for one. Not if its lock was free on its own host."""
    pid, here = previous.get("pid", 0), previous.get("host") == socket.gethostname()
    if previous.get("released", True) or (here and locked and (pid == os.getpid() or parent_of(pid) is None)):
        return False
    before = read_object(path / "heartbeat.json")
    time.sleep(2.5 * BEAT_SECONDS)
    return read_object(path / "heartbeat.json") != before
