"""trainers/fashion_mnist.py: the book's two networks, on one rank and two, and its figures."""

from pathlib import Path

import numpy as np
import pytest

from datasets import fashion_mnist
from datasets.errors import DataError
from tests.helpers.comparing import finished
from tests.helpers.images import write_idx
from tests.helpers.processes import accuracies, largest_difference, metrics, newest_checkpoint
from tests.helpers.server import run
from trainers.fashion_mnist import MEAN, STD


def training_figures(run: Path) -> tuple[float, float]:
    """Mean loss and accuracy of the last epoch's training steps, as the book's train_ch3 counts them."""
    return [(loss, accuracy) for split, loss, accuracy in metrics(run, "split", "loss", "accuracy")
            if split == "train"][-1]


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("recipe", [pytest.param("softmax", marks=pytest.mark.slow), "lenet"])
def test_two_ranks_reach_the_weights_of_one_after_twenty_steps(tmp_path: Path, recipe: str) -> None:
    flags = ("--dataset", "synthetic", "--no-pictures", "--recipe", recipe, "--max-steps", "20")
    runs = [finished("fashion_mnist", tmp_path / f"on-{ranks}", *flags, ranks=ranks) for ranks in (1, 2)]
    one, two = map(newest_checkpoint, runs)
    assert one["step"] == two["step"] == 20
    assert largest_difference(one["model"], two["model"]) < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_softmax_regression_says_and_holds_the_books_figures(
    fashion_mnist_data: Path, tmp_path: Path
) -> None:
    done = run("fashion_mnist", "--data-dir", fashion_mnist_data, "--no-pictures", "--threads", "1", "--output-dir",
               tmp_path, "--run-name", "softmax", timeout=220)
    assert done.code == 0, done.err
    folder, lines = tmp_path / "softmax", [line for line in done.err.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 10
    assert all(words in lines[-1] for words in ("train loss", "train accuracy", "test accuracy", "samples/s"))
    loss, accuracy = training_figures(folder)
    assert loss < 0.5
    assert accuracy > 0.7
    assert len(accuracies(folder)) == 10
    assert accuracies(folder)[-1] > 70


@pytest.fixture
def fashion_mnist_data(fashion_mnist: Path) -> Path:
    """The real FashionMNIST, where it is there; a name of its own, since the module's is `fashion_mnist`."""
    return fashion_mnist


def test_mean_and_std_are_those_of_the_training_images(fashion_mnist_data: Path) -> None:
    train, _ = fashion_mnist.load(fashion_mnist_data)
    assert train.inputs.shape == (60_000, 1, 28, 28)
    images = train.inputs.double() / 255
    assert images.mean().item() == pytest.approx(MEAN[0], abs=5e-5)
    assert images.std().item() == pytest.approx(STD[0], abs=5e-5)


@pytest.mark.long
@pytest.mark.timeout(400)
def test_lenet_reaches_the_books_accuracy(fashion_mnist_data: Path, tmp_path: Path) -> None:
    run = finished("fashion_mnist", tmp_path / "lenet", "--data-dir", fashion_mnist_data, "--recipe", "lenet", ranks=2,
                   timeout=380)
    assert training_figures(run)[0] < 0.52
    assert accuracies(run)[-1] >= 80


def test_files_of_mnist_beside_are_not_taken_for_fashion_mnist(tmp_path: Path) -> None:
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros((3, 28, 28)))
    with pytest.raises(DataError, match="FashionMNIST is not there"):
        fashion_mnist.load(tmp_path)
