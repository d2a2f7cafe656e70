"""The order of samples: a permutation, independent of world size, resumable anywhere."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets import keyed_random
from datasets.order import ResumableSampler, epoch_order, evaluation_indices

WORD = (1 << 64) - 1


def reference_bits(index: int, *parts: int) -> int:
    """datasets.keyed_random in Python integers of any size: splitmix64's finaliser of index * golden + key."""
    def mix(word: int) -> int:
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & WORD
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & WORD
        return word ^ (word >> 31)
    key = 0
    for part in parts:
        key = mix((key + 0x9E3779B97F4A7C15 + part) & WORD)
    return mix((index * 0x9E3779B97F4A7C15 + key) & WORD) >> 1


@given(st.integers(0, 2**40), st.integers(0, 2**31), st.integers(0, 1000))
def test_keyed_bits_are_splitmix64(index: int, seed: int, epoch: int) -> None:
    assert keyed_random.random_bits(torch.tensor([index]), seed, epoch).item() == reference_bits(index, seed, epoch)


def test_keyed_integers_are_uniform_and_uniforms_lie_in_the_unit_interval() -> None:
    counts = torch.bincount(keyed_random.random_integers(torch.arange(100_000), 5, 1, 2), minlength=5)
    assert (counts - 20_000).abs().max() < 600  # 4.7 standard deviations
    uniform = keyed_random.random_uniform(torch.arange(100_000), 3)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.005


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(0, 9), st.integers(0, 9))
def test_an_epochs_order_is_a_permutation(num_samples: int, seed: int, epoch: int) -> None:
    order = epoch_order(num_samples, seed=seed, epoch=epoch)
    assert order.sort().values.tolist() == list(range(num_samples))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(epoch_order(50, seed=seed, epoch=epoch).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@settings(deadline=None)
@given(st.sampled_from([1, 2, 3, 4, 6]), st.integers(12, 300), st.integers(0, 3))
def test_step_k_consumes_the_same_samples_at_every_world_size(world_size: int, num_samples: int, epoch: int) -> None:
    samplers = [sampler(num_samples, rank=rank, world_size=world_size) for rank in range(world_size)]
    for each in samplers:
        each.set_position(epoch, 0)
    shares = [list(each) for each in samplers]
    per_rank = 12 // world_size
    order = epoch_order(num_samples, seed=5, epoch=epoch).tolist()
    for step in range(num_samples // 12):
        of_step = [share[step * per_rank : (step + 1) * per_rank] for share in shares]
        together = [of_step[i % world_size][i // world_size] for i in range(12)]
        assert together == order[step * 12 : (step + 1) * 12]


def sampler(num_samples: int, *, rank: int = 0, world_size: int = 1) -> ResumableSampler:
    return ResumableSampler(range(num_samples), global_batch_size=12, rank=rank, world_size=world_size, seed=5)


@settings(deadline=None)
@given(st.integers(0, 8), st.sampled_from([1, 2, 3, 4]), st.sampled_from([1, 2, 3, 4]))
def test_an_epoch_started_at_one_world_size_ends_at_another_with_no_sample_repeated(
    steps_done: int, before: int, after: int
) -> None:
    seen: list[int] = []
    for rank in range(before):
        first = sampler(100, rank=rank, world_size=before)
        first.set_position(2, 0)
        seen += list(first)[: steps_done * 12 // before]
    for rank in range(after):
        second = sampler(100, rank=rank, world_size=after)
        second.set_position(2, steps_done * 12)
        assert len(second) == len(list(second))
        seen += list(second)
    assert sorted(seen) == sorted(epoch_order(100, seed=5, epoch=2)[:96].tolist())


def test_a_position_inside_a_global_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="no whole number"):
        sampler(100).set_position(0, 5)


@given(st.integers(0, 200), st.integers(1, 9))
def test_every_sample_is_evaluated_once_at_any_world_size(num_samples: int, world_size: int) -> None:
    shares = [evaluation_indices(num_samples, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sorted(index for share in shares for index in share) == list(range(num_samples))


def test_an_evaluation_rank_outside_the_world_is_refused() -> None:
    with pytest.raises(ValueError, match="outside"):
        evaluation_indices(10, rank=2, world_size=2)
