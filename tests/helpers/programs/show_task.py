"""Write down what a task of a job was told, in a file named after its rank: `show_task.py FOLDER`."""

import json
import os
import sys
from pathlib import Path

names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
rank = os.environ.get("RANK", os.environ["SLURM_PROCID"])
Path(sys.argv[1], rank).write_text(json.dumps({name: os.environ.get(name) for name in names}))
