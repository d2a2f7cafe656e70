"""The benchmark's arithmetic: what is planned, what the figures come to, and what is not to be believed."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch.bench.runs import Job, command, error_in, everything, parse_setup, plan, powers_up_to, rotated, why_not
from launch.bench.summary import summarise, warnings_of
from launch.bench.table import as_table, comparison, curves_of, draw, judgement, page, speed_cells
from launch.errors import UsageError

LAPTOP = {"cores": 4, "gpus": []}
SERVER = {"cores": 8, "gpus": ["A"] * 4}


def jobs(*names: str, batch_size: int = 64, scaling: str = "strong") -> list[Job]:
    return plan([parse_setup(name) for name in names], batch_size=batch_size, rank_batch_size=batch_size,
                scaling=scaling)


def figures(rate: float, *, ranks: int = 1, **changed: Any) -> dict[str, Any]:
    """What a trainer reports of a run that computed all the time."""
    return {
        "samples_per_second": rate, "seconds": 10.0, "loss": 2.0, "weights_moved": 1.0, "batch_norm": False,
        "world_size": ranks, "threads_per_rank": 1, "cpu_seconds": [9.9] * ranks, "queued_seconds": [0.01] * ranks,
        "machine_seconds": [10.0 * ranks] * ranks,
        "peak_memory_bytes": [100 + rank for rank in range(ranks)], "flops_per_sample": 10.0,
        "matrix_flops_per_second": [1000.0] * ranks, "data_seconds": [0.1] * ranks,
        "forward_backward_seconds": [0.5] * ranks, "optimizer_seconds": [0.1] * ranks,
        "communication_seconds": [None] if ranks == 1 else [0.2] * ranks, **changed,
    }


def runs_of(job: Job, *measured: dict[str, Any] | None, error: str | None = None) -> list[dict[str, Any]]:
    return [{"setup": job.setup.name, "batch_size": job.batch_size, "round": number, "benchmark": one,
             "error": None if one else error} for number, one in enumerate(measured)]


def report_of(rows: dict[str, Any]) -> dict[str, Any]:
    machine = {"host": "h", "processor": "P", "cores": 2, "gpus": [], "torch": "2"}
    method = {"steps": 10, "warmup_steps": 5, "rounds": 2, "threads": 1}
    return {"format": 1, "model": "net", "trainer": "cifar", "dataset": "synthetic", "recipe": "blitz",
            "command": "python launch/benchmark.py", "machine": machine, "method": method, "warnings": ["look out"],
            "not_run": [{"setup": "gpu:1", "batch_size": 64, "why": "no GPU"}], **rows}


def test_a_setup_is_read_with_its_options():
    setup = parse_setup("ddp:4+bf16+channels-last+compile+threads=3+gloo")
    assert (setup.kind, setup.devices, setup.precision, setup.threads) == ("ddp", 4, "bf16", 3)
    assert setup.channels_last
    assert setup.compile
    assert setup.gloo


@pytest.mark.parametrize("text", ["tpu:1", "cpu", "cpu:0", "gpu:2", "cpu:1+bf61", "ddp:two", "cpu:1+", "cpu:2+gloo"])
def test_an_unknown_setup_is_refused_by_name(text: str):
    with pytest.raises(UsageError, match=r"--setups " + text.split("+")[0]):
        parse_setup(text)


def test_every_setup_stands_for_the_command_a_person_would_type():
    def words(name: str) -> str:
        return " ".join(command(parse_setup(name), "cifar", ["--model", "net"]))
    assert "launch/torchrun.py" not in words("cpu:1")
    assert "--device cpu --parallel none" in words("cpu:1")
    assert "--nproc-per-node=2" in words("cpu:2")
    assert "--device cpu --parallel ddp --backend gloo" in words("cpu:2")
    assert "--device cuda --parallel none" in words("gpu:1")
    assert "launch/torchrun.py" not in words("dp:4")
    assert "--parallel dp" in words("dp:4")
    assert "--nproc-per-node=1 " in words("ddp:1")
    options = "--precision bf16 --compile --channels-last --threads 2"
    assert options in words("cpu:1+bf16+compile+channels-last+threads=2")


def test_what_the_machine_lacks_is_said_and_not_run():
    assert "needs 2 GPUs, this machine has none" in str(why_not(parse_setup("ddp:2"), LAPTOP, 64))
    assert "does not divide over 3" in str(why_not(parse_setup("cpu:3"), LAPTOP, 64))
    assert "nothing to split" in str(why_not(parse_setup("dp:1"), SERVER, 64))
    assert why_not(parse_setup("ddp:2+gloo"), {"cores": 2, "gpus": ["A"]}, 64) is None
    assert why_not(parse_setup("ddp:4"), SERVER, 64) is None
    assert why_not(parse_setup("cpu:8"), LAPTOP, 64) is None  # more ranks than cores: a warning, not a refusal


def test_by_default_everything_here_is_compared_and_what_is_missing_is_listed():
    assert everything(LAPTOP) == ["cpu:1", "cpu:2", "cpu:4", "gpu:1", "dp:2", "ddp:2"]
    assert everything(SERVER)[-4:] == ["dp:2", "dp:4", "ddp:2", "ddp:4"]
    assert powers_up_to(6) == [1, 2, 4, 6]
    assert powers_up_to(0) == []


def test_one_device_at_the_base_batch_begins_both_curves():
    planned = {job.key: job.scalings for job in jobs("cpu:1", "cpu:2", scaling="both")}
    assert planned == {("cpu:1", 64): ("strong", "weak"), ("cpu:2", 64): ("strong",), ("cpu:2", 128): ("weak",)}


def test_over_as_many_rounds_as_setups_each_has_every_place_once():
    planned = jobs("cpu:1", "cpu:2", "cpu:4")
    order = [[job.key for job in rotated(planned, number)] for number in range(3)]
    for place in range(3):
        assert len({turn[place] for turn in order}) == 3
    assert all(len(set(turn)) == 3 for turn in order)


def test_a_row_holds_median_and_spread_and_speedups_are_taken_within_rounds():
    one, two = jobs("cpu:1", "cpu:2")
    slow_round = [100.0, 50.0, 120.0]  # the second round was slow for both
    runs = (runs_of(one, *(figures(rate) for rate in slow_round))
            + runs_of(two, *(figures(1.8 * rate, ranks=2) for rate in slow_round)))
    summary = summarise([one, two], runs, baseline=None)
    first, second = summary["rows"]
    assert summary["baseline"] == "cpu:1"
    assert (first["samples_per_second"], first["slowest_round"], first["fastest_round"]) == (100, 50, 120)
    assert second["speedup"] == pytest.approx(1.8)
    assert second["efficiency"] == pytest.approx(0.9)
    assert second["peak_memory_bytes"] == 101
    assert second["step_seconds"]["communication"] == pytest.approx(0.2)
    assert first["step_seconds"]["communication"] is None
    assert first["utilisation"] == pytest.approx(100 * 10 / 1000)
    assert second["utilisation"] == pytest.approx(180 * 10 / 2000)


def test_weak_scaling_is_compared_at_the_same_batch_per_device():
    planned = jobs("cpu:1", "cpu:2", scaling="weak")
    runs = runs_of(planned[0], figures(100)) + runs_of(planned[1], figures(190, ranks=2))
    rows = summarise(planned, runs, baseline=None)["rows"]
    assert rows[1]["batch_size"] == 128
    assert rows[1]["speedup"] == pytest.approx(1.9)
    assert rows[1]["verdict"] is None  # nobody else at 128


def test_the_slowest_one_device_setup_is_the_default_baseline_and_another_can_be_named():
    planned = jobs("cpu:2", "cpu:1+threads=2", "cpu:1")
    runs = [run for job, rate in zip(planned, (190, 150, 100), strict=True) for run in runs_of(job, figures(rate))]
    assert summarise(planned, runs, baseline=None)["baseline"] == "cpu:1"
    named = summarise(planned, runs, baseline="cpu:2")
    assert named["rows"][2]["speedup"] == pytest.approx(100 / 190)


@pytest.mark.parametrize("changed", [{"loss": 2.01}, {"loss": None}, {"weights_moved": 1.1}])
def test_a_setup_that_learned_something_else_is_marked_wrong(changed: dict[str, float]):
    one, two = jobs("cpu:1", "cpu:2")
    rows = summarise([one, two], runs_of(one, figures(100)) + runs_of(two, figures(180, ranks=2, **changed)),
                     baseline=None)["rows"]
    assert [row["verdict"] for row in rows] == ["same", "WRONG"]
    assert any("cpu:2 (batch 64) is WRONG" in line for line in warnings_of(rows, rounds=1))


def test_a_loss_that_is_no_number_is_wrong_even_alone():
    planned = jobs("cpu:1")
    rows = summarise(planned, runs_of(planned[0], figures(100, loss=None)), baseline=None)["rows"]
    assert rows[0]["verdict"] == "WRONG"
    assert "not finite" in as_table(speed_cells(rows, "cpu:1"))


def test_rounding_and_batchnorm_are_no_reason_to_call_a_loss_wrong():
    one, two, low = jobs("cpu:1", "cpu:2", "cpu:1+bf16")
    runs = (runs_of(one, figures(100)) + runs_of(two, figures(180, ranks=2, loss=2.00001))
            + runs_of(low, figures(150, loss=2.02)))
    assert [row["verdict"] for row in summarise([one, two, low], runs, baseline=None)["rows"]] == ["same"] * 3
    runs = runs_of(one, figures(100, batch_norm=True)) + runs_of(two, figures(180, ranks=2, loss=2.02, batch_norm=True))
    assert [row["verdict"] for row in summarise([one, two], runs, baseline=None)["rows"]] == ["same"] * 2


@pytest.mark.parametrize("changed", [{"queued_seconds": [2.0], "machine_seconds": [15.0]},
                                     {"cpu_seconds": [7.0], "queued_seconds": [None], "machine_seconds": [None]}])
def test_a_busy_machine_is_noticed_and_its_rows_are_named(changed: dict[str, Any]):
    one, two = jobs("cpu:1", "cpu:2")
    rows = summarise([one, two], runs_of(one, figures(100, **changed)) + runs_of(two, figures(180, ranks=2)),
                     baseline=None)["rows"]
    warning = warnings_of(rows, rounds=1)
    assert [row["busy"] for row in rows] == [True, False]
    assert len(warning) == 1
    assert "cpu:1 (batch 64)" in warning[0]
    assert "cpu:2" not in warning[0]


def test_ranks_that_wait_for_each_others_cores_alone_do_not_make_a_machine_busy():
    planned = plan([parse_setup("cpu:2")], batch_size=64, rank_batch_size=64, scaling="strong")
    runs = runs_of(planned[0], figures(100, ranks=2, queued_seconds=[2.0, 2.0]))
    assert [row["busy"] for row in summarise(planned, runs, baseline=None)["rows"]] == [False]


def test_a_failed_setup_keeps_its_row_and_says_how():
    one, two = jobs("cpu:1", "cpu:2")
    runs = runs_of(one, figures(100)) + runs_of(two, None, error="exit code 1: boom")
    summary = summarise([one, two], runs, baseline=None)
    assert summary["rows"][1]["error"] == "exit code 1: boom"
    assert "failed" in as_table(speed_cells(summary["rows"], "cpu:1"))
    assert any("boom" in line for line in warnings_of(summary["rows"], rounds=1))


def test_the_error_of_a_run_is_its_own_error_line_and_not_the_launchers():
    log = "start\nERROR usage: --batch-size 3: no\nTraceback\ntorch.distributed.elastic.ChildFailedError:\n"
    assert error_in(log) == "ERROR usage: --batch-size 3: no"
    assert error_in("Traceback\nValueError: odd\n  File x\nx.ChildFailedError: \n") == "ValueError: odd"
    assert error_in("") == "no output"


def row(rates: tuple[float, float, float], rounds: int = 3) -> dict[str, Any]:
    return {"slowest_round": rates[0], "samples_per_second": rates[1], "fastest_round": rates[2], "rounds": rounds,
            "setup": "cpu:1", "batch_size": 64}


def test_only_a_difference_beyond_both_spreads_counts():
    old = row((90, 100, 110))
    assert judgement(old, row((111, 120, 130))) == "faster, beyond the noise"
    assert judgement(old, row((70, 80, 89))) == "slower, beyond the noise"
    assert judgement(old, row((105, 120, 130))) == "within the noise"
    assert "unknown" in judgement(old, row((120, 120, 120), rounds=1))


def test_two_reports_are_compared_row_by_row():
    old, new = report_of({"rows": [row((90, 100, 110))]}), report_of({"rows": [row((190, 200, 210))]})
    assert comparison(old, new).splitlines()[-1].split() == [
        "cpu:1", "|", "64", "|", "100", "|", "200", "|", "2.000", "|", "faster,", "beyond", "the", "noise"]


def test_the_report_is_shown_as_text_and_as_a_picture(tmp_path: Path):
    planned = jobs("cpu:1", "cpu:2", scaling="both")
    runs = [run for job in planned for run in runs_of(job, figures(100.0, ranks=job.setup.ranks))]
    report = report_of(summarise(planned, runs, baseline=None))
    for expected in ("cpu:2", "communication", "gpu:1", "look out", "200.00 ms"):
        assert expected in page(report)
    draw(report, tmp_path / "benchmark.png")
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    assert curves_of(report["rows"]) == {"cpu, strong": [(1, 1.0), (2, 1.0)], "cpu, weak": [(1, 1.0), (2, 1.0)]}
    json.dumps(report)
