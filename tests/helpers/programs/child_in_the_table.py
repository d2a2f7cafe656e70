"""Print whether this process has children: without one, with one, and with one that has ended uncollected."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from launch.node import has_children

print(has_children(os.getpid()))
reader, writer = os.pipe()
if (child := os.fork()) == 0:
    os.close(writer)
    os.read(reader, 1)
    os._exit(0)
print(has_children(os.getpid()))
os.close(writer)
os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # ended, and still in the table
print(has_children(os.getpid()))
