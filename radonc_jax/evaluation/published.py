"""The form of report.json that is to be shared: no case ids, no small group, no clinical text."""

import json
from collections.abc import Mapping, Sequence

from radonc_jax.evaluation import metrics as scores
from radonc_jax.evaluation.cells import (
    SMALLEST_CELL,
    Group,
    is_small,
    partner,
    protect,
    protect_alike,
    rest_of,
    thin_out,
)
from radonc_jax.evaluation.disclosure import disclose, last_part
from radonc_jax.evaluation.findings import entries
from radonc_jax.evaluation.run import MODELS
from radonc_jax.evaluation.summary import introduce, summarise
from radonc_jax.evaluation.verdict import judge_tuning


def publish(report: Mapping) -> dict:
    """report.json in the form to be shared: no case ids, no cell of fewer than 11 cases.

    Groups of fewer than 11 patients (all have `patients`, which the published form leaves out) or
    cases, of `subgroups`, `details.by_rarity`, `per_class` and the reliability curve, have no
    scores, and n "<11" or, where only their patients are few, "hidden" (support likewise); where
    one alone would be hidden, or several of fewer than 11 patients together, the next smallest is
    "hidden" too. Sites and sexes are named as the extract has them: those hidden are one row
    "hidden". ICD-10-CM codes, which are no free text, keep their names.

    A score over a known n is a count: it is null where the right answers or the wrong ones are 1 to
    10, and where sums would tell these, with that of another group. So are
      the accuracies of `subgroups` and `by_rarity`, precision, recall and F1 of a class, the
      accuracy of reliability bins, each field of regimens, `allowed` and robustness' rates;
      what conformal sets cover and answer, coverage at 5 % error (about one covered answer in
      twenty is wrong) and, but for its end, the risk-coverage curve, whose steps have no small
      count of cases, right or wrong;
      the mean cost, where nearly all errors cost the same, so that the sum tells the few others.
    In `confusion` the rows of hidden classes and counts of 1 to 10 are null; no row, column or
    diagonal that can be summed from other figures has one null alone or nulls of fewer than 11
    cases together beside a count. `details.errors` likewise. Groups that are as many cases with as
    many right answers, as a site of one code and this code, are treated alike. Where one of the
    four cells of a McNemar table is small (both right and both wrong follow from the accuracies)
    its counts are null, with what gives them away (their ratio; of each Wilcoxon test the number of
    what differs and the statistic; rank-biserial correlations). Fields of regimens, customary doses
    and robustness that are of few patients have n "<11" and no scores. A part that is shown beside
    its whole is large, and so is what it leaves of it: else its n is "hidden" and it has no scores,
    or it is null. `provenance` keeps hashes, versions and settings, but no folder and no command
    line; of models the last part of the name stays, of the extract the hash without its name.

    On purpose there stays what is of all answers to the split: n, patients, unparseable and
    unfinished answers, accuracy (of models, variants and baselines), strict and lenient
    accuracy (that which asks for boost and kind too where it leaves no small count of strict),
    agreement by depth, ROUGE-1, averages over classes, ECE, Brier score, AURC, intervals and
    p-values. Counts of answers (right, wrong, a confusion) are of cases, groups are of patients.
    Who solves for every average and every p-value together, or knows which codes a site has, may
    still narrow a hidden count down or find it.
    """
    result = json.loads(json.dumps(report))
    result["provenance"] = _without_places(result["provenance"])
    for task, entry in entries(result):
        n, patients = entry["tuned"]["n"], entry["tuned"]["patients"]
        for model, count in entry["judged_anew"].items():
            entry["judged_anew"][model] = _SMALL if is_small(count) else count
        found = entry["details"]
        for named in filter(None, (entry, entry["against"])):
            named["model"] = last_part(named["model"])
        if "unreadable_references" in found:
            found["unreadable_references"] = _parts(found["unreadable_references"], n)
        if "high_rouge_wrong" in found:
            found["high_rouge_wrong"] = []
            for model, share in found["high_rouge_wrong_share"].items():
                wrong = n - _right(entry[model])
                if _parts(round(n * share["value"]), n, wrong) is None:
                    found["high_rouge_wrong_share"][model] = None
            if found["high_rouge_wrong_share"]["tuned"] is None:
                found["high_rouge_wrong_n"] = None
        for model, whole in found.get("strict_boost_kind", {}).items():
            # What strict accuracy leaves of it: right but for the boost or the kind of treatment.
            missed = round(n * found["strict"][model]["value"]) - round(n * whole["value"])
            if is_small(missed):
                found["strict_boost_kind"][model] = None
        if found.get("allowed"):
            found["allowed"] = _publish_row(found["allowed"], patients, n)
        if "cost" in found:
            for model in MODELS:
                _publish_cost(found["cost"], model, n, n - _right(entry[model]))
        answers = {model: entry[model] for model in MODELS} | entry["variants"]
        for model, assessed in entry["confidence"].items():
            if assessed:
                _publish_confidence(assessed, n, patients, _right(answers[model]))
        for name, scored in found.get("fields", {}).items():
            readable = n - (found["unreadable_references"] or 0)
            found["fields"][name] = _publish_row(scored, patients, n, readable)
        for model in MODELS if found.get("errors") else ():
            counts = {kind: row[model] for kind, row in found["errors"].items()}
            # Unparseable answers, whose number stands elsewhere, are no codes either.
            strange = counts["not_a_code"] - entry[model]["unparseable"]
            also = ("not_a_code",) if is_small(strange) else ()
            # And readable answers that are no billable code are what those leave of the valid ones.
            leaf = found["valid_leaf"][model]
            readable = n - entry[model]["unparseable"]
            if _parts(readable - round(n * leaf["value"]), readable) is None:
                found["valid_leaf"][model] = None
            for kind, count in _publish_counts(counts, also).items():
                found["errors"][kind][model] = count
        for kinds in (entry["robustness"] or {}).values():
            for kind, measured in kinds.items():
                kinds[kind] = _publish_probe(measured, n, patients)
        rivals = [*(entry["baseline_tests"] or {}).values(), *entry["variant_tests"].values()]
        rivals += [entry["against"]["tests"]] if entry["against"] else []
        for tests in (entry["tests"], *rivals):
            _publish_tests(tests, n, _right(entry["tuned"]))
        _publish_groups(entry, answers | (entry["baselines"] or {}))
        entry["verdict"] = judge_tuning(task, entry)  # its sentences tell what is hidden by now
    for told in result["disclosure"].values():
        told["cohort"] = publish_cohort(told["cohort"])
    result |= {"disclosure": disclose(result)}  # and so do these
    listed = entries(result)
    return result | {"about": introduce(result, listed), "findings": summarise(listed)}


def publish_cohort(facts: Mapping) -> dict:
    """What the disclosure tells of a cohort, its counts of 1 to 10 rows or patients as "<11", and
    without the name of the extract's file, in which a name of a person may stand."""
    result = dict(facts)
    if "source" in facts:
        result["source"] = {key: v for key, v in facts["source"].items() if key != "name"}
    if is_small(facts.get("assessed", 0) - facts.get("kept", 0)):
        # Where a patient has one row, the rows read tell it too.
        result |= {"assessed": "hidden", "rows": {}}
    for name in ("excluded", "stripped"):
        if isinstance(result.get(name), Mapping):
            shown = _publish_counts(result[name])
            small = {key for key, count in result[name].items() if is_small(count)}
            result[name] = {
                key: (_SMALL if key in small else "hidden") if count is None else count
                for key, count in shown.items()
            }
    for name, key in (("deidentification", "rows"), ("annotation", "rows_offered")):
        count = (result.get(name) or {}).get(key, 0)
        if is_small(count):
            result[name] = result[name] | {key: _SMALL}
    if (result.get("annotation") or {}).get("sheets"):
        result["annotation"] = _publish_annotation(result["annotation"])
    return result


def _publish_annotation(told: Mapping) -> dict:
    """What is told of annotation sheets: no number of few rows, and no share that tells one."""
    rows, twice = told["rows"], told["rows_twice"]
    agreement = {name: dict(found) for name, found in told["agreement"].items()}
    # Of the rows that two annotated: both keep it, both leave it out, they differ.
    parts = {name: agreement.get(name, {"n": 0})["n"] for name in ("regimen", "exclude_reason")}
    shown = _publish_counts(parts | {"decision": twice - sum(parts.values())})
    for name, found in agreement.items():
        n, part = found["n"], shown.get(name, shown["regimen"])
        if is_small(n):
            found |= {"n": _SMALL, "equal": None, "kappa": None}
        elif n and (part is None or _parts(round(n * found["equal"]), n) is None):
            found |= {"n": n if name == "decision" or part is not None else _HIDDEN}
            found |= {"equal": None, "kappa": None}  # which narrows what is equal down
    hidden = _HIDDEN if is_small(rows - twice) else rows
    return told | {
        "rows": _SMALL if is_small(rows) else hidden,
        "rows_twice": _SMALL if is_small(twice) else twice,
        "agreement": agreement,
    }


_PLACES = ("workdir", "folder", "command", "xla_flags")  # of this machine and its people


def _without_places(value: object) -> object:
    """Provenance without the keys of _PLACES, however deep, and with models by their last part."""
    if not isinstance(value, dict):
        return value
    return {
        key: last_part(inner) if key == "model" else _without_places(inner)
        for key, inner in value.items()
        if key not in _PLACES
    }


_SMALL, _HIDDEN = f"<{SMALLEST_CELL}", "hidden"
_NAMES = ("by", "group", "bin")  # of rows of groups
_AS_TYPED = ("site", "sex")  # named as the extract has them


def _large(count: int) -> int | None:
    return None if is_small(count) else count


def _right(metrics: Mapping) -> int:
    return round(metrics["n"] * metrics["accuracy"]["value"])


def _parts(count: int, *wholes: int) -> int | None:
    """`count`, or None where it, or what it leaves of one of the wholes, is small."""
    parts = (count, *(whole - count for whole in wholes))
    return None if any(map(is_small, parts)) else count


def _hidden_row(row: Mapping, *wholes: int, patients: int) -> dict | None:
    """A row of scores over n of the cases with nothing but why it is not shown; None where it may
    be: it, and what it leaves of the wholes (of `patients` in all), is of 11 patients or more."""
    n, own = row["n"], row.get("patients", row["n"])
    alone = any(whole > n for whole in wholes) and patients - own < SMALLEST_CELL
    if _parts(n, *wholes) is not None and not is_small(own) and not (n and alone):
        return None
    return {key: None for key in row if key != "patients"} | {
        "n": _SMALL if is_small(n) else _HIDDEN
    }


def _publish_row(row: dict, patients: int, *wholes: int) -> dict:
    """A field of regimens, or `allowed`: n and each model's score over these n cases."""
    hidden = _hidden_row(row, *wholes, patients=patients)
    if hidden is not None:
        return hidden
    shown = {key: value for key, value in row.items() if key != "patients"}
    for model in MODELS:
        right = round(row["n"] * (row[model]["value"] or 0))
        # The precision of a field tells how many answers state it.
        precision = row[model].get("precision")
        given = round(right / precision) if precision else right
        if _parts(right, row["n"], given) is None:
            shown[model] = None
    return shown


def _publish_probe(measured: dict, n: int, patients: int) -> dict:
    """A change of the text in `robustness`."""
    measured = {key: value for key, value in measured.items() if key != "left_out"}
    hidden = _hidden_row(measured, n, patients=patients)
    if hidden is not None:
        return hidden | {"expected": measured["expected"]}
    own = measured["n"]
    measured.pop("patients", None)
    if _parts(round(own * (measured["rate"] or 0)), own) is None:
        measured |= {key: None for key in ("rate", "low", "high") if key in measured}
    return measured


def _publish_cost(cost: dict, model: str, n: int, wrong: int) -> None:
    """Nulls a mean cost if nearly all of the errors may be of one cost: the sum of all costs less
    so many times that cost would tell the few others."""
    total, highest = round(n * cost[model]["value"]), max(map(max, cost["matrix"]))
    if total in (wrong, highest * wrong):  # all are of the least or of the highest cost
        return
    if any(is_small(abs(total - each * wrong)) for each in range(1, highest + 1)):
        cost[model] = None


def _publish_counts(counts: Mapping[str, int], also: Sequence[str] = ()) -> dict[str, int | None]:
    """Counts whose sum is known, small ones and `also` null, never one alone nor few cases
    together."""
    shown = {kind: None if kind in also else _large(count) for kind, count in counts.items()}
    while (place := partner([(shown[kind], counts[kind]) for kind in counts])) is not None:
        shown[list(counts)[place]] = None
    return shown


def _publish_confidence(found: dict, n: int, patients: int, right: int) -> None:
    """`confidence` of a model that has `right` of its n answers right."""
    bins = [
        Group(row["n"], row["patients"], {"accuracy": round(row["n"] * row["accuracy"])})
        for row in found["reliability"]
    ]
    protect(bins, patients)
    found["reliability"] = list(map(_publish_group, found["reliability"], bins))
    # Cases, wrong ones and right ones among the most confident: none of them, and all.
    known = [(0, 0, 0), (n, n - right, right)]
    safe = round(n * found["coverage_at_5_percent_error"])
    wrong = n - right if safe == n else safe // 20  # one more case, and it would be above 5 %
    at_5_percent = thin_out([(safe, wrong, safe - wrong)], known)
    if not at_5_percent:
        found["coverage_at_5_percent_error"] = None
    points = {}
    for point in found["risk_coverage"]:
        cases = round(n * point["coverage"])
        wrong = round(cases * point["risk"])
        points[cases, wrong, cases - wrong] = point
    kept = thin_out(reversed(points), [*known, *at_5_percent])
    found["risk_coverage"] = [points[counts] for counts in reversed(kept)]
    if found["conformal"]:
        _publish_conformal(found["conformal"], n, right)


def _publish_conformal(sets: dict, n: int, right: int) -> None:
    answered, covered = (round(n * sets[name]) for name in ("answered", "measured_coverage"))
    missed = n - covered
    counts = [answered, n - answered, covered, missed, n - right - missed]
    if sets["kind"] == "answer":  # what is missed is a wrong answer that stands alone
        counts += [answered - missed, right - (answered - missed)]
    if any(map(is_small, counts)):
        # The mean size goes with them: where no set is of more than two labels it tells the same.
        sets |= dict.fromkeys(("answered", "measured_coverage", "mean_size"))


def _publish_tests(tests: dict, n: int, right: int) -> None:
    """Hides what is small of tests on n cases, of which the tuned model has `right` right."""
    pair = [tests["mcnemar"][f"only_{model}"] for model in MODELS]
    both_right, both_wrong = right - pair[1], n - right - pair[0]
    # Their difference is that of the accuracies, so one tells the other, and so does their sum: it
    # is what differs by patient too where each has one case, and by ROUGE-1 where answers are
    # either right or of other words.
    small = any(map(is_small, (*pair, both_right, both_wrong)))
    if small:
        tests["mcnemar"] |= {f"only_{model}": None for model in MODELS}
        tests["effect"] |= dict.fromkeys(("odds_ratio", "rank_biserial", "rank_biserial_rouge1"))
    for kind in ("wilcoxon", "wilcoxon_rouge1", "wilcoxon_by_patient"):
        if small or _parts(tests[kind]["n_nonzero"], tests[kind]["n"]) is None:
            tests[kind] |= {"n_nonzero": None, "statistic": None}


def _publish_groups(entry: dict, models: Mapping[str, dict]) -> None:
    """Hides small groups and scores that tell a small count: of `subgroups`, `by_rarity` and, in
    the metrics of `models` by name, of classes and their confusion."""
    n, patients = entry["tuned"]["n"], entry["tuned"]["patients"]
    right = {model: _right(entry[model]) for model in MODELS}
    by: dict[str, list[dict]] = {}
    for row in entry["subgroups"]:
        by.setdefault(row["by"], []).append(row)
    tables = [*by.values(), entry["details"].get("by_rarity") or []]
    groups = [
        [
            Group(row["n"], row["patients"], {m: round(row["n"] * row[m]["value"]) for m in MODELS})
            for row in rows
        ]
        for rows in tables
    ]
    # Cases whose group is not known are a group too.
    wholes = [[*group, *rest_of(group, n, patients, right)] for group in groups if group]
    classes = _classes(models)
    shown: dict[str, list] = {}
    changed = True
    while changed:
        changed = False
        protect_alike([*wholes, list(classes.values())], patients)
        for name, metrics in models.items():
            shown[name], unknown = _publish_confusion(metrics["confusion"], classes, name)
            for label in unknown:
                changed |= name not in classes[label].unscored
                classes[label].unscored.add(name)
    for name, metrics in models.items():
        metrics["confusion"]["matrix"] = shown[name]
        for label, row in metrics["per_class"].items():
            del row["patients"]
            if name in classes[label].unscored:  # recall times support is the diagonal
                row |= dict.fromkeys(("precision", "recall", "f1"))
            if classes[label].hidden:
                row["support"] = _SMALL if is_small(classes[label].n) else _HIDDEN
    *subgroups, rarity = (
        list(map(_publish_group, *pair)) for pair in zip(tables, groups, strict=True)
    )
    if rarity:
        entry["details"]["by_rarity"] = rarity
    entry["subgroups"] = [row for rows in subgroups for row in _without_names(rows)]


def _publish_group(row: Mapping, group: Group) -> dict:
    """A row {n, patients, score by model ...} with what is not kept back of its group."""
    if group.hidden:
        shown = {key: value if key in _NAMES else None for key, value in row.items()}
        shown["n"] = _SMALL if is_small(group.n) else _HIDDEN
    else:
        shown = {key: None if key in group.unscored else value for key, value in row.items()}
    del shown["patients"]
    return shown


def _without_names(rows: Sequence[dict]) -> list[dict]:
    """The groups of one kind, those hidden as one without a name where names are free text."""
    if rows[0]["by"] not in _AS_TYPED:
        return list(rows)
    shown = [row for row in rows if isinstance(row["n"], int)]
    hidden = [row | {"group": _HIDDEN, "n": _HIDDEN} for row in rows if row not in shown]
    return shown + hidden[:1]


def _classes(models: Mapping[str, dict]) -> dict[str, Group]:
    """The classes among the references, right answers by the names of `models`."""
    first = next(iter(models.values()))
    classes = {
        label: Group(row["support"], row["patients"], {})
        for label, row in first["per_class"].items()
    }
    for name, metrics in models.items():
        place = {label: i for i, label in enumerate(metrics["confusion"]["labels"])}
        for label, group in classes.items():
            group.right[name] = metrics["confusion"]["matrix"][place[label]][place[label]]
    return classes


def _publish_confusion(
    confusion: Mapping, classes: Mapping[str, Group], model: str
) -> tuple[list[list[int | None]], set[str]]:
    """The matrix with its nulls, and the labels whose right answers are null."""
    labels, matrix = confusion["labels"], confusion["matrix"]
    shown = [
        [None] * len(row)
        if label in classes and classes[label].hidden
        else [_large(count) for count in row]
        for label, row in zip(labels, matrix, strict=False)
    ]
    used = [i for i, row in enumerate(matrix) if any(row)]
    for i in used:
        if model in classes[labels[i]].unscored:
            shown[i][i] = None
    diagonal = [(i, i) for i in used]
    # Row sums are supports; column sums follow from precisions and, of the unparseable answers and
    # of the diagonal, stand elsewhere.
    columns = range(len(labels)) if used else ()
    lines = [([(i, j) for j in columns], True) for i in used]
    lines += [([(i, j) for i in used], labels[j] == scores.UNPARSEABLE) for j in columns]
    lines.append((diagonal, True))
    changed = True
    while changed:
        changed = False
        for cells, zeros in lines:
            place = partner([(shown[i][j], matrix[i][j]) for i, j in cells], zeros)
            if place is not None:
                i, j = cells[place]
                shown[i][j], changed = None, True
    return shown, {labels[i] for i in used if shown[i][i] is None}
