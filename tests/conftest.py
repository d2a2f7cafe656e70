"""The options --slow, --long and --slurm, and the real data, unpacked once a session where ../shared is there.

What is not run is skipped with its reason, never silently left out.
"""

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers.processes import SHARED
from tests.helpers.server import common_server
from tests.helpers.slurm import Cluster, start_cluster

# Those on Slurm wait most of their time, the others compute: side by side from the beginning.
LONGEST = ["test_slurm_faults", "test_cifar", "test_slurm_stops", "test_docs", "test_slurm", "test_resume_exact",
           "test_faults_waits", "test_own_code", "test_faults_torchrun", "test_faults_ranks", "test_named_weights",
           "test_faults_stop", "test_resume_elastic", "test_checkpoint_crashes", "test_evaluate", "test_mnist",
           "test_odd_checkpoints", "test_benchmark_runs", "test_image_folder", "test_faults_files", "test_mixing",
           "test_predict", "test_library", "test_transforms", "test_cache", "test_damaged_data"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the long sweeps too")
    parser.addoption("--long", action="store_true", help="run what takes minutes or times an idle machine, too")
    parser.addoption("--slurm", action="store_true", help="run the tests on a real Slurm cluster that they start")


@pytest.hookimpl(optionalhook=True)  # pytest-xdist may be missing where pytest is started by hand
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """With `-n auto`: most tests wait for something half of their time. Timings are taken one at a time."""
    return 0 if config.getoption("--long") else min(8, (os.cpu_count() or 1) + 1 + config.getoption("--slurm"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what was not asked for. The longest files come first: each is run by one process, for its fixtures."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    for item in items:
        for mark in ("slow", "long", "slurm"):
            if item.get_closest_marker(mark) and not config.getoption(f"--{mark}"):
                item.add_marker(pytest.mark.skip(reason=f"{mark}: run with --{mark}"))


@pytest.fixture(autouse=True)
def without_gpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests mean the CPU, in this process too (processes that they start: helpers/processes.py), unless marked cuda."""
    if not request.node.get_closest_marker("cuda"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def pytest_sessionfinish() -> None:
    if common_server.cache_info().currsize:
        common_server().close()


def unpack(name: str, folder: Path) -> Path:
    script = SHARED / "data" / "unpack.py"
    if not script.exists():
        pytest.skip(f"needs the real {name}: no {script}")
    with open(folder / "lock", "w") as alone:
        fcntl.flock(alone, fcntl.LOCK_EX)
        subprocess.run([sys.executable, str(script), "--out", str(folder), "--only", name], check=True, timeout=120,
                       capture_output=True)  # what is there already it only checks
    return folder


@pytest.fixture(scope="session")
def real_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for every real data set that a test asks for, in whichever of the processes that run side by side."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "real-data"
    folder.mkdir(exist_ok=True)
    return folder


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
def cluster() -> Iterator[Cluster]:
    """A Slurm cluster for the whole session, taken down at its end."""
    yield from start_cluster()
