"""Claim a run folder and keep it until stdin closes: `claim.py FOLDER`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from trainers.engine.run.folder import RunFolder

folder = RunFolder(Path(sys.argv[1]), is_main=True)
folder.claim()
print("claimed", flush=True)
sys.stdin.read()
