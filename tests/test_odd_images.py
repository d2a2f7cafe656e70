"""Files that are read although something about them is odd, and files that are not opened at all."""

import io
import logging
import os
import random
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import EpsImagePlugin, Image, ImageOps, PngImagePlugin

from datasets.images.read import BadImage
from tests.helpers.images import NEEDS_PILLOW_13, open_rgb

PICTURE = Image.effect_noise((40, 30), 60).convert("RGB")
EXIF = Image.Exif()
EXIF[0x0112], EXIF[0x010E] = 6, "a description"


def encoded(kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    PICTURE.save(buffer, kind, **options)
    return buffer.getvalue()


def chunks_of(png: bytes) -> list[tuple[bytes, bytes]]:
    """Kind and content of each chunk of a PNG file."""
    found, place = [], 8
    while place < len(png):
        size = int.from_bytes(png[place : place + 4], "big")
        found.append((png[place + 4 : place + 8], png[place + 8 : place + 8 + size]))
        place += 12 + size
    return found


def as_png(chunks: list[tuple[bytes, bytes]], *, wrong_sum: bytes = b"") -> bytes:
    """The file of these chunks; `wrong_sum` names a kind whose check sum is wrong."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content
        + struct.pack(">I", zlib.crc32(kind + content) ^ (kind == wrong_sum)) for kind, content in chunks)


def damaged_png(kind: bytes, content: bytes | None, *, last: bool = False) -> bytes:
    """A sound picture with one more chunk, which is damaged: by its content, or by its check sum."""
    first, *others, end = chunks_of(encoded("PNG"))
    odd = (kind, content if content is not None else b"abc\0\0" + zlib.compress(b"text"))
    chunks = [first, *others, odd, end] if last else [first, odd, *others, end]
    return as_png(chunks, wrong_sum=kind if content is None else b"")


def damaged_tiff(kind: int, count: int, place: int) -> bytes:
    """A sound picture whose description has another type, count or place than it says."""
    content = bytearray(encoded("TIFF", description="a description of the picture"))
    entry = content.index(struct.pack("<HH", 270, 2))
    content[entry : entry + 12] = struct.pack("<HHII", 270, kind, count, place)
    return bytes(content)


@pytest.mark.parametrize("content", [
    damaged_tiff(99, 3, 8), pytest.param(damaged_tiff(2, 2**31, 8), marks=NEEDS_PILLOW_13), damaged_tiff(5, 10, 8),
    damaged_tiff(3, 0, 0),
    encoded("TIFF", icc_profile=b"garbage"), encoded("TIFF", exif=EXIF.tobytes().replace(b"MM\0*", b"MM\0+")),
    encoded("MPO", exif=b"Exif\0\0MM"), encoded("BMP") + b"trailing", encoded("PPM") + b"trailing",
    damaged_png(b"zTXt", None), damaged_png(b"zTXt", None, last=True), damaged_png(b"iCCP", b"name\0\0garbage"),
    damaged_png(b"iCCP", b"name\0\7" + zlib.compress(b"x")), damaged_png(b"pHYs", b"\0"), damaged_png(b"gAMA", b""),
    damaged_png(b"zTXt", b"bomb\0\0" + zlib.compress(bytes(80 * 2**20))), damaged_png(b"sRGB", b""),
    damaged_png(b"iTXt", b"key\0\1\0en\0key\0" + b"no zlib", last=True), damaged_png(b"eXIf", b"no exif"),
    damaged_png(b"acTL", b"\0\0"), encoded("JPEG", exif=b"Exif\0\0garbage"), encoded("JPEG", icc_profile=b"garbage"),
    encoded("JPEG", exif=EXIF.tobytes().replace(b"MM\0*", b"MM\0+")), encoded("WEBP", exif=b"Exif\0\0II", quality=95),
    encoded("WEBP", xmp=b"\xff\xfe<x", icc_profile=b"garbage"), encoded("GIF", comment=b"\xff" * 1000),
], ids=lambda content: content[:60].hex()[-24:])
def test_broken_metadata_does_not_keep_the_pixels_from_being_read(content: bytes, tmp_path: Path):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert sorted(open_rgb(path).size) == sorted(PICTURE.size)
    if content.startswith(b"\x89PNG"):
        assert open_rgb(path).tobytes() == PICTURE.tobytes()


def test_pillows_own_remarks_do_not_reach_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    content = bytearray(encoded("TIFF"))
    entry = content.index(struct.pack("<HH", 277, 3))
    content[entry + 8 : entry + 10] = struct.pack("<H", 2048)  # samples per pixel, which Pillow logs as an error
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(BadImage):
        open_rgb(tmp_path / "a.tif")
    logger = logging.getLogger("PIL.TiffImagePlugin")
    while logger.parent is not None and not logger.handlers:
        logger = logger.parent
    assert logger.name == "PIL"
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_random_damage_to_the_metadata_alone_never_costs_the_picture(kind: str, tmp_path: Path):
    """The bytes of the EXIF block are replaced, as a camera or a converter might write them."""
    content = encoded(kind, exif=EXIF.tobytes())
    tail = EXIF.tobytes().removeprefix(b"Exif\0\0")
    start, path, rng = content.index(tail), tmp_path / "a", random.Random(kind)
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(rng.choice([1, 3, 20])):
            damaged[start + rng.randrange(len(tail))] = rng.randrange(256)
        path.write_bytes(damaged)
        assert sorted(open_rgb(path).size) == [30, 40]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "MPO"])
@pytest.mark.parametrize("orientation", range(9))
def test_the_orientation_is_followed_as_pillow_itself_does(kind: str, orientation: int, tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a"
    path.write_bytes(encoded(kind, exif=exif.tobytes()))
    with Image.open(path) as reference:
        expected = ImageOps.exif_transpose(reference).convert("RGB")
    assert open_rgb(path).tobytes() == expected.tobytes()
    assert open_rgb(path).size == expected.size


@pytest.mark.parametrize("damage", [lambda data: data[:-200], lambda data: data[:60] + bytes(40) + data[100:],
                                    lambda data: data[:22] + b"\0\7" + data[24:]])
def test_damage_to_the_pixels_is_still_found(damage: Callable[[bytes], bytes], tmp_path: Path):
    path = tmp_path / "a.png"
    path.write_bytes(damage(encoded("PNG", pnginfo=PngImagePlugin.PngInfo())))
    with pytest.raises(BadImage):
        open_rgb(path)


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program called gs, first on the PATH, that leaves a mark."""
    mark, program = tmp_path / "started", tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {mark}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return mark


def test_a_postscript_file_under_another_name_starts_no_program(ghostscript: Path, tmp_path: Path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded("EPS"))
    with pytest.raises(BadImage, match="no image format that is read here"):
        open_rgb(path)
    assert not ghostscript.exists()
    with Image.open(path) as image, pytest.raises((OSError, TypeError)):  # Pillow itself, left to its own devices
        image.load()
    assert ghostscript.exists()


@pytest.mark.parametrize("kind", ["ICO", "TGA", "PCX", "SGI", "JPEG2000", "DDS", "XBM", "PDF"])
def test_formats_that_are_not_named_are_not_read(kind: str, tmp_path: Path):
    path = tmp_path / "a.jpg"
    try:
        (PICTURE.convert("1") if kind == "XBM" else PICTURE).save(path, kind)
    except (KeyError, OSError):
        pytest.skip("this Pillow does not write it")
    with pytest.raises(BadImage, match="no image format"):
        open_rgb(path)


def test_what_is_no_regular_file_is_never_waited_for(tmp_path: Path):
    pipe = tmp_path / "a.png"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path, Path("/dev/zero")):
        with pytest.raises(BadImage, match="not a regular file"):
            open_rgb(path)
    link = tmp_path / "b.png"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(BadImage, match="a link to nothing"):
        open_rgb(link)
    with pytest.raises(BadImage, match="Input/output error"):
        open_rgb("/proc/self/mem")
