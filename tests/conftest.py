"""Shared by all tests: one thread, recipes small enough to run in milliseconds, and a budget of time that is reported."""

import os
import signal
from collections import Counter

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from torch import nn

import steep
from steep.testing import has_compiler

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Without a C++ compiler, what needs `torch.compile` is skipped, with that reason."""
    if has_compiler():
        return
    for item in items:
        chosen = getattr(getattr(item, "callspec", None), "params", {})
        if "compiled" in item.name or chosen.get("compile") is True:
            item.add_marker(pytest.mark.skip(reason="torch.compile needs a C++ compiler, and there is none"))


BUDGETS = {"common checks of": 5, "": 10}  # seconds of a method's common checks, and of a file


def pytest_terminal_summary(terminalreporter):
    """Name what takes longer than its budget. Slow tests are made faster one by one, or one day all are slow."""
    seconds = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if hasattr(report, "duration"):
                seconds[_measured_as(report.nodeid)] += report.duration
    over = [(s, name) for name, s in seconds.items() if s > BUDGETS["common checks of" if name[:6] == "common" else ""]]
    if over:
        terminalreporter.section(f"over budget: {BUDGETS['']} s a file, {BUDGETS['common checks of']} s a method's checks")
        for s, name in sorted(over, reverse=True):
            terminalreporter.write_line(f"{s:6.1f} s  {name}")


def _measured_as(nodeid):
    """The file, or the method whose common check it is."""
    file, _, rest = nodeid.partition("::")
    id = rest.partition("[")[2].partition("@")[0].rpartition("-")[0]
    return f"common checks of {id}" if file == "tests/test_methods.py" else file


@pytest.fixture(autouse=True)
def ctrl_c():
    """Python's own handler of Ctrl-C, also where the tests were started with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def squared_error(output, target):
    return (output.squeeze(-1) - target).square()


@pytest.fixture
def regression():
    """A recipe on 40 noisy linear examples, 5 steps an epoch, with dropout so that random numbers matter."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 3, generator=generator)
    y = x @ torch.tensor([1.0, -2.0, 0.5]) + 0.1 * torch.randn(60, generator=generator)
    return steep.Recipe(
        data=lambda g: steep.split_loaders(x, y, g, batch_size=8, val=1 / 6, test=1 / 6),
        model=lambda: nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 1)),
        loss=squared_error,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.05),
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR,
        budget=steep.Budget(epochs=4),
        name="regression",
    )
