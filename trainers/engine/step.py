"""The parts of one optimizer step."""

import torch
from torch import Tensor, nn


def gradient_norms(model: nn.Module) -> dict[str, Tensor]:
    """The norm of each layer's gradient, of all its parameters together, by the layer's name; on the device."""
    layers: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            layers.setdefault(name.rpartition(".")[0] or name, []).append(parameter.grad)
    return {name: torch.nn.utils.get_total_norm(gradients) for name, gradients in layers.items()}
