"""The benchmark with real processes: what it writes, and what it does when something goes wrong."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from launch.bench.runs import execute, parse_setup, plan
from launch.bench.summary import summarise
from launch.errors import UsageError
from launch.stop import Stopped, signals_caught
from tests.helpers.hooks import gradients_apart
from tests.helpers.processes import ROOT, TINY, Ended, kill_session, read_json, start
from tests.helpers.server import run
from trainers.engine.config import TrainConfig, measured_steps

BENCHMARK = [sys.executable, str(ROOT / "launch" / "benchmark.py")]
QUICK = ["--steps", "10", "--warmup-steps", "2", "--rounds", "1", "--batch-size", "64"]


def benchmark(*flags: Any, timeout: float = 150) -> Ended:
    return run(BENCHMARK[1], *flags, timeout=timeout)


def measured(folder: Path, *flags: Any, ranks: int | None = None) -> dict[str, Any]:
    done = run("cifar", *TINY, "--measure", "2:10", "--output-dir", folder, "--run-name", "a", *flags, ranks=ranks)
    assert done.code == 0, done.err
    return read_json(folder / "a" / "result.json")["benchmark"]


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_one_and_two_ranks_reach_the_same_loss_and_every_file_is_written(tmp_path: Path):
    done = benchmark("--setups", "cpu:1", "cpu:2", "ddp:2", *QUICK, "--output-dir", tmp_path)
    assert done.code == 0, done.err + done.out
    report = read_json(tmp_path / "benchmark.json")
    rows = {(row["setup"], row["batch_size"]): row for row in report["rows"]}
    assert report["complete"]
    assert set(rows) == {("cpu:1", 64), ("cpu:2", 64), ("cpu:2", 128)}
    assert rows["cpu:2", 64]["verdict"] == "same"
    assert rows["cpu:2", 64]["speedup"] > 0
    assert rows["cpu:2", 64]["step_seconds"]["communication"] is not None
    assert rows["cpu:1", 64]["step_seconds"]["communication"] is None
    assert [one["setup"] for one in report["not_run"]] == ["ddp:2"]
    assert {path.name for path in tmp_path.iterdir()} == {"benchmark.json", "benchmark.md", "benchmark.png"}
    assert "x cpu:1" in done.out
    again = benchmark("--report", tmp_path / "benchmark.json", "--compare", tmp_path / "benchmark.json", timeout=60)
    assert again.code == 0, again.err
    assert "1.000" in again.out


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_setup_that_crashes_says_how_and_the_others_go_on(tmp_path: Path):
    done = benchmark("--setups", "cpu:2", "cpu:1", *QUICK, "--scaling", "strong",
                     "--trainer-flags=--accumulation-steps 64", "--output-dir", tmp_path)
    rows = {row["setup"]: row for row in read_json(tmp_path / "benchmark.json")["rows"]}
    assert done.code == 1, done.err
    assert "ERROR usage: --batch-size 64" in rows["cpu:2"]["error"]
    assert rows["cpu:1"]["samples_per_second"] > 0
    assert "cpu:2 (batch 64) failed" in done.out


@pytest.mark.timeout(100)
@pytest.mark.parametrize(("flags", "expected"), [
    (["--setups", "cpu:one"], "--setups cpu:one"),
    (["--setups", "cpu:3", "--scaling", "strong"], "does not divide over 3 ranks"),
    (["--trainer", "cifr"], "did you mean cifar?"),
    (["--setups", "cpu:1", "--baseline", "cpu:2"], "--baseline cpu:2"),
    (["--compare", "missing.json"], "missing.json: cannot be read as a benchmark.json ([Errno 2] No such file"),
    (["--rounds", "0"], "--rounds 0"),
])
def test_flags_that_cannot_work_are_refused_in_one_line_before_anything_runs(flags: list[str], expected: str):
    began = time.monotonic()
    done = benchmark(*flags, "--output-dir", "/nonexistent/never" if "--compare" in flags else "/tmp", timeout=60)
    assert done.code == 2
    assert len(done.errors) == 1
    assert expected in done.errors[0]
    assert "round 1" not in done.err
    assert time.monotonic() - began < 60


@pytest.mark.timeout(100)
def test_an_output_folder_that_cannot_be_written_is_found_before_anything_runs(tmp_path: Path):
    (tmp_path / "benchmark.json").mkdir()
    (tmp_path / "file").write_text("")
    for folder in (tmp_path, tmp_path / "file"):
        done = benchmark("--setups", "cpu:1", *QUICK, "--output-dir", folder, timeout=60)
        assert done.code == 2
        assert "--output-dir" in done.errors[0]
        assert "round 1" not in done.err


def pids_with(mark: str) -> list[int]:
    """Processes in whose environment a text stands."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.mark.timeout(200)
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_keeps_what_was_finished_and_leaves_no_process(tmp_path: Path, number: signal.Signals):
    mark = str(uuid.uuid4())
    process = start([*BENCHMARK, "--setups", "cpu:1", "cpu:2", "--steps", "10", "--rounds", "20", "--output-dir",
                     str(tmp_path)], MARK=mark)
    try:
        deadline = time.monotonic() + 90
        while not (tmp_path / "benchmark.json").exists():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.2)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        kill_session(process) if process.poll() is None else None
    report = read_json(tmp_path / "benchmark.json")
    assert process.returncode == 130, err
    assert report["complete"] is False
    assert len(report["runs"]) >= 1
    assert "are kept" in out
    assert (tmp_path / "benchmark.md").exists()
    assert pids_with(mark) == []


@pytest.mark.timeout(60)
def test_ctrl_c_while_a_process_starts_leaves_it_not_behind(monkeypatch: pytest.MonkeyPatch):
    begin, begun = subprocess.Popen, []

    def interrupted(*words: Any, **how: Any) -> Any:
        begun.append(begin(*words, **how))
        signal.raise_signal(signal.SIGINT)
        return begun[0]

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    with signals_caught(), pytest.raises(Stopped):
        execute(["sleep", "50"], dict(os.environ), 40)
    assert begun[0].poll() == -signal.SIGTERM


@pytest.mark.timeout(100)
def test_flops_are_those_counted_by_hand(tmp_path: Path):
    found = measured(tmp_path)
    layers = [28 * 28 * 6 * 75, 10 * 10 * 16 * 150, 400 * 120, 120 * 84, 84 * 10]  # multiply-adds of net, per image
    forward, weight_gradients, input_gradients = sum(layers), sum(layers), sum(layers[1:])  # images need no gradient
    assert found["flops_per_sample"] == 2 * (forward + weight_gradients + input_gradients)


@pytest.mark.timeout(100)
def test_a_measured_run_accounts_for_its_steps(tmp_path: Path):
    found = measured(tmp_path, "--model", "resnet9", "--width", "8")
    per_step = found["seconds"] / found["steps"]
    phases = sum(found[name][0] for name in ("data_seconds", "forward_backward_seconds", "optimizer_seconds"))
    assert found["samples_per_second"] == pytest.approx(60 / per_step)
    assert 0.3 * per_step < phases < 3 * per_step  # other windows, on a machine that may be busy
    assert found["cpu_seconds"][0] > 0
    assert found["batch_norm"] is True
    assert found["communication_seconds"] == [None]


@pytest.mark.slow
@pytest.mark.timeout(100)
def test_measuring_leaves_the_training_as_it_is(tmp_path: Path):
    """The timed steps of a measured run are the steps of a run that only trains."""
    found = measured(tmp_path, "--measure", "0:20")
    done = run("cifar", *TINY, "--output-dir", tmp_path, "--run-name", "plain")
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in (tmp_path / "plain" / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["split"] == "train" and line["step"] == 20][-1]
    assert found["loss"] == pytest.approx(last["loss"], rel=1e-12)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_ranks_that_do_not_average_their_gradients_are_marked_wrong(tmp_path: Path):
    flags = [*TINY, "--measure", "2:30", "--output-dir", str(tmp_path)]
    broken = run("cifar", *flags, "--run-name", "broken", ranks=2, hook=gradients_apart())
    assert broken.code == 0, broken.err
    assert run("cifar", *flags, "--run-name", "alone").code == 0
    assert run("cifar", *flags, "--run-name", "right", ranks=2).code == 0
    jobs = plan([parse_setup("cpu:1"), parse_setup("cpu:2")], batch_size=60, rank_batch_size=60, scaling="strong")
    for name, verdict in (("right", "same"), ("broken", "WRONG")):
        runs = [{"setup": job.setup.name, "batch_size": 60, "round": 0, "error": None,
                 "benchmark": read_json(tmp_path / folder / "result.json")["benchmark"]}
                for job, folder in zip(jobs, ("alone", name), strict=True)]
        rows = summarise(jobs, runs, baseline=None)["rows"]
        assert rows[1]["verdict"] == verdict, (runs[0]["benchmark"], runs[1]["benchmark"])


@pytest.mark.parametrize("text", ["10", "a:b", "5:0", "-1:5", ""])
def test_measure_refuses_what_is_not_two_numbers(text: str):
    with pytest.raises(UsageError, match="must be WARMUP:STEPS"):
        TrainConfig(measure=text).check()
    assert measured_steps("20:100") == (20, 100)
