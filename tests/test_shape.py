"""The tree keeps its measure: small files, functions and constructors, shallow folders, and mains to say aloud."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT

FILES = sorted(path for package in ("launch", "datasets", "trainers") for path in (ROOT / package).rglob("*.py"))
ENGINE = ROOT / "trainers" / "engine"
MOST = {"lines of a file": 300, "lines of a function": 45, "arguments": 8, "lines of main": 12,
        "files of the engine": 21, "files of a wing": 6}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function and method of a file, with its place."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{name_of(path)}:{node.lineno} {node.name}", node


def lines_of(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def num_arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Without `self`; a `*` or `**` counts as one."""
    taken = function.args
    return len([*taken.posonlyargs, *taken.args, *taken.kwonlyargs, *filter(None, [taken.vararg, taken.kwarg])]) - 1


def main_of(path: Path) -> ast.FunctionDef:
    return next(node for node in ast.parse(path.read_text()).body
                if isinstance(node, ast.FunctionDef) and node.name == "main")


def trainer_scripts() -> list[Path]:
    """What trains: the scripts that open a run."""
    found = [path for path in (ROOT / "trainers").glob("*.py") if "import" in path.read_text()
             and "open_run" in path.read_text()]
    assert len(found) >= 5
    return sorted(found)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MOST["lines of a file"]


def test_a_function_fits_on_a_screen() -> None:
    assert [place for path in FILES for place, function in functions(path)
            if lines_of(function) > MOST["lines of a function"]] == []


def test_a_constructor_takes_a_handful_of_things() -> None:
    """Dataclasses have no constructor of their own, and so are not counted."""
    assert [f"{place}: {num_arguments(function)}" for path in FILES for place, function in functions(path)
            if function.name == "__init__" and num_arguments(function) > MOST["arguments"]] == []


def test_the_main_of_a_trainer_can_be_said_aloud() -> None:
    long = {name_of(path): lines_of(main_of(path)) - 1 for path in trainer_scripts()}  # without its `def`
    assert {name: number for name, number in long.items() if number > MOST["lines of main"]} == {}


def test_the_engine_and_its_wings_hold_few_files() -> None:
    def number(folder: Path) -> int:
        return len([path for path in folder.glob("*.py") if path.name != "__init__.py"])

    assert number(ENGINE) <= MOST["files of the engine"]
    wings = [path for path in ENGINE.iterdir() if (path / "__init__.py").exists()]
    assert {path.name for path in wings} >= {"checkpoints", "run"}
    assert {path.name: number(path) for path in wings if number(path) > MOST["files of a wing"]} == {}


def test_every_file_that_is_run_by_path_puts_our_root_first() -> None:
    for path in FILES:
        tree = ast.parse(path.read_text())
        tests = [ast.unparse(node.test) for node in tree.body if isinstance(node, ast.If)]
        if "__name__ == '__main__'" in tests:
            heads = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test)
                     == "not __package__"]
            assert len(heads) == 1, name_of(path)
            assert ast.unparse(heads[0].body[0]).startswith("sys.path[0] = str(Path(__file__).resolve().parent")
            first = next(node for node in tree.body if isinstance(node, ast.ImportFrom)
                         and (node.module or "").split(".")[0] in ("launch", "datasets", "trainers"))
            assert heads[0].lineno < first.lineno


def test_helpers_of_tests_lie_in_their_folder() -> None:
    here = ROOT / "tests"
    assert {path.name for path in here.glob("*.py") if not path.name.startswith("test_")} == {
        "__init__.py", "conftest.py"}
