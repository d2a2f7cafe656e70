"""`--profile STEP:STEPS`: a trace per rank that chrome and TensorBoard read, and the bits of a run without it."""

import json
from pathlib import Path

import pytest

from tests.helpers.faults import Fault, assert_ends_as_specified
from tests.helpers.processes import read_json
from tests.helpers.server import NORMED, run

pytestmark = pytest.mark.timeout(90)

PHASES = ["data", "forward", "backward", "optimizer"]


def phases_of(trace: Path) -> list[str]:
    """The phases of the recorded steps, in order."""
    events = [event for event in json.loads(trace.read_text())["traceEvents"]
              if event.get("cat") == "user_annotation" and event["name"] in PHASES]
    return [event["name"] for event in sorted(events, key=lambda event: event["ts"])]


def test_each_rank_leaves_a_trace_of_the_steps_and_the_weights_are_those_without(tmp_path: Path) -> None:
    for name, flags in [("plain", ()), ("profiled", ("--profile", "3:2"))]:
        ended = run("cifar", *NORMED, "--epochs", "1", *flags, "--output-dir", tmp_path / name, ranks=2)
        assert ended.codes == [0, 0], ended.err
        assert "WARNING" not in ended.err
        assert not [line for line in ended.err.splitlines() if "ERROR" in line or ".cpp" in line]  # of torch's profiler
    plain, profiled = (read_json(tmp_path / name / "r" / "result.json") for name in ("plain", "profiled"))
    assert plain["weights_sha256"] == profiled["weights_sha256"]
    for rank in range(2):
        trace = tmp_path / "profiled" / "r" / "profile" / f"rank-{rank}.pt.trace.json"
        assert phases_of(trace) == PHASES * 2
        assert "aten::convolution" in trace.read_text()


def test_a_run_that_ends_within_the_recorded_steps_leaves_what_there_was(tmp_path: Path) -> None:
    ended = run("cifar", *NORMED, "--max-steps", "4", "--profile", "2:100", "--output-dir", tmp_path)
    assert ended.code == 0, ended.err
    assert phases_of(tmp_path / "r" / "profile" / "rank-0.pt.trace.json") == PHASES * 2


def test_steps_that_are_never_taken_are_warned_of(tmp_path: Path) -> None:
    ended = run("cifar", *NORMED, "--max-steps", "2", "--profile", "50:2", "--output-dir", tmp_path)
    assert ended.code == 0, ended.err
    assert "WARNING --profile 50:2: no such step was taken; the run is at step 2" in ended.err.splitlines()


@pytest.mark.parametrize("value", ["5", "5:0", "x:2", "-1:2", "1:2:3"])
def test_anything_but_two_numbers_is_one_line(tmp_path: Path, value: str) -> None:
    line = f"ERROR usage: --profile {value}: must be STEP:STEPS, such as 20:100"
    assert_ends_as_specified(Fault(name="profile", flags=(f"--profile={value}",), codes=(2,), state=None, error=line),
                             tmp_path)
