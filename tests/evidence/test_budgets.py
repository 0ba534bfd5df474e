"""Steps at equal time and at equal examples: by hand, and whatever else the machine does."""

from dataclasses import replace

import numpy as np
import pytest

from steep.evidence.budgets import in_its_time, on_its_examples, steps_for
from steep.evidence.study import RunRecord


def run(steps=100, cpu=1.0, seconds=None, preparation=0.0, examples=1600):
    return RunRecord(
        "", "", "confirm", (), 1.0, 0, 0, {}, "finished", steps=steps, examples=examples, cpu_seconds=cpu,
        seconds=cpu if seconds is None else seconds, preparation_seconds=preparation,
    )  # fmt: skip


DIVERGED = RunRecord("", "", "confirm", (), 1.0, 0, 0, {}, "diverged")


def test_an_arm_that_costs_twice_as_much_gets_half_the_steps():
    assert steps_for(in_its_time, [run(cpu=2.0)] * 3, [run()] * 3) == 50
    assert steps_for(in_its_time, [run(cpu=0.5)] * 3, [run()] * 3) == 200
    assert steps_for(in_its_time, [run(cpu=1.04)] * 3, [run()] * 3) is None  # equal enough
    assert steps_for(in_its_time, [run(cpu=500.0)], [run()]) == 1


def test_preparation_counts_as_time_of_either():
    """Baseline 0.5 + 1 s; the arm prepares for 1 s, so that half a second is left for steps of 0.01 s."""
    assert steps_for(in_its_time, [run(preparation=1.0)], [run(preparation=0.5)]) == 50
    assert steps_for(in_its_time, [run(preparation=0.5)], [run(preparation=0.5)]) is None
    assert steps_for(in_its_time, [run(preparation=9.0)], [run()]) == 1  # longer than the baseline's whole training


def test_equal_examples():
    assert steps_for(on_its_examples, [run(examples=3200)], [run()]) == 50  # two forward passes a step
    assert steps_for(on_its_examples, [run(examples=400)], [run()]) == 400
    assert steps_for(on_its_examples, [run(cpu=7.0)], [run()]) is None


def test_runs_that_diverged_tell_nothing_and_spare_pairs_of_the_baseline_are_not_looked_at():
    for fitting in (in_its_time, on_its_examples):
        assert steps_for(fitting, [DIVERGED, DIVERGED], [run(), run()]) is None
        assert steps_for(fitting, [DIVERGED, run(cpu=2.0, examples=3200)], [run(cpu=9), run()]) == 50
        assert steps_for(fitting, [run(cpu=2.0, examples=3200)], [run(), DIVERGED]) == 50


@pytest.mark.parametrize("seed", range(5))
def test_the_load_of_the_machine_changes_no_budget(seed):
    """Wall seconds inflated at will, CPU seconds by what slows all runs of a seed: budgets stay the same."""
    rng = np.random.default_rng(seed)
    quiet = [run(cpu=1.7, preparation=0.3)] * 8, [run(cpu=1.0)] * 8
    slow = rng.uniform(1, 1.5, 8)

    def loaded(runs):
        return [
            replace(
                r,
                seconds=r.seconds * rng.uniform(1, 10),
                cpu_seconds=r.cpu_seconds * by,
                preparation_seconds=r.preparation_seconds * by,
            )
            for r, by in zip(runs, slow, strict=True)
        ]

    assert steps_for(in_its_time, *map(loaded, quiet)) == steps_for(in_its_time, *quiet) == 41
    assert steps_for(on_its_examples, *map(loaded, quiet)) is None


def test_one_disturbed_run_changes_no_budget():
    arm, baseline = [run(cpu=2.0)] * 8, [run()] * 8
    assert steps_for(in_its_time, [run(cpu=20.0), *arm[1:]], baseline) == steps_for(in_its_time, arm, baseline)
