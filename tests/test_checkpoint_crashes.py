"""Checkpoints that are killed at random while they are saved, stopped between any two system calls, or damaged."""

import hashlib
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers.checkpoints import is_whole, kill_while_saving, save, save_by_protocol, save_plainly, state_of
from tests.helpers.disk import Disk, record
from trainers.engine.checkpoints.files import give_name, manifest_path, prune
from trainers.engine.checkpoints.load import load_verified, newest_good
from trainers.engine.checkpoints.save import write_checkpoint
from trainers.engine.resume import choose_checkpoint
from trainers.engine.run.folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run", is_main=True)
    folder.checkpoints.mkdir(parents=True)
    return folder


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
    give_name(write_checkpoint(run.checkpoints, state_of(step, num_tensors=5)), "best")
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
