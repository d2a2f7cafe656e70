"""Mistakes in flags, data and devices: one line from one rank, before anything is trained or overwritten."""

import shutil
from pathlib import Path

import pytest

from tests.helpers.comparing import run_in
from tests.helpers.faults import Fault, assert_ends_as_specified, cases, check

pytestmark = pytest.mark.timeout(60)

FLAGS = [
    Fault(name="batch-not-divisible", ranks=2, flags=("--batch-size", "61"), codes=(2,), state=None,
          error="ERROR usage: --batch-size 61: not divisible by 2 ranks x 1 accumulation steps; try 6"),
    Fault(name="odd-batch-with-mixing", ranks=2, flags=("--batch-size", "30", "--mixup", "0.2"), codes=(2,), state=None,
          error="ERROR usage: --batch-size 30: leaves 15 samples per rank and micro-batch, and .* need pairs; try 32"),
    Fault(name="data-set-smaller-than-a-batch", ranks=2, flags=("--batch-size", "1000"), codes=(3,), state="FAILED",
          error="ERROR data: --batch-size 1000: the training set has only 600 samples"),
    Fault(name="unknown-model", ranks=2, flags=("--model", "nett"), codes=(2,), state=None,
          error="ERROR usage: --model nett: unknown.*did you mean net"),
    Fault(name="unknown-flag", ranks=2, flags=("--learning-rat", "1"), codes=(2,), state=None,
          error="ERROR usage: .*--learning-rat"),
    Fault(name="unknown-recipe", ranks=2, flags=("--recipe", "blits"), codes=(2,), state=None,
          error="ERROR usage: --recipe blits: unknown.*did you mean blitz"),
    Fault(name="unknown-precision", flags=("--precision", "fp8"), codes=(2,), state=None,
          error="ERROR usage: .*precision"),
    Fault(name="half-precision-on-a-CPU", ranks=2, flags=("--precision", "fp16"), codes=(2,), state="FAILED",
          error="ERROR usage: --precision fp16: on a CPU"),
    Fault(name="no-CUDA-device", ranks=2, flags=("--device", "cuda"), codes=(5,), state=None,
          variables=(("CUDA_VISIBLE_DEVICES", ""),), error="ERROR device: --device cuda: no CUDA device"),
    Fault(name="NCCL-without-CUDA", ranks=2, flags=("--backend", "nccl", "--device", "cpu"), codes=(5,), state=None,
          error="ERROR device: --backend nccl: needs CUDA"),
    Fault(name="ddp-without-a-launcher", flags=("--parallel", "ddp"), codes=(2,), state="FAILED",
          error="ERROR usage: --parallel ddp: no launcher started this process"),
    Fault(name="ranks-that-would-train-apart", ranks=2, flags=("--parallel", "none"), codes=(2,), state="FAILED",
          error="ERROR usage: --parallel none: 2 ranks would train apart"),
    Fault(name="a-checkpoint-that-is-not-there", ranks=2, flags=("--resume", "none.pt"), codes=(4,), state="FAILED",
          error="ERROR checkpoint: none.pt: no such checkpoint"),
    Fault(name="images-too-small-for-the-model", ranks=2, flags=("--model", "alexnet"), codes=(2,), state="FAILED",
          error=r"ERROR usage: --model alexnet: cannot take inputs of 3 x 32 x 32 \(.*\); choose a model"),
    Fault(name="one-sample-per-micro-batch", ranks=2, codes=(2,), state="FAILED",
          flags=("--model", "mobilenet_v3_small", "--accumulation-steps", "30"),
          error="ERROR usage: --accumulation-steps 30: leaves one sample per rank and micro-batch, .*; lower it"),
    Fault(name="one-sample-per-rank", flags=("--model", "mobilenet_v3_small", "--batch-size", "1"), codes=(2,),
          state="FAILED", error="ERROR usage: --batch-size 1: leaves one sample per rank.*; raise it"),
    Fault(name="a-policy-mistyped", ranks=2, flags=("--auto-augment", "randaugmemt"), codes=(2,), state=None,
          error="ERROR usage: .*randaugmemt.*--auto-augment"),
    Fault(name="a-magnitude-without-a-policy", ranks=2, flags=("--augment-magnitude", "9"), codes=(2,), state=None,
          error="ERROR usage: --augment-magnitude 9: is of randaugment, 0 to 30, and augmix, .*-augment None"),
    Fault(name="a-probability-above-1", flags=("--random-erase", "1.5"), codes=(2,), state=None,
          error="ERROR usage: --random-erase 1.5: must be at least 0 and at most 1"),
    Fault(name="data-missing", ranks=2, flags=("--dataset", "cifar10", "--data-dir", "nowhere"), codes=(3,),
          state="FAILED", error="ERROR data: --data-dir nowhere: CIFAR-10 is not there"),
]


@pytest.mark.parametrize("fault", cases(FLAGS, default={
    "batch-not-divisible", "odd-batch-with-mixing", "data-set-smaller-than-a-batch", "unknown-flag",
    "no-CUDA-device", "data-missing", "images-too-small-for-the-model", "one-sample-per-micro-batch"}))
def test_a_mistake_is_told_in_one_line_before_anything_is_trained(tmp_path: Path, fault: Fault) -> None:
    assert_ends_as_specified(fault, tmp_path)
    assert not (tmp_path / "runs" / "r" / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["flipped", "truncated", "removed"])
def test_one_damaged_file_of_the_real_data_is_noticed(tmp_path: Path, cifar10: Path,
                                                      damage: str) -> None:
    shutil.copytree(cifar10 / "cifar-10-batches-py", tmp_path / "data" / "cifar-10-batches-py")
    path = tmp_path / "data" / "cifar-10-batches-py" / "data_batch_3"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data if damage == "flipped" else data[:-100])
    if damage == "removed":
        path.unlink()
    ended = run_in(tmp_path, "--dataset", "cifar10", "--data-dir", tmp_path / "data", ranks=2)
    check(ended, Fault(name=damage, ranks=2, codes=(3,), error="ERROR data: --data-dir .*: CIFAR-10 is damaged"))
