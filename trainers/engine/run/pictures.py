"""Curves, confusion matrix and image grids as PNG bytes; matplotlib is imported by the first, and without pyplot."""

import io
import logging
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from launch.errors import printable

RIGHT, WRONG = "#1a7f37", "#c62828"
EVALUATED: dict[str, Any] = {"color": "#d62728", "linestyle": "--"}
STYLES = {"train": {"color": "#1f77b4", "linestyle": "-"}, "test": EVALUATED, "validation": EVALUATED}
MOST_NUMBERS, MOST_NAMES = 20, 60  # classes up to which a confusion matrix shows the count of each cell, and the names
MOST_IMAGES, COLUMNS, MOST_MARKERS = 32, 8, 50  # of a grid; points of a curve up to which each is marked
PLAIN: dict[str, Any] = {"parse_math": False}  # of text that is not ours: a `$` in it is no formula


def new_figure(width: float, height: float) -> Any:
    """An empty figure of that size in inches."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # without remarks on fonts and its config folder
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def as_png(figure: Any, *, dpi: int = 110) -> bytes:
    """The figure as the content of a PNG file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layouts, and of what the font lacks
        figure.savefig(buffer := io.BytesIO(), format="png", dpi=dpi)
    return buffer.getvalue()


def curves(epochs: Sequence[dict[str, Any]], *, steps_per_epoch: int, title: str = "") -> bytes:
    """Loss and, where there are classes, accuracy of the training and the evaluated set, at epochs and parts of one."""
    has_accuracy = any(line["train_accuracy"] is not None for line in epochs)
    figure = new_figure(8.4 if has_accuracy else 4.6, 3.6)
    panels = figure.subplots(1, 2 if has_accuracy else 1, squeeze=False)[0]
    places = [line["step"] / steps_per_epoch for line in epochs]
    draw_lines(panels[0], places, epochs, "loss")
    losses = [line[f"{split}_loss"] for line in epochs for split in STYLES if line.get(f"{split}_loss") is not None]
    if losses and max(losses) > 100 * min(losses) > 0:
        panels[0].set_yscale("log")
    if has_accuracy:
        draw_lines(panels[1], places, epochs, "accuracy", in_percent=True)
        panels[1].set_ylim(top=min(100.5, panels[1].get_ylim()[1]))
    figure.suptitle(printable(title), fontsize=10, **PLAIN)
    return as_png(figure)


def draw_lines(axes: Any, places: Sequence[float], epochs: Sequence[dict[str, Any]], name: str, *,
               in_percent: bool = False) -> None:
    """One line for each split that has values of this name, or of its top 5, on a whole-numbered axis of epochs."""
    from matplotlib.ticker import MaxNLocator
    for label, style in ((f"{split}_{name}{top}", {**style, "alpha": opacity}) for split, style in STYLES.items()
                         for top, opacity in (("", 1.0), ("_top5", 0.5))):
        values = [line.get(label) for line in epochs]
        known = [(place, 100 * value if in_percent else value) for place, value in zip(places, values, strict=True)
                 if value is not None and math.isfinite(value)]
        if known:
            axes.plot(*zip(*known, strict=True), marker="o" if len(known) <= MOST_MARKERS else None, markersize=3,
                      label=label.replace("_", " "), **style)
    axes.set(xlabel="epoch", ylabel=f"{name} in %" if in_percent else name,
             xlim=(0, max(1.0, *places) * 1.02 if places else 1.0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if axes.get_lines():
        axes.legend()


def confusion_matrix(matrix: Sequence[Sequence[int]], class_names: Sequence[str], *, title: str = "") -> bytes:
    """Rows are true classes, columns predicted ones; the colour is the share of the row, the number the count."""
    size = len(matrix)
    names = [printable(name) for name in class_names or map(str, range(size))]
    side = min(12.0, 2.6 + 0.55 * size)
    figure = new_figure(side + 0.8, side)
    axes = figure.subplots()
    shares = [[count / max(1, sum(row)) for count in row] for row in matrix]
    figure.colorbar(axes.imshow(shares, cmap="Blues", vmin=0, vmax=1), ax=axes, label="share of the true class",
                    shrink=0.8)
    if size <= MOST_NUMBERS:
        for row, counts in enumerate(matrix):
            for column, count in enumerate(counts):
                axes.text(column, row, str(count), ha="center", va="center", fontsize=8,
                          color="white" if shares[row][column] > 0.5 else "black")
    if size <= MOST_NAMES:
        axes.set_xticks(range(size), names, rotation=45, ha="right", rotation_mode="anchor", **PLAIN)
        axes.set_yticks(range(size), names, **PLAIN)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(printable(title), **PLAIN)
    return as_png(figure)


def denormalize(inputs: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """What the network sees, float32 (B, C, H, W) on the CPU, as pictures in [0, 1]."""
    return (inputs * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]).clamp(0, 1)


def image_grid(images: Tensor, captions: Sequence[str], *, right: Sequence[bool] = (), title: str = "") -> bytes:
    """Images with a line or two above each, green or red by `right`: float (N, C, H, W) in [0, 1], C 1 (grey) or 3."""
    num_images = min(len(images), MOST_IMAGES)
    columns = min(COLUMNS, max(1, num_images))
    rows = max(1, math.ceil(num_images / columns))
    figure = new_figure(max(3.0, 1.25 * columns), 1.55 * rows + 0.4)
    for place, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flatten()):
        axes.axis("off")
        if place < num_images:
            axes.imshow(images[place].float().clamp(0, 1).permute(1, 2, 0).cpu().numpy(), cmap="gray", vmin=0, vmax=1)
            colour = "black" if not right else RIGHT if right[place] else WRONG
            axes.set_title("\n".join(map(printable, captions[place].split("\n"))), fontsize=8, color=colour, **PLAIN)
    figure.suptitle(printable(title), fontsize=10, **PLAIN)
    return as_png(figure, dpi=120)


def predictions(images: Tensor, true: Sequence[str | None], predicted: Sequence[str], *,
                shares: Sequence[float] = (), title: str = "") -> bytes:
    """A grid with each image's predicted name, its probability if given, and the true name where it differs."""
    percents = [f" {100 * share:.0f} %" for share in shares] or [""] * len(predicted)
    truths = ["" if name in (None, other) else f"\ntrue: {name}" for name, other in zip(true, predicted, strict=True)]
    return image_grid(images, list(map("{}{}{}".format, predicted, percents, truths)), title=title,
                      right=[not truth for truth in truths] if None not in true else ())
