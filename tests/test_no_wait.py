"""Nothing in a step waits for the device: on a GPU torch itself says so, here two stand-ins do.

One is torch's meta device: its tensors hold no numbers, so that asking for one, for a shape that depends on one, or for
a copy is an error. On the CPU, which fused kernels and autocast need, a dispatch mode looks for the same by name.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from datasets.augment import Augmentation, scale_and_offset
from datasets.loaders import memory_loaders
from datasets.tensors import TensorDataset
from launch.process_group import World
from trainers import models
from trainers.cifar import RECIPES
from trainers.engine.config import ImageConfig
from trainers.engine.optimizer import MovingAverage, build_optimizer
from trainers.engine.precision import Precision
from trainers.engine.step import StepOptions, TrainStep
from trainers.engine.task import classification_task

pytestmark = pytest.mark.timeout(60)

CPU, META = torch.device("cpu"), torch.device("meta")
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "_unique2", "equal")
CLASSES = tuple("0123456789")


class Waits(TorchDispatchMode):
    """Raises on what makes the host wait for the device: reading a number, a shape that depends on one, a copy.

    `counters` are tensors that live on the host on a GPU too: how many steps Adam has taken.
    """

    def __init__(self, counters: list[Tensor]) -> None:
        super().__init__()
        self.counters = {tensor.data_ptr() for tensor in counters}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if name in WAITS and not all(tensor.device == CPU and tensor.data_ptr() in self.counters for tensor in tensors):
            raise AssertionError(f"{name} waits for the device")
        result = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_"):
            places = {tensor.device.type for tensor in (result, *tensors)}
            is_async = (kwargs or {}).get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
            if len(places) > 1 and not is_async:
                raise AssertionError(f"{name} between {places} waits for the device")
        return result


class Net(nn.Module):
    """Convolution, BatchNorm, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1))
        self.head = nn.Linear(8 * 8 * 8, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images).flatten(1))


def build(device: torch.device, make: Callable[[], nn.Module] = Net, *, precision: Any = "fp32", ema: int | None = None,
          accumulation_steps: int = 1, clip: float | None = None, **flags: Any) -> TrainStep:
    """A step as session.build_step makes it. On a CPU fp16 is its scaler alone."""
    with device:
        model = make()
    number = Precision("fp32" if precision == "fp16" and device == CPU else precision, device)
    if precision == "fp16":
        number.scaler = torch.amp.GradScaler(device.type)
    config = ImageConfig(**{"learning_rate": 0.01, **flags})
    average = None if ema is None else MovingAverage(model, 0.9, warmup_steps=ema)
    return TrainStep(model, build_optimizer(model, config), classification_task(CLASSES, device),
                     World(device=device), precision=number, schedule=lambda step: 1.0, ema=average,
                     options=StepOptions(seed=0, accumulation_steps=accumulation_steps, clip_grad_norm=clip,
                                         channels_last=True))


def batches(device: torch.device) -> Callable[[int], Iterator[Any]]:
    """What cifar.py trains on: in memory, augmented on the device; by epoch."""
    samples = TensorDataset(inputs=torch.zeros(48, 3, 32, 32, dtype=torch.uint8),
                            targets=torch.zeros(48, dtype=torch.int64), class_names=CLASSES)
    images = Augmentation(seed=0, mean=(0.5,) * 3, std=(0.25,) * 3, shift=2, flip="alternating")
    loaders = memory_loaders({"train": samples}, images, batch_size=8, rank_batch_size=8, rank=0, world_size=1, seed=0,
                             device=device)
    return lambda epoch: loaders["train"].batches(epoch, 0)


SPEEDRUN = {name: RECIPES["speedrun"][name] for name in ("optimizer", "learning_rate", "optimizer_options")}
CASES: dict[str, dict[str, Any]] = {
    "plain": {}, "accumulation": {"accumulation_steps": 2}, "clip": {"clip": 1.0}, "ema": {"ema": 0},
    "ema-warm-up": {"ema": 10}, "adam": {"optimizer": "adam"}, "adamw": {"optimizer": "adamw"},
    "rmsprop": {"optimizer": "rmsprop"}, "muon": {"optimizer": "muon"}, "speedrun": SPEEDRUN,
    "label-smoothing": {"label_smoothing": 0.1},
}
AUTOCAST: dict[str, dict[str, Any]] = {  # fp16 with muon or rmsprop waits for the GradScaler: these take no scale
    "bf16": {"precision": "bf16"}, "fp16": {"precision": "fp16"}, "fp16-clip": {"precision": "fp16", "clip": 1.0},
    "fp16-adamw": {"precision": "fp16", "optimizer": "adamw"},
}


def take_steps(step: TrainStep, watched: Callable[[list[Tensor]], contextlib.AbstractContextManager[Any]]) -> None:
    """Two steps to make all state, then one more and one of another epoch, watched."""
    loader = batches(step.world.device)
    first, second = loader(0), loader(1)
    step.train_mode()
    for number in range(2):
        step(first, step=number, before_update=lambda: None)
    states = [state for part in getattr(step.optimizer, "parts", [step.optimizer]) for state in part.state.values()]
    with watched([state["step"] for state in states if "step" in state]):
        step(first, step=2, before_update=lambda: None)
        step(second, step=3, before_update=lambda: None, watch_gradients=True)


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The device whose tensors hold no numbers; a copy to it needs no pinned memory."""
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor, *_: tensor)
    return META


@pytest.mark.parametrize("case", CASES)
def test_no_step_asks_a_device_for_a_number(meta: torch.device, case: str) -> None:
    flags = dict(CASES[case])
    if case == "speedrun":  # SGD's fused kernel knows no meta tensors
        flags["optimizer_options"] = ("sgd={'lr': 1.66, 'fused': False}", "normalize=True", "ns_steps=3")
    take_steps(build(meta, **flags), Waits)


@pytest.mark.parametrize("name", models.OURS)
def test_no_network_of_ours_asks_a_device_for_a_number(meta: torch.device, name: str) -> None:
    take_steps(build(meta, lambda: models.OURS[name](10)), Waits)


@pytest.mark.parametrize("case", [*CASES, *AUTOCAST])
def test_no_step_reads_a_number_on_the_cpu(case: str) -> None:
    take_steps(build(CPU, **{**CASES, **AUTOCAST}[case]), Waits)


@pytest.mark.parametrize("culprit", [Tensor.item, Tensor.tolist, Tensor.nonzero, Tensor.cpu, bool],
                         ids=["item", "tolist", "nonzero", "cpu", "bool"])
def test_a_wait_is_noticed(meta: torch.device, culprit: Callable[[Tensor], Any]) -> None:
    step = build(meta)
    forward = step.forward

    def waiting(inputs: Any, targets: Any) -> Any:
        outputs, loss = forward(inputs, targets)
        culprit(loss.detach())
        return outputs, loss

    step.forward = waiting
    with pytest.raises((AssertionError, NotImplementedError, RuntimeError), match=r"waits for the device|meta"):
        take_steps(step, Waits)


def test_what_images_are_normalised_by_is_copied_to_a_device_once() -> None:
    """A copy from ordinary memory waits for all that is queued."""
    scale_and_offset.cache_clear()
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    for _ in range(3):
        Augmentation(seed=0, mean=(0.5,) * 3, std=(0.25,) * 3).normalize(images)
    assert scale_and_offset.cache_info().misses == 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", [*CASES, *AUTOCAST])
def test_no_step_waits_for_a_gpu(case: str) -> None:
    @contextlib.contextmanager
    def strict(_: list[Tensor]) -> Iterator[None]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    take_steps(build(torch.device("cuda", 0), **{**CASES, **AUTOCAST}[case]), strict)
