"""The flags that every trainer shares; its own config inherits from TrainConfig and adds others.
Each field is a flag, its docstring the help, None means off. A number's range (launch/errors.py) stands beside it."""

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from launch.errors import LARGEST, MOST_SECONDS, Above, AtLeast, UsageError, check_numbers
from launch.launcher import default_workers, read_launch
from trainers.engine.parallel import ParallelName
from trainers.engine.precision import PrecisionName
from trainers.engine.schedule import ScheduleFlags
from trainers.engine.trackers.tracker import TrackerName
from trainers.engine.user_code import check_loss, check_optimizer, is_reference, options_in

# A resumed run may differ in these: they change where, how long and how fast it runs, not what is learned.
MAY_CHANGE = frozenset({
    "data_dir", "download", "output_dir", "run_name", "epochs", "max_steps", "accumulation_steps", "device", "backend",
    "parallel", "find_unused_parameters", "compile", "compile_mode", "channels_last", "workers", "threads", "onednn",
    "deterministic", "eval_every", "checkpoint_every", "keep_checkpoints", "resume", "evaluate", "timeout", "track",
    "tensorboard", "metric", "init_from", "config", "dry_run", "patience", "pictures", "log_gradients", "show_batch",
    "profile", "save_weights", "cache", "cache_dir", "skip_bad"})

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std per channel, in units of the full range [0, 1]
IMAGENET: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # torchvision's weights expect these


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ScheduleFlags):
    """Flags shared by all trainers."""
    TITLES: ClassVar = {"data_dir": "Data", "model": "Model", "optimizer": "Optimization", "device": "Distribution",
                        "output_dir": "Saving and resuming", "eval_every": "Reporting"}  # --help's, by the first flag
    # What a recipe sets of its own model, or loss, and leaves alone where --model names another, --loss FILE.py:NAME.
    OF_A_MODEL: ClassVar = ("width", "channels", "hidden", "dropout", "model_options", "freeze")
    OF_A_LOSS: ClassVar = ("label_smoothing", "class_weights")

    recipe: str = "default"
    """Named set of defaults, which other flags override."""
    config: Path | None = None
    """Flags from a file, JSON such as a run's config.json, or YAML: over the recipe's, below those given here."""
    given: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()  # no flag: the names of those on the command line
    in_file: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()  # and of those in --config (command_line.parse)

    data_dir: Path = Path("data")
    """Folder of the data sets, torchvision's root."""
    download: bool = False
    """Fetch the data set if it is not there: one rank per node does, the others wait."""
    validation_fraction: Annotated[float | None, Above(0, below=1, such_as=0.2)] = None
    """Set this share of each class of the training set apart, choose best.pt by it, and test once, at the end."""
    batch_size: Annotated[int, AtLeast(1)] = 512
    """GLOBAL batch: samples per optimizer step, summed over all ranks and accumulation steps."""
    accumulation_steps: Annotated[int, AtLeast(1)] = 1
    """Micro-batches whose gradients are added up before each optimizer step."""
    workers: Annotated[int | None, AtLeast(0, most=1024)] = None
    """DataLoader workers per rank. Default: where images are decoded, the rank's usable cores but one, at most 8."""
    seed: Annotated[int, AtLeast(-2**63, most=2**64 - 1)] = 0  # what torch.manual_seed takes
    """Of weights, order, augmentation and dropout."""

    model: str = "net"
    """Network, by name, or FILE.py:NAME: a class, function or module of yours."""
    model_options: tuple[str, ...] = ()
    """key=value ...: what the network is made with, besides num_classes and image_size where it asks for them."""
    init_from: Path | None = None
    """Start from the weights of a file: ours, torchvision's references', timm's or a plain state_dict."""
    freeze: tuple[str, ...] = ()
    """Parts of the model that are not trained: names, prefixes or patterns with *. Frozen BatchNorm stays fixed."""
    ema_decay: Annotated[float | None, Above(0, below=1, such_as=0.999)] = None
    """Keep an exponential moving average of the weights, and evaluate that."""
    ema_warmup_steps: Annotated[int, AtLeast(0)] = 0
    """Let the average follow faster at first: after t steps its decay is at most (1 + t) / (this + t)."""
    precision: PrecisionName = "fp32"
    """Autocast type; fp32 turns autocast off."""
    compile: bool = False
    """torch.compile the model."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    """What torch.compile aims at."""
    channels_last: bool = False
    """Keep images and convolutions in NHWC memory order."""

    optimizer: str = "sgd"
    """sgd, adam, adamw, rmsprop, muon (matrices and filters; AdamW for the rest), timm/NAME, or FILE.py:NAME: yours."""
    optimizer_options: tuple[str, ...] = ()
    """key=value ...: further arguments of the optimizer."""
    momentum: Annotated[float, AtLeast(0, below=1)] = 0.9
    """Of sgd, rmsprop and muon."""
    nesterov: bool = False
    """Nesterov's momentum, for sgd."""
    weight_decay: Annotated[float, AtLeast(0)] = 0.0
    """L2 penalty, decoupled in adamw and muon."""
    betas: Annotated[tuple[float, float] | None, AtLeast(0, below=1)] = None
    """Of adam, adamw and what muon leaves to AdamW. Default: torch's 0.9 0.999."""
    eps: Annotated[float | None, AtLeast(0)] = None
    """Of the same and of rmsprop. Default: torch's 1e-8."""
    no_decay: tuple[str, ...] = ()
    """Parameters without weight decay: norm, bias, and names, prefixes or patterns with *."""
    layer_decay: Annotated[float, Above(0, most=1)] = 1.0
    """Factor on the learning rate from each layer to the one before it; to fine-tune."""
    norm_bias_lr_scale: Annotated[float, Above(0)] = 1.0
    """Factor on the learning rate of normalisation biases."""
    label_smoothing: Annotated[float, AtLeast(0, below=1)] = 0.0
    """Share of the target probability that is spread over all classes."""
    class_weights: Annotated[tuple[float, ...], AtLeast(0)] = ()
    """A factor on the loss of each class's samples, one per class; to make up for rare classes."""
    clip_grad_norm: Annotated[float | None, Above(0)] = None
    """Largest allowed norm of all gradients together, after unscaling."""
    max_bad_steps: Annotated[int, AtLeast(1)] = 10
    """Consecutive steps with a non-finite loss after which the run stops."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: this rank's GPU if there is one."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """auto: nccl on GPUs, gloo on CPUs."""
    parallel: ParallelName = "auto"
    """auto: ddp under torchrun or srun, else none. dp: DataParallel over the GPUs of one process."""
    comm_hook: Literal["none", "bf16", "fp16"] = "none"
    """Type in which DDP sends gradients: half the traffic, rounded."""
    find_unused_parameters: bool = False
    """Let parameters go without a gradient under DDP, at the cost of a search in every step."""
    sync_bn: bool = False
    """BatchNorm over the batch of all ranks (CUDA)."""
    threads: Annotated[int | None, AtLeast(1, most=1024)] = None
    """Threads per rank. Default: OMP_NUM_THREADS, else usable cores / ranks on the node."""
    onednn: bool = True
    """oneDNN's CPU kernels; without, `net` is 1.3 times faster at batch 4, and twice as slow at 128."""
    deterministic: bool = False
    """Only deterministic kernels: bit-identical GPU runs, slower."""
    timeout: Annotated[float, Above(0, most=MOST_SECONDS)] = 300
    """Seconds without progress before the rank that hangs is named and the job ends; with one rank, without data."""

    output_dir: Path = Path("runs")
    """Folder of the run folders."""
    run_name: str | None = None
    """Folder of this run inside --output-dir; a run of that name resumes. Default: trainer, recipe, id."""
    checkpoint_every: Annotated[int | None, AtLeast(1)] = None
    """Steps between checkpoints. Default: one per epoch. The last step is always saved."""
    keep_checkpoints: Annotated[int, AtLeast(1)] = 2
    """How many of the newest to keep, besides the best."""
    resume: str = "auto"
    """auto: from the newest checkpoint of the run, if any. never: start over. Or the path of a checkpoint."""
    save_weights: bool = False
    """Write the final weights alone, a plain state_dict, to weights.pt in the run folder."""

    eval_every: Annotated[int, AtLeast(1)] = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    best: Literal["accuracy", "top5", "loss"] | None = None
    """The figure by which an evaluation is the best. Default: accuracy, without classes the loss."""
    patience: Annotated[int | None, AtLeast(1)] = None
    """Evaluations without a better one after which training ends."""
    evaluate: Path | None = None
    """Evaluate this, train nothing: a checkpoint, or a file of weights as --init-from takes it."""
    track: tuple[TrackerName, ...] = ()
    """Experiment trackers that get every line of metrics.jsonl; offline where there is no network."""
    tensorboard: bool = False
    """The same as --track tensorboard: event files in the run folder."""
    pictures: bool = True
    """Draw curves, confusion matrix and predictions into the run folder."""
    metric: str | None = None
    """FILE.py:NAME, of (outputs, targets) of the whole test set: a number for result.json, or a dict of them."""
    log_gradients: bool = False
    """Add the norm of each layer's gradient to every reported training line, and to TensorBoard."""
    show_batch: bool = False
    """Draw the first training batch as the network sees it into the run folder."""
    dry_run: bool = False
    """Take a few steps, save and load in a temporary place, say what the run would take, and keep nothing."""
    measure: str | None = None
    """Time so many steps after leaving others out, WARMUP:STEPS, write the figures to result.json, and stop."""
    profile: str | None = None
    """Record so many steps from one on, STEP:STEPS, by torch.profiler: profile/rank-R.* in the run folder."""

    @staticmethod
    def translated(saved: Mapping[str, Any]) -> dict[str, Any]:
        """A saved config in the flags of today: `normalize` and `half_statistics` were true or false once."""
        config = dict(saved)
        if isinstance(config.get("normalize"), bool):
            config["normalize"] = "dataset" if config["normalize"] else "none"
        if "half_statistics" in config:
            config["normalize"] = "half" if config.pop("half_statistics") else "dataset"
        return config

    def rank_batch_size(self) -> int:
        """Samples per rank per micro-batch; UsageError if the batch does not divide and something is trained."""
        world_size = read_launch().world_size
        parts = world_size * self.accumulation_steps
        if self.batch_size % parts and self.evaluate is None:
            nearest = max(parts, (self.batch_size + parts // 2) // parts * parts)
            raise UsageError(f"--batch-size {self.batch_size}: not divisible by {world_size} ranks x "
                             f"{self.accumulation_steps} accumulation steps; try {nearest}")
        return self.batch_size // parts

    def batches(self) -> dict[str, int]:
        """What a training loader is told of the batch."""
        return {"batch_size": self.batch_size, "rank_batch_size": self.rank_batch_size(), "seed": self.seed}

    def num_workers(self, *, decodes: bool = False) -> int:
        """--workers; by default none, or where images are decoded what the cores of the node leave to each rank."""
        default = default_workers(read_launch().local_world_size) if decodes else 0
        return default if self.workers is None else self.workers

    def trackers(self) -> list[TrackerName]:
        """The names of all trackers that are asked for, once each."""
        return list(dict.fromkeys([*self.track, "tensorboard"] if self.tensorboard else self.track))

    def check(self) -> None:
        """Raise UsageError for what cannot work, before any rank waits for another. `open_run` calls it."""
        check_numbers(self)  # of a config that no command line made
        for name in self.trackers():
            if getattr(importlib.util.find_spec(name), "origin", None) is None:  # an empty folder of that name is none
                extra = "" if name == "tensorboard" else f"[{name}]"
                raise UsageError(f"--track {name}: not installed; pip install -e .{extra}")
        for flag, form in (("measure", "WARMUP:STEPS"), ("profile", "STEP:STEPS")):
            if (text := getattr(self, flag)) is not None:
                measured_steps(text, flag=f"--{flag}", form=form)
        check_optimizer(self)
        for flag in ("metric", "transform"):
            if (text := getattr(self, flag, None)) is not None and not is_reference(text):
                raise UsageError(f"--{flag} {text}: must be FILE.py:NAME")
        options_in(self.model_options, "--model-options")
        options_in(self.optimizer_options, "--optimizer-options")
        if self.compile and self.parallel == "dp":  # nn.Module.compile keeps the original's bound method in each copy
            raise UsageError("--compile with --parallel dp: DataParallel's copies would all run the original; leave "
                             "--compile out, or use torchrun and --parallel ddp")
        if self.compile_mode != "default" and not self.compile:
            raise UsageError(f"--compile-mode {self.compile_mode}: does nothing alone; add --compile")
        if self.ema_warmup_steps and self.ema_decay is None:
            raise UsageError(f"--ema-warmup-steps {self.ema_warmup_steps}: does nothing alone; add --ema-decay 0.999")
        self.check_schedule()
        self.rank_batch_size()


@dataclass(frozen=True, kw_only=True)
class ImageConfig(TrainConfig):
    """Flags shared by the trainers of image classifiers."""
    TITLES: ClassVar = {"normalize": "Data"}
    SIZE: ClassVar = 32  # height and width of the images, where no flag says so
    OLD_SPELLINGS: ClassVar = {  # of flags without a value
        "--normalize": ("--normalize", "dataset"), "--no-normalize": ("--normalize", "none"),
        "--half-statistics": ("--normalize", "half"), "--no-half-statistics": ("--normalize", "dataset")}
    loss: str = "cross-entropy"
    """cross-entropy, bce (each class against the rest), or FILE.py:NAME: yours, of (outputs, targets)."""
    transform: str | None = None
    """FILE.py:NAME, of one uint8 image (C, H, W) at full size, in the place of fit, crop, flip and normalisation; with
    a parameter `train` it serves evaluation too."""
    normalize: Literal["none", "half", "dataset", "imagenet"] = "dataset"
    """Mean and std taken out of each channel: none leaves [0, 1], half is 0.5 and 0.5, dataset the training images'."""
    shift: Annotated[int, AtLeast(0, most=8191)] = 0
    """Random crop: pixels of padding on each side."""
    padding: Literal["reflect", "zeros"] = "reflect"
    """What the padding shows."""
    flip: Literal["random", "alternating"] | None = None
    """Mirror half of the images; alternating shows each side every other epoch."""

    def size(self) -> int:
        """Height and width of the images that the network sees."""
        return self.SIZE

    def network(self) -> dict[str, Any]:
        """What models.build needs besides the number of classes: the name of the network, and its options or None."""
        size = {"image_size": self.size()} if is_reference(self.model) else {}
        own = {name: getattr(self, name, None) for name in ("width", "channels", "hidden", "dropout")}  # as OF_A_MODEL
        return {"name": self.model, **own, **size, **options_in(self.model_options, "--model-options")}

    def check(self) -> None:
        """The same, and that no image is shifted out of itself, where reflected padding ends too."""
        super().check()
        if self.shift >= (size := getattr(self, "train_size", None) or self.size()):
            raise UsageError(f"--shift {self.shift}: must be below the image size of {size}")
        if self.loss != "bce":  # which takes all that cross-entropy does
            check_loss(self, ("cross-entropy", "bce"))

    def augmentation(self, dataset: Statistics) -> dict[str, Any]:
        """The arguments of Augmentation; `dataset` is what `--normalize dataset` stands for."""
        zero, half, one = ((value,) * len(dataset[0]) for value in (0.0, 0.5, 1.0))
        known = {"none": (zero, one), "half": (half, half), "dataset": dataset, "imagenet": IMAGENET}
        moved = {name: getattr(self, name) for name in ("seed", "shift", "padding", "flip")}
        return {"mean": known[self.normalize][0], "std": known[self.normalize][1], **moved}


def measured_steps(text: str, *, flag: str = "--measure", form: str = "WARMUP:STEPS") -> tuple[int, int]:
    """`20:100` as (20, 100): steps left out, steps taken. UsageError for anything else, or if no step is taken."""
    match = re.fullmatch(r"(\d{1,10}):(\d{1,10})", text)
    warmup, steps = map(int, match.groups()) if match else (0, 0)
    if warmup > LARGEST or not 0 < steps <= LARGEST:
        raise UsageError(f"{flag} {text}: must be {form}, such as 20:100, each at most {LARGEST:,}")
    return warmup, steps
