"""Train with MFAC; run again after an interruption, it goes on from the last epoch, bit for bit."""

from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

from mfac_core.torch import MFAC

SAMPLES, WINDOW, EPOCHS, LAST = 60_000, 128, 20, Path("last.pt")
if __name__ == "__main__":
    data = TensorDataset(torch.randn(SAMPLES, 784), torch.randint(10, (SAMPLES,)))  # yours
    net = torch.nn.Sequential(torch.nn.Linear(784, 512), torch.nn.ELU(), torch.nn.Linear(512, 10))
    optimizer = MFAC(net.parameters(), lr=1e-2, window_size=WINDOW, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=EPOCHS)
    parts = net, optimizer, schedule
    for part, state in zip(parts, torch.load(LAST) if LAST.exists() else (), strict=False):
        part.load_state_dict(state)
    for epoch in range(schedule.last_epoch, EPOCHS):
        for x, y in DataLoader(data, 64, shuffle=True, generator=torch.manual_seed(epoch)):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
        schedule.step()
        torch.save([part.state_dict() for part in parts], LAST)
