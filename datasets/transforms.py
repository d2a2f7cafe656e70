"""People's own transforms of images, such as torchvision's v2: one image at a time, each under a key of its own."""

import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from datasets.augment import Augmentation, KeyedTransforms
from datasets.errors import DataError
from datasets.images import packed, read, unreadable
from datasets.images.loaders import DecodedImages, Decoder, FromMemory
from datasets.loaders import memory_loaders, split_loaders
from datasets.samples import Explain, Reading, Splits, sample_loaders
from datasets.tensors import ThreeSplits

Normalize = Callable[[Tensor], Tensor]  # uint8 images (B, C, H, W) to floats
# A transform of the user's: what makes it, what explains its errors, its flag, and further arguments of sample_loaders
Own = tuple[Callable[[], Callable[..., Any]], Explain, str, Mapping[str, Any]]


def takes_train(transform: Callable[..., Any]) -> bool:
    """Whether a transform has a parameter `train`, and so serves evaluation too."""
    return "train" in inspect.signature(transform.forward if isinstance(transform, nn.Module) else transform).parameters


class Images(NamedTuple):
    """One split of images, sample by sample, before the user's transform."""
    read: Callable[..., Tensor]  # uint8 (C, H, W), at full size; with `frame`, at the size that the network sees
    targets: Tensor
    frame: Mapping[str, Any] = {}


class Transformed(Dataset[Any]):
    """Images through a transform of the user's: (inputs, label). Without a `train`, it leaves test images alone."""

    def __init__(self, images: Images, transform: Callable[..., Any], normalize: Normalize, *, train: bool) -> None:
        self.images, self.transform, self.normalize, self.train = images, transform, normalize, train
        self.targets, self.takes_train = images.targets, takes_train(transform)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, sample: int) -> tuple[Any, Tensor]:
        if not (self.train or self.takes_train):
            return self.normalize(self.images.read(sample, **self.images.frame)[None])[0], self.targets[sample]
        how = {"train": self.train} if self.takes_train else {}
        return self.transform(self.images.read(sample), **how), self.targets[sample]


def decoded(tree: packed.ImageSource, sample: int, **frame: Any) -> Tensor:
    """uint8 (3, H, W) of an image file, at full size by default; DataError if it is unreadable."""
    try:
        return read.to_square(tree.read(sample), **frame) if frame else full_size(tree.read(sample))
    except read.BadImage as error:
        raise DataError(f"{tree.path(sample)}: not readable as an image ({error}); repair or remove it") from None


def full_size(content: read.Stored) -> Tensor:
    """uint8 (3, H, W) of an image; BadImage if it is unreadable."""
    return torch.from_numpy(read.pixels(content)).permute(2, 0, 1).contiguous()


def image_loaders(splits: ThreeSplits, images: Augmentation, own: Own | None, keyed: KeyedTransforms | None, *,
                  workers: int, prepare_worker: Callable[[], None], device: torch.device, **how: Any) -> dict[str, Any]:
    """The loaders of one rank for images in memory: whole batches, or one by one for users' or `keyed` transforms."""
    present = Splits(*splits).present()
    if own is not None:
        own_images = {name: Images(functools.partial(operator.getitem, dataset.inputs), dataset.targets)
                      for name, dataset in present.items()}
        return transformed_loaders(own_images, images.normalize, own, device=device, **how)
    trained: dict[str, Any] = {}
    if keyed is not None and (train := present.pop("train", None)) is not None:
        decoder = Decoder(FromMemory(images=train.inputs, keyed=keyed), workers=workers,
                          pin_memory=device.type == "cuda", prepare_worker=prepare_worker)
        decode = DecodedImages("train", train.targets, decoder, keyed.rest, unreadable.BadImages(0), device=device)
        trained = split_loaders({"train": (decode, len(train))}, remedy=f"raise --workers from {workers}", **how)
    return trained | memory_loaders(present, images, device=device, **how)


def transformed_loaders(splits: Mapping[str, Images], normalize: Normalize, own: Own, **how: Any) -> dict[str, Any]:
    """The loaders of one rank for images that pass a user's transform, each under its own key."""
    make, explain, name, further = own
    opening = functools.partial(open_transformed, splits, normalize, make)
    return sample_loaders(Reading(opening, seed=how["seed"], name=name, explain=explain), **further, **how)


def open_transformed(splits: Mapping[str, Images], normalize: Normalize, make: Callable[[], Any]) -> Splits:
    """The splits with the transform, in the process that reads them."""
    transform = make()
    return Splits(**{name: Transformed(images, transform, normalize, train=name == "train")
                     for name, images in splits.items()})  # pyright: ignore[reportArgumentType]
