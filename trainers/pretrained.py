"""Weights that torchvision and timm publish, by name, with the preprocessing that belongs to them.

    --model resnet50 --pretrained IMAGENET1K_V2             torchvision's, or DEFAULT; --evaluate: as they are
    --model timm/resnet50.a1_in1k --pretrained timm         timm's

A cached file (TORCH_HOME, HF_HOME) is used without network; else one rank of each node fetches it into there."""

import functools
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torchvision import models as torchvision_models

from datasets.download import silence_ends
from datasets.errors import DataError
from launch.errors import CheckpointError, UsageError, first_line, nearest, say
from launch.process_group import World
from trainers.engine.checkpoints.weights import load_weights, put_weights, read_weights_file
from trainers.engine.config import IMAGENET
from trainers.engine.once_per_node import once_per_node
from trainers.engine.user_code import timm_library


@dataclass(frozen=True, kw_only=True)
class NamedWeights:
    """Weights of a library, and its own functions for them."""
    what: str  # such as --pretrained IMAGENET1K_V2 of resnet50
    num_classes: int
    file: Callable[[], Path | None]  # where they are cached, if they are
    download: Callable[[], object]  # fetches them into there
    build: Callable[[int], torch.nn.Module]  # the network with them; timm makes a new head for other classes
    preprocessing: dict[str, Any]  # of the published figure: size, crop_share, fit (None: unknown) and more
    options: dict[str, Any] = field(default_factory=dict)  # what models.build needs to make the same network
    head: str | None = None  # the layer that timm makes itself

    def fetch(self) -> None:
        """For one rank of each node: have the file in the cache, and look into it. DataError or CheckpointError."""
        if self.file() is None:
            try:
                with silence_ends():
                    self.download()
            except Exception as error:  # urllib's, httpx's and the hub's own share no base
                raise DataError(f"{self.what}: is not cached and cannot be fetched ({first_line(error)}); run it once "
                                f"where there is a network, or set TORCH_HOME or HF_HOME to a folder that has it"
                                ) from None
        if (path := self.file()) is not None:
            read_weights_file(path, f"{self.what}: {path}")

    def put_into(self, model: torch.nn.Module, num_classes: int) -> str:
        """Put them into a network of models.build, with a new head for other classes; returns what was done."""
        try:
            library = self.build(num_classes)
        except Exception as error:  # timm's functions that convert old files raise anything
            raise CheckpointError(f"{self.what}: {self.file()}: does not fit ({first_line(error)}); remove it, and it "
                                  f"is fetched again") from None
        name = f"weights of {self.what}"
        taken = put_weights(model, library.state_dict(), name, source=self.what, new_head=True)
        if self.head is None or num_classes == self.num_classes:
            return taken
        return f"{name}; the last layer, {self.head}, is new: {num_classes} outputs instead of {self.num_classes}"


def torchvision_weights(model: str, name: str, what: str) -> NamedWeights:
    """A member of one of torchvision's enums; options are what its constructors change where they are given weights."""
    weights: Any = torchvision_models.get_model_weights(model)[name]
    own = weights.transforms()
    (size,), (resize_size,) = own.crop_size, own.resize_size
    options = {"transform_input": True} if model in ("googlenet", "inception_v3") else {}
    return NamedWeights(
        what=what, num_classes=len(weights.meta["categories"]), file=lambda: hub_file(weights.url),
        download=lambda: weights.get_state_dict(progress=False, check_hash=True, weights_only=True),
        build=lambda _: torchvision_models.get_model(model, weights=weights, progress=False),
        options={"image_size": weights.meta["min_size"][0]} if model.startswith("vit_") else options,
        preprocessing={"size": size, "resize_size": resize_size, "crop_share": size / resize_size, "fit": "crop",
                       "interpolation": own.interpolation.value, "statistics": (tuple(own.mean), tuple(own.std))})


def timm_weights(model: str, what: str) -> NamedWeights:
    """The weights of a timm network's tag, by default of its first; preprocessing at the size of training."""
    timm = timm_library("--model")
    config = timm.get_pretrained_cfg(model)
    own = timm.data.resolve_data_config({}, pretrained_cfg=config.to_dict())
    (_, height, width), share = own["input_size"], own["crop_pct"]
    fits = {"center": "crop", "squash": "squash" if share == 1 else "squash-crop"} if height == width else {}
    def build(num_classes: int) -> torch.nn.Module:
        overlay = {"file": str(file()), **({"custom_load": False} if config.hf_hub_id else {})}  # that is for `url`
        return timm.create_model(model, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=num_classes)

    def file() -> Path | None:
        hub: Any = importlib.import_module("huggingface_hub")  # timm brings it
        repository, _, revision = (config.hf_hub_id or "").partition("@")
        found = [hub.try_to_load_from_cache(repository, name, revision=revision or None)
                 for name in ("model.safetensors", "pytorch_model.bin") if repository]  # as timm prefers them
        paths = [Path(path) for path in found if isinstance(path, str)]
        return paths[0] if paths else None if repository else hub_file(config.url)

    return NamedWeights(
        what=what, num_classes=config.num_classes, file=file, build=build, head=str(config.classifier),
        download=lambda: timm.create_model(model, pretrained=True),
        preprocessing={"size": height, "resize_size": math.floor(height / share), "crop_share": share,
                       "fit": fits.get(own["crop_mode"]), "interpolation": own["interpolation"],
                       "statistics": (own["mean"], own["std"])})


def hub_file(url: str) -> Path | None:
    """A file in torch.hub's cache, if it is there."""
    path = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(url).path).name)
    return path if path.is_file() else None


@functools.cache
def find_weights(network: str, name: Path | None, flag: str) -> NamedWeights | None:
    """The weights that a flag names, of torchvision or timm; None for a file or nothing; UsageError for any other."""
    library, _, model = network.partition("/")
    if name is None or name.exists() or name.suffix or len(name.parts) > 1 or library not in ("torchvision", "timm"):
        return None
    if library == "timm":
        config = timm_library("--model").get_pretrained_cfg(model)
        names = ["timm"] if config is not None and config.has_weights else []
    else:
        names = list(torchvision_models.get_model_weights(model).__members__)
    if str(name) not in names:
        raise UsageError(f"{flag} {name}: no such file, and no name of weights of {model}; choose "
                         f"{' or '.join(names) or 'a file, as there are none'}{nearest(str(name), names)}")
    what = f"{flag} {name} of {model}"
    return timm_weights(model, what) if library == "timm" else torchvision_weights(model, str(name), what)


def named_weights(config: Any) -> NamedWeights | None:
    """Those that an ImageFolderConfig evaluates or trains from, where it gives their name."""
    flag = "pretrained" if config.evaluate is None else "evaluate"
    return find_weights(config.full_name(), getattr(config, flag), f"--{flag}")


def start_from(config: Any, model: torch.nn.Module, num_classes: int, world: World) -> None:
    """Put the weights that flags name into a new network. A collective; DataError to evaluate them on other classes."""
    line = None
    if (named := named_weights(config)) is not None:
        if config.evaluate is not None and num_classes != named.num_classes:
            raise DataError(f"--data-dir {config.data_dir}: has {num_classes:,} classes, and {named.what} "
                            f"{named.num_classes:,} without names; give it a folder for each of them")
        once_per_node(world, named.fetch)
        line = named.put_into(model, num_classes)
    elif config.pretrained is not None and config.evaluate is None:
        line = load_weights(model, config.pretrained, flag="--pretrained", new_head=True)
    if line is not None and world.is_main:
        say(line)


def as_published(config: Any) -> Any:
    """An ImageFolderConfig with its named weights' preprocessing, where no flag says else; UsageError if unknown."""
    config.check()
    if (named := named_weights(config)) is None:
        return config
    own, stated = named.preprocessing, {*config.given, *config.in_file}
    size = config.image_size or own["size"]
    new: dict[str, Any] = {"image_size": size, "interpolation": config.interpolation or own["interpolation"]}
    if "fit" not in stated and config.resize_size is None:
        if own["fit"] is None:
            raise UsageError(f"{named.what}: its images are fitted in a way that is not known here; give --fit crop or "
                             f"squash, and --image-size {own['size']}")
        scaled = own["resize_size"] if size == own["size"] else math.floor(size / own["crop_share"])
        new |= {"fit": own["fit"], "resize_size": scaled if own["fit"] != "squash" else None}
    if not stated & {"normalize", "mean", "std"}:
        new |= dict(zip(("mean", "std"), own["statistics"], strict=True))
        for name in ("none", "half", "imagenet"):
            known = replace(config, normalize=name, mean=(), std=()).augmentation(IMAGENET)
            if (known["mean"], known["std"]) == own["statistics"]:
                new |= {"normalize": name, "mean": (), "std": ()}
    return replace(config, **new)
