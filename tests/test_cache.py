"""The cache of decoded images: equal to decoding, shared by the ranks of a node, never stale, whole or absent."""

import errno
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import image_folder, pack
from datasets.augment import Augmentation
from datasets.errors import DataError
from datasets.image_folder import ImageTree
from datasets.images.loaders import Decoding, Key
from datasets.images.packed import PackedImages, is_whole
from datasets.images.unreadable import BadImages
from launch.process_group import World
from launch.stop import Stopped, StopRequest, signals_flag
from tests.helpers.images import image_loaders, read_image, write_photos, write_tree
from tests.helpers.processes import metrics, read_json
from tests.helpers.server import run, start
from trainers.augment_flags import POLICIES
from trainers.engine.once_per_node import once_per_node
from trainers.image_folder import ImageFolderConfig, cache_of, from_cache


@pytest.fixture
def tree(tmp_path: Path) -> ImageTree:
    train, _ = image_folder.load(write_tree(tmp_path / "images"))
    assert train is not None
    return train


def config_of(folder: Path, **flags: Any) -> ImageFolderConfig:
    return ImageFolderConfig(cache=True, cache_dir=folder, **{"image_size": 24, **flags})


def cached(tree: ImageTree, folder: Path, split: str = "train", **flags: Any) -> PackedImages:
    """A split from its cache, which is made if it is not there."""
    found = from_cache(config_of(folder, **flags), {split: tree}, World())[split]
    assert isinstance(found, PackedImages)
    return found


def place_of(tree: ImageTree, folder: Path, **flags: Any) -> Path:
    return packing_of(tree, folder, **flags).out


def packing_of(tree: ImageTree, folder: Path, **flags: Any) -> Any:
    return cache_of(config_of(folder, **flags), "train", tree, folder, tree.fingerprint(times=True))


def test_a_cache_holds_every_image_as_it_is_decoded(tree: ImageTree, tmp_path: Path) -> None:
    assert not is_whole(place_of(tree, tmp_path / "cache"))
    opened = cached(tree, tmp_path / "cache")
    assert is_whole(opened.root)
    assert [opened.root] == list((tmp_path / "cache").iterdir())
    assert torch.equal(opened.targets, tree.targets)
    for sample in range(len(tree)):
        assert torch.equal(torch.from_numpy(np.array(opened.read(sample))).permute(2, 0, 1),
                           read_image(tree.path(sample), size=24, fit="squash"))
        assert opened.path(sample) == tree.path(sample)


@pytest.mark.parametrize("flags", [{}, {"fit": "crop"}, {"resize_size": 30, "interpolation": "bicubic"}], ids=str)
def test_training_from_a_cache_sees_the_bits_that_decoding_each_time_sees(flags: dict[str, Any], tree: ImageTree,
                                                                          tmp_path: Path) -> None:
    how = {"images": Augmentation(seed=2, mean=(0.4,) * 3, std=(0.2,) * 3, shift=3, flip="alternating"),
           "smallest_area": 1.0, "rank": 1, "world_size": 2, **flags}
    pairs = list(zip(*(image_loaders({"train": source}, **how)["train"].batches(1, 24)
                       for source in (cached(tree, tmp_path / "cache", **flags), tree)), strict=True))
    assert len(pairs) == 8
    for (inputs, targets), (other_inputs, other_targets) in pairs:
        assert torch.equal(inputs, other_inputs)
        assert torch.equal(targets, other_targets)


@pytest.mark.parametrize("flags", [{"auto_augment": name} for name in POLICIES] + [
    {"color_jitter": 0.4, "grayscale": 0.3, "blur": 0.5}], ids=str)
def test_a_policy_sees_of_a_cache_what_it_sees_of_the_files(flags: dict[str, Any], tree: ImageTree, tmp_path: Path
                                                            ) -> None:
    images = Augmentation(seed=5, mean=(0.5,) * 3, std=(0.5,) * 3, shift=2, flip="random")
    config = config_of(tmp_path / "cache", **flags)
    config.check()
    keyed = config.keyed(images)
    assert keyed is not None
    how: dict[str, Any] = {"images": keyed.rest, "keyed": keyed, "smallest_area": 1.0}
    of_cache, of_files = (list(image_loaders({"train": source}, workers=workers, **how)["train"].batches(1, 24))
                          for source, workers in ((cached(tree, tmp_path / "cache"), 1), (tree, 0)))
    for (inputs, _), (other_inputs, _) in zip(of_cache, of_files, strict=True):
        assert torch.equal(inputs, other_inputs)


def test_random_crops_of_a_cache_are_those_of_the_files_a_little_smaller(tmp_path: Path) -> None:
    """Of a photograph larger than what is kept; the test split is kept as the network sees it."""
    across = np.tile(np.linspace(0, 255, 400).astype(np.uint8)[:, None, None], (1, 300, 3))
    for number in range(16):
        path = tmp_path / "images" / ("test" if number > 11 else "train") / "ab"[number % 2] / f"{number}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(across).rotate(90 * (number // 2 % 4), expand=True).save(path)
    train, test = image_folder.load(tmp_path / "images")
    assert train is not None
    flags = {"random_crop": 0.08, "fit": "crop"}
    smaller = cached(train, tmp_path / "cache", **flags)
    assert sorted(smaller.read(0).shape)[1] == 85  # type: ignore  # 24 / sqrt(0.08)
    parts = [Decoding(splits={"train": source}, size=24, seed=1, smallest_area=0.08) for source in (smaller, train)]
    for sample in range(12):
        kept, own = (each[Key("train", [sample], 3)].images.int() for each in parts)  # type: ignore
        assert (kept - own).abs().max() <= 9
    assert not torch.equal(parts[0][Key("train", [7], 3)].images, parts[0][Key("train", [7], 4)].images)  # type: ignore
    same = [next(iter(image_loaders({"test": source}, fit="crop")["test"]))[0]
            for source in (cached(test, tmp_path / "cache", "test", **flags), test)]
    assert torch.equal(*same)


@pytest.mark.parametrize("change", ["time", "size", "name", "image size", "crops"])
def test_a_cache_of_other_data_is_not_taken_for_this_one(change: str, tree: ImageTree, tmp_path: Path) -> None:
    cached(tree, tmp_path / "cache")
    path, flags = tree.path(5), {}
    if change == "time":
        os.utime(path, (1, 1))
    elif change == "size":
        path.write_bytes(path.read_bytes() + b"more")
    elif change == "name":
        path.rename(path.with_name("zzz.png"))
    else:
        flags = {"image_size": 20} if change == "image size" else {"random_crop": 0.5}
    again = image_folder.scan(tree.folder)
    assert not is_whole(place_of(again, tmp_path / "cache", **flags))


def test_a_cut_off_cache_is_built_again(tree: ImageTree, tmp_path: Path) -> None:
    part = cached(tree, tmp_path / "cache").root / "train-00000.bin"
    whole = part.read_bytes()
    os.truncate(part, 1000)
    cached(tree, tmp_path / "cache")
    assert part.read_bytes() == whole


def test_unreadable_images_in_a_cache_are_skipped_where_that_is_allowed(tree: ImageTree, tmp_path: Path,
                                                                        capfd: pytest.CaptureFixture[str]) -> None:
    tree.path(7).write_bytes(b"no image")
    tree.path(9).unlink()
    opened = cached(tree, tmp_path / "cache")
    assert "WARNING" not in capfd.readouterr().err  # once a run meets them
    shown = Decoding(splits={"train": opened}, size=24, skip_bad=1)[Key("train", [7, 8], 0)]
    assert torch.equal(shown.images[0], shown.images[1])  # type: ignore
    with pytest.raises(DataError, match=rf"{tree.folder}.* not readable as an image .*--skip-bad"):
        list(image_loaders({"train": opened})["train"].batches(0, 0))
    bad = BadImages(2)
    list(image_loaders({"train": opened}, skip_bad=2, bad_images=bad)["train"].batches(0, 0))
    assert set(bad.known) == {str(tree.path(7)), str(tree.path(9))}
    test = cached(tree, tmp_path / "cache", "test")
    loaded = list(image_loaders({"test": test}, bad_images=BadImages(2))["test"])
    assert sum(len(targets) for _, targets in loaded) == len(tree) - 2


def test_a_flipped_byte_of_a_cache_ends_the_run_with_what_to_remove(tree: ImageTree, tmp_path: Path) -> None:
    opened = cached(tree, tmp_path / "cache")
    part = opened.root / "train-00000.bin"
    content = bytearray(part.read_bytes())
    content[100] ^= 4  # of the first image
    part.write_bytes(content)
    again = replace(opened)
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"--cache-dir .*damaged in train-00000\.bin.*; remove it, and the same"):
            list(image_loaders({"train": again}, workers=workers)["train"].batches(0, 0))
    shutil.rmtree(opened.root)
    list(image_loaders({"train": cached(tree, tmp_path / "cache")})["train"].batches(0, 0))


def test_a_disk_that_is_too_full_or_refuses_is_a_data_error(tree: ImageTree, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(DataError, match=r"--cache-dir .*cannot be written"):
        cached(tree, blocked / "cache")

    def full(*given: Any, **how: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pack, "replace_file", full)
    with pytest.raises(DataError, match=r"--cache-dir .*cannot be written \(No space left on device\); free some"):
        cached(tree, tmp_path / "cache")


def test_who_finds_a_cache_being_built_waits_for_it_and_continues_where_its_builder_was_stopped(
        tree: ImageTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainers.image_folder.PART_BYTES", 3 * 24**2 * 10)
    packing = packing_of(tree, tmp_path / "cache")
    first, second = packing.fill(), packing.fill()
    for _ in range(25):
        next(first)
    for _ in range(3):
        assert next(second) is None
    assert not is_whole(packing.out)
    parts = sorted(packing.out.with_name(f"{packing.out.name}.partial").glob("*.entries"))
    assert len(parts) == 2
    written = [path.stat().st_mtime_ns for path in parts]
    first.close()
    while len(parts) == 2 and next(second, "done") is None:
        written_now = [path.stat().st_mtime_ns for path in parts if path.exists()]
        assert written_now == written or not written_now
    assert is_whole(packing.out)


def test_a_stop_request_closes_the_work_of_all_ranks_and_an_error_is_raised() -> None:
    closed = []

    def work(items: int) -> Any:
        try:
            for _ in range(items):
                time.sleep(0.3)
                yield
            raise DataError("broken")
        finally:
            closed.append(items)

    request = StopRequest()
    request.ask("SIGTERM")
    with pytest.raises(Stopped):
        once_per_node(World(), work(100), stop=request)
    assert closed == [100]
    with pytest.raises(DataError, match="broken"):
        once_per_node(World(), work(1), stop=StopRequest())


FLAGS = ["--batch-size", "12", "--epochs", "1", "--threads", "1", "--no-pictures", "--workers", "0"]


def run_on_two_ranks(tree: Path, folder: Path, name: str, *more: str) -> tuple[Any, str]:
    """result.json and what was written to stderr."""
    finished = run("image_folder", "--data-dir", tree, "--output-dir", folder, "--run-name", name, *FLAGS, *more,
                      ranks=2)
    assert finished.code == 0, finished.err
    return read_json(folder / name / "result.json"), finished.err


@pytest.mark.timeout(100)
def test_two_ranks_build_one_cache_and_both_train_from_it(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "images")
    result, messages = run_on_two_ranks(tree, tmp_path, "cached", "--cache", "--random-crop", "0.5")
    assert messages.count("decoding ") == 2  # a line for each split, from one rank
    assert sorted(path.name.split("-")[0] for path in (tree / ".cache").iterdir()) == ["test", "train"]
    assert result["num_samples"] == 30


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_two_ranks_learn_from_a_cache_what_they_learn_without_it(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "images")
    cached, _ = run_on_two_ranks(tree, tmp_path, "cached", "--cache", "--workers", "1")
    decoded, _ = run_on_two_ranks(tree, tmp_path, "decoded")
    assert cached["weights_sha256"] == decoded["weights_sha256"]
    assert cached["confusion_matrix"] == decoded["confusion_matrix"]


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_run_resumes_with_or_without_the_cache_in_the_same_bits_or_in_one_line(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "images")
    flags = ["--data-dir", tree, "--output-dir", tmp_path, *FLAGS, "--workers", "0", "--flip", "random",
             "--schedule", "constant"]  # others reach over all the steps that a command asks for

    def trained(name: str, *more: Any) -> tuple[str, Any]:
        ended = run("image_folder", *flags, "--run-name", name, *more)
        assert ended.code == 0, ended.err
        return ended.err, metrics(tmp_path / name)

    _, expected = trained("whole")
    for first, then in (([], ["--cache"]), (["--cache"], [])):
        name = f"first {first}"
        trained(name, "--max-steps", "4", *first)
        said, found = trained(name, *then)
        assert "WARNING" not in said
        assert found[-1] == expected[-1]
        trained(f"crops {name}", "--max-steps", "4", "--random-crop", "0.5", *first)
        said, _ = trained(f"crops {name}", "--random-crop", "0.5", *then)
        assert said.count("WARNING") == 1
        assert "WARNING data: images were decoded by" in said


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_build_outlasts_the_collective_timeout_and_one_that_is_stopped_continues(tmp_path: Path) -> None:
    tree = write_photos(tmp_path / "photos", count=150)
    flags = ["--data-dir", tree, "--output-dir", tmp_path, "--cache", "--timeout", "4", *FLAGS, "--max-steps", "2"]
    began = time.monotonic()
    finished = run("image_folder", *flags, "--run-name", "slow", ranks=2)
    assert finished.code == 0, finished.err
    assert time.monotonic() - began > 4
    shutil.rmtree(tree / ".cache")
    with start("image_folder", *flags, "--run-name", "stopped", folder=tmp_path, ranks=2, launcher="torchrun",
               options=(signals_flag(),)) as job:
        job.wait_until(lambda: bool(list((tree / ".cache").glob("*.partial"))), timeout=90)
        job.signal(signal.SIGTERM)
        ended = job.wait(60)
        left = job.alive()
    assert "ERROR" not in ended.out + ended.err
    assert read_json(tmp_path / "stopped" / "status.json")["state"] == "PREEMPTED"
    assert not any(map(is_whole, (tree / ".cache").iterdir()))
    assert not left
    again = run("image_folder", *flags, "--run-name", "stopped", ranks=2)
    assert again.code == 0, again.err
    assert not list((tree / ".cache").glob("*.partial"))
