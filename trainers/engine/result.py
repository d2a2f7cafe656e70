"""What a run says before it begins; and of a finished one result.json, the final summary, the pictures, the weights."""

import io
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from launch.errors import printable, say
from trainers.engine.checkpoints.snapshot import hash_tensors
from trainers.engine.config import Statistics, TrainConfig
from trainers.engine.metrics import Evaluation, with_metrics
from trainers.engine.run import pictures
from trainers.engine.run.folder import OUT_OF_PATIENCE, RunFolder
from trainers.engine.task import EvaluationBatches, TrainBatches
from trainers.engine.trainer import Trainer

MOST_RESULT_CLASSES = 200  # up to which result.json holds the confusion matrix
MOST_SHOWN_CLASSES, ENDS = 20, 5  # up to which the terminal shows every class, and how many of either end beyond


def summary(config: TrainConfig, trainer: Trainer, train: TrainBatches, where: str) -> str:
    """What will run, before step 1: the batch arithmetic most of all."""
    world, step, per_epoch = trainer.world, trainer.train_step, train.steps_per_epoch
    limit = f", at most {config.max_steps}" if config.max_steps else ""
    launched = f", backend {world.backend}, launched by {world.launcher}" if world.backend else ""
    return (f"run        {trainer.folder.path} ({where})\n"
            f"world      {world.world_size} x {world.device.type}, {world.threads} threads each{launched}\n"
            f"batch      {config.batch_size} = {config.rank_batch_size()} per rank x {world.world_size} ranks x "
            f"{config.accumulation_steps} accumulation\n"
            f"steps      {config.total_steps(per_epoch)} = {per_epoch} per epoch, {config.epochs} epochs{limit}\n"
            f"model      {config.model}, {step.num_parameters:,} parameters, "
            f"{sum(parameter.numel() for parameter in step.trained):,} trained, {config.precision}")


def finish(trainer: Trainer, evaluation: Evaluation, class_names: tuple[str, ...], *, split: str, batch_size: int,
           total_seconds: float, save_weights: bool) -> dict[str, Any]:
    """Write result.json, returned here, and DONE, with a reason if that was early; print the accuracy per class."""
    world, folder, step = trainer.world, trainer.folder, trainer.train_step
    seconds = trainer.history.train_seconds
    result = with_metrics({
        "accuracy": evaluation.accuracy, "per_class_accuracy": evaluation.per_class_accuracy,
        "confusion_matrix": write_matrix(folder, evaluation.confusion_matrix), "loss": evaluation.loss,
        "num_samples": evaluation.num_samples, "split": split, "accuracy_top5": evaluation.accuracy_top5,
        "class_names": list(class_names), "train_seconds": seconds, "total_seconds": total_seconds,
        "warm_up_seconds": trainer.history.warm_up_seconds,
        "samples_per_second": trainer.step * batch_size / seconds if seconds else None,
        "data_wait_share": trainer.history.data_wait_share, "world_size": world.world_size,
        "device": str(world.device), "precision": step.precision.name, "num_parameters": step.num_parameters,
        "parallel": {"DistributedDataParallel": "ddp", "DataParallel": "dp"}.get(type(step.model).__name__, "none"),
        "weights_sha256": hash_tensors(sorted(step.network.state_dict().items())),  # equal exactly when every bit is
        "peak_memory_bytes": peak_memory_bytes(world.device), "steps": trainer.step, "best": trainer.history.best,
        "num_skipped_steps": step.precision.num_skipped_steps, "num_checkpoints": trainer.checkpointer.num_saves,
        "checkpoint_wait_seconds": trainer.checkpointer.wait_seconds},  # of this process, as the number of checkpoints
        evaluation.metrics)
    folder.write_json("result.json", result)
    if save_weights and world.is_main:
        weights = {name: tensor.detach().cpu() for name, tensor in step.evaluated_model.state_dict().items()}
        torch.save(weights, buffer := io.BytesIO())  # of the CPU, to be read anywhere
        folder.write_bytes("weights.pt", buffer.getvalue())
    ended, reason = result_text(evaluation, class_names, folder.path, split), ""
    if trainer.out_of_patience:
        best = (trainer.history.best or {}).get("step")
        reason = f"{OUT_OF_PATIENCE} {trainer.options.patience}: no evaluation since step {best} was better"
        ended += f"\nended by {reason}"
    if world.is_main:
        say(ended)
    folder.write_status("DONE", step=trainer.step, epoch=trainer.epoch, reason=reason)
    return result


def write_matrix(folder: RunFolder, matrix: list[list[int]] | None) -> list[list[int]] | None:
    """The matrix as result.json takes it; one of many classes goes into confusion_matrix.npz, under that name."""
    if matrix is None or len(matrix) <= MOST_RESULT_CLASSES:
        return matrix
    np.savez_compressed(buffer := io.BytesIO(), confusion_matrix=np.array(matrix, np.int64))
    folder.write_bytes("confusion_matrix.npz", buffer.getvalue())
    return None


@torch.no_grad()
def draw_result(trainer: Trainer, evaluation: Evaluation, class_names: tuple[str, ...], *, steps_per_epoch: int,
                split: str, test: EvaluationBatches, statistics: Statistics | None) -> None:
    """The pictures of a finished run, on rank 0, once all else is written; after an evaluation only, without curves."""
    report, step, folder = trainer.report, trainer.train_step, trainer.folder
    report.curves(trainer.history.epochs, steps_per_epoch=steps_per_epoch, always=True)
    if not report.draws:
        return
    with report.optional("--pictures"):
        if evaluation.confusion_matrix is not None:
            title = f"{100 * (evaluation.accuracy or 0.0):.2f} % of {evaluation.num_samples} {split} samples"
            folder.write_bytes("confusion_matrix.png", pictures.confusion_matrix(
                evaluation.confusion_matrix, class_names, title=title))
        trainer.world.watchdog.mark("evaluation data")
        first = next(iter(test), None) if statistics is not None else None  # none if no image of it can be read
        trainer.world.watchdog.mark("pictures")
        if statistics is not None and first is not None:
            inputs, targets = (tensor[: pictures.MOST_IMAGES] for tensor in first)
            with step.precision.autocast():
                labels = step.evaluated_model.eval()(inputs.to(step.world.device)).argmax(1)
            true, predicted = ([class_names[int(label)] for label in each] for each in (targets, labels))
            images = pictures.denormalize(inputs.float().cpu(), *statistics)
            folder.write_bytes("predictions.png", pictures.predictions(
                images, true, predicted, title=f"{split} images, as predicted"))


def result_text(evaluation: Evaluation, class_names: tuple[str, ...], path: Path, split: str = "test") -> str:
    """The final summary of a run."""
    top5 = f", top-5 {100 * evaluation.accuracy_top5:.2f} %" if evaluation.accuracy_top5 is not None else ""
    accuracy = None if evaluation.accuracy is None else f"accuracy {100 * evaluation.accuracy:.2f} %"
    lines = [f"{split} {accuracy or f'loss {evaluation.loss:.6f}'} over {evaluation.num_samples} samples{top5}"]
    lines += [f"  {name} {value:.6g}" for name, value in evaluation.metrics.items()]
    shares = list(zip(map(printable, class_names), evaluation.per_class_accuracy or [], strict=False))
    if len(shares) > MOST_SHOWN_CLASSES:
        lines.append(f"worst and best of {len(shares):,} classes:")
        shares = sorted((share for share in shares if share[1] is not None), key=lambda share: share[1] or 0.0)
        del shares[ENDS : max(ENDS, len(shares) - ENDS)]
    lines += [f"  {name:<12} " + ("  none" if share is None else f"{100 * share:6.2f} %") for name, share in shares]
    return "\n".join([*lines, f"results in {path}"])


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory that torch held on the GPU, or that this process held on the CPU, so far."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else used


def draw_first_batch(trainer: Trainer, train: TrainBatches, statistics: Statistics, class_names: Sequence[str]) -> None:
    """first_batch.png: training images as the network sees them, un-normalised. Rank 0 only."""
    trainer.world.watchdog.mark("data")
    inputs, targets = next(train.batches(trainer.epoch, trainer.samples_consumed))
    with trainer.report.optional("--show-batch"):
        images = pictures.denormalize(inputs[: pictures.MOST_IMAGES].float().cpu(), *statistics)
        captions = [label_text(target, class_names) for target in targets[: len(images)].cpu()]
        title = f"first training batch: {len(images)} of this rank's {len(inputs)} images"
        trainer.folder.write_bytes("first_batch.png", pictures.image_grid(images, captions, title=title))


def label_text(target: Tensor, class_names: Sequence[str]) -> str:
    """The name of a class; of mixed ones the two largest shares too."""
    if not target.is_floating_point():
        return class_names[int(target)]
    shares, labels = (part.tolist() for part in target.topk(2))
    return "\n".join(f"{class_names[label]} {share:.0%}" for share, label in zip(shares, labels, strict=True) if share)
