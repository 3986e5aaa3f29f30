"""What was found: run folders read, and the content of report.json made of them.

No page and no drawing in here: `evaluation.report` shows what this module finds.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from radonc_jax.data.cohort import (
    as_records,
    is_finished_cohort,
    is_of_run,
    load_manifest,
    load_split,
    of_run,
)
from radonc_jax.data.splits import SPLITS
from radonc_jax.evaluation import confidence, details, robustness, subgroups
from radonc_jax.evaluation import metrics as scores
from radonc_jax.evaluation.baselines import judge_baselines
from radonc_jax.evaluation.comparison import compare_models, pair_predictions
from radonc_jax.evaluation.run import (
    METRICS,
    MODELS,
    PREDICTIONS,
    SOURCE,
    VARIANTS,
    read_predictions,
    split_tasks,
)
from radonc_jax.evaluation.statistics import holm
from radonc_jax.evaluation.verdict import judge_tuning
from radonc_jax.tasks import TASKS, Record

NOTICE = "Research use only, not for clinical decisions."


@dataclass(frozen=True)
class Run:
    """One run folder's evaluation of both models on one split.

    `predictions` and `metrics` are by model, then by task; beside "original" and "tuned" they hold
    the variants that the folder has. `validation` are the predictions of the validation split, of
    the models that answered it; `robustness` what robustness.json of a model holds. What lies there
    from another checkpoint, base or cohort than the model's answers to `split` is in `left_out`.
    """

    name: str
    split: str
    predictions: dict[str, dict[str, list[dict]]]
    metrics: dict[str, dict[str, dict]]
    provenance: dict
    ceiling: dict[str, float] = field(default_factory=dict)
    training: Sequence[Record] = ()  # empty where the cohort is not at hand
    held_out: Sequence[Record] = ()
    sizes: dict[str, int] | None = None  # cases by split
    config: dict = field(default_factory=dict)  # the run's config.json
    cohort: dict = field(default_factory=dict)  # the cohort's manifest.json
    cases: pd.DataFrame | None = None  # cohort rows of the split: site, sex, age ... where known
    validation: dict[str, dict[str, list[dict]]] = field(default_factory=dict)
    robustness: dict[str, dict] = field(default_factory=dict)
    left_out: Sequence[
        str
    ] = ()  # answers in the folder that are not of these models; one line each


def _read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds no JSON object")
    return content


def read_run(workdir: Path, split: str = "test", cohort: Path | None = None) -> Run:
    """Reads a run folder that holds the evaluations of both models on `split`.

    The cohort (its place is `cohort`, else the one in the run's config.json) adds baselines, the
    ceiling, subgroups and the split sizes. A run folder that has travelled without its cohort is
    read all the same, unless `cohort` was given and is not there. A cohort whose manifest is not
    the one that the run's manifest names is not the run's, and is not read.

    Raises:
      FileNotFoundError: the folder, or the predictions or metrics of a model, are missing.
      ValueError: a file cannot be read, holds predictions of another split, task or case than it
        should, the two models answered different tasks, or `cohort` is not the run's.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise FileNotFoundError(f"{workdir} is no run folder")
    predictions, metrics, provenance = {}, {}, {}
    left_out: list[str] = []
    for model in VARIANTS:
        folder = workdir / "evaluation" / split / model
        if not (folder / PREDICTIONS).is_file() or not (folder / METRICS).is_file():
            if model not in MODELS:
                continue
            raise FileNotFoundError(
                f"{workdir}: no predictions of the {model} model on split {split!r}; run "
                f"python -m radonc_jax.evaluate --workdir={workdir} --split={split} --model={model}"
            )
        if not _is_of_same_model(workdir, split, folder, left_out):
            continue
        predictions[model], metrics[model] = _read_evaluation(folder, split)
        content = (folder / PREDICTIONS).read_bytes()
        provenance[f"{model}_predictions_sha256"] = hashlib.sha256(content).hexdigest()
    if predictions["original"].keys() != predictions["tuned"].keys():
        raise ValueError(
            f"{workdir}: original answered {', '.join(predictions['original'])} and tuned "
            f"{', '.join(predictions['tuned'])}; evaluate both on the same tasks"
        )
    unknown = predictions["tuned"].keys() - TASKS.keys()
    if unknown:
        raise ValueError(f"{workdir}: unknown task {', '.join(sorted(unknown))}")

    config = _read_json(workdir / "config.json")
    manifest = _read_json(workdir / "manifest.json")
    provenance |= {"workdir": str(workdir), "model": config.get("model"), "manifest": manifest}
    training = held_out = ()
    sizes, facts, cases = None, {}, None
    folder = cohort or (config.get("cohort") and of_run(config["cohort"], workdir))
    at_hand = folder and is_finished_cohort(Path(folder))
    if at_hand and not is_of_run(folder, workdir):
        if cohort is not None:
            raise ValueError(
                f"{folder} is not the cohort of {workdir}: its manifest.json is another than the "
                "run's manifest names; give the cohort that the run was made from"
            )
        at_hand = False
    if at_hand or cohort is not None:
        splits = {name: load_split(folder, name) for name in SPLITS}
        sizes = {name: len(rows) for name, rows in splits.items()}
        cases = splits[split]
        training, held_out = as_records(splits["train"]), as_records(cases)
        facts = load_manifest(folder)
    return Run(
        name=workdir.resolve().name,
        split=split,
        predictions=predictions,
        metrics=metrics,
        provenance=provenance,
        ceiling=facts.get("ceiling") or {},
        training=training,
        held_out=held_out,
        sizes=sizes,
        config=config,
        cohort=facts,
        cases=cases,
        validation=_read_validation(workdir, split, predictions, left_out),
        robustness=_read_robustness(workdir, split, provenance, left_out),
        left_out=tuple(left_out),
    )


def _is_of_same_model(workdir: Path, split: str, folder: Path, left_out: list[str]) -> bool:
    """Whether answers come from the weights and cohort of their model's free answers to `split`.

    If not, a line is added to `left_out`: training that went on, or evaluate --step, changes the
    folder of one kind of answers, and the others stay as they were.
    """
    model = next(name for name in MODELS if folder.name.startswith(name))

    def origin(path: Path) -> tuple:
        source = _read_json(path / SOURCE)
        cohort = (source.get("cohort") or {}).get("manifest_sha256")
        return source.get("trained_fingerprint"), source.get("base_fingerprint"), cohort

    if origin(folder) == origin(workdir / "evaluation" / split / model):
        return True
    left_out.append(
        f"{folder.parent.name}/{folder.name}: not of the same checkpoint, base and cohort as "
        f"{split}/{model}; evaluate it again"
    )
    return False


def _read_robustness(
    workdir: Path, split: str, provenance: Mapping, left_out: list[str]
) -> dict[str, dict]:
    """robustness.json by model, where it was measured against the answers that lie there now."""
    kept = {}
    for model in MODELS:
        found = _read_json(workdir / "evaluation" / split / model / robustness.ROBUSTNESS)
        if not found:
            continue
        if found.pop("predictions_sha256", None) == provenance[f"{model}_predictions_sha256"]:
            kept[model] = found
        else:
            left_out.append(
                f"{split}/{model}/{robustness.ROBUSTNESS}: measured against other answers than "
                "those there now; evaluate --robustness again"
            )
    return kept


def _read_evaluation(folder: Path, split: str) -> tuple[dict[str, list[dict]], dict[str, dict]]:
    """Predictions and metrics of one model by task, held against each other."""
    predictions = read_predictions(folder / PREDICTIONS)
    metrics = split_tasks(_read_json(folder / METRICS))
    if predictions.keys() != metrics.keys():
        raise ValueError(f"{folder}: {PREDICTIONS} and {METRICS} hold different tasks")
    for task, entry in metrics.items():
        if entry["split"] != split:
            raise ValueError(
                f"{folder / METRICS}: is of split {entry['split']!r}, not {split!r}; evaluate "
                "this split again"
            )
        given = predictions[task]
        if len({prediction["case_id"] for prediction in given}) < len(given):
            twice = len(given) - len({prediction["case_id"] for prediction in given})
            raise ValueError(
                f"{folder / PREDICTIONS}: {twice} case ids of task {task} stand more than once; "
                "evaluate again"
            )
        if len(given) != entry["n"]:
            raise ValueError(
                f"{folder}: {PREDICTIONS} holds {len(given)} cases of task {task}, {METRICS} "
                f"{entry['n']}; rows are missing, so evaluate again"
            )
    return predictions, metrics


def _read_validation(
    workdir: Path, split: str, predictions: Mapping[str, Mapping], left_out: list[str]
) -> dict[str, dict[str, list[dict]]]:
    """Predictions of the validation split by the models that answered it and `split`."""
    folder = workdir / "evaluation" / "validation"
    if split == "validation":  # would be calibrated on itself
        return {}
    return {
        model: _read_evaluation(folder / model, "validation")[0]
        for model in predictions
        if (folder / model / PREDICTIONS).is_file()
        and (folder / model / METRICS).is_file()
        and _is_of_same_model(workdir, split, folder / model, left_out)
    }


# ---------------------------------------------------------------------------------------------
# report.json
# ---------------------------------------------------------------------------------------------


def build_report(runs: Sequence[Run], *, bootstrap: int = 1000, seed: int = 0) -> dict:
    """The content of report.json.

    {"tasks": {task: entry}, "runs": [names], "split", "provenance": {run: ...}, "notice"}. Where
    several runs share a task the first run's entry leads and holds the others' in `further_runs`.
    An entry is
      run, model, sizes: names, and cases by split or null.
      original, tuned: metrics as in metrics.json. variants {name: metrics}: further ways in which
        the run's models answered.
      tests: as `compare_models` gives it, tuned against original.
      baselines {majority, lookup, nearest, tfidf: metrics} or null where the cohort is not at hand;
        baseline_tests {name: compare_models of tuned against it} or null.
      ceiling: the best reachable accuracy or null.
      verdict: see `judge_tuning`. details: see `details.assess`.
      confidence {model or variant: see `confidence.assess`}: null for one without probabilities.
      robustness {model: {perturbation: {n, rate, expected}}} or null; subgroups: see there.
      left_out: answers in the run folder that are of another checkpoint, base or cohort, a line
        each; nothing of them is in the entry.
      against {run, model, tests} or null: this run's tuned model against that of the first run of
        the task, where both answered the same cases.
    In every family of tests (`wilcoxon`, `wilcoxon_rouge1`, `wilcoxon_by_patient`, `mcnemar`) Holm
    adjusts over all entries of the report (`p_holm`); those of `against` and of `baseline_tests`
    are families of their own.

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
            | {"against": _against(group[0], name, run, task, bootstrap, seed)}
            for name, run in group
        ]
        for task, group in by_task.items()
    }
    listed = [entry for group in found.values() for entry in group]
    _adjust([entry["tests"] for entry in listed])
    _adjust([entry["against"]["tests"] for entry in listed if entry["against"]])
    _adjust([t for entry in listed for t in (entry["baseline_tests"] or {}).values()])
    for task, group in found.items():
        for entry in group:
            entry["verdict"] = judge_tuning(task, entry)
    return {
        "notice": NOTICE,
        "split": runs[0].split if runs else None,
        "tasks": {
            task: group[0] | {"further_runs": group[1:]} for task, group in found.items() if group
        },
        "runs": names,
        "provenance": {name: run.provenance for run, name in zip(runs, names, strict=True)},
    }


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
    counts = Counter(map(TASKS[task].reference, run.training)) if run.training else None
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
        "ceiling": run.metrics["tuned"][task].get("ceiling", run.ceiling.get(task)),
        "sizes": run.sizes,
        "left_out": list(run.left_out),
        "details": details.assess(task, both, sites=sites, training_counts=counts, **options),
        "confidence": {
            model: confidence.assess(given, run.validation.get(model, {}).get(task))
            for model, given in models.items()
        },
        "robustness": {
            model: found[task] for model, found in run.robustness.items() if task in found
        }
        or None,
        "subgroups": subgroups.assess(both, rows, counts, **options),
    }


def _aligned(run: Run, task: str) -> dict[str, list[dict]]:
    """Model or variant -> its predictions, all in the order of the original's cases.

    Raises:
      ValueError: one of them did not answer the same cases.
    """
    original = run.predictions["original"][task]
    return {
        model: [
            given
            for _, given in pair_predictions(original, by_task[task], names=("original", model))
        ]
        for model, by_task in run.predictions.items()
        if task in by_task
    }


def _scored(run: Run, model: str, task: str, options: dict) -> dict:
    """The model's metrics.json, scored anew where it was written before a score was thought of."""
    written = run.metrics[model][task]
    needed = (*scores.ROUGE_SCORES, *scores.CLASS_SCORES, "unparseable_share", "patients")
    if all(name in written for name in needed):
        return written
    anew = scores.score(
        run.predictions[model][task], TASKS[task], split=run.split, model=model, **options
    )
    return anew | ({"ceiling": written["ceiling"]} if "ceiling" in written else {})


def _against(
    first: tuple[str, Run], name: str, run: Run, task: str, bootstrap: int, seed: int
) -> dict | None:
    """This run's tuned model against that of the task's first run, on the same cases."""
    other_name, other = first
    if other is run:
        return None
    try:
        tests = compare_models(
            other.predictions["tuned"][task],
            run.predictions["tuned"][task],
            bootstrap=bootstrap,
            seed=seed,
            names=(other_name, name),
        )
    except ValueError:  # runs of other cohorts stand side by side, and cannot be compared
        return None
    return {"run": other_name, "model": other.provenance.get("model"), "tests": tests}


def require_same_cases(runs: Sequence[Run]) -> None:
    """
    Raises:
      ValueError: a run answered no task of the first run, or other cases of one.
    """
    names = _distinct_names(runs)
    for name, run in zip(names[1:], runs[1:], strict=True):
        shared = run.predictions["tuned"].keys() & runs[0].predictions["tuned"].keys()
        if not shared:
            raise ValueError(
                f"{name} answered no task that {names[0]} answered; compare runs of the same task"
            )
        for task in sorted(shared):
            pair_predictions(
                runs[0].predictions["tuned"][task],
                run.predictions["tuned"][task],
                names=(names[0], name),
            )


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


# ---------------------------------------------------------------------------------------------
# The published form
# ---------------------------------------------------------------------------------------------


def publish(report: Mapping) -> dict:
    """report.json in the form to be shared: no case ids, no cell of fewer than 11 cases.

    Small groups of `subgroups` and `details.by_rarity` and small classes of `per_class` have n
    "<11" (support likewise) and no scores; where one alone would be hidden the next smallest is
    "hidden" too. In `confusion` the rows of these classes and counts of 1 to 10 are null; no row,
    column or diagonal that can be summed from other figures has one null alone, and a class whose
    right answers are null has no scores. `details.errors` likewise. Where McNemar counts are small
    both are null, with what gives them away (their ratio, the number of cases that differ). Fields
    of regimens, customary doses, robustness and bins of the reliability curve that are small have
    n "<11" and no scores; the steps of the risk-coverage curve are of 11 cases or more.

    Sums that stand elsewhere (`n`, `unparseable`, accuracy) and p-values are of the whole split
    and stay. Who enumerates all tables that fit every average and every p-value together may still
    narrow a hidden count down.
    """
    result = json.loads(json.dumps(report))
    for task, entry in entries(result):
        entry["subgroups"] = subgroups.hide_small(entry["subgroups"], "by")
        n = entry["tuned"]["n"]
        found = entry["details"]
        if "high_rouge_wrong" in found:
            found["high_rouge_wrong"] = []
            found["high_rouge_wrong_n"] = _large(found["high_rouge_wrong_n"])
            for model, share in found["high_rouge_wrong_share"].items():
                if _large(round(n * share["value"])) is None:
                    found["high_rouge_wrong_share"][model] = None
        if found.get("allowed"):
            found["allowed"] = _without_small(found["allowed"])
        for model in filter(None, entry["confidence"].values()):
            model["reliability"] = [_without_small(row) for row in model["reliability"]]
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
        for tests in (entry["baseline_tests"] or {}).values():
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
    for kind in ("wilcoxon", "wilcoxon_rouge1", "wilcoxon_by_patient"):
        if _large(tests[kind]["n_nonzero"]) is None:
            tests[kind] |= {"n_nonzero": None, "statistic": None}
    pair = [tests["mcnemar"][f"only_{model}"] for model in MODELS]
    # Their difference is that of the accuracies, so one tells the other.
    if None in map(_large, pair):
        tests["mcnemar"] |= {f"only_{model}": None for model in MODELS}
        tests["effect"] |= {"odds_ratio": None, "rank_biserial": None}
        tests["wilcoxon"] |= {"n_nonzero": None, "statistic": None}


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
