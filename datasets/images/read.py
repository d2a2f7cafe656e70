"""One image file to uint8 RGB of a fixed size: any mode that Pillow reads, the right way up, never a bomb."""

import io
import logging
import math
import os
import stat
import warnings
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torchvision.transforms.v2 import functional as v2

from datasets.errors import DAMAGED
from datasets.keyed_random import Purpose, random_uniform

FitName = Literal["squash", "crop"]
LARGEST_RATIO = 4 / 3  # width / height of a random window is at most this, and at least its inverse (torchvision's)
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP")  # MPO is a JPEG; to read EPS would start Ghostscript
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}  # by EXIF's orientation

logging.getLogger("PIL").addHandler(logging.NullHandler())  # else its remarks on odd tags would reach stderr
UNREADABLE = (*DAMAGED, Image.DecompressionBombError, Image.DecompressionBombWarning)  # see tests/test_decoded.py


class BadImage(Exception):
    """A file that is no readable image; the message is the reason, without the path."""


class Window(NamedTuple):
    """A part of an image, in shares of its area and of the room that is left beside it."""

    area: float
    ratio: float
    top: float
    left: float


def random_window(sample: int, *, seed: int, epoch: int, smallest_area: float) -> Window:
    """The window of a sample in an epoch: as torchvision's RandomResizedCrop chooses one, but keyed."""
    index = torch.tensor(sample)
    area, ratio, top, left = (random_uniform(index, seed, epoch, purpose).item()
                              for purpose in (Purpose.WINDOW_AREA, Purpose.WINDOW_RATIO, Purpose.WINDOW_TOP,
                                              Purpose.WINDOW_LEFT))
    return Window(area=smallest_area + (1 - smallest_area) * area,
                  ratio=math.exp((2 * ratio - 1) * math.log(LARGEST_RATIO)), top=top, left=left)


def read_image(path: str | Path, *, size: int, fit: FitName, window: Window | None = None) -> Tensor:
    """A file as uint8 (3, size, size).

    Args:
        path: one of FORMATS, whatever its extension; of several frames the first.
        size: height and width of the result.
        fit: squash the whole image into the square, or crop its middle to a square first.
        window: show only this part, squashed into the square; `fit` is then ignored.

    Raises:
        BadImage: if it is no image, damaged, or larger than Pillow's limit on decompression bombs (89 megapixels).
    """
    smallest = window.area if window is not None else 1.0
    image = v2.pil_to_tensor(open_rgb(path, shortest_side=math.ceil(2 * size / math.sqrt(smallest))))
    top, left, height, width = part(image.shape[1], image.shape[2], fit=fit, window=window)
    return v2.resized_crop(image, top, left, height, width, [size, size], antialias=True)


def part(height: int, width: int, *, fit: FitName, window: Window | None) -> tuple[int, int, int, int]:
    """Top, left, height and width, in pixels, of what is shown of an image."""
    if window is not None:
        pixels = window.area * height * width
        part_width = min(width, max(1, round(math.sqrt(pixels * window.ratio))))
        part_height = min(height, max(1, round(math.sqrt(pixels / window.ratio))))
        return (round(window.top * (height - part_height)), round(window.left * (width - part_width)), part_height,
                part_width)
    if fit == "squash":
        return 0, 0, height, width
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def open_rgb(path: str | Path, *, shortest_side: int | None = None) -> Image.Image:
    """A decoded 8-bit RGB image, turned as its EXIF orientation says.

    Args:
        path: the file.
        shortest_side: a JPEG may be decoded at a half, a quarter or an eighth while its sides stay at least this
            long: several times faster for photographs.

    Raises:
        BadImage: see read_image.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise BadImage("not a regular file")  # to open a pipe is to wait for its writer
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")  # remarks on odd metadata, once per file and worker
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            try:
                return decode(file, shortest_side)
            except UNREADABLE:
                file.seek(0)
                if file.read(len(PNG_SIGNATURE)) != PNG_SIGNATURE:
                    raise
                return decode(without_metadata(file), shortest_side)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImage(f"more than {Image.MAX_IMAGE_PIXELS or 0:,} pixels, which may be a decompression bomb") from None
    except FileNotFoundError:
        raise BadImage("a link to nothing" if os.path.islink(path) else "no such file") from None
    except Image.UnidentifiedImageError:
        raise BadImage(f"no image format that is read here: {', '.join(FORMATS)}") from None
    except UNREADABLE as error:
        raise BadImage(str(error).strip().split("\n")[0] or type(error).__name__) from None


def decode(file: BinaryIO, shortest_side: int | None) -> Image.Image:
    """The image in an open file; see open_rgb."""
    with Image.open(file, formats=FORMATS) as image:
        if shortest_side is not None:
            image.draft(None, (shortest_side, shortest_side))  # pyright: ignore[reportArgumentType]
        image.load()
        return to_rgb(upright(image))


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says, if that can be read."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except UNREADABLE:
        return image
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def without_metadata(file: BinaryIO) -> BinaryIO:
    """A PNG file's chunks that decoding needs: Pillow refuses the whole file for a damaged text or colour profile."""
    file.seek(0)
    kept = [file.read(len(PNG_SIGNATURE))]
    while len(head := file.read(8)) == 8:
        content = file.read(int.from_bytes(head[:4], "big") + 4)  # and the check sum
        if head[4:] == b"tRNS" or not head[4] & 0x20:  # transparency, and what is critical
            kept += [head, content]
    return io.BytesIO(b"".join(kept))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes as 8-bit RGB: 16 bits are scaled, not clipped, and what is transparent shows white.

    Raises:
        ValueError: for floating-point images, whose range is unknown.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit greyscale; Pillow itself reads the upper byte of 16-bit colour
        values = np.asarray(image).astype(np.float64)
        return Image.fromarray(np.rint(values.clip(0, 65535) / 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")
    return image.convert("RGB")
