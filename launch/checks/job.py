"""What launch/doctor.py finds out about the job: who started this process, and where its ranks would meet."""

import os
import socket

from launch import launcher, network, stop
from launch.checks.finding import Finding, fail, ok, warn_if

SHOWN_VARIABLES = (  # an allow-list: tokens and passwords live in the environment too
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT",
    "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS",
    "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST", "SLURM_CPUS_PER_TASK",
    "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_DEBUG")


def job_findings(launch: launcher.Launch) -> list[Finding]:
    """Which launcher's variables would be followed, those that are set, this machine's name, the port."""
    alone = launch.launcher == "none"
    chosen = {"torchrun": "torchrun", "slurm": "srun", "none": "none, one process"}[launch.launcher]
    place = "" if alone else f", meeting at {launch.address}:{launch.port}"
    shown = [f"{name}={os.environ[name]}" for name in SHOWN_VARIABLES if name in os.environ]
    return [warn_if(alone and "SLURM_JOB_ID" in os.environ, "launcher",
                    f"{chosen}: rank {launch.rank} of {launch.world_size}{place}",
                    "this is a Slurm job: start the ranks with srun, or with torchrun"),
            ok("variables", " ".join(shown) or "none of torchrun's or Slurm's is set"),
            signals_finding(), address_finding(launch), port_finding(launch)]


def signals_finding() -> Finding:
    """At which signals training saves and stops, and whether torchrun, if it started this process, passes them on."""
    passed_on = os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE", ",".join(number.name for number in stop.SIGNALS))
    lost = [number.name for number in stop.SIGNALS if number.name not in map(str.strip, passed_on.split(","))]
    text = f"a run saves and stops at {', '.join(number.name for number in stop.stop_signals())}"
    return warn_if(bool(lost), "signals", f"{text}; torchrun would die of {', '.join(lost)}" if lost else text,
                   f"start torchrun with {stop.signals_flag()}")


def address_finding(launch: launcher.Launch) -> Finding:
    """What this machine's name means to itself; other nodes need an address that is not the loopback's."""
    name, address = socket.gethostname(), network.address_towards(socket.gethostname())
    text = f"{name} -> {address or 'no address'}"
    if launch.world_size > launch.local_world_size:
        if route := network.address_towards(launch.address):
            return ok("host name", f"{text}; the way to {launch.address} is from {route}")
        return fail("host name", f"{text}; no route to {launch.address}", "check MASTER_ADDR and the network")
    return warn_if(address is None, "host name", text,
                   f"add `127.0.1.1 {name}` to /etc/hosts: torchrun looks its own name up")


def port_finding(launch: launcher.Launch) -> Finding:
    """Whether the port at which ranks meet is free, as long as nobody of this job has opened it."""
    taken = launch.launcher == "none" and not network.connect_problem("localhost", launch.port)
    return warn_if(taken, "port", f"{launch.port} is {'taken' if taken else 'free, or this job has it'}",
                   "torchrun --standalone picks a free one; over several nodes set --rdzv-endpoint HOST:PORT")
