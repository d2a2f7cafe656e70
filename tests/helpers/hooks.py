"""Faults for a real trainer process, placed at an exact step and phase. Only tests import this.

A test calls one of these functions and gets a `Hook`: its name and arguments, which go to the process as JSON. There
the function itself is looked up and run, before training begins. Phases are those that the training loop announces to
its watchdog: data, forward, backward, optimizer, reduce, checkpoint, evaluate, main.

    hook=at(7, "backward", kill, ranks=[1])     # in a test
"""

import contextlib
import ctypes
import errno
import fcntl
import functools
import inspect
import json
import math
import multiprocessing.util
import os
import shutil
import signal
import socket
import stat
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import launch.process_group
import launch.watchdog
from datasets import synthetic
from launch.errors import launched_rank
from launch.files import read_object, replace_file
from launch.watchdog import Watchdog
from trainers import models
from trainers.engine import step as engine_step
from trainers.engine.run import ownership, pictures
from trainers.engine.step import TrainStep

FUNCTIONS: dict[str, Callable[..., None]] = {}


@dataclass(frozen=True)
class Hook:
    """A function of this file by its name, with arguments; some of these may be hooks themselves."""

    name: str
    arguments: list[Any]
    options: dict[str, Any]

    def __call__(self) -> None:
        """Run it, in the process it was sent to."""
        FUNCTIONS[self.name](*self.arguments, **self.options)


Hooks = Hook | Iterable[Hook]


def hook(function: Callable[..., None]) -> Callable[..., Hook]:
    """Make calls of a function, in tests, describe the call instead; a wrong argument is noticed there and then."""
    FUNCTIONS[function.__name__] = function

    @functools.wraps(function)
    def describe(*arguments: Any, **options: Any) -> Hook:
        inspect.signature(function).bind(*arguments, **options)
        return Hook(function.__name__, list(arguments), options)
    return describe


def to_json(hooks: Hooks) -> str:
    """One hook, or several that are run one after the other."""
    return json.dumps([hooks] if isinstance(hooks, Hook) else list(hooks), default=vars)


def from_json(text: str) -> list[Hook]:
    """What `to_json` wrote."""
    return json.loads(text, object_hook=lambda found: Hook(**found) if found.keys() == vars(EMPTY).keys() else found)


EMPTY = Hook("", [], {})


class Normed(nn.Module):
    """A small network with BatchNorm and dropout. Used in another order than defined, which DDP learns."""

    def __init__(self, num_classes: int, width: int = 8) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(width * 49, 32), nn.ReLU(), nn.Linear(32, num_classes))
        self.features = nn.Sequential(nn.Conv2d(3, width, 5, stride=2), nn.BatchNorm2d(width), nn.ReLU(),
                                      nn.MaxPool2d(2))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, 3, 32, 32)."""
        return self.head(self.features(images).flatten(1))


CLAIMED: list[ownership.Ownership] = []


def install(trainer: str, hooks: str) -> None:
    """In a trainer's process: add the network to those that `--model` knows, and run the hooks."""
    models.OURS["normed"] = Normed
    if trainer == "image_folder":
        from trainers import image_folder

        image_folder.OUR_MODELS = (*image_folder.OUR_MODELS, "normed")
    claim = ownership.Ownership.claim

    def remember_claim(self: ownership.Ownership) -> None:
        claim(self)
        CLAIMED.append(self)

    ownership.Ownership.claim = remember_claim
    for each in from_json(hooks):
        each()


@hook
def at(step: int, phase: str, *actions: Hook, ranks: Collection[int] | None = None, time: int = 1) -> None:
    """Run the actions once, when the training loop reaches that phase of that step (completed steps, from 0).

    `time`: 2 for the second micro-batch of the step.
    """
    original, fired = Watchdog.mark, []

    def mark(self: Watchdog, where: str, now: int | None = None) -> None:
        original(self, where, now)
        if self.step >= step and where == phase and (ranks is None or launched_rank() in ranks):
            fired.append(True)
            for action in actions if len(fired) == time else ():
                action()

    Watchdog.mark = mark


@hook
def on_ranks(ranks: Collection[int], action: Hook) -> None:
    """Run the action at once, on these ranks only."""
    if launched_rank() in ranks:
        action()


@hook
def packages_from(folder: str) -> None:
    """Import packages from this folder rather than those that are installed."""
    sys.path.insert(0, folder)


@hook
def log_connections(path: str) -> None:
    """Append the host of every connection that this process makes, and of every name it looks up, to a file."""
    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("socket.connect", "socket.getaddrinfo"):
            host = arguments[0] if event == "socket.getaddrinfo" else arguments[1]
            with open(path, "a") as file:
                file.write(f"{host[0] if isinstance(host, tuple) else host}\n")

    sys.addaudithook(watch)


@hook
def on_first_start(action: Hook) -> None:
    """Run the action unless torchrun has restarted the ranks."""
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        action()


@hook
def send(number: int) -> None:
    """Send this process a signal."""
    os.kill(os.getpid(), number)


kill = send(int(signal.SIGKILL))
stop = send(int(signal.SIGSTOP))


@hook
def sleep_for(seconds: float) -> None:
    """Sleep, as a loader does that waits for a file system."""
    time.sleep(seconds)


@hook
def say(text: str) -> None:
    """Print a line, for a test that waits for it."""
    print(text, flush=True)


@hook
def touch(name: str) -> None:
    """Make an empty file in the job's folder; `{rank}` stands for this process's rank."""
    Path(name.format(rank=launched_rank())).touch()


@hook
def change_folder(name: str) -> None:
    """Continue in another folder, as on a node of its own; `{rank}` stands for this process's rank."""
    os.chdir(name.format(rank=launched_rank()))


@hook
def list_files(below: str, into: str) -> None:
    """Write down every file below a folder with the time it was last written."""
    found = sorted((str(path), path.stat().st_mtime_ns) for path in Path(below).rglob("*") if path.is_file())
    Path(into).write_text(str(found))


@hook
def cut_short(below: str, pattern: str) -> None:
    """Leave half of every file below a folder whose name matches."""
    for path in Path(below).rglob(pattern):
        os.truncate(path, path.stat().st_size // 2)


@hook
def fill(path: str) -> None:
    """Write to a file until the disk is full."""
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 14))


@hook
def power_cut(mounted: str) -> None:
    """Shut an ext4 down as a power cut does: what is only in memory, its journal too, is lost. Then end at once."""
    descriptor = os.open(mounted, os.O_RDONLY)
    fcntl.ioctl(descriptor, 0x8004587D, struct.pack("i", 2))  # EXT4_IOC_SHUTDOWN, EXT4_GOING_FLAGS_NOLOGFLUSH
    os.kill(os.getpid(), signal.SIGKILL)


@hook
def unsyncable_folders(error: str) -> None:
    """Have fsync refuse folders with this errno, as some network file systems do."""
    fsync = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(getattr(errno, error), os.strerror(getattr(errno, error)))
        fsync(descriptor)

    os.fsync = refuse_folders


@hook
def run_out_of_memory(text: str) -> None:
    """Raise what Python raises then."""
    raise MemoryError(text)


@hook
def tell_writes(below: str) -> None:
    """Print a line for every file below a folder that a rank other than 0 opens for writing."""
    def tell(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and isinstance(arguments[0], str) and below in arguments[0] and launched_rank() != 0:
            os.write(2, f"WROTE {arguments[0]}\n".encode())

    sys.addaudithook(tell)


@hook
def limit_file_size(num_bytes: int) -> None:
    """Have every write beyond so many bytes of a file fail (EFBIG), as a quota does."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


@hook
def clock_jumps(at_call: int, seconds: float) -> None:
    """Have time.time() jump, as an adjusted system clock does."""
    real, calls = time.time, []

    def jumped() -> float:
        calls.append(1)
        return real() + (seconds if len(calls) > at_call else 0)

    time.time = jumped


@hook
def small_data(add_to_seed: int = 0) -> None:
    """Synthetic data of 600 training and 200 test images; with another seed, other images."""
    synthetic.load = lambda *, seed=0, **sizes: LOAD(seed=seed + add_to_seed, **{**SMALL, **sizes})


LOAD, SMALL = synthetic.load, {"num_train": 600, "num_test": 200}


@hook
def download_mnist_from(address: str, checksums: dict[str, str]) -> None:
    """Have torchvision fetch MNIST's files from this server: their names, with the md5 of each."""
    from torchvision.datasets import MNIST, utils

    MNIST.mirrors, MNIST.resources = [address], list(checksums.items())
    utils._get_redirect_url = lambda url, max_hops=3: url  # which would fetch each file once more


@hook
def silent_after(seconds: float) -> None:
    """Give up sooner on a host of the rendezvous that does not answer."""
    launch.watchdog.SILENT_SECONDS = seconds  # pyright: ignore[reportAttributeAccessIssue]


@hook
def rank_without_a_gpu(rank: int, num_gpus: int) -> None:
    """Have the ranks before this one find a device, and this one none, on a host of so many GPUs."""
    choose = launch.process_group.choose_device
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: num_gpus
    launch.process_group.choose_device = lambda device, launched: choose(
        "auto" if launched.rank == rank else "cpu", launched)


@hook
def bad_loss_from(step: int, *, ranks: Collection[int] | None = None) -> None:
    """Make the loss NaN from that step on."""
    original = TrainStep.forward

    def forward(self: TrainStep, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        outputs, loss = original(self, inputs, targets)
        broken = self.world.watchdog.step >= step and (ranks is None or launched_rank() in ranks)
        return outputs, loss * torch.nan if broken else loss

    TrainStep.forward = forward


@hook
def model_with_unused_layer() -> None:
    """Give the network a layer that its forward never calls."""
    class Unused(Normed):
        def __init__(self, num_classes: int) -> None:
            super().__init__(num_classes)
            self.spare = nn.Linear(3, 3)

    models.OURS["normed"] = Unused


@hook
def gradients_apart() -> None:
    """Have no rank average its gradients with the others'."""
    engine_step.parallel.gradient_sync = lambda model, last: model.no_sync()


@hook
def taken_over() -> None:
    """Do to this process's run what a later incarnation on another node does: raise the fencing token."""
    for claimed in CLAIMED:
        owner = read_object(claimed.path / "owner.json") or {}
        later = {**owner, "incarnation": owner["incarnation"] + 1, "host": "elsewhere", "pid": 1}
        replace_file(claimed.path / "owner.json", json.dumps(later).encode())


@hook
def delete(name: str) -> None:
    """Delete a file, or a folder with all that is in it, as a person does who tidies up."""
    gone = Path(name).rename(f"{name}.gone")  # at once, also while a save under way writes into it
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()


@hook
def no_locks(number: int) -> None:
    """Have file locks fail, as on a file system that has none."""
    def lockf(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    ownership.fcntl.lockf = lockf


@hook
def watch_the_fence(below: str, into: str) -> None:
    """Write down every change of a file below a folder, and how long before it owner.json was last looked at.

    The seconds are negative where another change came in between, so that this one was not checked by itself. Left out
    are temporaries, which are this process's own, and the files by which it owns the folder.
    """
    looked_at: dict[int, float] = {}  # by thread: the loop and the save under way take turns
    changes = {"os.rename": 1, "os.link": 1, "os.remove": 0, "open": 0}

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        path = str(arguments[changes[event]]) if event in changes else ""
        if below not in path:
            return
        name, thread = Path(path).name, threading.get_ident()
        writes = event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if not writes:
            if name == "owner.json":
                looked_at[thread] = time.perf_counter()
        elif not name.endswith(".tmp") and name not in ("owner.json", "heartbeat.json", "lock"):
            with contextlib.suppress(OSError):
                since = time.perf_counter() - looked_at.get(thread, math.inf)
                os.write(log, f"{event} {name} {since}\n".encode())
            if event != "open":
                looked_at[thread] = math.inf

    log = os.open(into, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.addaudithook(watch)


@hook
def slow_steps(seconds: float) -> None:
    """Make every step take that much longer."""
    original = TrainStep.__call__

    def train_step(self: TrainStep, *args: object, **kwargs: object) -> None:
        time.sleep(seconds)
        original(self, *args, **kwargs)  # pyright: ignore[reportArgumentType]

    TrainStep.__call__ = train_step


@hook
def log_steps() -> None:
    """Keep the number of computed steps in step-RANK.txt."""
    original = TrainStep.__call__

    def train_step(self: TrainStep, *args: object, **kwargs: object) -> None:
        original(self, *args, **kwargs)  # pyright: ignore[reportArgumentType]
        Path(f"step-{self.world.rank}.txt").write_text(str(self.world.watchdog.step))

    TrainStep.__call__ = train_step


@hook
def log_images() -> None:
    """Append step, position in the global batch and checksum of every augmented image to samples-RANK.txt."""
    original = TrainStep.to_device

    def to_device(self: TrainStep, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if getattr(self.model, "module", self.model).training:
            with open(f"samples-{self.world.rank}.txt", "a") as file:
                for place, image in enumerate(inputs):
                    position = place * self.world.world_size + self.world.rank
                    file.write(f"{self.world.watchdog.step} {position} {zlib.crc32(image.numpy().tobytes())}\n")
        return original(self, inputs, targets)

    TrainStep.to_device = to_device


@hook
def warm_workers() -> None:
    """Have the server of loader workers be a copy of this process as it is now, which has imported all that they need
    and is connected to nobody yet, not a new one, which imports it for seconds. For tests not of how workers start.
    """
    start, (ours, theirs) = multiprocessing.util.spawnv_passfds, socket.socketpair()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    pid = os.fork()
    if pid == 0:
        ours.close()
        serve_workers(theirs)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def send_command(path: bytes, words: list[str], descriptors: list[int]) -> int:
        if "forkserver" not in words[-1]:  # the tracker of shared memory
            return start(path, words, descriptors)
        blocked = sorted(signal.pthread_sigmask(signal.SIG_BLOCK, []))
        socket.send_fds(ours, [json.dumps([words[-1], descriptors, blocked]).encode()], descriptors)
        return pid

    multiprocessing.util.spawnv_passfds = send_command


def serve_workers(connection: socket.socket) -> None:
    """In the copy: wait for what the new process would have been told, and be it. Does not return."""
    try:
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        message, received, _, _ = socket.recv_fds(connection, 1 << 16, 8)
        if message:  # else the trainer has ended without workers
            command, numbers, blocked = json.loads(message)
            apart = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 512) for descriptor in received]
            for descriptor in (*received, connection.detach()):
                os.close(descriptor)
            for descriptor, number in zip(apart, numbers, strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            exec(command, {})
    finally:
        os._exit(0)


@hook
def small_shared_memory(size: str) -> None:
    """Give this process and its children, loader workers too, a /dev/shm of their own of that size, such as 64m."""
    libc, rest, private, own_mounts = ctypes.CDLL(None, use_errno=True), 0x4000, 1 << 18, 0x20000
    if libc.unshare(own_mounts) or libc.mount(b"none", b"/", None, rest | private, None) or libc.mount(
            b"tmpfs", b"/dev/shm", b"tmpfs", 0, f"size={size}".encode()):
        raise OSError(ctypes.get_errno(), "no mount of its own")


@hook
def hang_on_open(name: str) -> None:
    """Have this process wait without end when it opens a file of that name, as on a file server that is gone."""
    def hang(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).endswith(name):
            print("hangs", file=sys.stderr, flush=True)
            time.sleep(600)

    sys.addaudithook(hang)


@hook
def read_without_end() -> None:
    """Wait in a call that no signal interrupts, so that Python's handlers have no turn, as of a gone file server."""
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):  # the second time waits for the first
        ctypes.CDLL(None).pthread_mutex_lock(mutex)


@hook
def sleep_in_a_users_function(seconds: float) -> None:
    """Sleep in code of a file that is not of this checkout."""
    text = f"def transform():\n    import time\n    time.sleep({seconds})\ntransform()"
    exec(compile(text, "/home/me/mine.py", "exec"))


@hook
def no_more_threads() -> None:
    """Have every new thread refused, as beyond a container's limit of processes."""
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    threading.Thread.start = refuse


@hook
def drawing_fails(kind: str, text: str) -> None:
    """Have every picture fail with an exception of Python of that name; tell when, on stderr."""
    def fail(*_: Any, **__: Any) -> bytes:
        raise getattr(__import__("builtins"), kind)(text)

    pictures.as_png = fail


@hook
def events_fail() -> None:
    """Have TensorBoard's thread find the disk full."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    def fail(self: RecordWriter, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    RecordWriter.write = fail


@hook
def without_module(name: str) -> None:
    """Have no module of that name, as where it is not installed."""
    sys.modules[name] = None  # pyright: ignore[reportArgumentType]


@hook
def become_user(number: int) -> None:
    """Be a user that no passwd file knows, without HOME, as in a container."""
    os.environ.pop("HOME", None)
    os.setgroups([])
    os.setgid(number)
    os.setuid(number)
