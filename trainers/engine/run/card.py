"""What must be known to use a run's weights: `model.json` in the run folder, written by the image trainers."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from launch.errors import CheckpointError
from launch.files import read_object

CARD_FILE = "model.json"
LARGEST = 1e5  # of the numbers in it


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """How to build the network of a run, and what its inputs are."""
    trainer: str  # its file name without .py
    model: str  # its name, for models.build
    class_names: tuple[str, ...]  # of the outputs, whatever their kind
    mean: tuple[float, ...]  # per channel, in units of the full range [0, 1], as std
    std: tuple[float, ...]
    image_size: tuple[int, int]  # height and width
    options: dict[str, Any] = field(default_factory=dict)  # further arguments of models.build, such as the width
    kind: Literal["classes", "labels", "numbers"] = "classes"  # what the outputs are
    transform: str | None = None  # FILE.py:NAME of a transform of the user's
    user_code: dict[str, str] = field(default_factory=dict)  # the sha256 of each of the user's files, by path
    fit: Literal["squash", "crop", "squash-crop"] = "squash"  # this and the next two as datasets/images/read.py has it
    resize_size: int | None = None
    interpolation: Literal["bilinear", "bicubic"] | None = None

    def __post_init__(self) -> None:
        """Raise ValueError or TypeError for what a damaged or edited file may hold, and its use would not notice."""
        own = self.trainer == "custom"  # whose inputs may be images of any number of channels, or none
        blank = own and (self.mean, self.std, self.image_size) == ((), (), (0, 0))
        for name, is_good in {
            "trainer": str(self.trainer).isidentifier(), "model": isinstance(self.model, str),
            "class_names": are_all(self.class_names, str) and len({*self.class_names}) == len(self.class_names),
            "mean": blank or (are_all(self.mean, (int, float)) and (own or len(self.mean) in (1, 3))),
            "std": blank or (are_all(self.std, (int, float), above=0) and len(self.std) == len(self.mean)),
            "image_size": blank or (are_all(self.image_size, int, above=0) and len(self.image_size) == 2),
            "kind": self.kind in ("classes", "labels", "numbers"), "fit": self.fit in ("squash", "crop", "squash-crop"),
            "resize_size": self.resize_size is None or are_all((self.resize_size,), int, above=0),
            "interpolation": self.interpolation in (None, "bilinear", "bicubic"),
        }.items():
            if not is_good:
                raise ValueError(f"{name} cannot be {getattr(self, name)!r:.100}")


def are_all(values: object, kind: type | tuple[type, ...], *, above: float = -LARGEST) -> bool:
    """Whether it is a tuple of such values, not empty, and numbers among them within limits."""
    return isinstance(values, tuple) and len(values) > 0 and all(
        isinstance(value, kind) and (isinstance(value, str) or above < value < LARGEST) for value in values)


def read_card(run: Path) -> ModelCard:
    """The card of a run; raises CheckpointError if it is missing or damaged."""
    if not run.is_dir():
        raise CheckpointError(f"--run {run}: no such folder; give one that a trainer made, such as runs/NAME")
    saved = read_object(run / CARD_FILE) or {}
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    try:
        return ModelCard(**values)
    except (TypeError, ValueError) as error:
        reason = f" ({str(error).removeprefix('ModelCard.__init__() ')})" if saved else ""
        raise CheckpointError(f"--run {run}: has no readable {CARD_FILE}{reason}; only runs of the image trainers do, "
                              f"from the moment they start training") from None
