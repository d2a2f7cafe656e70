"""Trackio: files below TRACKIO_DIR, shown by `trackio show`; or where TRACKIO_SPACE_ID or TRACKIO_SERVER_URL say."""

import contextlib
import importlib
import io
import uuid
import warnings

from launch.network import library_defaults
from trainers.engine.trackers.tracker import TrackedRun, Tracker


def start(run: TrackedRun) -> Tracker:
    """One run of the project that has the trainer's name. Trackio knows runs by name, so each gets one of its own."""
    library_defaults(HF_HUB_OFFLINE="1", unless="TRACKIO_SPACE_ID")  # else it asks Hugging Face who is logged in
    warnings.filterwarnings("ignore", module="trackio")  # raised by `check`
    trackio, name = importlib.import_module("trackio"), run.id or f"{run.path.name}-{uuid.uuid4().hex[:6]}"
    with contextlib.redirect_stdout(io.StringIO()):
        following = trackio.init(run.project, name=name, config=dict(run.config), resume="allow", embed=False,
                                 auto_log_gpu=False, auto_log_cpu=False)
    def check() -> None:
        if failures := getattr(following, "_warned_failures", None):
            raise RuntimeError(f"cannot write ({', '.join(sorted(failures))})")
    def finish(state: str) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            following.finish()
        check()
    return Tracker(name, log=lambda step, values: (following.log(dict(values), step=step), check()), finish=finish)
