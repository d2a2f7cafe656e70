"""What this machine offers a rank: its device, backend and memory, and a record of all that."""

import contextlib
import ctypes
import platform
import re
import shutil
import socket
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from launch import files, launcher
from launch.errors import DeviceError


def choose_device(device: str, launch: launcher.Launch) -> torch.device:
    """cpu, or this rank's GPU; DeviceError if there is none for it, or no CUDA where that is asked for."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise DeviceError("--device cuda: no CUDA device is available to torch; use --device cpu")
    num_visible = torch.cuda.device_count()
    if launch.local_rank >= num_visible > 1:
        raise DeviceError(f"--device {device}: local rank {launch.local_rank} of {launch.local_world_size} has no GPU, "
                          f"{num_visible} are visible; start {num_visible} ranks on this node, or use --device cpu")
    return torch.device("cuda", launch.local_rank if num_visible > 1 else 0)  # of one, its launcher has chosen for it


def choose_backend(backend: str, device: torch.device) -> str:
    """nccl on CUDA and gloo on the CPU, unless a backend is named; DeviceError if that is NCCL and cannot work here."""
    if backend == "auto":
        return "nccl" if device.type == "cuda" else "gloo"
    if backend == "nccl" and (device.type != "cuda" or not torch.distributed.is_nccl_available()):
        raise DeviceError(f"--backend nccl: needs CUDA, and the device is {device.type}; use --backend gloo")
    return backend


def keep_freed_memory() -> None:
    """Ask glibc to keep large freed blocks: handing activations back to the kernel every step costs up to 1.46x."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no separate mapping for a large block
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def free_shared_memory() -> int | None:
    """Bytes that are free in /dev/shm, through which loader workers hand over their batches; None without one."""
    with contextlib.suppress(OSError):
        return shutil.disk_usage("/dev/shm").free
    return None


def environment_record() -> dict[str, Any]:
    """Versions, code and machine: what is needed to repeat a run. No environment variables: they may hold secrets."""
    return {
        "python": platform.python_version(), "torch": torch.__version__, "platform": platform.platform(),
        "cuda": torch.version.cuda, "host": socket.gethostname(), "command": sys.argv, "git_commit": git_commit(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "float32_matmul": torch.get_float32_matmul_precision(), "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_tf32": torch.backends.cudnn.allow_tf32, "deterministic": torch.are_deterministic_algorithms_enabled(),
        **{name: sys.modules[name].__version__ for name in ("torchvision", "numpy", "PIL") if name in sys.modules},
        "started": datetime.now().astimezone().isoformat(timespec="seconds")}


def git_commit() -> str | None:
    """The commit of this checkout, with `-dirty` if files differ from it; None outside git."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.check_output(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=files.ROOT,
                                       timeout=10, stderr=subprocess.DEVNULL, text=True).strip()
    return None


def processor() -> str:
    """The processor's own name, or just `CPU` where /proc does not tell."""
    with contextlib.suppress(OSError):
        if found := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return " ".join(found[1].split())
    return "CPU"
