"""A trainer that needs two seconds to save when it is stopped: `save_slowly.py FOLDER` leaves `started` and `saved`."""

import signal
import sys
import time
from pathlib import Path

stop: list[int] = []
signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number))
Path(sys.argv[1], "started").touch()
while not stop:
    time.sleep(0.05)
time.sleep(2)
Path(sys.argv[1], "saved").touch()
