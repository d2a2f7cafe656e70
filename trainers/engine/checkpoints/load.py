"""Loading a checkpoint, of which everything is checked before it is used: manifest, size, sha256 (torch.load checks no
CRC), tensors and entries; then, against the run that resumes: names, shapes, dtypes, optimizer, data, global batch."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from launch.errors import CheckpointError, first_line
from trainers.engine.checkpoints import files, save, snapshot, weights

Check = Callable[[dict[str, Any]], str | None]  # of a state: the name of what does not fit
NUMBER = math.nan  # of any sign, NaN too, or None where there was none
PATTERN: dict[str, Any] = {  # what saving writes; 0 stands for any number from 0 on, ... for all other names or items
    "format": 0, "model": {...: Tensor}, "optimizer": {}, "scaler": {...: NUMBER}, "ema": {...: Tensor}, "step": 0,
    "epoch": 0, "samples_consumed": 0, "best": {"step": 0, ...: NUMBER},
    "history": {"epochs": [{"step": 0, ...: NUMBER}, ...], "running": [[NUMBER, ...], ...], "train_seconds": 0.0},
    "config": {"epochs": NUMBER, "max_steps": NUMBER}, "fingerprint": {}}


class Damaged(Exception):
    """A checkpoint that fails a check; the message says which."""


def load_verified(path: Path) -> dict[str, Any]:
    """The state in a checkpoint file, on the CPU; Damaged if any check fails, CheckpointError if it may not be read."""
    try:
        for file in (files.manifest_path(path), path):
            if not file.is_file():
                raise Damaged(f"{file.name} is no regular file" if file.exists() else f"{file.name} is missing")
        written = files.manifest_path(path).read_bytes()
        expected = json.loads(written)
        size, sha256 = int(expected["size"]), str(expected["sha256"])
        if path.stat().st_size != size:
            raise Damaged(f"{path.stat().st_size} bytes, the manifest says {size}")
        if save.file_sha256(path) != sha256:
            raise Damaged("its sha256 is not the manifest's")
        if weights.inflates(path):
            raise Damaged("its records claim to be larger than the file")
        state = torch.load(path, map_location="cpu", weights_only=True)
        check_state(state)
        if save.manifest(state, size=size, sha256=sha256) != written:
            raise Damaged("its manifest describes another state")
        return state
    except (Damaged, MemoryError):
        raise
    except PermissionError as error:
        raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror}); make it readable") from None
    except Exception as error:  # a damaged manifest or pickle raises anything
        raise Damaged(f"cannot be read ({first_line(error)})") from None


def check_state(state: Any) -> None:
    """Raise Damaged unless this is what saving writes."""
    if missing := [key for key in PATTERN if not isinstance(state, dict) or key not in state]:
        raise Damaged(f"lacks {', '.join(missing)}")
    if state["format"] != save.FORMAT:
        raise Damaged(f"format {state['format']}, this code reads {save.FORMAT}")
    for name, tensor in snapshot.tensors_in(state):
        if kind := snapshot.strange_kind(name, tensor, complex_too=False):
            raise Damaged(kind)
    if name := snapshot.not_finite(state):
        raise Damaged(f"{name} is not dense and finite")
    absent = [name for name in ("ema", "best") if state[name] is None]
    if name := unlike(state, {name: part for name, part in PATTERN.items() if name not in absent}):
        raise Damaged(f"{name} is not what a run writes")
    rows = state["history"]["running"]
    if len({len(row) for row in rows}) != 1 or len(rows[0]) < 3 or any(None in row for row in rows):
        raise Damaged("history.running is not what a run writes")


def unlike(saved: Any, pattern: Any, name: str = "") -> str | None:
    """The path of the first part of nested dicts and lists that is not of the pattern's kind; None if there is none."""
    children: list[tuple[Any, Any, str]] = []
    if isinstance(pattern, type):
        fits = isinstance(saved, pattern)
    elif isinstance(pattern, Tensor):
        fits = isinstance(saved, Tensor) and (saved.shape, saved.dtype) == (pattern.shape, pattern.dtype)
    elif isinstance(pattern, Mapping):
        fits = (isinstance(saved, Mapping) and all(isinstance(key, str | int) for key in saved)
                and all(key in saved or kind is NUMBER for key, kind in pattern.items() if key is not ...))
        names = {*pattern, *(saved if fits and ... in pattern else ())} - {...}
        children = [(saved.get(key), pattern.get(key, pattern.get(...)), str(key)) for key in names] if fits else []
    elif isinstance(pattern, list | tuple):
        kinds = pattern[:1] * len(saved) if ... in pattern and isinstance(saved, list) else pattern
        fits = isinstance(saved, list | tuple) and len(saved) == len(kinds)
        children = [(child, kinds[number], str(number)) for number, child in enumerate(saved if fits else ())]
    elif pattern is NUMBER:
        fits = saved is None or type(saved) is float or (type(saved) is int and abs(saved) < 2**53)
    elif pattern is None or isinstance(pattern, bool | str):
        fits = saved is None or type(saved) in (bool, type(pattern))
    else:
        fits = type(saved) in (int, type(pattern)) and abs(saved) < 2**53 and (saved >= 0 or pattern < 0)
    found = (unlike(*child[:2], f"{name}.{child[2]}" if name else child[2]) for child in children)
    return next(filter(None, found), None) if fits else name


class Newest(NamedTuple):
    """What a folder of checkpoints holds."""
    damaged: dict[Path, str]  # what is wrong with each newer one, newest first
    path: Path = Path()
    state: dict[str, Any] | None = None  # of the newest that passes every check; None if there is none


def newest_good(folder: Path, *, try_best: bool = False, unfit: Check = lambda state: None) -> Newest:
    """The newest checkpoint that passes all checks and is not `unfit`, or best.pt with `try_best`; and those before."""
    damaged: dict[Path, str] = {}
    best = [folder / "best.pt"] if try_best and (folder / "best.pt").exists() else []
    for path in [*best, *reversed(files.committed(folder))]:
        try:
            state = load_verified(path)
            if path not in best and files.step_of(path) != state["step"]:  # copied: what is newest goes by the name
                raise Damaged(f"it holds step {state['step']}")
            if name := unfit(state):
                raise Damaged(f"{name} is not what this run writes")
            return Newest(damaged, path, state)
        except Damaged as damage:
            damaged[path] = str(damage)
    return Newest(damaged)


def is_checkpoint(path: Path) -> bool:
    """Whether a file is a checkpoint of ours, whole or not; else it may hold the weights of others."""
    if files.manifest_path(path).exists():
        return True
    content = weights.read_weights_file(path, str(path))
    return isinstance(content, Mapping) and {"samples_consumed", "fingerprint"} <= content.keys()


def load_or_fail(path: Path) -> dict[str, Any]:
    """The state of a checkpoint that the user named; raises CheckpointError if it is missing or damaged."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; look in the run folder's checkpoints/")
    if not files.manifest_path(path).exists():
        raise CheckpointError(f"{path}: its manifest is missing; copy {files.manifest_path(path).name} too, from the "
                              f"folder that {path.name} is from, or use --init-from if only its weights are wanted")
    try:
        return load_verified(path)
    except Damaged as damage:
        raise CheckpointError(f"{path}: {damage}; use another, or --init-from for its weights alone") from None


def check_fits(state: Mapping[str, Any], model: nn.Module, source: Path, *, config: Mapping[str, Any] | None = None,
               fingerprint: Mapping[str, Any] | None = None) -> None:
    """Raise CheckpointError if a checkpoint does not fit the model, flags or data of the run that resumes from it."""
    differences = weights.model_differences(state["model"], model.state_dict())
    for name in ("optimizer", "ema_decay", "freeze"):  # they decide what the optimizer's state looks like
        was, now = state["config"].get(name), (config or {}).get(name)
        if config is not None and was != now:
            differences.append(f"--{name.replace('_', '-')} was {was} and is {now}")
    for name in ("dataset", "global_batch_size"):
        was, now = state["fingerprint"].get(name), (fingerprint or {}).get(name)
        if now is not None and was != now:  # None of files, which DataRecord compares
            differences.append(f"{name} was {was} and is {now}")
    if differences:
        other = "" if config is None else ", or another --run-name"  # an evaluation is a run of its own already
        raise CheckpointError(f"{source}: does not fit this run: {weights.first_three(differences)}; use the flags and "
                              f"data it was made with{other}")
