"""trainers/split_demo.py against the sizes that the DataParallel tutorial prints."""

import re

import pytest

from launch.command_line import parse
from launch.errors import UsageError
from tests.helpers.server import run
from trainers import split_demo

# Rows of each replica, batch by batch, as the tutorial prints them (in any order, its replicas being threads).
TUTORIAL = {
    1: [[30], [30], [30], [10]],
    2: [[15, 15], [15, 15], [15, 15], [5, 5]],
    3: [[10, 10, 10], [10, 10, 10], [10, 10, 10], [4, 4, 2]],
    8: [[4, 4, 4, 4, 4, 4, 4, 2]] * 3 + [[2, 2, 2, 2, 2]],
}
OUTSIDE = [30, 30, 30, 10]


def sizes(text: str) -> tuple[list[list[int]], list[int]]:
    """Rows of the parts of each batch, in the order they were printed, and of each whole batch."""
    parts: list[list[int]] = [[]]
    outside = []
    for line in text.splitlines():
        inside = re.fullmatch(r"\tIn Model: input size torch.Size\(\[(\d+), 5\]\) output size torch.Size\(\[\1, 2\]\)",
                              line)
        whole = re.fullmatch(r"Outside: input size torch.Size\(\[(\d+), 5\]\) output_size torch.Size\(\[\1, 2\]\)",
                             line)
        if inside:
            parts[-1].append(int(inside[1]))
        elif whole:
            outside.append(int(whole[1]))
            parts.append([])
        else:
            assert line.startswith("worked out, not run"), line
    return parts[:-1], outside


@pytest.mark.parametrize("replicas", [2, 3, 8])
def test_the_worked_out_split_is_what_the_tutorial_prints(
    replicas: int, capsys: pytest.CaptureFixture[str]
) -> None:
    split_demo.main(split_demo.SplitConfig(parallel="dp", replicas=replicas, device="cpu"))
    assert sizes(capsys.readouterr().out) == (TUTORIAL[replicas], OUTSIDE)


@pytest.mark.timeout(120)
def test_without_gpus_dataparallel_is_worked_out_and_says_so() -> None:
    done = run("split_demo", "--parallel", "dp", "--replicas", 8, "--device", "cpu", timeout=100)
    assert done.code == 0, done.err
    assert done.out.startswith("worked out, not run")
    assert sizes(done.out) == (TUTORIAL[8], OUTSIDE)


def test_one_process_sees_whole_batches(capsys: pytest.CaptureFixture[str]) -> None:
    split_demo.main(split_demo.SplitConfig(device="cpu"))
    assert sizes(capsys.readouterr().out) == (TUTORIAL[1], OUTSIDE)


@pytest.mark.timeout(180)
def test_three_ranks_are_printed_rank_by_rank_and_cover_every_batch() -> None:
    done = run("split_demo", "--device", "cpu", ranks=3, timeout=160)
    assert done.code == 0, done.err
    parts, outside = sizes(done.out)
    assert outside == OUTSIDE
    assert parts == [[10, 10, 10], [10, 10, 10], [10, 10, 10], [4, 3, 3]]  # every third sample: rank 0 has one more


@pytest.mark.timeout(120)
def test_ddp_without_a_launcher_ends_with_code_2_and_one_line() -> None:
    done = run("split_demo", "--parallel", "ddp", timeout=100)
    assert done.code == 2
    assert len(done.errors) == 1
    assert done.errors[0].startswith("ERROR usage: --parallel ddp")


@pytest.mark.parametrize("flags", [["--replicas=2"], ["--parallel=dp", "--replicas=0"]])
def test_replicas_that_cannot_be_are_named(flags: list[str]) -> None:
    with pytest.raises(UsageError, match=f"--replicas {flags[-1][-1]}"):
        split_demo.main(parse(split_demo.SplitConfig, args=flags))
