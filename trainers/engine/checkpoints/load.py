"""Loading a checkpoint: everything is checked before it is used, and a damaged file costs one warning.

Order of checks: manifest, size, sha256 (torch.load itself verifies no CRC), torch.load with weights_only=True, the
keys, that every tensor is dense and finite, and that the manifest is the one that saving this state would write. Then,
against the run that resumes: names, shapes and dtypes, data set and global batch.
"""

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from launch.errors import CheckpointError, first_line
from trainers.engine.checkpoints.files import committed, manifest_path
from trainers.engine.checkpoints.save import FORMAT, file_sha256, manifest
from trainers.engine.checkpoints.snapshot import not_finite
from trainers.engine.checkpoints.weights import first_three, model_differences

KEYS = ("format", "model", "optimizer", "scaler", "ema", "step", "epoch", "samples_consumed", "best", "history",
        "config", "fingerprint")


class Damaged(Exception):
    """A checkpoint that fails a check; the message says which."""


def load_verified(path: Path) -> dict[str, Any]:
    """The state in a checkpoint file, on the CPU; raises Damaged if any check fails."""
    try:
        written = manifest_path(path).read_bytes()
        expected = json.loads(written)
        size, sha256 = int(expected["size"]), str(expected["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"no readable manifest {manifest_path(path).name} ({type(error).__name__})") from None
    try:
        if path.stat().st_size != size:
            raise Damaged(f"{path.stat().st_size} bytes, the manifest says {size}")
        if file_sha256(path) != sha256:
            raise Damaged("its sha256 is not the manifest's")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise Damaged(f"cannot be read ({first_line(error)})") from None
    if missing := [key for key in KEYS if not isinstance(state, dict) or key not in state]:
        raise Damaged(f"lacks {', '.join(missing)}")
    if state["format"] != FORMAT:
        raise Damaged(f"format {state['format']}, this code reads {FORMAT}")
    if name := not_finite(state):
        raise Damaged(f"{name} is not dense and finite")
    if manifest(state, size=size, sha256=sha256) != written:
        raise Damaged("its manifest describes another state")
    return state


@dataclass(frozen=True, kw_only=True)
class Newest:
    """What a folder of checkpoints holds."""

    path: Path = Path()
    state: dict[str, Any] | None = None
    """Of the newest that passes every check; None if there is none."""
    damaged: dict[Path, str]
    """What is wrong with each newer one, newest first."""


def newest_good(folder: Path, *, try_best: bool = False) -> Newest:
    """The newest checkpoint that passes every check, or best.pt with `try_best`; and those tried before."""
    damaged: dict[Path, str] = {}
    best = [folder / "best.pt"] if try_best and (folder / "best.pt").exists() else []
    for path in [*best, *reversed(committed(folder))]:
        try:
            return Newest(path=path, state=load_verified(path), damaged=damaged)
        except Damaged as damage:
            damaged[path] = str(damage)
    return Newest(damaged=damaged)


def load_or_fail(path: Path) -> dict[str, Any]:
    """The state of a checkpoint that the user named; raises CheckpointError if it is missing or damaged."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; look in the run folder's checkpoints/")
    try:
        return load_verified(path)
    except Damaged as damage:
        raise CheckpointError(f"{path}: {damage}; use another checkpoint, or --init-from if only its weights are "
                              f"wanted") from None


def check_fits(state: Mapping[str, Any], model: nn.Module, source: Path, *, config: Mapping[str, Any] | None = None,
               fingerprint: Mapping[str, Any] | None = None) -> None:
    """Raise CheckpointError if a checkpoint does not fit the model, flags or data of the run that resumes from it."""
    differences = model_differences(state["model"], model.state_dict())
    for name in ("optimizer", "ema_decay", "freeze"):  # they decide what the optimizer's state looks like
        was, now = state["config"].get(name), (config or {}).get(name)
        if config is not None and was != now:
            differences.append(f"--{name.replace('_', '-')} was {was} and is {now}")
    for name in ("dataset", "global_batch_size"):
        was, now = state["fingerprint"].get(name), (fingerprint or {}).get(name)
        if now is not None and was != now:  # None of files, which data_record.py compares
            differences.append(f"{name} was {was} and is {now}")
    if differences:
        raise CheckpointError(f"{source}: does not fit this run: {first_three(differences)}; use the flags and data it "
                              f"was made with, or another --run-name")
