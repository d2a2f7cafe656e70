"""What launch/doctor.py finds out about one machine. Nothing raises: its page is complete."""

import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch
import torch.cuda.nccl as cuda_nccl
import torch.distributed as dist
from torch.torch_version import TorchVersion

from launch import files, launcher
from launch.checks.finding import Finding, fail, ok, warn, warn_if
from launch.machine import free_shared_memory, processor

GIB = 2**30
BATCHES_PER_WORKER = 3  # in /dev/shm: DataLoader asks for two ahead, and one is being used; docker gives 64 MiB


def machine_findings(launch: launcher.Launch, output_dir: Path, *, batch_bytes: int, workers: int) -> list[Finding]:
    """The whole page for this process's machine, in the order in which things go wrong."""
    return [versions_finding(), *device_findings(), cores_finding(launch),
            shared_memory_finding(batch_bytes=batch_bytes, workers=workers * launch.local_world_size),
            output_finding(output_dir)]


def versions_finding() -> Finding:
    """Python, and each dependency of pyproject.toml at the version it asks for."""
    versions, wrong = [f"python {sys.version.split()[0]}"], []
    for name, least in required_versions().items():
        try:
            versions.append(f"{name} {metadata.version(name)}")
            if TorchVersion(metadata.version(name)) < least:
                wrong.append(f"{versions[-1]} is older than {least}")
        except metadata.PackageNotFoundError:
            wrong.append(f"{name} is missing")
    return (fail("versions", "; ".join(wrong), f"pip install -e {files.ROOT}") if wrong else
            ok("versions", ", ".join(versions)))


def required_versions() -> dict[str, str]:
    """Dependencies of pyproject.toml: name -> lowest version, "0" where any will do."""
    block = (files.ROOT / "pyproject.toml").read_text().partition("\ndependencies = [")[2].partition("]")[0]
    return {name: least or "0" for name, least in re.findall(r'"([\w-]+)(?:>=([\d.]+))?"', block)}


def device_findings() -> Iterator[Finding]:
    """Every visible GPU (UUID, free memory, whether a kernel runs on it), or why there is none; then gloo and NCCL."""
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        try:
            device = torch.cuda.get_device_properties(index)
            free, total = (num_bytes / GIB for num_bytes in torch.cuda.mem_get_info(index))
            assert torch.ones(8, device=f"cuda:{index}").sum().item() == 8
            text = f"{device.name}, GPU-{device.uuid}, {free:.1f} of {total:.1f} GiB free"
            yield warn_if(free < total / 2, f"gpu {index}", text, "another process holds its memory: see nvidia-smi")
        except (RuntimeError, AssertionError) as error:
            yield fail(f"gpu {index}", f"no kernel runs on it ({str(error).splitlines()[0][:100]})",
                       "install a torch build for this GPU and driver, or hide it with CUDA_VISIBLE_DEVICES")
    are_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if not torch.cuda.is_available() and Path("/dev/nvidiactl").exists() and not are_hidden:
        yield fail("devices", f"an NVIDIA driver is loaded, but torch {torch.__version__} finds no CUDA device",
                   "update the driver, or install the torch build for it; see CUDA_VISIBLE_DEVICES too")
    elif not torch.cuda.is_available():
        why = "CUDA_VISIBLE_DEVICES hides all GPUs" if are_hidden else "no GPU"
        yield ok("devices", f"{processor()}; {why}, training runs on the CPU")
    if not dist.is_gloo_available():
        yield fail("backends", "this torch build has no gloo", "install torch from pytorch.org; one process works")
    elif torch.cuda.is_available() and not dist.is_nccl_available():
        yield warn("backends", "gloo; no NCCL in this torch build", "install a CUDA build of torch for --backend nccl")
    else:
        nccl = f", NCCL {'.'.join(map(str, cuda_nccl.version()))}" if torch.cuda.is_available() else ""
        yield ok("backends", f"gloo{nccl}")


def cores_finding(launch: launcher.Launch) -> Finding:
    """Whether the threads of this node's ranks fit onto the cores that they may use."""
    cores, threads, ranks = launcher.usable_cores(), launcher.choose_threads(launch), launch.local_world_size
    text = f"{cores} of {os.cpu_count()} usable; {ranks} rank{'s' * (ranks > 1)} here x {threads} threads"
    return warn_if(ranks * threads > cores, "cores", text, f"set OMP_NUM_THREADS={launcher.threads_per_rank(ranks)}, "
                   f"start fewer ranks, or ask the scheduler for more cores (--cpus-per-task)")


def shared_memory_finding(*, batch_bytes: int, workers: int) -> Finding:
    """Whether this node's loader workers have room in /dev/shm for the batches that they hand over."""
    free_bytes, needed_bytes = free_shared_memory(), batch_bytes * workers * BATCHES_PER_WORKER
    if free_bytes is None:
        return ok("/dev/shm", "this system has none and does not need it")
    text = (f"{free_bytes / GIB:.1f} GiB free; {workers} workers x {BATCHES_PER_WORKER} batches of "
            f"{batch_bytes / 2**20:.1f} MiB need {needed_bytes / GIB:.1f}")
    return warn_if(free_bytes < needed_bytes, "/dev/shm", text,
                   "docker run --shm-size=8g (or --ipc=host), or fewer --workers; else they use pipes, which is slower")


def output_finding(output_dir: Path) -> Finding:
    """Free space where the runs are kept, and whether a file can be replaced and synced there; leaves nothing."""
    folder = next(folder for folder in (output_dir.absolute(), *output_dir.absolute().parents) if folder.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as scratch:
            start = time.perf_counter()
            files.replace_file(Path(scratch, "file"), b"new", durable=True)
            seconds = time.perf_counter() - start
        free_bytes = shutil.disk_usage(folder).free
    except OSError as error:
        return fail("--output-dir", f"{output_dir}: cannot be written ({error.strerror})",
                    "choose a folder that can, with space left")
    return warn_if(free_bytes < 5 * GIB, "--output-dir",  # room for some ResNet checkpoints with optimizer state
                   f"{output_dir}: {free_bytes / GIB:.1f} GiB free, rename and fsync work ({seconds * 1000:.1f} ms)",
                   "free some space, or lower --keep-checkpoints")
