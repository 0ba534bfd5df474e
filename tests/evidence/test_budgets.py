"""Budgets at equal time and equal examples: medians of pairs, CPU seconds, preparation counted, load left out."""

import dataclasses

import pytest

from steep.evidence.budgets import at_equal_examples, at_equal_time, steps_for
from steep.evidence.study import RunRecord


def run(**changes):
    plain = RunRecord("key", "arm", "confirm", [], 1.0, 0, 0, {}, "finished", steps=100, examples=800)
    return dataclasses.replace(plain, **{"seconds": 2.0, "cpu_seconds": 2.0, **changes})


def test_an_arm_that_costs_twice_as_much_gets_half_the_steps():
    assert steps_for(at_equal_time, [run(cpu_seconds=4.0)] * 3, [run()] * 3) == 50


def test_what_an_arm_prepares_counts_into_its_time():
    assert at_equal_time(run(preparation_seconds=1.0), run()) == 50
    assert at_equal_time(run(preparation_seconds=1.0), run(preparation_seconds=1.0)) == 100
    assert steps_for(at_equal_time, [run(preparation_seconds=5.0)], [run()]) == 1  # it never gets to train


def test_the_load_of_the_machine_does_not_matter():
    """Wall seconds are not looked at; CPU seconds that rise for both of a pair cancel."""
    loaded = [run(seconds=40.0), run(cpu_seconds=6.0)]
    arms = [run(seconds=1.0, cpu_seconds=4.0), run(cpu_seconds=12.0)]
    assert steps_for(at_equal_time, arms, loaded) == 50


def test_arms_within_five_per_cent_need_no_runs_of_their_own():
    assert steps_for(at_equal_time, [run(cpu_seconds=2.05)], [run()]) is None
    assert steps_for(at_equal_time, [run(cpu_seconds=2.2)], [run()]) == 91


def test_equal_examples_count_every_forward():
    assert at_equal_examples(run(examples=1600), run()) == 50
    assert steps_for(at_equal_examples, [run(examples=400)], [run()]) == 200
    assert steps_for(at_equal_examples, [run()], [run()]) is None


def test_diverged_runs_say_nothing():
    diverged = run(outcome="diverged", seconds=0.0, cpu_seconds=0.0, steps=0, examples=0)
    assert steps_for(at_equal_time, [diverged], [run()]) is None
    assert steps_for(at_equal_time, [diverged, run(cpu_seconds=4.0)], [run(), run()]) == 50


@pytest.mark.parametrize("fitting", [at_equal_time, at_equal_examples])
def test_pairs_are_compared_and_not_sums(fitting):
    """One slow seed of the arm moves the median of three pairs not at all."""
    slow = run(cpu_seconds=60.0, examples=24_000)
    assert steps_for(fitting, [run(cpu_seconds=4.0, examples=1600)] * 2 + [slow], [run()] * 3) == 50
