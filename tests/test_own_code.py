"""People's own code: one file of theirs trains, resumes exactly, and every mistake in it is one line that names it."""

import hashlib
import json
import random
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.keyed_random import Purpose
from datasets.samples import generators_kept, seed_sample
from launch.errors import UsageError
from tests.helpers.comparing import outcome
from tests.helpers.hooks import at, kill, log_images, small_data, warm_workers
from tests.helpers.images import image_tree
from tests.helpers.own import LINEAR, train, write
from tests.helpers.processes import ROOT, read_json
from tests.helpers.server import run
from trainers.engine.task import logits_of
from trainers.engine.user_code import options_in

STEPS = 20
PREDICT = str(ROOT / "trainers" / "predict.py")


def result_of(folder: Path) -> dict[str, Any]:
    return outcome(folder / "runs")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_strangers_file_killed_and_resumed_ends_as_one_never_killed(tmp_path: Path, ranks: int) -> None:
    whole = train(tmp_path / "whole", ranks=ranks)
    assert whole.codes == [0] * ranks, whole.err
    assert "WARNING" not in whole.err
    for step, phase in ((4, "forward"), (17, "optimizer")):
        killed = train(tmp_path / "killed", ranks=ranks, hook=at(step, phase, kill))
        assert killed.codes == [-9] * ranks, killed.err
    assert train(tmp_path / "killed", ranks=ranks).codes == [0] * ranks
    assert result_of(tmp_path / "killed") == result_of(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_any_number_of_workers_gives_the_same_bits(tmp_path: Path) -> None:
    found = []
    for workers in (0, 1, 3):
        ended = train(tmp_path / str(workers), "--workers", workers, "--epochs", 1, ranks=2, hook=warm_workers())
        assert ended.codes == [0, 0], ended.err
        found.append(result_of(tmp_path / str(workers)))
    assert found[0] == found[1] == found[2]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_ranks_with_two_workers_killed_at_random_steps_end_as_one_never_killed(tmp_path: Path) -> None:
    assert train(tmp_path / "whole", ranks=2).codes == [0, 0]
    steps = sorted(random.Random(0).sample(range(1, STEPS), 10))
    for step in steps:
        hook = [warm_workers(), at(step, "backward", kill)]
        assert train(tmp_path / "killed", "--workers", 2, ranks=2, hook=hook).codes == [-9, -9]
    assert train(tmp_path / "killed", "--workers", 3, ranks=2).codes == [0, 0]
    assert result_of(tmp_path / "killed") == result_of(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_every_sample_is_augmented_alike_on_one_two_and_four_ranks(tmp_path: Path) -> None:
    seen = []
    for ranks in (1, 2, 4):
        ended = train(tmp_path / str(ranks), "--epochs", 1, ranks=ranks, hook=log_images())
        assert ended.codes == [0] * ranks, ended.err
        files = (tmp_path / str(ranks)).glob("samples-*.txt")
        lines = {line for file in files for line in file.read_text().splitlines()}  # DDP tries the first batch, too
        seen.append(sorted(lines))
    assert len(seen[0]) == 120
    assert seen[0] == seen[1] == seen[2]


def test_a_key_sets_all_three_generators_and_they_are_put_back() -> None:
    def draw() -> tuple[float, float, float]:
        return torch.rand(()).item(), random.random(), float(np.random.random())

    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    expected = draw()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    with generators_kept():
        seed_sample(0, 3, Purpose.TRAIN_SAMPLE, 7)
        first = draw()
        seed_sample(0, 3, Purpose.TRAIN_SAMPLE, 8)
        assert all(one != other for one, other in zip(first, draw(), strict=True))
        seed_sample(0, 3, Purpose.TRAIN_SAMPLE, 7)
        assert draw() == first
    assert draw() == expected


def test_keys_cost_less_than_thirty_microseconds_a_sample_with_what_is_put_back() -> None:
    def seconds() -> float:
        """For one batch of 16, each sample drawing from all three."""
        began = time.thread_time()
        with generators_kept():
            for sample in range(16):
                seed_sample(0, 1, Purpose.TRAIN_SAMPLE, sample)
                torch.rand(()), random.random(), np.random.random()
        return time.thread_time() - began

    assert min(seconds() for _ in range(500)) / 16 < 30e-6


def test_what_keeps_generators_may_be_within_another() -> None:
    np.random.seed(1)
    expected = np.random.random(3).tolist()
    np.random.seed(1)
    found = [np.random.random()]
    with generators_kept():
        np.random.seed(9)
        inner = np.random.random(2).tolist()
        np.random.seed(9)
        assert np.random.random() == inner[0]
        with generators_kept():
            np.random.seed(5)
        assert np.random.random() == inner[1]
    assert [*found, *np.random.random(2).tolist()] == expected


@pytest.mark.timeout(60)
@pytest.mark.parametrize("line", ["np.random.default_rng().normal()", "torch.rand((), generator=GENERATOR)"])
def test_random_numbers_that_no_key_reaches_are_named_once(tmp_path: Path, line: str) -> None:
    write(tmp_path, f"""
        GENERATOR = torch.Generator().manual_seed(0)
        class Noisy(TensorDataset):
            def __getitem__(self, index):
                return torch.rand(3) + {line}, index % 2
        def load():
            return Noisy(torch.zeros(24)), Noisy(torch.zeros(9))""")
    ended = train(tmp_path, *LINEAR, ranks=2)
    assert ended.codes == [0, 0], ended.err
    assert ended.err.count("WARNING") == 1
    assert "sample 0 differs" in ended.err
    assert "default_rng(torch.initial_seed() % 2**32)" in ended.err


MISTAKES = {  # what the file says, the flags, what the one line says
    "no such name": ("", ("--model", "mine.py:Nett"), "--model mine.py:Nett: the file has no Nett; give a name that "),
    "no such file": ("", ("--model", "no.py:Net"), "--model no.py:Net: no such file"),
    "a neighbour that is not there": ("import nowhere  # here", (), "ModuleNotFoundError: No module named 'nowhere'"),
    "a syntax error": ("def broken(:  # here", (), "SyntaxError: "),
    "sys.exit": ("sys.exit()  # here", (), "SystemExit:"),
    "other parameters": ("def load(folder):  # here\n            ...", (),
                         "TypeError: missing a required argument: 'folder'"),
    "an option of no meaning": ("", ("--model-options", "depth=3"),
                                "TypeError: got an unexpected keyword argument 'depth'"),
    "an option that is none": ("", ("--model-options", "depth"), "--model-options depth: must be key=value"),
    "too few outputs": ("def model():\n            return nn.Linear(3, 1)", (), "shape (12, 1) for 2 classes"),
    "numbers of another shape": ("""
        def load():
            return data(24, lambda index: [0.5, 0.1, 0.2]), data(9, lambda index: [0.5, 0.1, 0.2])""", (),
                                 "--loss mse: outputs (12, 2) for targets (12, 3)"),
    "layers that do not fit": ("def model():\n            return nn.Linear(7, 2)", (), "RuntimeError: mat1 and mat2"),
    "what is no network": ("model = [1]", (), "TypeError: [1] is not a callable object"),
    "a function that makes no network": ("def model():\n            return 3", (), "is int, not a network"),
    "a model without parameters": ("def model():\n            return nn.Flatten()", (), "has no parameters to train"),
    "an error in forward": ("""
        class Net(nn.Linear):
            def forward(self, inputs):
                return super().forward(inputs) + torch.zeros(7, 7)  # here
        def model():
            return Net(3, 2)""", (), "RuntimeError: The size of tensor a"),
    "sys.exit in forward": ("""
        class Net(nn.Linear):
            def forward(self, inputs):
                sys.exit(0)  # here
        def model():
            return Net(3, 2)""", (), "SystemExit: 0"),
    "a loss that is no scalar": ("""
        def own(outputs, targets):
            return outputs.sum(1)""", ("--loss", "mine.py:own"), "gives a tensor of shape (12,), not one number"),
    "an error in the loss": ("""
        def own(outputs, targets):
            return outputs.no_such_thing  # here""", ("--loss", "mine.py:own"), "AttributeError: "),
    "an error in the metric": ("""
        def share(outputs, targets):
            raise ValueError("in the metric")  # here""", ("--metric", "mine.py:share"), "ValueError: in the metric"),
    "an error in the optimizer": ("""
        def own(params, lr):
            raise KeyError("in the optimizer")  # here""", ("--optimizer", "mine.py:own"), "KeyError: 'in the optim"),
    "what is no optimizer": ("""
        def own(params, lr):
            return params""", ("--optimizer", "mine.py:own"), "makes list, not an optimizer"),
    "a sample that raises": ("""
        class Bad(TensorDataset):
            def __getitem__(self, index):
                if index == 17:
                    raise OSError("no such picture")  # here
                return super().__getitem__(index)
        def load():
            return Bad(*data(24).tensors), data(9)""", (),
                             "OSError: no such picture (sample 17 of the training set)"),
    "a data set of length 0": ("""
        def load():
            return data(24), TensorDataset(torch.zeros(0, 3), torch.zeros(0))""", (), "the test set has no samples"),
    "an iterable data set": ("""
        class Stream(IterableDataset):
            def __iter__(self):
                yield torch.rand(3), 0
        def load():
            return Stream(), data(9)""", (), "the training set is Stream, which has no samples by number"),
    "what is no pair": ("def load():\n            return data(24)", (), "gives TensorDataset, not (train, test)"),
    "a target outside the classes": ("""
        def load():
            return data(24, lambda index: 2 if index == 20 else index % 2), data(9)""", (),
                                     "sample 20 of the training set: target 2 must be a class from 0 to 1"),
    "a target that is no label": ("""
        def load():
            return data(24, lambda index: [3 * (index == 20), 1]), data(9, lambda index: [0, 1])""", ("--loss", "bce"),
                                  "sample 20 of the training set: target [3, 1] must be a label from 0 to 1"),
    "a target that is NaN": ("""
        def load():
            return data(24, lambda index: float("nan") if index == 20 else 0.5), data(9)""", (),
                             "sample 20 of the training set: target nan must be a number"),
    "Hugging Face's datasets": ("from datasets import load_dataset  # here", (), "`datasets` is a folder of this proj"),
    "timm's reader of them": ("import datasets\n        datasets.load_dataset('x')  # here", (), "to Parquet"),
}
DATA_ERRORS = ("length 0", "iterable", "target")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_users_file_is_one_line_that_names_it(tmp_path: Path, mistake: str) -> None:
    text, flags, words = MISTAKES[mistake]
    line = write(tmp_path, f"        {text}" if not text.startswith("\n") else text)
    ended = train(tmp_path, *LINEAR, *flags)
    errors = [each for each in ended.err.splitlines() if each.startswith("ERROR")]
    assert ended.code == (3 if any(word in mistake for word in DATA_ERRORS) else 2), ended.err
    assert len(errors) == 1
    assert "Traceback" not in ended.err
    assert words in errors[0]
    if line:
        assert f": mine.py line {line}: " in errors[0]


@pytest.mark.parametrize("outputs", [
    torch.ones(2), {"logits": torch.ones(2), "out": torch.zeros(2)}, {"aux": torch.zeros(2), "out": torch.ones(2)},
    (torch.ones(2), torch.zeros(2)), [{"other": torch.ones(2)}], SimpleNamespace(logits=torch.ones(2), loss=None),
])
def test_logits_are_found_in_what_models_return(outputs: Any) -> None:
    assert torch.equal(logits_of(outputs), torch.ones(2))


@pytest.mark.parametrize("outputs", [{}, (), None, "logits"])
def test_outputs_without_logits_are_named(outputs: Any) -> None:
    with pytest.raises(UsageError, match=f"--model: returns {type(outputs).__name__}, in which no logits are found"):
        logits_of(outputs)


def test_options_are_literals_or_text() -> None:
    assert options_in(["depth=3", "name=wide", "sizes=(1, 2)", "scale=-1e-3", "flag=None", "path=a=b"], "--x") == {
        "depth": 3, "name": "wide", "sizes": (1, 2), "scale": -1e-3, "flag": None, "path": "a=b"}


@pytest.mark.timeout(90)
def test_a_file_that_changed_since_the_checkpoint_is_named_once(tmp_path: Path) -> None:
    write(tmp_path, "        import neighbour")
    (tmp_path / "neighbour.py").write_text("")
    assert train(tmp_path, *LINEAR, "--epochs", 1).code == 0
    before = read_json(tmp_path / "runs" / "r" / "environment.json")["user_code"]
    assert before.keys() == {str(tmp_path / "mine.py"), str(tmp_path / "neighbour.py")}
    assert before[str(tmp_path / "mine.py")] == hashlib.sha256((tmp_path / "mine.py").read_bytes()).hexdigest()
    (tmp_path / "neighbour.py").write_text("# other")
    resumed = train(tmp_path, *LINEAR, "--epochs", 2, ranks=2)
    assert resumed.codes == [0, 0], resumed.err
    assert [line for line in resumed.err.splitlines() if "WARNING" in line] == [
        f"WARNING checkpoint: {tmp_path / 'neighbour.py'}: changed since step-00000002.pt was written; the run "
        f"continues with what is there now"]


@pytest.mark.timeout(90)
def test_several_labels_are_counted_by_exact_matches_and_torchmetrics(tmp_path: Path) -> None:
    write(tmp_path, """
        def load():
            features = torch.rand(54, 3)
            whole = TensorDataset(features, (features > 0.6).float())
            return tuple(torch.utils.data.Subset(whole, range(*ends)) for ends in ((0, 24), (24, 54)))""")
    flags = (*LINEAR, "--num-classes", 3, "--lr", 1)
    found = []
    for ranks in (1, 2):
        (tmp_path / str(ranks)).mkdir()
        shutil.copy(tmp_path / "mine.py", tmp_path / str(ranks))
        ended = train(tmp_path / str(ranks), *flags, ranks=ranks)
        assert ended.codes == [0] * ranks, ended.err
        found.append(read_json(tmp_path / str(ranks) / "runs" / "r" / "result.json"))
    for name in ("exact_match", "mean_average_precision"):
        assert 0 < found[0][name] <= 1
        assert found[0][name] == pytest.approx(found[1][name], abs=1e-6)


@pytest.mark.timeout(60)
def test_dicts_and_tuples_reach_the_model_by_keyword_and_position(tmp_path: Path) -> None:
    write(tmp_path, """
        class Pairs(TensorDataset):
            def __getitem__(self, index):
                features, target = super().__getitem__(index)
                return ({"left": features, "right": np.ones(3)}, 0.5 * target)
        class Net(nn.Linear):
            def forward(self, left, right):
                return super().forward(left + right)
        def model(num_classes):
            return Net(3, 1)
        def load():
            return Pairs(*data(24).tensors), Pairs(*data(9).tensors)""")
    ended = train(tmp_path, *LINEAR)
    assert ended.code == 0, ended.err
    assert "test loss" in ended.out


@pytest.mark.timeout(90)
def test_predict_reads_any_input_of_own_data(tmp_path: Path) -> None:
    write(tmp_path, """
        class Named(TensorDataset):
            def __getitem__(self, index):
                features, target = super().__getitem__(index)
                return {"rows": torch.ones(1 + index % 3, 3) * features}, target
        def collate(samples):
            longest = max(len(inputs["rows"]) for inputs, _ in samples)
            rows = [nn.functional.pad(each["rows"], (0, 0, 0, longest - len(each["rows"]))) for each, _ in samples]
            return {"rows": torch.stack(rows)}, torch.stack([target for _, target in samples])
        class Net(nn.Linear):
            def forward(self, rows):
                return {"logits": super().forward(rows.sum(1))}
        def model(num_classes):
            return Net(3, num_classes)
        def load():
            return Named(*data(24).tensors), Named(*data(9).tensors)""")
    ended = train(tmp_path, *LINEAR)
    assert ended.code == 0, ended.err
    done = run(PREDICT, "--run", "runs/r", "--test-images", "99", "--json", "--device", "cpu", folder=tmp_path)
    assert done.code == 0, done.err
    found = json.loads(done.out)["predictions"]
    right = [max(each["probabilities"], key=each["probabilities"].get) == each["true_class"] for each in found]
    assert sum(right) / 9 == pytest.approx(read_json(tmp_path / "runs" / "r" / "result.json")["best"]["accuracy"])


THREE = """
        class Named(TensorDataset):
            def __init__(self, classes, features, labels):
                super().__init__(features, labels)
                self.classes = classes
        features = torch.rand(57, 3)
        labels = (features[:, 0] > 0.5).long()
        def load():
            test = Named(("high", "low"), features[36:], 1 - labels[36:])
            return Named(("low", "high"), features[:36], labels[:36]), test
        def three():
            train, test = load()
            return train, Named(("high", "low"), features[:9], 1 - labels[:9]), test
        def test_alone():
            return None, load()[1]
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("flags", [("--validation-fraction", 0.25), ("--data", "mine.py:three")])
def test_own_data_has_three_splits_and_its_classes_are_joined_by_name(tmp_path: Path, flags: tuple[Any, ...]) -> None:
    write(tmp_path, THREE)
    ended = train(tmp_path, *LINEAR, *flags, "--lr", 3, "--epochs", 8)
    assert ended.code == 0, ended.err
    run = tmp_path / "runs" / "r"
    result = read_json(run / "result.json")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {line["split"] for line in lines} == {"train", "validation"}
    assert (result["split"], result["num_samples"], result["class_names"]) == ("test", 21, ["low", "high"])
    assert result["accuracy"] > 0.6  # near 0 if labels were positions
    again = train(tmp_path, *LINEAR, "--data", "mine.py:test_alone", "--evaluate", run / "checkpoints" / "best.pt",
                  "--run-name", "e", "--batch-size", 7, ranks=2)
    assert again.codes == [0, 0], again.err
    assert read_json(tmp_path / "runs" / "e" / "result.json")["accuracy"] == result["accuracy"]


@pytest.mark.timeout(60)
def test_the_custom_trainer_needs_no_data(tmp_path: Path) -> None:
    ended = train(tmp_path, "--data", "None", "--dataset", "synthetic", "--model", "net", "--loss", "auto",
                  "--max-steps", 3, ranks=1)
    assert ended.code == 0, ended.err


IMAGES = """
        import torch
        from torch import nn
        from torchvision.transforms import v2
        def net(num_classes, image_size, width=4):
            assert image_size == 32
            head = nn.Linear(49 * width, num_classes)
            return nn.Sequential(nn.Conv2d(3, width, 5, stride=4), nn.Flatten(), head)
        def logits(outputs):
            return outputs + 0
        def loss(outputs, targets):
            return nn.functional.cross_entropy(outputs, targets)
        def optimizer(params, lr, weight_decay, eps=1e-6):
            assert eps == 0.5
            return torch.optim.Adam(params, lr=lr, weight_decay=weight_decay, eps=eps)
        def share(outputs, targets):
            return {"share": (outputs.argmax(1) == targets).float().mean()}
        def prepare(image, train):
            assert image.dtype == torch.uint8
            image = v2.functional.resize(image, [32, 32])
            return (v2.RandomHorizontalFlip()(image) if train else image).float() / 255
"""


def test_a_metric_whose_name_is_taken_gets_another_and_replaces_nothing(tmp_path: Path) -> None:
    write(tmp_path, """
        def scores(outputs, targets):
            return {"precision": 0.125, "loss": 7.0, "step": -5.0, "f1": 0.25}
    """)
    ended = train(tmp_path, *LINEAR, "--metric", "mine.py:scores", "--max-steps", 3)
    assert ended.codes == [0], ended.err
    result = read_json(tmp_path / "runs" / "r" / "result.json")
    assert (result["precision"], result["metric_precision"], result["f1"]) == ("fp32", 0.125, 0.25)
    assert result["metric_loss"] == 7.0 != result["loss"]
    line = json.loads((tmp_path / "runs" / "r" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (line["step"], line["metric_step"], line["loss"]) == (3, -5.0, result["loss"])


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("trainer", ["cifar", pytest.param("image_folder", marks=pytest.mark.slow)])
def test_every_part_of_an_image_trainer_may_be_ones_own(tmp_path: Path, trainer: str) -> None:
    write(tmp_path, "", head=IMAGES)
    data = ("--dataset", "synthetic") if trainer == "cifar" else ("--data-dir", image_tree(tmp_path / "images"))
    flags = ("--model", "mine.py:net", "--model-options", "width=3", "--loss", "mine.py:loss", "--optimizer",
             "mine.py:optimizer", "--optimizer-options", "eps=0.5", "--metric", "mine.py:share", "--transform",
             "mine.py:prepare", "--max-steps", 4, "--batch-size", 12, "--image-size", 32, "--no-pictures",
             "--threads", 1, "--schedule", "constant", "--precision", "fp32", "--ema-decay", "None",
             "--label-smoothing", 0, "--run-name", "r", "--eval-every", 1)
    if trainer == "cifar":
        at = flags.index("--image-size")
        flags = flags[:at] + flags[at + 2:]
    results = []
    for ranks in (1, 2):
        ended = train(tmp_path, *data, *flags, "--output-dir", f"runs-{ranks}", trainer=trainer, ranks=ranks,
                      hook=small_data())
        assert ended.codes == [0] * ranks, ended.err
        results.append(read_json(tmp_path / f"runs-{ranks}" / "r" / "result.json"))
    assert results[0]["share"] == pytest.approx(results[0]["accuracy"])
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-4)
    run_folder = tmp_path / "runs-1" / "r"
    assert read_json(run_folder / "model.json")["options"] == {"image_size": 32, "width": 3}
    picture = next(iter((tmp_path / "images").rglob("*.png")), None) or drawn(tmp_path / "one.png")
    predicted = run(PREDICT, "--run", run_folder, picture, "--json", "--export", tmp_path / "net.pt2", "--device",
                    "cpu")
    assert predicted.code == 0, predicted.err
    assert len(json.loads(predicted.out)["predictions"]) == 1
    assert (tmp_path / "net.pt2").is_file()


def drawn(path: Path) -> Path:
    Image.new("RGB", (40, 32), "red").save(path)
    return path
