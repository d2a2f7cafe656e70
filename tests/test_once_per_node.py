"""Work that one rank of each node does while the others wait."""

import shutil
import socket
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datasets import download, image_folder
from datasets.errors import DataError
from datasets.image_folder import ImageTree
from launch.process_group import World
from launch.stop import Stopped, StopRequest
from tests.helpers.images import write_tree
from trainers.engine.once_per_node import once_per_node
from trainers.image_folder import ImageFolderConfig, from_cache, load_data


def nothing_there(folder: Path) -> None:
    raise DataError("not there")


def test_a_server_that_falls_silent_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(download, "SILENT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        with pytest.raises(DataError, match=r"--download: X could not be fetched \(timed out\)"):
            download.fetch(lambda folder: urllib.request.urlopen(url), tmp_path, "X", load=nothing_there)
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


@pytest.fixture
def four_nodes(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[World], object]], None]:
    """Runs a function on four nodes of one rank each, as threads."""
    meeting, values = threading.Barrier(4), {}

    def gather(world: World, value: Any) -> list[Any]:
        values[world.rank] = value
        meeting.wait(20)
        found = [values[rank] for rank in range(4)]
        meeting.wait(20)
        return found

    monkeypatch.setattr("trainers.engine.once_per_node.gather", gather)
    monkeypatch.setattr("trainers.image_folder.gather", gather)
    monkeypatch.setattr("trainers.engine.once_per_node.from_main",
                        lambda world, action: gather(world, action() if world.is_main else None)[0])

    def on_all(act: Callable[[World], object]) -> None:
        threads = [threading.Thread(target=act, args=(World(rank=rank, world_size=4),)) for rank in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)

    return on_all


DISKS = ("shared", "own", "shared", "other")  # of each node


def test_of_the_nodes_that_see_one_folder_one_rank_does_the_work(four_nodes: Any, tmp_path: Path) -> None:
    done: list[int] = []
    four_nodes(lambda world: once_per_node(world, lambda: done.append(world.rank), stop=StopRequest(),
                                           folder=tmp_path / DISKS[world.rank] / "cache"))
    assert sorted(done) == [0, 1, 3]
    assert not [path for disk in DISKS for path in (tmp_path / disk / "cache").iterdir()]


@pytest.mark.parametrize("other", ["the same", "other files"])
def test_a_folder_is_listed_by_one_rank_of_those_that_see_it_and_every_rank_has_its_files(
        other: str, four_nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = write_tree(tmp_path / "shared")
    for disk in DISKS[1::2]:
        shutil.copytree(tree, tmp_path / disk)
    if other == "other files":
        shutil.copy(next((tree / "train" / "disc").iterdir()), tmp_path / "other" / "train" / "disc" / "one more.png")
    listed, found, errors = list[Path](), dict[int, Any](), list[str]()
    load = image_folder.load
    monkeypatch.setattr(image_folder, "load", lambda folder, **how: listed.append(folder) or load(folder, **how))

    def rank(world: World) -> None:
        try:
            found[world.rank] = load_data(
                ImageFolderConfig(data_dir=tmp_path / DISKS[world.rank], batch_size=12), world)
        except DataError as error:
            errors.append(str(error))

    four_nodes(rank)
    assert sorted(path.name for path in listed) == ["other", "own", "shared"]
    if other == "other files":
        assert ["the ranks found different files in it" in error for error in errors] == [True] * 4
    else:
        assert not errors
        assert {(splits.train.names, *splits.test.targets.tolist()) for splits in found.values()} == {
            (found[0].train.names, *found[0].test.targets.tolist())}


def test_files_are_looked_at_for_a_cache_by_one_rank_of_those_that_see_them(
        four_nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, _ = image_folder.load(write_tree(tmp_path / "shared"))
    assert train is not None
    looks, look, found = list[Path](), ImageTree.sizes_and_times, dict[int, Any]()
    monkeypatch.setattr(ImageTree, "sizes_and_times", lambda tree: looks.append(tree.folder) or look(tree))
    config = ImageFolderConfig(cache=True, cache_dir=tmp_path / "cache", image_size=24)
    four_nodes(lambda world: found.update({world.rank: from_cache(config, {"train": train}, world)["train"].path(3)}))
    assert found == dict.fromkeys(range(4), train.path(3))
    assert len(looks) == 1


def test_a_folder_that_one_node_lacks_is_one_error_on_all(four_nodes: Any, tmp_path: Path) -> None:
    write_tree(tmp_path / "shared")
    errors: list[str] = []

    def rank(world: World) -> None:
        with pytest.raises(DataError) as caught:
            load_data(ImageFolderConfig(data_dir=tmp_path / ("nowhere" if world.rank == 3 else "shared")), world)
        errors.append(str(caught.value))

    four_nodes(rank)
    assert ["nowhere: no such folder" in error for error in errors] == [True] * 4
