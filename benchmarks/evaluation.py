"""Time to score many predictions of one task by two models, intervals and tests included.

    python -m benchmarks.evaluation --cases=100000

Writes benchmarks/results/evaluation.json: seconds by task and part. The answers are those of
synthetic records: the second model gives the case's own in six of ten cases and another's else,
the first in two of ten. Two cases of three share their patient. Baselines are not in it: they are
fitted on the training split, whatever the number of predictions.
"""

import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from absl import app, flags

from radonc_jax.data.synthetic import make_extract
from radonc_jax.evaluation import comparison, confidence, details, metrics, subgroups
from radonc_jax.tasks import TASKS, Record
from radonc_jax.tasks.modality import normalise_modality

_CASES = flags.DEFINE_integer("cases", 100_000, "Predictions of each model.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of records and answers.")
_TASKS = flags.DEFINE_list("tasks", list(TASKS), "Tasks to time.")
_OUTPUT = flags.DEFINE_string(
    "output", str(Path(__file__).parent / "results" / "evaluation.json"), "JSON to write."
)


def records(cases: int, seed: int) -> tuple[list[Record], dict[str, dict]]:
    """Cases of synthetic patients, repeated to the number wanted, and their cohort rows."""
    extract = make_extract(8000, seed)
    table = extract.table.drop_duplicates("patient_id").set_index("patient_id")
    rng = np.random.default_rng(seed)
    patients = sorted(extract.latents)
    found, rows = [], {}
    for i, pick in enumerate(rng.integers(len(patients), size=cases)):
        row, latent = table.loc[patients[pick]], extract.latents[patients[pick]]
        target, side = latent.treated
        regimen = latent.regimen
        text = f"{side or ''} {target}, {regimen.dose} Gy in {regimen.fractions} fractions"
        modality = normalise_modality(regimen.modality)
        record = Record(
            f"c{i}",
            f"p{i // 2 if i % 3 else i}",
            row["diagnosis"],
            f"{text.strip()}, {regimen.technique}",
            modality,
            latent.code,
        )
        found.append(record)
        rows[record.case_id] = dict(row) | {"modality": modality}
    return found, rows


def predict(task, cases: list[Record], share: float, seed: int) -> list[dict]:
    rng = np.random.default_rng(seed)
    texts = [task.answer(record) for record in cases]
    outputs = [
        text if own else texts[other]
        for text, own, other in zip(
            texts, rng.random(len(cases)) < share, rng.integers(len(cases), size=len(cases)),
            strict=True,
        )
    ]  # fmt: skip
    return [
        metrics.judge(task, record, output, logprob=float(-rng.exponential()))
        for record, output in zip(cases, outputs, strict=True)
    ]


def measure(name: str, cases: list[Record], rows: dict[str, dict]) -> dict[str, float]:
    task = TASKS[name]
    models = {
        model: predict(task, cases, share, seed)
        for model, share, seed in (("original", 0.2, 1), ("tuned", 0.6, 2))
    }
    metrics.rouge_scores.cache_clear()
    sites = {case: row["site"] for case, row in rows.items()}
    seconds, start = {}, time.perf_counter()

    def lap(part: str) -> None:
        seconds[part] = round(time.perf_counter() - start - sum(seconds.values()), 2)

    for model, predictions in models.items():
        metrics.score(predictions, task, split="test", model=model)
    lap("scores")
    comparison.compare_models(models["original"], models["tuned"])
    lap("tests")
    details.assess(name, models, sites=sites)
    lap("details")
    for predictions in models.values():
        confidence.assess(predictions)
    lap("confidence")
    subgroups.assess(models, rows)
    lap("subgroups")
    return seconds | {"total": round(sum(seconds.values()), 2)}


def main(_) -> None:
    cases, rows = records(_CASES.value, _SEED.value)
    result = {
        "cases": _CASES.value,
        "seconds": {name: measure(name, cases, rows) for name in _TASKS.value},
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("numpy", "scipy", "scikit-learn")},
    }
    Path(_OUTPUT.value).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["seconds"], indent=1))


if __name__ == "__main__":
    app.run(main)
