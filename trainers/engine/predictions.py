"""Predictions for people, for programs, and as a picture."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from launch.errors import UsageError
from trainers.engine.run.pictures import image_grid


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The probabilities that the network gives to the classes of one image."""

    name: str
    probabilities: tuple[float, ...]
    """One per class."""
    true_class: str | None = None

    def best(self, class_names: tuple[str, ...], count: int) -> list[tuple[str, float]]:
        """The most probable classes, with their probabilities."""
        order = sorted(range(len(class_names)), key=lambda label: -self.probabilities[label])
        return [(class_names[label], self.probabilities[label]) for label in order[:count]]


def accuracy_of(predictions: Sequence[Prediction], class_names: tuple[str, ...]) -> float | None:
    """The share of correct ones among those whose true class is known; None if none is."""
    known = [prediction for prediction in predictions if prediction.true_class is not None]
    right = sum(prediction.best(class_names, 1)[0][0] == prediction.true_class for prediction in known)
    return right / len(known) if known else None


def as_lines(predictions: Sequence[Prediction], class_names: tuple[str, ...], *, top: int) -> str:
    """For people: one line per image, and the accuracy where it is known."""
    width = max(len(prediction.name) for prediction in predictions)
    lines = []
    for prediction in predictions:
        ranked = "  ".join(f"{name} {100 * share:5.1f} %" for name, share in prediction.best(class_names, top))
        truth = f"  (is {prediction.true_class})" if prediction.true_class is not None else ""
        lines.append(f"{prediction.name:<{width}}  {ranked}{truth}")
    accuracy = accuracy_of(predictions, class_names)
    if accuracy is not None:
        lines.append(f"accuracy {100 * accuracy:.2f} %")
    return "\n".join(lines)


def as_json(predictions: Sequence[Prediction], class_names: tuple[str, ...], source: Path) -> str:
    """For programs: one object."""
    entries = []
    for prediction in predictions:
        name, share = prediction.best(class_names, 1)[0]
        entries.append({"image": prediction.name, "class": name, "probability": share,
                        "probabilities": dict(zip(class_names, prediction.probabilities, strict=True)),
                        "true_class": prediction.true_class})
    return json.dumps({"checkpoint": str(source), "accuracy": accuracy_of(predictions, class_names),
                       "predictions": entries}, indent=2)


def draw(path: Path, images: Tensor, predictions: Sequence[Prediction], class_names: tuple[str, ...]) -> None:
    """Images, float (N, C, H, W) in [0, 1], with predicted and true names, as a PNG.

    Raises:
        UsageError: if it cannot be written.
    """
    captions, right = [], []
    for prediction in predictions:
        name, share = prediction.best(class_names, 1)[0]
        wrong = prediction.true_class not in (None, name)
        captions.append(f"{name} {100 * share:.0f} %" + (f"\ntrue: {prediction.true_class}" if wrong else ""))
        right.append(not wrong)
    known = all(prediction.true_class is not None for prediction in predictions)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_grid(images, captions, right=right if known else None))
    except OSError as error:
        raise UsageError(f"--picture {path}: cannot be written ({error.strerror}); choose a folder that can") from None
