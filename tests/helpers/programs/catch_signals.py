"""A process that catches stop signals: `catch_signals.py early`, `wait` or `late` says when they come, `all` which."""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from launch.stop import SIGNALS, catch_signals, stop_request


class Late:
    """Sends this process signals when it is deleted: after Python has given back the default handlers."""

    def __del__(self, kill=os.kill, pid=os.getpid(), numbers=tuple(reversed(SIGNALS))):  # noqa
        for number in numbers:
            kill(pid, number)
        os.write(1, b"late")


catch_signals()
if sys.argv[1] == "early":
    assert not any(name in sys.modules for name in ("torch", "numpy", "tyro")), "slow imports come first"
    os.kill(os.getpid(), signal.SIGTERM)
    print(stop_request().reason, stop_request().launcher == os.getppid())
elif sys.argv[1] == "all":
    for number in SIGNALS:
        stop_request().reason = None
        os.kill(os.getpid(), number)
        print(number.name, stop_request().reason)
elif sys.argv[1] == "wait":
    print("up", flush=True)
    time.sleep(60)
else:
    late = Late()
