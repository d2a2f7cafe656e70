"""What is printed and compared: a page of Markdown that is also read in a terminal, and benchmark.png."""

import json
from pathlib import Path
from typing import Any

from launch.bench.summary import STEP_PHASES, measured, ratio_of_rounds
from launch.errors import UsageError

FORMAT = 1  # of benchmark.json
COLORS = {"cpu": "#4878a8", "gpu": "#6aa84f", "dp": "#e69138", "ddp": "#8e63a8"}
Cells = list[list[str]]


def check_output_dir(folder: Path) -> None:
    """Make the folder and try to write there; UsageError if one of the files could not be written later."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".trial").write_bytes(b"")
        (folder / ".trial").unlink()
        for name in ("benchmark.json", "benchmark.md", "benchmark.png"):
            if (folder / name).is_dir():
                raise IsADirectoryError(21, f"{name} is a folder")
    except OSError as error:
        raise UsageError(f"--output-dir {folder}: cannot be written ({error.strerror}); choose another") from None


def page(results: dict[str, Any]) -> str:
    """One benchmark.json for people: what was measured and how, speeds, phases of a step, warnings."""
    machine, method = results["machine"], results["method"]
    gpus = f", {len(machine['gpus'])} x {machine['gpus'][0]}" if machine["gpus"] else ""
    return "\n\n".join([
        f"# {results['model']} ({results['trainer']}, {results['dataset']}) on {machine['processor']}, "
        f"{machine['cores']} cores{gpus}, torch {machine['torch']}",
        f"    {results['command']}",
        f"{method['steps']} steps timed after {method['warmup_steps']}, median of {method['rounds']} rounds in "
        f"rotating order, {method['threads']} thread{'s' * (method['threads'] > 1)} per rank unless named",
        as_table(speed_cells(results["rows"], results["baseline"])),
        "## Where a step goes (per rank; * = the machine was busy)", as_table(step_cells(results["rows"])),
        *(f"not run: {one['setup']}: {one['why']}" for one in results["not_run"]),
        *(f"WARNING: {line}" for line in results["warnings"])])


def speed_cells(rows: list[dict[str, Any]], baseline: str | None) -> Cells:
    """Header and rows: how fast each set-up is, and what that is worth."""
    cells = [["set-up", "global batch", "samples/s", "min - max", f"x {baseline}", "efficiency", "cores busy", "loss",
              "verdict"]]
    for row in rows:
        figures = ["failed", *[""] * 6] if row["samples_per_second"] is None else [
            number(row["samples_per_second"]), f"{number(row['slowest_round'])} - {number(row['fastest_round'])}",
            "" if row["speedup"] is None else f"{row['speedup']:.2f}",
            "" if row["efficiency"] is None else f"{100 * row['efficiency']:.0f} %", f"{row['cpu_share']:.2f}",
            "not finite" if row["loss"] is None else f"{row['loss']:.5f}", row["verdict"] or ""]
        cells.append([f"{row['setup']}{' *' if row.get('busy') else ''}", str(row["batch_size"]), *figures])
    return cells


def step_cells(rows: list[dict[str, Any]]) -> Cells:
    """Header and rows: where a step goes, in milliseconds (empty: could not be measured), memory, and arithmetic."""
    cells = [["set-up", "global batch", "data", "forward+backward", "communication", "optimizer", "peak memory",
              "GFLOP/s", "of a matrix product"]]
    for row in measured(rows):
        phases = [row["step_seconds"][name] for name in STEP_PHASES]
        cells.append([row["setup"], str(row["batch_size"]),
                      *("" if seconds is None else f"{1000 * seconds:.2f} ms" for seconds in phases),
                      f"{row['peak_memory_bytes'] / 2**20:,.0f} MiB",
                      number(row["flops_per_second"] / 1e9), f"{100 * row['utilisation']:.1f} %"])
    return cells


def number(value: float) -> str:
    """Three digits or more: 1,234 or 12.3."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def as_table(cells: Cells) -> str:
    """A Markdown table whose columns are aligned, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(" | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
                     for row in [cells[0], rule, *cells[1:]])


def read_results(path: Path) -> dict[str, Any]:
    """A benchmark.json; UsageError, with the cause, if it is none."""
    try:
        results = json.loads(path.read_text())
        if not isinstance(results, dict) or results.get("format") != FORMAT or "rows" not in results:
            raise ValueError(f"not of format {FORMAT}")
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as a benchmark.json ({error}); give one that launch/benchmark.py "
                         f"wrote") from None
    return results


def comparison(old: dict[str, Any], new: dict[str, Any]) -> str:
    """A table with a row for every set-up and batch that both have."""
    cells = [["set-up", "global batch", "old samples/s", "new samples/s", "new / old", "judgement"]]
    before = {(row["setup"], row["batch_size"]): row for row in measured(old["rows"])}
    for row in measured(new["rows"]):
        if other := before.get((row["setup"], row["batch_size"])):
            was, now = other["samples_per_second"], row["samples_per_second"]
            cells.append([row["setup"], str(row["batch_size"]), f"{was:,.0f}", f"{now:,.0f}", f"{now / was:.3f}",
                          judgement(other, row)])
    return as_table(cells) if len(cells) > 1 else "the two have no set-up and batch in common"


def judgement(old: dict[str, Any], new: dict[str, Any]) -> str:
    """faster or slower only if every new round lies beyond every old one; one round each shows no noise."""
    return ("one round: noise unknown" if min(old["rounds"], new["rounds"]) < 2 else
            "faster, beyond the noise" if new["slowest_round"] > old["fastest_round"] else
            "slower, beyond the noise" if new["fastest_round"] < old["slowest_round"] else "within the noise")


def draw(results: dict[str, Any], path: Path) -> None:
    """Write the PNG; matplotlib is loaded only here."""
    from matplotlib.figure import Figure

    rows = measured(results["rows"])
    curves = curves_of(rows)
    panels = 2 if curves else 1
    figure = Figure(figsize=(6 * panels, max(4.2, 2.2 + 0.45 * len(rows))), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    figure.suptitle(f"{results['model']}, {results['trainer']} trainer, torch {results['machine']['torch']}",
                    fontsize=11)
    draw_bars(axes[0], rows)
    if curves:
        draw_scaling(axes[1], curves)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
    figure.savefig(path, dpi=130)


def draw_bars(axis: Any, rows: list[dict[str, Any]]) -> None:
    """Samples per second: the median, and as a whisker the slowest and fastest round."""
    rates = [row["samples_per_second"] for row in rows]
    spread = [[row["samples_per_second"] - row["slowest_round"] for row in rows],
              [row["fastest_round"] - row["samples_per_second"] for row in rows]]
    names = [f"{row['setup']}, batch {row['batch_size']}{' *' * row['busy']}" for row in rows]
    bars = axis.barh(names, rates, xerr=spread, capsize=3, color=[COLORS[row["kind"]] for row in rows], height=0.6)
    axis.bar_label(bars, [f"{row['samples_per_second']:,.0f}{' WRONG' * (row['verdict'] == 'WRONG')}" for row in rows],
                   padding=3, fontsize=9)
    axis.invert_yaxis()
    axis.margins(x=0.2)
    busy = ", * busy machine" * any(row["busy"] for row in rows)
    axis.set_title(f"samples per second (whisker: rounds){busy}", fontsize=10)


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
