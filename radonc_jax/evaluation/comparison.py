"""Two models on the same cases: who is better, by how much, and could it be chance."""

from collections.abc import Sequence

import numpy as np

from radonc_jax.evaluation.metrics import ClassCounts
from radonc_jax.evaluation.statistics import (
    PatientBootstrap,
    bootstrap_means,
    cohen_h,
    constant_interval,
    mcnemar_exact,
    paired_interval,
    paired_odds_ratio,
    rank_biserial,
    wilcoxon_one_sided,
)
from radonc_jax.tasks import TASKS


def pair_predictions(
    original: Sequence[dict],
    tuned: Sequence[dict],
    names: tuple[str, str] = ("original", "tuned"),
) -> list[tuple[dict, dict]]:
    """The two models' predictions of the same cases, in the original's order.

    Raises:
      ValueError: a case stands twice in one list or is missing from the other, or the two differ
        in task, patient or reference of a case. Messages count cases and name their ids only.
    """
    by_id = []
    for name, predictions in zip(names, (original, tuned), strict=True):
        cases = {prediction["case_id"]: prediction for prediction in predictions}
        if len(cases) != len(predictions):
            twice = len(predictions) - len(cases)
            raise ValueError(f"{name}: {twice} case ids stand more than once; evaluate it again")
        by_id.append(cases)
    first, second = by_id
    alone = sorted(first.keys() ^ second.keys())
    if alone:
        raise ValueError(
            f"{names[0]} ({len(first)} cases) and {names[1]} ({len(second)} cases) did not answer "
            f"the same cases: {len(alone)} are in one only, such as {', '.join(alone[:3])}; "
            "evaluate both on the same split of the same cohort"
        )
    for field in ("task", "patient_id", "reference"):
        differing = [case for case in first if first[case][field] != second[case][field]]
        if differing:
            raise ValueError(
                f"{names[0]} and {names[1]} disagree on the {field} of {len(differing)} cases, "
                f"such as {', '.join(differing[:3])}; evaluate both on the same cohort and task"
            )
    if not first:
        raise ValueError(f"{names[0]} and {names[1]} hold no cases; nothing can be compared")
    return [(first[case], second[case]) for case in first]


def compare_models(
    original_predictions: Sequence[dict],
    tuned_predictions: Sequence[dict],
    *,
    bootstrap: int = 1000,
    seed: int = 0,
    names: tuple[str, str] = ("original", "tuned"),
) -> dict:
    """The `tests` object of report.json for one task.

    Case by case on right or wrong: `wilcoxon` (one-sided, tuned greater), `mcnemar` (exact,
    two-sided) and `difference` of accuracies with its paired 95 % bootstrap interval by patient
    (`paired_interval`; `constant_interval` of differences that are the same in every patient); on
    ROUGE-1:
    `wilcoxon_rouge1` and `difference_rouge1`. `wilcoxon_by_patient` ranks each patient's mean
    difference in right or wrong: the cases of a patient are not independent, and tests by case
    find too much where a patient has several. Its `p_two_sided` is twice the smaller p of either
    side. Where each patient has one case that is McNemar's p, and `p_value` that of `wilcoxon`.
    `f1_macro`, `f1_micro` and `f1_weighted` are differences with paired intervals, null for free
    text. `effect` holds sizes that do not grow with the number of cases.

    Raises:
      ValueError: the two do not hold the same cases (see `pair_predictions`).
    """
    pairs = pair_predictions(original_predictions, tuned_predictions, names)
    patients = [first["patient_id"] for first, _ in pairs]
    scores = {
        field: tuple(
            np.array([float(model[field]) for model in models])
            for models in zip(*pairs, strict=True)
        )
        for field in ("correct", "rouge1")
    }
    draw = PatientBootstrap(patients, bootstrap, seed)
    tests = {}
    for field, suffix in (("correct", ""), ("rouge1", "_rouge1")):
        original, tuned = scores[field]
        tests["wilcoxon" + suffix] = wilcoxon_one_sided(tuned, original)
        tests["difference" + suffix] = _difference(original, tuned, patients, draw)
    original, tuned = scores["correct"]
    by_patient = draw.sums(np.stack([original, tuned, np.ones_like(tuned)], axis=1))
    means = by_patient[:, 1] / by_patient[:, 2], by_patient[:, 0] / by_patient[:, 2]
    better, worse = wilcoxon_one_sided(*means), wilcoxon_one_sided(*means[::-1])
    two_sided = min(1.0, 2 * min(better["p_value"], worse["p_value"]))
    tests["wilcoxon_by_patient"] = better | {"p_two_sided": two_sided}
    only_original = int(((original == 1) & (tuned == 0)).sum())
    only_tuned = int(((original == 0) & (tuned == 1)).sum())
    tests["mcnemar"] = {
        "only_original": only_original,
        "only_tuned": only_tuned,
        "p_value": mcnemar_exact(only_original, only_tuned),
    }
    tests["effect"] = {
        "rank_biserial": rank_biserial(tuned, original),
        "rank_biserial_rouge1": rank_biserial(scores["rouge1"][1], scores["rouge1"][0]),
        "cohen_h": cohen_h(float(tuned.mean()), float(original.mean())),
        "odds_ratio": paired_odds_ratio(only_original, only_tuned),
    }
    return tests | _f1_differences(pairs, draw)


def _constant_interval(differences: np.ndarray, patients: Sequence[str]) -> dict | None:
    """Ends {low, high} of a mean difference that is the same in every patient, else None."""
    draw = PatientBootstrap(patients, 0, 0)
    total, count = draw.sums(np.stack([differences, np.ones(len(patients))], axis=1)).T
    means = total / count
    if np.ptp(means) > 1e-12:
        return None
    low, high = constant_interval(float(means[0]), draw.count, -1, 1)
    return {"low": low, "high": high}


def _difference(
    original: np.ndarray, tuned: np.ndarray, patients: Sequence[str], draw: PatientBootstrap
) -> dict:
    """{value, low, high} of the mean difference of scores from 0 to 1 [N]."""
    result = {"value": float((tuned - original).mean()), "low": None, "high": None}
    if not draw.resamples:
        return result
    constant = _constant_interval(tuned - original, patients)
    if constant is not None:
        return result | constant
    both = {"original": original, "tuned": tuned}
    means = bootstrap_means(
        both, patients, resamples=draw.resamples, seed=draw.seed, shares=tuple(both)
    )
    # The same patients are drawn for both: the paired bootstrap.
    changes = draw.mean_samples(np.stack([original, tuned], axis=1)).T
    low, high = paired_interval(means["original"], means["tuned"], changes)
    return result | {"low": low, "high": high}


def _f1_differences(pairs: Sequence[tuple[dict, dict]], draw: PatientBootstrap) -> dict:
    names = ("f1_macro", "f1_micro", "f1_weighted")
    if not TASKS[pairs[0][0]["task"]].has_classes:
        return dict.fromkeys(names)
    counts = [
        ClassCounts(
            [first["reference"] for first, _ in pairs], [pair[side]["answer"] for pair in pairs]
        )
        for side in (0, 1)
    ]
    values = [count.scores() for count in counts]
    result = {
        name: {"value": values[1][name] - values[0][name], "low": None, "high": None}
        for name in names
    }
    if not draw.resamples:
        return result
    samples = [count.samples(draw) for count in counts]
    intervals = [
        count.intervals(draw, sampled) for count, sampled in zip(counts, samples, strict=True)
    ]
    for name, score in result.items():
        changes = np.stack([sampled[name] for sampled in samples])
        if np.ptp(changes[1] - changes[0]) < 1e-12:
            score["low"], score["high"] = constant_interval(score["value"], draw.count, -1, 1)
            continue
        if name == "f1_macro":
            changes = np.stack([count.deletions(draw, "f1") for count in counts])
        models = (
            {"value": value[name], "low": ends[name][0], "high": ends[name][1]}
            for value, ends in zip(values, intervals, strict=True)
        )
        score["low"], score["high"] = paired_interval(*models, changes)
    return result
