"""torchrun without its own reports: the rank that failed first has said why, and nodes that do not meet are one line.

    python launch/torchrun.py --standalone --nproc-per-node=2 trainers/cifar.py --epochs 3"""

import logging
import os
import socket
import sys
import threading
import time
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # else pages of frames for a connection that fails

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import main, parse_args

from launch import network, node
from launch.errors import DistributedError, first_line, to_stderr


def end(reason: str) -> None:
    """Say in one line why the nodes did not meet, as an ERROR on the one where they were to, and end the process."""
    flags = parse_args(sys.argv[1:])
    interface = network.interface_of(flags.local_addr) or "unknown"
    where = f"{flags.rdzv_endpoint} (interface {interface}, {flags.local_addr})"
    to_stderr(f"{socket.gethostname()}: cannot meet at {where}: {reason}" if "is_host=false" in flags.rdzv_conf else
              f"ERROR distributed: rendezvous {where}: {reason}; see that all nodes started and nothing blocks that "
              f"port, or set MASTER_PORT to a free one, or MASTER_ADDR to the first node's name on another network")
    os._exit(DistributedError.exit_code)


def expect_ranks(seconds: int) -> None:
    """End if there are none by then: torch waits without end for what listens on that port and says nothing."""
    for _ in range(seconds):
        time.sleep(1)
        if node.has_children(os.getpid()):
            return
    end("no answer")


if __name__ == "__main__":
    logging.disable(logging.ERROR)  # what stops torchrun itself is raised
    if allowed := parse_args(sys.argv[1:]).rdzv_conf.partition("join_timeout=")[2].partition(",")[0]:
        threading.Thread(target=expect_ranks, args=[int(allowed) + 5], daemon=True).start()
    try:
        main()
    except RendezvousError as error:
        end(first_line(error.__cause__ or error))
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        if all(failure.exitcode < 0 for failure in error.failures.values()):  # so none could
            to_stderr(f"ERROR distributed: rank {rank}: {first.message}; see the system log (killed, out of memory?)")
        sys.exit(1)  # as torchrun does
