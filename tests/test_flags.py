"""Old spellings of flags and of saved configs, and --help in groups."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.command_line import parse
from trainers import cifar, custom, fashion_mnist, image_folder, mnist, regression
from trainers.engine.run.folder import RunFolder

CONFIGS = [cifar.CifarConfig, mnist.MnistConfig, fashion_mnist.FashionMnistConfig, image_folder.ImageFolderConfig,
           regression.RegressionConfig, custom.CustomConfig]
TITLES = ["Data", "Model", "Optimization", "Distribution", "Saving and resuming", "Reporting"]


@pytest.mark.parametrize(("module", "config_class", "words", "normalize"), [
    (mnist, mnist.MnistConfig, "--normalize --epochs 1", "dataset"),
    (mnist, mnist.MnistConfig, "--epochs 1 --normalize", "dataset"),
    (mnist, mnist.MnistConfig, "--recipe fast --no-normalize", "none"),
    (mnist, mnist.MnistConfig, "--normalize half", "half"),
    (cifar, cifar.CifarConfig, "--half_statistics", "half"),
    (cifar, cifar.CifarConfig, "--recipe blitz", "half"),
    (cifar, cifar.CifarConfig, "--recipe blitz --no-half-statistics", "dataset"),
    (image_folder, image_folder.ImageFolderConfig, "", "imagenet"),
])
def test_old_spellings_of_normalize_mean_what_they_meant(module, config_class, words, normalize) -> None:
    assert parse(config_class, recipes=module.RECIPES, args=words.split()).normalize == normalize


@pytest.mark.parametrize(("module", "config_class", "own"), [
    (cifar, cifar.CifarConfig, {"width": 64, "freeze": ("whitening",)}),
    (mnist, mnist.MnistConfig, {"channels": (16, 32), "hidden": 64, "dropout": 0.0}),
])
def test_a_recipe_sets_its_own_model_and_not_another_that_is_asked_for(tmp_path: Path, module, config_class, own
                                                                       ) -> None:
    def parsed(*words: str) -> Any:
        return parse(config_class, recipes=module.RECIPES, args=["--recipe", "fast", *words])

    def values(config: Any) -> dict[str, Any]:
        return {name: getattr(config, name) for name in own}

    file = tmp_path / "flags.yaml"
    file.write_text("model: lenet")
    nothing, plain = values(config_class()), parsed()
    assert values(plain) == values(parsed("--model", plain.model)) == own
    assert values(parsed("--model", "lenet")) == values(parsed("--config", str(file))) == nothing
    assert parsed("--model=lenet", "--freeze", "fc").freeze == ("fc",)
    assert parsed("--model", "lenet").batch_size == plain.batch_size  # what is not the model's stays


@pytest.mark.parametrize(("config_class", "saved", "now"), [
    (mnist.MnistConfig, {"normalize": True}, "dataset"), (mnist.MnistConfig, {"normalize": False}, "none"),
    (cifar.CifarConfig, {"half_statistics": True}, "half"), (cifar.CifarConfig, {"half_statistics": False}, "dataset"),
])
def test_a_run_folder_from_before_is_resumed_and_predicted_from(tmp_path: Path, config_class, saved, now) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-00000001.json").write_text("{}")
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert parse(config_class, args=["--config", str(tmp_path / "config.json")]).normalize == now
    folder = RunFolder(tmp_path, is_main=True)
    folder.claim()
    try:
        other = "half" if now == "none" else "none"
        with pytest.raises(Exception, match=rf"--normalize {other} \(was {now}\)"):
            folder.begin({"normalize": other}, world={})
        assert folder.begin({"normalize": now}, world={})
    finally:
        folder.release()


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("config_class", CONFIGS)
def test_help_is_in_groups_with_the_trainers_own_flags_first_and_two_examples(
    config_class, columns: int, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "argv", ["trainers/x.py"])
    with pytest.raises(SystemExit):
        parse(config_class, args=["--help"])
    text = capsys.readouterr().out
    assert re.findall(r"^(\w[\w ./]*):$", text, re.MULTILINE) == ["trainers/x.py", *TITLES, "Examples"]
    assert max(map(len, text.splitlines())) <= columns
    assert len(re.findall(r"^  (?:python|torchrun) ", text, re.MULTILINE)) == 2
    assert text.index("--dataset") < text.index("\nData:") < text.index("--batch-size") < text.index("\nModel:")
    assert text.count("\x1b") == 0
