"""Checkpoints and JSON files whose content is odd though their hashes are right: one warning, and the previous file.

All in one process: random parts of a state are replaced by values of other types, signs and sizes, and committed with a
manifest that is right about them. What is then taken must train; what is not must cost one line.
"""

import copy
import json
import math
import os
import random
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from launch.errors import CheckpointError, RunError
from tests.helpers.checkpoints import state_of
from trainers.engine.checkpoints.files import checkpoint_path, committed, manifest_path
from trainers.engine.checkpoints.load import load_or_fail, newest_good
from trainers.engine.checkpoints.save import file_sha256, manifest, write_checkpoint
from trainers.engine.config import TrainConfig
from trainers.engine.history import History
from trainers.engine.metrics import TrainingSums
from trainers.engine.optimizer import build_optimizer
from trainers.engine.resume import choose_checkpoint, unlike_run
from trainers.engine.run.folder import RunFolder
from trainers.engine.session import to_plain

SECONDS = 10  # that any mutation may take
OPTIMIZERS = ["sgd", "adam", "rmsprop", "muon"]
pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore")]


def nested(depth: int) -> list[Any]:
    inner: list[Any] = []
    for _ in range(depth):
        inner = [inner]
    return inner


def tensors() -> list[Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.quantize_per_tensor(torch.ones(5), 0.1, 0, torch.qint8)
    return [torch.ones(1).expand(2**20, 2**20), torch.ones(7, 7), torch.ones(()), torch.empty(0),
            torch.eye(3).to_sparse(), torch.empty(5, device="meta"), torch.zeros(2, dtype=torch.complex64),
            torch.tensor(-3.0), quantized,
            torch.full((5,), math.nan), torch.tensor([True]), torch.as_strided(torch.ones(2), (10**9,), (0,))]


ODD: list[Any] = [None, True, -1, 0.5, -0.5, 2**63, -(2**70), 10**400, math.nan, math.inf, -math.inf, "", "text",
                  b"\x00", [], {}, [1, "a"], {"a": 1}, {3: {}}, nested(30), nested(400), *tensors()]


class Small:
    """What `resume` needs of a trainer: a network, its optimizer, and what they continue with."""

    def __init__(self, optimizer: str) -> None:
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
        self.config = TrainConfig(optimizer=optimizer, norm_bias_lr_scale=2.0)  # pyright: ignore
        self.optimizer: Any = build_optimizer(self.network, self.config)

    def state(self) -> dict[str, Any]:
        return {"model": self.network.state_dict(), "optimizer": self.optimizer.state_dict(),
                "ema": self.network.state_dict()}

    def train(self) -> None:
        self.network(torch.randn(5, 4)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def whole_state(self, step: int) -> dict[str, Any]:
        line = {"epoch": 0, "step": 3, "train_loss": 1.0, "train_accuracy": None, "test_loss": math.nan,
                "test_accuracy": 0.5, "seconds": 2.0}
        return copy.deepcopy({
            **state_of(step), **self.state(), "best": {"accuracy": 0.5, "loss": 1.0, "step": 3},
            "history": {"epochs": [line], "running": [[1.0, 2.0, 3.0, 0.0]], "train_seconds": 2.0},
            "config": to_plain(self.config)})

    def resume_from(self, state: dict[str, Any]) -> None:
        """As a trainer does, and one step more."""
        self.network.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        history = History()
        history.load_state(state["history"], best=state["best"])
        history.has_recorded(state["step"])
        TrainingSums(classification=True).restore(state["history"]["running"], SimpleNamespace(  # pyright: ignore
            world_size=2, rank=0, is_main=True))
        assert max(state["step"], state["epoch"], state["samples_consumed"]) >= 0
        self.train()


@pytest.fixture(params=OPTIMIZERS)
def small(request: pytest.FixtureRequest) -> Iterator[Small]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    small = Small(request.param)
    small.train()
    yield small
    torch.set_num_threads(threads)


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every part of nested dicts and lists, by the keys that lead to it."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in items:
        yield (*path, key)
        yield from places(child, (*path, key))


def mutated(state: dict[str, Any], rng: random.Random) -> tuple[dict[str, Any], str]:
    """The state with one part replaced or missing, and a text that says which."""
    state = copy.deepcopy(state)
    *outer, last = rng.choice(list(places(state)))
    holder: Any = state
    for key in outer:
        holder = holder[key]
    before = holder[last]
    value = rng.choice([*ODD, -before - 1 if type(before) in (int, float) else None])
    if rng.random() < 0.1:
        del holder[last]
    else:
        holder[last] = value
    return state, f"{[*outer, last]} = {type(value)!s}"


def commit(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint whatever it holds, with a manifest that is right about it where there can be one."""
    torch.save(state, path)
    size, sha256 = path.stat().st_size, file_sha256(path)
    try:
        text = manifest(state, size=size, sha256=sha256)
    except Exception:
        text = json.dumps({"size": size, "sha256": sha256}).encode()
    manifest_path(path).write_bytes(text)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run", is_main=True)
    folder.checkpoints.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("mutations", [75, pytest.param(500, marks=pytest.mark.slow)])
def test_odd_content_under_a_right_hash_costs_one_warning_and_the_previous_file(
        run: RunFolder, small: Small, mutations: int, capsys: pytest.CaptureFixture[str]) -> None:
    rng, taken = random.Random(mutations), 0
    write_checkpoint(run.checkpoints, small.whole_state(7))
    newest, previous = checkpoint_path(run.checkpoints, 8), checkpoint_path(run.checkpoints, 7)
    whole = small.whole_state(8)
    for _ in range(mutations):
        state, what = mutated(whole, rng)
        try:
            commit(newest, state)
        except (NotImplementedError, RuntimeError, RecursionError):  # no file can hold it
            continue
        began = time.monotonic()
        chosen = choose_checkpoint("auto", run, lambda state: unlike_run(state, small))  # pyright: ignore
        assert time.monotonic() - began < SECONDS, what
        said = capsys.readouterr().err
        if chosen == newest:
            assert said == "", what
            Small(small.config.optimizer).resume_from(load_or_fail(newest))
            taken += 1
        else:
            assert chosen == previous, what
            assert said.startswith("WARNING checkpoint: "), what
            assert said.count("\n") == 1, what
        for path in run.checkpoints.glob("*.damaged"):
            path.unlink()
    assert taken < mutations / 2


ODD_TEXTS = [b"", b"\xff\xfe", b"null", b"[]", b"{", b'"text"', b"[" * 10**5, b'{"a":' * 10**5,
             b'{"size": Infinity, "sha256": "a"}', b'{"size": 1e400, "sha256": 3}', b'{"size": -1, "sha256": []}',
             b'{"size": ' + b"9" * 5000 + b', "sha256": ""}', b'{"size": {"a": 1}, "sha256": null}',
             b'{"size": "NaN", "sha256": true}']


@pytest.mark.parametrize("text", ODD_TEXTS, ids=lambda text: repr(text[:24]))
def test_an_odd_manifest_costs_one_warning(run: RunFolder, text: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (7, 8):
        write_checkpoint(run.checkpoints, state_of(step))
    manifest_path(checkpoint_path(run.checkpoints, 8)).write_bytes(text)
    chosen = choose_checkpoint("auto", run)
    assert chosen == checkpoint_path(run.checkpoints, 7)
    said = capsys.readouterr().err
    assert said.count("\n") == said.count("WARNING checkpoint: ") == 1


def odd_json(rng: random.Random, content: dict[str, Any]) -> bytes:
    """The JSON of a file with one value replaced by an odd one, or an odd text instead."""
    if rng.random() < 0.2:
        return rng.choice(ODD_TEXTS)
    name = rng.choice(list(content))
    plain = [value for value in ODD if not isinstance(value, Tensor | bytes) and value != {3: {}}]
    value = rng.choice([*plain[:7], *plain[8:]])  # without an int of 400 digits, which JSON takes and Python refuses
    return json.dumps({**content, name: value}).encode()


@pytest.mark.parametrize("mutations", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_json_file_of_a_run_may_hold_anything(tmp_path: Path, mutations: int) -> None:
    rng, path = random.Random(mutations), tmp_path / "r"
    asked = {"epochs": 2, "max_steps": None, "learning_rate": 0.1, "resume": "auto", "model": "net"}

    def start() -> RunFolder:
        folder = RunFolder(path, is_main=True)
        folder.claim()
        return folder

    folder = start()
    folder.begin(asked, world={})
    write_checkpoint(folder.checkpoints, state_of(7))
    folder.write_json("result.json", {"accuracy": 0.5, "loss": 1.0})
    folder.beat()
    folder.release()
    files = {name: (path / name).read_bytes() for name in (
        "status.json", "config.json", "owner.json", "environment.json", "result.json", "heartbeat.json")}
    for _ in range(mutations):
        name = rng.choice(list(files))
        text = odd_json(rng, json.loads(files[name]))
        (path / name).write_bytes(text)
        began, refused = time.monotonic(), ""
        try:
            folder = start()
            if folder.begin(asked, world={}):
                folder.failed("a test", step=3)
        except RunError as error:  # a flag that differs, or an owner that lives
            refused = str(error)
        finally:
            folder.release()
        assert time.monotonic() - began < SECONDS, (name, text)
        assert not refused or refused.startswith(("--", f"{path}: in use")), (name, text)
        for known, content in files.items():
            (path / known).write_bytes(content)


def spoil(path: Path, how: str) -> None:
    path.unlink(missing_ok=True)
    if how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
        (path / "file").touch()
    else:
        path.symlink_to("nowhere")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("how", ["pipe", "folder", "link to nothing"])
@pytest.mark.parametrize("name", ["step-00000008.pt", "step-00000008.json", "best.pt", ".step-00000009.pt.1.tmp",
                                  "step-x.json", "step-00000010.pt"])
def test_a_pipe_or_folder_under_the_name_of_a_checkpoint_costs_at_most_a_line(
        run: RunFolder, name: str, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (7, 8):
        write_checkpoint(run.checkpoints, {**state_of(step), "best": {"step": 3}})
    spoil(run.checkpoints / name, how)
    newest = 7 if "08" in name else 8
    assert choose_checkpoint("auto", run) == checkpoint_path(run.checkpoints, newest)
    assert capsys.readouterr().err.count("WARNING") == (newest == 7)
    write_checkpoint(run.checkpoints, state_of(9))
    assert newest_good(run.checkpoints).path == checkpoint_path(run.checkpoints, 9)
    if name == "best.pt":
        with pytest.raises(CheckpointError, match=r"best.pt: "):
            load_or_fail(run.checkpoints / "best.pt")


def test_an_unreadable_folder_of_checkpoints_is_an_error_and_not_empty(run: RunFolder) -> None:
    write_checkpoint(run.checkpoints, state_of(7))
    run.checkpoints.rename(run.path / "elsewhere")
    for unreadable in ("nowhere", "checkpoints"):  # a link to nothing, and one to itself
        run.checkpoints.symlink_to(unreadable)
        with pytest.raises(CheckpointError, match=r"checkpoints: cannot be read \(.*\); "):
            committed(run.checkpoints)
        with pytest.raises(CheckpointError, match=r"checkpoints: cannot be read"):
            run.begin({"epochs": 1}, world={})
        run.checkpoints.unlink()
    assert committed(run.checkpoints) == []


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_checkpoint_that_may_not_be_read_is_an_error_and_not_set_aside(run: RunFolder) -> None:
    path = write_checkpoint(run.checkpoints, state_of(7))
    path.chmod(0)
    with pytest.raises(CheckpointError, match=r"step-00000007.pt: cannot be read \(Permission denied\)"):
        choose_checkpoint("auto", run)


def test_no_temporary_remains_after_a_resume_at_the_best(run: RunFolder) -> None:
    write_checkpoint(run.checkpoints, {**state_of(6), "best": {"step": 6}})
    for _ in range(2):
        choose_checkpoint("auto", run)
        assert not list(run.checkpoints.glob(".*"))
    assert load_or_fail(run.checkpoints / "best.pt")["step"] == 6


def test_a_checkpoint_under_the_name_of_a_later_step_is_set_aside(run: RunFolder, capsys: pytest.CaptureFixture[str]
                                                                  ) -> None:
    path = write_checkpoint(run.checkpoints, state_of(6))
    for file in (path, manifest_path(path)):
        file.with_stem("step-00000099").write_bytes(file.read_bytes())
    assert choose_checkpoint("auto", run) == path
    assert "step-00000099.pt (it holds step 6): kept as *.damaged" in capsys.readouterr().err
    assert committed(run.checkpoints) == [path]  # what is kept goes by the name: a later save would have been pruned


def test_a_checkpoint_copied_alone_names_the_manifest_to_copy(run: RunFolder, tmp_path: Path) -> None:
    path = write_checkpoint(run.checkpoints, state_of(6))
    alone = tmp_path / "best.pt"
    alone.write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match=r"best.pt: its manifest is missing; copy best.json too"):
        load_or_fail(alone)
    alone.with_suffix(".json").write_bytes(manifest_path(path).read_bytes())
    assert load_or_fail(alone)["step"] == 6
