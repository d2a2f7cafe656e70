"""What the tests of resuming share: runs that are never stopped, and the comparison of every bit with them."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tests.helpers.processes import metrics, newest_checkpoint, read_json
from tests.helpers.server import NORMED, Ended, Job, Server

IMAGES = ["--model", "normed", "--batch-size", "12", "--lr", "0.02", "--epochs", "2", "--schedule", "constant",
          "--shift", "2", "--flip", "random", "--random-crop", "0.5", "--threads", "1", "--checkpoint-every", "3",
          "--no-pictures", "--run-name", "r"]


def run(server: Server, folder: Path, *flags: Any, trainer: str = "cifar", ranks: int = 1, hook: str = "",
        timeout: float = 120) -> Ended:
    """A run in `folder`, to its end or to where it is killed."""
    base = NORMED if trainer == "cifar" else IMAGES
    with Job(server, trainer, [*base, "--output-dir", folder, *flags], folder=folder, ranks=ranks, hook=hook) as job:
        return job.wait(timeout)


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


def image_tree(folder: Path, *, num_train: int = 120, num_test: int = 40) -> Path:
    """Two classes of small noisy images: train/<class>/*.png and test/<class>/*.png."""
    generator = torch.Generator().manual_seed(1)
    for split, number in (("train", num_train), ("test", num_test)):
        for index in range(number):
            label = index % 2
            pixels = torch.randint(0, 128, (36, 36, 3), generator=generator) + 100 * label
            path = folder / split / "ab"[label] / f"{index:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(path)
    return folder
