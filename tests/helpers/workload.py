"""Running a trainer to its end in the tests of the workloads, and the accuracy of each of its epochs."""

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.processes import metrics, read_json
from tests.helpers.server import forked

THREE_SEEDS = (0, 1, 2)


def finished(trainer: str, run: Path, *flags: Any, ranks: int | None = None, timeout: float = 120) -> Path:
    """Train into the folder `run` and return it, having made sure that it ended well; one thread a rank."""
    done = forked(trainer, *flags, "--threads", "1", "--output-dir", run.parent, "--run-name", run.name, ranks=ranks,
                  timeout=timeout)
    assert done.code == 0, done.err
    assert read_json(run / "status.json")["state"] == "DONE"
    return run


def accuracies(run: Path) -> list[float]:
    """Percent on the test set after each epoch."""
    return [100 * accuracy for split, accuracy in metrics(run, "split", "accuracy") if split == "test"]




def write_idx(path: Path, array: np.ndarray) -> None:
    """An IDX file of unsigned bytes, gzipped if its name says so."""
    header = struct.pack(f">I{array.ndim}I", 0x0800 | array.ndim, *array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
