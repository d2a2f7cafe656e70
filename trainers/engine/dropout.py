"""Dropout that depends on (seed, step, rank) alone, so that a resumed run repeats it and no random state is saved."""

import hashlib
import random

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DataParallel


def default_generators(model: nn.Module, device: torch.device) -> list[torch.Generator]:
    """Those that dropout takes numbers from: the device's, or with DataParallel that of every GPU that runs a copy.
    Seeding them alone costs 1 us, torch.manual_seed 100."""
    if device.type == "cuda":
        copies = model.device_ids if isinstance(model, DataParallel) else [device.index]
        return [torch.cuda.default_generators[index] for index in copies]
    return [torch.default_generator]


def seed_dropout(generators: list[torch.Generator], *, seed: int, step: int, rank: int) -> int:
    """Put the generators where this step of this rank begins; the copies of DataParallel get different numbers. Returns
    the first seed, from which people's own networks and losses get those of Python's and numpy's generators."""
    first = int.from_bytes(hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=7).digest(), "big")
    for copy, generator in enumerate(generators):
        generator.manual_seed(first + copy)
    return first


def seed_own_code(first: int) -> None:
    """Python's and numpy's own generators, from which people's networks and losses may draw; 7 us."""
    random.seed(first)
    np.random.seed(first % 2**32)
