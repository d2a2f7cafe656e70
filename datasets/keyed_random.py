"""Random numbers that are a hash of what they are for: (seed, epoch, purpose, sample index).
No number depends on the one before, on device, world size or workers: by splitmix64 (Steele, Lea and Flood, 2014)."""

import functools
import math
from enum import IntEnum, unique

import torch
from torch import Tensor

WORD = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: spreads consecutive indices over all bits
FIRST, SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # splitmix64's multipliers


@unique
class Purpose(IntEnum):
    """What random numbers are for: no two choices share a number. One that is changed changes every run."""
    ORDER = 1
    CROP_ROW, CROP_COLUMN, FLIP = 2, 3, 4
    SYNTHETIC, SYNTHETIC_GRAIN = 5, 6
    DIGITS, DIGITS_GRAIN = 7, 8
    FEATURES, NOISE = 9, 10
    WINDOW_AREA, WINDOW_RATIO, WINDOW_TOP, WINDOW_LEFT = 20, 21, 22, 23
    SPLIT = 24
    TRAIN_SAMPLE, TEST_SAMPLE = 26, 27
    VERTICAL_FLIP = 30
    ERASE, ERASE_AREA, ERASE_RATIO, ERASE_TOP, ERASE_LEFT = 31, 32, 33, 34, 35
    MIX_KIND, MIX_LAMBDA, MIX_ROW, MIX_COLUMN = 40, 41, 42, 43


def signed(word: int) -> int:
    """A 64-bit word as the int64 with the same bits, which is what a tensor holds."""
    return word - (1 << 64) if word >> 63 else word


def mix(word: int) -> int:
    """splitmix64's finaliser for one Python integer: every input bit flips each output bit half of the time."""
    word = ((word ^ (word >> 30)) * FIRST) & WORD
    word = ((word ^ (word >> 27)) * SECOND) & WORD
    return word ^ (word >> 31)


@functools.lru_cache(maxsize=256)
def key(*parts: int) -> int:
    """One word that names a choice, such as (seed, epoch, Purpose.FLIP)."""
    word = 0
    for part in parts:
        word = mix((word + GOLDEN + part) & WORD)
    return word


def shift_right(words: Tensor, num_bits: int) -> Tensor:
    """Logical shift: int64's own keeps the sign."""
    return (words >> num_bits) & ((1 << (64 - num_bits)) - 1)


def random_bits(indices: Tensor, *key_parts: int) -> Tensor:
    """63 random bits for each index, as non-negative int64, of the shape and on the device of `indices` (int64)."""
    words = indices * signed(GOLDEN) + signed(key(*key_parts))
    words = (words ^ shift_right(words, 30)) * signed(FIRST)
    words = (words ^ shift_right(words, 27)) * signed(SECOND)
    return shift_right(words ^ shift_right(words, 31), 1)


def random_integers(indices: Tensor, limit: int, *key_parts: int) -> Tensor:
    """An integer in [0, limit) for each index; the bias of the remainder is below limit / 2**63."""
    return random_bits(indices, *key_parts) % limit


def random_uniform(indices: Tensor, *key_parts: int) -> Tensor:
    """A float32 in [0, 1) for each index: 24 bits, which float32 holds exactly on every device."""
    return shift_right(random_bits(indices, *key_parts), 39).to(torch.float32) / (1 << 24)


def uniform_of(index: int, *key_parts: int) -> float:
    """`random_uniform` of one index, the same number, in Python's integers: 2 µs where tensors take 60."""
    return (mix((index * GOLDEN + key(*key_parts)) & WORD) >> 40) / (1 << 24)


def random_normal(indices: Tensor, *key_parts: int) -> Tensor:
    """A float32 from the standard normal distribution for each index (Box and Muller, 1958)."""
    first, second = (random_uniform(2 * indices + part, *key_parts) for part in (0, 1))
    return torch.sqrt(-2 * torch.log(1 - first)) * torch.cos(2 * math.pi * second)


def random_beta(indices: Tensor, shape: Tensor, *key_parts: int) -> Tensor:
    """A float32 from Beta(shape, shape) for each index, `shape` (float64) above 0, by the polar method (Bailey, 1994;
    Devroye, 1996): two uniform numbers, none rejected. In float64, to round off what devices round in other ways."""
    first, second = (random_uniform(2 * indices + part, *key_parts).double() for part in (0, 1))
    cosine = torch.cos(2 * math.pi * second)
    ratio = torch.expm1(-torch.log(1 - first) / shape) * cosine**2
    return (0.5 + 0.5 * cosine.sign() / torch.sqrt(1 + 1 / ratio)).float()
