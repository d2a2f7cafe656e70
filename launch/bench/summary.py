"""From the figures of all rounds to one row per set-up: medians, spread, speed-ups, and warnings."""

import math
from statistics import median
from typing import Any

from launch.bench.runs import Job, Setup

STEP_PHASES = ("data", "forward_backward", "communication", "optimizer")
QUEUED_SHARE = 0.05  # of the time a thread was ready to run, another had its core: another rank's, or
OTHERS_SHARE = 0.1  # of the CPU time of all ranks, other processes used as well (on an idle machine 0.04 at most)
IDLE_SHARE = 0.15  # of its time, a lone CPU process did not compute: another machine, or a virtual core, had it
LOSS_TOLERANCE = 1e-3  # relative: the same sums in another order, grown over a few hundred fp32 steps
MOVED_TOLERANCE = 0.02  # relative, for the distance that the weights moved, which is what is left of many gradients
LOOSE_TOLERANCE = 0.1  # relative: other number formats, or BatchNorm, whose statistics depend on how a batch is split


def summarise(jobs: list[Job], runs: list[dict[str, Any]], *, baseline: str | None) -> dict[str, Any]:
    """Rows, in the order of the jobs, of what run_rounds yielded; baseline None: the slowest set-up on one device."""
    rows = [row_of(job, [run for run in runs if (run["setup"], run["batch_size"]) == job.key]) for job in jobs]
    candidates = [row for row in measured(rows) if row["devices"] == 1] or measured(rows)
    chosen = baseline or min(candidates, key=lambda row: row["samples_per_second"], default={"setup": None})["setup"]
    for row in rows:  # the baseline's row on the same curve: at the same global batch, or batch per device
        others = [other for other in measured(rows) if other["setup"] == chosen and row["samples_per_second"]]
        base = next((other for other in others if
                     ("strong" in row["scalings"] and other["batch_size"] == row["batch_size"]) or
                     ("weak" in row["scalings"] and
                      other["batch_size"] * row["devices"] == row["batch_size"] * other["devices"])), None)
        row["speedup"] = ratio_of_rounds(row, base) if base else None
        comparable = base and (row["kind"] == "cpu") == (base["kind"] == "cpu")  # between CPU and GPU it means nothing
        row["efficiency"] = row["speedup"] * base["devices"] / row["devices"] if base and comparable else None
    compare_losses(rows, chosen)
    return {"baseline": chosen, "rows": rows}


def measured(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with a speed: at least one round succeeded."""
    return [row for row in rows if row["samples_per_second"]]


def row_of(job: Job, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One set-up at one batch, over its rounds; figures are None if no round succeeded."""
    good = [run for run in runs if run["benchmark"] is not None]
    errors = [run["error"] for run in runs if run["error"]]
    row: dict[str, Any] = {
        "setup": job.setup.name, "kind": job.setup.kind, "devices": job.setup.devices, "batch_size": job.batch_size,
        "scalings": list(job.scalings), "precision": job.setup.precision, "rounds": len(good), "verdict": None,
        "error": errors[0] if errors else None, "samples_per_second": None, "by_round": {}, "loss": None}
    if not good:
        return row
    figures = [run["benchmark"] for run in good]
    gpus = job.setup.devices if job.setup.kind == "dp" else 1  # behind one rank; DataParallel's are taken to be alike
    rates = [one["samples_per_second"] for one in figures]
    row |= {
        "by_round": {str(run["round"]): run["benchmark"]["samples_per_second"] for run in good},
        "samples_per_second": median(rates), "slowest_round": min(rates), "fastest_round": max(rates),
        "loss": figures[0]["loss"], "losses": [one["loss"] for one in figures],
        "weights_moved": figures[0]["weights_moved"], "batch_norm": figures[0]["batch_norm"],
        "ranks": figures[0]["world_size"], "busy": any(is_busy(one, job.setup) for one in figures),
        "cpu_share": median(sum(one["cpu_seconds"]) / one["seconds"] for one in figures),
        "peak_memory_bytes": max(max(one["peak_memory_bytes"]) for one in figures),
        "step_seconds": {name: phase(figures, name) for name in STEP_PHASES},
        "flops_per_second": median(rates) * figures[0]["flops_per_sample"],
        "matrix_flops_per_second": median(sum(one["matrix_flops_per_second"]) * gpus for one in figures)}
    row["utilisation"] = row["flops_per_second"] / row["matrix_flops_per_second"]
    return row


def phase(figures: list[dict[str, Any]], name: str) -> float | None:
    """Seconds per step in a phase: the mean over ranks, the median over rounds."""
    values = [[value for value in one[f"{name}_seconds"] if value is not None] for one in figures]
    return median(sum(ranks) / len(ranks) for ranks in values if ranks) if any(values) else None


def is_busy(figures: dict[str, Any], setup: Setup) -> bool:
    """Whether something else had the cores that threads queued for, or a lone CPU process was kept from computing."""
    own, seconds = sum(figures["cpu_seconds"]), figures["seconds"]
    if None not in figures["queued_seconds"]:
        queued = max(figures["queued_seconds"]) > QUEUED_SHARE * seconds * figures["threads_per_rank"]
        if queued and max(figures["machine_seconds"]) - own > OTHERS_SHARE * own:
            return True
    alone = setup.kind == "cpu" and figures["world_size"] == 1 and figures["threads_per_rank"] == 1
    return alone and own < (1 - IDLE_SHARE) * seconds


def ratio_of_rounds(row: dict[str, Any], base: dict[str, Any]) -> float:
    """The median over rounds of the ratio within a round: what slows a whole round down cancels."""
    shared = row["by_round"].keys() & base["by_round"].keys()  # the first at least: what failed is not tried again
    return median(row["by_round"][name] / base["by_round"][name] for name in shared)


def compare_losses(rows: list[dict[str, Any]], baseline: str | None) -> None:
    """Set `verdict`, "same" or "WRONG": at one global batch set-ups see the same samples and must learn the same."""
    for row in measured(rows):
        peers = [other for other in measured(rows) if other["batch_size"] == row["batch_size"]]
        reference = next((other for other in peers if other["setup"] == baseline), peers[0])
        same_split = all(row[name] == reference[name] for name in ("ranks", "devices"))
        strict = row["precision"] == reference["precision"] == "fp32" and (same_split or not row["batch_norm"])
        allowed = row["tolerance"] = LOSS_TOLERANCE if strict else LOOSE_TOLERANCE
        # a loss that hardly falls would hide gradients that were not averaged
        pairs = [(row["weights_moved"], reference["weights_moved"], max(allowed, MOVED_TOLERANCE)),
                 *((loss, reference["loss"], allowed) for loss in row["losses"])]
        if not all(None not in pair and math.isclose(*pair[:2], rel_tol=pair[2]) for pair in pairs):
            row["verdict"] = "WRONG"
        elif len(peers) > 1:
            row["verdict"] = "same"


def warnings_of(rows: list[dict[str, Any]], *, rounds: int) -> list[str]:
    """What a reader must know before believing a row."""
    found = []
    for row in rows:
        name = f"{row['setup']} (batch {row['batch_size']})"
        if row["error"]:
            found.append(f"{name} failed: {row['error']}")
        if row["verdict"] == "WRONG":
            found.append(f"{name} is WRONG: loss {row['loss']} after moving the weights by {row['weights_moved']}; the "
                         f"others at this batch differ (tolerance {row['tolerance']:g}), so its speed is worth nothing")
        if row["samples_per_second"] and row["rounds"] < rounds:
            found.append(f"{name}: only {row['rounds']} of {rounds} rounds")
        if row.get("busy"):
            found.append(f"{name}: the machine was busy with something else: wall time is well above CPU time; run it "
                         f"again on an idle machine")
    return found
