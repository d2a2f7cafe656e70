"""benchmark.png: how fast each set-up is, how that scales, and where its step goes."""

from pathlib import Path
from typing import Any

from launch.bench.summary import measured, ratio_of_rounds

COLORS = {"cpu": "#4878a8", "gpu": "#6aa84f", "dp": "#e69138", "ddp": "#8e63a8"}
PHASES = {"forward_backward": ("forward + backward", "#4878a8"), "communication": ("communication", "#cc5544"),
          "optimizer": ("optimizer", "#e6a23c"), "data": ("waiting for data", "#9aa5b1")}


def draw(results: dict[str, Any], path: Path) -> None:
    """Write the PNG; matplotlib is loaded only here."""
    from matplotlib.figure import Figure

    rows = measured(results["rows"])
    curves = curves_of(rows)
    height = max(4.2, 2.2 + 0.45 * len(rows))
    figure = Figure(figsize=(15 if curves else 11, height), layout="constrained")
    axes = figure.subplots(1, 3 if curves else 2, width_ratios=[1.2, 1, 1][: 3 if curves else 2])
    figure.suptitle(f"{results['model']}, {results['trainer']} trainer, torch {results['machine']['torch']}",
                    fontsize=11)
    draw_bars(axes[0], rows)
    draw_steps(axes[1], rows)
    if curves:
        draw_scaling(axes[2], curves)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
    figure.savefig(path, dpi=130)


def draw_bars(axis: Any, rows: list[dict[str, Any]]) -> None:
    """Samples per second: the median, and as a whisker the slowest and fastest round."""
    widest = max(row["fastest_round"] for row in rows)
    for position, row in enumerate(rows):
        rate, slowest, fastest = (row[name] for name in ("samples_per_second", "slowest_round", "fastest_round"))
        axis.barh(position, rate, xerr=[[rate - slowest], [fastest - rate]], color=COLORS[row["kind"]], height=0.6,
                  error_kw={"capsize": 3, "elinewidth": 1, "ecolor": "#333333"})
        axis.text(fastest + 0.02 * widest, position, f"{rate:,.0f}{' WRONG' * (row['verdict'] == 'WRONG')}",
                  va="center", fontsize=9)
    names = [f"{row['setup']}, batch {row['batch_size']}{' *' * row['busy']}" for row in rows]
    axis.set_yticks(range(len(rows)), names)
    axis.invert_yaxis()
    axis.set_xlim(0, widest * 1.2)
    busy = ", * busy machine" * any(row["busy"] for row in rows)
    axis.set_title(f"samples per second (whisker: rounds){busy}", fontsize=10)


def draw_steps(axis: Any, rows: list[dict[str, Any]]) -> None:
    """Milliseconds per step of each phase, stacked."""
    left = [0.0] * len(rows)
    for name, (text, color) in PHASES.items():
        widths = [1000 * (row["step_seconds"][name] or 0.0) for row in rows]
        axis.barh(range(len(rows)), widths, left=left, color=color, height=0.6, label=text)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axis.set_yticks([])
    axis.invert_yaxis()
    axis.set_title("where a step goes, ms", fontsize=10)
    axis.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=2)


def curves_of(rows: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Name of a curve, of set-ups with other numbers of devices -> (devices, speed relative to its own first point)."""
    points: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        _, plus, options = row["setup"].partition("+")
        for kind in ("dp", "ddp") if row["kind"] == "gpu" else (row["kind"],):  # one GPU begins both curves
            for scaling in row["scalings"]:
                points.setdefault(f"{kind}{plus}{options}, {scaling}", {})[row["devices"]] = row
    return {name: [(count, min(found) * ratio_of_rounds(found[count], found[min(found)])) for count in sorted(found)]
            for name, found in points.items() if len(found) > 1}


def draw_scaling(axis: Any, curves: dict[str, list[tuple[int, float]]]) -> None:
    """Speed-up over devices, against the line on which twice the devices are twice as fast."""
    most = max(count for points in curves.values() for count, _ in points)
    axis.plot([1, most], [1, most], color="#999999", linestyle=":", label="ideal")
    for name, points in curves.items():
        kind, _, scaling = name.partition(", ")
        axis.plot(*zip(*points, strict=True), marker="o", label=name, color=COLORS[kind.partition("+")[0]],
                  linestyle="-" if scaling == "strong" else "--")
    axis.set_xticks(sorted({count for points in curves.values() for count, _ in points}))
    axis.set_xlabel("ranks or GPUs", fontsize=9)
    axis.set_ylim(bottom=0)
    axis.set_title("speed-up (strong: one global batch, weak: one per rank)", fontsize=10)
    axis.legend(fontsize=8, frameon=False)
