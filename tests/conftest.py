"""The options --slow, --long and --slurm, and the real data, unpacked once a session where ../shared is there.

What is not run is skipped with its reason, never silently left out.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs import Server
from tests.slurm_support import Cluster, start_cluster
from tests.support import SHARED


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the long sweeps too")
    parser.addoption("--long", action="store_true", help="run what takes minutes or times an idle machine, too")
    parser.addoption("--slurm", action="store_true", help="run the tests on a real Slurm cluster that they start")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for mark in ("slow", "long", "slurm"):
            if item.get_closest_marker(mark) and not config.getoption(f"--{mark}"):
                item.add_marker(pytest.mark.skip(reason=f"{mark}: run with --{mark}"))


def unpack(name: str, folder: Path) -> Path:
    script = SHARED / "data" / "unpack.py"
    if not script.exists():
        pytest.skip(f"needs the real {name}: no {script}")
    subprocess.run([sys.executable, str(script), "--out", str(folder), "--only", name], check=True, timeout=120,
                   capture_output=True)
    return folder


@pytest.fixture(scope="session")
def real_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for every real data set that a test asks for."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def cifar10(real_data: Path) -> Path:
    return unpack("cifar-10", real_data)


@pytest.fixture(scope="session")
def mnist(real_data: Path) -> Path:
    return unpack("mnist", real_data)


@pytest.fixture(scope="session")
def fashion_mnist(real_data: Path) -> Path:
    return unpack("fashion-mnist", real_data)


@pytest.fixture(scope="session")
def cats_dogs(real_data: Path) -> Path:
    return unpack("cats-dogs", real_data) / "cats-dogs"


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The process that forks trainers for the tests of faults and of resuming."""
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A Slurm cluster for the whole session, taken down at its end."""
    yield from start_cluster()
