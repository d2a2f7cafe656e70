"""Classify images with the network of a run: classes with probabilities, and a picture; or export the network.

    python trainers/predict.py --run runs/NAME photos/ cat.jpg          # files, and all images of a folder
    python trainers/predict.py --run runs/NAME --test-images 32         # of the run's own test set

The weights are the best checkpoint's, or their moving average; a true class that is known is compared."""

import importlib
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

if not __package__:  # run by path: our packages, not others of the same names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import tyro
from torch import nn
from torchvision.transforms.v2.functional import rgb_to_grayscale

from datasets import augment, listing, samples, tensors, transforms
from datasets.errors import DataError
from datasets.images import loaders, packed
from datasets.images.read import BadImage, Stored, read_file, to_square
from launch import launcher, machine
from launch.command_line import parse, run
from launch.errors import AtLeast, CheckpointError, UsageError, first_line, say, to_stderr
from launch.process_group import World
from trainers import models
from trainers.engine import export, history, predictions, task
from trainers.engine.checkpoints import load
from trainers.engine.run import pictures
from trainers.engine.run.card import CARD_FILE, ModelCard, read_card
from trainers.engine.user_code import Reference, blaming, is_reference, made_again


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Classify images with the network of a run."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Image files, and folders of them."""
    run: Path | None = None
    """Run folder, such as runs/NAME."""
    checkpoint: Path | None = None
    """Use this checkpoint of the run, not its best."""
    test_images: Annotated[int | None, AtLeast(1)] = None
    """Classify this many images of the run's test set."""
    data_dir: Path | None = None
    """Folder of the test set. Default: the run's --data-dir."""
    batch_size: Annotated[int, AtLeast(1)] = 64
    """Images at a time."""
    top: Annotated[int, AtLeast(1)] = 3
    """Classes shown per image, most probable first."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    json: bool = False
    """Print one JSON object, not lines."""
    picture: Path | None = None
    """PNG of the first images with their names. Default: predict.png in the run folder."""
    export: Path | None = None
    """Write the network as a torch.export program, and as ONNX where the package onnx is installed."""


class Picture(NamedTuple):
    """One image to classify: uint8 (C, H, W), or float as the network takes it; of custom.py a batch of one."""
    name: str
    pixels: Any
    true_class: str | None


def load_model(run: Path, card: ModelCard, checkpoint: Path | None, device: torch.device) -> tuple[nn.Module, Path]:
    """The network with its trained weights, of the best or the newest whole checkpoint, and the file they are from."""
    if checkpoint is not None:
        state, source = load.load_or_fail(checkpoint), checkpoint
    else:
        damaged, source, state = load.newest_good(run / "checkpoints", try_best=True)
        for path, damage in damaged.items():
            to_stderr(f"WARNING checkpoint: {path}: {damage}; using another one")
        if state is None:
            raise CheckpointError(f"--run {run}: has no whole checkpoint; wait for its first epoch to end, or train "
                                  f"again")
    known = history.saved_class_names(state)
    if known not in ((), card.class_names):
        raise CheckpointError(f"{source}: knows the classes {tensors.some_of(known)}, and {run / CARD_FILE} has "
                              f"{tensors.some_of(card.class_names)}; use a checkpoint and a {CARD_FILE} of one run")
    try:
        model = models.build(card.model, num_classes=len(card.class_names), **card.options)
    except (ValueError, TypeError, RuntimeError, UsageError) as error:
        if is_reference(card.model):  # of the user's file: the error names its line
            raise
        raise CheckpointError(f"--run {run}: its model {card.model} cannot be built here ({first_line(error)}); use "
                              f"the version of this code that trained it") from None
    if state["ema"] is not None:
        state = {**state, "model": state["ema"]}
    load.check_fits(state, model, source)
    model.load_state_dict(state["model"])
    if is_reference(card.model):  # which may return more than logits
        own = Reference("--model", card.model).extra("logits")
        model.register_forward_hook(lambda module, inputs, outputs: (own if callable(own) else task.logits_of)(outputs))
    return model.eval().to(device), source


class Reader:
    """Reads images one at a time, as the network of a run takes them; `bad` are those that cannot be, and why."""

    def __init__(self, run: Path, card: ModelCard) -> None:
        self.run, self.card, self.bad = run, card, dict[str, str]()
        text = str(card.transform)
        own = made_again(Reference("--transform", text), 0) if is_reference(text) else None
        self.transform = partial(own, train=False) if own is not None and transforms.takes_train(own) else None

    def files(self, paths: tuple[Path, ...]) -> Iterator[Picture]:
        """Image files and folders of them; the name of an image's folder may be its class."""
        for path in paths:
            try:
                files, left_out = listing.find_images(path)
            except DataError as error:
                self.bad[str(path)] = str(error).removeprefix(f"{path}: ")
                continue
            if left_out:
                to_stderr(f"{path}{listing.describe_left_out(left_out)}")
            for file in files:
                parent = file.absolute().parent.name
                known = parent if parent in self.card.class_names else None
                yield from self.picture(file, partial(read_file, file), known)

    def picture(self, path: Path, read: Callable[[], Stored], true_class: str | None) -> Iterator[Picture]:
        """An image at the size and with the channels that the network was trained on; none of a bad one."""
        card = self.card
        if card.trainer == "custom":
            raise UsageError(f"{path}: a run of custom.py knows no preprocessing of files; use --test-images, which "
                             f"reads its own data set")
        try:
            pixels = transforms.full_size(read()) if self.transform else to_square(
                read(), size=card.image_size[0], fit=card.fit, resize_size=card.resize_size,
                interpolation=card.interpolation)
        except BadImage as error:
            self.bad[str(path)] = f"not readable as an image ({error}); repair it or leave it out"
            return
        pixels = rgb_to_grayscale(pixels) if len(card.mean) == 1 else pixels
        yield Picture(str(path), self.transform(pixels) if self.transform else pixels, true_class)

    def test_set(self, number: int, source: Path, data_dir: Path | None) -> Iterator[Picture]:
        """The first images of the run's test set, loaded by the run's trainer, its classes joined to the network's."""
        names = self.card.class_names
        try:
            trainer = importlib.import_module(f"trainers.{self.card.trainer}")
            load_data, config_class = trainer.load_data, get_type_hints(trainer.main)["config"]
            config = parse(config_class, args=["--config", f"{self.run}/config.json"])
        except (ImportError, AttributeError, KeyError, UsageError) as error:
            raise CheckpointError(f"--run {self.run}: {CARD_FILE}: {self.card.trainer} is no trainer of images, or its "
                                  f"config.json is not readable ({error}); name image files, not --test-images"
                                  ) from None
        found = load_data(replace(config, evaluate=source, data_dir=data_dir or config.data_dir), World(), names)
        _, validation, test, *_ = found.splits if isinstance(found, samples.Reading) else found
        test: Any = validation if test is None else test
        self.bad |= getattr(test, "unreadable", {})
        for sample in range(min(number, len(test))):
            if isinstance(found, samples.Reading):
                inputs, targets = samples.unless_failed(found[loaders.Key("test", [sample], 0)])
                yield Picture(f"test {sample}", inputs, names[int(targets[0])])
            elif isinstance(test, packed.ImageSource):
                yield from self.picture(test.path(sample), partial(test.read, sample), names[int(test.targets[sample])])
            else:
                pixels = self.transform(test.inputs[sample]) if self.transform else test.inputs[sample]
                yield Picture(f"test {sample}", pixels, names[int(test.targets[sample])])


@torch.no_grad()
def classify(model: nn.Module, batch: list[Picture], card: ModelCard, device: torch.device
             ) -> list[predictions.Prediction]:
    """Probabilities of a batch of images."""
    own = card.trainer == "custom"
    inputs = batch[0].pixels if own else torch.stack([picture.pixels for picture in batch])
    inputs = task.map_tensors(lambda tensor: tensor.to(device), inputs)
    if not own and inputs.dtype == torch.uint8:
        inputs = augment.normalize(inputs, card.mean, card.std)
    probabilities = task.apply(model, inputs).float().softmax(1).cpu().tolist()  # of log-probabilities too
    return [predictions.Prediction(picture.name, dict(zip(card.class_names, row, strict=True)), picture.true_class)
            for picture, row in zip(batch, probabilities, strict=True)]


def draw(path: Path, shown: list[Picture], classified: list[predictions.Prediction], *, asked: bool) -> None:
    """The pictures with predicted and true names, as a PNG; one that was not asked for costs a warning at most."""
    names, shares = zip(*(each.ranked[0] for each in classified), strict=True)
    images = torch.stack([picture.pixels.view(picture.pixels.shape[-3:]) for picture in shown])
    is_raw = images.dtype == torch.uint8
    images = images.float() / 255 if is_raw else (images - images.min()) / (images.max() - images.min())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pictures.predictions(images, [each.true_class for each in classified], names, shares=shares))
    except (OSError, ValueError, RuntimeError) as error:
        if asked and isinstance(error, OSError):
            raise UsageError(f"--picture {path}: cannot be written ({error.strerror}); choose another folder") from None
        to_stderr(f"WARNING picture: {path}: not drawn ({first_line(error)})")


def main(config: PredictConfig) -> int:
    """Read, classify and show; returns the exit code."""
    if config.run is None:
        raise UsageError("--run: missing; give the folder of a run, such as runs/NAME")
    if not (config.images or config.test_images or config.export):
        raise UsageError("no images given; name files or folders, or use --test-images 32")
    card = read_card(config.run)
    own = {"--model": card.model, "--transform": card.transform}
    with blaming([Reference(flag, text) for flag, text in own.items() if is_reference(text)]):
        return predict(config, config.run, card)


def predict(config: PredictConfig, run: Path, card: ModelCard) -> int:
    """The same for a run that has a card."""
    if card.kind != "classes" and (config.images or config.test_images):
        raise UsageError(f"--run {run}: its network gives {card.kind}, not classes; only --export works with it")
    device = machine.choose_device(config.device, launcher.read_launch())
    model, source = load_model(run, card, config.checkpoint, device)
    if config.export is not None:
        if not card.mean:
            raise UsageError(f"--export {config.export}: the network's inputs are no images (C, H, W); export it with "
                             f"torch.export in a program of your own")
        for line in export.export(model, config.export, image_shape=(len(card.mean), *card.image_size)):
            (to_stderr if config.json else say)(line)
    classified: list[predictions.Prediction] = []
    shown: list[Picture] = []
    reader = Reader(run, card)
    found, bad = reader.files(config.images), reader.bad
    if config.test_images is not None:
        found = itertools.chain(found, reader.test_set(config.test_images, source, config.data_dir))
    size = 1 if card.trainer == "custom" else config.batch_size  # theirs may have any shape, and no two the same
    while batch := list(itertools.islice(found, size)):
        classified += classify(model, batch, card, device)
        shown += batch[: pictures.MOST_IMAGES - len(shown)]
    if config.json and (classified or bad):
        say(predictions.as_json(classified, source, bad), is_result=True)
    elif classified:
        say(predictions.as_lines(classified, top=config.top), is_result=True)
    for path, reason in bad.items() if len(bad) > 1 else ():
        to_stderr(f"WARNING data: {path}: {reason}")
    shapes = {getattr(each.pixels, "shape", ()) for each in shown}
    if len(shapes) == 1 and len(shapes.pop()) > 2:  # else they are no images, or not of one size
        draw(config.picture or run / "predict.png", shown, classified[: len(shown)], asked=config.picture is not None)
    for path, reason in bad.items():
        raise DataError(f"{path}: {reason}" + f"; so are {len(bad) - 1} others, named above" * (len(bad) > 1))
    return 0


if __name__ == "__main__":
    run(main, PredictConfig, prints_results=True)
