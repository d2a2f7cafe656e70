"""How our own commands start torchrun: quietly, with the threads and the signals that the ranks expect."""

import json
import re
import sys
from pathlib import Path

import pytest

from launch.bench.runs import command, parse_setup
from launch.bench.runs import environment as benchmark_environment
from launch.bench.runs import execute as run_benchmarked
from launch.checks.job import signals_finding
from launch.launcher import threads_per_rank
from launch.stop import signals_flag
from tests.helpers.processes import PROGRAMS, ROOT, Ended, execute

BOX = "Setting OMP_NUM_THREADS environment variable"  # of torchrun, where the variable is not set
DOCTOR = [str(ROOT / "launch" / "doctor.py"), "--json", "--device", "cpu", "--output-dir"]


def threads(doctor: Ended) -> list[int]:
    return [rank["threads"] for rank in json.loads(doctor.out)["ranks"]]


@pytest.mark.timeout(120)
def test_the_quickstart_starts_without_torchruns_box_and_with_all_cores(tmp_path: Path) -> None:
    done = execute([str(ROOT / "launch" / "quickstart"), "--recipe", "blitz", "--max-steps", "1", "--no-pictures",
                    "--output-dir", str(tmp_path)], timeout=100)
    assert done.code == 0, done.err
    assert BOX not in done.err
    assert f"world      2 x cpu, {threads_per_rank(2)} threads each" in done.out


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_benchmarked_command_starts_without_torchruns_box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    setup = parse_setup("cpu:2")
    words = command(setup, "cifar", ["--help"])
    error, printed = run_benchmarked(words, benchmark_environment(setup), 100)
    assert error is None
    assert "--batch-size" in printed
    assert BOX not in printed


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_node_starts_without_torchruns_box_and_its_ranks_take_as_many_threads_as_under_torchrun(
        tmp_path: Path) -> None:
    ranks = ["--nproc-per-node", "2", *DOCTOR, str(tmp_path)]
    ours = execute([sys.executable, str(ROOT / "launch" / "node.py"), "--nodes", "1", "--rendezvous", "localhost:1",
                    "--id", "1", "--", *ranks], timeout=80)
    plain = execute([sys.executable, "-m", "torch.distributed.run", "--standalone", *ranks], timeout=80)
    assert BOX in plain.err
    assert BOX not in ours.err
    assert threads(ours) == threads(plain) == [threads_per_rank(2)] * 2


def test_the_readme_names_the_signals_that_a_rank_stops_at() -> None:
    named = re.findall(r"--signals-to-handle[ =](\S+?)`", (ROOT / "docs" / "reference.md").read_text())
    assert named
    assert {f"--signals-to-handle={signals}" for signals in named} == {signals_flag()}
    commands = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("    torchrun ")]
    assert [line for line in commands if "--signals-to-handle=$signals" not in line] == []
    assert set(re.findall(r"^    signals=(\S+)", (ROOT / "README.md").read_text(), re.MULTILINE)) == set(named)


@pytest.mark.parametrize(("passed_on", "lost"), [(None, []), (signals_flag().partition("=")[2], []),
                                                 ("SIGTERM,SIGINT,SIGHUP,SIGQUIT", ["SIGUSR1", "SIGUSR2", "SIGXCPU"])])
def test_the_doctor_names_the_signals_that_torchrun_would_not_pass_on(
        monkeypatch: pytest.MonkeyPatch, passed_on: str | None, lost: list[str]) -> None:
    monkeypatch.delenv("TORCHELASTIC_SIGNALS_TO_HANDLE", raising=False)
    if passed_on is not None:
        monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", passed_on)
    found = signals_finding()
    assert found.state == ("WARN" if lost else "OK")
    assert re.findall(r"SIG\w+", found.text.partition("die of")[2]) == lost
    assert not lost or found.fix == f"start torchrun with {signals_flag()}"


def test_in_a_notebook_a_script_prints_into_its_cell_and_leaves_the_notebook_as_it_was() -> None:
    """IPython's %run: the cell's stdout has the number of the notebook server's own."""
    program = """
import io, os, signal, sys
class Cell(io.StringIO):
    encoding, errors, fileno = "utf-8", None, lambda self: 1
sys.ps1, sys.stdout, server = ">>> ", Cell(), sys.stdout
from launch.stop import begin_script
begin_script()
from dataclasses import dataclass
from launch.command_line import run
@dataclass
class Config:
    "None."
try:
    run(lambda config: print("trained"), Config)
except SystemExit as ended:
    print("after", ended.code)
server.write(repr((sys.stdout.getvalue(), signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)))
"""
    done = execute([sys.executable, "-c", program], cwd=ROOT)
    assert done.out == repr(("trained\nafter 0\n", True)), done.err


@pytest.mark.parametrize("module", ["launch.errors", "launch.launcher", "launch.stop"])
def test_what_must_start_fast_imports_neither_torch_nor_tyro(module: str) -> None:
    done = execute([sys.executable, str(PROGRAMS / "slow_imports.py"), module])
    assert done.out.strip() == "set()", done.err


def test_a_script_collects_no_garbage_while_it_imports_and_does_once_it_runs() -> None:
    """Collecting finds nothing in what imports make, and takes a third of their time."""
    program = """
import gc
from launch.stop import begin_script
begin_script()
print(gc.isenabled())
from dataclasses import dataclass
from launch.command_line import run
@dataclass
class Config:
    "None."
run(lambda config: print(gc.isenabled(), gc.get_freeze_count() > 1000), Config)
"""
    assert execute([sys.executable, "-c", program], cwd=ROOT).out.split() == ["False", "True", "True"]
