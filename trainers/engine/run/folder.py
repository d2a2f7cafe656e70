"""The run folder `runs/<name>/`: the config, status, metrics and results of a run. Rank 0 alone writes, only while it
owns the folder (ownership.py), and every file but metrics.jsonl is replaced in one step: no reader sees half of one."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launch import files, machine
from launch.errors import CheckpointError, UsageError, say, user_line
from trainers.engine.checkpoints.files import committed, step_of
from trainers.engine.config import MAY_CHANGE
from trainers.engine.run.ownership import Ownership, read_config

OUT_OF_PATIENCE = "--patience"  # how the reason of a run begins that it ended


class RunFolder:
    """Rank 0's view of its run; on other ranks every method that writes does nothing."""

    def __init__(self, path: Path, *, is_main: bool) -> None:
        self.path, self.checkpoints, self.is_main = path, path / "checkpoints", is_main
        self.ownership = Ownership(path)
        self.beat, self.release = self.ownership.beat, self.ownership.release
        self._started = False  # whether this process started or resumed the run: only then may it write how it ended

    def claim(self) -> None:
        """Create the folder and own it; CheckpointError if it cannot be written, or another live process owns it."""
        if self.is_main:
            with files.writing(f"--output-dir {self.path.parent}"):
                self.checkpoints.mkdir(parents=True, exist_ok=True)
                self.ownership.claim()

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[Path]:
        """The path of a file to write, behind the fence; what the disk refuses becomes one line for the user."""
        self.ownership.check()
        path = self.path / name
        with files.writing(path):
            if path.suffix and path.exists() and not path.is_file():  # opening a pipe may wait without end
                raise OSError(errno.EEXIST, "it is no regular file")
            yield path

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The content of a JSON file of the folder, or None if it is missing or damaged."""
        return files.read_object(self.path / name)

    def write_bytes(self, name: str, content: bytes) -> None:
        """Replace a file of the folder; CheckpointError if a later incarnation owns the run, or the disk refuses."""
        if self.is_main:
            with self._writing(name) as path:
                files.replace_file(path, content, check_fence=self.ownership.check)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Replace a JSON file of the folder. A number that is not finite becomes null, as JSON has no NaN."""
        self.write_bytes(name, (json.dumps(finite(content), indent=2) + "\n").encode())

    def write_status(self, state: str, *, step: int = 0, epoch: int = 0, reason: str = "") -> None:
        """Replace status.json: RUNNING, PREEMPTED, DONE or FAILED."""
        self.write_json("status.json", {"state": state, "step": step, "epoch": epoch, "reason": reason})

    def position(self) -> tuple[int, int]:
        """Step and epoch in status.json; 0 for what is missing or damaged."""
        status = self.read_json("status.json") or {}
        step, epoch = (value if type(value) is int else 0 for value in (status.get("step"), status.get("epoch")))
        return step, epoch

    def _is_under_way(self) -> bool:  # its end is still to be written down; what fails once it is DONE is optional
        return self._started and (self.read_json("status.json") or {}).get("state") != "DONE"

    def failed(self, cause: Exception | str, *, step: int) -> None:
        """FAILED and why; not if this process never started the run, or has lost it, or the disk is full."""
        if isinstance(cause, Exception):
            cause = user_line(cause) or f"{type(cause).__name__}: {cause}"
        if self._is_under_way():
            before_step, epoch = self.position()
            with contextlib.suppress(CheckpointError):
                self.write_status("FAILED", step=max(step, before_step), epoch=epoch, reason=cause)

    def preempted(self, reason: str) -> None:
        """PREEMPTED and why, at the last checkpoint; nothing is said of this process's end after that."""
        if self._is_under_way():
            step = max(map(step_of, committed(self.checkpoints)), default=0)
            self.write_status("PREEMPTED", step=step, epoch=self.position()[1], reason=reason)
            self._started = False
            say(f"stopped at step {step} ({reason}); the same command continues from there")

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl, in one write; raises as `write_bytes` does."""
        if self.is_main:
            text = (json.dumps(finite(line)) + "\n").encode()
            with self._writing("metrics.jsonl") as path, open(path, "ab", buffering=0) as file:
                self.ownership.check()  # again: nothing but the write itself comes after it
                file.write(text)

    def sync_metrics(self) -> None:
        """Put metrics.jsonl and its name on the disk."""
        path = self.path / "metrics.jsonl"
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            files.sync_folder(self.path)
            files.sync_folder(self.path.parent)

    def truncate_metrics(self, step: int, *, evaluated: bool) -> None:
        """Drop lines that a run resumed at `step` writes again: of its evaluation too, unless `evaluated` before."""
        if self.is_main and (self.path / "metrics.jsonl").exists():
            with self._writing("metrics.jsonl") as path:
                kept = [text + "\n" for text, line in files.read_lines(path) if line["step"] < step or (
                    line["step"] == step and (evaluated or line["split"] == "train"))]
                files.replace_file(path, "".join(kept).encode(), durable=True, check_fence=self.ownership.check)

    def first_evaluated_split(self) -> str | None:
        """The split of the first evaluation that metrics.jsonl holds; None before there is one."""
        lines = files.read_lines(self.path / "metrics.jsonl")
        return next((line["split"] for _, line in lines if line["split"] != "train"), None)

    def set_aside(self) -> None:
        """Make room for a run from the start: what an earlier one left is renamed, not overwritten."""
        for name in ("checkpoints", "metrics.jsonl", "trackers") if self.is_main else ():
            with self._writing(name) as path:
                if path.exists() and (path.is_file() or any(path.iterdir())):
                    path.rename(self.path / f"before-{self.ownership.incarnation}-{name}")
                self.checkpoints.mkdir(exist_ok=True)

    def begin(self, config: Mapping[str, Any], *, world: Mapping[str, Any]) -> bool:
        """Record the config; False if the run is DONE and it asks for no more. UsageError for what would alter it."""
        before, status = read_config(self.path), self.read_json("status.json") or {}
        is_done, is_empty = status.get("state") == "DONE", not committed(self.checkpoints)
        has_progress = not is_empty  # without, nothing is altered by other flags
        if is_done and is_empty and before is not None:  # cleared, unless nothing was ever trained
            has_progress = before.get("evaluate") is None and before.get("measure") is None
        if has_progress and config.get("evaluate") is not None:
            raise UsageError(f"--evaluate {config['evaluate']}: {self.path} holds a training run, whose result this "
                             f"would replace; give the evaluation another --run-name")
        if has_progress and before is not None and config.get("resume") != "never":
            if changed := [f"--{name.replace('_', '-')} {value} (was {before[name]})" for name, value in config.items()
                           if name not in MAY_CHANGE and value != before.get(name, value)]:
                raise UsageError(f"{', '.join(changed[:3])}: would alter the run in {self.path}; use the flags it was "
                                 f"started with, or another --run-name")
            limits = ("patience",) if str(status.get("reason")).startswith(OUT_OF_PATIENCE) else ("epochs", "max_steps")
            given = [name for name in limits if isinstance(before.get(name), int)]
            if is_done and not any(config.get(name) is None or config[name] > before[name] for name in given):
                return False  # none was raised, or taken away
            if is_done and config.get("resume") == "auto" and is_empty:
                raise CheckpointError(f"{self.path}: is DONE and its checkpoints are gone, so it cannot continue; use "
                                      f"--resume never to start over, or another --run-name")
        self.write_json("config.json", config)
        self.write_json("environment.json", {**machine.environment_record(), **world})
        step, epoch = self.position()
        self.write_status("RUNNING", step=step, epoch=epoch)
        self._started = True
        return True


def finite(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content as JSON holds it, with null in the place of NaN and infinity, which it does not know."""
    return json.loads(json.dumps(content), parse_constant=lambda name: None)
