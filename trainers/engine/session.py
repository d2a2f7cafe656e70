"""From a config and a data set to a finished run, the wiring that all trainers share: in a `main` that is an
`entry_point`, `with open_run(config, "cifar") as run:` and then `return train_classifier(config, run, model, ...)`."""

import contextlib
import functools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from launch import failure, launcher, stop
from launch.errors import UsageError, say, to_stderr
from launch.process_group import World, from_main, process_group
from trainers.engine import history, measure, metrics, parallel, result, resume, user_code
from trainers.engine.checkpoints import load, save
from trainers.engine.config import ImageConfig, Statistics, TrainConfig
from trainers.engine.optimizer import MovingAverage, build_optimizer, freeze
from trainers.engine.precision import Precision
from trainers.engine.run import card, ownership, report
from trainers.engine.run.folder import RunFolder
from trainers.engine.step import StepOptions, TrainStep
from trainers.engine.task import EvaluationBatches, Task, TrainBatches, classification_task, with_own_code
from trainers.engine.trackers.tracker import TrackedRun, TrackerThread
from trainers.engine.trainer import LoopOptions, Run, Trainer


class AlreadyDone(BaseException):
    """The run is DONE and no more is asked of it: raised by all ranks with its result, caught by `entry_point`."""


def entry_point(main: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Let `main(config)` return the stored result of a run that is DONE; a dry run has a temporary folder, rank 0's."""
    @functools.wraps(main)
    def call(config: Any, *more: Any) -> dict[str, Any]:
        try:
            if not config.dry_run:
                return main(config, *more)
            place = next(path for path in (config.output_dir, *config.output_dir.absolute().parents) if path.is_dir())
            with tempfile.TemporaryDirectory(dir=place, prefix=".dry-run-") as folder:
                return main(replace(config, output_dir=Path(folder)), *more)
        except AlreadyDone as done:
            return done.args[0]
    return call


def to_plain(config: TrainConfig) -> dict[str, Any]:
    """The config as JSON and `weights_only` take it: paths as text, tuples as lists."""
    return {name: value for name, value in json.loads(json.dumps(asdict(config), default=str)).items()
            if name not in ("given", "in_file")}


@contextlib.contextmanager
def open_run(config: TrainConfig, trainer: str, *, named: bool = False) -> Iterator[Run]:
    """Catch signals, join the other ranks and own the run folder, for the length of a `with` block; status.json says
    how that ends. Weights that are `named` are no file. UsageError for flags that cannot work; AlreadyDone."""
    config.check()
    ownership.check_run_name(config.run_name)
    torch.backends.mkldnn.enabled = config.onednn
    with stop.signals_caught() as asked, process_group(
            config.backend, device=config.device, timeout_seconds=config.timeout, threads=config.threads,
            deterministic=config.deterministic) as world:
        files = user_code.load_all(config)
        name = from_main(world, lambda: config.run_name or ownership.unnamed_run(
            config.output_dir, trainer, config.recipe, to_plain(config)))
        folder = RunFolder(config.output_dir / name, is_main=world.is_main)
        from_main(world, folder.claim)
        world.watchdog.attend(folder, traces=folder.path)
        try:
            state, known, config = resume.find_evaluated(config, named=named)
            if config.evaluate is not None:
                files |= user_code.load_all(config)  # the transform that the weights were trained with
            facts = {"world_size": world.world_size, "device": str(world.device), "threads_per_rank": world.threads,
                     "launcher": world.launcher, "backend": world.backend, "user_code": files}
            if not from_main(world, lambda: folder.begin(to_plain(config), world=facts)):
                stored = folder.read_json("result.json") or {}
                if world.is_main:
                    figure = "loss" if stored.get("accuracy") is None else "accuracy"
                    say(f"{folder.path} is DONE ({figure} {stored.get(figure)}); raise --epochs, or the --max-steps or "
                        f"--patience that ended it, to continue")
                raise AlreadyDone(stored)
            if world.is_main and (warning := launcher.too_many_threads(world, world.threads)):
                to_stderr(warning)
            with user_code.blaming(user_code.references(config)):
                yield Run(trainer=trainer, world=world, folder=folder, stop=asked, config=config, evaluated=state,
                          known=known, user_code=files)
        except stop.Stopped as stopped:
            folder.preempted(str(stopped))
            raise
        except Exception as error:
            folder.failed(failure.translated(error), step=world.watchdog.step)
            raise
        finally:
            folder.release()


def build_trainer(config: TrainConfig, run: Run, model: nn.Module, task: Task, *, steps_per_epoch: int,
                  data: history.DataRecord, split: Literal["test", "validation"]) -> Trainer:
    """A model and all that trains it, evaluated on a split. Raises UsageError as build_step does."""
    world, num_classes = run.world, task.num_classes or 0
    if num_classes <= {"top5": metrics.TOP, "accuracy": 0}.get(config.best or "loss", -1):
        raise UsageError(f"--best {config.best}: the data has {num_classes or 'no'} classes; use --best loss")
    fingerprint = {"dataset": None if data.has_files else data.fingerprint, "global_batch_size": config.batch_size,
                   "world_size": world.world_size, "threads": world.threads, "torch": str(torch.__version__),
                   "decoder": getattr(data.dataset, "decoder", None), **launcher.job_identity(),
                   **({"user_code": run.user_code} if run.user_code else {})}
    tracked = TrackedRun(run.folder.path, project=run.trainer, config=to_plain(config))
    trackers = [TrackerThread(name, tracked) for name in config.trackers() if not config.dry_run]
    options = LoopOptions(split=split, best=config.best or "accuracy", **{name: getattr(config, name) for name in (
        "eval_every", "checkpoint_every", "max_bad_steps", "log_gradients", "patience")})
    return Trainer(build_step(config, model, task, world, steps_per_epoch=steps_per_epoch), run, options=options,
                   checkpointer=save.Checkpointer(run.folder, keep=config.keep_checkpoints), config=to_plain(config),
                   report=report.Report(run.folder, pictures=config.pictures, trackers=trackers), data=data,
                   fingerprint=fingerprint)


def build_step(config: TrainConfig, model: nn.Module, task: Task, world: World, *, steps_per_epoch: int) -> TrainStep:
    """Freeze, move and wrap a model, for steps by the flags; UsageError if these do not fit model, device or world."""
    precision = Precision(config.precision, world.device)
    freeze(model, config.freeze)
    model.to(world.device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    mode, remark = parallel.choose_parallel(config.parallel, world, num_gpus=torch.cuda.device_count())
    if remark and world.is_main:
        say(remark)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(f"--model {config.model}: has no parameters to train; give it some, or --freeze less")
    ema = (None if config.ema_decay is None else
           MovingAverage(model, config.ema_decay, warmup_steps=config.ema_warmup_steps))
    optimizer = build_optimizer(model, config)
    if config.sync_bn and world.device.type != "cuda":
        raise UsageError(f"--sync-bn: torch's SyncBatchNorm needs CUDA, this is {world.device.type}; leave it out")
    if config.sync_bn and mode == "ddp":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # of the same parameters
    if config.compile:
        model.compile(mode=config.compile_mode)
    wrapped = parallel.parallelize(model, mode, world, comm_hook=config.comm_hook,
                                   find_unused_parameters=config.find_unused_parameters)
    options = StepOptions(seed=config.seed, accumulation_steps=config.accumulation_steps,
                          clip_grad_norm=config.clip_grad_norm, channels_last=config.channels_last)
    return TrainStep(wrapped, optimizer, task, world, precision=precision, ema=ema, options=options,
                     schedule=config.rate_curve(steps_per_epoch))


def train_classifier(config: ImageConfig, run: Run, model: nn.Module, class_names: tuple[str, ...],
                     statistics: Statistics, train: TrainBatches = None, test: EvaluationBatches | None = None,
                     dataset: Any = None, **more: Any) -> dict[str, Any]:
    """A classifier of images, from its parts to the end of the run, as train_model; writes model.json first."""
    options = {name: value for name, value in config.network().items() if value is not None}
    model_card = card.ModelCard(
        trainer=run.trainer, model=user_code.absolute(options.pop("name")), options=options, class_names=class_names,
        mean=statistics[0], std=statistics[1], image_size=(config.size(), config.size()), user_code=run.user_code,
        transform=user_code.absolute(config.transform) if config.transform else None,
        **{name: getattr(config, name) for name in ("fit", "resize_size", "interpolation") if hasattr(config, name)})
    run.folder.write_json(card.CARD_FILE, asdict(model_card))
    task = classification_task(class_names, run.world.device, loss=config.loss, class_weights=config.class_weights,
                               label_smoothing=config.label_smoothing)
    task = with_own_code(task, user_code.references(config), run.world.device)
    return train_model(config, run, model, task, train, test, dataset=dataset, class_names=class_names,
                       statistics=statistics, **more)


def train_model(config: TrainConfig, run: Run, model: nn.Module, task: Task, train: TrainBatches | None = None,
                test: EvaluationBatches | None = None, *, dataset: Any, validation: EvaluationBatches | None = None,
                class_names: tuple[str, ...] = (), statistics: Statistics | None = None) -> dict[str, Any]:
    """Resume, train, evaluate, and write down how it ended; returns what result.json holds. With `--evaluate` nothing
    is trained. A validation split chooses best.pt, with whose weights the test split is then evaluated once."""
    began = time.perf_counter()
    steps_per_epoch = train.steps_per_epoch if train is not None else 1
    split, evaluated, at_the_end = "test", test if validation is None else validation, None
    assert evaluated is not None
    # a run of before there were three splits called the validation split its test set, and keeps doing so
    if validation is not None and from_main(run.world, run.folder.first_evaluated_split) != "test":
        split, at_the_end = "validation", test
    trainer = build_trainer(config, run, model, task, steps_per_epoch=steps_per_epoch, split=split,
                            data=history.DataRecord(run.world, dataset, class_names))
    with trainer.report:
        if config.evaluate is not None:
            resume.load_evaluated(config, run, trainer)
        elif train is not None:
            where = resume.resume(config, trainer, steps_per_epoch=steps_per_epoch)
            if run.world.is_main:
                say(result.summary(config, trainer, train, where))
                if config.show_batch and statistics is not None:
                    result.draw_first_batch(trainer, train, statistics, class_names)
            with measure.profiled(trainer, config.profile):
                if config.dry_run:
                    return measure.dry_run(trainer, train, config)
                if config.measure is not None:
                    return measure.write_measurement(trainer, train, config.measure)
                trainer.fit(train, evaluated, last_step=config.total_steps(train.steps_per_epoch))
            if at_the_end is not None:
                best = run.folder.checkpoints / "best.pt"
                trainer.train_step.load_weights(load.load_or_fail(best))
                resume.check_same_on_all_ranks(trainer, best)
        if at_the_end is not None:
            split, evaluated, trainer.last_evaluation = "test", at_the_end, None
        evaluation = trainer.last_evaluation or trainer.evaluate(evaluated)
        outcome = result.finish(trainer, evaluation, class_names, split=split, batch_size=config.batch_size,
                                save_weights=config.save_weights, total_seconds=time.perf_counter() - began)
        result.draw_result(trainer, evaluation, class_names, split=split, test=evaluated, statistics=statistics,
                           steps_per_epoch=steps_per_epoch)
    return outcome
