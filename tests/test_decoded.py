"""Image files to tensors, and the loaders that decode them while training."""

import io
import multiprocessing
import os
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from datasets import image_folder
from datasets.errors import DataError
from datasets.image_folder import ImageTree
from datasets.images.loaders import Decoding, Key
from datasets.images.read import BadImage, part, random_window
from datasets.images.unreadable import BadImages
from datasets.loaders import TrainLoader
from tests.helpers.images import (
    NEEDS_PILLOW_13,
    PLAIN,
    image_loaders,
    open_rgb,
    read_image,
    write_bomb,
    write_tree,
)


@pytest.fixture
def ramp() -> Image.Image:
    """64 x 48, red grows to the right, green to the left, blue downwards."""
    across, down = np.linspace(0, 255, 64).astype(np.uint8), np.linspace(0, 255, 48).astype(np.uint8)
    return Image.fromarray(np.stack([np.tile(across, (48, 1)), np.tile(across[::-1], (48, 1)),
                                     np.tile(down[:, None], (1, 64))], -1))


def distance(first: Image.Image, second: Image.Image) -> float:
    assert first.mode == second.mode == "RGB"
    assert first.size == second.size
    return float(np.abs(np.asarray(first).astype(int) - np.asarray(second).astype(int)).max())


def saved(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "CMYK", pytest.param("YCbCr", marks=NEEDS_PILLOW_13)])
def test_every_colour_mode_becomes_the_same_rgb(mode: str, ramp: Image.Image, tmp_path: Path):
    expected = ramp if mode not in ("L", "LA") else ramp.convert("L").convert("RGB")
    path = saved(ramp.convert(mode), tmp_path / ("image.tif" if mode in ("CMYK", "YCbCr") else "image.png"))
    assert distance(open_rgb(path), expected) <= (3 if mode == "YCbCr" else 0)


def test_a_cmyk_jpeg_is_not_inverted(ramp: Image.Image, tmp_path: Path):
    path = saved(ramp.convert("CMYK"), tmp_path / "image.jpg", quality=100, subsampling=0)
    assert distance(open_rgb(path), ramp) <= 4


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    grey = np.asarray(open_rgb(saved(Image.fromarray(values), tmp_path / "image.png")))
    assert (grey == np.rint(values / 257)[..., None]).all()


def test_a_palette_shows_its_colours_and_transparency_shows_white(tmp_path: Path):
    image = Image.new("P", (2, 1))
    image.putpalette([200, 10, 20, 0, 0, 0])
    image.putpixel((1, 0), 1)
    shown = open_rgb(saved(image, tmp_path / "image.png", transparency=1))
    assert [shown.getpixel((x, 0)) for x in (0, 1)] == [(200, 10, 20), (255, 255, 255)]
    glass = open_rgb(saved(Image.new("RGBA", (1, 1), (0, 0, 0, 51)), tmp_path / "glass.png"))
    assert glass.getpixel((0, 0)) == (204, 204, 204)  # a fifth of black over white


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(orientation: int, ramp: Image.Image, tmp_path: Path):
    stored = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
              4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
              7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(ramp if stored is None else ramp.transpose(stored), tmp_path / "image.png", exif=exif)
    assert distance(open_rgb(path), ramp) == 0


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path):
    with pytest.raises(BadImage, match="bomb"):
        read_image(write_bomb(tmp_path / "bomb.png", side=20_000), size=32, fit="squash")
    with pytest.raises(BadImage, match="bomb"):  # above Pillow's warning, below its error
        read_image(write_bomb(tmp_path / "bomb.png", side=10_000), size=32, fit="squash")


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "tif", "bmp", "webp"])
def test_a_damaged_file_is_an_image_or_a_bad_image_and_nothing_else(kind: str, ramp: Image.Image, tmp_path: Path):
    buffer = io.BytesIO()
    ramp.save(buffer, format={"jpg": "jpeg", "tif": "tiff"}.get(kind, kind))
    whole, chance, num_bad = buffer.getvalue(), random.Random(0), 0
    path = tmp_path / f"image.{kind}"
    for attempt in range(300):
        damaged = bytearray(whole)
        if attempt % 2:
            damaged = damaged[: chance.randrange(len(whole))]
        else:
            for _ in range(3):
                damaged[chance.randrange(min(300, len(whole)))] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            assert open_rgb(path).mode == "RGB"
        except BadImage:
            num_bad += 1
    assert num_bad > 50


def test_squash_and_crop_show_what_torchvision_shows(ramp: Image.Image, tmp_path: Path):
    path, tensor = saved(ramp, tmp_path / "image.png"), v2.functional.pil_to_tensor(ramp)
    assert torch.equal(read_image(path, size=20, fit="squash"), v2.Resize((20, 20), antialias=True)(tensor))
    middle = v2.functional.center_crop(tensor, [48, 48])
    assert torch.equal(read_image(path, size=20, fit="crop"), v2.Resize((20, 20), antialias=True)(middle))


def test_a_large_jpeg_is_decoded_small_and_looks_the_same(ramp: Image.Image, tmp_path: Path):
    path = saved(ramp.resize((1600, 1200), Image.Resampling.BICUBIC), tmp_path / "image.jpg", quality=95)
    assert open_rgb(path, shortest_side=64).size == (200, 150)
    whole = v2.functional.resize(v2.functional.pil_to_tensor(open_rgb(path)), [32, 32], antialias=True)
    assert (read_image(path, size=32, fit="squash").int() - whole.int()).abs().max() <= 4


def test_random_windows_are_keyed_and_lie_inside_the_image():
    windows = [random_window(sample, seed=1, epoch=2, smallest_area=0.25) for sample in range(500)]
    assert windows == [random_window(sample, seed=1, epoch=2, smallest_area=0.25) for sample in range(500)]
    assert windows[0] != random_window(0, seed=1, epoch=3, smallest_area=0.25)
    areas = []
    for window in windows:
        top, left, height, width = part(90, 120, fit="squash", window=window)
        assert 0 <= top <= top + height <= 90
        assert 0 <= left <= left + width <= 120
        areas.append(height * width / (90 * 120))
    assert min(areas) > 0.24
    assert 0.55 < sum(areas) / len(areas) < 0.68  # uniform in [0.25, 1]: 0.625, a little less where it hits the edge


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageTree, ImageTree]:
    return image_folder.load(write_tree(tmp_path_factory.mktemp("images")))


def loader(trees: tuple[ImageTree, ImageTree], *, skip_bad: int = 0, bad_images: BadImages | None = None, **how: Any
           ) -> TrainLoader:
    return image_loaders({"train": trees[0], "test": trees[1]}, skip_bad=skip_bad,
                         bad_images=bad_images or BadImages(skip_bad), **how)["train"]


def epochs(train: TrainLoader) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [batch for epoch in range(2) for batch in train.batches(epoch, 0)]


def assert_same(first: list[tuple[torch.Tensor, torch.Tensor]], second: list[tuple[torch.Tensor, torch.Tensor]]):
    assert len(first) == len(second) > 0
    for (inputs, targets), (other_inputs, other_targets) in zip(first, second, strict=True):
        assert torch.equal(inputs, other_inputs)
        assert torch.equal(targets, other_targets)


@pytest.mark.timeout(120)
def test_any_number_of_workers_gives_the_same_bits(trees: tuple[ImageTree, ImageTree]):
    alone = epochs(loader(trees))
    assert not torch.equal(alone[0][0], alone[10][0])
    for workers in (1, 2):
        assert_same(alone, epochs(loader(trees, workers=workers)))


def test_every_step_holds_the_same_images_at_any_world_size(trees: tuple[ImageTree, ImageTree]):
    alone = epochs(loader(trees))
    for world_size in (2, 3):
        ranks = [epochs(loader(trees, rank=rank, world_size=world_size)) for rank in range(world_size)]
        together = [tuple(torch.stack(parts, 1).flatten(0, 1) for parts in zip(*step, strict=True))
                    for step in zip(*ranks, strict=True)]
        assert_same(alone, together)


@pytest.mark.timeout(120)
def test_a_loader_goes_on_from_any_position_even_after_one_was_left_in_the_middle(trees: tuple[ImageTree, ImageTree]):
    whole = list(loader(trees).batches(1, 0))
    train = loader(trees, workers=1)
    next(train.batches(1, 0))  # as --show-batch takes one
    assert_same(whole[4:], list(train.batches(1, 48)))


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_draws_no_random_number_that_dropout_would_miss(workers: int, trees: tuple[ImageTree, ImageTree]):
    before = torch.get_rng_state()
    next(loader(trees, workers=workers).batches(0, 0))
    assert torch.equal(torch.get_rng_state(), before)


def test_every_test_image_is_decoded_once_on_three_ranks(trees: tuple[ImageTree, ImageTree]):
    test = trees[1]
    seen = [image for rank in range(3) for images, _ in
            image_loaders({"test": test}, images=PLAIN, rank=rank, world_size=3, evaluation_batch_size=4)["test"]
            for image in images]
    expected = [PLAIN.normalize(read_image(test.path(sample), size=24, fit="squash")) for sample in range(len(test))]
    assert sorted(image.sum().item() for image in seen) == sorted(image.sum().item() for image in expected)
    assert len(seen) == len(test) == 30


def spoil(path: Path) -> Path:
    path.write_bytes(b"no image")
    return path


def test_an_unreadable_image_is_replaced_by_the_next_one_and_counts_stay_exact(tmp_path: Path):
    trees = image_folder.load(write_tree(tmp_path))
    good = epochs(loader(trees))
    spoil(trees[0].path(7))
    with pytest.raises(DataError, match=re.escape(str(trees[0].path(7)))):
        epochs(loader(trees))
    lines: list[str] = []
    with_one = epochs(loader(trees, skip_bad=1, bad_images=BadImages(1, log=lines.append)))
    assert [len(targets) for _, targets in with_one] == [len(targets) for _, targets in good]
    assert len(lines) == 1  # it came up in both epochs
    assert str(trees[0].path(7)) in lines[0]
    changed = [step for step in range(20) if not torch.equal(with_one[step][0], good[step][0])]
    assert len(changed) == 2  # once per epoch
    spoil(trees[0].path(8))
    with pytest.raises(DataError, match="--skip-bad 2"):
        epochs(loader(trees, skip_bad=1))


def test_an_unreadable_test_image_is_left_out_and_not_replaced(tmp_path: Path):
    test = image_folder.load(write_tree(tmp_path))[1]
    spoil(test.path(4))
    loaded = image_loaders({"test": test}, skip_bad=1, bad_images=BadImages(1))["test"]
    assert sum(len(targets) for _, targets in loaded) == len(test) - 1


def test_ranks_count_their_bad_images_together_at_the_end_of_an_epoch(tmp_path: Path):
    trees = image_folder.load(write_tree(tmp_path))
    theirs = BadImages(1, exchange=lambda mine: [mine, {"elsewhere.png": "no image"}])
    spoil(trees[0].path(7))
    with pytest.raises(DataError, match=r"elsewhere\.png and 1 more"):
        list(loader(trees, skip_bad=1, bad_images=theirs).batches(0, 0))


@pytest.mark.timeout(120)
def test_a_killed_worker_is_one_data_error_in_the_loader(trees: tuple[ImageTree, ImageTree]):
    before = {worker.pid for worker in multiprocessing.active_children()}
    train = loader(trees, workers=2)
    batches = train.batches(0, 0)
    next(batches)
    started = [worker.pid for worker in multiprocessing.active_children() if worker.pid not in before]
    assert len(started) == 2
    for pid in started:
        assert pid is not None
        os.kill(pid, 9)
    with pytest.raises(DataError, match="DataLoader worker"):
        list(batches)


def test_a_training_image_is_cropped_again_in_each_epoch_and_a_test_image_never(trees: tuple[ImageTree, ImageTree]):
    decoding = Decoding(splits={"train": trees[0], "test": trees[1]}, size=24, seed=5, smallest_area=0.4)
    first, again, later = (decoding[Key("train", [3, 4], epoch)].images for epoch in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    assert torch.equal(decoding[Key("test", [3], 0)].images, decoding[Key("test", [3], 1)].images)
