"""People's own code, `FILE.py:NAME` in a flag: a class, a function or an object. The file is run once in each process,
after `--seed` is set, and finds its neighbours. An error in it is one line: `--model my.py:Net: my.py line 12: ...`."""

import ast
import contextlib
import functools
import hashlib
import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from launch import failure, files, stop
from launch.errors import UsageError, first_line, is_users, nearest, to_stderr
from trainers.engine.dropout import seed_own_code

FLAGS = ("model", "loss", "transform", "optimizer", "metric", "data")
OURS = tuple(files.ROOT / name for name in ("launch", "datasets", "trainers"))
TASK = str(files.ROOT / "trainers" / "engine" / "task.py")
THEIRS_BELOW = {"--model": "apply", "--loss": "one_number"}  # the functions of task.py that call people's code
OPTIMIZERS = ("sgd", "adam", "adamw", "rmsprop", "muon")
TIMM = "timm/"  # before the names of the package timm, of networks and of optimizers


def is_reference(text: Any) -> bool:
    """Whether a flag's value is `FILE.py:NAME`, and not one of our names."""
    return isinstance(text, str) and re.fullmatch(r".*[^/]\.py:\w+", text) is not None


@dataclass(frozen=True)
class Reference:
    """Something in a file of the user's. Small enough to be sent to a worker, which runs the file itself."""
    flag: str
    text: str  # FILE.py:NAME

    @property
    def path(self) -> Path:
        """Of the file, absolute."""
        return Path(self.text.rpartition(":")[0]).expanduser().resolve()

    @property
    def name(self) -> str:
        """What is asked for in it."""
        return self.text.rpartition(":")[2]

    def module(self) -> ModuleType:
        """The file, run; the first time in this process only. UsageError if there is none, or it fails."""
        path = self.path
        known = f"users_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
        if known in sys.modules:
            return sys.modules[known]
        try:
            source = path.read_bytes()
        except OSError as error:
            raise UsageError(f"{self.flag} {self.text}: no such file ({error.strerror}); give the path of one that "
                             f"defines {self.name}") from None
        if str(path.parent) not in sys.path:
            sys.path.insert(1, str(path.parent))  # behind our own packages
        module = sys.modules[known] = ModuleType(known)
        module.__file__ = str(path)
        try:
            with blaming([self]):
                exec(compile(source, str(path), "exec"), module.__dict__)  # not imported: it may change within a second
        except UsageError:
            del sys.modules[known]
            raise
        return module

    def find(self) -> Any:
        """The object itself; UsageError if the file has none of that name."""
        found = vars(self.module())
        if self.name not in found:
            raise UsageError(f"{self.flag} {self.text}: the file has no {self.name}; give a name that it defines"
                             f"{nearest(self.name, found)}")
        return found[self.name]

    def make(self, offered: Mapping[str, Any], *positional: Any, options: Mapping[str, Any] | None = None) -> Any:
        """Call it with what its signature asks for of `offered`, and with all options; UsageError if that fails."""
        with blaming([self], made := self.find()):
            return call(made, offered, *positional, options=options)

    def extra(self, name: str) -> Any:
        """A function that may stand beside it in the file, such as `logits` or `collate`; None if it does not."""
        return vars(self.module()).get(name)

    def explain(self, error: BaseException, place: str = "") -> Exception:
        """An error of the user's code as one that names the file, its line and the place, such as a sample."""
        if is_users(error):
            return error  # pyright: ignore[reportReturnType]
        return UsageError(f"{self.flag} {self.text}: {fault(error, [self])}{f' ({place})' if place else ''}")

    def is_theirs(self, filename: str) -> bool:
        """Whether a line of code is the user's: of this file, or of a neighbour that no package brought."""
        path, own = Path(filename), self.path
        foreign = (sys.prefix, sys.base_prefix, *(OURS if own.is_relative_to(files.ROOT) else (files.ROOT,)))
        return path == own or (path.is_relative_to(own.parent) and "site-packages" not in path.parts
                               and not any(map(path.is_relative_to, foreign)))


def call(made: Any, offered: Mapping[str, Any], *positional: Any, options: Mapping[str, Any] | None = None) -> Any:
    """Call something with what its signature asks for of `offered`, and with all options."""
    signature = inspect.signature(made)
    chosen = {key: value for key, value in offered.items() if key in signature.parameters} | dict(options or {})
    signature.bind(*positional, **chosen)  # its TypeError names what is missing, or of no meaning
    return made(*positional, **chosen)


def references(config: Any) -> list[Reference]:
    """Every flag of a config that names people's own code."""
    return [Reference(f"--{name}", text) for name in FLAGS if is_reference(text := str(getattr(config, name, None)))]


def absolute(text: str) -> str:
    """A name as it is; FILE.py:NAME with the whole path, for who reads it in another folder."""
    reference = Reference("", text)
    return f"{reference.path}:{reference.name}" if is_reference(text) else text


def load_all(config: Any) -> dict[str, str]:
    """Run every file that the flags name, `--seed` set before; the sha256 of each and of its neighbours, by path."""
    found = references(config)
    for reference in found:
        seed_everything(config.seed)
        reference.find()
    names = sorted({getattr(module, "__file__", None) or "" for module in list(sys.modules.values())})
    return {name: hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in names
            if any(each.is_theirs(name) for each in found) and Path(name).is_file()}


def made_again(reference: Reference, seed: int) -> Any:
    """What a flag names, in a process that may not have run the file yet; a class is made."""
    seed_everything(seed)
    found = reference.find()
    return reference.make({}) if isinstance(found, type) else found


def own_transform(config: Any, *, decodes: bool = False) -> Any:
    """`--transform` as datasets.samples.Own, of images that are decoded or in memory; None without."""
    if config.transform is None:
        return None
    reference = Reference("--transform", config.transform)
    return (functools.partial(made_again, reference, config.seed), reference.explain, f"--transform {config.transform}",
            {"workers": config.num_workers(decodes=decodes), "prepare_worker": stop.ignore_signals, "warn": to_stderr})


def seed_everything(seed: int) -> None:
    """torch's, Python's and numpy's own generators."""
    torch.manual_seed(seed)
    seed_own_code(seed)


@contextlib.contextmanager
def blaming(known: Iterable[Reference], made: Any = None) -> Iterator[None]:
    """Turn what is raised in, or through, people's code into a UsageError that names file and line, but for a lost rank
    or a lack of memory. With `made`, what was called is theirs, even if it failed before its first line."""
    try:
        yield
    except (Exception, SystemExit) as error:  # `sys.exit` in a file of theirs is no success
        if is_users(error):
            raise
        known, frames = list(known), [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        through = [each for each in known if any(each.is_theirs(frame.f_code.co_filename) for frame in frames)
                   or (isinstance(error, SyntaxError) and each.is_theirs(str(error.filename)))]
        if not through:  # a network, or a loss, that is the user's but whose lines are torch's
            ours = {frame.f_code.co_name for frame in frames if frame.f_code.co_filename == TASK}
            through = [each for each in known if made is not None or THEIRS_BELOW.get(each.flag) in ours]
            made = through[0].find() if made is None and through else made
        raised_there = any(each.is_theirs(frames[-1].f_code.co_filename) for each in through)
        if not through or (isinstance(error, Exception) and not raised_there and is_users(failure.translated(error))):
            raise
        names = {getattr(frame.f_code, "co_qualname", frame.f_code.co_name).partition(".")[0] for frame in frames}
        culprit = next((each for each in through if each.name in names), through[0])
        raise UsageError(f"{culprit.flag} {culprit.text}: {fault(error, through, made)}") from error


def fault(error: BaseException, known: list[Reference], made: Any = None) -> str:
    """`my.py line 12: ValueError: message`: the innermost line of theirs, else where the thing called is defined."""
    lines = [(frame.f_code.co_filename, number) for frame, number in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        lines.append((str(error.filename), error.lineno or 0))
    lines = [line for line in lines if any(each.is_theirs(line[0]) for each in known)]
    if not lines and made is not None:
        with contextlib.suppress(OSError, TypeError):
            lines = [(inspect.getfile(made), inspect.getsourcelines(made)[1])]
    given = {str(each.path): each.text.rpartition(":")[0] for each in known}
    where = f"{given.get(lines[-1][0], Path(lines[-1][0]).name)} line {lines[-1][1]}: " if lines else ""
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    if isinstance(error, ImportError | AttributeError) and re.search(r"'datasets\b", message):
        message += ("; `datasets` is a folder of this project, not Hugging Face's package: export once, elsewhere, to "
                    "Parquet (load_dataset(...).to_parquet(FILE)), then datasets/pack.py, or write an image folder")
    return f"{where}{type(error).__name__}: {message}"


def options_in(words: Iterable[str], flag: str) -> dict[str, Any]:
    """`depth=3 name=wide` as a dict: Python literals, else text; UsageError for a word without a `=`."""
    options = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"{flag} {word}: must be key=value, such as depth=3")
        options[name] = value
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            options[name] = ast.literal_eval(value)
    return options


def check_loss(config: Any, known: Collection[str]) -> None:
    """Raise UsageError for an unknown `--loss`, or one that knows nothing of the flags of cross-entropy."""
    loss = config.loss
    if loss not in known and not is_reference(loss):
        raise UsageError(f"--loss {loss}: unknown; choose {', '.join(known)} or FILE.py:NAME{nearest(loss, [*known])}")
    if loss != "cross-entropy" and (config.label_smoothing or config.class_weights):
        raise UsageError(f"--loss {loss}: takes no --label-smoothing or --class-weights, which are of cross-entropy")


def timm_library(flag: str, module: str = "timm") -> Any:
    """The package timm, or a module of it; UsageError without."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(f"{flag} {TIMM}NAME: needs timm ({first_line(error)}); pip install -e .[timm]") from None


def check_optimizer(config: Any) -> None:
    """Raise UsageError for an unknown `--optimizer`, or a `--betas` or `--eps` that it does not take."""
    name, known = config.optimizer, OPTIMIZERS
    choices = f"{', '.join(OPTIMIZERS)}, timm/NAME or FILE.py:NAME"
    takes = {"sgd": (), "rmsprop": ("eps",)}.get(name, ("betas", "eps"))
    if name.startswith(TIMM) and not is_reference(name):
        optim = timm_library("--optimizer", "timm.optim")
        infos = {TIMM + each: optim.get_optimizer_info(each) for each in optim.list_optimizers()}
        known = tuple(each for each, info in infos.items() if not info.second_order)
        choices = "a name of timm.optim.list_optimizers() behind timm/, of the first order"
        takes = [flag for flag in takes if getattr(infos.get(name), f"has_{flag}", False)]
    if name not in known and not is_reference(name):
        raise UsageError(f"--optimizer {name}: unknown; choose {choices}{nearest(name, known)}")
    for flag in ("betas", "eps"):
        if getattr(config, flag) is not None and flag not in takes:
            raise UsageError(f"--{flag}: {name} has none to set; leave it out, or use adamw")
