"""Augmentation keyed by (seed, epoch, sample), a batch at a time: the same on CPU and GPU, alone or in any batch."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from datasets.keyed_random import Purpose, key, random_integers, random_uniform

ERASING = (Purpose.ERASE, Purpose.ERASE_AREA, Purpose.ERASE_RATIO, Purpose.ERASE_TOP, Purpose.ERASE_LEFT)
CACHED_VALUES = 2**18  # 1 MiB of floats: a core's own cache holds them through the three steps of `normalize`


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What is done to a training image between the data set and the network."""
    seed: int
    mean: tuple[float, ...]  # per channel, in units of the full range [0, 1]
    std: tuple[float, ...]
    shift: int = 0  # the image is padded by this many pixels on each side and cropped back at a random place
    padding: Literal["reflect", "zeros"] = "reflect"
    flip: Literal["random", "alternating"] | None = None
    """random: half of the samples, chosen again in each epoch. alternating: half of them in the first epoch, and then
    each sample the other way round every epoch, so that any two epochs in a row show both sides (cifar10-airbench)."""
    vertical_flip: float = 0.0  # the share of samples that are turned upside down
    random_erase: float = 0.0  # the share of samples in which a rectangle is blank

    def prepare(self, images: Tensor) -> Tensor:
        """Pad the whole data set once, (N, C, H, W) to (N, C, H + 2 shift, W + 2 shift), so that a crop is a gather."""
        if self.padding == "zeros":
            return nn.functional.pad(images, [self.shift] * 4) if self.shift else images
        for dimension in (2, 3) if self.shift else ():  # reflected; pad() does that to floats alone on some devices
            size = images.shape[dimension]
            places = torch.arange(-self.shift, size + self.shift, device=images.device).abs()
            images = images.index_select(dimension, size - 1 - (size - 1 - places).abs())
        return images

    def __call__(self, images: Tensor, samples: Tensor, *, epoch: int, rows: Tensor | None = None) -> Tensor:
        """Crop, flip and normalise images (B, C, H, W), which may be changed in place, or these rows, int64 (B,), of a
        prepared data set: float32 (B, C, H, W). `samples`, int64 (B,), are the keys of all choices."""
        images = normalize(self.moved(images, samples, epoch, rows), self.mean, self.std)
        return erase(images, self.random_erase, samples, self.seed, epoch) if self.random_erase else images

    def moved(self, images: Tensor, samples: Tensor, epoch: int, rows: Tensor | None = None) -> Tensor:
        """The same, cropped and flipped only: uint8."""
        if self.shift:
            prepared = self.prepare(images) if rows is None else images
            down = random_integers(samples, 2 * self.shift + 1, self.seed, epoch, Purpose.CROP_ROW)
            right = random_integers(samples, 2 * self.shift + 1, self.seed, epoch, Purpose.CROP_COLUMN)
            rows = torch.arange(len(prepared), device=prepared.device) if rows is None else rows
            images = crop(prepared, rows, down, right, self.shift)
        elif rows is not None:
            images = images[rows]
        if self.flip is not None:
            images = mirror(images, self.flipped(samples, epoch))
        if self.vertical_flip:
            chosen = random_uniform(samples, self.seed, epoch, Purpose.VERTICAL_FLIP) < self.vertical_flip
            images = mirror(images, chosen, -2)
        return images

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images (B, C, H, W) as the network sees them when nothing is random."""
        return normalize(images, self.mean, self.std)

    def flipped(self, samples: Tensor, epoch: int) -> Tensor:
        """Which samples are mirrored in this epoch: bool (B,)."""
        if self.flip == "random":
            return random_integers(samples, 2, self.seed, epoch, Purpose.FLIP) == 1
        return (random_integers(samples, 2, self.seed, 0, Purpose.FLIP) + epoch) % 2 == 1


@dataclass(frozen=True, kw_only=True)
class KeyedTransforms:
    """torchvision's transforms, of one training image at a time, drawn by torch's generator, seeded by the sample."""
    augmentation: Augmentation  # its crop and flips come first
    transform: Callable[[Tensor], Tensor]

    def __call__(self, images: Tensor, samples: list[int], epoch: int) -> Tensor:
        """uint8 images (B, C, H, W), as they are stored, of these samples; changed in place."""
        augmentation, keys = self.augmentation, torch.tensor(samples, dtype=torch.int64)
        images.copy_(augmentation.moved(images, keys, epoch))
        with torch.random.fork_rng(devices=[]):
            for row, sample in enumerate(samples):
                torch.default_generator.manual_seed(key(augmentation.seed, epoch, Purpose.TRAIN_SAMPLE, sample))
                images[row] = self.transform(images[row])
        return images

    @property
    def rest(self) -> Augmentation:
        """What is left to do on the device."""
        return replace(self.augmentation, shift=0, flip=None, vertical_flip=0.0)


def crop(padded: Tensor, samples: Tensor, rows: Tensor, columns: Tensor, shift: int) -> Tensor:
    """Windows of the unpadded size whose upper left corners are (rows, columns), each (B,) in [0, 2 shift]."""
    height, width = padded.shape[2] - 2 * shift, padded.shape[3] - 2 * shift
    if padded.device.type == "cpu":  # numpy copies whole rows, 5 times as fast as torch's element by element
        views = np.lib.stride_tricks.sliding_window_view(padded.numpy(), (height, width), axis=(2, 3))
        return torch.from_numpy(views[samples.numpy(), :, rows.numpy(), columns.numpy()])
    return padded.unfold(2, height, 1).unfold(3, width, 1)[samples, :, rows, columns]  # of a view, (N, C, y, x, H, W)


def mirror(images: Tensor, chosen: Tensor, dimension: int = -1) -> Tensor:
    """Some of the images (B, C, H, W), by a bool (B,), the other way round; on a CPU in place, 5 times as fast."""
    if images.device.type != "cpu":
        return torch.where(chosen[:, None, None, None], images.flip(dimension), images)  # does not wait for the device
    pixels, which = images.numpy(), chosen.numpy()
    pixels[which] = torch.from_numpy(pixels[which]).flip(dimension).numpy()
    return images


def erase(images: Tensor, share: float, samples: Tensor, *key_parts: int) -> Tensor:
    """Zeros, in place, in a rectangle of this share of images (B, C, H, W) (Zhong et al., 2017), as torchvision's."""
    height, width = images.shape[2:]
    chance, area, ratio, top, left = (random_uniform(samples, *key_parts, purpose).double() for purpose in ERASING)
    ratio = (math.log(0.3) + math.log(3.3 / 0.3) * ratio).exp()  # height / width
    area = (0.02 + (0.33 - 0.02) * area) * height * width

    def inside(side: int, length: Tensor, place: Tensor) -> Tensor:  # which rows or columns, (B, side)
        length = length.sqrt().round().clamp(1, side)
        distance = torch.arange(side, device=images.device) - (place * (side - length + 1)).floor()[:, None]
        return (distance >= 0) & (distance < length[:, None])

    rows, columns = inside(height, area * ratio, top), inside(width, area / ratio, left)
    rows &= (chance < share)[:, None]
    return images.masked_fill_((rows[:, :, None] & columns[:, None, :])[:, None], 0)


@functools.lru_cache
def scale_and_offset(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """What `normalize` multiplies by and subtracts, (C, 1, 1) each; kept, as a copy to a GPU waits for it."""
    return (torch.tensor([1 / (255 * s) for s in std], device=device)[:, None, None],
            torch.tensor([m / s for m, s in zip(mean, std, strict=True)], device=device)[:, None, None])


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 (B, C, H, W) to float32: each channel less its mean, divided by its std."""
    scale, offset = scale_and_offset(mean, std, images.device)
    on_cpu = images.device.type == "cpu"
    # decoded images come as pixels, and planes are what most networks take: to turn bytes costs half of turning floats
    normalized = torch.empty(images.shape) if on_cpu else torch.empty_like(images, dtype=torch.float32)
    together = max(1, CACHED_VALUES // max(1, images[:1].numel())) if on_cpu else max(1, len(images))
    for some, result in zip(images.split(together), normalized.split(together), strict=True):
        result.copy_(some).mul_(scale).sub_(offset)
    return normalized
