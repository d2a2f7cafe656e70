"""Predictions of finished runs: as accurate as the run says, readable for people and programs, and exportable."""

import contextlib
import fcntl
import json
import os
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from datasets.errors import DataError
from launch.errors import PATIENCE_SECONDS, CheckpointError, UsageError
from tests.helpers import server
from tests.helpers.images import NUM_TEST, write_tree
from tests.helpers.processes import TINY, environment, execute, read_json, wait_until
from trainers import models
from trainers.engine import export
from trainers.engine.checkpoints.load import load_verified
from trainers.engine.run.card import ModelCard
from trainers.predict import PredictConfig, load_model, main

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def finished_run(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs with averaged weights, cropped and not squashed: what predict must find out by itself."""
    folder = tmp_path_factory.mktemp("runs")
    finished = server.run("image_folder", "--data-dir", tree, "--output-dir", folder, "--run-name", "run",
                          "--batch-size", "12", "--epochs", "2", "--fit", "crop", "--normalize", "half", "--ema-decay",
                          "0.8", "--image-size", "40", "--threads", "1", "--no-pictures")
    assert finished.code == 0, finished.err
    return folder / "run"


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def as_json(capsys: pytest.CaptureFixture[str], run: Path, *images: Path, **more: Any) -> Any:
    capsys.readouterr()
    assert main(PredictConfig(run=run, images=images, json=True, device="cpu", **more)) == 0
    return json.loads(capsys.readouterr().out)


def test_the_whole_test_set_gets_the_accuracy_of_the_runs_best_epoch(run: Path, capsys: pytest.CaptureFixture[str]):
    said = as_json(capsys, run, test_images=10_000)
    assert len(said["predictions"]) == NUM_TEST
    assert said["accuracy"] == pytest.approx(read_json(run / "result.json")["best"]["accuracy"])
    assert said["checkpoint"].endswith("best.pt")
    for prediction in said["predictions"]:
        assert sum(prediction["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert prediction["probability"] == max(prediction["probabilities"].values())


def test_a_folder_a_file_and_the_test_set_give_an_image_the_same_probabilities(run: Path, tree: Path,
                                                                               capsys: pytest.CaptureFixture[str]):
    path = sorted((tree / "test" / "ring").iterdir())[1]
    folder, file = as_json(capsys, run, tree / "test" / "ring"), as_json(capsys, run, path, batch_size=1)
    of_folder = next(entry for entry in folder["predictions"] if entry["image"] == str(path))
    of_test = next(entry for entry in as_json(capsys, run, test_images=NUM_TEST)["predictions"]
                   if entry["image"] == str(path))
    for entry in (of_folder, of_test):
        assert entry["probabilities"] == pytest.approx(file["predictions"][0]["probabilities"], abs=1e-5)
        assert entry["true_class"] == "ring"


def test_lines_rank_the_classes_and_name_the_truth_only_where_it_is_known(run: Path, tree: Path, tmp_path: Path,
                                                                         capsys: pytest.CaptureFixture[str]):
    unknown = Path(shutil.copy(next((tree / "test" / "disc").iterdir()), tmp_path / "some.png"))
    assert main(PredictConfig(run=run, images=(unknown,), device="cpu", top=2)) == 0
    line, = capsys.readouterr().out.splitlines()
    assert line.startswith(str(unknown))
    shares = [float(word) for word in line.split() if word.replace(".", "").isdigit()]
    assert shares == sorted(shares, reverse=True)
    assert len(shares) == 2
    assert "(is" not in line
    assert main(PredictConfig(run=run, images=(tree / "test" / "disc",), device="cpu")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.endswith("(is disc)") for line in lines[:-1])
    assert lines[-1].startswith("accuracy")


def test_the_picture_is_written_where_it_is_asked_for(run: Path, tree: Path, tmp_path: Path):
    assert main(PredictConfig(run=run, test_images=9, device="cpu")) == 0
    assert main(PredictConfig(run=run, images=(tree / "test",), device="cpu", picture=tmp_path / "new" / "x.png")) == 0
    for path in (run / "predict.png", tmp_path / "new" / "x.png"):
        with Image.open(path) as image:
            image.load()
            assert min(image.size) > 200


def test_the_averaged_weights_of_the_best_checkpoint_are_used(run: Path):
    state = load_verified(run / "checkpoints" / "best.pt")
    card = ModelCard(**{name: tuple(value) if isinstance(value, list) else value
                        for name, value in read_json(run / "model.json").items()})
    model, source = load_model(run, card, None, torch.device("cpu"))
    assert source == run / "checkpoints" / "best.pt"
    assert not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, state["ema"][name])
    assert not torch.equal(state["ema"]["classifier.4.bias"], state["model"]["classifier.4.bias"])


def test_a_damaged_best_checkpoint_costs_a_warning_and_a_run_without_any_is_an_error(
        run: Path, tree: Path, capsys: pytest.CaptureFixture[str]):
    best = run / "checkpoints" / "best.pt"
    content = bytearray(best.read_bytes())
    content[len(content) // 2] ^= 1
    best.unlink()  # it is a second name of a step's file, which stays whole
    best.write_bytes(content)
    assert main(PredictConfig(run=run, images=(tree / "test" / "disc",), device="cpu")) == 0
    assert capsys.readouterr().err.count("WARNING checkpoint") == 1
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        main(PredictConfig(run=run, images=(tree / "test" / "disc",), device="cpu"))


def test_what_cannot_be_predicted_is_one_error_that_names_it(run: Path, tmp_path: Path):
    spoiled = tmp_path / "spoiled.png"
    spoiled.write_bytes(b"no image")
    for path, said in ((spoiled, "spoiled.png: not readable"), (tmp_path / "absent", "absent: no such"),
                       (run / "checkpoints", "checkpoints: holds no image")):
        with pytest.raises(DataError, match=said):
            main(PredictConfig(run=run, images=(path,), device="cpu"))
    with pytest.raises(CheckpointError, match=r"absent: no such folder"):
        main(PredictConfig(run=tmp_path / "absent", images=(spoiled,)))
    with pytest.raises(CheckpointError, match=r"model\.json"):
        main(PredictConfig(run=tmp_path, images=(spoiled,)))
    for config in (PredictConfig(), PredictConfig(run=run), PredictConfig(run=run, test_images=0)):
        with pytest.raises(UsageError):
            main(config)


def test_an_exported_program_gives_what_the_model_gives_at_any_batch_size(run: Path, tmp_path: Path,
                                                                         capsys: pytest.CaptureFixture[str]):
    assert main(PredictConfig(run=run, export=tmp_path / "out" / "net.pt2", device="cpu")) == 0
    assert "within" in capsys.readouterr().out
    program = torch.export.load(tmp_path / "out" / "net.pt2").module()
    card = ModelCard(**{name: tuple(value) if isinstance(value, list) else value
                        for name, value in read_json(run / "model.json").items()})
    model, _ = load_model(run, card, None, torch.device("cpu"))
    for batch_size in (1, 5):
        images = torch.randn(batch_size, 3, 40, 40)
        torch.testing.assert_close(program(images), model(images))


def test_an_export_that_gives_something_else_is_refused(tmp_path: Path):
    path = tmp_path / "net.pt2"
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="differ"):
        export.compared(path, torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.1]]))
    with pytest.raises(UsageError, match="--export"):
        export.export(models.build("lenet", num_classes=3).eval(), path / "below" / "net", image_shape=(1, 28, 28))


@pytest.mark.timeout(100)
def test_a_checkpoint_of_another_model_ends_with_one_line_and_code_4(run: Path, tree: Path):
    card = read_json(run / "model.json")
    (run / "model.json").write_text(json.dumps({**card, "model": "net"}))
    words = [sys.executable, str(ROOT / "trainers" / "predict.py"), "--run", str(run), str(tree / "test"),
             "--device", "cpu"]
    finished = execute(words)
    assert finished.code == 4
    assert len(finished.errors) == 1
    assert "Traceback" not in finished.err
    assert "does not fit" in finished.errors[0]


@pytest.mark.slow
@pytest.mark.timeout(150)
@pytest.mark.parametrize("trainer", ["cifar", "mnist", "fashion_mnist"])
def test_runs_of_the_other_image_trainers_can_predict_too(trainer: str, tree: Path, tmp_path: Path,
                                                          capsys: pytest.CaptureFixture[str]):
    flags = TINY if trainer == "cifar" else ["--dataset", "synthetic", "--max-steps", "40", "--threads", "1"]
    finished = server.run(trainer, *flags, "--output-dir", tmp_path, "--run-name", "run")
    assert finished.code == 0, finished.err
    said = as_json(capsys, tmp_path / "run", test_images=10_000)
    assert said["accuracy"] == pytest.approx(read_json(tmp_path / "run" / "result.json")["accuracy"], abs=1e-3)
    image = next((tree / "test" / "disc").iterdir())  # in colour, 32 x 32, whatever the network takes
    assert len(as_json(capsys, tmp_path / "run", image)["predictions"]) == 1
    assert main(PredictConfig(run=tmp_path / "run", export=tmp_path / "net", device="cpu")) == 0


def started(run: Path, *words: object, **variables: str) -> Any:
    return execute([sys.executable, str(ROOT / "trainers" / "predict.py"), "--run", str(run), "--device", "cpu",
                    *map(str, words)], **variables)


def test_bad_files_are_listed_after_the_results_of_the_others(run: Path, tree: Path, tmp_path: Path,
                                                              capsys: pytest.CaptureFixture[str]):
    good = Path(shutil.copy(next((tree / "test" / "disc").iterdir()), tmp_path / ".hidden"))
    (tmp_path / "spoiled.png").write_bytes(b"no image")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    bad = [tmp_path / name for name in ("spoiled.png", "dangling.jpg", "absent.png")]
    for json_wanted in (False, True):
        with pytest.raises(DataError, match=r"spoiled\.png: not readable as an image .*; so are 2 others, named above"):
            main(PredictConfig(run=run, images=(*bad[:1], good, *bad[1:]), device="cpu", json=json_wanted,
                               picture=tmp_path / f"{json_wanted}.png"))
        said = capsys.readouterr()
        assert [line.split(": ")[1] for line in said.err.splitlines()] == list(map(str, bad))
        assert (tmp_path / f"{json_wanted}.png").exists()
        if json_wanted:
            content = json.loads(said.out)
            assert list(content["unreadable"]) == list(map(str, bad))
            assert [each["image"] for each in content["predictions"]] == [str(good)]
        else:
            assert said.out.startswith(str(good))


@pytest.mark.slow
def test_results_that_have_no_room_are_an_error(run: Path, tree: Path):
    words = [sys.executable, str(ROOT / "trainers" / "predict.py"), "--run", str(run), str(tree / "test")]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, env=environment(), timeout=60, text=True)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr
    assert ended.stderr.startswith("ERROR usage: stdout: cannot be written (No space left on device)")


@pytest.mark.slow
def test_variables_that_a_launcher_has_left_do_not_silence_an_error(run: Path, tree: Path):
    ended = started(run, tree / "test", RANK="1", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="x")
    assert (ended.code, len(ended.errors)) == (2, 1), ended.err


@pytest.mark.slow
def test_a_slow_reader_gets_every_result(run: Path, tree: Path):
    words = [sys.executable, str(ROOT / "trainers" / "predict.py"), "--run", str(run), str(tree / "test"), "--json"]
    reading, writing = os.pipe()
    fcntl.fcntl(writing, 1031, 4096)  # F_SETPIPE_SZ: the least
    with subprocess.Popen(words, stdout=writing, env=environment()) as process, open(reading, "rb") as file:
        os.close(writing)
        wait_until(lambda: struct.unpack("i", fcntl.ioctl(file, termios.FIONREAD, bytes(4)))[0] == 4096, 60)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2 * PATIENCE_SECONDS)  # what is tested: longer than lines of a training run wait
        assert len(json.loads(file.read())["predictions"]) == NUM_TEST


def test_results_are_printed_before_a_picture_that_cannot_be_drawn(run: Path, tree: Path, tmp_path: Path,
                                                                   capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--picture"):
        main(PredictConfig(run=run, images=(tree / "test",), device="cpu", picture=tmp_path / "file" / "x.png"))
    assert "accuracy" in capsys.readouterr().out
    (run / "predict.png").mkdir()
    assert main(PredictConfig(run=run, images=(tree / "test",), device="cpu")) == 0
    assert capsys.readouterr().err.count("WARNING picture") == 1


@pytest.mark.timeout(100)
@pytest.mark.parametrize("encoding", ["ascii", pytest.param("latin-1", marks=pytest.mark.slow),
                                      pytest.param("cp1252:strict", marks=pytest.mark.slow)])
def test_a_name_that_the_output_cannot_show_is_an_escape(run: Path, tree: Path, tmp_path: Path, encoding: str):
    image = Path(shutil.copy(next((tree / "test" / "disc").iterdir()), tmp_path / "\u732b.png"))
    ended = started(run, image, tmp_path / "\u732b\u732b.png", PYTHONIOENCODING=encoding)
    assert (ended.code, len(ended.errors)) == (3, 1), ended.err
    assert ended.out.startswith(str(tmp_path / r"\u732b.png") + "  ")
    assert r"\u732b\u732b.png: no such file" in ended.errors[0]


@pytest.mark.parametrize("change", [
    "{", "[]", "null", '"text"', "{}", {"class_names": None}, {"class_names": [1, 2]}, {"class_names": "abc"},
    {"class_names": []}, {"class_names": ["a", "a"]}, {"mean": ["x", 1, 2]}, {"mean": 5}, {"mean": [0.5, 0.5]},
    {"std": [0, 1, 1]}, {"std": [0.5]}, {"std": [1e999] * 3}, {"image_size": [32]}, {"image_size": [0, 0]},
    {"image_size": "40"}, {"fit": "stretch"}, {"fit": ["crop"]}, {"trainer": 5}, {"trainer": "../x"},
    {"model": ["net"]}, {"model": "nett"}, {"options": [1]}, {"options": {"width": "wide"}}, {"unknown": 1},
    {"class_names": ["a", "b"]}, {"options": 5}, {"resize_size": "x"}, {"interpolation": 3},
])
def test_an_odd_model_json_is_one_line(run: Path, tree: Path, change: Any):
    path = run / "model.json"
    path.write_text(change if isinstance(change, str) else json.dumps({**read_json(path), **change}))
    with pytest.raises(CheckpointError, match=r"--run|model\.json"):
        main(PredictConfig(run=run, images=(tree / "test" / "disc",), device="cpu"))


def test_a_trainer_that_is_none_is_one_line_too(run: Path):
    for trainer in ("nothing", "models", "predict"):
        (run / "model.json").write_text(json.dumps({**read_json(run / "model.json"), "trainer": trainer}))
        with pytest.raises(CheckpointError, match=rf"model\.json: {trainer} is no trainer"):
            main(PredictConfig(run=run, test_images=3, device="cpu"))


def test_the_test_set_of_another_folder_is_compared_by_name(run: Path, tree: Path, tmp_path: Path,
                                                            capsys: pytest.CaptureFixture[str]):
    for name in ("saltire", "bars"):
        shutil.copytree(tree / "test" / name, tmp_path / "data" / "test" / name)
    said = as_json(capsys, run, test_images=100, data_dir=tmp_path / "data")
    assert {each["true_class"] for each in said["predictions"]} == {"saltire", "bars"}
    whole = as_json(capsys, run, tree / "test" / "saltire", tree / "test" / "bars")
    assert said["accuracy"] == whole["accuracy"]
    (tmp_path / "data" / "test" / "bars").rename(tmp_path / "data" / "test" / "wolf")
    with pytest.raises(DataError, match=r"wolf: no such class in the checkpoint, which knows bars, checks"):
        main(PredictConfig(run=run, test_images=9, device="cpu", data_dir=tmp_path / "data"))
