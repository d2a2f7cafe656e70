"""Thousands of classes: what is kept of an evaluation, printed and written stays small, and counts every sample."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from launch.stop import StopRequest
from trainers.engine.metrics import MOST_MATRIX_CLASSES, Evaluation, EvaluationSums
from trainers.engine.result import MOST_RESULT_CLASSES, result_text, write_matrix
from trainers.engine.run.folder import RunFolder

ALONE: Any = SimpleNamespace(backend=None)


def evaluate(num_classes: int, num_samples: int = 6000, batches: int = 3) -> tuple[Evaluation, torch.Tensor]:
    """An evaluation of made-up predictions, half of them right, and (true, predicted) labels of all samples."""
    generator = torch.Generator().manual_seed(num_classes)
    targets, guessed = torch.randint(num_classes, (2, num_samples), generator=generator)
    predicted = torch.where(torch.rand(num_samples, generator=generator) < 0.5, targets, guessed)
    sums = EvaluationSums(torch.device("cpu"), num_classes=num_classes)
    for true, label in zip(targets.chunk(batches), predicted.chunk(batches), strict=True):
        outputs = torch.zeros(len(true), num_classes)
        outputs[torch.arange(len(true)), label] = 1.0
        sums.update(torch.tensor(2.0), outputs, true)
    return sums.reduce(ALONE, StopRequest()), torch.stack([targets, predicted])


@pytest.mark.parametrize("num_classes", [2, 3, 200, MOST_MATRIX_CLASSES, MOST_MATRIX_CLASSES + 1, 5000])
def test_accuracy_is_the_share_of_all_samples_for_any_number_of_classes(num_classes: int) -> None:
    evaluation, (targets, predicted) = evaluate(num_classes)
    right = targets == predicted
    assert evaluation.num_samples == len(targets)
    assert evaluation.accuracy == right.double().mean().item()
    assert evaluation.loss == 2.0
    per_class = evaluation.per_class_accuracy
    assert per_class is not None
    assert len(per_class) == num_classes
    for label in (0, num_classes // 2, num_classes - 1):
        of_class = right[targets == label].double()
        assert per_class[label] == (of_class.mean().item() if len(of_class) else None)
    assert (evaluation.confusion_matrix is None) == (num_classes > MOST_MATRIX_CLASSES)


def test_the_sums_of_22_000_classes_fit_in_a_megabyte() -> None:
    assert EvaluationSums(torch.device("cpu"), num_classes=21_841).sums.nbytes < 2**20


@pytest.mark.parametrize("num_classes", [MOST_RESULT_CLASSES, 1000])
def test_a_large_matrix_goes_into_a_file_of_its_own(tmp_path: Path, num_classes: int) -> None:
    folder = RunFolder(tmp_path, is_main=True)
    evaluation, (targets, predicted) = evaluate(num_classes)
    expected = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(expected, (targets.numpy(), predicted.numpy()), 1)
    inside = write_matrix(folder, evaluation.confusion_matrix)
    if num_classes <= MOST_RESULT_CLASSES:
        assert inside == expected.tolist()
        assert not (tmp_path / "confusion_matrix.npz").exists()
    else:
        assert inside is None
        assert np.array_equal(np.load(tmp_path / "confusion_matrix.npz")["confusion_matrix"], expected)


def test_of_many_classes_the_worst_and_best_five_are_printed() -> None:
    matrix = [[0] * 1000 for _ in range(1000)]
    for label in range(999):  # the last class has no samples
        matrix[label][label] = label + 1
        matrix[label][(label + 1) % 1000] = 1000
    evaluation = Evaluation(loss=1.0, num_samples=sum(map(sum, matrix)), confusion_matrix=matrix)
    lines = result_text(evaluation, tuple(f"class{label}" for label in range(1000)), Path("runs/r")).splitlines()
    shown = [line.split()[0] for line in lines if line.startswith("  class")]
    assert shown == [f"class{label}" for label in (*range(5), *range(994, 999))]
    assert "1,000 classes" in "\n".join(lines)
    assert len(lines) < 16


@pytest.mark.parametrize("num_classes", [2, 20])
def test_of_few_classes_all_are_printed(num_classes: int) -> None:
    evaluation, _ = evaluate(num_classes)
    names = tuple(f"class{label}" for label in range(num_classes))
    lines = result_text(evaluation, names, Path("runs/r")).splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == list(names)
