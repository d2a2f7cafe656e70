"""What the launcher says about this process: torchrun's variables, Slurm's under srun, or none.

torchrun's win over Slurm's, since torchrun is often itself started by srun. Threads per rank, and the names that a
restart or a requeue keeps, come from here too. No device is touched, no connection is made, and torch is not imported.
"""

import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from launch.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What the launcher says, before any device or connection is touched."""

    launcher: Literal["torchrun", "slurm", "none"] = "none"
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    address: str = "localhost"
    """Host of the store at which the ranks meet."""
    port: int = 29500  # torch's own default for MASTER_PORT
    peer: str | None = None
    """Another node of the job, where the launcher names one: the way there is the way to all of them."""


def read_launch(environ: Mapping[str, str] = os.environ) -> Launch:
    """Rank and world size from torchrun's variables, else from srun's, else one process.

    Slurm's are believed only inside a step (SLURM_STEP_ID): in a batch script they describe the whole job, and a
    plain `python` there would wait for ranks that nobody starts.

    Raises:
        UsageError: if a variable is missing or is no number.
    """
    try:
        if "RANK" in environ and "WORLD_SIZE" in environ:
            return Launch(
                launcher="torchrun",
                rank=int(environ["RANK"]),
                local_rank=int(environ.get("LOCAL_RANK", environ["RANK"])),
                world_size=int(environ["WORLD_SIZE"]),
                local_world_size=int(environ.get("LOCAL_WORLD_SIZE", environ["WORLD_SIZE"])),
                address=environ.get("MASTER_ADDR", "localhost"),
                port=int(environ.get("MASTER_PORT", "29500")),
            )
        if "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ:
            return read_slurm(environ)
    except (KeyError, ValueError) as error:
        raise UsageError(f"launcher variables: {error}; start with torchrun, srun python, or plain python") from None
    return Launch()


def read_slurm(environ: Mapping[str, str]) -> Launch:
    """Rank and world size of a task that srun started. The port lies below the ephemeral range, by job id."""
    tasks = per_node_counts(environ.get("SLURM_STEP_TASKS_PER_NODE", environ["SLURM_NTASKS"]))
    node = int(environ.get("SLURM_NODEID", "0"))
    hosts = host_names(environ.get("SLURM_STEP_NODELIST", "localhost"))
    job_id = int(environ.get("SLURM_JOB_ID", "0"))
    return Launch(
        launcher="slurm",
        rank=int(environ["SLURM_PROCID"]),
        local_rank=int(environ["SLURM_LOCALID"]),
        world_size=int(environ.get("SLURM_STEP_NUM_TASKS", environ["SLURM_NTASKS"])),
        local_world_size=tasks[node],
        address=environ.get("MASTER_ADDR") or hosts[0],
        port=int(environ.get("MASTER_PORT") or 10000 + job_id % 20000),
        peer=hosts[0 if node else -1],
    )


def per_node_counts(text: str) -> list[int]:
    """Slurm's `2(x3),1` as [2, 2, 2, 1]."""
    counts = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ValueError(f"{text!r} is no list of tasks per node")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def host_names(node_list: str) -> list[str]:
    """The hosts of a Slurm node list: `gpu[03-05,9],login` gives gpu03, gpu04, gpu05, gpu9 and login.

    Raises:
        ValueError: if it is no such list.
    """
    return [name for part in re.split(r",(?![^\[]*\])", node_list) for name in expanded(part)]


def expanded(part: str) -> list[str]:
    """One part of a node list, `gpu[03-05]`, as its hosts."""
    brackets = re.search(r"\[([^\]]*)\]", part)
    if brackets is None:
        if re.fullmatch(r"[\w.-]+", part) is None:
            raise ValueError(f"{part!r} is no host name of a Slurm node list")
        return [part]
    names = []
    for piece in brackets[1].split(","):
        first, _, last = piece.partition("-")
        for number in range(int(first), int(last or first) + 1):
            names += expanded(f"{part[:brackets.start()]}{number:0{len(first)}d}{part[brackets.end():]}")
    return names


def usable_cores() -> int:
    """Cores this process may use: its affinity, or the cgroup's CPU quota where that is smaller."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores


def choose_threads(threads: int | None, launch: Launch, environ: Mapping[str, str] = os.environ) -> int:
    """Threads per rank: `--threads`, else the user's OMP_NUM_THREADS, else the usable cores shared by the node's ranks.

    torchrun sets OMP_NUM_THREADS=1 for its ranks when the user set nothing, which would leave most of a CPU node
    idle; the environment torchrun itself was started with tells the two apart.
    """
    if threads is not None:
        return threads
    asked = environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked) > 0 and not (launch.launcher == "torchrun" and asked == "1" and not users_omp()):
        return int(asked)
    return threads_per_rank(launch.local_world_size)


def threads_per_rank(num_ranks: int) -> int:
    """The usable cores, shared by that many ranks of this node."""
    return max(1, usable_cores() // num_ranks)


def users_omp() -> bool:
    """Whether OMP_NUM_THREADS was in the environment that this process's parent, torchrun, was started with."""
    try:
        with open(f"/proc/{os.getppid()}/environ", "rb") as file:
            return b"\0OMP_NUM_THREADS=" in b"\0" + file.read()
    except OSError:
        return True


def job_identity() -> dict[str, Any]:
    """The scheduler's or launcher's name for this job, and how often it has restarted it."""
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if "SLURM_JOB_ID" in os.environ:
        requeues = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        return {"job": f"slurm-{slurm_name()}", "restart": 1000 * requeues + restarts}  # each may hold many restarts
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return {"job": f"torchrun-{torchrun_name()}", "restart": restarts}
    return {"job": None, "restart": 0}


def slurm_name() -> str:
    """The Slurm job's id, or for an array task `<array job>_<task>`, which a requeue keeps."""
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def torchrun_name() -> str:
    """torchrun's run id, or, where none was given, the time at which torchrun was started: a restart keeps both."""
    run_id = os.environ["TORCHELASTIC_RUN_ID"]
    return run_id if run_id != "none" else start_time(os.getppid())


def start_time(pid: int) -> str:
    """When a process was started, as `20261121-041530`; the present time where /proc does not tell."""
    try:
        ticks = int(stat_of(pid)[19])
        booted = int(re.search(r"^btime (\d+)", Path("/proc/stat").read_text(), re.MULTILINE)[1])  # pyright: ignore
        started = booted + ticks // os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, TypeError):
        started = int(time.time())
    return datetime.fromtimestamp(started).strftime("%Y%m%d-%H%M%S")


def default_run_name(trainer: str, recipe: str) -> str:
    """Trainer, recipe and an id: the Slurm job's, else torchrun's, else the time. A restart finds its folder again."""
    if "SLURM_JOB_ID" in os.environ:
        run_id = slurm_name()
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        run_id = torchrun_name()
    else:
        run_id = f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"
    return "-".join(re.sub(r"[^A-Za-z0-9._-]", "_", part) for part in (trainer, recipe, run_id))


def parent_of(pid: int) -> int | None:
    """The parent of a live process; None if it has ended, or where /proc does not tell."""
    try:
        state, parent = stat_of(pid)[:2]
    except (OSError, ValueError):
        return None
    return int(parent) if state not in "ZX" else None


def stat_of(pid: int) -> list[str]:
    """What the kernel tells of a process, from its state on (the command's name before it may hold spaces)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
