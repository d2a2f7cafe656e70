"""A run that was killed and started again computes, to the last bit, what one never stopped does."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.comparing import outcome, run_in
from tests.helpers.hooks import Hook, at, kill, send, warm_workers
from tests.helpers.images import image_tree

PHASES = ("data", "forward", "backward", "optimizer")
STEPS = 20
Reference = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def never_stopped(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """What a run computes that is never stopped, made once for each trainer and number of ranks."""
    @functools.cache
    def reference(trainer: str, ranks: int, *flags: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp(f"{trainer}-{ranks}")
        ended = run_in(folder, *flags, trainer=trainer, ranks=ranks)
        assert ended.codes == [0] * ranks, ended.err
        return outcome(folder)
    return reference


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_tree(tmp_path_factory.mktemp("images"))


def kill_at(step: int, *, ranks: int) -> Hook:
    """A hook: SIGKILL at that step, of all ranks or, every fourth time, of the last one only."""
    phase = "evaluate" if step == STEPS else PHASES[step % len(PHASES)]
    return at(step, phase, kill, ranks=[ranks - 1] if step % 4 == 3 else None)


def check_killed(codes: list[int]) -> None:
    assert codes[-1] == -9
    assert set(codes) <= {-9, 6}  # a rank that was left over says so


def check_kill_and_resume(folder: Path, expected: dict[str, Any], step: int, *, ranks: int) -> None:
    check_killed(run_in(folder, ranks=ranks, hook=kill_at(step, ranks=ranks)).codes)
    resumed = run_in(folder, ranks=ranks)
    assert resumed.codes == [0] * ranks, resumed.err
    if step > 10:
        assert "(from step-" in resumed.out  # it did resume from a checkpoint
    assert outcome(folder) == expected


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("step", "ranks"), [(14, 1), (20, 2)])
def test_a_run_killed_at_a_step_ends_as_one_never_killed(never_stopped: Reference, tmp_path: Path,
                                                         step: int, ranks: int) -> None:
    check_kill_and_resume(tmp_path, never_stopped("cifar", ranks), step, ranks=ranks)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_killed_at_any_step_ends_as_one_never_killed(never_stopped: Reference, tmp_path: Path,
                                                           ranks: int) -> None:
    for step in range(1, STEPS + 1):
        check_kill_and_resume(tmp_path / str(step), never_stopped("cifar", ranks), step, ranks=ranks)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_three_ranks_add_gradients_up_in_the_same_order_after_a_resume(never_stopped: Reference,
                                                                       tmp_path: Path) -> None:
    check_kill_and_resume(tmp_path, never_stopped("cifar", 3), 13, ranks=3)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 0), (1, 2), (2, 2)])
def test_a_run_on_decoded_images_killed_at_every_step_in_turn_ends_as_one_never_killed(
        never_stopped: Reference, images: Path, tmp_path: Path, ranks: int, workers: int) -> None:
    flags = ["--data-dir", str(images), "--workers", str(workers)]
    num_resumed = 0
    steps = range(1, STEPS + 1) if workers == 0 else range(ranks, STEPS + 1, 2)  # workers need seconds to start
    for step in steps:
        hook = [warm_workers(), kill_at(step, ranks=ranks)]
        killed = run_in(tmp_path, *flags, trainer="image_folder", ranks=ranks, hook=hook)
        check_killed(killed.codes)
        num_resumed += "(from step-" in killed.out
    assert num_resumed > len(steps) / 2
    assert run_in(tmp_path, *flags, trainer="image_folder", ranks=ranks).codes == [0] * ranks
    without_workers = ("--data-dir", str(images), "--workers", "0")
    assert outcome(tmp_path) == never_stopped("image_folder", ranks, *without_workers)


@pytest.mark.timeout(240)
def test_a_killed_run_with_a_moving_average_and_adam_ends_as_one_never_killed(never_stopped: Reference,
                                                                             tmp_path: Path) -> None:
    flags = ("--optimizer", "adamw", "--ema-decay", "0.9", "--schedule", "cosine", "--lr", "0.003",
             "--accumulation-steps", "2", "--clip-grad-norm", "1", "--eval-every", "2")
    expected = never_stopped("cifar", 2, *flags)
    check_killed(run_in(tmp_path, *flags, ranks=2, hook=at(14, "backward", kill)).codes)
    assert run_in(tmp_path, *flags, ranks=2).codes == [0, 0]
    assert outcome(tmp_path) == expected


@pytest.mark.timeout(240)
def test_a_run_stopped_in_its_evaluation_and_then_killed_logs_nothing_twice(never_stopped: Reference,
                                                                           tmp_path: Path) -> None:
    assert run_in(tmp_path, hook=at(10, "evaluate", send(15))).codes == [75]
    assert run_in(tmp_path, hook=at(11, "data", kill)).codes == [-9]
    assert run_in(tmp_path).codes == [0]
    assert outcome(tmp_path) == never_stopped("cifar", 1)
