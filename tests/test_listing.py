"""What counts as an image below a folder: the same for training and predictions, with odd names and links."""

import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

from datasets import image_folder
from datasets.errors import DataError
from datasets.images.unreadable import BadImages
from datasets.listing import describe_left_out, find_images, list_images
from launch.process_group import World
from tests.helpers.images import NUM_TEST, NUM_TRAIN, write_tree
from tests.helpers.processes import ROOT
from trainers.image_folder import ImageFolderConfig, load_data


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "images")


def copy_into(tree: Path, name: str) -> Path:
    """Another file with the content of an image."""
    target = tree / name
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(next((tree / "train" / "disc").glob("*.png")), target)
    return target


def test_names_and_labels_are_those_of_torchvisions_image_folder(tree: Path):
    copy_into(tree, "train/disc/a/b/1.png")
    copy_into(tree, "train/disc/a-b/1.PNG")
    copy_into(tree, "train/disc/a b.jpeg")
    (tree / "train" / "disc" / "linked").symlink_to(tree / "test" / "ring")
    reference = ImageFolder(str(tree / "train"))
    ours = image_folder.scan(tree / "train")
    assert [(str(ours.path(sample)), int(ours.targets[sample])) for sample in range(len(ours))] == reference.samples
    assert list(ours.class_names) == reference.classes


@pytest.mark.parametrize("name", [
    "train/disc/.Trash-1000/files/5.png", "train/disc/._5.png", "train/ring/deep/.git/x.jpg", "train/.cache/a.png",
    "train/__MACOSX/disc/5.png", "train/bars/@eaDir/5.png/SYNOPHOTO_THUMB_M.jpg", "train/$RECYCLE.BIN/5.png",
    "train/lost+found/5.png", "train/disc/Thumbs.db", "train/disc/Desktop.ini", "train/#snapshot/5.png",
    "train/disc/@Recently-Snapshot/5.png",
])
def test_hidden_names_and_what_archives_and_desktops_leave_behind_are_no_images_and_no_classes(name: str, tree: Path):
    copy_into(tree, name)
    training, _ = image_folder.load(tree)
    assert len(training) == NUM_TRAIN
    assert len(training.class_names) == 10
    assert training.left_out == {"hidden": 1}
    found, _ = find_images(tree / "train")
    assert len(found) == NUM_TRAIN


def test_a_hidden_folder_above_what_was_given_hides_nothing_and_a_named_file_is_always_read(tree: Path):
    hidden = tree.parent / ".local" / "@eaDir" / "images"
    hidden.parent.mkdir(parents=True)
    tree.rename(hidden)
    assert len(image_folder.load(hidden)[0]) == NUM_TRAIN
    odd = copy_into(hidden, "train/disc/.5.data")
    assert find_images(odd) == ([odd], {})


def test_what_is_left_out_is_counted_by_extension(tree: Path):
    for name in ("train/disc/1.heic", "train/ring/2.HEIC", "test/disc/3.avif", "train/disc/README", "train/x.png"):
        copy_into(tree, name)
    line = image_folder.describe(dict(zip(("train", "test"), image_folder.load(tree), strict=True)))
    assert line == (f"{NUM_TRAIN} training images in 10 classes, {NUM_TEST} test images; left out: 2 .heic, 1 .avif, "
                    f"1 outside of the class folders, 1 without extension")
    splits = image_folder.load(tree, validation_fraction=0.25)
    split = image_folder.describe(dict(zip(("train", "test"), splits, strict=True)))
    assert split.endswith("; left out: 2 .heic, 1 outside of the class folders, 1 without extension")
    assert describe_left_out(find_images(tree / "test")[1]) == "; left out: 1 .avif"


@pytest.mark.parametrize("name", ["a.jfif", "a.GIF", "a.mpo", "a.pbm", "a.jpe"])
def test_extensions_of_readable_formats_are_images_in_folders_too(name: str, tree: Path):
    copy_into(tree, f"train/disc/{name}")
    assert len(image_folder.load(tree)[0]) == NUM_TRAIN + 1
    assert name in [path.name for path in find_images(tree / "train" / "disc")[0]]


def test_a_link_to_a_folder_that_holds_it_is_refused_by_name_and_other_links_are_followed(tree: Path):
    elsewhere = tree.parent / "elsewhere"
    (elsewhere / "deep").mkdir(parents=True)
    copy_into(tree, "train/disc/one.png").rename(elsewhere / "deep" / "one.png")
    (tree / "train" / "disc" / "more").symlink_to(elsewhere)
    (tree / "train" / "ring" / "again").symlink_to(elsewhere)
    assert len(image_folder.load(tree)[0]) == NUM_TRAIN + 2
    for place, target in (("train/disc/self", tree / "train" / "disc"), ("train/disc/up", tree.parent),
                          ("train/bars/root", Path("/")), ("train/ring/again/deep/back", tree / "train" / "ring")):
        link = tree / place
        link.symlink_to(target)
        with pytest.raises(DataError, match=rf"{link.name}: is a link to {target}, a folder that holds it"):
            image_folder.load(tree)
        with pytest.raises(DataError, match="a folder that holds it"):
            find_images(tree / "train")
        link.unlink()


def test_what_cannot_be_read_is_named_with_the_reason(tree: Path):
    disc = tree / "train" / "disc"
    (disc / "gone.png").symlink_to(tree / "nowhere.png")
    (disc / "self.png").symlink_to(disc / "self.png")
    os.mkfifo(disc / "pipe.png")
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(disc)  # a path in a socket's address is short
        try:
            listener.bind("socket.png")
        finally:
            os.chdir(here)
    (tree / "train" / "lost").symlink_to(tree / "unmounted")
    training = image_folder.scan(tree / "train")
    assert {Path(path).name: reason for path, reason in training.unreadable.items()} == {
        "gone.png": "a link to nothing", "self.png": "Too many levels of symbolic links",
        "pipe.png": "not a regular file", "socket.png": "not a regular file", "lost": "a link to nothing"}
    assert len(training) == NUM_TRAIN
    assert "lost" in training.class_names
    with pytest.raises(DataError, match="lost and 4 more: not readable"):
        BadImages(4).add(training.unreadable.items())


def test_a_folder_that_may_not_be_entered_is_named(tree: Path):
    """In a process that obeys permissions, as root does not."""
    (tree / "train" / "ring").chmod(0o000)
    code = ("import sys; sys.path.insert(0, sys.argv[1])\nfrom pathlib import Path\nfrom datasets import image_folder\n"
            "print(*image_folder.load(Path(sys.argv[2]))[0].unreadable.items())")
    without = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    done = subprocess.run([*without, sys.executable, "-c", code, str(ROOT), str(tree)], capture_output=True, text=True,
                          timeout=60, check=False)
    (tree / "train" / "ring").chmod(0o755)
    assert done.stdout == f"('{tree / 'train' / 'ring'}', 'Permission denied')\n", done.stderr


def test_files_that_cannot_be_read_are_named_where_too_few_others_are_left(tree: Path):
    for image in (tree / "train").rglob("*.png"):
        image.unlink()
        image.symlink_to(tree / "unmounted")
    config = ImageFolderConfig(data_dir=tree, batch_size=12)
    with pytest.raises(DataError, match=r"\.png: not readable as an image \(a link to nothing\)"):
        load_data(config, World())
    with pytest.raises(DataError, match="the training set has only 0 samples"):
        load_data(replace(config, skip_bad=NUM_TRAIN), World())


def test_a_file_that_vanishes_after_the_listing_does_not_break_the_fingerprint(tree: Path):
    training, _ = image_folder.load(tree)
    before = training.fingerprint()
    training.path(3).unlink()
    assert training.fingerprint() != before


def test_one_class_only_and_one_level_too_deep_are_errors_that_say_what_was_found(tree: Path):
    for split in ("train", "test"):
        (tree / split).rename(tree / "pictures")
        (tree / split).mkdir()
        (tree / "pictures").rename(tree / split / "pictures")
    with pytest.raises(DataError, match=r"one class only, pictures with 120 images in bars, checks, .* and 5 more; if "
                                        r"those are the classes, move them one level up, into train/"):
        image_folder.load(tree)
    only = tree / "only"
    only.mkdir()
    (tree / "train" / "pictures" / "disc").rename(only / "disc")
    with pytest.raises(DataError, match=r"one class only, disc with 12 images; put those of each class"):
        image_folder.load(only, validation_fraction=0.2)
    with pytest.raises(DataError, match=r"has no train/ but images; add it"):
        image_folder.load(tree.parent)


@pytest.mark.parametrize(("in_train", "in_test"), [("Disc", "disc"), ("caf\u00e9", "cafe\u0301"), ("disc", "disc ")])
def test_classes_spelled_in_two_ways_are_named_in_the_error(in_train: str, in_test: str, tree: Path):
    (tree / "train" / "disc").rename(tree / "train" / in_train)
    (tree / "test" / "disc").rename(tree / "test" / in_test)
    with pytest.raises(DataError, match=f"test/{in_test}: no such class .*has {in_train}, which is spelled in another"):
        image_folder.load(tree)


def test_ten_thousand_files_are_listed_without_a_look_at_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for number in range(5000):
            (tmp_path / label / f"{number}.jpg").touch()
    looks: list[object] = []
    monkeypatch.setattr(os, "stat", lambda *args, **kwargs: looks.append(args))
    assert len(list_images(tmp_path).images) == 10_000
    assert not looks
