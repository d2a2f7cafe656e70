"""trainers/regression.py: the book's and the cheat sheet's regressions, losses of one's own, no classes."""

from pathlib import Path

import pytest
import torch

from datasets import regression
from launch.errors import UsageError
from tests.helpers.comparing import finished
from tests.helpers.processes import largest_difference, metrics, newest_checkpoint, read_json
from tests.helpers.server import run
from trainers.engine.user_code import blaming, references
from trainers.regression import RegressionConfig, build_task, my_mse

D2L = ("--no-pictures", "--max-steps", "20")


@pytest.mark.timeout(120)
def test_three_epochs_recover_the_weights_and_the_bias_that_the_data_was_drawn_with(tmp_path: Path) -> None:
    run = finished("regression", tmp_path / "d2l", "--save-weights", timeout=100)
    weights = torch.load(run / "weights.pt", weights_only=True)
    assert (weights["0.weight"] - torch.tensor([[2.0, -3.4]])).abs().max() < 0.01
    assert (weights["0.bias"] - 4.2).abs().max() < 0.01
    assert read_json(run / "result.json")["loss"] == pytest.approx(1e-4, rel=0.2)  # the noise's variance
    assert read_json(run / "result.json")["steps"] == 300
    check_that_nothing_speaks_of_classes(run)


def check_that_nothing_speaks_of_classes(run: Path) -> None:
    result = read_json(run / "result.json")
    assert result["accuracy"] is result["per_class_accuracy"] is result["confusion_matrix"] is None
    assert {accuracy for (accuracy,) in metrics(run, "accuracy")} == {None}
    assert (run / "curves.png").exists()
    assert not (run / "confusion_matrix.png").exists()
    assert not (run / "predictions.png").exists()
    assert read_json(run / "status.json")["state"] == "DONE"


@pytest.mark.timeout(60)
def test_a_run_that_is_done_says_its_figure_and_what_to_raise_and_that_continues(tmp_path: Path) -> None:
    flags = ["--no-pictures", "--run-name", "r", "--output-dir", tmp_path, "--max-steps"]
    assert run("regression", *flags, 20).codes == [0]
    again = run("regression", *flags, 20)
    loss = read_json(tmp_path / "r" / "result.json")["loss"]
    assert again.codes == [0]
    assert again.out == (f"{tmp_path}/r is DONE (loss {loss}); raise --epochs, or the --max-steps or --patience that "
                         f"ended it, to continue\n")
    assert run("regression", *flags, 30).codes == [0]
    assert read_json(tmp_path / "r" / "status.json")["step"] == 30


@pytest.mark.timeout(240)
def test_two_ranks_reach_the_weights_of_one_after_twenty_steps(tmp_path: Path) -> None:
    runs = [finished("regression", tmp_path / f"on-{ranks}", *D2L, ranks=ranks) for ranks in (1, 2)]
    one, two = map(newest_checkpoint, runs)
    assert one["step"] == two["step"] == 20
    assert largest_difference(one["model"], two["model"]) < 1e-5


@pytest.mark.timeout(240)
def test_a_loss_from_a_file_trains_as_the_built_in_one_does(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def squares(outputs, targets):\n    return ((outputs - targets) ** 2).mean()\n")
    runs = [finished("regression", tmp_path / name, *D2L, "--loss", loss)
            for name, loss in (("theirs", "mse"), ("mine", f"{tmp_path}/mine.py:squares"))]
    first, second = (newest_checkpoint(run)["model"] for run in runs)
    assert largest_difference(first, second) < 1e-6


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_cheat_sheets_regression_prints_what_it_learned(tmp_path: Path) -> None:
    run = finished("regression", tmp_path / "five", "--recipe", "cheatsheet", timeout=100)
    losses = [loss for split, loss in metrics(run, "split", "loss") if split == "train"]
    assert losses[-1] < losses[0] / 500
    check_that_nothing_speaks_of_classes(run)


def test_my_mse_is_torchs() -> None:
    outputs, targets = torch.randn(2, 9, 1, generator=torch.Generator().manual_seed(0))
    assert my_mse(outputs, targets).item() == pytest.approx(torch.nn.functional.mse_loss(outputs, targets).item())


def use_loss(text: str) -> None:
    """A loss, checked and called as a run does."""
    config = RegressionConfig(loss=text)
    config.check()
    with blaming(references(config)):
        build_task(config, torch.device("cpu")).loss(torch.zeros(2, 1, requires_grad=True), torch.ones(2, 1))


@pytest.mark.parametrize(("code", "name", "words"), [
    ("def other(a, b): ...", "loss", "has no loss; give a name that it defines"),
    ("x = 1", "x", "has no function x but int"),
    ("x = 1", "y", "has no y; give a name that it defines"),
    ("def loss(:", "loss", r"mine\.py line 1: SyntaxError: "),
    ("\nimport nowhere_to_be_found", "loss", r"mine\.py line 2: ModuleNotFoundError: No module named"),
    ("def loss(a): return a.mean()", "loss", r"mine\.py line 1: TypeError: "),
    ("import sys\nsys.exit(0)", "loss", r"mine\.py line 2: SystemExit: 0"),
    ("def loss(a, b): return a - b", "loss", r"gives a tensor of shape \(2, 1\)"),
    ("def loss(a, b): return 1.0", "loss", "gives float"),
    ("def loss(a, b): return (a - b).detach().mean()", "loss", "not one number that depends on the outputs"),
])
def test_a_loss_file_that_cannot_be_used_is_named_with_its_fault(
    tmp_path: Path, code: str, name: str, words: str
) -> None:
    (tmp_path / "mine.py").write_text(code + "\n")
    with pytest.raises(UsageError, match=words) as error:
        use_loss(f"{tmp_path}/mine.py:{name}")
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)


def test_a_loss_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        use_loss(f"{tmp_path}/nothing.py:loss")


@pytest.mark.parametrize(("flag", "value"), [("--label-smoothing", "0.1"), ("--class-weights", "2")])
def test_flags_of_cross_entropy_alone_are_refused_and_not_ignored(tmp_path: Path, flag: str, value: str) -> None:
    ended = run("regression", "--max-steps", 1, "--output-dir", tmp_path, flag, value)
    assert ended.codes == [2]
    assert "ERROR usage: --loss mse: takes no --label-smoothing or --class-weights" in ended.err


@pytest.mark.parametrize("text", ["mae", "mine.py", "mine.py:", ":loss"])
def test_a_loss_that_is_no_name_and_no_file_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match=r"choose mse, my-mse or FILE\.py:NAME"):
        use_loss(text)


def test_features_are_standard_normal_and_targets_follow_the_relation() -> None:
    train, test = regression.load("two-features", seed=5)
    assert train.inputs.mean().item() == pytest.approx(0, abs=0.05)
    assert train.inputs.std().item() == pytest.approx(1, abs=0.05)
    noise = train.targets - (train.inputs @ torch.tensor([[2.0], [-3.4]]) + 4.2)
    assert noise.std().item() == pytest.approx(0.01, rel=0.1)
    assert not torch.equal(train.inputs, test.inputs)


def test_uniform_noise_lies_between_zero_and_its_width() -> None:
    train, _ = regression.load("five-features")
    noise = train.targets - (train.inputs @ torch.arange(1.0, 6.0)[:, None] + 5)
    assert noise.min() >= -1e-5
    assert noise.max() < 0.3 + 1e-5
    assert noise.std() > 0.01
