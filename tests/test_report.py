"""trainers/engine/report.py, pictures.py, result.py and losses.py: what a run leaves for people."""

import contextlib
import fcntl
import functools
import json
import os
import struct
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from launch.errors import UsageError
from tests.helpers.comparing import finished
from tests.helpers.processes import largest_difference, newest_checkpoint
from trainers.engine.history import History
from trainers.engine.metrics import Evaluation
from trainers.engine.run import pictures, report
from trainers.engine.run.folder import RunFolder
from trainers.engine.run.report import Report
from trainers.engine.step import gradient_norms
from trainers.engine.task import classification_task, weighted_cross_entropy
from trainers.engine.trackers.tracker import TrackedRun, TrackerThread

CLASSES = ("cat", "dog", "ship")
EPOCHS = [
    {"step": 10, "train_loss": 1.0, "test_loss": 0.9, "train_accuracy": 0.4, "test_accuracy": 0.5},
    {"step": 20, "train_loss": 0.7, "test_loss": None, "train_accuracy": 0.6, "test_accuracy": None},
    {"step": 25, "train_loss": 0.5, "test_loss": 0.6, "train_accuracy": 0.8, "test_accuracy": 0.7},
]


def size_of(png: bytes) -> tuple[int, int]:
    """Width and height from a PNG's header."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", png[16:24])
    return width, height


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are turned into PNGs, to look into."""
    found: list[Any] = []
    as_png = pictures.as_png
    monkeypatch.setattr(pictures, "as_png",
                        lambda figure, **options: found.append(figure) or as_png(figure, **options))
    return found


def test_curves_show_losses_and_accuracies_at_the_epochs_they_were_measured(figures: list[Any]) -> None:
    size_of(pictures.curves(EPOCHS, steps_per_epoch=10, title="run"))
    loss, accuracy = figures[0].axes
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
             for axes in (loss, accuracy) for line in axes.get_lines()}
    assert lines == {
        "train loss": ([1.0, 2.0, 2.5], [1.0, 0.7, 0.5]), "test loss": ([1.0, 2.5], [0.9, 0.6]),
        "train accuracy": ([1.0, 2.0, 2.5], [40, 60, 80]), "test accuracy": ([1.0, 2.5], [50, 70]),
    }
    assert [axes.get_ylabel() for axes in (loss, accuracy)] == ["loss", "accuracy in %"]
    assert {axes.get_xlabel() for axes in (loss, accuracy)} == {"epoch"}
    assert accuracy.get_ylim()[1] <= 100.5


def test_curves_show_the_top_5_that_an_epoch_recorded(figures: list[Any]) -> None:
    history, counts = History(), [[1, 0, 0, 0, 0, 0]] * 6
    for step, top5 in ((1, 0.75), (2, 1.0)):
        history.train_seconds += 1
        history.record(epoch=step, step=step, train_loss=1.0, train_accuracy=0.5,
                       evaluation=Evaluation(loss=1.0, num_samples=6, confusion_matrix=counts, accuracy_top5=top5))
    pictures.curves(history.epochs, steps_per_epoch=1)
    lines = {line.get_label(): list(line.get_ydata()) for line in figures[0].axes[1].get_lines()}
    assert lines["test accuracy top5"] == [75, 100]


def test_curves_without_classes_have_one_panel_and_a_log_scale_for_a_great_range(figures: list[Any]) -> None:
    lines = [{"step": step, "train_loss": 10.0 ** -step, "test_loss": None, "train_accuracy": None,
              "test_accuracy": None} for step in range(1, 5)]
    pictures.curves(lines, steps_per_epoch=1)
    (axes,) = figures[0].axes
    assert axes.get_yscale() == "log"


def test_a_confusion_matrix_shows_counts_and_names(figures: list[Any]) -> None:
    size_of(pictures.confusion_matrix([[5, 1, 0], [0, 4, 2], [0, 0, 0]], CLASSES))
    axes = figures[0].axes[0]
    assert [text.get_text() for text in axes.texts] == ["5", "1", "0", "0", "4", "2", "0", "0", "0"]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(CLASSES)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")


def test_predictions_name_the_truth_where_they_are_wrong(figures: list[Any]) -> None:
    pictures.predictions(torch.rand(2, 3, 8, 8), ["cat", "dog"], ["cat", "ship"])
    titles = [(axes.get_title(), axes.title.get_color()) for axes in figures[0].axes]
    assert titles == [("cat", pictures.RIGHT), ("ship\ntrue: dog", pictures.WRONG)]


def test_what_the_font_lacks_is_replaced_and_the_rest_is_drawn_as_it_is(figures: list[Any]) -> None:
    pictures.image_grid(torch.rand(1, 1, 4, 4), ["$x_2$ naïve Ωß\n猫\udcff\t"], title="$\\frac$")
    (axes,) = figures[0].axes
    assert axes.get_title() == "$x_2$ naïve Ωß\n猫\\udcff\\t"  # matplotlib draws a box for the cat
    assert not axes.title.get_parse_math()


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_grid_shows_the_pixels_it_is_given(figures: list[Any], channels: int) -> None:
    images = torch.rand(40, channels, 5, 5)
    pictures.image_grid(images, [str(number) for number in range(40)])
    panels = figures[0].axes
    assert len(panels) == pictures.MOST_IMAGES
    shown = torch.as_tensor(panels[7].get_images()[0].get_array().copy())
    torch.testing.assert_close(shown.view(5, 5, channels), images[7].permute(1, 2, 0))


def test_the_bar_shows_all_figures_on_a_terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with open(terminal, "w") as stderr, open(ours, "rb", buffering=0) as screen:
        monkeypatch.setattr(sys, "stderr", stderr)
        progress = report.Progress(shown=True, total_steps=25_000, step=12_000)
        progress.show_figures(loss=2.3049, accuracy=0.9999, samples_per_second=2506, seconds_left=100)
        progress.close()
        stderr.close()
        text = b""
        with contextlib.suppress(OSError):  # the end, once all is read: one read may give a part
            while part := screen.read(10_000):
                text += part
    last = text.decode().strip().rpartition("\r")[2]
    assert last.endswith(", loss 2.3049  accuracy 99.99 %  2,506 samples/s")


def test_drawing_waits_until_it_costs_a_twentieth_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(report.time, "monotonic", lambda: clock[0])

    def draw(*_: Any, **__: Any) -> bytes:
        clock[0] += 2.0  # what this drawing takes
        return f"drawn at {clock[0]}".encode()

    monkeypatch.setattr(pictures, "curves", draw)
    ours, file = Report(RunFolder(tmp_path, is_main=True)), tmp_path / "curves.png"
    for now, content in ((19.0, None), (20.0, "drawn at 22.0"), (61.0, "drawn at 22.0"), (62.0, "drawn at 64.0")):
        clock[0] = now
        ours.curves(EPOCHS, steps_per_epoch=10)
        assert (file.read_text() if file.exists() else None) == content
    ours.curves(EPOCHS, steps_per_epoch=10, always=True)
    assert file.read_text() == "drawn at 66.0"


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    ours = Report(RunFolder(tmp_path, is_main=False),
                  trackers=[TrackerThread("tensorboard", TrackedRun(tmp_path, "p", {}))])
    ours.line({"split": "train", "step": 1, "loss": 1.0})
    ours.curves(EPOCHS, steps_per_epoch=10, always=True)
    assert list(tmp_path.iterdir()) == []


def test_gradient_norms_are_those_of_each_layers_parameters_together() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    model(torch.rand(5, 3)).sum().backward()
    norms = gradient_norms(model)
    assert list(norms) == ["0", "2"]
    for name, layer in (("0", model[0]), ("2", model[2])):
        together = torch.cat([parameter.grad.flatten() for parameter in layer.parameters()])
        assert norms[name].item() == pytest.approx(together.norm().item(), rel=1e-5)


def test_class_weights_of_one_change_nothing_and_others_weigh_each_sample() -> None:
    outputs, targets = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 2, 1, 0])
    ones = weighted_cross_entropy(outputs, targets, weights=torch.ones(3), label_smoothing=0.1)
    assert ones.item() == pytest.approx(F.cross_entropy(outputs, targets, label_smoothing=0.1).item())
    weights = torch.tensor([1.0, 0.0, 3.0])
    each = F.cross_entropy(outputs, targets, reduction="none")
    weighted = weighted_cross_entropy(outputs, targets, weights=weights)
    assert weighted.item() == pytest.approx((weights[targets] * each).mean().item())


def test_the_mean_of_two_ranks_weighted_losses_is_that_of_the_whole_batch() -> None:
    outputs, targets = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 0, 0, 1, 1, 2])
    loss = functools.partial(weighted_cross_entropy, weights=torch.tensor([1.0, 5.0, 9.0]))
    halves = (loss(outputs[:3], targets[:3]) + loss(outputs[3:], targets[3:])) / 2
    assert halves.item() == pytest.approx(loss(outputs, targets).item())


def test_class_weights_that_are_not_one_for_each_class_are_a_usage_error() -> None:
    with pytest.raises(UsageError, match="2 weights for 3 classes"):
        classification_task(CLASSES, torch.device("cpu"), class_weights=(1.0, 2.0))


@pytest.mark.timeout(180)
def test_a_run_leaves_pictures_events_gradient_norms_and_its_weights(tmp_path: Path) -> None:
    run = finished("mnist", tmp_path / "run", "--dataset", "synthetic", "--max-steps", "20", "--tensorboard",
                   "--log-gradients", "--show-batch", "--save-weights", "--class-weights", *(["2"] * 10), ranks=2,
                   timeout=160)
    for name in ("curves.png", "confusion_matrix.png", "predictions.png", "first_batch.png"):
        assert min(size_of((run / name).read_bytes())) > 300
    weights = torch.load(run / "weights.pt", weights_only=True)
    assert largest_difference(weights, newest_checkpoint(run)["model"]) == 0
    check_gradient_norms(run, {"conv1", "conv2", "fc1", "fc2"})


def check_gradient_norms(run: Path, layers: set[str]) -> None:
    """Those in metrics.jsonl are positive, at every reported training line, and the same in TensorBoard's events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["split"] == "train"]
    assert all(line["gradient_norms"].keys() == layers for line in train)
    assert all(norm > 0 for line in train for norm in line["gradient_norms"].values())
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for name, field in (("train/loss", "loss"), ("train/learning_rate", "learning_rate")):
        scalars = [(event.step, event.value) for event in events.Scalars(name)]
        assert scalars == [(line["step"], pytest.approx(line[field])) for line in train]
    conv1 = [event.value for event in events.Scalars("gradient_norm/conv1")]
    assert conv1 == pytest.approx([line["gradient_norms"]["conv1"] for line in train])
    assert [event.step for event in events.Scalars("test/accuracy")] == [20]
