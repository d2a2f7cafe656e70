"""What goes wrong with weights by name: one line from one rank."""

from pathlib import Path

import pytest
from torchvision import models as torchvision_models

from tests.helpers.images import write_tree
from tests.helpers.libraries import fill_torch, no_network
from tests.helpers.processes import Ended
from tests.helpers.server import run

pytestmark = pytest.mark.timeout(60)


def start(folder: Path, *flags: str, ranks: int = 2) -> Ended:
    ended = run("image_folder", "--data-dir", write_tree(folder / "data"), "--output-dir", folder / "runs", "--model",
                "squeezenet1_1", "--image-size", "64", "--threads", "1", "--no-pictures", *flags, ranks=ranks,
                **no_network(folder))
    assert len(ended.errors) == 1
    assert "Traceback" not in ended.err
    return ended


def test_no_network_and_no_cache_is_one_line(tmp_path: Path):
    ended = start(tmp_path, "--pretrained", "DEFAULT")
    assert ended.codes == [3, 3]
    assert ended.errors[0].startswith("ERROR data: --pretrained DEFAULT of squeezenet1_1: is not cached and cannot be "
                                      "fetched (<urlopen error [Errno 111] Connection refused>); run it once where")


def test_a_damaged_file_in_the_cache_is_one_line(tmp_path: Path):
    weights = torchvision_models.SqueezeNet1_1_Weights.DEFAULT
    path = fill_torch(tmp_path / "torch", weights.url, torchvision_models.squeezenet1_1())
    path.write_bytes(path.read_bytes()[:5000])
    ended = start(tmp_path, "--pretrained", "DEFAULT")
    assert ended.codes == [4, 4]
    assert f"squeezenet1_1: {path}: cannot be read" in ended.errors[0]


def test_another_number_of_classes_is_refused_in_the_evaluation_of_a_name(tmp_path: Path):
    ended = start(tmp_path, "--evaluate", "IMAGENET1K_V1")
    assert ended.codes == [3, 3]
    assert "has 10 classes, and --evaluate IMAGENET1K_V1 of squeezenet1_1 1,000 without names" in ended.errors[0]


def test_a_word_that_is_no_name_of_weights_says_which_there_are(tmp_path: Path):
    ended = start(tmp_path, "--pretrained", "IMAGENET1K_V3")
    assert ended.codes == [2, 2]
    assert "no such file, and no name of weights of squeezenet1_1; choose IMAGENET1K_V1 or DEFAULT" in ended.errors[0]
