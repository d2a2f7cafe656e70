"""Power cuts, on an ext4 of its own that is shut down without writing its journal, and mounted again."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.comparing import outcome, run_in
from tests.helpers.faults import Fault, check
from tests.helpers.hooks import at, power_cut, unsyncable_folders
from trainers.engine.checkpoints.load import load_verified, newest_good

pytestmark = pytest.mark.timeout(120)


class Ext4:
    """A file system in a file, mounted."""

    def __init__(self, folder: Path) -> None:
        self.image, self.path = folder / "disk.img", folder / "disk"

    def make(self) -> None:
        """Raises CalledProcessError or FileNotFoundError where this machine does not allow it."""
        self.path.mkdir()
        with open(self.image, "wb") as file:
            file.truncate(64 * 2**20)
        subprocess.run(["mkfs.ext4", "-q", "-F", self.image], check=True, capture_output=True)
        self.mount()

    def mount(self) -> None:
        # a journal that is written every five minutes: nothing but an fsync puts anything on the disk
        subprocess.run(["mount", "-o", "loop,commit=300", self.image, self.path], check=True, capture_output=True)

    def unmount(self) -> None:
        subprocess.run(["umount", self.path], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Ext4]:
    disk = Ext4(tmp_path)
    try:
        disk.make()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs root, mkfs.ext4 and a loop device: {error}")
    yield disk
    if os.path.ismount(disk.path):
        disk.unmount()


@pytest.mark.parametrize("step", [8, pytest.param(13, marks=pytest.mark.slow)])
def test_a_power_cut_leaves_a_whole_checkpoint_and_every_line_up_to_it(tmp_path: Path, disk: Ext4, step: int) -> None:
    ended = run_in(tmp_path / "logs", "--output-dir", disk.path, hook=at(step, "optimizer", power_cut(str(disk.path))))
    assert ended.codes == [-9]
    disk.unmount()
    disk.mount()
    run = disk.path / "r"
    found = newest_good(run / "checkpoints")
    assert found.state is not None
    assert found.damaged == {}
    at_least = (step - 1) // 3 * 3  # saved every three steps; the save before is over when the next begins
    assert found.state["step"] >= at_least - 3
    lines = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_bytes().split(b"\n")
             if line.startswith(b"{") and line.endswith(b"}")]
    assert {number for number in lines if number <= found.state["step"]} == set(range(1, found.state["step"] + 1))
    check(run_in(tmp_path / "logs", "--output-dir", disk.path), Fault(name="resumed"))
    shutil.copytree(run, tmp_path / "resumed" / "r")
    assert run_in(tmp_path / "whole").codes == [0]
    assert outcome(tmp_path / "resumed") == outcome(tmp_path / "whole")


def test_a_power_cut_in_a_resumed_run_leaves_the_lines_of_before(tmp_path: Path, disk: Ext4) -> None:
    flags = ("--output-dir", disk.path)
    assert run_in(tmp_path / "logs", *flags, "--max-steps", 9).codes == [0]
    cut = at(9, "optimizer", power_cut(str(disk.path)))  # in the first step of this process, before any save of it
    assert run_in(tmp_path / "logs", *flags, hook=cut).codes == [-9]
    disk.unmount()
    disk.mount()
    state = newest_good(disk.path / "r" / "checkpoints").state
    assert state is not None
    assert state["step"] == 9
    text = (disk.path / "r" / "metrics.jsonl").read_text()
    assert {json.loads(line)["step"] for line in text.splitlines()} == set(range(1, 10))


@pytest.mark.parametrize("error", ["EINVAL", pytest.param("ENOTSUP", marks=pytest.mark.slow)])
def test_a_file_system_that_cannot_sync_folders_costs_one_warning(tmp_path: Path, error: str) -> None:
    ended = run_in(tmp_path, hook=unsyncable_folders(error))
    check(ended, Fault(name="unsyncable"))
    assert [line[:19] for line in ended.err.splitlines() if "WARNING" in line] == ["WARNING checkpoint:"]
    assert "free some space" not in ended.err
    assert load_verified(tmp_path / "r" / "checkpoints" / "best.pt")["format"] == 1
