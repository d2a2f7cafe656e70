"""People's own transforms of images, such as torchvision's v2: one image at a time, each under a random key of its own.

    own = (partial(made_again, reference, seed), reference.explain, "--transform my.py:prepare", {"workers": 2})
    loaders = image_loaders((train, validation, test), augmentation, own, **batches, **shard)      # by split
"""

import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from datasets.augment import Augmentation, KeyedTransforms
from datasets.errors import DataError
from datasets.images.loaders import DecodedImages, Decoder, FromMemory
from datasets.images.packed import ImageSource
from datasets.images.read import BadImage, Stored, pixels, to_square
from datasets.images.unreadable import BadImages
from datasets.loaders import evaluation_loader, split_loaders, train_loader
from datasets.samples import SPLITS, Explain, Reading, Splits, sample_loaders
from datasets.tensors import TensorDataset, ThreeSplits


def takes_train(transform: Callable[..., Any]) -> bool:
    """Whether a transform has a parameter `train`, and so serves evaluation too."""
    return "train" in inspect.signature(transform.forward if isinstance(transform, nn.Module) else transform).parameters


@dataclass(frozen=True, kw_only=True)
class Images:
    """One split of images, sample by sample, before the user's transform."""

    read: Callable[[int], Tensor]
    """uint8 (C, H, W), at full size."""
    fitted: Callable[[int], Tensor]
    """The same at the size that the network sees."""
    targets: Tensor


class Transformed(Dataset[Any]):
    """Images through a transform of the user's: (inputs, label). Without a `train`, it leaves test images alone."""

    def __init__(self, images: Images, transform: Callable[..., Any], normalize: Callable[[Tensor], Tensor], *,
                 train: bool) -> None:
        self.images, self.transform, self.normalize, self.train = images, transform, normalize, train
        self.targets, self.takes_train = images.targets, takes_train(transform)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, sample: int) -> tuple[Any, Tensor]:
        if self.takes_train:
            return self.transform(self.images.read(sample), train=self.train), self.targets[sample]
        if self.train:
            return self.transform(self.images.read(sample)), self.targets[sample]
        return self.normalize(self.images.fitted(sample)[None])[0], self.targets[sample]


def in_memory(dataset: TensorDataset) -> Images:
    """The images of a data set in memory, which are of the network's size."""
    read = functools.partial(operator.getitem, dataset.inputs)
    return Images(read=read, fitted=read, targets=dataset.targets)


def in_files(tree: ImageSource, **frame: Any) -> Images:
    """The images of a folder, decoded one at a time; those that are evaluated are framed as `to_square` does."""
    return Images(read=functools.partial(decoded, tree), targets=tree.targets,
                  fitted=functools.partial(decoded, tree, **frame))


def decoded(tree: ImageSource, sample: int, **frame: Any) -> Tensor:
    """uint8 (3, H, W) of an image file, at full size by default; DataError if it is unreadable."""
    try:
        return to_square(tree.read(sample), **frame) if frame else full_size(tree.read(sample))
    except BadImage as error:
        raise DataError(f"{tree.path(sample)}: not readable as an image ({error}); repair or remove it") from None


def full_size(content: Stored) -> Tensor:
    """uint8 (3, H, W) of an image; BadImage if it is unreadable."""
    return torch.from_numpy(pixels(content)).permute(2, 0, 1).contiguous()


# A transform of the user's: what makes it, what explains its errors, its flag, and further arguments of sample_loaders
Own = tuple[Callable[[], Callable[..., Any]], Explain, str, Mapping[str, Any]]


def image_loaders(splits: ThreeSplits, images: Augmentation, own: Own | None, keyed: KeyedTransforms | None, *,
                  workers: int, prepare_worker: Callable[[], None], **how: Any) -> dict[str, Any]:
    """The loaders of one rank for images in memory: a whole batch at a time, or one by one in workers where a user's
    transform or `keyed` ones ask for that."""
    present = {name: dataset for name, dataset in zip(SPLITS, splits, strict=True) if dataset is not None}
    if own is not None:
        return transformed_loaders({name: in_memory(dataset) for name, dataset in present.items()}, images.normalize,
                                   own, **how)
    shard = {name: how[name] for name in ("rank", "world_size", "device")}
    loaders: dict[str, Any] = {name: evaluation_loader(dataset, images.normalize, **shard)
                               for name, dataset in present.items() if name != "train"}
    if "train" not in present:
        return loaders
    if keyed is None:
        loaders["train"] = train_loader(present["train"], images, **how)
    else:
        decoder = Decoder(FromMemory(images=present["train"].inputs, keyed=keyed), workers=workers,
                          pin_memory=shard["device"].type == "cuda", prepare_worker=prepare_worker)
        device, train = how.pop("device"), present["train"]
        read = DecodedImages("train", train.targets, decoder, keyed.rest, BadImages(0), device=device)
        remedy = f"raise --workers from {workers}"
        loaders |= split_loaders({"train": read}, {"train": len(train)}, remedy=remedy, **how)
    return loaders


def transformed_loaders(splits: Mapping[str, Images], normalize: Callable[[Tensor], Tensor], own: Own, **how: Any
                        ) -> dict[str, Any]:
    """The loaders of one rank for images that pass a user's transform, each under its own key."""
    make, explain, name, further = own
    reading = Reading(functools.partial(open_transformed, splits, normalize, make), seed=how["seed"], name=name,
                      explain=explain)
    return sample_loaders(reading, **further, **how)


def open_transformed(splits: Mapping[str, Images], normalize: Callable[[Tensor], Tensor],
                     make: Callable[[], Callable[..., Any]]) -> Splits:
    """The splits with the transform, in the process that reads them."""
    transform = make()
    opened: dict[str, Any] = {name: Transformed(images, transform, normalize, train=name == "train")
                              for name, images in splits.items()}
    return Splits(**opened)
