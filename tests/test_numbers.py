"""Every number of every command: its rule stands beside the field, and what breaks it is one usage line, exit 2."""

import math
import typing
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from launch.bench.runs import parse_setup
from launch.benchmark import BenchmarkConfig, check
from launch.command_line import parse
from launch.doctor import DoctorConfig
from launch.errors import AtLeast, UsageError, rules_of
from tests.helpers.processes import ROOT
from tests.helpers.server import run
from trainers import cifar, custom, fashion_mnist, image_folder, mnist, regression
from trainers.engine.config import TrainConfig
from trainers.predict import PredictConfig
from trainers.split_demo import SplitConfig

TRAINERS = {"cifar": (cifar, cifar.CifarConfig), "mnist": (mnist, mnist.MnistConfig),
            "fashion_mnist": (fashion_mnist, fashion_mnist.FashionMnistConfig),
            "image_folder": (image_folder, image_folder.ImageFolderConfig),
            "custom": (custom, custom.CustomConfig),
            "regression": (regression, regression.RegressionConfig)}
CONFIGS = [TrainConfig, *(config for _, config in TRAINERS.values()), BenchmarkConfig, DoctorConfig, PredictConfig,
           SplitConfig]


def numbers_in(hint: Any) -> set[type]:
    """int and float where a type holds them, in unions and tuples too."""
    if hint in (int, float):
        return {hint}
    parts = () if typing.get_origin(hint) is typing.Literal else typing.get_args(hint)
    return set().union(*map(numbers_in, parts))


def numbers_of(config_class: type) -> dict[str, tuple[type, int]]:
    """Each field that holds numbers: which kind, and how many words its flag takes."""
    hints = typing.get_type_hints(config_class)
    return {field.name: (kinds.pop(), 2 if field.name in ("channels", "betas") else 1) for field in fields(config_class)
            if (kinds := numbers_in(hints[field.name]))}


def wrong_words(kind: type, rule: AtLeast) -> Iterator[str]:
    """What a rule must refuse: below, above, and for floats what is no number or has no end."""
    top = rule.most if rule.below is None else rule.below
    if kind is int:
        yield from (str(int(rule.low) - 1), str(int(top) + 1), str(10**23), str(-10**23))
    else:
        yield from (repr(math.nextafter(rule.low, -math.inf)), repr(math.nextafter(rule.most, math.inf)))
        yield from ("nan", "inf", "-inf", "1e300", *([repr(float(rule.below))] if rule.below is not None else []))


@pytest.mark.parametrize("config_class", CONFIGS)
def test_every_number_has_a_rule(config_class: type) -> None:
    assert numbers_of(config_class).keys() == dict(rules_of(config_class)).keys()


@pytest.mark.parametrize("config_class", CONFIGS)
def test_every_number_out_of_its_range_is_refused_by_the_name_of_its_flag(config_class: type) -> None:
    rules, shared, tried = dict(rules_of(config_class)), dict(rules_of(TrainConfig)), 0
    for name, (kind, count) in numbers_of(config_class).items():
        flag = f"--{name.replace('_', '-')}"
        words = list(wrong_words(kind, rules[name]))
        if config_class is not TrainConfig and rules[name] is shared.get(name):
            words = words[-1:]  # TrainConfig's own case tries them all
        for word in words:
            args = [f"{flag}={word}"] if count == 1 else [flag, *[repr(rules[name].low)] * (count - 1), word]
            with pytest.raises(UsageError, match=f"^{flag} .*must be (at least|above) "):
                parse(config_class, args=args)
            tried += 1
    assert tried >= len(rules)


@pytest.mark.parametrize("config_class", CONFIGS)
def test_defaults_and_recipes_keep_their_own_rules(config_class: type) -> None:
    assert parse(config_class, args=[]) == config_class()
    for module, of in TRAINERS.values():
        for recipe in getattr(module, "RECIPES", ()) if of is config_class else ():
            assert parse(config_class, recipes=module.RECIPES, args=["--recipe", recipe]).recipe == recipe


def test_the_last_of_a_repeated_flag_wins() -> None:
    words = "--learning-rate nan --lr 0.5 --epochs 0 --epochs=3 --download --no-download --threads 2 --threads None"
    config = parse(TrainConfig, args=words.split())
    assert (config.learning_rate, config.epochs, config.download, config.threads) == (0.5, 3, False, None)
    with pytest.raises(UsageError, match="--epochs 0"):
        parse(TrainConfig, args=["--epochs", "3", "--epochs", "0"])


@pytest.mark.parametrize("seed", [-2**63, -1, 2**64 - 1])
def test_every_seed_that_torch_takes_is_taken(seed: int) -> None:
    import torch
    taken = parse(TrainConfig, args=[f"--seed={seed}"]).seed
    assert taken == seed
    torch.manual_seed(taken)


@pytest.mark.parametrize("text", ["cpu:99999999999", "cpu:1025", "cpu:1+threads=99999", "ddp:2+threads=99999999999"])
def test_numbers_inside_a_setup_have_a_rule(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--setups .*must be at least 1 and at most 1,024"):
        parse_setup(text)


@pytest.mark.parametrize("text", ["5:99999999999", "99999999999:5", f"{10**30}:1"])
def test_numbers_inside_measure_have_a_rule(text: str) -> None:
    with pytest.raises(UsageError, match=f"^--measure {text}: must be WARMUP:STEPS"):
        TrainConfig(measure=text).check()


@pytest.mark.parametrize("name", ["models", "predict", "split_demo", "__init__", "cifra"])
def test_the_benchmark_takes_only_trainers_that_can_measure(name: str) -> None:
    with pytest.raises(UsageError, match=f"--trainer {name}: .*choose from {', '.join(sorted(TRAINERS))}$"):
        check(BenchmarkConfig(trainer=name))
    for trainer in TRAINERS:
        check(BenchmarkConfig(trainer=trainer))


@pytest.mark.parametrize(("trainer", "size"), [("cifar", 32), ("mnist", 28), ("fashion_mnist", 28),
                                               ("image_folder", 32)])
def test_an_image_is_not_shifted_out_of_itself(trainer: str, size: int) -> None:
    module, config_class = TRAINERS[trainer]
    parse(config_class, recipes=module.RECIPES, args=["--shift", str(size - 1)]).check()
    with pytest.raises(UsageError, match=f"--shift {size}: must be below the image size of {size}"):
        parse(config_class, recipes=module.RECIPES, args=["--shift", str(size)]).check()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("command", [
    "trainers/cifar.py --clip-grad-norm -1.5", "trainers/cifar.py --width 0", "trainers/mnist.py --timeout nan",
    f"trainers/fashion_mnist.py --seed {10**23}", "trainers/regression.py --learning-rate nan",
    "trainers/image_folder.py --threads 100000", "launch/benchmark.py --setups cpu:99999999999",
    "launch/doctor.py --timeout inf", "trainers/predict.py --top 0", "trainers/split_demo.py --replicas -1",
])
def test_a_number_out_of_range_is_one_line_and_exit_code_2(command: str) -> None:
    path, *words = command.split()
    done = run(str(ROOT / path), *words)
    assert done.code == 2
    assert done.err.startswith(f"ERROR usage: {words[0]} {words[1]}: ")
    assert done.err.count("\n") == 1
    assert not done.out


@pytest.mark.timeout(120)
def test_of_several_ranks_one_names_the_number(tmp_path: Path) -> None:
    done = run("cifar", "--norm-bias-lr-scale", 0, "--output-dir", tmp_path / "runs", ranks=2)
    assert done.errors == ["ERROR usage: --norm-bias-lr-scale 0.0: must be above 0 and at most 2,147,483,647"]
    assert not (tmp_path / "runs").exists()
