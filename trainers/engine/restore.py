"""Loading a checkpoint: nothing is believed until it has been checked, and a damaged file costs one warning.

Order of checks: manifest, size, sha256 (torch.load itself does not verify its CRCs), torch.load with
weights_only=True, the keys, and that every tensor is dense and finite. Then, against the model it is for: names,
shapes and dtypes.
"""

import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from launch.command_line import CheckpointError
from trainers.engine.checkpoint import FORMAT, file_sha256, manifest_path

KEYS = ("format", "model", "optimizer", "scaler", "ema", "step", "epoch", "samples_consumed", "best", "history",
        "config", "fingerprint")


class Damaged(Exception):
    """A checkpoint that fails a check; the message says which."""


def load_verified(path: Path) -> dict[str, Any]:
    """The state in a checkpoint file, on the CPU.

    Raises:
        Damaged: if any check fails.
    """
    try:
        manifest = json.loads(manifest_path(path).read_text())
        expected_size, expected_hash = int(manifest["size"]), str(manifest["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"no readable manifest ({type(error).__name__})") from None
    try:
        if path.stat().st_size != expected_size:
            raise Damaged(f"{path.stat().st_size} bytes, the manifest says {expected_size}")
        if file_sha256(path) != expected_hash:
            raise Damaged("its sha256 is not the manifest's")
        if not zipfile.is_zipfile(path):
            raise Damaged("no zip archive")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise Damaged(f"cannot be read ({str(error).splitlines()[0]})") from None
    missing = [key for key in KEYS if not isinstance(state, dict) or key not in state]
    if missing:
        raise Damaged(f"lacks {', '.join(missing)}")
    if state["format"] != FORMAT:
        raise Damaged(f"format {state['format']}, this code reads {FORMAT}")
    for name, tensor in tensors_in(state):
        if tensor.layout is not torch.strided or not torch.isfinite(tensor).all():
            raise Damaged(f"{name} is not dense and finite")
    return state


def tensors_in(tree: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of nested dicts and lists, with its path."""
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, Mapping):
        for key, child in tree.items():
            yield from tensors_in(child, f"{name}.{key}" if name else str(key))
    elif isinstance(tree, list | tuple):
        for position, child in enumerate(tree):
            yield from tensors_in(child, f"{name}[{position}]")


def newest_good(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that passes every check, and a warning for each newer one that does not.

    Raises:
        CheckpointError: if there are checkpoints and none is good: starting over silently would lose the run.
    """
    warnings = []
    manifests = sorted(folder.glob("step-*.json"), reverse=True)
    for manifest in manifests:
        path = manifest.with_suffix(".pt")
        try:
            load_verified(path)
            return path, warnings
        except Damaged as damage:
            warnings.append(f"WARNING checkpoint: {path}: {damage}; falling back to the one before")
    if manifests:
        raise CheckpointError(f"{folder}: none of {len(manifests)} checkpoints is whole (newest: {warnings[0]}); "
                              f"use --resume never to start over, or another --run-name")
    return None, warnings


def load_or_fail(path: Path) -> dict[str, Any]:
    """The state of a checkpoint that the user named.

    Raises:
        CheckpointError: if it is missing or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; look in the run folder's checkpoints/")
    try:
        return load_verified(path)
    except Damaged as damage:
        raise CheckpointError(f"{path}: {damage}; use another checkpoint") from None


def check_fits(state: Mapping[str, Any], model: nn.Module, source: Path, *, fingerprint: Mapping[str, Any]) -> None:
    """Compare a checkpoint with the model and data it is to go on with.

    Raises:
        CheckpointError: with the first three differences.
    """
    differences = model_differences(state["model"], model.state_dict())
    for name in ("dataset", "global_batch_size"):
        if name in fingerprint and state["fingerprint"].get(name) != fingerprint[name]:
            differences.append(f"{name} was {state['fingerprint'].get(name)} and is {fingerprint[name]}")
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise CheckpointError(f"{source}: does not fit this run: {'; '.join(differences[:3])}{more}; use the flags and "
                              f"data it was made with, or another --run-name")


def model_differences(saved: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> list[str]:
    """Sentences about names, shapes and dtypes that differ."""
    differences = [f"{name} is not in the checkpoint" for name in current if name not in saved]
    differences += [f"{name} is not in the model" for name in saved if name not in current]
    for name in current:
        if name in saved and saved[name].shape != current[name].shape:
            differences.append(f"{name} is {tuple(saved[name].shape)} in the checkpoint and "
                               f"{tuple(current[name].shape)} in the model")
        elif name in saved and saved[name].dtype != current[name].dtype:
            differences.append(f"{name} is {saved[name].dtype} in the checkpoint and {current[name].dtype} here")
    return differences
