"""What launch/node.py adds to torchrun on one node; how nodes meet and part is tested on a real Slurm."""

import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from launch.node import unreachable
from tests.helpers.processes import PROGRAMS, ROOT, execute, start
from tests.helpers.server import free_port


@pytest.mark.timeout(90)
def test_a_stop_signal_that_comes_again_and_again_does_not_interrupt_the_saving(tmp_path: Path):
    process = start([sys.executable, "launch/node.py", "--nodes", "1", "--rendezvous", "localhost:1", "--id", "1", "--",
                     "--nproc-per-node=1", str(PROGRAMS / "save_slowly.py"), str(tmp_path)], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for _ in range(4):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    process.communicate(timeout=30)
    assert (tmp_path / "saved").exists()


@pytest.mark.timeout(60)
def test_a_port_of_the_rendezvous_that_is_taken_is_one_line_at_once() -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        done = execute([sys.executable, "launch/node.py", "--nodes=2", f"--rendezvous=localhost:{port}", "--id=1",
                        "--", "--nproc-per-node=1", "trainers/cifar.py"], cwd=ROOT, timeout=40)
    assert done.code == 6
    assert len(done.err.splitlines()) == 1, done.err
    assert f"ERROR distributed: rendezvous localhost:{port} (interface " in done.err
    assert "address already in use; see that" in done.err


def test_a_child_that_has_ended_but_was_not_collected_does_not_count():
    assert execute([sys.executable, str(PROGRAMS / "child_in_the_table.py")]).out.split() == ["False", "True", "False"]


@pytest.mark.timeout(60)
def test_a_host_that_refuses_answers_and_one_that_lets_a_connection_wait_does_not():
    assert not unreachable("127.0.0.1", free_port())
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        port = server.getsockname()[1]
        assert not unreachable("127.0.0.1", port)
        waiting = [socket.socket() for _ in range(8)]
        try:
            for client in waiting:  # the kernel drops what the queue does not hold, as a cut cable does
                client.setblocking(False)
                client.connect_ex(("127.0.0.1", port))
            assert unreachable("127.0.0.1", port)
        finally:
            for client in waiting:
                client.close()
