"""From a config and a data set to a finished run: the wiring that all trainers share.

    with join_world(config) as world, open_run(config, "cifar", world) as folder:
        if folder is None:
            return EXIT_DONE                    # the run was finished before
        trainer = build_trainer(config, model, task, world, folder, ...)
        return complete(config, trainer, train, test, ...)
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from launch.errors import EXIT_DONE, EXIT_PREEMPTED, UsageError
from launch.failure import translated
from launch.launcher import default_run_name, job_identity
from launch.process_group import World, from_main, process_group
from launch.stop import catch_signals
from trainers.engine.checkpoints.save import Checkpointer
from trainers.engine.config import MAY_CHANGE, TrainConfig
from trainers.engine.measure import write_measurement
from trainers.engine.metrics import Evaluation
from trainers.engine.optimizer import build_optimizer, freeze
from trainers.engine.parallel import choose_parallel, num_parameters, parallelize, unwrap
from trainers.engine.precision import Precision
from trainers.engine.result import ToImage, draw, draw_first_batch, finish
from trainers.engine.resume import load_for_evaluation, resume
from trainers.engine.run.folder import RunFolder, describe, say_failed
from trainers.engine.run.progress import say
from trainers.engine.run.report import Report
from trainers.engine.schedule import schedule
from trainers.engine.task import EvaluationBatches, Task, TrainBatches, classification_task
from trainers.engine.trainer import Trainer


def to_plain(config: TrainConfig) -> dict[str, Any]:
    """The config as JSON and `weights_only` take it: paths as text, tuples as lists."""
    def convert(value: Any) -> Any:
        return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
    return {name: convert(value) for name, value in asdict(config).items()}


def join_world(config: TrainConfig) -> contextlib.AbstractContextManager[World]:
    """The process group that the flags ask for, on kernels that they ask for."""
    torch.backends.mkldnn.enabled = config.onednn
    return process_group(config.backend, device=config.device, timeout_seconds=config.timeout,
                         threads=config.threads, deterministic=config.deterministic)


@contextlib.contextmanager
def open_run(config: TrainConfig, trainer: str, world: World) -> Iterator[RunFolder | None]:
    """Own the run folder for the length of a `with` block; None if the run is DONE and no more is asked of it.

    However the block ends, status.json says how, and the folder is given up.
    """
    name = from_main(world, lambda: config.run_name or default_run_name(trainer, config.recipe))
    folder = RunFolder(config.output_dir / name, is_main=world.is_main)
    from_main(world, folder.claim)
    world.watchdog.on_tick.append(folder.beat)
    world.watchdog.on_end.append(
        lambda reason: say_failed(folder, reason, step=world.watchdog.step) if folder.begun else None)
    facts = {"world_size": world.world_size, "device": str(world.device), "threads_per_rank": world.threads,
             "launcher": world.launcher, "backend": world.backend}
    try:
        if not from_main(world, lambda: folder.begin(to_plain(config), may_change=MAY_CHANGE, world=facts)):
            result = folder.read_json("result.json") or {}
            if world.is_main:
                say(f"{folder.path} is DONE (accuracy {result.get('accuracy')}); raise --epochs to go on")
            yield None
        else:
            yield folder
    except Exception as error:
        if folder.begun:
            say_failed(folder, describe(translated(error)), step=world.watchdog.step)
        raise
    finally:
        folder.release()


def build_trainer(config: TrainConfig, model: nn.Module, task: Task, world: World, folder: RunFolder, *,
                  steps_per_epoch: int, dataset_fingerprint: str) -> Trainer:
    """Freeze, move, wrap and equip a model for training.

    Raises:
        UsageError: for flags that do not fit this model, device or world.
    """
    precision = Precision(config.precision, world.device)
    frozen_norms = freeze(model, config.freeze)
    model.to(world.device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    parallel, remark = choose_parallel(config.parallel, world, num_gpus=torch.cuda.device_count())
    if remark and world.is_main:
        say(remark)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(f"--freeze {' '.join(config.freeze)}: leaves nothing to train; freeze less")
    ema = None
    if config.ema_decay is not None:
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=True)
    optimizer = build_optimizer(model, config)
    if config.compile:
        model.compile()
    total_steps = min(config.epochs * steps_per_epoch, config.max_steps or config.epochs * steps_per_epoch)
    return Trainer(
        parallelize(model, parallel, world), optimizer, task, world, precision=precision, folder=folder,
        schedule=schedule(config.schedule, total_steps=total_steps, warmup_steps=config.warmup_steps),
        checkpointer=Checkpointer(folder, keep=config.keep_checkpoints), stop=catch_signals(), seed=config.seed,
        accumulation_steps=config.accumulation_steps, clip_grad_norm=config.clip_grad_norm, ema=ema,
        frozen_norms=frozen_norms, channels_last=config.channels_last, max_bad_steps=config.max_bad_steps,
        report=Report(folder, pictures=config.pictures, tensorboard=config.tensorboard),
        log_gradients=config.log_gradients, config=to_plain(config),
        fingerprint={"dataset": dataset_fingerprint, "global_batch_size": config.batch_size,
                     "world_size": world.world_size, "threads": world.threads, "torch": str(torch.__version__),
                     **job_identity()},
    )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a session ended, for the trainer's own last words."""

    exit_code: int
    evaluation: Evaluation | None = None


def train_classifier(config: TrainConfig, model: nn.Module, world: World, folder: RunFolder, train: TrainBatches,
                     test: EvaluationBatches, *, class_names: tuple[str, ...], dataset_fingerprint: str,
                     to_image: ToImage) -> Outcome:
    """A classifier of images, from its parts to the end of the run.

    Args:
        to_image: undoes the normalisation, for pictures.
    """
    task = classification_task(class_names, world.device, label_smoothing=config.label_smoothing,
                               class_weights=config.class_weights)
    trainer = build_trainer(config, model, task, world, folder, steps_per_epoch=train.steps_per_epoch,
                            dataset_fingerprint=dataset_fingerprint)
    return complete(config, trainer, train, test, class_names=class_names, to_image=to_image)


def complete(config: TrainConfig, trainer: Trainer, train: TrainBatches, test: EvaluationBatches, *,
             class_names: tuple[str, ...] = (), to_image: ToImage | None = None) -> Outcome:
    """Resume, train, evaluate, and write down how it ended; with `--evaluate PATH`, load that and train nothing."""
    began = time.perf_counter()
    world, folder = trainer.world, trainer.folder
    if config.evaluate is not None:
        load_for_evaluation(config.evaluate, trainer)
    else:
        where = resume(config, trainer)
        if world.is_main:
            say(summary(config, trainer, train, where))
            if config.show_batch and to_image is not None:
                first = next(train.batches(trainer.epoch, trainer.samples_consumed))
                draw_first_batch(folder, first, to_image, class_names)
        if config.measure is not None:
            measured = write_measurement(trainer, train, config.measure)
            return Outcome(exit_code=EXIT_DONE) if measured else preempted(trainer)
        outcome = trainer.fit(train, test, epochs=config.epochs, max_steps=config.max_steps,
                              eval_every=config.eval_every, checkpoint_every=config.checkpoint_every)
        if outcome == "stopped":
            return preempted(trainer)
    evaluation = trainer.last_evaluation or trainer.evaluate(test)
    if evaluation is None:  # asked to stop in the evaluation of a run that was complete
        return preempted(trainer)
    finish(config, trainer, evaluation, class_names, total_seconds=time.perf_counter() - began)
    draw(trainer, evaluation, class_names, test=test, to_image=to_image,
         steps_per_epoch=None if config.evaluate is not None else train.steps_per_epoch)
    trainer.report.close()
    folder.write_status("DONE", step=trainer.step, epoch=trainer.epoch)
    return Outcome(exit_code=EXIT_DONE, evaluation=evaluation)


def preempted(trainer: Trainer) -> Outcome:
    """All ranks agreed to stop, and the state is saved."""
    trainer.report.close()
    trainer.folder.write_status("PREEMPTED", step=trainer.step, epoch=trainer.epoch, reason=trainer.stop.reason or "")
    if trainer.world.is_main:
        say(f"stopped at step {trainer.step} ({trainer.stop.reason}); the same command goes on from there")
    return Outcome(exit_code=EXIT_PREEMPTED)


def summary(config: TrainConfig, trainer: Trainer, train: TrainBatches, where: str) -> str:
    """What will run, before step 1: the batch arithmetic most of all."""
    world, model = trainer.world, unwrap(trainer.model)
    last_step = min(config.epochs * train.steps_per_epoch, config.max_steps or config.epochs * train.steps_per_epoch)
    trained = sum(parameter.numel() for parameter in trainer.trained)
    return "\n".join([
        f"run        {trainer.folder.path} ({where})",
        f"world      {world.world_size} x {world.device.type}, {world.threads} threads each, backend {world.backend}, "
        f"launched by {world.launcher}",
        f"batch      {config.batch_size} = {config.rank_batch_size()} per rank x {world.world_size} ranks x "
        f"{config.accumulation_steps} accumulation",
        f"steps      {last_step} = {train.steps_per_epoch} per epoch, {config.epochs} epochs"
        + (f", at most {config.max_steps}" if config.max_steps else ""),
        f"model      {config.model}, {num_parameters(model):,} parameters, {trained:,} trained, {config.precision}",
    ])
