"""How sure: intervals by bootstrap over patients, and paired tests of two models.

Cases of one patient are not independent, so the bootstrap draws patients and takes all their
cases. No function returns NaN: where nothing differs, the result is defined and documented.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from scipy import stats

LEVEL = 0.95
_CHUNK_ENTRIES = 4_000_000  # weights held at once: 32 MB


def patient_weights(patients: Sequence[str], resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each patient is drawn, resample by resample.

    Yields float64 [chunk, P], rows over the P distinct patients in sorted order; each row sums to
    P. The draws depend on the number of patients and the seed alone, not on the chunking.
    """
    count = len(set(patients))
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK_ENTRIES // count)
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        yield np.stack(
            [np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(rows)]
        ).astype(np.float64)


def patient_sums(values: np.ndarray, patients: Sequence[str]) -> np.ndarray:
    """Sums of `values` [N] within each patient: [P], patients in sorted order."""
    names, index = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    return np.bincount(index, weights=values, minlength=len(names))


def percentile_interval(samples: np.ndarray) -> tuple[float, float]:
    """The central 95 % of bootstrap samples [B] (percentile method)."""
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def bootstrap_mean(
    values: Sequence[float], patients: Sequence[str], *, resamples: int = 1000, seed: int = 0
) -> dict[str, float | None]:
    """Mean over cases with its 95 % interval by patient: {value, low, high}.

    `resamples=0` leaves the interval out (None). With a single patient the interval is that
    patient's mean itself: there is nothing to resample.
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        raise ValueError("no cases to average; the split or the predictions are empty")
    result = {"value": float(values.mean()), "low": None, "high": None}
    if resamples:
        sums = patient_sums(values, patients)
        sizes = patient_sums(np.ones_like(values), patients)
        means = [w @ sums / (w @ sizes) for w in patient_weights(patients, resamples, seed)]
        result["low"], result["high"] = percentile_interval(np.concatenate(means))
    return result


def wilcoxon_one_sided(tuned: Sequence[float], original: Sequence[float]) -> dict:
    """One-sided Wilcoxon signed-rank test that `tuned` is greater than `original`, case by case.

    scipy.stats.wilcoxon with alternative="greater", zero_method="wilcox" (ties between the models
    are left out), no continuity correction. It enumerates exactly where few cases differ: the ties
    are taken out here already, because scipy would otherwise count them when it chooses. Where the
    models never differ the statistic is 0 and p is 1.

    Returns {statistic, p_value, alternative, n, n_nonzero, zero_method}; the statistic is the sum
    of the ranks of the cases in which tuned is better.
    """
    # Rounding undoes the last bits of float arithmetic, which would break ties between ranks.
    difference = np.round(
        np.asarray(tuned, dtype=np.float64) - np.asarray(original, dtype=np.float64), 12
    )
    nonzero = int(np.count_nonzero(difference))
    statistic, p_value = 0.0, 1.0
    if nonzero:
        test = stats.wilcoxon(
            difference[difference != 0], alternative="greater", zero_method="wilcox"
        )
        statistic, p_value = float(test.statistic), float(test.pvalue)
    return {
        "statistic": statistic,
        "p_value": p_value,
        "alternative": "greater",
        "n": len(difference),
        "n_nonzero": nonzero,
        "zero_method": "wilcox",
    }


def mcnemar_exact(only_original: int, only_tuned: int) -> float:
    """Two-sided p of McNemar's exact test: binomial on the cases that just one model gets right.

    1.0 where there are no such cases.
    """
    discordant = only_original + only_tuned
    return float(stats.binomtest(only_tuned, discordant, 0.5).pvalue) if discordant else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given (Holm, Scand J Stat 1979;6:65)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def pair_predictions(original: Sequence[dict], tuned: Sequence[dict]) -> list[tuple[dict, dict]]:
    """The two models' predictions of the same cases, in the original's order.

    Raises:
      ValueError: a case stands twice in one list or is missing from the other, or the two differ
        in task, patient or reference of a case. Messages count cases and name their ids only.
    """
    by_id = []
    for name, predictions in (("original", original), ("tuned", tuned)):
        cases = {prediction["case_id"]: prediction for prediction in predictions}
        if len(cases) != len(predictions):
            twice = len(predictions) - len(cases)
            raise ValueError(f"{name}: {twice} case ids stand more than once; evaluate it again")
        by_id.append(cases)
    first, second = by_id
    alone = sorted(first.keys() ^ second.keys())
    if alone:
        raise ValueError(
            f"original ({len(first)} cases) and tuned ({len(second)} cases) did not answer the "
            f"same cases: {len(alone)} are in one only, such as {', '.join(alone[:3])}; "
            "evaluate both on the same split of the same cohort"
        )
    for field in ("task", "patient_id", "reference"):
        differing = [case for case in first if first[case][field] != second[case][field]]
        if differing:
            raise ValueError(
                f"original and tuned disagree on the {field} of {len(differing)} cases, such as "
                f"{', '.join(differing[:3])}; evaluate both on the same cohort and task"
            )
    if not first:
        raise ValueError("original and tuned hold no cases; nothing can be compared")
    return [(first[case], second[case]) for case in first]


def compare_models(
    original_predictions: Sequence[dict],
    tuned_predictions: Sequence[dict],
    *,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict:
    """The `tests` object of report.json for one task.

    Case by case on right or wrong: `wilcoxon` (one-sided, tuned greater), `mcnemar` (exact,
    two-sided) and `difference` of accuracies with its paired 95 % bootstrap interval by patient;
    on ROUGE-1: `wilcoxon_rouge1` and `difference_rouge1`.

    Raises:
      ValueError: the two do not hold the same cases (see `pair_predictions`).
    """
    pairs = pair_predictions(original_predictions, tuned_predictions)
    patients = [first["patient_id"] for first, _ in pairs]
    tests = {}
    for field, suffix in (("correct", ""), ("rouge1", "_rouge1")):
        original = np.array([float(first[field]) for first, _ in pairs])
        tuned = np.array([float(second[field]) for _, second in pairs])
        tests["wilcoxon" + suffix] = wilcoxon_one_sided(tuned, original)
        # Drawing patients and averaging their differences is the paired bootstrap.
        tests["difference" + suffix] = bootstrap_mean(
            tuned - original, patients, resamples=bootstrap, seed=seed
        )
    only_original = sum(bool(a["correct"]) and not b["correct"] for a, b in pairs)
    only_tuned = sum(bool(b["correct"]) and not a["correct"] for a, b in pairs)
    tests["mcnemar"] = {
        "only_original": only_original,
        "only_tuned": only_tuned,
        "p_value": mcnemar_exact(only_original, only_tuned),
    }
    return tests
