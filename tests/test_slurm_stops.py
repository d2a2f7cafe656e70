"""slurm/preemptible.sbatch on a real Slurm: however it is stopped, it resumes, and ends with the weights of a run that
was never stopped.
"""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.processes import TINY, read_json, wait_until
from tests.helpers.server import HOOKED, run
from tests.helpers.slurm import Cluster, Job, own_jobs, slowed, state_of, step_of

__all__ = ["own_jobs"]  # a fixture
pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("own_jobs"), pytest.mark.timeout(600)]
TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1")
STEPS = ["--max-steps", "80", "--checkpoint-every", "10"]


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory: pytest.TempPathFactory) -> str:
    """weights_sha256 of 80 steps on 4 ranks that nobody stops."""
    folder = tmp_path_factory.mktemp("never-stopped")
    done = run("cifar", *TINY, *STEPS, "--output-dir", folder, "--run-name", "run", ranks=4)
    assert done.code == 0, done.err
    return read_json(folder / "run" / "result.json")["weights_sha256"]


def submit_slow(cluster: Cluster, folder: Path, *options: str, step_seconds: float = 0.15, **variables: str) -> Job:
    return cluster.submit("preemptible", HOOKED, *TINY, *STEPS, "--output-dir", folder, "--run-name",
                          "run", log=folder / "log", options=("--exclude=node[4-5]", *TWO_BY_TWO, *options),
                          **slowed(step_seconds), **variables)


@pytest.fixture(scope="module")
def job_with_a_time_limit(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Path]:
    """Submitted first and looked at last: Slurm looks at time limits every half minute only."""
    folder = tmp_path_factory.mktemp("time-limit")
    options = ("--exclude=node[1-3]", "--time=3", "--signal=USR1@100")  # after 50 to 80 s
    return submit_slow(cluster, folder, *options, step_seconds=0.9), folder


def preempt(cluster: Cluster, job: Job) -> None:
    nodes = ",".join(job.nodes())
    cluster.run("sbatch", "--partition=high", "--exclusive", f"--nodelist={nodes}", "--nodes=2", "--output=/dev/null",
                "--wrap=sleep 1")


def send_usr1(cluster: Cluster, job: Job) -> None:
    cluster.run("scancel", "--signal=USR1", job.key)


def requeue(cluster: Cluster, job: Job) -> None:
    cluster.run("scontrol", "requeue", job.key)


def warn_the_batch_script_alone(cluster: Cluster, job: Job) -> None:
    cluster.run("scancel", "--batch", "--signal=USR1", job.key)


@pytest.mark.parametrize("stop", [preempt, send_usr1, requeue, warn_the_batch_script_alone])
def test_a_stopped_job_is_saved_requeued_and_ends_with_the_weights_of_one_never_stopped(
        cluster: Cluster, tmp_path: Path, job_with_a_time_limit: object, never_stopped: str,
        stop: Callable[[Cluster, Job], None]):
    job = submit_slow(cluster, tmp_path, "--partition=low")
    run = tmp_path / "run"
    wait_until(lambda: step_of(run) >= 10, 120, job.text)
    stop(cluster, job)
    wait_until(lambda: state_of(run) == "PREEMPTED", 60, job.text)
    saved_at = step_of(run)
    assert read_json(run / "status.json")["step"] == saved_at
    assert job.wait(200) == "COMPLETED", job.text()
    assert job.restarts == 1
    assert f"step {saved_at}, epoch 0" in job.text()  # resumed from there, not from an earlier checkpoint
    assert f"job {job.key}, restart 1:" in job.text()
    assert read_json(run / "result.json")["weights_sha256"] == never_stopped
    assert cluster.pids(str(tmp_path)) == []


def test_scancel_saves_and_ends_the_job_without_a_restart(cluster: Cluster, tmp_path: Path):
    job = submit_slow(cluster, tmp_path)
    run = tmp_path / "run"
    wait_until(lambda: step_of(run) >= 10, 120, job.text)
    cluster.run("scancel", job.key)
    assert job.wait(30) == "CANCELLED", job.text()
    assert state_of(run) == "PREEMPTED"
    assert read_json(run / "status.json")["step"] == step_of(run)
    time.sleep(6)  # longer than a requeued job waits
    assert (job.state, job.restarts) == ("CANCELLED", 0)
    assert cluster.pids(str(tmp_path)) == []


def test_what_would_fail_again_is_not_requeued_and_what_goes_on_not_more_often_than_allowed(
        cluster: Cluster, tmp_path: Path):
    limited = submit_slow(cluster, tmp_path, TRAINERS_MAX_REQUEUES="0")
    wrong = cluster.submit("preemptible", "trainers/cifar.py", "--batch-size", "-1", "--output-dir", tmp_path,
                           log=tmp_path / "wrong", options=("--nodes=1",))
    assert wrong.wait() == "FAILED", wrong.text()
    assert wrong.restarts == 0
    assert len(wrong.errors()) == 1, wrong.text()
    wait_until(lambda: step_of(tmp_path / "run") >= 10, 120, limited.text)
    send_usr1(cluster, limited)
    assert limited.wait(60) == "FAILED", limited.text()
    assert limited.restarts == 0
    assert limited.record()["ExitCode"] == "75:0"
    assert "PREEMPTED, and started 1 times: given up" in limited.text()


def test_a_job_near_its_time_limit_is_warned_saves_and_goes_on_until_it_is_done(
        cluster: Cluster, job_with_a_time_limit: tuple[Job, Path], never_stopped: str):
    job, folder = job_with_a_time_limit
    assert job.wait(280) == "COMPLETED", job.text()
    assert job.restarts >= 1
    assert f"job {job.key}: PREEMPTED, requeued" in job.text()
    assert read_json(folder / "run" / "result.json")["weights_sha256"] == never_stopped


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_twenty_requeues_in_a_row_lose_nothing(cluster: Cluster, tmp_path: Path, never_stopped: str):
    job = submit_slow(cluster, tmp_path, "--partition=low", step_seconds=1.0)
    run, steps = tmp_path / "run", []
    for cycle in range(1, 21):
        wait_until(lambda cycle=cycle: job.text().count("(from ") == cycle, 90, job.text)  # it trains
        (requeue if cycle % 2 else send_usr1)(cluster, job)
        wait_until(lambda: state_of(run) == "PREEMPTED", 60, job.text)
        steps.append(step_of(run))
    assert job.wait(240) == "COMPLETED", job.text()
    assert job.restarts == 20
    assert steps == sorted(steps)
    assert read_json(run / "result.json")["weights_sha256"] == never_stopped
