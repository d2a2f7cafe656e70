"""Which checkpoint a run resumes from, by `--resume` and what is on disk, and putting its weights into a trainer."""

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from launch import launcher, process_group
from launch.errors import CheckpointError, UsageError, first_line, launched_rank, say, to_stderr
from launch.files import read_object, writing
from trainers.engine import history, optimizer
from trainers.engine.checkpoints import files, load, snapshot, weights
from trainers.engine.config import ImageConfig, TrainConfig
from trainers.engine.run import card, ownership
from trainers.engine.run.folder import RunFolder
from trainers.engine.step import TrainStep
from trainers.engine.trainer import Run, Trainer

NORMALIZATION = ("normalize", "mean", "std")
# Flags that belong to the weights; by some of `pretrained`, a library builds another network.
PREPROCESSING = ("image_size", "resize_size", "fit", "interpolation", *NORMALIZATION, "transform", "pretrained")
MOMENTS = ("momentum_buffer", "exp_avg", "exp_avg_sq", "square_avg")  # of optimizers, as large as their parameter


def choose_checkpoint(resume: str, folder: RunFolder, unfit: load.Check = lambda state: None) -> Path | None:
    """The checkpoint to resume from, by --resume and what is on disk, or None; CheckpointError if none is whole. Rank 0
    only; removes what killed saves left. One `unfit` for the run is damaged, unless all are: then flags differ."""
    check_fence = folder.ownership.check
    files.sweep(folder.checkpoints, check_fence=check_fence)
    damaged, newest, state = load.newest_good(folder.checkpoints, unfit=unfit)
    if state is None and damaged:
        damaged, newest, state = load.newest_good(folder.checkpoints)
    continues = resume == "auto"
    if state is not None and not continues:  # a restart of the same job, or the same PATH again, resumes where it was
        continues = (ownership.is_restart_of(state["fingerprint"], launcher.job_identity()) if resume == "never" else
                     state["config"].get("resume") == resume)
    if not continues:
        return start_over(resume, folder)
    if state is None:
        for path, reason in damaged.items():
            raise CheckpointError(f"{path}: {reason}, and of {len(damaged)} checkpoints none is whole; use --resume "
                                  f"never to start over, or another --run-name")
        if uncommitted := sorted(folder.checkpoints.glob("step-*.pt")):
            to_stderr(f"WARNING checkpoint: {uncommitted[-1]}: has no manifest, so was never finished; starting over")
        return None
    if damaged:
        reasons = ", ".join(f"{path} ({reason})" for path, reason in damaged.items())
        to_stderr(f"WARNING checkpoint: {reasons}: kept as *.damaged; resuming from {newest.name}")
        files.set_aside(damaged, "damaged", check_fence=check_fence)
    if (state["best"] or {}).get("step") == state["step"]:
        files.give_name(newest, "best", check_fence=check_fence)  # a kill between its two links
    return newest


def start_over(resume: str, folder: RunFolder) -> Path | None:
    """From scratch or from the checkpoint that the user named; what the run had after that is renamed, not deleted."""
    path = None if resume == "never" else Path(resume)
    step = load.load_or_fail(path)["step"] if path is not None else 0
    if path is not None and path.resolve().parent == folder.checkpoints.resolve():
        later = [own for own in files.committed(folder.checkpoints) if files.step_of(own) > step]
        files.set_aside(later, "superseded", check_fence=folder.ownership.check)
    else:
        folder.set_aside()
    return path


def find_evaluated(config: TrainConfig, *, named: bool) -> tuple[dict[str, Any] | None, tuple[str, ...] | None, Any]:
    """The state that `--evaluate` names, its classes, and the config as it was trained. What a file of weights, or an
    older checkpoint, does not say is taken from the run folder it lies in. Of a library's, `named`, flags stand."""
    path, state, names, saved = config.evaluate, None, (), None
    if path is None or named:
        return None, None, config
    if not path.is_file() or load.is_checkpoint(path):
        state = load.load_or_fail(path)
        names, saved = history.saved_class_names(state), state["config"]
    for folder in (path.absolute().parent.parent, path.absolute().parent):
        with contextlib.suppress(CheckpointError):
            run_card = card.read_card(folder)
            names = names or (run_card.class_names if run_card.kind == "classes" else ())
            saved = saved or read_object(folder / "config.json")
    if state is not None and not names and isinstance(config, ImageConfig) and launched_rank() == 0:
        to_stderr(f"WARNING checkpoint: {path}: holds no names of classes and lies in no run folder with "
                  f"{card.CARD_FILE}; they are taken to be those of --data-dir, in sorted order")
    return state, names or None, as_trained(config, saved) if saved else config


def load_evaluated(config: TrainConfig, run: Run, trainer: Trainer) -> None:
    """Put what `--evaluate` names into the trainer, if it is not there; of a checkpoint its position. A collective."""
    path, train_step, state = config.evaluate, trainer.train_step, run.evaluated
    assert path is not None
    train_step.ema = None
    if state is not None:
        load.check_fits(state, train_step.network, path)
        if state["ema"] is not None:
            train_step.ema = optimizer.MovingAverage(train_step.network, decay=1.0)
        train_step.load_weights(state)
        trainer.step, trainer.epoch, trainer.history.best = state["step"], state["epoch"], state["best"]
        return check_same_on_all_ranks(trainer, path)
    taken = weights.load_weights(train_step.network, path, flag="--evaluate") if path.exists() else f"weights {path}"
    check_same_on_all_ranks(trainer, path)
    if run.world.is_main:
        if (num_classes := train_step.task.num_classes) and run.known is None:
            taken += f"; without names of classes: the {num_classes:,} of the data, in sorted order"
        say(f"evaluate   {taken}")


def as_trained(config: Any, saved: Mapping[str, Any]) -> Any:
    """An evaluation's config with a saved one's preprocessing; flags given stand, or are refused."""
    saved = {"mean": (), "std": (), **TrainConfig.translated(saved)}
    saved = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    if saved.get("pretrained") is not None:
        saved["pretrained"] = Path(saved["pretrained"])
    names = [name for name in PREPROCESSING if name in saved and hasattr(config, name)]
    trained: Any = replace(config, **{name: saved[name] for name in names})
    given = set(names) & set(config.given)
    for name in given:
        now, was = (each.size() if name == "image_size" else getattr(each, name) for each in (config, trained))
        line = f"--{name.replace('_', '-')} {now}: the weights were trained with {was}"
        if now != was and name in NORMALIZATION:
            raise UsageError(f"{line}; leave the flag out")
        if now != was and launched_rank() == 0:
            say(f"evaluate   {line}")
    return replace(trained, **{name: getattr(config, name) for name in given})


def check_same_on_all_ranks(trainer: Trainer, source: Path) -> None:
    """Compare hashes of weights and optimizer state: CheckpointError on every rank, if any differs. A collective."""
    state = trainer.train_step.state()
    loaded = snapshot.tensors_in([state["model"], state["ema"], state["optimizer"]])
    if len(set(process_group.gather(trainer.world, snapshot.hash_tensors(loaded)))) > 1:
        raise CheckpointError(f"{source}: the ranks loaded different weights; let every node see the same folder")


def unlike_run(state: Mapping[str, Any], train_step: TrainStep) -> str | None:
    """The path of the first part of a state that what is trained cannot continue from; None if there is none."""
    live, learns, memory = train_step.state(), train_step.optimizer, state["optimizer"]
    if name := load.unlike(state, {part: live[part] for part in ("model", "ema", "optimizer") if live[part]}):
        return name
    for saved, part in zip(memory.get("parts", [memory]), getattr(learns, "parts", [learns]), strict=False):
        if not type(part).__module__.startswith(("torch.", "trainers.")):
            continue  # timm's and people's own remember what they like
        parameters = dict(enumerate(parameter for group in part.param_groups for parameter in group["params"]))
        names = {frozenset(entry) if isinstance(entry, dict) else None for entry in saved["state"].values()}
        for index, entry in saved["state"].items():
            if len(names) > 1 or index not in parameters or not is_memory_of(parameters[index], entry):
                return f"optimizer.state.{index}"
    return None


def is_memory_of(parameter: Tensor, entry: Any) -> bool:
    """Whether an optimizer can have remembered this of a parameter: moments of its shape, and no negative step."""
    step = entry.get("step", 0) if isinstance(entry, dict) else None
    step = step.item() if isinstance(step, Tensor) and step.numel() == 1 else step
    return load.unlike(step, 0.0) is None and all(
        entry[name] is None or (isinstance(entry[name], Tensor) and entry[name].shape == parameter.shape)
        for name in MOMENTS if name in entry)


def resume(config: TrainConfig, trainer: Trainer, *, steps_per_epoch: int) -> str:
    """Put the trainer where the run was, or at the weights of `--init-from`; returns a sentence for the summary."""
    world, folder = trainer.world, trainer.folder
    source = process_group.from_main(world, writing(folder.checkpoints)(lambda: choose_checkpoint(
        config.resume, folder, lambda state: unlike_run(state, trainer.train_step))))
    if source is None:
        process_group.from_main(world, lambda: folder.truncate_metrics(-1, evaluated=False))
        if config.init_from is None:
            return "from the start"
        taken = weights.load_weights(trainer.train_step.network, config.init_from, flag="--init-from")
        check_same_on_all_ranks(trainer, config.init_from)
        return f"from the {taken}"
    state = load.load_or_fail(source)
    load.check_fits(state, trainer.train_step.network, source, config=trainer.config, fingerprint=trainer.fingerprint)
    was, decoder = (each.get("decoder") for each in (state["fingerprint"], trainer.fingerprint))
    if decoder not in (None, was) and world.is_main:
        to_stderr(f"WARNING data: images were decoded by {was or 'Pillow alone'} before {source.name} and are by "
                  f"{decoder} now: pixels may differ by a shade; go back to what it was for the same bits")
    trainer.data.expect(state, source)
    try:
        trainer.load_state(state)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:  # as an optimizer refuses another's state
        raise CheckpointError(f"{source}: does not fit this run: {first_line(error)}; use the flags and the version of "
                              f"this code that it was made with, or another --run-name") from None
    then, now = (each.get("user_code", {}) for each in (state["fingerprint"], trainer.fingerprint))
    then = {Path(path).name: sha256 for path, sha256 in then.items()}
    changed = [path for path, sha256 in now.items() if then.get(Path(path).name, sha256) != sha256]
    if changed and world.is_main:
        to_stderr(f"WARNING checkpoint: {', '.join(changed)}: changed since {source.name} was written; the run "
                  f"continues with what is there now")
    check_same_on_all_ranks(trainer, source)
    if world.is_main and config.schedule != "constant":
        say_other_rate(config, trainer, state["config"], steps_per_epoch)
    evaluated = trainer.history.has_recorded(trainer.step)
    process_group.from_main(world, lambda: folder.truncate_metrics(trainer.step, evaluated=evaluated))
    return f"from {source.name}, step {trainer.step}, epoch {trainer.epoch}"


def say_other_rate(config: TrainConfig, trainer: Trainer, saved: Mapping[str, Any], steps_per_epoch: int) -> None:
    """From which learning rate to which it goes, where the schedule is laid over more steps, or fewer, than before."""
    before = replace(config, epochs=saved.get("epochs", config.epochs), max_steps=saved.get("max_steps"))
    total, old_total = (each.total_steps(steps_per_epoch) for each in (config, before))
    if total != old_total:
        group = trainer.train_step.optimizer.param_groups[0]
        then, now = group["lr"], group["initial_lr"] * trainer.train_step.schedule(trainer.step)
        say(f"schedule   {config.schedule} over {total} steps, not {old_total}: the learning rate goes from {then:.3g} "
            f"to {now:.3g}")
