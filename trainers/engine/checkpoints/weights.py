"""`--init-from PATH` and `--pretrained PATH`: weights of a file made elsewhere, or here.

    torchvision's references   {"model": ..., "model_ema": ..., "args": argparse.Namespace}
    timm                       {"state_dict": ..., "state_dict_ema": ..., "args": argparse.Namespace}
    pytorch/examples           {"state_dict": ...} with "module." before every name, or {"MODEL_STATE": ...}
    ours                       {"model": ..., "ema": ...}
    a plain state_dict         {name: tensor}

Where a file holds a moving average of the weights, that is taken, as timm does: it is what was evaluated.
"""

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from launch.errors import CheckpointError, first_line
from trainers.engine.checkpoints.snapshot import not_finite

AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # heads that GoogLeNet and Inception had in their own training only

PARTS = ("ema", "state_dict_ema", "model_ema", "model", "state_dict", "model_state_dict", "MODEL_STATE")


def load_weights(model: nn.Module, path: Path, *, flag: str, new_head: bool = False) -> str:
    """Put the weights of a file into a model; returns what was taken, such as `weights in net.pt (ema)`.

    Args:
        flag: the one that named the file, for messages.
        new_head: whether the model keeps its own last layer where that of the file has another size.

    Raises:
        CheckpointError: if the file cannot be read, or its names or shapes differ from the model's.
    """
    source = f"{flag} {path}"
    part, saved = weights_in(read(path, source), source)
    current = model.state_dict()
    weights = {name: value for name, value in saved.items() if name in current or not name.startswith(AUXILIARY)}
    for name, value in current.items():
        if name.endswith("num_batches_tracked"):  # files from before BatchNorm counted its batches lack it
            weights.setdefault(name, value)
    taken = f"weights in {path}" + (f" ({part})" if part else "")
    if new_head:
        taken += replace_head(weights, model)
    if differences := model_differences(weights, current, compare_dtypes=False):
        classes = "" if new_head else ", with as many classes"
        raise CheckpointError(f"{source}: does not fit the model: {first_three(differences)}; choose the --model it "
                              f"was made with{classes}")
    if name := not_finite(weights):
        raise CheckpointError(f"{source}: {name} is not dense and finite; use another file")
    model.load_state_dict(weights)
    return taken


def replace_head(weights: dict[str, Tensor], model: nn.Module) -> str:
    """Where the last layer has another size in a file's weights, put the model's own there; says whether it did."""
    current = model.state_dict()
    layer = list(dict(model.named_parameters()))[-1].rpartition(".")[0]  # the one that holds the last parameter
    own = {name: value for name, value in current.items() if name.rpartition(".")[0] == layer}
    resized = [name for name, value in own.items()
               if name in weights and weights[name].ndim == value.ndim and weights[name].shape != value.shape]
    if not resized:
        return ", all of them"
    before, outputs = len(weights[resized[0]]), len(own[resized[0]])
    weights |= own
    return f"; the last layer, {layer}, is new: {outputs} outputs instead of {before}"


def read(path: Path, source: str) -> Any:
    """What torch.load returns, on the CPU, without running any code from the file; errors name `source`."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the flags in torchvision's and timm's files
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{source}: no such file; give the path of a file of weights") from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{source}: holds more than tensors and plain values ({first_line(error)[:150]}); save "
                              f"its state_dict() alone") from None
    except (OSError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise CheckpointError(f"{source}: cannot be read ({first_line(error)[:150]}); get it again") from None


def weights_in(content: Any, source: str) -> tuple[str, dict[str, Tensor]]:
    """The part of a file's content that holds the weights, and these by the names that an unwrapped model gives."""
    part = next((name for name in PARTS if isinstance(content, Mapping) and isinstance(content.get(name), Mapping)), "")
    found = content[part] if part else content
    if not isinstance(found, Mapping) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        held = ", ".join(map(str, list(found)[:4])) if isinstance(found, Mapping) else type(found).__name__
        raise CheckpointError(f"{source}: holds {held or 'nothing'}, not weights by name; save the model's "
                              f"state_dict()")
    weights = {str(name).replace("_orig_mod.", ""): value  # torch.compile puts it before the names of a module
               for name, value in found.items() if name != "n_averaged"}  # AveragedModel's counter
    while weights and all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    return part, weights


def first_three(differences: list[str]) -> str:
    """The first three of a list, and how many more there are."""
    more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
    return "; ".join(differences[:3]) + more


def model_differences(saved: Mapping[str, Tensor], current: Mapping[str, Tensor], *,
                      compare_dtypes: bool = True) -> list[str]:
    """Sentences about names, shapes and dtypes that differ."""
    differences = [f"{name} is not in the checkpoint" for name in current if name not in saved]
    differences += [f"{name} is not in the model" for name in saved if name not in current]
    for name in current:
        if name in saved and saved[name].shape != current[name].shape:
            differences.append(f"{name} is {tuple(saved[name].shape)} in the checkpoint and "
                               f"{tuple(current[name].shape)} in the model")
        elif name in saved and compare_dtypes and saved[name].dtype != current[name].dtype:
            differences.append(f"{name} is {saved[name].dtype} in the checkpoint and {current[name].dtype} here")
    return differences
