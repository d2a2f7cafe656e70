"""Training from packs: the bits of training from the folder, at any world size, and one copy of the pack in memory."""

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import image_folder, pack
from datasets.images import packed
from datasets.images.loaders import Decoding, Key
from datasets.images.packed import ImageSource
from datasets.pack import PackConfig
from tests.helpers.images import FLAGS, NUM_TEST, image_loaders, write_tree
from tests.helpers.processes import largest_difference, metrics, newest_checkpoint, read_json
from tests.helpers.server import run, start
from trainers.engine.checkpoints.save import write_checkpoint

pytestmark = pytest.mark.timeout(150)
Batches = list[tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEG and PNG files, beside a pack of their bytes and one of their pixels."""
    folder = write_tree(tmp_path_factory.mktemp("images") / "photos")
    for path in sorted(folder.rglob("*.png"))[::2]:
        with Image.open(path) as image:
            image.resize((70, 50)).save(path.with_suffix(".jpg"))
        path.unlink()
    for kind, flags in (("bytes", {}), ("raw", {"raw": 40})):
        pack.main(PackConfig(data_dir=folder, out=folder.parent / f"{kind}.pack", images_per_part=32, **flags))
    return folder


def epochs(source: ImageSource, *, consumed: int = 0, **how: Any) -> Batches:
    """Two epochs of random crops and flips, the first one from a position."""
    loader = image_loaders({"train": source}, **how)["train"]
    return [*loader.batches(0, consumed), *loader.batches(1, 0)]


def assert_same(found: Batches, expected: Batches) -> None:
    assert len(found) == len(expected) > 0
    for (inputs, targets), (other_inputs, other_targets) in zip(found, expected, strict=True):
        assert torch.equal(inputs, other_inputs)
        assert torch.equal(targets, other_targets)


def test_a_pack_gives_the_pixels_of_the_folder_at_any_world_size_and_from_any_position(folder: Path) -> None:
    files, (train, test) = image_folder.load(folder), packed.load(folder.parent / "bytes.pack")
    assert train is not None
    assert files[0] is not None
    expected = epochs(files[0])
    assert_same(epochs(train, consumed=48), expected[4:])
    for world_size in (1, 2, 4):
        ranks = [epochs(train, rank=rank, world_size=world_size) for rank in range(world_size)]
        together: Any = [tuple(torch.stack(parts, 1).flatten(0, 1) for parts in zip(*step, strict=True))
                         for step in zip(*ranks, strict=True)]
        assert_same(together, expected)
    assert_same(*[list(image_loaders({"test": split})["test"]) for split in (test, files[1])])


@pytest.mark.parametrize("kind", ["bytes", "raw"])
def test_any_number_of_workers_gives_the_pixels_of_none(kind: str, folder: Path) -> None:
    train, _ = packed.load(folder.parent / f"{kind}.pack")
    assert train is not None
    expected = epochs(train)
    for workers in (1, 3):
        assert_same(epochs(train, workers=workers), expected)


def test_raw_packs_give_nearly_the_pixels_of_the_files(folder: Path) -> None:
    files, (train, _) = image_folder.load(folder)[0], packed.load(folder.parent / "raw.pack")
    assert train is not None
    assert files is not None
    raw, expected = (Decoding(splits={"train": each}, size=24, fit="crop") for each in (train, files))
    for sample in range(len(files)):
        key = Key("train", [sample], 0)
        first, second = (decoding.read(key, sample, sample).int() for decoding in (raw, expected))
        assert (first - second).abs().float().mean() < 4


def trained(data_dir: Path, place: Path, name: str, *flags: Any, **how: Any) -> Path:
    words = ["--data-dir", data_dir, "--output-dir", place, "--run-name", name, *FLAGS, *flags]
    ended = run("image_folder", *words, **how)
    assert ended.code == 0, ended.err
    return place / name


def test_a_run_from_a_pack_ends_with_the_weights_of_one_from_the_folder_also_when_it_was_stopped(
        folder: Path, tmp_path: Path) -> None:
    reference = trained(folder, tmp_path, "folder")
    words = ["--data-dir", folder.parent / "bytes.pack", "--output-dir", tmp_path, "--run-name", "pack", *FLAGS,
             "--checkpoint-every", "1"]
    with start("image_folder", *words, folder=tmp_path) as job:
        job.wait_until(lambda: any((tmp_path / "pack" / "checkpoints").glob("step-*.json")))
        job.signal(signal.SIGTERM)
        assert job.wait(60).code == 75
    stopped = read_json(tmp_path / "pack" / "status.json")
    resumed = run("image_folder", *words)
    assert resumed.code == 0, resumed.err
    assert f"step {stopped['step']}" in resumed.out
    assert "WARNING" not in resumed.err
    assert metrics(tmp_path / "pack") == metrics(reference)
    assert read_json(tmp_path / "pack" / "result.json")["weights_sha256"] == \
        read_json(reference / "result.json")["weights_sha256"]


@pytest.mark.slow
def test_two_ranks_train_from_a_pack_as_one_does(folder: Path, tmp_path: Path) -> None:
    one, two = (trained(folder.parent / "bytes.pack", tmp_path, f"ranks-{ranks}", ranks=ranks)
                for ranks in (None, 2))
    assert largest_difference(newest_checkpoint(one)["model"], newest_checkpoint(two)["model"]) < 1e-5
    assert read_json(two / "result.json")["num_samples"] == NUM_TEST


@pytest.mark.slow
def test_evaluation_and_predictions_read_packs_and_join_classes_by_name(folder: Path, tmp_path: Path) -> None:
    run_folder = trained(folder, tmp_path, "run")
    expected = read_json(run_folder / "result.json")
    checkpoint = sorted((run_folder / "checkpoints").glob("step-*.pt"))[-1]
    evaluated = trained(folder.parent / "bytes.pack", tmp_path, "evaluated", "--evaluate", checkpoint)
    assert read_json(evaluated / "result.json")["accuracy"] == expected["accuracy"]
    ended = [run("predict", "--run", run_folder, "--test-images", 5, "--data-dir", place, "--json")
             for place in (folder, folder.parent / "bytes.pack")]
    files, packs = (json.loads(each.out)["predictions"] for each in ended)
    assert len(packs) == 5
    assert [each["probabilities"] for each in packs] == [each["probabilities"] for each in files]


def test_classes_of_a_pack_are_joined_to_those_of_a_checkpoint(folder: Path) -> None:
    train, test = packed.load(folder.parent / "bytes.pack")
    assert train is not None
    known = ("aardvark", *reversed(train.class_names))
    joined = packed.load(folder.parent / "bytes.pack", known=known, train=False)
    assert joined[0] is None
    assert [known[label] for label in joined[1].targets.tolist()] == \
        [train.class_names[label] for label in test.targets.tolist()]
    with pytest.raises(image_folder.DataError, match=r"no such class in the checkpoint"):
        assert packed.load(folder.parent / "bytes.pack", known=["bars"], train=False)[1].targets


@pytest.mark.slow
def test_a_run_that_resumes_with_another_decoder_says_so_once(folder: Path, tmp_path: Path) -> None:
    run_folder = trained(folder, tmp_path, "run", "--max-steps", "10")
    path = sorted((run_folder / "checkpoints").glob("step-*.pt"))[-1]
    state = torch.load(path, weights_only=True)
    assert re.match(r"(simplejpeg|Pillow) [\d.]+", state["fingerprint"]["decoder"])
    words = ["--data-dir", folder, "--output-dir", tmp_path, *FLAGS]
    for decoder, was in (("slowjpeg 1.0", "slowjpeg 1.0"), (None, "Pillow alone")):
        state["fingerprint"]["decoder"] = decoder
        (tmp_path / was).mkdir()
        path = write_checkpoint(tmp_path / was, state)
        resumed = run("image_folder", *words, "--run-name", f"from {was}", "--resume", path, ranks=2)
        assert resumed.codes == [0, 0], resumed.err
        assert resumed.err.count("WARNING") == 1
        assert f"WARNING data: images were decoded by {was} before" in resumed.err


def own_bytes(pid: int | str, kinds: tuple[str, ...]) -> dict[str, int]:
    """What a process has of its own, by kind of memory."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return {kind: int(re.search(rf"^{kind}: +(\d+) kB", text, re.MULTILINE)[1]) * 1024 for kind in kinds}  # type: ignore


def test_four_ranks_share_one_copy_of_a_pack_and_their_own_memory_does_not_grow_with_it(tmp_path: Path) -> None:
    data_dir = tmp_path / "photos"
    for split, count in (("train", 60), ("test", 2)):
        for label in "ab":
            (data_dir / split / label).mkdir(parents=True)
            for number in range(count):
                noise = np.random.default_rng(number).integers(0, 256, (256, 300, 3), dtype=np.uint8)
                Image.fromarray(noise).save(data_dir / split / label / f"{number}.bmp")
    pack.main(PackConfig(data_dir=data_dir, out=tmp_path / "photos.pack", raw=256))
    train, _ = packed.load(tmp_path / "photos.pack")
    assert train is not None
    size = os.path.getsize(train.root / "train-00000.bin")
    assert size > 25e6
    ready, go = os.pipe(), os.pipe()
    children = []
    for _ in range(4):
        children.append(os.fork())
        if children[-1] == 0:
            for sample in range(len(train)):
                train.read(sample)
            os.write(ready[1], b".")
            os.read(go[0], 1)
            os._exit(0)
    try:
        before = dict.fromkeys(("Pss_File", "Pss_Anon"), 0)
        waited = sum(len(os.read(ready[0], 1)) for _ in children)
        assert waited == 4
        mapped_here = [re.search(r"^Pss: +(\d+)", block, re.MULTILINE) for child in children
                       for block in Path(f"/proc/{child}/smaps").read_text().split("VmFlags")
                       if str(train.root) in block]
        shared = sum(int(found[1]) * 1024 for found in mapped_here if found)
        private = [own_bytes(child, tuple(before))["Pss_Anon"] for child in children]
    finally:
        os.write(go[1], b"....")
        for child in children:
            os.waitpid(child, 0)
    assert 0.9 * size < shared < 1.1 * size
    assert max(private) < own_bytes("self", ("Pss_Anon",))["Pss_Anon"] + 5e6
