"""The line that repeats a run says everything that `steep fit` must be told, and is read back as it was meant."""

from __future__ import annotations

import itertools
import shlex
from typing import Any

import pytest

from steep.cli.training import with_settings
from steep.evidence.report.reproduce import command
from steep.evidence.study import RunRecord


def record(**changes: Any) -> RunRecord:
    plain: dict[str, Any] = {"methods": [], "lr_scale": 1.0, "seed": 3, "split_seed": 3}
    budget = {"epochs": None, "steps": 20, "seconds": None}
    return RunRecord("key", "arm", "confirm", budget=budget, outcome="finished", **plain | changes)


def settings(line: str) -> dict[str, dict[str, Any]]:
    """What `steep fit` makes of the line's `--set`, by method."""
    words = shlex.split(line)
    values = {option: [v for o, v in itertools.pairwise(words) if o == option] for option in words}
    return dict(with_settings(values["--method"], values.get("--set", [])))


def test_a_plain_run_is_named_by_recipe_budget_and_seed() -> None:
    assert command(record(), "digits") == "steep fit digits --steps 20 --seed 3 --threads 1"


def test_what_differs_from_the_plain_run_is_said() -> None:
    assert " --lr-scale 0.30000000000000004 " in command(record(lr_scale=0.1 + 0.2), "digits")
    assert " --seed 500003 --split-seed 3 " in command(record(seed=500_003), "digits")
    budget = {"epochs": 1.5, "steps": 7, "seconds": 0.1}
    line = command(RunRecord("key", "arm", "tune", [], 1.0, 0, 0, budget, "finished"), "digits")
    assert " --epochs 1.5 --steps 7 --seconds 0.1 " in line


@pytest.mark.parametrize(
    "value",
    [
        1e-300,
        0.1 + 0.2,
        3,
        True,
        None,
        (1, 2),
        [0.9, 0.999],
        "static",
        "1",
        "None",
        "two words",
        "it's",
        "a=b",
        "<b>",
        "",
    ],
)
def test_values_come_back_as_they_were(value: Any) -> None:
    line = command(record(methods=[("sven", {"value": value})]), "digits")
    assert settings(line) == {"sven": {"value": value}}
    assert type(settings(line)["sven"]["value"]) is type(value)


def test_settings_of_joined_methods_are_told_apart() -> None:
    methods = [("sven", {"lr": 0.1, "rank": 8}), ("ps-kd", {"lr": 0.2})]
    line = command(record(methods=methods), "digits")
    assert settings(line) == dict(methods)
    assert line.index("--method sven") < line.index("--method ps-kd")


def test_recipes_are_quoted_for_the_shell_and_those_without_a_name_have_no_line() -> None:
    assert shlex.split(command(record(), "my file.py:recipe; rm"))[2] == "my file.py:recipe; rm"
    assert command(record(), "") == ""
