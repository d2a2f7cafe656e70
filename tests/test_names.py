"""Names of files and classes that hold newlines, escape codes or bytes that are no text: what is printed stays ours."""

import io
import os
import sys
from pathlib import Path

import pytest

from launch.command_line import parse
from launch.errors import UsageError, printable, say, to_stderr, user_line
from tests.helpers.images import write_tree
from tests.helpers.server import run
from trainers.engine.predictions import Prediction, as_lines
from trainers.image_folder import ImageFolderConfig
from trainers.predict import PredictConfig

FORGED = "x\nERROR data: forged; send money\x1b[2K\x1b[1A\r\u202e"
FLAGS = ["--batch-size", "12", "--epochs", "1", "--threads", "1", "--no-pictures", "--run-name", "r"]


def is_clean(text: str) -> bool:
    """Whether a text has no control characters but ends of lines, and no line that claims to be an error."""
    return not any(ord(letter) < 32 or 0x7F <= ord(letter) < 0xA0 or letter == "\u202e" for letter in text
                   if letter != "\n") and not any(line.lower().startswith("error") for line in text.splitlines())


def test_control_characters_become_escapes_and_other_letters_stay_as_they_are():
    assert printable("a\x1b[31m\n\t\x9b\u2028\udce9b") == r"a\x1b[31m\n\t\x9b\u2028\udce9b"
    assert printable("a\nb", keep="\n") == "a\nb"
    for name in ("katze", "caf\u00e9", "\u732b", "\U0001f408", "back\\slash", "two  spaces", "\u0645\u0644\u0641"):
        assert printable(name) == name


def test_no_way_to_a_terminal_lets_a_name_forge_a_line(capsys: pytest.CaptureFixture[str]):
    to_stderr(f"WARNING data: {FORGED}: skipped")
    line = user_line(UsageError(f"--x {FORGED}: no"))
    assert line is not None
    to_stderr(line)
    say(f"run        {FORGED[2:]}")
    err = capsys.readouterr().err
    assert err.count("\n") == 2
    assert is_clean(err.replace("ERROR usage: --x", "", 1))
    text = as_lines([Prediction(image=FORGED, probabilities={FORGED: 0.6, "b": 0.4}, true_class=FORGED)], top=2)
    assert len(text.splitlines()) == 2  # one image, and the accuracy
    assert is_clean(text)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_run_on_files_and_classes_of_such_names_prints_them_escaped(tmp_path: Path):
    tree = write_tree(tmp_path / "images")
    for split in ("train", "test"):
        (tree / split / "disc").rename(tree / split / FORGED)
        os.rename(os.fsencode(tree / split / "ring"), os.fsencode(tree / split) + b"/caf\xe9")
    (tree / "train" / FORGED / f"{FORGED}.png").write_bytes(b"no image")
    (tree / "train" / FORGED / f"y.{FORGED}").write_bytes(b"no image")
    ended = run("image_folder", "--data-dir", tree, "--output-dir", tmp_path, *FLAGS, "--skip-bad", "1", ranks=2,
                folder=tmp_path / "job")
    assert ended.codes == [0, 0], ended.err
    assert is_clean(ended.out)
    assert is_clean(ended.err)
    assert r"x\nERROR data: forged" in ended.out
    refused = run("image_folder", "--data-dir", tree, "--output-dir", tmp_path / "other", *FLAGS, "--workers", "1",
                  folder=tmp_path / "job2", timeout=100)
    assert refused.code == 3
    assert len(refused.errors) == 1
    assert is_clean(refused.err.replace("ERROR", "", 1))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-16", "shift_jis", "utf-8"])
def test_every_print_shows_an_escape_for_what_its_encoding_lacks(encoding: str, monkeypatch: pytest.MonkeyPatch):
    for name, show in (("stdout", say), ("stderr", to_stderr)):
        written = io.BytesIO()
        monkeypatch.setattr(sys, name, io.TextIOWrapper(written, encoding=encoding, errors="strict"))
        show("accuracy of \u732b and \U0001f408: \u00e9")
        text = written.getvalue().decode(encoding)
        assert text.startswith("accuracy of ")
        assert r"\U0001f408" in text or encoding in ("utf-8", "utf-16")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    monkeypatch.setattr(sys, "argv", ["trainers/x.py"])
    with pytest.raises(SystemExit):
        parse(ImageFolderConfig, args=["--help"])
    assert "--batch-size" in written.getvalue().decode(encoding, "replace")


def test_a_tilde_that_the_shell_left_is_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = parse(ImageFolderConfig, args=["--data-dir=~/.cache/photos", "--cache-dir", "~", "--output-dir=a~b"])
    assert (config.data_dir, config.cache_dir) == (tmp_path / ".cache" / "photos", tmp_path)
    assert config.output_dir == Path("a~b")
    assert parse(PredictConfig, args=["~/a.png", "~nobody-of-that-name/b"]).images == (
        tmp_path / "a.png", Path("~nobody-of-that-name/b"))
