"""Train a classifier of handwritten digits on MNIST, on one process or many.

    python trainers/mnist.py --data-dir data                                          # the tutorial's network, 10/20
    torchrun --standalone --nproc_per_node=2 trainers/mnist.py --recipe fast          # over 99 % in seconds
    python trainers/mnist.py --dataset synthetic --epochs 2                           # no data at hand"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

if not __package__:  # run by path: our packages, not others of the same names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.stop import begin_script

begin_script(__name__)  # before torch is imported, which takes seconds

from datasets import augment, mnist, synthetic_digits
from launch.command_line import run
from launch.errors import AtLeast, UsageError
from trainers import models, recipes
from trainers.augment_flags import AugmentFlags, load_splits
from trainers.engine.config import Statistics
from trainers.engine.session import entry_point, open_run, train_classifier


@dataclass(frozen=True, kw_only=True)
class MnistConfig(AugmentFlags):
    """Train a classifier of handwritten digits on MNIST."""
    SIZE: ClassVar = 28
    recipe: str = "tutorial"
    """tutorial: its network, rates and number of epochs. fast: over 99 % in less time."""
    dataset: Literal["mnist", "synthetic"] = "mnist"
    """mnist is read from --data-dir, IDX files or mnist.npz; synthetic digits are generated from the seed."""
    model: str = "mnistnet"
    """mnistnet, lenet or softmax."""
    channels: Annotated[tuple[int, int] | None, AtLeast(1, most=65536)] = None
    """Of mnistnet's two convolutions. Default: 10 20."""
    hidden: Annotated[int | None, AtLeast(1, most=65536)] = None
    """Of mnistnet, between its two last layers. Default: 50."""
    dropout: Annotated[float | None, AtLeast(0, below=1)] = None
    """Of mnistnet: share of channels and of hidden units that a training step leaves out. Default: 0.5."""
    normalize: Literal["none", "half", "dataset"] = "none"
    """Mean and std taken out of the images: none leaves [0, 1], half is 0.5 and 0.5, dataset those of MNIST."""
    padding: Literal["reflect", "zeros"] = "zeros"
    """What the padding shows."""

    def check(self) -> None:
        """Find mistakes in the flags before ranks wait for each other."""
        super().check()
        models.check_name(self.model, models.GREY, libraries=False)
        for name in ("channels", "hidden", "dropout") if self.model in models.GREY.keys() - {"mnistnet"} else ():
            if getattr(self, name) is not None:
                raise UsageError(f"--{name}: {self.model} has none to set; leave it out, or use --model mnistnet")


RECIPES = recipes.read("mnist")
load_data = partial(load_splits, published=mnist, drawn=synthetic_digits)


@entry_point
def main(config: MnistConfig, trainer: str = "mnist", load: Any = load_data,
         statistics: Statistics = (mnist.MEAN, mnist.STD)) -> dict[str, Any]:
    """One run, on this rank; returns its result."""
    with open_run(config, trainer) as run:
        config = run.config
        train, validation, test = load(config, run.world, run.known)
        images = augment.Augmentation(**config.augmentation(statistics))
        loaders = config.loaders((train, validation, test), images, run.world)
        return train_classifier(config, run, models.from_flags(config, len(test.class_names)), test.class_names,
                                (images.mean, images.std), dataset=train, **loaders)


if __name__ == "__main__":
    run(main, MnistConfig, recipes=RECIPES)
