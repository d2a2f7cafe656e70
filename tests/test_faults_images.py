"""Images that cannot be read, and loader workers that are killed: the file or the worker is named."""

import os
import signal
from pathlib import Path

import pytest

from tests.helpers.comparing import run_in
from tests.helpers.faults import Fault, check, check_nothing_left
from tests.helpers.hooks import at, cut_short
from tests.helpers.images import NUM_TEST, NUM_TRAIN, image_tree, write_tree
from tests.helpers.processes import read_json
from tests.helpers.server import IMAGES, run, start

pytestmark = pytest.mark.timeout(120)


def spoil_an_image(folder: Path) -> Path:
    path = sorted((folder / "train").rglob("*.png"))[3]
    path.write_bytes(path.read_bytes()[:100])
    return path


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    path = spoil_an_image(image_tree(tmp_path / "images"))
    ended = run_in(tmp_path, "--data-dir", tmp_path / "images", trainer="image_folder", ranks=2)
    assert set(ended.codes) <= {3, 6}
    assert 3 in ended.codes
    check(ended, Fault(name="image", codes=tuple(ended.codes), ranks=2, error=f"ERROR data: .*{path.name}"))
    assert read_json(tmp_path / "r" / "status.json")["state"] == "FAILED"


def test_an_unreadable_image_is_left_out_and_logged_where_that_is_allowed(tmp_path: Path) -> None:
    path = spoil_an_image(image_tree(tmp_path / "images"))
    flags = ("--data-dir", tmp_path / "images", "--skip-bad", "1")
    ended = run_in(tmp_path, *flags, trainer="image_folder", ranks=2)
    check(ended, Fault(name="image", ranks=2))
    assert path.name in ended.err
    assert read_json(tmp_path / "r" / "status.json")["state"] == "DONE"


def test_a_killed_loader_worker_ends_the_run_and_is_named(tmp_path: Path) -> None:
    flags = [*IMAGES, "--data-dir", image_tree(tmp_path / "images"), "--workers", "1", "--epochs", "500",
             "--output-dir", tmp_path]
    with start("image_folder", *flags, folder=tmp_path) as job:
        job.wait_for_line("epoch 0:")
        for pid in job.alive():
            if pid not in job.pids and is_worker(pid):
                os.kill(pid, signal.SIGKILL)
        check(job.wait(30), Fault(name="worker", codes=(3,), error="ERROR data: .*worker"))
        check_nothing_left(job)
    assert read_json(tmp_path / "r" / "status.json")["state"] == "FAILED"


def is_worker(pid: int) -> bool:
    """Whether a process has torch's loader loop in it: the children of the fork server, not the server itself."""
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return b"forkserver" in Path(f"/proc/{parent}/cmdline").read_bytes()


def test_a_link_to_nothing_ends_the_run_by_name_and_is_skipped_where_that_is_allowed(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "images")
    link = tree / "train" / "disc" / "gone.png"
    link.symlink_to(tree / "nowhere.png")
    flags = ["--data-dir", tree, "--output-dir", tmp_path, "--batch-size", "12", "--epochs", "1", "--max-steps", "2",
             "--threads", "1", "--no-pictures"]
    refused = run("image_folder", *flags, "--run-name", "refused", ranks=2)
    assert refused.codes == [3, 3]
    assert refused.errors == [f"ERROR data: {link}: not readable as an image (a link to nothing); repair or remove it, "
                              f"or allow some with --skip-bad 1"]
    skipped = run("image_folder", *flags, "--run-name", "skipped", "--skip-bad", "1", ranks=2)
    assert skipped.codes == [0, 0], skipped.err
    assert skipped.err.count("gone.png: skipped") == 1
    assert f"data       {NUM_TRAIN} training images in 10 classes, {NUM_TEST} test images\n" in skipped.out


@pytest.mark.parametrize("split", ["train", pytest.param("test", marks=pytest.mark.slow)])
def test_a_cache_that_is_cut_short_while_in_use_is_named_and_built_again(tmp_path: Path, split: str) -> None:
    flags = ("--data-dir", image_tree(tmp_path / "images"), "--cache", "--cache-dir", tmp_path / "cache",
             "--output-dir", tmp_path, "--batch-size", "12", "--epochs", "2", "--threads", "1", "--no-pictures",
             "--run-name", "r")
    ended = run("image_folder", *flags, hook=at(3, "data", cut_short(str(tmp_path / "cache"), f"{split}-0*.bin")))
    check(ended, Fault(name="cut", codes=(3,), error=f"ERROR data: --cache-dir .*{split}-.*cut short while in use"))
    check(run("image_folder", *flags), Fault(name="again"))
