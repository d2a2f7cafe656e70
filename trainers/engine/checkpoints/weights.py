"""`--init-from PATH` and `--pretrained PATH`: weights of a file made elsewhere, or here.

    torchvision's references   {"model": ..., "model_ema": ..., "args": argparse.Namespace}
    timm                       {"state_dict": ..., "state_dict_ema": ..., "args": argparse.Namespace}
    pytorch/examples           {"state_dict": ...} with "module." before every name, or {"MODEL_STATE": ...}
    Lightning                  {"state_dict": ...} with the attribute's name, such as "model.", before every name
    ours                       {"model": ..., "ema": ...}
    a plain state_dict         {name: tensor}, torch.save's or safetensors

Where a file holds a moving average of the weights, that is taken, as timm does: it is what was evaluated.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from launch.errors import CheckpointError
from trainers.engine.checkpoints.snapshot import not_finite, strange_kind
from trainers.engine.checkpoints.weight_files import read_weights_file

AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # heads that GoogLeNet and Inception had in their own training only

# By these names the weights are wrapped, perhaps twice, as in {"ema": {"module": ...}}; the first one found is taken.
PARTS = ("ema", "state_dict_ema", "model_ema", "params_ema", "model", "state_dict", "model_state_dict", "model_state",
         "MODEL_STATE", "net", "network", "module", "params", "weights", "state", "checkpoint")
MOST_WRAPPERS = 3


def load_weights(model: nn.Module, path: Path, *, flag: str, new_head: bool = False) -> str:
    """Put the weights of a file into a model; returns what was taken, such as `weights in net.pt (ema)`.

    Args:
        flag: the one that named the file, for messages.
        new_head: whether the model keeps its own last layer where that of the file has another size.

    Raises:
        CheckpointError: if the file cannot be read, or its names or shapes differ from the model's.
    """
    source = f"{flag} {path}"
    part, saved = weights_in(read_weights_file(path, source), source)
    name = f"weights in {path}" + (f" ({part})" if part else "")
    return put_weights(model, saved, name, source=source, new_head=new_head)


def put_weights(model: nn.Module, saved: dict[str, Tensor], taken: str, *, source: str, new_head: bool) -> str:
    """The same for weights by name that were read before; returns `taken` with what else is to be said of them."""
    current = model.state_dict()
    prefix, saved = without_prefix(saved, current)
    for name, tensor in saved.items():
        if kind := strange_kind(name, tensor, complex_too=name not in current or not current[name].is_complex()):
            raise CheckpointError(f"{source}: {kind}; save a state_dict() of plain tensors")
    weights = {name: value for name, value in saved.items() if name in current or not name.startswith(AUXILIARY)}
    for name, value in current.items():
        if name.endswith("num_batches_tracked"):  # files from before BatchNorm counted its batches lack it
            weights.setdefault(name, value)
    taken += f", names without {prefix}" if prefix else ""
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


def weights_in(content: Any, source: str) -> tuple[str, dict[str, Tensor]]:
    """The part of a file's content that holds the weights, and these by the names that an unwrapped model gives."""
    part, found = next(parts_with_weights(content), ("", None))
    if found is None:
        odd = [f"{name} is a {type(value).__name__}, no tensor" for name, value in
               (content.items() if isinstance(content, Mapping) else ()) if not isinstance(value, Tensor)]
        if odd and len(odd) < len(content):
            raise CheckpointError(f"{source}: {first_three(odd)}; save a state_dict() of plain tensors")
        held = ", ".join(map(str, list(content)[:4])) if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(f"{source}: holds {held or 'nothing'}, not weights by name; save the model's "
                              f"state_dict()")
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
    """The weights without what a wrapper put before all of their names, and that prefix; empty where names fit as is.

    Of all prefixes that leave the name of some parameter of the model, the one that leaves the most of them.
    """
    def number_known(prefix: str) -> int:
        return sum(name.removeprefix(prefix) in current for name in saved)

    first = min(saved, key=len, default="")
    prefixes = {first.removesuffix(name) for name in current if first.endswith(name)}
    common = [prefix for prefix in prefixes if all(name.startswith(prefix) for name in saved)]
    best = max(["", *sorted(common)], key=number_known)
    return best, {name.removeprefix(best): value for name, value in saved.items()}


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
        elif name in saved and saved[name].dtype != current[name].dtype and (
                compare_dtypes or current[name].is_floating_point() > saved[name].is_floating_point()):
            differences.append(f"{name} is {saved[name].dtype} in the checkpoint and {current[name].dtype} here")
    return differences
