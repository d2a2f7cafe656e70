"""The fast JPEG decoders beside Pillow, their reference: the same pixels, the same files refused."""

import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as v2

from datasets.images import read
from datasets.images.read import BadImage, pixels, resize, to_square
from datasets.keyed_random import Purpose, random_uniform, uniform_of


def photo(width: int = 90, height: int = 61) -> Image.Image:
    """Smooth colours and some noise."""
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 9, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((smooth + generator.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image or photo()).save(buffer, "JPEG", **{"quality": 90, **options})
    return buffer.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return jpeg(exif=exif.tobytes())


def reference(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


JPEGS: dict[str, bytes] = {
    "baseline": jpeg(), "4:4:4": jpeg(subsampling=0), "4:2:2": jpeg(subsampling=1),
    "progressive": jpeg(progressive=True), "grey": jpeg(photo().convert("L")), "CMYK": jpeg(photo().convert("CMYK")),
    "RGB": jpeg(keep_rgb=True),
    "restart markers": jpeg(restart_marker_blocks=3), "one pixel": jpeg(Image.new("RGB", (1, 1), "red")),
    "bytes after the end": jpeg() + b"more",
    **{f"turned {number}": turned(number) for number in range(1, 9)},
}


@pytest.fixture(params=["simplejpeg", "torchvision"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Each of the decoders; whether it gave the pixels, by call."""
    if request.param == "torchvision":
        monkeypatch.setattr(read, "simplejpeg", None)
    elif read.simplejpeg is None:
        pytest.skip("simplejpeg is not installed")
    calls: list[bool] = []
    real = read.decode_jpeg

    def counted(*arguments: Any, **named: Any) -> Any:
        rows = real(*arguments, **named)
        calls.append(rows is not None)
        return rows

    monkeypatch.setattr(read, "decode_jpeg", counted)
    return calls


@pytest.mark.parametrize("kind", JPEGS)
def test_the_pixels_are_pillows(kind: str, decoder: list[bool]) -> None:
    found, expected = pixels(JPEGS[kind]), reference(JPEGS[kind])
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= 1
    if kind != "CMYK" and "bytes" not in kind:
        assert decoder == [True]


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: data[:300],
                                    lambda data: data[:-400], lambda data: data[:2]])
def test_a_truncated_file_is_refused(damage: Callable[[bytes], bytes], decoder: list[bool]) -> None:
    with pytest.raises(BadImage):
        pixels(damage(jpeg()))
    assert True not in decoder


def test_a_bomb_is_refused_before_it_is_decoded(decoder: list[bool]) -> None:
    content = jpeg()
    size = content.index(struct.pack(">HH", 61, 90))
    for side in (10_000, 60_000):
        with pytest.raises(BadImage, match="decompression bomb"):
            pixels(content[:size] + struct.pack(">HH", side, side) + content[size + 4 :])
    assert decoder == []


@pytest.mark.parametrize("size", [(1600, 1200), (1601, 1199), (803, 1607)])
def test_a_large_jpeg_is_decoded_at_the_fraction_that_pillow_takes(size: tuple[int, int], decoder: list[bool]) -> None:
    content = jpeg(photo(*size))
    for shortest_side in (64, 150, 300, 599, 2000):
        with Image.open(io.BytesIO(content)) as image:
            image.draft(None, (shortest_side, shortest_side))
            expected = np.asarray(image)
        found = pixels(content, shortest_side=shortest_side)
        assert found.shape == expected.shape
        assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("to", [(32, 32), (60, 60), (224, 224), (17, 90)])
def test_a_crop_is_resized_to_the_bits_of_torchvision(to: tuple[int, int]) -> None:
    image = np.array(photo())
    for top, left, height, width in ((0, 0, 61, 90), (5, 7, 33, 40), (60, 0, 1, 90), (10, 20, 32, 32)):
        expected = v2.resized_crop(torch.from_numpy(image).permute(2, 0, 1).contiguous(), top, left, height, width,
                                   list(to), antialias=True)
        assert torch.equal(resize(image[top : top + height, left : left + width], *to), expected)


def test_bytes_a_view_of_them_and_their_pixels_give_the_same_square() -> None:
    content = jpeg()
    squares = [to_square(each, size=24, fit="crop") for each in (content, memoryview(content), reference(content))]
    assert torch.equal(squares[0], squares[1])
    assert (squares[0].int() - squares[2].int()).abs().max() <= 1


def test_random_numbers_in_pythons_integers_are_those_of_tensors() -> None:
    samples = [0, 1, 2, 77, 10**6, 2**40, 2**62]
    for key in ((0, 0, Purpose.WINDOW_TOP), (3, 9, Purpose.WINDOW_AREA), (-5, 2, Purpose.FLIP)):
        assert [uniform_of(sample, *key) for sample in samples] == random_uniform(torch.tensor(samples), *key).tolist()


def test_a_file_too_large_for_any_image_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    with open(path, "wb") as file:
        file.truncate(5 * 2**30)
    with pytest.raises(BadImage, match="a file of 5"):
        read.read_file(path)
