"""One optimizer step, and one evaluation: what happens to a batch; before the first the network is tried on blanks."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from launch.errors import UsageError, first_line, is_users
from launch.failure import translated
from launch.process_group import World
from launch.stop import StopRequest
from trainers.engine import dropout, metrics, parallel, user_code
from trainers.engine.optimizer import MovingAverage
from trainers.engine.precision import Precision
from trainers.engine.task import Batch, EvaluationBatches, Task, apply, map_tensors

SINGLE = {"accumulation_steps": "lower it, or raise --batch-size", "batch_size": "raise it, or use fewer ranks"}


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """Numbers that a step needs."""
    seed: int  # of dropout
    accumulation_steps: int = 1
    clip_grad_norm: float | None = None
    channels_last: bool = False


class DataWait:
    """Adds up how long steps wait for batches, but for a process's first; on a GPU, with work queued, by its events."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu, self._spans, self._num_seen = device.type == "cuda", [], 0

    def now(self) -> Any:
        """A time, as both kinds of clock have it."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self) -> None:
        self._began = self.now()

    def __exit__(self, *error: object) -> None:
        self._spans.append((self._began, self.now()))

    def collect(self) -> float:
        """Seconds since this was last called, which on a GPU must follow a wait for the device."""
        spans, self._spans = self._spans[self._num_seen == 0:], []
        self._num_seen += 1
        return sum(began.elapsed_time(end) / 1000 if self.on_gpu else end - began for began, end in spans)


class TrainStep:
    """Owns what learns: the model, its optimizer and everything that a step does to them. Knows no position or file."""

    def __init__(self, model: nn.Module, optimizer: Any, task: Task, world: World, *, precision: Precision,
                 schedule: Callable[[int], float], options: StepOptions, ema: MovingAverage | None = None) -> None:
        self.model, self.optimizer, self.task, self.world = model, optimizer, task, world
        self.network = parallel.unwrap(model)  # without its wrapper for several devices: no `module.` before its names
        self.precision, self.schedule, self.options, self.ema = precision, schedule, options, ema
        self.mark: Callable[[str, int], None] = world.watchdog.mark  # is told of phases, to notice a hang, or for times
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())  # frozen ones too
        self.data_wait = DataWait(world.device)
        self.sums = metrics.TrainingSums(classification=task.num_classes is not None)
        self._side_stream = torch.cuda.Stream(world.device) if world.device.type == "cuda" else None
        self.gradient_norms: dict[str, Tensor] = {}
        self.is_under_way = False  # begun and not ended, as where a stop interrupts a wait for data: no state to save
        self._frozen_norms = [
            module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
            and {parameter.requires_grad for parameter in module.parameters(recurse=False)} == {False}]
        self._memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
        self._dropout_generators = dropout.default_generators(model, world.device)

    @property
    def evaluated_model(self) -> nn.Module:
        """The network that is evaluated: the moving average of the weights, if one is kept."""
        return self.ema.module if self.ema is not None else self.network

    def __call__(self, batches: Iterator[Batch], *, step: int, before_update: Callable[[], None],
                 watch_gradients: bool = False) -> None:
        """One optimizer update from the next `accumulation_steps` micro-batches. Nothing in it waits for the device.
        The steps so far key dropout and the rate; `before_update` is called once the gradients are there."""
        mark, options = self.mark, self.options
        first = dropout.seed_dropout(self._dropout_generators, seed=options.seed, step=step, rank=self.world.rank)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.schedule(step)
        for micro_step in range(options.accumulation_steps):
            mark("data", step)
            with self.data_wait:
                inputs, targets = self.next_batch(batches)
            if self.task.is_own:
                dropout.seed_own_code(first + micro_step)
            with parallel.gradient_sync(self.model, last=micro_step == options.accumulation_steps - 1):
                mark("forward", step)
                self.is_under_way = True
                outputs, loss = self.forward(inputs, targets)
                mark("backward", step)
                self.precision.backward(loss / options.accumulation_steps if options.accumulation_steps > 1 else loss)
            self.sums.update(loss, outputs, targets)
        mark("optimizer", step)
        if watch_gradients or options.clip_grad_norm is not None:
            self.precision.scaler.unscale_(self.optimizer)
        if watch_gradients:
            self.gradient_norms = gradient_norms(self.network)  # already averaged over the ranks
        if options.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.trained, options.clip_grad_norm)
        before_update()
        self.precision.step(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update_parameters(self.network)
        self.is_under_way = False
        mark("between steps", step + 1)

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """The next batch on the device; on a GPU copied and augmented on a side stream, beside the step before."""
        if self._side_stream is None:
            return self.to_device(*next(batches))
        with torch.cuda.stream(self._side_stream):
            batch = self.to_device(*next(batches))
        compute = torch.cuda.current_stream()
        compute.wait_stream(self._side_stream)  # the device waits, not the host
        map_tensors(lambda tensor: (tensor.record_stream(compute), tensor)[1], batch)  # else its memory is reused early
        return batch

    def to_device(self, inputs: Any, targets: Any) -> Batch:
        """A batch where the model is, images in its memory order."""
        def moved(tensor: Tensor, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
            return tensor.to(self.world.device, non_blocking=True, memory_format=memory_format)
        return (map_tensors(lambda each: moved(each, self._memory_format) if each.ndim == 4 else moved(each), inputs),
                map_tensors(moved, targets))

    def forward(self, inputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """The logits and the loss of a batch on the device."""
        with self.precision.autocast():
            outputs = apply(self.model, inputs)
            return self.task.logits(outputs), self.task.loss(outputs, targets)

    @torch.no_grad()
    def evaluate(self, test: EvaluationBatches, stop: StopRequest) -> metrics.Evaluation:
        """Count every sample of the test set once, over all ranks, through the unwrapped model or its moving average,
        with rank 0's buffers. No collective in the loop: ranks may have more batches than others. Raises Stopped."""
        if self.task.is_own:
            dropout.seed_own_code(dropout.seed_dropout(self._dropout_generators, seed=self.options.seed, step=-1,
                                                       rank=self.world.rank))
        model = self.evaluated_model.eval()
        metrics.sync_buffers(model, self.world)
        sums = metrics.EvaluationSums(self.world.device, num_classes=self.task.num_classes, metrics=self.task.metrics)
        self.world.watchdog.mark("evaluation data")
        for number, (inputs, targets) in enumerate(test):
            self.world.watchdog.mark("evaluate")
            if stop:
                break
            if self.task.is_own:
                dropout.seed_own_code(self.options.seed + number)
            inputs, targets = self.to_device(inputs, targets)
            with self.precision.autocast():
                outputs = apply(model, inputs)
            outputs = outputs.float() if isinstance(outputs, Tensor) else outputs
            sums.update(self.task.test_loss(outputs, targets), self.task.logits(outputs), targets)
            self.world.watchdog.mark("evaluation data")
        self.world.watchdog.mark("reduce")
        return sums.reduce(self.world, stop)

    def train_mode(self) -> None:
        """Before the steps of an epoch."""
        if self._side_stream is not None:
            self._side_stream.wait_stream(torch.cuda.current_stream())  # what loaders hold may still be on its way
        self.model.train()
        for module in self._frozen_norms:
            module.eval()  # frozen BatchNorm neither normalises by the batch nor follows it

    def state(self) -> dict[str, Any]:
        """Its part of a checkpoint; tensors are the live ones."""
        return {"model": self.network.state_dict(keep_vars=True), "optimizer": self.optimizer.state_dict(),
                "scaler": self.precision.state_dict(), "ema": self.ema.module.state_dict() if self.ema else None}

    def load_weights(self, state: Mapping[str, Any]) -> None:
        """Take the weights of a checkpoint's state, which was checked to fit, and their moving average."""
        self.network.load_state_dict(state["model"])
        if self.ema is not None and state["ema"] is not None:
            self.ema.module.load_state_dict(state["ema"])
            self.ema.num_updates = state["step"]  # 0 would start the average again

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state, which was checked to fit."""
        self.load_weights(state)
        self.optimizer.load_state_dict(state["optimizer"])
        self.precision.load_state_dict(state["scaler"])


def gradient_norms(model: nn.Module) -> dict[str, Tensor]:
    """The norm of each layer's gradient, of all its parameters together, by the layer's name; on the device."""
    layers: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            layers.setdefault(name.rpartition(".")[0] or name, []).append(parameter.grad)
    return {name: torch.nn.utils.get_total_norm(gradients) for name, gradients in layers.items()}


def tried_first(step: TrainStep, batches: Iterator[Batch], flags: Mapping[str, Any]) -> Iterator[Batch]:
    """The batches; before the first is handed out, the network is tried on blanks of its shape, or UsageError."""
    for first in batches:
        with parallel.buffers_kept(step.network), torch.no_grad():
            for set_mode in (step.network.eval, step.train_mode)[: 1 if flags.get("evaluate") is not None else 2]:
                set_mode()
                try_network(step, first[0], flags)
        yield first
        yield from batches


def try_network(step: TrainStep, inputs: Any, flags: Mapping[str, Any]) -> None:
    """Run the network, as written and not compiled, on two blanks of this size; dicts and tuples stay as they are."""
    size, num_samples = f"a {type(inputs).__name__}", None
    if isinstance(inputs, Tensor):  # two samples behave as any larger micro-batch; one may have no variance
        size, num_samples = " x ".join(map(str, inputs.shape[1:])), len(inputs)
        inputs = torch.zeros_like(inputs[:2], device=step.world.device)
    else:
        inputs = step.to_device(inputs, ())[0]
    device = step.world.device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), step.precision.autocast():
            apply(step.network.forward, inputs)
    except Exception as error:  # whatever a network does with inputs that it was not made for
        if is_users(translated(error)) or user_code.is_reference(flags.get("model")):  # whose line is then named
            raise
        model, reason = f"--model {flags.get('model')}", first_line(error)
        if flags.get("evaluate") is not None:
            line = (f"--evaluate {flags['evaluate']}: its network cannot take inputs of {size} ({reason}); use the "
                    f"trainer and size that made it")
        elif not step.network.training:
            line = f"{model}: cannot take inputs of {size} ({reason}); choose a model for this size"
        elif num_samples == 1:
            flag = "accumulation_steps" if flags.get("accumulation_steps", 1) > 1 else "batch_size"
            line = (f"--{flag.replace('_', '-')} {flags[flag]}: leaves one sample per rank and micro-batch, on which "
                    f"{model} cannot be trained ({reason}); {SINGLE[flag]}")
        else:
            line = f"{model}: fails in training on inputs of {size} ({reason}); choose another"
        raise UsageError(line) from None
