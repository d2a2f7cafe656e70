"""--dry-run: what a run would take, and nothing kept."""

import re
from pathlib import Path

import pytest

from tests.helpers.server import NORMED, run

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize("ranks", [None, 2])
def test_a_dry_run_trains_saves_loads_and_keeps_nothing(tmp_path: Path, ranks: int | None) -> None:
    ended = run("cifar", *NORMED, "--output-dir", tmp_path / "runs", "--dry-run", folder=tmp_path, ranks=ranks)
    assert ended.code == 0, ended.err
    assert list(tmp_path.glob("**/*.pt")) == [] == list(tmp_path.glob(".dry-run-*"))
    assert not (tmp_path / "runs").exists()
    for line in (r"batch +60 = ", r"memory +[\d,]+ MiB", r"files +checkpoints of [\d.]+ MiB, up to 4 of them; [\d,]+",
                 r"time +about [\d,]+ s: 20 steps of [\d.e-]+ s", r"dry run +4 steps, a save and a load worked"):
        assert re.search(line, ended.out), (line, ended.out)


def test_a_dry_run_leaves_the_run_of_that_name_as_it_is_and_says_what_would_fail(tmp_path: Path) -> None:
    flags = (*NORMED, "--output-dir", tmp_path)
    assert run("cifar", *flags, folder=tmp_path).code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file()}
    assert run("cifar", *flags, "--lr", "0.01", "--dry-run", folder=tmp_path).code == 0
    assert {path: path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file()} == before
    ended = run("cifar", *flags, "--batch-size", "1000", "--dry-run", folder=tmp_path)
    assert ended.code == 3
    assert "the training set has only 600 samples" in ended.err
