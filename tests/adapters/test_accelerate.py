"""Accelerate: prepared, accumulated, scaled and saved, the result is the plain loop's."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from parity import BATCH, METHODS, Setting, distance, images, plain
from torch import nn

import steep
from steep.adapters.accelerate import _FILE, Backward, Batches
from steep.requires import UnmetRequirement
from steep.rounds.fedspeed import FedSpeed


@pytest.fixture
def accelerator():
    def make(**options):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        return Accelerator(cpu=True, **options)

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Host:
    """A training loop as Accelerate's documentation writes it, with two lines changed."""

    def __init__(self, accelerator, method, batch=BATCH, dropout=0.0):
        self.accelerator, self.setting = accelerator, Setting(method, dropout=dropout)
        dataset = steep.Indexed(torch.utils.data.TensorDataset(*images()))
        loader = torch.utils.data.DataLoader(dataset, batch_size=batch)
        self.model, self.optimizer, loader = accelerator.prepare(self.setting.model, self.setting.optimizer, loader)
        self.loader = self.setting.data(Batches(loader)) if self.setting.data else loader
        parts = [*self.setting.stepped, *([self.loader] if self.setting.data else [])]
        self.backward = Backward(accelerator, self.model, *parts, rule=self.setting.rule)

    def train(self, steps):
        done = 0
        while done < steps:
            for x, y, indices in self.loader:
                with self.accelerator.accumulate(self.model):
                    self.backward(self.setting.losses(x, y, indices))
                    self.optimizer.step()
                    self.backward.step()
                    self.optimizer.zero_grad()
                done += self.accelerator.sync_gradients
        return self.setting.model


@pytest.mark.parametrize("method", METHODS)
def test_twenty_steps_are_those_of_the_plain_loop(method, accelerator):
    host = Host(accelerator(), method)
    torch.manual_seed(7)
    assert distance(host.train(20), plain(method)) < 1e-6


@pytest.mark.parametrize("method", ["mean", "sven", "ps-kd", "nm-gradient-flow"])
def test_accumulated_gradients_are_those_of_the_plain_loop(method, accelerator):
    host = Host(accelerator(gradient_accumulation_steps=2), method, BATCH // 2)
    assert distance(host.train(20), plain(method, accumulate=2)) < 1e-6


@pytest.mark.parametrize("method", ["mean", "sven"])
def test_the_gradient_scaler_reaches_the_gradient_but_not_the_rule(method, accelerator):
    host = Host(accelerator(), method)
    host.accelerator.scaler = host.optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    host.accelerator.scaler._lazy_init_scale_growth_tracker(torch.device("cpu"))
    losses = host.setting.losses(*next(iter(host.loader)))
    host.backward(losses)
    scaled = host.setting.model.head.weight.grad
    clone = Host(accelerator(), method)
    clone.backward(clone.setting.losses(*next(iter(clone.loader))))
    torch.testing.assert_close(scaled, 1024 * clone.setting.model.head.weight.grad)


@pytest.mark.parametrize("method", METHODS)
def test_resuming_equals_going_on(method, accelerator, tmp_path):
    """`save_state` and `load_state`, with dropout; Accelerate keeps the random numbers, and the epochs are whole."""
    whole = Host(accelerator(), method, dropout=0.2)
    torch.manual_seed(7)
    whole.train(10)
    whole.accelerator.save_state(str(tmp_path), safe_serialization=False)
    whole.train(10)
    torch.load(tmp_path / _FILE, weights_only=True)
    again = Host(accelerator(), method, dropout=0.2)
    again.accelerator.load_state(str(tmp_path))
    again.train(10)
    assert distance(again.setting.model, whole.setting.model) == 0


def test_a_closure_is_called_again(accelerator):
    lbfgs = lambda parameters: torch.optim.LBFGS(parameters, lr=0.3, max_iter=4)  # noqa: E731
    host, calls = accelerator(), []
    setting = Setting("mean")
    model, optimizer = host.prepare(setting.model, lbfgs(setting.model.parameters()))
    backward = Backward(host, model, optimizer)
    for x, y, indices in steep.tensor_loader(*images(), BATCH):

        def closure(x=x, y=y, indices=indices):
            calls.append(1)
            optimizer.zero_grad()
            losses = setting.losses(x, y, indices)
            backward(losses)
            return losses.mean().detach()

        optimizer.step(closure)
    assert len(calls) > 5
    assert distance(setting.model, plain("mean", 5, optimizer=lbfgs)) < 1e-6


def test_what_it_cannot_give_is_refused(accelerator):
    host, model = accelerator(), Setting("mean").model
    clients = [steep.tensor_loader(torch.randn(4, 2), torch.zeros(4), 2)]
    federated = FedSpeed(nn.Linear(2, 2), clients, None, generator=torch.Generator())
    with pytest.raises(UnmetRequirement, match="FedSpeed .*Accelerate cannot give: .*iterate over it"):
        Backward(host, model, federated)
    host.scaler = torch.amp.GradScaler("cpu")
    assert Backward(host, model, torch.optim.SGD(model.parameters())).attached.parts == []
    with pytest.raises(UnmetRequirement, match="LBFGS needs a closure.*mixed_precision='bf16'"):
        Backward(host, model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ValueError, match="Sven needs one loss per example"):
        Host(accelerator(), "sven").backward(torch.zeros((), requires_grad=True))


def test_a_rule_of_several_tasks_is_given_the_dict(accelerator):
    class Sum:
        requires = frozenset({"tasks"})

        def __call__(self, losses, *, scale=1.0):
            (scale * sum(v.mean() for v in losses.values())).backward()

    weight = nn.Linear(1, 1, bias=False)
    backward = Backward(accelerator(), weight, rule=Sum())
    output = weight(torch.ones(4, 1)).squeeze(1)
    backward({"a": output, "b": 2 * output})
    assert float(weight.weight.grad) == pytest.approx(3.0)


def test_a_schedule_may_be_stepped_with_the_parts(accelerator):
    host, model = accelerator(), nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    backward = Backward(host, model, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    optimizer.step()
    backward.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
