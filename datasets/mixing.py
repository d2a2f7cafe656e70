"""Mixup and CutMix: both partners of a pair are mixed with each other, on the device, a whole batch at a time.
Partners are neighbours in the epoch's order, on one rank (order.py). All is a hash of (seed, epoch, the first one)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from datasets.errors import DataError
from datasets.keyed_random import Purpose, random_beta, random_integers, random_uniform
from datasets.loaders import Batch


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """What is done to a pair of training images and their labels: of two kinds one, each to half of the pairs."""
    num_classes: int
    mixup: float | None = None  # images are averaged, lambda from Beta(this, this) (Zhang et al., 2018)
    cutmix: float | None = None  # or exchange a box of 1 - lambda of their area, lambda likewise (Yun et al., 2019)
    off_epoch: int | None = None  # the epoch, counted from 0, from which on nothing is mixed

    def draw(self, pairs: Tensor, *, seed: int, epoch: int) -> Tensor:
        """Of pairs, named by their first samples (P,): lambda, 1 for a box, its middle (y, x), in [0, 1]; (P, 4)."""
        key = (seed, epoch)
        has_box = random_integers(pairs, 2, *key, Purpose.MIX_KIND).double()
        if self.mixup is None or self.cutmix is None:
            has_box = torch.full_like(has_box, float(self.mixup is None))
        shape = has_box * (self.cutmix or 0.0) + (1 - has_box) * (self.mixup or 0.0)
        middle = [random_uniform(pairs, *key, purpose) for purpose in (Purpose.MIX_ROW, Purpose.MIX_COLUMN)]
        return torch.stack([random_beta(pairs, shape, *key, Purpose.MIX_LAMBDA), has_box.float(), *middle], 1)

    def __call__(self, inputs: Tensor, targets: Tensor, drawn: Tensor) -> Batch:
        """Mixed images (B, C, H, W), and each one's shares of all labels, float32 (B, num_classes). Partners lie beside
        each other; targets are classes (B,), or rows of labels; `drawn` (B / 2, 4) is from `draw`."""
        kept, has_box, *middle = drawn.unbind(1)
        of_pixels = kept[:, None, None, None]  # how much of each pixel is the image's own
        if self.cutmix is not None:
            rows, columns = (span(kept, *each) for each in zip(middle, inputs.shape[-2:], strict=True))
            outside = 1 - rows[:, None, :, None] * columns[:, None, None, :]
            of_pixels = torch.where(has_box[:, None, None, None] == 1, outside, of_pixels)
            kept = torch.where(has_box == 1, outside.mean((1, 2, 3)), kept)  # a box at the edge is smaller than drawn
        labels = nn.functional.one_hot(targets, self.num_classes) if targets.ndim == 1 else targets
        return with_partner(inputs, of_pixels), with_partner(labels.float(), kept[:, None])

    def batches(self, batches: Iterator[Any], samples: Tensor, epoch: int, *, seed: int, device: torch.device
                ) -> Iterator[Batch]:
        """Mixed batches of these samples, in order. DataError for inputs that cannot be mixed."""
        if self.off_epoch is not None and epoch >= self.off_epoch:
            yield from batches
            return
        drawn = self.draw(samples[::2].to(device), seed=seed, epoch=epoch)
        for inputs, targets in batches:
            if not (isinstance(inputs, Tensor) and inputs.ndim == 4 and inputs.is_floating_point()):
                raise DataError("--mixup and --cutmix: mix images, floats (B, C, H, W), and no others; leave both out")
            images, labels = (tensor.to(device, non_blocking=True) for tensor in (inputs, targets))
            of_pairs, drawn = drawn.tensor_split([len(inputs) // 2])
            yield self(images, labels, of_pairs)


def span(kept: Tensor, middle: Tensor, length: int) -> Tensor:
    """1 for the rows (or columns) of each pair's box, else 0: float32 (P, length), rounded as in CutMix's own code."""
    half = (length * (1 - kept.double()).sqrt()).floor() // 2
    distance = torch.arange(length, device=kept.device) - (length * middle.double()).floor()[:, None]
    return ((distance >= -half[:, None]) & (distance < half[:, None])).float()


def with_partner(values: Tensor, kept: Tensor) -> Tensor:
    """Every value (2 P, ...) with its partner's: `kept` (P, ...) is its own share."""
    pairs = values.unflatten(0, (-1, 2))
    return torch.lerp(pairs.flip(1), pairs, kept[:, None].to(values.dtype)).flatten(0, 1)


def mixed(loaders: dict[str, Any], how: Mapping[str, Any], *, num_classes: int, device: torch.device) -> dict[str, Any]:
    """The loaders of one rank, by split, the training batches mixed by `how`: arguments of Mixing, or none at all."""
    if how and (loader := loaders.get("train")) is not None:
        loader.sampler.group_size = 2  # after `off_epoch` too
        loader.mix = partial(Mixing(num_classes=num_classes, **how).batches, seed=loader.sampler.seed, device=device)
    return loaders
