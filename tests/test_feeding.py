"""How batches reach the steps: workers by default, shared memory, a side stream, and how long steps wait for them."""

import gc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from datasets import image_folder, pack
from datasets.images import packed
from datasets.images.loaders import Decoder, Decoding, Key
from datasets.images.unreadable import BadImages
from datasets.images.workers import NUM_PLACES, PREFETCHED
from datasets.pack import PackConfig
from launch import launcher
from launch.process_group import World
from tests.helpers.images import PLAIN, Noted, image_loaders, write_tree
from tests.helpers.processes import wait_until
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


def test_a_batch_of_a_worker_is_written_into_shared_memory_once_and_into_the_same_again(tmp_path: Path) -> None:
    train, _ = image_folder.load(write_tree(tmp_path / "images"))
    assert train is not None
    decoder = Decoder(Noted(Decoding(splits={"train": train}, size=24)), workers=1)
    expected = Decoding(splits={"train": train}, size=24)[BATCH].images  # type: ignore
    places = set()
    for place, batch in decoder.decode("train", [torch.arange(12)] * 20, 0):
        assert place  # as it was made, not by a copy on its way here
        places.add(place)
        assert torch.equal(batch.images, expected)
    assert len(places) == NUM_PLACES


def test_a_batch_in_use_is_not_written_over_by_those_that_wait(tmp_path: Path) -> None:
    train, _ = image_folder.load(write_tree(tmp_path / "images"))
    assert train is not None
    decoding = Decoding(splits={"train": train}, size=24, smallest_area=0.3)
    keys = [Key("train", list(range(4)), epoch) for epoch in range(8)]
    decoder = Decoder(decoding, workers=1)
    for number, batch in enumerate(decoder.batches(keys)):
        queue = decoder.loader._iterator._worker_result_queue  # type: ignore
        wait_until(lambda: queue.qsize() == min(PREFETCHED, 7 - number), 60)  # noqa: B023  it is called at once
        assert torch.equal(batch.images, decoding[keys[number]].images)  # type: ignore


@pytest.mark.parametrize("held", [1, 40])
def test_batches_stay_as_they_are_while_somebody_holds_them(held: int, tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "images")
    sorted(folder.rglob("train/*/*"))[5].write_bytes(b"no image")  # of its batch a copy is sent, without it
    train, _ = image_folder.load(folder)
    assert train is not None
    alone, by_workers = (image_loaders({"train": train, "test": train}, workers=workers, bad_images=BadImages(1),
                                       evaluation_batch_size=7) for workers in (0, 2))

    def batches(loaders: dict[str, Any]) -> Iterator[torch.Tensor]:
        for epoch in range(2):
            yield from (images for images, _ in loaders["train"].batches(epoch, 0))
            yield from (images for images, _ in loaders["test"])

    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    for pair in zip(batches(by_workers), batches(alone), strict=True):
        kept.append(pair)
        assert all(torch.equal(one, other) for one, other in kept)
        del kept[: len(kept) - held]


def test_a_decoder_that_is_dropped_ends_its_workers(tmp_path: Path) -> None:
    train, _ = image_folder.load(write_tree(tmp_path / "images"))
    assert train is not None
    decoder = Decoder(Decoding(splits={"train": train}, size=24), workers=2)
    list(decoder.decode("train", [torch.arange(6)] * 4, 0))
    processes = decoder.processes
    del decoder
    gc.collect()
    for process in processes:
        process.join(20)
        assert not process.is_alive()


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
