"""Training on a real Slurm of several nodes: the same weights as on one machine, and jobs that keep to themselves."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.processes import PROGRAMS, ROOT, TINY, read_json, wait_until
from tests.helpers.server import run
from tests.helpers.slurm import Cluster, Job, state_of

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]
TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1")
ONE = ("--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=1")


def shown(folder: Path) -> list[dict[str, str]]:
    return [json.loads((folder / str(rank)).read_text()) for rank in range(len(list(folder.iterdir())))]


def test_torchrun_on_two_nodes_and_plain_srun_train_to_the_weights_of_four_ranks_on_one_machine(
        cluster: Cluster, tmp_path: Path):
    jobs = [cluster.submit(name, "trainers/cifar.py", *TINY, "--output-dir", tmp_path, "--run-name", name,
                           log=tmp_path / f"{name}.log", options=TWO_BY_TWO) for name in ("multi_node", "per_rank")]
    alone = run("cifar", *TINY, "--output-dir", tmp_path, "--run-name", "alone", ranks=4)
    assert alone.code == 0, alone.err
    expected = read_json(tmp_path / "alone" / "result.json")
    for job, name in zip(jobs, ("multi_node", "per_rank"), strict=True):
        assert job.wait() == "COMPLETED", job.text()
        result = read_json(tmp_path / name / "result.json")
        assert result["weights_sha256"] == expected["weights_sha256"], name
        assert result["confusion_matrix"] == expected["confusion_matrix"]
    assert "launched by torchrun" in jobs[0].text()
    assert "launched by slurm" in jobs[1].text()


def test_a_rank_is_started_for_each_gpu_and_a_plain_task_sees_one_gpu(cluster: Cluster, tmp_path: Path):
    asked = {"multi_node": ("--nodes=2", "--gpus-per-node=2", "--cpus-per-gpu=3"),
             "per_rank": ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-task=1", "--cpus-per-task=3"),
             "single_node": ("--ntasks-per-node=3", "--cpus-per-task=2")}
    jobs = {}
    for name, options in asked.items():
        (tmp_path / name).mkdir()
        jobs[name] = cluster.submit(name, PROGRAMS / "show_task.py", tmp_path / name, log=tmp_path / f"{name}.log",
                                    options=options)
    for job in jobs.values():
        assert job.wait() == "COMPLETED", job.text()
    under_torchrun, plain, single = (shown(tmp_path / name) for name in asked)
    assert [task["LOCAL_RANK"] for task in under_torchrun] == ["0", "1", "0", "1"]
    assert {task["WORLD_SIZE"] for task in under_torchrun} == {"4"}
    assert all(len(task["CUDA_VISIBLE_DEVICES"].split(",")) == 2 for task in under_torchrun)
    assert {task["OMP_NUM_THREADS"] for task in under_torchrun + plain} == {"3"}
    first, second = ({task["CUDA_VISIBLE_DEVICES"] for task in node} for node in (plain[:2], plain[2:]))
    assert all(gpu.isdigit() for gpu in first | second)
    assert len(first) == len(second) == 2
    assert [(task["WORLD_SIZE"], task["OMP_NUM_THREADS"]) for task in single] == [("3", "2")] * 3


def test_two_tasks_of_a_sweep_on_one_node_have_their_own_values_ports_and_folders(cluster: Cluster, tmp_path: Path):
    array = cluster.submit("sweep", "--lr", "0.01,0.03", "trainers/cifar.py", *TINY, "--output-dir", tmp_path,
                           log=tmp_path / "sweep-%a.log", options=(*ONE, "--array=0-1", "--nodelist=node1"))
    runs = [tmp_path / f"cifar-blitz-{array.key}_{task}" for task in (0, 1)]
    texts = lambda: "".join(path.read_text() for path in tmp_path.glob("sweep-*.log"))  # noqa: E731
    wait_until(lambda: [state_of(run) for run in runs] == ["DONE", "DONE"], 120, texts)
    assert [read_json(run / "config.json")["learning_rate"] for run in runs] == [0.01, 0.03]
    first, second = (read_json(run / "result.json")["weights_sha256"] for run in runs)
    assert first != second
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {run.name for run in runs}
    ports = [line.rpartition(":")[2] for line in texts().splitlines() if "rendezvous at" in line]
    assert len(set(ports)) == 2, ports


def test_a_task_of_a_sweep_without_a_value_is_refused_before_anything_is_written(cluster: Cluster, tmp_path: Path):
    job = cluster.submit("sweep", "--lr", "0.01", "trainers/cifar.py", *TINY, "--output-dir", tmp_path / "runs",
                         log=tmp_path / "log", options=(*ONE, "--array=1"))
    wait_until(lambda: "ERROR usage: --array: task 1 has no value" in job.text(), 30, job.text)
    assert not (tmp_path / "runs").exists()


def test_paths_with_spaces_work_and_shell_characters_in_names_are_not_executed(cluster: Cluster, tmp_path: Path):
    checkout = tmp_path / "my check out"
    for folder in ("launch", "datasets", "trainers", "slurm"):
        shutil.copytree(ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__"))
    witness = tmp_path / "executed"
    evil = f"x$(touch {str(witness).replace('/', '${PWD:0:1}')})`touch executed`;touch executed;'\"&|*"
    output = checkout / "my runs"
    job = cluster.submit("preemptible", "trainers/cifar.py", *TINY, "--output-dir", output, "--run-name", evil,
                         log=tmp_path / "log", options=(*ONE, f"--job-name={evil}", f"--comment={evil}"), cwd=checkout)
    assert job.wait() == "COMPLETED", job.text()
    made = [path.parent for path in output.rglob("status.json")]
    assert [state_of(path) for path in made] == ["DONE"]
    assert str(made[0].relative_to(output)) == evil
    assert not witness.exists()
    assert not list(tmp_path.rglob("executed"))


def environment_for_anyone(folder: Path) -> Path:
    """A file to source, with which an ordinary user runs this test's packages: /root is closed to them."""
    python = shutil.which("python3", path="/usr/bin")
    major, minor = sys.version_info[:2]
    version = subprocess.run([python, "--version"], capture_output=True, text=True).stdout if python else ""
    if not version.startswith(f"Python {major}.{minor}."):
        pytest.skip(f"needs a Python {sys.version_info[:2]} in /usr/bin, which an ordinary user may run")
    (folder / "bin").mkdir()
    (folder / "bin" / "python").symlink_to(str(python))
    file = folder / "environment.sh"
    packages = Path(torch.__file__).parents[1]
    file.write_text(f"export PATH={folder}/bin:$PATH PYTHONPATH={packages}\n")
    return file


def test_a_user_who_may_not_write_gets_one_line_and_a_wrong_partition_slurms_own(cluster: Cluster, tmp_path: Path):
    home, closed = Path(cluster.folder) / "home", Path(cluster.folder) / "closed"
    closed.mkdir(mode=0o755)
    job = cluster.submit("single_node", "trainers/cifar.py", *TINY, "--output-dir", closed / "runs", user="rig",
                         log=home / "log", options=ONE, TRAINERS_ENV=str(environment_for_anyone(closed)))
    assert job.wait() == "FAILED"
    assert len(job.errors()) == 1, job.text()
    assert f"{closed}/runs: cannot be written (Permission denied" in job.errors()[0] or (
        f"--output-dir {closed}" in job.errors()[0] and "Permission denied" in job.errors()[0]), job.errors()
    assert not (closed / "runs").exists()
    refused = cluster.run("sbatch", "--partition=nowhere", "slurm/single_node.sbatch", "trainers/cifar.py")
    assert refused.code != 0
    assert "invalid partition specified: nowhere" in refused.err


def test_the_doctor_sees_one_code_version_and_a_shared_folder_on_every_node(cluster: Cluster, tmp_path: Path):
    job = cluster.submit("per_rank", "launch/doctor.py", "--output-dir", tmp_path / "runs", log=tmp_path / "log",
                         options=TWO_BY_TWO)
    assert job.wait() == "COMPLETED", job.text()
    text = job.text()
    for words in ("srun: rank 0 of 4", "on every rank", "4 ranks on 2 hosts", "apart"):
        assert words in text, text


def submit_script(cluster: Cluster, folder: Path, *lines: str) -> Job:
    """A batch script of a user's own."""
    file = folder / "script.sh"
    file.write_text("\n".join(("#!/bin/bash", *lines, "")))
    done = cluster.run("sbatch", "--parsable", "--nodes=1", "--requeue", "--open-mode=append",
                       f"--output={folder / 'log'}", file)
    assert done.code == 0, done.err
    cluster.jobs.append(Job(cluster, done.out.strip(), folder / "log"))
    return cluster.jobs[-1]


def test_the_commands_of_a_batch_script_are_a_run_each_found_again_after_a_requeue(cluster: Cluster, tmp_path: Path):
    trainer = [sys.executable, str(ROOT / "trainers" / "cifar.py"), *TINY, "--output-dir", str(tmp_path / "runs")]
    job = submit_script(cluster, tmp_path, f"for seed in 0 1; do {shlex.join(trainer)} --seed $seed; done",
                        '[[ -n ${SLURM_RESTART_COUNT:-} ]] || { scontrol requeue "$SLURM_JOB_ID"; sleep 60; }')
    assert job.wait() == "COMPLETED", job.text()
    assert job.restarts == 1
    names = [f"cifar-blitz-{job.key}", f"cifar-blitz-2-{job.key}"]
    assert {path.name for path in (tmp_path / "runs").iterdir()} == set(names)
    for seed, name in enumerate(names):
        assert read_json(tmp_path / "runs" / name / "config.json")["seed"] == seed
        assert state_of(tmp_path / "runs" / name) == "DONE"
        assert job.text().count(f"{name} is DONE") == 1  # in the second start


def test_every_command_of_an_interactive_allocation_is_a_new_run(cluster: Cluster, tmp_path: Path):
    trainer = shlex.join([sys.executable, str(ROOT / "trainers" / "cifar.py"), *TINY, "--output-dir",
                          str(tmp_path / "runs")])
    done = cluster.run("salloc", "--nodes=1", "bash", "-c", f"{trainer} && srun {trainer}")
    assert done.code == 0, done.err
    assert "is DONE" not in done.out
    runs = list((tmp_path / "runs").iterdir())
    assert [state_of(run) for run in runs] == ["DONE"] * 2
    assert all(re.fullmatch(r"cifar-blitz-20\d{6}-\d{6}(-\d)?", run.name) for run in runs)
