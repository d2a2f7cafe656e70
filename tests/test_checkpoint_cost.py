"""What training waits for a checkpoint of 96 MiB, beside a plain synchronous save of the same state."""

import os
import statistics
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers.processes import read_json
from tests.helpers.server import run
from trainers.engine.checkpoints.save import Checkpointer
from trainers.engine.checkpoints.snapshot import tensors_in
from trainers.engine.run.folder import RunFolder

MOST_SECONDS = 0.010  # for 96 MiB
MOST_SHARE = 0.035  # of run time, with a checkpoint an epoch
LAYERS, WIDTH, BATCH = 12, 1024, 192  # 48 MiB of weights, as much momentum; a step of some 0.1 s on two cores


class Training:
    """A loop with the order of calls of engine/trainer.py."""

    def __init__(self, folder: RunFolder, layers: int) -> None:
        self.model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-6, momentum=0.9)
        self.inputs, self.number = torch.randn(BATCH, WIDTH), 0
        self.checkpointer = Checkpointer(folder, keep=1)
        self.step()
        self.checkpointer.prepare(self.state())
        self.step()

    def step(self) -> None:
        self.model(self.inputs).square().mean().backward()
        if self.number:
            self.checkpointer.finish_copy()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.number += 1

    def state(self) -> dict[str, object]:
        return {"model": self.model.state_dict(keep_vars=True), "optimizer": self.optimizer.state_dict(),
                "step": self.number, "epoch": 0, "fingerprint": {}}


def save_plainly(state: dict[str, object], path: Path) -> float:
    began = time.perf_counter()
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - began


def measure(tmp_path: Path, *, layers: int, repeats: int) -> tuple[list[float], list[float], float]:
    """Seconds that training waits for each save, those of plain saves in between, and MiB of the state."""
    folder = RunFolder(tmp_path / "run", is_main=True)
    folder.checkpoints.mkdir(parents=True)
    training, waited, plain = Training(folder, layers), [], []
    for _ in range(repeats):
        before = training.checkpointer.wait_seconds
        training.checkpointer.save(training.state())
        training.step()
        training.step()
        waited.append(training.checkpointer.wait_seconds - before)
        training.checkpointer.wait()
        plain.append(save_plainly(training.state(), tmp_path / "plain.pt"))
    return waited, plain, sum(each.nbytes for _, each in tensors_in(training.state())) / 2**20


def show(waited: list[float], plain: list[float], mebibytes: float) -> None:
    def milliseconds(values: list[float]) -> str:
        return f"median {1000 * statistics.median(values):.1f} ms, {1000 * min(values):.1f} to {1000 * max(values):.1f}"
    print(f"{mebibytes:.0f} MiB: training waits {milliseconds(waited)} (first {1000 * waited[0]:.1f}); "
          f"a plain synchronous save takes {milliseconds(plain)}")


def test_training_waits_far_less_than_for_a_plain_save(tmp_path: Path):
    waited, plain, mebibytes = measure(tmp_path, layers=3, repeats=5)
    show(waited, plain, mebibytes)
    assert statistics.median(waited) < 0.25 * statistics.median(plain)


@pytest.mark.long
def test_training_waits_at_most_10_ms_for_96_mebibytes(tmp_path: Path):
    waited, plain, mebibytes = measure(tmp_path, layers=LAYERS, repeats=15)
    show(waited, plain, mebibytes)
    assert mebibytes == 96
    assert statistics.median(waited) <= MOST_SECONDS


@pytest.mark.long
def test_training_waits_at_most_3_and_a_half_percent_of_a_run_at_the_default_interval(tmp_path: Path):
    finished = run("cifar", "--dataset", "synthetic", "--epochs", 3, "--threads", 1, "--no-pictures", "--output-dir",
                     tmp_path, "--run-name", "run", timeout=280, launcher="python")
    assert finished.code == 0, finished.err
    result = read_json(tmp_path / "run" / "result.json")
    share = result["checkpoint_wait_seconds"] / result["total_seconds"]
    print(f"training waited for its checkpoints {100 * share:.2f} % of {result['total_seconds']:.0f} s")
    assert result["num_checkpoints"] == 3
    assert share <= MOST_SHARE
