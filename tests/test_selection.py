"""Which weights are the best, by what, when training ends early, and what the test set is for."""

from pathlib import Path

import pytest
import torch

from datasets.tensors import TensorDataset, hold_out
from launch.process_group import World
from launch.stop import StopRequest
from tests.helpers.comparing import run_in
from tests.helpers.images import write_tree
from tests.helpers.processes import metrics, read_json
from tests.helpers.server import run
from trainers.engine.checkpoints.load import load_or_fail
from trainers.engine.checkpoints.snapshot import hash_tensors
from trainers.engine.history import History
from trainers.engine.metrics import Evaluation, EvaluationSums

pytestmark = pytest.mark.timeout(120)
THREE = ("--validation-fraction", "0.2")


def splits_of(folder: Path) -> list[str]:
    return sorted({split for (split,) in metrics(folder, "split")})


def test_the_validation_split_chooses_and_the_test_set_is_evaluated_once_with_the_best_weights(tmp_path: Path) -> None:
    assert run_in(tmp_path / "two", *THREE, "--lr", "0.3", "--epochs", "3", ranks=2).codes == [0, 0]
    folder = tmp_path / "two" / "r"
    result, best = read_json(folder / "result.json"), folder / "checkpoints" / "best.pt"
    assert (result["split"], result["num_samples"], splits_of(folder)) == ("test", 200, ["train", "validation"])
    accuracies = {step: accuracy for split, step, accuracy in metrics(folder, "split", "step", "accuracy")
                  if split == "validation"}
    assert result["best"]["accuracy"] == max(accuracies.values()) == accuracies[result["best"]["step"]]
    state = load_or_fail(best)
    assert state["step"] == result["best"]["step"]
    assert result["weights_sha256"] == hash_tensors(sorted(state["model"].items()))
    assert run_in(tmp_path / "again", *THREE, "--evaluate", best).code == 0
    again = read_json(tmp_path / "again" / "r" / "result.json")
    assert (again["split"], again["num_samples"], again["accuracy"]) == ("test", 200, result["accuracy"])


def test_without_a_test_set_the_validation_split_is_what_is_reported(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree")
    flags = (*THREE, "--data-dir", tree / "train", "--epochs", "1")
    assert run_in(tmp_path / "one", *flags, trainer="image_folder").code == 0
    assert read_json(tmp_path / "one" / "r" / "result.json")["split"] == "validation"
    flags = (*THREE, "--data-dir", tree, "--epochs", "1", "--cache", "--random-crop", "None")
    assert run_in(tmp_path / "three", *flags, trainer="image_folder").code == 0
    assert read_json(tmp_path / "three" / "r" / "result.json")["split"] == "test"
    assert splits_of(tmp_path / "three" / "r") == ["train", "validation"]


def test_a_run_from_before_there_were_three_splits_goes_on_calling_its_validation_split_test(tmp_path: Path) -> None:
    assert run_in(tmp_path / "new", *THREE, "--epochs", "1").code == 0
    folder = tmp_path / "new" / "r"
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text.replace('"validation"', '"test"'))  # as it was written then
    assert run_in(tmp_path / "new", *THREE, "--epochs", "2").code == 0
    result = read_json(folder / "result.json")
    assert (splits_of(folder), result["split"], result["num_samples"]) == (["test", "train"], "test", 120)


def test_training_ends_on_all_ranks_once_patience_is_out_and_goes_on_only_with_more_of_it(tmp_path: Path) -> None:
    flags = ("--lr", "0", "--momentum", "0", "--model", "net", "--epochs", "9")
    for patience, epochs, more in [("2", 3, ()), ("2", 3, ("--epochs", "12")), ("4", 5, ()), ("4", 5, ())]:
        ended = run_in(tmp_path, *flags, "--patience", patience, *more, ranks=2)
        assert ended.codes == [0, 0], ended.err
        status = read_json(tmp_path / "r" / "status.json")
        assert (status["state"], status["step"]) == ("DONE", 10 * epochs)
        assert status["reason"] == f"--patience {patience}: no evaluation since step 10 was better"
        assert [step for split, step in metrics(tmp_path / "r", "split", "step") if split == "test"] == [
            10 * (epoch + 1) for epoch in range(epochs)]


def test_the_best_is_by_accuracy_top_five_or_loss() -> None:
    found = [Evaluation(loss=loss, num_samples=10, confusion_matrix=[[right, 10 - right], [0, 0]], accuracy_top5=top5)
             for loss, right, top5 in [(2.0, 5, 0.7), (1.0, 4, 0.8), (float("nan"), 6, 0.6), (1.5, 3, 0.9)]]
    for by, best in [("accuracy", 2), ("top5", 3), ("loss", 1)]:
        history = History()
        for step, evaluation in enumerate(found):
            history.record(epoch=step, step=step, train_loss=1.0, train_accuracy=None, evaluation=evaluation, by=by)
        assert history.best is not None
        assert history.best["step"] == best
        assert history.evaluations_since_best("test") == len(found) - 1 - best


def test_top_five_counts_samples_whose_class_is_among_the_five_largest_outputs() -> None:
    outputs = torch.randn(100, 12, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(100) % 12
    sums = EvaluationSums(torch.device("cpu"), num_classes=12)
    for part in range(0, 100, 30):
        sums.update(torch.tensor(1.0), outputs[part : part + 30], targets[part : part + 30])
    evaluation = sums.reduce(World(), StopRequest())
    expected = sum(int(target) in row.argsort(descending=True)[:5].tolist()
                   for row, target in zip(outputs, targets, strict=True))
    assert evaluation.accuracy_top5 == expected / 100
    assert evaluation.num_samples == 100


def test_a_figure_that_the_data_does_not_have_is_a_usage_error(tmp_path: Path) -> None:
    for best in ("accuracy", "top5"):
        ended = run("regression", "--best", best, "--output-dir", tmp_path, folder=tmp_path)
        assert ended.code == 2
        assert f"ERROR usage: --best {best}: the data has no classes; use --best loss" in ended.err


def test_each_class_gives_its_share_and_the_split_depends_on_the_seed_alone() -> None:
    targets = torch.arange(100) % 10
    whole = TensorDataset(inputs=torch.arange(100).float()[:, None], targets=targets, class_names=tuple("abcdefghij"))
    train, validation = hold_out(whole, 0.2, seed=3)
    assert train is not None
    assert validation is not None
    assert validation.targets.bincount().tolist() == [2] * 10
    assert sorted([*train.inputs.flatten().tolist(), *validation.inputs.flatten().tolist()]) == list(range(100))
    again, other = hold_out(whole, 0.2, seed=3)[1], hold_out(whole, 0.2, seed=4)[1]
    assert again is not None
    assert other is not None
    assert torch.equal(again.inputs, validation.inputs)
    assert not torch.equal(other.inputs, validation.inputs)
    assert hold_out(whole, None, seed=3) == (whole, None)
    values = TensorDataset(inputs=whole.inputs, targets=torch.rand(100, 1))
    assert [len(split or ()) for split in hold_out(values, 0.3, seed=0)] == [70, 30]
