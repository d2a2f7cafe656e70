"""Keyed transforms: torchvision's own for a sample's seed, the same pixels whoever reads the sample and wherever."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models import get_model_weights
from torchvision.transforms import AutoAugmentPolicy, v2

from datasets import image_folder, pack, synthetic
from datasets.augment import Augmentation, KeyedTransforms, erase
from datasets.images import packed
from datasets.images.loaders import DecodedImages, Decoder, Decoding, Key
from datasets.images.unreadable import BadImages
from datasets.keyed_random import Purpose
from datasets.loaders import split_loaders
from datasets.samples import generators_kept, seed_sample
from datasets.transforms import image_loaders
from launch.command_line import parse
from launch.errors import UsageError
from tests.helpers.comparing import finished, outcome
from tests.helpers.hooks import at, kill, log_images, small_data, warm_workers
from tests.helpers.images import write_tree
from tests.helpers.own import write
from tests.helpers.processes import TINY, metrics, read_json
from tests.helpers.server import run
from trainers.cifar import CifarConfig
from trainers.image_folder import RECIPES, ImageFolderConfig

pytestmark = pytest.mark.timeout(120)
CPU = torch.device("cpu")
IMAGES = synthetic.generate(range(48), seed=0)
EVERYTHING: dict[str, Any] = {"auto_augment": "randaugment", "color_jitter": 0.3, "grayscale": 0.3, "blur": 0.3,
                              "vertical_flip": 0.5, "random_erase": 0.4, "shift": 2, "flip": "random", "seed": 5}
FLAGS = [word for name, value in EVERYTHING.items() for word in (f"--{name.replace('_', '-')}", value)]


def parts(**flags: Any) -> tuple[Augmentation, KeyedTransforms]:
    config = CifarConfig(**flags)
    images = Augmentation(**config.augmentation(((0.5,) * 3, (0.25,) * 3)))
    keyed = config.keyed(images)
    assert keyed is not None
    return images, keyed


def loader(source: Any, *, rank: int = 0, world_size: int = 1, workers: int = 0) -> Any:
    """The training loader of images in memory, or of files."""
    images, keyed = parts(**EVERYTHING)
    how: Any = {"batch_size": 12, "rank_batch_size": 12 // world_size, "seed": 5, "rank": rank,
                "world_size": world_size}
    if source is IMAGES:
        return image_loaders((IMAGES, None, IMAGES), images, None, keyed, workers=workers, device=CPU,
                             prepare_worker=torch.get_num_threads, **how)["train"]
    decoder = Decoder(Decoding(splits={"train": source}, size=24, seed=5, smallest_area=0.4, keyed=keyed),
                      workers=workers)
    read = DecodedImages("train", source.targets, decoder, keyed.rest, BadImages(0), device=CPU)
    return split_loaders({"train": (read, len(source))}, **how)["train"]


def assert_same_at_any_world_size(source: Any, sizes: tuple[int, ...], *, workers: int) -> None:
    """The second half of an epoch, as after a resume, on one rank without workers and as asked for."""
    expected = list(loader(source).batches(1, 0))[2:]
    assert expected
    for world_size in sizes:
        ranks = [list(loader(source, rank=rank, world_size=world_size, workers=workers).batches(1, 24))
                 for rank in range(world_size)]
        for place, batch in enumerate(expected):
            for whole, shares in zip(batch, zip(*[batches[place] for batches in ranks], strict=True), strict=True):
                assert torch.equal(torch.stack(shares, 1).flatten(0, 1), whole)


@pytest.mark.parametrize(("name", "magnitude", "theirs"), [
    ("randaugment", None, v2.RandAugment()), ("randaugment", 20, v2.RandAugment(magnitude=20)),
    ("trivialaugment", None, v2.TrivialAugmentWide()), ("augmix", 5, v2.AugMix(severity=5)),
    ("autoaugment", None, v2.AutoAugment(AutoAugmentPolicy.CIFAR10)),
])
def test_a_policy_is_torchvisions_own_under_the_seed_of_the_sample(name: str, magnitude: int | None,
                                                                   theirs: v2.Transform) -> None:
    _, keyed = parts(auto_augment=name, augment_magnitude=magnitude, seed=3)
    samples = [7, 3, 40, 11]
    found = keyed(IMAGES.inputs[samples], samples, 2)
    for image, sample in zip(found, samples, strict=True):
        with generators_kept():
            seed_sample(3, 2, Purpose.TRAIN_SAMPLE, sample)
            assert torch.equal(image, theirs(IMAGES.inputs[sample]))
    assert not torch.equal(found, keyed(IMAGES.inputs[samples], samples, 3))


def test_crop_and_flips_come_before_the_policy_and_draw_as_they_do_without_one() -> None:
    images, keyed = parts(auto_augment="trivialaugment", shift=2, flip="random", vertical_flip=0.5)
    samples = list(range(48))
    moved = images.moved(IMAGES.inputs.clone(), torch.arange(48), 1)
    none = KeyedTransforms(augmentation=images, transform=lambda image: image)
    assert torch.equal(none(IMAGES.inputs.clone(), samples, 1), moved)
    still = KeyedTransforms(augmentation=keyed.rest, transform=keyed.transform)
    assert torch.equal(keyed(IMAGES.inputs.clone(), samples, 1), still(moved, samples, 1))


def test_transforms_in_this_process_take_no_random_number_from_dropout() -> None:
    before = torch.get_rng_state()
    next(loader(IMAGES).batches(0, 0))
    assert torch.equal(torch.get_rng_state(), before)


def test_some_images_are_turned_upside_down_and_no_others_change() -> None:
    images = Augmentation(seed=1, mean=(0.0,) * 3, std=(1.0,) * 3, vertical_flip=0.25)
    numbers = torch.arange(4000)
    pixels = (torch.arange(2)[:, None] * torch.ones(3, 1, 2)).to(torch.uint8).expand(4000, 3, 2, 2)
    turned = images(pixels, numbers, epoch=0, rows=numbers)[:, 0, 0, 0] > 0
    assert 0.22 < turned.float().mean() < 0.28
    assert not torch.equal(turned, images(pixels, numbers, epoch=1, rows=numbers)[:, 0, 0, 0] > 0)


def test_a_rectangle_is_erased_after_normalisation_within_torchvisions_ranges() -> None:
    blank = erase(torch.ones(4000, 3, 32, 24), 0.25, torch.arange(4000), 1, 0) == 0
    assert torch.equal(blank.all(1), blank.any(1))
    hit = blank[:, 0].flatten(1).any(1)
    assert 0.22 < hit.float().mean() < 0.28
    heights, widths = (blank[hit, 0].any(side).sum(1) for side in (2, 1))
    assert torch.equal(heights * widths, blank[hit, 0].sum((1, 2)))  # one rectangle
    areas, ratios = (heights * widths) / (32 * 24), heights / widths
    assert (areas.min() > 0.014, areas.max() < 0.36, ratios.min() > 0.22, ratios.max() < 4.5) == (True,) * 4
    assert 0.15 < areas.mean() < 0.2  # uniform from 0.02 to 0.33
    alone = erase(torch.ones(1, 3, 32, 24), 0.25, hit.nonzero()[0], 1, 0) == 0
    assert torch.equal(alone[0], blank[hit][0])


def test_a_sample_in_memory_has_the_same_pixels_at_any_world_size() -> None:
    assert_same_at_any_world_size(IMAGES, (2, 4), workers=0)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The training images of a folder, and of a pack of the same bytes."""
    folder = write_tree(tmp_path_factory.mktemp("images") / "photos")
    pack.main(pack.PackConfig(data_dir=folder, out=folder.parent / "photos.pack"))
    return {"folder": image_folder.load(folder)[0], "pack": packed.load(folder.parent / "photos.pack")[0]}


def test_a_sample_of_a_folder_and_of_a_pack_has_the_same_pixels(sources: dict[str, Any]) -> None:
    first, second = (list(loader(source).batches(0, 96)) for source in sources.values())
    for batch, other in zip(first, second, strict=True):
        assert all(torch.equal(one, another) for one, another in zip(batch, other, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("name", ["memory", "folder", "pack"])
def test_a_sample_has_the_same_pixels_with_any_number_of_workers(sources: dict[str, Any], name: str, workers: int
                                                                 ) -> None:
    assert_same_at_any_world_size({"memory": IMAGES, **sources}[name], (1,), workers=workers)


def test_training_images_have_a_size_of_their_own(sources: dict[str, Any]) -> None:
    decoding = Decoding(splits={"train": sources["folder"], "test": sources["folder"]}, size=32, train_size=24,
                        fit="crop", resize_size=40)
    found = [decoding[Key(split, [0], 0)].images for split in ("train", "test")]
    assert [image.shape[-1] for image in found] == [24, 32]
    smaller = v2.functional.resize(found[1], [24, 24]).int()
    assert (smaller - found[0].int()).abs().float().mean() < 12  # the same part, three quarters as large


def test_a_training_size_that_the_network_cannot_take_is_named(tmp_path: Path) -> None:
    ended = run("image_folder", "--dataset", "synthetic", "--data-dir", tmp_path, "--output-dir", tmp_path / "runs",
                "--model", "alexnet", "--train-size", 16, "--image-size", 64)
    assert (ended.codes, len(ended.errors)) == ([2], 1)
    assert ended.errors[0].startswith("ERROR usage: --model alexnet: cannot take inputs of 3 x 16 x 16 (")


@pytest.mark.parametrize(("words", "line"), [
    (["--auto-augment", "augmix", "--augment-magnitude", "11"], "--augment-magnitude 11: .* augmix, 1 to 10"),
    (["--auto-augment", "trivialaugment", "--augment-magnitude", "5"], "--augment-magnitude 5: .*-augment trivial"),
    (["--blur", "-0.1"], "--blur -0.1: must be at least 0"), (["--color-jitter", "nan"], "--color-jitter nan"),
    (["--train-size", "0"], "--train-size 0: must be at least 1"),
    (["--train-size", "20", "--shift", "20"], "--shift 20: must be below the image size of 20"),
    (["--transform", "my.py:f", "--train-size", "20"], "--train-size 20: --transform takes"),
    (["--transform", "my.py:f", "--random-erase", "0.1"], "--random-erase 0.1: --transform takes the place"),
])
def test_a_flag_that_cannot_work_is_named(words: list[str], line: str) -> None:
    with pytest.raises(UsageError, match=line):
        parse(ImageFolderConfig, args=words).check()


@pytest.mark.slow
def test_a_run_with_a_policy_is_the_run_of_the_users_own_file_with_torchvisions(tmp_path: Path) -> None:
    write(tmp_path, """
        import torch
        from torchvision.transforms import v2
        def prepare(image, policy=v2.RandAugment(magnitude=12)):
            return policy(image).float() * torch.tensor(1 / 127.5) - 1""", head="")
    flags: Any = [*TINY, "--max-steps", 4, "--dataset", "synthetic"]
    ours = finished("cifar", tmp_path / "ours", *flags, "--auto-augment", "randaugment", "--augment-magnitude", 12,
                    "--show-batch", hook=small_data())
    theirs = finished("cifar", tmp_path / "theirs", *flags, "--transform", f"{tmp_path}/mine.py:prepare",
                      hook=small_data())
    found = [read_json(folder / "result.json")["weights_sha256"] for folder in (ours, theirs)]
    assert found[0] == found[1]
    assert (ours / "first_batch.png").exists()


@pytest.mark.slow
def test_a_run_of_every_flag_killed_and_resumed_at_another_number_of_workers_ends_as_one_never_killed(tmp_path: Path
                                                                                                      ) -> None:
    def trained(name: str, *more: Any, **how: Any) -> Any:
        words = [*TINY, *FLAGS, "--output-dir", tmp_path / name / "runs", "--run-name", "r", "--checkpoint-every", 2]
        return run("cifar", *words, "--max-steps", 8, *more, **how)

    assert trained("whole").code == 0
    assert trained("killed", "--workers", 1, hook=[warm_workers(), at(5, "forward", kill)]).code == -9
    assert trained("killed", "--workers", 2, hook=warm_workers()).code == 0
    assert outcome(tmp_path / "killed" / "runs") == outcome(tmp_path / "whole" / "runs")


@pytest.mark.slow
def test_every_sample_is_augmented_alike_on_one_two_and_four_ranks(tmp_path: Path) -> None:
    seen: list[set[str]] = []
    for ranks in (1, 2, 4):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        ended = run("image_folder", "--dataset", "synthetic", "--data-dir", tmp_path, *FLAGS, "--max-steps", 3,
                    "--batch-size", 12, "--threads", 1, "--random-crop", 0.4, "--train-size", 24, "--no-pictures",
                    folder=folder, ranks=ranks, hook=log_images())
        assert ended.codes == [0] * ranks, ended.err
        seen.append({line for file in folder.glob("samples-*.txt") for line in file.read_text().splitlines()})
    assert len(seen[0]) == 36
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_one_that_runs(name: str) -> None:
    config = parse(ImageFolderConfig, recipes=RECIPES, args=["--recipe", name])
    if "timm/" in config.model + config.optimizer:
        pytest.importorskip("timm")
    config.check()


@pytest.mark.parametrize(("name", "weights"), [
    ("resnet50-classic", "IMAGENET1K_V1"), ("resnet50-tv2", "IMAGENET1K_V2"), ("convnext-t", "IMAGENET1K_V1"),
])
def test_a_recipe_of_torchvisions_is_tested_as_its_published_weights_are(name: str, weights: str) -> None:
    config = parse(ImageFolderConfig, recipes=RECIPES, args=["--recipe", name])
    theirs = get_model_weights(config.model)[weights].transforms()  # pyright: ignore
    assert ([config.size()], [config.resize_size], config.interpolation or "bilinear") == (
        theirs.crop_size, theirs.resize_size, theirs.interpolation.value)


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_the_strong_recipe_climbs_on_a_cpu_too(cifar10: Path, tmp_path: Path) -> None:
    trained = finished("cifar", tmp_path / "strong", "--data-dir", cifar10, "--recipe", "strong", "--width", 8,
                       "--epochs", 2, "--batch-size", 100, "--lr", 0.1, "--precision", "fp32", "--workers", 1,
                       "--validation-fraction", 0.8, "--no-pictures", timeout=270, hook=warm_workers())
    first, second = (accuracy for split, accuracy in metrics(trained, "split", "accuracy") if split == "validation")
    assert 0.15 < first < second
