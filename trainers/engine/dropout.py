"""Dropout that depends on (seed, step, rank) alone, so that a resumed run repeats it and no random state is saved."""

import hashlib
import random

import numpy as np
import torch


def default_generators(model: torch.nn.Module, device: torch.device) -> list[torch.Generator]:
    """Those that dropout draws from: the device's, or each GPU's of DataParallel. To seed these takes 1 us, all 100."""
    if device.type == "cuda":
        copies = model.device_ids if isinstance(model, torch.nn.DataParallel) else [device.index]
        return [torch.cuda.default_generators[index] for index in copies]
    return [torch.default_generator]


def seed_dropout(generators: list[torch.Generator], *, seed: int, step: int, rank: int) -> int:
    """Put the generators where this step of this rank begins, each copy's elsewhere; returns the first one's seed."""
    first = int.from_bytes(hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=7).digest(), "big")
    for copy, generator in enumerate(generators):
        generator.manual_seed(first + copy)
    return first


def seed_own_code(first: int) -> None:
    """Python's and numpy's own generators, from which people's networks and losses may draw; 7 us."""
    random.seed(first)
    np.random.seed(first % 2**32)
