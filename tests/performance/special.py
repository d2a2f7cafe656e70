"""A trainer as its command starts it, with one thing changed: `special.py first|sized=N TRAINER FLAGS…`.

`first`: ends after the first step and prints when that was. `sized=N`: the synthetic training set has N images.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FIRST = """
import os, time, trainers.engine.step
def first(*args, before=trainers.engine.step.TrainStep.__call__, **more):
    before(*args, **more)
    print(time.time(), flush=True)
    os._exit(0)
trainers.engine.step.TrainStep.__call__ = first
"""
SIZED = """
import functools
from datasets import synthetic
synthetic.load = functools.partial(synthetic.load, num_train={})
"""

if __name__ == "__main__":
    kind, _, number = sys.argv[1].partition("=")
    path = ROOT / "trainers" / f"{sys.argv[2]}.py"
    parts = path.read_text().rpartition('if __name__ == "__main__":')
    sys.argv[:] = [str(path), *sys.argv[3:]]
    main = vars(sys.modules["__main__"])
    main.update(__file__=str(path), __package__=None)
    change = FIRST if kind == "first" else SIZED.format(number)
    exec(compile(parts[0] + change + parts[1] + parts[2], path, "exec"), main)
