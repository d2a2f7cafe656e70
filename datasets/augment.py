"""Augmentation of a whole batch at a time, on the device the model is on, keyed by (seed, epoch, sample).

A sample gets the same crop and flip on the CPU and the GPU, alone or in a batch, at any world size. The per-sample
choices are one hash each; the pixels are moved by one gather and one select for the batch.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from datasets.keyed_random import Purpose, random_integers

CACHED_VALUES = 2**18  # 1 MiB of floats: a core's own cache holds them through the three steps of `normalize`


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What is done to a training image between the data set and the network."""

    seed: int
    mean: tuple[float, ...]
    """Per channel, in units of the full range [0, 1]."""
    std: tuple[float, ...]
    shift: int = 0
    """The image is padded by this many pixels on each side and cropped back at a random place."""
    padding: Literal["reflect", "zeros"] = "reflect"
    flip: Literal["random", "alternating"] | None = None
    """random: half of the samples, chosen again in each epoch. alternating: half of them in the first epoch, and then
    each sample the other way round every epoch, so that any two consecutive epochs show both sides (cifar10-airbench).
    """

    def prepare(self, images: Tensor) -> Tensor:
        """Pad the whole data set once, (N, C, H, W) to (N, C, H + 2 shift, W + 2 shift), so that a crop is a gather."""
        return pad(images, self.shift, self.padding) if self.shift else images

    def __call__(self, prepared: Tensor, samples: Tensor, *, epoch: int) -> Tensor:
        """Crop, flip and normalise some samples of the prepared data set.

        Args:
            prepared: uint8 (N, C, H + 2 shift, W + 2 shift), from `prepare`.
            samples: int64 (B,), indices into it, on its device; they are the key of every random choice.
            epoch: the other part of the key.

        Returns:
            float32 (B, C, H, W), normalised.
        """
        return self.augment(prepared, samples, samples, epoch)

    def batch(self, images: Tensor, samples: Tensor, *, epoch: int) -> Tensor:
        """The same result for images that are not in memory with the rest of the data set.

        Args:
            images: uint8 (B, C, H, W), not prepared.
            samples: int64 (B,), the keys, on their device.
            epoch: as above.
        """
        return self.augment(self.prepare(images), torch.arange(len(images), device=images.device), samples, epoch)

    def augment(self, prepared: Tensor, rows: Tensor, samples: Tensor, epoch: int) -> Tensor:
        """Some rows (B,) of prepared images, their random choices keyed by `samples` (B,)."""
        if self.shift:
            down = random_integers(samples, 2 * self.shift + 1, self.seed, epoch, Purpose.CROP_ROW)
            right = random_integers(samples, 2 * self.shift + 1, self.seed, epoch, Purpose.CROP_COLUMN)
            images = crop(prepared, rows, down, right, self.shift)
        else:
            images = prepared[rows]
        if self.flip is not None:
            images = mirror(images, self.flipped(samples, epoch))
        return normalize(images, self.mean, self.std)

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images (B, C, H, W) as the network sees them when nothing is random."""
        return normalize(images, self.mean, self.std)

    def flipped(self, samples: Tensor, epoch: int) -> Tensor:
        """Which samples are mirrored in this epoch: bool (B,)."""
        if self.flip == "random":
            return random_integers(samples, 2, self.seed, epoch, Purpose.FLIP) == 1
        return (random_integers(samples, 2, self.seed, 0, Purpose.FLIP) + epoch) % 2 == 1


def pad(images: Tensor, amount: int, mode: Literal["reflect", "zeros"]) -> Tensor:
    """Pad height and width on both sides; reflect does not repeat the edge pixel. Any dtype, (N, C, H, W)."""
    if mode == "reflect":
        for dimension in (2, 3):
            size = images.shape[dimension]
            positions = torch.arange(-amount, size + amount, device=images.device).abs()
            images = images.index_select(dimension, size - 1 - (size - 1 - positions).abs())
        return images
    padded = images.new_zeros(*images.shape[:2], images.shape[2] + 2 * amount, images.shape[3] + 2 * amount)
    padded[:, :, amount:-amount, amount:-amount] = images
    return padded


def crop(padded: Tensor, samples: Tensor, rows: Tensor, columns: Tensor, shift: int) -> Tensor:
    """Windows of the unpadded size whose upper left corners are (rows, columns), each (B,) in [0, 2 shift]."""
    height, width = padded.shape[2] - 2 * shift, padded.shape[3] - 2 * shift
    if padded.device.type == "cpu":  # numpy copies whole rows, 5 times as fast as torch's element by element
        views = np.lib.stride_tricks.sliding_window_view(padded.numpy(), (height, width), axis=(2, 3))
        return torch.from_numpy(views[samples.numpy(), :, rows.numpy(), columns.numpy()])
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: (N, C, 2 shift + 1, 2 shift + 1, H, W)
    return windows[samples, :, rows, columns]


def mirror(images: Tensor, chosen: Tensor) -> Tensor:
    """Some of the images (B, C, H, W), by a bool (B,), the other way round; on a CPU in place, 5 times as fast."""
    if images.device.type != "cpu":
        return torch.where(chosen[:, None, None, None], images.flip(-1), images)  # does not wait for the device
    pixels, which = images.numpy(), chosen.numpy()
    pixels[which] = torch.from_numpy(pixels[which]).flip(-1).numpy()
    return images


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 (B, C, H, W) to float32: each channel less its mean, divided by its std."""
    scale = torch.tensor([1 / (255 * s) for s in std], device=images.device)[:, None, None]
    offset = torch.tensor([m / s for m, s in zip(mean, std, strict=True)], device=images.device)[:, None, None]
    normalized = torch.empty_like(images, dtype=torch.float32)
    together = CACHED_VALUES // images[0].numel() if images.device.type == "cpu" and len(images) else len(images)
    for some, result in zip(images.split(max(1, together)), normalized.split(max(1, together)), strict=True):
        result.copy_(some).mul_(scale).sub_(offset)
    return normalized
