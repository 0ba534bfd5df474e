"""Shared by all tests: one thread, recipes small enough to run in milliseconds, and a report of slow tests."""

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


FILE_BUDGET, CHECKS_BUDGET = 10.0, 5.0  # seconds of a test file, and of one method's common checks


def pytest_terminal_summary(terminalreporter):
    """Name what is over its budget: with a hundred methods, each slow test is paid for a hundred times."""
    seconds = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            seconds[_owner(getattr(report, "nodeid", ""))] += getattr(report, "duration", 0.0)
    over = [(s, name) for name, s in seconds.items() if s > (CHECKS_BUDGET if " " in name else FILE_BUDGET)]
    if over:
        terminalreporter.section(f"over budget ({FILE_BUDGET:g} s a file, {CHECKS_BUDGET:g} s a method's checks)")
        for s, name in sorted(over, reverse=True):
            terminalreporter.write_line(f"{s:6.1f} s  {name}")


def _owner(nodeid):
    """The file of a test, or "common checks of ..." for the method that one of those is about."""
    file, _, rest = nodeid.partition("::")
    id = rest.partition("[")[2].rpartition("-")[0]
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
