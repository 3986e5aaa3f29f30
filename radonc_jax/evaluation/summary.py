"""The first screen in words: what was compared, and what was found, in three plain sentences.

All of it is made of report.json and stands in it, so that the published form can tell no more than
its figures.
"""

from collections.abc import Mapping, Sequence

from radonc_jax.evaluation.disclosure import describe_base, is_synthetic, last_part
from radonc_jax.evaluation.figures import TITLES, name_of
from radonc_jax.evaluation.run import MODELS
from radonc_jax.evaluation.verdict import (
    UNTUNED,
    adjusted_p,
    doubts,
    none_right,
    several_each,
    standing,
)

Entries = Sequence[tuple[str, Mapping]]  # (task, entry) of a report, as `findings.entries` has them
# The words that the sentences of `summarise` begin with.
SUBJECTS = ("Tuning", "Against simple baselines", "How sure")


def summarise(listed: Entries) -> list[str]:
    """`findings` of report.json: what tuning did, what does as well without it, and how sure that
    is; no sentence where nothing was evaluated."""
    return [_changes(listed), _rivals(listed), _certainty(listed)] if listed else []


def introduce(report: Mapping, listed: Entries) -> list[str]:
    """`about` of report.json: base model, cohort and cases, as far as the manifests tell them; one
    line, or one for each group of runs that differ in these."""
    groups: dict[str, list[str]] = {}
    for name in report["runs"]:
        entry = next((entry for _, entry in listed if entry["run"] == name), None)
        if entry is not None:
            groups.setdefault(_introduction(report, entry), []).append(name)
    several = len(groups) > 1
    return [f"{join_words(runs)}: {text}" if several else text for text, runs in groups.items()]


def _introduction(report: Mapping, entry: Mapping) -> str:
    known = report["disclosure"][entry["run"]]
    manifest = report["provenance"][entry["run"]].get("manifest") or {}
    parts = []
    if known["base"] is not None:
        files = (manifest.get("base") or {}).get("sha256") or {}
        weights = min((file for file in files if file.endswith(".safetensors")), default=None)
        told = [describe_base(known["base"])]
        told.append(weights and f"{weights} SHA-256 {files[weights][:12]}")
        parts.append(f"Base model: {known['base']['name']}{_in_brackets(told)}.")
    cohort = manifest.get("cohort") or {}
    if cohort.get("manifest_sha256"):
        digest = f"manifest SHA-256 {cohort['manifest_sha256'][:12]}"
        # The published form has no folder's name.
        name = last_part(cohort.get("folder"))
        parts.append(f"Cohort: {f'{name} ({digest})' if name else digest}.")
    told = [_counted(entry["tuned"]["n"], "case"), _counted(entry["tuned"]["patients"], "patient")]
    parts.append(f"Split {report['split']}: {' of '.join(told)}.")
    if is_synthetic(known["cohort"]) or entry["ceiling"] is not None:
        parts.append("The cases are synthetic.")
    return " ".join(parts)


def _in_brackets(told: Sequence[str | None]) -> str:
    known = "; ".join(filter(None, told))
    return f" ({known})" if known else ""


def _counted(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _are(n: int) -> str:
    return "is" if n == 1 else "are"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _called(listed: Entries, task: str, entry: Mapping) -> str:
    """A task within a sentence, with its run where several have it."""
    title = TITLES[task] if task == "icd" else TITLES[task].lower()
    several = sum(other == task for other, _ in listed) > 1
    return f"{title} ({entry['run']})" if several else title


def _accuracy(metrics: Mapping) -> float:
    return metrics["accuracy"]["value"]


def join_words(parts: Sequence[str], most: int = 4) -> str:
    """Joined with commas and "and"; the rest is counted where there are many."""
    shown = list(parts[:most])
    if len(parts) > most:
        shown.append(f"{len(parts) - most} more")
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def _changes(listed: Entries) -> str:
    groups: dict[str, list[str]] = {"raised": [], "lowered": [], "did not change": []}
    none = []
    for task, entry in listed:
        before, after = (_accuracy(entry[model]) for model in MODELS)
        name = f"the {_called(listed, task, entry)}"
        if none_right(*(entry[model] for model in MODELS)):
            none.append(name)
        elif before == after:
            groups["did not change"].append(f"{name} ({_share(after)})")
        else:
            verb = "raised" if after > before else "lowered"
            groups[verb].append(f"{name} from {_share(before)} to {_share(after)}")
    clauses = [f"{verb} the accuracy of {join_words(g)}" for verb, g in groups.items() if g]
    if none:
        clauses.append(
            f"brought no right answer on {join_words(none)}, where the original model has none "
            "either"
        )
    return f"Tuning {'; it '.join(clauses)}."


def best_baseline(entry: Mapping) -> tuple[str, Mapping] | None:
    """Name and metrics of the baseline that is the hardest to beat; None without baselines."""
    name = entry["verdict"]["best_baseline"]
    return None if name is None else (name, entry["baselines"][name])


def standing_to_baselines(entry: Mapping) -> str | None:
    """How the tuned model stands to the baselines (see `standing`), at the worst; None without."""
    best = best_baseline(entry)
    return None if best is None else standing(entry["baseline_tests"][best[0]])


def _rivals(listed: Entries) -> str:
    known = [(task, entry) for task, entry in listed if entry["baselines"]]
    start = "Against simple baselines: "
    untuned = _untuned_rivals(listed)
    if not known:
        return start + f"none was computed, because the cohort is not at hand{untuned}."
    says = {
        "none": "no answer of the tuned model or of any simple baseline is right on",
        "worse": "a simple baseline does better than the tuned model on",
        "unclear": "a simple baseline does no worse, as far as these cases tell, on",
        "better": "the tuned model beats all of them on",
    }
    by_standing: dict[str, list[str]] = {kind: [] for kind in says}
    for task, entry in known:
        name, metrics = best_baseline(entry)
        called = f"the {_called(listed, task, entry)}"
        if none_right(metrics, entry["tuned"]):
            by_standing["none"].append(called)
            continue
        reached, tuned = _share(_accuracy(metrics)), _share(_accuracy(entry["tuned"]))
        by_standing[standing_to_baselines(entry)].append(
            f"{called} ({name_of(name)} {reached}, tuned {tuned})"
        )
    return start + "; ".join(_clauses(says, by_standing)) + untuned + "."


def _clauses(says: Mapping[str, str], named: Mapping[str, Sequence[str]]) -> list[str]:
    return [f"{says[kind]} {join_words(names)}" for kind, names in named.items() if names]


def _untuned_rivals(listed: Entries) -> str:
    """Clauses on what the original model does without tuning that the tuned one does not beat."""
    says = {
        "none": "the tuned model has no right answer, and the original model in the way that is "
        "named in brackets has none either, on",
        "worse": "the original model does better without tuning on",
        "unclear": "the original model without tuning is not told apart from the tuned one, as far "
        "as these cases tell, on",
    }
    named: dict[str, list[str]] = {kind: [] for kind in says}
    for task, entry in listed:
        called = f"the {_called(listed, task, entry)}"
        for name, tests in (entry.get("variant_tests") or {}).items():
            rival, stands = entry["variants"][name], standing(tests)
            reached, tuned = (_share(_accuracy(m)) for m in (rival, entry["tuned"]))
            if none_right(rival, entry["tuned"]):
                named["none"].append(f"{called} ({UNTUNED[name]})")
            elif stands != "better":
                named[stands].append(f"{called} ({UNTUNED[name]} {reached}, tuned {tuned})")
    return "".join(f"; {clause}" for clause in _clauses(says, named))


def _certainty(listed: Entries) -> str:
    text = f"How sure: {_significance(listed)}; "
    unread = sum(entry["tuned"]["unparseable"] for _, entry in listed)
    total = sum(entry["tuned"]["n"] for _, entry in listed)
    if not unread:
        text += "no tuned answer is unparseable"
    elif unread == total:
        text += f"all {total:,} tuned answers are" if total > 1 else "the only tuned answer is"
        text += " unparseable"
    else:
        text += f"{unread:,} of {total:,} tuned answers {_are(unread)} unparseable"
    before = sum(entry["original"]["unparseable"] for _, entry in listed)
    if before == total != unread:
        text += f", {'all of the original' if total > 1 else 'the original'}'s {_are(total)}"
    elif before and before != unread:
        text += f", {before:,} of the original's {_are(before)}"
    ceilings = [
        f"{_share(entry['ceiling'])} ({_called(listed, task, entry)})"
        for task, entry in listed
        if entry["ceiling"] is not None
    ]
    if ceilings:
        return f"{text}; the ceiling is {join_words(ceilings)}."
    return text + "; the ceiling is not known."


def by_patient(listed: Entries) -> bool:
    """Whether a patient of some comparison has several cases, so that the test must be named."""
    return any(several_each(entry["tests"]) for _, entry in listed)


def _significance(listed: Entries) -> str:
    """In how many comparisons the gain is significant, and where another test does not agree."""
    sure = [entry for _, entry in listed if adjusted_p(entry["tests"]) <= 0.05]
    better = any(_accuracy(entry["tuned"]) > _accuracy(entry["original"]) for _, entry in listed)
    by = " by patient" if by_patient(listed) else ""
    one, test = len(listed) == 1, f"(one-sided Wilcoxon{by} at 5 %, after Holm)"
    if not better:
        where = "the one comparison" if one else f"any of the {len(listed)} comparisons"
        return f"no gain is significant {test}: the tuned model is not more accurate in {where}"
    if not sure:
        if one:
            return f"the gain is not significant {test} in the one comparison"
        return f"the gain is significant {test} in none of the {len(listed)} comparisons"
    if len(sure) == len(listed):
        where = "the one comparison" if one else f"all {len(listed)} comparisons"
    else:
        where = f"{len(sure)} of the {len(listed)} comparisons"
    text = f"the gain is significant {test} in {where}"
    doubted = sum(bool(doubts(entry["tests"])) for entry in sure)
    if doubted:
        there = "there" if len(sure) == 1 else f"in {doubted} of these"
        two_sided = "the same test of two sides" if by else "McNemar's exact two-sided test"
        text += (
            f", but {there} {two_sided} at 5 % or the interval of the difference does not bear it "
            "out"
        )
    return text
