"""Reading a tree of images, one folder a class: labels, splits, fingerprint, and trees that cannot be used."""

import os
from pathlib import Path
from typing import Any

import pytest

from datasets import image_folder
from datasets.errors import DataError
from tests.helpers.images import NUM_TEST, write_tree


def test_labels_follow_the_training_folders_and_hidden_ones_are_no_classes(tmp_path: Path):
    tree = write_tree(tmp_path)
    (tree / "train" / ".thumbnails").mkdir()
    training, test = image_folder.load(tree)
    assert training.class_names == tuple(sorted(training.class_names))
    assert len(training.class_names) == 10
    for split in (training, test):
        for sample in range(len(split)):
            assert split.path(sample).parent.name == split.class_names[int(split.targets[sample])]
    assert len(set(test.targets[:10].tolist())) > 4  # mixed


@pytest.mark.parametrize(("damage", "said"), [
    (lambda tree: [path.unlink() for path in (tree / "test" / "disc").iterdir()], "test/disc: holds no image"),
    (lambda tree: (tree / "test" / "disc").rename(tree / "test" / "disk"), "test/disk: no such class"),
    (lambda tree: (tree / "test").rename(tree / "exam"), "has no test/ or val/"),
    (lambda tree: (tree / "train").rename(tree / "practice"), "has no train/"),
])
def test_a_folder_that_cannot_be_used_is_a_data_error_that_names_it(damage: Any, said: str, tmp_path: Path):
    tree = write_tree(tmp_path / "images")
    damage(tree)
    with pytest.raises(DataError, match=said):
        image_folder.load(tree)


def test_a_missing_folder_and_one_without_classes_are_data_errors(tmp_path: Path):
    with pytest.raises(DataError, match="no such folder"):
        image_folder.load(tmp_path / "nothing")
    with pytest.raises(DataError, match="holds no folder per class"):
        image_folder.load(tmp_path, validation_fraction=0.2)


def test_val_is_a_test_split_by_another_name(tmp_path: Path):
    tree = write_tree(tmp_path)
    (tree / "test").rename(tree / "val")
    assert len(image_folder.load(tree)[1]) == NUM_TEST


@pytest.mark.parametrize("inner", ["train", ""])
def test_one_folder_is_split_by_a_fraction_of_each_class_and_a_seed(inner: str, tmp_path: Path):
    tree = write_tree(tmp_path)
    folder = tree if inner else tree / "train"
    training, test = image_folder.load(folder, validation_fraction=0.25, seed=1)
    assert training.targets.bincount().tolist() == [9] * 10
    assert test.targets.bincount().tolist() == [3] * 10
    assert not set(training.names) & set(test.names)
    assert image_folder.load(folder, validation_fraction=0.25, seed=1)[1].names == test.names
    assert set(image_folder.load(folder, validation_fraction=0.25, seed=2)[1].names) != set(test.names)


def test_the_fingerprint_sees_names_labels_and_sizes(tmp_path: Path):
    training, _ = image_folder.load(write_tree(tmp_path))
    before, timed = training.fingerprint(), training.fingerprint(times=True)
    os.utime(training.path(0), (1, 1))
    assert training.fingerprint() == before
    assert training.fingerprint(times=True) != timed
    with open(training.path(0), "ab") as file:
        file.write(b"more")
    assert training.fingerprint() != before


def test_the_synthetic_folder_appears_whole_and_once(tmp_path: Path):
    folder = tmp_path / "synthetic-images-4"
    image_folder.write_synthetic(folder, seed=4)
    training, test = image_folder.load(folder)
    assert (len(training), len(test)) == (2000, 500)
    written = training.path(0).stat().st_mtime_ns
    image_folder.write_synthetic(folder, seed=4)
    assert training.path(0).stat().st_mtime_ns == written
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
