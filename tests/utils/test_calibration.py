"""Calibration metrics against their definitions, counted by hand."""

import itertools

import numpy as np
import pytest
import torch

from steep.utils.calibration import area_under_risk_coverage, expected_calibration_error


def binary(confidence):
    """Probabilities (N, 2) whose answer is class 0 with the given confidence (> 1/2)."""
    p = torch.as_tensor(confidence, dtype=torch.float64)
    return torch.stack([p, 1 - p], 1)


def random_case(n, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    probabilities = (3 * torch.randn(n, classes, generator=generator)).softmax(1)
    return probabilities, torch.randint(classes, (n,), generator=generator)


def ece_by_hand(probabilities, labels, bins):
    confidence, answer = probabilities.double().numpy().max(1), probabilities.numpy().argmax(1)
    total = 0.0
    for k in range(bins):
        inside = (confidence > k / bins) & (confidence <= (k + 1) / bins)
        if inside.any():
            accuracy = (answer == labels.numpy())[inside].mean()
            total += inside.sum() * abs(accuracy - confidence[inside].mean())
    return total / len(confidence)


def aurc_by_hand(confidence, wrong, order):
    risks = [np.mean([wrong[i] for i in order[: k + 1]]) for k in range(len(order))]
    return float(np.mean(risks))


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_ece_is_its_definition(bins):
    probabilities, labels = random_case(500, 4, seed=bins)
    expected = ece_by_hand(probabilities, labels, bins)
    assert expected > 0.1
    assert expected_calibration_error(probabilities, labels, bins=bins) == pytest.approx(expected, abs=1e-12)


def test_ece_of_calibrated_answers_is_zero_and_overconfidence_is_its_gap():
    labels = torch.tensor([0, 0, 0, 1] * 25)  # class 0 three times in four
    assert expected_calibration_error(binary([0.75] * 100), labels) == pytest.approx(0, abs=1e-12)
    assert expected_calibration_error(binary([0.95] * 100), labels) == pytest.approx(0.2, abs=1e-12)


def test_ece_bins_are_closed_above():
    # 0.75 belongs to (0.5, 0.75], so of four bins it does not share one with 0.9: gaps 0.25 and 0.9 are not netted
    assert expected_calibration_error(binary([0.75, 0.9]), torch.tensor([0, 1]), bins=4) == pytest.approx(0.575)


def test_aurc_is_its_definition():
    probabilities, labels = random_case(300, 5, seed=0)
    confidence, wrong = probabilities.max(1).values.numpy(), (probabilities.argmax(1) != labels).numpy()
    expected = aurc_by_hand(confidence, wrong, np.argsort(-confidence))
    assert area_under_risk_coverage(probabilities, labels) == pytest.approx(expected, abs=1e-12)


def test_aurc_is_least_when_mistakes_are_the_least_confident_answers():
    probabilities, labels = binary([0.9, 0.8, 0.7, 0.6]), torch.tensor([0, 0, 0, 1])
    assert area_under_risk_coverage(probabilities, labels) == pytest.approx(1 / 16)
    assert area_under_risk_coverage(probabilities, labels.flip(0)) == pytest.approx(25 / 48)  # the surest is wrong


def test_aurc_of_ties_is_the_mean_over_their_orders():
    confidence, wrong = [0.9, 0.7, 0.7, 0.7, 0.6], [0, 1, 0, 0, 1]
    orders = [(0, *middle, 4) for middle in itertools.permutations([1, 2, 3])]
    expected = np.mean([aurc_by_hand(confidence, wrong, order) for order in orders])
    assert area_under_risk_coverage(binary(confidence), torch.tensor(wrong)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric", [expected_calibration_error, area_under_risk_coverage])
def test_order_of_examples_and_of_classes_is_irrelevant(metric):
    probabilities, labels = random_case(200, 3, seed=1)
    shuffled = torch.randperm(200, generator=torch.Generator().manual_seed(2))
    value = metric(probabilities, labels)
    assert metric(probabilities[shuffled], labels[shuffled]) == pytest.approx(value, abs=1e-12)
    assert metric(probabilities[:, [2, 0, 1]], (labels + 1) % 3) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("metric", [expected_calibration_error, area_under_risk_coverage])
def test_bad_input_is_named(metric):
    probabilities, labels = random_case(4, 3, seed=0)
    with pytest.raises(ValueError, match=r"\(N, K\)"):
        metric(probabilities, labels[:3])
    with pytest.raises(ValueError, match="N > 0"):
        metric(probabilities[:0], labels[:0])
    for bad in (probabilities.log(), probabilities * 2, probabilities * torch.nan):
        with pytest.raises(ValueError, match="sum to one: apply softmax"):
            metric(bad, labels)


def test_bins_below_one_are_refused():
    with pytest.raises(ValueError, match="bins=0"):
        expected_calibration_error(*random_case(4, 3, seed=0), bins=0)
