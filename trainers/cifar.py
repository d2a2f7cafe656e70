"""Train an image classifier on CIFAR-10, on one process or many.

    python trainers/cifar.py --data-dir data                                          # one process
    torchrun --standalone --nproc_per_node=2 trainers/cifar.py --data-dir data        # two ranks: CPU (gloo) or GPU
    python trainers/cifar.py --recipe speedrun                                        # eight epochs with Muon, one GPU
    python trainers/cifar.py --dataset synthetic --epochs 3                           # no data at hand"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

if not __package__:  # run by path: our packages, not others of the same names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.stop import begin_script

begin_script(__name__)  # before torch is imported, which takes seconds

from torch import nn

from datasets import cifar, synthetic
from datasets.augment import Augmentation
from datasets.tensors import TensorDataset
from launch.command_line import run
from launch.errors import AtLeast, UsageError
from trainers import models, recipes
from trainers.augment_flags import AugmentFlags, load_splits
from trainers.engine.session import entry_point, open_run, train_classifier
from trainers.engine.user_code import is_reference


@dataclass(frozen=True, kw_only=True)
class CifarConfig(AugmentFlags):
    """Train an image classifier on CIFAR-10."""
    recipe: str = "fast"
    """fast: 92 % in 5 epochs. blitz: the tutorial's. For a GPU: speedrun, after airbench94_muon; strong, a resnet18."""
    dataset: Literal["cifar10", "synthetic"] = "cifar10"
    """cifar10 is read from --data-dir; synthetic is generated from the seed."""
    width: Annotated[int | None, AtLeast(1, most=65536)] = None
    """Channels of the model's first trained convolution. Default: the model's own."""

    def check(self) -> None:
        """Find mistakes in the flags before ranks wait for each other."""
        super().check()
        models.check_name(self.model, models.OURS)
        if self.width is not None and self.model not in models.OURS and not is_reference(self.model):
            raise UsageError(f"--width {self.width}: {self.model} has no width to set; leave it out")


RECIPES = recipes.read("cifar")
load_data = partial(load_splits, published=cifar, drawn=synthetic)


def build_model(config: CifarConfig, train: TensorDataset | None, num_classes: int, images: Augmentation) -> nn.Module:
    """The network, from the seed; whitenet's first layer is set from the first 5,000 training images."""
    model = models.from_flags(config, num_classes)
    if isinstance(model, models.WhiteNet) and train is not None:
        model.whiten(images.normalize(train.inputs[:5000]))
    return model


@entry_point
def main(config: CifarConfig) -> dict[str, Any]:
    """One run, on this rank; returns its result."""
    with open_run(config, "cifar") as run:
        config = run.config
        train, validation, test = load_data(config, run.world, run.known)
        source = cifar if config.dataset == "cifar10" else synthetic
        images = Augmentation(**config.augmentation((source.MEAN, source.STD)))
        loaders = config.loaders((train, validation, test), images, run.world)
        return train_classifier(config, run, build_model(config, train, len(test.class_names), images),
                                test.class_names, (images.mean, images.std), dataset=train, **loaders)


if __name__ == "__main__":
    run(main, CifarConfig, recipes=RECIPES)
