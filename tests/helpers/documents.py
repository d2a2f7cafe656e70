"""The commands of README.md, docs/ and slurm/README.md, and a place in which they run as they stand.

A command is what an indented line says, run by bash. Programs named `python`, `torchrun`, `sbatch` and `tensorboard`
stand first on its PATH: they are the real ones with a few more flags at the end, which make the work small.
"""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "slurm" / "README.md"]
PROGRAMS = ("python", "torchrun", "sbatch", "tensorboard", "launch/", "tests/", "pip", "generator", "signals=")

NOT_RUN = {  # beginnings of commands, and where they are run instead
    "pip install -e .": "installs: .ci/run does",
    "tests/run": "is what runs this",
    "launch/quickstart": ".ci/run does",
    "generator = ": "a line of Python: tests/test_own_code.py",
    "random_bits(": "a line of Python: tests/test_order.py",
}

TRAIN = ["--max-steps", "2", "--device", "cpu", "--no-pictures", "--threads", "1"]
SYNTHETIC = [*TRAIN, "--dataset", "synthetic"]
PHOTOS = [*TRAIN, "--batch-size", "16", "--image-size", "32", "--resize-size", "32", "--workers", "1"]
MORE_FLAGS = {  # by program
    "trainers/cifar.py": [*SYNTHETIC, "--width", "8"], "trainers/mnist.py": SYNTHETIC,
    "trainers/fashion_mnist.py": SYNTHETIC, "trainers/regression.py": TRAIN, "trainers/custom.py": TRAIN,
    "trainers/image_folder.py": PHOTOS,
    "launch/benchmark.py": ["--rounds", "1", "--steps", "1", "--warmup-steps", "1", "--setups", "cpu:1",
                            "--batch-size", "64"],
    "launch/doctor.py": [], "datasets/pack.py": [], "trainers/report.py": [], "trainers/predict.py": [],
    "docs/make_reference.py": [],
}


def commands(document: Path) -> list[str]:
    """The commands of a document, in its order: its indented lines, those that end in a backslash joined."""
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    lines = re.findall(r"(?:(?<=\n)|^)    (\S.*)$", text.replace("\\\n", " "), re.MULTILINE)
    return [re.sub(r"\s+# .*", "", line).strip() for line in lines if not line.startswith("#")]


def blocks(document: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def make_programs(folder: Path, port: int) -> Path:
    """Write the shortened programs into `folder`; a rendezvous is at `port` of this machine."""
    folder.mkdir()
    for name in ("python", "torchrun", "sbatch", "tensorboard"):
        path = folder / name
        path.write_text(f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
                        f"from tests.helpers.documents import become\nbecome({name!r}, sys.argv[1:], {port})\n")
        path.chmod(0o755)
    return folder


def become(program: str, words: list[str], port: int) -> None:
    """Replace this process by the real program with more flags."""
    if program == "tensorboard":
        command = [sys.executable, "-m", "tensorboard.main", *words, "--inspect"]
    else:
        at = next(position for position, word in enumerate(words) if word in MORE_FLAGS)
        script = [*words[at:], *MORE_FLAGS[words[at]]]
        if program == "torchrun":
            several_nodes = any(word.startswith("--nnodes") for word in words)
            here = ["--rdzv-endpoint", f"127.0.0.1:{port}", "--nproc_per_node", "1"] if several_nodes else []
            command = [sys.executable, "-m", "torch.distributed.run", *words[:at], *here, *script]
        elif program == "sbatch":  # the options of Slurm and its files are tests/test_slurm*.py's
            file = next(word for word in words[:at] if word.startswith("slurm/"))
            assert (ROOT / file).is_file(), file
            run_once([sys.executable, *script], Path(sys.argv[0]).parent)
        else:
            command = [sys.executable, *script]
    print(json.dumps(shlex.join(command)), file=sys.stderr, flush=True)
    os.execv(command[0], command)


def run_once(command: list[str], folder: Path) -> NoReturn:
    """Run it unless just that has ended well here before: what differs in many of Slurm's commands are its options."""
    ended_well = folder / hashlib.sha256(shlex.join(command).encode()).hexdigest()
    if not ended_well.exists():
        subprocess.run(command, check=True)
        ended_well.touch()
    sys.exit()
