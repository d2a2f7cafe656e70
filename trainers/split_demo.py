"""How a batch is split: the DataParallel tutorial's model that prints the sizes it sees.

    python trainers/split_demo.py --parallel dp --replicas 8             # without GPUs: the sizes it would make
    torchrun --standalone --nproc_per_node=3 trainers/split_demo.py      # ddp: each rank its own part"""

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
    """One linear layer that notes the sizes of its input and output."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(INPUT_SIZE, OUTPUT_SIZE)
        self.told: list[str] = []  # of all replicas, which share it

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, 5) to (B, 2)."""
        outputs = self.fc(inputs)
        self.told.append(f"\tIn Model: input size {inputs.size()} output size {outputs.size()}")
        return outputs


def show(model: Model, forward: Callable[[Tensor], Tensor], world: World) -> None:
    """Each rank runs every world_size-th sample, as training does; rank 0 prints what the model saw, rank by rank."""
    for batch in torch.randn(NUM_SAMPLES, INPUT_SIZE).split(BATCH_SIZE):
        model.told.clear()
        outputs = forward(batch[world.rank :: world.world_size].to(world.device))
        of_ranks = gather(world, ("\n".join(model.told), len(outputs)))
        if world.is_main:
            size = torch.Size((sum(rows for _, rows in of_ranks), OUTPUT_SIZE))
            say("\n".join(lines for lines, _ in of_ranks))
            say(f"Outside: input size {batch.size()} output_size {size}")


def main(config: SplitConfig) -> None:
    """The demonstration, on this rank."""
    if config.replicas is not None and config.parallel != "dp":
        raise UsageError(f"--replicas {config.replicas}: only DataParallel has replicas; add --parallel dp")
    with process_group(config.backend, device=config.device) as world:
        num_gpus = torch.cuda.device_count() if world.device.type == "cuda" else 0
        replicas = config.replicas or max(num_gpus, 1)
        torch.manual_seed(0)
        model = Model().to(world.device)
        if config.parallel == "dp" and world.world_size == 1 and num_gpus < (config.replicas or 2):
            say(f"worked out, not run: DataParallel with --replicas {replicas}, split by torch.chunk, as its scatter")
            return show(model, lambda batch: torch.cat([model(part) for part in batch.chunk(replicas)]), world)
        parallel, _ = choose_parallel(config.parallel, world, num_gpus=num_gpus)
        if parallel == "dp":
            say(f"Let's use {replicas} GPUs!")
        wrapped = nn.DataParallel(model, range(replicas)) if parallel == "dp" else parallelize(model, parallel, world)
        show(model, wrapped, world)


if __name__ == "__main__":
    run(main, SplitConfig)
