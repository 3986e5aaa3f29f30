"""report.json: what a reviewer asks of it, and what is refused."""

import dataclasses
import itertools
import json
import math
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from reports import run_in_memory

from radonc_jax.answering import answer_split
from radonc_jax.data.cohort import (
    keep_copy,
    load_records,
    load_split,
    of_run,
    sha256,
    write_cohort,
)
from radonc_jax.data.splits import SPLITS
from radonc_jax.evaluation import (
    cells,
    findings,
    metrics,
    published,
    robustness,
    run,
    run_folder,
    subgroups,
)
from radonc_jax.evaluation.page import render_page
from radonc_jax.evaluation.report import write_report
from radonc_jax.evaluation.verdict import judge_tuning
from radonc_jax.tasks import select

PLACES = {
    "C50.911": ("right breast", "breast_wbi", "Right breast, 40.05 Gy in 15 fractions", "photon"),
    "C61": ("prostate", "prostate", "Prostate, 70 Gy in 28 fractions", "proton"),
    "C20": ("rectum", "rectal", "Rectum, 50 Gy in 25 fractions", "photon"),
}

NONE_EXCLUDED = pd.DataFrame(columns=["row", "reason"])


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    rng = np.random.default_rng(0)
    rows = []
    for split, n in (("train", 90), ("validation", 40), ("test", 60)):
        for i in range(n):
            code = list(PLACES)[i % 3]
            place, site, regimen, modality = PLACES[code]
            rows.append(
                {
                    "case_id": f"{split}-{i}",
                    "patient_id": f"{split}-p{i // 2}",
                    "diagnosis": f"Cancer of the {place}. Stage {rng.integers(4)}.",
                    "regimen": regimen,
                    "modality": modality,
                    "icd10": code,
                    "site": site,
                    "sex": "FM"[i % 2],
                    # Few are young: a cell that must not be published.
                    "age": "35" if i < 4 else "64",
                    "split": split,
                }
            )
    folder = tmp_path_factory.mktemp("data") / "cohort"
    write_cohort(folder, pd.DataFrame(rows), NONE_EXCLUDED, {"ceiling": {"icd": 0.93}})
    return folder


def answer(workdir, cohort, model, share, *, task="icd", split="test", seed=3):
    records = load_records(cohort, split)
    rng = np.random.default_rng(seed)

    def decode(current, diagnoses):
        return [
            SimpleNamespace(
                text=current.answer(record) if rng.random() < share else "none that is known",
                tokens=[],
                logprob=float(-rng.random()),
                finished=True,
                gap=None,
                trimmed=False,
                label_logprobs=None,
            )
            for record in records
        ]

    output = workdir / "evaluation" / split / model
    run.evaluate(
        decode, records, select(task), split=split, model=model, output=output, bootstrap=50
    )


def make_run(workdir, cohort, *, task="icd", right=(0.3, 0.8), seed=3):
    for model, share in zip(run.MODELS, right, strict=True):
        answer(workdir, cohort, model, share, task=task, seed=seed)
    (workdir / "config.json").write_text(json.dumps({"cohort": str(cohort), "model": "base"}))
    return workdir


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, cohort):
    folder = make_run(tmp_path_factory.mktemp("runs") / "all", cohort, task="all")
    answer(folder, cohort, "tuned", 0.8, task="all", split="validation")
    answer(folder, cohort, "original_examples", 0.5, task="icd")
    probes = {"icd": {"side_flip": {"n": 3, "rate": 1.0, "expected": "flips"}}}
    write_probes(folder, probes)
    return folder


def write_probes(folder, probes):
    tuned = folder / "evaluation" / "test" / "tuned"
    probes = {"predictions_sha256": sha256(tuned / run.PREDICTIONS)} | probes
    (tuned / robustness.ROBUSTNESS).write_text(json.dumps(probes))


@pytest.fixture(scope="module")
def report(workdir):
    return findings.build_report([run_folder.read_run(workdir)], bootstrap=50)


def test_an_entry_answers_every_question(report):
    json.dumps(report, allow_nan=False)
    for task, entry in report["tasks"].items():
        assert set(entry["baselines"]) == {"majority", "lookup", "nearest", "tfidf"}
        assert len(entry["verdict"]["sentences"]) == 3 + (task == "icd")
        assert {row["by"] for row in entry["subgroups"]} == set(subgroups.ORDER)
        assert entry["confidence"]["tuned"]["conformal"]["n_validation"] == 40
        assert entry["confidence"]["original"]["conformal"] is None
        for test in ("wilcoxon", "wilcoxon_rouge1", "wilcoxon_by_patient", "mcnemar"):
            assert entry["tests"][test]["p_holm"] >= entry["tests"][test]["p_value"]
        assert entry["against"] is None
        assert (entry["robustness"] is None) == (task != "icd")
    icd = report["tasks"]["icd"]
    assert set(icd["variants"]) == set(icd["variant_tests"]) == {"original_examples"}
    few, tuned = (
        m["accuracy"]["value"] for m in (icd["variants"]["original_examples"], icd["tuned"])
    )
    test = icd["variant_tests"]["original_examples"]
    assert test["difference"]["value"] == pytest.approx(tuned - few)
    assert icd["verdict"]["best_untuned"] == "original_examples"
    assert icd["verdict"]["tuned_beats_untuned"] == (test["difference"]["low"] > 0)
    assert report["tasks"]["modality"]["variants"] == {}
    assert icd["robustness"]["tuned"]["side_flip"]["rate"] == 1.0
    assert icd["ceiling"] == 0.93
    assert report["tasks"]["regimen"]["details"]["allowed"]["n"] > 0
    assert [(row["bin"], row["n"]) for row in icd["details"]["by_rarity"]] == [("21-100", 60)]
    assert icd["details"]["by_rarity"][0]["tuned"]["value"] == icd["tuned"]["accuracy"]["value"]


def closed_testing(p_values):
    """Holm by its definition: the largest Bonferroni p of all sets of tests that hold this one."""
    places = range(len(p_values))
    sets = [s for size in places for s in itertools.combinations(places, size + 1)]
    bonferroni = [min(1, len(s) * min(p_values[i] for i in s)) for s in sets]
    return [max(p for s, p in zip(sets, bonferroni, strict=True) if i in s) for i in places]


def test_holm_adjusts_over_all_tasks_of_a_report(report):
    entries = report["tasks"].values()
    families = {
        "own": [entry["tests"] for entry in entries],
        "baselines": [t for entry in entries for t in entry["baseline_tests"].values()],
        "untuned": [t for entry in entries for t in entry["variant_tests"].values()],
    }
    assert [len(tests) for tests in families.values()] == [3, 12, 1]
    for family in families.values():
        for kind in ("wilcoxon", "wilcoxon_rouge1", "wilcoxon_by_patient", "mcnemar"):
            expected = closed_testing([tests[kind]["p_value"] for tests in family])
            assert [tests[kind]["p_holm"] for tests in family] == pytest.approx(expected), kind


def test_subgroups_add_up_to_the_whole(report):
    entry = report["tasks"]["icd"]
    for by in subgroups.ORDER:
        rows = [row for row in entry["subgroups"] if row["by"] == by]
        assert sum(row["n"] for row in rows) == 60
        right = sum(row["n"] * row["tuned"]["value"] for row in rows)
        assert right / 60 == pytest.approx(entry["tuned"]["accuracy"]["value"])
    ages = {row["group"]: row["n"] for row in entry["subgroups"] if row["by"] == "age"}
    assert ages == {"0-39": 4, "60-69": 56}


def test_the_published_form_hides_small_cells_and_cases(report):
    public = published.publish(report)
    text = json.dumps(public, allow_nan=False)
    assert '"test-' not in text.replace(json.dumps(public["provenance"]), "")
    for entry in public["tasks"].values():
        young, other = [row for row in entry["subgroups"] if row["by"] == "age"]
        assert young == {
            "by": "age",
            "group": "0-39",
            "n": "<11",
            "original": None,
            "tuned": None,
        }
        # Alone, it could be found by subtraction.
        assert other["n"] == "hidden" and other["tuned"] is None
        for row in entry["subgroups"]:
            assert row["by"] != "sex" or row["n"] == 30
        for row in entry["tuned"]["confusion"]["matrix"]:
            assert all(count is None or count == 0 or count >= 11 for count in row)
        errors = entry["details"].get("errors", {}).values()
        assert all(n is None or n == 0 or n >= 11 for row in errors for n in row.values())
    assert report["tasks"]["icd"]["subgroups"] != public["tasks"]["icd"]["subgroups"]


def hidden_groups(*groups):
    """Which groups (cases, or cases and patients) are hidden; patients have cases in one alone."""
    made = [cells.Group(*(g if isinstance(g, tuple) else (g, g)), {}) for g in groups]
    cells.protect(made, sum(group.patients for group in made))
    return [group.hidden for group in made]


def test_small_groups_are_hidden_and_the_next_smallest_with_a_single_one():
    assert hidden_groups(3, 20, 90) == [True, True, False]
    assert hidden_groups(3, 20, 90, 10) == [True, False, False, True]
    assert hidden_groups(20, 90) == [False, False]
    # Two that are small even together are what the total leaves of the others.
    assert hidden_groups(3, 20, 90, 4) == [True, True, False, True]


def test_groups_of_few_patients_are_hidden_however_many_cases_they_have():
    assert hidden_groups((14, 1), (30, 30), (60, 55)) == [True, True, False]
    assert hidden_groups((14, 11), (30, 30)) == [False, False]
    assert hidden_groups((40, 6), (50, 7), (30, 30), (60, 60)) == [True, True, False, False]
    assert hidden_groups((40, 4), (50, 5), (30, 30), (60, 60)) == [True, True, True, False]
    # The same six patients in both: twelve in the sum, and too few.
    same = [cells.Group(n, patients, {}) for n, patients in ((20, 6), (20, 6), (30, 30), (60, 60))]
    cells.protect(same, 96)
    assert [group.hidden for group in same] == [True, True, True, False]


def unscored_groups(*groups):
    made = [cells.Group(n, n, {"tuned": right}) for n, right in groups]
    cells.protect(made, sum(group.n for group in made))
    return [bool(group.unscored) for group in made]


def test_a_score_over_a_known_number_of_cases_is_a_count():
    assert unscored_groups((36, 0), (40, 40)) == [False, False]
    assert unscored_groups((36, 12), (40, 20), (50, 30)) == [False, False, False]
    # 4 right, or 4 wrong: all right answers less the others' would tell them.
    assert unscored_groups((36, 4), (40, 20), (50, 30)) == [True, True, False]
    assert unscored_groups((36, 32), (60, 40), (50, 38)) == [True, False, True]
    # Few together are hidden with another that has some.
    assert unscored_groups((36, 2), (40, 3), (50, 0), (60, 30)) == [True, True, False, True]


def told(cells, total):
    """What whoever sees one line of a table and its sum can work out of its hidden cells: of one
    its count, of several that they are small together, where a count is left to hide."""
    hidden = tuple(i for i, count in enumerate(cells) if count is None)
    if not hidden or total is None:
        return {}
    rest = total - sum(count for count in cells if count is not None)
    if len(hidden) == 1 or (0 < rest < 11 and any(cells)):
        return {hidden: rest}
    return {}


MATRICES = {
    "few errors of a class": [[40, 3, 2, 0], [0, 30, 0, 0], [0, 0, 60, 0]],
    # The lone small cell of "b" is its whole row: n minus the other supports would tell it.
    "one small class": [[40, 0, 0, 0], [0, 3, 0, 0], [0, 0, 25, 0]],
    "small class and its partner": [[40, 12, 0, 0], [4, 0, 0, 0], [0, 2, 13, 0]],
    "one small error": [[40, 12, 0, 0], [0, 30, 0, 0], [3, 12, 60, 0]],
    "unparseable alone": [[40, 0, 0, 3], [0, 30, 0, 0], [0, 0, 60, 0]],
    "few right in one class": [[4, 20, 12, 0], [0, 30, 0, 0], [0, 0, 60, 0]],
}


@pytest.mark.parametrize("name", MATRICES)
def test_no_hidden_count_of_a_confusion_matrix_can_be_worked_out(name):
    matrix = MATRICES[name]
    labels = ["a", "b", "c"]
    n = sum(map(sum, matrix))
    columns = [sum(column) for column in zip(*matrix, strict=True)]
    classes = {
        label: {
            "precision": matrix[i][i] / columns[i] if columns[i] else 0.0,
            "recall": matrix[i][i] / sum(matrix[i]),
            "f1": 0.5,
            "support": sum(matrix[i]),
            "patients": sum(matrix[i]),
        }
        for i, label in enumerate(labels)
    }
    found = {
        "n": n,
        "patients": n,
        "accuracy": {"value": sum(matrix[i][i] for i in range(3)) / n},
        "per_class": classes,
        "confusion": {"labels": [*labels, "unparseable"], "matrix": matrix},
    }
    entry = dict.fromkeys(run.MODELS, found) | {"subgroups": [], "details": {}}
    published._publish_groups(entry, {"tuned": found})
    shown, classes = found["confusion"]["matrix"], found["per_class"]
    rows = [c["support"] if isinstance(c["support"], int) else None for c in classes.values()]
    for i, c in enumerate(classes.values()):
        if c["recall"] is not None:
            assert shown[i][i] == round(c["recall"] * rows[i])
    # The supports: one hidden alone is n minus the others.
    assert rows.count(None) != 1
    lines = list(zip(shown, rows, strict=True))
    sums = [
        shown[i][i] / c["precision"] if c["precision"] else None
        for i, c in enumerate(classes.values())
    ]
    lines += list(zip(zip(*shown, strict=True), [*sums, columns[-1]], strict=True))
    right = sum(matrix[i][i] for i in range(3))
    lines.append(([shown[i][i] for i in range(3)], right))
    for line, total in lines:
        assert told(line, total) == {}, name
    assert all(count in (None, 0) or count >= 11 for row in shown for count in row)
    assert any(count is None for row in shown for count in row) and n > 0
    for i, total in enumerate(rows):
        if total is None:
            assert shown[i] == [None] * 4


def test_no_other_small_count_stands_in_the_published_form(tmp_path, cohort):
    folder = make_run(tmp_path / "run", cohort, task="all", right=(0.9, 0.95))
    answer(folder, cohort, "original_examples", 0.93, task="icd")
    probes = {"icd": {"side_flip": {"n": 3, "rate": 1.0, "expected": "flips"}}}
    path = folder / "evaluation" / "test" / "tuned" / robustness.ROBUSTNESS
    probes = {"predictions_sha256": sha256(path.with_name(run.PREDICTIONS))} | probes
    path.write_text(json.dumps(probes))
    report = findings.build_report([run_folder.read_run(folder)], bootstrap=20)
    public = published.publish(report)
    for task, entry in public["tasks"].items():
        before = report["tasks"][task]
        assert 0 < max(before["tests"]["mcnemar"][f"only_{m}"] for m in run.MODELS) < 11
        rivals = (*entry["baseline_tests"].values(), *entry["variant_tests"].values())
        assert len(rivals) == 4 + (task == "icd")
        for tests in (entry["tests"], *rivals):
            pair = [tests["mcnemar"][f"only_{side}"] for side in ("original", "tuned")]
            assert pair == [None, None] or all(n == 0 or n >= 11 for n in pair)
            if None in pair:
                assert tests["wilcoxon"]["n_nonzero"] is tests["effect"]["odds_ratio"] is None
        for model in filter(None, entry["confidence"].values()):
            covered = [round(60 * p["coverage"]) for p in model["risk_coverage"]]
            assert covered[-1] == 60 and covered[0] >= 11
            assert all(step >= 11 for step in np.diff(covered))
        assert small_parts(public, task) == {}
        if task == "icd":
            for m in run.MODELS:
                counts = [kinds[m] for kinds in entry["details"]["errors"].values()]
                assert told(counts, 60 - round(60 * entry[m]["accuracy"]["value"])) == {}
    flip = public["tasks"]["icd"]["robustness"]["tuned"]["side_flip"]
    assert flip == {"n": "<11", "rate": None, "expected": "flips"}


def test_a_small_mcnemar_count_cannot_be_read_off_another_test():
    # 3 that only the original gets right, 20 only the tuned: a patient each, and no shared words.
    answers = [("C61", "C61", "")] * 3 + [("C61", "", "C61")] * 20 + [("C61", "C61", "C61")] * 17
    report = findings.build_report([run_in_memory(answers, "icd")], bootstrap=0)
    before = report["tasks"]["icd"]["tests"]
    kinds = ("wilcoxon", "wilcoxon_rouge1", "wilcoxon_by_patient")
    assert [before[kind]["n_nonzero"] for kind in kinds] == [23] * 3
    after = published.publish(report)["tasks"]["icd"]["tests"]
    assert after["mcnemar"]["only_original"] is after["mcnemar"]["only_tuned"] is None
    for kind in kinds:
        assert after[kind]["n_nonzero"] is after[kind]["statistic"] is None, kind
        assert after[kind]["p_value"] == before[kind]["p_value"]
    told = {name for name, value in after["effect"].items() if value is not None}
    assert told == {"cohen_h"}  # of the two accuracies


def test_a_small_bin_of_the_reliability_curve_cannot_be_worked_out():
    sizes = {0.95: 40, 0.55: 20, 0.15: 4}
    answers = [("C61", "", "C61" if i % 2 else "C20") for i in range(sum(sizes.values()))]
    logprobs = [math.log(share) for share, n in sizes.items() for _ in range(n)]
    report = findings.build_report([run_in_memory(answers, "icd", logprobs=logprobs)], bootstrap=0)
    bins = report["tasks"]["icd"]["confidence"]["tuned"]["reliability"]
    assert [row["n"] for row in bins] == [4, 20, 40]
    shown = published.publish(report)["tasks"]["icd"]["confidence"]["tuned"]["reliability"]
    # n and the accuracy less the two large bins would be the small one.
    hidden = {"confidence": None, "accuracy": None}
    large = {key: value for key, value in bins[2].items() if key != "patients"}
    assert shown == [hidden | {"n": "<11"}, hidden | {"n": "hidden"}, large]


def test_few_unreadable_references_are_hidden():
    regimen = "Left breast, 50 Gy in 25 fractions"
    answers = [("as discussed", regimen, regimen)] * 3 + [(regimen, "", regimen)] * 20
    report = findings.build_report([run_in_memory(answers)], bootstrap=0)
    assert report["tasks"]["regimen"]["details"]["unreadable_references"] == 3
    public = published.publish(report)
    assert public["tasks"]["regimen"]["details"]["unreadable_references"] is None


def scored(what, n, score):
    """A score over n cases as a whole and its part."""
    if isinstance(n, int) and score is not None and score["value"] is not None:
        yield what, n, round(n * score["value"])


def scored_groups(what, rows, scores, n, right):
    """The same of groups, and of what these leave of `right` among n where that tells something.

    Args:
      scores: of each row, {value} or None.
    """
    told = [part for row, s in zip(rows, scores, strict=True) for part in scored(what, row["n"], s)]
    yield from told
    left = n - sum(whole for _, whole, _ in told)
    rights = right - sum(part for _, _, part in told)
    if not left or not told:
        return
    sizes = [row["n"] for row in rows]
    groups = len(rows) - len(told)  # and those whose group is not known
    groups += all(isinstance(size, int) for size in sizes) and sum(sizes) < n
    if (
        groups == 1
        or (0 < rights < 11 and any(part for _, _, part in told))
        or (0 < left - rights < 11 and any(whole - part for _, whole, part in told))
    ):
        yield f"{what}, the rest", left, rights


def wholes_and_parts(entry):
    """(what, whole, part) of counts that stand in a published entry, the part among the whole."""
    n, details = entry["tuned"]["n"], entry["details"]
    right = {m: round(n * entry[m]["accuracy"]["value"]) for m in run.MODELS}
    unreadable = details.get("unreadable_references")
    if unreadable is not None:
        yield "unreadable references", n, unreadable
    for name, row in {**details.get("fields", {}), "allowed": details.get("allowed")}.items():
        if row is not None and isinstance(row["n"], int):
            yield name, n, row["n"]
            yield name, n - (unreadable or 0), row["n"]
            for m in run.MODELS:
                yield from scored(f"{name} right", row["n"], row[m])
                if row[m] is not None and row[m].get("precision"):
                    same = round(row["n"] * row[m]["value"])
                    yield f"{name} precision", round(same / row[m]["precision"]), same
        elif row is not None:
            assert all(row[m] is None for m in run.MODELS)
    for m, share in details.get("high_rouge_wrong_share", {}).items():
        if share is not None:
            for whole in (n, n - right[m]):
                yield "high ROUGE-1", whole, round(n * share["value"])
    if details.get("high_rouge_wrong_n") is not None:
        yield "high ROUGE-1", n - right["tuned"], details["high_rouge_wrong_n"]
    for m in run.MODELS if "cost" in details else ():
        if details["cost"][m] is not None:
            total, wrong = round(n * details["cost"][m]["value"]), n - right[m]
            if total not in (wrong, 3 * wrong):
                for each in (1, 2, 3):
                    yield "cost", math.inf, abs(total - each * wrong)
    for kinds in (entry["robustness"] or {}).values():
        for row in kinds.values():
            if isinstance(row["n"], int):
                yield "robustness", n, row["n"]
                yield from scored("robustness rate", row["n"], {"value": row["rate"]})
    for by in subgroups.ORDER:
        rows = [row for row in entry["subgroups"] if row["by"] == by]
        if rows and all(isinstance(row["n"], int) for row in rows):
            yield by, n, sum(row["n"] for row in rows)
        for m in run.MODELS:
            yield from scored_groups(f"{by} right", rows, [row[m] for row in rows], n, right[m])
    for m in run.MODELS:
        rows = details.get("by_rarity") or []
        yield from scored_groups("by rarity right", rows, [row[m] for row in rows], n, right[m])
        classes = [{"n": row["support"], **row} for row in entry[m]["per_class"].values()]
        scores = [None if c["recall"] is None else {"value": c["recall"]} for c in classes]
        yield from scored_groups("class right", classes, scores, n, right[m])
    for name, model in entry["confidence"].items():
        if model is not None:
            metrics = entry[name] if name in run.MODELS else entry["variants"][name]
            yield from parts_of_confidence(model, n, round(n * metrics["accuracy"]["value"]))
    others = [*(entry["baseline_tests"] or {}).values(), *entry["variant_tests"].values()]
    for tests in (entry["tests"], *others):
        if tests["mcnemar"]["only_tuned"] is not None:
            yield "both right", right["tuned"], tests["mcnemar"]["only_tuned"]
            yield "both wrong", n - right["tuned"], tests["mcnemar"]["only_original"]
        for kind in ("wilcoxon", "wilcoxon_rouge1", "wilcoxon_by_patient"):
            if tests[kind]["n_nonzero"] is not None:
                yield kind, tests[kind]["n"], tests[kind]["n_nonzero"]


def parts_of_confidence(model, n, right):
    bins = model["reliability"]
    accuracies = [None if b["accuracy"] is None else {"value": b["accuracy"]} for b in bins]
    yield from scored_groups("reliability", bins, accuracies, n, right)
    points = []
    for point in model["risk_coverage"]:
        cases = round(n * point["coverage"])
        wrong = round(cases * point["risk"])
        points.append((cases, wrong, cases - wrong))
    for few, more in itertools.pairwise(points):
        for part, whole in zip(few, more, strict=True):
            yield "risk and coverage", whole, part
    if (safe := model["coverage_at_5_percent_error"]) is not None:
        cases = round(n * safe)
        yield "coverage at 5 % error", n, cases
        if 0 < cases < n:  # with one case more above 5 % are wrong
            yield "wrong in coverage at 5 % error", n - right, cases // 20
            for point in points:
                for count, other in zip((cases, cases // 20), point, strict=False):
                    yield "risk and coverage at 5 %", max(count, other), min(count, other)
    if model["conformal"] and model["conformal"]["measured_coverage"] is not None:
        sets = model["conformal"]
        answered = round(n * sets["answered"])
        missed = n - round(n * sets["measured_coverage"])
        yield "conformal", n, answered
        yield "conformal", n, missed
        yield "conformal", n - right, missed
        if sets["kind"] == "answer":
            yield "conformal", answered, missed
            yield "conformal", right, answered - missed


def small_parts(report, task):
    return {
        what: (whole, part)
        for what, whole, part in wholes_and_parts(report["tasks"][task])
        if 0 < whole - part < 11 or 0 < part < 11
    }


SIDED, PLAIN = "Left breast, 50 Gy in 25 fractions", "Prostate, 70 Gy in 28 fractions"


@pytest.fixture(scope="module")
def nearly_whole():
    """A run in which a few cases lack what all others have: side, site, a probe, an error."""
    wrong = SIDED.replace("50", "60")
    answers = [(SIDED, SIDED, SIDED)] * 4 + [(SIDED, "", SIDED)] * 21 + [(SIDED, SIDED, "")] * 3
    answers += (
        [(SIDED, "", wrong)] * 14 + [(PLAIN, "Prostate", "?")] * 4 + [("as discussed", "", "?")] * 3
    )
    sites = ["breast_wbi"] * 42 + ["prostate"] * 2 + [None] * 5
    logprobs = [-0.1] * 25 + [-3.0 - i for i in range(len(answers) - 25)]
    found = run_in_memory(answers, sites=sites, logprobs=logprobs)
    probe = {"n": 44, "left_out": 5, "rate": 1.0, "low": 0.9, "high": 1.0, "expected": "same"}
    probes = {"tuned": {"regimen": {"synonyms": probe}}}
    return findings.build_report([dataclasses.replace(found, robustness=probes)], bootstrap=0)


def test_few_answers_that_are_right_but_for_their_boost_are_not_told(nearly_whole):
    boosted = f"{PLAIN}, boost 10 Gy in 5 fractions"
    entries = []
    for few in (3, 14):
        answers = [(PLAIN, "", PLAIN)] * 40 + [(PLAIN, "", boosted)] * few
        report = findings.build_report([run_in_memory(answers)], bootstrap=0)
        found = report["tasks"]["regimen"]
        strict, whole = (
            round(found["tuned"]["n"] * found["details"][name]["tuned"]["value"])
            for name in ("strict", "strict_boost_kind")
        )
        assert strict - whole == few
        entries.append(published.publish(report)["tasks"]["regimen"]["details"])
    assert entries[0]["strict_boost_kind"]["tuned"] is None
    assert entries[1]["strict_boost_kind"]["tuned"]["value"] == pytest.approx(40 / 54)


def test_no_part_that_is_shown_leaves_a_small_count_of_its_whole(nearly_whole):
    assert small_parts(nearly_whole, "regimen").keys() >= {
        "side", "dose", "allowed", "site", "robustness", "both right", "high ROUGE-1",
        "unreadable references", "wilcoxon_rouge1", "target right", "side precision",
    }  # fmt: skip
    public = published.publish(nearly_whole)
    assert small_parts(public, "regimen") == {}
    entry = public["tasks"]["regimen"]
    assert entry["details"]["fields"]["side"]["n"] == "hidden"
    assert entry["details"]["fields"]["boost"]["n"] == 0
    assert entry["robustness"]["tuned"]["synonyms"] == {
        "n": "hidden", "rate": None, "low": None, "high": None, "expected": "same"
    }  # fmt: skip
    sites = [row for row in entry["subgroups"] if row["by"] == "site"]
    assert [(row["group"], row["n"], row["tuned"]) for row in sites] == [("hidden", "hidden", None)]
    assert entry["tests"]["mcnemar"]["only_original"] is None
    json.dumps(public, allow_nan=False)


def rows_by(entry, by):
    return {row["group"]: row for row in entry["subgroups"] if row["by"] == by}


def test_the_accuracy_of_a_subgroup_does_not_tell_what_the_confusion_hides():
    answers = [("photon", "", "photon")] * 4 + [("photon", "", "proton")] * 32
    answers += [("proton", "", "proton")] * 28 + [("proton", "", "photon")] * 12
    answers += [("electron", "", "electron")] * 30 + [("electron", "", "photon")] * 20
    report = findings.build_report([run_in_memory(answers, "modality")], bootstrap=0)
    told = small_parts(report, "modality")
    assert told["modality right"] == told["class right"] == (36, 4)
    public = published.publish(report)
    assert small_parts(public, "modality") == {}
    entry = public["tasks"]["modality"]
    rows = rows_by(entry, "modality")
    assert {name: row["n"] for name, row in rows.items()} == {
        "photon": 36, "proton": 40, "electron": 50
    }  # fmt: skip
    # Had only the 4 of 36 been hidden, all right answers less the others' would tell them.
    assert rows["photon"]["tuned"] is rows["proton"]["tuned"] is None
    assert rows["electron"]["tuned"]["value"] == 30 / 50
    assert rows["photon"]["original"]["value"] == 0  # none right tells no small count


def test_a_site_of_one_code_does_not_tell_what_the_confusion_hides():
    answers = [("C61", "", "C61")] * 12 + [("C61", "", "C20")] * 3 + [("C61", "", "C50.911")] * 20
    answers += [("C20", "", "C20")] * 40 + [("C50.911", "", "C50.911")] * 60
    sites = ["prostate"] * 35 + ["rectum"] * 40 + ["breast"] * 60
    report = findings.build_report([run_in_memory(answers, "icd", sites=sites)], bootstrap=0)
    entry = published.publish(report)["tasks"]["icd"]
    assert entry["tuned"]["per_class"]["C61"]["recall"] is None  # or else 3 = 35 - 12 - 20
    rows = rows_by(entry, "site")
    assert rows["prostate"]["tuned"] is rows["rectum"]["tuned"] is None
    assert rows["breast"]["tuned"]["value"] == 1 and rows["prostate"]["n"] == 35


def test_conformal_shares_do_not_tell_a_small_count():
    answers = [("C61", "", "C61")] * 290 + [("C61", "", "C20")] * 10
    few = run_in_memory(answers, "icd")
    few = dataclasses.replace(few, validation={"tuned": few.predictions["tuned"]})
    report = findings.build_report([few], bootstrap=0)
    sets = report["tasks"]["icd"]["confidence"]["tuned"]["conformal"]
    assert sets["measured_coverage"] == 290 / 300
    assert small_parts(report, "icd")["conformal"] == (300, 10)
    public = published.publish(report)
    assert small_parts(public, "icd") == {}
    shown = public["tasks"]["icd"]["confidence"]["tuned"]["conformal"]
    assert shown == sets | {"measured_coverage": None, "answered": None, "mean_size": None}
    # 200 surely right, 100 wrong of which 29 are surer than the threshold: nothing is small.
    answers = [("C61", "", "C61")] * 200 + [("C61", "", "C20")] * 100
    logprobs = [-0.1] * 200 + [-0.5 - i / 50 for i in range(100)]
    many = run_in_memory(answers, "icd", logprobs=logprobs)
    many = dataclasses.replace(many, validation={"tuned": many.predictions["tuned"]})
    report = findings.build_report([many], bootstrap=0)
    sets = report["tasks"]["icd"]["confidence"]["tuned"]["conformal"]
    assert (sets["answered"], sets["measured_coverage"]) == (229 / 300, 271 / 300)
    shown = published.publish(report)["tasks"]["icd"]["confidence"]["tuned"]["conformal"]
    assert shown == sets


def test_other_shares_over_a_known_number_are_counts_too():
    answers = [(SIDED, "", SIDED)] * 40 + [(SIDED, "", PLAIN)] * 20 + [(PLAIN, "", PLAIN)] * 40
    found = run_in_memory(answers, sites=["breast_wbi"] * 60 + ["prostate"] * 40)
    probes = {
        "synonyms": {"n": 89, "rate": 85 / 89, "low": 0.9, "high": 1.0, "expected": "same"},
        "side_flip": {"n": 50, "rate": 30 / 50, "low": 0.4, "high": 0.8, "expected": "flips"},
    }
    found = dataclasses.replace(found, robustness={"tuned": {"regimen": probes}})
    report = findings.build_report([found], bootstrap=0)
    assert small_parts(report, "regimen")["robustness rate"] == (89, 85)
    public = published.publish(report)
    assert small_parts(public, "regimen") == {}
    shown = public["tasks"]["regimen"]["robustness"]["tuned"]
    assert shown["synonyms"] == {
        "n": 89, "rate": None, "low": None, "high": None, "expected": "same"
    }  # fmt: skip
    assert shown["side_flip"] == probes["side_flip"]
    modality = [("photon", "", "photon")] * 40 + [("photon", "", "proton")] * 20
    modality += [("photon", "", "HDR")] * 2
    report = findings.build_report([run_in_memory(modality, "modality")], bootstrap=0)
    # 20 of cost 1 and 2 of cost 3: 26 - 22 wrong ones tells the 2.
    assert small_parts(report, "modality")["cost"] == (math.inf, 4)
    cost = published.publish(report)["tasks"]["modality"]["details"]["cost"]
    assert cost["tuned"] is None and cost["original"]["value"] == pytest.approx(1)


def test_groups_of_one_patient_are_hidden_and_sites_by_name_too():
    answers = [("C20", "", "C20")] * 14 + [("C61", "", "C61")] * 30 + [("C50.911", "", "C61")] * 60
    patients = ["one"] * 14 + [f"p{i}" for i in range(90)]
    sites = ["Rectum, see J. Doe"] * 14 + ["prostate"] * 30 + ["breast"] * 60
    found = run_in_memory(answers, "icd", patients=patients, sites=sites)
    sexes = ["M"] * 44 + ["F"] * 57 + ["see J. Doe"] * 3
    found = dataclasses.replace(found, cases=found.cases.assign(sex=sexes))
    report = findings.build_report([found], bootstrap=0)
    entry = report["tasks"]["icd"]
    rows = rows_by(entry, "site")
    assert [(row["n"], row["patients"]) for row in rows.values()] == [(14, 1), (60, 60), (30, 30)]
    assert entry["tuned"]["per_class"]["C20"]["patients"] == 1
    public = published.publish(report)
    entry = public["tasks"]["icd"]
    assert [(row["group"], row["n"]) for row in rows_by(entry, "site").values()] == [
        ("breast", 60), ("hidden", "hidden")
    ]  # fmt: skip
    assert [(row["group"], row["n"]) for row in rows_by(entry, "sex").values()] == [
        ("F", 57), ("hidden", "hidden")
    ]  # fmt: skip
    nothing = {"precision": None, "recall": None, "f1": None, "support": "hidden"}
    assert entry["tuned"]["per_class"]["C20"] == entry["tuned"]["per_class"]["C61"] == nothing
    page = render_page(public, [found], include_text=False)
    for text in (json.dumps(public["tasks"]), page):
        assert "J. Doe" not in text
    assert "J. Doe" in render_page(report, [found])


@pytest.mark.parametrize("task", ["regimen", "modality", "icd"])
def test_no_small_count_can_be_worked_out_of_random_runs(task):
    options = {
        "regimen": [SIDED, PLAIN, SIDED.replace("Left", "Right"), PLAIN.replace("70", "60")],
        "modality": ["photon", "proton", "electron", "brachytherapy"],
        "icd": ["C61", "C20", "C50.911", "C34.11", "C18.9"],
    }[task]
    hidden = 0
    for seed in range(8):
        rng = np.random.default_rng(seed)
        n, share = int(rng.integers(40, 400)), rng.dirichlet(np.ones(len(options)))
        right = rng.choice(options, n, p=share)

        def given(right=right, rng=rng, n=n):
            kind = rng.random(n)
            other = np.where(kind < 0.9, rng.choice(options, n), "?")
            return np.where(kind < rng.random(), right, other)

        answers = list(zip(map(str, right), map(str, given()), map(str, given()), strict=True))
        found = run_in_memory(
            answers,
            task,
            patients=[f"p{i}" for i in rng.integers(n, size=n)],
            sites=list(rng.choice(["a", "b", "c", None], n, p=[0.5, 0.3, 0.15, 0.05])),
            logprobs=list(-rng.exponential(size=n)),
        )
        found = dataclasses.replace(found, validation={"tuned": found.predictions["tuned"]})
        report = findings.build_report([found], bootstrap=0)
        hidden += len(small_parts(report, task))
        assert small_parts(published.publish(report), task) == {}, seed
    assert hidden > 20


@pytest.mark.parametrize("task", ["regimen", "modality", "icd"])
def test_rarity_is_that_of_the_case_s_code_whatever_is_asked(task):
    given = {"regimen": SIDED, "modality": "photon", "icd": "C20"}[task]
    found = run_in_memory([(given, given, given)] * 20, task)
    # As the extract may spell it, and where it names none.
    codes = ["c20"] * 12 + (["C20"] if task == "icd" else ["C61"]) * 7
    codes += ["C20"] if task == "icd" else ["unknown"]
    held_out = [
        dataclasses.replace(record, icd10=code)
        for record, code in zip(found.held_out, codes, strict=True)
    ]
    training = [
        dataclasses.replace(found.held_out[0], case_id=f"t{i}", icd10="C20" if i < 3 else "C61")
        for i in range(10)
    ]
    found = dataclasses.replace(found, held_out=held_out, training=training)
    entry = findings.build_report([found], bootstrap=0)["tasks"][task]
    bins = {name: row["n"] for name, row in rows_by(entry, "rarity").items()}
    assert bins == ({"1-5": 20} if task == "icd" else {"1-5": 12, "6-20": 7})
    if task == "icd":
        assert {row["bin"]: row["n"] for row in entry["details"]["by_rarity"]} == bins


def test_a_few_that_both_models_have_right_or_whose_group_is_not_known_are_hidden():
    answers = [("C61", "", "C61")] * 20 + [("C61", "C61", "")] * 15
    answers += [("C61", "C61", "C61")] * 4 + [("C61", "", "")] * 15
    report = findings.build_report(
        [run_in_memory(answers, "icd", sites=["a"] * 49 + [None] * 5)], bootstrap=0
    )
    entry = published.publish(report)["tasks"]["icd"]
    assert entry["tests"]["mcnemar"]["only_original"] is None
    assert entry["tests"]["mcnemar"]["only_tuned"] is None
    assert [row["n"] for row in entry["subgroups"] if row["by"] == "site"] == ["hidden"]


def test_few_answers_that_are_no_code_cannot_be_told_from_the_unparseable():
    answers = [("C61", "", "C20")] * 20 + [("C61", "", "")] * 12 + [("C61", "", "C99.9")] * 3
    report = findings.build_report([run_in_memory(answers, "icd")], bootstrap=0)
    counts, errors = report["tasks"]["icd"], report["tasks"]["icd"]["details"]["errors"]
    before = errors["not_a_code"]["tuned"], counts["tuned"]["unparseable"]
    assert 0 < before[0] - before[1] < 11
    details = published.publish(report)["tasks"]["icd"]["details"]
    errors = details["errors"]
    assert errors["not_a_code"]["tuned"] is errors["other"]["tuned"] is None
    assert details["valid_leaf"]["tuned"] is None
    assert errors["not_a_code"]["original"] == 35


def test_a_large_remainder_is_left_as_it_is():
    answers = [(SIDED, "", SIDED)] * 30 + [(PLAIN, "", "?")] * 20
    sites = ["breast"] * 30 + [None] * 20
    report = findings.build_report([run_in_memory(answers, sites=sites)], bootstrap=0)
    entry = published.publish(report)["tasks"]["regimen"]
    assert entry["details"]["fields"]["side"]["n"] == 30
    assert [row["n"] for row in entry["subgroups"] if row["by"] == "site"] == [30]
    assert entry["tests"]["mcnemar"]["only_tuned"] == 30


def test_a_published_cohort_tells_no_small_count():
    facts = {
        "kept": 50,
        "excluded": {"no_text": 3, "no_dose": 20, "other": 40, "none": 0},
        "deidentification": {"policy": "redact", "rows": 3},
        "annotation": {"rows_offered": 2},
    }
    public = published.publish_cohort(facts)
    assert public["excluded"] == {"no_text": "<11", "no_dose": "hidden", "other": 40, "none": 0}
    assert public["deidentification"] == {"policy": "redact", "rows": "<11"}
    assert public["annotation"] == {"rows_offered": "<11"} and public["kept"] == 50
    assert facts["excluded"]["no_text"] == 3
    agreement = {
        "decision": {"n": 90, "equal": 0.8, "kappa": 0.5},
        "modality": {"n": 60, "equal": 0.95, "kappa": 0.9},
        "regimen": {"n": 60, "equal": 0.5, "kappa": 0.4},
        "exclude_reason": {"n": 12, "equal": 1.0, "kappa": None},
    }
    sheets = {"sheets": 2, "rows_offered": 0, "rows": 95, "rows_twice": 90, "agreement": agreement}
    told = published.publish_cohort({"annotation": sheets})["annotation"]
    assert (told["rows"], told["rows_twice"]) == ("hidden", 90)  # five are annotated once
    assert told["agreement"] == agreement | {"modality": {"n": 60, "equal": None, "kappa": None}}
    agreement["exclude_reason"] |= {"n": 9, "kappa": 0.6}
    told = published.publish_cohort({"annotation": sheets})["annotation"]["agreement"]
    # 60 of the same decision with the 21 others would tell the nine; so would the share of these.
    assert told["exclude_reason"] == {"n": "<11", "equal": None, "kappa": None}
    assert told["decision"] == {"n": 90, "equal": None, "kappa": None}
    assert told["regimen"] == {"n": 60, "equal": 0.5, "kappa": 0.4}
    assert agreement["decision"]["equal"] == 0.8
    few = {"assessed": 53, "kept": 50}
    shown = {"assessed": "hidden", "kept": 50, "rows": {}}
    assert published.publish_cohort(few | {"rows": {"read": 53}}) == shown
    assert published.publish_cohort({"assessed": 90, "kept": 50})["assessed"] == 90


def test_groups_of_a_case():
    case = {"age": "64.0", "sex": " F ", "site": None, "diagnosis": "x" * 250, "modality": ""}
    found = {by: subgroups.group_of(by, case) for by in ("age", "sex", "site", "length")}
    assert found == {"age": "60-69", "sex": "F", "site": None, "length": "200-399"}
    assert subgroups.group_of("modality", case) is None
    ages = [subgroups.group_of("age", {"age": age}) for age in ("39", "40", "90+", "unknown", "-3")]
    assert ages == ["0-39", "40-49", "80+", None, None]


def paired_tests(difference, mcnemar=0.02, wilcoxon=0.01, **by_patient):
    """Of 100 cases of a patient each; `by_patient` tells another number of patients, n, and p."""
    return {
        "difference": difference,
        "wilcoxon": {"p_value": wilcoxon, "n": 100},
        "wilcoxon_by_patient": {"p_value": wilcoxon, "p_two_sided": mcnemar, "n": 100} | by_patient,
        "mcnemar": {"p_value": mcnemar},
    }


def entry_with(tuned, baseline, difference, low, high):
    score = {"value": tuned, "low": None, "high": None}
    interval = {"value": difference, "low": low, "high": high}
    return {
        "original": {"accuracy": {"value": 0.1}},
        "tuned": {"accuracy": score, "n": 100, "unparseable": 0},
        "baselines": {"lookup": {"accuracy": {"value": baseline}}},
        "baseline_tests": {"lookup": paired_tests(interval)},
        "tests": paired_tests(interval),
        "details": {},
        "ceiling": None,
    }


def test_the_verdict_says_plainly_who_wins():
    better = judge_tuning("icd", entry_with(0.8, 0.5, 0.3, 0.2, 0.4))
    assert better["tuned_beats_baseline"] is True
    assert "beats every simple baseline" in better["sentences"][1]
    worse = judge_tuning("icd", entry_with(0.5, 0.8, -0.3, -0.4, -0.2))
    assert worse["tuned_beats_baseline"] is False
    assert "A simple baseline does better" in worse["sentences"][1]
    unsure = judge_tuning("icd", entry_with(0.8, 0.79, 0.01, -0.05, 0.07))
    assert unsure["tuned_beats_baseline"] is False
    assert "no worse than the tuned model as far as these cases tell" in unsure["sentences"][1]
    for value in (0.3, -0.3):  # no interval was computed
        unknown = judge_tuning("icd", entry_with(0.5 + value, 0.5, value, None, None))
        assert unknown["tuned_beats_baseline"] is False
        assert "as far as these cases tell" in unknown["sentences"][1]
    for (low, high), beats, said in (
        ((0.2, 0.4), True, "It beats the original model with examples in its prompt, which"),
        ((-0.4, -0.2), False, "original model with examples in its prompt does better than the"),
        ((-0.1, 0.1), False, "does no worse than the tuned one as far as these cases tell"),
        ((None, None), False, "as far as these cases tell: it reaches 50.0 % (tuned"),
    ):
        entry = entry_with(0.8, 0.5, 0.3, 0.2, 0.4) | {
            "variants": {
                "original_examples": {"accuracy": {"value": 0.5}},
                "original_constrained": {"accuracy": {"value": 0.4}},
                "tuned_constrained": {"accuracy": {"value": 0.9}},  # no rival: it is tuned
            },
            "variant_tests": {
                name: paired_tests({"value": 0.3, "low": low, "high": high})
                for name in ("original_constrained", "original_examples")
            },
        }
        judged = judge_tuning("icd", entry)
        assert judged["best_untuned"] == "original_examples"
        assert judged["tuned_beats_untuned"] is beats
        assert said in judged["sentences"][2] and len(judged["sentences"]) == 4
    # Of other cases: the most accurate baseline is beaten, a less accurate one is not told apart.
    several = entry_with(0.8, 0.6, 0.2, 0.1, 0.3)
    unclear = paired_tests({"value": 0.3, "low": -0.1, "high": 0.7}, mcnemar=0.3)
    several["baselines"]["tfidf"] = {"accuracy": {"value": 0.5}}
    several["baseline_tests"]["tfidf"] = unclear
    several["variants"], several["variant_tests"] = (
        dict(zip(("original_examples", "original_constrained"), found.values(), strict=True))
        for found in (several["baselines"], several["baseline_tests"])
    )
    judged = judge_tuning("icd", several)
    assert judged["best_baseline"] == "tfidf" and judged["tuned_beats_baseline"] is False
    assert "TF-IDF with logistic regression reaches 50.0 %" in judged["sentences"][1]
    assert judged["best_untuned"] == "original_constrained"
    assert judged["tuned_beats_untuned"] is False
    few = entry_with(0.8, 0.5, 0.3, 0.2, 0.4)
    for tests in (few["tests"], few["baseline_tests"]["lookup"]):
        tests["mcnemar"] = {"p_value": 0.125}
    judged = judge_tuning("icd", few)
    assert judged["tuned_beats_baseline"] is False
    assert "as far as these cases tell" in judged["sentences"][1]
    # The main test finds a gain all the same, and both are said.
    said = judged["sentences"][0]
    assert said.endswith(
        "one-sided Wilcoxon p = 0.0100). The Wilcoxon test finds a gain, but McNemar's exact "
        "two-sided test does not (p = 0.1250)."
    )
    few["tests"]["wilcoxon_by_patient"]["p_holm"] = 0.06
    said = judge_tuning("icd", few)["sentences"][0]
    assert said.endswith("p = 0.0100, after Holm p = 0.0600), which chance alone could explain.")
    assert "chance" not in better["sentences"][0] and "but" not in better["sentences"][0]
    assert better["best_untuned"] is better["tuned_beats_untuned"] is None
    none = entry_with(0.8, 0.5, 0.3, 0.2, 0.4) | {"baselines": None, "baseline_tests": None}
    assert judge_tuning("icd", none)["tuned_beats_baseline"] is None
    assert "a gain, but the interval of the difference holds 0." in unsure["sentences"][0]


def test_the_verdict_rests_on_the_test_by_patient_where_patients_have_several_cases():
    """By case all is sure, of 100 cases of 20 patients."""
    interval = {"value": 0.3, "low": 0.2, "high": 0.4}
    unsure, one_sided, sure = (
        paired_tests(interval, 1e-9, 1e-9, n=20, p_value=p, p_two_sided=2 * p, p_holm=2 * p)
        for p in (0.06, 0.03, 0.004)
    )
    entry = entry_with(0.8, 0.5, 0.3, 0.2, 0.4)
    for tests, said in (
        (
            unsure,
            "one-sided Wilcoxon by patient p = 0.0600, after Holm p = 0.1200), which chance alone "
            "could explain.",
        ),
        (sure, "one-sided Wilcoxon by patient p = 0.0040, after Holm p = 0.0080)."),
        (
            one_sided
            | {"wilcoxon_by_patient": one_sided["wilcoxon_by_patient"] | {"p_holm": 0.03}},
            "one-sided Wilcoxon by patient p = 0.0300). The Wilcoxon test by patient finds a gain, "
            "but the same test of two sides does not (p = 0.0600).",
        ),
    ):
        judged = judge_tuning("icd", entry | {"tests": tests, "baseline_tests": {"lookup": tests}})
        assert judged["sentences"][0].endswith(said)
        assert judged["tuned_beats_baseline"] is (tests is sure)


def test_where_no_answer_is_right_nothing_is_weighed():
    entry = entry_with(0.0, 0.0, 0.0, -0.1, 0.1)
    entry["tests"]["mcnemar"] = entry["baseline_tests"]["lookup"]["mcnemar"] = {"p_value": 1.0}
    entry["original"] = {"accuracy": {"value": 0.0}}
    entry["variants"] = {"original_examples": {"accuracy": {"value": 0.0}}}
    entry["variant_tests"] = {"original_examples": entry["baseline_tests"]["lookup"]}
    sentences = judge_tuning("icd", entry)["sentences"]
    assert sentences[0].startswith("On 100 held-out cases no answer is right, before tuning or")
    assert sentences[1:] == [
        "No answer of the tuned model or of any simple baseline is right.",
        "No answer of the original model with examples in its prompt is right, nor is any of the "
        "tuned one.",
        "All 100 answers of the tuned model are wrong; the ceiling is not known.",
    ]


@pytest.mark.parametrize(
    ("accuracy", "unread", "said"),
    [
        (
            0.63,
            12,
            "37 of the tuned model's 100 answers are wrong (37.0 %), 12 of them unparseable",
        ),
        (
            0.63,
            37,
            "37 of the tuned model's 100 answers are wrong (37.0 %), all of them unparseable",
        ),
        (0.99, 1, "1 of the tuned model's 100 answers is wrong (1.0 %), unparseable"),
        (0.0, 19, "All 100 answers of the tuned model are wrong, 19 of them unparseable"),
        (1.0, 0, "No answer of the tuned model is wrong"),
    ],
)
def test_what_remains_is_counted(accuracy, unread, said):
    entry = entry_with(accuracy, 0.5, 0.1, None, None)
    entry["tuned"]["unparseable"] = unread
    assert judge_tuning("icd", entry)["sentences"][-1].startswith(f"{said}; the ceiling is")


# -- two tuned models, and a folder that has travelled ---------------------------------------


def test_two_adapters_are_compared_on_the_same_cases(tmp_path, cohort):
    first = make_run(tmp_path / "rank8", cohort, right=(0.2, 0.5), seed=1)
    second = make_run(tmp_path / "rank16", cohort, right=(0.2, 0.9), seed=1)
    runs = [run_folder.read_run(folder) for folder in (first, second)]
    entry = findings.build_report(runs, bootstrap=50)["tasks"]["icd"]
    assert entry["against"] is None
    other = entry["further_runs"][0]
    against = other["against"]
    assert against["run"] == "rank8"
    value = other["tuned"]["accuracy"]["value"] - entry["tuned"]["accuracy"]["value"]
    assert against["tests"]["difference"]["value"] == pytest.approx(value)
    assert against["tests"]["wilcoxon"]["p_holm"] == against["tests"]["wilcoxon"]["p_value"]
    findings.require_same_cases(runs)


def test_runs_of_other_cases_stand_side_by_side_but_are_not_compared(tmp_path, cohort):
    first = make_run(tmp_path / "a", cohort)
    second = make_run(tmp_path / "b", cohort)
    for model in run.MODELS:
        path = second / "evaluation" / "test" / model / "predictions.jsonl"
        path.write_text(path.read_text().replace('"case_id": "test-', '"case_id": "other-'))
        unstamp(path.parent)
    (second / "config.json").write_text("{}")
    runs = [run_folder.read_run(folder) for folder in (first, second)]
    entry = findings.build_report(runs, bootstrap=20)["tasks"]["icd"]
    assert entry["further_runs"][0]["against"] is None
    why = {"run": "a", "why": "they were not asked the same cases"}
    assert entry["further_runs"][0]["not_compared"] == why and entry["not_compared"] is None
    with pytest.raises(ValueError, match=r"a \(60 cases\) and b \(60 cases\) did not answer the"):
        findings.require_same_cases(runs)


OTHER = {"patient_id": "patients", "reference": "right answers", "prompt_sha256": "prompts"}
SAID = {
    "patient_id": "a and b disagree on the patient_id of 60 cases",
    "reference": "a and b disagree on the reference of 60 cases",
    "prompt_sha256": "a and b were asked 60 cases of the same ids with other prompts",
}


@pytest.mark.parametrize("field", OTHER)
def test_runs_of_another_cohort_with_the_same_ids_are_not_compared(tmp_path, cohort, field):
    runs = [run_folder.read_run(make_run(tmp_path / name, cohort)) for name in "ab"]
    changed = {
        model: {"icd": [p | {field: "another"} for p in given["icd"]]}
        for model, given in runs[1].predictions.items()
    }
    runs[1] = dataclasses.replace(runs[1], predictions=changed, training=())
    entry = findings.build_report(runs, bootstrap=0)["tasks"]["icd"]["further_runs"][0]
    why = f"cases of the same ids have other {OTHER[field]}"
    assert entry["against"] is None and entry["not_compared"] == {"run": "a", "why": why}
    with pytest.raises(ValueError, match=SAID[field]):
        findings.require_same_cases(runs)


def test_prompts_are_the_same_cases_where_models_are_asked_in_the_same_way(workdir):
    found = run_folder.read_run(workdir)

    def with_prompts(model, prompt):
        given = [p | {"prompt_sha256": prompt} for p in found.predictions[model]["icd"]]
        one = found.predictions[model] | {"icd": given}
        return dataclasses.replace(found, predictions=found.predictions | {model: one})

    with pytest.raises(ValueError, match="original and tuned were asked 60 cases .* other prompts"):
        findings.build_report([with_prompts("tuned", "another")], bootstrap=0)
    # Prompts with examples are other words, and older predictions do not tell theirs.
    for model, prompt in (("original_examples", "another"), ("tuned", None)):
        findings.build_report([with_prompts(model, prompt)], bootstrap=0)


def test_a_folder_that_has_travelled_is_reported_from_what_it_holds(tmp_path, workdir, report):
    moved = tmp_path / "elsewhere"
    shutil.copytree(workdir, moved)
    (moved / "config.json").write_text(json.dumps({"cohort": str(tmp_path / "gone")}))
    entry = findings.build_report([run_folder.read_run(moved)], bootstrap=50)["tasks"]["icd"]
    whole = report["tasks"]["icd"]
    for name in ("original", "tuned", "variants", "confidence", "robustness"):
        assert entry[name] == whole[name], name
    assert entry["tests"]["difference"] == whole["tests"]["difference"]
    assert entry["baselines"] is None and entry["subgroups"] == []
    assert "was not at hand" in entry["verdict"]["sentences"][1]


def test_answers_of_another_checkpoint_are_left_out_and_told(tmp_path, workdir, cohort, capsys):
    folder = tmp_path / "run"
    shutil.copytree(workdir, folder)
    answer(folder, cohort, "tuned_constrained", 0.9)

    def came_from(split, model, trained):
        source = {"trained_fingerprint": trained, "base_fingerprint": "b", "base": f"/{split}"}
        source["cohort"] = {"folder": f"/{split}", "manifest_sha256": "c"}
        (folder / "evaluation" / split / model / run.SOURCE).write_text(json.dumps(source))

    for model in ("original", "original_examples"):
        came_from("test", model, "none")
    for split, model in (("test", "tuned"), ("test", "tuned_constrained"), ("validation", "tuned")):
        came_from(split, model, "step 100")
    whole = run_folder.read_run(folder)
    assert whole.left_out == ()
    assert set(whole.predictions) == {*run.MODELS, "tuned_constrained", "original_examples"}
    assert whole.validation and whole.robustness
    # Trained further: the test split alone is answered anew.
    answer(folder, cohort, "tuned", 0.9, task="all", seed=4)
    came_from("test", "tuned", "step 200")
    mixed = run_folder.read_run(folder)
    assert set(mixed.predictions) == {*run.MODELS, "original_examples"}
    assert not mixed.validation and not mixed.robustness
    named = ("test/tuned_constrained", "validation/tuned", "test/tuned/robustness.json")
    assert [line.split(":")[0] for line in mixed.left_out] == list(named)
    entry = write_report(folder, bootstrap=20)["tasks"]["icd"]
    assert entry["left_out"] == list(mixed.left_out)
    assert entry["confidence"]["tuned"]["conformal"] is None and entry["robustness"] is None
    assert capsys.readouterr().err.count("left out of the report") == 3


def test_variants_belong_to_their_model_however_it_was_loaded(tmp_path, workdir, cohort):
    """`train` runs the original with an idle adapter, `evaluate` without; sets must be the same."""
    folder = tmp_path / "run"
    shutil.copytree(workdir, folder)
    for model in ("original_constrained", "tuned_constrained"):
        answer(folder, cohort, model, 0.9)

    def came_from(model, trained, base, closed=None):
        source = {"trained_fingerprint": trained, "base_fingerprint": base}
        source |= {"constraints": {"icd": closed}} if closed else {}
        place = folder / "evaluation" / "test" / model / run.SOURCE
        place.write_text(json.dumps(source))

    came_from("original", "idle adapter", "weights")
    came_from("original_examples", "weights", "")
    came_from("tuned", "adapter", "weights")
    came_from("original_constrained", "weights", "", "table 1")
    came_from("tuned_constrained", "adapter", "weights", "table 1")
    whole = run_folder.read_run(folder)
    assert set(whole.predictions) == set(run.VARIANTS)
    assert [line for line in whole.left_out if line.startswith("test/")] == []
    came_from("original_examples", "other weights", "")
    came_from("tuned_constrained", "adapter", "weights", "cohort 2")
    mixed = run_folder.read_run(folder)
    assert set(mixed.predictions) == {*run.MODELS, "original_constrained"}
    told = [line for line in mixed.left_out if line.startswith("test/")]
    assert ["test/tuned_constrained", "test/original_examples"] == [
        x.split(":")[0] for x in told[:2]
    ]
    assert "from another closed set than test/original_constrained" in told[0]


ASKED = {
    "max_new_tokens": 128,
    "over_length": "fail",
    "seed": 1,
    "answers": {"precision": ["bfloat16", "bfloat16"]},
}
CODES = {"constrained": "table", "constraints": {"icd": "codes 1a"}}


@pytest.fixture(scope="module")
def asked(tmp_path_factory, cohort):
    """A run whose models answered both splits, every way in the same way in both."""
    folder = make_run(tmp_path_factory.mktemp("asked") / "run", cohort)
    ways = {"original_examples": {"examples": 5}, "tuned_constrained": CODES}
    for model in ("original", "tuned", *ways):
        for split in ("validation", "test"):
            if model not in run.MODELS or split == "validation":
                answer(folder, cohort, model, 0.5, split=split)
            asked_in(folder, split, model, ASKED | ways.get(model, {}))
    return folder


def asked_in(folder, split, model, source):
    (folder / "evaluation" / split / model / run.SOURCE).write_text(json.dumps(source))


@pytest.mark.parametrize(
    ("model", "change", "told"),
    [
        (
            "original_examples",
            {"examples": 2},
            "examples (2, there 5); run python -m radonc_jax.evaluate --split=validation "
            "--model=original --examples=5",
        ),
        (
            "original_examples",
            {"seed": 2},
            "seed (2, there 1); run python -m radonc_jax.evaluate --split=validation "
            "--model=original --examples=5 and python -m radonc_jax.evaluate --split=test "
            "--model=original --examples=5, so that both are asked alike",
        ),
        (
            "tuned_constrained",
            {"constrained": "cohort", "constraints": {"icd": "codes 2b"}},
            "constraints (cohort, there table); run python -m radonc_jax.evaluate "
            "--split=validation --model=tuned --constrained=table",
        ),
        (
            "tuned_constrained",
            {"constraints": {"icd": "codes 2b"}},
            "constraints (table, there table); run python -m radonc_jax.evaluate "
            "--split=validation --model=tuned --constrained=table and python -m "
            "radonc_jax.evaluate --split=test --model=tuned --constrained=table, so that both",
        ),
        (
            "tuned",
            {"max_new_tokens": 32},
            "max_new_tokens (32, there 128); run python -m radonc_jax.evaluate --split=validation "
            "--model=tuned and python -m radonc_jax.evaluate --split=test --model=tuned, so that",
        ),
        ("original", {"over_length": "trim_diagnosis"}, "over_length (trim_diagnosis, there fail)"),
        (
            "tuned",
            {"answers": {"precision": ["float32", "bfloat16"]}},
            "precision (['float32', 'bfloat16'], there ['bfloat16', 'bfloat16'])",
        ),
    ],
    ids=["examples", "seed", "closed set", "code table", "tokens", "length", "precision"],
)
def test_sets_are_not_calibrated_on_answers_asked_for_in_another_way(
    tmp_path, asked, model, change, told
):
    whole = run_folder.read_run(asked)
    assert set(whole.validation) == {*run.MODELS, "original_examples", "tuned_constrained"}
    assert not whole.left_out
    folder = tmp_path / "run"
    shutil.copytree(asked, folder)
    path = folder / "evaluation" / "validation" / model / run.SOURCE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    mixed = run_folder.read_run(folder)
    assert set(mixed.validation) == set(whole.validation) - {model}
    assert len(mixed.left_out) == 1 and told in mixed.left_out[0]
    assert mixed.left_out[0].startswith(f"validation/{model}: asked for in another way than test/")


def test_how_answers_were_asked_for_stands_in_the_report_and_names_its_rows(tmp_path, asked):
    folder = tmp_path / "run"
    shutil.copytree(asked, folder)
    content = write_report(folder, bootstrap=20)
    told = content["provenance"]["run"]["answers"]
    assert told["original_examples"]["examples"] == 5
    assert told["tuned_constrained"]["constrained"] == "table"
    assert told["tuned_constrained"]["constraints"] == {"icd": "codes 1a"}
    settings = content["tasks"]["icd"]["variant_settings"]
    assert settings["original_examples"] == {"examples": 5, "closed_set": None}
    assert settings["tuned_constrained"] == {"examples": None, "closed_set": "table"}
    page = (folder / "report.html").read_text()
    for name in ("Original with 5 examples", "Tuned, constrained to the code table"):
        assert f'<span class="model">{name}</span>' in page
        assert f'<th scope="row">{name}</th>' in page  # of the conformal sets
    assert "original with 5 examples, " in page  # of the model card
    assert (
        content["provenance"]["run"]["answers"]
        == published.publish(content)["provenance"]["run"]["answers"]
    )


def other_cohort(cohort, folder):
    """The same patients with other codes, as another site's data under the same path."""
    tables = [load_split(cohort, split).assign(split=split) for split in SPLITS]
    write_cohort(folder, pd.concat(tables).assign(icd10="C34.11"), NONE_EXCLUDED, {})


def test_another_cohort_under_the_config_s_path_is_not_the_run_s(tmp_path, cohort):
    folder = make_run(tmp_path / "run", cohort)
    named = {"manifest_sha256": sha256(cohort / "manifest.json")}
    (folder / "manifest.json").write_text(json.dumps({"cohort": named}))
    there = tmp_path / "data"
    other_cohort(cohort, there)
    (folder / "config.json").write_text(json.dumps({"cohort": str(there)}))
    # Without the run's own copy there is no cohort at hand, and none is taken for it.
    assert run_folder.read_run(folder).cases is None
    with pytest.raises(ValueError, match="is not the cohort of"):
        run_folder.read_run(folder, cohort=there)
    keep_copy(cohort, folder)
    assert of_run(there, folder) == folder / "cohort"
    assert set(run_folder.read_run(folder).cases["icd10"]) == set(PLACES)
    assert of_run(cohort, folder) == cohort


def test_a_copy_of_the_cohort_that_lacks_what_no_evaluation_reads(tmp_path, cohort):
    """As older versions kept it: the splits and the manifest alone."""
    folder = make_run(tmp_path / "run", cohort)
    keep_copy(cohort, folder)
    (folder / "config.json").write_text(json.dumps({"cohort": "/nowhere/cohort"}))
    copy = folder / "cohort"
    (copy / "excluded.csv").unlink()
    assert len(run_folder.read_run(folder).cases) == 60
    with pytest.raises(FileNotFoundError, match=r"excluded\.csv: missing.*run prepare again"):
        load_records(copy, "test")  # as `train` does
    (copy / "excluded.csv").write_text("row,reason\n1,changed\n")
    with pytest.raises(ValueError, match=r"excluded\.csv: changed .*; put back that of the cohort"):
        run_folder.read_run(folder)
    (copy / "excluded.csv").unlink()
    (copy / "validation.parquet").unlink()
    message = r"cohort/validation\.parquet: missing from the cohort; put back that of the cohort"
    with pytest.raises(FileNotFoundError, match=message):
        run_folder.read_run(folder)


def compare(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "radonc_jax.compare", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_compare_against_a_run(tmp_path, cohort):
    first = make_run(tmp_path / "rank8", cohort, right=(0.2, 0.5), seed=1)
    second = make_run(tmp_path / "rank16", cohort, right=(0.2, 0.9), seed=1)
    done = compare(f"--runs={second}", f"--against={first}", f"--output={tmp_path / 'report'}")
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "report" / "report.json").read_text())
    assert written["runs"] == ["rank8", "rank16"]
    assert "icd: rank16 tuned against rank8 tuned: +" in done.stdout


# -- bad input -------------------------------------------------------------------------------


@pytest.fixture
def icd_run(tmp_path, cohort):
    return make_run(tmp_path / "run", cohort)


def edit(folder, change, model="tuned", name="predictions.jsonl"):
    path = folder / "evaluation" / "test" / model / name
    path.write_text(change(path.read_text()))
    if name == run.PREDICTIONS:  # so that the check is met that the change is about
        unstamp(path.parent)


def unstamp(folder):
    """Leaves scores as an older version wrote them, without the hash of their predictions."""
    scores = json.loads((folder / run.METRICS).read_text())
    del scores[run.PREDICTIONS_SHA256]
    (folder / run.METRICS).write_text(json.dumps(scores))


def drop_last(text):
    return "".join(text.splitlines(keepends=True)[:-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("test-7", "test-700"), "such as test-7"),
        (lambda text: text + text.splitlines()[0] + "\n", "1 case ids of task icd stand more than"),
        (drop_last, "holds 59 cases of task icd, metrics.json 60; rows are missing"),
        (lambda text: text.replace('"task": "icd"', '"task": "modality"'), "hold different tasks"),
        (lambda text: text[:-30], "line 60: not a JSON object"),
        (lambda text: "", "holds no predictions"),
        (
            lambda text: text.replace('"reference": "C61"', '"reference": "C62.9"'),
            "disagree on the reference of 20 cases",
        ),
        (
            lambda text: text.replace('"rouge1": 1.0', '"rouge1": NaN'),
            "rouge1 is no number from 0 to 1",
        ),
        (
            lambda text: text.replace('"logprob": -', '"logprob": -9e999, "x": -'),
            "line 1: logprob is",
        ),
        (
            lambda text: text.replace('"correct": true', '"correct": "no"'),
            "correct is neither true",
        ),
        (
            lambda text: text.replace('"answer": null', '"answer": 7'),
            "answer is neither a text nor",
        ),
        (
            lambda text: text.replace('"correct": true', '"correct": false', 3),
            r"is not of the answers in .* \(task icd: accuracy ",
        ),
    ],
    ids=["other cases", "duplicate", "missing rows", "other task", "cut off", "empty", "reference"]
    + ["score NaN", "infinite", "no truth value", "no text", "scores of other answers"],
)
def test_predictions_that_do_not_belong_together_are_refused(icd_run, change, message):
    edit(icd_run, change)
    with pytest.raises(ValueError, match=message) as error:
        findings.build_report([run_folder.read_run(icd_run)], bootstrap=20)
    assert "\n" not in str(error.value) and "Cancer" not in str(error.value)


def test_scores_of_another_model_with_the_same_accuracy_are_refused(icd_run, cohort):
    # Each has one wrong answer, to a case of another class: F1 and confusion differ.
    folders = [icd_run / "evaluation" / "test" / model for model in run.MODELS]
    for i, folder in enumerate(folders):
        given = run.read_predictions(folder / run.PREDICTIONS)
        given["icd"] = [p | {"output": p["reference"]} for p in given["icd"]]
        given["icd"][i] |= {"output": "none"}
        given["icd"] = metrics.judge_again(given["icd"], select("icd")[0])[0]
        options = {"split": "test", "model": folder.name, "output": folder, "bootstrap": 20}
        run.score_all(given, select("icd"), **options)
    written = [json.loads((folder / run.METRICS).read_text()) for folder in folders]
    assert written[0]["accuracy"]["value"] == written[1]["accuracy"]["value"]
    assert written[0]["confusion"] != written[1]["confusion"]
    shutil.copy(folders[0] / run.METRICS, folders[1] / run.METRICS)
    with pytest.raises(ValueError, match="tuned: metrics.json is not of the answers in .* again"):
        run_folder.read_run(icd_run)
    # An older version named no predictions; of which model they are, it did.
    unstamp(folders[1])
    with pytest.raises(ValueError, match="is of model original, not of tuned; evaluate again"):
        run_folder.read_run(icd_run)
    scores = json.loads((folders[1] / run.METRICS).read_text())
    (folders[1] / run.METRICS).write_text(json.dumps(scores | {"model": "tuned"}))
    found = run_folder.read_run(icd_run)
    assert found.unproven == ("tuned",)
    entry = findings.build_report([found], bootstrap=20)["tasks"]["icd"]
    for name in ("f1_weighted", "per_class", "confusion"):
        assert entry["tuned"][name] == written[1][name] != written[0][name]


def test_a_folder_of_another_model_s_answers_is_refused(icd_run):
    folder = icd_run / "evaluation" / "test"
    for name in (run.PREDICTIONS, run.METRICS):
        shutil.copy(folder / "original" / name, folder / "tuned" / name)
    with pytest.raises(ValueError, match="is of model original, not of tuned; evaluate again"):
        run_folder.read_run(icd_run)


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "9e999"])
@pytest.mark.parametrize(
    ("place", "key", "advice"),
    [
        ("evaluation/test/tuned/metrics.json", "f1_macro.value", "evaluate again"),
        ("evaluation/test/tuned/metrics.json", "confusion.matrix.1.2", "evaluate again"),
        ("evaluation/test/tuned/robustness.json", "icd.side_flip.rate", "evaluate --robustness"),
        ("manifest.json", "loss", "put the run's own back"),
    ],
)
def test_numbers_that_are_not_finite_are_refused_by_file_and_key(
    icd_run, place, key, advice, value
):
    write_probes(icd_run, {"icd": {"side_flip": {"n": 3, "rate": 1.0, "expected": "flips"}}})
    (icd_run / "manifest.json").write_text('{"loss": 0.5}')
    path = icd_run / place
    content = json.loads(path.read_text())
    *way, last = [int(step) if step.isdigit() else step for step in key.split(".")]
    inner = content
    for step in way:
        inner = inner[step]
    inner[last] = "X"
    path.write_text(json.dumps(content).replace('"X"', value))
    with pytest.raises(ValueError) as error:
        run_folder.read_run(icd_run)
    told = str(error.value)
    assert told.startswith(f"{path}: not what") and f" {key} is no finite number; {advice}" in told
    assert "\n" not in told


def of_an_older_version(folder, changed):
    """Predictions, scores and hash as a version of the code left them that could not read the
    answers of the first `changed` right cases."""
    given = run.read_predictions(folder / run.PREDICTIONS)
    right = [p["case_id"] for p in given["icd"] if p["correct"]][:changed]
    unread = {"answer": None, "correct": False}
    given["icd"] = [p | unread if p["case_id"] in right else p for p in given["icd"]]
    options = {"split": "test", "model": folder.name, "output": folder, "bootstrap": 50}
    run.score_all(given, select("icd"), **options)


def test_answers_that_are_read_otherwise_by_now_are_judged_and_scored_anew(icd_run, capsys):
    (icd_run / "config.json").write_text("{}")
    before = run_folder.read_run(icd_run)
    assert before.judged_anew == {}
    of_an_older_version(icd_run / "evaluation" / "test" / "tuned", 3)
    write_probes(icd_run, {"icd": {"side_flip": {"n": 3, "rate": 1.0, "expected": "flips"}}})
    after = run_folder.read_run(icd_run)
    assert after.judged_anew == {"tuned": {"icd": 3}}
    assert after.predictions == before.predictions
    stored = after.metrics["tuned"]["icd"]["accuracy"]["value"]
    assert stored == pytest.approx(before.metrics["tuned"]["icd"]["accuracy"]["value"] - 3 / 60)
    assert after.robustness == {"tuned": {}}
    assert "robustness.json: of task icd, measured by a version of the code" in after.left_out[0]
    expected = findings.build_report([before], bootstrap=50)["tasks"]["icd"]
    report = write_report(icd_run, bootstrap=50)
    entry = report["tasks"]["icd"]
    for name in ("original", "tuned", "tests", "details", "confidence"):
        assert entry[name] == expected[name], name
    assert entry["judged_anew"] == {"tuned": 3} and expected["judged_anew"] == {}
    assert (
        "read or judged some answers otherwise (tuned 3)" in (icd_run / "report.html").read_text()
    )
    assert "tuned, task icd: 3 answers were read or judged otherwise" in capsys.readouterr().err
    assert published.publish(report)["tasks"]["icd"]["judged_anew"] == {"tuned": "<11"}


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Gives the same answer to every text, and counts the texts."""

    asked: list
    journal: object = None

    def source(self):
        return {}

    def prompt(self, task, diagnosis):
        return SimpleNamespace(beyond=False)

    def __call__(self, task, diagnoses):
        self.asked.extend(diagnoses)
        fields = {"tokens": [], "logprob": -1.0, "finished": True, "gap": None}
        made = SimpleNamespace(text="C61", trimmed=False, label_logprobs=None, **fields)
        return [made] * len(diagnoses)


def test_evaluating_again_judges_anew_what_is_there_and_replaces_what_does_not_belong(
    tmp_path, cohort
):
    config = SimpleNamespace(
        cohort=str(cohort), task="icd", seed=0, decode=SimpleNamespace(max_new_tokens=8),
        batch=SimpleNamespace(over_length="fail"),
        precision=SimpleNamespace(compute="float32", base="float32"),
    )  # fmt: skip
    folder, records = tmp_path / "tuned", load_records(cohort, "test")
    origin = {"trained_fingerprint": "a", "base_fingerprint": "b", "architecture": {}, "lora": None}

    def evaluate():
        decoder = Decoder([])
        given = {"split": "test", "model": "tuned", "output": folder, "config": config}
        answer_split(decoder, records, select("icd"), **given, origin=origin)
        files = {name: (folder / name).read_bytes() for name in (run.PREDICTIONS, run.METRICS)}
        return len(decoder.asked), files

    asked, whole = evaluate()
    assert asked == 60 and evaluate() == (0, whole)
    of_an_older_version(folder, 3)
    assert evaluate() == (0, whole)  # none is decoded again
    unstamp(folder)
    assert evaluate() == (0, whole)
    scores = json.loads(whole[run.METRICS]) | {"predictions_sha256": "of other answers"}
    (folder / run.METRICS).write_text(json.dumps(scores))
    assert evaluate() == (60, whole)


def test_the_ceiling_is_that_of_the_test_split_alone(icd_run, cohort):
    config = SimpleNamespace(
        cohort=str(cohort), task="icd", seed=0, decode=SimpleNamespace(max_new_tokens=8),
        batch=SimpleNamespace(over_length="fail"),
        precision=SimpleNamespace(compute="float32", base="float32"),
    )  # fmt: skip
    origin = {"trained_fingerprint": "a", "base_fingerprint": "b", "architecture": {}, "lora": None}
    options = {"output": None, "config": config, "origin": origin}
    for split, known in (("test", 0.93), ("validation", None), ("train", None)):
        records = load_records(cohort, split)
        given = options | {"split": split, "model": "tuned"}
        scores = answer_split(Decoder([]), records, select("icd"), **given)
        assert scores.get("ceiling") == known, split
    for model in run.MODELS:  # with the test split's, as older versions wrote it
        answer(icd_run, cohort, model, 0.7, split="validation")
        path = icd_run / "evaluation" / "validation" / model / run.METRICS
        path.write_text(json.dumps(json.loads(path.read_text()) | {"ceiling": 0.93}))
    found = {s: run_folder.read_run(icd_run, s) for s in ("test", "validation")}
    assert found["test"].ceiling == {"icd": 0.93} and found["validation"].ceiling == {}
    for split, known in (("test", 0.93), ("validation", None)):
        entry = findings.build_report([found[split]], bootstrap=0)["tasks"]["icd"]
        assert entry["ceiling"] == known
        assert all(entry[model].get("ceiling") is None for model in run.MODELS)
        assert ("ceiling is not known" in entry["verdict"]["sentences"][-1]) == (known is None)
    # Scored anew, too.
    older = dataclasses.replace(found["validation"], unproven=run.MODELS)
    assert "ceiling" not in findings.build_report([older], bootstrap=0)["tasks"]["icd"]["tuned"]


@pytest.mark.parametrize("value", ["null", "NaN", "true", '"0.5"'])
@pytest.mark.parametrize("field", ["accuracy", "unparseable"])
def test_figures_that_are_no_numbers_are_refused_in_one_line(icd_run, field, value):
    def broken(text):
        scores = json.loads(text)
        scores |= {field: {"value": "X"} if field == "accuracy" else "X"}
        return json.dumps(scores).replace('"X"', value)

    edit(icd_run, broken, name="metrics.json")
    with pytest.raises(ValueError, match="metrics.json: not what evaluate writes") as error:
        run_folder.read_run(icd_run)
    assert "\n" not in str(error.value)


def test_predictions_of_another_split_are_refused(icd_run):
    edit(icd_run, lambda text: text.replace('"split": "test"', '"split": "train"'), "tuned",
         "metrics.json")  # fmt: skip
    with pytest.raises(ValueError, match="is of split 'train', not 'test'"):
        run_folder.read_run(icd_run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_last, "no answer to 1 of the 60 cases of split 'test' of its cohort, and 0 answers"),
        (
            lambda text: text.replace('"case_id": "test-7"', '"case_id": "other"'),
            "no answer to 1 of the 60 cases of split 'test' of its cohort, and 1 answers",
        ),
    ],
    ids=["missing", "other"],
)
def test_cases_that_both_models_lack_are_told(icd_run, change, message):
    for model in run.MODELS:
        edit(icd_run, change, model)
        path = icd_run / "evaluation" / "test" / model
        lines = [json.loads(line) for line in (path / "predictions.jsonl").open()]
        scores = json.loads((path / "metrics.json").read_text())
        scores["accuracy"]["value"] = sum(line["correct"] for line in lines) / len(lines)
        scores |= {"n": len(lines), "unparseable": sum(line["answer"] is None for line in lines)}
        (path / "metrics.json").write_text(json.dumps(scores))
    with pytest.raises(ValueError, match=message):
        run_folder.read_run(icd_run)
    # A folder without its cohort cannot know.
    (icd_run / "config.json").write_text("{}")
    assert run_folder.read_run(icd_run).cases is None


def test_a_validation_split_with_missing_cases_calibrates_nothing(icd_run, cohort):
    answer(icd_run, cohort, "tuned", 0.8, split="validation")
    path = icd_run / "evaluation" / "validation" / "tuned"
    lines = (path / run.PREDICTIONS).read_text().splitlines(keepends=True)[:-3]
    (path / run.PREDICTIONS).write_text("".join(lines))
    given = [json.loads(line) for line in lines]
    scores = metrics.score(given, select("icd")[0], split="validation", model="tuned", bootstrap=0)
    (path / run.METRICS).write_text(json.dumps(scores))
    with pytest.raises(ValueError, match="no answer to 3 of the 40 cases of split 'validation'"):
        run_folder.read_run(icd_run)


@pytest.mark.parametrize(
    "content", ["{}", '{"task": "icd"}', '{"task": "icd", "accuracy": 1}', '{"tasks": [1]}']
)
def test_scores_that_evaluate_did_not_write_are_refused_in_one_line(icd_run, content):
    edit(icd_run, lambda text: content, name="metrics.json")
    with pytest.raises(ValueError, match="metrics.json: not what evaluate writes"):
        run_folder.read_run(icd_run)


@pytest.mark.parametrize(
    ("task", "right"),
    [("all", (0.0, 0.0)), ("all", (1.0, 1.0)), ("icd", (0.0, 1.0))],
    ids=["all unparseable", "all right", "as different as can be"],
)
def test_extreme_models_have_defined_figures(tmp_path, cohort, task, right):
    folder = make_run(tmp_path / "run", cohort, task=task, right=right)
    report = findings.build_report([run_folder.read_run(folder)], bootstrap=20)
    json.dumps(report, allow_nan=False)
    json.dumps(published.publish(report), allow_nan=False)
    for entry in report["tasks"].values():
        if right[0] == right[1]:
            assert entry["tests"]["wilcoxon"]["p_value"] == 1
            assert entry["tests"]["difference"]["low"] < 0 < entry["tests"]["difference"]["high"]
            assert entry["tests"]["mcnemar"]["p_value"] == 1
            assert entry["tests"]["effect"]["odds_ratio"] is None
            none = "no answer is right, before tuning or after it"
            every = "every answer is right, before tuning and after it"
            assert (every if right[0] else none) in entry["verdict"]["sentences"][0]


def test_one_patient_and_one_class_have_defined_figures(icd_run):
    for model in run.MODELS:
        path = icd_run / "evaluation" / "test" / model
        lines = [json.loads(line) for line in (path / "predictions.jsonl").open()]
        kept = [line | {"patient_id": "p"} for line in lines if line["reference"] == "C61"]
        (path / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
        scores = json.loads((path / "metrics.json").read_text())
        # As an evaluation of before would have left it: scored anew.
        del scores["patients"], scores[run.PREDICTIONS_SHA256]
        scores["accuracy"]["value"] = sum(line["correct"] for line in kept) / len(kept)
        scores |= {"n": len(kept), "unparseable": sum(line["answer"] is None for line in kept)}
        (path / "metrics.json").write_text(json.dumps(scores))
    (icd_run / "config.json").write_text("{}")
    report = findings.build_report([run_folder.read_run(icd_run)], bootstrap=50)
    json.dumps(report, allow_nan=False)
    entry = report["tasks"]["icd"]
    assert entry["tuned"]["patients"] == 1 and list(entry["tuned"]["per_class"]) == ["C61"]
    accuracy = entry["tuned"]["accuracy"]
    assert accuracy["low"] < 0.1 < accuracy["value"] < 0.95 < accuracy["high"]
    assert entry["tests"]["wilcoxon_by_patient"]["n"] == 1


def test_an_older_evaluation_is_scored_anew(icd_run, cohort):
    before = findings.build_report([run_folder.read_run(icd_run)], bootstrap=50)["tasks"]["icd"]
    for model in run.MODELS:
        path = icd_run / "evaluation" / "test" / model / "metrics.json"
        scores = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in scores.items() if "micro" not in k}))
    after = findings.build_report([run_folder.read_run(icd_run)], bootstrap=50)["tasks"]["icd"]
    assert after["tuned"] == before["tuned"]


@pytest.mark.parametrize("method", [None, 1])
def test_intervals_of_another_definition_are_made_anew(icd_run, method):
    before = findings.build_report([run_folder.read_run(icd_run)], bootstrap=50)["tasks"]["icd"]
    path = icd_run / "evaluation" / "test" / "tuned" / "metrics.json"
    scores = json.loads(path.read_text())
    scores["accuracy"] |= {"low": 0.0, "high": 1.0}
    # Of this very definition they stand as they were written.
    path.write_text(json.dumps(scores))
    kept = findings.build_report([run_folder.read_run(icd_run)], bootstrap=50)["tasks"]["icd"]
    assert kept["tuned"]["accuracy"] == scores["accuracy"]
    other = {name: value for name, value in scores.items() if name != "interval_method"}
    path.write_text(json.dumps(other if method is None else other | {"interval_method": method}))
    after = findings.build_report([run_folder.read_run(icd_run)], bootstrap=50)["tasks"]["icd"]
    assert after["tuned"] == before["tuned"]
