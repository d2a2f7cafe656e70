"""Autocast and gradient scaling."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from launch.errors import UsageError

PrecisionName = Literal["fp32", "bf16", "fp16"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """The number format of the forward pass (torch.amp). Weights and optimizer state stay fp32. No fp16 on the CPU."""

    def __init__(self, name: PrecisionName, device: torch.device) -> None:
        if name == "fp16" and device.type == "cpu":
            raise UsageError("--precision fp16: on a CPU it is 30 times slower than fp32 (measured); use bf16")
        self.name, self.device_type = name, device.type
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")
        self._num_skipped = torch.zeros((), device=device)  # counted on the device, which a step does not wait for

    @property
    def num_skipped_steps(self) -> int:
        """Optimizer steps of the run that were skipped since a gradient overflowed in fp16. Waits for the device."""
        return int(self._num_skipped.item())

    def autocast(self) -> AbstractContextManager[object]:
        """The context of the forward pass and the loss."""
        return nullcontext() if self.name == "fp32" else torch.autocast(self.device_type, dtype=DTYPES[self.name])

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss, scaled up where fp16 would round small ones to zero."""
        self.scaler.scale(loss).backward()

    def step(self, optimizer: Any) -> None:
        """Update the weights; in fp16 a step whose gradients overflowed is skipped, and the scale lowered."""
        if self.scaler.is_enabled():
            begin_momentum(optimizer)
        self.scaler.step(optimizer)
        if self.scaler.is_enabled():
            self._num_skipped += sum(self.scaler._found_inf_per_device(optimizer).values())  # of this call
            self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """The scaler's state and the number of skipped steps; empty without a scaler."""
        state = self.scaler.state_dict()
        return state and {**state, "num_skipped_steps": self.num_skipped_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        self.scaler.load_state_dict(state)
        self._num_skipped.fill_(state.get("num_skipped_steps", 0))


def begin_momentum(optimizer: Any) -> None:
    """Let SGD's momentum begin at zero. Its fused kernel takes what memory held, where the first step is skipped."""
    for part in getattr(optimizer, "parts", [optimizer]):
        for group in part.param_groups if isinstance(part, torch.optim.SGD) else ():
            for parameter in group["params"] if group["momentum"] else ():
                if "momentum_buffer" not in part.state[parameter]:
                    part.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
