"""The recipe speedrun, as far as a CPU can tell: what learns by which rule and rate, and what is no training time."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from launch.process_group import World
from tests.helpers.processes import metrics, read_json
from tests.helpers.server import run
from trainers import models
from trainers.cifar import RECIPES, CifarConfig
from trainers.engine.optimizer import FilterMuon, MuonWithAdamW, build_optimizer, freeze
from trainers.engine.parallel import warmed_up
from trainers.engine.run.report import epoch_text

pytestmark = pytest.mark.timeout(90)


def test_filters_learn_by_muon_and_the_rest_by_sgd_at_airbenchs_rates() -> None:
    config = CifarConfig(**{**RECIPES["speedrun"], "recipe": "speedrun"})
    model = models.WhiteNet(10, width=8)
    freeze(model, config.freeze)
    optimizer = build_optimizer(model, config)
    assert isinstance(optimizer, MuonWithAdamW)
    muon, sgd = optimizer.parts
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_rate = {round(group["lr"], 6): ({names[id(each)] for each in group["params"]}, group)
               for group in sgd.param_groups}
    filters = {name for name, parameter in model.named_parameters() if parameter.ndim == 4 and parameter.requires_grad}
    assert {names[id(each)] for group in muon.param_groups for each in group["params"]} == filters
    assert by_rate[1.66][0] == {"head.weight"}
    biases, group = by_rate[round(64 * 1.66, 6)]
    assert biases == {name for name in names.values() if name.startswith("blocks") and name.endswith("bias")}
    assert group["lr"] == pytest.approx(0.053 * 2000, rel=0.01)  # airbench's, per sum of 2,000 losses
    assert group["lr"] * group["weight_decay"] == pytest.approx(2e-6 * 2000, rel=0.01)
    assert (group["momentum"], group["nesterov"], muon.param_groups[0]["momentum"]) == (0.85, True, 0.6)


def test_a_normalised_filter_is_scaled_to_the_norm_of_orthonormal_rows_before_each_step() -> None:
    ours, theirs = (nn.Parameter(torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0)))
                    for _ in range(2))
    how: dict[str, Any] = {"lr": 0.24, "momentum": 0.6, "weight_decay": 0.0, "ns_steps": 3, "adjust_lr_fn": "original"}
    normalising, plain = FilterMuon([{"params": [ours]}], normalize=True, **how), FilterMuon([{"params": [theirs]}],
                                                                                             **how)
    for seed in range(3):
        gradient = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        theirs.data *= 2 / theirs.data.norm()
        normalising.step()
        plain.step()
    assert torch.allclose(ours, theirs, rtol=1e-5)


def test_a_few_steps_of_it_learn_on_a_cpu(tmp_path: Path) -> None:
    ended = run("cifar", "--recipe", "speedrun", "--dataset", "synthetic", "--no-compile", "--width", "8",
                "--batch-size", "250", "--max-steps", "24", "--threads", "1", "--no-pictures", "--output-dir", tmp_path,
                "--run-name", "r")
    assert ended.code == 0, ended.err
    losses = [loss for split, loss in metrics(tmp_path / "r", "split", "loss") if split == "train"]
    assert losses[-1] < losses[0]
    assert read_json(tmp_path / "r" / "result.json")["warm_up_seconds"] >= 0


def test_a_warm_up_compiles_and_leaves_no_trace() -> None:
    model, calls = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [(torch.randn(5, 3), torch.zeros(5, dtype=torch.int64)) for _ in range(3)]

    def loss(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls.append(len(inputs))
        return F.cross_entropy(model(inputs), targets)

    assert list(warmed_up(model, World(), iter(batches), loss=loss)) == batches
    assert calls == []  # nothing to prepare
    model.compile(backend="eager")
    assert list(warmed_up(model, World(), iter(batches), loss=loss)) == batches
    assert calls == [5]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_lines_of_epochs_are_a_table() -> None:
    lines = [{"epoch": epoch, "train_loss": loss, "train_accuracy": accuracy, "test_loss": loss,
              "test_accuracy": tested, "seconds": seconds}
             for epoch, loss, accuracy, tested, seconds in [(0, 2.3, 0.094, 0.1, 0.5), (10, 0.01, 1.0, None, 1234.5)]]
    first, second = (epoch_text(line, samples_per_second=900) for line in lines)
    assert len(first) == len(second)
    for words in ("train loss", "train accuracy", " s ", "samples/s"):
        assert first.index(words) == second.index(words)
    assert "test accuracy  10.00 %" in first
    assert "test accuracy" not in second
