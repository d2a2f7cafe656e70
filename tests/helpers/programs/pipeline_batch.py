"""Check the first batch of an input pipeline of the benchmark: `pipeline_batch.py pil:0`, `v2:1` or `batch`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from datasets import pipeline_speed, synthetic

if __name__ == "__main__":  # the workers of a loader may import this file
    train, _ = synthetic.load(num_train=1000, num_test=10)
    kind, _, workers = sys.argv[1].partition(":")
    if kind == "batch":
        batches = pipeline_speed.whole_batches(train, 500)
    else:
        batches = getattr(pipeline_speed, f"{kind}_batches")(train, 500, int(workers))
    images, labels = next(batches)
    assert images.shape == (500, 3, 32, 32), images.shape
    assert str(images.dtype) == "torch.float32", images.dtype
    whole = (train.inputs / 255 - 0.5) / 0.25
    assert abs(images.mean() - whole.mean()) < 0.1, images.mean()
    assert abs(images.std() - whole.std()) < 0.1, images.std()
    assert len(labels) == 500
