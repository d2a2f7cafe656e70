"""Shell completion, by tyro: the script comes out as it is, not as --help does."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers.server import run

pytestmark = pytest.mark.timeout(60)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_a_completion_script_is_printed_whole_and_bash_can_read_it(tmp_path: Path) -> None:
    ended = run("mnist", "--tyro-print-completion", "bash")
    assert ended.code == 0, ended.err
    script = tmp_path / "completion.bash"
    script.write_text(ended.out)
    assert "--learning-rate" in ended.out
    function = next(line.split()[2] for line in ended.out.splitlines() if line.startswith("complete -F "))
    asked = f'COMP_WORDS=(python trainers/mnist.py --precision b); COMP_CWORD=3; {function}; echo "${{COMPREPLY[@]}}"'
    answer = subprocess.run(["bash", "-c", f"source {script}; {asked}"], capture_output=True, text=True, timeout=30)
    assert answer.stdout.strip() == "bf16", answer.stderr
