"""The image-folder trainer: what it accepts, and that ranks, workers and interruptions change nothing."""

import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models import get_model

from launch.command_line import parse
from launch.errors import CheckpointError, UsageError
from tests.helpers.hooks import warm_workers
from tests.helpers.images import FLAGS, NUM_TEST, write_bomb, write_tree
from tests.helpers.processes import (
    ROOT,
    largest_difference,
    metrics,
    newest_checkpoint,
    read_json,
    wait_until,
)
from tests.helpers.server import Job, run, start
from trainers import models
from trainers.engine.checkpoints.weights import load_weights
from trainers.image_folder import RECIPES, ImageFolderConfig


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def reference(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of 20 uninterrupted steps on one rank without workers."""
    return trained(tree, tmp_path_factory.mktemp("runs"), "reference")


def flags(tree: Path, folder: Path, name: str) -> list[Any]:
    return ["--data-dir", tree, "--output-dir", folder, "--run-name", name, *FLAGS]


def trained(tree: Path, folder: Path, name: str, *more: Any, ranks: int | None = None) -> Path:
    finished = run("image_folder", *flags(tree, folder, name), *more, ranks=ranks, hook=warm_workers())
    assert finished.code == 0, finished.err
    return folder / name


def fingerprint_of(run: Path) -> tuple[Any, ...]:
    """Everything that must be the same bits: weights, optimizer state and what was logged."""
    momentum = newest_checkpoint(run)["optimizer"]["state"].values()
    return (read_json(run / "result.json")["weights_sha256"],
            [state["momentum_buffer"].double().sum().item() for state in momentum], metrics(run))


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_workers_give_the_weights_of_none_even_when_the_run_is_stopped_mid_epoch(reference: Path, tree: Path,
                                                                                     tmp_path: Path):
    words = [*flags(tree, tmp_path, "run"), "--workers", "2", "--checkpoint-every", "1"]
    with start("image_folder", *words, folder=tmp_path) as job:
        job.wait_until(lambda: any((tmp_path / "run" / "checkpoints").glob("step-*.json")), timeout=90)
        job.signal(signal.SIGTERM)  # to the workers too, as a scheduler does
        ended = job.wait(60)
        wait_until(lambda: not job.alive(), 10)
    assert ended.code == 75, ended.out + ended.err
    assert "ERROR" not in ended.out + ended.err
    stopped = read_json(tmp_path / "run" / "status.json")
    assert (stopped["state"], stopped["step"] < 20) == ("PREEMPTED", True)
    resumed = run("image_folder", *words)
    assert resumed.code == 0, resumed.err
    assert f"step {stopped['step']}" in resumed.out
    assert fingerprint_of(tmp_path / "run") == fingerprint_of(reference)


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_two_ranks_with_a_worker_each_reach_the_weights_of_one_without(reference: Path, tree: Path, tmp_path: Path):
    run = trained(tree, tmp_path, "two", "--workers", "1", ranks=2)
    one, two = newest_checkpoint(reference), newest_checkpoint(run)
    assert one["step"] == two["step"] == 20
    assert largest_difference(one["model"], two["model"]) < 1e-5
    assert read_json(run / "result.json")["num_samples"] == NUM_TEST


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_a_rank_killed_outright_leaves_no_workers_behind(tree: Path, tmp_path: Path):
    with start("image_folder", *flags(tree, tmp_path, "run"), "--workers", "2", "--epochs", "100000", folder=tmp_path,
               launcher="python") as job:
        job.wait_until(lambda: has_started(tmp_path / "run"), timeout=90)
        job.wait_until(lambda: len(workers_of(job)) >= 2, timeout=20)  # the first step needs only one of them
        job.signal(signal.SIGKILL, 0)
        assert job.wait(5).code == -signal.SIGKILL  # it did not end by itself before
        wait_until(lambda: not workers_of(job), 5)
        wait_until(lambda: not job.alive(), 20)  # their server takes its interpreter down first


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_a_killed_worker_ends_the_run_with_one_data_error(tree: Path, tmp_path: Path):
    with start("image_folder", *flags(tree, tmp_path, "run"), "--workers", "1", "--epochs", "100000", folder=tmp_path,
               launcher="python") as job:
        job.wait_until(lambda: has_started(tmp_path / "run"), timeout=90)
        os.kill(workers_of(job)[0], signal.SIGKILL)
        ended = job.wait(60)
        wait_until(lambda: not job.alive(), 10)
    assert ended.code == 3
    errors = [line for line in (ended.out + ended.err).splitlines() if "ERROR" in line or "Traceback" in line]
    assert len(errors) == 1
    assert errors[0].startswith("ERROR data: --workers 1: ")
    assert read_json(tmp_path / "run" / "status.json")["state"] == "FAILED"


@pytest.mark.timeout(150)
def test_an_unreadable_image_is_skipped_when_that_is_allowed(tmp_path: Path):
    tree = write_tree(tmp_path / "images")
    bad = write_bomb(sorted((tree / "train" / "ring").iterdir())[3], side=20_000)
    run = trained(tree, tmp_path, "skipped", "--skip-bad", "1")
    assert read_json(run / "status.json")["step"] == 20
    assert read_json(run / "result.json")["num_samples"] == NUM_TEST
    assert list(read_json(run / "bad_images.json")) == [str(bad)]


@pytest.mark.slow
@pytest.mark.timeout(150)
@pytest.mark.parametrize("ranks", [None, 2])
def test_an_unreadable_image_ends_the_run_with_one_line_that_names_it(ranks: int | None, tmp_path: Path):
    tree = write_tree(tmp_path / "images")
    bad = write_bomb(sorted((tree / "train" / "ring").iterdir())[3], side=20_000)
    refused = run("image_folder", *flags(tree, tmp_path, "refused"), ranks=ranks,
                  launcher="python" if ranks is None else "torchrun")
    assert refused.code == (3 if ranks is None else 1)  # torchrun's is always 1
    assert len(refused.errors) == 1
    assert refused.errors[0].startswith(f"ERROR data: {bad}: ")
    assert "bomb" in refused.errors[0]
    assert not re.search(rf'File "{re.escape(str(ROOT))}/(launch|datasets|trainers)/', refused.err)  # only torchrun's
    assert read_json(tmp_path / "refused" / "status.json")["state"] == "FAILED"


def has_started(run: Path) -> bool:
    """Whether a step has been reported."""
    return (run / "metrics.jsonl").exists() and bool(metrics(run))


def workers_of(job: Job) -> list[int]:
    """The loader workers that have started."""
    return [pid for pid in job.alive() if name_of(pid) == "pt_data_worker"]


def name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


@pytest.mark.slow
@pytest.mark.timeout(100)
def test_an_empty_class_folder_is_named_with_exit_code_3(tmp_path: Path):
    tree = write_tree(tmp_path / "images")
    (tree / "train" / "zebra").mkdir()
    (tree / "train" / "zebra" / "notes.txt").write_text("no image")
    finished = run("image_folder", *flags(tree, tmp_path, "run"))
    assert finished.code == 3
    assert len(finished.errors) == 1
    assert str(tree / "train" / "zebra") in finished.errors[0]
    assert "Traceback" not in finished.err


@pytest.mark.parametrize("words", [
    ["--model", "resnet81"], ["--image-size", "0"], ["--skip-bad", "-1"], ["--shift", "32"], ["--random-crop", "1.5"],
    ["--validation-fraction", "0"], ["--cache-dir", "here"],
])
def test_a_flag_that_cannot_work_is_named(words: list[str]):
    with pytest.raises(UsageError, match=words[-2]):
        parse(ImageFolderConfig, recipes=RECIPES, args=words).check()


def test_a_pretrained_backbone_keeps_all_but_a_head_of_another_size(tmp_path: Path):
    path = tmp_path / "backbone.pth"
    trained_on_1000 = get_model("resnet18", num_classes=1000)
    torch.save(trained_on_1000.state_dict(), path)
    model = models.build("torchvision/resnet18", num_classes=2)
    fresh_head = model.get_parameter("fc.weight").clone()
    flag: Any = {"flag": "--pretrained", "new_head": True}
    line = load_weights(model, path, **flag)
    assert "fc, is new: 2 outputs instead of 1000" in line
    assert torch.equal(model.get_parameter("fc.weight"), fresh_head)
    for name, value in trained_on_1000.state_dict().items():
        assert name.startswith("fc.") or torch.equal(model.state_dict()[name], value)
    assert "all of them" in load_weights(models.build("torchvision/resnet18", num_classes=1000), path, **flag)
    with pytest.raises(CheckpointError, match=r"--pretrained .*does not fit"):
        load_weights(models.build("torchvision/resnet34", num_classes=2), path, **flag)
    with pytest.raises(CheckpointError, match=r"--pretrained .*no such file"):
        load_weights(model, tmp_path / "absent.pth", **flag)


def test_an_image_size_that_a_network_cannot_take_is_a_usage_error():
    from launch.process_group import World
    from trainers.image_folder import build_model

    config = replace(ImageFolderConfig(), model="alexnet", image_size=16)
    with pytest.raises(UsageError, match="--image-size 16: alexnet"):
        build_model(config, 2, World())


@pytest.mark.long
@pytest.mark.timeout(280)
def test_the_cheat_sheet_network_tells_cats_from_dogs(cats_dogs: Path, tmp_path: Path):
    finished = run("image_folder", "--data-dir", cats_dogs, "--cache", "--cache-dir", tmp_path / "cache",
                   "--output-dir", tmp_path, "--run-name", "run", "--threads", "1", timeout=270)
    assert finished.code == 0, finished.err
    result = read_json(tmp_path / "run" / "result.json")
    assert result["num_samples"] == 2000
    assert result["accuracy"] >= 0.70
