import torch
from torch import nn

from torchrun_trainers import Checkpoints, ddp, evaluate, loaders, process_group


class Digits(torch.utils.data.Dataset):
    def __init__(self, first, number):
        self.targets = [sample % 2 for sample in range(first, first + number)]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return torch.randn(8) + 2 * self.targets[index], self.targets[index]


def main():
    torch.manual_seed(0)
    with process_group() as world:
        train, test = loaders(Digits(0, 480), Digits(480, 120), world, batch_size=24, seed=0)
        model = ddp(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)), world)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        checkpoints = Checkpoints("runs/loop", world)
        step, first_epoch, consumed = checkpoints.resume(model, optimizer)
        for epoch in range(first_epoch, 3):
            for inputs, targets in train.batches(epoch, consumed):
                nn.functional.cross_entropy(model(inputs), targets).backward()
                optimizer.step()
                optimizer.zero_grad()
                step, consumed = step + 1, consumed + train.global_batch_size
                if step % 7 == 0 and consumed < 480:
                    checkpoints.save(model, optimizer, step=step, epoch=epoch, samples_consumed=consumed)
            consumed = 0
            checkpoints.save(model, optimizer, step=step, epoch=epoch + 1, samples_consumed=0)
            result = evaluate(model, test, world, num_classes=2)
            print(f"rank {world.rank} epoch {epoch}: {result.accuracy} of {result.num_samples}, loss {result.loss!r}")


main()
