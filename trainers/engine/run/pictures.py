"""Curves, confusion matrix and image grids as PNG bytes.

matplotlib is imported by the first drawing, so that training neither waits for it nor needs a display: figures are made
without pyplot, which holds global state and would look for a window system. Names of classes and runs are drawn as they
are: never read as markup, and characters that the font lacks are replaced.
"""

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from launch.errors import printable

RIGHT, WRONG = "#1a7f37", "#c62828"
STYLES: dict[str, dict[str, Any]] = {
    "train": {"color": "#1f77b4", "linestyle": "-"}, "test": {"color": "#d62728", "linestyle": "--"},
    "validation": {"color": "#d62728", "linestyle": "--"},
}
MOST_NUMBERS = 20  # classes up to which each cell of a confusion matrix shows its count
MOST_NAMES = 60  # and up to which each row shows its name
MOST_IMAGES, COLUMNS = 32, 8
MOST_MARKERS = 50  # points of a curve up to which each is marked
PLAIN: dict[str, Any] = {"parse_math": False}  # of text that is not ours: a `$` in it is no formula


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Draw one picture without matplotlib's remarks on fonts, layout and a config folder that cannot be written."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("matplotlib").setLevel(logging.ERROR)
        yield


def drawable(text: str) -> str:
    """A text in one line, with a replacement in the place of what the font lacks."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = get_font(findfont(FontProperties())).get_charmap()
    return "".join(character if ord(character) in known else "\ufffd" for character in printable(text))


def new_figure(width: float, height: float) -> Any:
    """An empty figure of that size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def as_png(figure: Any, *, dpi: int = 110) -> bytes:
    """The figure as the content of a PNG file."""
    figure.savefig(buffer := io.BytesIO(), format="png", dpi=dpi)
    return buffer.getvalue()


@drawing()
def curves(epochs: Sequence[dict[str, Any]], *, steps_per_epoch: int, title: str = "") -> bytes:
    """Loss and, where there are classes, accuracy over the epochs, of the training and the evaluated set. By
    `steps_per_epoch` an epoch that was cut short is not drawn as whole."""
    has_accuracy = any(line["train_accuracy"] is not None for line in epochs)
    figure = new_figure(8.4 if has_accuracy else 4.6, 3.6)
    panels = figure.subplots(1, 2 if has_accuracy else 1, squeeze=False)[0]
    places = [line["step"] / steps_per_epoch for line in epochs]
    draw_lines(panels[0], places, epochs, "loss")
    panels[0].set_ylabel("loss")
    losses = [line[f"{split}_loss"] for line in epochs for split in STYLES if line.get(f"{split}_loss") is not None]
    if losses and min(losses) > 0 and max(losses) > 100 * min(losses):
        panels[0].set_yscale("log")
    if has_accuracy:
        draw_lines(panels[1], places, epochs, "accuracy", scale=100)
        panels[1].set_ylabel("accuracy in %")
        panels[1].set_ylim(top=min(100.5, panels[1].get_ylim()[1]))
    figure.suptitle(drawable(title), fontsize=10, **PLAIN)
    return as_png(figure)


def draw_lines(axes: Any, places: Sequence[float], epochs: Sequence[dict[str, Any]], name: str, *, scale: float = 1
               ) -> None:
    """One line for each split that has values of this name, on a whole-numbered axis of epochs."""
    from matplotlib.ticker import MaxNLocator

    for split, style in STYLES.items():
        values = [line.get(f"{split}_{name}") for line in epochs]
        known = [(place, scale * value) for place, value in zip(places, values, strict=True)
                 if value is not None and math.isfinite(value)]
        if known:
            marker = "o" if len(known) <= MOST_MARKERS else None
            axes.plot(*zip(*known, strict=True), marker=marker, markersize=3, label=f"{split} {name}", **style)
    axes.set_xlabel("epoch")
    axes.set_xlim(0, max(1.0, *places) * 1.02 if places else 1.0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if axes.get_lines():
        axes.legend()


@drawing()
def confusion_matrix(matrix: Sequence[Sequence[int]], class_names: Sequence[str], *, title: str = "") -> bytes:
    """Rows are true classes, columns predicted ones; the colour is the share of the row, the number the count."""
    size = len(matrix)
    names = [drawable(name) for name in class_names or map(str, range(size))]
    side = min(12.0, 2.6 + 0.55 * size)
    figure = new_figure(side + 0.8, side)
    axes = figure.subplots()
    shares = [[count / max(1, sum(row)) for count in row] for row in matrix]
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    if size <= MOST_NUMBERS:
        for row, counts in enumerate(matrix):
            for column, count in enumerate(counts):
                axes.text(column, row, str(count), ha="center", va="center", fontsize=8,
                          color="white" if shares[row][column] > 0.5 else "black")
    if size <= MOST_NAMES:
        axes.set_xticks(range(size), names, rotation=45, ha="right", rotation_mode="anchor", **PLAIN)
        axes.set_yticks(range(size), names, **PLAIN)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(drawable(title), **PLAIN)
    return as_png(figure)


def denormalize(inputs: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """What the network sees, float32 (B, C, H, W) on the CPU, as pictures in [0, 1]."""
    shape = (-1, 1, 1)
    return (inputs * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)).clamp(0, 1)


@drawing()
def image_grid(images: Tensor, captions: Sequence[str], *, right: Sequence[bool] | None = None, title: str = ""
               ) -> bytes:
    """Images with a line or two of text above each: float (N, C, H, W) in [0, 1], one channel (grey) or three.
    `right`: N truths, which colour the captions green or red; black without."""
    num_images = min(len(images), MOST_IMAGES)
    columns = min(COLUMNS, max(1, num_images))
    rows = max(1, math.ceil(num_images / columns))
    figure = new_figure(max(3.0, 1.25 * columns), 1.55 * rows + 0.4)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels:
        axes.axis("off")
    for place in range(num_images):
        pixels = images[place].float().clamp(0, 1).permute(1, 2, 0).cpu().numpy()
        panels[place].imshow(pixels, cmap="gray", vmin=0, vmax=1)
        colour = "black" if right is None else RIGHT if right[place] else WRONG
        caption = "\n".join(map(drawable, captions[place].split("\n")))
        panels[place].set_title(caption, fontsize=8, color=colour, **PLAIN)
    figure.suptitle(drawable(title), fontsize=10, **PLAIN)
    return as_png(figure, dpi=120)


def predictions(images: Tensor, true: Sequence[str | None], predicted: Sequence[str], *,
                shares: Sequence[float] = (), title: str = "") -> bytes:
    """A grid with each image's predicted name, its probability if given, and the true name where it differs."""
    percents = [f" {100 * share:.0f} %" for share in shares] or [""] * len(predicted)
    truths = ["" if name in (None, other) else f"\ntrue: {name}" for name, other in zip(true, predicted, strict=True)]
    captions = list(map("{}{}{}".format, predicted, percents, truths))
    right = None if None in true else [name == other for name, other in zip(true, predicted, strict=True)]
    return image_grid(images, captions, right=right, title=title)
