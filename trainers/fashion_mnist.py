"""Train a classifier of clothing on FashionMNIST, as Dive into Deep Learning does, on one process or many.

    python trainers/fashion_mnist.py --data-dir data                                  # train_ch3: softmax regression
    torchrun --standalone --nproc_per_node=2 trainers/fashion_mnist.py --recipe lenet # train_ch6: LeNet, on two ranks
    python trainers/fashion_mnist.py --dataset synthetic --epochs 3                   # no data at hand"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

if not __package__:  # run by path: our packages, not others of the same names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.stop import begin_script

begin_script(__name__)  # before torch is imported, which takes seconds

from datasets import fashion_mnist, synthetic_digits
from launch.command_line import run
from trainers import mnist, recipes
from trainers.augment_flags import load_splits

MEAN, STD = (0.2860,), (0.3530,)  # over the 60,000 training images; tests/test_fashion_mnist.py recomputes them


@dataclass(frozen=True, kw_only=True)
class FashionMnistConfig(mnist.MnistConfig):
    """Train a classifier of clothing on FashionMNIST."""
    recipe: str = "softmax"
    """softmax: the book's train_ch3. lenet: its train_ch6."""
    dataset: Literal["fashion-mnist", "synthetic"] = "fashion-mnist"  # pyright: ignore
    """fashion-mnist is read from --data-dir; synthetic is digits generated from the seed."""
    model: str = "softmax"
    """softmax, lenet or mnistnet."""


RECIPES = recipes.read("fashion_mnist")
load_data = partial(load_splits, published=fashion_mnist, drawn=synthetic_digits)


def main(config: FashionMnistConfig) -> dict[str, Any]:
    """One run, on this rank, as of mnist.py; returns its result."""
    return mnist.main(config, "fashion_mnist", load_data, (MEAN, STD))


if __name__ == "__main__":
    run(main, FashionMnistConfig, recipes=RECIPES)
