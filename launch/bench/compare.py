"""Two benchmarks side by side: which set-ups changed by more than their rounds scatter."""

import json
from pathlib import Path
from typing import Any

from launch.bench.summary import measured
from launch.bench.table import as_table
from launch.errors import UsageError

FORMAT = 1


def read_results(path: Path) -> dict[str, Any]:
    """A benchmark.json; UsageError, with the cause, if it is none."""
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as a benchmark.json ({error}); give one that launch/benchmark.py "
                         f"wrote") from None
    if not isinstance(results, dict) or results.get("format") != FORMAT or "rows" not in results:
        raise UsageError(f"{path}: is no benchmark.json of format {FORMAT}; give one that launch/benchmark.py wrote")
    return results


def comparison(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What else differs, then a table with a row for every set-up and batch that both have."""
    cells = [["set-up", "global batch", "old samples/s", "new samples/s", "new / old", "judgement"]]
    before = {(row["setup"], row["batch_size"]): row for row in measured(old["rows"])}
    for row in measured(new["rows"]):
        other = before.get((row["setup"], row["batch_size"]))
        if other is not None:
            ratio = row["samples_per_second"] / other["samples_per_second"]
            cells.append([row["setup"], str(row["batch_size"]), f"{other['samples_per_second']:,.0f}",
                          f"{row['samples_per_second']:,.0f}", f"{ratio:.3f}", judgement(other, row)])
    return "\n".join([*(f"differs: {difference}" for difference in differences(old, new)),
                      as_table(cells) if len(cells) > 1 else "the two have no set-up and batch in common"])


def judgement(old: dict[str, Any], new: dict[str, Any]) -> str:
    """faster or slower only if every new round lies beyond every old one; one round each shows no noise."""
    if min(old["rounds"], new["rounds"]) < 2:
        return "one round: noise unknown"
    if new["slowest_round"] > old["fastest_round"]:
        return "faster, beyond the noise"
    if new["fastest_round"] < old["slowest_round"]:
        return "slower, beyond the noise"
    return "within the noise"


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What else changed between the two, so that a ratio is not put down to the code alone."""
    before, after = {**old, **old["machine"]}, {**new, **new["machine"]}
    names = ("model", "trainer", "dataset", "recipe", "host", "processor", "cores", "gpus", "torch")
    return [f"{name}: {before.get(name)} -> {after.get(name)}" for name in names
            if before.get(name) != after.get(name)]
