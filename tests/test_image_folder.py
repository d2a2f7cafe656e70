"""The image-folder trainer: what it accepts, and that ranks, workers and interruptions change nothing."""

import os
import re
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models import get_model

from datasets import image_folder
from datasets.tensors import DataError
from launch.command_line import CheckpointError, UsageError, parse
from tests.images import FLAGS, NUM_TEST, write_bomb, write_tree
from tests.jobs import forked
from tests.support import (
    ROOT,
    command,
    execute,
    kill_session,
    largest_difference,
    metrics,
    newest_checkpoint,
    read_json,
    session_pids,
    start,
    train,
)
from trainers import models
from trainers.engine.backbone import load_backbone
from trainers.image_folder import RECIPES, ImageFolderConfig, check


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
    finished = forked("image_folder", *flags(tree, folder, name), *more, ranks=ranks)
    assert finished.code == 0, finished.err
    return folder / name


def fingerprint_of(run: Path) -> tuple[Any, ...]:
    """Everything that must be the same bits: weights, optimizer state and what was logged."""
    momentum = newest_checkpoint(run)["optimizer"]["state"].values()
    return (read_json(run / "result.json")["weights_sha256"],
            [state["momentum_buffer"].double().sum().item() for state in momentum], metrics(run))


@pytest.mark.timeout(240)
def test_two_workers_give_the_weights_of_none_even_when_the_run_is_stopped_mid_epoch(reference: Path, tree: Path,
                                                                                     tmp_path: Path):
    words = command("image_folder", [str(word) for word in flags(tree, tmp_path, "run")] + ["--workers", "2"])
    process = start([*words, "--checkpoint-every", "1"])
    try:
        wait_for(lambda: any((tmp_path / "run" / "checkpoints").glob("step-*.json")), seconds=90)
        os.killpg(process.pid, signal.SIGTERM)  # to the workers too, as a scheduler does
        out, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            kill_session(process)
    assert process.returncode == 75, out + err
    assert "ERROR" not in out + err
    stopped = read_json(tmp_path / "run" / "status.json")
    assert (stopped["state"], stopped["step"] < 20) == ("PREEMPTED", True)
    wait_for(lambda: not session_pids(process.pid), seconds=10)
    resumed = execute([*words, "--checkpoint-every", "1"])
    assert resumed.code == 0, resumed.err
    assert f"step {stopped['step']}" in resumed.out
    assert fingerprint_of(tmp_path / "run") == fingerprint_of(reference)


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
    process = start(command("image_folder", [str(word) for word in flags(tree, tmp_path, "run")]
                            + ["--workers", "2", "--epochs", "100000"]))
    try:
        wait_for(lambda: bool(read_lines(tmp_path / "run" / "metrics.jsonl")), seconds=90)
        wait_for(lambda: len(workers_of(process)) >= 2, seconds=20)  # the first step needs only one of them
        process.kill()
        wait_for(lambda: not workers_of(process), seconds=5)
        wait_for(lambda: not session_pids(process.pid), seconds=20)  # their server takes its interpreter down first
    finally:
        kill_session(process)


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_a_killed_worker_ends_the_run_with_one_data_error(tree: Path, tmp_path: Path):
    process = start(command("image_folder", [str(word) for word in flags(tree, tmp_path, "run")]
                            + ["--workers", "1", "--epochs", "100000"]))
    try:
        wait_for(lambda: bool(read_lines(tmp_path / "run" / "metrics.jsonl")), seconds=90)
        os.kill(workers_of(process)[0], signal.SIGKILL)
        out, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            kill_session(process)
    assert process.returncode == 3
    errors = [line for line in (out + err).splitlines() if "ERROR" in line or "Traceback" in line]
    assert len(errors) == 1
    assert errors[0].startswith("ERROR data: --workers 1: ")
    assert read_json(tmp_path / "run" / "status.json")["state"] == "FAILED"
    wait_for(lambda: not session_pids(process.pid), seconds=10)


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
    refused = train("image_folder", *flags(tree, tmp_path, "refused"), ranks=ranks)
    assert refused.code == (3 if ranks is None else 1)  # torchrun's is always 1
    assert len(refused.errors) == 1
    assert refused.errors[0].startswith(f"ERROR data: {bad}: ")
    assert "bomb" in refused.errors[0]
    assert not re.search(rf'File "{re.escape(str(ROOT))}/(launch|datasets|trainers)/', refused.err)  # only torchrun's
    assert read_json(tmp_path / "refused" / "status.json")["state"] == "FAILED"


def wait_for(condition: Any, *, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.05)


def read_lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """The loader workers that have begun."""
    return [pid for pid in session_pids(process.pid) if name_of(pid) == "pt_data_worker"]


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
    finished = forked("image_folder", *flags(tree, tmp_path, "run"))
    assert finished.code == 3
    assert len(finished.errors) == 1
    assert str(tree / "train" / "zebra") in finished.errors[0]
    assert "Traceback" not in finished.err


def test_labels_follow_the_training_folders_and_hidden_ones_are_no_classes(tmp_path: Path):
    tree = write_tree(tmp_path)
    (tree / "train" / ".thumbnails").mkdir()
    training, test = image_folder.load(tree)
    assert training.class_names == tuple(sorted(training.class_names))
    assert len(training.class_names) == 10
    for split in (training, test):
        for sample in range(len(split)):
            assert split.path(sample).parent.name == split.class_names[int(split.targets[sample])]
    assert len(set(test.targets[:10].tolist())) > 4  # mixed


@pytest.mark.parametrize(("damage", "said"), [
    (lambda tree: [path.unlink() for path in (tree / "test" / "disc").iterdir()], "test/disc: holds no image"),
    (lambda tree: (tree / "test" / "disc").rename(tree / "test" / "disk"), "test/disk: no such class"),
    (lambda tree: (tree / "test").rename(tree / "exam"), "has no test/ or val/"),
    (lambda tree: (tree / "train").rename(tree / "practice"), "has no train/"),
])
def test_a_folder_that_cannot_be_used_is_a_data_error_that_names_it(damage: Any, said: str, tmp_path: Path):
    tree = write_tree(tmp_path / "images")
    damage(tree)
    with pytest.raises(DataError, match=said):
        image_folder.load(tree)


def test_a_missing_folder_and_one_without_classes_are_data_errors(tmp_path: Path):
    with pytest.raises(DataError, match="no such folder"):
        image_folder.load(tmp_path / "nothing")
    with pytest.raises(DataError, match="holds no folder per class"):
        image_folder.load(tmp_path, validation_fraction=0.2)


def test_val_is_a_test_split_by_another_name(tmp_path: Path):
    tree = write_tree(tmp_path)
    (tree / "test").rename(tree / "val")
    assert len(image_folder.load(tree)[1]) == NUM_TEST


@pytest.mark.parametrize("inner", ["train", ""])
def test_one_folder_is_split_by_a_fraction_of_each_class_and_a_seed(inner: str, tmp_path: Path):
    tree = write_tree(tmp_path)
    folder = tree if inner else tree / "train"
    training, test = image_folder.load(folder, validation_fraction=0.25, seed=1)
    assert training.targets.bincount().tolist() == [9] * 10
    assert test.targets.bincount().tolist() == [3] * 10
    assert not set(training.names) & set(test.names)
    assert image_folder.load(folder, validation_fraction=0.25, seed=1)[1].names == test.names
    assert set(image_folder.load(folder, validation_fraction=0.25, seed=2)[1].names) != set(test.names)


def test_the_fingerprint_sees_names_labels_and_sizes(tmp_path: Path):
    training, _ = image_folder.load(write_tree(tmp_path))
    before, timed = training.fingerprint(), training.fingerprint(times=True)
    os.utime(training.path(0), (1, 1))
    assert training.fingerprint() == before
    assert training.fingerprint(times=True) != timed
    with open(training.path(0), "ab") as file:
        file.write(b"more")
    assert training.fingerprint() != before


@pytest.mark.parametrize("words", [
    ["--model", "resnet81"], ["--image-size", "0"], ["--skip-bad", "-1"], ["--shift", "32"], ["--random-crop", "1.5"],
    ["--cache", "--random-crop", "0.5"], ["--validation-fraction", "0"], ["--cache-dir", "here"],
])
def test_a_flag_that_cannot_work_is_named(words: list[str]):
    config = parse(ImageFolderConfig, recipes=RECIPES, args=words)
    with pytest.raises(UsageError, match=words[-2] if words[0] != "--cache" else "--random-crop"):
        check(config)


def test_the_synthetic_folder_appears_whole_and_once(tmp_path: Path):
    folder = image_folder.write_synthetic(tmp_path, seed=4)
    training, test = image_folder.load(folder)
    assert (len(training), len(test)) == (2000, 500)
    written = training.path(0).stat().st_mtime_ns
    assert image_folder.write_synthetic(tmp_path, seed=4) == folder
    assert training.path(0).stat().st_mtime_ns == written
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_a_pretrained_backbone_keeps_all_but_a_head_of_another_size(tmp_path: Path):
    path = tmp_path / "backbone.pth"
    trained_on_1000 = get_model("resnet18", num_classes=1000)
    torch.save(trained_on_1000.state_dict(), path)
    model = models.build("torchvision/resnet18", num_classes=2)
    fresh_head = model.get_parameter("fc.weight").clone()
    line = load_backbone(model, path)
    assert "fc, is new: 2 outputs instead of 1000" in line
    assert torch.equal(model.get_parameter("fc.weight"), fresh_head)
    for name, value in trained_on_1000.state_dict().items():
        assert name.startswith("fc.") or torch.equal(model.state_dict()[name], value)
    assert "all of them" in load_backbone(models.build("torchvision/resnet18", num_classes=1000), path)
    with pytest.raises(CheckpointError, match=r"--pretrained .*does not fit"):
        load_backbone(models.build("torchvision/resnet34", num_classes=2), path)
    with pytest.raises(CheckpointError, match=r"--pretrained .*no such file"):
        load_backbone(model, tmp_path / "absent.pth")


def test_an_image_size_that_a_network_cannot_take_is_a_usage_error():
    from launch.process_group import World
    from trainers.image_folder import build_model

    config = replace(ImageFolderConfig(), model="alexnet", image_size=16)
    with pytest.raises(UsageError, match="--image-size 16: alexnet"):
        build_model(config, 2, World())


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_the_cheat_sheet_network_tells_cats_from_dogs(cats_dogs: Path, tmp_path: Path):
    finished = forked("image_folder", "--data-dir", cats_dogs, "--cache", "--cache-dir", tmp_path / "cache",
                      "--output-dir", tmp_path, "--run-name", "run", "--threads", "1", timeout=270)
    assert finished.code == 0, finished.err
    result = read_json(tmp_path / "run" / "result.json")
    assert result["num_samples"] == 2000
    assert result["accuracy"] >= 0.70
