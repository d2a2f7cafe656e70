"""Data that is not what the weights were trained on: other files at a resume, other classes in an evaluation."""

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.errors import CheckpointError
from launch.process_group import World
from tests.helpers.comparing import run_in
from tests.helpers.faults import Fault, check
from tests.helpers.hooks import at, send
from tests.helpers.images import image_tree
from tests.helpers.processes import read_json
from trainers.engine.checkpoints.load import load_verified
from trainers.engine.checkpoints.save import write_checkpoint
from trainers.engine.history import DataRecord

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on files that was stopped at step 8."""
    folder = tmp_path_factory.mktemp("stopped")
    image_tree(folder / "images")
    ended = run_in(folder, "--data-dir", folder / "images", trainer="image_folder", hook=at(7, "backward", send(15)))
    assert ended.codes == [75], ended.err
    return folder


@pytest.fixture
def spoilt(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "job"))


def some_file(folder: Path) -> Path:
    """The third training image; the copy of the folder has given all files the times that they had."""
    return sorted((folder / "images" / "train").rglob("*.png"))[2]


def resume(folder: Path, *flags: str, ranks: int = 1):
    return run_in(folder, "--data-dir", folder / "images", *flags, trainer="image_folder", ranks=ranks)


def replace_image(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def rename_image(path: Path) -> None:
    path.rename(path.with_name("9999.png"))


@pytest.mark.parametrize(("change", "said"), [
    (replace_image, r"0004\.png: its size was 3\d\d\d and is 3\d\d\d"),
    (rename_image, r"0004\.png: its size was 3\d\d\d and is absent"),
], ids=["replaced", "renamed"])
def test_another_file_is_refused_by_name_at_the_resume(spoilt: Path, change: Callable[[Path], None], said: str) -> None:
    change(some_file(spoilt))
    before = sorted(path.name for path in (spoilt / "r" / "checkpoints").iterdir())
    ended = resume(spoilt, "--workers", "1", ranks=2)
    assert ended.codes == [4, 4], ended.err
    check(ended, Fault(name="file", codes=(4, 4), ranks=2, error=f"ERROR checkpoint: .*{said}; use the data"))
    assert read_json(spoilt / "r" / "status.json")["state"] == "FAILED"
    assert sorted(path.name for path in (spoilt / "r" / "checkpoints").iterdir()) == before


def test_a_file_written_again_with_its_size_is_one_warning_at_the_resume(spoilt: Path) -> None:
    for path in (spoilt / "images" / "train").rglob("*.png"):
        if path >= some_file(spoilt):
            os.utime(path)
    ended = resume(spoilt)
    assert ended.codes == [0], ended.err
    assert ended.err.count("WARNING") == 1
    assert f"WARNING data: {some_file(spoilt)}: written since the checkpoint, the first of " in ended.err


def without_record(folder: Path) -> None:
    """Make the checkpoints of a run such as they were before files were recorded."""
    for path in (folder / "r" / "checkpoints").glob("step-*.pt"):
        state = load_verified(path)
        del state["files"], state["class_names"]
        write_checkpoint(path.parent, state)


@pytest.mark.slow
def test_a_checkpoint_of_before_is_compared_by_its_fingerprint(spoilt: Path, tmp_path: Path) -> None:
    without_record(spoilt)
    other = Path(shutil.copytree(spoilt, tmp_path / "other"))
    os.utime(some_file(spoilt))
    ended = resume(spoilt)
    assert ended.codes == [0], ended.err
    assert "WARNING" not in ended.err
    replace_image(some_file(other))
    check(resume(other), Fault(name="fingerprint", codes=(4,), error="ERROR checkpoint: .*dataset was .* and is "))


def test_a_class_that_the_checkpoint_does_not_know_is_refused_in_an_evaluation(stopped: Path, tmp_path: Path) -> None:
    images = Path(shutil.copytree(stopped / "images", tmp_path / "images"))
    (images / "test" / "b").rename(images / "test" / "wolf")
    shutil.rmtree(images / "train")
    newest = sorted((stopped / "r" / "checkpoints").glob("step-*.pt"))[-1]
    ended = resume(tmp_path, "--evaluate", str(newest), "--batch-size", "7", "--run-name", "e", ranks=3)
    check(ended, Fault(name="class", codes=(3, 3, 3), ranks=3, error=(
        "ERROR data: .*wolf: no such class in the checkpoint, which knows a, b; leave it out, or train")))


def test_other_names_of_classes_are_refused_at_a_resume() -> None:
    record = DataRecord(World(), None, ("cat", "dog"))
    record.expect({"class_names": ["cat", "dog"]}, Path("x.pt"))
    record.expect({}, Path("x.pt"))
    for names, said in ((["cat", "Dog"], r"names \(Dog, dog\); use"), (["cat"], r"names \(dog\)"),
                        (["dog", "cat"], "other names")):
        with pytest.raises(CheckpointError, match=said):
            record.expect({"class_names": names}, Path("x.pt"))


def test_training_begins_before_all_files_are_looked_at(tmp_path: Path) -> None:
    class Slow:
        """Files on a file system that answers late."""

        folder, answer = tmp_path, threading.Event()

        def sizes_and_times(self, files: dict[str, list[int]]) -> None:
            assert self.answer.wait(30)
            files["a.png"] = [5, 6]

        def fingerprint(self, files: object) -> str:
            return "known"

    record = DataRecord(World(), Slow(), ("a", "b"))
    assert record.fingerprint is None  # training begins
    Slow.answer.set()
    record.settle()
    assert record.fingerprint == "known"
    assert record.state() == {"class_names": ["a", "b"], "files": '{"a.png": [5, 6]}'}
