"""Linear relations with noise, generated from a seed: what a regression must recover is known."""

from dataclasses import dataclass

import torch

from datasets.keyed_random import Purpose, random_normal, random_uniform
from datasets.tensors import TensorDataset


@dataclass(frozen=True, kw_only=True)
class LinearRelation:
    """targets = features @ weights + bias + noise, the features from the standard normal distribution."""
    weights: tuple[float, ...]
    bias: float
    num_samples: int
    normal_noise: float = 0.0  # standard deviation of noise around zero
    uniform_noise: float = 0.0  # noise between zero and this; its mean, half of it, adds to the bias that is learned

    def generate(self, first: int, *, seed: int) -> TensorDataset:
        """`num_samples` samples from number `first` on: features float32 (N, F), targets float32 (N, 1)."""
        samples = torch.arange(first, first + self.num_samples)
        index = samples[:, None] * len(self.weights) + torch.arange(len(self.weights))
        features = random_normal(index, seed, Purpose.FEATURES)
        targets = features @ torch.tensor(self.weights)[:, None] + self.bias
        noise = (self.normal_noise * random_normal(samples, seed, Purpose.NOISE)
                 + self.uniform_noise * random_uniform(samples, seed, Purpose.NOISE))
        return TensorDataset(inputs=features, targets=targets + noise[:, None])


RELATIONS = {
    "two-features": LinearRelation(weights=(2.0, -3.4), bias=4.2, num_samples=1000, normal_noise=0.01),
    "five-features": LinearRelation(weights=(1.0, 2.0, 3.0, 4.0, 5.0), bias=5.0, num_samples=10, uniform_noise=0.3)}


def load(name: str, *, seed: int = 0) -> tuple[TensorDataset, TensorDataset]:
    """The training and test split of one of RELATIONS, of the same size."""
    relation = RELATIONS[name]
    return relation.generate(0, seed=seed), relation.generate(10**6, seed=seed)
