"""One page about this machine and job: what would run, what would not, and the fix. Exit code 5 if anything is FAIL.

    python launch/doctor.py
    torchrun --nproc-per-node 2 launch/doctor.py          also: the ranks, their devices, one timed all_reduce"""

import importlib.util
import json
import socket
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    missing = [name for name in ("torch", "tyro") if importlib.util.find_spec(name) is None]
    if missing:  # nothing below could be imported
        sys.exit(f"FAIL  versions: {sys.executable} has no {', '.join(missing)}; fix: pip install -e {sys.path[0]}")

from launch import command_line, launcher
from launch.checks.finding import Finding, fail
from launch.checks.job import job_findings
from launch.checks.machine import machine_findings
from launch.checks.ranks import ranks_findings
from launch.errors import MOST_SECONDS, Above, AtLeast, DeviceError, UsageError, say


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Check this machine and, under torchrun or srun, the ranks of the job. Trains nothing."""
    output_dir: str = "runs"
    """Folder in which runs are to be kept: its space, and whether files can be replaced and synced there."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """The --device that training would be given."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """The --backend that training would be given."""
    batch_size: Annotated[int, AtLeast(1)] = 256
    """The --batch-size that image_folder.py would be given, for the room in /dev/shm."""
    image_size: Annotated[int, AtLeast(1, most=8192)] = 224
    """And its --image-size."""
    workers: Annotated[int, AtLeast(0)] = 2
    """And its --workers, on every rank."""
    timeout: Annotated[float, Above(0, most=MOST_SECONDS)] = 60
    """Seconds to wait for the other ranks."""
    json: bool = False
    """Print one JSON object instead: ok, host, findings (check, state, text, fix, host), ranks."""


def main(config: DoctorConfig) -> int:
    """Find out, print on rank 0, and return the exit code (the same on every rank)."""
    try:
        launch = launcher.read_launch()
        job = job_findings(launch)
    except UsageError as error:
        launch, job = launcher.Launch(), [fail("launcher", str(error), launcher.START_WITH)]
    batch_bytes = -(-config.batch_size // launch.world_size) * 3 * config.image_size**2
    findings = machine_findings(launch, Path(config.output_dir), workers=config.workers, batch_bytes=batch_bytes) + job
    ranks: list[dict[str, Any]] = []
    if launch.launcher != "none":
        findings, ranks = ranks_findings(launch, findings, device=config.device, backend=config.backend,
                                         timeout_seconds=config.timeout)
    failed = any(finding.state == "FAIL" for finding in findings)
    if launch.rank == 0:
        say(json.dumps({"ok": not failed, "host": socket.gethostname(), "ranks": ranks,
                        "findings": list(map(asdict, findings))}, indent=2) if config.json else page(findings, ranks))
    return DeviceError.exit_code if failed else 0


def page(findings: list[Finding], ranks: list[dict[str, Any]]) -> str:
    """The findings as lines, each fix under its finding, then where each rank runs and on what, and a summary."""
    lines = [f"doctor on {socket.gethostname()}", ""]
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        host = f"[{finding.host}] " if finding.host else ""
        lines.append(f"  {finding.state:4}  {finding.check:{width}}  {host}{finding.text}")
        if finding.fix:
            lines.append(f"  {'':4}  {'':{width}}  fix: {finding.fix}")
    if ranks:
        width = max(len(record["host"]) for record in ranks)
        lines += ["", f"  {'rank':>4}  {'local':>5}  {'host':{width}}  {'device':8}  {'threads':>7}  uuid"]
        lines += [f"  {record['rank']:4}  {record['local_rank']:5}  {record['host']:{width}}  "
                  f"{record['device'] or 'none':8}  {record['threads']:7}  {record['uuid'] or ''}".rstrip()
                  for record in ranks]
    warned, failed = (sum(finding.state == state for finding in findings) for state in ("WARN", "FAIL"))
    return "\n".join([*lines, "", f"{failed} FAIL, {warned} WARN: training would not work as it is" if failed else
                      f"{warned} WARN: training works" if warned else "all OK"])


if __name__ == "__main__":
    command_line.run(main, DoctorConfig)
