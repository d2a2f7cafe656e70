"""torch's optimizers, from flags; each group remembers its peak rate as `initial_lr`, which the schedule scales."""

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from launch.errors import UsageError

if TYPE_CHECKING:
    from trainers.engine.config import TrainConfig

NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


def build_optimizer(model: nn.Module, config: "TrainConfig") -> "Optimizer | MuonWithAdamW":
    """The optimizer of the parameters that are trained."""
    groups, momentum = parameter_groups(model, config), config.momentum
    common: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    kernel: dict[str, Any] = {"fused": True} if fused_works(model) else {"foreach": True}
    optimizer: Optimizer | MuonWithAdamW
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=momentum, nesterov=config.nesterov and momentum > 0, **common,
                                    **kernel)
    elif config.optimizer == "adam":
        optimizer = torch.optim.Adam(groups, **common, **kernel)
    elif config.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, **common, **kernel)
    elif config.optimizer == "rmsprop":
        optimizer = torch.optim.RMSprop(groups, momentum=momentum, foreach=True, **common)
    else:
        optimizer = MuonWithAdamW(groups, momentum=momentum, **common)
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return optimizer


def parameter_groups(model: nn.Module, config: "TrainConfig") -> list[dict[str, Any]]:
    """All trained parameters; the biases of norms apart where they learn at a rate of their own.

    Their weight decay is divided by the same factor, so that the pull towards zero stays what it is.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    scale = config.norm_bias_lr_scale
    if scale == 1.0:
        return [{"params": trained}]
    norms = [module for module in model.modules() if isinstance(module, NORMS)]
    chosen = {id(norm.bias): norm.bias for norm in norms if norm.bias is not None and norm.bias.requires_grad}
    return [
        {"params": [parameter for parameter in trained if id(parameter) not in chosen]},
        {"params": list(chosen.values()), "lr": config.learning_rate * scale, "weight_decay": config.weight_decay / scale},
    ]


def fused_works(model: nn.Module) -> bool:
    """Whether one kernel can update all parameters: floats, all on the CPU or all on a GPU."""
    devices = {parameter.device.type for parameter in model.parameters()}
    return devices <= {"cpu"} or devices <= {"cuda"}


def is_matrix(parameter: nn.Parameter) -> bool:
    """Whether a parameter is a matrix, or filters that flatten to one; a row or column alone is a vector."""
    return parameter.ndim >= 2 and 1 < len(parameter) < parameter.numel()


def as_matrix(tensor: Tensor, like: Tensor) -> Tensor:
    """Filters (O, I, ...) as a matrix (O, I * ...), its columns in the order in which `like` holds them in memory.

    A tensor laid out as `like`, channels_last too, is not copied. Muon's update does not depend on the columns' order.
    """
    order = sorted(range(1, like.ndim), key=like.stride, reverse=True)
    return tensor.permute(0, *order).flatten(1)


class FilterMuon(torch.optim.Muon):
    """torch's Muon, which takes matrices only, for filters too: flattened, as cifar10-airbench and timm do."""

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        matrices = [[as_matrix(parameter.detach(), parameter) for parameter in group["params"]] for group in groups]
        super().__init__([{**group, "params": flat} for group, flat in zip(groups, matrices, strict=True)], **options)
        for group, given in zip(self.param_groups, groups, strict=True):
            group["params"] = given["params"]

    def _init_group(self, group: Any, params_with_grad: list[Tensor], grads: list[Tensor],
                    muon_momentum_bufs: list[Tensor]) -> bool:
        for parameter in group["params"]:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        is_complex = super()._init_group(group, params_with_grad, grads, muon_momentum_bufs)
        parameters = list(params_with_grad)
        for tensors in (params_with_grad, grads, muon_momentum_bufs):
            tensors[:] = [as_matrix(tensor, like) for tensor, like in zip(tensors, parameters, strict=True)]
        return is_complex


class MuonWithAdamW:
    """Muon for weight matrices and filters and AdamW for everything else, stepped and saved as one.

    Muon's rates are matched to AdamW's (adjust_lr_fn), so one learning rate serves both.
    """

    def __init__(self, groups: list[dict[str, Any]], *, momentum: float, **common: Any) -> None:
        def chosen(matrices: bool) -> list[dict[str, Any]]:
            """The groups with only their matrices, or with only the rest; those left empty are dropped."""
            parts = [{**group, "params": [each for each in group["params"] if is_matrix(each) is matrices]}
                     for group in groups]
            return [part for part in parts if part["params"]]

        self.parts: list[Optimizer] = []
        if matrices := chosen(True):
            self.parts.append(FilterMuon(matrices, momentum=momentum, adjust_lr_fn="match_rms_adamw", **common))
        if others := chosen(False):
            self.parts.append(torch.optim.AdamW(others, **common))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of both."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        """Update all parameters."""
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The states of both, in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)


def ema_average(decay: float, *, warmup_steps: int) -> Callable[[Any, Any, Any], None]:
    """The update of a moving average of weights for `AveragedModel`: torch's own, slower to forget once warmed up."""
    def average(averaged: Any, current: Any, num_averaged: Any) -> None:
        steps = int(num_averaged)  # on the CPU: no wait for a GPU
        get_ema_multi_avg_fn(min(decay, (1 + steps) / (warmup_steps + steps)))(averaged, current, num_averaged)

    return average if warmup_steps else get_ema_multi_avg_fn(decay)


def freeze(model: nn.Module, patterns: tuple[str, ...]) -> None:
    """Stop training every parameter whose name begins with, or matches (`*`), a pattern. Call it before wrapping.

    Raises:
        UsageError: if a pattern matches no parameter.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        matching = [name for name in parameters
                    if name == pattern or name.startswith(pattern + ".") or fnmatchcase(name, pattern)]
        if not matching:
            tops = ", ".join(name for name, _ in model.named_children())
            raise UsageError(f"--freeze {pattern}: matches no parameter; the model's parts are {tops}")
        for name in matching:
            parameters[name].requires_grad_(False)
