"""How batches reach the steps: workers by default, shared memory, a side stream, and how long steps wait for them."""

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from datasets import image_folder, pack
from datasets.images import packed
from datasets.images.loaders import Decoder, Decoding, Key
from datasets.images.workers import HEADER, MOST_SLOTS, slots_of_workers
from datasets.pack import PackConfig
from launch import launcher
from launch.process_group import World
from tests.helpers.images import PLAIN, Noted, write_tree
from trainers.engine.config import TrainConfig
from trainers.engine.history import History
from trainers.engine.step import DataWait, TrainStep
from trainers.image_folder import ImageFolderConfig, build_loaders

pytestmark = pytest.mark.timeout(120)
CPU = torch.device("cpu")
BATCH = Key("train", list(range(12)), 0)


@pytest.mark.parametrize(("cores", "ranks", "workers"),
                         [(1, 1, 0), (2, 1, 1), (2, 2, 0), (16, 1, 8), (16, 4, 3), (96, 8, 8)])
def test_by_default_workers_leave_each_rank_a_core(cores: int, ranks: int, workers: int,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "usable_cores", lambda: cores)
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    assert TrainConfig().num_workers(decodes=True) == workers
    assert TrainConfig().num_workers() == 0
    assert TrainConfig(workers=5).num_workers() == TrainConfig(workers=5).num_workers(decodes=True) == 5


def test_packs_of_pixels_and_caches_need_no_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "usable_cores", lambda: 3)
    asked: list[int] = []
    monkeypatch.setattr("trainers.image_folder.Decoder",
                        lambda decoding, workers, **how: asked.append(workers) or Decoder(decoding))
    folder = write_tree(tmp_path / "images")
    pack.main(PackConfig(data_dir=folder, out=tmp_path / "raw.pack", raw=32))
    pack.main(PackConfig(data_dir=folder, out=tmp_path / "bytes.pack"))
    run_of = SimpleNamespace(world=World(), folder=SimpleNamespace(read_json=lambda name: None))
    for module, place, flags, expected in (
            (image_folder, folder, {}, 2), (image_folder, folder, {"cache": True}, 0),
            (packed, tmp_path / "raw.pack", {}, 0), (packed, tmp_path / "bytes.pack", {}, 2),
            (packed, tmp_path / "raw.pack", {"auto_augment": "randaugment"}, 2)):
        splits: Any = dict(zip(("train", "test"), module.load(place), strict=True))
        config = ImageFolderConfig(data_dir=place, batch_size=12, **flags)
        loaders = build_loaders(config, splits, PLAIN, run_of)  # type: ignore
        assert asked.pop() == expected
        assert ("--workers from 2" if expected else "--threads") in loaders["train"].remedy


def test_a_batch_of_a_worker_is_written_into_shared_memory_once(tmp_path: Path) -> None:
    train, _ = image_folder.load(write_tree(tmp_path / "images"))
    assert train is not None
    decoder = Decoder(Noted(Decoding(splits={"train": train}, size=24)), workers=1)
    shared, batch = next(decoder.decode("train", [torch.arange(12)], 0))
    assert shared  # as it was made, not by a copy on its way here
    assert batch.images.data_ptr() - HEADER in {memory.ctypes.data for memory in slots_of_workers.values()}
    assert torch.equal(batch.images, Decoding(splits={"train": train}, size=24)[BATCH].images)  # type: ignore


@pytest.mark.parametrize("held", [1, 3, 40])
def test_memory_is_used_again_and_never_while_somebody_holds_a_batch_in_it(held: int, tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "images")
    sorted(folder.rglob("train/*/*"))[5].write_bytes(b"no image")  # of its batches a copy is sent, without it
    train, _ = image_folder.load(folder)
    assert train is not None
    decoding = Decoding(splits={"train": train, "test": train}, size=24, smallest_area=0.3)
    keys = [Key("test" if epoch % 5 == 4 else "train", list(range(start, start + 4 + epoch % 2)), epoch)
            for epoch in range(20) for start in (0, 4, 7)]
    keys = [key for key in keys if key.split == "test" or not set(key.samples) & unreadable(train)]
    expected = [decoding[key].images.clone() for key in keys]  # type: ignore
    decoder, batches, places = Decoder(decoding, workers=2), [], set()
    for number, batch in enumerate(decoder.batches(keys)):
        batches.append((number, batch.images))
        places.add(batch.images.data_ptr())
        for earlier, images in batches:
            assert torch.equal(images, expected[earlier])
        del batches[: len(batches) - held]
    pids = {process.pid for process in decoder.processes}
    kept = [memory for (pid, _), memory in slots_of_workers.items() if pid in pids]
    assert 0 < len(kept) <= 2 * MOST_SLOTS
    if held == 1:
        assert len(places) < len(keys) / 2
    del batch, batches, images  # pyright: ignore
    assert not any(memory[0] for memory in kept)


def unreadable(train: Any) -> set[int]:
    return {sample for sample in range(len(train)) if Path(train.path(sample)).read_bytes() == b"no image"}


def test_a_decoder_that_is_dropped_ends_its_workers_and_forgets_their_memory(tmp_path: Path) -> None:
    train, _ = image_folder.load(write_tree(tmp_path / "images"))
    assert train is not None
    before = set(slots_of_workers)
    decoder = Decoder(Decoding(splits={"train": train}, size=24), workers=2)
    list(decoder.decode("train", [torch.arange(6)] * 4, 0))
    processes = decoder.processes
    assert set(slots_of_workers) - before
    del decoder
    gc.collect()
    for process in processes:
        process.join(20)
        assert not process.is_alive()
    assert not {pid for pid, _ in slots_of_workers} & {process.pid for process in processes}


def test_threads_alter_no_pixel_of_a_pack(tmp_path: Path) -> None:
    pack.main(PackConfig(data_dir=write_tree(tmp_path / "images"), out=tmp_path / "raw.pack", raw=30))
    train, _ = packed.load(tmp_path / "raw.pack")
    assert train is not None
    one, four = (Decoding(splits={"train": train}, size=24, smallest_area=0.3, threads=threads)[BATCH]
                 for threads in (1, 4))
    assert torch.equal(one.images, four.images)  # type: ignore
    assert one.sources == four.sources  # type: ignore


class FakeStream:
    """In the place of a CUDA stream: notes what happens in which order."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def __enter__(self) -> None:
        self.log.append(f"on {self.name}")

    def __exit__(self, *error: object) -> None:
        self.log.append(f"off {self.name}")

    def wait_stream(self, other: "FakeStream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")


def step_of(model: nn.Module) -> TrainStep:
    return TrainStep(model, None, SimpleNamespace(num_classes=2), World(), precision=None,  # type: ignore
                     schedule=lambda step: 1.0, options=SimpleNamespace(channels_last=False))  # type: ignore


def test_on_a_gpu_batches_are_made_on_a_side_stream_that_the_device_and_not_the_host_waits_for(
        monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    side, compute = FakeStream("side", log), FakeStream("compute", log)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: compute)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: log.append("the host waits"))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: log.append(f"kept for {stream.name}"))
    step = step_of(nn.Linear(2, 2))
    step._side_stream = side  # type: ignore

    def batches() -> Any:
        log.append("made")
        yield {"images": torch.ones(3, 2)}, torch.zeros(3)

    step.train_mode()
    inputs, targets = step.next_batch(batches())
    assert log == ["side waits for compute", "on side", "made", "off side", "compute waits for side",
                   "kept for compute", "kept for compute"]
    assert torch.equal(inputs["images"], torch.ones(3, 2))
    assert torch.equal(targets, torch.zeros(3))


def test_without_a_gpu_a_batch_is_what_the_loader_gives() -> None:
    batch = torch.ones(3, 2), torch.zeros(3)
    given = step_of(nn.Linear(2, 2)).next_batch(iter([batch]))
    assert all(one is other for one, other in zip(given, batch, strict=True))


def test_waits_are_added_up_but_for_the_first_batch_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 100.0, 200.0, 201.0, 300.0, 303.0, 400.0, 405.0])
    monkeypatch.setattr("trainers.engine.step.time.perf_counter", lambda: next(times))
    wait = DataWait(CPU)
    found = []
    for count in (2, 2):
        for _ in range(count):
            with wait:
                pass
        found.append(wait.collect())
    assert found == [1.0, 8.0]


def test_on_a_gpu_its_own_events_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        made: ClassVar[list[Any]] = []

        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing
            self.made.append(self)

        def record(self) -> None:
            self.at = 10 * len(self.made)

        def elapsed_time(self, end: "Event") -> int:
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    wait = DataWait(torch.device("cuda"))
    for _ in range(3):
        with wait:
            pass
    assert wait.collect() == 0.02


def test_one_warning_says_what_helps_if_more_than_a_fifth_is_waiting() -> None:
    history = History()
    history.train_seconds = 2.0
    assert history.record_wait(0.9, "raise it") is None
    history.train_seconds = 10.0
    assert history.record_wait(1.9, "raise it") is None
    assert history.record_wait(2.6, "raise it") == \
        "WARNING data: training has waited for data for 26 % of its time; raise it"
    assert history.record_wait(2.6, "raise it") is None
    assert history.data_wait_share == 0.26
    history.load_state({"epochs": [], "train_seconds": 20.0}, best=None)  # of before this was recorded
    assert history.data_wait_seconds == 0.0
    history = History()
    history.train_seconds = 10.0
    assert history.record_wait(5.0, "") is None
