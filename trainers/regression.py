"""Fit a linear relation, with a loss of your own if you like, on one process or many.

    python trainers/regression.py                                   # Dive into Deep Learning: w = [2, -3.4], b = 4.2
    python trainers/regression.py --loss my_losses.py:huber         # a function of (outputs, targets) in a file"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if not __package__:  # run by path: our packages, not others of the same names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.stop import begin_script

begin_script(__name__)  # before torch is imported, which takes seconds

import torch
from torch import Tensor, nn

from datasets import loaders, regression, samples, tensors
from launch.command_line import run
from launch.errors import say
from trainers import models, recipes
from trainers.engine import session, user_code
from trainers.engine.config import TrainConfig
from trainers.engine.task import Loss, Task, with_own_code


@dataclass(frozen=True, kw_only=True)
class RegressionConfig(TrainConfig):
    """Fit a linear relation."""
    recipe: str = "d2l"
    """d2l: 1,000 samples of two features. cheatsheet: ten samples of five features, with a loss of one's own."""
    dataset: Literal["two-features", "five-features"] = "two-features"
    """Generated from the seed."""
    model: str = "linear"
    """linear: one layer with one output. FILE.py:NAME: yours."""
    loss: str = "mse"
    """mse: torch's. my-mse: the same, written out. FILE.py:NAME: yours, (outputs, targets) to a mean."""

    def check(self) -> None:
        """The same, and that there is such a loss."""
        super().check()
        user_code.check_loss(self, LOSSES)


RECIPES = recipes.read("regression")


def my_mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """The cheat sheet's example of a loss of one's own: the mean of the squared differences."""
    return torch.mean(torch.pow(outputs - targets, 2))


LOSSES: dict[str, Loss] = {"mse": nn.MSELoss(), "my-mse": my_mse}


def learned_text(model: nn.Module, relation: regression.LinearRelation) -> str:
    """The learned state_dict beside what the data was generated with."""
    lines = [f"{name:<10} {[round(value, 4) for value in tensor.flatten().tolist()]}"
             for name, tensor in model.state_dict().items()]
    bias = relation.bias + relation.uniform_noise / 2
    return "\n".join(["learned", *lines, f"generated with w = {list(relation.weights)}, b = {bias}"])


def load_data(config: RegressionConfig) -> tensors.ThreeSplits:
    """Training, validation and test split; for --evaluate the latter alone."""
    train, test = regression.load(config.dataset, seed=config.seed)
    trained = train if config.evaluate is None else None
    return *tensors.hold_out(trained, config.validation_fraction, seed=config.seed), test


def build_model(config: RegressionConfig, data: tensors.TensorDataset) -> nn.Module:
    """One linear layer, or the user's network, from the seed: float32 (B, features) to (B, 1)."""
    torch.manual_seed(config.seed)
    if user_code.is_reference(config.model):
        options = user_code.options_in(config.model_options, "--model-options")
        return models.build(config.model, num_classes=1, **options)
    return nn.Sequential(nn.Linear(data.inputs.shape[1], 1))


def build_task(config: RegressionConfig, device: torch.device) -> Task:
    """The loss, and the user's metric."""
    loss = LOSSES.get(config.loss, my_mse)  # or the user's, which takes its place
    return with_own_code(Task(loss=loss, test_loss=loss, num_classes=None), user_code.references(config), device)


@session.entry_point
def main(config: RegressionConfig) -> dict[str, Any]:
    """One run, on this rank; returns its result."""
    with session.open_run(config, "regression") as run:
        train, validation, test = load_data(config)
        model, task, shard = build_model(config, test), build_task(config, run.world.device), run.world.shard
        present = samples.Splits(train, validation, test).present()
        result = session.train_model(config, run, model, task, dataset=train,
                                     **loaders.memory_loaders(present, None, **config.batches(), **shard))
        if "loss" in result and run.world.is_main:  # not where --measure timed some steps
            say(learned_text(model, regression.RELATIONS[config.dataset]))
        return result


if __name__ == "__main__":
    run(main, RegressionConfig, recipes=RECIPES)
