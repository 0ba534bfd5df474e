"""One small classification of images, trained by a plain loop: what every host must reproduce."""

import torch
from torch import nn
from torch.nn import functional as F

import steep
from steep.backward.sven import Sven
from steep.data.efficienttrain import EfficientTrain
from steep.losses.ps_kd import PSKD
from steep.models.nm_gradient_flow import apply_nm_gradient_flow
from steep.optim.adabelief import AdaBelief

CLASSES, SIDE, BATCH, COUNT = 3, 8, 8, 40
PER_EPOCH = COUNT // BATCH
METHODS = ["mean", "efficienttrain", "nm-gradient-flow", "ps-kd", "sven", "adabelief"]


def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(COUNT, 1, SIDE, SIDE, generator=generator), torch.randint(CLASSES, (COUNT,), generator=generator)


class Net(nn.Module):
    """Also what the Trainer takes: named input, logits by name."""

    main_input_name = "pixel_values"

    def __init__(self, dropout=0.0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.stem = nn.Conv2d(1, 8, 3, padding=1)
            self.hidden, self.head = nn.Linear(8, 8), nn.Linear(8, CLASSES)
        self.dropout = nn.Dropout(dropout)

    def forward(self, pixel_values, labels=None):
        x = self.dropout(F.relu(self.stem(pixel_values)).mean((2, 3)))
        return {"logits": self.head(torch.tanh(self.hidden(x)))}


def cross_entropy(output, target):
    return F.cross_entropy(output, target, reduction="none")


class Setting:
    """A method's parts for a training run of `steps` steps, the same in every host."""

    def __init__(self, method, steps=20, dropout=0.0):
        self.model, self.rule, self.loss, self.parts, self.data = Net(dropout), None, cross_entropy, [], None
        if method == "efficienttrain":
            self.data = lambda loader: EfficientTrain(loader, total_steps=steps, max_magnitude=5.0)
        if method == "nm-gradient-flow":
            self.parts = [apply_nm_gradient_flow(self.model, total_steps=steps, n=1, m=4)]
        if method == "ps-kd":
            self.loss = PSKD(COUNT, total_steps=steps, steps_per_epoch=PER_EPOCH)
        if method == "sven":
            self.rule = Sven(self.model, param_fraction=0.7)
        kind = AdaBelief if method == "adabelief" else torch.optim.SGD
        self.optimizer = kind(self.model.parameters(), lr=0.05)

    @property
    def stepped(self):
        return [*self.parts, *([self.loss] if isinstance(self.loss, nn.Module) else [])]

    def losses(self, x, y, indices):
        memory = {"indices": indices} if isinstance(self.loss, PSKD) else {}
        return self.loss(self.model(x)["logits"], y, **memory)


def plain(method, steps=20, accumulate=1, clip=None, dropout=0.0, optimizer=None):
    """The plain loop, in order of the data, and the model it leaves."""
    setting = Setting(method, steps, dropout)
    optimizer = optimizer(setting.model.parameters()) if optimizer else setting.optimizer
    rule = setting.rule or steep.Mean()
    torch.manual_seed(7)
    loader = steep.tensor_loader(*images(), BATCH)
    loader = setting.data(loader) if setting.data else loader
    changing = [*setting.stepped, *([loader] if setting.data else [])]
    done = 0
    while done < steps:
        for x, y, indices in loader:
            if done == steps:
                break

            def closure(x=x, y=y, indices=indices):
                optimizer.zero_grad()
                for part in torch.arange(len(x)).tensor_split(accumulate):
                    losses = setting.losses(x[part], y[part], indices[part])
                    rule(losses, scale=len(part) / len(x))
                return losses.mean().detach()

            optimizer.step(closure)
            for part in changing:
                part.step()
            done += 1
    return setting.model


def distance(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)
