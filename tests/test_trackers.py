"""trainers/engine/trackers with the real packages, offline: what was logged is read back, also after kills and stops.

A package that is not installed is skipped by name.
"""

import importlib
import importlib.util
import json
import signal
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.errors import UsageError
from launch.network import is_reachable
from tests.helpers.comparing import run_in
from tests.helpers.hooks import at, kill, log_connections, packages_from, send
from tests.helpers.processes import read_json
from tests.helpers.server import NORMED, run, start
from trainers.cifar import CifarConfig
from trainers.engine.config import TrainConfig
from trainers.engine.trackers.tracker import TrackedRun, TrackerName, values_of

pytestmark = pytest.mark.timeout(120)

NAMES: tuple[TrackerName, ...] = ("wandb", "mlflow", "trackio", "tensorboard")
INSTALLED = [name for name in NAMES if importlib.util.find_spec(name) is not None]
Logged = list[tuple[str, int, float]]  # name, step, value


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three processes: the first killed at step 8, the second stopped at step 14."""
    folder = tmp_path_factory.mktemp("tracked")
    flags = [*NORMED, "--track", *INSTALLED, "--output-dir", folder / "runs"]
    nowhere = "http://127.0.0.1:1"  # where nobody listens
    how: dict[str, Any] = {
        "folder": folder, "TRACKIO_DIR": str(folder / "trackio"), "WANDB_BASE_URL": nowhere,
        "WANDB_API_KEY": "0" * 40, "MLFLOW_TRACKING_URI": nowhere, "HF_HOME": str(folder)}
    log = log_connections(str(folder / "connections.txt"))
    assert run("cifar", *flags, hook=[log, at(8, "backward", kill)], **how).codes == [-9]
    ids = {path.name: read_json(path)["id"] for path in (folder / "runs" / "r" / "trackers").glob("*.json")}
    with start("cifar", *flags, hook=[log, at(14, "backward", send(int(signal.SIGTERM)))], **how) as job:
        stopped = job.wait()
    assert stopped.codes == [75], stopped.err
    ended = run("cifar", *flags, hook=log, **how)
    assert ended.codes == [0], ended.err
    assert "WARNING" not in stopped.err + ended.err
    assert not [line for line in ended.out.splitlines() if line.startswith("*")]  # of Trackio's own
    assert ids == {path.name: read_json(path)["id"] for path in (folder / "runs" / "r" / "trackers").glob("*.json")}
    return folder


def need(name: str) -> None:
    if name not in INSTALLED:
        pytest.skip(f"needs the package {name}: pip install -e .[{name}]")


def records(log: bytes) -> Iterator[bytes]:
    """Those of a LevelDB log, as which wandb writes its files: a header of 7 bytes, and one before each part."""
    place, record = 7, b""
    while place + 7 <= len(log):
        if (left := 32768 - place % 32768) < 7:  # zeros, as no header fits
            place += left
            continue
        size, kind = struct.unpack_from("<HB", log, place + 4)  # after a checksum
        record += log[place + 7:place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # all of a record, or the last part of one
            yield record
            record = b""


def logged_by_wandb(folder: Path) -> Logged:
    number = read_json(folder / "runs/r/trackers/wandb.json")["id"]
    parse = importlib.import_module("wandb.proto.wandb_internal_pb2").Record.FromString
    found: Logged = []
    paths = list((folder / "runs/r/trackers/wandb").glob("offline-run-*/*.wandb"))
    assert len(paths) == 2  # of the process that was stopped, and of the last one
    for path in paths:
        assert path.name == f"run-{number}.wandb"
        for record in map(parse, records(path.read_bytes())):
            items = {item.key or "/".join(item.nested_key): float(item.value_json) for item in record.history.item}
            for name, value in items.items():
                step = f"{name.partition('/')[0]}/step"
                if step in items and name != step:
                    found.append((name, int(items[step]), value))
    return found


def logged_by_mlflow(folder: Path) -> Logged:
    where, number = read_json(folder / "runs/r/trackers/mlflow.json")["id"].split()
    assert where == (folder / "runs/mlruns").as_uri()
    client = importlib.import_module("mlflow").MlflowClient(where)
    info = client.get_run(number)
    assert (info.info.status, info.info.run_name, info.data.params["batch_size"]) == ("FINISHED", "r", "60")
    return [(name, metric.step, metric.value) for name in info.data.metrics
            for metric in client.get_metric_history(number, name)]


def logged_by_trackio(folder: Path) -> Logged:
    storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
    lines = storage.get_logs("cifar", read_json(folder / "runs/r/trackers/trackio.json")["id"])
    return [(name, line["step"], value) for line in lines for name, value in line.items() if "/" in name]


def logged_by_tensorboard(folder: Path) -> Logged:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "runs/r/tensorboard"))
    events.Reload()
    return [(name, event.step, event.value) for name in events.Tags()["scalars"] for event in events.Scalars(name)]


READERS = {"wandb": logged_by_wandb, "mlflow": logged_by_mlflow, "trackio": logged_by_trackio,
           "tensorboard": logged_by_tensorboard}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_run_killed_and_stopped_is_one_tracked_run_with_every_step_once(
        name: TrackerName, tracked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need(name)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if name == "trackio":
        monkeypatch.setattr(importlib.import_module("trackio.sqlite_storage"), "TRACKIO_DIR", tracked / "trackio")
    logged = READERS[name](tracked)
    assert max(Counter((key, step) for key, step, _ in logged).values()) == 1
    lines = [json.loads(text) for text in (tracked / "runs" / "r" / "metrics.jsonl").read_text().splitlines()]
    expected = {(key, line["step"]): value for line in lines for key, value in values_of(line).items()}
    missing = {(split_of(key), step) for key, step in expected.keys() - {entry[:2] for entry in logged}}
    if name == "trackio":  # whose own thread writes twice a second: the kill cost what it had not written
        assert all(step <= 8 for _, step in missing)
    else:  # the kill may fall between the record of a line and the line
        assert len(missing) <= (name != "wandb"), missing
    expected = {entry: value for entry, value in expected.items() if (split_of(entry[0]), entry[1]) not in missing}
    found = {(key, step): value for key, step, value in logged}
    assert found.keys() == expected.keys()
    for key, step in found:
        if key != "train/samples_per_second":  # of lines that were written again after the kill
            assert found[key, step] == pytest.approx(expected[key, step], rel=1e-5)


def split_of(key: str) -> str:
    return key.partition("/")[0]


@pytest.mark.slow
def test_no_tracker_asks_another_machine_where_none_can_be_reached(tracked: Path) -> None:
    if INSTALLED == ["tensorboard"]:
        pytest.skip("needs a tracker that may have a server: pip install -e .[wandb]")
    hosts = set((tracked / "connections.txt").read_text().splitlines())
    assert "127.0.0.1" in hosts  # was tried
    assert not {host for host in hosts if host not in ("127.0.0.1", "::1", "localhost", "None", "")
                and not host.startswith(("/", "b'"))}  # the sockets of files


def test_a_run_continues_with_other_trackers_and_they_get_what_it_has_reported_before(tmp_path: Path) -> None:
    assert run("cifar", *NORMED, "--max-steps", "3", "--output-dir", tmp_path / "runs").codes == [0]
    ended = run("cifar", *NORMED, "--max-steps", "6", "--output-dir", tmp_path / "runs", "--track", "tensorboard")
    assert ended.codes == [0], ended.err
    assert {3, 6} <= {step for name, step, _ in logged_by_tensorboard(tmp_path) if name == "test/loss"}


def test_a_dry_run_tells_no_tracker(tmp_path: Path) -> None:
    (tmp_path / "trackio").mkdir()
    (tmp_path / "trackio" / "__init__.py").write_text("raise OSError('was started')")
    ended = run_in(tmp_path, "--track", "trackio", "--dry-run", hook=packages_from(str(tmp_path)))
    assert (ended.codes, ended.err) == ([0], "")


def test_every_figure_of_a_line_is_told_but_not_its_place() -> None:
    line = {"split": "test", "step": 3, "epoch": 0, "loss": 0.5, "accuracy": None, "learning_rate": 0.1,
            "samples_per_second": None, "seconds": 2.0, "f1": 0.25, "metric_precision": 0.75}
    assert values_of(line) == {"test/loss": 0.5, "test/f1": 0.25, "test/metric_precision": 0.75}
    assert "train/learning_rate" in values_of({**line, "split": "train"})


def test_the_users_own_project_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_EXPERIMENT_NAME": "mine", "WANDB_PROJECT": "mine",
                        "WANDB_MODE": "offline"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run_here = TrackedRun(tmp_path / "runs" / "r", "cifar", {})
    (run_here.path / "trackers").mkdir(parents=True)
    if "mlflow" in INSTALLED:
        tracker = importlib.import_module("trainers.engine.trackers.mlflow").start(run_here)
        where, number = tracker.id.split()
        client = importlib.import_module("mlflow").MlflowClient(where)
        assert client.get_experiment(client.get_run(number).info.experiment_id).name == "mine"
    if "wandb" in INSTALLED:
        wandb, asked = importlib.import_module("wandb"), dict[str, Any]()
        wandb.teardown()  # its settings are read once
        monkeypatch.setattr(wandb, "init", lambda **options: asked.update(options))
        with pytest.raises(AttributeError):  # as there is no run
            importlib.import_module("trainers.engine.trackers.wandb").start(run_here)
        assert asked["project"] == "mine"


def test_a_metric_may_have_a_name_that_mlflow_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    start_one = importlib.import_module("trainers.engine.trackers.mlflow").start
    tracker = start_one(TrackedRun(tmp_path / "runs" / "r", "cifar", {}))
    tracker.log(3, {"test/f1@0.5 (ß)": 0.25})
    where, number = tracker.id.split()
    logged = importlib.import_module("mlflow").MlflowClient(where).get_run(number).data.metrics
    assert logged == {"test/f1_0.5 _ß_": 0.25}


@pytest.mark.slow
def test_a_run_that_starts_over_is_another_tracked_run(tmp_path: Path) -> None:
    need("mlflow")
    flags = [*NORMED, "--max-steps", "3", "--track", "mlflow", "--output-dir", tmp_path]
    assert run("cifar", *flags, folder=tmp_path).codes == [0]
    first = read_json(tmp_path / "r/trackers/mlflow.json")["id"]
    assert run("cifar", *flags, "--resume", "never", folder=tmp_path).codes == [0]
    assert read_json(tmp_path / "r/trackers/mlflow.json")["id"] != first


def test_tensorboard_is_a_tracker_and_each_is_asked_once() -> None:
    assert CifarConfig(tensorboard=True).trackers() == ["tensorboard"]
    assert CifarConfig(tensorboard=True, track=("wandb", "tensorboard", "wandb")).trackers() == ["wandb", "tensorboard"]


def test_a_folder_with_the_name_of_a_tracker_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("tensorboard")
    (tmp_path / "trackio").mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(__import__("sys").modules, "trackio", raising=False)
    importlib.invalidate_caches()
    with pytest.raises(UsageError, match="--track trackio: not installed"):
        TrainConfig(track=("trackio",)).check()


def test_a_server_is_reachable_when_somebody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert is_reachable(f"{address}/path")
        monkeypatch.setenv("https_proxy", address)
        assert is_reachable("https://nowhere.invalid")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert not is_reachable(address)
