"""How a batch is split: the DataParallel tutorial's model that prints the sizes it sees.

    python trainers/split_demo.py --parallel dp --replicas 8             # without GPUs: the sizes it would make
    torchrun --standalone --nproc_per_node=3 trainers/split_demo.py      # ddp: each rank its own part
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

if not __package__:  # run by path: our packages, not others of the same names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn

from launch.command_line import run
from launch.errors import AtLeast, UsageError, say
from launch.process_group import World, gather, process_group
from trainers.engine.parallel import ParallelName, choose_parallel, parallelize

INPUT_SIZE, OUTPUT_SIZE, BATCH_SIZE, NUM_SAMPLES = 5, 2, 30, 100  # the tutorial's


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Print how batches are split over replicas or ranks."""

    parallel: ParallelName = "auto"
    """auto: ddp under torchrun or srun, else none. dp: DataParallel over the GPUs of one process."""
    replicas: Annotated[int | None, AtLeast(1, most=1024)] = None
    """Of dp. Default: one for each GPU. Where there are fewer GPUs, the split is worked out and not run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: this rank's GPU if there is one."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """auto: nccl on GPUs, gloo on CPUs."""


class Model(nn.Module):
    """One linear layer that tells the sizes of its input and output."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__()
        self.fc = nn.Linear(INPUT_SIZE, OUTPUT_SIZE)
        self.tell = tell

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, 5) to (B, 2)."""
        outputs = self.fc(inputs)
        self.tell(f"\tIn Model: input size {inputs.size()} output size {outputs.size()}")
        return outputs


def outside_text(inputs: torch.Size, outputs: torch.Size) -> str:
    """The tutorial's line for the whole batch."""
    return f"Outside: input size {inputs} output_size {outputs}"


def batches() -> tuple[Tensor, ...]:
    """The tutorial's 100 samples in batches of 30, the last one of 10."""
    return torch.randn(NUM_SAMPLES, INPUT_SIZE, generator=torch.Generator().manual_seed(0)).split(BATCH_SIZE)


def show_one_process(forward: Callable[[Tensor], Tensor]) -> None:
    """One model, or DataParallel, whose replicas run and tell in threads, in any order."""
    for batch in batches():
        say(outside_text(batch.size(), forward(batch).size()))


def show_worked_out(model: nn.Module, replicas: int) -> None:
    """What DataParallel's scatter would hand to each replica, by the chunking that it uses; one after the other."""
    say(f"worked out, not run: DataParallel with --replicas {replicas}, split by torch.chunk as its scatter does")
    show_one_process(lambda batch: torch.cat([model(part) for part in batch.chunk(replicas)]))


def show_ranks(model: nn.Module, told: list[str], world: World) -> None:
    """Each rank runs every world_size-th sample of a batch, as training does; rank 0 prints all, rank by rank."""
    for batch in batches():
        told.clear()
        outputs = model(batch[world.rank :: world.world_size].to(world.device))
        of_ranks = gather(world, (list(told), len(outputs)))
        if world.is_main:
            for lines, _ in of_ranks:
                say("\n".join(lines))
            say(outside_text(batch.size(), torch.Size((sum(count for _, count in of_ranks), OUTPUT_SIZE))))


def main(config: SplitConfig) -> None:
    """The demonstration, on this rank."""
    if config.replicas is not None and config.parallel != "dp":
        raise UsageError(f"--replicas {config.replicas}: only DataParallel has replicas; add --parallel dp")
    with process_group(config.backend, device=config.device) as world:
        num_gpus = torch.cuda.device_count() if world.device.type == "cuda" else 0
        torch.manual_seed(0)
        if config.parallel == "dp" and world.world_size == 1 and num_gpus < (config.replicas or 2):
            return show_worked_out(Model(say), config.replicas or max(num_gpus, 1))
        parallel, _ = choose_parallel(config.parallel, world, num_gpus=num_gpus)
        told: list[str] = []
        model = Model(told.append if parallel == "ddp" else say).to(world.device)
        if parallel == "ddp":
            return show_ranks(parallelize(model, parallel, world), told, world)
        if parallel == "dp":
            replicas = config.replicas or num_gpus
            say(f"Let's use {replicas} GPUs!")
            model = nn.DataParallel(model, device_ids=list(range(replicas)))
        show_one_process(lambda batch: model(batch.to(world.device)))


if __name__ == "__main__":
    run(main, SplitConfig)
