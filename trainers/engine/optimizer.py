"""torch's optimizers, from flags; each group remembers its peak rate as `initial_lr`, which the schedule scales."""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, swa_utils

from launch.errors import UsageError, first_line
from trainers.engine.config import TrainConfig
from trainers.engine.user_code import TIMM, Reference, is_reference, options_in, timm_library

NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


def build_optimizer(model: nn.Module, config: TrainConfig) -> "Optimizer | MuonWithAdamW":
    """The optimizer of the parameters that are trained; UsageError for options that it does not take."""
    options, name = options_in(config.optimizer_options, "--optimizer-options"), config.optimizer
    groups = parameter_groups(model, config)
    flags = {flag: getattr(config, flag) for flag in ("betas", "eps") if getattr(config, flag) is not None}
    rates = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    common: dict[str, Any] = {**rates, **options}
    try:
        if is_reference(name):
            ours = {**rates, "momentum": config.momentum, **flags}  # given where its signature has them
            optimizer = Reference("--optimizer", name).make(ours, groups, options=options)
            if not isinstance(optimizer, Optimizer):
                raise UsageError(f"--optimizer {name}: makes {type(optimizer).__name__}, not an optimizer; return one")
        elif name.startswith(TIMM):
            make = timm_library("--optimizer", "timm.optim").create_optimizer_v2
            optimizer = make(groups, name.removeprefix(TIMM), **{"momentum": config.momentum, **flags, **common})
        elif name == "muon":
            optimizer = MuonWithAdamW(groups, momentum=config.momentum, adams=flags, **common)
        else:
            rule = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}.get(name)
            momentum = {} if name in ("adam", "adamw") else {"momentum": config.momentum}
            nesterov = {"nesterov": config.nesterov and config.momentum > 0} if name == "sgd" else {}
            one_kernel = {parameter.device.type for parameter in model.parameters()} in ({"cpu"}, {"cuda"})
            kernel = {"fused": True} if rule is not None and one_kernel else {"foreach": True}
            optimizer = (rule or torch.optim.RMSprop)(groups, **common, **flags, **momentum, **nesterov, **kernel)
    except (TypeError, ValueError, AssertionError, ImportError) as error:
        if not options and not name.startswith(TIMM):
            raise
        flag = f"--optimizer-options {' '.join(options)}" if options else f"--optimizer {name}"
        raise UsageError(f"{flag}: not of {name} ({first_line(error)}); leave out what it does not take") from None
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return optimizer


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """All trained parameters, those of one learning rate and weight decay together. The biases of norms may learn at a
    rate of their own; their decay is divided by the same factor, so that the pull towards zero stays what it is."""
    scale, decay = config.norm_bias_lr_scale, config.weight_decay
    norms = [module for module in model.modules() if isinstance(module, NORMS)]
    norm_biases = {id(norm.bias) for norm in norms if norm.bias is not None} if scale != 1.0 else set()
    of_norms = {id(parameter) for norm in norms for parameter in norm.parameters(recurse=False)}
    words = {"norm": [name for name, parameter in model.named_parameters() if id(parameter) in of_norms],
             "bias": [name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "bias"]}
    undecayed = {name for pattern in config.no_decay
                 for name in (words[pattern] if pattern in words else matching(model, pattern, flag="--no-decay"))}
    layers = layer_numbers(model) if config.layer_decay != 1.0 else {}
    last = max(layers.values(), default=0)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {(1.0, decay): [], (scale, decay / scale): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own = scale if id(parameter) in norm_biases else 1.0
            rate = own * config.layer_decay ** (last - layers.get(name, last))
            groups.setdefault((rate, 0.0 if name in undecayed else decay / own), []).append(parameter)
    if len(groups) == 1:
        return [{"params": groups[1.0, decay]}]
    return [{"params": parameters, "lr": config.learning_rate * rate, "weight_decay": its_decay}
            for (rate, its_decay), parameters in groups.items()]


def layer_numbers(model: nn.Module) -> dict[str, int]:
    """The layer of each parameter by its name, counted from the inputs; timm's models know theirs. Else each child is a
    layer, but a Sequential or ModuleList, and what holds one directly below the model, is as many as its children."""
    if hasattr(model, "group_matcher"):
        group_parameters = timm_library("--layer-decay", "timm.models").group_parameters
        return group_parameters(model, model.group_matcher(coarse=False), reverse=True)  # pyright: ignore
    containers = (nn.Sequential, nn.ModuleList)

    def layers_in(module: nn.Module, prefix: str = "") -> Iterator[str]:
        for name, child in module.named_children():
            if isinstance(child, containers) or (
                    not prefix and any(isinstance(inner, containers) for inner in child.children())):
                yield from layers_in(child, f"{prefix}{name}.")
            elif any(True for _ in child.parameters()):
                yield f"{prefix}{name}."

    layers = list(layers_in(model))
    return {parameter: next((number for number, layer in enumerate(layers) if parameter.startswith(layer)), 0)
            for parameter, _ in model.named_parameters()}


def as_matrix(tensor: Tensor, like: Tensor) -> Tensor:
    """Filters (O, I, ...) as a matrix (O, I * ...), the columns as `like` has them in memory: copies none, for Muon."""
    return tensor.permute(0, *sorted(range(1, like.ndim), key=like.stride, reverse=True)).flatten(1)


class FilterMuon(torch.optim.Muon):
    """torch's Muon, which takes matrices only, for filters too: flattened, as cifar10-airbench and timm do.
    `normalize`: before each step every weight is scaled to the norm that as many orthonormal rows have."""

    def __init__(self, groups: list[dict[str, Any]], *, normalize: bool = False, **options: Any) -> None:
        self.normalizes = normalize
        matrices = [[as_matrix(parameter.detach(), parameter) for parameter in group["params"]] for group in groups]
        super().__init__([{**group, "params": flat} for group, flat in zip(groups, matrices, strict=True)], **options)
        for group, given in zip(self.param_groups, groups, strict=True):
            group["params"] = given["params"]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters."""
        for group in self.param_groups if self.normalizes else ():
            for parameter in group["params"]:
                parameter.mul_(len(parameter) ** 0.5 / parameter.norm().clamp_(min=1e-7))
        return super().step(closure)

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
    """Muon for weight matrices and filters and AdamW for all else, stepped and saved as one, at matched rates
    (adjust_lr_fn). With `sgd`, options such as lr, Muon takes filters alone, SGD the rest, as in cifar10-airbench."""

    def __init__(self, groups: list[dict[str, Any]], *, momentum: float, adams: Mapping[str, Any] | None = None,
                 sgd: Mapping[str, Any] | None = None, lr: float, weight_decay: float, **options: Any) -> None:
        def is_matrix(each: nn.Parameter) -> bool:  # or filters that flatten to one; a row or column alone is a vector
            return each.ndim >= (2 if sgd is None else 3) and 1 < len(each) < each.numel()
        def chosen(matrices: bool, rate: float = lr) -> list[dict[str, Any]]:
            """The groups with only their matrices, or with only the rest; those left empty are dropped."""
            parts = [{**group, "lr": group.get("lr", lr) * (rate / lr if lr else 1),
                      "params": [each for each in group["params"] if is_matrix(each) is matrices]} for group in groups]
            return [part for part in parts if part["params"]]

        sgd = None if sgd is None else dict(sgd)  # TypeError for anything else
        common = {"lr": lr, "weight_decay": weight_decay}
        self.parts: list[Optimizer] = []
        if matrices := chosen(True):
            how = {"adjust_lr_fn": "match_rms_adamw" if sgd is None else "original", **common, **options}
            self.parts.append(FilterMuon(matrices, momentum=momentum, **how))
        if others := chosen(False, (sgd or common).get("lr", lr)):
            self.parts.append(
                torch.optim.AdamW(others, **common, **options, **(adams or {}),
                                  fused=others[0]["params"][0].is_cuda or None) if sgd is None else
                torch.optim.SGD(others, **{"momentum": 0.9, "nesterov": True, "fused": True, **common, **sgd}))

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


class MovingAverage(swa_utils.AveragedModel):
    """An exponential moving average of weights and buffers; torch's copies its counter to the GPU, which waits."""

    def __init__(self, model: nn.Module, decay: float, *, warmup_steps: int = 0) -> None:
        super().__init__(model, use_buffers=True)
        self.decay, self.warmup_steps, self.num_updates = decay, warmup_steps, 0

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """After an optimizer step; the first one is taken as it is."""
        averages, values = ([*each.parameters(), *each.buffers()] for each in (self.module, model))
        if self.num_updates == 0:
            torch._foreach_copy_(averages, values)
        warm = (1 + self.num_updates) / (self.warmup_steps + self.num_updates) if self.warmup_steps else 1.0
        update = swa_utils.get_ema_multi_avg_fn(min(self.decay, warm))
        for floats in (True, False) if self.num_updates else ():
            pairs = [pair for pair in zip(averages, values, strict=True) if pair[0].is_floating_point() is floats]
            if pairs:
                update(*map(list, zip(*pairs, strict=True)), self.num_updates)  # pyright: ignore
        self.num_updates += 1


def freeze(model: nn.Module, patterns: tuple[str, ...]) -> None:
    """Stop training what a pattern matches: call it before wrapping. UsageError if one matches no parameter."""
    for name in (name for pattern in patterns for name in matching(model, pattern, flag="--freeze")):
        model.get_parameter(name).requires_grad_(False)


def matching(model: nn.Module, pattern: str, *, flag: str) -> list[str]:
    """The names of parameters that begin with, or match (`*`), a pattern; UsageError if none does."""
    found = [name for name, _ in model.named_parameters()
             if name == pattern or name.startswith(pattern + ".") or fnmatchcase(name, pattern)]
    if not found:
        tops = ", ".join(name for name, _ in model.named_children())
        raise UsageError(f"{flag} {pattern}: matches no parameter; the model's parts are {tops}")
    return found
