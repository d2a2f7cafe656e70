"""How ranks share gradients: rounded for the wire, or missing for parameters that had no part in the loss."""

import json
from pathlib import Path

import pytest
from torch import nn

from tests.helpers.comparing import run_in, tensors_sha256
from tests.helpers.faults import Fault, assert_ends_as_specified
from tests.helpers.hooks import model_with_unused_layer
from tests.helpers.processes import newest_checkpoint
from trainers.engine.optimizer import MovingAverage

pytestmark = pytest.mark.timeout(90)


def losses(tmp_path: Path, name: str, *flags: str) -> list[float]:
    ended = run_in(tmp_path / name, *flags, "--epochs", "1", ranks=2)
    assert ended.codes == [0, 0], ended.err
    text = (tmp_path / name / "r" / "metrics.jsonl").read_text()
    return [line["loss"] for line in map(json.loads, text.splitlines()) if line["split"] == "train"]


def test_a_comm_hook_sends_rounded_gradients_and_trains_almost_alike(tmp_path: Path) -> None:
    exact = losses(tmp_path, "exact")
    for name in ("bf16", "fp16"):
        rounded = losses(tmp_path, name, "--comm-hook", name)
        assert rounded != exact
        assert rounded == pytest.approx(exact, rel=0.02)


def test_parameters_without_a_part_in_the_loss_are_named_with_the_flag_that_allows_them(tmp_path: Path) -> None:
    line = r"ERROR usage: --find-unused-parameters: parameters of the model \(numbers [\d ]+\) had no part"
    assert_ends_as_specified(Fault(name="unused", ranks=2, hook=model_with_unused_layer(), codes=(2,), state="FAILED",
                                   error=line), tmp_path)
    ended = run_in(tmp_path / "allowed", "--find-unused-parameters", ranks=2, hook=model_with_unused_layer())
    assert ended.codes == [0, 0], ended.err


def test_sync_bn_on_a_cpu_is_a_usage_line(tmp_path: Path) -> None:
    assert_ends_as_specified(Fault(name="sync-bn", ranks=2, flags=("--sync-bn",), codes=(2,), state="FAILED",
                                   error="ERROR usage: --sync-bn: .* needs CUDA, this is cpu; leave it out"), tmp_path)


def test_an_average_that_warms_up_follows_the_formula() -> None:
    model, expected = nn.Linear(1, 1, bias=False), 0.0
    average = MovingAverage(model, 0.9, warmup_steps=10)
    for step in range(200):
        nn.init.constant_(model.weight, float(step % 7))
        average.update_parameters(model)
        decay = min(0.9, (1 + step) / (10 + step)) if step else 0.0
        expected = decay * expected + (1 - decay) * (step % 7)
        assert average.module.weight.item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_an_average_that_warms_up_is_resumed_exactly(tmp_path: Path) -> None:
    flags = ("--ema-decay", "0.99", "--ema-warmup-steps", "20", "--warmup-epochs", "0.5")
    for name, steps in [("whole", "20"), ("parts", "7"), ("parts", "20")]:
        assert run_in(tmp_path / name, *flags, "--max-steps", steps).code == 0
    whole, parts = (tensors_sha256(newest_checkpoint(tmp_path / name / "r")["ema"]) for name in ("whole", "parts"))
    assert whole == parts
