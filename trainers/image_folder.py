"""Train an image classifier on a folder of images by class, on one process or many.

    python trainers/image_folder.py --data-dir cats-dogs                        # train/<class>/… and test/<class>/…
    python trainers/image_folder.py --data-dir photos.pack                      # a pack; see datasets/pack.py
    torchrun --standalone --nproc_per_node=2 trainers/image_folder.py --data-dir photos --recipe finetune --workers 4
    python trainers/image_folder.py --dataset synthetic --cache                 # no data at hand"""

import hashlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

if not __package__:  # run by path: our packages, not others of the same names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.stop import begin_script, ignore_signals

begin_script(__name__)  # before torch is imported, which takes seconds

import torch
import torchvision

from datasets import image_folder, mixing, pack, samples, transforms
from datasets.augment import Augmentation
from datasets.errors import DataError
from datasets.images import packed, read, unreadable
from datasets.images.loaders import DecodedImages, Decoder, Decoding
from datasets.images.packed import ImageSource
from datasets.loaders import check_size, split_loaders
from launch.command_line import run
from launch.errors import Above, AtLeast, UsageError, first_line, printable, say, to_stderr
from launch.process_group import World, from_main, gather
from trainers import models, recipes
from trainers.augment_flags import AugmentFlags
from trainers.engine import session, user_code
from trainers.engine.config import IMAGENET, Statistics
from trainers.engine.once_per_node import found_once, once_per_node
from trainers.engine.trainer import Run
from trainers.pretrained import as_published, find_weights, named_weights, start_from

OUR_MODELS = ("cheatsheet", "net", "resnet9")  # other names are torchvision's, resnet18 too
RECIPES = recipes.read("image_folder")
PART_BYTES = 2**28  # of a cache: as much is decoded again where a build was stopped


@dataclass(frozen=True, kw_only=True)
class ImageFolderConfig(AugmentFlags):
    """Train an image classifier on a folder of images by class."""
    recipe: str = "fast"
    """fast: over 70 % on cats and dogs. cheatsheet: the tutorial's. finetune: a torchvision model at 224 pixels. For
    ImageNet, as published: resnet50-classic, -tv2 or -a3, convnext-t, vit-s, without repeated augmentation."""
    dataset: Literal["folder", "synthetic"] = "folder"
    """folder is --data-dir; synthetic is generated from the seed and written below it."""
    data_dir: Path = Path("data")
    """Folder that holds train/ and test/ (or val/), each with one folder per class; or a pack of datasets/pack.py."""
    model: str = "cheatsheet"
    """cheatsheet, net, resnet9, a classifier of torchvision.models, or timm/NAME (pip install -e .[timm])."""
    pretrained: Path | None = None
    """Start from a file of weights, or by a name that --evaluate knows too: torchvision's (IMAGENET1K_V2, DEFAULT) or
    timm; with their size, resize, interpolation, mean and std. A head for other classes is replaced by a new one."""
    image_size: Annotated[int | None, AtLeast(1, most=8192)] = None
    """Height and width that the network sees. Default: 32 for our networks, 224 for torchvision's."""
    train_size: Annotated[int | None, AtLeast(1, most=8192)] = None
    """Height and width of training images, where smaller ones than the evaluation's do. Default: --image-size."""
    fit: read.FitName = "squash"
    """Squash images into a square, crop their middle, or squash to --resize-size and crop that (timm's NFNets)."""
    resize_size: Annotated[int | None, AtLeast(1, most=8192)] = None
    """Resize the shorter side to this and crop the middle, --fit squash too, as published evaluations do."""
    interpolation: read.InterpolationName | None = None
    """By which images are resized. Default: bilinear."""
    normalize: Literal["none", "half", "imagenet"] = "imagenet"
    """Mean and std taken out of each channel: none leaves [0, 1], half is 0.5 and 0.5."""
    mean: Annotated[tuple[float, ...], AtLeast(0, most=1)] = ()
    """The mean instead of --normalize's, per channel, in units of the full range [0, 1]; with --std."""
    std: Annotated[tuple[float, ...], Above(0, most=1)] = ()
    """And the standard deviation."""
    random_crop: Annotated[float | None, Above(0, below=1, such_as=0.35)] = None
    """Train on random parts of the images, with at least this share of their area, such as 0.35."""
    cache: bool = False
    """Decode every image once, into a pack of pixels that all ranks of a node share, and train from that."""
    cache_dir: Path | None = None
    """Folder of the cache, best on a local disk. Default: .cache inside --data-dir."""
    skip_bad: Annotated[int, AtLeast(0)] = 0
    """Unreadable images that a run may leave out; in training the next readable one takes the place."""

    def size(self) -> int:
        """Height and width that the network sees."""
        return self.image_size or (32 if self.model in OUR_MODELS else 224)

    def frame(self) -> dict[str, Any]:
        """How images become square."""
        return {"fit": self.fit, "resize_size": self.resize_size, "interpolation": self.interpolation}

    def augmentation(self, dataset: Statistics) -> dict[str, Any]:
        """The same, with --mean and --std."""
        return {**super().augmentation(dataset), **({"mean": self.mean, "std": self.std} if self.mean else {})}

    def full_name(self) -> str:
        """The name of the network, for models.build."""
        as_it_is = self.model in OUR_MODELS or "/" in self.model or user_code.is_reference(self.model)
        return self.model if as_it_is else f"torchvision/{self.model}"

    def network(self) -> dict[str, Any]:
        """Its name and options, for models.build: of a run from a library's weights too."""
        first = named_weights(self) or find_weights(self.full_name(), self.pretrained, "--pretrained")
        return {**(first.options if first is not None else {}), **super().network(), "name": self.full_name()}

    def check(self) -> None:
        """Find mistakes in the flags before ranks wait for each other."""
        super().check()
        models.check_name(self.model, OUR_MODELS)
        if self.resize_size is not None and self.resize_size < self.size():
            raise UsageError(f"--resize-size {self.resize_size}: must be at least the image size of {self.size()}")
        if len(self.mean) != len(self.std) or len(self.mean) not in (0, 3):
            raise UsageError(f"--mean {' '.join(map(str, self.mean))}: must be three numbers, and --std too")
        if self.cache_dir is not None and not self.cache:
            raise UsageError(f"--cache-dir {self.cache_dir}: does nothing alone; add --cache")


def load_data(config: ImageFolderConfig, world: World, known: Sequence[str] | None = None) -> samples.Splits:
    """The splits that there are, names and labels; for --evaluate the test split, with the checkpoint's classes."""
    folder = config.data_dir
    if config.dataset == "synthetic":
        folder = config.data_dir / f"synthetic-images-{config.seed}"
        once_per_node(world, lambda: image_folder.write_synthetic(folder, seed=config.seed))
    splits = found_once(world, partial(find_splits, config, folder, known), folder=folder, digest=lambda found: "".join(
        tree.listing_hash() for tree in found.present().values()))
    if splits is None:
        raise DataError(f"--data-dir {folder}: the ranks found different files in it; give every node the same folder")
    if splits.train is not None:
        unreadable.BadImages(config.skip_bad).add(splits.train.unreadable.items())  # rather than that there are too few
        check_size(len(splits.train), config.batch_size)
    return splits


def find_splits(config: ImageFolderConfig, folder: Path, known: Sequence[str] | None) -> samples.Splits:
    """What `load_data` hands to every rank."""
    trains = config.evaluate is None
    module = packed if packed.is_pack(folder) else image_folder
    train, evaluated = module.load(folder, validation_fraction=config.validation_fraction, seed=config.seed,
                                   train=trains, known=known)
    train = train if trains else None
    if config.validation_fraction is None:
        return samples.Splits(train, None, evaluated)
    test = module.load_test(folder, evaluated.class_names)
    return samples.Splits(train, evaluated if trains or test is None else None, test)


def build_model(config: ImageFolderConfig, num_classes: int, world: World) -> torch.nn.Module:
    """The network, from the seed and `--pretrained`, tried on a blank image of the size that is evaluated."""
    model, size = models.from_flags(config, num_classes), config.size()
    try:
        if not user_code.is_reference(config.model) and config.transform is None:
            with torch.no_grad():
                model.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--image-size {size}: {config.model} cannot take 3 x {size} x {size} images "
                         f"({first_line(error)}); try another size") from None
    start_from(config, model, num_classes, world)
    return model.train()


def remember_bad_images(config: ImageFolderConfig, run: Run) -> unreadable.BadImages:
    """The unreadable images of this run, those of before an interruption included; kept in bad_images.json."""
    world, folder = run.world, run.folder
    def exchange(mine: dict[str, str]) -> list[dict[str, str]]:
        all_found = gather(world, mine)
        if any(all_found):
            folder.write_json("bad_images.json", dict(item for found in all_found for item in found.items()))
        return all_found

    known = from_main(world, lambda: None if config.resume == "never" else folder.read_json("bad_images.json"))
    return unreadable.BadImages(config.skip_bad, exchange=exchange, log=to_stderr, known=known)


def build_loaders(config: ImageFolderConfig, splits: dict[str, ImageSource], images: Augmentation, run: Run
                  ) -> dict[str, Any]:
    """The loader of each split that there is, on this rank; and the training set, for the record."""
    world, bad_images = run.world, remember_bad_images(config, run)
    if world.is_main:
        say(f"data       {printable(image_folder.describe(splits))}")
    bad_images.add([item for tree in splits.values() for item in tree.unreadable.items()], log=world.is_main)
    if (own := user_code.own_transform(config, decodes=True)) is not None:
        how = {"size": config.size(), **config.frame()}
        files = {name: transforms.Images(partial(transforms.decoded, tree), tree.targets, how)
                 for name, tree in splits.items()}
        return {"dataset": splits.get("train"),
                **transforms.transformed_loaders(files, images.normalize, own, **config.batches(), **world.shard)}
    found, keyed = from_cache(config, splits, world) if config.cache else splits, config.keyed(images)
    decodes = not all(tree.raw for tree in found.values())
    decoding = Decoding(splits=found, size=config.size(), **config.frame(), train_size=config.train_size, keyed=keyed,
                        seed=config.seed, smallest_area=config.random_crop or 1.0, skip_bad=config.skip_bad,
                        threads=world.threads)
    workers = config.num_workers(decodes=decodes or keyed is not None)
    decoder = Decoder(decoding, workers=workers, pin_memory=world.device.type == "cuda", prepare_worker=ignore_signals)
    rest = images if keyed is None else keyed.rest
    remedy = "raise --threads" if not decodes and keyed is None else f"raise --workers from {workers}"
    if decodes:
        remedy += ", or add --cache, or train from a pack of pixels (python datasets/pack.py --raw 256)"
    loaders = split_loaders(
        {name: (DecodedImages(name, tree.targets, decoder, rest, bad_images, device=world.device), len(tree))
         for name, tree in found.items()}, **config.batches(), rank=world.rank, world_size=world.world_size,
        evaluation_batch_size=max(8, min(500, 2**24 // (3 * config.size() ** 2))) if config.cache else 64,
        remedy=remedy)
    train = splits.get("train")
    return {"dataset": train and replace(train, decoder=found["train"].decoder), **loaders}


def from_cache(config: ImageFolderConfig, splits: dict[str, ImageSource], world: World) -> dict[str, ImageSource]:
    """The same images decoded: from packs that one rank per file system writes, where they are not there."""
    folder = config.cache_dir or config.data_dir / ".cache"
    found: dict[str, ImageSource] = {}
    for split, tree in splits.items():
        mark = found_once(world, partial(tree.fingerprint, times=True), folder=tree.folder, digest=lambda found: "")
        packing = cache_of(config, split, tree, folder, mark)
        once_per_node(world, packing.fill(), folder=folder)
        if not packed.is_whole(packing.out):
            raise DataError(f"--cache-dir {folder}: the cache built for this run is gone; choose a folder that every "
                            f"rank of the node sees and nothing clears")
        found[split] = packed.PackedImages(
            root=packing.out, split=split, record=packed.read_record(packing.out), raw=True, origin=tree.folder,
            fitted=packing.head["fitted"], class_names=tree.class_names, decoder=packing.head["decoder"])
    return found


def cache_of(config: ImageFolderConfig, split: str, tree: ImageSource, folder: Path, mark: str | None) -> pack.Packing:
    """Pixels of a split, whose files have this mark: as the network sees them or, to be cropped at random, larger."""
    crops, frame = split == "train" and config.random_crop is not None, config.frame()
    size = config.train_size or config.size() if split == "train" else config.size()
    frame["resize_size"] = config.resize_size and round(config.resize_size * size / config.size())
    side = min(math.ceil(size / math.sqrt(config.random_crop or 1)), max(256, size * 8 // 7)) if crops else size
    how = [packed.FORMAT, mark, crops or frame, read.DECODER, torchvision.__version__]
    name = f"{split}-{side}px-{hashlib.sha256(repr(how).encode()).hexdigest()[:16]}.pack"
    return pack.Packing(
        sources={split: tree}, out=folder / name, is_cache=True,
        convert=partial(pack.smaller, side=side, quality=None) if crops else lambda own: read.to_square(
            own, size=size, **frame).permute(1, 2, 0).contiguous().numpy(),
        head={"raw": side, "fitted": not crops, "class_names": tree.class_names,
              "decoder": f"{tree.decoder or 'pixels'}, cached at {side}" if crops else tree.decoder,
              "images_per_part": max(1, PART_BYTES // (3 * side**2))})


@session.entry_point
def main(config: ImageFolderConfig) -> dict[str, Any]:
    """One run, on this rank; returns its result."""
    config = as_published(config)
    with session.open_run(config, "image_folder", named=named_weights(config) is not None) as run:
        config = run.config
        splits = load_data(config, run.world, run.known).present()
        class_names = next(iter(splits.values())).class_names
        images = Augmentation(**config.augmentation(IMAGENET))
        loaders = build_loaders(config, splits, images, run)
        loaders = mixing.mixed(loaders, config.mixing(), num_classes=len(class_names), device=run.world.device)
        return session.train_classifier(config, run, build_model(config, len(class_names), run.world), class_names,
                                        (images.mean, images.std), **loaders)


if __name__ == "__main__":
    run(main, ImageFolderConfig, recipes=RECIPES)
