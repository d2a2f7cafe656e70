"""Writing and keeping checkpoints: what is kept and what swept, what is refused, and what a save costs."""

import os
import resource
import shutil
import threading
from pathlib import Path
from typing import BinaryIO
from unittest.mock import patch

import pytest
import torch

from launch.errors import CheckpointError, NumericError
from tests.helpers.checkpoints import save, state_of
from trainers.engine.checkpoints import save as checkpoint
from trainers.engine.checkpoints.files import sweep
from trainers.engine.checkpoints.load import load_verified, newest_good
from trainers.engine.checkpoints.save import Checkpointer, write_checkpoint
from trainers.engine.checkpoints.snapshot import Snapshot
from trainers.engine.resume import choose_checkpoint
from trainers.engine.run.folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run", is_main=True)
    folder.checkpoints.mkdir(parents=True)
    return folder


def names(run: RunFolder) -> list[str]:
    return sorted(path.name for path in run.checkpoints.iterdir())


def test_only_the_newest_are_kept_and_the_best(run: RunFolder):
    save(run, 1, 2, 3, 4, 5, keep=2)
    assert names(run) == ["best.json", "best.pt", "step-00000004.json", "step-00000004.pt", "step-00000005.json",
                          "step-00000005.pt"]
    assert load_verified(run.checkpoints / "best.pt")["step"] == 3


def test_a_damaged_newer_checkpoint_does_not_push_good_ones_out(run: RunFolder):
    save(run, 1, 2, keep=2)
    (run.checkpoints / "step-00000002.pt").write_bytes(b"damaged")
    assert choose_checkpoint("auto", run).name == "step-00000001.pt"
    save(run, 1, keep=1)
    assert newest_good(run.checkpoints).path.name == "step-00000001.pt"
    assert "step-00000002.pt.damaged" in names(run)


def test_what_killed_saves_left_is_swept(run: RunFolder):
    save(run, 1)
    for name in (".step-00000002.pt.17.tmp", ".step-00000002.json.17.tmp", "step-00000002.pt"):
        (run.checkpoints / name).write_bytes(b"unfinished")
    sweep(run.checkpoints)
    assert names(run) == ["step-00000001.json", "step-00000001.pt"]


def test_checkpoints_whose_manifests_were_lost_are_not_swept_away(run: RunFolder, capsys: pytest.CaptureFixture[str]):
    save(run, 1)
    (run.checkpoints / "step-00000001.json").unlink()
    assert choose_checkpoint("auto", run) is None
    assert names(run) == ["step-00000001.pt"]
    assert capsys.readouterr().err.count("WARNING") == 1


def test_weights_that_are_not_finite_are_refused_and_the_last_good_checkpoint_is_kept(run: RunFolder):
    save(run, 1, keep=1)
    broken = state_of(2)
    broken["model"]["part2"][3] = float("nan")
    checkpointer = Checkpointer(run, keep=1)
    checkpointer.save(broken)
    with pytest.raises(NumericError, match=r"step 2: model.part2 is not finite"):
        checkpointer.join()
    assert names(run) == ["step-00000001.json", "step-00000001.pt"]


def test_a_disk_without_room_is_found_out_before_anything_is_written(run: RunFolder):
    save(run, 1)
    full = shutil.disk_usage(run.path)._replace(free=2**20)
    with patch("shutil.disk_usage", lambda path: full), pytest.raises(CheckpointError, match=r"free some space"):
        Checkpointer(run, keep=2).save(state_of(2))
    assert names(run) == ["step-00000001.json", "step-00000001.pt"]


def test_a_write_that_the_system_refuses_is_reported_and_leaves_no_file(run: RunFolder):
    save(run, 1)
    checkpointer = Checkpointer(run, keep=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # bytes a file; python ignores SIGXFSZ
    try:
        checkpointer.save(state_of(2, size=4000))
        with pytest.raises(CheckpointError, match=r"cannot be written \(.*File too large"):
            checkpointer.join()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(run) == ["step-00000001.json", "step-00000001.pt"]


def test_what_is_read_back_is_compared_with_what_was_written(run: RunFolder):
    real = checkpoint.forget_cached

    def damage_on_disk(file: BinaryIO) -> None:
        os.pwrite(file.fileno(), b"?", 200)
        real(file)

    with (patch.object(checkpoint, "forget_cached", damage_on_disk),
          patch.object(checkpoint, "open", lambda path, mode: open(path, "w+b" if mode == "wb" else mode), create=True),
          pytest.raises(CheckpointError, match=r"differs from what was written")):
        write_checkpoint(run.checkpoints, state_of(1))
    assert names(run) == []


def test_a_process_that_was_cut_off_writes_nothing_more(run: RunFolder):
    def fenced() -> None:
        raise CheckpointError("a later incarnation owns this run")

    with pytest.raises(CheckpointError, match="later incarnation"):
        write_checkpoint(run.checkpoints, state_of(1), check_fence=fenced)
    assert names(run) == []


def test_the_snapshot_holds_the_moment_of_the_save_though_training_goes_on(run: RunFolder):
    checkpointer, model = Checkpointer(run, keep=2), torch.nn.BatchNorm1d(8)
    model.running_mean.fill_(1)
    forward_pass, copy_rest = threading.Event(), Snapshot.copy_rest

    def copy_late(snapshot: Snapshot) -> None:
        forward_pass.wait(timeout=30)
        copy_rest(snapshot)

    with patch.object(Snapshot, "copy_rest", copy_late):
        checkpointer.save({**state_of(1), "model": model.state_dict(keep_vars=True)})
        model.running_mean.fill_(2)  # as a forward pass does at once
        forward_pass.set()
        checkpointer.finish_copy()
    with torch.no_grad():
        model.weight.fill_(3)  # as the optimizer does after finish_copy
    checkpointer.join()
    saved = load_verified(run.checkpoints / "step-00000001.pt")["model"]
    assert saved["running_mean"].unique().tolist() == [1.0]
    assert saved["weight"].unique().tolist() == [1.0]
    assert type(saved["weight"]) is torch.Tensor


@pytest.mark.parametrize("tensor", [
    torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last), torch.arange(6.0).reshape(2, 3).t(),
    torch.arange(8.0)[::2], torch.ones(1).expand(3), torch.tensor(3), torch.arange(4).bfloat16(), torch.zeros(0),
], ids=["channels last", "transposed", "strided", "expanded", "scalar", "bfloat16", "empty"])
def test_tensors_of_any_layout_are_saved_with_their_values(run: RunFolder, tensor: torch.Tensor):
    for step in (1, 2):  # the second into memory that is used again
        write = Checkpointer(run, keep=2)
        write.prepare({**state_of(step), "ema": {"t": tensor}})
        write.save({**state_of(step), "ema": {"t": tensor}})
        write.join()
        saved = load_verified(run.checkpoints / f"step-0000000{step}.pt")["ema"]["t"]
        assert saved.dtype == tensor.dtype
        assert torch.equal(saved, tensor)
