"""What must be known to use a run's weights: `model.json` in the run folder, written by the image trainers."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from launch.errors import CheckpointError
from launch.files import read_object

CARD_FILE = "model.json"


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """How to build the network of a run, and what its inputs are."""

    trainer: str
    """File name of the trainer, without .py."""
    model: str
    """Name of the network, for models.build."""
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    """Per channel, in units of the full range [0, 1]."""
    std: tuple[float, ...]
    image_size: tuple[int, int]
    """Height and width."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of models.build, such as the width."""
    fit: Literal["squash", "crop"] = "squash"
    """How an image of another shape is made to fit."""

    @property
    def channels(self) -> int:
        """3 for colour, 1 for greyscale."""
        return len(self.mean)


def read_card(run: Path) -> ModelCard:
    """The card of a run; raises CheckpointError if it is missing or damaged."""
    if not run.is_dir():
        raise CheckpointError(f"--run {run}: no such folder; give one that a trainer made, such as runs/NAME")
    saved = read_object(run / CARD_FILE) or {}
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    try:
        return ModelCard(**values)
    except TypeError:
        raise CheckpointError(f"--run {run}: has no readable {CARD_FILE}; only runs of the image trainers do, from the "
                              f"moment they start training") from None
