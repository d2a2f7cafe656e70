"""What is optional never costs the run: pictures, events, odd names. One WARNING at most, once all else is safe."""

from pathlib import Path

import pytest

from tests.helpers.comparing import run_in
from tests.helpers.faults import Fault, assert_ends_as_specified, cases, check
from tests.helpers.hooks import drawing_fails, events_fail, without_module
from tests.helpers.images import image_tree
from tests.helpers.processes import newest_checkpoint, read_json

pytestmark = pytest.mark.timeout(120)

PICTURES = ("--pictures", "--show-batch")
FAULTS = [
    Fault(name="a-picture-that-fails", flags=PICTURES, hook=drawing_fails("TypeError", "set_text(): text")),
    Fault(name="no-room-for-a-picture", flags=PICTURES, ranks=2,
          hook=drawing_fails("OSError", "No space left on device")),
    Fault(name="no-memory-for-a-picture", flags=PICTURES, hook=drawing_fails("MemoryError", "full")),
    Fault(name="no-matplotlib", flags=PICTURES, hook=without_module("matplotlib")),
    Fault(name="no-room-for-events", flags=("--tensorboard", "--log-gradients"), hook=events_fail()),
    Fault(name="no-TensorBoard", flags=("--tensorboard",), hook=without_module("torch.utils.tensorboard")),
]
BACKENDS = ["module://matplotlib_inline.backend_inline", "nonsense", "TkAgg"]


@pytest.mark.parametrize("fault", cases(FAULTS, default={"a-picture-that-fails", "no-room-for-events"}))
def test_what_is_optional_is_warned_of_and_does_not_cost_the_run(tmp_path: Path, fault: Fault) -> None:
    ended = assert_ends_as_specified(fault, tmp_path)
    warnings = [line for line in ended.err.splitlines() if line.startswith("WARNING")]
    assert len({line.split()[1] for line in warnings}) == len(warnings) <= 2  # one for each flag
    assert "; the run does without" in warnings[0]
    run = tmp_path / "runs" / "r"
    assert newest_checkpoint(run)["step"] == 20
    assert read_json(run / "result.json")["steps"] == 20


@pytest.mark.parametrize("backend", [
    BACKENDS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in BACKENDS[1:])])
def test_pictures_are_drawn_whatever_backend_a_notebook_has_named(tmp_path: Path, backend: str) -> None:
    ended = run_in(tmp_path, "--pictures", "--max-steps", "10", MPLBACKEND=backend)
    check(ended, Fault(name="backend"))
    assert "WARNING" not in ended.err
    run = tmp_path / "r"
    written = [(run / name).stat().st_mtime_ns for name in (
        "checkpoints/step-00000010.pt", "result.json", "status.json", "curves.png", "confusion_matrix.png")]
    assert written == sorted(written)  # what matters comes first


def test_class_names_of_any_kind_are_drawn_and_printed(tmp_path: Path) -> None:
    tree = image_tree(tmp_path / "images")
    for split in ("train", "test"):
        (tree / split / "a").rename(tree / split / "$x_2$ _a\n\\frac")
        (tree / split / "b").rename(tree / split / "猫\udcff$")
    flags = ["--data-dir", tree, "--pictures", "--show-batch", "--epochs", "1", "--run-name", "r_$1\udcfe$"]
    ended = run_in(tmp_path, *flags, trainer="image_folder")
    check(ended, Fault(name="names"))
    assert "WARNING" not in ended.err
    assert "Glyph" not in ended.err
    made = {path.name for path in (tmp_path / "r_$1\udcfe$").glob("*.png")}
    assert made == {"curves.png", "confusion_matrix.png", "predictions.png", "first_batch.png"}
