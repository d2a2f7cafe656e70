"""Ten shapes, 32x32 pixels in colour, drawn from a seed: of any size, place and angle, on a gradient, under grain."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from datasets.keyed_random import Purpose, random_uniform
from datasets.tensors import TensorDataset

CLASS_NAMES = ("disc", "ring", "square", "frame", "triangle", "cross", "saltire", "bars", "columns", "checks")
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)  # colours are uniform in [0, 1]
SIZE = 32
NUM_TRAIN, NUM_TEST = 10_000, 2_000
GENERATED_AT_ONCE = 500  # of 10,000 at once, the intermediate results took a gigabyte in every rank
NOISE = 0.1  # standard deviation, of the full range


def load(*, seed: int = 0, num_train: int = NUM_TRAIN, num_test: int = NUM_TEST, **how: Any
         ) -> tuple[TensorDataset, TensorDataset]:
    """The training and test split; image i of a seed is the same however many are generated."""
    return generate(range(num_train), seed=seed, **how), generate(range(10**6, 10**6 + num_test), seed=seed, **how)


def generate(samples: range, *, seed: int, draw: Callable[[Tensor, int], Tensor] | None = None,
             class_names: tuple[str, ...] = CLASS_NAMES) -> TensorDataset:
    """The images of these sample numbers, by default of `generate_some`; image i shows class i mod 10."""
    index = torch.arange(samples.start, samples.stop)
    inputs = torch.cat([(draw or generate_some)(part, seed) for part in index.split(GENERATED_AT_ONCE)])
    return TensorDataset(inputs=inputs, targets=index % len(class_names), class_names=class_names)


def generate_some(index: Tensor, seed: int) -> Tensor:
    """The images of these sample numbers, uint8 (N, 3, 32, 32); their noise is grain, the same in every channel."""
    traits = random_uniform(index[:, None] * 16 + torch.arange(16), seed, Purpose.SYNTHETIC)  # (N, 16) in [0, 1)
    images = background_of(traits)
    for label in range(len(CLASS_NAMES)):
        mine = index % len(CLASS_NAMES) == label
        images[mine] += shape_mask(label, traits[mine])[:, None] * (traits[mine, 8:11, None, None] - images[mine])
    pixels = torch.arange(SIZE * SIZE).view(1, SIZE, SIZE)
    noise = random_uniform(index[:, None, None, None] * SIZE**2 + pixels, seed, Purpose.SYNTHETIC_GRAIN) - 0.5
    return (images + NOISE * math.sqrt(12) * noise).clamp_(0, 1).mul_(255).round_().to(torch.uint8)


def background_of(traits: Tensor) -> Tensor:
    """A linear gradient between two colours, in a random direction: (N, 3, 32, 32)."""
    angle = traits[:, 7, None, None] * 2 * math.pi
    axis = torch.linspace(-1, 1, SIZE)
    blend = (torch.cos(angle) * axis[:, None] + torch.sin(angle) * axis) / 2.8 + 0.5  # (N, 32, 32) in [0, 1]
    first, second = traits[:, 11:14, None, None], traits[:, [14, 15, 4], None, None]
    return first + blend[:, None] * (second - first)


def shape_mask(label: int, traits: Tensor) -> Tensor:
    """How much each pixel belongs to the shape, (N, 32, 32) in [0, 1]: a soft step at its outline."""
    grid = torch.arange(SIZE, dtype=torch.float32)
    centre = 16 + (traits[:, 0:2] - 0.5) * 12
    y, x = grid[:, None] - centre[:, 0, None, None], grid - centre[:, 1, None, None]
    angle = (traits[:, 3, None, None] - 0.5) * 0.7  # up to 20 degrees either way
    u, v = torch.cos(angle) * x + torch.sin(angle) * y, torch.cos(angle) * y - torch.sin(angle) * x
    radius, contrast = 6 + 6 * traits[:, 2, None, None], 0.5 + 0.5 * traits[:, 5, None, None]
    return torch.sigmoid(-2 * signed_distance(CLASS_NAMES[label], u, v, radius)) * contrast


def signed_distance(shape: str, u: Tensor, v: Tensor, radius: Tensor) -> Tensor:
    """Distance in pixels to the outline of a shape, negative inside, at the points (u, v) of its own axes."""
    disc, square = torch.hypot(u, v) - radius, torch.maximum(u.abs(), v.abs()) - radius * 0.9
    arm, wave = radius * 0.25, 2 * math.pi / (radius * 0.8)
    shapes: dict[str, Callable[[], Tensor]] = {
        "disc": lambda: disc, "ring": lambda: (disc + radius * 0.2).abs() - radius * 0.2,
        "square": lambda: square, "frame": lambda: (square + radius * 0.2).abs() - radius * 0.2,
        "triangle": lambda: torch.maximum(0.87 * u.abs() + 0.5 * v, -v) - radius * 0.55,
        "cross": lambda: torch.maximum(square, torch.minimum(u.abs(), v.abs()) - arm),
        "saltire": lambda: torch.maximum(disc, torch.minimum((u + v).abs(), (u - v).abs()) * 0.71 - arm),
        "bars": lambda: torch.maximum(square, torch.sin(v * wave) * 2),
        "columns": lambda: torch.maximum(square, torch.sin(u * wave) * 2),
        "checks": lambda: torch.maximum(square, torch.sin(u * wave) * torch.sin(v * wave) * 3)}
    return shapes[shape]()
