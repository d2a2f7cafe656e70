"""The input pipelines that launch/benchmark.py --pipeline compares."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.bench.pipeline import pipeline_cells, row, variants
from tests.helpers.processes import PROGRAMS, ROOT, execute, read_json


def test_pipelines_are_compared_without_workers_and_with_up_to_one_a_core():
    assert variants(4) == ["pil:0", "pil:1", "pil:2", "pil:4", "v2:0", "v2:1", "v2:2", "v2:4", "batch"]
    assert pipeline_cells([row("pil:0", [1.0, 3.0, 2.0]), row("batch", [8.0])])[2][1:] == ["8", "8 - 8", "4.00"]


VARIANTS = ["pil:0", "v2:1", "batch"]


@pytest.fixture(scope="module")
def first_batches() -> dict[str, dict[str, Any]]:
    """What the first batch of each pipeline is like, and all images normalised, from one process."""
    done = execute([sys.executable, str(PROGRAMS / "first_batches.py"), *VARIANTS], timeout=100)
    assert done.code == 0, done.err
    return json.loads(done.out)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_input_pipeline_gives_the_same_kind_of_batch(first_batches: dict[str, dict[str, Any]], variant: str):
    """Float batches of the same shape, mean and spread: else their speeds could not be compared."""
    batch, whole = first_batches[variant], first_batches["whole"]
    assert batch["shape"] == [500, 3, 32, 32]
    assert batch["dtype"] == "torch.float32"
    assert abs(batch["mean"] - whole["mean"]) < 0.1
    assert abs(batch["std"] - whole["std"]) < 0.1
    assert batch["labels"] == 500


@pytest.mark.long
@pytest.mark.timeout(500)
def test_whole_batches_are_faster_than_single_samples(tmp_path: Path):
    done = execute([sys.executable, str(ROOT / "launch" / "benchmark.py"), "--pipeline", "--rounds", "1", "--seconds",
                    "1", "--output-dir", str(tmp_path)], timeout=480)
    assert done.code == 0, done.err
    rates = {one["variant"]: one["images_per_second"] for one in read_json(tmp_path / "pipeline.json")["rows"]}
    assert rates["batch"] > 3 * max(rates["pil:0"], rates["v2:0"])  # 9.5 times v2:0 was measured
    assert "whole batch at once" in done.out
