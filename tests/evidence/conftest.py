"""Shared by the tests of comparisons: worker processes that outlive one comparison, as starting them costs seconds."""

from typing import ClassVar

import pytest
from loky import ProcessPoolExecutor

from steep.evidence.runs import workers


class KeptExecutor:
    """A process pool that a comparison cannot shut down when it ends well; one that ends badly kills its workers."""

    kept: ClassVar[dict[int, "KeptExecutor"]] = {}

    def __init__(self, count, **options):
        self.count, self.executor = count, ProcessPoolExecutor(count, **options)
        self.submit = self.executor.submit

    def shutdown(self, wait, kill_workers):
        if kill_workers:
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
    for executor in list(KeptExecutor.kept.values()):
        executor.shutdown(wait=True, kill_workers=True)
