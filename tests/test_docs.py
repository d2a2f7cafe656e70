"""README.md and docs/: their commands run, their excerpts are the code, no link is dead, the tables are current."""

import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from launch.stop import signals_flag
from tests.helpers import documents
from tests.helpers.documents import DOCUMENTS, NOT_RUN, ROOT, blocks, commands
from tests.helpers.images import image_tree
from tests.helpers.libraries import fill_hub, fill_torch, no_network
from tests.helpers.server import free_port
from trainers.engine.run.report import epoch_text

README = ROOT / "README.md"
EVERY_PAGE = [*DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "tests" / "README.md"]
RUN = list(dict.fromkeys(line for page in DOCUMENTS for line in commands(page)
                         if not line.startswith((*NOT_RUN, "signals="))))


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_the_tables_of_flags_are_what_the_configs_say(tmp_path: Path) -> None:
    old = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    code = "import sys; sys.path.insert(0, sys.argv[1]); import make_reference as m; " \
           "sys.stdout.write(m.page(sys.stdin.read()))"
    done = subprocess.run([sys.executable, "-c", code, str(ROOT / "docs")], input=old, capture_output=True, text=True,
                          cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == old, "run: python docs/make_reference.py"


@pytest.mark.parametrize("file", ["trainers/cifar.py", "trainers/engine/step.py"])
def test_the_readme_shows_the_code_as_it_is(file: str) -> None:
    code = textwrap.dedent((ROOT / file).read_text(encoding="utf-8"))
    plain = "\n".join(line.strip() for line in code.splitlines())
    shown = ["\n".join(line.strip() for line in block.strip().splitlines()) for block in blocks(README, "python")]
    assert sum(block in plain for block in shown) == 1


def test_the_lines_that_quickstart_ends_with_are_shown_as_they_are_printed() -> None:
    (shown,) = blocks(README, "text")
    epoch, test, *_ = shown.splitlines()
    number, *figures = (float(word.replace(",", "")) for word in re.findall(r"[\d.,]+", epoch))
    names = ("train_loss", "train_accuracy", "test_accuracy", "seconds")
    line = {"epoch": int(number), **dict(zip(names, figures, strict=False)), "test_loss": 0.0}
    line |= {name: line[name] / 100 for name in names[1:3]}
    assert epoch == epoch_text(line, samples_per_second=figures[-1])
    assert test.startswith(f"test accuracy {figures[2]:.2f} % over 2000 samples, top-5 ")


def test_the_readme_counts_the_faults_that_are_rehearsed() -> None:
    table = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .*`test_\w+\.py::", table, re.MULTILINE)
    assert f"| faults rehearsed | {len(rows)}, in " in README.read_text(encoding="utf-8")


def test_every_page_has_commands_that_are_known() -> None:
    assert len(RUN) > 30
    for line in RUN:
        assert line.startswith(documents.PROGRAMS), line


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder in which the commands of the pages find what they name, and the environment for it."""
    torchvision_models = pytest.importorskip("torchvision").models
    folder = tmp_path_factory.mktemp("documents")
    for name in ("trainers", "datasets", "launch", "slurm", "docs"):
        (folder / name).symlink_to(ROOT / name)
    image_tree(folder / "photos", num_train=64, num_test=16)
    one = next((folder / "photos" / "test").rglob("*.png"))
    for number in range(1000):
        for split in ("train", "val"):
            link = folder / "imagenet" / split / f"n{number:08}" / "1.png"
            link.parent.mkdir(parents=True)
            link.hardlink_to(one)
    (folder / "my.py").write_text(next(block for block in blocks(README, "python") if block.startswith("# my.py")))
    (folder / "mine.yaml").write_text("epochs: 20\n")
    offline = no_network(folder)
    home = Path(offline["TORCH_HOME"])
    fill_torch(home, torchvision_models.ResNet50_Weights.IMAGENET1K_V2.url, torchvision_models.resnet50())
    fill_torch(home, torchvision_models.ResNet18_Weights.IMAGENET1K_V1.url, torchvision_models.resnet18())
    if importlib.util.find_spec("timm"):
        timm = importlib.import_module("timm")
        fill_hub(Path(offline["HF_HOME"]) / "hub", "timm/resnet50.a1_in1k", timm.create_model("resnet50"))
    path = documents.make_programs(folder / "bin", free_port())
    variables = {**os.environ, **offline, "PATH": f"{path}:{os.environ['PATH']}", "WANDB_MODE": "offline",
                 "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "signals": signals_flag().partition("=")[2]}
    run("python trainers/cifar.py --run-name first", folder, variables)
    run("python trainers/cifar.py --run-name second --tensorboard", folder, variables)
    return folder, variables


def run(command: str, folder: Path, variables: dict[str, str], copies: int = 1) -> None:
    """Run a command in bash, so often at once, and see that each ends with 0."""
    started = [subprocess.Popen(["bash", "-euc", command], cwd=folder, env=variables, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, start_new_session=True) for _ in range(copies)]
    for process in started:
        try:
            output, _ = process.communicate(timeout=200)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            output, _ = process.communicate()
        assert process.returncode == 0, f"{command}\n{output}"


@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.parametrize("command", RUN)
def test_a_command_of_the_pages_works(command: str, place: tuple[Path, dict[str, str]]) -> None:
    for word, module in {"timm": "timm", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}.items():
        if word in command:
            pytest.importorskip(module)
    run(command, *place, copies=2 if "--nnodes=2" in command else 1)
