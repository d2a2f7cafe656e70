"""Ten digits of 28x28 pixels drawn from a seed, a stand-in for MNIST: lines through points that are moved about."""

import functools

import torch
from torch import Tensor

from datasets import synthetic
from datasets.keyed_random import Purpose, random_uniform

CLASS_NAMES = tuple("0123456789")
SIZE = 28
TRAITS = 32  # random numbers per image: 8 for the whole, the others for its points
GRAIN = 0.15  # of the full range

STROKES = (  # (x, y) in a unit square, y downwards
    ((0.5, 0.0), (0.85, 0.2), (0.85, 0.8), (0.5, 1.0), (0.15, 0.8), (0.15, 0.2), (0.5, 0.0)),
    ((0.3, 0.2), (0.55, 0.0), (0.55, 1.0)),
    ((0.15, 0.2), (0.5, 0.0), (0.85, 0.25), (0.15, 1.0), (0.9, 1.0)),
    ((0.15, 0.1), (0.6, 0.0), (0.85, 0.25), (0.5, 0.47), (0.85, 0.75), (0.55, 1.0), (0.1, 0.9)),
    ((0.65, 1.0), (0.65, 0.0), (0.1, 0.65), (0.9, 0.65)),
    ((0.85, 0.0), (0.2, 0.0), (0.2, 0.45), (0.65, 0.4), (0.85, 0.7), (0.6, 1.0), (0.15, 0.92)),
    ((0.75, 0.0), (0.3, 0.35), (0.15, 0.75), (0.5, 1.0), (0.85, 0.75), (0.5, 0.5), (0.2, 0.65)),
    ((0.1, 0.0), (0.9, 0.0), (0.4, 1.0)),
    ((0.5, 0.47), (0.2, 0.25), (0.5, 0.0), (0.8, 0.25), (0.5, 0.47), (0.15, 0.75), (0.5, 1.0), (0.85, 0.75),
     (0.5, 0.47)),
    ((0.25, 1.0), (0.7, 0.65), (0.85, 0.25), (0.5, 0.0), (0.15, 0.25), (0.5, 0.5), (0.8, 0.35)))


def generate_some(index: Tensor, seed: int) -> Tensor:
    """The images of these sample numbers, uint8 (N, 1, 28, 28)."""
    traits = random_uniform(index[:, None] * TRAITS + torch.arange(TRAITS), seed, Purpose.DIGITS) - 0.5  # (N, TRAITS)
    images = torch.empty(len(index), SIZE, SIZE)
    for label, stroke in enumerate(STROKES):
        mine = index % len(CLASS_NAMES) == label
        images[mine] = ink(torch.tensor(stroke), traits[mine])
    pixels = torch.arange(SIZE**2).view(SIZE, SIZE)
    grain = random_uniform(index[:, None, None] * SIZE**2 + pixels, seed, Purpose.DIGITS_GRAIN)
    return (images + GRAIN * (grain - 0.5)).clamp_(0, 1).mul_(255).round_().to(torch.uint8).unsqueeze(1)


def ink(stroke: Tensor, traits: Tensor) -> Tensor:
    """How much of the pen each pixel took, (N, 28, 28) in [0, 1]: stroke (P, 2), traits (N, TRAITS) in [-0.5, 0.5)."""
    wobble = traits[:, 8 : 8 + 2 * len(stroke)].reshape(-1, len(stroke), 2)
    points = place(stroke - 0.5 + 0.16 * wobble, traits)
    pixels = torch.arange(SIZE, dtype=torch.float32)
    grid = torch.stack(torch.meshgrid(pixels, pixels, indexing="xy"), -1)  # (28, 28, 2): x, y
    nearest = torch.full((len(traits), SIZE, SIZE), torch.inf)
    for start, end in zip(points.unbind(1)[:-1], points.unbind(1)[1:], strict=True):
        nearest = torch.minimum(nearest, distance_to_segment(grid, start[:, None, None], end[:, None, None]))
    pen = 1.3 + 1.2 * traits[:, 0, None, None]  # half the width of the line, in pixels
    return torch.sigmoid(3 * (pen - nearest))


def place(points: Tensor, traits: Tensor) -> Tensor:
    """Points (N, P, 2) around the origin, in pixels of the image: slanted, turned, scaled and shifted."""
    x, y = points.unbind(-1)
    x = x * (12 + 4 * traits[:, 1, None]) - y * 10 * traits[:, 2, None]
    y = y * (18 + 4 * traits[:, 3, None])
    angle = 0.5 * traits[:, 4, None]  # up to 14 degrees either way
    turned = torch.stack([torch.cos(angle) * x - torch.sin(angle) * y, torch.sin(angle) * x + torch.cos(angle) * y], -1)
    return turned + (SIZE - 1) / 2 + 4 * traits[:, None, 5:7]


def distance_to_segment(grid: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Pixels from each point of the grid (28, 28, 2) to the segments between start and end, each (N, 1, 1, 2)."""
    along = end - start
    share = ((grid - start) * along).sum(-1) / along.square().sum(-1).clamp_min(1e-6)
    return torch.linalg.vector_norm(grid - start - share.clamp(0, 1)[..., None] * along, dim=-1)


generate = functools.partial(synthetic.generate, draw=generate_some, class_names=CLASS_NAMES)
load = functools.partial(synthetic.load, draw=generate_some, class_names=CLASS_NAMES)
