"""Every change of a run folder comes right after a look at owner.json, so a process that was taken over makes none.

The window that remains, from that look to the change, is printed by `pytest -s tests/test_fence.py`.
"""

import statistics
from pathlib import Path

import pytest

from tests.helpers.comparing import run_in
from tests.helpers.hooks import at, kill, watch_the_fence
from tests.helpers.processes import metrics

pytestmark = pytest.mark.timeout(120)


def test_every_change_of_a_run_folder_is_checked_by_itself(tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    watch = watch_the_fence(str(tmp_path / "r"), str(tmp_path / "log"))
    assert run_in(tmp_path, hook=[watch, at(13, "data", kill)]).codes == [-9]
    newest = max((tmp_path / "r" / "checkpoints").glob("step-*.pt"))
    newest.write_bytes(newest.read_bytes()[:-1])  # so that a damaged file is set aside, too
    (newest.parent / "step-00000099.pt").touch()  # never finished: swept away
    (newest.parent / "best.json").unlink()
    assert run_in(tmp_path, "--keep-checkpoints", "1", "--pictures", hook=watch).codes == [0]
    changes = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert [line for line in changes if float(line[2]) < 0] == []
    named = {name for _, name, _ in changes}
    assert named >= {"config.json", "status.json", "metrics.jsonl", "result.json", "best.pt", "best.json",
                     "step-00000020.pt", "step-00000020.json", "curves.png"}
    assert {event for event, _, _ in changes} == {"open", "os.rename", "os.remove"}
    assert sum(line[:2] == ["open", "metrics.jsonl"] for line in changes) >= len(metrics(tmp_path / "r"))
    seconds = sorted(float(line[2]) for line in changes)
    print(f"{len(seconds)} changes, looked at {1e6 * statistics.median(seconds):.0f} us before in the median, "
          f"{1e6 * seconds[-1]:.0f} us at most")
