"""The roll in which ranks take their places: ranks of another job, late ones and repeated ones are refused."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

import pytest
import torch.distributed as dist

from launch.errors import DistributedError
from launch.launcher import Launch
from launch.rendezvous import take_place

pytestmark = pytest.mark.timeout(60)


class Meeting:
    """A store, and ranks that meet in it, each in a thread. How processes meet is in test_faults_ranks.py."""

    def __init__(self) -> None:
        self.store = dist.HashStore()
        self.threads = ThreadPoolExecutor(max_workers=16)

    def rank(self, rank: int, world_size: int, *, seconds: float = 10, agent: bool = False) -> Future[dist.Store]:
        """One more rank comes; `agent`: to a store that torchrun's agent keeps."""
        launch = Launch(launcher="torchrun", rank=rank, world_size=world_size, torchrun_hosts_store=agent)
        return self.threads.submit(take_place, self.store, launch, seconds)

    def job(self, world_size: int, **how: bool) -> list[dist.Store]:
        """All ranks of a job; they share a part of the store that no earlier one had."""
        return together([self.rank(rank, world_size, **how) for rank in range(world_size)])


def together(ranks: list[Future[dist.Store]]) -> list[dist.Store]:
    """What ranks get that find each other."""
    wait(ranks, timeout=20)
    stores = [rank.result(0) for rank in ranks]
    for store in stores:
        assert not store.check(["met"])
    stores[0].set("met", "here")
    assert [store.get("met") for store in stores] == [b"here"] * len(stores)
    return stores


@pytest.fixture
def meeting() -> Iterator[Meeting]:
    made = Meeting()
    yield made
    made.threads.shutdown(wait=True)


@pytest.mark.parametrize(("rank", "world_size", "why"), [
    (1, 2, "2 ranks have met there already"), (1, 3, "the 2 ranks of another job meet there"),
    (7, 8, "the 2 ranks of another job meet there")])
def test_a_rank_that_comes_to_another_job_is_refused_at_once_and_writes_nothing(
        meeting: Meeting, rank: int, world_size: int, why: str) -> None:
    meeting.job(2)
    before, began = meeting.store.num_keys(), time.monotonic()
    with pytest.raises(DistributedError, match=f"rank {rank} of {world_size} .*{why}.*MASTER_PORT"):
        meeting.rank(rank, world_size).result(5)
    assert time.monotonic() - began < 2
    assert meeting.store.num_keys() == before


def test_ranks_of_another_job_do_not_take_the_places_of_a_job_that_still_gathers(meeting: Meeting) -> None:
    first = meeting.rank(0, 3), meeting.rank(1, 3)
    for rank in (1, 2, 3):
        with pytest.raises(DistributedError, match="the 3 ranks of another job"):
            meeting.rank(rank, 4).result(5)
    while not meeting.store.check(["trainers/1/place/1"]):
        time.sleep(0.01)
    with pytest.raises(DistributedError, match="another rank 1 has come before"):
        meeting.rank(1, 3).result(5)
    together([*first, meeting.rank(2, 3)])


def test_another_job_of_the_same_size_is_told_by_its_id(meeting: Meeting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    first = meeting.rank(0, 2)
    while not meeting.store.check(["trainers/1/job"]):
        time.sleep(0.01)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "second")
    with pytest.raises(DistributedError, match="another job"):
        meeting.rank(1, 2).result(5)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    together([first, meeting.rank(1, 2)])


@pytest.mark.parametrize("late", [0, 1, 2])
def test_every_round_of_torchrun_has_a_roll_of_its_own_whoever_comes_first(meeting: Meeting, late: int) -> None:
    assert len(meeting.job(1, agent=True)) == 1  # a node alone; then one joins, at the same restart count
    for world_size in (3, 3, 2):
        others = [meeting.rank(rank, world_size, agent=True) for rank in range(world_size) if rank != late]
        threading.Event().wait(0.1)
        together([*others, meeting.rank(late, world_size, agent=True)] if late < world_size else others)


def test_a_round_that_never_became_full_does_not_hold_up_the_next(meeting: Meeting) -> None:
    died = meeting.rank(0, 3, agent=True, seconds=0.3), meeting.rank(1, 3, agent=True, seconds=0.3)
    for rank, why in zip(died, ("missing: rank 2", "rank 0 gave up"), strict=True):
        with pytest.raises(RuntimeError, match=why):
            rank.result(5)
    last = meeting.rank(2, 3, agent=True)  # takes its place in the old round first, if it comes first
    threading.Event().wait(0.1)
    together([meeting.rank(0, 3, agent=True), meeting.rank(1, 3, agent=True), last])


def test_a_stranger_at_torchruns_store_is_refused_when_no_other_round_begins(meeting: Meeting) -> None:
    meeting.job(2, agent=True)
    with pytest.raises(RuntimeError, match="2 ranks have met there already"):  # `meet` makes it one line
        meeting.rank(1, 2, agent=True, seconds=0.3).result(5)
