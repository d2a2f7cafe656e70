"""trainers/engine/optimizer.py: every rule trains, is torch's own, and resumes from its saved state."""

import copy
import dataclasses
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from launch.errors import UsageError
from tests.helpers.comparing import outcome
from tests.helpers.hooks import at, kill
from tests.helpers.own import train as train_own
from tests.helpers.processes import Ended
from trainers.engine.config import TrainConfig
from trainers.engine.optimizer import MuonWithAdamW, build_optimizer, layer_numbers, parameter_groups

RATES = {"sgd": 0.05, "adam": 0.01, "adamw": 0.01, "rmsprop": 0.005, "muon": 0.02}

LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost these tiny networks more than they give, ten times more on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network() -> nn.Module:
    """A small network with matrices, a convolution and a norm."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                         nn.Linear(4 * 36, 16), nn.ReLU(), nn.Linear(16, 3))


def config(name: str, **changes: object) -> TrainConfig:
    """The flags of one rule."""
    return TrainConfig(optimizer=name, learning_rate=RATES[name], **changes)  # pyright: ignore[reportArgumentType]


def batch() -> tuple[Tensor, Tensor]:
    """Images whose class is where they are bright."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(48) % 3
    images = torch.randn(48, 1, 8, 8, generator=generator)
    for label in range(3):
        images[labels == label, :, label * 2 : label * 2 + 2] += 1.0
    return images, labels


def train(model: nn.Module, optimizer: object, steps: int) -> list[float]:
    """Losses of so many steps on the one batch."""
    images, labels = batch()
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.zero_grad()  # pyright: ignore[reportAttributeAccessIssue]
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", RATES)
def test_each_optimizer_brings_the_loss_to_a_fifth(name: str) -> None:
    model = network()
    losses = train(model, build_optimizer(model, config(name)), 60)
    assert losses[-1] < losses[0] / 5


TORCHS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, weight_decay=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.01),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.005, momentum=0.9, weight_decay=0.01),
}


@pytest.mark.parametrize("name", TORCHS)
def test_flags_mean_what_they_mean_in_torch(name: str) -> None:
    ours, theirs = network(), network()
    train(ours, build_optimizer(ours, config(name, weight_decay=0.01)), 5)
    train(theirs, TORCHS[name](theirs.parameters()), 5)
    for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)


def test_nesterov_is_torchs() -> None:
    ours, theirs = network(), network()
    train(ours, build_optimizer(ours, config("sgd", nesterov=True)), 5)
    train(theirs, torch.optim.SGD(theirs.parameters(), lr=0.05, momentum=0.9, nesterov=True), 5)
    for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)


class Parts(nn.Module):
    """A parameter of every kind that networks have, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8),
                                      nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.GroupNorm(2, 8),
                                      nn.ConvTranspose2d(8, 4, 2), nn.Conv2d(4, 6, 1))
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(1, 26, 6))
        self.scale, self.temperature = nn.Parameter(torch.ones(6, 1, 1)), nn.Parameter(torch.tensor(1.0))
        self.mix, self.norm, self.gate = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = (self.features(images) * self.scale).flatten(2).mT
        tokens = torch.cat([self.token.expand(len(images), -1, -1), features], 1) + self.positions
        tokens = self.mix(self.norm(self.mix(tokens))) * self.gate(tokens).sigmoid()
        return self.head(tokens.mean(1)) * self.temperature


OPTIONS: dict[str, dict[str, object]] = {
    "plain": {}, "norm biases apart": {"norm_bias_lr_scale": 4.0}, "decayed": {"weight_decay": 0.01},
    "all": {"norm_bias_lr_scale": 0.5, "weight_decay": 0.01, "nesterov": True, "momentum": 0.6},
    "no momentum": {"momentum": 0.0},
    "by name": {"weight_decay": 0.01, "no_decay": ("norm", "bias", "token"), "norm_bias_lr_scale": 2.0},
    "by layer": {"weight_decay": 0.01, "no_decay": ("bias",), "layer_decay": 0.5},
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", RATES)
def test_each_trained_parameter_is_in_exactly_one_group_and_moves(name: str, options: str,
                                                                  layout: torch.memory_format) -> None:
    model = Parts().to(memory_format=layout)
    model.head.bias.requires_grad_(False)
    before = copy.deepcopy(model)
    optimizer = build_optimizer(model, config(name, **OPTIONS[options]))
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    train(model, optimizer, 2)
    pairs = zip(model.named_parameters(), before.parameters(), strict=True)
    assert [name for (name, now), was in pairs if torch.equal(now, was)] == ["head.bias"]


def test_muon_updates_matrices_and_filters_and_adamw_the_rest() -> None:
    model = Parts()
    optimizer = build_optimizer(model, config("muon", norm_bias_lr_scale=2.0))
    assert isinstance(optimizer, MuonWithAdamW)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    filters, *rest = [{names[id(parameter)] for group in part.param_groups for parameter in group["params"]}
                      for part in optimizer.parts]
    assert filters == {"features.0.weight", "features.2.weight", "features.4.weight", "features.5.weight", "mix.weight",
                       "head.weight"}
    assert rest == [set(names.values()) - filters]


def test_filters_are_updated_as_torchs_muon_updates_the_matrix_of_them() -> None:
    filters, before = nn.Conv2d(3, 4, 2, bias=False), torch.randn(4, 3, 2, 2)
    filters.weight.data.copy_(before)
    matrix = nn.Parameter(before.flatten(1).clone())
    ours = build_optimizer(filters, config("muon", weight_decay=0.1))
    theirs = torch.optim.Muon([matrix], lr=RATES["muon"], momentum=0.9, weight_decay=0.1,
                              adjust_lr_fn="match_rms_adamw")
    for seed in range(3):
        gradient = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
        filters.weight.grad, matrix.grad = gradient, gradient.flatten(1)
        ours.step()
        theirs.step()
    assert torch.equal(filters.weight.flatten(1), matrix)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", RATES)
def test_training_goes_on_from_a_saved_state_as_if_never_stopped(name: str, layout: torch.memory_format) -> None:
    model = Parts().to(memory_format=layout)
    optimizer = build_optimizer(model, config(name))
    train(model, optimizer, 5)
    other = copy.deepcopy(model)
    resumed = build_optimizer(other, config(name))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(model, optimizer, 5) == train(other, resumed, 5)


@pytest.mark.parametrize("name", RATES)
def test_every_group_knows_the_peak_rate_that_the_schedule_scales(name: str) -> None:
    optimizer = build_optimizer(network(), config(name))
    assert [group["initial_lr"] for group in optimizer.param_groups] == pytest.approx(
        [RATES[name]] * len(optimizer.param_groups))


def test_biases_of_norms_get_their_own_rate_and_the_same_pull_towards_zero() -> None:
    model = network()
    rest, biases = parameter_groups(model, config("sgd", norm_bias_lr_scale=64.0, weight_decay=0.64))
    norm = model[1]  # pyright: ignore[reportIndexIssue]
    assert [id(bias) for bias in biases["params"]] == [id(norm.bias)]
    assert biases["lr"] * biases["weight_decay"] == pytest.approx(0.05 * 0.64)
    assert biases["lr"] == pytest.approx(0.05 * 64)
    assert len(rest["params"]) + 1 == len(list(model.parameters()))


def test_no_decay_names_norms_biases_and_patterns() -> None:
    model = Parts()
    flags = config("sgd", weight_decay=0.1, no_decay=("norm", "token", "head", "features.4.*"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(parameter)] for group in parameter_groups(model, flags) if group["weight_decay"]
               for parameter in group["params"]}
    assert set(names.values()) - decayed == {
        "token", "features.1.weight", "features.1.bias", "features.3.weight", "features.3.bias", "features.4.weight",
        "features.4.bias", "norm.weight", "norm.bias", "head.weight", "head.bias"}
    with pytest.raises(UsageError, match="--no-decay nrom: matches no parameter"):
        parameter_groups(model, config("sgd", no_decay=("nrom",)))


@pytest.mark.parametrize(("make", "num_layers", "layers"), [
    (torchvision.models.resnet18, 11,
     {"conv1.weight": 0, "layer1.0.conv1.weight": 2, "layer4.1.bn2.bias": 9, "fc.bias": 10}),
    (functools.partial(torchvision.models.VisionTransformer, 32, 16, 3, 2, 12, 24), 6,
     {"conv_proj.weight": 0, "class_token": 0, "encoder.layers.encoder_layer_0.ln_1.weight": 1,
      "encoder.layers.encoder_layer_2.mlp.0.weight": 3, "encoder.ln.bias": 4, "heads.head.weight": 5}),
])
def test_layer_decay_slows_each_layer_by_its_distance_from_the_last(make, num_layers, layers) -> None:
    model = make()
    numbers = layer_numbers(model)
    assert numbers.keys() == dict(model.named_parameters()).keys()
    assert sorted(set(numbers.values())) == list(range(num_layers))
    assert {name: numbers[name] for name in layers} == layers
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in parameter_groups(model, config("sgd", layer_decay=0.5)):
        for parameter in group["params"]:
            assert group["lr"] == pytest.approx(0.05 * 0.5 ** (num_layers - 1 - numbers[names[id(parameter)]]))


def test_betas_and_eps_are_torchs() -> None:
    flags = {"betas": (0.5, 0.7), "eps": 1e-3}
    for name in ("adam", "adamw", "muon"):
        optimizer = build_optimizer(Parts(), config(name, **flags))
        last = (optimizer.parts if isinstance(optimizer, MuonWithAdamW) else [optimizer])[-1].param_groups[0]
        assert (last["betas"], last["eps"]) == ((0.5, 0.7), 1e-3)
    assert build_optimizer(Parts(), config("rmsprop", eps=1e-3)).param_groups[0]["eps"] == 1e-3
    with pytest.raises(UsageError, match="--betas: sgd has none to set"):
        config("sgd", betas=(0.5, 0.7)).check()
    with pytest.raises(UsageError, match="--betas: rmsprop has none"):
        config("rmsprop", **flags).check()


def test_frozen_parameters_are_left_alone() -> None:
    model = network()
    first = model[0].weight  # pyright: ignore[reportIndexIssue]
    first.requires_grad_(False)
    before = first.clone()
    train(model, build_optimizer(model, config("adamw", weight_decay=0.1)), 3)
    assert torch.equal(first, before)


def test_timms_optimizers_are_timms_on_our_groups_and_resume() -> None:
    optim = pytest.importorskip("timm.optim")
    for name in ("lamb", "adan", "adafactor", "muon", "sgdw", "madgrad"):
        flags = config("sgd", weight_decay=0.02, no_decay=("norm", "bias"), optimizer_options=("eps=1e-7",))
        flags = dataclasses.replace(flags, optimizer=f"timm/{name}", learning_rate=0.01)
        flags.check()
        model, theirs = network(), network()
        optimizer = build_optimizer(model, flags)
        assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.02]
        groups = [{"params": [each for each in theirs.parameters() if each.ndim > 1]},
                  {"params": [each for each in theirs.parameters() if each.ndim == 1], "weight_decay": 0.0}]
        expected = optim.create_optimizer_v2(groups, name, lr=0.01, weight_decay=0.02, momentum=0.9, eps=1e-7)
        assert train(model, optimizer, 5) == train(theirs, expected, 5), name
        other = copy.deepcopy(model)
        resumed = build_optimizer(other, flags)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert train(model, optimizer, 5) == train(other, resumed, 5), name


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", [pytest.param("lamb", marks=pytest.mark.slow), "muon"])
def test_a_run_with_an_optimizer_of_timms_killed_and_resumed_ends_as_one_never_killed(tmp_path: Path, name: str
                                                                                      ) -> None:
    pytest.importorskip("timm")
    flags = ["--optimizer", f"timm/{name}", "--learning-rate", 0.01, "--weight-decay", 0.02, "--no-decay", "norm"]
    assert train_own(tmp_path / "whole", *flags).code == 0
    assert train_own(tmp_path / "killed", *flags, hook=at(11, "optimizer", kill)).code == -9
    ended = train_own(tmp_path / "killed", *flags)
    resumed = re.search(r"from step-000000(09|10)\.pt", ended.out)  # the last save may have been under way
    assert (ended.code, resumed is not None, "WARNING" in ended.err) == (0, True, False), ended
    assert outcome(tmp_path / "killed" / "runs") == outcome(tmp_path / "whole" / "runs")


@pytest.mark.timeout(60)
def test_an_optimizer_that_timm_has_not_or_cannot_make_is_one_line(tmp_path: Path) -> None:
    def refused(*flags: str) -> str:
        ended: Ended = train_own(tmp_path, *flags)
        assert (ended.code, len(ended.errors)) == (2, 1), ended.err
        return ended.errors[0]

    pytest.importorskip("timm")
    assert refused("--optimizer", "timm/lam").endswith("of the first order; did you mean timm/lamb?")
    assert "choose a name of timm.optim.list_optimizers()" in refused("--optimizer", "timm/adahessian")
    assert "not of timm/lamb (Lamb.__init__()" in refused("--optimizer", "timm/lamb", "--optimizer-options", "spam=1")
    assert refused("--optimizer", "timm/lion", "--eps", "1e-8").startswith("ERROR usage: --eps: timm/lion has none")
    if not torch.cuda.is_available():
        assert "(CUDA required for APEX optimizers)" in refused("--optimizer", "timm/fusedlamb")


def test_without_timm_its_optimizers_name_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match=r"--optimizer timm/NAME: needs timm \(.*\); pip install -e \.\[timm\]"):
        dataclasses.replace(config("sgd"), optimizer="timm/lamb").check()
