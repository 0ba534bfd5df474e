"""
Fit a function with Sven
========================

Sven treats the losses of a batch as a system of equations, in which every residual should be zero, and takes the
smallest step that solves the linearised system. In the loop it replaces ``loss.backward()``; nothing else changes.
"""

import copy

import matplotlib.pyplot as plt
import torch
from torch import nn

from steep.backward import Sven

torch.manual_seed(0)
torch.set_num_threads(1)
x = torch.rand(2000, 1) * 2 - 1
y = torch.exp(-10 * x.square()) * torch.sin(2 * x)
y = (y - y.mean()) / y.std()


def network():
    layers = [nn.Linear(1, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 1)]
    return nn.Sequential(*layers)


def train(model, optimizer, backward, steps=600):
    """The same loop for both methods; only `backward` and the optimizer differ."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        batch = torch.randint(len(x), (32,), generator=order)
        optimizer.zero_grad()
        residuals = (model(x[batch]) - y[batch]).squeeze(1)
        backward(residuals)
        optimizer.step()
        schedule.step()
        losses.append(residuals.detach().square().mean().item())
    return losses


# %%
# Adam is given the gradient of the mean square. Sven is given the residuals themselves.
start = network()
first, second = copy.deepcopy(start), copy.deepcopy(start)
adam = train(first, torch.optim.Adam(first.parameters(), lr=1e-2), lambda r: r.square().mean().backward())
sven = train(second, torch.optim.SGD(second.parameters(), lr=0.5), Sven(second))

# %%
# This is one problem with one seed. It illustrates how the two behave, and is no evidence that one is better; for
# evidence, use ``steep compare``.
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
for losses, name in ((adam, "Adam"), (sven, "Sven")):
    axes[0].semilogy(torch.tensor(losses).unfold(0, 20, 1).mean(1), label=name)
axes[0].set(xlabel="step", ylabel="mean squared residual")
axes[0].legend(frameon=False)
grid = torch.linspace(-1, 1, 300).unsqueeze(1)
order = x.squeeze(1).argsort()
axes[1].plot(x[order], y[order], color="0.75", linewidth=4, label="target")
with torch.no_grad():
    axes[1].plot(grid, first(grid), label="Adam")
    axes[1].plot(grid, second(grid), label="Sven")
axes[1].legend(frameon=False)
figure.tight_layout()
