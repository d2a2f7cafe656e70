"""--config FILE: defaults < recipe < file < flags, from JSON as a run writes it and from YAML."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from launch.command_line import parse
from launch.errors import UsageError
from tests.helpers.hooks import small_data
from tests.helpers.processes import read_json
from tests.helpers.server import NORMED, run
from trainers import cifar, image_folder, mnist, regression
from trainers.engine.session import to_plain


def parsed(path: Path, content: str | dict[str, Any], *args: str, name: str = "flags.yaml", module: Any = cifar) -> Any:
    file = path / name
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    config_class = next(value for value in vars(module).values()
                        if isinstance(value, type) and value.__module__ == module.__name__ and hasattr(value, "TITLES"))
    return parse(config_class, recipes=getattr(module, "RECIPES", None), args=["--config", str(file), *args])


def test_flags_win_over_the_file_the_file_over_the_recipe_and_that_over_the_defaults(tmp_path: Path) -> None:
    config = parsed(tmp_path, "epochs: 3\nlr: 1e-2\nfreeze: [conv1, conv2]\n", "--epochs", "4")
    assert (config.epochs, config.learning_rate, config.freeze) == (4, 0.01, ("conv1", "conv2"))
    assert (config.recipe, config.momentum) == ("fast", 0.8)
    config = parsed(tmp_path, "recipe: blitz\nclip-grad-norm: null\nnesterov: yes\ndata_dir: ~/sets\n")
    assert (config.recipe, config.batch_size, config.nesterov, config.clip_grad_norm) == ("blitz", 4, True, None)
    assert config.data_dir == Path.home() / "sets"
    assert parsed(tmp_path, "recipe: blitz\nmomentum: 0.5", "--recipe", "fast").recipe == "fast"
    assert parsed(tmp_path, "recipe: blitz\nmomentum: 0.5", "--recipe", "fast").momentum == 0.5


@pytest.mark.parametrize("module", [cifar, mnist, image_folder, regression])
def test_every_flag_of_a_config_json_is_read_back_as_it_was(tmp_path: Path, module: Any) -> None:
    config = parsed(tmp_path, {}, name="empty.json", module=module)
    changed = replace(config, epochs=7, freeze=("a b", "c=*"), learning_rate=1e-7, class_weights=(1.0, 0.5),
                      max_steps=12, measure="1:2", data_dir=Path("with space"), run_name="mine", resume="never")
    saved = to_plain(changed)
    again = parsed(tmp_path, saved, name="config.json", module=module)
    different = {field.name for field in fields(config) if getattr(again, field.name) != getattr(changed, field.name)}
    assert different == {"config", "in_file", "run_name", "resume"}  # those are of one run
    assert (again.run_name, again.resume) == (None, "auto")


@pytest.mark.parametrize(("name", "text"), [
    ("windows.yaml", "\ufeffepochs: 7\r\nrun_name: grün\r\n"),
    ("windows.json", '\ufeff{"epochs": 7,\r\n"run_name": "grün"}')])
def test_files_of_a_windows_editor_are_read(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(text.encode())
    config = parse(cifar.CifarConfig, recipes=cifar.RECIPES, args=["--config", str(tmp_path / name)])
    assert (config.epochs, config.run_name) == (7, "grün")


def test_old_names_are_accepted_and_a_hand_written_file_may_name_the_run(tmp_path: Path) -> None:
    assert parsed(tmp_path, {"normalize": False}, name="old.json").normalize == "none"
    assert parsed(tmp_path, {"half_statistics": True}, name="old.json").normalize == "half"
    assert parsed(tmp_path, "run_name: mine").run_name == "mine"


@pytest.mark.parametrize(("content", "name", "wrong"), [
    ("learning_rat: 0.1", "flags.yaml", r"learning-rat.* did you mean --learning-rate\?"),
    ("epochs: ten", "flags.yaml", "--epochs"),
    ("epochs: 0", "flags.yaml", "--epochs 0: must be at least 1"),
    ("flip: sideways", "flags.yaml", "flip"),
    ("nesterov: 3", "flags.yaml", "nesterov"),
    ("batch_size: true", "flags.yaml", "batch-size"),
    ("epochs: [1, 2]", "flags.yaml", "2"),
    ("epochs: {of: 3}", "flags.yaml", "--epochs: must be one value or a list of values"),
    ("a: [", "flags.yaml", "is no YAML"), ("- 1", "flags.yaml", "must map names"),
    ("", "flags.yaml", "must map names"),
    ("1: 2", "flags.yaml", "must map names"), ("{", "flags.json", "is no JSON"),
    ("[" * 10**5, "deep.json", "is no JSON"),
    ("[" * 10**5, "deep.yaml", "is no YAML"), ("!!python/object/apply:os.getpid []", "evil.yaml", "is no YAML"),
    ("\x00", "flags.yml", "is no YAML"),
])
def test_what_is_no_flag_is_one_line_that_names_the_file(tmp_path: Path, content: str, name: str, wrong: str) -> None:
    with pytest.raises(UsageError, match=wrong) as error:
        parsed(tmp_path, content, name=name)
    assert str(error.value).startswith(f"--config {tmp_path / name}: ")
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_or_is_no_text_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    for name, wrong in [("none.yaml", "No such file"), (".", "directory"), ("bytes.json", "is no JSON")]:
        with pytest.raises(UsageError, match=wrong):
            parse(cifar.CifarConfig, args=["--config", str(tmp_path / name)])


@pytest.mark.timeout(120)
def test_the_config_of_a_run_repeats_it_to_the_bit(tmp_path: Path) -> None:
    first = run("cifar", *NORMED, "--clip-grad-norm", "1", "--output-dir", tmp_path / "first", ranks=2)
    second = run("cifar", "--config", tmp_path / "first" / "r" / "config.json", "--run-name", "again", "--output-dir",
                 tmp_path / "second", ranks=2, hook=small_data())
    assert (first.codes, second.codes) == ([0, 0], [0, 0]), second.err
    results = [read_json(tmp_path / name / "result.json") for name in ("first/r", "second/again")]
    assert results[0]["weights_sha256"] == results[1]["weights_sha256"]
