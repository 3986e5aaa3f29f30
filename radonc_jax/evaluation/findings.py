"""What was found: run folders read, and the content of report.json made of them.

No page and no drawing in here: `evaluation.report` shows what this module finds.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from radonc_jax.data.cohort import as_records, is_finished_cohort, load_manifest, load_split
from radonc_jax.data.splits import SPLITS
from radonc_jax.evaluation.baselines import score_baselines
from radonc_jax.evaluation.run import METRICS, MODELS, PREDICTIONS, read_predictions, split_tasks
from radonc_jax.evaluation.statistics import compare_models, holm
from radonc_jax.tasks import TASKS, Record

NOTICE = "Research use only, not for clinical decisions."


@dataclass(frozen=True)
class Run:
    """One run folder's evaluation of both models on one split."""

    name: str
    split: str
    predictions: dict[str, dict[str, list[dict]]]  # model -> task -> predictions
    metrics: dict[str, dict[str, dict]]  # model -> task -> metrics
    provenance: dict
    ceiling: dict[str, float] = field(default_factory=dict)
    training: Sequence[Record] = ()  # empty where the cohort is not at hand
    held_out: Sequence[Record] = ()
    sizes: dict[str, int] | None = None  # cases by split
    config: dict = field(default_factory=dict)  # the run's config.json
    cohort: dict = field(default_factory=dict)  # the cohort's manifest.json
    cases: pd.DataFrame | None = None  # cohort rows of the split: site, sex, age ... where known


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
    ceiling and the split sizes. A run folder that has travelled without its cohort is read all
    the same, unless `cohort` was given and is not there.

    Raises:
      FileNotFoundError: the folder, or the predictions or metrics of a model, are missing.
      ValueError: a file cannot be read, or the two models answered different tasks.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise FileNotFoundError(f"{workdir} is no run folder")
    predictions, metrics, provenance = {}, {}, {}
    for model in MODELS:
        folder = workdir / "evaluation" / split / model
        if not (folder / PREDICTIONS).is_file() or not (folder / METRICS).is_file():
            raise FileNotFoundError(
                f"{workdir}: no predictions of the {model} model on split {split!r}; run "
                f"python -m radonc_jax.evaluate --workdir={workdir} --split={split} --model={model}"
            )
        predictions[model] = read_predictions(folder / PREDICTIONS)
        metrics[model] = split_tasks(_read_json(folder / METRICS))
        content = (folder / PREDICTIONS).read_bytes()
        provenance[f"{model}_predictions_sha256"] = hashlib.sha256(content).hexdigest()
        if predictions[model].keys() != metrics[model].keys():
            raise ValueError(f"{folder}: {PREDICTIONS} and {METRICS} hold different tasks")
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
    folder = cohort or config.get("cohort")
    if folder and (cohort is not None or is_finished_cohort(Path(folder))):
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
    )


# ---------------------------------------------------------------------------------------------
# report.json
# ---------------------------------------------------------------------------------------------


def build_report(runs: Sequence[Run], *, bootstrap: int = 1000, seed: int = 0) -> dict:
    """The content of report.json.

    {"tasks": {task: entry}, "runs": [names], "split", "provenance": {run: ...}, "notice"}. An
    entry is {"run", "model", "original", "tuned", "tests", "baselines", "ceiling", "sizes"}:
    `tests` as `compare_models` gives it, with Holm's adjustment of the one-sided Wilcoxon p over
    all entries of the report (`p_holm`); `baselines` {majority, lookup} or null where the cohort
    is not at hand; `ceiling` the best reachable accuracy or null. Where several runs share a task
    the first run's entry leads and holds the others' in `further_runs`.
    """
    by_task: dict[str, list[dict]] = {task: [] for task in TASKS}
    for run, name in zip(runs, _distinct_names(runs), strict=True):
        for task in run.predictions["tuned"]:
            by_task[task].append(
                {
                    "run": name,
                    "model": run.provenance.get("model"),
                    "original": run.metrics["original"][task],
                    "tuned": run.metrics["tuned"][task],
                    "tests": compare_models(
                        run.predictions["original"][task],
                        run.predictions["tuned"][task],
                        bootstrap=bootstrap,
                        seed=seed,
                    ),
                    "baselines": _baselines(run, task, bootstrap, seed),
                    "ceiling": run.metrics["tuned"][task].get("ceiling", run.ceiling.get(task)),
                    "sizes": run.sizes,
                }
            )
    listed = [entry for group in by_task.values() for entry in group]
    for suffix in ("", "_rouge1"):
        tests = [entry["tests"]["wilcoxon" + suffix] for entry in listed]
        for test, adjusted in zip(tests, holm([t["p_value"] for t in tests]), strict=True):
            test["p_holm"] = adjusted
    return {
        "notice": NOTICE,
        "split": runs[0].split if runs else None,
        "tasks": {
            task: group[0] | {"further_runs": group[1:]} for task, group in by_task.items() if group
        },
        "runs": _distinct_names(runs),
        "provenance": {
            name: run.provenance for run, name in zip(runs, _distinct_names(runs), strict=True)
        },
    }


def _distinct_names(runs: Sequence[Run]) -> list[str]:
    """Folder names; a number is added where two runs' folders have the same name."""
    names: list[str] = []
    for run in runs:
        name, number = run.name, 2
        while name in names:
            name, number = f"{run.name} ({number})", number + 1
        names.append(name)
    return names


def _baselines(run: Run, task: str, bootstrap: int, seed: int) -> dict | None:
    """Scored on the very cases the models answered, so that the figures can stand side by side."""
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
    return score_baselines(
        TASKS[task], run.training, records, split=run.split, bootstrap=bootstrap, seed=seed
    )


def entries(report: Mapping) -> list[tuple[str, dict]]:
    """(task, entry) of every run, the leading run of each task first."""
    return [
        (task, entry)
        for task, first in report["tasks"].items()
        for entry in (first, *first["further_runs"])
    ]
