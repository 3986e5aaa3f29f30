"""Scores against scikit-learn, rouge-score and figures made by hand."""

import json
import math

import numpy as np
import pytest
from rouge_score import rouge_scorer
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

from radonc_jax.evaluation import comparison, metrics
from radonc_jax.evaluation.comparison import compare_models
from radonc_jax.evaluation.statistics import PatientBootstrap, paired_interval
from radonc_jax.tasks import TASKS, Record


def prediction(case, reference, answer, patient=None, task="modality", **fields):
    return {
        "case_id": str(case),
        "patient_id": str(case if patient is None else patient),
        "task": task,
        "output": answer or "",
        "answer": answer,
        "reference": reference,
        "correct": answer == reference,
        "rouge1": float(answer == reference),
        "finished": True,
    } | fields


def score(predictions, task="modality", **options):
    return metrics.score(predictions, TASKS[task], split="test", model="tuned", **options)


def random_predictions(n, classes, seed, per_patient=3):
    rng = np.random.default_rng(seed)
    labels = [f"C{10 + i // 10}.{i % 10}" for i in range(classes)]
    answers = [*labels, "D99.9", None]  # one that is nobody's reference, one unparseable
    return [
        prediction(
            i,
            labels[int(rng.integers(classes) * rng.random())],
            answers[int(rng.integers(len(answers)))],
            patient=rng.integers(1 + n // per_patient),
            task="icd",
            rouge1=float(rng.random()),
        )
        for i in range(n)
    ]


def test_golden_values_by_hand():
    # photon: 3 cases, 2 hit; proton: 2 cases, 1 hit, 1 answered "photon"; electron: unparseable.
    result = score(
        [
            prediction(1, "photon", "photon"),
            prediction(2, "photon", "photon"),
            prediction(3, "photon", "brachytherapy"),
            prediction(4, "proton", "proton"),
            prediction(5, "proton", "photon"),
            prediction(6, "electron", None, finished=False),
        ],
        bootstrap=0,
    )
    assert (result["n"], result["unparseable"], result["unfinished"]) == (6, 1, 1)
    assert (result["task"], result["split"], result["model"]) == ("modality", "test", "tuned")
    assert result["accuracy"] == {"value": 0.5, "low": None, "high": None}
    # "brachytherapy" is no reference: a miss for photon, a false alarm for no class.
    assert result["precision_macro"]["value"] == pytest.approx((0 + 2 / 3 + 1) / 3)
    assert result["recall_macro"]["value"] == pytest.approx((0 + 2 / 3 + 1 / 2) / 3)
    assert result["f1_macro"]["value"] == pytest.approx((0 + 2 / 3 + 2 / 3) / 3)
    assert result["f1_weighted"]["value"] == pytest.approx((2 / 3 * 3 + 2 / 3 * 2) / 6)
    assert result["per_class"]["proton"] == {
        "precision": 1.0,
        "recall": 0.5,
        "f1": pytest.approx(2 / 3),
        "support": 2,
        "patients": 2,
    }
    assert "brachytherapy" not in result["per_class"]
    assert result["confusion"] == {
        "labels": ["photon", "proton", "electron", "brachytherapy", "unparseable"],
        "matrix": [[2, 0, 0, 1, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]],
    }


def sklearn_scores(references, answers, classes=None):
    classes = classes or sorted(set(references))
    answers = [answer or "unparseable" for answer in answers]
    scores = {}
    for average in ("macro", "micro", "weighted"):
        values = precision_recall_fscore_support(
            references, answers, labels=classes, average=average, zero_division=0
        )
        scores |= {
            f"{name}_{average}": value
            for name, value in zip(("precision", "recall", "f1"), values, strict=False)
        }
    return scores


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_scikit_learn_on_random_data(seed):
    predictions = random_predictions(200, 17, seed)
    references = [p["reference"] for p in predictions]
    answers = [p["answer"] for p in predictions]
    result = score(predictions, "icd", bootstrap=0)
    for name, value in sklearn_scores(references, answers).items():
        assert result[name]["value"] == pytest.approx(value, rel=0, abs=1e-12)
    readable = [answer or "" for answer in answers]
    expected = accuracy_score(references, readable)
    assert result["accuracy"]["value"] == pytest.approx(expected, rel=0, abs=1e-12)
    matrix = np.array(result["confusion"]["matrix"])
    assert matrix.sum() == 200
    assert matrix[:, -1].sum() == result["unparseable"] == answers.count(None)
    assert matrix.shape[1] == matrix.shape[0] + 1 == len(result["confusion"]["labels"])


def test_every_bootstrap_sample_is_what_scikit_learn_gives_on_the_resampled_cases():
    predictions = random_predictions(60, 7, seed=5)
    references = [p["reference"] for p in predictions]
    answers = [p["answer"] for p in predictions]
    patients = [p["patient_id"] for p in predictions]
    draw = PatientBootstrap(patients, 15, seed=3)
    samples = metrics.ClassCounts(references, answers).samples(draw)
    weights = np.concatenate(list(draw.weights()))
    names = np.unique(patients)
    classes = sorted(set(references))
    lacking = 0
    for row in range(15):
        drawn = [
            i
            for name, times in zip(names, weights[row], strict=True)
            for _ in range(int(times))
            for i, patient in enumerate(patients)
            if patient == name
        ]
        lacking += len({references[i] for i in drawn}) < len(classes)
        expected = sklearn_scores(
            [references[i] for i in drawn], [answers[i] for i in drawn], classes
        )
        for name, value in expected.items():
            assert samples[name][row] == pytest.approx(value, abs=1e-12), name
    assert lacking  # the classes stay those of the split where a resample lacks one


def simulated_splits(classes, cases, each, runs, seed, gain=0.0):
    """(references, answers of two models) of test splits drawn from one law; the `each` cases of a
    patient have one reference. The second model is right more often, by `gain`, and mostly where
    the first one is."""
    rng = np.random.default_rng(seed)
    shares = 1 / np.arange(1, classes + 1)
    shares /= shares.sum()
    recall = np.clip(rng.beta(4, 2, classes), 0.05, 0.98)
    for _ in range(runs):
        drawn = np.repeat(rng.choice(classes, cases // each, p=shares), each)
        other = rng.choice(classes, cases, p=shares)
        luck = rng.random((2, cases))
        luck[1] = np.where(rng.random(cases) < 0.7, luck[0], luck[1])
        right = luck < np.clip(recall + [[0], [gain]], 0, 1)[:, drawn]
        yield drawn, *np.where(right, drawn, other)


def f1_macro(references, answers):
    classes = np.unique(references)
    hits, given, held = (
        np.bincount(rows, minlength=classes[-1] + 1)[classes]
        for rows in (references[references == answers], answers, references)
    )
    return (2 * hits / (given + held)).mean()


def simulate_class_scores(classes, cases, each, runs, seed):
    """Values and intervals of macro F1."""
    draw = PatientBootstrap(np.arange(cases) // each, 300, seed)
    found = []
    for references, answers, _ in simulated_splits(classes, cases, each, runs, seed):
        value = f1_macro(references, answers)
        counts = metrics.ClassCounts(references.astype(str), answers.astype(str))
        found.append((value, *counts.intervals(draw)["f1_macro"]))
    return np.array(found)


@pytest.mark.parametrize(("classes", "cases", "each"), [(4, 200, 1), (15, 300, 1), (15, 300, 3)])
def test_intervals_of_macro_f1_cover_and_hold_the_value(classes, cases, each):
    value, low, high = simulate_class_scores(classes, cases, each, runs=1000, seed=1).T
    # The estimand: what a test split of this size and make scores on average.
    covered = np.mean((low <= value.mean()) & (value.mean() <= high))
    assert 0.93 <= covered <= 0.97
    assert ((low <= value) & (value <= high)).all()


@pytest.mark.parametrize(("classes", "cases"), [(40, 100), (150, 420)])
def test_intervals_of_macro_scores_cover_with_many_classes_of_a_single_case(classes, cases):
    """Of 40 classes about 28 are in a split, 11 of them once; the bootstrap's own variance covers
    0.89 to 0.92."""
    draw = PatientBootstrap(np.arange(cases), 30, seed=1)
    found = {f"{name}_macro": [] for name in ("precision", "recall", "f1")}
    for references, answers, _ in simulated_splits(classes, cases, 1, runs=600, seed=1):
        counts = metrics.ClassCounts(references.astype(str), answers.astype(str))
        intervals, influence = counts.intervals(draw), counts._influence(draw)
        for name, rows in found.items():
            rows.append((influence[name][0], *intervals[name]))
    for name, rows in found.items():
        value, low, high = np.array(rows).T
        covered = np.mean((low <= value.mean()) & (value.mean() <= high))
        assert 0.93 <= covered <= 0.98, (name, covered)
        assert ((low <= value) & (value <= high)).all()


@pytest.mark.parametrize(("classes", "each"), [(30, 1), (30, 3), (3, 1)])
def test_deletions_are_what_each_patient_leaves(classes, each):
    ((references, answers, _),) = simulated_splits(classes, 60, each, 1, seed=4)
    patients = 100 + np.arange(60) // each  # in order as texts too
    names, total = np.unique(references), 60 // each

    def by_class(kept, score):
        """(score, denominator) of each class that has a case, with the kept cases."""
        result = {}
        for name in names:
            held, given = references[kept] == name, answers[kept] == name
            hits, held, given = (held & given).sum(), held.sum(), given.sum()
            if held:
                under = {"precision": given, "recall": held, "f1": held + given}[score]
                result[name] = (1 + (score == "f1")) * hits / max(under, 1), under
        return result

    counts = metrics.ClassCounts(references.astype(str), answers.astype(str))
    draw = PatientBootstrap(patients, 0, 0)
    for score in ("precision", "recall", "f1"):
        whole = by_class(np.ones(60, bool), score)
        mean = np.mean([value for value, _ in whole.values()])
        expected, jackknife = [], []
        for patient in range(total):
            left = by_class(patients != 100 + patient, score)
            jackknife.append(np.mean([value for value, _ in left.values()]) - mean)
            change = 0
            for name, (value, under) in whole.items():
                if name not in left:
                    change += mean - value
                elif under:
                    kept = max(left[name][1], 0.5) / under
                    change += math.sqrt(1 / 8 + 7 / 8 * kept) * (left[name][0] - value)
            expected.append(change / len(left))
        found = counts.deletions(draw, score)
        assert found == pytest.approx(np.array(expected), abs=1e-12)
        # Of the jackknife's own variance they are a part, and not a small one.
        assert 0.5 < (np.var(found) / np.var(jackknife)) < 1.02


def simulated_answers(classes, patients, each, score, runs, seed, likeness=1 / 7):
    """(references, answers) of test splits with a micro F1 of `score` on average; the cases of a
    patient correlate by `likeness` in being right, and have classes of their own."""
    rng = np.random.default_rng(seed)
    shares = 1 / np.arange(1, classes + 1)
    shares /= shares.sum()
    luck = (shares**2).sum()  # a guess is right too, now and then
    mean, size = (score - luck) / (1 - luck), 1 / likeness - 1
    for _ in range(runs):
        references, guessed = rng.choice(classes, (2, patients * each), p=shares)
        chance = rng.beta(mean * size, (1 - mean) * size, patients)
        right = rng.random(patients * each) < np.repeat(chance, each)
        yield references, np.where(right, references, guessed)


@pytest.mark.parametrize(
    ("patients", "each", "score"), [(300, 1, 0.95), (141, 3, 0.965), (100, 3, 0.98)]
)
def test_intervals_of_weighted_and_micro_scores_cover_near_1(patients, each, score):
    draw = PatientBootstrap(np.arange(patients * each) // each, 300, seed=1)
    found = {"f1_weighted": [], "f1_micro": [], "precision_weighted": []}
    for references, answers in simulated_answers(15, patients, each, score, runs=1000, seed=3):
        hits, given, held = (
            np.bincount(rows, minlength=15)
            for rows in (references[references == answers], answers, references)
        )
        values = {
            "f1_weighted": held @ (2 * hits / np.maximum(given + held, 1)) / held.sum(),
            "f1_micro": hits.sum() / held.sum(),  # every answer is some class
            "precision_weighted": held @ (hits / np.maximum(given, 1)) / held.sum(),
        }
        counts = metrics.ClassCounts(references.astype(str), answers.astype(str))
        intervals = counts.intervals(draw)
        for name, value in values.items():
            found[name].append((value, *intervals[name]))
    for name, rows in found.items():
        value, low, high = np.array(rows).T
        assert value.mean() == pytest.approx(score, abs=0.004)
        # With 6 errors in 100 patients few counts are likely, and the coverage goes in steps.
        most = 0.98 if patients == 100 else 0.97
        assert 0.93 <= np.mean((low <= value.mean()) & (value.mean() <= high)) <= most, name
        assert ((low <= value) & (value <= high)).all()


@pytest.mark.parametrize(("patients", "each"), [(300, 1), (141, 3)])
def test_intervals_of_macro_f1_cover_near_1(patients, each):
    """Centred on the value they cover 0.91 to 0.93."""
    draw = PatientBootstrap(np.arange(patients * each) // each, 300, seed=1)
    found = []
    for references, answers in simulated_answers(4, patients, each, 0.98, runs=1000, seed=3):
        counts = metrics.ClassCounts(references.astype(str), answers.astype(str))
        found.append((f1_macro(references, answers), *counts.intervals(draw)["f1_macro"]))
    value, low, high = np.array(found).T
    assert value.mean() == pytest.approx(0.978, abs=0.002)
    assert 0.935 <= np.mean((low <= value.mean()) & (value.mean() <= high)) <= 0.975
    assert ((low <= value) & (value <= high)).all()


def test_the_influence_of_a_patient_is_the_derivative_by_its_weight():
    predictions = random_predictions(60, 5, seed=2)
    references, answers = ([p[name] for p in predictions] for name in ("reference", "answer"))
    draw = PatientBootstrap([p["patient_id"] for p in predictions], 0, 0)
    counts = metrics.ClassCounts(references, answers)
    classes, given = sorted(set(references)), [str(answer) for answer in answers]

    def scores(patient, change):
        weights = 1 + change * (draw.index == patient)
        for average in metrics.AVERAGES:
            found = precision_recall_fscore_support(
                references,
                given,
                labels=classes,
                average=average,
                zero_division=0,
                sample_weight=weights,
            )
            for name, value in zip(("precision", "recall", "f1"), found, strict=False):
                yield f"{name}_{average}", value

    influence = counts._influence(draw)
    for patient in (0, 7, draw.count - 1):
        more, less = (dict(scores(patient, change)) for change in (1e-5, -1e-5))
        for name, (value, z, *_) in influence.items():
            assert value == pytest.approx(counts.scores()[name], abs=1e-12)
            slope = (more[name] - less[name]) / 2e-5
            assert z[patient] == pytest.approx(slope, abs=1e-8), name
            assert z.sum() == pytest.approx(0, abs=1e-12)


def test_classes_that_resamples_lack_do_not_make_intervals_near_1_boundless():
    # A class of two cases, both right, beside 98 cases with two errors.
    references = np.array(["C10"] * 98 + ["C11"] * 2)
    answers = np.where(np.arange(100) < 2, "C12", references)
    counts = metrics.ClassCounts(references, answers)
    draw = PatientBootstrap(np.arange(100), 1000, 0)
    low, high = counts.intervals(draw)["f1_macro"]
    spread = counts.samples(draw)["f1_macro"].std()
    assert low < counts.scores()["f1_macro"] < high <= 1
    assert counts.scores()["f1_macro"] - low < 2.3 * spread


@pytest.mark.parametrize(("task", "classes"), [("icd", 17), ("modality", 0)])
def test_micro_and_weighted_recall_are_the_accuracy_with_its_interval(task, classes):
    if classes:
        predictions = random_predictions(300, classes, seed=4)
    else:
        given = ["photon"] * 70 + ["proton"] * 5 + [None] * 5
        predictions = [
            prediction(i, "proton" if i % 7 == 0 else "photon", answer, i // 2)
            for i, answer in enumerate(given)
        ]
    result = score(predictions, task, bootstrap=200)
    for name in ("recall_micro", "recall_weighted"):
        assert result[name] == pytest.approx(result["accuracy"], rel=0, abs=1e-12)


def test_a_precision_of_1_that_resamples_lower_has_an_interval():
    # One case is answered; without that patient there is no answer, and the precision is 0.
    cases = [prediction(i, "photon", "photon" if i == 0 else None) for i in range(12)]
    found = score(cases)["precision_micro"]
    assert found["value"] == found["high"] == 1 and found["low"] < 0.5


def differ(references, original, tuned, patients, **options):
    """`compare_models`' difference in macro F1."""
    given = [
        [
            prediction(i, f"C{10 + right}", f"C{10 + answer}", patient, task="icd")
            for i, (right, answer, patient) in enumerate(
                zip(references, answers, patients, strict=True)
            )
        ]
        for answers in (original, tuned)
    ]
    return compare_models(*given, **options)["f1_macro"]


def test_the_difference_in_macro_f1_by_hand():
    # The original says class 0 throughout: F1 is 2 * 2 / (4 + 2) and 0. Tuned is right throughout.
    found = differ([0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 1, 1], "abcd", bootstrap=0)
    assert found == {"value": pytest.approx(1 - 1 / 3), "low": None, "high": None}
    found = differ([0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], "abcd", bootstrap=0)
    assert found["value"] == pytest.approx(1 / 3 - 1)


def test_the_difference_in_macro_f1_is_that_of_both_models_on_the_same_drawn_cases():
    patients = np.repeat(np.arange(30), 2)
    ((references, original, tuned),) = simulated_splits(4, 60, 2, 1, seed=8, gain=0.3)
    draw = PatientBootstrap(patients, 40, seed=3)
    samples = []
    for weights in np.concatenate(list(draw.weights())):
        cases = np.repeat(np.arange(60), weights[draw.index].astype(int))
        one, other = (
            f1_score(
                references[cases],
                answers[cases],
                labels=np.unique(references),
                average="macro",
                zero_division=0,
            )
            for answers in (original, tuned)
        )
        samples.append(other - one)
    found = differ(references, original, tuned, patients, bootstrap=40, seed=3)
    value = f1_macro(references, tuned) - f1_macro(references, original)
    assert found["value"] == pytest.approx(value) and value > 0.1
    counts = [
        metrics.ClassCounts(references.astype(str), answers.astype(str))
        for answers in (original, tuned)
    ]
    models = []
    for count in counts:
        low, high = count.intervals(draw)["f1_macro"]
        models.append({"value": count.scores()["f1_macro"], "low": low, "high": high})
    changes = np.stack([count.deletions(draw, "f1") for count in counts])
    expected = paired_interval(*models, changes)
    # The correlation is that of the bootstrap, or nearly.
    drawn = np.stack([count.samples(draw)["f1_macro"] for count in counts])
    assert drawn[1] - drawn[0] == pytest.approx(np.array(samples))
    assert np.corrcoef(changes)[0, 1] == pytest.approx(np.corrcoef(drawn)[0, 1], abs=0.25)
    assert (found["low"], found["high"]) == pytest.approx(expected)
    assert expected[0] > 0


def test_the_difference_in_macro_f1_is_narrower_than_of_unpaired_models():
    ((references, original, _),) = simulated_splits(4, 200, 1, 1, seed=8)
    tuned = original.copy()
    tuned[::20] = references[::20]
    found = differ(references, original, tuned, np.arange(200))
    draw = PatientBootstrap(np.arange(200), 1000, 0)
    alone = [
        np.ptp(draw.interval(metrics.ClassCounts(*pair).samples(draw)["f1_macro"]))
        for pair in ((references.astype(str), answers.astype(str)) for answers in (original, tuned))
    ]
    assert 0 < found["high"] - found["low"] < 0.5 * math.hypot(*alone)


def macro_differences(splits, patients):
    """Values and intervals, as `compare_models` makes them, of splits (references, answers of two
    models)."""
    draw = PatientBootstrap(patients, 300, seed=1)
    found = []
    for references, *answers in splits:
        pairs = [
            [{"task": "icd", "reference": str(right), "answer": str(answer)} for answer in given]
            for right, *given in zip(references, *answers, strict=True)
        ]
        difference = comparison._f1_differences(pairs, draw)["f1_macro"]
        found.append([difference[name] for name in ("value", "low", "high")])
    value, low, high = np.array(found).T
    assert ((low <= value) & (value <= high)).all()
    return value, low, high


@pytest.mark.parametrize(
    ("classes", "each", "gain"), [(4, 1, 0.0), (4, 1, 0.15), (6, 3, 0.0), (40, 1, 0.15)]
)
def test_intervals_of_the_difference_in_macro_f1_cover(classes, each, gain):
    """With the bootstrap's own variance they cover 0.83 to 0.86 where there are 40 classes."""
    splits = simulated_splits(classes, 210, each, 400, seed=5, gain=gain)
    value, low, high = macro_differences(splits, np.arange(210) // each)
    # No difference to be expected, or what a split of this size and make gives on average.
    expected = value.mean() if gain else 0.0
    assert abs(value.mean() - 0.75 * gain) < (0.01 if classes < 10 else 0.05)
    assert 0.93 <= np.mean((low <= expected) & (expected <= high)) <= 0.975


@pytest.mark.parametrize(
    ("classes", "cases", "mean"), [(4, 200, 0.98), (40, 422, 0.97), (40, 100, 0.97)]
)
def test_intervals_of_the_difference_in_macro_f1_cover_near_1(classes, cases, mean):
    """The original is never right, and what tuned gets wrong is unparseable."""
    shares = 1 / np.arange(1, classes + 1)
    rng = np.random.default_rng(2)

    def splits():
        for _ in range(250):
            references = rng.choice(classes, cases, p=shares / shares.sum())
            tuned = np.where(rng.random(cases) < mean, references, -1)
            yield references, np.full(cases, -1), tuned

    value, low, high = macro_differences(splits(), np.arange(cases))
    covered = np.mean((low <= value.mean()) & (value.mean() <= high))
    # With 100 cases most classes have one or none, and no resample holds all of them.
    assert 0.93 <= covered <= (0.985 if cases > 100 else 1), covered
    assert (high - low).min() > 0.01


def test_no_difference_in_macro_f1_is_certain():
    # Twenty classes of two cases each, all right, against none: nothing left out changes anything.
    references = np.repeat(np.arange(20), 2)
    found = differ(references, np.full(40, 99), references, [f"{i:02}" for i in range(40)])
    assert found["value"] == found["high"] == 1 and 0.5 < found["low"] < 0.95


def test_intervals_hold_the_value_and_are_seeded():
    predictions = random_predictions(300, 5, seed=1)
    result = score(predictions, "icd", bootstrap=200, seed=7)
    for name in ("accuracy", "rouge1", *metrics.CLASS_SCORES):
        assert result[name]["low"] <= result[name]["value"] <= result[name]["high"], name
        assert result[name]["low"] < result[name]["high"]
    assert score(predictions, "icd", bootstrap=200, seed=7) == result
    assert score(predictions, "icd", bootstrap=200, seed=8) != result
    json.dumps(result, allow_nan=False)


def test_regimen_has_no_classes_but_keeps_the_keys():
    result = score([prediction(1, "Prostate, 70 Gy", None, task="regimen")], "regimen")
    assert result["f1_macro"] == {"value": None, "low": None, "high": None}
    assert result["per_class"] == {}
    assert result["accuracy"]["value"] == 0


def test_all_unparseable_is_a_defined_result():
    result = score([prediction(i, "photon", None) for i in range(4)], bootstrap=50)
    assert result["unparseable"] == 4
    # No more certain than the accuracy, of which F1 is made here.
    nothing = {"value": 0.0, "low": 0.0, "high": pytest.approx(1 - 0.025 ** (1 / 4))}
    for name in ("accuracy", "rouge1", *metrics.CLASS_SCORES):
        assert result[name] == nothing, name
    json.dumps(result, allow_nan=False)


def test_one_patient_is_not_called_certain():
    result = score([prediction(i, "photon", "photon", patient="p") for i in range(4)])
    # One patient who is right says little of the next: 0.025 ** (1 / 1).
    assert result["accuracy"] == {"value": 1.0, "low": pytest.approx(0.025), "high": 1.0}
    assert result["f1_macro"] == result["rouge1"] == result["accuracy"]
    half = score([prediction(i, "photon", "photon" if i else None, patient="p") for i in range(2)])
    for name in ("accuracy", "recall_micro"):
        assert half[name]["value"] == 0.5
        # Of all patients 97.5 % may differ from this one: 0.0125 to 0.9875.
        assert (half[name]["low"], half[name]["high"]) == pytest.approx((0.0125, 0.9875))
    cases = [prediction(i, "photon", "photon" if i % 2 else None, i // 2) for i in range(80)]
    alike = score(cases)["accuracy"]
    differ = 1 - 0.025 ** (1 / 40)
    ends = (1 - differ) / 2, (1 - differ) / 2 + differ
    assert (alike["low"], alike["high"]) == pytest.approx(ends)


def test_bad_predictions():
    with pytest.raises(ValueError, match="no predictions"):
        score([])
    with pytest.raises(ValueError, match="1 case ids stand more than once"):
        score([prediction(1, "photon", "photon")] * 2)
    with pytest.raises(ValueError, match="1 predictions belong to another task"):
        score([prediction(1, "C61", "C61", task="icd")])


def test_rouge_is_that_of_rouge_score():
    reference = "Right breast, 40.05 Gy in 15 fractions"
    output = " Left breast, 40.05 Gy in 16 fractions \n"
    scorer = rouge_scorer.RougeScorer(["rouge1"], use_stemmer=False)
    expected = scorer.score(reference, output)["rouge1"].fmeasure
    assert metrics.rouge1(output, reference) == expected == pytest.approx(6 / 8)
    # No stemming: the plural is another word.
    assert metrics.rouge1("photons", "photon") == 0
    assert metrics.rouge1("", "photon") == 0


def test_all_rouge_scores_are_those_of_rouge_score_on_random_text():
    rng = np.random.default_rng(0)
    words = ["Gy", "gy", "40.05", "40", "05", "in", "fractions,", "fraction", "Left", "C50.411"]
    scorer = rouge_scorer.RougeScorer(["rouge1"], use_stemmer=False)
    for _ in range(200):
        output, reference = (" ".join(rng.choice(words, rng.integers(0, 9))) for _ in range(2))
        expected = scorer.score(reference, output)["rouge1"]
        found = metrics.rouge_scores(output, reference)
        assert found["rouge1"] == pytest.approx(expected.fmeasure, abs=1e-12)
        assert found["rouge1_precision"] == pytest.approx(expected.precision, abs=1e-12)
        assert found["rouge1_recall"] == pytest.approx(expected.recall, abs=1e-12)


def test_a_wrong_dose_costs_more_where_the_tokenizer_keeps_numbers_whole():
    reference = "Right breast, 40.05 Gy in 15 fractions"
    wrong = "Right breast, 60.05 Gy in 15 fractions."
    found = metrics.rouge_scores(wrong, reference)
    assert found["rouge1"] == pytest.approx(7 / 8)
    assert found["rouge1_decimal"] == pytest.approx(6 / 7)
    assert metrics.DecimalTokenizer().tokenize("C50.411, 40.05Gy. VMAT") == [
        "c50.411",
        "40.05gy",
        "vmat",
    ]


def test_shares_of_unreadable_and_unfinished_answers():
    result = score(
        [prediction(i, "photon", None if i < 6 else "photon", finished=i > 1) for i in range(20)]
    )
    assert result["unparseable_share"]["value"] == 0.3
    assert 0 < result["unparseable_share"]["low"] < 0.3 < result["unparseable_share"]["high"]
    assert result["unfinished_share"]["value"] == 0.1
    assert result["patients"] == 20


def test_judge_takes_rouge_of_the_raw_output():
    record = Record("c", "p", "text", "70 Gy in 28 fx to prostate", "photon", "C61")
    judged = metrics.judge(TASKS["icd"], record, "The code is c61", logprob=-1.5, finished=False)
    assert (
        list(judged)
        == (
            "case_id task prompt_sha256 output answer reference correct rouge1 logprob finished "
            "patient_id"
        ).split()
    )
    assert (judged["answer"], judged["correct"], judged["output"]) == (
        "C61",
        True,
        "The code is c61",
    )
    assert judged["rouge1"] == pytest.approx(2 * (1 / 4) / (1 / 4 + 1))
    assert (judged["logprob"], judged["finished"]) == (-1.5, False)
