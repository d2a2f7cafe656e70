"""MLflow: the server at MLFLOW_TRACKING_URI; or mlruns/ beside the run folders, if none is named or can be reached, for
`MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri runs/mlruns`, a command of the whole package mlflow."""

import importlib
import re
import time
from collections.abc import Mapping

from launch.errors import say
from launch.network import is_reachable, library_defaults
from trainers.engine.trackers.tracker import TrackedRun, Tracker

STATES = {"DONE": "FINISHED", "PREEMPTED": "KILLED", "FAILED": "FAILED"}


def start(run: TrackedRun) -> Tracker:
    """One run of MLFLOW_EXPERIMENT_NAME, or of an experiment of the trainer's name; all flags are its parameters."""
    library_defaults(MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_ALLOW_FILE_STORE="true",
                     MLFLOW_HTTP_REQUEST_MAX_RETRIES="2", MLFLOW_HTTP_REQUEST_TIMEOUT="10")
    mlflow, local = importlib.import_module("mlflow"), (run.path.parent / "mlruns").resolve()
    where = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else local.as_uri()
    if where.startswith("http") and not is_reachable(where):
        say(f"mlflow: {where} cannot be reached; logging to {local}")
        where = local.as_uri()
    client = mlflow.MlflowClient(where)
    kept_where, _, number = (run.id or "").rpartition(" ")
    if kept_where != where:
        name = mlflow.environment_variables.MLFLOW_EXPERIMENT_NAME.get() or run.project
        known = client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else client.create_experiment(name)
        number = client.create_run(experiment, run_name=run.path.name).info.run_id
        for name, value in run.config.items():
            client.log_param(number, name, str(value)[:500])  # the most that all servers take
    client.update_run(number, status="RUNNING")
    def log(step: int, values: Mapping[str, float]) -> None:
        now, metric = int(1000 * time.time()), mlflow.entities.Metric
        client.log_batch(number, [metric(re.sub(r"[^\w/.\- :]", "_", name), value, now, step)  # what it allows in names
                                  for name, value in values.items()])
    return Tracker(f"{where} {number}", log, finish=lambda state: client.set_terminated(number, STATES[state]))
