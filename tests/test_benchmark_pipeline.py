"""The input pipelines that launch/benchmark.py --pipeline compares."""

import sys
from pathlib import Path

import pytest

from launch.bench.pipeline import pipeline_cells, row, variants
from tests.helpers.processes import PROGRAMS, ROOT, execute, read_json


def test_pipelines_are_compared_without_workers_and_with_up_to_one_a_core():
    assert variants(4) == ["pil:0", "pil:1", "pil:2", "pil:4", "v2:0", "v2:1", "v2:2", "v2:4", "batch"]
    assert pipeline_cells([row("pil:0", [1.0, 3.0, 2.0]), row("batch", [8.0])])[2][1:] == ["8", "8 - 8", "4.00"]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("variant", ["pil:0", "v2:1", "batch"])
def test_every_input_pipeline_gives_the_same_kind_of_batch(variant: str):
    """Float batches of the same shape, mean and spread: else their speeds could not be compared."""
    done = execute([sys.executable, str(PROGRAMS / "pipeline_batch.py"), variant], timeout=100)
    assert done.code == 0, done.err


@pytest.mark.long
@pytest.mark.timeout(500)
def test_whole_batches_are_faster_than_single_samples(tmp_path: Path):
    done = execute([sys.executable, str(ROOT / "launch" / "benchmark.py"), "--pipeline", "--rounds", "1", "--seconds",
                    "1", "--output-dir", str(tmp_path)], timeout=480)
    assert done.code == 0, done.err
    rates = {one["variant"]: one["images_per_second"] for one in read_json(tmp_path / "pipeline.json")["rows"]}
    assert rates["batch"] > 3 * max(rates["pil:0"], rates["v2:0"])  # 9.5 times v2:0 was measured
    assert "whole batch at once" in done.out
