"""The form of report.json that is to be shared: no case ids, no small group, no clinical text."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from radonc_jax.evaluation import metrics as scores
from radonc_jax.evaluation import subgroups
from radonc_jax.evaluation.disclosure import disclose
from radonc_jax.evaluation.findings import entries
from radonc_jax.evaluation.run import MODELS
from radonc_jax.evaluation.verdict import judge_tuning


def publish(report: Mapping) -> dict:
    """report.json in the form to be shared: no case ids, no cell of fewer than 11 cases.

    Small groups of `subgroups` and `details.by_rarity` and small classes of `per_class` have n
    "<11" (support likewise) and no scores; where one alone would be hidden, or all that are hidden
    are fewer than 11 cases together, the next smallest is "hidden" too. In `confusion` the rows of
    these classes and counts of 1 to 10 are null; no row, column or diagonal that can be summed from
    other figures has one null alone or nulls of fewer than 11 cases together beside a count, and a
    class whose right answers are null has no scores. `details.errors` likewise. Where one of the
    four cells of a McNemar table is small (both right and both wrong follow from the accuracies)
    its counts are null, with what gives them away (their ratio; of each Wilcoxon test the number of
    what differs and the statistic; rank-biserial correlations). Fields of regimens, customary doses
    and robustness that are small have n "<11" and no scores; so have bins of the reliability curve,
    where one alone hides the next smallest; the steps of the risk-coverage curve are of 11 cases or
    more. A part that is shown beside its whole is large, and so is what it leaves of it: else its n
    is "hidden" and it has no scores, or it is null. `provenance` keeps hashes, versions and
    settings, but no folder and no command line; of models the last part of the name stays.

    Sums that stand elsewhere (`n`, `unparseable`, `unfinished` and their shares, accuracy) and
    p-values are of the whole split and stay, and so do further scores of all its answers. Who
    enumerates all tables that fit every average and every p-value together may still narrow a
    hidden count down.
    """
    result = json.loads(json.dumps(report))
    result["provenance"] = _without_places(result["provenance"])
    for task, entry in entries(result):
        n = entry["tuned"]["n"]
        entry["subgroups"] = _publish_subgroups(entry["subgroups"], n)
        for model, count in entry["judged_anew"].items():
            entry["judged_anew"][model] = count if _large(count) else _SMALL
        found = entry["details"]
        for named in filter(None, (entry, entry["against"])):
            named["model"] = _last_part(named["model"])
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
        if found.get("allowed"):
            found["allowed"] = _without_small(found["allowed"], n)
        for model in filter(None, entry["confidence"].values()):
            model["reliability"] = subgroups.hide_small(model["reliability"], "")
            model["risk_coverage"] = _large_steps(model["risk_coverage"], n)
            safe = round(n * model["coverage_at_5_percent_error"])
            if _parts(safe, n) is None:
                model["coverage_at_5_percent_error"] = None
            else:
                model["risk_coverage"] = [
                    point
                    for point in model["risk_coverage"]
                    if _large(abs(round(n * point["coverage"]) - safe)) is not None
                ]
        for name, scored in found.get("fields", {}).items():
            readable = n - (found["unreadable_references"] or 0)
            found["fields"][name] = _without_small(scored, n, readable)
        if found.get("by_rarity"):
            found["by_rarity"] = subgroups.hide_small(found["by_rarity"], "")
        for model in MODELS if found.get("errors") else ():
            counts = {kind: row[model] for kind, row in found["errors"].items()}
            # Unreadable answers, whose number stands elsewhere, are no codes either.
            strange = counts["not_a_code"] - entry[model]["unparseable"]
            also = ("not_a_code",) if _large(strange) is None else ()
            # And readable answers that are no billable code are what those leave of the valid ones.
            leaf = found["valid_leaf"][model]
            readable = n - entry[model]["unparseable"]
            if _parts(readable - round(n * leaf["value"]), readable) is None:
                found["valid_leaf"][model] = None
            for kind, count in _publish_counts(counts, also).items():
                found["errors"][kind][model] = count
        for kinds in (entry["robustness"] or {}).values():
            for kind, measured in kinds.items():
                measured = {key: x for key, x in measured.items() if key != "left_out"}
                kinds[kind] = _without_small(measured, n) | {"expected": measured["expected"]}
        rivals = [*(entry["baseline_tests"] or {}).values(), *entry["variant_tests"].values()]
        rivals += [entry["against"]["tests"]] if entry["against"] else []
        for tests in (entry["tests"], *rivals):
            _publish_tests(tests, n, _right(entry["tuned"]))
        measured = (entry["original"], entry["tuned"], *entry["variants"].values())
        for metrics in (*measured, *(entry["baselines"] or {}).values()):
            _publish_classes(metrics)
        entry["verdict"] = judge_tuning(task, entry)  # its sentences tell what is hidden by now
    for told in result["disclosure"].values():
        told["cohort"] = publish_cohort(told["cohort"])
    return result | {"disclosure": disclose(result)}  # and so do these


def publish_cohort(facts: Mapping) -> dict:
    """What the disclosure tells of a cohort, its counts of 1 to 10 rows or patients as "<11"."""
    result = dict(facts)
    if _large(facts.get("assessed", 0) - facts.get("kept", 0)) is None:
        # Where a patient has one row, the rows read tell it too.
        result |= {"assessed": "hidden", "rows": {}}
    for name in ("excluded", "stripped"):
        if isinstance(result.get(name), Mapping):
            shown = _publish_counts(result[name])
            small = {key for key, count in result[name].items() if _large(count) is None}
            result[name] = {
                key: (_SMALL if key in small else "hidden") if count is None else count
                for key, count in shown.items()
            }
    for name, key in (("deidentification", "rows"), ("annotation", "rows_offered")):
        count = (result.get(name) or {}).get(key, 0)
        if _large(count) is None:
            result[name] = result[name] | {key: _SMALL}
    return result


_PLACES = ("workdir", "folder", "command", "xla_flags")  # of this machine and its people


def _without_places(value: object) -> object:
    """Provenance without the keys of _PLACES, however deep, and with models by their last part."""
    if not isinstance(value, dict):
        return value
    return {
        key: _last_part(inner) if key == "model" else _without_places(inner)
        for key, inner in value.items()
        if key not in _PLACES
    }


def _last_part(model: str | None) -> str | None:
    """Of a folder, whose path is nobody's business, or of a hub id."""
    return None if model is None else re.split(r"[/\\]", model.rstrip("/\\"))[-1]


_SMALL = f"<{subgroups.SMALLEST_CELL}"


def _large(count: int) -> int | None:
    return None if 0 < count < subgroups.SMALLEST_CELL else count


def _right(metrics: Mapping) -> int:
    return round(metrics["n"] * metrics["accuracy"]["value"])


def _parts(count: int, *wholes: int) -> int | None:
    """`count`, or None where it, or what it leaves of one of the wholes, is small."""
    parts = (count, *(whole - count for whole in wholes))
    return None if None in map(_large, parts) else count


def _without_small(row: dict, *wholes: int) -> dict:
    """A row of scores over n of the cases, or nothing but why it is not shown."""
    if _parts(row["n"], *wholes) is not None:
        return row
    return dict.fromkeys(row) | {"n": _SMALL if _large(row["n"]) is None else "hidden"}


def _publish_subgroups(rows: Sequence[Mapping], n: int) -> list[dict]:
    """Cases whose group is not known are a group too: n less those that are shown."""
    known = Counter()
    for row in rows:
        known[row["by"]] += row["n"]
    unknown = [{"by": by, "n": n - count} for by, count in known.items()]
    return subgroups.hide_small([*rows, *unknown], "by")[: len(rows)]


def _partner(counts: Sequence[tuple[int | None, int]], zeros: bool = True) -> int | None:
    """The place of the count to hide with the only hidden one, whose sum would tell it, or with
    several that are small even together; of (shown, count), the smallest that is not 0, then, with
    the only one, a 0 if `zeros`. None where none has to or can be."""
    hidden = [n for shown, n in counts if shown is None]
    if len(hidden) != 1 and _large(sum(hidden)) is not None:
        return None
    zeros = zeros and len(hidden) == 1
    others = [i for i, (shown, n) in enumerate(counts) if shown is not None and (n or zeros)]
    return min(others, key=lambda i: (not counts[i][1], counts[i][1]), default=None)


def _publish_counts(counts: Mapping[str, int], also: Sequence[str] = ()) -> dict[str, int | None]:
    """Counts whose sum is known, small ones and `also` null, never one alone nor few cases
    together."""
    shown = {kind: None if kind in also else _large(count) for kind, count in counts.items()}
    while (place := _partner([(shown[kind], counts[kind]) for kind in counts])) is not None:
        shown[list(counts)[place]] = None
    return shown


def _large_steps(points: Sequence[dict], n: int) -> list[dict]:
    """Points of a risk-coverage curve of `n` cases, each 11 cases or more from the one before."""
    kept: list[dict] = []
    for point in points[::-1]:  # from the end, which is the whole split
        cases = round(n * point["coverage"])
        following = round(n * kept[-1]["coverage"]) if kept else None
        far = following is None or following - cases >= subgroups.SMALLEST_CELL
        if far and _large(cases) is not None:
            kept.append(point)
    return kept[::-1]


def _publish_tests(tests: dict, n: int, right: int) -> None:
    """Hides what is small of tests on n cases, of which the tuned model has `right` right."""
    pair = [tests["mcnemar"][f"only_{model}"] for model in MODELS]
    both_right, both_wrong = right - pair[1], n - right - pair[0]
    # Their difference is that of the accuracies, so one tells the other, and so does their sum: it
    # is what differs by patient too where each has one case, and by ROUGE-1 where answers are
    # either right or of other words.
    small = None in map(_large, (*pair, both_right, both_wrong))
    if small:
        tests["mcnemar"] |= {f"only_{model}": None for model in MODELS}
        tests["effect"] |= dict.fromkeys(("odds_ratio", "rank_biserial", "rank_biserial_rouge1"))
    for kind in ("wilcoxon", "wilcoxon_rouge1", "wilcoxon_by_patient"):
        if small or _parts(tests[kind]["n_nonzero"], tests[kind]["n"]) is None:
            tests[kind] |= {"n_nonzero": None, "statistic": None}


def _publish_classes(metrics: dict) -> None:
    rows = [
        {"label": label, "n": row["support"], **row} for label, row in metrics["per_class"].items()
    ]
    hidden = {r["label"]: r for r in subgroups.hide_small(rows, "") if not isinstance(r["n"], int)}
    labels, matrix = metrics["confusion"]["labels"], metrics["confusion"]["matrix"]
    shown = [
        [None] * len(row) if label in hidden else [_large(count) for count in row]
        for label, row in zip(labels, matrix, strict=False)
    ]
    used = [i for i, row in enumerate(matrix) if any(row)]
    diagonal = [(i, i) for i in used]
    # Row sums are supports; column sums follow from precisions and, of the unreadable answers and
    # of the diagonal, stand elsewhere.
    columns = range(len(labels)) if used else ()
    lines = [([(i, j) for j in columns], True) for i in used]
    lines += [([(i, j) for i in used], labels[j] == scores.UNPARSEABLE) for j in columns]
    lines.append((diagonal, True))
    changed = True
    while changed:
        changed = False
        for cells, zeros in lines:
            place = _partner([(shown[i][j], matrix[i][j]) for i, j in cells], zeros)
            if place is not None:
                i, j = cells[place]
                shown[i][j], changed = None, True
    metrics["confusion"]["matrix"] = shown
    unknown = {labels[i] for i, _ in diagonal if shown[i][i] is None}
    for label, row in metrics["per_class"].items():
        if label in unknown or label in hidden:  # recall times support is the diagonal
            row |= {"precision": None, "recall": None, "f1": None}
        if label in hidden:
            row["support"] = hidden[label]["n"]
