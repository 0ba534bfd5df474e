"""The common checks, over every method."""

import pytest

import steep
from steep.testing import checks

# checks of one method share its runs, so they stay in one process
ALL = [
    pytest.param(check, id=f"{method.id}-{name}", marks=pytest.mark.xdist_group(method.id))
    for method in steep.methods().values()
    for name, check in checks(method)
]


@pytest.mark.parametrize("check", ALL)
def test_common(check):
    check()
