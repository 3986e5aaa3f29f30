"""Intervals and tests against scipy, closed forms and simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from radonc_jax.evaluation import statistics


def predictions(correct, rouge=None, patients=None, task="icd"):
    return [
        {
            "case_id": f"c{i}",
            "patient_id": f"p{i}" if patients is None else patients[i],
            "task": task,
            "reference": "C61",
            "correct": bool(right),
            "rouge1": float(right) if rouge is None else rouge[i],
        }
        for i, right in enumerate(correct)
    ]


# -- Wilcoxon, McNemar, Holm -----------------------------------------------------------------


def test_wilcoxon_exact_by_hand():
    # All four differences favour tuned: the chance of that is 1 / 2**4.
    result = statistics.wilcoxon_one_sided([2, 4, 6, 8], [1, 2, 3, 4])
    assert result["p_value"] == pytest.approx(1 / 16)
    assert result["statistic"] == 10
    assert (result["alternative"], result["n"], result["n_nonzero"]) == ("greater", 4, 4)
    # And all four against it give p = 1: the test has the right side.
    assert statistics.wilcoxon_one_sided([1, 2, 3, 4], [2, 4, 6, 8])["p_value"] == 1


def test_wilcoxon_agrees_with_scipy_and_leaves_ties_out():
    rng = np.random.default_rng(400)
    original, tuned = rng.integers(0, 2, (2, 400)).astype(float)
    difference = tuned - original
    expected = stats.wilcoxon(difference, alternative="greater", zero_method="wilcox")
    result = statistics.wilcoxon_one_sided(tuned, original)
    assert result["n"] == 400
    assert result["n_nonzero"] == np.count_nonzero(difference)
    assert result["statistic"] == expected.statistic
    assert result["p_value"] == pytest.approx(expected.pvalue, rel=1e-12)


def test_wilcoxon_is_exact_on_few_cases_that_differ_among_many_that_tie():
    original = np.array([1] * 3 + [0] * 8 + [1] * 500)
    tuned = np.array([0] * 3 + [1] * 8 + [1] * 500)
    # With right and wrong alone all ranks tie, and the exact test is the sign test.
    expected = stats.binom.sf(7, 11, 0.5)
    assert statistics.wilcoxon_one_sided(tuned, original)["p_value"] == pytest.approx(expected)


def test_wilcoxon_of_equal_models_is_defined():
    result = statistics.wilcoxon_one_sided([0.1 + 0.2, 1.0], [0.3, 1.0])
    assert (result["statistic"], result["p_value"], result["n_nonzero"]) == (0.0, 1.0, 0)


def test_mcnemar_is_the_two_sided_binomial():
    assert statistics.mcnemar_exact(0, 5) == pytest.approx(2 / 2**5)
    assert statistics.mcnemar_exact(5, 0) == pytest.approx(2 / 2**5)
    assert statistics.mcnemar_exact(3, 3) == 1
    assert statistics.mcnemar_exact(0, 0) == 1
    tail = sum(math.comb(20, k) for k in range(16, 21)) / 2**20
    assert statistics.mcnemar_exact(4, 16) == pytest.approx(2 * tail)


def test_holm():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.6, 0.9]) == [1, 1]
    assert statistics.holm([]) == []


def test_tests_keep_their_level_under_no_difference():
    rng = np.random.default_rng(0)
    rejected = sum(
        statistics.wilcoxon_one_sided(rng.random(80) < 0.4, rng.random(80) < 0.4)["p_value"] < 0.05
        for _ in range(1000)
    )
    # Binomial(1000, 0.05): three standard deviations are 0.021.
    assert 0.02 < rejected / 1000 < 0.072


# -- bootstrap -------------------------------------------------------------------------------


def test_weights_draw_every_patient_equally_whatever_the_chunks(monkeypatch):
    patients = ["b", "a", "b", "c"]
    weights = np.concatenate(list(statistics.patient_weights(patients, 500, seed=1)))
    assert weights.shape == (500, 3)
    assert (weights.sum(1) == 3).all()
    assert weights.mean(0) == pytest.approx([1, 1, 1], abs=0.12)
    monkeypatch.setattr(statistics, "_CHUNK_ENTRIES", 21)
    chunks = list(statistics.patient_weights(patients, 500, seed=1))
    assert len(chunks) == 72
    np.testing.assert_array_equal(np.concatenate(chunks), weights)


def test_interval_is_by_patient_and_not_by_case():
    rng = np.random.default_rng(2)
    patients = np.repeat(np.arange(60), 10)
    values = np.repeat(rng.random(60) < 0.5, 10)  # ten cases of a patient say the same
    together = statistics.bootstrap_mean(values, patients, seed=0)
    alone = statistics.bootstrap_mean(values, np.arange(600), seed=0)
    assert together["value"] == alone["value"] == values.mean()
    width, narrow = (r["high"] - r["low"] for r in (together, alone))
    assert width == pytest.approx(narrow * math.sqrt(10), rel=0.15)


def test_interval_is_the_central_95_percent():
    assert statistics.percentile_interval(np.arange(1001)) == pytest.approx((25, 975))


def test_intervals_cover():
    rng = np.random.default_rng(4)
    patients = np.repeat(np.arange(50), 3)
    covered = 0
    for number in range(400):
        chance = np.repeat(rng.beta(3, 3, 50), 3)  # cases of a patient share their chance
        values = rng.random(150) < chance
        result = statistics.bootstrap_mean(values, patients, resamples=300, seed=number)
        covered += result["low"] <= 0.5 <= result["high"]
    # 0.95 within three standard deviations of Binomial(400, 0.95), less the percentile
    # method's known shortfall at 50 patients.
    assert 0.91 <= covered / 400 <= 0.985


def test_bootstrap_without_resamples_or_cases():
    assert statistics.bootstrap_mean([1, 0], ["a", "b"], resamples=0) == {
        "value": 0.5,
        "low": None,
        "high": None,
    }
    with pytest.raises(ValueError, match="no cases"):
        statistics.bootstrap_mean([], [])


# -- comparing models ------------------------------------------------------------------------


def test_compare_models_by_hand():
    original = predictions([1, 0, 0, 0, 1, 0], rouge=[1, 0.2, 0.2, 0.2, 1, 0.5])
    tuned = predictions([1, 1, 1, 1, 0, 0], rouge=[1, 1, 1, 1, 0.4, 0.5])
    tests = statistics.compare_models(original, tuned[::-1])
    assert tests["mcnemar"] == {"only_original": 1, "only_tuned": 3, "p_value": 0.625}
    assert tests["difference"]["value"] == pytest.approx(2 / 6)
    assert tests["difference"]["low"] <= 2 / 6 <= tests["difference"]["high"]
    assert tests["difference_rouge1"]["value"] == pytest.approx((3 * 0.8 - 0.6) / 6)
    assert tests["wilcoxon"]["n_nonzero"] == tests["wilcoxon_rouge1"]["n_nonzero"] == 4
    # |differences| 0.8 0.8 0.8 0.6: the ranks of the three in favour are 3, 3 and 3.
    assert tests["wilcoxon_rouge1"]["statistic"] == 9


def test_difference_is_paired():
    rng = np.random.default_rng(0)
    original = rng.random(300) < 0.5
    better = original | (rng.random(300) < 0.05)  # right wherever the original is
    result = statistics.compare_models(predictions(original), predictions(better))["difference"]
    assert 0 < result["low"] < result["value"] < result["high"] < 0.06


def test_models_that_never_differ():
    same = predictions([1, 0, 1])
    tests = statistics.compare_models(same, same)
    assert tests["wilcoxon"]["p_value"] == tests["mcnemar"]["p_value"] == 1
    assert tests["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_other_cases_are_refused():
    original = predictions([1, 0, 1])
    with pytest.raises(ValueError, match=r"tuned \(2 cases\).* 1 are in one only, such as c2"):
        statistics.compare_models(original, original[:2])
    with pytest.raises(ValueError, match="tuned: 1 case ids stand more than once"):
        statistics.compare_models(original, [*original, original[0]])
    with pytest.raises(ValueError, match="disagree on the task of 3 cases"):
        statistics.compare_models(original, predictions([1, 0, 1], task="modality"))
    changed = [dict(p, reference="C00" if p["case_id"] == "c1" else "C61") for p in original]
    with pytest.raises(ValueError, match="the reference of 1 cases, such as c1") as error:
        statistics.compare_models(original, changed)
    assert "C00" not in str(error.value)
    with pytest.raises(ValueError, match="hold no cases"):
        statistics.compare_models([], [])
