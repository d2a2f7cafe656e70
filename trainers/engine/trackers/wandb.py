"""Weights & Biases: online, else files in the run folder for `wandb sync runs/NAME/trackers/wandb/offline-run-*`."""

import importlib
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

from launch.errors import say
from launch.network import is_reachable, library_defaults
from trainers.engine.trackers.tracker import TrackedRun, Tracker


def start(run: TrackedRun) -> Tracker:
    """One run of WANDB_PROJECT, or a project of the trainer's name; each split brings its steps as horizontal axis."""
    library_defaults(WANDB_ERROR_REPORTING="false")
    wandb, folder, number = importlib.import_module("wandb"), run.path / "trackers", run.id or uuid.uuid4().hex[:12]
    settings = wandb.setup().settings
    mode, url = settings.mode, settings.base_url
    has_key = settings.api_key or importlib.import_module("requests").utils.get_netrc_auth(url)
    if mode == "online" and not (has_key and is_reachable(url)):
        mode, reason = "offline", f"{url} cannot be reached" if has_key else "no key, see wandb login"
        say(f"wandb: {reason}; logging offline, for wandb sync {folder}/wandb/offline-run-*")
    for unfinished in folder.glob("wandb/offline-run-*/files/unfinished"):  # of a killed process: wandb-core writes
        shutil.rmtree(unfinished.parents[1])  # 32 KiB at a time, so what it was told is logged again
    following = wandb.init(
        project=settings.project or run.project, name=run.path.name, id=number, resume="allow", mode=mode,
        dir=str(folder), config={**run.config}, settings=wandb.Settings(silent=True, console="off", finish_timeout=15))
    for split in ("train", "validation", "test"):
        following.define_metric(f"{split}/*", step_metric=f"{split}/step")
    mark = Path(following.dir) / "unfinished"
    if mode == "offline":
        mark.touch()
    def log(step: int, values: Mapping[str, float]) -> None:
        following.log({**values, **{f"{name.partition('/')[0]}/step": step for name in values}})
    def finish(state: str) -> None:
        following.finish(exit_code=0 if state == "DONE" else 1)
        mark.unlink(missing_ok=True)
    return Tracker(number, log, finish, forgets=mode == "offline")
