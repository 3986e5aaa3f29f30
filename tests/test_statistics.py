"""Intervals and tests against scipy, closed forms and simulation."""

import itertools
import json
import math

import numpy as np
import pytest
from scipy import stats

from radonc_jax.evaluation import comparison, statistics
from radonc_jax.evaluation.page import DEFINITIONS
from radonc_jax.evaluation.verdict import standing


def predictions(correct, rouge=None, patients=None, task="icd"):
    return [
        {
            "case_id": f"c{i}",
            "patient_id": f"p{i}" if patients is None else patients[i],
            "task": task,
            "reference": "C61",
            "answer": "C61" if right else None,
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


@pytest.mark.parametrize("n", [400, 1000])
def test_wilcoxon_of_many_cases_agrees_with_scipy_and_leaves_ties_out(n):
    rng = np.random.default_rng(n)
    original, tuned = rng.integers(0, 11, (2, n)) / 10
    difference = (tuned - original).round(12)
    expected = stats.wilcoxon(difference, alternative="greater", zero_method="wilcox")
    result = statistics.wilcoxon_one_sided(tuned, original)
    assert result["n"] == n
    assert result["n_nonzero"] == np.count_nonzero(difference) > statistics.EXACT_CASES
    assert result["statistic"] == expected.statistic
    assert result["p_value"] == pytest.approx(expected.pvalue, rel=1e-12)
    assert result["method"] == "normal"


@pytest.mark.parametrize("n", [3, 12, 50, 120])
def test_wilcoxon_without_ties_is_scipys_exact_test(n):
    rng = np.random.default_rng(n)
    for shift in (-0.3, 0, 0.3):
        tuned, original = rng.normal(shift, 1, n), rng.normal(0, 1, n)
        expected = stats.wilcoxon(tuned - original, alternative="greater", method="exact")
        result = statistics.wilcoxon_one_sided(tuned, original)
        assert result["statistic"] == expected.statistic
        assert result["p_value"] == pytest.approx(expected.pvalue, rel=1e-12)
        assert result["method"] == "exact"


@pytest.mark.parametrize("n", [1, 4, 9, 14])
def test_wilcoxon_with_ties_is_what_enumeration_of_all_signs_gives(n):
    rng = np.random.default_rng(n)
    signs = np.array(list(itertools.product((-1, 1), repeat=n)))
    for _ in range(5):
        difference = rng.choice([-1, -0.75, -0.5, -0.25, 0.25, 0.5, 0.75, 1], n)
        ranks = stats.rankdata(np.abs(difference))
        sums = (ranks * (signs > 0)).sum(1)
        statistic = ranks[difference > 0].sum()
        result = statistics.wilcoxon_one_sided(difference, np.zeros(n))
        assert result["statistic"] == statistic
        assert result["p_value"] == pytest.approx(np.mean(sums >= statistic), rel=1e-12)


def test_wilcoxon_changes_little_where_it_is_no_longer_enumerated(monkeypatch):
    rng = np.random.default_rng(5)
    for shift in (-0.1, 0, 0.1, 0.2):
        difference = rng.normal(shift, 1, statistics.EXACT_CASES).round(1)
        difference[difference == 0] = 0.1
        exact = statistics.wilcoxon_one_sided(difference, 0 * difference)
        with monkeypatch.context() as patch:
            patch.setattr(statistics, "EXACT_CASES", 0)
            normal = statistics.wilcoxon_one_sided(difference, 0 * difference)
        assert (exact["method"], normal["method"]) == ("exact", "normal")
        assert exact["p_value"] == pytest.approx(normal["p_value"], abs=2e-3, rel=0.02)


def test_the_definitions_say_where_wilcoxon_is_not_exact():
    assert f"more than {statistics.EXACT_CASES} cases differ" in DEFINITIONS["Wilcoxon p"]


def right_or_wrong(only_tuned, only_original):
    """Of many cases on which the models agree, these that only one of them gets right."""
    tuned = np.array([1] * only_tuned + [0] * only_original + [1] * 500)
    original = np.array([0] * only_tuned + [1] * only_original + [1] * 500)
    return statistics.wilcoxon_one_sided(tuned, original)["p_value"]


def test_wilcoxon_of_right_and_wrong_is_the_binomial():
    # All ranks tie, and the exact test is the sign test.
    by_hand = sum(math.comb(11, k) for k in range(8, 12)) / 2**11
    assert right_or_wrong(8, 3) == pytest.approx(by_hand)
    for only in ((11, 4), (11, 3), (31, 19), (400, 350)):
        assert right_or_wrong(*only) == pytest.approx(stats.binom.sf(only[0] - 1, sum(only), 0.5))


@pytest.mark.parametrize("values", [(1,), (1, 0.5)], ids=["right or wrong", "with one half"])
def test_wilcoxon_keeps_its_level_exactly_on_14_to_50_cases_that_differ(values):
    """The chance of p <= 0.05 where each case is as likely for either model, summed up exactly."""
    for n in range(14, 51):
        level, half = 0.0, len(values) - 1  # one difference of one half beside n - 1 of one
        for wins in range(n - half + 1):
            for sign in (1, -1)[: half + 1]:
                difference = np.ones(n)
                difference[wins : n - half] = -1
                if half:
                    difference[-1] = sign / 2
                if statistics.wilcoxon_one_sided(difference, np.zeros(n))["p_value"] <= 0.05:
                    level += math.comb(n - half, wins) / 2**n
        assert 0.017 < level <= 0.05, n


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
    rejected = {"wilcoxon": 0, "graded": 0, "mcnemar": 0, "bootstrap": 0}
    patients = np.arange(120)
    for number in range(1000):
        one, other = rng.random((2, 120)) < 0.4
        rejected["wilcoxon"] += statistics.wilcoxon_one_sided(one, other)["p_value"] < 0.05
        graded = statistics.wilcoxon_one_sided(*rng.random((2, 120)).round(1))
        rejected["graded"] += graded["p_value"] < 0.05
        only = int((one & ~other).sum()), int((other & ~one).sum())
        rejected["mcnemar"] += statistics.mcnemar_exact(*only) < 0.05
        interval = statistics.bootstrap_mean(
            one.astype(float) - other, patients, resamples=300, seed=number
        )
        rejected["bootstrap"] += not interval["low"] <= 0 <= interval["high"]
    # Binomial(1000, 0.05): three standard deviations are 0.021. The exact test may stay below.
    for name in ("wilcoxon", "graded", "bootstrap"):
        assert 0.029 < rejected[name] / 1000 < 0.071, name
    assert 0.01 < rejected["mcnemar"] / 1000 < 0.071


@pytest.mark.parametrize("likeness", [0.999, 0.5])
def test_the_test_by_patient_keeps_its_level_where_cases_of_a_patient_agree(likeness):
    rng = np.random.default_rng(1)
    by_case = by_patient = 0
    patients = [f"p{i // 8}" for i in range(320)]
    size = (1 / likeness - 1) / 2
    for _ in range(1000):
        chances = np.repeat(rng.beta(size, size, (2, 40)), 8, axis=1)
        given = (
            predictions(answers, patients=patients, task="regimen")  # no classes: sooner done
            for answers in rng.random((2, 320)) < chances
        )
        tests = comparison.compare_models(*given, bootstrap=0)
        by_case += tests["wilcoxon"]["p_value"] < 0.05
        by_patient += tests["wilcoxon_by_patient"]["p_value"] < 0.05
    # Binomial(1000, 0.05): three standard errors above it; the exact test of few may stay below.
    assert 0.02 < by_patient / 1000 <= 0.071
    assert by_case / 1000 > 0.2


@pytest.mark.parametrize("each", [1, 4])
def test_the_test_by_patient_of_two_sides(each):
    # 2 patients whose cases only the original gets right, 7 of whom only the tuned model does.
    original = np.repeat([1] * 2 + [0] * 7 + [1] * 11, each)
    tuned = np.repeat([0] * 2 + [1] * 7 + [1] * 11, each)
    given = (
        predictions(answers, patients=[f"p{i // each}" for i in range(len(answers))])
        for answers in (original, tuned)
    )
    tests = comparison.compare_models(*given, bootstrap=200)
    by_patient = tests["wilcoxon_by_patient"]
    assert by_patient["p_value"] == pytest.approx(stats.binom.sf(6, 9, 0.5))
    assert by_patient["p_two_sided"] == pytest.approx(statistics.mcnemar_exact(2, 7))
    assert (by_patient["n"], tests["wilcoxon"]["n"]) == (20, 20 * each)
    if each == 1:
        assert tests["wilcoxon"]["p_value"] == by_patient["p_value"]
        assert tests["mcnemar"]["p_value"] == by_patient["p_two_sided"]


def test_effect_sizes_by_hand():
    # Ranks of |1|, |2|, |3|, |-4|: three in favour (6 of 10), one against (4 of 10).
    assert statistics.rank_biserial([1, 2, 3, 0], [0, 0, 0, 4]) == pytest.approx(0.2)
    assert statistics.rank_biserial([1, 1], [1, 1]) == 0
    assert statistics.cohen_h(0.5, 0.5) == 0
    assert statistics.cohen_h(1, 0) == pytest.approx(math.pi)
    assert statistics.paired_odds_ratio(4, 16) == 4
    assert statistics.paired_odds_ratio(0, 5) == 11
    assert statistics.paired_odds_ratio(0, 0) is None


def test_rank_biserial_agrees_with_scipys_statistic():
    rng = np.random.default_rng(2)
    tuned, original = rng.random((2, 90)).round(1)
    test = statistics.wilcoxon_one_sided(tuned, original)
    n = test["n_nonzero"]
    expected = 2 * test["statistic"] / (n * (n + 1) / 2) - 1
    assert statistics.rank_biserial(tuned, original) == pytest.approx(expected, abs=1e-12)


# -- bootstrap -------------------------------------------------------------------------------


def test_weights_draw_every_patient_equally_whatever_the_chunks(monkeypatch):
    draw = statistics.PatientBootstrap(["b", "a", "b", "c"], 500, seed=1)
    weights = np.concatenate(list(draw.weights()))
    assert weights.shape == (500, 3)
    assert (weights.sum(1) == 3).all()
    assert weights.mean(0) == pytest.approx([1, 1, 1], abs=0.12)
    monkeypatch.setattr(statistics, "_CHUNK_ENTRIES", 21)
    chunks = list(draw.weights())
    assert len(chunks) == 72
    np.testing.assert_array_equal(np.concatenate(chunks), weights)
    # Nor does it matter whether draws are kept for the next use.
    monkeypatch.setattr(statistics, "_KEPT_ENTRIES", 0)
    np.testing.assert_array_equal(np.concatenate(list(draw.weights())), weights)


def test_bootstrap_means_are_those_of_the_drawn_cases():
    rng = np.random.default_rng(0)
    patients = rng.integers(0, 9, 40).astype(str)
    values, inside = rng.random((40, 2)), rng.random((40, 2)) < 0.5
    draw = statistics.PatientBootstrap(patients, 25, seed=3)
    samples = draw.mean_samples(values, inside)
    names = np.unique(patients)
    for row, weights in enumerate(np.concatenate(list(draw.weights()))):
        times = weights[np.searchsorted(names, patients)]
        for column in range(2):
            counted = times * inside[:, column]
            expected = np.average(values[:, column], weights=counted)
            assert samples[row, column] == pytest.approx(expected, abs=1e-12)


def test_interval_is_by_patient_and_not_by_case():
    rng = np.random.default_rng(2)
    patients = np.repeat(np.arange(60), 10)
    values = np.repeat(rng.random(60) < 0.5, 10)  # ten cases of a patient say the same
    together = statistics.bootstrap_mean(values, patients, seed=0)
    alone = statistics.bootstrap_mean(values, np.arange(600), seed=0)
    assert together["value"] == alone["value"] == values.mean()
    width, narrow = (r["high"] - r["low"] for r in (together, alone))
    assert width == pytest.approx(narrow * math.sqrt(10), rel=0.15)


def test_interval_is_the_central_95_percent_and_wider_for_few_patients():
    samples = np.arange(1001.0)
    many = statistics.PatientBootstrap(np.arange(10**6), 0, 0)
    assert many.interval(samples) == pytest.approx((25, 975), abs=0.01)
    few = statistics.PatientBootstrap(np.arange(10), 0, 0)
    # Hesterberg 2015: the quantile is Phi(sqrt(10 / 9) t(0.025, 9)).
    low = 1000 * stats.norm.cdf(math.sqrt(10 / 9) * stats.t.ppf(0.025, 9))
    assert few.interval(samples) == pytest.approx((low, 1000 - low))
    assert many.interval(np.full(3, np.nan)) == (None, None)


def simulated_coverage(mean, patients, each, *, share, likeness=1 / 7, runs=2000):
    """How often the interval holds the mean; the cases of a patient have one chance to be right,
    from a beta distribution in which they correlate by `likeness`."""
    rng = np.random.default_rng(4)
    index = np.repeat(np.arange(patients), each)
    size = 1 / likeness - 1
    chance = rng.beta(mean * size, (1 - mean) * size, (runs, patients))
    values = rng.random((runs, patients * each)) < np.repeat(chance, each, axis=1)
    names = [str(run) for run in range(runs)]
    columns = dict(zip(names, values, strict=True))
    found = statistics.bootstrap_means(columns, index, shares=names if share else ())
    return np.mean([f["low"] <= mean <= f["high"] for f in found.values()])


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(("patients", "each"), [(40, 3), (120, 1)])
def test_intervals_of_means_cover(patients, each, share):
    assert 0.93 <= simulated_coverage(2 / 3, patients, each, share=share) <= 0.97


@pytest.mark.parametrize(("patients", "each", "most"), [(40, 3, 0.98), (141, 3, 0.97)])
@pytest.mark.parametrize("mean", [0.9, 0.95, 0.98])
def test_intervals_of_shares_cover_near_1(mean, patients, each, most):
    assert 0.935 <= simulated_coverage(mean, patients, each, share=True) <= most


@pytest.mark.parametrize("mean", [0.9, 0.925, 0.95, 0.98])
def test_intervals_of_shares_cover_where_few_patients_hold_all_errors(mean):
    assert 0.935 <= simulated_coverage(mean, 40, 3, share=True, likeness=0.5) <= 0.975
    assert "also where a few of 40 patients hold nearly all" in DEFINITIONS["95 % interval"]


def test_the_ends_of_a_share_are_those_from_which_the_value_is_t_away():
    draw = statistics.PatientBootstrap(np.arange(100), 0, 0)
    t = stats.t.ppf(0.975, 99)
    low, high = draw.share_interval(0.9, 0.02**2)
    for end in (low, high):
        assert abs(0.9 - end) == pytest.approx(
            t * math.sqrt(0.02**2 * end * (1 - end) / (0.9 * 0.1))
        )
    assert low < 0.9 < high and draw.share_interval(0.9, 0.0) == statistics.constant_interval(
        0.9, 100
    )
    samples = 0.9 + 0.02 * np.tile([-1.0, 1.0], 50)
    assert statistics.unbiased_variance(samples, 100) == pytest.approx(0.02**2 * 100 / 99)
    assert statistics.unbiased_variance(samples, 1) == 0


def test_the_variance_factor_is_that_of_data_with_the_added_cases():
    # 8 patients of 2 cases, three wrong cases; a quarter case each is an eighth of a patient.
    right = np.array([0, 1, 2, 2, 2, 2, 2, 2])
    value = right.sum() / 16
    found = statistics.variance_factor(
        value,
        (right - 2 * value) / 16,
        2,
        (-value / 8, value**2 / 64),
        ((1 - value) / 8, (1 - value) ** 2 / 64),
    )
    shares = np.append(right / 2, [0, 1])
    weights = np.append(np.ones(8), [1 / 8, 1 / 8])
    mean = np.average(shares, weights=weights)
    spread = np.average((shares - mean) ** 2, weights=weights)
    expected = spread / (mean * (1 - mean)) / (np.var(right / 2) / (value * (1 - value)))
    # The number of patients stays 8 in the variance of the mean.
    assert found == pytest.approx(expected)
    assert found > 1
    one = np.repeat([0.0, 1.0], [3, 37]) - 37 / 40
    ends = [(x / 40, x**2 / 1600) for x in (-37 / 40, 3 / 40)]
    assert statistics.variance_factor(37 / 40, one / 40, 1, *ends) == pytest.approx(1)


@pytest.mark.parametrize(("n", "most"), [(40, 0.981), (120, 0.972), (422, 0.97)])
def test_intervals_of_shares_cover_exactly_computed(n, most):
    """One case a patient: the interval depends on the number of right answers alone."""
    values = np.arange(n)[:, None] < np.arange(n + 1)
    names = [str(k) for k in range(n + 1)]
    columns = dict(zip(names, values.T, strict=True))
    found = statistics.bootstrap_means(columns, np.arange(n), shares=names)
    low, high = (np.array([found[name][end] for name in names]) for end in ("low", "high"))
    covered = {
        mean: stats.binom.pmf(np.arange(n + 1), n, mean)[(low <= mean) & (mean <= high)].sum()
        for mean in (0.5, 0.67, 0.8, 0.9, 0.93, 0.95, 0.97, 0.98)
    }
    assert 0.935 <= min(covered.values()) <= max(covered.values()) <= most, covered


def test_interval_of_a_share_is_wilsons_for_independent_cases():
    rng = np.random.default_rng(0)
    values = np.arange(422) < 400
    found = statistics.bootstrap_mean(values, np.arange(422), resamples=20_000, share=True)
    expected = stats.binomtest(400, 422).proportion_ci(0.95, method="wilson")
    assert (found["low"], found["high"]) == pytest.approx(
        (expected.low, expected.high), abs=0.03 * (expected.high - expected.low)
    )
    # Three cases alike are worth one; a graded score spreads less than right and wrong.
    triple = statistics.bootstrap_mean(
        np.repeat(values, 3), np.repeat(np.arange(422), 3), resamples=20_000, share=True
    )
    assert triple == pytest.approx(found)
    graded = statistics.bootstrap_mean(rng.beta(9, 1, 422), np.arange(422), share=True)
    spread = math.sqrt(0.9 * 0.1 / 11 / 422)  # of a mean of Beta(9, 1)
    assert graded["high"] - graded["low"] == pytest.approx(2 * 1.966 * spread, rel=0.15)


def test_a_constant_share_is_not_called_certain():
    patients = [f"p{i // 2}" for i in range(40)]
    result = statistics.bootstrap_mean(np.zeros(40), patients, share=True)
    expected = stats.binomtest(0, 20).proportion_ci(0.95, method="exact")
    assert (result["low"], result["high"]) == pytest.approx((0, expected.high))
    assert result["high"] == pytest.approx(1 - 0.025 ** (1 / 20))
    # A mean that is no share has no such law.
    assert statistics.bootstrap_mean(np.zeros(40), patients)["high"] == 0


def test_a_mean_over_no_case_is_null_and_not_nan():
    result = statistics.bootstrap_means(
        {"all": [1.0, 0.0], "none": [1.0, 1.0]},
        ["a", "b"],
        resamples=50,
        within={"none": np.array([False, False])},
    )
    assert result["none"] == {"value": None, "low": None, "high": None}
    assert result["all"]["value"] == 0.5


def test_a_mean_over_some_cases_is_resampled_over_them():
    rng = np.random.default_rng(1)
    values, inside = rng.random(400), np.arange(400) < 60
    patients = np.arange(400).astype(str)
    part = statistics.bootstrap_means({"x": values}, patients, within={"x": inside}, seed=2)["x"]
    alone = statistics.bootstrap_mean(values[inside], patients[inside], seed=5)
    assert part["value"] == pytest.approx(alone["value"])
    assert part["high"] - part["low"] == pytest.approx(alone["high"] - alone["low"], rel=0.15)


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
    tests = comparison.compare_models(original, tuned[::-1])
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
    result = comparison.compare_models(predictions(original), predictions(better))["difference"]
    assert 0 < result["low"] < result["value"] < result["high"] < 0.06


@pytest.mark.parametrize(
    "sizes", [[3] * 40, [3] * 141, [1, 2, 3, 6] * 20], ids=["40", "141", "80 unequal"]
)
@pytest.mark.parametrize("mean", [0.6, 0.9])
def test_intervals_of_a_real_difference_in_accuracy_cover_where_patients_have_several_cases(
    mean, sizes
):
    """Both models are right where it is easy; tuned also in half of what the original gets wrong.
    The cases of a patient correlate by 1 / 7."""
    rng, runs = np.random.default_rng(6), 1000
    index = np.repeat(np.arange(len(sizes)), sizes)
    chance = rng.beta(6 * mean, 6 * (1 - mean), (runs, len(sizes)))[:, index]
    luck = rng.random((2, *chance.shape))
    luck[1] = np.where(rng.random(chance.shape) < 0.7, luck[0], luck[1])
    original, tuned = luck[0] < chance, luck[1] < (1 + chance) / 2
    expected = (1 - mean) / 2
    found = accuracy_differences(original, tuned, index, expected)
    # As `compare_models` makes them.
    given = (
        predictions(answers, patients=index.astype(str), task="regimen")
        for answers in (original[0], tuned[0])
    )
    assert comparison.compare_models(*given, bootstrap=300)["difference"] == found[0]


def accuracy_differences(original, tuned, index, expected, most=0.97):
    """Of each run [R, N], after a look at their coverage."""
    draw = statistics.PatientBootstrap(index.astype(str), 300, 0)
    pairs = zip(original.astype(float), tuned.astype(float), strict=True)
    found = [comparison._difference(*pair, index.astype(str), draw) for pair in pairs]
    assert np.mean([f["value"] for f in found]) == pytest.approx(expected, abs=0.003)
    assert 0.93 <= np.mean([f["low"] <= expected <= f["high"] for f in found]) <= most
    assert all(f["low"] <= f["value"] <= f["high"] for f in found)
    return found


@pytest.mark.parametrize(("mean", "cases"), [(0.982, 200), (0.945, 100), (0.962, 100)])
def test_intervals_of_the_difference_to_a_model_that_is_never_right_cover_near_1(mean, cases):
    """As an untuned one often is. The central 95 % of paired resamples cover 0.91 to 0.93."""
    tuned = np.random.default_rng(3).random((1000, cases)) < mean
    accuracy_differences(np.zeros_like(tuned), tuned, np.arange(cases), mean, most=0.98)


def test_a_paired_interval_is_newcombes():
    original = {"value": 0.5, "low": 0.4, "high": 0.62}
    tuned = {"value": 0.8, "low": 0.65, "high": 0.9}
    rng = np.random.default_rng(0)
    changes = rng.normal(size=(2, 50)) + rng.normal(size=50)
    r = np.corrcoef(changes)[0, 1]
    low, high = statistics.paired_interval(original, tuned, changes)
    assert 0.2 < r < 0.8
    assert low == pytest.approx(0.3 - math.sqrt(0.15**2 + 0.12**2 - 2 * r * 0.15 * 0.12))
    assert high == pytest.approx(0.3 + math.sqrt(0.1**2 + 0.1**2 - 2 * r * 0.1 * 0.1))
    still = np.stack([np.zeros(50), changes[1]])
    low, high = statistics.paired_interval(original, tuned, still)
    assert low == pytest.approx(0.3 - math.hypot(0.15, 0.12))
    assert high == pytest.approx(0.3 + math.hypot(0.1, 0.1))


@pytest.mark.parametrize(("patients", "low"), [(1, 2 * 0.025 - 1), (20, 2 * 0.025 ** (1 / 20) - 1)])
def test_a_difference_that_is_the_same_in_every_patient_is_not_certain(patients, low):
    of = [f"p{i // 3}" for i in range(3 * patients)]  # several cases each
    wrong, right = (predictions([x] * len(of), patients=of) for x in (0, 1))
    gain = comparison.compare_models(wrong, right)["difference"]
    assert (gain["value"], gain["high"]) == (1, 1) and gain["low"] == pytest.approx(low)
    loss = comparison.compare_models(right, wrong)["difference"]
    assert (loss["value"], loss["low"]) == (-1, -1) and loss["high"] == pytest.approx(-low)
    none = comparison.compare_models(wrong, right, bootstrap=0)["difference"]
    assert none == {"value": 1, "low": None, "high": None}


def test_few_cases_that_differ_decide_nothing():
    wrong, right = predictions([0] * 4 + [1] * 116), predictions([1] * 120)
    for original, tuned in ((wrong, right), (right, wrong)):
        tests = comparison.compare_models(original, tuned)
        # The bootstrap alone would be sure of it.
        assert 0 not in np.sign([tests["difference"][end] for end in ("low", "high")])
        assert tests["mcnemar"]["p_value"] == 0.125 and standing(tests) == "unclear"
    wrong = predictions([0] * 6 + [1] * 114)
    assert standing(comparison.compare_models(wrong, right)) == "better"
    assert standing(comparison.compare_models(right, wrong)) == "worse"
    assert standing(comparison.compare_models(wrong, right, bootstrap=0)) == "unclear"


@pytest.mark.parametrize(("gained", "stands"), [(5, "unclear"), (6, "better")])
def test_few_patients_that_differ_decide_nothing(gained, stands):
    """Their cases say the same, so more of them do not make the gain sure."""
    patients = [f"p{i // 4}" for i in range(120)]
    wrong = predictions([0] * 4 * gained + [1] * (120 - 4 * gained), patients=patients)
    tests = comparison.compare_models(wrong, predictions([1] * 120, patients=patients))
    assert tests["difference"]["low"] > 0 and tests["mcnemar"]["p_value"] < 1e-5
    assert tests["wilcoxon_by_patient"]["p_two_sided"] == pytest.approx(2 * 0.5**gained)
    assert standing(tests) == stands


def test_models_that_never_differ():
    same = predictions([1, 0, 1])
    tests = comparison.compare_models(same, same)
    assert tests["wilcoxon"]["p_value"] == tests["mcnemar"]["p_value"] == 1
    # Up to a share of 0.708 of all patients may differ where none of three did.
    for name in ("difference", "difference_rouge1", "f1_macro"):
        assert tests[name]["value"] == 0.0
        assert tests[name]["high"] == -tests[name]["low"] == pytest.approx(1 - 0.025 ** (1 / 3))
    assert tests["wilcoxon_by_patient"]["p_value"] == 1
    assert tests["effect"] == {
        "rank_biserial": 0.0,
        "rank_biserial_rouge1": 0.0,
        "cohen_h": 0.0,
        "odds_ratio": None,
    }
    json.dumps(tests, allow_nan=False)


def test_other_cases_are_refused():
    original = predictions([1, 0, 1])
    with pytest.raises(ValueError, match=r"tuned \(2 cases\).* 1 are in one only, such as c2"):
        comparison.compare_models(original, original[:2])
    with pytest.raises(ValueError, match="tuned: 1 case ids stand more than once"):
        comparison.compare_models(original, [*original, original[0]])
    with pytest.raises(ValueError, match="disagree on the task of 3 cases"):
        comparison.compare_models(original, predictions([1, 0, 1], task="modality"))
    changed = [dict(p, reference="C00" if p["case_id"] == "c1" else "C61") for p in original]
    with pytest.raises(ValueError, match="the reference of 1 cases, such as c1") as error:
        comparison.compare_models(original, changed)
    assert "C00" not in str(error.value)
    with pytest.raises(ValueError, match="hold no cases"):
        comparison.compare_models([], [])
