"""Describe, as JSON, the first batch of some input pipelines of the benchmark: `first_batches.py pil:0 v2:1 batch`."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from datasets import pipeline_speed, synthetic

if __name__ == "__main__":  # the workers of a loader may import this file
    train, _ = synthetic.load(num_train=1000, num_test=10)
    whole = (train.inputs / 255 - 0.5) / 0.25
    described: dict[str, object] = {"whole": {"mean": float(whole.mean()), "std": float(whole.std())}}
    for variant in sys.argv[1:]:
        kind, _, workers = variant.partition(":")
        if kind == "batch":
            batches = pipeline_speed.whole_batches(train, 500)
        else:
            batches = pipeline_speed.single_samples(train, kind, 500, int(workers))
        images, labels = next(batches)
        described[variant] = {"shape": list(images.shape), "dtype": str(images.dtype), "mean": float(images.mean()),
                              "std": float(images.std()), "labels": len(labels)}
    print(json.dumps(described))
