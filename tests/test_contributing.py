"""CONTRIBUTING.md says what is so: every file and function it names exists, and what it teaches to add trains."""

import ast
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT, execute, metrics, read_json

TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def section(title: str) -> str:
    assert f"\n## {title}\n" in TEXT
    return TEXT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def defined(path: Path) -> set[str]:
    """The functions, classes and methods of a file."""
    return {node.name for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_what_a_batch_goes_through_names_files_and_functions_that_exist() -> None:
    steps = re.split(r"^\d\. ", section("What a batch goes through"), flags=re.MULTILINE)[1:]
    assert len(steps) == 5
    for step in steps:
        quoted = re.findall(r"`([^`]+)`", step)
        files = [ROOT / word for word in quoted if word.endswith(".py")]
        assert files, step
        names = {word for word in quoted if word.isidentifier()}
        assert names or len(files) > 1, step
        assert names <= set().union(*map(defined, files)), step


def blocks() -> list[str]:
    """The pieces of Python in the text about what can be added: a purpose, a data set, a model, a trainer."""
    return re.findall(r"```python\n(.*?)```", section("How to add a data set, a model, a trainer"), flags=re.DOTALL)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of our packages to which the four pieces have been added as the text says."""
    folder = tmp_path_factory.mktemp("tree")
    for package in ("launch", "datasets", "trainers"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    purpose, data_set, model, trainer = blocks()
    keyed_random = folder / "datasets" / "keyed_random.py"
    before, definition, after = keyed_random.read_text().partition("\n\n\ndef signed(")
    keyed_random.write_text(f"{before}\n{purpose}{definition}{after}")
    (folder / "datasets" / "stripes.py").write_text(data_set)
    with open(folder / "trainers" / "models.py", "a") as file:
        file.write(f"\n\n{model}")
    (folder / "trainers" / "stripes.py").write_text(trainer)
    return folder


@pytest.mark.timeout(120)
def test_a_data_set_a_model_and_a_trainer_added_by_this_text_train(tree: Path, tmp_path: Path) -> None:
    done = execute([sys.executable, str(tree / "trainers" / "stripes.py"), "--threads", "1", "--no-pictures",
                    "--output-dir", str(tmp_path), "--run-name", "run"], cwd=tmp_path)
    assert done.code == 0, done.err
    assert read_json(tmp_path / "run" / "status.json")["state"] == "DONE"
    assert read_json(tmp_path / "run" / "result.json")["accuracy"] > 0.95
    assert metrics(tmp_path / "run", "split", "step")[-1] == ("test", 40)
