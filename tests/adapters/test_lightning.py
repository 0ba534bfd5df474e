"""Lightning trains as the plain loop does, and goes on from its checkpoints as if nothing had happened."""

import pytest
import torch
from parity import BATCH, METHODS, Setting, distance, images, plain
from torch import nn

import steep
from steep.backward.sven import Sven
from steep.losses.ps_kd import PSKD
from steep.requires import UnmetRequirement
from steep.rounds.fedspeed import FedSpeed

lightning = pytest.importorskip("lightning", reason="needs the extra steep[lightning]")

from lightning.pytorch import LightningModule, Trainer  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402

from steep.adapters.lightning import SteepModule  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*lightning.*")


class Module(SteepModule, LightningModule):
    def __init__(self, setting, *parts, optimizer=None):
        super().__init__()
        self.setting, self.net, self.loss = setting, setting.model, setting.loss
        self.optimizer = optimizer(self.parameters()) if optimizer else setting.optimizer
        self.attach(*setting.stepped, *parts, rule=setting.rule)
        self.evaluations = 0

    def training_step(self, batch, batch_idx):
        self.evaluations += 1
        return self.setting.losses(*batch)

    def configure_optimizers(self):
        return self.optimizer


def loader(setting):
    plain_loader = steep.tensor_loader(*images(), BATCH)
    return setting.data(plain_loader) if setting.data else plain_loader


def trainer(steps=20, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"enable_checkpointing": False, "max_steps": steps, "accelerator": "cpu"} | quiet | options
    return Trainer(**options)


def train(method, steps=20, optimizer=None, dropout=0.0, **options):
    setting = Setting(method, steps, dropout)
    data = loader(setting)
    module = Module(setting, *([data] if setting.data else []), optimizer=optimizer)
    torch.manual_seed(7)
    trainer(steps, **options).fit(module, data)
    return module


@pytest.mark.parametrize("method", METHODS)
def test_twenty_steps_are_those_of_the_plain_loop(method):
    reference = plain(method)
    assert distance(reference, Setting(method).model) > 1e-3
    assert distance(train(method).setting.model, reference) < 1e-6


def test_an_optimizer_may_call_its_closure_again():
    lbfgs = lambda parameters: torch.optim.LBFGS(parameters, lr=0.3, max_iter=4)  # noqa: E731
    module = train("mean", steps=6, optimizer=lbfgs)
    assert module.evaluations > 6
    assert distance(module.setting.model, plain("mean", 6, optimizer=lbfgs)) < 1e-6


@pytest.mark.parametrize("method", ["mean", "sven"])
def test_accumulated_gradients_are_those_of_the_plain_loop(method):
    setting = Setting(method)
    data = steep.tensor_loader(*images(), BATCH // 2)
    module = Module(setting)
    trainer(20, accumulate_grad_batches=2).fit(module, data)
    assert distance(setting.model, plain(method, accumulate=2)) < 1e-6


@pytest.mark.parametrize("method", ["mean", "sven"])
def test_a_gradient_scaler_changes_nothing_but_rounding(method):
    """The rule is given the losses themselves, and the scale apart."""

    class Float32(MixedPrecision):
        def autocast_context_manager(self):
            return torch.autocast("cpu", enabled=False)

    plugin = Float32("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    assert distance(train(method, plugins=[plugin]).setting.model, plain(method)) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_resuming_equals_going_on(method, tmp_path):
    """With dropout, so that torch's random numbers matter too; the checkpoint is read without unpickling."""
    saver = ModelCheckpoint(tmp_path, every_n_epochs=2, save_top_k=-1, filename="{epoch}")
    epochs = {"max_steps": -1, "max_epochs": 4}  # given max_steps, Lightning itself repeats a batch
    whole = train(method, dropout=0.2, **epochs, enable_checkpointing=True, callbacks=[saver])
    again = Setting(method, 20, dropout=0.2)
    data = loader(again)
    module = Module(again, *([data] if again.data else []))
    torch.manual_seed(123)
    trainer(20, **epochs).fit(module, data, ckpt_path=tmp_path / "epoch=1.ckpt", weights_only=True)
    assert distance(again.model, whole.setting.model) == 0


def test_requirements_are_checked_with_the_line_to_change():
    setting = Setting("sven")
    setting.model.norm = nn.BatchNorm1d(3)
    with pytest.raises(UnmetRequirement, match="Sven needs examples that do not influence.*norm.*GroupNorm"):
        Module(setting)
    federated = FedSpeed(
        nn.Linear(2, 2), [steep.tensor_loader(torch.randn(4, 2), torch.zeros(4), 2)], None, generator=torch.Generator()
    )
    with pytest.raises(
        UnmetRequirement, match="FedSpeed needs .*clients, which Lightning cannot give: .*iterate over it"
    ):
        Module(Setting("mean"), federated)
    x, y = images()
    pairs = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=BATCH)
    with pytest.raises(UnmetRequirement, match="PSKD needs the index of every example.*Indexed"):
        trainer(1).fit(Module(Setting("ps-kd")), pairs)


def test_a_scalar_loss_is_refused_where_a_vector_is_needed():
    class Scalar(Module):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx).mean()

    with pytest.raises(ValueError, match="Sven needs one loss per example.*reduction='none'"):
        trainer(1).fit(Scalar(Setting("sven")), loader(Setting("mean")))
    trainer(1).fit(Scalar(Setting("mean")), loader(Setting("mean")))


class Twice(torch.optim.SGD):
    requires = frozenset({"closure"})


def test_closures_that_lightning_withholds_are_refused():
    twice = lambda parameters: Twice(parameters, lr=0.1)  # noqa: E731
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(UnmetRequirement, match="Twice needs a closure.*16-mixed.*bf16-mixed"):
        train("mean", 1, optimizer=twice, plugins=[plugin])
    with pytest.raises(UnmetRequirement, match="Twice needs a closure for the whole batch.*accumulate_grad_batches=2"):
        train("mean", 1, optimizer=twice, accumulate_grad_batches=2)
    train("mean", 1, optimizer=twice)


def test_another_set_of_parts_is_refused():
    saved = {"steep": {"rule": {}, "part0 PSKD": {}}}
    with pytest.raises(steep.CheckpointError, match="PSKD.*attach the same"):
        Module(Setting("sven")).on_load_checkpoint(saved)
    with pytest.raises(steep.CheckpointError, match="written without SteepModule"):
        Module(Setting("sven")).on_load_checkpoint({})


def test_the_rule_and_the_loss_are_the_ones_attached():
    module = Module(Setting("ps-kd"))
    assert isinstance(module._attached.parts[0], PSKD)
    assert isinstance(Module(Setting("sven"))._attached.rule, Sven)
