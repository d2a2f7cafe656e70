"""Train a classifier of clothing on FashionMNIST, as Dive into Deep Learning does, on one process or many.

    python trainers/fashion_mnist.py --data-dir data                                  # train_ch3: softmax regression
    python trainers/fashion_mnist.py --recipe lenet                                   # train_ch6: LeNet
    torchrun --standalone --nproc_per_node=2 trainers/fashion_mnist.py --recipe lenet # two ranks
    python trainers/fashion_mnist.py --dataset synthetic --epochs 3                   # no data at hand
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if not __package__:  # run by path: our packages, not others of the same names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.stop import begin_script

if __name__ == "__main__":
    begin_script()  # before torch is imported, which takes seconds

from datasets import fashion_mnist
from datasets import synthetic_digits as digits
from datasets.augment import Augmentation
from datasets.tensors import ThreeSplits, hold_out
from launch.command_line import run
from launch.process_group import World
from trainers import models
from trainers.augment_flags import AugmentFlags
from trainers.engine.once_per_node import once_per_node
from trainers.engine.session import entry_point, open_run, train_classifier

MEAN, STD = (0.2860,), (0.3530,)  # over the 60,000 training images; tests/test_fashion_mnist.py recomputes them


@dataclass(frozen=True, kw_only=True)
class FashionMnistConfig(AugmentFlags):
    """Train a classifier of clothing on FashionMNIST."""

    recipe: str = "softmax"
    """softmax: the book's train_ch3. lenet: its train_ch6."""
    dataset: Literal["fashion-mnist", "synthetic"] = "fashion-mnist"
    """fashion-mnist is read from --data-dir; synthetic is digits generated from the seed."""
    model: str = "softmax"
    """softmax, lenet or mnistnet."""
    normalize: Literal["none", "half", "dataset"] = "none"
    """Mean and std taken out of the images: none leaves [0, 1], as the book does, half is 0.5 and 0.5, dataset those of
    FashionMNIST."""
    padding: Literal["reflect", "zeros"] = "zeros"
    """What the padding shows."""

    def size(self) -> int:
        """Height and width of the images."""
        return 28

    def check(self) -> None:
        """Find mistakes in the flags before ranks wait for each other."""
        super().check()
        models.check_name(self.model, models.GREY)


RECIPES: dict[str, dict[str, Any]] = {
    "softmax": {"model": "softmax", "epochs": 10, "batch_size": 256, "learning_rate": 0.1, "momentum": 0.0},
    "lenet": {"model": "lenet", "epochs": 10, "batch_size": 256, "learning_rate": 0.9, "momentum": 0.0},
}


def load_data(config: FashionMnistConfig, world: World, known: Sequence[str] | None = None) -> ThreeSplits:
    """Training, validation and test; for --evaluate the latter alone, with the classes that the checkpoint knows."""
    if config.dataset == "synthetic":
        train, test = digits.load(seed=config.seed)
    else:
        if config.download:
            once_per_node(world, lambda: fashion_mnist.download(config.data_dir))
        train, test = fashion_mnist.load(config.data_dir, train=config.evaluate is None)
    train = train if config.evaluate is None else None
    return *hold_out(train, config.validation_fraction, seed=config.seed), test.with_classes(known)


@entry_point
def main(config: FashionMnistConfig) -> dict[str, Any]:
    """One run, on this rank; returns its result."""
    with open_run(config, "fashion_mnist") as run:
        config = run.config
        train, validation, test = load_data(config, run.world, run.known)
        images = Augmentation(**config.augmentation((MEAN, STD)))
        loaders = config.loaders((train, validation, test), images, run.world)
        return train_classifier(config, run, models.from_flags(config, len(test.class_names)), test.class_names,
                                (images.mean, images.std), dataset=train, **loaders)


if __name__ == "__main__":
    run(main, FashionMnistConfig, recipes=RECIPES)
