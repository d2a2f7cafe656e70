"""Predictions for people and for programs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from launch.errors import printable


class Prediction(NamedTuple):
    """The probabilities that the network gives to the classes of one image."""
    image: str
    probabilities: dict[str, float]  # by the names of all classes, in the network's order
    true_class: str | None = None

    @property
    def ranked(self) -> list[tuple[str, float]]:
        """The classes with their probabilities, the most probable first."""
        return sorted(self.probabilities.items(), key=lambda entry: -entry[1])


def accuracy_of(predictions: Sequence[Prediction]) -> float | None:
    """The share of correct ones among those whose true class is known; None if none is."""
    right = [each.ranked[0][0] == each.true_class for each in predictions if each.true_class is not None]
    return sum(right) / len(right) if right else None


def as_lines(predictions: Sequence[Prediction], *, top: int) -> str:
    """For people: one line per image, and the accuracy where it is known."""
    width = max(len(printable(prediction.image)) for prediction in predictions)
    lines = []
    for prediction in predictions:
        ranked = "  ".join(f"{name} {100 * share:5.1f} %" for name, share in prediction.ranked[:top])
        truth = f"  (is {prediction.true_class})" if prediction.true_class is not None else ""
        lines.append(f"{printable(prediction.image):<{width}}  {printable(ranked + truth)}")
    if (accuracy := accuracy_of(predictions)) is not None:
        lines.append(f"accuracy {100 * accuracy:.2f} %")
    return "\n".join(lines)


def as_json(predictions: Sequence[Prediction], source: Path, unreadable: Mapping[str, str]) -> str:
    """For programs: one object; `unreadable` is by file, with the reason."""
    entries = [{"image": each.image, "class": each.ranked[0][0], "probability": each.ranked[0][1],
                "probabilities": each.probabilities, "true_class": each.true_class} for each in predictions]
    return json.dumps({"checkpoint": str(source), "accuracy": accuracy_of(predictions), "predictions": entries,
                       "unreadable": dict(unreadable)}, indent=2)
