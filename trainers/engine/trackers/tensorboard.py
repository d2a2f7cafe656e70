"""TensorBoard's event files, in tensorboard/ of the run folder: `tensorboard --logdir runs`."""

import importlib
import threading
from collections.abc import Mapping

from trainers.engine.trackers.tracker import TrackedRun, Tracker


def start(run: TrackedRun) -> Tracker:
    """One more event file; the first one hides what an older version of this code may have left."""
    make_writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
    show = threading.excepthook  # not errors of TensorBoard's own thread: its next event raises them again
    threading.excepthook = lambda error: type(error.thread).__module__.startswith("tensorboard") or show(error)
    writer = make_writer(str(run.path / "tensorboard"), purge_step=None if run.id else 0)
    def log(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()
    return Tracker(id=run.path.name, log=log, finish=lambda state: writer.close())
