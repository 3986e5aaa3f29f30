"""Time to report on many predictions of one task by two models, intervals and tests included.

    python -m benchmarks.evaluation --cases=100000

Writes benchmarks/results/evaluation.json: seconds by task and part of `build_report`, and of the
scores that `evaluate` writes before it. Both models have answered the test split and the validation
split (conformal sets), and the training split is at hand (rarity, baselines). The answers are those
of synthetic records: the second model gives the case's own in six of ten cases and another's else,
the first in two of ten. Two cases of three share their patient. Baselines stand apart from the
total: they are fitted on the training split, and then answer, are scored and are compared with the
tuned model on as many cases as the models, so they too grow with the number of predictions. The
goal is 100,000 predictions in under a minute on two cores, baselines not counted.
"""

import contextlib
import functools
import json
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
from absl import app, flags

from radonc_jax.data.synthetic import make_extract
from radonc_jax.evaluation import confidence, details, findings, metrics, subgroups
from radonc_jax.evaluation.baselines import BASELINES
from radonc_jax.evaluation.run import MODELS
from radonc_jax.evaluation.run_folder import Run
from radonc_jax.tasks import TASKS, Record
from radonc_jax.tasks.modality import normalise_modality

_CASES = flags.DEFINE_integer("cases", 100_000, "Predictions of each model.")
_TRAINING = flags.DEFINE_integer("training", 20_000, "Cases of the training split.")
_VALIDATION = flags.DEFINE_integer("validation", 5_000, "Cases of the validation split.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of records and answers.")
_TASKS = flags.DEFINE_list("tasks", list(TASKS), "Tasks to time.")
_OUTPUT = flags.DEFINE_string(
    "output", str(Path(__file__).parent / "results" / "evaluation.json"), "JSON to write."
)


def records(split: str, cases: int, seed: int) -> tuple[list[Record], pd.DataFrame]:
    """Cases of synthetic patients, repeated to the number wanted, and their cohort rows."""
    extract = make_extract(8000, seed)
    table = extract.table.drop_duplicates("patient_id").set_index("patient_id")
    rng = np.random.default_rng(seed)
    patients = sorted(extract.latents)
    found, rows = [], []
    for i, pick in enumerate(rng.integers(len(patients), size=cases)):
        row, latent = table.loc[patients[pick]], extract.latents[patients[pick]]
        target, side = latent.treated
        regimen = latent.regimen
        text = f"{side or ''} {target}, {regimen.dose} Gy in {regimen.fractions} fractions"
        modality = normalise_modality(regimen.modality)
        record = Record(
            f"{split}-c{i}",
            f"{split}-p{i // 2 if i % 3 else i}",
            row["diagnosis"],
            f"{text.strip()}, {regimen.technique}",
            modality,
            latent.code,
        )
        found.append(record)
        rows.append(dict(row) | vars(record))
    return found, pd.DataFrame(rows)


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


@contextlib.contextmanager
def stopwatch(seconds: Counter) -> Iterator[None]:
    """Counts the seconds that parts of `build_report` take, "baselines ..." those for baselines."""

    def timed(part: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def run(*arguments, **options):
            start = time.perf_counter()
            result = function(*arguments, **options)
            names = {options.get("model"), *options.get("names", ())}
            seconds[f"baselines {part}" if names & BASELINES.keys() else part] += (
                time.perf_counter() - start
            )
            return result

        return run

    parts = {
        "scores": (metrics, "score"),
        "tests": (findings, "compare_models"),
        "details": (details, "assess"),
        "confidence": (confidence, "assess"),
        "subgroups": (subgroups, "assess"),
        "baselines answers": (findings, "judge_baselines"),
    }
    with contextlib.ExitStack() as stack:
        for part, (module, name) in parts.items():
            replaced = timed(part, getattr(module, name))
            stack.enter_context(mock.patch.object(module, name, replaced))
        yield


def measure(name: str, splits: dict[str, tuple[list[Record], pd.DataFrame]]) -> dict:
    """Seconds by part; "other" is what of `build_report` is in no part, the total all of it but the
    baselines, and the scores of the two models."""
    task, (held_out, rows) = TASKS[name], splits["test"]
    answers = {
        split: {
            model: {name: predict(task, splits[split][0], share, seed)}
            for model, share, seed in zip(MODELS, (0.2, 0.6), (1, 2), strict=True)
        }
        for split in ("validation", "test")
    }
    metrics.rouge_scores.cache_clear()
    seconds: Counter = Counter()
    start = time.perf_counter()
    with stopwatch(seconds):
        scored = {
            model: {name: metrics.score(given[name], task, split="test", model=model)}
            for model, given in answers["test"].items()
        }
        run = Run(
            name="benchmark",
            split="test",
            predictions=answers["test"],
            metrics=scored,
            provenance={},
            training=splits["train"][0],
            held_out=held_out,
            cases=rows,
            validation=answers["validation"],
        )
        entry = findings.build_report([run])["tasks"][name]
    whole = time.perf_counter() - start
    assert entry["baselines"] and entry["confidence"]["tuned"]["conformal"]
    assert any(row["by"] == "rarity" for row in entry["subgroups"])
    baselines = {part.split()[1]: s for part, s in seconds.items() if part.startswith("baselines")}
    own = {part: s for part, s in seconds.items() if not part.startswith("baselines")}
    total = whole - sum(baselines.values())
    own |= {"other": total - sum(own.values()), "total": total}
    baselines["total"] = sum(baselines.values())
    result = {part: round(s, 2) for part, s in own.items()}
    return result | {"baselines": {part: round(s, 2) for part, s in baselines.items()}}


def main(_) -> None:
    sizes = {"train": _TRAINING.value, "validation": _VALIDATION.value, "test": _CASES.value}
    splits = {
        split: records(split, cases, _SEED.value + i)
        for i, (split, cases) in enumerate(sizes.items())
    }
    result = {
        "cases": _CASES.value,
        "training": _TRAINING.value,
        "validation": _VALIDATION.value,
        "seconds": {name: measure(name, splits) for name in _TASKS.value},
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("numpy", "scipy", "scikit-learn")},
    }
    Path(_OUTPUT.value).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["seconds"], indent=1))


if __name__ == "__main__":
    app.run(main)
