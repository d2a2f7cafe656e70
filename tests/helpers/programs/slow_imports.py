"""Import a module and print which of the slow packages came with it: `slow_imports.py launch.stop`."""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

importlib.import_module(sys.argv[1])
print({"torch", "tyro"} & set(sys.modules))
