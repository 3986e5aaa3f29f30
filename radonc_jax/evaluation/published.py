"""The form of report.json that is to be shared: no case ids, no small group, no clinical text."""

import json
import re
from collections.abc import Mapping, Sequence

from radonc_jax.evaluation import metrics as scores
from radonc_jax.evaluation import subgroups
from radonc_jax.evaluation.findings import entries
from radonc_jax.evaluation.run import MODELS
from radonc_jax.evaluation.verdict import judge_tuning


def publish(report: Mapping) -> dict:
    """report.json in the form to be shared: no case ids, no cell of fewer than 11 cases.

    Small groups of `subgroups` and `details.by_rarity` and small classes of `per_class` have n
    "<11" (support likewise) and no scores; where one alone would be hidden the next smallest is
    "hidden" too. In `confusion` the rows of these classes and counts of 1 to 10 are null; no row,
    column or diagonal that can be summed from other figures has one null alone, and a class whose
    right answers are null has no scores. `details.errors` likewise. Where McNemar counts are small
    both are null, with what gives them away (their ratio; of each Wilcoxon test the number of what
    differs and the statistic; rank-biserial correlations). Fields of regimens, customary doses and
    robustness that are small have n "<11" and no scores; so have bins of the reliability curve,
    where one alone hides the next smallest; the steps of the risk-coverage curve are of 11 cases
    or more. `provenance` keeps hashes, versions and settings, but no folder and no command line;
    of models the last part of the name stays.

    Sums that stand elsewhere (`n`, `unparseable`, `unfinished` and their shares, accuracy) and
    p-values are of the whole split and stay. Who enumerates all tables that fit every average and
    every p-value together may still narrow a hidden count down.
    """
    result = json.loads(json.dumps(report))
    result["provenance"] = _without_places(result["provenance"])
    for task, entry in entries(result):
        entry["subgroups"] = subgroups.hide_small(entry["subgroups"], "by")
        n = entry["tuned"]["n"]
        found = entry["details"]
        for named in filter(None, (entry, entry["against"])):
            named["model"] = _last_part(named["model"])
        if "unreadable_references" in found:
            found["unreadable_references"] = _large(found["unreadable_references"])
        if "high_rouge_wrong" in found:
            found["high_rouge_wrong"] = []
            found["high_rouge_wrong_n"] = _large(found["high_rouge_wrong_n"])
            for model, share in found["high_rouge_wrong_share"].items():
                if _large(round(n * share["value"])) is None:
                    found["high_rouge_wrong_share"][model] = None
        if found.get("allowed"):
            found["allowed"] = _without_small(found["allowed"])
        for model in filter(None, entry["confidence"].values()):
            model["reliability"] = subgroups.hide_small(model["reliability"], "")
            model["risk_coverage"] = _large_steps(model["risk_coverage"], n)
            if _large(round(n * model["coverage_at_5_percent_error"])) is None:
                model["coverage_at_5_percent_error"] = None
        for name, scored in found.get("fields", {}).items():
            found["fields"][name] = _without_small(scored)
        if found.get("by_rarity"):
            found["by_rarity"] = subgroups.hide_small(found["by_rarity"], "")
        for model in MODELS if found.get("errors") else ():
            counts = {kind: row[model] for kind, row in found["errors"].items()}
            for kind, count in _publish_counts(counts).items():
                found["errors"][kind][model] = count
        for kinds in (entry["robustness"] or {}).values():
            for kind, measured in kinds.items():
                measured = {key: x for key, x in measured.items() if key != "left_out"}
                kinds[kind] = _without_small(measured) | {"expected": measured["expected"]}
        _publish_tests(entry["tests"])
        for tests in (*(entry["baseline_tests"] or {}).values(), *entry["variant_tests"].values()):
            _publish_tests(tests)
        if entry["against"]:
            _publish_tests(entry["against"]["tests"])
        measured = (entry["original"], entry["tuned"], *entry["variants"].values())
        for metrics in (*measured, *(entry["baselines"] or {}).values()):
            _publish_classes(metrics)
        entry["verdict"] = judge_tuning(task, entry)  # its sentences tell what is hidden by now
    return result


def publish_cohort(facts: Mapping) -> dict:
    """A cohort's manifest with its counts of 1 to 10 rows or patients as "<11", for the page."""
    result = dict(facts)
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


def _without_small(row: dict) -> dict:
    if _large(row["n"]) is not None:
        return row
    return dict.fromkeys(row) | {"n": _SMALL}


def _partner(counts: Sequence[tuple[int | None, int]], zeros: bool = True) -> int | None:
    """The place of the count to hide with the only hidden one, whose sum would tell it; of (shown,
    count), the smallest that is not 0, then a 0 if `zeros`. None where none has to or can be."""
    if sum(shown is None for shown, _ in counts) != 1:
        return None
    others = [i for i, (shown, n) in enumerate(counts) if shown is not None and (n or zeros)]
    return min(others, key=lambda i: (not counts[i][1], counts[i][1]), default=None)


def _publish_counts(counts: Mapping[str, int]) -> dict[str, int | None]:
    """Counts whose sum is known, small ones null and never one alone."""
    shown = {kind: _large(count) for kind, count in counts.items()}
    place = _partner([(shown[kind], counts[kind]) for kind in counts])
    if place is not None:
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


def _publish_tests(tests: dict) -> None:
    pair = [tests["mcnemar"][f"only_{model}"] for model in MODELS]
    # Their difference is that of the accuracies, so one tells the other, and so does their sum: it
    # is what differs by patient too where each has one case, and by ROUGE-1 where answers are
    # either right or of other words.
    small = None in map(_large, pair)
    if small:
        tests["mcnemar"] |= {f"only_{model}": None for model in MODELS}
        tests["effect"] |= dict.fromkeys(("odds_ratio", "rank_biserial", "rank_biserial_rouge1"))
    for kind in ("wilcoxon", "wilcoxon_rouge1", "wilcoxon_by_patient"):
        if small or _large(tests[kind]["n_nonzero"]) is None:
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
