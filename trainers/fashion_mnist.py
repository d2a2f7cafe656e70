"""Train a classifier of clothing on FashionMNIST, as Dive into Deep Learning does, on one process or many.

    python trainers/fashion_mnist.py --data-dir data                                  # train_ch3: softmax regression
    python trainers/fashion_mnist.py --recipe lenet                                   # train_ch6: LeNet
    torchrun --standalone --nproc_per_node=2 trainers/fashion_mnist.py --recipe lenet # two ranks
    python trainers/fashion_mnist.py --dataset synthetic --epochs 3                   # no data at hand
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if not __package__:  # run by path: our packages, not others of the same names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.stop import catch_signals

if __name__ == "__main__":
    catch_signals()  # before torch is imported, which takes seconds

import torch

from datasets import fashion_mnist
from datasets import synthetic_digits as digits
from datasets.augment import Augmentation
from datasets.loaders import evaluation_loader, train_loader
from datasets.tensors import TensorDataset
from launch.command_line import nearest, run
from launch.errors import UsageError
from launch.process_group import World
from trainers import models
from trainers.engine.config import TrainConfig
from trainers.engine.once_per_node import download_once
from trainers.engine.run.card import ModelCard, write_card
from trainers.engine.session import join_world, open_run, train_classifier

MEAN, STD = (0.0,), (1.0,)  # images lie in 0 to 1, as the book leaves them


@dataclass(frozen=True, kw_only=True)
class FashionMnistConfig(TrainConfig):
    """Train a classifier of clothing on FashionMNIST."""

    recipe: str = "softmax"
    """softmax: the book's train_ch3. lenet: its train_ch6."""
    dataset: Literal["fashion-mnist", "synthetic"] = "fashion-mnist"
    """fashion-mnist is read from --data-dir; synthetic is digits drawn from the seed."""
    model: str = "softmax"
    """softmax, lenet or mnistnet."""


RECIPES: dict[str, dict[str, Any]] = {
    "softmax": {"model": "softmax", "epochs": 10, "batch_size": 256, "learning_rate": 0.1, "momentum": 0.0},
    "lenet": {"model": "lenet", "epochs": 10, "batch_size": 256, "learning_rate": 0.9, "momentum": 0.0},
}


def load_data(config: FashionMnistConfig, world: World) -> tuple[TensorDataset, TensorDataset]:
    """Training and test split."""
    if config.dataset == "synthetic":
        return digits.load(seed=config.seed)
    download_once(config, world, fashion_mnist.download)
    return fashion_mnist.load(config.data_dir)


def check(config: FashionMnistConfig) -> None:
    """Find mistakes in the flags before ranks wait for each other."""
    config.check()
    if config.model not in models.GREY:
        raise UsageError(f"--model {config.model}: unknown; choose {', '.join(models.GREY)}"
                         f"{nearest(config.model, models.GREY)}")


def main(config: FashionMnistConfig) -> int:
    """One run, on this rank; returns the exit code."""
    check(config)
    with join_world(config) as world, open_run(config, "fashion_mnist", world) as folder:
        if folder is None:
            return 0
        train, test = load_data(config, world)
        write_card(folder, ModelCard(trainer="fashion_mnist", model=config.model, class_names=train.class_names,
                                     mean=MEAN, std=STD, image_size=(28, 28)))
        shard = {"rank": world.rank, "world_size": world.world_size, "device": world.device}
        augmentation = Augmentation(seed=config.seed, mean=MEAN, std=STD)
        batches = train_loader(train, augmentation, batch_size=config.batch_size,
                               rank_batch_size=config.rank_batch_size(), seed=config.seed, **shard)
        test_batches = evaluation_loader(test, augmentation.normalize, **shard)
        torch.manual_seed(config.seed)
        model = models.build(config.model, num_classes=len(train.class_names))
        return train_classifier(config, model, world, folder, batches, test_batches, class_names=train.class_names,
                                dataset_fingerprint=train.fingerprint(), to_image=augmentation.to_image).exit_code


if __name__ == "__main__":
    run(main, FashionMnistConfig, recipes=RECIPES)
