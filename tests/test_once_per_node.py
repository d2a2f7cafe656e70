"""Work that one rank of each node does while the others wait."""

import socket
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from datasets import download
from datasets.errors import DataError
from launch.process_group import World
from launch.stop import Stopped, StopRequest
from trainers.engine.once_per_node import once_per_node


def nothing_there(folder: Path) -> None:
    raise DataError("not there")


def test_a_server_that_falls_silent_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(download, "SILENT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        with pytest.raises(DataError, match=r"--download: X could not be fetched \(timed out\)"):
            download.fetch(lambda folder: urllib.request.urlopen(url), tmp_path, "X", name="X", load=nothing_there)
    assert socket.getdefaulttimeout() is None
    assert not list(tmp_path.iterdir())


def test_a_function_runs_to_its_end_and_what_it_raises_is_raised():
    done = []
    once_per_node(World(), lambda: (time.sleep(1.2), done.append(1)), stop=StopRequest())
    assert done == [1]

    def broken() -> None:
        raise DataError("broken")

    with pytest.raises(DataError, match="broken"):
        once_per_node(World(), broken, stop=StopRequest())
    once_per_node(World(local_rank=1), broken, stop=StopRequest())  # that rank only waits


def test_a_stop_request_does_not_wait_for_a_function():
    request, began = StopRequest(), time.monotonic()
    threading.Timer(0.5, request.ask, ["SIGTERM"]).start()
    with pytest.raises(Stopped):
        once_per_node(World(), lambda: time.sleep(20), stop=request)
    assert time.monotonic() - began < 5
