"""The common checks, over every card there is."""

import pytest

import steep
from steep.testing import checks

ALL = [
    pytest.param(check, id=f"{method.id}-{name}")
    for method in steep.methods().values()
    for name, check in checks(method)
]


@pytest.mark.parametrize("check", ALL)
def test_common(check):
    check()
