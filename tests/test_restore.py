"""Going on from checkpoints: which one, what is refused, and what users see; with real runs of a tiny network."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from launch.errors import CheckpointError
from tests.helpers import server
from tests.helpers.checkpoints import state_of
from tests.helpers.hooks import change_folder
from tests.helpers.processes import TINY, Ended, metrics, read_json
from trainers.engine.checkpoints import save as checkpoint
from trainers.engine.checkpoints.files import manifest_path
from trainers.engine.checkpoints.load import Damaged, check_fits, load_or_fail, load_verified, newest_good
from trainers.engine.checkpoints.save import Checkpointer, write_checkpoint
from trainers.engine.resume import choose_checkpoint
from trainers.engine.run.folder import RunFolder

STEPS = ["--checkpoint-every", "4", "--keep-checkpoints", "3"]
LONGER = [*TINY, *STEPS, "--max-steps", "16"]


def run_tiny(output_dir: Path, name: str, *flags: object, ranks: int | None = None) -> Ended:
    return server.run("cifar", *TINY, *STEPS, "--max-steps", 12, "--output-dir", output_dir, "--run-name", name, *flags,
                  ranks=ranks)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps with checkpoints at 4, 8 and 12."""
    output_dir = tmp_path_factory.mktemp("original")
    assert run_tiny(output_dir, "run").code == 0
    return output_dir / "run"


@pytest.fixture(scope="module")
def resumed_run(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, whole, resumed to step 16."""
    output_dir = tmp_path_factory.mktemp("resumed_run")
    shutil.copytree(original, output_dir / "run")
    assert run_tiny(output_dir, "run", "--max-steps", 16).code == 0
    return output_dir / "run"


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    """A copy of the original for one test to spoil."""
    shutil.copytree(original, tmp_path / "run")
    return tmp_path / "run"


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_newest_checkpoint_costs_one_warning_and_no_bit_of_the_result(run: Path, resumed_run: Path):
    spoil(run / "checkpoints" / "step-00000012.pt")
    finished = run_tiny(run.parent, "run", "--max-steps", 16)
    assert finished.code == 0
    warnings = [line for line in finished.err.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 1
    assert "step-00000012.pt (its sha256 is not the manifest's)" in warnings[0]
    assert "from step-00000008.pt" in finished.out
    assert (run / "checkpoints" / "step-00000012.pt.damaged").exists()
    assert read_json(run / "result.json")["weights_sha256"] == read_json(resumed_run / "result.json")["weights_sha256"]
    assert metrics(run)[-1] == metrics(resumed_run)[-1]


def test_where_every_checkpoint_is_damaged_the_run_does_not_start_over(run: Path):
    paths = sorted((run / "checkpoints").glob("step-*.pt"))
    for path in paths:
        spoil(path)
    finished = run_tiny(run.parent, "run", "--max-steps", 16)
    assert finished.code == 4
    assert len(finished.errors) == 1
    assert "of 3 checkpoints none is whole; use --resume never" in finished.errors[0]
    assert "Traceback" not in finished.err
    assert sorted((run / "checkpoints").glob("step-*.pt")) == paths


def test_a_named_checkpoint_is_resumed_from_and_later_ones_are_renamed(run: Path, resumed_run: Path):
    finished = run_tiny(run.parent, "run", "--max-steps", 16, "--resume", run / "checkpoints" / "step-00000004.pt")
    assert finished.code == 0
    assert "from step-00000004.pt, step 4" in finished.out
    assert (run / "checkpoints" / "step-00000012.pt.superseded").exists()
    assert newest_good(run / "checkpoints").path.name == "step-00000016.pt"
    assert read_json(run / "result.json")["weights_sha256"] == read_json(resumed_run / "result.json")["weights_sha256"]
    steps = [step for (step,) in metrics(run, "step")]
    assert steps == sorted(steps)


def test_a_checkpoint_of_another_model_or_optimizer_is_refused_with_its_differences(run: Path):
    finished = run_tiny(run.parent, "other", "--width", 8, "--resume", run / "checkpoints" / "best.pt")
    assert finished.code == 4
    assert len(finished.errors) == 1
    assert "conv1.weight is (6, 3, 5, 5) in the checkpoint and (8, 3, 5, 5) in the model" in finished.errors[0]
    assert "conv2.weight" in finished.errors[0]
    assert "Traceback" not in finished.err


def test_ranks_that_would_load_different_weights_stop_before_training(original: Path, tmp_path: Path):
    for rank in (0, 1):
        shutil.copytree(original, tmp_path / f"node{rank}" / "runs" / "run")
    other = tmp_path / "node1" / "runs" / "run" / "checkpoints"
    state = load_verified(other / "step-00000012.pt")
    state["model"]["conv1.bias"] += 1
    write_checkpoint(other, state)
    finished = server.run("cifar", *LONGER, "--run-name", "run", folder=tmp_path, ranks=2,
                          hook=change_folder("node{rank}"))
    assert set(finished.codes) <= {4, 6}
    assert 4 in finished.codes
    assert len(finished.errors) == 1
    assert "the ranks loaded different weights" in finished.errors[0]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_the_best_checkpoint_evaluates_to_what_the_run_reported_on_any_number_of_ranks(original: Path, tmp_path: Path,
                                                                                       ranks: int):
    finished = run_tiny(tmp_path, "evaluated", "--evaluate", original / "checkpoints" / "best.pt", "--max-steps", 100,
                        "--lr", 0.5, ranks=ranks)
    assert finished.code == 0, finished.err
    trained, evaluated = read_json(original / "result.json"), read_json(tmp_path / "evaluated" / "result.json")
    for name in ("confusion_matrix", "accuracy", "weights_sha256"):
        assert evaluated[name] == trained[name]
    assert evaluated["loss"] == pytest.approx(trained["loss"], rel=1e-6)
    assert not list((tmp_path / "evaluated" / "checkpoints").iterdir())


# From here on in this process, on made-up states.


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run", is_main=True)
    folder.checkpoints.mkdir(parents=True)
    return folder


def write(folder: RunFolder, *steps: int, resume: str = "auto") -> None:
    for step in steps:
        write_checkpoint(folder.checkpoints, {**state_of(step), "config": {"resume": resume}})


def test_the_same_path_given_again_goes_on_where_the_run_was(folder: RunFolder, tmp_path: Path):
    elsewhere = RunFolder(tmp_path / "elsewhere", is_main=True)
    elsewhere.checkpoints.mkdir(parents=True)
    write(elsewhere, 5)
    path = elsewhere.checkpoints / "step-00000005.pt"
    write(folder, 7)
    assert choose_checkpoint(str(path), folder) == path
    write(folder, 6, resume=str(path))
    assert choose_checkpoint(str(path), folder).name == "step-00000006.pt"
    assert (folder.path / "before-0-checkpoints" / "step-00000007.pt").exists()


def test_never_starts_over_but_a_restart_of_the_same_job_goes_on(folder: RunFolder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    state = state_of(3)
    state["fingerprint"] |= {"job": "torchrun-job", "restart": 0}
    write_checkpoint(folder.checkpoints, state)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert choose_checkpoint("never", folder).name == "step-00000003.pt"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert choose_checkpoint("never", folder) is None
    assert not list(folder.checkpoints.iterdir())


def test_a_named_checkpoint_that_is_missing_changes_nothing_on_disk(folder: RunFolder):
    write(folder, 1, 2)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        choose_checkpoint(str(folder.checkpoints / "step-00000003.pt"), folder)
    assert newest_good(folder.checkpoints).path.name == "step-00000002.pt"


SPOILT = {
    "lacks optimizer": lambda state: state.pop("optimizer"),
    "format 2, this code reads 1": lambda state: state.update(format=2),
    "model.part1 is not dense and finite": lambda state: state["model"]["part1"].fill_(float("inf")),
    "model.part0 is not dense and finite": lambda state: state["model"].update(part0=torch.eye(3).to_sparse()),
}


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize("message", SPOILT)
def test_a_file_that_is_intact_but_no_state_of_ours_is_refused(folder: RunFolder, message: str,
                                                               monkeypatch: pytest.MonkeyPatch):
    state = state_of(1)
    SPOILT[message](state)
    monkeypatch.setattr(checkpoint, "not_finite", lambda tree: None)
    path = write_checkpoint(folder.checkpoints, state)
    with pytest.raises(Damaged, match=message):
        load_verified(path)


def test_a_file_with_more_than_tensors_and_plain_values_is_refused_unread(folder: RunFolder):
    path = write_checkpoint(folder.checkpoints, {**state_of(1), "history": Surprise()})
    with pytest.raises(Damaged, match="cannot be read"):
        load_verified(path)
    assert not Surprise.ran


class Surprise:
    """Unpickling this would run code."""

    ran = False

    def __reduce__(self) -> tuple[object, tuple[()]]:
        return surprise, ()


def surprise() -> dict[str, object]:
    Surprise.ran = True
    return {}


def test_a_manifest_of_another_state_is_noticed(folder: RunFolder):
    path = write_checkpoint(folder.checkpoints, state_of(12))
    manifest = json.loads(manifest_path(path).read_text())
    manifest_path(path).write_text(json.dumps({**manifest, "epoch": 7}, indent=2) + "\n")
    with pytest.raises(Damaged, match="describes another state"):
        load_verified(path)


def test_a_checkpoint_made_on_a_gpu_loads_without_one(folder: RunFolder, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patched:
        patched.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")  # as a GPU's tensors are marked
        path = write_checkpoint(folder.checkpoints, state_of(1))
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(path, weights_only=True)
    assert load_verified(path)["model"]["part0"].device.type == "cpu"


def test_another_data_set_or_batch_is_named(folder: RunFolder):
    state, model = state_of(1), nn.Linear(2, 2)
    state["model"], state["config"] = model.state_dict(), {"optimizer": "sgd"}
    check_fits(state, model, Path("x.pt"), config={"optimizer": "sgd"}, fingerprint=state["fingerprint"])
    with pytest.raises(CheckpointError) as refused:
        check_fits(state, model, Path("x.pt"), config={"optimizer": "adam"},
                   fingerprint={"dataset": "another", "global_batch_size": 4})
    assert "--optimizer was sgd and is adam; dataset was made up and is another; global_batch_size was 2 and is 4" \
        in str(refused.value)


def test_of_many_differences_the_first_three_are_named(folder: RunFolder):
    state = state_of(1)
    with pytest.raises(CheckpointError, match=r"weight is not in the checkpoint; bias is not .* and 3 more"):
        check_fits(state, nn.Linear(2, 2), Path("x.pt"))


def test_a_kill_between_the_two_links_of_the_best_is_mended_on_resume(folder: RunFolder):
    checkpointer = Checkpointer(folder, keep=1)
    checkpointer.save(state_of(3), is_best=True)
    checkpointer.save(state_of(6))
    checkpointer.join()
    best = folder.checkpoints / "best.pt"
    best.unlink()
    best.hardlink_to(folder.checkpoints / "step-00000006.pt")  # the manifest is still that of step 3
    with pytest.raises(CheckpointError):
        load_or_fail(best)
    choose_checkpoint("auto", folder)
    assert load_or_fail(best)["step"] == 6
