"""`--measure`, `--dry-run` and `--profile`. A window is timed on the loop that trains, votes and reports; then some
steps are split into phases, with waits for the device; communication is what averaging adds to forward and backward."""

import math
import os
import resource
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from launch import network, process_group
from launch.errors import CheckpointError, say, to_stderr
from trainers.engine import metrics, parallel, precision, result, task
from trainers.engine.checkpoints import load, save, snapshot
from trainers.engine.config import TrainConfig, measured_steps
from trainers.engine.run.report import Progress
from trainers.engine.trainer import Trainer

MOST_PHASE_STEPS = 40  # steps split into phases: half of them with gradient averaging, half without
MATRIX_SIZE, MATRIX_SECONDS = {"cpu": 1024, "cuda": 8192}, 0.3
DRY_STEPS = 3  # timed, after the first


def write_measurement(trainer: Trainer, train: task.TrainBatches, steps: str) -> dict[str, Any]:
    """Time steps as `--measure` says, then split some more into phases; write result.json and return its content.
    The same on every rank. Seconds and samples are of the timed window and over all ranks; lists are by rank."""
    world, sums, start = trainer.world, trainer.train_step.sums, weights(trainer)
    warmup, timed = measured_steps(steps)
    advance(trainer, train, warmup)
    sums.reset()  # the loss of the window alone
    before, began_seconds = usage(), trainer.history.train_seconds
    advance(trainer, train, timed)
    seconds, after = trainer.history.train_seconds - began_seconds, usage()
    loss, moved = sums.means(world)[0], torch.linalg.vector_norm(weights(trainer) - start).item()
    used = {name: max(now - before[name], 0.0) for name, now in after.items()}  # below 0 where a thread has ended
    mine = {"seconds": seconds, **used, "peak_memory_bytes": result.peak_memory_bytes(world.device),
            **time_phases(trainer, train, timed)}
    flops = flops_per_sample(trainer, train)
    ranks = process_group.gather(world, mine | {"matrix_flops_per_second": matrix_flops_per_second(trainer)})
    slowest = max(rank["seconds"] for rank in ranks)
    found = {"benchmark": {
        "warmup_steps": warmup, "steps": timed, "batch_size": train.global_batch_size, "seconds": slowest,
        "samples_per_second": timed * train.global_batch_size / slowest, "loss": loss, "weights_moved": moved,
        "flops_per_sample": flops, "world_size": world.world_size, "threads_per_rank": world.threads,
        "device": world.device.type, "backend": world.backend, "batch_norm": any(
            isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in trainer.train_step.model.modules()),
        **{name: [rank[name] for rank in ranks] for name in ranks[0] if name != "seconds"}}}
    trainer.folder.write_json("result.json", found)
    trainer.folder.write_status("DONE", step=trainer.step, epoch=trainer.epoch)
    return found


def dry_run(trainer: Trainer, train: task.TrainBatches, config: TrainConfig) -> dict[str, Any]:
    """Some steps, one save and one load, and what the whole run would need, printed by rank 0; nothing is kept."""
    world, history = trainer.world, trainer.history
    advance(trainer, train, 1)  # compiles, allocates
    began = history.train_seconds
    advance(trainer, train, DRY_STEPS)
    step_seconds = max(process_group.gather(world, (history.train_seconds - began) / DRY_STEPS))
    memory = max(process_group.gather(world, result.peak_memory_bytes(world.device)))
    state = trainer.state(trainer.sums.of_all_ranks(world))
    def save_and_load() -> int:
        path = save.write_checkpoint(trainer.folder.checkpoints, state)
        loaded = load.load_or_fail(path)
        if len({snapshot.hash_tensors(snapshot.tensors_in(each["model"])) for each in (state, loaded)}) > 1:
            raise CheckpointError(f"{path}: what was loaded differs from what was saved; check the disk")
        return path.stat().st_size

    num_bytes = process_group.from_main(world, save_and_load)
    num_files, num_steps = config.keep_checkpoints + 2, config.total_steps(train.steps_per_epoch)  # best, unfinished
    if world.is_main:
        say(f"memory     {memory / 2**20:,.0f} MiB at most, per rank\n"
            f"files      checkpoints of {num_bytes / 2**20:,.1f} MiB, up to {num_files} of them; "
            f"{shutil.disk_usage(trainer.folder.path).free / 2**20:,.0f} MiB are free\n"
            f"time       about {num_steps * step_seconds:,.0f} s: {num_steps:,} steps of {step_seconds:.3g} s, "
            f"without evaluations\n"
            f"dry run    {DRY_STEPS + 1} steps, a save and a load worked; nothing is kept")
    return {"memory_bytes": memory, "checkpoint_bytes": num_bytes, "step_seconds": step_seconds}


def advance(trainer: Trainer, train: task.TrainBatches, steps: int) -> None:
    """So many steps more, over as many epochs as that takes."""
    last_step = trainer.step + steps
    progress = Progress(shown=False, total_steps=last_step, step=trainer.step)
    while trainer.step < last_step:
        trainer.train_epoch(train, last_step, progress)
        trainer.finish_epoch(train)


class PhaseClock:
    """Is told of the phases of a step in the watchdog's place, and adds up the seconds between them."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._phase, self._since = device, "start", time.perf_counter()
        self.seconds: dict[str, float] = {}

    def mark(self, phase: str, step: int | None = None) -> None:
        """A phase begins; on a GPU the work of the one before is waited for."""
        parallel.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase, now


def time_phases(trainer: Trainer, train: task.TrainBatches, steps: int) -> dict[str, float | None]:
    """Seconds per step of this rank in each phase; communication is None for one process and inside DataParallel."""
    model, world = trainer.train_step.model, trainer.world
    synced, alone = PhaseClock(world.device), PhaseClock(world.device)
    part = max(1, min(steps, MOST_PHASE_STEPS) // 4)
    averages = isinstance(model, torch.nn.parallel.DistributedDataParallel) and world.world_size > 1
    try:
        for clock in (synced, alone, synced, alone):
            process_group.barrier(world)
            clock.mark("between steps")
            trainer.train_step.mark = clock.mark
            with model.no_sync() if clock is alone and averages else nullcontext():  # pyright: ignore
                advance(trainer, train, part)
            clock.mark("between steps")
    finally:
        trainer.train_step.mark = world.watchdog.mark
    def per_step(*phases: str, clocks: Sequence[PhaseClock] = (synced,) if averages else (synced, alone)) -> float:
        return sum(clock.seconds.get(phase, 0.0) for clock in clocks for phase in phases) / (2 * part * len(clocks))
    gradients, bare = per_step("forward", "backward"), per_step("forward", "backward", clocks=[alone])
    return {"data_seconds": per_step("data"), "optimizer_seconds": per_step("optimizer"),
            "forward_backward_seconds": min(bare, gradients) if averages else gradients,
            "communication_seconds": max(0.0, gradients - bare) if averages else None}


@contextmanager
def profiled(trainer: Trainer, steps: str | None) -> Iterator[None]:
    """Record the steps of the block that `--profile` asks for: a trace of each rank, and on a GPU what memory held."""
    if steps is None:
        yield
        return
    world, folder, start, written, phase = trainer.world, trainer.folder, trainer.step, [], ExitStack()
    first, number = measured_steps(steps)
    place, on_gpu = folder.path / "profile" / f"rank-{world.rank}", world.device.type == "cuda"

    def action(num_steps: int) -> torch.profiler.ProfilerAction:
        left = first + number - start - num_steps  # until the recording ends
        if not 1 <= left <= number:
            return torch.profiler.ProfilerAction.NONE
        return torch.profiler.ProfilerAction.RECORD_AND_SAVE if left == 1 else torch.profiler.ProfilerAction.RECORD

    def write(profiler: torch.profiler.profile) -> None:
        written.append(place)
        with trainer.report.optional("--profile"):
            if world.is_main:
                folder.ownership.check()
            place.parent.mkdir(exist_ok=True)
            profiler.export_chrome_trace(f"{place}.pt.trace.json")
            if on_gpu:
                torch.cuda.memory._dump_snapshot(f"{place}.memory.pickle")
                torch.cuda.memory._record_memory_history(enabled=None)

    def mark(name: str, step: int) -> None:
        world.watchdog.mark(name, step)
        phase.close()
        if name == "between steps":
            profiler.step()
        if on_gpu and name == "data" and step == max(first, start):
            torch.cuda.memory._record_memory_history(max_entries=100_000)
        phase.enter_context(torch.profiler.record_function(name))  # a range that the trace shows

    network.library_defaults(KINETO_LOG_LEVEL="99")  # no lines of its own, an ERROR for want of a GPU among them
    with torch.profiler.profile(schedule=action, on_trace_ready=write, record_shapes=True) as profiler:
        trainer.train_step.mark = mark
        try:
            yield
        finally:
            trainer.train_step.mark = world.watchdog.mark
            phase.close()
    if not written and world.is_main:
        to_stderr(f"WARNING --profile {steps}: no such step was taken; the run is at step {trainer.step}")


def usage() -> dict[str, float]:
    """CPU seconds of this process so far. `queued_seconds`: ready to run, but another thread had the core (the sum over
    threads). `machine_seconds`: of all processes, and what its host took from it. Both are NaN without Linux."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    queued = machine = math.nan
    with suppress(OSError, IndexError, ValueError):
        queued = sum(int(file.read_text().split()[1]) for file in Path("/proc/self/task").glob("*/schedstat")) / 1e9
        ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
        machine = sum(ticks[:3] + ticks[7:8]) / os.sysconf("SC_CLK_TCK")  # user, nice, system; steal
    return {"cpu_seconds": used.ru_utime + used.ru_stime, "queued_seconds": queued, "machine_seconds": machine}


def flops_per_sample(trainer: Trainer, train: task.TrainBatches) -> float:
    """Floating-point operations of forward and backward, a multiply-add being two (torch's FlopCounterMode)."""
    step = trainer.train_step
    inputs, targets = step.to_device(*next(train.batches(trainer.epoch, trainer.samples_consumed)))
    with FlopCounterMode(display=False) as counter:
        step.task.loss(task.apply(step.network.forward, inputs), targets).backward()  # not what torch.compile made
    step.optimizer.zero_grad(set_to_none=True)
    return counter.get_total_flops() / metrics.num_samples(targets)


def matrix_flops_per_second(trainer: Trainer) -> float:
    """What this rank reaches in a product of large square matrices, while every other rank computes one too."""
    device = trainer.world.device
    size, dtype = MATRIX_SIZE[device.type], precision.DTYPES.get(trainer.train_step.precision.name, torch.float32)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = left @ right  # warm-up
    process_group.barrier(trainer.world)
    fastest, until = float("inf"), time.perf_counter() + MATRIX_SECONDS
    while time.perf_counter() < until:
        parallel.synchronize(device)
        began = time.perf_counter()
        torch.mm(left, right, out=product)
        parallel.synchronize(device)
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * size**3 / fastest


def weights(trainer: Trainer) -> torch.Tensor:
    """All trained parameters as one vector on the CPU."""
    return torch.cat([parameter.detach().flatten().cpu() for parameter in trainer.train_step.trained])
