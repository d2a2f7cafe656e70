"""A trainer with a fault in it, for torchrun: `torchrun … hooked.py FLAGS`; TRAINER and HOOKS are variables.

The same script also is the server that forks such trainers (see server.py): `python hooked.py --serve`. A fork of a
process that has imported torch starts in milliseconds instead of seconds; it is a real process all the same.
"""

import faulthandler
import gc
import importlib
import json
import os
import runpy
import select
import signal
import sys
import typing
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

from launch.stop import catch_signals  # noqa: E402  the path is set first

if __name__ == "__main__":
    gc.disable()  # until `run`, as in a trainer's own script: imports take less time
    if "--serve" not in sys.argv:
        catch_signals()

from launch.command_line import run  # noqa: E402
from tests.helpers import hooks  # noqa: E402


def train(trainer: str, hooks_in_json: str) -> None:
    """Be that trainer, or that file, as if started by its path. Does not return."""
    if trainer.endswith(".py"):
        gc.enable()
        sys.path.insert(0, str(Path(trainer).parent))
        runpy.run_path(trainer, run_name="__main__")
        sys.exit()
    catch_signals()
    module = importlib.import_module(f"trainers.{trainer}")
    hooks.install(trainer, hooks_in_json)
    run(module.main, typing.get_type_hints(module.main)["config"], recipes=getattr(module, "RECIPES", None))


def serve() -> dict[str, Any]:
    """Fork a process for each request on stdin, and tell their ids and exit codes on stdout.

    Returns:
        In a forked process, the request; never in the server.
    """
    import trainers.cifar
    import trainers.image_folder  # noqa: F401  imported once, before any fork

    gc.freeze()  # else each process, as it ends, looks through all that and so copies it
    pending = b""
    while True:
        ready, _, _ = select.select([0], [], [], 0.01)
        if ready:
            data = os.read(0, 1 << 16)
            if not data:
                os._exit(0)
            pending += data
            *requests, pending = pending.split(b"\n")
            for text in requests:
                request = json.loads(text)
                pid = os.fork()
                if pid == 0:
                    return request
                os.setpgid(pid, request["group"] or pid)  # here: by the next fork the group must be there
                say({"id": request["id"], "pid": pid})
        collect()


def collect() -> None:
    """Tell of every process that has ended."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        say({"ended": pid, "code": os.waitstatus_to_exitcode(status)})


def say(line: dict[str, Any]) -> None:
    """One line to whoever started this server."""
    os.write(1, (json.dumps(line) + "\n").encode())


def become(request: dict[str, Any]) -> None:
    """Take on the request's environment, output files and arguments."""
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for number, name in ((1, request["out"]), (2, request["err"])):
        if name is None:
            os.close(number)
        else:
            file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(file, number)
            os.close(file)
    faulthandler.register(signal.SIGRTMIN, all_threads=True)  # a test that runs out of time asks where this process is
    sys.argv = [request["trainer"], *request["flags"]]


if __name__ == "__main__":
    if "--serve" in sys.argv:
        request = serve()
        become(request)
        train(request["trainer"], request["hooks"])
    train(os.environ.get("TRAINER", "cifar"), os.environ.get("HOOKS", "[]"))
