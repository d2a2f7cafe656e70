"""Writing checkpoints: killed at random, stopped between any two system calls, damaged, and timed."""

import hashlib
import os
import random
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO
from unittest.mock import patch

import pytest
import torch

from launch.command_line import CheckpointError, NumericError
from launch.run_folder import RunFolder
from tests.checkpoint_support import BEST_EVERY, is_whole, kill_while_saving, save_by_protocol, save_plainly, state_of
from tests.recorded_files import Disk, record
from trainers.engine import checkpoint
from trainers.engine.checkpoint import Checkpointer, write_checkpoint
from trainers.engine.restore import load_verified, newest_good
from trainers.engine.resume import choose_checkpoint
from trainers.engine.retention import link_best, manifest_path, prune, sweep
from trainers.engine.snapshot import Snapshot


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run", is_main=True)
    folder.checkpoints.mkdir(parents=True)
    return folder


def save(run: RunFolder, *steps: int, keep: int = 2) -> None:
    checkpointer = Checkpointer(run, keep=keep)
    for step in steps:
        checkpointer.save(state_of(step), is_best=step % BEST_EVERY == 0)
    checkpointer.join()


def names(run: RunFolder) -> list[str]:
    return sorted(path.name for path in run.checkpoints.iterdir())


def loads(path: Path) -> bool:
    try:
        return is_whole(torch.load(path, weights_only=True))
    except (OSError, RuntimeError, EOFError, KeyError):
        return False


@pytest.mark.timeout(240)
@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_of_saving_leaves_the_newest_or_the_previous_checkpoint(run: RunFolder, kills: int):
    rng, step = random.Random(kills), 1
    for _ in range(kills):
        last = kill_while_saving(save_by_protocol, run.path, step, rng)
        found = choose_checkpoint("auto", run)
        state = load_verified(found)
        assert is_whole(state)
        assert state["step"] in (last, last + 1)
        assert not list(run.checkpoints.glob("*.damaged"))
        if best := (state["best"] or {}).get("step"):
            assert load_verified(run.checkpoints / "best.pt")["step"] == best
        step = state["step"] + 1


@pytest.mark.timeout(240)
@pytest.mark.parametrize("kills", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_the_control_with_plain_torch_save_loses_checkpoints_to_the_same_kills(run: RunFolder, kills: int):
    rng, lost = random.Random(kills), 0
    for _ in range(kills):
        kill_while_saving(save_plainly, run.path, 1, rng)
        lost += not loads(run.path / "latest.pt")
    print(f"plain torch.save: {lost} of {kills} kills left nothing that loads")
    assert lost > kills // 10


def after_every_crash(run: RunFolder, save_once: Callable[[], None], scratch: Path,
                      forget: str = "") -> Iterator[RunFolder]:
    """The run as each crash during `save_once` may leave it, on a disk that loses what was not synced."""
    disk = Disk({path.name: path.read_bytes() for path in run.checkpoints.iterdir()})
    with record(run.checkpoints) as calls:
        save_once()
    assert {call[0] for call in calls} >= {"create", "write", "fsync", "replace", "fsync folder"}
    seen = set()
    for call in [None, *calls]:
        if call is not None and call[0] != forget:
            disk.apply(call)
        for files in disk.after_crash():
            key = hashlib.sha256(repr(sorted(files.items())).encode()).digest()
            if key not in seen:
                seen.add(key)
                crashed = RunFolder(scratch / str(len(seen)), is_main=True)
                crashed.checkpoints.mkdir(parents=True)
                for name, data in files.items():
                    (crashed.checkpoints / name).write_bytes(data)
                yield crashed
                shutil.rmtree(crashed.path)
    print(f"{len(calls)} calls, {len(seen)} different states after a crash")


def write_again(run: RunFolder, step: int) -> None:
    """Another state of a step that was saved before, as after its evaluation."""
    link_best(write_checkpoint(run.checkpoints, state_of(step, num_tensors=5)))
    prune(run.checkpoints, keep=1)


SAVES = {
    "of the next step": (lambda run: save(run, 7, keep=1), {6, 7}),
    "of a best step, keeping two": (lambda run: save(run, 9, keep=2), {6, 9}),
    "of the same step again": (lambda run: write_again(run, 6), {6}),
}


@pytest.mark.parametrize("which", SAVES)
def test_a_crash_after_any_call_of_a_save_loses_neither_the_newest_nor_the_previous(run: RunFolder, tmp_path: Path,
                                                                                    which: str):
    save_once, allowed = SAVES[which]
    save(run, 5, 6, keep=2 if "two" in which else 1)
    found = set()
    for crashed in after_every_crash(run, lambda: save_once(run), tmp_path / "crashed"):
        state = load_verified(choose_checkpoint("auto", crashed))
        assert is_whole(state)
        assert load_verified(crashed.checkpoints / "best.pt")["step"] == state["best"]["step"]
        found.add(state["step"])
    assert found == allowed


def test_a_crash_after_any_call_of_the_first_save_leaves_it_or_nothing(run: RunFolder, tmp_path: Path):
    found = set()
    for crashed in after_every_crash(run, lambda: save(run, 1), tmp_path / "crashed"):
        path = choose_checkpoint("auto", crashed)
        found.add(path and load_verified(path)["step"])
    assert found == {None, 1}


@pytest.mark.parametrize("forgotten", ["fsync", "fsync folder"])
def test_a_save_that_forgot_to_sync_would_lose_everything_in_some_crash(run: RunFolder, tmp_path: Path, forgotten: str):
    save(run, 5, 6, keep=1)
    crashes = after_every_crash(run, lambda: save(run, 7, keep=1), tmp_path / "crashed", forget=forgotten)
    assert any(newest_good(crashed.checkpoints).state is None for crashed in crashes)


def damage(rng: random.Random, data: bytes) -> bytes:
    """One bit flipped, or the end cut off."""
    if rng.random() < 0.7:
        position = rng.randrange(len(data))
        return data[:position] + bytes([data[position] ^ 1 << rng.randrange(8)]) + data[position + 1 :]
    return data[: rng.randrange(len(data))]


def test_of_1000_bit_flips_and_truncations_none_loads_silently(run: RunFolder):
    save(run, 7, 8)
    rng, plainly = random.Random(0), 0
    newest, previous = run.checkpoints / "step-00000008.pt", run.checkpoints / "step-00000007.pt"
    for number in range(1000):
        victim = newest if number % 2 else manifest_path(newest)
        good = victim.read_bytes()
        victim.write_bytes(damage(rng, good))
        found = newest_good(run.checkpoints)
        assert (found.path, list(found.damaged)) == (previous, [newest])
        plainly += victim == newest and loads_something(newest)
        victim.write_bytes(good)
    print(f"torch.load alone reads {plainly} of the 500 damaged checkpoint files")
    assert plainly > 50
    assert newest_good(run.checkpoints).path == newest


def loads_something(path: Path) -> bool:
    try:
        torch.load(path, weights_only=True)
    except Exception:
        return False
    return True


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
