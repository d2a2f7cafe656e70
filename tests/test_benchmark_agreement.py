"""The benchmark against a loop that anyone would write by hand: the same model, batch, data and thread."""

import json
import sys
from statistics import median
from typing import Any

import pytest

from launch.bench.runs import parse_setup, plan, run_job
from launch.bench.summary import is_busy
from tests.helpers.processes import PROGRAMS, execute

ROUNDS = 5
BATCH_SIZE, WARMUP, STEPS = 128, 30, 300
AGREEMENT = 0.05


def bare_loop() -> dict[str, float]:
    done = execute([sys.executable, str(PROGRAMS / "bare_loop.py"), *map(str, (BATCH_SIZE, WARMUP, STEPS))],
                   timeout=120)
    assert done.code == 0, done.err
    return json.loads(done.out)


def benchmarked() -> dict[str, Any]:
    job = plan([parse_setup("cpu:1")], batch_size=BATCH_SIZE, rank_batch_size=BATCH_SIZE, scaling="strong")[0]
    flags = ["--onednn", "--model", "net", "--recipe", "blitz", "--dataset", "synthetic", "--learning-rate", "0.05"]
    result = run_job(job, "cifar", flags, steps=f"{WARMUP}:{STEPS}", timeout_seconds=120)
    assert result["error"] is None, result["error"]
    return result["benchmark"]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_one_cpu_process_is_as_fast_as_a_loop_written_by_hand(record_property: Any) -> None:
    """Both by turns. CPU time is compared always, and wall time where nothing else had the machine."""
    bare, ours = [], []
    for number in range(ROUNDS):
        order = [(bare, bare_loop), (ours, benchmarked)]
        for results, measure in order[:: 1 if number % 2 == 0 else -1]:
            results.append(measure())
    cpu = median(hand["cpu_seconds"] / one["cpu_seconds"][0] for hand, one in zip(bare, ours, strict=True))
    wall = median(hand["seconds"] / one["seconds"] for hand, one in zip(bare, ours, strict=True))
    busy = any(is_busy(one, parse_setup("cpu:1")) for one in ours)
    speed = median(one["samples_per_second"] for one in ours)
    text = (f"cpu:1 {speed:,.0f} samples/s; relative to the bare loop: {cpu:.3f} by CPU time, {wall:.3f} by wall time"
            f"{', machine busy' if busy else ''}")
    record_property("agreement", text)
    print(text)
    assert cpu == pytest.approx(1, abs=AGREEMENT), text
    if not busy:
        assert wall == pytest.approx(1, abs=AGREEMENT), text
