"""The Trainer trains as the plain loop does, splits batches without changing the mean, and resumes exactly."""

import copy
import gc

import pytest
import torch
from parity import BATCH, COUNT, METHODS, Setting, cross_entropy, distance, images, plain
from torch import nn
from torch.utils.data import Dataset, SequentialSampler

import steep
from steep.backward.sven import Sven
from steep.requires import UnmetRequirement
from steep.rounds.fedspeed import FedSpeed

transformers = pytest.importorskip("transformers", reason="needs the extra steep[hf]")

from transformers import Trainer, TrainingArguments  # noqa: E402

from steep.adapters.hf import _FILE, SteepMixin  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """What is imported is never garbage: the Trainer collects after every run, and would search all of it each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class MyTrainer(SteepMixin, Trainer):
    pass


class Examples(Dataset):
    def __init__(self, count=COUNT):
        self.x, self.y = (t[:count] for t in images())

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"pixel_values": self.x[i], "labels": self.y[i]}


def trainer(setting, out, steps=20, batch=BATCH, dataset=None, **options):
    kinds = {k: options.pop(k) for k in ("rule", "loss", "optimizers", "parts", "compute_loss_func") if k in options}
    args = TrainingArguments(
        str(out),
        max_steps=steps,
        per_device_train_batch_size=batch,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        max_grad_norm=options.pop("max_grad_norm", 0.0),
        seed=7,
        **{"save_strategy": "no", "logging_strategy": "no"} | options,
    )
    constant = torch.optim.lr_scheduler.LambdaLR(setting.optimizer, lambda step: 1.0)
    given = {"rule": setting.rule, "loss": setting.loss, "parts": tuple(setting.parts)}
    given |= {"optimizers": (setting.optimizer, constant)} | kinds
    return MyTrainer(
        setting.model, args, train_dataset=dataset or Examples(), data=setting.data, sampler=SequentialSampler, **given
    )


@pytest.mark.parametrize("method", METHODS)
def test_twenty_steps_are_those_of_the_plain_loop(method, tmp_path):
    setting = Setting(method)
    trainer(setting, tmp_path).train()
    assert distance(setting.model, plain(method)) < 1e-6


@pytest.mark.parametrize("method", ["mean", "sven", "ps-kd"])
def test_accumulated_gradients_are_those_of_the_plain_loop(method, tmp_path):
    setting = Setting(method)
    trainer(setting, tmp_path, batch=BATCH // 2, gradient_accumulation_steps=2).train()
    assert distance(setting.model, plain(method, accumulate=2)) < 1e-6


def test_parts_of_unlike_size_count_by_their_examples(tmp_path):
    """11 examples as 4 + 4 + 3: the one step's gradient is that of the mean over 11."""
    setting = Setting("mean")
    trainer(setting, tmp_path, 1, batch=4, gradient_accumulation_steps=3, dataset=Examples(11)).train()
    reference = Setting("mean")
    x, y = images()
    cross_entropy(reference.model(x[:11])["logits"], y[:11]).mean().backward()
    reference.optimizer.step()
    assert distance(setting.model, reference.model) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_resuming_equals_going_on(method, tmp_path):
    whole = Setting(method, dropout=0.2)
    trainer(whole, tmp_path, save_strategy="steps", save_steps=10).train()
    checkpoint = tmp_path / "checkpoint-10"
    torch.load(checkpoint / _FILE, weights_only=True)
    again = Setting(method, dropout=0.2)
    trainer(again, tmp_path).train(resume_from_checkpoint=str(checkpoint))
    assert distance(again.model, whole.model) == 0


def test_a_loss_function_of_the_trainer_may_return_a_vector(tmp_path):
    setting = Setting("sven")
    mean = lambda output, labels, num_items_in_batch=None: cross_entropy(output["logits"], labels)  # noqa: E731
    trainer(setting, tmp_path, 3, loss=None, compute_loss_func=mean).train()
    assert distance(setting.model, plain("sven", 3)) < 1e-6


@pytest.mark.parametrize("wide", [False, True], ids=["summed over the step", "one number per example"])
def test_accumulation_of_the_trainers_own_losses(wide, tmp_path):
    """A scalar that the Trainer takes for the step's own share is not divided a second time."""

    def loss(output, labels, num_items_in_batch):
        losses = cross_entropy(output["logits"], labels)
        return losses if wide else losses.sum() / num_items_in_batch

    setting = Setting("mean")
    options = {"batch": BATCH // 2, "gradient_accumulation_steps": 2, "loss": None, "compute_loss_func": loss}
    trainer(setting, tmp_path, 5, **options).train()
    assert distance(setting.model, plain("mean", 5)) < 1e-6


def test_held_out_losses_are_reported_without_the_methods_memory(tmp_path):
    setting = Setting("ps-kd")
    found = trainer(setting, tmp_path, 3)
    found.train()
    loss = found.evaluate(Examples())["eval_loss"]
    x, y = images()
    assert loss == pytest.approx(cross_entropy(setting.model(x)["logits"], y).mean().item(), rel=1e-5)


def test_clipping_follows_the_rule(tmp_path):
    free, clipped = Setting("sven"), Setting("sven")
    trainer(free, tmp_path, 3).train()
    trainer(clipped, tmp_path, 3, max_grad_norm=1e-4).train()
    assert distance(clipped.model, Setting("sven").model) < 1e-4 < distance(free.model, clipped.model)


def test_every_example_gets_its_position():
    example = steep.Indexed(Examples())[5]
    assert example["indices"] == 5
    assert set(example) == {"pixel_values", "labels", "indices"}


class NeedsClosure(torch.optim.SGD):
    requires = frozenset({"closure"})


def test_what_the_trainer_cannot_give_is_refused(tmp_path):
    setting = Setting("mean")
    setting.optimizer = NeedsClosure(setting.model.parameters(), lr=0.1)
    with pytest.raises(
        UnmetRequirement, match="NeedsClosure needs a closure.*the Trainer cannot give.*Lightning, Accelerate"
    ):
        trainer(setting, tmp_path, 1).train()
    setting.optimizer = torch.optim.LBFGS(setting.model.parameters())
    with pytest.raises(UnmetRequirement, match="LBFGS needs a closure"):
        trainer(setting, tmp_path, 1).train()
    clients = [steep.tensor_loader(torch.randn(4, 2), torch.zeros(4), 2)]
    federated = FedSpeed(nn.Linear(2, 2), clients, None, generator=torch.Generator())
    with pytest.raises(UnmetRequirement, match="FedSpeed .*the Trainer cannot give: .*iterate over it"):
        trainer(Setting("mean"), tmp_path, 1, parts=(federated,))
    coupled = nn.Sequential(nn.BatchNorm1d(3))
    setting = Setting("mean")
    setting.model.add_module("norm", coupled)
    with pytest.raises(UnmetRequirement, match="Sven needs examples that do not influence.*norm"):
        trainer(setting, tmp_path, 1, rule=Sven(setting.model))
    scalar = trainer(Setting("sven"), tmp_path, 1, loss=lambda z, y: cross_entropy(z, y).mean())
    with pytest.raises(ValueError, match="Sven needs one loss per example"):
        scalar.train()


def test_texts_with_padding_are_trained_as_in_a_plain_loop(tmp_path):
    """BERT on messages of unlike length: the Trainer's steps with Sven are those of a loop over the same batches."""
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=30, **sizes, **ids, **rates))
    twin = copy.deepcopy(model)
    texts = [torch.randint(3, 30, (3 + i % 5,)) for i in range(16)]
    examples = [{"input_ids": t, "attention_mask": torch.ones_like(t), "labels": i % 2} for i, t in enumerate(texts)]

    def collate(batch):
        padded = {k: nn.utils.rnn.pad_sequence([e[k] for e in batch], True) for k in ("input_ids", "attention_mask")}
        return padded | {"labels": torch.tensor([e["labels"] for e in batch])}

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        max_grad_norm=0.0,
        save_strategy="no",
        logging_strategy="no",
    )
    MyTrainer(
        model,
        arguments,
        train_dataset=examples,
        data_collator=collate,
        sampler=SequentialSampler,
        rule=Sven(model, rtol=1e-2),
        loss=cross_entropy,
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
    ).train()
    rule, optimizer = Sven(twin, rtol=1e-2), torch.optim.SGD(twin.parameters(), lr=0.1)
    for start in range(0, 16, 4):
        batch = collate(examples[start : start + 4])
        optimizer.zero_grad()
        rule(cross_entropy(twin(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"]))
        optimizer.step()
    assert distance(model, twin) < 1e-6
