"""Scores of one model on one task, with 95 % intervals by patient.

Definitions:
* accuracy: share of cases that the task calls correct; an unparseable answer is wrong.
* rouge1: F1 of unigram overlap between the raw output, stripped, and the reference answer, as
  computed by rouge-score without stemming (Lin 2004). Its tokenizer splits "40.05" in two.
* precision, recall, F1 (scikit-learn): the classes are the answers that occur among the
  references. An unparseable answer, or one that is no reference of any case, is a miss for its
  reference's class and a false alarm for none. Macro is the mean over the classes, weighted is
  weighted by their number of cases; 0 / 0 counts as 0. Free text (regimen) has no classes, so
  the values are null there.
"""

import functools
from collections.abc import Sequence

import numpy as np
from rouge_score import rouge_scorer
from scipy import sparse
from sklearn.metrics import precision_recall_fscore_support

from radonc_jax.evaluation.statistics import bootstrap_mean, patient_weights, percentile_interval
from radonc_jax.tasks import Record, Task

UNPARSEABLE = "unparseable"
CLASS_SCORES = tuple(
    f"{score}_{average}"
    for average in ("macro", "weighted")
    for score in ("precision", "recall", "f1")
)


@functools.cache
def _rouge_scorer() -> rouge_scorer.RougeScorer:
    return rouge_scorer.RougeScorer(["rouge1"], use_stemmer=False)


def rouge1(output: str, reference: str) -> float:
    """ROUGE-1 F1 of the stripped output against the reference, between 0 and 1."""
    return float(_rouge_scorer().score(reference, output.strip())["rouge1"].fmeasure)


def judge(task: Task, record: Record, output: str, **decoded) -> dict:
    """One prediction: the raw output parsed and scored against its record.

    `decoded` holds what the decoder knows beside the text (prompt_sha256, logprob, finished).
    """
    reference = task.reference(record)
    answer = task.parse(output)
    return {
        "case_id": record.case_id,
        "task": task.name,
        "prompt_sha256": decoded.get("prompt_sha256"),
        "output": output,
        "answer": answer,
        "reference": reference,
        "correct": bool(task.correct(answer, reference)),
        "rouge1": rouge1(output, reference),
        "logprob": decoded.get("logprob"),
        "finished": decoded.get("finished", True),
        "patient_id": record.patient_id,
    }


def score(
    predictions: Sequence[dict],
    task: Task,
    *,
    split: str,
    model: str,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict:
    """The metrics.json object of one task; see the module's definitions.

    Args:
      predictions: as written to predictions.jsonl, all of one task, each case once.
      bootstrap: resamples for the intervals; 0 leaves `low` and `high` None.

    Raises:
      ValueError: no predictions, a case twice, or predictions of another task.
    """
    if not predictions:
        raise ValueError(f"task {task.name}: no predictions to score; the split may be empty")
    foreign = sum(prediction["task"] != task.name for prediction in predictions)
    if foreign:
        raise ValueError(f"task {task.name}: {foreign} predictions belong to another task")
    cases = {prediction["case_id"] for prediction in predictions}
    if len(cases) < len(predictions):
        twice = len(predictions) - len(cases)
        raise ValueError(f"task {task.name}: {twice} case ids stand more than once")
    patients = [prediction["patient_id"] for prediction in predictions]
    metrics = {
        "task": task.name,
        "split": split,
        "model": model,
        "n": len(predictions),
        "unparseable": sum(prediction["answer"] is None for prediction in predictions),
        "unfinished": sum(not prediction["finished"] for prediction in predictions),
    }
    for name, field in (("accuracy", "correct"), ("rouge1", "rouge1")):
        values = [float(prediction[field]) for prediction in predictions]
        metrics[name] = bootstrap_mean(values, patients, resamples=bootstrap, seed=seed)
    if not task.has_classes:
        nothing = {"value": None, "low": None, "high": None}
        metrics |= {name: dict(nothing) for name in CLASS_SCORES}
        return metrics | {"per_class": {}, "confusion": {"labels": [], "matrix": []}}
    return metrics | _classification(predictions, task, patients, bootstrap, seed)


def _classification(
    predictions: Sequence[dict], task: Task, patients: list[str], bootstrap: int, seed: int
) -> dict:
    references = [prediction["reference"] for prediction in predictions]
    answers = [prediction["answer"] or UNPARSEABLE for prediction in predictions]
    classes = sorted(set(references))
    if UNPARSEABLE in classes:
        raise ValueError(f"task {task.name}: {UNPARSEABLE!r} cannot be a reference answer")
    result = {}
    for average in ("macro", "weighted"):
        values = precision_recall_fscore_support(
            references, answers, labels=classes, average=average, zero_division=0
        )
        for name, value in zip(("precision", "recall", "f1"), values, strict=False):
            result[f"{name}_{average}"] = {"value": float(value), "low": None, "high": None}
    if bootstrap:
        samples = _class_score_samples(references, answers, classes, patients, bootstrap, seed)
        for name, values in samples.items():
            result[name]["low"], result[name]["high"] = percentile_interval(values)
    columns = precision_recall_fscore_support(
        references, answers, labels=classes, average=None, zero_division=0
    )
    result["per_class"] = {
        label: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(s)}
        for label, p, r, f, s in zip(classes, *columns, strict=True)
    }
    result["confusion"] = _confusion(references, answers, task)
    return result


def _confusion(references: list[str], answers: list[str], task: Task) -> dict:
    """Counts by reference (rows) and answer (columns): L - 1 rows of L columns.

    `labels` [L] are the task's own where it has a closed set, else all that occur, sorted, and
    last "unparseable", which is a column only: no reference is unparseable.
    """
    seen = set(references) | (set(answers) - {UNPARSEABLE})
    labels = list(task.labels) if task.labels else sorted(seen)
    column = {label: i for i, label in enumerate([*labels, UNPARSEABLE])}
    matrix = np.zeros((len(labels), len(labels) + 1), dtype=int)
    for reference, answer in zip(references, answers, strict=True):
        matrix[column[reference], column[answer]] += 1
    return {"labels": [*labels, UNPARSEABLE], "matrix": matrix.tolist()}


def _class_score_samples(
    references: list[str],
    answers: list[str],
    classes: list[str],
    patients: list[str],
    resamples: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """Bootstrap samples [B] of the macro and weighted scores, all resamples at once.

    Each is what scikit-learn would give on the resampled cases with the classes that occur among
    their references. Counts of hits, answers and references per patient and class are sparse
    [P, K]; weighting patients is then one product per chunk of resamples.
    """
    names, patient = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    index = {label: i for i, label in enumerate(classes)}
    reference = np.array([index[label] for label in references])
    answer = np.array([index.get(label, -1) for label in answers])  # -1: no class of its own
    shape = len(names), len(classes)

    def counts(rows: np.ndarray, columns: np.ndarray) -> sparse.csr_matrix:
        return sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=shape).T.tocsr()

    named, hit = answer >= 0, answer == reference
    hits = counts(patient[hit], reference[hit])
    answered = counts(patient[named], answer[named])
    supported = counts(patient, reference)

    samples: dict[str, list[np.ndarray]] = {name: [] for name in CLASS_SCORES}
    for weights in patient_weights(patients, resamples, seed):
        tp, predicted, support = (m @ weights.T for m in (hits, answered, supported))  # [K, b]
        present = support > 0
        per_class = {
            "precision": _ratio(tp, predicted),
            "recall": _ratio(tp, support),
            "f1": _ratio(2 * tp, predicted + support),
        }
        for name, values in per_class.items():
            samples[f"{name}_macro"].append((values * present).sum(0) / present.sum(0))
            samples[f"{name}_weighted"].append((values * support).sum(0) / support.sum(0))
    return {name: np.concatenate(chunks) for name, chunks in samples.items()}


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """0 where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
