"""The watchdog's judgement: who is silent, who speaks, which rank the others wait for. Two ranks in one process."""

import json
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from launch.failure import JobFailure
from launch.heartbeats import Heartbeats
from launch.launcher import Launch, parent_of
from launch.watchdog import Watchdog
from tests.helpers.server import free_port

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def store() -> dist.Store:
    port = free_port()
    return dist.PrefixStore("test", dist.TCPStore("localhost", port, is_master=True, wait_for_workers=False,
                                                  timeout=timedelta(seconds=5)))


def test_only_the_first_rank_to_fail_speaks_and_only_once(store: dist.Store) -> None:
    first, second = (JobFailure(Launch(rank=rank, world_size=2)) for rank in range(2))
    first.heartbeats = Heartbeats(store, rank=0, world_size=2)
    second.heartbeats = Heartbeats(store, rank=1, world_size=2)
    assert second.claim_error_line()
    assert not first.claim_error_line()
    assert not second.claim_error_line()


def test_without_a_store_a_process_speaks_once() -> None:
    failure = JobFailure(Launch())
    assert [failure.claim_error_line() for _ in range(2)] == [True, False]


def test_when_the_store_has_died_the_first_rank_that_lives_elsewhere_speaks() -> None:
    class Dead:
        def add(self, key: str, number: int) -> int:
            raise RuntimeError("Connection reset by peer")

    failures = [JobFailure(Launch(rank=rank, world_size=8, local_world_size=4, torchrun_hosts_store=True))
                for rank in range(8)]
    for failure in failures:
        failure.heartbeats = SimpleNamespace(store=Dead())  # pyright: ignore[reportAttributeAccessIssue]
    assert [failure.launch.rank for failure in failures if failure.claim_error_line()] == [4]


def test_a_rank_that_sends_nothing_unreachable_and_one_that_has_left_is_not(store: dist.Store) -> None:
    ranks = [Heartbeats(store, rank=rank, world_size=4) for rank in range(4)]
    for rank in ranks[:3]:
        rank.send(5, "backward")
    before = ranks[0].last()
    ranks[0].send(6, "backward")
    ranks[1].send(5, "left")
    before_leaving = ranks[0].last()
    assert ranks[0].silent_since(before) == [2, 3]  # 2 says nothing more, 3 never did
    assert ranks[0].silent_since(before_leaving) == [2, 3]  # 1 has left of its own will


def test_the_thread_ends_when_it_is_told_to(store: dist.Store) -> None:
    class Run:
        def beat(self) -> None:
            ticks.append(time.monotonic())

        def failed(self, reason: str, *, step: int) -> None: ...

        def preempted(self, reason: str) -> None: ...

    watchdog = Watchdog()
    ticks: list[float] = []
    watchdog.attend(Run())
    watchdog.start(store)
    time.sleep(1.2)
    watchdog.stop()
    number = len(ticks)
    time.sleep(0.7)
    assert len(ticks) == number >= 1
    assert json.loads(store.get("beat/0"))[1:3] == [0, "start"]


def test_a_node_has_one_speaker_where_the_store_cannot_be_reached() -> None:
    port = free_port()
    first, second = (JobFailure(Launch(rank=rank, world_size=2)) for rank in range(2))
    assert first.claim_on_this_node(port)
    assert not second.claim_on_this_node(port)
    assert first._node_token is not None
    first._node_token.close()  # as when its process ends
    assert second.claim_on_this_node(port)


def test_the_parent_of_a_process_that_does_not_exist_is_unknown() -> None:
    assert parent_of(2**22 - 1) is None
