"""Every network for images, and `build`, to find one by name. `width`: channels of the first convolution trained."""

from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models as torchvision_models
from torchvision.ops import Conv2dNormActivation

from launch.errors import UsageError, first_line, nearest
from trainers.engine.user_code import TIMM, Reference, is_reference, timm_library


class Net(nn.Module):
    """The network of PyTorch's 60-minute blitz for 3x32x32 images, with a width to widen."""

    def __init__(self, num_classes: int, width: int = 6) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 5)
        self.conv2 = nn.Conv2d(width, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, 3, 32, 32)."""
        features = F.max_pool2d(F.relu(self.conv1(images)), 2)
        features = F.max_pool2d(F.relu(self.conv2(features)), 2).flatten(1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(features)))))


class WhiteNet(nn.Module):
    """A small fast network for 3x32x32 images, after cifar10-airbench (Keller Jordan, 2024): a first layer that whitens
    patches, set from the data and frozen; convolutions that start as the identity; norms without a weight."""

    def __init__(self, num_classes: int, width: int = 32) -> None:
        super().__init__()
        self.whitening = nn.Conv2d(3, 24, 2)  # 3 channels x 2 x 2 pixels = 12 directions, each with either sign
        self.whitening.weight.requires_grad_(False)
        self.blocks = nn.Sequential(white_block(24, width), white_block(width, 4 * width),
                                    white_block(4 * width, 4 * width))
        for module in self.blocks.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.dirac_(module.weight.data[:module.in_channels])  # these filters pass their channel through
            elif isinstance(module, nn.BatchNorm2d):
                module.weight.requires_grad_(False)
        self.head = nn.Linear(4 * width, num_classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, 3, 32, 32)."""
        features = self.blocks(F.gelu(self.whitening(images)))
        return self.head(F.max_pool2d(features, 3).flatten(1)) / 9

    @torch.no_grad()
    def whiten(self, images: Tensor, eps: float = 5e-4) -> None:
        """Set the first layer from normalised images (N, 3, 32, 32): its outputs become uncorrelated, of variance 1.
        The eigenvectors' signs are fixed, since those that LAPACK returns differ between machines."""
        patches = images.unfold(2, 2, 1).unfold(3, 2, 1).movedim(1, 3).flatten(0, 2).flatten(1).double()
        eigenvalues, eigenvectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        eigenvectors = eigenvectors * eigenvectors.gather(0, eigenvectors.abs().argmax(0)[None]).sign()
        filters = (eigenvectors / (eigenvalues + eps).sqrt()).T.view(12, 3, 2, 2)
        self.whitening.weight.copy_(torch.cat([filters, -filters]))


def white_block(channels_in: int, channels_out: int) -> nn.Sequential:
    """conv, pool, norm, GELU, conv, norm, GELU; the norms' running statistics follow the last few batches."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False), nn.MaxPool2d(2),
        nn.BatchNorm2d(channels_out, eps=1e-12, momentum=0.4), nn.GELU(),
        nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out, eps=1e-12, momentum=0.4), nn.GELU())


class ResNet9(nn.Module):
    """The nine-layer residual network of David Page's DAWNBench entry (2018), for 3x32x32 images."""

    def __init__(self, num_classes: int, width: int = 64) -> None:
        super().__init__()
        block = Conv2dNormActivation  # 3x3 convolution, BatchNorm, ReLU
        self.stem = nn.Sequential(block(3, width), block(width, 2 * width), nn.MaxPool2d(2))
        self.residual1 = nn.Sequential(block(2 * width, 2 * width), block(2 * width, 2 * width))
        self.middle = nn.Sequential(block(2 * width, 4 * width), nn.MaxPool2d(2), block(4 * width, 8 * width),
                                    nn.MaxPool2d(2))
        self.residual2 = nn.Sequential(block(8 * width, 8 * width), block(8 * width, 8 * width))
        self.head = nn.Linear(8 * width, num_classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, 3, 32, 32)."""
        features = self.stem(images)
        features = self.middle(features + self.residual1(features))
        features = features + self.residual2(features)
        return self.head(F.adaptive_max_pool2d(features, 1).flatten(1)) / 8


class ResNet18(nn.Module):
    """ResNet-18 (He et al., 2015) for 3x32x32 images: torchvision's blocks, a 3x3 stem without stride, no max-pool."""

    def __init__(self, num_classes: int, width: int = 64) -> None:
        super().__init__()
        self.stem = Conv2dNormActivation(3, width)
        self.layers = nn.Sequential(residual_layer(width, width, stride=1), *(
            residual_layer(channels, 2 * channels, stride=2) for channels in (width, 2 * width, 4 * width)))
        self.head = nn.Linear(8 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, 3, 32, 32)."""
        return self.head(self.layers(self.stem(images)).mean((2, 3)))


def residual_layer(channels_in: int, channels_out: int, *, stride: int) -> nn.Sequential:
    """Two basic blocks; the first halves the image if the stride is 2."""
    shortcut = None
    if stride != 1:
        shortcut = Conv2dNormActivation(channels_in, channels_out, 1, stride, activation_layer=None)
    block = torchvision_models.resnet.BasicBlock
    return nn.Sequential(block(channels_in, channels_out, stride, shortcut), block(channels_out, channels_out))


class CheatSheetNet(nn.Sequential):
    """The cats-and-dogs network of the CNN cheat sheet, for 3x32x32 images; larger ones are pooled to 5x5 features."""

    def __init__(self, num_classes: int, width: int = 6) -> None:
        super().__init__(OrderedDict(
            model=nn.Sequential(nn.Conv2d(3, width, 5), nn.ReLU(), nn.MaxPool2d(2, 2),
                                nn.Conv2d(width, 16, 5), nn.ReLU(), nn.MaxPool2d(2, 2)),
            pool=nn.AdaptiveAvgPool2d(5), flatten=nn.Flatten(),
            classifier=nn.Sequential(nn.Linear(400, 800), nn.ReLU(), nn.Linear(800, 120), nn.ReLU(),
                                     nn.Linear(120, num_classes))))


class MnistNet(nn.Module):
    """The MNIST tutorial's network for 1x28x28 images: log-probabilities, which cross-entropy leaves as they are."""

    def __init__(self, num_classes: int, channels: tuple[int, int] = (10, 20), hidden: int = 50,
                 dropout: float = 0.5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels[0], 5)
        self.conv2 = nn.Conv2d(channels[0], channels[1], 5)
        self.conv2_drop = nn.Dropout2d(dropout)
        self.fc1 = nn.Linear(channels[1] * 4 * 4, hidden)
        self.fc1_drop = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities (B, num_classes) of images (B, 1, 28, 28)."""
        features = F.relu(F.max_pool2d(self.conv1(images), 2))
        features = F.relu(F.max_pool2d(self.conv2_drop(self.conv2(features)), 2)).flatten(1)
        return F.log_softmax(self.fc2(self.fc1_drop(F.relu(self.fc1(features)))), dim=1)


def softmax_regression(num_classes: int) -> nn.Sequential:
    """One linear layer on the pixels of 1x28x28 images, as Dive into Deep Learning starts it (chapter 3)."""
    linear = nn.Linear(28 * 28, num_classes)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.Flatten(), linear)


def lenet(num_classes: int) -> nn.Sequential:
    """LeNet for 1x28x28 images with sigmoids, average pooling, Xavier's start (Dive into Deep Learning, chapter 6)."""
    model = nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.Sigmoid(), nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5), nn.Sigmoid(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(16 * 5 * 5, 120), nn.Sigmoid(), nn.Linear(120, 84), nn.Sigmoid(), nn.Linear(84, num_classes))
    for module in model:
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
    return model


OURS: dict[str, Callable[..., nn.Module]] = {"net": Net, "whitenet": WhiteNet, "resnet9": ResNet9, "resnet18": ResNet18,
                                             "cheatsheet": CheatSheetNet}
GREY: dict[str, Callable[..., nn.Module]] = {"mnistnet": MnistNet, "softmax": softmax_regression, "lenet": lenet}


def check_name(name: str, ours: Collection[str], *, libraries: bool = True) -> None:
    """Raise UsageError with the nearest name for a `--model` that is none of ours, of a library's, and no file's."""
    theirs = torchvision_models.list_models(module=torchvision_models) if libraries else []
    known = [*ours, *theirs, *(f"torchvision/{each}" for each in theirs)]
    choices = ", ".join(ours) + ", a classifier of torchvision.models, timm/NAME" * libraries
    if libraries and name.startswith(TIMM) and not is_reference(name):
        timm, choices = timm_library("--model"), "a name of timm.list_models() behind timm/"
        known = [TIMM + each for each in (*timm.list_models(), *timm.list_pretrained())]
    if name not in known and not is_reference(name):
        raise UsageError(f"--model {name}: unknown; choose {choices} or FILE.py:NAME{nearest(name, known)}")


def from_flags(config: Any, num_classes: int) -> nn.Module:
    """The network that an ImageConfig describes, from the seed."""
    torch.manual_seed(config.seed)
    return build(**config.network(), num_classes=num_classes)


def build(name: str, *, num_classes: int, **options: Any) -> nn.Module:
    """A new network for images with its usual initialisation, on the CPU; `torchvision/` and `timm/` choose a library.
    An option of None is the default. ValueError for an unknown name, UsageError for options that it does not take."""
    chosen: dict[str, Any] = {option: value for option, value in options.items() if value is not None}
    if is_reference(name):  # made with what its signature asks for, or ready as it is
        reference, offered = Reference("--model", name), {"num_classes": num_classes}
        found, offered["image_size"] = reference.find(), chosen.pop("image_size", None)
        model = found if isinstance(found, nn.Module) and not chosen else reference.make(offered, options=chosen)
        if not isinstance(model, nn.Module):
            raise UsageError(f"--model {name}: is {type(model).__name__}, not a network; give an nn.Module, or a class "
                             f"or function that makes one")
        return model
    try:
        if (make := (OURS | GREY).get(name)) is not None:
            return make(num_classes, **chosen)
        if name.startswith(TIMM):
            return timm_library("--model").create_model(name.removeprefix(TIMM), num_classes=num_classes, **chosen)
        name = name.removeprefix("torchvision/")
        own = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
        return torchvision_models.get_model(name, weights=None, num_classes=num_classes, **own, **chosen)
    except (ValueError, TypeError, RuntimeError) as error:
        if not chosen:
            raise
        raise UsageError(f"--model-options {' '.join(f'{key}={value}' for key, value in chosen.items())}: {name} takes "
                         f"no such thing ({first_line(error)}); leave it out or correct it") from None
