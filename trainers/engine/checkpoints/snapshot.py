"""A copy of the training state that a thread can write while training continues: made during the next forward and
backward pass, or queued by a GPU. Its memory is kept: fresh memory's page faults cost several times the copy itself."""

import ctypes
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

CHANGED_BY_STEP = ("optimizer", "ema")  # parts of the state, besides parameters, that only the optimizer step changes
SERIAL_ELEMENTS = 32768  # torch starts its threads above this size: a pool of our own would compete with training's
Pair = tuple[Tensor, Tensor]  # where to copy to, and what


class Snapshot:
    """A copy of nested dicts and lists of tensors, in CPU memory that is reused."""

    def __init__(self) -> None:
        self.tree: dict[str, Any] = {}
        self._pending: list[Pair] = []
        self.queued: torch.cuda.Event | None = None  # comes once the copies that `begin` queued have arrived

    def allocate(self, state: Mapping[str, Any]) -> None:
        """Get the memory for a state like this one, without reading its tensors."""
        pairs: list[Pair] = []
        self.tree = mirror(dict(state), self.tree, pairs)
        for target, _ in pairs:
            ctypes.memset(target.data_ptr(), 0, target.nbytes)  # touches every page

    def begin(self, state: Mapping[str, Any]) -> None:
        """Copy what the next forward pass may change, and remember the rest for `copy_rest`."""
        self._pending, self.queued, tree = [], None, {}
        for name, child in state.items():
            pairs: list[Pair] = []
            tree[name] = mirror(child, self.tree.get(name), pairs)
            for target, source in pairs:
                if source.is_cuda:
                    target.copy_(source.detach(), non_blocking=True)
                    self.queued = self.queued or torch.cuda.Event()
                elif name in CHANGED_BY_STEP or isinstance(source, nn.Parameter):
                    self._pending.append((target, source))
                else:
                    copy(target, source)
        self.tree = tree
        if self.queued is not None:
            self.queued.record()

    def copy_rest(self) -> None:
        """Copy what changes in the optimizer step; may run in another thread than `begin`, before that step."""
        for target, source in self._pending:
            copy(target, source)
        self._pending = []


def mirror(tree: Any, known: Any, pairs: list[Pair]) -> Any:
    """The same nesting with CPU tensors to copy into, from `known` where they fit; appends (target, source) pairs."""
    if isinstance(tree, Tensor):
        fits = isinstance(known, Tensor) and (known.shape, known.dtype) == (tree.shape, tree.dtype)
        target = known if fits else torch.empty_like(tree, device="cpu", requires_grad=False, pin_memory=tree.is_cuda)
        pairs.append((target, tree))
        return target
    if isinstance(tree, dict):
        old = known if isinstance(known, dict) else {}
        return {name: mirror(child, old.get(name), pairs) for name, child in tree.items()}
    if isinstance(tree, list | tuple):
        olds = known if isinstance(known, list | tuple) and len(known) == len(tree) else [None] * len(tree)
        return type(tree)(mirror(child, old, pairs) for child, old in zip(tree, olds, strict=True))
    return tree


def copy(target: Tensor, source: Tensor) -> None:
    """Copy on this thread alone: torch's own copy starts threads for each tensor, 30 times longer on a busy machine."""
    if source.device.type == "cpu" and target.stride() == source.stride():
        ctypes.memmove(target.data_ptr(), source.data_ptr(), source.nbytes)
    else:
        target.copy_(source.detach())


def tensors_in(tree: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of nested dicts and lists, with its path."""
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, Mapping):
        for key, child in tree.items():
            yield from tensors_in(child, f"{name}.{key}" if name else str(key))
    elif isinstance(tree, list | tuple):
        for position, child in enumerate(tree):
            yield from tensors_in(child, f"{name}[{position}]")


def hash_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """A sha256 of tensors in the order given, and of their names: equal exactly when every bit is."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def strange_kind(name: str, tensor: Tensor, *, complex_too: bool = True) -> str | None:
    """A sentence about a tensor that is no plain array of real numbers, or claims more of them than it holds."""
    kind = ("a meta" if tensor.is_meta else "a quantized" if tensor.is_quantized else "a nested" if tensor.is_nested
            else "a complex" if complex_too and tensor.is_complex() else None)
    if kind is None and tensor.layout is torch.strided and tensor.nbytes > (held := tensor.untyped_storage().nbytes()):
        return f"{name} is expanded: {tensor.nbytes:,} bytes from {held:,}"
    return kind and f"{name} is {kind} tensor ({tensor.dtype})"


def not_finite(tree: Any) -> str | None:
    """The path of the first tensor that is sparse, or holds a NaN or an infinity; None if there is none."""
    for name, tensor in tensors_in(tree):
        if tensor.layout is not torch.strided:
            return name
        if tensor.is_floating_point() or tensor.is_complex():  # and not every 8-bit float knows isfinite
            parts = tensor.reshape(-1).split(SERIAL_ELEMENTS)
            if not all(torch.isfinite(part.float() if part.itemsize == 1 else part).all() for part in parts):
                return name
    return None
