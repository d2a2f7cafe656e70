"""The table of faults in README.md and the tests of faults agree: each names the other."""

import ast
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FILES = sorted(HERE.glob("test_faults_*.py"))
ROW = re.compile(r"^\|(?P<fault>[^|]+)\|(?P<seen>[^|]+)\|(?P<code>[^|]+)\|(?P<state>[^|]+)\| `(?P<test>[^`]+)` \|$")


def rows() -> dict[str, re.Match[str]]:
    """Every row of the table by the test it names."""
    lines = [line for line in (HERE / "README.md").read_text().splitlines() if "| `test_" in line]
    matches = [ROW.match(line) for line in lines]
    assert all(matches), [line for line, match in zip(lines, matches, strict=True) if not match]
    return {match["test"]: match for match in matches if match}


def rehearsed() -> dict[str, list[str]]:
    """Every fault of every list, with its exit codes, and every test that is not driven by a list."""
    found: dict[str, list[str]] = {}
    for path in FILES:
        tree = ast.parse(path.read_text())
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                if "fault" not in [argument.arg for argument in node.args.args]:
                    found[f"{path.name}::{node.name}"] = []
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.List):
                for call in node.value.elts:
                    if isinstance(call, ast.Call) and ast.unparse(call.func) == "Fault":
                        arguments = arguments_of(call, tree)
                        codes = arguments.get("codes", (0,))
                        found[f"{path.name}::{arguments['name']}"] = [str(code) for code in codes]
    return found


def arguments_of(call: ast.Call, tree: ast.Module) -> dict[str, Any]:
    """The literal arguments of a call, those of a `**NAME` of the same file too."""
    arguments: dict[str, Any] = {}
    for word in call.keywords:
        if word.arg is None:
            shared = next(node.value for node in tree.body if isinstance(node, ast.Assign)
                          and ast.unparse(node.targets[0]) == ast.unparse(word.value))
            arguments |= ast.literal_eval(shared)
        elif isinstance(word.value, ast.Constant | ast.Tuple) and word.arg in ("name", "codes"):
            arguments[word.arg] = ast.literal_eval(word.value)
    return arguments


def test_every_fault_of_the_tests_is_in_the_table_and_every_test_of_the_table_exists() -> None:
    assert rows().keys() == rehearsed().keys()


def test_the_table_has_the_exit_codes_that_the_tests_check() -> None:
    codes = {name: row["code"].split() for name, row in rows().items()}
    assert {name: codes[name] for name, expected in rehearsed().items() if expected} == \
        {name: expected for name, expected in rehearsed().items() if expected}


def test_at_least_forty_faults_are_rehearsed() -> None:
    assert len(rows()) >= 40
