"""The common checks, over every card there is."""

import pytest

import steep
from steep.testing import checks

ALL = [pytest.param(check, id=f"{card.id}-{name}") for card in steep.cards().values() for name, check in checks(card)]


@pytest.mark.parametrize("check", ALL)
def test_common(check):
    check()
