"""What grows with the work and what must not: `python tests/performance/growth.py [--rounds 3] [--ranks 32]`.

Seconds per sample of the whole trainer, for training sets of 1,000 to 50,000 images and for batches of 64 to 1,024, on
one thread: drawn to docs/growth.png. Then a stop of many ranks on this machine: seconds from SIGTERM to torchrun until
the checkpoint is saved, and until the last process is gone. Prints both as tables; nothing is asserted.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from launch.bench.table import as_table  # noqa: E402  the path is set first
from launch.stop import signals_flag  # noqa: E402

SPECIAL = ROOT / "tests" / "performance" / "special.py"
SIZES, BATCHES = (1_000, 2_000, 5_000, 10_000, 20_000, 50_000), (64, 128, 256, 512, 1024)
USUAL_SIZE, USUAL_BATCH = 10_000, 128
TIMED_SAMPLES = 30_000
FLAGS = ["--recipe", "blitz", "--onednn", "--learning-rate", "0.01", "--dataset", "synthetic", "--device", "cpu",
         "--threads", "1", "--no-pictures", "--run-name", "run"]


def microseconds_per_sample(size: int, batch: int) -> float:
    """Of the training loop, by the trainer's own clock."""
    steps = max(1, TIMED_SAMPLES // batch)
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--batch-size", str(batch), "--epochs", "1000", "--measure", f"{max(2, steps // 5)}:{steps}"]
        subprocess.run([sys.executable, str(SPECIAL), f"sized={size}", "cifar", *FLAGS, *flags, "--output-dir", folder],
                       check=True, capture_output=True, timeout=300)
        rate = json.loads((Path(folder) / "run" / "result.json").read_text())["benchmark"]["samples_per_second"]
    return 1e6 / float(rate)


def measured(rounds: int) -> dict[str, dict[int, list[float]]]:
    """Each size and each batch, once per round."""
    found: dict[str, dict[int, list[float]]] = {"training images": {size: [] for size in SIZES},
                                                "samples per batch": {batch: [] for batch in BATCHES}}
    for _ in range(rounds):
        for size, values in found["training images"].items():
            values.append(microseconds_per_sample(size, USUAL_BATCH))
        for batch, values in found["samples per batch"].items():
            values.append(microseconds_per_sample(USUAL_SIZE, batch))
    return found


def draw(found: dict[str, dict[int, list[float]]], path: Path) -> None:
    """Medians, with the rounds as whiskers; readable on a light and a dark page."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    for axis, (what, by_number) in zip(figure.subplots(1, 2, sharey=True), found.items(), strict=True):
        middle = [median(values) for values in by_number.values()]
        below = [value - min(values) for value, values in zip(middle, by_number.values(), strict=True)]
        above = [max(values) - value for value, values in zip(middle, by_number.values(), strict=True)]
        axis.errorbar(list(by_number), middle, yerr=[below, above], marker="o", capsize=3, color="#4878a8")
        axis.set_xscale("log")
        axis.set_xticks(list(by_number), [f"{number:,}" for number in by_number], fontsize=8)
        axis.minorticks_off()
        axis.set_ylim(0, 1.25 * max(max(values) for by in found.values() for values in by.values()))
        axis.set_xlabel(what)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("µs per sample")
    figure.savefig(path, dpi=110)


def stop_of(ranks: int) -> tuple[float, float]:
    """Seconds from the signal until the checkpoint of the stop is committed, and until all processes are gone."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--batch-size", str(4 * ranks), "--epochs", "1000", "--output-dir", folder]
        words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", signals_flag(),
                 str(ROOT / "trainers" / "cifar.py"), *FLAGS, *flags]
        run = Path(folder) / "run"
        with subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              start_new_session=True) as process:
            try:
                lines, limit = run / "metrics.jsonl", time.monotonic() + 300
                while not (lines.exists() and len(lines.read_bytes().splitlines()) > 2):
                    if process.poll() is not None or time.monotonic() > limit:
                        raise RuntimeError(f"{ranks} ranks did not start training")
                    time.sleep(0.1)
                began = time.time()
                process.send_signal(signal.SIGTERM)
                process.wait(120)
                gone = time.time() - began
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        status = json.loads((run / "status.json").read_text())
        assert status["state"] == "PREEMPTED", status
        manifest = run / "checkpoints" / f"step-{status['step']:08d}.json"
        return manifest.stat().st_mtime - began, gone


def main() -> None:
    """Measure, draw and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="0: only the stop")
    parser.add_argument("--ranks", type=int, default=32, help="0: no stop")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "growth.png")
    flags = parser.parse_args()
    if flags.rounds:
        found = measured(flags.rounds)
        draw(found, flags.picture)
        cells = [["of", "number", "µs per sample", "rounds", "to the median of its row"]]
        for what, by_number in found.items():
            usual = median(median(values) for values in by_number.values())
            cells += [[what, f"{number:,}", f"{median(values):.1f}", f"{min(values):.1f} - {max(values):.1f}",
                       f"{median(values) / usual:.2f}"] for number, values in by_number.items()]
        print(as_table(cells))
    if flags.ranks:
        saved, gone = stop_of(flags.ranks)
        print(f"a stop of {flags.ranks} ranks: saved after {saved:.1f} s, the last process gone after {gone:.1f} s")


if __name__ == "__main__":
    main()
