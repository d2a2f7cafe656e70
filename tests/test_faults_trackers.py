"""Trackers that are missing, broken, failing or silent: they cost one line, and never a run."""

import importlib.util
from pathlib import Path

import pytest

from launch.errors import UsageError
from tests.helpers.comparing import outcome, run_in
from tests.helpers.faults import check_lines
from tests.helpers.hooks import packages_from
from trainers.engine.config import TrainConfig
from trainers.engine.trackers.tracker import TrackerName

pytestmark = pytest.mark.timeout(60)

WHOLE = """
import trainers.engine.run.report
trainers.engine.run.report.CLOSE_SECONDS["DONE"] = 1.0
class Run:
    id = "1"
    def log(self, values, step): ...
    def finish(self): ...
def init(*words, **options): return Run()
"""
FAULTS = {
    "import": ("class Run:", "raise OSError('broken\\nin two lines')\nclass Run:", "OSError: broken"),
    "exit": ("class Run:", "raise SystemExit\nclass Run:", "SystemExit: SystemExit"),
    "start": ("return Run()", "raise ConnectionError('no route')", "ConnectionError: no route"),
    "line": ("def log(self, values, step): ...", "def log(self, values, step): assert step < 7, 'far'",
             "AssertionError: far"),
    "end": ("def finish(self): ...", "def finish(self): raise OSError('disk full')", "OSError: disk full"),
    "silence": ("def log(self, values, step): ...", "def log(self, values, step): __import__('time').sleep(1000)",
                "no answer"),
}


@pytest.fixture(scope="module")
def untracked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What the run computes without a tracker."""
    folder = tmp_path_factory.mktemp("untracked")
    assert run_in(folder).codes == [0]
    return outcome(folder)


@pytest.mark.parametrize("when", FAULTS)
def test_a_tracker_that_fails_costs_one_warning_and_no_step(when: str, tmp_path: Path,
                                                            untracked: dict[str, object]) -> None:
    good, bad, reason = FAULTS[when]
    (tmp_path / "trackio").mkdir()
    (tmp_path / "trackio" / "__init__.py").write_text(WHOLE.replace(good, bad))
    ended = run_in(tmp_path, "--track", "trackio", hook=packages_from(str(tmp_path)))
    assert ended.codes == [0], ended.err
    check_lines(ended, "")
    assert [line for line in ended.err.splitlines() if "WARNING" in line] == [
        f"WARNING --track trackio: {reason}; the run does without"]
    assert outcome(tmp_path) == untracked


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_tracker_that_is_not_installed_is_a_usage_error(name: TrackerName, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=rf"^--track {name}: not installed; pip install -e \.\[{name}\]$"):
        TrainConfig(track=(name,)).check()


