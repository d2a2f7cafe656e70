"""Weights by name, and published evaluations: `--pretrained NAME`, `--evaluate NAME` or a file of others, against the
libraries themselves. Their caches are filled here with random weights; there is no network."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import models as torchvision_models
from torchvision.datasets import ImageFolder

from datasets.images.read import to_square
from launch.command_line import parse
from tests.helpers.images import write_tree
from tests.helpers.libraries import fill_hub, fill_torch, no_network
from tests.helpers.processes import Ended, read_json
from tests.helpers.server import run
from trainers.engine.config import IMAGENET
from trainers.image_folder import RECIPES, ImageFolderConfig, as_published

pytestmark = pytest.mark.timeout(120)
FLAGS = ["--threads", "1", "--no-pictures", "--run-name", "r", "--resume", "never"]


def photograph(sample: int, longest: int = 420) -> Image.Image:
    """Soft shapes with some noise, of a size of its own."""
    rng = np.random.default_rng(sample)
    width, height = rng.integers(longest // 2, longest, 2)
    shapes = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)).resize((width, height), 3)
    noise = rng.normal(0, 8, (height, width, 3))
    return Image.fromarray((np.asarray(shapes) + noise).clip(0, 255).astype(np.uint8))


def varied(model: nn.Module, batch: torch.Tensor) -> nn.Module:
    """A network of random weights whose outputs differ from image to image."""
    model.train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        model(batch)
        model.eval()
        last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        features: list[torch.Tensor] = []
        hook = last.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
        model(batch)
        hook.remove()
        last.weight.copy_(torch.randn_like(last.weight))
        last.bias.copy_(-last.weight @ features[0].mean(0))
    return model


@torch.no_grad()
def plain_count(model: nn.Module, folder: Path, transform: Callable[[Any], torch.Tensor]) -> tuple[int, int, int]:
    """Right answers by the first and by the first five outputs, and images, in plain torch."""
    data = ImageFolder(folder, transform)
    first = five = 0
    for inputs, labels in torch.utils.data.DataLoader(data, batch_size=50):
        ranked = model.eval()(inputs).topk(5).indices
        first += int((ranked[:, 0] == labels).sum())
        five += int((ranked == labels[:, None]).sum())
    return first, five, len(data)


@torch.no_grad()
def sort_into_folders(folder: Path, images: list[Image.Image], model: nn.Module,
                      transform: Callable[[Any], torch.Tensor], num_classes: int) -> Path:
    """Every other image goes where the model puts it, where that is possible, the rest one after another."""
    outputs = torch.cat([model.eval()(torch.stack([transform(image) for image in images[start : start + 50]]))
                         for start in range(0, len(images), 50)])
    free = list(range(num_classes))
    for sample, (image, label) in enumerate(zip(images, outputs.argmax(1).tolist(), strict=True)):
        if len(images) - sample <= len(free) or sample % 2:
            label = label if label in free else free[0] if free else sample % num_classes
        free = [each for each in free if each != label]
        place = folder / "val" / f"n{label:04d}"
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{sample:04d}.jpg", quality=92)
    return folder


def evaluate(folder: Path, data: Path, *flags: Any, ranks: int | None = None, **variables: str) -> tuple[Ended, Any]:
    ended = run("image_folder", "--data-dir", data, "--output-dir", folder, *flags, *FLAGS, ranks=ranks, **variables)
    return ended, read_json(folder / "r" / "result.json") if set(ended.codes) == {0} else None


def counts(result: Any) -> tuple[int, int, int]:
    total = result["num_samples"]
    return round(result["accuracy"] * total), round(result["accuracy_top5"] * total), total


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torchvision bilinear 128", "timm 0.95", "timm 0.875", "timm 1.0"])
def test_a_published_evaluation_gives_as_many_right_answers_as_the_library(tmp_path: Path, kind: str):
    torch.manual_seed(0)
    if kind.startswith("timm"):
        timm = pytest.importorskip("timm")
        share = float(kind.split()[1])
        model = timm.create_model("resnet10t", num_classes=20)
        transform = timm.data.create_transform(input_size=(3, 64, 64), interpolation="bicubic", crop_pct=share)
        flags = ["--model", "timm/resnet10t", "--image-size", 64, "--resize-size", int(64 / share),
                 "--interpolation", "bicubic"]
    else:
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms._presets import ImageClassification

        _, interpolation, resize = kind.split()
        model = torchvision_models.resnet18(num_classes=20)
        transform = ImageClassification(crop_size=112, resize_size=int(resize),
                                        interpolation=InterpolationMode(interpolation))
        flags = ["--model", "resnet18", "--resize-size", resize, "--image-size", 112, "--interpolation", interpolation]
    images = [photograph(sample) for sample in range(200)]
    varied(model, torch.stack([transform(image) for image in images[:32]]))
    data = sort_into_folders(tmp_path / "data", images, model, transform, 20)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    ended, result = evaluate(tmp_path / "runs", data, *flags, "--evaluate", tmp_path / "weights.pth", ranks=2)
    assert result is not None, ended.err
    expected = plain_count(model, data / "val", transform)
    assert 50 < expected[0] < 180
    assert counts(result) == expected
    assert [line for line in ended.out.splitlines() if line.startswith("evaluate")] == [
        f"evaluate   weights in {tmp_path / 'weights.pth'}; without names of classes: the 20 of the data, "
        f"in sorted order"]


@pytest.mark.slow
@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_name_is_evaluated_from_the_librarys_cache_without_network(tmp_path: Path, library: str):
    torch.manual_seed(0)
    images = [photograph(sample, longest=48) for sample in range(1000)]
    if library == "timm":
        timm = pytest.importorskip("timm")
        model, name = timm.create_model("resnet10t"), "timm"
        config = timm.data.resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg("resnet10t").to_dict())
        transform = timm.data.create_transform(**{**config, "input_size": (3, 32, 32)})
        flags = ["--model", "timm/resnet10t"]
    else:
        model, name = torchvision_models.resnet18(), "IMAGENET1K_V1"
        weights = torchvision_models.ResNet18_Weights[name]
        transform = weights.transforms(crop_size=32, resize_size=36)
        flags = ["--model", "resnet18"]
    varied(model, torch.stack([transform(image) for image in images[:64]]))
    data = sort_into_folders(tmp_path / "data", images, model, transform, 1000)
    variables = no_network(tmp_path)
    if library == "timm":
        fill_hub(tmp_path / "hf" / "hub", timm.get_pretrained_cfg("resnet10t").hf_hub_id, model)
    else:
        fill_torch(tmp_path / "torch", weights.url, model)
    ended, result = evaluate(tmp_path / "runs", data, *flags, "--evaluate", name, "--image-size", 32, ranks=2,
                             **variables)
    assert result is not None, ended.err
    expected = plain_count(model, data / "val", transform)
    assert expected[0] > 50
    assert counts(result) == expected
    assert ended.out.count("1,000 of the data, in sorted order") == 1


@pytest.mark.slow
@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_training_from_a_name_replaces_the_head_and_takes_the_preprocessing(tmp_path: Path, library: str):
    data, variables = write_tree(tmp_path / "data"), no_network(tmp_path)
    torch.manual_seed(0)
    if library == "timm":
        timm = pytest.importorskip("timm")
        model = timm.create_model("resnet10t")
        fill_hub(tmp_path / "hf" / "hub", timm.get_pretrained_cfg("resnet10t").hf_hub_id, model)
        flags, size = ["--model", "timm/resnet10t", "--pretrained", "timm"], [176, 185, "bicubic"]
        own = timm.data.resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg("resnet10t").to_dict())
        size = [own["input_size"][1], int(own["input_size"][1] / own["crop_pct"]), own["interpolation"]]
    else:
        fill_torch(tmp_path / "torch", torchvision_models.ResNet18_Weights.DEFAULT.url, torchvision_models.resnet18())
        flags, size = ["--model", "resnet18", "--pretrained", "DEFAULT"], [224, 256, "bilinear"]
    ended, result = evaluate(tmp_path / "runs", data, *flags, "--max-steps", 1, "--batch-size", 4, **variables)
    assert result is not None, ended.err
    assert "the last layer, fc, is new: 10 outputs instead of 1000" in ended.out
    card = read_json(tmp_path / "runs" / "r" / "model.json")
    assert [card["image_size"][0], card["resize_size"], card["interpolation"]] == size
    best = next((tmp_path / "runs" / "r" / "checkpoints").glob("step-*.pt"))
    ended, again = evaluate(tmp_path / "again", data, *flags[:2], "--evaluate", best)  # no cache needed
    assert again is not None, ended.err
    assert again["accuracy"] == result["accuracy"]
    assert again["loss"] == pytest.approx(result["loss"], rel=1e-5)


def named(*words: str, **more: Any) -> Any:
    return as_published(parse(ImageFolderConfig, recipes=RECIPES, args=list(map(str, words))))


def statistics(config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    arguments = config.augmentation(IMAGENET)
    return tuple(torch.tensor(arguments[name])[:, None, None] for name in ("mean", "std"))


def test_the_preprocessing_of_a_name_is_the_librarys_and_flags_stand_over_it():
    for model in ("resnet50", "vit_b_16", "efficientnet_b1", "inception_v3"):
        for weights in torchvision_models.get_model_weights(model):
            config, own = named("--model", model, "--pretrained", weights.name), weights.transforms()
            pixels = to_square(np.asarray(photograph(1)), size=config.size(), **config.frame())
            mean, std = statistics(config)
            torch.testing.assert_close((pixels / 255 - mean) / std, own(photograph(1)))
    config = named("--model", "resnet50", "--pretrained", "DEFAULT", "--image-size", 128)
    assert (config.size(), config.resize_size) == (128, 132)
    config = named("--model", "resnet50", "--pretrained", "DEFAULT", "--normalize", "half", "--fit", "squash")
    assert (config.normalize, config.fit, config.resize_size) == ("half", "squash", None)


def test_the_preprocessing_of_timms_weights_is_timms():
    timm = pytest.importorskip("timm")
    for model in ("resnet18.a1_in1k", "vit_base_patch16_clip_224.openai", "mobilenetv3_large_100.ra_in1k",
                  "tf_efficientnet_b0.ns_jft_in1k", "vit_base_patch16_siglip_224.webli", "dpn68.mx_in1k",
                  "dm_nfnet_f0.dm_in1k", "convnext_base.fb_in22k_ft_in1k_384"):
        config = named("--model", f"timm/{model}", "--pretrained", "timm")
        own = timm.data.resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(model).to_dict())
        pixels = to_square(np.asarray(photograph(1)), size=config.size(), **config.frame())
        mean, std = statistics(config)
        torch.testing.assert_close((pixels / 255 - mean) / std, timm.data.create_transform(**own)(photograph(1)),
                                   rtol=1e-5, atol=1e-5)


FILES: dict[str, Callable[[nn.Module], Any]] = {
    "pytorch/examples": lambda model: {"epoch": 3, "arch": "resnet18", "best_acc1": torch.tensor(71.5),
                                       "state_dict": nn.DataParallel(model).state_dict()},
    "torchvision's references": lambda model: {"model": model.state_dict(), "args": argparse.Namespace(lr=0.1)},
    "timm": lambda model: {"state_dict": model.state_dict(), "args": argparse.Namespace(lr=0.1), "metric": 71.5},
    "Lightning": lambda model: {"state_dict": {f"model.{name}": value for name, value in model.state_dict().items()},
                                "hyper_parameters": {"lr": 0.1}},
}


@pytest.mark.parametrize("kind", [kind if kind == "Lightning" else pytest.param(kind, marks=pytest.mark.slow)
                                  for kind in FILES])
def test_files_of_others_are_evaluated(tmp_path: Path, kind: str):
    torch.manual_seed(3)
    model = torchvision_models.resnet18(num_classes=10)
    data = write_tree(tmp_path / "data")
    (data / "train").rename(tmp_path / "train")  # an evaluation needs none
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    torch.save(FILES[kind](model), tmp_path / "theirs.ckpt")
    flags = ["--model", "resnet18", "--image-size", 32]
    _, expected = evaluate(tmp_path / "a", data, *flags, "--evaluate", tmp_path / "plain.pt")
    ended, result = evaluate(tmp_path / "b", data, *flags, "--evaluate", tmp_path / "theirs.ckpt")
    assert result is not None, ended.err
    assert result["weights_sha256"] == expected["weights_sha256"]
    assert result["confusion_matrix"] == expected["confusion_matrix"]
    ended, _ = evaluate(tmp_path / "c", data, "--model", "resnet34", "--image-size", 32, "--evaluate",
                        tmp_path / "theirs.ckpt")
    assert (ended.code, len(ended.errors)) == (4, 1)
