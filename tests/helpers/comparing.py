"""Runs that are compared: started with the flags that many tests share, and what they computed, to the last bit."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.helpers.processes import Ended, metrics, newest_checkpoint, read_json
from tests.helpers.server import IMAGES, NORMED, run


def run_in(folder: Path, *flags: Any, trainer: str = "cifar", ranks: int = 1, **how: Any) -> Ended:
    """A run of NORMED or IMAGES in `folder`, to its end or to where it is killed; one rank without a launcher."""
    flags = (*(NORMED if trainer == "cifar" else IMAGES), "--output-dir", folder, *flags)
    return run(trainer, *flags, folder=folder, ranks=None if ranks == 1 else ranks, **how)


def finished(trainer: str, folder: Path, *flags: Any, **how: Any) -> Path:
    """Train into the run folder and return it, having made sure that it ended well; one thread per rank."""
    ended = run(trainer, *flags, "--threads", "1", "--output-dir", folder.parent, "--run-name", folder.name, **how)
    assert ended.code == 0, ended.err
    assert read_json(folder / "status.json")["state"] == "DONE"
    return folder


def outcome(folder: Path) -> dict[str, Any]:
    """All that a finished run computed, to the last bit, without what depends on the clock."""
    state = newest_checkpoint(folder / "r")
    epochs = [{name: value for name, value in line.items() if name != "seconds"} for line in state["history"]["epochs"]]
    return {
        "weights": read_json(folder / "r" / "result.json")["weights_sha256"],
        "optimizer": tensors_sha256(state["optimizer"]["state"]),
        "metrics": metrics(folder / "r"),
        "epochs": json.dumps(epochs),
        "best": state["best"],
        "position": (state["step"], state["epoch"], state["samples_consumed"]),
        "state": read_json(folder / "r" / "status.json")["state"],
    }


def tensors_sha256(tree: Any) -> str:
    """A hash of all tensors in nested dicts and lists."""
    digest = hashlib.sha256()
    for name, tensor in walk(tree):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def walk(tree: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor with its path."""
    if isinstance(tree, torch.Tensor):
        yield name, tree
    elif isinstance(tree, dict):
        for key, child in tree.items():
            yield from walk(child, f"{name}.{key}")
    elif isinstance(tree, list | tuple):
        for number, child in enumerate(tree):
            yield from walk(child, f"{name}.{number}")
