"""torchrun without its own report of failed ranks: the rank that failed first has said why, in the last line.

    python launch/torchrun.py --standalone --nproc-per-node=2 trainers/cifar.py --epochs 3
"""

import logging
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from launch.errors import to_stderr

if __name__ == "__main__":
    logging.disable(logging.ERROR)  # what stops torchrun itself is raised
    try:
        main()
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        if all(failure.exitcode < 0 for failure in error.failures.values()):  # so none could
            to_stderr(f"ERROR distributed: rank {rank}: {first.message}; see the system log (killed, out of memory?)")
        sys.exit(1)  # as torchrun does
