"""Calibration, risk-coverage and conformal sets against hand-made figures and simulation."""

import json
import math

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss

from radonc_jax.evaluation import confidence


def predictions(shares, correct, **fields):
    return [
        {"case_id": f"c{i}", "patient_id": f"p{i}", "logprob": math.log(p), "correct": bool(right)}
        | fields
        for i, (p, right) in enumerate(zip(shares, correct, strict=True))
    ]


def draw(n, seed, labels="abcd", sure=2.0):
    """Cases whose label scores are the truth: the label is drawn from them."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, len(labels))) * sure
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    cases = []
    for row in shares:
        given = labels[int(row.argmax())]
        right = labels[int(rng.choice(len(labels), p=row))]
        cases.append(
            {
                "patient_id": len(cases),
                "reference": right,
                "answer": given,
                "correct": given == right,
                "logprob": float(np.log(row.max())),
                "label_logprobs": dict(zip(labels, np.log(row).tolist(), strict=True)),
            }
        )
    return cases


def free(cases):
    return [{k: v for k, v in case.items() if k != "label_logprobs"} for case in cases]


def test_reliability_and_ece_by_hand():
    result = confidence.assess(predictions([0.95, 0.95, 0.95, 0.95, 0.15], [1, 1, 1, 0, 1]))
    assert result["reliability"] == [
        {"confidence": pytest.approx(0.15), "accuracy": 1.0, "n": 1, "patients": 1},
        {"confidence": pytest.approx(0.95), "accuracy": 0.75, "n": 4, "patients": 4},
    ]
    assert result["ece"] == pytest.approx((1 * 0.85 + 4 * 0.2) / 5)
    # A probability of 1 belongs to the last bin.
    assert confidence.assess(predictions([1.0], [1]))["ece"] == 0


def test_brier_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    shares, correct = rng.random(300), rng.random(300) < 0.5
    result = confidence.assess(predictions(shares, correct))
    assert result["brier"] == pytest.approx(brier_score_loss(correct, shares), abs=1e-12)


def test_risk_coverage_by_hand_with_equal_confidences_together():
    result = confidence.assess(predictions([0.9, 0.8, 0.8, 0.2], [1, 0, 1, 0]))
    assert result["risk_coverage"] == [
        {"coverage": 0.25, "risk": 0.0},
        {"coverage": 0.75, "risk": pytest.approx(1 / 3)},
        {"coverage": 1.0, "risk": 0.5},
    ]
    assert result["coverage_at_5_percent_error"] == 0.25
    assert result["aurc"] == pytest.approx(0.25 * 0 + 0.5 / 3 + 0.25 * 0.5)
    # Wrong where it is surest: there is no coverage that is safe.
    worst = confidence.assess(predictions([0.9, 0.1], [0, 1]))
    assert worst["coverage_at_5_percent_error"] == 0.0
    # The first answers are wrong, but over all of them the error is small enough.
    late = confidence.assess(predictions([0.99, *[0.5] * 19], [0, *[1] * 19]))
    assert late["coverage_at_5_percent_error"] == 1.0


def test_a_calibrated_model_has_a_small_ece_and_an_overconfident_one_has_not():
    cases = free(draw(4000, seed=1))
    assert confidence.assess(cases)["ece"] < 0.03
    boasting = [case | {"logprob": case["logprob"] / 4} for case in cases]
    assert confidence.assess(boasting)["ece"] > 0.1


@pytest.mark.parametrize("kind", ["labels", "answer"])
def test_conformal_sets_cover_as_promised(kind):
    measured, answered = [], []
    for seed in range(60):
        validation, test = draw(99, seed, sure=1.0), draw(400, seed + 1000, sure=1.0)
        if kind == "answer":
            validation, test = free(validation), free(test)
        result = confidence.conformal(validation, test)
        assert result["kind"] == kind
        measured.append(result["measured_coverage"])
        answered.append(result["answered"])
    # By exchangeability the mean coverage is at least 0.9, at most 0.9 + 1 / 100 for labels.
    error = 3 * np.std(measured) / np.sqrt(60)
    assert np.mean(measured) > 0.9 - error
    if kind == "labels":
        assert np.mean(measured) < 0.91 + error
    assert 0 < np.mean(answered) < 1


def test_the_conformal_threshold_by_hand():
    # Ten validation cases: the rank is ceil(11 * 0.9) = 10, so the surest wrong answer is it.
    validation = predictions([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95], [0] * 8 + [1] * 2)
    test = predictions([0.75, 0.85], [0, 0])
    result = confidence.conformal(validation, test)
    assert result["threshold"] == pytest.approx(0.8)
    assert result["answered"] == 0.5 and result["measured_coverage"] == 0.5
    # With eight, no threshold can promise 90 %: every set is everything.
    few = confidence.conformal(validation[:8], test)
    assert few["threshold"] == 1.0
    assert few["answered"] == 0 and few["measured_coverage"] == 1
    with pytest.raises(ValueError, match="evaluate the validation split"):
        confidence.conformal([], test)


def test_without_probabilities_there_is_no_confidence():
    cases = predictions([0.5, 0.5], [1, 0])
    cases[1]["logprob"] = None
    assert confidence.assess(cases) is None


def test_all_wrong_and_all_alike_are_defined():
    result = confidence.assess(predictions([0.5] * 20, [0] * 20), predictions([0.5] * 20, [0] * 20))
    assert result["coverage_at_5_percent_error"] == 0.0
    assert result["conformal"]["measured_coverage"] == 1.0
    json.dumps(result, allow_nan=False)
