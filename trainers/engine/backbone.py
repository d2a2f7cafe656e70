"""`--pretrained PATH`: weights of a network that was trained on other classes; its last layer is started anew."""

from pathlib import Path

from torch import nn

from launch.command_line import CheckpointError
from trainers.engine.pretrained import read, weights_in
from trainers.engine.restore import first_three, model_differences

AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # heads that GoogLeNet and Inception had in their own training only


def load_backbone(model: nn.Module, path: Path) -> str:
    """Put the weights of a file into a model, except those of a last layer of another size.

    Returns:
        One line about what was taken.

    Raises:
        CheckpointError: if the file cannot be read, or differs in more than the last layer.
    """
    try:
        _, saved = weights_in(read(path), path)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace("--init-from", "--pretrained")) from None
    weights = {name: value for name, value in saved.items() if not name.startswith(AUXILIARY)}
    current = model.state_dict()
    for name, value in current.items():
        if name.endswith("num_batches_tracked"):  # which old files lack
            weights.setdefault(name, value)
    layer = head(model)
    last = {name: value for name, value in current.items() if name.rpartition(".")[0] == layer}
    sizes = [len(weights[name]) for name in last if name in weights]
    replaced = any(name in weights and weights[name].shape != value.shape for name, value in last.items())
    if replaced:
        weights |= last
    if differences := model_differences(weights, current, compare_dtypes=False):
        raise CheckpointError(f"--pretrained {path}: does not fit the model: {first_three(differences)}; choose the "
                              f"--model it was made with")
    model.load_state_dict(weights)
    if not replaced:
        return f"weights from {path}, all of them"
    outputs = len(next(iter(last.values())))
    return f"weights from {path}; the last layer, {layer}, is new: {outputs} outputs instead of {sizes[0]}"


def head(model: nn.Module) -> str:
    """The name of the last layer, the one that holds the last parameter."""
    return list(dict(model.named_parameters()))[-1].rpartition(".")[0]
