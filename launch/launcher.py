"""What the launcher says about this process: torchrun's variables, Slurm's under srun, or none. Without torch."""

import contextlib
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launch.errors import LARGEST, UsageError

UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}")  # torchrun --standalone's run id
REQUEUE = 1000  # what Slurm's restart counts in `restart`: one more than a torchrun ever restarts within it
MOST_HOSTS = 100_000  # in one Slurm node list
START_WITH = "start with torchrun, srun python, or plain python"


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What the launcher says, before any device is touched or connection made."""
    launcher: Literal["torchrun", "slurm", "none"] = "none"
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    address: str = "localhost"  # host of the store at which the ranks meet
    port: int = 29500  # torch's own default for MASTER_PORT
    peer: str | None = None  # another node of the job, if the launcher names one: the way there is the way to all
    torchrun_hosts_store: bool = False  # whether torchrun's agent does, so that it outlives the ranks; else rank 0

    @property
    def hosts_store(self) -> bool:
        """Whether this process hosts the store, so that the others lose it when this one ends."""
        return self.rank == 0 and not self.torchrun_hosts_store

    @property
    def is_grouped(self) -> bool:
        """Whether the ranks meet and form a group, even one of a single rank."""
        return self.launcher == "torchrun" or self.world_size > 1


def read_launch(environ: Mapping[str, str] = os.environ) -> Launch:
    """Rank and world size from torchrun's variables, else from srun's, else one process; UsageError for wrong ones."""
    launch = Launch()
    try:
        for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
            if int(environ.get(name, "0")) < 0:
                raise ValueError(f"{name}={environ[name]} is below 0")
        if "RANK" in environ and "WORLD_SIZE" in environ:  # torchrun is often itself started by srun
            launch = Launch(
                launcher="torchrun", rank=int(environ["RANK"]), world_size=int(environ["WORLD_SIZE"]),
                local_rank=int(environ.get("LOCAL_RANK", environ["RANK"])),
                local_world_size=int(environ.get("LOCAL_WORLD_SIZE", environ["WORLD_SIZE"])),
                address=environ.get("MASTER_ADDR") or "localhost", port=int(environ.get("MASTER_PORT", "29500")),
                torchrun_hosts_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True")
        elif "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ:  # in no step, nobody starts the job's ranks
            launch = read_slurm(environ)
        elif environ.get("WORLD_SIZE", "1") != "1":
            raise ValueError(f"WORLD_SIZE={environ['WORLD_SIZE']} is set without RANK")
        elif environ.get("RANK", "0") != "0":
            raise ValueError(f"RANK={environ['RANK']} is set without WORLD_SIZE")
    except (KeyError, ValueError) as error:
        raise UsageError(f"launcher variables: {error}; {START_WITH}") from None
    for name, value, low, high in (
            ("world size", launch.world_size, 1, LARGEST), ("port", launch.port, 1, 2**16 - 1),
            ("ranks on this node", launch.local_world_size, 1, launch.world_size),
            ("rank", launch.rank, 0, launch.world_size - 1),
            ("local rank", launch.local_rank, 0, launch.local_world_size - 1)):
        if not low <= value <= high:
            error = UsageError(f"launcher variables: {name} {value} is not from {low} to {high}; {START_WITH}")
            error.speaks = name.endswith("rank") or None  # each rank that has it
            raise error
    return launch


def read_slurm(environ: Mapping[str, str]) -> Launch:
    """Rank and world size of a task that srun started. The port lies below the ephemeral range, by job id."""
    world_size = int(environ.get("SLURM_STEP_NUM_TASKS") or environ["SLURM_NTASKS"])
    tasks = []
    for part in (counts := environ.get("SLURM_STEP_TASKS_PER_NODE", str(world_size))).split(","):
        if (match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())) is None:
            raise ValueError(f"{counts!r} is no list of tasks per node")
        tasks += [int(match[1])] * min(int(match[2] or 1), MOST_HOSTS)  # `2(x3),1` is 2, 2, 2, 1
    node, job_id = int(environ.get("SLURM_NODEID", "0")), int(environ.get("SLURM_JOB_ID", "0"))
    hosts = host_names(environ.get("SLURM_STEP_NODELIST", "localhost"))
    if not 0 <= node < len(tasks) or len(hosts) != len(tasks) > 1:
        raise ValueError(f"node {node}, tasks on {len(tasks)} nodes and a list of {len(hosts)} nodes do not fit")
    if sum(tasks) != world_size:
        raise ValueError(f"{sum(tasks)} tasks on the nodes of a step of {world_size}")
    return Launch(launcher="slurm", rank=int(environ["SLURM_PROCID"]), local_rank=int(environ["SLURM_LOCALID"]),
                  world_size=world_size, local_world_size=tasks[node], address=environ.get("MASTER_ADDR") or hosts[0],
                  port=int(environ.get("MASTER_PORT") or 10000 + job_id % 20000), peer=hosts[0 if node else -1])


def host_names(node_list: str) -> list[str]:
    """The hosts of a Slurm node list: `gpu[03-05,9],login` gives gpu03, gpu04, gpu05, gpu9 and login."""
    names = []
    for part in re.split(r",(?![^\[]*\])", node_list):
        if (brackets := re.search(r"\[([^\]]*)\]", part)) is None:
            if re.fullmatch(r"[\w.-]+", part) is None:
                raise ValueError(f"{part!r} is no host name of a Slurm node list")
            names.append(part)
            continue
        for piece in brackets[1].split(","):
            first, _, last = piece.partition("-")
            if not 0 <= int(last or first) - int(first) < MOST_HOSTS:
                raise ValueError(f"{piece!r} is no range of a Slurm node list")
            for number in range(int(first), int(last or first) + 1):
                names += host_names(f"{part[:brackets.start()]}{number:0{len(first)}d}{part[brackets.end():]}")
    return names


def usable_cores() -> int:
    """Cores this process may use: its affinity, or the cgroup's CPU quota where that is smaller."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # the latter where the quota is `max`
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        return max(1, min(cores, quota // period))
    return cores


def choose_threads(launch: Launch) -> int:
    """Threads per rank without --threads: the user's OMP_NUM_THREADS, else the usable cores over the node's ranks."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if launch.launcher == "torchrun" and asked == "1":  # set by torchrun, unless it was itself started with it
        with contextlib.suppress(OSError):
            asked = asked if b"\0OMP_NUM_THREADS=" in b"\0" + Path(f"/proc/{os.getppid()}/environ").read_bytes() else ""
    return int(asked) if asked.isdecimal() and int(asked) > 0 else threads_per_rank(launch.local_world_size)


def too_many_threads(launch: Launch, threads: int) -> str | None:
    """A warning where this node's ranks together have more threads than cores; None where they do not."""
    cores, ranks = usable_cores(), launch.local_world_size
    text = (f"WARNING --threads {threads}: {ranks} rank{'s' * (ranks > 1)} x {threads} threads on {cores} usable cores "
            f"hinder each other; use --threads {threads_per_rank(ranks)}" + " and fewer ranks" * (ranks > cores))
    return text if ranks * threads > cores else None


def threads_per_rank(num_ranks: int) -> int:
    """The usable cores, shared by that many ranks of this node."""
    return max(1, usable_cores() // num_ranks)


def default_workers(num_ranks: int) -> int:
    """Loader workers for each of that many ranks of this node: a core stays for the rank itself."""
    return max(0, min(8, usable_cores() // num_ranks - 1))


def job_identity() -> dict[str, Any]:
    """The scheduler's or launcher's name for this job, and how often it has restarted it."""
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if job := slurm_job():
        return {"job": f"slurm-{job}", "restart": REQUEUE * int(os.environ.get("SLURM_RESTART_COUNT", "0")) + restarts}
    if (agent := launcher_identity()) is None:
        return {"job": None, "restart": 0}
    name = agent["run_id"] if agent["run_id"] != "none" else f"{agent['host']}-{agent['pid']}-{agent['started']}"
    return {"job": f"torchrun-{name}", "restart": restarts}


def launcher_identity() -> dict[str, Any] | None:
    """The torchrun agent that started this process, the same for its restarts; `started` is in ticks since the boot."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    stat = stat_of(os.getppid())
    return {"host": socket.gethostname(), "pid": os.getppid(), "started": int(stat[19]) if stat else None,
            "run_id": os.environ["TORCHELASTIC_RUN_ID"]}


def slurm_job() -> str | None:
    """The id of the Slurm job that started this process, or an array task's `<array job>_<task>`; a requeue keeps it.
    None in an interactive allocation, of many commands: salloc's (no task, or its own step's) or `srun --pty`'s."""
    interactive = (os.environ.get("SLURM_STEP_ID") == "4294967290" or "SLURM_PTY_PORT" in os.environ
                   or os.environ.get("SLURM_JOB_NAME") == "interactive")  # salloc's defaults
    is_batch = os.environ.get("ENVIRONMENT") == "BATCH"  # whatever it inherits from the shell that submitted it
    if not {"SLURM_JOB_ID", "SLURM_PROCID"} <= os.environ.keys() or (interactive and not is_batch):
        return None
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    return f"{array}_{task}" if task is not None else os.environ["SLURM_JOB_ID"]


def given_run_id() -> str | None:
    """The id that Slurm or the user (--rdzv-id) gave the job; one that torchrun --standalone made up is not given."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return slurm_job() or (None if run_id == "none" or UUID.fullmatch(run_id) else run_id)


def parent_of(pid: int) -> int | None:
    """The parent of a live process; None if it has ended, or where /proc does not tell."""
    stat = stat_of(pid)
    return int(stat[1]) if stat and stat[0] not in "ZX" else None


def stat_of(pid: int) -> list[str]:
    """What the kernel tells of a process, from its state on (the command's name before it may hold spaces), or []."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []
