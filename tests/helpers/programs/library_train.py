import torch
from torch import nn

from torchrun_trainers import train


class Digits(torch.utils.data.Dataset):
    def __init__(self, first, number):
        self.classes, self.targets = ("even", "odd"), [sample % 2 for sample in range(first, first + number)]
    def __len__(self):
        return len(self.targets)
    def __getitem__(self, index):  # what is random in here is the same after a resume, and in any worker
        return torch.randn(8) + 2 * self.targets[index], self.targets[index]

def network(num_classes):  # made once the seed is set
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, num_classes))

if __name__ == "__main__":  # workers import this file again
    train(network, (Digits(0, 480), Digits(480, 120)), loss=nn.functional.cross_entropy, epochs=3, batch_size=24,
          checkpoint_every=7, run_name="digits", workers=0)
