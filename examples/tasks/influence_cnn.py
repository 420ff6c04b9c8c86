"""Find the ten training images that harm a CNN's predictions of test images most."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from mfac_core.influence import Influence
from mfac_core.torch import ModelGradients

TRAIN, TEST, WIDE, EPOCHS = 12, 6, 64, 50  # batches of 100, channels
if __name__ == "__main__":
    images, labels = map(torch.tensor, load_digits(return_X_y=True))  # your data
    images = images.float().reshape(-1, 1, 8, 8) / 16
    batches = list(zip(images.split(100), labels.split(100), strict=True))
    net = nn.Sequential(nn.Conv2d(1, WIDE, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36 * WIDE, 10))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    loss = nn.CrossEntropyLoss(reduction="none")
    for x, y in batches[:TRAIN] * EPOCHS:  # and your network, trained
        optimizer.zero_grad()
        loss(net(x), y).mean().backward()
        optimizer.step()
    train = ModelGradients(net, lambda net, b: loss(net(b[0]), b[1]), batches[:TRAIN])  # not stored
    test = ModelGradients(net, lambda net, b: loss(net(b[0]), b[1]), batches[-TEST:])
    scores = Influence(train, damping=1e-3).scores(test)  # (test images, training images)
    print(scores.mean(0).argsort()[:10])  # without any of these the test loss would fall most
