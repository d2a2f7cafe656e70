"""The input pipelines that launch/benchmark.py --pipeline compares."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from datasets.pipeline_speed import photographs, trained_on
from launch.bench.pipeline import pipeline_cells, variants
from tests.helpers.processes import PROGRAMS, ROOT, execute, read_json


def test_pipelines_are_compared_without_workers_and_with_up_to_one_a_core():
    assert variants(4) == ["pil:0", "pil:1", "pil:2", "pil:4", "v2:0", "v2:1", "v2:2", "v2:4", "batch"]
    assert pipeline_cells({"pil:0": {0: 2.0, 1: 3.0, 2: 1.0}, "batch": {0: 8.0, 1: 6.0}})[1:] == [
        ["PIL transforms, 0 workers", "2", "1 - 3", "1.00 (1.00 - 1.00)"],
        ["whole batch at once (ours)", "7", "6 - 8", "3.00 (2.00 - 4.00)"]]


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


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """train/ and test/ of two classes of smooth JPEGs."""
    for split, number in (("train", 24), ("test", 2)):
        for index in range(number):
            pixels = torch.randint(256, (12, 16, 3), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
            path = tmp_path / "photos" / split / "ab"[index % 2] / f"{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.numpy()).resize((320, 240)).save(path)
    return tmp_path / "photos"


@pytest.mark.parametrize("kind", ["torchvision", "ours", "timm"])
def test_every_pipeline_of_photographs_gives_the_same_kind_of_batch(kind: str, photos: Path):
    if kind == "timm":
        pytest.importorskip("timm")
    batches = trained_on(photographs(kind, photos, 4, 0))
    images = torch.cat([next(batches)[0] for _ in range(8)])  # more than an epoch
    assert images.shape == (32, 3, 224, 224)
    assert images.dtype == torch.float32
    assert abs(float(images.mean()) - 0.2) < 0.2  # grey, (0.5 - 0.45) / 0.225
    assert 0.5 < float(images.std()) < 1.2


def test_photographs_are_compared_with_timm_in_the_same_work_and_round():
    trained = "2 workers, a trivial network trained"
    rates = {"torchvision, a folder": {0: 1.0}, "timm, a folder": {0: 2.0, 1: 4.0}, "ours, a folder": {0: 4.0, 1: 4.0},
             f"timm, {trained}": {1: 10.0}, f"ours, {trained}": {0: 99.0, 1: 15.0}}
    assert [cells[3] for cells in pipeline_cells(rates)] == [
        "x timm (rounds)", "0.50 (0.50 - 0.50)", "1.00 (1.00 - 1.00)", "1.50 (1.00 - 2.00)", "1.00 (1.00 - 1.00)",
        "1.50 (1.50 - 1.50)"]


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_photographs_of_a_folder_are_measured_from_files_packs_and_in_the_trainer(photos: Path, tmp_path: Path):
    done = execute([sys.executable, str(ROOT / "launch" / "benchmark.py"), "--pipeline", "--data-dir", str(photos),
                    "--rounds", "1", "--seconds", "0.2", "--batch-size", "4", "--output-dir", str(tmp_path / "out")],
                   timeout=270)
    assert done.code == 0, done.err
    rows = [one["variant"] for one in read_json(tmp_path / "out" / "pipeline.json")["rows"]]
    assert len(rows) == 8 if importlib.util.find_spec("timm") else 6
    assert not list((tmp_path / "out").glob(".packs-*"))


@pytest.mark.long
@pytest.mark.timeout(500)
def test_whole_batches_are_faster_than_single_samples(tmp_path: Path):
    done = execute([sys.executable, str(ROOT / "launch" / "benchmark.py"), "--pipeline", "--rounds", "1", "--seconds",
                    "1", "--output-dir", str(tmp_path)], timeout=480)
    assert done.code == 0, done.err
    rates = {one["variant"]: one["images_per_second"] for one in read_json(tmp_path / "pipeline.json")["rows"]}
    assert rates["batch"] > 3 * max(rates["pil:0"], rates["v2:0"])  # 9.5 times v2:0 was measured
    assert "whole batch at once" in done.out
