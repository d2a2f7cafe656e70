"""A run that resumes with another number of ranks trains on the same samples in order; a stop loses nothing."""

import random
import signal
import time
from pathlib import Path

import pytest

from tests.helpers.comparing import outcome, run_in
from tests.helpers.hooks import at, log_images, log_steps, send, slow_steps
from tests.helpers.processes import largest_difference, newest_checkpoint, read_json
from tests.helpers.server import NORMED, slack, start

PLAIN = ["--model", "net", "--lr", "0.02"]  # neither BatchNorm nor dropout, which depend on the samples of a rank


def images_seen(folder: Path) -> dict[tuple[int, int], str]:
    """The checksum of the augmented image at every (step, position in the global batch)."""
    seen: dict[tuple[int, int], str] = {}
    for path in folder.glob("samples-*.txt"):
        for line in path.read_text().splitlines():
            step, position, checksum = line.split()
            key = (int(step), int(position))
            assert seen.setdefault(key, checksum) == checksum, f"two different images at {key}"
    return seen


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_stopped_on_two_ranks_goes_on_with_the_same_samples_on_one_three_or_four(tmp_path: Path) -> None:
    assert run_in(tmp_path / "2", *PLAIN, ranks=2, hook=log_images()).codes == [0, 0]
    expected = images_seen(tmp_path / "2")
    assert sorted(expected) == [(step, position) for step in range(20) for position in range(60)]
    for ranks in (1, 3, 4):
        folder = tmp_path / str(ranks)
        stopped = run_in(folder, *PLAIN, ranks=2, hook=[log_images(), at(7, "backward", send(15), ranks=[1])])
        assert stopped.codes == [75, 75], stopped.err
        assert 0 < newest_checkpoint(folder / "r")["step"] < 20
        ended = run_in(folder, *PLAIN, ranks=ranks, hook=log_images())
        assert ended.codes == [0] * ranks, ended.err
        assert images_seen(folder) == expected
        assert largest_difference(newest_checkpoint(folder / "r")["model"],
                                  newest_checkpoint(tmp_path / "2" / "r")["model"]) < 1e-5


def check_stops(folder: Path, *, number: int, seed: int) -> None:
    """Stop a run at random moments: each time the checkpoint holds every step that was computed."""
    chance = random.Random(seed)
    flags = [*NORMED, "--epochs", "60", "--output-dir", folder]
    for _ in range(number):
        hook = [log_steps(), slow_steps(0.04)]  # 24 s in all: more than all the stops take
        with start("cifar", *flags, folder=folder, ranks=2, hook=hook) as job:
            job.wait_for_line("parameters")
            time.sleep(chance.uniform(0.0, 0.6))
            number = chance.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
            job.signal(number, chance.choice([None, 0, 1]))
            asked_at = time.monotonic()
            ended = job.wait(30)
        assert ended.codes == [75, 75], ended.err
        assert time.monotonic() - asked_at < 3 * slack()  # two seconds, and a step
        status = read_json(folder / "r" / "status.json")
        computed = {int((folder / f"step-{rank}.txt").read_text()) for rank in range(2)}
        assert status["state"] == "PREEMPTED"
        assert computed == {status["step"]} == {newest_checkpoint(folder / "r")["step"]}
    assert run_in(folder, "--epochs", "60", ranks=2).codes == [0, 0]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_stop_at_a_random_moment_loses_no_step(tmp_path: Path) -> None:
    check_stops(tmp_path, number=2, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_stops_at_random_moments_lose_no_step_and_change_nothing(tmp_path: Path) -> None:
    check_stops(tmp_path / "stopped", number=20, seed=2)
    assert run_in(tmp_path / "whole", "--epochs", "60", ranks=2).codes == [0, 0]
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")
