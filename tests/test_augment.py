"""Augmentation: the same choice for a sample whatever batch it is in, and the pixels that the choice says."""

import pytest
import torch
import torch.nn.functional as F

from datasets.augment import Augmentation, normalize
from datasets.errors import DataError
from datasets.loaders import memory_loaders
from datasets.tensors import TensorDataset
from trainers.engine.run.pictures import denormalize

IMAGES = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


@pytest.mark.parametrize("amount", [1, 2, 4])
@pytest.mark.parametrize("mode", ["reflect", "zeros"])
def test_padding_is_torchs(amount: int, mode: str) -> None:
    theirs = F.pad(IMAGES.float(), (amount,) * 4, mode="reflect" if mode == "reflect" else "constant")
    images = Augmentation(seed=0, shift=amount, padding=mode, **HALF)  # pyright: ignore[reportArgumentType]
    assert torch.equal(images.prepare(IMAGES).float(), theirs)


def test_a_crop_is_a_window_of_the_padded_image() -> None:
    augmentation = Augmentation(seed=1, shift=2, **HALF)
    prepared = augmentation.prepare(IMAGES)
    out = denormalize(augmentation(prepared, torch.arange(40), epoch=3, rows=torch.arange(40)), **HALF)
    for sample in range(40):
        windows = [prepared[sample, :, row : row + 8, column : column + 8] for row in range(5) for column in range(5)]
        assert any(torch.allclose(out[sample], window / 255, atol=1e-6) for window in windows)


def test_a_sample_is_augmented_alike_alone_and_in_any_batch() -> None:
    augmentation = Augmentation(seed=1, shift=2, flip="random", **HALF)
    prepared, samples = augmentation.prepare(IMAGES), torch.arange(40)
    together = augmentation(prepared, samples, epoch=3, rows=samples)
    assert torch.equal(augmentation(IMAGES.clone(), samples, epoch=3), together)  # that were not prepared
    for sample in ([0], [7], [39]):
        alone = augmentation(prepared, samples[sample], epoch=3, rows=samples[sample])
        assert torch.equal(alone, together[sample])


def test_epochs_differ_and_a_repeated_epoch_does_not() -> None:
    augmentation = Augmentation(seed=1, shift=2, flip="random", **HALF)
    prepared, samples = augmentation.prepare(IMAGES), torch.arange(40)
    third, again, fourth = (augmentation(prepared, samples, epoch=epoch, rows=samples) for epoch in (3, 3, 4))
    assert torch.equal(third, again)
    assert not torch.equal(third, fourth)


def test_alternating_flips_show_each_side_in_any_two_consecutive_epochs() -> None:
    augmentation = Augmentation(seed=1, flip="alternating", **HALF)
    samples = torch.arange(1000)
    first = augmentation.flipped(samples, 0)
    assert 400 < first.sum() < 600
    assert torch.equal(augmentation.flipped(samples, 1), ~first)
    assert torch.equal(augmentation.flipped(samples, 2), first)


def test_normalisation_takes_mean_and_std_out() -> None:
    values = IMAGES.float() / 255
    mean, std = tuple(values.mean((0, 2, 3)).tolist()), tuple(values.std((0, 2, 3)).tolist())
    out = normalize(IMAGES, mean, std)
    assert out.mean((0, 2, 3)).abs().max() < 1e-5
    assert (out.std((0, 2, 3)) - 1).abs().max() < 1e-5
    assert torch.allclose(denormalize(out, mean, std), values, atol=1e-6)


def test_ranks_together_see_the_batches_of_one_process() -> None:
    dataset = TensorDataset(inputs=IMAGES, targets=torch.arange(40))
    augmentation = Augmentation(seed=1, shift=2, flip="random", **HALF)

    def batches(rank: int, world_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        loaders = memory_loaders({"train": dataset}, augmentation, batch_size=12, rank_batch_size=12 // world_size,
                                 rank=rank, world_size=world_size, seed=0, device=torch.device("cpu"))
        return list(loaders["train"].batches(1, 12))

    for world_size in (2, 3):
        shares = [batches(rank, world_size) for rank in range(world_size)]
        for step, (inputs, targets) in enumerate(batches(0, 1)):
            for rank in range(world_size):
                assert torch.equal(shares[rank][step][1], targets[rank::world_size])
                assert torch.equal(shares[rank][step][0], inputs[rank::world_size])


def test_a_data_set_smaller_than_a_batch_is_refused() -> None:
    dataset = TensorDataset(inputs=IMAGES, targets=torch.arange(40))
    with pytest.raises(DataError, match="only 40 samples"):
        memory_loaders({"train": dataset}, Augmentation(seed=0, **HALF), batch_size=64, rank_batch_size=64, rank=0,
                       world_size=1, seed=0, device=torch.device("cpu"))


@pytest.mark.parametrize("num_images", [0, 1, 85, 200])
def test_images_normalised_piece_by_piece_have_the_bits_of_the_whole(num_images: int) -> None:
    images = torch.randint(0, 256, (num_images, 3, 32, 32), dtype=torch.uint8).to(memory_format=torch.channels_last)
    scale, offset = (torch.tensor(values)[:, None, None] for values in ([1 / (255 * 0.2), 1 / 255, 2 / 255], [1, 2, 3]))
    whole = images.float().mul_(scale).sub_(offset)
    pieces = normalize(images, (0.2, 2.0, 1.5), (0.2, 1.0, 0.5))
    assert torch.equal(pieces, whole)
    assert pieces.is_contiguous()  # planes, as most networks take them
