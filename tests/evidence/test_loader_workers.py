"""Recipes whose loaders have worker processes of their own, inside the worker processes of a comparison."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

import steep
from steep.evidence.runs.jobs import Job
from steep.evidence.runs.source import from_name, load_recipe
from steep.evidence.runs.store import Store
from steep.evidence.runs.workers import Workers

RECIPE = """
import random
import numpy as np
import steep, torch
from torch.utils.data import DataLoader, Dataset

class Noisy(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        noise = torch.rand(3) + float(np.random.rand()) + random.random()
        return torch.full((3,), i / 16) + 0.1 * noise, torch.tensor(i / 16)

def make(**options):
    def data(generator):
        x = torch.ones(2, 3)
        return steep.Data(DataLoader(Noisy(), 8, shuffle=True, num_workers=1, **options), [(x, x.sum(1))])
    return steep.Recipe(data=data, model=lambda: torch.nn.Linear(3, 1), name="noisy",
        loss=lambda o, t: (o.squeeze(-1) - t).square(), budget=steep.Budget(steps=3),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.05))

default = make()
fork = make(multiprocessing_context="fork")
spawn = make(multiprocessing_context="spawn")
persistent = make(persistent_workers=True)
long = make().replace(budget=steep.Budget(steps=100_000))
"""
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("loaders") / "noisy_recipes.py"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize("name", ["default", pytest.param("fork", marks=needs_fork), "spawn", "persistent"])
def test_a_run_in_a_worker_is_that_of_fit(file, tmp_path, name):
    source = from_name(f"{file}:{name}")
    job = Job("baseline", "confirm", (), 3, 3, steep.Budget(steps=3))
    with Workers(source, Store(tmp_path), 1) as workers:
        (record,) = workers.run([job])
    again = steep.fit(load_recipe(f"{file}:{name}"), seed=3, progress=False)
    assert record.test["loss"] == again.test["loss"]
    assert steep.fit(load_recipe(f"{file}:default"), seed=3, progress=False).test == again.test


def test_persistent_workers_change_no_number_and_resume_exactly(file, tmp_path):
    def fit(name, steps, **options):
        recipe = load_recipe(f"{file}:{name}").replace(budget=steep.Budget(steps=steps))
        return steep.fit(recipe, progress=False, **options)

    before = _children(psutil.Process())
    whole, path = fit("persistent", 7), tmp_path / "run.pt"
    assert whole.history.losses == fit("default", 7).history.losses
    fit("persistent", 5, checkpoint=path)  # in the middle of the third epoch
    assert fit("persistent", 7, checkpoint=path).history.losses == whole.history.losses
    left = [p for p in _children(psutil.Process()) if p not in before and p.status() != psutil.STATUS_ZOMBIE]
    assert not [p for p in left if "resource_tracker" not in " ".join(p.cmdline())]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_is_left_behind(file, tmp_path, number):
    command = [sys.executable, "-m", "steep", "compare", f"{file}:long", "-m", "sgdp", "--out", str(tmp_path / "out")]
    main = subprocess.Popen([*command, "--workers", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        tree = _until(lambda: _tree(main.pid, 2), 60)
        main.send_signal(number)
        main.wait(30)
        assert _until(lambda: not [p for p in tree if p.is_running() and p.status() != psutil.STATUS_ZOMBIE], 20)
    finally:
        main.kill()


def _tree(pid, depth):
    """The processes below, once the workers of a loader are among them."""
    below = [psutil.Process(pid)]
    found = []
    for _ in range(depth):
        below = [child for parent in below for child in _children(parent)]
        found += below
    return found if below else []


def _children(process):
    with contextlib.suppress(psutil.Error):
        return process.children()
    return []


def _until(condition, seconds):
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return found
