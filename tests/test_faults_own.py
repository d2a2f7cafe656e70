"""Faults in people's own code that only some of a job's processes meet: a worker, or one rank."""

from pathlib import Path

import pytest

from tests.helpers.own import LINEAR, train, write

RAISES_AT_17 = """
        class Bad(TensorDataset):
            def __getitem__(self, index):
                if index == 17:
                    raise OSError("no such picture")  # here
                return super().__getitem__(index)
        def load():
            return Bad(*data(24).tensors), data(9)"""


def check_sample_is_named(folder: Path, *flags: object, ranks: int | None) -> None:
    line = write(folder, RAISES_AT_17)
    ended = train(folder, *LINEAR, *flags, ranks=ranks)
    assert sorted(set(ended.codes))[0] == 2, ended.err
    assert set(ended.codes) <= {2, 6}  # a rank whose peer has left
    assert [each for each in ended.err.splitlines() if each.startswith("ERROR")] == [
        f"ERROR usage: --data mine.py:load: mine.py line {line}: OSError: no such picture "
        f"(sample 17 of the training set)"]
    assert "Traceback" not in ended.err


@pytest.mark.timeout(60)
def test_a_users_data_set_that_raises_in_a_worker_is_named_with_its_sample(tmp_path: Path) -> None:
    check_sample_is_named(tmp_path, "--workers", 1, ranks=None)


@pytest.mark.timeout(60)
def test_a_users_data_set_that_raises_on_one_rank_is_named_with_its_sample(tmp_path: Path) -> None:
    check_sample_is_named(tmp_path, ranks=2)


@pytest.mark.timeout(60)
def test_ranks_that_find_other_samples_are_stopped(tmp_path: Path) -> None:
    write(tmp_path, """
        def load():
            generator = torch.Generator()
            generator.seed()
            return random_split(data(33), [24, 9], generator=generator)""")
    ended = train(tmp_path, *LINEAR, ranks=2)
    assert ended.codes == [3, 3]
    assert "the ranks found different samples; seed whatever splits" in ended.err


@pytest.mark.timeout(60)
def test_mixing_with_a_regression_is_one_line(tmp_path: Path) -> None:
    write(tmp_path, """
        def load():
            return tuple(TensorDataset(torch.rand(24, 3, 8, 8), torch.rand(24, 1)) for _ in range(2))""")
    ended = train(tmp_path, *LINEAR, "--mixup", 0.2, ranks=2)
    assert ended.codes == [2, 2]
    assert [line for line in ended.err.splitlines() if line.startswith("ERROR")] == [
        "ERROR usage: --mixup 0.2: mixes images (C, H, W) and their labels; these are inputs (3, 8, 8) with numbers; "
        "leave it out"]
