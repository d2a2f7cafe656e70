"""The files of the checkpoint folder: their names, which of them count, which are kept and which are removed.
A checkpoint is `step-00000400.pt` with its manifest `step-00000400.json`; without the manifest it does not count."""

import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from launch.errors import CheckpointError
from launch.files import no_check, remedy, replacing, sync_folder

MANIFEST = re.compile(r"step-\d+(-earlier)?\.json")


def checkpoint_path(folder: Path, step: int) -> Path:
    """`step-00000400.pt`: sorts by step."""
    return folder / f"step-{step:08d}.pt"


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.stem.split("-")[1])


def manifest_path(path: Path) -> Path:
    """The manifest beside a checkpoint."""
    return path.with_suffix(".json")


def committed(folder: Path) -> list[Path]:
    """The checkpoints with a manifest, oldest first, `step-N-earlier.pt` before `step-N.pt`; or CheckpointError."""
    try:
        names = os.listdir(folder) if os.path.lexists(folder) else []
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error.strerror}); {remedy(error)}") from None
    return [(folder / name).with_suffix(".pt") for name in sorted(names) if MANIFEST.fullmatch(name)]


def give_name(path: Path, stem: str, *, check_fence: Callable[[], None] = no_check) -> None:
    """A second name, such as `best`, for a checkpoint and its manifest: hard links, or copies where links fail."""
    for file in (path, manifest_path(path)):
        with replacing(file.with_stem(stem), check_fence) as temporary:
            temporary.unlink(missing_ok=True)
            try:
                os.link(file, temporary)
            except OSError:
                shutil.copyfile(file, temporary)
        temporary.unlink(missing_ok=True)  # where both already were one file, a rename leaves both names
    sync_folder(path.parent)


def prune(folder: Path, *, keep: int, check_fence: Callable[[], None] = no_check) -> None:
    """Delete all but the newest `keep` committed checkpoints; best.pt is a name of its own and stays."""
    paths = committed(folder)
    kept = [path for path in paths if not path.stem.endswith("-earlier")][-keep:]
    for path in paths:
        for file in (manifest_path(path), path) if path not in kept else ():  # without its manifest none counts
            check_fence()
            file.unlink(missing_ok=True)


def sweep(folder: Path, *, check_fence: Callable[[], None] = no_check) -> None:
    """Remove what killed saves left behind: temporaries, and files never committed beside others that were."""
    paths = committed(folder)
    loose = [path for path in folder.glob("step-*.pt") if path not in paths]
    for path in [*folder.glob(".*.tmp"), *(loose if paths else ())]:  # without any manifest somebody may have lost them
        if not path.is_dir():
            check_fence()
            path.unlink(missing_ok=True)


def set_aside(paths: Iterable[Path], reason: str, *, check_fence: Callable[[], None] = no_check) -> None:
    """Rename checkpoints to `step-N.pt.<reason>`: they no longer count, and only the user may delete them."""
    for path in paths:
        for file in (manifest_path(path), path):  # the manifest first: from then on the other does not count
            if file.exists():
                check_fence()
                os.replace(file, file.with_name(f"{file.name}.{reason}"))
