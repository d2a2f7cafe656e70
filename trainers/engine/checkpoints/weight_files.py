"""Files of weights as others write them: torch.save's archives and older pickles, and safetensors.

No code from a file is run, and what torch.load does not check is: the CRC of every record of an archive, and that no
record claims to be larger than the file.
"""

import argparse
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from launch.errors import CheckpointError, first_line

HEAD_BYTES = 512
MARKED_AS_FOLDER = 0x10  # one flipped bit of an archive's directory; torch then takes what its memory holds for weights
NO_WEIGHTS = {  # what downloads leave in the place of a file of weights, by its beginning
    r"(\ufeff|\s|<\?xml[^>]*>|<!--.*?-->)*<((!doctype )?(html|head|body|title|meta|script)|!--(?!.*-->))":
        "is an HTML page; download the file itself, not the page about it",
    r"version https://git-lfs": "is a Git LFS pointer; fetch the file itself with git lfs pull",
}
NUMPY_SCALARS = [*((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
                 np.dtype, *(type(np.dtype(code)) for code in "?bBhHiIlLqQefdUS")]
PLAIN_TYPES = [argparse.Namespace, *NUMPY_SCALARS]  # the flags and scores in torchvision's and timm's files


def read_weights_file(path: Path, source: str) -> Any:
    """The content of a file of weights, on the CPU: nested dicts and lists of tensors and plain values.

    Raises:
        CheckpointError: if it cannot be read, or holds more than that; the message begins with `source`.
    """
    try:
        if not path.exists():
            raise CheckpointError(f"{source}: no such file; give the path of a file of weights")
        if not path.is_file():
            raise CheckpointError(f"{source}: is no regular file; give the path of a file of weights")
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
        for beginning, message in NO_WEIGHTS.items():
            if re.match(beginning, head.decode(errors="replace"), re.IGNORECASE | re.DOTALL):
                raise CheckpointError(f"{source}: {message}")
        if head[8:9] == b"{":  # safetensors: eight bytes of length, then a JSON header
            return safetensors.torch.load_file(path)
        if not head.startswith((b"PK", b"\x80")):  # an archive, or the pickle that torch.save wrote before 1.6
            raise ValueError(f"it begins with {head[:16]}, as no file of weights does")
        check_archive(path, source)
        with torch.serialization.safe_globals(PLAIN_TYPES), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own remarks on old pickles and sparse tensors
            return torch.load(path, map_location="cpu", weights_only=True)
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle raises anything
        if found := re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None:
            raise CheckpointError(f"{source}: holds more than tensors and plain values ({found[1]}); save its "
                                  f"state_dict() alone") from None
        reason = str(error).partition("WeightsUnpickler error: ")[2].strip().split("\n")[0] or first_line(error)
        raise CheckpointError(f"{source}: cannot be read ({reason}); get it again") from None


def inflates(path: Path) -> bool:
    """Whether an archive's records claim to be larger than the file. torch.save compresses nothing."""
    with zipfile.ZipFile(path) as archive:
        return sum(record.file_size for record in archive.infolist()) > path.stat().st_size


def check_archive(path: Path, source: str) -> None:
    """Raise CheckpointError for an archive of other things, or with a damaged or inflated record; other files pass."""
    if not zipfile.is_zipfile(path):
        return
    archive = zipfile.ZipFile(path)
    names = archive.namelist()
    if any("/code/" in name for name in names) or not any(name.endswith("/data.pkl") for name in names):
        raise CheckpointError(f"{source}: is an archive of {', '.join(names[:3]) or 'nothing'}, not what torch.save "
                              f"makes of a state_dict(); unpack it, or load it with what made it and save that")
    if inflates(path):
        raise CheckpointError(f"{source}: its records claim to be larger than the file; get it again")
    marked = (record.filename for record in archive.infolist() if record.external_attr & MARKED_AS_FOLDER)
    if damaged := archive.testzip() or next(marked, None):
        raise CheckpointError(f"{source}: its record {damaged} is damaged (CRC); get it again")
