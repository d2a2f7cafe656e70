"""The walk of one batch: the files of ours that a reader must open between the sampler and the optimizer's step."""

import sys
from pathlib import Path
from types import FrameType

import pytest

from tests.helpers.processes import ROOT
from trainers.mnist import MnistConfig, main

MOST_FILES = 13  # loaders.py too, which the walk passed unseen while each kind of data had a loader of its own
OURS = {"launch", "datasets", "trainers"}


def ours(path: str) -> str | None:
    """A file's path inside the repository, if it is product code."""
    relative = Path(path).relative_to(ROOT) if Path(path).is_relative_to(ROOT) else None
    return relative.as_posix() if relative is not None and relative.parts[0] in OURS else None


@pytest.mark.timeout(60)
def test_the_walk_of_one_batch_passes_few_files_and_never_goes_back_up_to_the_loop(tmp_path: Path) -> None:
    walk: list[str] = []  # in the order in which their code first runs
    walking = [False]

    def watch(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event != "call":
            return
        if code.co_name == "indices":
            walking[0] = True
        elif code.co_name == "step" and Path(code.co_filename).parent.name == "optim":
            walking[0] = False
        name = ours(code.co_filename)
        if walking[0] and name is not None and name not in walk:
            walk.append(name)

    sys.setprofile(watch)
    try:
        main(MnistConfig(dataset="synthetic", batch_size=100, max_steps=1, shift=1, threads=1, pictures=False,
                         output_dir=tmp_path, run_name="walk"))
    finally:
        sys.setprofile(None)
    assert {"datasets/order.py", "datasets/augment.py", "trainers/engine/step.py", "trainers/models.py"} <= set(walk)
    assert "trainers/engine/trainer.py" not in walk
    assert len(walk) <= MOST_FILES, walk
