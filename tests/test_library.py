"""torchrun_trainers: the two examples of README.md, run from anywhere, killed and resumed; and what it says."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from datasets.samples import Splits
from launch.errors import UsageError
from tests.helpers import server
from tests.helpers.processes import PROGRAMS, ROOT, execute, newest_checkpoint, wait_until
from torchrun_trainers import Checkpoints, World, check_workers

EXAMPLES = {"library_train": 20, "library_loop": 40}  # and how many lines each may have


def start(name: str, folder: Path, ranks: int) -> server.Job:
    """An example as it stands, in a folder of its own; the module is found as an installed one is."""
    return server.start(str(PROGRAMS / f"{name}.py"), folder=folder, ranks=None if ranks == 1 else ranks,
                        launcher="python" if ranks == 1 else "fork", PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")


def finish(name: str, folder: Path, ranks: int) -> None:
    with start(name, folder, ranks) as job:
        ended = job.wait()
    assert ended.codes == [0] * ranks, ended.err


def kill_at_a_checkpoint(name: str, folder: Path, ranks: int) -> None:
    """Kill -9 every rank, as a job does at its end, once the second checkpoint is committed."""
    with start(name, folder, ranks) as job:
        wait_until(lambda: len([*folder.rglob("step-*.json")]) >= 2, 60, lambda: job.text("err"), every=0.001)


def weights_in(folder: Path) -> dict[str, Any]:
    path = sorted(folder.rglob("step-*.pt"))[-1].parent
    state = newest_checkpoint(path.parent) if path.name == "checkpoints" else newest_in(path)
    return {name: tensor.tolist() for name, tensor in state["model"].items()} | {"step": state["step"]}


def newest_in(folder: Path) -> dict[str, Any]:
    return torch.load(sorted(folder.glob("step-*.pt"))[-1], weights_only=True)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["library_train", pytest.param("library_loop", marks=pytest.mark.slow)])
def test_an_example_of_the_readme_killed_and_resumed_ends_as_one_never_killed(tmp_path: Path, name: str,
                                                                              ranks: int) -> None:
    finish(name, tmp_path / "whole", ranks)
    kill_at_a_checkpoint(name, tmp_path / "killed", ranks)
    finish(name, tmp_path / "killed", ranks)
    assert weights_in(tmp_path / "killed") == weights_in(tmp_path / "whole")
    assert weights_in(tmp_path / "whole")["step"] == 60


def test_a_loop_of_ones_own_resumes_from_its_newest_checkpoint_that_is_whole(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    checkpoints, weights = Checkpoints(tmp_path, World()), []
    for step in (1, 2):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        weights.append(model.weight.tolist())
        checkpoints.save(model, optimizer, step=step, epoch=0, samples_consumed=8 * step)
    for step, spoil in ((2, False), (1, True)):
        if spoil:
            (tmp_path / "step-00000002.pt").write_bytes(b"cut off")
        with torch.no_grad():
            model.weight.zero_()
        assert Checkpoints(tmp_path, World()).resume(model, optimizer) == (step, 0, 8 * step)
        assert model.weight.tolist() == weights[step - 1]
    assert capsys.readouterr().err.count("WARNING checkpoint: ") == 1


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_readme_shows_the_examples_as_they_are_run(name: str) -> None:
    text = (PROGRAMS / f"{name}.py").read_text()
    assert len(text.splitlines()) <= EXAMPLES[name]
    assert text.strip() in (ROOT / "README.md").read_text()


@pytest.mark.timeout(60)
def test_another_package_of_our_names_is_named(tmp_path: Path) -> None:
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "__init__.py").write_text("")
    code = f"import sys; sys.path.append({str(ROOT)!r}); import datasets, torchrun_trainers"
    done = execute([sys.executable, "-c", code], cwd=tmp_path, timeout=30)
    assert done.code == 1
    assert done.err.splitlines()[-1].startswith(
        f"ImportError: torchrun_trainers: another package called datasets is imported already ({tmp_path}/datasets)")


def test_workers_for_a_class_of_a_notebook_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(Dataset[int]):
        pass

    Own.__module__ = "__main__"
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))
    check_workers(Splits(Own(), Own()), 0)
    with pytest.raises(UsageError, match=r"workers=2: Own is defined in a notebook, .*; move it to a \.py file"):
        check_workers(Splits(Own(), Own()), 2)


@pytest.mark.timeout(60)
def test_an_error_in_a_program_of_the_library_is_one_line(tmp_path: Path) -> None:
    text = (PROGRAMS / "library_train.py").read_text().replace("torch.randn(8)", "torch.randn(8, generator=index)")
    (tmp_path / "mine.py").write_text(text)
    done = execute([sys.executable, "mine.py"], cwd=tmp_path, timeout=50, PYTHONPATH=str(ROOT))
    assert done.code == 2
    assert "Traceback" not in done.err
    assert "mine.py line 13: TypeError: " in done.err
    assert "(sample 0 of the training set)" in done.err
