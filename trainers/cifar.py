"""Train an image classifier on CIFAR-10, on one process or many.

    python trainers/cifar.py --data-dir data                                          # one process
    torchrun --standalone --nproc_per_node=2 trainers/cifar.py --data-dir data        # two ranks: CPU (gloo) or GPU
    python trainers/cifar.py --recipe speedrun                                        # eight epochs with Muon, one GPU
    python trainers/cifar.py --dataset synthetic --epochs 3                           # no data at hand
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

if not __package__:  # run by path: our packages, not others of the same names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.stop import begin_script

if __name__ == "__main__":
    begin_script()  # before torch is imported, which takes seconds

from torch import nn

from datasets import cifar, synthetic
from datasets.augment import Augmentation
from datasets.tensors import TensorDataset
from launch.command_line import run
from launch.errors import AtLeast, UsageError
from trainers import models
from trainers.augment_flags import AugmentFlags, load_splits
from trainers.engine.session import entry_point, open_run, train_classifier
from trainers.engine.user_code import is_reference


@dataclass(frozen=True, kw_only=True)
class CifarConfig(AugmentFlags):
    """Train an image classifier on CIFAR-10."""

    recipe: str = "fast"
    """fast: 92 % in 5 epochs. blitz: the 60-minute tutorial's. For a GPU: speedrun, airbench94_muon's; strong, a
    resnet18 in 30 epochs. Other flags override its settings."""
    dataset: Literal["cifar10", "synthetic"] = "cifar10"
    """cifar10 is read from --data-dir; synthetic is generated from the seed."""
    width: Annotated[int | None, AtLeast(1, most=65536)] = None
    """Channels of the model's first trained convolution. Default: the model's own."""

    def network(self) -> dict[str, Any]:
        """Its name and options, for models.build."""
        return {"width": self.width, **super().network()}

    def check(self) -> None:
        """Find mistakes in the flags before ranks wait for each other."""
        super().check()
        models.check_name(self.model, models.OURS)
        if self.width is not None and self.model not in models.OURS and not is_reference(self.model):
            raise UsageError(f"--width {self.width}: {self.model} has no width to set; leave it out")


RECIPES: dict[str, dict[str, Any]] = {
    "fast": {  # after cifar10-airbench; the first bias stays as it is drawn, which makes a step 1.1 times faster
        "model": "whitenet", "width": 64, "freeze": ("whitening",), "epochs": 5, "batch_size": 1024,
        "optimizer": "muon", "learning_rate": 0.04, "momentum": 0.8, "weight_decay": 0.4, "no_decay": ("norm",),
        "schedule": "linear", "label_smoothing": 0.2, "shift": 2, "flip": "alternating", "ema_decay": 0.96,
        "precision": "bf16", "channels_last": True},
    "speedrun": {  # after airbench94_muon, which leaves the whitening's bias to SGD for three epochs; no TTA here
        # its rates for SGD are per sum of 2,000 losses, and of a head divided by 256 with weights of variance 1; ours
        # are per mean, of a head divided by 9: 0.67 x 2000 x (9 / 256)^2 = 1.66, and 0.053 x 2000 = 64 x 1.66 for norms
        "model": "whitenet", "width": 64, "freeze": ("whitening.bias",), "epochs": 8, "batch_size": 2000,
        "optimizer": "muon", "learning_rate": 0.24, "momentum": 0.6, "weight_decay": 0.0024, "norm_bias_lr_scale": 64.0,
        "optimizer_options": ("sgd={'lr': 1.66, 'momentum': 0.85}", "normalize=True", "ns_steps=3"),
        "schedule": "linear", "label_smoothing": 0.2, "shift": 2, "flip": "alternating", "precision": "bf16",
        "channels_last": True, "compile": True},
    "blitz": {
        "model": "net", "epochs": 2, "batch_size": 4, "learning_rate": 0.001, "momentum": 0.9, "normalize": "half",
        "onednn": False, "seed": 1},  # two epochs at batch 4 scatter: 52.4, 56.1, 55.8 and 53.6 % with seeds 0 to 3
    "strong": {
        "model": "resnet18", "epochs": 30, "batch_size": 512, "learning_rate": 0.4, "momentum": 0.9, "nesterov": True,
        "weight_decay": 0.0005, "schedule": "onecycle", "min_lr": 0.0, "label_smoothing": 0.1, "shift": 4,
        "padding": "zeros", "flip": "alternating", "auto_augment": "trivialaugment", "cutmix": 1.0, "mix_off_epoch": 25,
        "random_erase": 0.1, "ema_decay": 0.998, "ema_warmup_steps": 10, "precision": "bf16", "channels_last": True}}
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
