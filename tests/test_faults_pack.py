"""What goes wrong with packs: while they are made, and while they are trained from."""

import os
import sys
from pathlib import Path

import pytest

from datasets import pack
from datasets.images import packed
from datasets.pack import PackConfig
from tests.helpers.comparing import run_in
from tests.helpers.faults import Fault, check, check_lines
from tests.helpers.hooks import at, delete
from tests.helpers.images import image_tree
from tests.helpers.processes import ROOT, execute, read_json, start
from tests.test_pack import flip_a_byte, same_files, unshuffled, write_tars

pytestmark = pytest.mark.timeout(120)
PACK = [sys.executable, str(ROOT / "datasets" / "pack.py")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return image_tree(tmp_path / "photos")


def test_a_tar_file_cut_short_is_one_line(folder: Path, tmp_path: Path) -> None:
    path = write_tars(tmp_path / "tars", unshuffled(folder)) / "train-001.tar"
    os.truncate(path, path.stat().st_size // 2)
    ended = execute([*PACK, "--data-dir", str(tmp_path / "tars")])
    assert ended.codes == [3]
    check_lines(ended, rf"^ERROR data: {path}: is cut short or damaged \(.*\); copy or download it again$")


@pytest.mark.slow
def test_a_full_disk_while_packing_is_one_line_and_the_same_command_continues(folder: Path, tmp_path: Path) -> None:
    words = [*PACK, "--data-dir", str(folder), "--out", str(tmp_path / "a.pack"), "--images-per-part", "50"]
    size = sum(path.stat().st_size for path in (folder / "train").rglob("*.png")) // 120
    limit = ["bash", "-c", f'ulimit -f {40 * size // 1024}; exec "$@"', "bash"]
    ended = execute([*limit, *words])
    assert ended.codes == [3]
    check_lines(ended, r"^ERROR data: --out .*a\.pack: cannot be written \(File too large\); free some space")
    assert not (tmp_path / "a.pack").exists()
    pack.main(PackConfig(data_dir=folder, out=tmp_path / "a.pack", images_per_part=50))
    pack.main(PackConfig(data_dir=folder, out=tmp_path / "b.pack", images_per_part=50))
    assert same_files(tmp_path / "a.pack", tmp_path / "b.pack")


@pytest.mark.slow
def test_a_second_process_that_packs_the_same_is_told_so(folder: Path, tmp_path: Path) -> None:
    with pack.begun(tmp_path / "a.pack", "a plan"):
        first = start([*PACK, "--data-dir", str(folder), "--out", str(tmp_path / "a.pack")])
        out, err = first.communicate(timeout=60)
    assert first.returncode == 3, out + err
    assert err == f"ERROR data: --out {tmp_path}/a.pack: another process is packing it; wait for that one\n"


def test_training_from_a_pack_that_is_being_written_is_refused(folder: Path, tmp_path: Path) -> None:
    with pack.begun(tmp_path / "a.pack", "a plan"):
        for path in (tmp_path / "a.pack", tmp_path / f"a.pack{packed.PARTIAL}"):
            ended = run_in(tmp_path, "--data-dir", path, trainer="image_folder", ranks=2)
            check(ended, Fault(name="writing", codes=(3,), ranks=2, error=rf"ERROR data: --data-dir {path}: is still"))


def test_a_flipped_byte_of_a_pack_ends_the_run_by_name_and_is_skipped_where_that_is_allowed(folder: Path,
                                                                                            tmp_path: Path) -> None:
    pack.main(PackConfig(data_dir=folder, out=tmp_path / "a.pack"))
    train, _ = packed.load(tmp_path / "a.pack")
    assert train is not None
    name = train.path(7)
    flip_a_byte(train, 7)
    ended = run_in(tmp_path, "--data-dir", tmp_path / "a.pack", "--workers", "0", trainer="image_folder", ranks=2)
    assert set(ended.codes) <= {3, 6}
    assert 3 in ended.codes
    said = rf"ERROR data: {name}: .*damaged in train-00000\.bin"
    check(ended, Fault(name="flip", codes=tuple(ended.codes), ranks=2, error=said))
    skipped = run_in(tmp_path, "--data-dir", tmp_path / "a.pack", "--skip-bad", "1", trainer="image_folder", ranks=2)
    check(skipped, Fault(name="flip", ranks=2))
    assert list(read_json(tmp_path / "r" / "bad_images.json")) == [str(name)]


def test_a_pack_deleted_while_it_is_trained_from_is_one_line(folder: Path, tmp_path: Path) -> None:
    pack.main(PackConfig(data_dir=folder, out=tmp_path / "a.pack", images_per_part=1))
    ended = run_in(tmp_path, "--data-dir", tmp_path / "a.pack", "--workers", "0", trainer="image_folder",
                   hook=at(0, "backward", delete(str(tmp_path / "a.pack"))))
    check(ended, Fault(name="gone", codes=(3,), error=r"ERROR data: .*: not readable as an image \(train-\d+\.bin can"
                       r"not be read \(.*No such file or directory.*\): copy or pack it again\)"))
