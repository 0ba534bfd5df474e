"""
The loss landscape around trained weights
=========================================

This example draws the loss of a small network on handwritten digits around its trained weights: in the plane of its
training trajectory, in a random plane, and along two eigenvectors of the Hessian. It then estimates the whole spectrum
of the Hessian, and measures how far the tangent kernel of the network moved during training.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from steep.probes.lla import hessian_spectrum, landscape, random_directions, snapshot, top_eigenpairs, trajectory
from steep.probes.ntk import empirical_ntk, kernel_drift

torch.manual_seed(0)
torch.set_num_threads(1)
digits = load_digits()
x, y = torch.tensor(digits.images).float().flatten(1) / 16, torch.tensor(digits.target)
train, test = slice(0, 1000), slice(1000, None)
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
order = torch.Generator().manual_seed(1)

kernel = empirical_ntk(model, x[:40], outputs="trace")
snapshots = [snapshot(model)]
for step in range(600):
    batch = torch.randint(1000, (64,), generator=order)
    optimizer.zero_grad()
    F.cross_entropy(model(x[batch]), y[batch]).backward()
    optimizer.step()
    if step % 20 == 19:
        snapshots.append(snapshot(model))


def loss(model, part=train):
    """One number per example, on fixed data; a landscape needs nothing else."""
    return F.cross_entropy(model(x[part]), y[part], reduction="none")


# %%
# Three planes through the same weights (red). The random directions are filter-normalized.
walk = trajectory(snapshots)
randomly = random_directions(model, torch.Generator().manual_seed(0))
sharpest = top_eigenpairs(model, loss, torch.Generator().manual_seed(0), steps=40)
low, high = walk.points.min(0).values - 1, walk.points.max(0).values + 1
figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
seen = landscape(model, loss, walk.directions, steps=21, span=list(zip(low.tolist(), high.tolist(), strict=True)))
seen.draw(axes[0], points=walk.points)
axes[0].set(title=f"training trajectory ({walk.explained.sum():.0%} of squared distances)")
landscape(model, loss, randomly, steps=21, span=2.0).draw(axes[1])
axes[1].set(title="two random directions")
landscape(model, loss, sharpest.directions, steps=21, span=4.0).draw(axes[2])
axes[2].set(title="eigenvalues {:.2g} and {:.2g}".format(*sharpest.values))

# %%
# The spectrum on the training data, and on data that the network was not trained on. The paper finds that both criteria
# grow where the accuracy falls. Here r_e grows from each set to the next; K_h separates the test data from the training
# data, but not the noisy test data from the clean ones.
figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
noise = 0.5 * torch.randn(x[test].shape, generator=order)
settings = {"train": (x[train], y[train]), "test": (x[test], y[test]), "test, noisy": (x[test] + noise, y[test])}
for name, (inputs, labels) in settings.items():
    found = hessian_spectrum(
        model,
        lambda m, inputs=inputs, labels=labels: F.cross_entropy(m(inputs), labels),
        torch.Generator().manual_seed(0),
        steps=40,
        runs=3,
    )
    found.draw(axis, width=0.05)
    axis.lines[-1].set_label(name)
    accuracy = (model(inputs).argmax(1) == labels).float().mean()
    criteria = found.criteria()
    print(f"{name:12} accuracy {accuracy:.3f}   r_e {criteria.r_e:.4f}   K_h {criteria.k_h:.3f}")
axis.legend(frameon=False)

# %%
# A narrow network is far from the regime in which its tangent kernel stays constant.
drift = kernel_drift(kernel, empirical_ntk(model, x[:40], outputs="trace"))
print(f"the kernel moved by {drift.distance:.1f} times its size, alignment {drift.alignment:.2f}")
