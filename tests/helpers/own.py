"""Files of a stranger's: programs/own.py, and small ones that a test writes; and training with them."""

import shutil
from pathlib import Path
from typing import Any

from tests.helpers.processes import PROGRAMS, Ended
from tests.helpers.server import run

OWN = ("--data", "own.py:load", "--model", "own.py:Net", "--loss", "own.py:loss", "--batch-size", "12", "--epochs", "2",
       "--threads", "1", "--checkpoint-every", "3", "--no-pictures", "--run-name", "r")


def train(folder: Path, *flags: Any, ranks: int | None = None, trainer: str = "custom", **how: Any) -> Ended:
    folder.mkdir(exist_ok=True, parents=True)
    if not (folder / "own.py").exists():
        shutil.copy(PROGRAMS / "own.py", folder)
    return run(trainer, *(OWN if trainer == "custom" else ()), *flags, folder=folder, ranks=ranks, **how)


LINEAR = ("--data", "mine.py:load", "--model", "mine.py:model", "--loss", "auto", "--num-classes", 2)
HEAD = """
        import sys
        import numpy as np
        import torch
        from torch import nn
        from torch.utils.data import IterableDataset, TensorDataset, random_split
        def model(num_classes):
            return nn.Linear(3, num_classes)
        def load():
            return data(24), data(9)
        def data(number, targets=lambda index: index % 2):
            return TensorDataset(torch.rand(number, 3), torch.tensor([targets(index) for index in range(number)]))
"""


def write(folder: Path, text: str, name: str = "mine.py", head: str = HEAD) -> int:
    """A user's file; returns the number of the line that ends with `# here`."""
    lines = [line[8:] for line in (head + text).splitlines()]
    (folder / name).write_text("\n".join(lines) + "\n")
    return next((number for number, line in enumerate(lines, start=1) if line.endswith("# here")), 0)
