"""What is printed: the rows as text tables, and the same as Markdown."""

from collections.abc import Sequence
from typing import Any

MIB = 2**20
Cells = list[list[str]]


def speed_cells(rows: Sequence[dict[str, Any]], baseline: str | None) -> Cells:
    """Header and rows: how fast each set-up is, and what that is worth."""
    cells = [["set-up", "global batch", "samples/s", "min - max", f"x {baseline}", "efficiency", "cores busy", "loss",
              "verdict"]]
    for row in rows:
        name = f"{row['setup']}{' *' if row.get('busy') else ''}"
        if row["samples_per_second"] is None:
            cells.append([name, str(row["batch_size"]), "failed", *[""] * 6])
            continue
        cells.append([
            name, str(row["batch_size"]), number(row["samples_per_second"]),
            f"{number(row['slowest_round'])} - {number(row['fastest_round'])}",
            f"{row['speedup']:.2f}" if row["speedup"] is not None else "",
            f"{100 * row['efficiency']:.0f} %" if row["efficiency"] is not None else "",
            f"{row['cpu_share']:.2f}", "not finite" if row["loss"] is None else f"{row['loss']:.5f}",
            row["verdict"] or "",
        ])
    return cells


def step_cells(rows: Sequence[dict[str, Any]]) -> Cells:
    """Header and rows: where a step goes, in milliseconds, memory, and arithmetic."""
    cells = [["set-up", "global batch", "data", "forward+backward", "communication", "optimizer", "peak memory",
              "GFLOP/s", "of a matrix product"]]
    for row in rows:
        if row["samples_per_second"] is not None:
            phases = row["step_seconds"]
            cells.append([
                row["setup"], str(row["batch_size"]),
                *(milliseconds(phases[name]) for name in ("data", "forward_backward", "communication", "optimizer")),
                f"{row['peak_memory_bytes'] / MIB:,.0f} MiB", number(row["flops_per_second"] / 1e9),
                f"{100 * row['utilisation']:.1f} %",
            ])
    return cells


def number(value: float) -> str:
    """Three digits or more: 1,234 or 12.3."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def milliseconds(seconds: float | None) -> str:
    """`12.3 ms`, or nothing for what could not be measured."""
    return "" if seconds is None else f"{1000 * seconds:.2f} ms"


def as_text(cells: Cells) -> str:
    """Columns aligned, numbers to the right, the header underlined."""
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) if column == 0 else cell.rjust(width)
                       for column, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
             for row in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def as_markdown(cells: Cells) -> str:
    """The same for a README."""
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" + "---:|" * (len(cells[0]) - 1), *lines[1:]])


def terminal_page(results: dict[str, Any]) -> str:
    """One benchmark.json as text: speeds, phases of a step, warnings."""
    return "\n\n".join(part for part in (
        headline(results), as_text(speed_cells(results["rows"], results["baseline"])),
        "Where a step goes (per rank; * = the machine was busy)\n\n" + as_text(step_cells(results["rows"])),
        "\n".join(f"not run: {one['setup']}: {one['why']}" for one in results["not_run"]),
        "\n".join(f"WARNING: {line}" for line in results["warnings"]),
    ) if part)


def markdown_page(results: dict[str, Any]) -> str:
    """benchmark.md."""
    missing = [f"{one['setup']} ({one['why']})" for one in results["not_run"]]
    return "\n\n".join([
        "# Benchmark", headline(results), f"    {results['command']}",
        as_markdown(speed_cells(results["rows"], results["baseline"])), "## Where a step goes",
        as_markdown(step_cells(results["rows"])), "![bars and scaling curves](benchmark.png)",
        *([f"Not run: {'; '.join(missing)}."] if missing else []),
        *(f"**Warning:** {line}" for line in results["warnings"]),
    ]) + "\n"


def headline(results: dict[str, Any]) -> str:
    """What was measured, on what, and how."""
    machine, method = results["machine"], results["method"]
    gpus = f", {len(machine['gpus'])} x {machine['gpus'][0]}" if machine["gpus"] else ""
    return (f"{results['model']} ({results['trainer']}, {results['dataset']}) on {machine['processor']}, "
            f"{machine['cores']} cores{gpus}, torch {machine['torch']}\n"
            f"{method['steps']} steps timed after {method['warmup_steps']}, median of {method['rounds']} rounds in "
            f"rotating order, {method['threads']} thread{'s' * (method['threads'] > 1)} per rank unless named")
