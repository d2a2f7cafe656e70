"""One image to uint8 RGB of a fixed size: any mode that Pillow reads, the right way up, never a bomb.
Pillow looks at every file; simplejpeg, else torchvision, decodes ordinary JPEGs, and Pillow all that these refuse: of
500 x 375, in one thread: simplejpeg 0.62 ms, torchvision 0.69, Pillow 0.90; the pixels are the same."""

import contextlib
import io
import logging
import math
import os
import stat
import warnings
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import PIL
import torch
import torchvision
from numpy.typing import NDArray
from PIL import ExifTags, Image
from torch import Tensor
from torchvision.transforms.v2 import functional as v2

from datasets.errors import DAMAGED
from datasets.keyed_random import Purpose, uniform_of

try:
    import simplejpeg  # pyright: ignore[reportMissingImports]
except ImportError:  # an extra: `pip install -e ".[images]"`
    simplejpeg: Any = None

FitName = Literal["squash", "crop", "squash-crop"]
InterpolationName = Literal["bilinear", "bicubic"]
LARGEST_FILE = 2**30  # bytes; 89 megapixels, Pillow's limit on decompression bombs, need 512 MiB with 16 bits a channel
DECODER = (f"simplejpeg {simplejpeg.__version__}" if simplejpeg else f"torchvision {torchvision.__version__}"
           ) + f", Pillow {PIL.__version__}"
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP")  # MPO is a JPEG; to read EPS would start Ghostscript
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}  # by EXIF's orientation

logging.getLogger("PIL").addHandler(logging.NullHandler())  # else its remarks on odd tags would reach stderr
UNREADABLE = (*DAMAGED, Image.DecompressionBombError)  # see tests/test_decoded.py
Encoded = bytes | memoryview  # a file's content
Stored = Encoded | NDArray[np.uint8]  # or pixels (H, W, 3)


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
    area, ratio, top, left = (uniform_of(sample, seed, epoch, purpose) for purpose in (
        Purpose.WINDOW_AREA, Purpose.WINDOW_RATIO, Purpose.WINDOW_TOP, Purpose.WINDOW_LEFT))
    ratio = math.exp((2 * ratio - 1) * math.log(4 / 3))  # width / height: at least 3 / 4, as in torchvision
    return Window(area=smallest_area + (1 - smallest_area) * area, ratio=ratio, top=top, left=left)


def to_square(content: Stored, *, size: int, fit: FitName, window: Window | None = None,
              resize_size: int | None = None, interpolation: InterpolationName | None = None) -> Tensor:
    """An image, a file in one of FORMATS or its pixels (H, W, 3), as uint8 (3, size, size); BadImage as `pixels`.
    `fit`: squash the image into the square, or crop its middle first; squash-crop squashes it to `resize_size` and then
    crops its middle. A `window` is squashed instead. Without one, `resize_size` or `interpolation` mean `published`."""
    if window is None and (resize_size, interpolation) != (None, None):
        return published(pixels(content), size=size, fit=fit, resize_size=resize_size, interpolation=interpolation)
    image = pixels(content, shortest_side=math.ceil(2 * size / math.sqrt(1.0 if window is None else window.area)))
    top, left, height, width = part(*image.shape[:2], fit=fit, window=window)
    return resize(image[top : top + height, left : left + width], size, size, interpolation or "bilinear")


def published(image: NDArray[np.uint8], *, size: int, fit: FitName, resize_size: int | None,
              interpolation: InterpolationName | None) -> Tensor:
    """Pixels (H, W, 3) to (3, size, size), to the bit as torchvision and timm evaluate: by Pillow's resize."""
    side = resize_size or size
    to = [side, side] if fit == "squash-crop" or (fit == "squash" and resize_size is None) else [side]
    picture: Any = Image.fromarray(image)
    picture = v2.resize(picture, to, interpolation=v2.InterpolationMode(interpolation or "bilinear"))
    return v2.pil_to_tensor(v2.center_crop(picture, [size, size]))


def resize(image: NDArray[np.uint8], height: int, width: int, interpolation: InterpolationName = "bilinear") -> Tensor:
    """Pixels (H, W, 3) as (3, height, width), antialiased as torchvision does; contiguous: the twice as fast path."""
    return v2.resize(torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1), [height, width],
                     interpolation=v2.InterpolationMode(interpolation), antialias=True)


def part(height: int, width: int, *, fit: FitName, window: Window | None) -> tuple[int, int, int, int]:
    """Top, left, height and width, in pixels, of what is shown of an image."""
    if window is not None:
        pixels = window.area * height * width
        part_width = min(width, max(1, round(math.sqrt(pixels * window.ratio))))
        part_height = min(height, max(1, round(math.sqrt(pixels / window.ratio))))
        top, left = round(window.top * (height - part_height)), round(window.left * (width - part_width))
        return top, left, part_height, part_width
    if fit != "crop":
        return 0, 0, height, width
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def read_file(path: str | Path) -> bytes:
    """The content of a regular file; BadImage if there is none that can be read."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise BadImage("not a regular file")  # to open a pipe is to wait for its writer
        if status.st_size > LARGEST_FILE:
            raise BadImage(f"a file of {status.st_size / 2**30:.1f} GiB")
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise BadImage("a link to nothing" if os.path.islink(path) else "no such file") from None
    except OSError as error:
        raise BadImage(str(error.strerror)) from None


def pixels(content: Stored, *, shortest_side: int | None = None) -> NDArray[np.uint8]:
    """uint8 RGB (H, W, 3) of a file's content, turned as its EXIF orientation says; pixels stay as they are.
    BadImage for no image, a damaged one, or one beyond Pillow's limit on decompression bombs (89 megapixels). A JPEG
    may be decoded at a half, quarter or eighth while its sides keep at least `shortest_side`: several times faster."""
    if isinstance(content, np.ndarray):
        return content
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on odd metadata, once per file and worker
            try:
                return decode(content, io.BytesIO(content), shortest_side)
            except UNREADABLE:
                if bytes(content[: len(PNG_SIGNATURE)]) != PNG_SIGNATURE:
                    raise
                return decode(content, without_metadata(io.BytesIO(content)), shortest_side)
    except Image.DecompressionBombError:
        raise BadImage(f"more than {Image.MAX_IMAGE_PIXELS or 0:,} pixels, which may be a decompression bomb") from None
    except Image.UnidentifiedImageError:
        raise BadImage(f"no image format that is read here: {', '.join(FORMATS)}") from None
    except UNREADABLE as error:
        raise BadImage(str(error).strip().split("\n")[0] or type(error).__name__) from None


def decode(content: Encoded, file: BinaryIO, shortest_side: int | None) -> NDArray[np.uint8]:
    """The pixels of an image, given as a buffer and as an open file; see `pixels`."""
    with Image.open(file, formats=FORMATS) as image:
        if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise Image.DecompressionBombError  # Pillow itself only warns, up to twice as many
        full_size = image.size
        if shortest_side is not None:
            image.draft(None, (shortest_side, shortest_side))  # pyright: ignore[reportArgumentType]
        is_plain = image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB")
        rows = decode_jpeg(content, image.size, scaled=image.size != full_size) if is_plain else None
        if rows is None:
            rows = np.array(to_rgb(image))
        upright = None
        with contextlib.suppress(*UNREADABLE):
            upright = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
        return rows if upright is None else np.array(Image.fromarray(rows).transpose(upright))


def decode_jpeg(content: Encoded, size: tuple[int, int], *, scaled: bool) -> NDArray[np.uint8] | None:
    """A JPEG's pixels by a fast decoder, None where it refuses; `scaled` to the size that Pillow's `draft` chose."""
    width, height = size if scaled else (0, 0)
    try:
        if simplejpeg:  # strict by default: anything odd in the data is an error, also what Pillow reads
            rows = simplejpeg.decode_jpeg(content, "RGB", min_height=height, min_width=width)
        elif scaled:
            return None
        else:
            channels: Any = torchvision.io.decode_jpeg(torch.frombuffer(content, dtype=torch.uint8),
                                                       torchvision.io.ImageReadMode.RGB)
            rows = channels.permute(1, 2, 0).numpy()
    except (ValueError, RuntimeError):
        return None
    return rows if rows.shape[1::-1] == size else None


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
    """Any of Pillow's modes as 8-bit RGB, 16 bits scaled and what is transparent white; ValueError for floats."""
    if image.mode == "F":
        raise ValueError("floating-point pixels; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit greyscale; Pillow itself reads the upper byte of 16-bit colour
        values = np.asarray(image).astype(np.float64)
        return Image.fromarray(np.rint(values.clip(0, 65535) / 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")
    return image.convert("RGB")
