"""What checkpoints record of the data: the names of the classes and, where it is files, their names, sizes and times.
Those cost a look at each file, minutes for 200,000 of them on a shared file system. So rank 0 takes them in a thread
while training begins; they are in the first checkpoint, and a run that resumes compares them before its next."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.errors import CheckpointError, to_stderr
from launch.process_group import World, from_main
from trainers.engine.once_per_node import in_thread


class DataRecord:
    """The training set of one run, None or anything with a `fingerprint()`; of files, of their `sizes_and_times()`."""

    def __init__(self, world: World, dataset: Any, class_names: tuple[str, ...] = ()) -> None:
        self.world, self.dataset, self.class_names = world, dataset, class_names
        self.has_files = hasattr(dataset, "sizes_and_times")  # whose fingerprint is None until they were looked at
        self.fingerprint: str | None = None if dataset is None or self.has_files else dataset.fingerprint()
        self._files, self._text = dict[str, list[int]](), "{}"
        self._before: tuple[Mapping[str, Any], Path] | None = None
        self._looking = in_thread(self._look) if self.has_files and world.is_main else iter(())
        next(self._looking, None)  # starts it

    def _look(self) -> None:
        self.dataset.sizes_and_times(self._files)
        self._text, self.fingerprint = json.dumps(self._files), self.dataset.fingerprint(self._files)

    def state(self) -> dict[str, Any]:
        """The part of a checkpoint; both entries are optional when read."""
        return {"class_names": list(self.class_names), "files": self._text}

    def expect(self, state: Mapping[str, Any], source: Path) -> None:
        """Remember a checkpoint for `settle`; raises CheckpointError if its classes have other names."""
        self._before = state, source
        if (was := saved_class_names(state)) not in ((), self.class_names):
            raise self._refused(f"its classes have other names ({', '.join(sorted({*was} ^ {*self.class_names})[:5])})")

    def settle(self) -> None:
        """Before the first save: CheckpointError if a file is new, gone or of another size. A collective."""
        if self.has_files:
            self.has_files = False
            from_main(self.world, self._compare)

    def _compare(self) -> None:
        num_seen = -1
        for _ in self._looking:
            if len(self._files) > num_seen:  # else a file system hangs, and the watchdog is to say so
                self.world.watchdog.mark("data")
            num_seen = len(self._files)
        if self._before is None:
            return
        state = self._before[0]
        try:  # the size and time of each file; none in a checkpoint of before they were recorded
            was = {name: [int(size), int(time)] for name, (size, time) in json.loads(state.get("files", "{}")).items()}
        except (ValueError, TypeError, AttributeError):
            was = {}
        for name in sorted({*was, *self._files}) if was else ():
            before, now = (files.get(name, ["absent"])[0] for files in (was, self._files))
            if before != now:  # -1 of one that cannot be read
                raise self._refused(f"{self.dataset.folder / name}: its size was {before} and is {now}")
        if (digest := state["fingerprint"].get("dataset")) != self.fingerprint:
            raise self._refused(f"dataset was {digest} and is {self.fingerprint}")
        if touched := [name for name, seen in self._files.items() if was and was[name] != seen]:
            to_stderr(f"WARNING data: {self.dataset.folder / touched[0]}: written since the checkpoint, the first of "
                      f"{len(touched):,}, all of the sizes that they had; if they are no copies, start another run")

    def _refused(self, difference: str) -> CheckpointError:
        assert self._before is not None
        return CheckpointError(f"{self._before[1]}: does not fit this run: {difference}; use the data it was made "
                               f"with, or another --run-name")


def saved_class_names(state: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes in a checkpoint; none in one of before they were recorded."""
    return tuple(map(str, state.get("class_names") or ()))
