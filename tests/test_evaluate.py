"""`--evaluate`: of any checkpoint, by any number of ranks, with the test set alone; classes by name, and the
preprocessing that the weights were trained with."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from datasets import cifar, fashion_mnist, image_folder, mnist
from datasets.errors import DataError
from datasets.tensors import TensorDataset, join_classes
from launch.command_line import parse
from tests.helpers.images import write_idx, write_tree
from tests.helpers.processes import Ended, read_json
from tests.helpers.server import run
from trainers.engine.checkpoints.load import load_verified
from trainers.engine.checkpoints.save import write_checkpoint
from trainers.image_folder import RECIPES, ImageFolderConfig

pytestmark = pytest.mark.timeout(120)
SMALL = ["--threads", "1", "--no-pictures", "--run-name"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def trained(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with preprocessing that no recipe has."""
    folder = tmp_path_factory.mktemp("runs")
    ended = run("image_folder", "--data-dir", tree, "--output-dir", folder, "--batch-size", "12", "--epochs", "2",
                "--fit", "crop", "--normalize", "half", "--image-size", "40", "--save-weights", *SMALL, "run")
    assert ended.code == 0, ended.err
    return folder / "run"


def evaluate(checkpoint: Path, data: Path, folder: Path, *flags: Any, ranks: int | None = None) -> tuple[Ended, Any]:
    """How the evaluation ended, and its result if there is one."""
    ended = run("image_folder", "--data-dir", data, "--output-dir", folder, "--evaluate", checkpoint, *flags, *SMALL,
                "evaluated", ranks=ranks)
    return ended, read_json(folder / "evaluated" / "result.json") if ended.code == 0 else None


def best(trained: Path) -> Path:
    return trained / "checkpoints" / "best.pt"


def only_test(tree: Path, folder: Path, *classes: str) -> Path:
    """The test images of some classes."""
    for name in classes:
        shutil.copytree(tree / "test" / name, folder / "test" / name)
    return folder


def test_three_ranks_evaluate_some_classes_without_a_training_set_by_name(trained: Path, tree: Path, tmp_path: Path):
    data = only_test(tree, tmp_path / "some", "ring", "bars", "frame")
    whole, parts = evaluate(best(trained), tree, tmp_path / "1"), evaluate(
        best(trained), data, tmp_path / "3", "--batch-size", "64", ranks=3)
    names = read_json(trained / "model.json")["class_names"]
    assert whole[0].codes + parts[0].codes == [0] * 4, parts[0].err
    for label, name in enumerate(names):
        row = whole[1]["confusion_matrix"][label] if name in ("ring", "bars", "frame") else [0] * len(names)
        assert parts[1]["confusion_matrix"][label] == row
    assert parts[1]["class_names"] == names
    trained_result = read_json(trained / "result.json")
    assert whole[1]["accuracy"] == trained_result["best"]["accuracy"]  # with half, crop and 40 pixels, as trained
    assert "evaluate " not in whole[0].out


@pytest.mark.slow
def test_what_is_given_stands_and_is_said_but_for_another_normalisation(trained: Path, tree: Path, tmp_path: Path):
    ended, _ = evaluate(best(trained), tree, tmp_path / "a", "--image-size", "32", "--fit", "squash", "--normalize",
                        "half")
    assert ended.code == 0, ended.err
    said = sorted(line for line in ended.out.splitlines() if line.startswith("evaluate"))
    assert said == ["evaluate   --fit squash: the weights were trained with crop",
                    "evaluate   --image-size 32: the weights were trained with 40"]
    assert read_json(tmp_path / "a" / "evaluated" / "model.json")["image_size"] == [32, 32]
    assert "given" not in read_json(tmp_path / "a" / "evaluated" / "config.json")
    ended, _ = evaluate(best(trained), tree, tmp_path / "b", "--normalize", "imagenet", ranks=2)
    assert ended.code == 2
    assert ended.errors == ["ERROR usage: --normalize imagenet: the weights were trained with half; leave the flag out"]


def test_a_checkpoint_of_another_network_is_one_line_without_the_name_of_another_run(trained: Path, tree: Path,
                                                                                     tmp_path: Path):
    ended, _ = evaluate(best(trained), tree, tmp_path, "--model", "squeezenet1_1", "--image-size", "40", ranks=2)
    assert ended.codes == [4, 4]
    assert len(ended.errors) == 1
    assert ended.errors[0].endswith("more; use the flags and data it was made with")


@pytest.mark.slow
def test_a_checkpoint_of_before_takes_its_classes_from_its_run_and_alone_by_position_with_one_warning(
        trained: Path, tree: Path, tmp_path: Path):
    state = load_verified(best(trained))
    assert state.pop("class_names") == read_json(trained / "model.json")["class_names"]
    state.pop("files")
    older, alone = tmp_path / "older" / "checkpoints", tmp_path / "alone"
    for folder in (older, alone):
        folder.mkdir(parents=True)
        write_checkpoint(folder, state)
    shutil.copy(trained / "model.json", older.parent)
    data = only_test(tree, tmp_path / "some", "ring", "bars")
    ended, result = evaluate(next(older.glob("*.pt")), data, tmp_path / "a")
    assert "WARNING checkpoint" not in ended.err
    assert sum(map(sum, result["confusion_matrix"])) == sum(1 for _ in data.rglob("*.png"))
    ended, result = evaluate(next(alone.glob("*.pt")), tree, tmp_path / "b", ranks=2)
    assert ended.err.count("WARNING") == 1
    assert "holds no names of classes" in ended.err
    assert result["accuracy"] == read_json(trained / "result.json")["best"]["accuracy"]


@pytest.mark.slow
def test_weights_beside_a_run_are_evaluated_with_its_preprocessing_and_classes(trained: Path, tree: Path,
                                                                                tmp_path: Path):
    data = only_test(tree, tmp_path / "some", "ring", "bars")
    newest = sorted((trained / "checkpoints").glob("step-*.pt"))[-1]
    (_, expected), (ended, result) = (evaluate(path, data, tmp_path / path.stem)
                                      for path in (newest, trained / "weights.pt"))
    assert result is not None, ended.err
    same = ("accuracy", "loss", "confusion_matrix", "class_names", "weights_sha256")
    assert [result[name] for name in same] == [expected[name] for name in same]
    card = read_json(tmp_path / "weights" / "evaluated" / "model.json")
    assert (card["fit"], card["image_size"], card["mean"]) == ("crop", [40, 40], [0.5] * 3)
    assert "without names of classes" not in ended.out
    ended, _ = evaluate(trained / "weights.pt", tree, tmp_path / "b", "--normalize", "imagenet")
    assert (ended.code, len(ended.errors)) == (2, 1)
    assert "--normalize imagenet: the weights were trained with half" in ended.errors[0]


@pytest.mark.parametrize(("trainer", "flags"), [
    pytest.param("mnist", ["--dataset", "synthetic", "--max-steps", "5"], marks=pytest.mark.slow),
    pytest.param("fashion_mnist", ["--dataset", "synthetic", "--max-steps", "5"], marks=pytest.mark.slow),
    ("regression", []), pytest.param("regression", ["--recipe", "cheatsheet"], marks=pytest.mark.slow),
])
def test_three_ranks_evaluate_a_run_of_one_though_its_batch_does_not_divide(trainer: str, flags: list[str],
                                                                            tmp_path: Path):
    ended = run(trainer, *flags, "--output-dir", tmp_path, *SMALL, "run")
    assert ended.code == 0, ended.err
    newest = sorted((tmp_path / "run" / "checkpoints").glob("step-*.pt"))[-1]
    ended = run(trainer, *flags, "--output-dir", tmp_path, "--evaluate", newest, "--batch-size", "64", *SMALL, "three",
                ranks=3)
    assert ended.codes == [0, 0, 0], ended.err
    one, three = (read_json(tmp_path / name / "result.json") for name in ("run", "three"))
    assert three["accuracy"] == one["accuracy"]
    assert three["num_samples"] == one["num_samples"]
    assert three["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert "WARNING checkpoint" not in ended.err


def test_the_test_split_of_mnist_and_its_like_needs_no_training_file(tmp_path: Path):
    for place in (tmp_path, tmp_path / "FashionMNIST" / "raw"):
        write_idx(place / "t10k-images-idx3-ubyte.gz", np.zeros((3, 28, 28)))
        write_idx(place / "t10k-labels-idx1-ubyte", np.arange(3))
    for source in (mnist, fashion_mnist):
        train, test = source.load(tmp_path, train=False)
        assert (train, test.targets.tolist()) == (None, [0, 1, 2])
        with pytest.raises(DataError, match="train-images"):
            source.load(tmp_path)


def test_the_test_split_of_cifar_needs_its_own_batch_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    (folder / "test_batch").write_bytes(pickle.dumps({"data": np.zeros((4, 3072), np.uint8), "labels": [1, 2, 3, 9]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"c{label}" for label in range(10)]}))
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": None})
    cifar.prepare(tmp_path, download=False, train=False)
    train, test = cifar.load(tmp_path, train=False)
    assert (train, test.targets.tolist()) == (None, [1, 2, 3, 9])
    with pytest.raises(DataError, match="CIFAR-10 is damaged"):
        cifar.load(tmp_path)


def test_labels_follow_the_names_and_an_unknown_name_says_what_is_known():
    data = TensorDataset(inputs=torch.zeros(4, 1), targets=torch.tensor([0, 1, 2, 0]),
                         class_names=("cat", "dog", "owl"))
    assert data.with_classes(["ant", "dog", "owl", "cat"]).targets.tolist() == [3, 1, 2, 3]
    assert data.with_classes(None) is data
    with pytest.raises(DataError, match=r"owl: no such class in the checkpoint, which knows cat, dog, fox"):
        data.with_classes(["cat", "dog", "fox"])
    many = [f"class {number}" for number in range(21_841)]
    assert list(join_classes(many[::-1], many, place="", owner="").values()) == list(range(21_841))[::-1]


def test_a_fraction_of_one_folder_is_split_as_in_training_with_the_labels_of_the_checkpoint(tree: Path):
    whole = image_folder.load(tree / "train", validation_fraction=0.3)[1]
    known = sorted([*whole.class_names, "another"])
    part = image_folder.load(tree / "train", validation_fraction=0.3, train=False, known=known)[1]
    assert part.names == whole.names
    assert [known[label] for label in part.targets] == [whole.class_names[label] for label in whole.targets]


def test_a_config_knows_which_flags_were_given():
    words = ["--recipe", "finetune", "--image_size=32", "--lr", "0.1", "--no-cache", "--half-statistics"]
    assert parse(ImageFolderConfig, recipes=RECIPES, args=words).given == (
        "recipe", "image_size", "lr", "no_cache", "normalize")
