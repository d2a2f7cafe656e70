"""Fit a linear relation, with a loss of your own if you like, on one process or many.

    python trainers/regression.py                                   # Dive into Deep Learning: w = [2, -3.4], b = 4.2
    python trainers/regression.py --recipe cheatsheet               # five features, ten samples, 500 epochs
    python trainers/regression.py --loss my_losses.py:huber         # a function of (outputs, targets) in a file
    torchrun --standalone --nproc_per_node=2 trainers/regression.py # two ranks
"""

import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if not __package__:  # run by path: our packages, not others of the same names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.stop import catch_signals

if __name__ == "__main__":
    catch_signals()  # before torch is imported, which takes seconds

import torch
from torch import Tensor, nn

from datasets import regression
from datasets.errors import DataError
from datasets.loaders import PlainTransform, evaluation_loader, train_loader
from datasets.tensors import TensorDataset, ThreeSplits, hold_out
from launch.command_line import run
from launch.errors import UsageError, say
from trainers.engine.config import TrainConfig
from trainers.engine.session import entry_point, open_run, train_model
from trainers.engine.task import Loss, Task


@dataclass(frozen=True, kw_only=True)
class RegressionConfig(TrainConfig):
    """Fit a linear relation."""

    recipe: str = "d2l"
    """d2l: 1,000 samples of two features. cheatsheet: ten samples of five features, with a loss of one's own."""
    dataset: Literal["two-features", "five-features"] = "two-features"
    """Generated from the seed."""
    model: Literal["linear"] = "linear"
    """linear: one layer with one output."""
    loss: str = "mse"
    """mse: torch's. my-mse: the same, written out. PATH.py:FUNCTION: yours, (outputs, targets) to a mean."""


RECIPES: dict[str, dict[str, Any]] = {
    "d2l": {"dataset": "two-features", "epochs": 3, "batch_size": 10, "learning_rate": 0.03, "momentum": 0.0},
    "cheatsheet": {
        "dataset": "five-features", "loss": "my-mse", "epochs": 500, "batch_size": 5, "learning_rate": 0.01,
        "momentum": 0.0, "eval_every": 100, "checkpoint_every": 1000,
    },
}


def my_mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """The cheat sheet's example of a loss of one's own: the mean of the squared differences."""
    return torch.mean(torch.pow(outputs - targets, 2))


LOSSES: dict[str, Loss] = {"mse": nn.MSELoss(), "my-mse": my_mse}


def choose_loss(text: str) -> Loss:
    """The loss that `--loss` names; one from a file is tried on two samples."""
    if text in LOSSES:
        return LOSSES[text]
    path, _, name = text.rpartition(":")
    if not path.endswith(".py") or not name:
        raise UsageError(f"--loss {text}: unknown; choose {', '.join(LOSSES)} or PATH.py:FUNCTION")
    loss = function_in(Path(path), name)
    try:
        value = loss(torch.zeros(2, 1, requires_grad=True), torch.ones(2, 1))
    except Exception as error:  # whatever the user's code does is told in one line
        raise DataError(f"--loss {text}: fails with {type(error).__name__} ({error}) on outputs and targets of "
                        f"shape (2, 1); give a function of two tensors") from None
    if not isinstance(value, Tensor) or value.shape != () or not value.requires_grad:
        kind = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise DataError(f"--loss {text}: gives {kind}, not one number that depends on the outputs; return a mean made "
                        f"with torch")
    return loss


def function_in(path: Path, name: str) -> Loss:
    """A function defined in a Python file, which is run; DataError says why it cannot be had."""
    if not path.is_file():
        raise DataError(f"--loss {path}:{name}: no such file; give the path of one that defines {name}")
    try:
        found = runpy.run_path(str(path), run_name="users_loss")
    except Exception as error:  # whatever the user's code does is told in one line
        raise DataError(f"--loss {path}:{name}: the file does not run ({type(error).__name__}: {error}); mend it, then "
                        f"try again") from None
    if not callable(found.get(name)):
        known = [key for key, value in found.items() if callable(value) and not key.startswith("_")]
        raise DataError(f"--loss {path}:{name}: the file has no function {name}; it has "
                        f"{', '.join(known) or 'none at all'}")
    return found[name]


def learned_text(model: nn.Module, relation: regression.LinearRelation) -> str:
    """The learned state_dict beside what the data was generated with."""
    state = model.state_dict()
    lines = [f"{name:<10} {[round(value, 4) for value in tensor.flatten().tolist()]}" for name, tensor in state.items()]
    return "\n".join(["learned", *lines, f"generated with w = {list(relation.weights)}, b = {relation.learned_bias}"])


def load_data(config: RegressionConfig) -> ThreeSplits:
    """Training, validation and test split; for --evaluate the latter alone."""
    train, test = regression.load(config.dataset, seed=config.seed)
    return *hold_out(train if config.evaluate is None else None, config.validation_fraction, seed=config.seed), test


def build_model(config: RegressionConfig, samples: TensorDataset) -> nn.Module:
    """One linear layer, from the seed: float32 (B, features) to (B, 1)."""
    torch.manual_seed(config.seed)
    return nn.Sequential(nn.Linear(samples.inputs.shape[1], 1))


@entry_point
def main(config: RegressionConfig) -> dict[str, Any]:
    """One run, on this rank; returns its result."""
    loss = choose_loss(config.loss)
    with open_run(config, "regression") as run:
        train, validation, test = load_data(config)
        model, task = build_model(config, test), Task(loss=loss, test_loss=loss, num_classes=None)
        plain, shard = PlainTransform(), run.world.shard
        result = train_model(config, run, model, task, train_loader(train, plain, **config.batches(), **shard),
                             evaluation_loader(test, plain.normalize, **shard), dataset=train,
                             validation=evaluation_loader(validation, plain.normalize, **shard))
        if "loss" in result and run.world.is_main:  # not where --measure timed some steps
            say(learned_text(model, regression.RELATIONS[config.dataset]))
        return result


if __name__ == "__main__":
    run(main, RegressionConfig, recipes=RECIPES)
