"""The flags of augmentation that the trainers of images share, and the splits and loaders that they ask for."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor
from torchvision.transforms import AutoAugmentPolicy, InterpolationMode, v2

from datasets import augment, mixing, tensors, transforms
from launch.errors import AtLeast, UsageError
from launch.process_group import World
from launch.stop import ignore_signals
from trainers.engine import task, user_code
from trainers.engine.config import ImageConfig, Statistics
from trainers.engine.once_per_node import once_per_node

POLICIES = {"randaugment": v2.RandAugment, "trivialaugment": v2.TrivialAugmentWide, "autoaugment": v2.AutoAugment,
            "augmix": v2.AugMix}
MAGNITUDES = {"randaugment": ("magnitude", 0, 30), "augmix": ("severity", 1, 10)}  # torchvision's names and ranges
SIGMA, KERNEL = (0.1, 2.0), 13  # of the blur, in pixels (DeiT III, 2022), and what holds three sigmas on each side


@dataclass(frozen=True, kw_only=True)
class AugmentFlags(task.MixingFlags, ImageConfig):
    """Flags of augmentation: of whole batches on the device, and of one image at a time in workers."""
    TITLES: ClassVar = {"vertical_flip": "Data"}
    vertical_flip: Annotated[float, AtLeast(0, most=1)] = 0.0
    """Share of the training images that are turned upside down."""
    auto_augment: Literal["randaugment", "trivialaugment", "autoaugment", "augmix"] | None = None
    """A policy of torchvision's (autoaugment: for CIFAR-10, else for ImageNet), on one image at a time, in workers."""
    augment_magnitude: Annotated[int | None, AtLeast(0, most=30)] = None
    """Strength of the policy: of randaugment 0 to 30 (default 9), of augmix 1 to 10 (default 3)."""
    color_jitter: Annotated[float, AtLeast(0, most=1)] = 0.0
    """Vary brightness, contrast and saturation by up to this share; in workers too."""
    grayscale: Annotated[float, AtLeast(0, most=1)] = 0.0
    """Share of the training images that lose their colour; in workers too."""
    blur: Annotated[float, AtLeast(0, most=1)] = 0.0
    """Share of the training images that are blurred; in workers too."""
    random_erase: Annotated[float, AtLeast(0, most=1)] = 0.0
    """Share of the training images in which a random rectangle is blank."""

    def check(self) -> None:
        """The same, and that no flag of augmentation is in vain."""
        super().check()
        self.check_mixing(self.batch_size, 0 if self.evaluate is not None else self.rank_batch_size())
        _, low, high = MAGNITUDES.get(self.auto_augment or "", ("", 1, 0))
        if self.augment_magnitude is not None and not low <= self.augment_magnitude <= high:
            raise UsageError(f"--augment-magnitude {self.augment_magnitude}: is of randaugment, 0 to 30, and augmix, "
                             f"1 to 10, not of --auto-augment {self.auto_augment}; use one of these, or leave it out")
        for name in ("vertical_flip", "auto_augment", "color_jitter", "grayscale", "blur", "random_erase",
                     "random_crop", "train_size", "cache", "skip_bad"):
            if self.transform is not None and (value := getattr(self, name, None)):
                raise UsageError(f"--{name.replace('_', '-')}{'' if value is True else f' {value}'}: --transform takes "
                                 f"the place of it, with each image at full size; leave one of the two out")

    def augmentation(self, dataset: Statistics) -> dict[str, Any]:
        """The arguments of Augmentation; `dataset` is what `--normalize dataset` stands for."""
        return {**super().augmentation(dataset), "vertical_flip": self.vertical_flip, "random_erase": self.random_erase}

    def keyed(self, images: augment.Augmentation) -> augment.KeyedTransforms | None:
        """What workers do to one training image at a time, in torchvision's order; None for nothing."""
        chosen: list[Any] = []
        if self.auto_augment is not None:
            how: dict[str, Any] = {}
            if getattr(self, "interpolation", None):
                how["interpolation"] = InterpolationMode.BILINEAR
            if self.auto_augment == "autoaugment" and getattr(self, "dataset", None) == "cifar10":
                how["policy"] = AutoAugmentPolicy.CIFAR10
            if self.augment_magnitude is not None:
                how[MAGNITUDES[self.auto_augment][0]] = self.augment_magnitude
            chosen.append(POLICIES[self.auto_augment](**how))
        others = ((self.color_jitter, v2.ColorJitter(*[self.color_jitter] * 3)),
                  (self.grayscale, v2.RandomGrayscale(self.grayscale)),
                  (self.blur, functools.partial(blurred, share=self.blur)))
        chosen += [transform for share, transform in others if share]
        return augment.KeyedTransforms(augmentation=images, transform=v2.Compose(chosen)) if chosen else None

    def loaders(self, splits: tensors.ThreeSplits, images: augment.Augmentation, world: World) -> dict[str, Any]:
        """The loaders of one rank for images in memory."""
        keyed = self.keyed(images)
        workers = self.num_workers(decodes=keyed is not None)
        loaders = transforms.image_loaders(splits, images, user_code.own_transform(self), keyed, workers=workers,
                                           prepare_worker=ignore_signals, **self.batches(), **world.shard)
        return mixing.mixed(loaders, self.mixing(), num_classes=len(splits[-1].class_names), device=world.device)


def load_splits(config: Any, world: World, known: Sequence[str] | None = None, *, published: Any, drawn: Any
                ) -> tensors.ThreeSplits:
    """Training, validation and test set in memory; for --evaluate the last alone, with the checkpoint's classes."""
    trains = config.evaluate is None
    if config.dataset == "synthetic":
        train, test = drawn.load(seed=config.seed)
    else:
        once_per_node(world, lambda: published.prepare(config.data_dir, download=config.download, train=trains))
        train, test = published.load(config.data_dir, train=trains)
    kept = tensors.hold_out(train if trains else None, config.validation_fraction, seed=config.seed)
    return *kept, test.with_classes(known)


def blurred(image: Tensor, *, share: float) -> Tensor:
    """This share of images (C, H, W), blurred along one side, then the other: 12 ms at 224 pixels, v2's takes 32."""
    if torch.rand(()) >= share:
        return image
    sigma = float(torch.empty(()).uniform_(*SIGMA))
    for kernel in ([KERNEL, 1], [1, KERNEL]):
        image = v2.functional.gaussian_blur(image, kernel, [sigma, sigma])
    return image
