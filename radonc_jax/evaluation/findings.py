"""What was found: the content of report.json, made of run folders that were read.

No page and no drawing in here: `evaluation.report` shows what this module finds.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from radonc_jax.evaluation import confidence, details, subgroups
from radonc_jax.evaluation import metrics as scores
from radonc_jax.evaluation.baselines import judge_baselines
from radonc_jax.evaluation.comparison import compare_models, pair_predictions
from radonc_jax.evaluation.disclosure import disclose, facts
from radonc_jax.evaluation.run import MODELS
from radonc_jax.evaluation.run_folder import Run
from radonc_jax.evaluation.statistics import INTERVAL_METHOD, holm
from radonc_jax.evaluation.summary import introduce, summarise
from radonc_jax.evaluation.verdict import UNTUNED, judge_tuning
from radonc_jax.tasks import TASKS
from radonc_jax.tasks.icd import normalise_code

NOTICE = "Research use only, not for clinical decisions."


def build_report(runs: Sequence[Run], *, bootstrap: int = 1000, seed: int = 0) -> dict:
    """The content of report.json.

    {"about": base model, cohort and cases in words, "findings": the three sentences of the first
    screen (both lists of texts, see `summary`), "tasks": {task: entry}, "runs": [names], "split",
    "provenance": {run: ...}, "disclosure": see `disclose`, "notice"}. Where several runs share a
    task the first run's entry leads and holds the others' in `further_runs`.
    An entry is
      run, model, sizes: names, and cases by split or null.
      original, tuned: metrics as in metrics.json. variants {name: metrics}: further ways in which
        the run's models answered; variant_tests {name: compare_models of tuned against it}, of the
        original's; variant_settings {name: {examples, closed_set}}: how many training cases its
        prompts show, and which answers it can give ("labels", "table" or "cohort" codes), where
        source.json tells them, else null.
      tests: as `compare_models` gives it, tuned against original.
      baselines {majority, lookup, nearest, tfidf: metrics} or null where the cohort is not at hand;
        baseline_tests {name: compare_models of tuned against it} or null.
      ceiling: the accuracy that the best reader of the texts would have on average, or null; known
        of the test split alone.
      verdict: see `judge_tuning`. details: see `details.assess`.
      confidence {model or variant: see `confidence.assess`}: null for one without probabilities.
      robustness {model: {perturbation: {n, rate, expected}}} or null; subgroups: see there.
      left_out: answers in the run folder that are of another checkpoint, base or cohort, or were
        asked for in another way, a line each; nothing of them is in the entry.
      judged_anew {model or "validation/" and model: n}: how many of its answers stand otherwise in
        predictions.jsonl, read or judged by an earlier version of the code; every figure of the
        entry is of this version.
      against {run, model, tests} or null: this run's tuned model against that of the first run of
        the task, where both answered the same cases. not_compared {run, why} or null: where they
        did not, the first run and the reason in words.
    In every family of tests (`wilcoxon`, `wilcoxon_rouge1`, `wilcoxon_by_patient`, `mcnemar`) Holm
    adjusts over all entries of the report (`p_holm`); those of `against`, of `baseline_tests` and
    of `variant_tests` are families of their own.

    Raises:
      ValueError: the models of a run did not answer the same cases, or the cohort is another one.
    """
    names = _distinct_names(runs)
    by_task: dict[str, list[tuple[str, Run]]] = {task: [] for task in TASKS}
    for run, name in zip(runs, names, strict=True):
        for task in run.predictions["tuned"]:
            by_task[task].append((name, run))
    found: dict[str, list[dict]] = {
        task: [
            _entry(run, name, task, bootstrap, seed)
            | _against(group[0], name, run, task, bootstrap, seed)
            for name, run in group
        ]
        for task, group in by_task.items()
    }
    listed = [entry for group in found.values() for entry in group]
    _adjust([entry["tests"] for entry in listed])
    _adjust([entry["against"]["tests"] for entry in listed if entry["against"]])
    _adjust([t for entry in listed for t in (entry["baseline_tests"] or {}).values()])
    _adjust([t for entry in listed for t in entry["variant_tests"].values()])
    for task, group in found.items():
        for entry in group:
            entry["verdict"] = judge_tuning(task, entry)
    report = {
        "notice": NOTICE,
        "about": [],
        "findings": [],
        "split": runs[0].split if runs else None,
        "tasks": {
            task: group[0] | {"further_runs": group[1:]} for task, group in found.items() if group
        },
        "runs": names,
        "provenance": {name: run.provenance for run, name in zip(runs, names, strict=True)},
        "disclosure": {
            name: facts(run.config, run.cohort, run.split)
            for run, name in zip(runs, names, strict=True)
        },
    }
    report |= {"disclosure": disclose(report)}
    told = entries(report)
    return report | {"about": introduce(report, told), "findings": summarise(told)}


_TESTS = ("wilcoxon", "wilcoxon_rouge1", "wilcoxon_by_patient", "mcnemar")


def _adjust(family: Sequence[dict]) -> None:
    """Adds Holm's `p_holm` to each kind of test over all of the `tests` objects."""
    for kind in _TESTS:
        tests = [tests[kind] for tests in family]
        for test, adjusted in zip(tests, holm([t["p_value"] for t in tests]), strict=True):
            test["p_holm"] = adjusted


def _entry(run: Run, name: str, task: str, bootstrap: int, seed: int) -> dict:
    options = {"bootstrap": bootstrap, "seed": seed}
    models = _aligned(run, task)
    metrics = {model: _scored(run, model, task, options) for model in models}
    baselines = _baselines(run, task)
    counts, rarity = _code_counts(run)
    rows = None
    if run.cases is not None:
        rows = {row["case_id"]: row for row in run.cases.to_dict("records")}
    sites = None
    if rows is not None and "site" in run.cases.columns:
        sites = {case: str(row["site"]) for case, row in rows.items()}
    both = {model: models[model] for model in MODELS}
    return {
        "run": name,
        "model": run.provenance.get("model"),
        "original": metrics["original"],
        "tuned": metrics["tuned"],
        "variants": {name: metrics[name] for name in metrics if name not in MODELS},
        "variant_settings": {
            name: _asked(run, name, task) for name in metrics if name not in MODELS
        },
        "variant_tests": {
            name: compare_models(given, models["tuned"], names=(name, "tuned"), **options)
            for name, given in models.items()
            if name in UNTUNED
        },
        "tests": compare_models(models["original"], models["tuned"], **options),
        "baselines": None
        if baselines is None
        else {
            kind: scores.score(given, TASKS[task], split=run.split, model=kind, **options)
            for kind, given in baselines.items()
        },
        "baseline_tests": None
        if baselines is None
        else {
            kind: compare_models(given, models["tuned"], names=(kind, "tuned"), **options)
            for kind, given in baselines.items()
        },
        "ceiling": _ceiling(run, task),
        "sizes": run.sizes,
        "left_out": list(run.left_out),
        "judged_anew": {
            model: changed[task] for model, changed in run.judged_anew.items() if task in changed
        },
        "details": details.assess(task, both, sites=sites, training_counts=counts, **options),
        "confidence": {
            model: confidence.assess(given, run.validation.get(model, {}).get(task))
            for model, given in models.items()
        },
        "robustness": {
            model: found[task] for model, found in run.robustness.items() if task in found
        }
        or None,
        "subgroups": subgroups.assess(both, rows, rarity, **options),
    }


def _ceiling(run: Run, task: str) -> float | None:
    """That of the test split's patients, though older versions wrote it beside every split."""
    if run.split != "test":
        return None
    return run.metrics["tuned"][task].get("ceiling", run.ceiling.get(task))


def _code_counts(run: Run) -> tuple[Counter | None, dict[str, int] | None]:
    """Training cases by ICD-10-CM code, and by held-out case how many of them have its code (of the
    cases whose column holds one); of the cohort, whatever is asked. None where it is not at hand.
    """
    if not run.training:
        return None, None
    counts = Counter(normalise_code(record.icd10) for record in run.training)
    codes = {record.case_id: normalise_code(record.icd10) for record in run.held_out}
    return counts, {case: counts[code] for case, code in codes.items() if code is not None}


def _asked(run: Run, model: str, task: str) -> dict:
    settings = run.provenance.get("answers", {}).get(model, {})
    closed = settings.get("constraints", {}).get(task)
    if closed is not None:
        closed = "labels" if closed.startswith("labels") else settings.get("constrained")
    return {"examples": settings.get("examples"), "closed_set": closed}


def _aligned(run: Run, task: str) -> dict[str, list[dict]]:
    """Model or variant -> its predictions, all in the order of the original's cases.

    Raises:
      ValueError: one of them did not answer the same cases, or, but for examples, was not asked in
        the words that the original was.
    """
    original = run.predictions["original"][task]
    for model, by_task in run.predictions.items():
        if task in by_task and model != "original_examples":
            _require_same_prompts(original, by_task[task], names=("original", model))
    return {
        model: [
            given
            for _, given in pair_predictions(original, by_task[task], names=("original", model))
        ]
        for model, by_task in run.predictions.items()
        if task in by_task
    }


def _scored(run: Run, model: str, task: str, options: dict) -> dict:
    """The model's metrics.json, scored anew where it was written before a score was thought of, its
    intervals were of another definition than those beside them, its answers were read or judged
    otherwise, or it does not say of which answers it is: figures and tests of a report are of one
    definition and of the same answers."""
    written = run.metrics[model][task]
    if run.split != "test":  # see `_ceiling`
        written = {name: value for name, value in written.items() if name != "ceiling"}
    needed = (*scores.ROUGE_SCORES, *scores.CLASS_SCORES, "unparseable_share", "patients")
    same_intervals = written.get("interval_method") == INTERVAL_METHOD
    same_answers = model not in run.unproven and task not in run.judged_anew.get(model, {})
    with_patients = all("patients" in row for row in written["per_class"].values())
    complete = all(name in written for name in needed)
    if same_intervals and same_answers and with_patients and complete:
        return written
    anew = scores.score(
        run.predictions[model][task], TASKS[task], split=run.split, model=model, **options
    )
    return anew | ({"ceiling": written["ceiling"]} if "ceiling" in written else {})


def _against(
    first: tuple[str, Run], name: str, run: Run, task: str, bootstrap: int, seed: int
) -> dict:
    """`against` and `not_compared` of an entry: this run's tuned model against that of the task's
    first run, on the same cases."""
    other_name, other = first
    if other is run:
        return {"against": None, "not_compared": None}
    given = [which.predictions["tuned"][task] for which in (other, run)]
    why = _other_cases(*given)
    if why is not None:  # such runs stand side by side, and cannot be compared
        return {"against": None, "not_compared": {"run": other_name, "why": why}}
    tests = compare_models(*given, bootstrap=bootstrap, seed=seed, names=(other_name, name))
    against = {"run": other_name, "model": other.provenance.get("model"), "tests": tests}
    return {"against": against, "not_compared": None}


# What makes a case another, whatever its id: field of a prediction and its name in a sentence.
_CASE = {"patient_id": "patients", "reference": "right answers", "prompt_sha256": "prompts"}


def _other_cases(first: Sequence[dict], second: Sequence[dict]) -> str | None:
    """Why answers to one task cannot be compared, in words without counts and ids; None where they
    can be: they are to the same cases."""
    if {p["case_id"] for p in first} != {p["case_id"] for p in second}:
        return "they were not asked the same cases"
    for field, called in _CASE.items():
        if _differing(first, second, field):
            return f"cases of the same ids have other {called}"
    return None


def _differing(first: Sequence[dict], second: Sequence[dict], field: str) -> int:
    """Of how many cases in both lists both tell the field, and not the same."""
    told = {prediction["case_id"]: prediction.get(field) for prediction in first}
    pairs = [(told.get(p["case_id"]), p.get(field)) for p in second]
    return sum(None not in pair and pair[0] != pair[1] for pair in pairs)


def _require_same_prompts(
    first: Sequence[dict], second: Sequence[dict], names: Sequence[str]
) -> None:
    """ValueError where models that are asked in the same words were not: another cohort can have
    the same ids and references. Not for prompts with examples, which are other words."""
    differing = _differing(first, second, "prompt_sha256")
    if differing:
        raise ValueError(
            f"{names[0]} and {names[1]} were asked {differing} cases of the same ids with other "
            "prompts; evaluate both on the same cohort"
        )


def require_same_cases(runs: Sequence[Run]) -> None:
    """
    Raises:
      ValueError: a run answered no task of the first run, or other cases of one, or was asked them
        with other prompts.
    """
    names = _distinct_names(runs)
    for name, run in zip(names[1:], runs[1:], strict=True):
        shared = run.predictions["tuned"].keys() & runs[0].predictions["tuned"].keys()
        if not shared:
            raise ValueError(
                f"{name} answered no task that {names[0]} answered; compare runs of the same task"
            )
        for task in sorted(shared):
            given = [each.predictions["tuned"][task] for each in (runs[0], run)]
            pair_predictions(*given, names=(names[0], name))
            _require_same_prompts(*given, names=(names[0], name))


def _distinct_names(runs: Sequence[Run]) -> list[str]:
    """Folder names; a number is added where two runs' folders have the same name."""
    names: list[str] = []
    for run in runs:
        name, number = run.name, 2
        while name in names:
            name, number = f"{run.name} ({number})", number + 1
        names.append(name)
    return names


def _baselines(run: Run, task: str) -> dict[str, list[dict]] | None:
    """Answers to the very cases the models answered, so that the figures can stand side by side."""
    references = {p["case_id"]: p["reference"] for p in run.predictions["tuned"][task]}
    records = [record for record in run.held_out if record.case_id in references]
    if not run.training or len(records) != len(references):
        return None
    changed = sum(TASKS[task].reference(r) != references[r.case_id] for r in records)
    if changed:
        raise ValueError(
            f"run {run.name}: {changed} references of task {task} differ between its predictions "
            "and its cohort; the cohort was prepared anew, so evaluate again"
        )
    return judge_baselines(TASKS[task], run.training, records)


def entries(report: Mapping) -> list[tuple[str, dict]]:
    """(task, entry) of every run, the leading run of each task first."""
    return [
        (task, entry)
        for task, first in report["tasks"].items()
        for entry in (first, *first["further_runs"])
    ]
