"""The recipe speedrun beside a bare script of it on one GPU: `python tests/performance/gpu.py --data-dir data`.

Both take turns in one process, with torch.compile. The bare script has CIFAR-10 on the GPU and the recipe's network,
optimizer and schedule, and nothing else: no checkpoint, log, stop or evaluation before the end. Its crops and flips are
drawn for an epoch at once. Seconds are those of the training steps, without what compiles before them.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median, stdev

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402  path set first
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from datasets import cifar, synthetic  # noqa: E402
from datasets.augment import normalize  # noqa: E402
from launch.bench.table import as_table  # noqa: E402
from trainers import models  # noqa: E402
from trainers.cifar import RECIPES, CifarConfig, main  # noqa: E402
from trainers.engine.optimizer import build_optimizer, freeze  # noqa: E402
from trainers.engine.parallel import synchronize  # noqa: E402


def moved(images: Tensor, epoch: int, first_flips: Tensor) -> Tensor:
    """Every image cropped at random after reflect padding by 2, and flipped in every other epoch."""
    padded = F.pad(images, (2,) * 4, "reflect")
    down, right = torch.randint(0, 5, (2, len(images)), device=images.device)
    result = torch.empty_like(images)
    for row in range(5):
        for column in range(5):
            chosen = (down == row) & (right == column)
            result[chosen] = padded[chosen][:, :, row : row + 32, column : column + 32]
    return torch.where((first_flips ^ bool(epoch % 2)).view(-1, 1, 1, 1), result.flip(-1), result)


def bare(config: CifarConfig, device: torch.device) -> tuple[float, float]:
    """Seconds of training, and the accuracy on the test set."""
    torch.manual_seed(config.seed)
    source = cifar if config.dataset == "cifar10" else synthetic
    train, test = cifar.load(config.data_dir) if config.dataset == "cifar10" else synthetic.load()
    assert train is not None
    images, test_images = (normalize(part.inputs.to(device), source.MEAN, source.STD) for part in (train, test))
    labels, test_labels = train.targets.to(device), test.targets.to(device)
    model = models.WhiteNet(10, width=config.width or 64)
    model.whiten(images[:5000].cpu())
    freeze(model, config.freeze)
    model.to(device).to(memory_format=torch.channels_last).train()
    optimizer = build_optimizer(model, config)
    if config.compile:
        model.compile()

    def loss_of(batch: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            outputs = model(batch.contiguous(memory_format=torch.channels_last))
            return F.cross_entropy(outputs, targets, label_smoothing=config.label_smoothing)

    kept = {name: value.clone() for name, value in model.state_dict().items()}
    loss_of(images[: config.batch_size], labels[: config.batch_size]).backward()  # compiles
    model.zero_grad()
    model.load_state_dict(kept)
    synchronize(device)
    began, step, steps = time.perf_counter(), 0, config.epochs * (len(images) // config.batch_size)
    first_flips = torch.rand(len(images), device=device) < 0.5
    for epoch in range(config.epochs):
        augmented = moved(images, epoch, first_flips)
        for indices in torch.randperm(len(images), device=device).split(config.batch_size):
            if len(indices) == config.batch_size:
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * (1 - step / steps)
                loss_of(augmented[indices], labels[indices]).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                step += 1
    synchronize(device)
    seconds = time.perf_counter() - began
    model.eval()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        right = sum(int((model(batch).argmax(1) == targets).sum()) for batch, targets in
                    zip(test_images.split(2000), test_labels.split(2000), strict=True))
    return seconds, right / len(test_labels)


def compare() -> None:
    """Run both by turns and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--dataset", choices=["cifar10", "synthetic"], default="cifar10")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--width", type=int, default=64)
    flags = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    found: dict[str, list[tuple[float, float]]] = {"trainers/cifar.py": [], "a bare script": []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(flags.seeds):
            config = CifarConfig(**{
                **RECIPES["speedrun"], "recipe": "speedrun", "seed": seed, "dataset": flags.dataset, "pictures": False,
                "data_dir": flags.data_dir, "epochs": flags.epochs, "compile": not flags.no_compile,
                "width": flags.width, "output_dir": Path(folder), "run_name": f"seed-{seed}"})
            result = main(config)
            found["trainers/cifar.py"].append((result["train_seconds"], result["accuracy"]))
            found["a bare script"].append(bare(config, device))
    cells = [["what", "accuracy, mean", "sd", "seconds, median", "seconds"]]
    for name, runs in found.items():
        seconds, accuracies = ([run[place] for run in runs] for place in (0, 1))
        spread = f"{100 * stdev(accuracies):.2f}" if len(runs) > 1 else ""
        cells.append([name, f"{100 * mean(accuracies):.2f} %", spread, f"{median(seconds):.2f}",
                      f"{min(seconds):.2f} - {max(seconds):.2f}"])
    print(as_table(cells))


if __name__ == "__main__":
    compare()
