"""What images come from: a folder, a pack, or archives on their way into one. Loaders know no more of it."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from datasets.images.read import Stored


class ImageSource(Protocol):
    """The images of one split, in a fixed order. It is copied to every worker, without what it has opened."""

    @property
    def targets(self) -> Tensor:
        """Labels, int64 (N,)."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """By label."""
        ...

    @property
    def left_out(self) -> Counter[str]:
        """What is there and no image, counted by kind."""
        ...

    @property
    def unreadable(self) -> Mapping[str, str]:
        """Images known to be unreadable before any is read: path and reason."""
        ...

    def __len__(self) -> int: ...

    def path(self, sample: int) -> Path:
        """What messages call an image."""
        ...

    def read(self, sample: int) -> Stored:
        """The content of an image; BadImage if that cannot be had."""
        ...

    def fingerprint(self, *, times: bool = False) -> str:
        """A hash, to notice data that changed since a checkpoint; with `times`, files that were written since."""
        ...
