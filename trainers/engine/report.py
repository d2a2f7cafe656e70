"""What a run leaves for people: lines of metrics.jsonl, TensorBoard events, and pictures in the run folder.

On rank 0 only, and outside the timed steps. Drawing is paced: it may take a twentieth of the run's time, so that
short epochs are not slowed by their own picture; the last one is always drawn.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from launch.command_line import CheckpointError
from launch.run_folder import RunFolder, replace_file
from trainers.engine import pictures
from trainers.engine.metrics import Evaluation

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from trainers.engine.trainer import Trainer

FIRST_COST_SECONDS = 1.0  # of the first drawing, which imports matplotlib
SHARE = 0.05  # of the run's time that drawing may take
SCALARS = ("loss", "accuracy", "learning_rate", "samples_per_second")


class Report:
    """Writes for one run; on other ranks every method does nothing."""

    def __init__(self, folder: RunFolder, *, pictures: bool = True, tensorboard: bool = False) -> None:
        self.folder, self.draws, self.tensorboard = folder, pictures and folder.is_main, tensorboard and folder.is_main
        self._writer: SummaryWriter | None = None
        self._drawn_at, self._cost_seconds = time.monotonic(), FIRST_COST_SECONDS

    def line(self, line: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl, and its numbers to TensorBoard."""
        self.folder.append_metrics(line)
        if not self.tensorboard:
            return
        writer = self._events(line["step"])
        for name in SCALARS:
            if line.get(name) is not None and not (name == "learning_rate" and line["split"] == "test"):
                writer.add_scalar(f"{line['split']}/{name}", line[name], line["step"])
        for name, norm in line.get("gradient_norms", {}).items():
            writer.add_scalar(f"gradient_norm/{name}", norm, line["step"])

    def _events(self, step: int) -> "SummaryWriter":
        """The event file, opened at the first line: whatever a killed run wrote from that step on is struck out."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder.path / "tensorboard"), purge_step=step, flush_secs=10)
        return self._writer

    def curves(self, epochs: Sequence[dict[str, Any]], *, steps_per_epoch: int, always: bool = False) -> None:
        """Draw curves.png, if it is time to or `always`."""
        waited = time.monotonic() - self._drawn_at
        if not self.draws or not epochs or not (always or waited * SHARE >= self._cost_seconds):
            return
        began = time.monotonic()
        write_whole(self.folder, "curves.png", pictures.curves(epochs, steps_per_epoch=steps_per_epoch,
                                                              title=self.folder.path.name))
        self._drawn_at = time.monotonic()
        self._cost_seconds = self._drawn_at - began

    def confusion_matrix(self, evaluation: Evaluation, class_names: Sequence[str]) -> None:
        """Draw confusion_matrix.png, where there are classes."""
        if self.draws and evaluation.confusion_matrix is not None and evaluation.accuracy is not None:
            title = f"{100 * evaluation.accuracy:.2f} % of {evaluation.num_samples} test samples"
            write_whole(self.folder, "confusion_matrix.png",
                                    pictures.confusion_matrix(evaluation.confusion_matrix, class_names, title=title))

    def close(self) -> None:
        """Finish the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def write_whole(folder: RunFolder, name: str, content: bytes) -> None:
    """Replace a picture, or another file, of the run. Rank 0 only.

    Raises:
        CheckpointError: if a later incarnation owns the run, or the disk refuses.
    """
    folder.check_fence()
    try:
        replace_file(folder.path / name, content)
    except OSError as error:
        raise CheckpointError(f"{folder.path / name}: cannot be written ({error.strerror}); free some space, "
                              f"then start the same command again") from None


def gradient_norms(model: nn.Module) -> dict[str, Tensor]:
    """The norm of each layer's gradient, of all its parameters together, by the layer's name; on the device."""
    layers: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            layers.setdefault(name.rpartition(".")[0] or name, []).append(parameter.grad)
    return {name: torch.nn.utils.get_total_norm(gradients) for name, gradients in layers.items()}


def name_of(label: int, class_names: Sequence[str]) -> str:
    """The class's name, or its number where it has none."""
    return class_names[label] if label < len(class_names) else str(label)


def draw_first_batch(folder: RunFolder, batch: tuple[Tensor, Tensor], to_image: Callable[[Tensor], Tensor],
                     class_names: Sequence[str]) -> None:
    """first_batch.png: training images as the network sees them, un-normalised. Rank 0 only."""
    inputs, targets = batch
    images = to_image(inputs[: pictures.MOST_IMAGES].float().cpu())
    captions = [name_of(label, class_names) for label in targets[: len(images)].tolist()]
    title = f"first training batch: {len(images)} of this rank's {len(inputs)} images"
    write_whole(folder, "first_batch.png", pictures.image_grid(images, captions, title=title))


@torch.no_grad()
def draw_predictions(trainer: "Trainer", inputs: Tensor, targets: Tensor, to_image: Callable[[Tensor], Tensor],
                     class_names: Sequence[str]) -> None:
    """predictions.png: test images with what the model makes of them. Rank 0 only; no collective."""
    model = trainer.evaluated_model()
    model.eval()
    inputs, targets = inputs[: pictures.MOST_IMAGES], targets[: pictures.MOST_IMAGES]
    with trainer.precision.autocast():
        labels = model(inputs.to(trainer.world.device)).argmax(1).tolist()
    true, predicted = ([name_of(label, class_names) for label in some] for some in (targets.tolist(), labels))
    png = pictures.predictions(to_image(inputs.float().cpu()), true, predicted, title="test images, as predicted")
    write_whole(trainer.folder, "predictions.png", png)
