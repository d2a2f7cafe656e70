"""datasets/mnist.py and trainers/mnist.py: every kind of file, damaged ones, and the tutorial's figures."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from datasets import mnist
from datasets import synthetic_digits as digits
from datasets.download import fetch
from datasets.errors import DataError
from tests.helpers import server
from tests.helpers.comparing import finished
from tests.helpers.images import write_idx
from tests.helpers.processes import accuracies, largest_difference, metrics, newest_checkpoint, read_json
from trainers import models

MEASURED = {  # percent after each epoch: the tutorial's own script, measured here, mean of three seeds
    "10/20": (85.2, 92.0, 93.9, 95.0, 95.6),
    "32/64": (91.3, 94.6, 96.0, 96.9, 97.2),
}
SYNTHETIC = ("--dataset", "synthetic", "--no-pictures")


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    """Thirty training and ten test images of noise, labelled 0 to 9 in turn."""
    noise = np.random.default_rng(0)
    return {"train-images": noise.integers(0, 256, (30, 28, 28)).astype(np.uint8), "train-labels": np.arange(30) % 10,
            "t10k-images": noise.integers(0, 256, (10, 28, 28)).astype(np.uint8), "t10k-labels": np.arange(10)}


def write_files(folder: Path, arrays: dict[str, np.ndarray], mark: str = "-", end: str = "") -> None:
    for name, array in arrays.items():
        write_idx(folder / f"{name}{mark}idx{array.ndim}-ubyte{end}", array)


@pytest.mark.parametrize("folder", ["MNIST/raw", "MNIST", "."])
@pytest.mark.parametrize(("mark", "end"), [("-", ""), (".", ""), ("-", ".gz")])
def test_idx_files_are_read_plain_or_gzipped_in_either_spelling(
    tmp_path: Path, arrays: dict[str, np.ndarray], folder: str, mark: str, end: str
) -> None:
    write_files(tmp_path / folder, arrays, mark, end)
    splits = mnist.load(tmp_path)
    for split, name in zip(splits, ("train", "t10k"), strict=True):
        assert split.inputs.dtype == torch.uint8
        assert np.array_equal(split.inputs.squeeze(1).numpy(), arrays[f"{name}-images"])
        assert np.array_equal(split.targets.numpy(), arrays[f"{name}-labels"])


@pytest.mark.parametrize("kind", ["keras", "flat bytes and one-hot", "flat shares of one and one-hot"])
def test_npz_files_of_either_kind_hold_the_same_data_as_idx_files(
    tmp_path: Path, arrays: dict[str, np.ndarray], kind: str
) -> None:
    images, labels, test_images, test_labels = arrays.values()
    if kind == "keras":
        np.savez(tmp_path / "mnist.npz", x_train=images, y_train=labels, x_test=test_images, y_test=test_labels)
    else:
        def flat(some: np.ndarray) -> np.ndarray:
            return some.reshape(-1, 784) if "bytes" in kind else (some.reshape(-1, 784) / 255).astype(np.float32)
        np.savez(tmp_path / "mnist.npz", trainInps=flat(images), trainTargs=np.eye(10)[labels],
                 testInps=flat(test_images), testTargs=np.eye(10)[test_labels])
    write_files(tmp_path / "idx", arrays)
    for split, reference in zip(mnist.load(tmp_path), mnist.load(tmp_path / "idx"), strict=True):
        assert torch.equal(split.inputs, reference.inputs)
        assert torch.equal(split.targets, reference.targets)


def damage(folder: Path, how: str) -> None:
    """Spoil the files in a folder in one way."""
    images, labels = folder / "train-images-idx3-ubyte", folder / "train-labels-idx1-ubyte"
    if how == "truncated":
        images.write_bytes(images.read_bytes()[:-100])
    elif how == "magic":
        images.write_bytes(b"\x00\x00\x08\x01" + images.read_bytes()[4:])
    elif how == "huge":
        images.write_bytes(images.read_bytes()[:4] + b"\xff" * 12 + images.read_bytes()[16:])
    elif how == "empty":
        images.write_bytes(b"")
    elif how == "counts":
        write_idx(labels, np.zeros(29))
    elif how == "label":
        write_idx(labels, np.full(30, 10))
    elif how == "size":
        write_idx(images, np.zeros((30, 27, 28)))
    elif how == "missing":
        labels.unlink()
    elif how == "gzip":
        images.rename(images.with_name(images.name + ".gz"))


@pytest.mark.parametrize(("how", "words"), [
    ("truncated", "its header says 23536"), ("magic", "begins with 00000801"), ("huge", "its header says"),
    ("empty", "begins with nothing"), ("counts", "30 images and 29 labels"), ("label", "labels 10 to 10 of 10 classes"),
    ("size", "27 x 28 pixels"), ("missing", "is not there"), ("gzip", "cannot be read"),
])
def test_a_damaged_idx_file_is_named_with_its_fault(
    tmp_path: Path, arrays: dict[str, np.ndarray], how: str, words: str
) -> None:
    write_files(tmp_path, arrays)
    damage(tmp_path, how)
    with pytest.raises(DataError, match=words) as error:
        mnist.load(tmp_path)
    assert "train-" in str(error.value)


def test_objects_in_an_npz_file_are_never_unpickled(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "unpickled",)

    images, labels, *_ = arrays.values()
    np.savez(tmp_path / "mnist.npz", x_train=np.array([Trap()], dtype=object), y_train=labels, x_test=images,
             y_test=labels)
    with pytest.raises(DataError, match="holds Python objects"):
        mnist.load(tmp_path)
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize(("change", "words"), [
    ({"y_train": np.full((30, 10), 0.1)}, "not whole numbers or one-hot"),
    ({"y_train": np.arange(30) / 10}, "labels of type float"),
    ({"x_train": np.full((30, 784), np.nan)}, "outside 0 to 255"), ({"x_train": np.zeros((30, 783))}, "not 28 x 28"),
    ({"x_train": None}, "not x_train, y_train"), ({"y_test": np.arange(9)}, "10 images and 9 labels"),
])
def test_an_npz_file_that_is_no_mnist_is_named_with_its_fault(
    tmp_path: Path, arrays: dict[str, np.ndarray], change: dict[str, np.ndarray | None], words: str
) -> None:
    good = dict(zip(("x_train", "y_train", "x_test", "y_test"), arrays.values(), strict=True))
    np.savez(tmp_path / "mnist.npz", **{name: array for name, array in (good | change).items() if array is not None})
    with pytest.raises(DataError, match=words):
        mnist.load(tmp_path)


def test_a_truncated_npz_file_is_an_error_in_one_line(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    np.savez(tmp_path / "whole.npz", *arrays.values())
    (tmp_path / "mnist.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:20_000])
    with pytest.raises(DataError, match="cannot be read"):
        mnist.load(tmp_path)


@pytest.mark.timeout(120)
def test_damaged_data_ends_the_trainer_with_code_3_and_one_line(
    tmp_path: Path, arrays: dict[str, np.ndarray]
) -> None:
    write_files(tmp_path, arrays)
    damage(tmp_path, "truncated")
    done = server.run("mnist", "--data-dir", tmp_path, "--output-dir", tmp_path / "runs", timeout=100)
    assert done.code == 3
    assert len(done.errors) == 1
    assert done.errors[0].startswith("ERROR data: ")
    assert "Traceback" not in done.err


@pytest.mark.parametrize(("flags", "words"), [
    (("--model", "lenet", "--hidden", "9"), "--hidden"), (("--model", "resnet9"), "--model resnet9"),
    (("--channels", "0", "3"), "--channels 0"), (("--dropout", "1"), "--dropout 1"),
])
def test_flags_that_do_not_fit_end_with_code_2(
    flags: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from launch.command_line import run
    from trainers.mnist import RECIPES, MnistConfig, main

    monkeypatch.setattr("sys.argv", ["mnist.py", *flags])
    with pytest.raises(SystemExit) as end:
        run(main, MnistConfig, recipes=RECIPES)
    assert end.value.code == 2
    assert words in capsys.readouterr().err


def test_mean_and_std_are_those_of_the_training_images(mnist_data: Path) -> None:
    images = mnist.load(mnist_data)[0].inputs.double() / 255
    assert images.mean().item() == pytest.approx(mnist.MEAN[0], abs=5e-5)
    assert images.std(correction=0).item() == pytest.approx(mnist.STD[0], abs=5e-5)


@pytest.fixture
def mnist_data(mnist: Path) -> Path:
    """The real MNIST, where it is there; a name of its own, since the module's is `mnist`."""
    return mnist


def test_cross_entropy_of_the_networks_outputs_is_the_tutorials_nll_loss() -> None:
    torch.manual_seed(0)
    network = models.build("mnistnet", num_classes=10).eval()
    outputs, targets = network(torch.rand(8, 1, 28, 28)), torch.arange(8)
    assert outputs.exp().sum(1).tolist() == pytest.approx([1.0] * 8, abs=1e-6)
    assert F.cross_entropy(outputs, targets).item() == pytest.approx(F.nll_loss(outputs, targets).item(), abs=1e-6)


def test_drawn_digits_depend_on_seed_and_number_alone() -> None:
    few, many = digits.generate(range(20), seed=3), digits.generate(range(50), seed=3)
    assert torch.equal(few.inputs, many.inputs[:20])
    assert few.targets[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert not torch.equal(few.inputs, digits.generate(range(20), seed=4).inputs)


def test_reading_idx_agrees_with_torchvision(mnist_data: Path) -> None:
    from torchvision.datasets import MNIST

    ours, theirs = mnist.load(mnist_data)[1], MNIST(str(mnist_data), train=False)
    assert torch.equal(ours.inputs.squeeze(1), theirs.data)
    assert torch.equal(ours.targets, theirs.targets)


@pytest.mark.timeout(240)
def test_two_ranks_reach_the_weights_of_one_after_twenty_steps(tmp_path: Path) -> None:
    flags = (*SYNTHETIC, "--dropout", "0", "--max-steps", "20")
    runs = [finished("mnist", tmp_path / f"on-{ranks}", *flags, ranks=ranks) for ranks in (1, 2)]
    one, two = map(newest_checkpoint, runs)
    assert one["step"] == two["step"] == 20
    assert largest_difference(one["model"], two["model"]) < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_run_started_again_with_more_epochs_goes_on_from_its_last(tmp_path: Path) -> None:
    finished("mnist", tmp_path / "twice", *SYNTHETIC, "--epochs", "1")
    finished("mnist", tmp_path / "twice", *SYNTHETIC, "--epochs", "2")
    finished("mnist", tmp_path / "once", *SYNTHETIC, "--epochs", "2")
    twice, once = (read_json(tmp_path / name / "result.json") for name in ("twice", "once"))
    assert twice["steps"] == once["steps"] == 200
    assert twice["weights_sha256"] == once["weights_sha256"]
    assert metrics(tmp_path / "twice") == metrics(tmp_path / "once")


@pytest.mark.timeout(240)
def test_drawn_digits_are_learned(tmp_path: Path) -> None:
    run = finished("mnist", tmp_path / "fast", *SYNTHETIC, "--recipe", "fast", "--epochs", "2", "--batch-size", "64",
                   "--lr", "0.05", ranks=2)
    assert accuracies(run)[-1] > 95


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_tutorials_network_learns_as_fast_as_in_the_tutorial(mnist_data: Path, tmp_path: Path) -> None:
    run = finished("mnist", tmp_path / "tutorial", "--data-dir", mnist_data, "--epochs", "3", timeout=380)
    assert accuracies(run) == pytest.approx(MEASURED["10/20"][:3], abs=1.0)


@pytest.mark.long
@pytest.mark.timeout(400)
def test_the_widened_network_learns_as_fast_as_in_the_tutorial(mnist_data: Path, tmp_path: Path) -> None:
    run = finished("mnist", tmp_path / "wide", "--data-dir", mnist_data, "--epochs", "1", "--channels", "32", "64",
                   "--hidden", "100", timeout=380)
    assert accuracies(run) == pytest.approx(MEASURED["32/64"][:1], abs=1.0)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_fast_recipe_reaches_its_accuracy_on_two_ranks(mnist_data: Path, tmp_path: Path) -> None:
    run = finished("mnist", tmp_path / "fast", "--data-dir", mnist_data, "--recipe", "fast", ranks=2, timeout=380)
    assert accuracies(run)[-1] >= 99.1  # measured: 99.26 to 99.41 with three seeds


def test_a_download_that_fails_leaves_nothing_and_one_that_works_is_whole(tmp_path: Path) -> None:
    def broken(folder: str) -> None:
        (Path(folder) / "MNIST").mkdir()
        raise RuntimeError("no network\nand more")

    def load(folder: Path) -> None:
        if not (folder / "MNIST").is_dir():
            raise DataError("not there")

    with pytest.raises(DataError, match=r"MNIST could not be fetched \(no network\)"):
        fetch(broken, tmp_path / "data", "MNIST", load=load)
    assert list((tmp_path / "data").iterdir()) == []
    fetch(lambda folder: (Path(folder) / "MNIST" / "raw").mkdir(parents=True), tmp_path / "data", "MNIST",
          load=load)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["MNIST"]
    fetch(broken, tmp_path / "data", "MNIST", load=load)  # it is there: nothing is fetched
