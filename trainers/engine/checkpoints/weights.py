"""`--init-from` and `--pretrained`: weights in a file of ours, torchvision, timm, Lightning, pytorch/examples or plain
state_dicts; a moving average where there is one. No code of a file is run, and records' CRC and size are checked."""

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from launch.errors import CheckpointError, first_line
from trainers.engine.checkpoints.snapshot import not_finite, strange_kind

AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # heads that GoogLeNet and Inception had in their own training only
# By these names the weights are wrapped, perhaps twice, as in {"ema": {"module": ...}}; the first one found is taken.
PARTS = ("ema", "state_dict_ema", "model_ema", "params_ema", "model", "state_dict", "model_state_dict", "model_state",
         "MODEL_STATE", "net", "network", "module", "params", "weights", "state", "checkpoint")
MOST_WRAPPERS = 3
MARKED_AS_FOLDER = 0x10  # one flipped bit of an archive's directory; torch then takes what its memory holds for weights
NUMPY_SCALARS = [*((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
                 np.dtype, *(type(np.dtype(code)) for code in "?bBhHiIlLqQefdUS")]
PLAIN_TYPES = [argparse.Namespace, *NUMPY_SCALARS]  # the flags and scores in torchvision's and timm's files


def read_weights_file(path: Path, source: str) -> Any:
    """The content of a file of weights, on the CPU; CheckpointError if that is more than tensors and plain values."""
    try:
        if not path.is_file():
            reason = "is no regular file" if path.exists() else "no such file"
            raise CheckpointError(f"{source}: {reason}; give the path of a file of weights")
        with open(path, "rb") as file:
            head = file.read(512)
        if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
            raise CheckpointError(f"{source}: is an HTML page, or XML; download the file itself, not the page about it")
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


def load_weights(model: nn.Module, path: Path, *, flag: str, new_head: bool = False) -> str:
    """Put a file's weights into a model, but for a `new_head`; returns what was taken. CheckpointError for others."""
    source = f"{flag} {path}"
    part, saved = weights_in(read_weights_file(path, source), source)
    taken = f"weights in {path} ({part})" if part else f"weights in {path}"
    return put_weights(model, saved, taken, source=source, new_head=new_head)


def put_weights(model: nn.Module, saved: dict[str, Tensor], taken: str, *, source: str, new_head: bool) -> str:
    """The same for weights by name that were read before; returns `taken` with what else is to be said of them."""
    current = model.state_dict()
    prefix, saved = without_prefix(saved, current)
    for name, tensor in saved.items():
        if kind := strange_kind(name, tensor, complex_too=name not in current or not current[name].is_complex()):
            raise CheckpointError(f"{source}: {kind}; save a state_dict() of plain tensors")
    # files from before BatchNorm counted its batches lack these
    weights = {name: value for name, value in current.items() if name.endswith("num_batches_tracked")}
    weights |= {name: value for name, value in saved.items() if name in current or not name.startswith(AUXILIARY)}
    taken += f", names without {prefix}" if prefix else ""
    if new_head:
        taken += replace_head(weights, model)
    if differences := model_differences(weights, current, dtypes=False):
        raise CheckpointError(f"{source}: does not fit the model: {first_three(differences)}; choose the --model it "
                              f"was made with{'' if new_head else ', with as many classes'}")
    if name := not_finite(weights):
        raise CheckpointError(f"{source}: {name} is not dense and finite; use another file")
    model.load_state_dict(weights)
    return taken


def replace_head(weights: dict[str, Tensor], model: nn.Module) -> str:
    """Where the last layer has another size in a file's weights, put the model's own there; says whether it did."""
    layer = list(dict(model.named_parameters()))[-1].rpartition(".")[0]  # the one that holds the last parameter
    own = {name: value for name, value in model.state_dict().items() if name.rpartition(".")[0] == layer}
    for name, value in own.items():
        if name in weights and weights[name].ndim == value.ndim and weights[name].shape != value.shape:
            before = len(weights[name])
            weights |= own
            return f"; the last layer, {layer}, is new: {len(value)} outputs instead of {before}"
    return ", all of them"


def weights_in(content: Any, source: str) -> tuple[str, dict[str, Tensor]]:
    """The part of a file's content that holds the weights, and these by the names that an unwrapped model gives."""
    part, found = next(parts_with_weights(content), ("", None))
    if found is None:
        named = content if isinstance(content, Mapping) else {"the content": content}
        odd = [f"{name} ({type(value).__name__})" for name, value in named.items() if not isinstance(value, Tensor)]
        raise CheckpointError(f"{source}: holds no weights by name: {first_three(odd) or 'it is empty'}; save the "
                              f"model's state_dict(), of plain tensors")
    return part, {str(name).replace("_orig_mod.", ""): value  # torch.compile puts it before the names of a module
                  for name, value in found.items() if name != "n_averaged"}  # AveragedModel's counter


def parts_with_weights(content: Any, part: str = "") -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """Every part of nested dicts that holds tensors only, by its path such as `ema.module`, the preferred one first."""
    if not isinstance(content, Mapping) or not content:
        return
    if all(isinstance(value, Tensor) for value in content.values()):
        yield part, content
    elif part.count(".") < MOST_WRAPPERS - 1:
        for name in PARTS:
            yield from parts_with_weights(content.get(name), f"{part}.{name}" if part else name)


def without_prefix(saved: dict[str, Tensor], current: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """The prefix, of all names alike, without which most of them are the model's, and the weights without it."""
    first = min(saved, key=len, default="")
    prefixes = sorted({first.removesuffix(name) for name in current if first.endswith(name)})
    best = max(["", *(each for each in prefixes if all(name.startswith(each) for name in saved))],
               key=lambda prefix: sum(name.removeprefix(prefix) in current for name in saved))
    return best, {name.removeprefix(best): value for name, value in saved.items()}


def first_three(differences: list[str]) -> str:
    """The first three of a list, and how many more there are."""
    return "; ".join(differences[:3]) + (f" and {len(differences) - 3} more" if len(differences) > 3 else "")


def model_differences(saved: Mapping[str, Tensor], current: Mapping[str, Tensor], *, dtypes: bool = True) -> list[str]:
    """Sentences about names, shapes and dtypes that differ."""
    differences = [f"{name} is not in the checkpoint" for name in current if name not in saved]
    differences += [f"{name} is not in the model" for name in saved if name not in current]
    for name, was, now in [(name, saved[name], value) for name, value in current.items() if name in saved]:
        if was.shape != now.shape:
            differences.append(f"{name} is {tuple(was.shape)} in the checkpoint and {tuple(now.shape)} in the model")
        elif was.dtype != now.dtype and (dtypes or now.is_floating_point() > was.is_floating_point()):
            differences.append(f"{name} is {was.dtype} in the checkpoint and {now.dtype} here")
    return differences
