"""Packs: what a folder, tar shards and Parquet files become, whole or absent, and what is refused."""

import filecmp
import hashlib
import io
import json
import os
import random
import shutil
import signal
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import image_folder, pack
from datasets.errors import DataError
from datasets.image_folder import ImageTree
from datasets.images import packed
from datasets.images.packed import PackedImages
from datasets.images.read import BadImage, pixels
from datasets.pack import PackConfig
from launch.errors import UsageError
from tests.helpers.images import NUM_TEST, NUM_TRAIN, write_tree

pytestmark = pytest.mark.timeout(120)
Splits = tuple[Any, Any]


def photos(folder: Path, *, sizes: tuple[tuple[int, int], ...] = ((90, 60), (40, 64), (20, 20))) -> Path:
    """Two classes of JPEG files of several sizes, in train/ and val/, which is a folder for tests by another name."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for label in ("cat", "dög"):
            place = folder / split / label
            place.mkdir(parents=True)
            for number in range(count):
                for width, height in sizes:
                    noise = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8))
                    noise.resize((width, height)).save(place / f"{number}-{width}.jpg", quality=95)
    return folder


def packs(data_dir: Path, **options: Any) -> Splits:
    """The splits of a pack that was made here."""
    out = data_dir.parent / f"{data_dir.name}{'-'.join(map(str, options.items()))}.pack"
    pack.main(PackConfig(data_dir=data_dir, out=out, **{"images_per_part": 10, **options}))
    return packed.load(out)


def assert_same_images(found: Splits, expected: Splits) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.class_names == theirs.class_names
        assert ours.targets.tolist() == theirs.targets.tolist()
        assert [bytes(ours.read(sample)) for sample in range(len(ours))] == \
            [theirs.read(sample) for sample in range(len(theirs))]


def test_a_pack_holds_the_bytes_names_and_labels_of_a_folder_in_its_order(tmp_path: Path) -> None:
    folder = image_folder.load(write_tree(tmp_path / "images"))
    found = packs(tmp_path / "images")
    assert_same_images(found, folder)
    assert [path.relative_to(found[0].root / "train") for path in map(found[0].path, range(NUM_TRAIN))] == \
        list(map(Path, folder[0].names))
    assert (len(found[0]), len(found[1])) == (NUM_TRAIN, NUM_TEST)
    record = json.loads((found[0].root / "pack.json").read_text())
    assert sorted(path.name for path in found[0].root.iterdir()) == sorted(["pack.json", *record["files"]])
    for name, facts in record["files"].items():
        assert hashlib.sha256((found[0].root / name).read_bytes()).hexdigest() == facts["sha256"]
    apart, expected = (module.load(place, validation_fraction=0.25, seed=3) for module, place in
                       ((packed, found[0].root), (image_folder, tmp_path / "images")))
    assert_same_images(apart, expected)


def test_resized_images_are_jpegs_with_that_shorter_side_and_small_files_stay_as_they_are(tmp_path: Path) -> None:
    files = image_folder.load(photos(tmp_path / "photos"))
    small, coarse = packs(tmp_path / "photos", resize=32), packs(tmp_path / "photos", resize=32, quality=10)
    raw = packs(tmp_path / "photos", raw=32)
    for split in range(2):
        for sample in range(len(files[split])):
            own = files[split].read(sample)
            content = small[split].read(sample)
            stored = raw[split].read(sample)
            assert isinstance(stored, np.ndarray)
            height, width = pixels(own).shape[:2]
            if min(height, width) <= 32:
                assert bytes(content) == own
                assert np.array_equal(stored, pixels(own))
            else:
                assert pixels(content).shape == stored.shape == (32, 48, 3) if width == 90 else (51, 32, 3)
                assert np.abs(pixels(content).astype(int) - stored).mean() < 10
                assert len(coarse[split].read(sample)) < len(content) < len(own)


def test_an_image_too_long_for_a_jpeg_keeps_its_own_bytes(tmp_path: Path) -> None:
    data_dir = write_tree(tmp_path / "images")
    path = data_dir / "train" / "bars" / "000 long.png"
    Image.new("L", (80_000, 9)).save(path)
    train, _ = packs(data_dir, resize=8, quality=90)
    (sample,) = [sample for sample in range(len(train)) if train.path(sample).name == path.name]
    assert bytes(train.read(sample)) == path.read_bytes()


def write_tars(data_dir: Path, splits: tuple[ImageTree, ImageTree], *, shards: int = 2) -> Path:
    data_dir.mkdir()
    for split, images in zip(("train", "val"), splits, strict=True):
        for shard in range(shards):
            with tarfile.open(data_dir / f"{split}-{shard:03d}.tar", "w") as archive:
                for sample in range(shard, len(images), shards):
                    add(archive, f"a.b/{sample}.png", images.read(sample))
                    add(archive, f"a.b/{sample}.cls", str(int(images.targets[sample])).encode())
                add(archive, "notes.txt", b"nothing")
    return data_dir


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_parquet(data_dir: Path, splits: tuple[ImageTree, ImageTree], **change: Any) -> Path:
    """One file per split as Hugging Face writes them; `change` replaces columns, None removes one."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    data_dir.mkdir(parents=True)
    for split, images in zip(("train", "test"), splits, strict=True):
        columns = {"image": [{"bytes": images.read(sample), "path": None} for sample in range(len(images))],
                   "label": images.targets.tolist()}
        names = {"label": {"names": list(images.class_names), "_type": "ClassLabel"}}
        columns = {name: values for name, values in (columns | change).items() if values is not None}
        table = arrow.table(columns, metadata={"huggingface": json.dumps({"info": {"features": names}})})
        parquet.write_table(table, data_dir / f"{split}-00000-of-00001.parquet", row_group_size=7)
    return data_dir


def unshuffled(folder: Path) -> tuple[ImageTree, ImageTree]:
    train = image_folder.scan(folder / "train")
    return train, image_folder.scan(folder / "test", class_names=train.class_names)


def test_tar_shards_and_parquet_files_give_the_images_of_the_folder(tmp_path: Path, capfd: Any) -> None:
    folder = unshuffled(write_tree(tmp_path / "images"))
    files = image_folder.load(tmp_path / "images")
    tars = packs(write_tars(tmp_path / "tars", folder, shards=1))
    assert "; left out: 2 .txt" in capfd.readouterr().out
    assert tars[0].class_names == tuple(map(str, range(10)))
    assert_same_images(tars, (files[0], files[1]) if tars[0].class_names == files[0].class_names else
                       tuple(replace(split, class_names=tars[0].class_names) for split in files))  # type: ignore
    assert tars[0].path(3).relative_to(tars[0].root).as_posix() == "train/train-000.tar/a.b/3.png"
    shutil.rmtree(tars[0].root)
    assert_same_images(packs(write_parquet(tmp_path / "hub" / "data", folder).parent), files)


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


def retar(path: Path, change: Callable[[list[tuple[str, bytes]]], list[tuple[str, bytes]]]) -> None:
    """Write a tar file again with other members."""
    with tarfile.open(path) as archive:
        members = [(each.name, archive.extractfile(each).read()) for each in archive]  # type: ignore
    with tarfile.open(path, "w") as archive:
        for name, content in change(members):
            add(archive, name, content)


def relabel(path: Path, label: bytes) -> None:
    """Give the first image another label."""
    retar(path, lambda members: [members[0], ("a.b/0.cls", label), *members[2:]])


TAR_FAULTS: list[tuple[Callable[[Path], Any], str]] = [
    (lambda path: cut(path, path.stat().st_size // 2), "cut short or damaged"),
    (lambda path: cut(path, 512), "cut short or damaged"),
    (lambda path: cut(path, 100), "cut short or damaged"),
    (lambda path: cut(path, 0), "cut short or damaged"),
    (lambda path: cut(path, (path.stat().st_size - 512 * 2) // 10240 * 10240 - 10240 * 2), "cut short or damaged"),
    (lambda path: retar(path, lambda members: [*members, members[0]]), "twice"),
    (lambda path: retar(path, lambda members: [*members, ("a.b/0.jpg", b"x")]), "twice"),
    (lambda path: retar(path, lambda members: [*members, members[1]]), "twice"),
    (lambda path: retar(path, lambda members: members[:1] + members[2:]), r"0\.png: has no label; add a\.b/0\.cls"),
    (lambda path: relabel(path, b"ring"), "'ring' is no number"),
    (lambda path: relabel(path, b"-1"), "'-1' is no number"),
    (lambda path: relabel(path, b"99999999"), "its label 99999999 is none of"),
]


@pytest.mark.parametrize("number", range(len(TAR_FAULTS)))
def test_a_tar_file_that_cannot_be_used_is_named(number: int, tmp_path: Path) -> None:
    damage, said = TAR_FAULTS[number]
    data_dir = write_tars(tmp_path / "tars", unshuffled(write_tree(tmp_path / "images")))
    damage(data_dir / "train-000.tar")
    with pytest.raises(DataError, match=rf"train-000\.tar.*{said}"):
        packs(data_dir)
    assert not list(tmp_path.glob("*.pack*"))


@pytest.mark.parametrize(("change", "said"), [
    ({"label": None}, "has no column label but image; rename"), ({"image": None}, "has no column image but label"),
    ({"label": "names"}, "labels of type string, no numbers"), ({"label": "floats"}, "of type double, no numbers"),
    ({"label": "missing"}, "row 0 has no label"), ({"label": "negative"}, "its label -1 is none of 10 classes"),
    ({"image": "numbers"}, "an image without bytes"),
])
def test_parquet_columns_that_cannot_be_used_are_named(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    splits = unshuffled(write_tree(tmp_path / "images"))
    first = splits[0].subset(torch.arange(6))
    values = {"names": ["a"] * 6, "floats": [0.5] * 6, "missing": [None, *range(5)], "negative": [-1] * 6,
              "numbers": list(range(6))}
    change = {name: values.get(value, value) for name, value in change.items()}
    with pytest.raises(DataError, match=rf"train-.*\.parquet.*{said}"):
        packs(write_parquet(tmp_path / "hub", (first, first), **change))


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_a_parquet_file_cut_short_or_missing_is_named(share: float, tmp_path: Path) -> None:
    data_dir = write_parquet(tmp_path / "hub", unshuffled(write_tree(tmp_path / "images")))
    path = data_dir / "train-00000-of-00001.parquet"
    cut(path, int(share * path.stat().st_size))
    with pytest.raises(DataError, match=rf"{path.name}: is cut short or damaged"):
        packs(data_dir)
    path.rename(data_dir / "train-00000-of-00002.parquet")
    with pytest.raises(DataError, match="holds 1 of the 2 files"):
        packs(data_dir)


def test_parquet_files_of_one_split_that_name_their_classes_otherwise_are_refused(tmp_path: Path) -> None:
    train, test = unshuffled(write_tree(tmp_path / "images"))
    data_dir = write_parquet(tmp_path / "hub", (train, test))
    turned = replace(train, class_names=train.class_names[::-1])
    second = write_parquet(tmp_path / "second", (turned, test)) / "train-00000-of-00001.parquet"
    (data_dir / "train-00000-of-00001.parquet").rename(data_dir / "train-0.parquet")
    second.rename(data_dir / "train-1.parquet")
    with pytest.raises(DataError, match=r"train-1\.parquet: names its classes otherwise than .*train-0\.parquet"):
        packs(data_dir)


def test_a_test_split_without_labels_gives_way_to_the_validation_split_and_that_is_said(tmp_path: Path, capfd: Any
                                                                                       ) -> None:
    """As ImageNet lies at Hugging Face: the test split's labels are all -1."""
    train, test = unshuffled(write_tree(tmp_path / "images"))
    data_dir = write_parquet(tmp_path / "hub", (train, test))
    (data_dir / "test-00000-of-00001.parquet").rename(data_dir / "validation-00000-of-00001.parquet")
    unlabelled = write_parquet(tmp_path / "unlabelled", (test, test), label=[-1] * len(test))
    (unlabelled / "test-00000-of-00001.parquet").rename(data_dir / "test-00000-of-00001.parquet")
    assert sorted(packs(data_dir)[1].targets.tolist()) == sorted(test.targets.tolist())
    assert "left out: 1 split (test-00000-of-00001.parquet: no labels)" in capfd.readouterr().out


def test_a_second_test_split_is_said_to_be_left_out(tmp_path: Path, capfd: Any) -> None:
    data_dir = write_tree(tmp_path / "images")
    shutil.copytree(data_dir / "test", data_dir / "val")
    assert image_folder.load(data_dir)[1].left_out == {"split (val/: test/ is taken)": 1}
    packs(data_dir)
    assert "left out: 1 split (val: another one is taken)" in capfd.readouterr().out


def test_other_input_that_cannot_be_packed_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no train/, train-\*\.tar or train-\*\.parquet"):
        packs(tmp_path / "nothing")
    data_dir = write_tree(tmp_path / "images")
    link = data_dir / "train" / "disc" / "gone.png"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"gone\.png: cannot be read \(a link to nothing\)"):
        packs(data_dir)
    link.unlink()
    packs(data_dir)
    with pytest.raises(UsageError, match=r"--out .*is there already"):
        packs(data_dir)
    for flags, said in (({"raw": 8, "resize": 8}, "--raw 8"), ({"quality": 8}, "--quality 8"),
                        ({"raw": 8, "quality": 8}, "--raw 8")):
        with pytest.raises(UsageError, match=said):
            packs(data_dir, **flags)


def test_pictures_in_both_splits_are_counted_in_one_warning(tmp_path: Path, capfd: Any) -> None:
    data_dir = write_tree(tmp_path / "images")
    for number, path in enumerate(sorted((data_dir / "train" / "disc").iterdir())[:3]):
        shutil.copy(path, data_dir / "test" / "ring" / f"copy{number}.png")
    packs(data_dir, raw=8)
    lines = capfd.readouterr().err.splitlines()
    assert [line for line in lines if "WARNING" in line] == [
        f"WARNING data: 3 of {NUM_TEST + 3} test images are byte for byte training images too, such as "
        f"{data_dir}/test/ring/copy0.png; they are no test"]


@pytest.mark.parametrize("options", [{"raw": 8}, {"resize": 8}])
def test_an_image_that_cannot_be_decoded_keeps_its_bytes_and_is_named_now_and_when_it_is_read(
        options: dict[str, int], tmp_path: Path, capfd: Any) -> None:
    data_dir = write_tree(tmp_path / "images")
    path = sorted((data_dir / "train" / "bars").iterdir())[2]
    path.write_bytes(b"no image")
    train, _ = packs(data_dir, **options)
    assert f"WARNING data: {path}: not readable as an image" in capfd.readouterr().err
    assert bytes(train.read(2)) == b"no image"


def flip_a_byte(images: PackedImages, sample: int) -> Path:
    """Change one bit of an image in its part."""
    entry, _, part = images.find(sample)
    path = images.root / part
    with open(path, "r+b") as file:
        file.seek(int(entry["offset"]) + int(entry["length"]) // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))
    return path


@pytest.mark.parametrize("options", [{}, {"resize": 8}, {"raw": 8}])
def test_a_flipped_bit_is_named_when_its_image_is_read_and_no_other_image_suffers(options: dict[str, int],
                                                                                  tmp_path: Path) -> None:
    train, _ = packs(write_tree(tmp_path / "images"), **options)
    path = flip_a_byte(train, 57)
    damaged = packed.load(train.root)[0]
    with pytest.raises(BadImage, match=rf"damaged in {path.name}, whose bytes have changed"):
        damaged.read(57)
    for sample in (56, 58):
        damaged.read(sample)


@pytest.mark.parametrize("name", ["train-00001.bin", "train.index"])
def test_a_pack_cut_short_while_it_is_in_use_is_named_and_kills_no_process(name: str, tmp_path: Path) -> None:
    train, _ = packs(write_tree(tmp_path / "images"), raw=64)
    pid = os.fork()
    if pid == 0:  # which a signal may kill
        signal.alarm(30)
        for sample in range(20):
            train.read(sample)
        cut(train.root / name, 100)
        try:
            train.read(19)
        except BadImage as error:
            os._exit(42 if f"{name} was cut short while in use" in str(error) and "train" in str(train.path(19)) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42


def test_packs_that_cannot_be_trained_from_are_named(tmp_path: Path) -> None:
    train, _ = packs(write_tree(tmp_path / "images"))
    root, record = train.root, json.loads((train.root / "pack.json").read_text())
    for name, content, said in (
            ("train-00001.bin", b"", r"damaged \(train-00001\.bin is not"),
            ("train.index", None, "damaged .*No such file"),
            ("train.labels", bytes(8 * NUM_TRAIN), r"train\.labels has changed"), ("pack.json", b"{}", "damaged"),
            ("pack.json", json.dumps({**record, "format": 2}).encode(), "format 2, and format 1 is read here")):
        path = root / name
        kept = path.read_bytes()
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DataError, match=rf"{said}.*again") as caught:
            packed.load(root)
        assert str(caught.value).startswith(f"--data-dir {root}: ")
        path.write_bytes(kept)
    (root / "pack.json").write_text(json.dumps({**record, "files": {}, "splits": {"train": NUM_TRAIN}}))
    with pytest.raises(DataError, match="has no test images"):
        packed.load(root)


CALLS = ("open", "fsync", "replace", "rename", "unlink", "rmdir")


def killed_at(call: int, config: PackConfig) -> int:
    """Pack in a child that kills itself before its n-th call that changes files; its exit status."""
    pid = os.fork()
    if pid == 0:
        calls = iter(range(call + 1))
        signal.alarm(60)

        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            def count(*arguments: Any, **named: Any) -> Any:
                if next(calls, None) == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **named)
            return count

        try:
            for name in CALLS:
                setattr(os, name, counted(getattr(os, name)))
            pack.write_part.__globals__["open"] = counted(open)
            pack.main(config)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def same_files(first: Path, second: Path) -> bool:
    names = sorted(path.name for path in first.iterdir())
    return names == sorted(path.name for path in second.iterdir()) and \
        filecmp.cmpfiles(first, second, names, shallow=False)[0] == names


def test_a_pack_killed_at_twenty_moments_and_started_again_is_byte_identical(tmp_path: Path) -> None:
    data_dir = photos(tmp_path / "photos")
    config = PackConfig(data_dir=data_dir, out=tmp_path / "whole.pack", resize=32, images_per_part=7, workers=2)
    pack.main(config)
    assert config.out is not None
    killed, rng = replace(config, out=tmp_path / "killed.pack"), random.Random(1)
    assert killed.out is not None
    moments = 0
    while moments < 20:
        status = killed_at(rng.randrange(3, 12 if rng.random() < 0.6 else 80), killed)
        moments += os.WIFSIGNALED(status)
        assert status in (0, signal.SIGKILL)
        assert killed.out.exists() or packed.is_pack(killed.out)
        if killed.out.exists():
            assert same_files(config.out, killed.out)
            shutil.rmtree(killed.out)
            shutil.rmtree(f"{killed.out}{packed.PARTIAL}", ignore_errors=True)
        else:
            with pytest.raises(DataError, match="still being packed, or packing was stopped"):
                packed.load(killed.out)
    if not killed.out.exists():
        pack.main(killed)
    assert same_files(config.out, killed.out)
