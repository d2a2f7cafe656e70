"""The doctor, on ranks of which the second has other code: `doctor_of_two_checkouts.py OUTPUT_FOLDER`."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from launch.checks import ranks
from launch.doctor import DoctorConfig, main

true_hash = ranks.code_hash
ranks.code_hash = lambda: "edited" if os.environ["RANK"] == "1" else true_hash()
sys.exit(main(DoctorConfig(output_dir=Path(sys.argv[1]), device="cpu", json=True)))
