"""What a run remembers of its epochs: each once, with its evaluation, however often the run was interrupted."""

import signal
from pathlib import Path

import pytest
import torch

from tests.helpers.comparing import run_in
from tests.helpers.hooks import at, send
from tests.helpers.processes import metrics, newest_checkpoint, read_json
from trainers.engine.history import History
from trainers.engine.metrics import Evaluation


def evaluation(*, loss: float, correct: int | None) -> Evaluation:
    """Of ten samples in two classes, or without classes."""
    return Evaluation(loss=loss, num_samples=10,
                      confusion_matrix=None if correct is None else [[correct, 10 - correct], [0, 0]])


def record(history: History, step: int, found: Evaluation | None) -> bool:
    return history.record(epoch=step, step=step, train_loss=1.0, train_accuracy=None, evaluation=found)


def test_the_best_epoch_has_the_highest_accuracy_or_without_classes_the_lowest_loss() -> None:
    history = History()
    assert [record(history, step, found) for step, found in enumerate([
        evaluation(loss=1.0, correct=6), None, evaluation(loss=0.5, correct=5), evaluation(loss=2.0, correct=7),
    ])] == [True, False, False, True]
    assert history.best == {"accuracy": 0.7, "accuracy_top5": None, "loss": 2.0, "step": 3}
    regression = History()
    assert [record(regression, step, evaluation(loss=loss, correct=None))
            for step, loss in enumerate([1.0, 2.0, 0.5])] == [True, False, True]


def test_the_speed_is_that_since_the_last_report_and_a_resumed_run_begins_with_its_own() -> None:
    history = History()
    history.load_state({"epochs": [], "train_seconds": 100.0}, best=None)
    for samples, seconds in ((50, 5.0), (80, 1.0)):
        history.samples_here += samples
        history.train_seconds += seconds
        assert history.lap_samples_per_second() == pytest.approx(samples / seconds)
    history.start_clock()
    history.pause_clock(torch.device("cpu"))
    assert 106 < history.train_seconds < 107


@pytest.mark.timeout(120)
def test_an_interrupted_last_evaluation_is_made_up_for_and_every_epoch_is_recorded_once(tmp_path: Path) -> None:
    for code, flags, hook, evaluated in [(75, [], at(20, "evaluate", send(signal.SIGTERM)), [10]),
                                         (0, [], (), [10, 20]), (0, ["--epochs", "3"], (), [10, 20, 30])]:
        assert run_in(tmp_path, *flags, hook=hook).codes == [code]
        assert [step for split, step in metrics(tmp_path / "r", "split", "step") if split == "test"] == evaluated
    epochs = newest_checkpoint(tmp_path / "r")["history"]["epochs"]
    assert [(line["epoch"], line["step"]) for line in epochs] == [(0, 10), (1, 20), (2, 30)]
    assert epochs[-1]["test_accuracy"] == read_json(tmp_path / "r" / "result.json")["accuracy"]
    assert None not in [line["test_accuracy"] for line in epochs]
