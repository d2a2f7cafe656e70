"""The flags that every trainer shares. A trainer's own config inherits from TrainConfig and adds its own.

Each field is a flag (`--batch-size` or `--batch_size`), its docstring the help, None means off.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from launch.errors import UsageError
from launch.launcher import read_launch
from trainers.engine.parallel import ParallelName
from trainers.engine.precision import PrecisionName
from trainers.engine.schedule import ScheduleName

# A resumed run may differ in these: they change where, how long and how fast it runs, not what is learned.
MAY_CHANGE = frozenset({
    "data_dir", "download", "output_dir", "run_name", "epochs", "max_steps", "accumulation_steps", "device", "backend",
    "parallel", "compile", "channels_last", "workers", "threads", "onednn", "deterministic", "eval_every",
    "checkpoint_every", "keep_checkpoints", "resume", "evaluate", "timeout", "tensorboard", "init_from",
    "pictures", "log_gradients", "show_batch", "save_weights",
    "cache", "cache_dir", "skip_bad",  # of image_folder.py: how images are read, and what is forgiven
})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Flags shared by all trainers."""

    recipe: str = "default"
    """Named set of defaults, which other flags override."""
    data_dir: Path = Path("data")
    """Folder of the data sets, torchvision's root."""
    download: bool = False
    """Fetch the data set if it is not there: one rank per node does, the others wait."""
    output_dir: Path = Path("runs")
    """Folder of the run folders."""
    run_name: str | None = None
    """Folder of this run inside --output-dir; a run of that name goes on where it was. Default: trainer, recipe, id."""
    epochs: int = 10
    """Passes over the training set."""
    max_steps: int | None = None
    """Stop after so many optimizer steps, even within an epoch."""
    batch_size: int = 512
    """GLOBAL batch: samples per optimizer step, summed over all ranks and accumulation steps."""
    accumulation_steps: int = 1
    """Micro-batches whose gradients are added up before each optimizer step."""
    model: str = "net"
    """Network, by name."""
    optimizer: Literal["sgd", "adam", "adamw", "rmsprop", "muon"] = "sgd"
    """Update rule (torch.optim). muon updates weight matrices, and AdamW the rest."""
    learning_rate: Annotated[float, tyro.conf.arg(aliases=["--lr"])] = 0.1
    """Peak rate, at the global batch size."""
    momentum: float = 0.9
    """Of sgd, rmsprop and muon."""
    nesterov: bool = False
    """Nesterov's momentum, for sgd."""
    weight_decay: float = 0.0
    """L2 penalty, decoupled in adamw and muon."""
    norm_bias_lr_scale: float = 1.0
    """Factor on the learning rate of normalisation biases."""
    schedule: ScheduleName = "constant"
    """Learning-rate curve over the run."""
    warmup_steps: int = 0
    """Steps over which the rate first rises linearly."""
    label_smoothing: float = 0.0
    """Share of the target probability that is spread over all classes."""
    class_weights: tuple[float, ...] = ()
    """A factor on the loss of each class's samples, one per class; to make up for rare classes."""
    clip_grad_norm: float | None = None
    """Largest allowed norm of all gradients together, after unscaling."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights, and evaluate that."""
    freeze: tuple[str, ...] = ()
    """Parts of the model that are not trained: names, prefixes or patterns with *. Frozen BatchNorm stays fixed."""
    precision: PrecisionName = "fp32"
    """Autocast type; fp32 turns autocast off."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: this rank's GPU if there is one."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """auto: nccl on GPUs, gloo on CPUs."""
    parallel: ParallelName = "auto"
    """auto: ddp under torchrun or srun, else none. dp: DataParallel over the GPUs of one process."""
    compile: bool = False
    """torch.compile the model."""
    channels_last: bool = False
    """Keep images and convolutions in NHWC memory order."""
    workers: int = 0
    """DataLoader workers per rank, for data that is decoded from files."""
    threads: int | None = None
    """Threads per rank. Default: OMP_NUM_THREADS, else usable cores / ranks on the node."""
    seed: int = 0
    """Of weights, order, augmentation and dropout."""
    onednn: bool = True
    """oneDNN's CPU kernels; without, `net` is 1.3 times faster at batch 4, and twice as slow at 128."""
    deterministic: bool = False
    """Only deterministic kernels: bit-identical GPU runs, slower."""
    eval_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    checkpoint_every: int | None = None
    """Steps between checkpoints. Default: one an epoch. The last step is always saved."""
    keep_checkpoints: int = 2
    """How many of the newest to keep, besides the best."""
    resume: str = "auto"
    """auto: from the newest checkpoint of the run, if any. never: start over. Or the path of a checkpoint."""
    init_from: Path | None = None
    """Start from the weights of a file: ours, torchvision's references', timm's or a plain state_dict."""
    evaluate: Path | None = None
    """Evaluate this checkpoint, train nothing."""
    timeout: float = 300
    """Seconds that a collective may take before the rank that hangs is named and the job ends."""
    max_bad_steps: int = 10
    """Consecutive steps with a non-finite loss after which the run stops."""
    tensorboard: bool = False
    """Write TensorBoard event files to the run folder."""
    pictures: bool = True
    """Draw curves, confusion matrix and predictions into the run folder."""
    log_gradients: bool = False
    """Add the norm of each layer's gradient to every reported training line, and to TensorBoard."""
    show_batch: bool = False
    """Draw the first training batch as the network sees it into the run folder."""
    save_weights: bool = False
    """Write the final weights alone, a plain state_dict, to weights.pt in the run folder."""

    measure: str | None = None
    """Time so many steps after leaving others out, WARMUP:STEPS, write the figures to result.json, and stop."""

    def rank_batch_size(self) -> int:
        """Samples per rank per micro-batch, from the launcher's world size.

        Raises:
            UsageError: if the global batch does not divide.
        """
        world_size = read_launch().world_size
        parts = world_size * self.accumulation_steps
        if self.batch_size % parts:
            nearest = max(parts, (self.batch_size + parts // 2) // parts * parts)
            raise UsageError(f"--batch-size {self.batch_size}: not divisible by {world_size} ranks x "
                             f"{self.accumulation_steps} accumulation steps; try {nearest}")
        return self.batch_size // parts

    def batches(self) -> dict[str, int]:
        """What a training loader is told of the batch."""
        return {"batch_size": self.batch_size, "rank_batch_size": self.rank_batch_size(), "seed": self.seed}

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run, of so many per epoch."""
        steps = self.epochs * steps_per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def check(self) -> None:
        """Find what cannot work before any rank waits for another.

        Raises:
            UsageError: naming the flag and its rule.
        """
        for name in ("epochs", "batch_size", "accumulation_steps", "eval_every", "keep_checkpoints", "max_bad_steps",
                     "max_steps", "checkpoint_every", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} {value}: must be at least 1")
        for name in ("learning_rate", "momentum", "weight_decay", "label_smoothing", "warmup_steps", "workers"):
            if getattr(self, name) < 0:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: must not be negative")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UsageError(f"--ema-decay {self.ema_decay}: must lie between 0 and 1, such as 0.999")
        if any(not 0 <= weight < float("inf") for weight in self.class_weights):
            raise UsageError(f"--class-weights {' '.join(map(str, self.class_weights))}: must not be negative")
        if self.label_smoothing >= 1:
            raise UsageError(f"--label-smoothing {self.label_smoothing}: must be below 1")
        if self.measure is not None:
            measured_steps(self.measure)
        if self.compile and self.parallel == "dp":  # nn.Module.compile keeps the original's bound method in each copy
            raise UsageError("--compile with --parallel dp: DataParallel's copies of a compiled model would all run "
                             "the original; leave --compile out, or use torchrun and --parallel ddp")
        if self.timeout <= 0:
            raise UsageError(f"--timeout {self.timeout}: must be positive")
        self.rank_batch_size()


def measured_steps(text: str) -> tuple[int, int]:
    """`20:100` as (20, 100): steps left out, steps timed.

    Raises:
        UsageError: if it is anything else, or no step would be timed.
    """
    warmup, _, steps = text.partition(":")
    if not (warmup.isdecimal() and steps.isdecimal() and int(steps) > 0):
        raise UsageError(f"--measure {text}: must be WARMUP:STEPS, such as 20:100")
    return int(warmup), int(steps)
