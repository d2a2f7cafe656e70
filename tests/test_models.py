"""trainers/models.py: shapes, sizes, first weights, and what `build` refuses."""

import math

import pytest
import torch
from torch import nn

from datasets import synthetic
from datasets.augment import normalize
from launch.errors import UsageError
from trainers import models


@pytest.mark.parametrize("name", models.OURS)
def test_networks_for_colour_images_give_a_number_for_each_class(name: str) -> None:
    assert models.build(name, num_classes=7)(torch.rand(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("name", models.GREY)
def test_networks_for_grey_images_give_a_number_for_each_class(name: str) -> None:
    assert models.build(name, num_classes=7)(torch.rand(2, 1, 28, 28)).shape == (2, 7)


@pytest.mark.parametrize(("name", "options", "count"), [
    ("net", {}, 62_006),  # counted by hand from the tutorials' layers
    ("mnistnet", {}, 21_840),
    ("mnistnet", {"channels": (32, 64), "hidden": 100}, 155_606),
    ("softmax", {}, 7_850),
    ("lenet", {}, 61_706),
])
def test_networks_have_as_many_parameters_as_the_tutorials(name: str, options: dict[str, object], count: int) -> None:
    model = models.build(name, num_classes=10, **options)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_a_networks_own_options_reach_it_and_none_means_its_default() -> None:
    model = models.build("mnistnet", num_classes=10, channels=(3, 4), hidden=None)
    assert isinstance(model, models.MnistNet)
    assert (model.conv1.out_channels, model.conv2.out_channels, model.fc1.out_features) == (3, 4, 50)


def test_unknown_names_and_options_are_refused() -> None:
    with pytest.raises(ValueError, match="Unknown model lenett"):
        models.build("lenett", num_classes=10)
    with pytest.raises(UsageError, match=r"hidden=5: lenet takes no such thing .*; leave it out"):
        models.build("lenet", num_classes=10, hidden=5)
    with pytest.raises(UsageError, match="width=5: resnet18 takes no such thing"):
        models.build("torchvision/resnet18", num_classes=10, width=5)


def test_lenet_starts_from_xaviers_uniform_weights() -> None:
    torch.manual_seed(0)
    for module in models.build("lenet", num_classes=10).modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(module.weight)
            bound = math.sqrt(6 / (fan_in + fan_out))
            assert module.weight.abs().max().item() <= bound
            assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2)


def test_softmax_regression_starts_from_small_normal_weights_and_no_bias() -> None:
    torch.manual_seed(0)
    layer = models.softmax_regression(10)[1]
    assert layer.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert layer.bias.abs().max().item() == 0


def test_lenet_is_made_of_sigmoids_and_average_pooling() -> None:
    kinds = [type(module).__name__ for module in models.lenet(10)]
    assert kinds == ["Conv2d", "Sigmoid", "AvgPool2d", "Conv2d", "Sigmoid", "AvgPool2d", "Flatten", "Linear", "Sigmoid",
                     "Linear", "Sigmoid", "Linear"]


def test_whitening_makes_patches_uncorrelated_and_of_variance_one() -> None:
    images = normalize(synthetic.generate(range(500), seed=0).inputs, synthetic.MEAN, synthetic.STD)
    model = models.WhiteNet(10)
    model.whiten(images, eps=0.0)
    outputs = nn.functional.conv2d(images, model.whitening.weight[:12]).movedim(1, -1).reshape(-1, 12)
    second_moments = outputs.T @ outputs / len(outputs)
    torch.testing.assert_close(second_moments, torch.eye(12), rtol=0, atol=0.02)
    assert torch.equal(model.whitening.weight[12:], -model.whitening.weight[:12])
