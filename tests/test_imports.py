"""The tree keeps its shape: imports point downwards only, and each thing has one owner."""

import ast
import re
import sys
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT, environment, execute

OURS = ("launch", "datasets", "trainers")
FILES = sorted(path for package in OURS for path in (ROOT / package).rglob("*.py"))
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_object", "broadcast", "broadcast_object_list", "barrier",
               "reduce", "gather", "scatter", "reduce_scatter", "all_to_all", "gather_object")
MAY_COMMUNICATE = ("launch/process_group.py", "launch/stop.py", "trainers/engine/metrics.py")
WINGS = ("trainers/engine/checkpoints/", "trainers/engine/run/", "trainers/engine/trackers/")
LOOP = ("trainers.engine.trainer", "trainers.engine.session", "trainers.engine.step")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports: those under TYPE_CHECKING and inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def forbidden_for(name: str) -> tuple[str, ...]:
    """What a file of this name must not import."""
    if name.startswith("launch/"):
        return ("datasets", "trainers", "tests")
    if name == "datasets/pack.py":  # a command
        return ("trainers", "tests")
    if name.startswith("datasets/"):
        return ("launch", "trainers", "tests")
    if name.startswith(WINGS):
        return ("datasets", "trainers.models", "tests", *workloads(), *LOOP)
    if name.startswith("trainers/engine/"):
        return ("datasets", "trainers.models", "tests", *workloads())
    return ("tests",)


def workloads() -> tuple[str, ...]:
    return tuple(f"trainers.{path.stem}" for path in (ROOT / "trainers").glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_point_downwards_only(path: Path) -> None:
    names = imported(path)
    forbidden = forbidden_for(relative(path))
    found = {name for name in names if any(name == bad or name.startswith(bad + ".") for bad in forbidden)}
    assert not found


def test_no_files_import_each_other_in_a_circle() -> None:
    modules = {relative(path)[:-3].replace("/", ".").removesuffix(".__init__"): path for path in FILES}
    graph = {name: imported(path) & modules.keys() - {name} for name, path in modules.items()}

    def reachable(start: str) -> set[str]:
        found, waiting = set(), [start]
        while waiting:
            new = graph[waiting.pop()] - found
            found |= new
            waiting += new
        return found

    assert {name for name in graph if name in reachable(name)} == set()


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_the_environment_is_read_in_launch_only(path: Path) -> None:
    if relative(path).startswith("launch/"):
        return
    uses = [node for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv")]
    assert not uses


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_collectives_are_called_by_their_owners_only(path: Path) -> None:
    if relative(path) in MAY_COMMUNICATE:
        return
    calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not [call for call in calls
                if call.rpartition(".")[2] in COLLECTIVES and call.split(".")[0] in ("dist", "torch")]


def test_the_tree_in_contributing_names_every_file_and_no_other() -> None:
    tree = (ROOT / "CONTRIBUTING.md").read_text().partition("## The tree")[2].partition("\n## ")[0]
    words = {word.removesuffix(".py") for word in re.findall(r"[\w.]+", tree)}
    names = {path.stem for path in FILES if path.name != "__init__.py"}
    assert not names - words
    files = {word for line in tree.splitlines() for word in re.findall(r"\w+\.py\b", line)}
    assert files <= {path.name for path in FILES}


def test_no_file_shadows_the_standard_library() -> None:
    assert not [relative(path) for path in FILES if path.stem in sys.stdlib_module_names]


def test_a_trainer_run_by_path_ignores_other_packages_of_our_names(tmp_path: Path) -> None:
    for name in ("datasets", "launch", "trainers"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('the wrong package')\n")
    done = execute([sys.executable, str(ROOT / "trainers" / "cifar.py"), "--help"], cwd=tmp_path,
                   PYTHONPATH=str(tmp_path), timeout=60)
    assert done.code == 0, done.err
    assert "--batch-size" in done.out


def test_a_trainer_runs_as_a_module_too() -> None:
    done = execute([sys.executable, "-m", "trainers.cifar", "--help"], cwd=ROOT, timeout=60)
    assert done.code == 0, done.err
    assert "--batch-size" in done.out


def test_the_test_environment_drops_launcher_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert not {"RANK", "SLURM_JOB_ID"} & set(environment())
