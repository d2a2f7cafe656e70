"""What launch/doctor.py finds out when it is started as the job would be: do the ranks reach and agree with each other?
All collectives but one run over gloo: where GPUs are handed out wrongly, NCCL would hang, and the page not come."""

import hashlib
import os
import socket
import time
from dataclasses import replace
from typing import Any

import torch

from launch import files, launcher, machine
from launch.checks.finding import Finding, fail, ok, warn, warn_if
from launch.errors import DeviceError, DistributedError, user_line
from launch.process_group import World, barrier, gather, process_group, time_all_reduce

BUCKET_BYTES = 25 * 2**20  # what DistributedDataParallel sends at once by default (bucket_cap_mb)
SLOW_BYTES_PER_SECOND = 50e6  # a ResNet-18's gradients, 45 MB, would take a second per step


def ranks_findings(launch: launcher.Launch, mine: list[Finding], *, device: str, backend: str, timeout_seconds: float
                   ) -> tuple[list[Finding], list[dict[str, Any]]]:
    """Findings of all machines (`mine`: of this rank's), then about the ranks together; and one record per rank."""
    try:
        with process_group("gloo", device="cpu", timeout_seconds=timeout_seconds) as world:
            ranks = gather(world, rank_record(launch, device))
            machines = gather(world, mine if launch.local_rank == 0 else [])
            devices = rank_devices_finding(ranks, backend)
            found = [devices, code_finding(ranks), clocks_finding(world, ranks),
                     all_reduce_finding(world, ranks, backend, devices)]
    except (DistributedError, RuntimeError) as error:
        where, _, fix = (user_line(error) or str(error)).removeprefix("ERROR distributed: ").partition("; ")
        return [*mine, fail("ranks", where, fix or "see that every node runs the same command")], []
    return [*gathered(machines, ranks), *found], ranks


def rank_record(launch: launcher.Launch, device: str) -> dict[str, Any]:
    """What the other ranks need to know about this one; `device` is None where it would get none."""
    record: dict[str, Any] = {
        "rank": launch.rank, "local_rank": launch.local_rank, "host": socket.gethostname(), "pid": os.getpid(),
        "threads": launcher.choose_threads(launch), "torch": torch.__version__, "code": code_hash(),
        "device": None, "uuid": None, "problem": None}
    try:
        chosen = machine.choose_device(device, launch)
    except DeviceError as error:
        return {**record, "problem": str(error)}
    uuid = f"GPU-{torch.cuda.get_device_properties(chosen).uuid}" if chosen.type == "cuda" else None
    return {**record, "device": str(chosen), "uuid": uuid}


def code_hash() -> str:
    """sha256 over this checkout's code and recipes: also tells apart what was edited and not committed."""
    digest = hashlib.sha256()
    found = [path for name in ("launch", "datasets", "trainers") for path in (files.ROOT / name).rglob("*")]
    for path in sorted(path for path in found if path.suffix in (".py", ".yaml")):
        digest.update(f"{path.relative_to(files.ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def gathered(machines: list[list[Finding]], ranks: list[dict[str, Any]]) -> list[Finding]:
    """Rank 0's machine in full; of the other nodes' only what is not OK, with the host's name."""
    others = zip(ranks[1:], machines[1:], strict=True)
    return [*machines[0], *(replace(finding, host=record["host"]) for record, findings in others
                            for finding in findings if finding.state != "OK")]


def rank_devices_finding(ranks: list[dict[str, Any]], backend: str) -> Finding:
    """Every rank has a device, and none has that of another."""
    for record in ranks:
        if record["problem"]:
            rule, _, fix = record["problem"].partition("; ")
            return fail("rank devices", f"rank {record['rank']} on {record['host']}: {rule}", fix)
    owners = ranks_by(ranks, "uuid").items()
    if shared := "; ".join(f"{names} share {uuid}" for (uuid,), names in owners if uuid and "," in names):
        fix = "start one rank per GPU: torchrun --nproc-per-node gpu, or srun --gpus-per-task=1"
        return warn("rank devices", shared, fix) if backend == "gloo" else fail(
            "rank devices", f"{shared}, which NCCL refuses", f"{fix}; or train with --backend gloo")
    hosts = {record["host"] for record in ranks}
    kinds = ", ".join(sorted({str(record["device"]).partition(":")[0] for record in ranks}))
    return ok("rank devices", f"{len(ranks)} ranks on {len(hosts)} host{'s' * (len(hosts) > 1)} ({kinds}), none shared")


def ranks_by(ranks: list[dict[str, Any]], *names: str) -> dict[tuple[Any, ...], str]:
    """The values of these fields -> `ranks 0, 2`, those whose records hold them."""
    found: dict[tuple[Any, ...], list[str]] = {}
    for record in ranks:
        found.setdefault(tuple(record[name] for name in names), []).append(str(record["rank"]))
    return {values: f"ranks {', '.join(numbers)}" for values, numbers in found.items()}


def code_finding(ranks: list[dict[str, Any]]) -> Finding:
    """The same files and the same torch on every rank."""
    versions = ranks_by(ranks, "code", "torch")
    if len(versions) > 1:
        text = "; ".join(f"{names}: code {code}, torch {version}" for (code, version), names in versions.items())
        return fail("code", text, "start every rank from one checkout and one environment")
    return ok("code", f"{ranks[0]['code']} on every rank")


def clocks_finding(world: World, ranks: list[dict[str, Any]]) -> Finding:
    """How far apart the hosts' clocks are at most: all are read as a barrier opens."""
    barrier(world)
    times = gather(world, time.time())
    spread = max(times) - min(times)
    bad = spread > 1 and len({record["host"] for record in ranks}) > 1  # people compare lines of different nodes
    return warn_if(bad, "clocks", f"at most {spread * 1000:.1f} ms apart",
                   "let every node keep its time by NTP (chronyc tracking)")


def all_reduce_finding(world: World, ranks: list[dict[str, Any]], backend: str, devices: Finding) -> Finding:
    """One timed all_reduce, of the size that DDP sends, over the backend that training would use."""
    if devices.state == "FAIL":
        return warn("all_reduce", "not tried: the ranks have no devices of their own", "see rank devices")
    mine = torch.device(ranks[world.rank]["device"])
    chosen = machine.choose_backend(backend, mine)
    if mine.type == "cuda":
        torch.cuda.set_device(mine)
    try:
        seconds = max(gather(world, time_all_reduce(world, num_bytes=BUCKET_BYTES, device=mine, backend=chosen)))
    except (DistributedError, RuntimeError) as error:
        return fail("all_reduce", f"{chosen}: {str(error).splitlines()[0][:160]}",
                    "set NCCL_DEBUG=INFO, or GLOO_SOCKET_IFNAME / NCCL_SOCKET_IFNAME to the right interface")
    rate = BUCKET_BYTES / seconds
    return warn_if(rate < SLOW_BYTES_PER_SECOND, "all_reduce",
                   f"{BUCKET_BYTES / 2**20:.0f} MiB over {chosen} in {seconds * 1000:.1f} ms, {rate / 1e9:.2f} GB/s",
                   "is this the fast network? set GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME")
