"""Prune a ResNet to 90 % zeros from a DataLoader, fine-tune it between the steps, and save it."""

import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset
from transformers import ResNetConfig, ResNetForImageClassification

from mfac_core.torch import Pruner

SIDE, BATCH, SPARSITIES, RESNET = 64, 16, (0.0, 0.5, 0.7, 0.8, 0.9), {"depths": [3, 4, 6, 3]}
if __name__ == "__main__":
    images, labels = map(torch.tensor, load_digits(return_X_y=True))  # your data and network
    images = torch.nn.Upsample(SIDE)(images.float().reshape(-1, 1, 8, 8) / 16)
    train = DataLoader(TensorDataset(images, labels), batch_size=BATCH, shuffle=True)
    net = ResNetForImageClassification(ResNetConfig(num_channels=1, num_labels=10, **RESNET))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    pruner = Pruner(net, lambda net, batch: net(batch[0], labels=batch[1]).loss, train)
    for sparsity in SPARSITIES:  # none at first: this network is not trained yet
        print(pruner.step(sparsity))
        for x, y in train:  # what is removed stays zero
            optimizer.zero_grad()
            net(x, labels=y).loss.backward()
            optimizer.step()
        torch.save({"pruner": pruner.state_dict(), "model": net.state_dict()}, "last.pt")
    torch.save(pruner.finalize().state_dict(), "pruned.pt")  # plain weights, with zeros
