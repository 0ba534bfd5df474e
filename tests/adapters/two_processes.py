"""What two processes do; apart from the tests, so that a new process can import it."""

import datetime
import importlib.util
import os
import tempfile
import time
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

import steep
from steep.adapters import _global_rows
from steep.adapters._attached import Attached
from steep.adapters._global_rows import Exchange
from steep.adapters._sharding import check_sharding
from steep.adapters.distributed import GlobalBatch, sharded
from steep.backward.sven import Sven
from steep.optim.adabelief import AdaBelief
from steep.optim.adamp import AdamP
from steep.requires import UnmetRequirement

LIMIT = 60  # seconds that a process waits for the other
# Imported once, in the server from which both processes are forked: importing is most of what they do.
PRELOAD = ["steep", "accelerate", "transformers.trainer", "torch.distributed.fsdp"]
TRANSFORMERS = importlib.util.find_spec("transformers") is not None


def _enter(rank, world, path, works):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # read by Accelerate, which finds the group made
    limit = datetime.timedelta(seconds=LIMIT)
    dist.init_process_group("gloo", init_method=f"file://{path}/meet", rank=rank, world_size=world, timeout=limit)
    try:
        torch.save({name: work(rank) for name, work in works.items()}, f"{path}/{rank}")
    finally:
        dist.destroy_process_group()


def in_two(works):
    """What every `work(rank)` returns, by name, in each of two processes, which are ended when they take too long."""
    torch.multiprocessing.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as path:
        context = start_processes(_enter, (2, path, works), 2, join=False, start_method="forkserver")
        end = time.monotonic() + 2 * LIMIT
        try:
            while not context.join(timeout=1):
                assert time.monotonic() < end, "the processes hang"
        finally:
            for process in context.processes:
                process.kill()
        return [torch.load(f"{path}/{rank}") for rank in range(2)]


def mixed(kind):
    return _float32(kind).double()  # so that rounding, which Sven amplifies, hides nothing


def _float32(kind):
    """Models whose parts are kept in every way: factors, patches, rows, tokens, tied weights, no rule at all."""
    torch.manual_seed(3)
    if kind == "mlp":
        return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 1))
    if kind == "conv":
        shape = nn.Unflatten(1, (1, 1, 6))
        return nn.Sequential(
            shape, nn.Conv2d(1, 40, (1, 3)), nn.Tanh(), nn.GroupNorm(2, 40), nn.Flatten(), nn.Linear(160, 1)
        )
    return Tied()


class Tied(nn.Module):
    """An embedding tied to a linear layer, and one without a rule."""

    def __init__(self):
        super().__init__()
        self.table, self.back, self.odd = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False), nn.Bilinear(5, 5, 4)
        self.back.weight = self.table.weight

    def forward(self, x):
        h = torch.tanh(self.back(self.table(x.abs().mul(9).long() % 5).mean(1)))
        return self.odd(h, h).sum(-1, keepdim=True)


RULES = {
    "mean": lambda model: steep.Mean(),
    "sven": Sven,
    "sven, some rows": partial(Sven, param_fraction=0.5),
    "sven, micro-batches": partial(Sven, micro_batch=3, rank=3),
}


def batch(step, count=12):
    generator = torch.Generator().manual_seed(step)
    numbers = torch.randn(count, 7, generator=generator).double()
    return numbers[:, :6], numbers[:, 6]


def trained(model, call, rule, cut, steps=4):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        x, y = (t[cut] for t in batch(step))
        optimizer.zero_grad()
        rule(
            call(x).squeeze(-1) - y
            if not isinstance(getattr(rule, "rule", rule), steep.Mean)
            else (call(x).squeeze(-1) - y).square()
        )
        optimizer.step()
    return model.state_dict()


CASES = [("mlp", name) for name in RULES] + [
    ("conv", "sven"),
    ("conv", "sven, some rows"),
    ("tied", "sven"),
    ("tied", "sven, some rows"),
]


def all_cases(rank):
    found = {}
    for split in (6, 5):  # even, uneven
        cut = slice(0, split) if rank == 0 else slice(split, 12)
        for kind, name in CASES:
            model = mixed(kind)
            rule = GlobalBatch(RULES[name](model))
            # rows of layers without a rule are sent in one piece, or in several
            with mock.patch.object(_global_rows, "CHUNK", 2**19 if split == 6 else 60):
                state = trained(model, DistributedDataParallel(model), rule, cut)
            found[split, kind, name] = state, rule.sent_bytes
    return found


def refusals(rank):
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    rule, text = GlobalBatch(Sven(model)), ""
    try:
        rule(model(torch.randn(2, 3 + rank, 4)).square().mean((1, 2)))
    except ValueError as error:
        text = str(error)
    with pytest.raises(ValueError, match=r"every process needs examples, but they have \[0, 1\]"):
        rule(torch.zeros(rank, requires_grad=True))
    return text, Exchange().lengths(torch.zeros(rank + 1))


def on_shards(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = mixed("mlp")
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    texts = []
    for refused in (AdamP, Sven):
        with pytest.raises(UnmetRequirement) as error:
            check_sharding(model.parameters(), refused)
        texts.append(str(error.value))
    with pytest.raises(UnmetRequirement):
        sharded(AdamP, model.parameters())
    optimizer = sharded(AdaBelief, model.parameters(), lr=0.05, weight_decay=0.1)
    for step in range(5):
        x, y = (t[6 * rank : 6 * rank + 6] for t in batch(step))
        optimizer.zero_grad()
        (model(x).squeeze(-1) - y).square().mean().backward()
        optimizer.step()
    return texts, {k: v.full_tensor() for k, v in model.state_dict().items()}


def with_accelerate(rank):
    """Accelerate in two processes: the loader divides the batches, the rule is made global by itself."""
    from accelerate import Accelerator

    from steep.adapters.accelerate import Backward

    accelerator = Accelerator(cpu=True)
    model = mixed("mlp")
    backward = Backward(accelerator, model, rule=Sven(model))
    wrapped, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    for step in range(4):
        x, y = (t[6 * rank : 6 * rank + 6] for t in batch(step))
        optimizer.zero_grad()
        backward(wrapped(x).squeeze(-1) - y)
        optimizer.step()
        backward.step()
    alone = Attached("a loop", model, Sven(model), (), {})
    with pytest.raises(UnmetRequirement, match=r"Sven needs the losses of all 2 processes.*GlobalBatch"):
        alone.backward(model(batch(0)[0]).squeeze(-1), 1.0)
    return accelerator.num_processes, model.state_dict()


class Named(nn.Module):
    """What the Trainer takes."""

    main_input_name = "x"

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, labels=None):
        return {"logits": self.model(x).squeeze(-1)}


def with_trainer(rank):
    """The Trainer in two processes, which take turns in the dataset: six examples each of every step's twelve."""
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainingArguments

    from steep.adapters.hf import SteepMixin

    class MyTrainer(SteepMixin, Trainer):
        pass

    model = mixed("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    examples = [{"x": x, "labels": y} for step in range(4) for x, y in zip(*batch(step), strict=True)]
    with tempfile.TemporaryDirectory() as out:
        options = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "ddp_backend": "gloo", "max_grad_norm": 0.0}
        args = TrainingArguments(
            out, max_steps=4, per_device_train_batch_size=6, save_strategy="no", logging_strategy="no", **options
        )
        MyTrainer(
            Named(model),
            args,
            rule=GlobalBatch(Sven(model)),
            loss=lambda output, y: output - y,
            sampler=SequentialSampler,
            train_dataset=examples,
            optimizers=(optimizer, constant),
        ).train()
        processes = args.world_size
    return processes, model.state_dict()


WORKS = {"cases": all_cases, "refusals": refusals, "shards": on_shards, "accelerate": with_accelerate}
if TRANSFORMERS:
    WORKS["trainer"] = with_trainer
