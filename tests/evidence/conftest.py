"""Shared by the tests of comparisons: worker processes that outlive one comparison, as starting them costs seconds."""

import importlib.util
from pathlib import Path
from typing import ClassVar

import pytest
from loky import ProcessPoolExecutor

import steep
from steep.evidence.runs import workers


class KeptExecutor:
    """A process pool that outlives the comparison that used it, unless a worker died or still has work to do."""

    kept: ClassVar[dict[int, "KeptExecutor"]] = {}

    def __init__(self, count, **options):
        self.count, self.executor = count, ProcessPoolExecutor(count, **options)
        self.submit = self.executor.submit

    def shutdown(self, wait, kill_workers):
        if kill_workers and (self.executor._flags.broken or self.executor._pending_work_items):
            self.kept.pop(self.count, None)
            self.executor.shutdown(wait=wait, kill_workers=True)

    @classmethod
    def of(cls, count, **options):
        if count not in cls.kept:
            cls.kept[count] = cls(count, **options)
        return cls.kept[count]


@pytest.fixture(autouse=True, scope="session")
def kept_workers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "ProcessPoolExecutor", KeptExecutor.of)
        yield
    for kept in KeptExecutor.kept.values():
        kept.executor.shutdown(wait=True, kill_workers=True)


@pytest.fixture(scope="session")
def kills():
    """The benchmark of that name, as a module."""
    path = Path(__file__).parents[2] / "benchmarks" / "kills.py"
    spec = importlib.util.spec_from_file_location("kills", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def undisturbed(kills, kept_workers, tmp_path_factory):
    """A recipe, and the table of a comparison of one trial and two seeds that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = folder / "tiny.py"
    recipe.write_text(kills.RECIPE)
    sizes = {"trials": 1, "seeds": 2, "workers": 1}
    study = steep.compare(f"{recipe}:recipe", ["adabelief"], **sizes, out=folder / "out", progress=False)
    return recipe, kills.table(study)
