"""The loop of PyTorch's CIFAR-10 tutorial, 4000 steps: prints the seconds per step. `cifar_tutorial.py DATA_FOLDER`."""

import sys
import time
from pathlib import Path

import torch
import torchvision
from torch import nn, optim
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from trainers.models import Net

if __name__ == "__main__":  # its loader's workers may import this file
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)])
    dataset = torchvision.datasets.CIFAR10(sys.argv[1], train=True, transform=transform)
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, shuffle=True, num_workers=2)
    net, criterion = Net(10), nn.CrossEntropyLoss()
    optimizer = optim.SGD(net.parameters(), lr=0.001, momentum=0.9)
    start, running_loss = time.perf_counter(), 0.0
    for index, (inputs, labels) in enumerate(loader):
        optimizer.zero_grad()
        loss = criterion(net(inputs), labels)
        loss.backward()
        optimizer.step()
        running_loss += loss.item()
        if index == 3999:
            break
    print((time.perf_counter() - start) / 4000)
