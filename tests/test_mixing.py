"""Mixup and CutMix: what the papers say, for the same pairs at any world size, and a loss of shares of labels."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.augment import Augmentation
from datasets.errors import DataError
from datasets.image_folder import ImageTree
from datasets.images.loaders import DecodedImages, Decoder, Decoding
from datasets.images.unreadable import BadImages
from datasets.keyed_random import random_beta
from datasets.loaders import TrainLoader, memory_loaders, split_loaders
from datasets.mixing import Mixing, mixed
from datasets.order import epoch_order
from datasets.samples import Reading, Splits, sample_loaders
from datasets.tensors import TensorDataset
from launch.errors import UsageError
from tests.helpers.comparing import outcome, run_in
from tests.helpers.hooks import at, kill
from tests.helpers.images import drawn_files, write_tree
from tests.helpers.processes import largest_difference, newest_checkpoint, read_json
from tests.helpers.server import run
from trainers.cifar import CifarConfig
from trainers.engine.metrics import TrainingSums
from trainers.engine.result import label_text
from trainers.engine.task import classification_task

CPU = torch.device("cpu")
CLASSES = ("cat", "dog", "fox")
BOTH = {"mixup": 0.4, "cutmix": 1.0}
SAMPLES, BATCH = 96, 24  # no samples are left over
GENERATOR = torch.Generator().manual_seed(0)
DATASET = TensorDataset(inputs=torch.rand(SAMPLES, 3, 9, 14, generator=GENERATOR), class_names=CLASSES,
                        targets=torch.randint(0, 3, (SAMPLES,), generator=GENERATOR))
Seen = dict[int, tuple[Tensor, Tensor]]


def in_memory(rank: int, world_size: int, *, parts: int = 1) -> Any:
    return memory_loaders({"train": DATASET}, None, batch_size=BATCH, rank_batch_size=BATCH // world_size // parts,
                          rank=rank, world_size=world_size, seed=5, device=CPU)["train"]


def mixed_by(loader: Any, how: dict[str, Any]) -> TrainLoader:
    return mixed({"train": loader}, how, num_classes=3, device=CPU)["train"]


def seen_by(make: Callable[[int, int], Any], how: dict[str, Any], *, world_size: int, epoch: int, consumed: int = 0
            ) -> Seen:
    """What becomes of each sample, over all ranks."""
    seen: Seen = {}
    for rank in range(world_size):
        loader = mixed_by(make(rank, world_size), how)
        images, shares = (torch.cat(part) for part in zip(*loader.batches(epoch, consumed), strict=True))
        loader.sampler.set_position(epoch, consumed)
        samples = loader.sampler.indices().tolist()
        seen |= {sample: (images[place], shares[place]) for place, sample in enumerate(samples)}
    return seen


def assert_same(first: Seen, second: Seen) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(one, other) for sample in first
               for one, other in zip(first[sample], second[sample], strict=True))


def by_hand(how: dict[str, Any], *, epoch: int, seed: int = 5) -> dict[int, tuple[int, float, tuple[int, ...] | None]]:
    """Of each sample: its partner, its own share, and the box (top, bottom, left, right), in Python's own numbers."""
    order = epoch_order(SAMPLES, seed=seed, epoch=epoch)
    found: dict[int, tuple[int, float, tuple[int, ...] | None]] = {}
    drawn = Mixing(num_classes=3, **how).draw(order[::2], seed=seed, epoch=epoch).tolist()
    height, width = DATASET.inputs.shape[-2:]
    for (first, second), (share, has_box, down, right) in zip(order.view(-1, 2).tolist(), drawn, strict=True):
        box = None
        if has_box:  # as rand_bbox of the paper's code
            cut_height, cut_width = (int(length * (1 - share) ** 0.5) for length in (height, width))
            row, column = int(down * height), int(right * width)
            top, bottom = max(0, row - cut_height // 2), min(height, row + cut_height // 2)
            left, right = max(0, column - cut_width // 2), min(width, column + cut_width // 2)
            box, share = (top, bottom, left, right), 1 - (bottom - top) * (right - left) / (height * width)
        found |= {first: (second, share, box), second: (first, share, box)}
    return found


@pytest.mark.parametrize("a", [0.1, 0.2, 0.5, 1.0, 8.0])
def test_lambda_has_the_distribution_of_torchs_beta(a: float) -> None:
    number = 50_000
    ours = random_beta(torch.arange(number), torch.full((number,), a, dtype=torch.float64), 0, 0, 99)
    torch.manual_seed(0)
    theirs = torch.distributions.Beta(torch.tensor(a).double(), torch.tensor(a).double()).sample((number,))
    values = torch.linspace(0.0005, 0.9995, 1000)
    shares = [torch.searchsorted(each.float().sort().values, values) / number for each in (ours, theirs)]
    assert (shares[0] - shares[1]).abs().max() < 1.95 * (2 / number) ** 0.5  # Kolmogorov and Smirnov, 0.1 %


@pytest.mark.parametrize("a", [5e-324, 1e-300, 2.0**31])
def test_lambda_is_a_number_for_any_shape(a: float) -> None:
    found = random_beta(torch.arange(10_000), torch.full((10_000,), a, dtype=torch.float64), 0, 0, 99)
    assert ((found >= 0) & (found <= 1)).all()


@pytest.mark.parametrize("how", [{"mixup": 0.4}, {"cutmix": 1.0}, BOTH], ids=["mixup", "cutmix", "both"])
def test_both_partners_are_mixed_as_the_papers_say(how: dict[str, Any]) -> None:
    seen, expected = seen_by(in_memory, how, world_size=1, epoch=2), by_hand(how, epoch=2)
    labels = F.one_hot(DATASET.targets, 3).float()
    for sample, (image, shares) in seen.items():
        partner, share, box = expected[sample]
        own, other = DATASET.inputs[sample], DATASET.inputs[partner]
        picture = share * own + (1 - share) * other
        if box is not None:
            top, bottom, left, right = box
            picture = own.clone()
            picture[:, top:bottom, left:right] = other[:, top:bottom, left:right]
            assert torch.equal(image, picture)
        assert torch.allclose(image, picture, atol=1e-6)
        assert torch.allclose(shares, share * labels[sample] + (1 - share) * labels[partner], atol=1e-6)
    boxes = [box for _, _, box in expected.values()]
    assert None in boxes or how == {"cutmix": 1.0}
    assert any(boxes) or how == {"mixup": 0.4}


def test_of_both_kinds_half_of_the_pairs_get_each_and_a_pair_another_one_in_another_epoch() -> None:
    has_box = [Mixing(num_classes=3, **BOTH).draw(torch.arange(10_000), seed=0, epoch=epoch)[:, 1] for epoch in (0, 1)]
    assert all(0.48 < each.mean() < 0.52 for each in has_box)
    assert 0.48 < (has_box[0] == has_box[1]).float().mean() < 0.52


@pytest.mark.parametrize("how", [{**BOTH, "off_epoch": 1}, {"cutmix": 0.3}], ids=["both", "cutmix"])
def test_a_sample_has_the_same_partner_share_and_box_at_any_world_size_and_after_a_resume(how: dict[str, Any]) -> None:
    alone = seen_by(in_memory, how, world_size=1, epoch=0)
    assert len(alone) == SAMPLES
    for world_size in (2, 4, 12):
        assert_same(alone, seen_by(in_memory, how, world_size=world_size, epoch=0))
        resumed = seen_by(in_memory, how, world_size=world_size, epoch=0, consumed=2 * BATCH)
        assert_same({sample: alone[sample] for sample in resumed}, resumed)
    assert_same(alone, seen_by(lambda *place: in_memory(*place, parts=3), how, world_size=2, epoch=0))


def test_after_the_last_mixed_epoch_samples_are_as_they_are_and_pairs_stay_on_one_rank() -> None:
    for rank in (0, 1):
        loader = mixed_by(in_memory(rank, 2), {"mixup": 1.0, "off_epoch": 1})
        images, labels = (torch.cat(part) for part in zip(*loader.batches(1, 0), strict=True))
        pairs = epoch_order(SAMPLES, seed=5, epoch=1).view(-1, 2)[rank::2].flatten()
        assert torch.equal(labels, DATASET.targets[pairs])
        assert torch.equal(images, DATASET.inputs[pairs])


def test_the_order_of_runs_without_mixing_is_what_it_was() -> None:
    loader = in_memory(1, 3)
    assert mixed({"train": loader}, {}, num_classes=3, device=CPU)["train"] is loader
    assert torch.equal(loader.sampler.indices(), epoch_order(SAMPLES, seed=5, epoch=0)[1::3])


def decoded(folder: Path, workers: int) -> Callable[[int, int], Any]:
    names = sorted(name.removeprefix("train/") for name in drawn_files() if name.startswith("train/"))[:SAMPLES]
    tree = ImageTree(folder=folder / "train", names=tuple(names), targets=DATASET.targets, class_names=CLASSES)
    images = Augmentation(seed=5, mean=(0.5,) * 3, std=(0.5,) * 3, shift=1, flip="random")

    def make(rank: int, world_size: int) -> Any:
        decoder = Decoder(Decoding(splits={"train": tree}, size=16, seed=5), workers=workers)
        read = DecodedImages("train", tree.targets, decoder, images, BadImages(0), device=CPU)
        return split_loaders({"train": (read, len(tree))}, batch_size=BATCH, seed=5, rank=rank,
                             rank_batch_size=BATCH // world_size, world_size=world_size)["train"]
    return make


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_images_from_files_are_mixed_alike_by_any_number_of_workers(tmp_path: Path) -> None:
    write_tree(tmp_path)
    alone = seen_by(decoded(tmp_path, 0), BOTH, world_size=1, epoch=0)
    for workers, world_size in ((1, 1), (3, 2)):
        assert_same(alone, seen_by(decoded(tmp_path, workers), BOTH, world_size=world_size, epoch=0))


@pytest.mark.parametrize("inputs", [torch.zeros(SAMPLES, 4), torch.zeros(SAMPLES, 3, 4, 4, dtype=torch.uint8)],
                         ids=["no-images", "bytes"])
def test_inputs_that_cannot_be_mixed_are_one_line(inputs: Tensor) -> None:
    dataset = torch.utils.data.TensorDataset(inputs, DATASET.targets)
    loader = sample_loaders(Reading(lambda: Splits(train=dataset), seed=0), batch_size=BATCH, rank_batch_size=BATCH,
                            seed=0, rank=0, world_size=1, device=CPU)["train"]
    with pytest.raises(DataError, match="--mixup and --cutmix: mix images"):
        next(mixed_by(loader, {"mixup": 1.0}).batches(0, 0))


@pytest.mark.parametrize("kind", ["cross-entropy", "bce"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [(), (1.0, 0.0, 2.5)], ids=["", "weighted"])
@pytest.mark.parametrize("how", [{"mixup": 0.4}, {"cutmix": 1.0}], ids=["mixup", "cutmix"])
def test_the_loss_is_the_textbooks_sum_of_the_losses_of_two_labels(kind: str, smoothing: float, how: dict[str, Any],
                                                                   weights: tuple[float, ...]) -> None:
    images, shares = next(mixed_by(in_memory(0, 1), how).batches(0, 0))
    torch.manual_seed(0)
    logits = images.flatten(1) @ torch.randn(images[0].numel(), 3)
    task = classification_task(CLASSES, CPU, loss=kind, label_smoothing=smoothing, class_weights=weights)
    expected = by_hand(how, epoch=0)
    total = 0.0
    for row, sample in zip(logits, epoch_order(SAMPLES, seed=5, epoch=0)[:BATCH].tolist(), strict=True):
        partner, share, _ = expected[sample]
        for label, part in ((DATASET.targets[sample], share), (DATASET.targets[partner], 1 - share)):
            target = torch.full((3,), smoothing / 3)
            target[label] += 1 - smoothing
            if kind == "bce":
                one = -(target * row.sigmoid().log() + (1 - target) * (-row).sigmoid().log()).mean()
                one = one * weights[label] if weights else one
            else:  # torch weighs each class of a smoothed target, which PyTorch's own loss of labels does too
                factors = torch.tensor(weights or (1.0,) * 3)
                one = -(factors * target * row.log_softmax(0)).sum()
            total += part * one.item() / BATCH
    assert task.loss(logits, shares).item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("kind", ["cross-entropy", "bce"])
@pytest.mark.parametrize("weights", [(), (1.0, 0.5, 2.5)], ids=["", "weighted"])
def test_labels_and_shares_that_are_whole_have_the_same_loss(kind: str, weights: tuple[float, ...]) -> None:
    logits, labels = torch.randn(40, 3), torch.arange(40) % 3
    task = classification_task(CLASSES, CPU, loss=kind, label_smoothing=0.1, class_weights=weights)
    assert task.loss(logits, labels) == pytest.approx(task.loss(logits, F.one_hot(labels, 3).float()).item(), rel=1e-5)


def test_training_accuracy_counts_the_label_of_the_larger_share() -> None:
    sums = TrainingSums(classification=True)
    shares = torch.tensor([[0.6, 0.4, 0.0], [0.3, 0.0, 0.7], [0.0, 1.0, 0.0]])
    sums.update(torch.tensor(1.0), F.one_hot(torch.tensor([0, 0, 1]), 3).float(), shares)
    sums.collect()
    assert (sums.correct, sums.samples) == (2, 3)


def test_a_mixed_picture_is_captioned_by_its_shares() -> None:
    assert label_text(torch.tensor([0.25, 0.0, 0.75]), CLASSES) == "fox 75%\ncat 25%"
    assert label_text(torch.tensor([0.0, 1.0, 0.0]), CLASSES) == "dog 100%"
    assert label_text(torch.tensor(2), CLASSES) == "fox"


MIXED = ("--mixup", 0.4, "--cutmix", 1.0, "--mix-off-epoch", 1, "--label-smoothing", 0.1)


@pytest.mark.timeout(120)
def test_a_mixed_run_is_the_same_on_one_rank_and_on_two(tmp_path: Path) -> None:
    plain = (*MIXED, "--model", "net", "--lr", 0.02, "--show-batch", "--pictures")
    for ranks in (1, 2):
        ended = run_in(tmp_path / str(ranks), *plain, "--accumulation-steps", 3 - ranks, ranks=ranks)
        assert ended.codes == [0] * ranks, ended.err
    states = [newest_checkpoint(tmp_path / name / "r") for name in "12"]
    assert largest_difference(*(state["model"] for state in states)) < 1e-5
    one, two = ([line["train_loss"] for line in state["history"]["epochs"]] for state in states)
    assert one == pytest.approx(two, abs=1e-5)
    assert (tmp_path / "2" / "r" / "first_batch.png").is_file()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_mixed_run_killed_before_and_after_the_last_mixed_epoch_ends_as_one_never_killed(tmp_path: Path, ranks: int
                                                                                           ) -> None:
    flags = (*MIXED, "--ema-decay", 0.9)
    assert run_in(tmp_path / "whole", *flags, ranks=ranks).codes == [0] * ranks
    for step in (7, 15):
        killed = run_in(tmp_path / "killed", *flags, ranks=ranks, hook=at(step, "backward", kill))
        assert killed.codes == [-9] * ranks, killed.err
    resumed = run_in(tmp_path / "killed", *flags, ranks=ranks)
    assert "(from step-" in resumed.out
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    refused = run_in(tmp_path / "killed", *flags, "--mixup", 0.3, ranks=ranks)
    assert refused.codes == [2] * ranks
    assert "--mixup 0.3 (was 0.4): would alter the run" in refused.errors[0]


OWN = """
import torch.nn.functional as F

def soft(outputs, targets):
    return -(targets * outputs.log_softmax(1)).sum(1).mean() if targets.is_floating_point() else F.cross_entropy(
        outputs, targets)
"""


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("trainer", "flags"), [
    ("mnist", ("--dataset", "synthetic", "--loss", "bce")),
    ("fashion_mnist", ("--dataset", "synthetic", "--precision", "bf16")),
    ("image_folder", ("--dataset", "synthetic", "--cache")),
    ("custom", ("--dataset", "synthetic")),
    ("cifar", ("--dataset", "synthetic", "--loss", "own.py:soft")),
])
def test_every_trainer_of_images_mixes_them(tmp_path: Path, trainer: str, flags: tuple[str, ...]) -> None:
    (tmp_path / "own.py").write_text(OWN)
    ended = run(trainer, *flags, "--mixup", 0.2, "--cutmix", 1, "--batch-size", 100, "--epochs", 1, "--max-steps", 4,
                "--run-name", "r", "--no-pictures", folder=tmp_path)
    assert ended.code == 0, ended.err
    assert read_json(tmp_path / "runs" / "r" / "status.json")["state"] == "DONE"


@pytest.mark.parametrize(("changes", "line"), [
    ({"batch_size": 63, "mixup": 0.2}, "--batch-size 63: leaves 63 samples .* need pairs; try 64"),
    ({"batch_size": 60, "accumulation_steps": 4, "cutmix": 1.0}, "--batch-size 60: leaves 15 samples .*; try 64"),
    ({"mixup": 0.0}, "--mixup 0.0: must be above 0"),
    ({"mixup": -1.0}, "--mixup -1.0: must be above 0"),
    ({"cutmix": float("nan")}, "--cutmix nan: must be above 0"),
    ({"mix_off_epoch": 3}, "--mix-off-epoch 3: does nothing alone; add --mixup 0.2"),
    ({"mix_off_epoch": 0, "mixup": 0.2}, "--mix-off-epoch 0: must be at least 1"),
])
def test_flags_that_cannot_work_are_one_line(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(UsageError, match=line):
        replace(CifarConfig(), **changes).check()


def test_an_evaluation_needs_no_pairs() -> None:
    CifarConfig(batch_size=63, mixup=0.2, evaluate=Path("step.pt")).check()
