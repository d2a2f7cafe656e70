"""What the checkpoint tests share: states whose every number follows from the step, and children that save and die.

Children come from multiprocessing's fork server, which has imported torch once: each starts in milliseconds.
"""

import multiprocessing
import os
import random
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from trainers.engine.checkpoints.save import Checkpointer
from trainers.engine.run.folder import RunFolder

BEST_EVERY = 3
SAVER = multiprocessing.get_context("forkserver")
SAVER.set_forkserver_preload([__name__])


def state_of(step: int, *, num_tensors: int = 4, size: int = 16) -> dict[str, Any]:
    """A whole training state at a step. Tensors stay below the size from which torch starts threads."""
    def tensors(offset: int) -> dict[str, torch.Tensor]:
        return {f"part{index}": torch.full((size,), float(step + offset + index)) for index in range(num_tensors)}
    best = step // BEST_EVERY * BEST_EVERY
    return {
        "format": 1, "model": tensors(0), "ema": None, "scaler": {}, "step": step, "epoch": step // 10,
        "optimizer": {"state": {0: {"momentum_buffer": tensors(1000)["part0"]}}, "param_groups": [{"lr": 0.1}]},
        "samples_consumed": step % 10, "best": {"step": best} if best else None,
        "history": {"epochs": [], "running": [[0.0, 0.0, 0.0]], "train_seconds": float(step)},
        "config": {"resume": "auto"}, "fingerprint": {"dataset": "made up", "global_batch_size": 2},
    }


def is_whole(state: dict[str, Any]) -> bool:
    """Whether every tensor is the one that `state_of` gives for this step."""
    model = state["model"]
    expected = state_of(state["step"], num_tensors=len(model), size=len(model["part0"]))
    same = all(torch.equal(model[name], tensor) for name, tensor in expected["model"].items())
    momentum = state["optimizer"]["state"][0]["momentum_buffer"]
    return same and torch.equal(momentum, expected["optimizer"]["state"][0]["momentum_buffer"])


def save(run: RunFolder, *steps: int, keep: int = 2) -> None:
    """Save these steps one after the other; all are on disk when it returns."""
    checkpointer = Checkpointer(run, keep=keep)
    for step in steps:
        checkpointer.save(state_of(step), is_best=step % BEST_EVERY == 0)
    checkpointer.join()


def save_by_protocol(run: str, first_step: int, progress: Connection) -> None:
    """Save step after step, as training does, and tell each step that is committed. Never returns."""
    checkpointer = Checkpointer(RunFolder(Path(run), is_main=True), keep=1)
    step = first_step
    while True:
        checkpointer.save(state_of(step, num_tensors=32, size=8192), is_best=step % BEST_EVERY == 0)
        checkpointer.finish_copy()
        checkpointer.join()
        progress.send(step)
        step += 1


def save_plainly(run: str, first_step: int, progress: Connection) -> None:
    """The control: torch.save over the file of the step before. Never returns."""
    step = first_step
    while True:
        torch.save(state_of(step, num_tensors=32, size=8192), Path(run) / "latest.pt")
        progress.send(step)
        step += 1


def kill_while_saving(saver: Callable[[str, int, Connection], None], run: Path, first_step: int,
                      rng: random.Random) -> int:
    """Start a child that saves, kill -9 it at a random moment after its first save; the last step that it committed."""
    here, there = SAVER.Pipe(duplex=False)
    child = SAVER.Process(target=saver, args=(str(run), first_step, there), daemon=True)
    child.start()
    there.close()
    if not here.poll(timeout=60):
        raise TimeoutError("the child did not save within 60 s")
    time.sleep(rng.uniform(0, 0.05))
    assert child.pid is not None
    os.kill(child.pid, 9)
    child.join(timeout=30)
    last = first_step
    try:
        while True:
            last = here.recv()
    except EOFError:
        return last
