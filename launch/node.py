"""Start torchrun on one node of several; slurm/common.sh runs it.

    srun --ntasks-per-node=1 python launch/node.py --nodes 2 --rendezvous node1:13455 --id 1734-0 -- \\
        --nproc-per-node 4 trainers/cifar.py --epochs 20

What torchrun lacks: a rendezvous that cannot come up ends in a minute; nodes get an address that others can reach; a
stop signal that comes again does not interrupt the ranks' saving; cut off, it ends when its ranks have."""

import argparse
import errno
import math
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from launch import errors, files, launcher, network, stop

ARRIVAL_SECONDS = 60  # for the slowest node; srun starts them together
CONNECT_SECONDS = 40  # of which torch makes 60 by trying again
CUT_OFF_SECONDS = 30  # without ranks and without a way to the rendezvous: a switch that restarts takes less


def main() -> int:
    """Start torchrun, pass on the first stop signal, and return torchrun's exit code."""
    parser = argparse.ArgumentParser(description="Start torchrun on one node of several.")
    parser.add_argument("--nodes", required=True, help="how many nodes, or the range 1:2 for an elastic run")
    parser.add_argument("--rendezvous", required=True, help="HOST:PORT at which the nodes meet")
    parser.add_argument("--id", required=True, help="names this start of the job; a restart needs another")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="torchrun's flags, the trainer and its flags")
    options = parser.parse_args()
    host, _, port = options.rendezvous.rpartition(":")
    me = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    node = int(os.environ.get("SLURM_NODEID", "0"))
    nodes = launcher.host_names(os.environ.get("SLURM_STEP_NODELIST") or host)
    address = network.address_among([host, nodes[0 if node else -1]])
    is_elastic = not options.nodes.isdigit()  # as 1:2: none is waited for, and one may come later
    if address is None or address.startswith("127."):
        address = me  # which the other nodes know as something else
    rendezvous = ["--standalone"] if options.nodes == "1" else [
        f"--nnodes={options.nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={options.rendezvous}",
        f"--rdzv-id={options.id}", f"--local-addr={address}",
        f"--rdzv-conf=is_host={str(host == me if is_elastic else node == 0).lower()},read_timeout={CONNECT_SECONDS},"
        f"join_timeout={(5 if is_elastic else 1) * ARRIVAL_SECONDS},last_call_timeout=15"]
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    words = [sys.executable, str(files.ROOT / "launch" / "torchrun.py"), *rendezvous, stop.signals_flag(), *command]
    return supervise(words, host, int(port))


def supervise(command: list[str], host: str, port: int) -> int:
    """Run torchrun to its end, or until this node has been cut off from the rendezvous and has no ranks any more."""
    passed_on: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def handle(number: int, frame: FrameType | None) -> None:
        passed_on.append(number)
        if process is not None and len(passed_on) == 1:  # Slurm sends SIGTERM two or three times when it preempts a job
            process.send_signal(number)

    for number in stop.stop_signals():
        signal.signal(number, handle)
    process = subprocess.Popen(command)
    if passed_on:
        process.send_signal(passed_on[0])  # it came before there was anything to pass it on to
    useful_at = math.inf  # until it has ranks: launch/torchrun.py itself ends if it gets none
    while True:
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(5)
            return code if code >= 0 else 128 - code  # a signal's number, as a shell reports it
        if has_children(process.pid) or (useful_at < math.inf and not unreachable(host, port)):
            useful_at = time.monotonic()
        elif time.monotonic() - useful_at > CUT_OFF_SECONDS:
            errors.to_stderr(f"{socket.gethostname()}: cut off from {host}:{port}, its ranks have ended; torchrun "
                             f"ended too")
            process.kill()


def unreachable(host: str, port: int) -> bool:
    """Whether nothing at all comes back from there; a port that is closed is an answer."""
    return network.connect_problem(host, port) not in ("", os.strerror(errno.ECONNREFUSED))


def has_children(pid: int) -> bool:
    """Whether a process has started others that live; torchrun, while it waits, does not collect those that ended."""
    return any(launcher.parent_of(int(entry.name)) == pid for entry in Path("/proc").glob("[0-9]*"))


if __name__ == "__main__":
    sys.exit(main())
