"""
Train a network to 1:8 sparsity
===============================

N:M sparsity keeps N of every M weights. Decaying masks let the other weights fade during training, instead of setting
them to zero at once. The method is applied to the model before the loop, stepped after the optimizer, and merged into
the weights at the end.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

from steep.models import apply_nm_gradient_flow

torch.manual_seed(0)
torch.set_num_threads(1)
x = torch.randn(1024, 32)
y = torch.sin(x @ torch.randn(32)) + x[:, 0]
model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 1))
steps = 300
handle = apply_nm_gradient_flow(model, n=1, m=8, total_steps=steps)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

snapshots, losses = {}, []
for step in range(steps):
    batch = torch.randint(1024, (64,))
    optimizer.zero_grad()
    loss = (model(x[batch]).squeeze(1) - y[batch]).square().mean()
    loss.backward()
    optimizer.step()
    handle.step()
    losses.append(loss.item())
    if step in (0, steps // 2, steps - 1):
        snapshots[step] = model[0].weight.detach().abs().clone()
handle.merge()

# %%
# The first layer's weights at the start, halfway and at the end, where one in eight is left.
figure, axes = plt.subplots(1, 3, figsize=(9, 4))
for axis, (step, weight) in zip(axes, snapshots.items(), strict=True):
    axis.imshow(weight, cmap="Greys", vmin=0, vmax=0.4, aspect="auto")
    axis.set(title=f"step {step + 1}", xlabel="input", ylabel="unit" if step == 0 else "")
figure.tight_layout()
print(f"{(model[0].weight == 0).float().mean():.3f} of the weights are zero")
