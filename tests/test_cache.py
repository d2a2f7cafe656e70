"""The cache of decoded images: equal to decoding, shared by the ranks of a node, never stale, whole or absent."""

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from datasets import image_folder
from datasets.augment import Augmentation
from datasets.errors import DataError
from datasets.image_folder import ImageTree
from datasets.images.cache import GatherThenAugment, ImageCache
from datasets.images.loaders import DecodedTrainLoader, Decoder, Decoding
from datasets.images.read import read_image
from datasets.images.unreadable import BadImages
from datasets.loaders import train_loader
from datasets.order import ResumableSampler
from launch.process_group import World
from launch.stop import Stopped, StopRequest, signals_flag
from tests.helpers.images import write_photos, write_tree
from tests.helpers.processes import read_json
from tests.helpers.server import run, start
from trainers.engine.once_per_node import once_per_node

CPU = torch.device("cpu")


@pytest.fixture
def tree(tmp_path: Path) -> ImageTree:
    return image_folder.load(write_tree(tmp_path / "images"))[0]


def cache_of(tree: ImageTree, folder: Path, *, size: int = 24, split: str = "train") -> ImageCache:
    return ImageCache(tree, split, folder, size=size, fit="squash")


def build(cache: ImageCache, *, skip_bad: int = 0) -> None:
    decoder = Decoder(Decoding(splits={cache.split: cache.tree}, size=cache.size, skip_bad=skip_bad))
    assert list(cache.build(decoder, BadImages(skip_bad)))[-1] <= len(cache.tree)


def test_a_cache_holds_every_image_as_it_is_decoded(tree: ImageTree, tmp_path: Path):
    cache = cache_of(tree, tmp_path / "cache")
    assert not cache.exists()
    build(cache)
    assert cache.exists()
    opened = cache.open(BadImages(0))
    assert torch.equal(opened.targets, tree.targets)
    for sample in range(len(tree)):
        assert torch.equal(opened.inputs[sample], read_image(tree.path(sample), size=24, fit="squash"))
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".json", ".u8"]


def test_training_from_a_cache_sees_the_bits_that_decoding_each_time_sees(tree: ImageTree, tmp_path: Path):
    cache = cache_of(tree, tmp_path / "cache")
    build(cache)
    augmentation = Augmentation(seed=2, mean=(0.4,) * 3, std=(0.2,) * 3, shift=3, flip="alternating")
    cached = train_loader(cache.open(BadImages(0)), GatherThenAugment(augmentation), batch_size=12, rank_batch_size=6,
                          rank=1, world_size=2, seed=2, device=CPU)
    sampler = ResumableSampler(tree, global_batch_size=12, rank=1, world_size=2, seed=2)
    decoder = Decoder(Decoding(splits={"train": tree}, size=24))
    decoded = DecodedTrainLoader(tree, decoder, augmentation, sampler, BadImages(0), rank_batch_size=6, device=CPU)
    pairs = list(zip(cached.batches(1, 24), decoded.batches(1, 24), strict=True))
    assert len(pairs) == 8
    for (inputs, targets), (other_inputs, other_targets) in pairs:
        assert torch.equal(inputs, other_inputs)
        assert torch.equal(targets, other_targets)


def test_two_openings_share_memory_and_writing_to_one_alters_neither_the_other_nor_the_file(tree: ImageTree,
                                                                                           tmp_path: Path):
    cache = cache_of(tree, tmp_path / "cache")
    build(cache)
    content = cache.path.read_bytes()
    first, second = cache.open(BadImages(0)), cache.open(BadImages(0))
    maps = Path("/proc/self/maps").read_text()
    assert maps.count(str(cache.path)) >= 2  # mapped, not read
    first.inputs.fill_(0)
    assert second.inputs.any()
    assert cache.path.read_bytes() == content


@pytest.mark.parametrize("change", ["time", "size", "name", "image size"])
def test_a_cache_of_other_data_is_not_taken_for_this_one(change: str, tree: ImageTree, tmp_path: Path):
    build(cache_of(tree, tmp_path / "cache"))
    path, image_size = tree.path(5), 24
    if change == "time":
        os.utime(path, (1, 1))
    elif change == "size":
        path.write_bytes(path.read_bytes() + b"more")
    elif change == "name":
        path.rename(path.with_name("zzz.png"))
    else:
        image_size = 20
    again = image_folder.scan(tree.root)
    assert not cache_of(again, tmp_path / "cache", size=image_size).exists()


def test_a_cut_off_cache_is_built_again(tree: ImageTree, tmp_path: Path):
    cache = cache_of(tree, tmp_path / "cache")
    build(cache)
    os.truncate(cache.path, 1000)
    assert not cache.exists()
    build(cache)
    assert torch.equal(cache.open(BadImages(0)).inputs[3], read_image(tree.path(3), size=24, fit="squash"))


def test_unreadable_images_in_a_cache_are_counted_whenever_it_is_opened(tree: ImageTree, tmp_path: Path):
    tree.path(7).write_bytes(b"no image")
    with pytest.raises(DataError, match="no image format"):
        build(cache_of(tree, tmp_path / "cache"))
    assert not list((tmp_path / "cache").iterdir())
    cache = cache_of(tree, tmp_path / "cache")
    build(cache, skip_bad=1)
    opened = cache.open(BadImages(1))
    assert torch.equal(opened.inputs[7], opened.inputs[8])
    assert opened.targets[7] == tree.targets[8]
    with pytest.raises(DataError, match="--skip-bad 1"):
        cache.open(BadImages(0))


def test_an_unreadable_test_image_has_no_row(tree: ImageTree, tmp_path: Path):
    tree.path(7).write_bytes(b"no image")
    cache = cache_of(tree, tmp_path / "cache", split="test")
    build(cache, skip_bad=1)
    opened = cache.open(BadImages(1))
    assert len(opened) == len(tree) - 1
    assert torch.equal(opened.inputs[7], read_image(tree.path(8), size=24, fit="squash"))


def test_a_disk_that_is_too_full_or_refuses_is_a_data_error(tree: ImageTree, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(DataError, match=r"--cache-dir .*cannot be written"):
        build(cache_of(tree, blocked / "cache"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(DataError, match="the cache needs"):
        build(cache_of(tree, tmp_path / "cache"))


def test_what_a_killed_builder_left_is_swept_and_what_a_live_one_writes_is_not(tree: ImageTree, tmp_path: Path):
    cache = cache_of(tree, tmp_path / "cache")
    builder = cache.build(Decoder(Decoding(splits={"train": tree}, size=24)), BadImages(0))
    next(builder)
    mine, = (tmp_path / "cache").iterdir()
    left = mine.with_name(mine.name.replace(f".{os.getpid()}.", ".999999999."))
    left.write_bytes(b"half")
    build(cache_of(tree, tmp_path / "cache", size=16))
    assert mine.exists()
    assert not left.exists()
    builder.close()
    assert not mine.exists()
    assert not cache.exists()


def test_a_stop_request_closes_the_work_of_all_ranks_and_an_error_is_raised():
    closed = []

    def work(items: int):
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


FLAGS = ["--batch-size", "12", "--epochs", "1", "--threads", "1", "--no-pictures"]


def run_on_two_ranks(tree: Path, folder: Path, name: str, *more: str) -> tuple[Any, str]:
    """result.json and what was written to stderr."""
    finished = run("image_folder", "--data-dir", tree, "--output-dir", folder, "--run-name", name, *FLAGS, *more,
                      ranks=2)
    assert finished.code == 0, finished.err
    return read_json(folder / name / "result.json"), finished.err


@pytest.mark.timeout(100)
def test_two_ranks_build_one_cache_and_both_train_from_it(tmp_path: Path):
    tree = write_tree(tmp_path / "images")
    result, messages = run_on_two_ranks(tree, tmp_path, "cached", "--cache")
    assert messages.count("decoding ") == 2  # a line for each split, from one rank
    assert sorted(path.suffix for path in (tree / ".cache").iterdir()) == [".json", ".json", ".u8", ".u8"]
    assert result["num_samples"] == 30


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_two_ranks_learn_from_a_cache_what_they_learn_without_it(tmp_path: Path):
    tree = write_tree(tmp_path / "images")
    cached, _ = run_on_two_ranks(tree, tmp_path, "cached", "--cache", "--workers", "1")
    decoded, _ = run_on_two_ranks(tree, tmp_path, "decoded")
    assert cached["weights_sha256"] == decoded["weights_sha256"]
    assert cached["confusion_matrix"] == decoded["confusion_matrix"]


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_build_outlasts_the_collective_timeout_and_a_stop_leaves_nothing_of_it(tmp_path: Path):
    tree = write_photos(tmp_path / "photos", count=150)
    flags = ["--data-dir", tree, "--output-dir", tmp_path, "--cache", "--timeout", "8", *FLAGS, "--max-steps", "2"]
    began = time.monotonic()
    finished = run("image_folder", *flags, "--run-name", "slow", ranks=2)
    assert finished.code == 0, finished.err
    assert time.monotonic() - began > 8
    shutil.rmtree(tree / ".cache")
    with start("image_folder", *flags, "--run-name", "stopped", folder=tmp_path, ranks=2, launcher="torchrun",
               options=(signals_flag(),)) as job:
        job.wait_until(lambda: bool(list((tree / ".cache").glob(".*.tmp"))), timeout=90)
        job.signal(signal.SIGTERM)
        ended = job.wait(60)
        left = job.alive()
    assert "ERROR" not in ended.out + ended.err
    assert read_json(tmp_path / "stopped" / "status.json")["state"] == "PREEMPTED"
    assert not list((tree / ".cache").iterdir())
    assert not left
