"""Train your own network on your own data, with your own loss, from one file of yours.

    python trainers/custom.py --data my.py:load --model my.py:Net --loss my.py:loss --workers 2
    python trainers/custom.py --dataset synthetic                       # no data at hand

`load(data_dir)` returns (train, test) or (train, validation, test): map-style data sets of (input, target)."""

import functools
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

if not __package__:  # run by path: our packages, not others of the same names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.stop import begin_script, ignore_signals

begin_script(__name__)  # before torch is imported, which takes seconds

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset, default_collate

from datasets import augment, mixing, samples, synthetic
from datasets.errors import DataError
from datasets.images.loaders import Key
from launch.command_line import run
from launch.errors import AtLeast, UsageError, to_stderr
from launch.process_group import World, gather
from trainers import models
from trainers.engine import session, trainer, user_code
from trainers.engine.config import TrainConfig
from trainers.engine.run.card import CARD_FILE, ModelCard
from trainers.engine.task import Loss, Metric, MixingFlags, Task, classification_task, with_own_code

Kind = Literal["classes", "labels", "numbers"]  # what the targets are
KINDS: dict[str, Kind] = {"cross-entropy": "classes", "bce": "labels", "mse": "numbers"}


@dataclass(frozen=True, kw_only=True)
class CustomConfig(MixingFlags, TrainConfig):
    """Train your own network on your own data."""
    dataset: Literal["own", "synthetic", "given"] = "own"
    """own is --data; synthetic is generated from the seed; given is for Python programs, which hand it over."""
    data: str | None = None
    """FILE.py:NAME, a function of data_dir that returns (train, test) or (train, validation, test)."""
    num_classes: Annotated[int | None, AtLeast(1)] = None
    """Classes, where the training set has no `.classes`; outputs of the network, where there are none."""
    loss: str = "auto"
    """cross-entropy for class numbers, bce for rows of 0 and 1, else mse; auto chooses. FILE.py:NAME: yours."""
    batch_size: Annotated[int, AtLeast(1)] = 32
    """GLOBAL batch: samples per optimizer step, summed over all ranks and accumulation steps."""

    def check(self) -> None:
        """Find mistakes in the flags before ranks wait for each other."""
        super().check()
        if self.dataset != "given":
            models.check_name(self.model, models.OURS | models.GREY)
        if self.dataset == "own" and not user_code.is_reference(self.data):
            raise UsageError(f"--data {self.data}: must be FILE.py:NAME, a function of yours; or --dataset synthetic")
        self.check_mixing(self.batch_size, 0 if self.evaluate is not None else self.rank_batch_size())
        if self.loss != "auto":
            user_code.check_loss(self, KINDS)


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a Python program hands over, not by flags that name files."""
    splits: samples.Splits | None = None
    model: Callable[..., Any] | nn.Module | None = None
    loss: Loss | None = None
    metric: Metric | None = None
    explain: samples.Explain | None = None


class Facts(NamedTuple):
    """What the data says about the task."""
    kind: Kind
    names: tuple[str, ...]  # of the network's outputs
    shape: tuple[int, ...]  # of one sample's inputs; empty if they are no single tensor


def open_own(reference: user_code.Reference, data_dir: Path, seed: int) -> samples.Splits:
    """Run the user's file and call its function, in the process that will read the samples."""
    user_code.seed_everything(seed)
    reference.find()
    user_code.seed_everything(seed)  # again: the file may have run before
    return splits_in(reference.make({"data_dir": data_dir}), reference.extra("collate"), reference.text)


def splits_in(found: Any, collate: Any, name: str) -> samples.Splits:
    """What a user's function returned; UsageError if that is no two or three data sets."""
    if not isinstance(found, tuple | list) or len(found) not in (2, 3):
        raise UsageError(f"--data {name}: gives {type(found).__name__}, not (train, test) or (train, validation, test)")
    return samples.Splits(train=found[0], validation=found[1] if len(found) == 3 else None, test=found[-1],
                          collate=collate if callable(collate) else default_collate)


def wanted(opening: Callable[[], samples.Splits], config: CustomConfig) -> samples.Splits:
    """The splits that a run needs: `--validation-fraction` of the training set apart, for --evaluate the test set."""
    splits, fraction, name = opening(), config.validation_fraction, f"--data {config.data or 'given'}"
    for split in ("test",) if config.evaluate is not None else ("test", "train"):
        samples.check_map_style(getattr(splits, split), samples.NAMES[split], name)
    if config.evaluate is not None:
        return samples.Splits(test=splits.test, collate=splits.collate)
    if fraction is None:
        return splits
    if splits.validation is not None:
        raise UsageError(f"--validation-fraction {fraction}: {name} gives a validation set of its own; leave it out")
    return samples.set_apart(splits, fraction, seed=config.seed)


def open_synthetic(seed: int) -> samples.Splits:
    """The drawn images of synthetic.py, normalised."""
    train, test = (TensorDataset(augment.normalize(part.inputs, synthetic.MEAN, synthetic.STD), part.targets)
                   for part in synthetic.load(seed=seed))
    vars(train)["classes"] = vars(test)["classes"] = synthetic.CLASS_NAMES
    return samples.Splits(train=train, test=test)


def load_data(config: CustomConfig, world: World, known: Sequence[str] | None = None, given: Given = Given()
              ) -> samples.Reading:
    """The splits, the same on all ranks, with a checkpoint's `known` classes; for --evaluate the test set alone."""
    reference, explain = user_code.Reference("--data", config.data or "given"), given.explain
    if given.splits is not None:
        opening = functools.partial(samples.Splits, *given.splits)
    elif config.dataset == "synthetic":
        opening = functools.partial(open_synthetic, config.seed)
    else:
        opening, explain = functools.partial(open_own, reference, config.data_dir, config.seed), reference.explain
    name = f"--data {reference.text}"
    reading = samples.Reading(functools.partial(wanted, opening, config), seed=config.seed, name=name, explain=explain)
    if len(set(gather(world, reading.facts))) > 1:
        raise DataError(f"{name}: the ranks found different samples; {samples.SEED_IT}")
    names = tuple(known or samples.class_names_of(next(iter(reading.splits.present().values()))))
    if len({*names}) != len(names):
        raise DataError(f"{name}: .classes names one class twice; give each a name of its own")
    if names:
        reading.join_classes(names, owner="the training set" if known is None else "the checkpoint")
    return reading


def learn_facts(config: CustomConfig, reading: samples.Reading, known: Sequence[str] | None) -> Facts:
    """What the first samples say; the targets of all others will be held to it."""
    split, dataset = next(iter(reading.splits.present().items()))
    read = [samples.unless_failed(reading[Key(split, [sample], 0)]) for sample in range(min(8, len(dataset)))]
    inputs, targets = read[0]
    kind: Kind = KINDS.get(config.loss) or kind_of([each for _, each in read])
    own_names = names = tuple(known or samples.class_names_of(dataset))
    num_outputs = len(names) if kind == "classes" else targets[0].numel() if isinstance(targets, Tensor) else 1
    num_outputs = config.num_classes or num_outputs
    if kind == "classes" and num_outputs == 0:
        raise UsageError("--num-classes: missing; the targets are class numbers, and the training set has no .classes")
    shape = tuple(inputs.shape[1:]) if isinstance(inputs, Tensor) else ()
    if config.mixing() and (kind == "numbers" or len(shape) != 3):
        raise UsageError(f"--{'mixup' if config.mixup else 'cutmix'} {config.mixup or config.cutmix}: mixes images "
                         f"(C, H, W) and their labels; these are inputs {shape} with {kind}; leave it out")
    if len(names) != num_outputs:
        names = tuple(map(str, range(num_outputs)))
    reading.largest_target = {"classes": num_outputs - 1, "labels": 1}.get(kind)
    if kind != "classes" or names != own_names:
        reading.labels = {}  # these targets are no classes that have names
    return Facts(kind, names, shape)


def kind_of(targets: list[Any]) -> Kind:
    """By the targets of a few samples, each a batch of one: class numbers, rows of 0 and 1, or anything else."""
    if not all(isinstance(each, Tensor) for each in targets):
        return "numbers"
    if all(each.ndim == 1 and not each.is_floating_point() for each in targets):
        return "classes"
    rows = all(each.ndim == 2 and each.shape[1] > 1 and bool(((each == 0) | (each == 1)).all()) for each in targets)
    return "labels" if rows else "numbers"


def build_model(config: CustomConfig, facts: Facts, given: Given = Given()) -> nn.Module:
    """The network, from the seed."""
    torch.manual_seed(config.seed)
    offered = {"num_classes": len(facts.names), "image_size": facts.shape[-1] if len(facts.shape) == 3 else None}
    if given.model is not None:
        return given.model if isinstance(given.model, nn.Module) else user_code.call(given.model, offered)
    if not user_code.is_reference(config.model):
        del offered["image_size"]
    return models.build(config.model, **offered, **user_code.options_in(config.model_options, "--model-options"))


def build_task(config: CustomConfig, facts: Facts, device: torch.device, given: Given = Given()) -> Task:
    """The loss that fits the targets, or the user's own, and what an evaluation reports."""
    if facts.kind == "classes":
        task = classification_task(facts.names, device, label_smoothing=config.label_smoothing,
                                   class_weights=config.class_weights)
    else:
        name, loss = ("bce", F.binary_cross_entropy_with_logits) if facts.kind == "labels" else ("mse", F.mse_loss)
        checked = functools.partial(elementwise, name, loss)
        task = Task(loss=checked, test_loss=checked, num_classes=None)
    if facts.kind == "labels":
        if importlib.util.find_spec("torchmetrics") is None:
            raise UsageError("--loss bce: its mean average precision needs torchmetrics; pip install torchmetrics")
        task.metrics["labels"] = label_metrics
    task.is_own = True
    return with_own_code(task, user_code.references(config), device, loss=given.loss, metric=given.metric)


def elementwise(name: str, loss: Loss, outputs: Tensor, targets: Any) -> Tensor:
    """A loss of as many outputs as targets, (B,) and (B, 1) being the same; UsageError for any other shapes."""
    if not isinstance(targets, Tensor) or outputs.numel() != targets.numel():
        shape = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
        raise UsageError(f"--loss {name}: outputs {tuple(outputs.shape)} for targets {shape}; return as many numbers, "
                         f"or give a --loss FILE.py:NAME")
    return loss(outputs, targets.view_as(outputs).float())


def label_metrics(logits: Tensor, targets: Tensor) -> dict[str, float]:
    """The share of rows that are right in every label, and torchmetrics' mean average precision."""
    from torchmetrics.functional.classification import multilabel_average_precision
    exact = ((logits > 0) == (targets > 0)).all(1).float().mean().item()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of labels that no sample has
        precision = multilabel_average_precision(logits.float().sigmoid(), targets.int(), num_labels=logits.shape[1])
    return {"exact_match": exact, "mean_average_precision": precision.item()}


def write_card(config: CustomConfig, facts: Facts, run: trainer.Run) -> None:
    """model.json: how to build the network again, and what it takes."""
    channels, height, width = facts.shape if len(facts.shape) == 3 else (0, 0, 0)
    run.folder.write_json(CARD_FILE, asdict(ModelCard(
        trainer=run.trainer, model=user_code.absolute(config.model), class_names=facts.names, mean=(0.0,) * channels,
        std=(1.0,) * channels, image_size=(height, width), kind=facts.kind, user_code=run.user_code,
        options=user_code.options_in(config.model_options, "--model-options"))))


@session.entry_point
def main(config: CustomConfig, given: Given = Given()) -> dict[str, Any]:
    """One run, on this rank; returns its result."""
    with session.open_run(config, "custom") as run:
        reading = load_data(config, run.world, run.known, given)
        facts = learn_facts(config, reading, run.known)
        write_card(config, facts, run)
        names = facts.names if facts.kind == "classes" else ()
        loaders = samples.sample_loaders(reading, workers=config.num_workers(), prepare_worker=ignore_signals,
                                         warn=to_stderr, **config.batches(), **run.world.shard)
        loaders = mixing.mixed(loaders, config.mixing(), num_classes=len(facts.names), device=run.world.device)
        return session.train_model(config, run, build_model(config, facts, given),
                                   build_task(config, facts, run.world.device, given), class_names=names,
                                   dataset=reading if config.evaluate is None else None, **loaders)


if __name__ == "__main__":
    run(main, CustomConfig)
