"""Scores of one model on one task, with 95 % intervals by patient.

Definitions:
* accuracy: share of cases that the task calls correct; an unparseable answer is wrong.
* rouge1: F1 of unigram overlap between the raw output, stripped, and the reference answer, as
  computed by rouge-score without stemming (Lin 2004): with m words in common (each counted as
  often as both have it), precision m / words of the output, recall m / words of the reference,
  F1 their harmonic mean. Its tokenizer splits "40.05" in two.
* rouge1_decimal: the same F1 with a tokenizer that keeps numbers and codes whole ("40.05",
  "C50.411"), so that a wrong dose costs a whole word.
* precision, recall, F1 (scikit-learn): the classes are the answers that occur among the
  references. An unparseable answer, or one that is no reference of any case, is a miss for its
  reference's class and a false alarm for none. Macro is the mean over the classes, micro pools
  their counts, weighted is weighted by their number of cases; 0 / 0 counts as 0. Free text
  (regimen) has no classes, so the values are null there.
* unparseable_share, unfinished_share: of all cases; unfinished answers hit the token limit.

Intervals come from a bootstrap by patient that keeps the set of classes fixed, for macro scores
from leaving out each patient; they are Wilson's with the variance of it, but for scores of 0 or 1.
See `statistics` and `ClassCounts.intervals`.
"""

import functools
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from rouge_score import rouge_scorer, tokenizers
from scipy import sparse
from sklearn.metrics import precision_recall_fscore_support

from radonc_jax.evaluation.statistics import (
    ADDED_CASES_MACRO,
    INTERVAL_METHOD,
    PatientBootstrap,
    bootstrap_means,
    unbiased_variance,
    variance_factor,
)
from radonc_jax.tasks import Record, Task

UNPARSEABLE = "unparseable"
AVERAGES = ("macro", "micro", "weighted")
CLASS_SCORES = tuple(
    f"{score}_{average}" for average in AVERAGES for score in ("precision", "recall", "f1")
)
ROUGE_SCORES = ("rouge1", "rouge1_precision", "rouge1_recall", "rouge1_decimal")
_SHARES = ("accuracy", *ROUGE_SCORES, "unparseable_share", "unfinished_share")


class DecimalTokenizer(tokenizers.Tokenizer):
    """rouge-score's words in lower case, but a full stop between two of their characters joins
    them: "40.05 Gy, VMAT." gives 40.05, gy, vmat."""

    _WORD = re.compile(r"[a-z0-9]+(?:\.[a-z0-9]+)*")

    def tokenize(self, text: str) -> list[str]:
        return self._WORD.findall(text.lower())


@functools.cache
def _rouge_scorer(decimal: bool) -> rouge_scorer.RougeScorer:
    tokenizer = DecimalTokenizer() if decimal else None
    return rouge_scorer.RougeScorer(["rouge1"], use_stemmer=False, tokenizer=tokenizer)


@functools.lru_cache(maxsize=65536)  # short answers are given again and again
def rouge_scores(output: str, reference: str) -> dict[str, float]:
    """ROUGE_SCORES of the stripped output against the reference, each between 0 and 1."""
    output = output.strip()
    usual = _rouge_scorer(False).score(reference, output)["rouge1"]
    decimal = _rouge_scorer(True).score(reference, output)["rouge1"]
    return {
        "rouge1": float(usual.fmeasure),
        "rouge1_precision": float(usual.precision),
        "rouge1_recall": float(usual.recall),
        "rouge1_decimal": float(decimal.fmeasure),
    }


def rouge1(output: str, reference: str) -> float:
    """ROUGE-1 F1 of the stripped output against the reference, between 0 and 1."""
    return rouge_scores(output, reference)["rouge1"]


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


def judge_again(predictions: Sequence[dict], task: Task) -> tuple[list[dict], int]:
    """Predictions read and judged as this version of the code does it, and how many of them an
    earlier one read or judged otherwise. ROUGE, which hangs on words alone, stays as it is."""
    verdicts: dict[tuple[str, str], dict] = {}  # the same answers are given again and again
    judged, changed = [], 0
    for prediction in predictions:
        key = prediction["output"], prediction["reference"]
        if key not in verdicts:
            answer = task.parse(key[0])
            verdicts[key] = {"answer": answer, "correct": bool(task.correct(answer, key[1]))}
        verdict = verdicts[key]
        same = all(prediction[name] == value for name, value in verdict.items())
        changed += not same
        judged.append(prediction if same else prediction | verdict)
    return judged, changed


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
        "patients": len(set(patients)),
        "interval_method": INTERVAL_METHOD,
        "unparseable": sum(prediction["answer"] is None for prediction in predictions),
        "unfinished": sum(not prediction["finished"] for prediction in predictions),
    }
    rouge = [rouge_scores(p["output"], p["reference"]) for p in predictions]
    columns = {
        "accuracy": [float(prediction["correct"]) for prediction in predictions],
        **{name: [scores[name] for scores in rouge] for name in ROUGE_SCORES},
        "unparseable_share": [float(p["answer"] is None) for p in predictions],
        "unfinished_share": [float(not p["finished"]) for p in predictions],
    }
    # What was judged when the model answered stands.
    columns["rouge1"] = [float(prediction["rouge1"]) for prediction in predictions]
    metrics |= bootstrap_means(columns, patients, resamples=bootstrap, seed=seed, shares=_SHARES)
    if not task.has_classes:
        nothing = {"value": None, "low": None, "high": None}
        metrics |= {name: dict(nothing) for name in CLASS_SCORES}
        return metrics | {"per_class": {}, "confusion": {"labels": [], "matrix": []}}
    return metrics | _classification(predictions, task, patients, bootstrap, seed)


def _classification(
    predictions: Sequence[dict], task: Task, patients: list[str], bootstrap: int, seed: int
) -> dict:
    references = [prediction["reference"] for prediction in predictions]
    if UNPARSEABLE in references:
        raise ValueError(f"task {task.name}: {UNPARSEABLE!r} cannot be a reference answer")
    answers = [prediction["answer"] for prediction in predictions]
    counts = ClassCounts(references, answers)
    result = {
        name: {"value": value, "low": None, "high": None} for name, value in counts.scores().items()
    }
    if bootstrap:
        draw = PatientBootstrap(patients, bootstrap, seed)
        for name, ends in counts.intervals(draw).items():
            result[name]["low"], result[name]["high"] = ends
    people = Counter(reference for reference, _ in set(zip(references, patients, strict=True)))
    result["per_class"] = {
        label: row | {"patients": people[label]} for label, row in counts.per_class().items()
    }
    result["confusion"] = _confusion(references, answers, task)
    return result


class ClassCounts:
    """Hits, answers and references by class, and the scores made of them.

    Args:
      references: the right answer of each case.
      answers: what was answered, None where it could not be read.
    """

    def __init__(self, references: Sequence[str], answers: Sequence[str | None]):
        self.classes, self._reference = np.unique(
            np.asarray(references, dtype=str), return_inverse=True
        )
        index = {label: i for i, label in enumerate(self.classes.tolist())}
        # -1: no class of its own
        self._answer = np.array([index.get(answer, -1) for answer in answers])

    def _columns(self) -> tuple[np.ndarray, ...]:
        labels = range(len(self.classes))
        return precision_recall_fscore_support(
            self._reference, self._answer, labels=labels, average=None, zero_division=0
        )

    def per_class(self) -> dict[str, dict]:
        """{label: {precision, recall, f1, support}}."""
        return {
            label: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(s)}
            for label, p, r, f, s in zip(self.classes.tolist(), *self._columns(), strict=True)
        }

    def scores(self) -> dict[str, float]:
        """CLASS_SCORES by name, as scikit-learn has them."""
        result = {}
        for average in AVERAGES:
            values = precision_recall_fscore_support(
                self._reference,
                self._answer,
                labels=range(len(self.classes)),
                average=average,
                zero_division=0,
            )
            for name, value in zip(("precision", "recall", "f1"), values, strict=False):
                result[f"{name}_{average}"] = float(value)
        return result

    def samples(self, draw: PatientBootstrap) -> dict[str, np.ndarray]:
        """Bootstrap samples [B] of CLASS_SCORES, all resamples at once.

        Each is what scikit-learn would give on the resampled cases with the very same classes; one
        that a resample lacks scores 0 in it. Counts per class and patient are sparse [K, P];
        weighting patients is then one product per chunk of resamples.
        """
        tables = self._tables(draw)
        samples: dict[str, list[np.ndarray]] = {name: [] for name in CLASS_SCORES}
        for weights in draw.weights():
            tp, predicted, support = (m @ weights.T for m in tables)  # [K, b]
            for name, (numerator, denominator) in _fractions(tp, predicted, support).items():
                values = _ratio(numerator, denominator)
                samples[f"{name}_macro"].append(values.mean(0))
                samples[f"{name}_weighted"].append((values * support).sum(0) / support.sum(0))
                samples[f"{name}_micro"].append(_ratio(numerator.sum(0), denominator.sum(0)))
        return {name: np.concatenate(chunks) for name, chunks in samples.items()}

    def intervals(
        self, draw: PatientBootstrap, samples: dict[str, np.ndarray] | None = None
    ) -> dict[str, tuple[float, float]]:
        """The 95 % intervals of CLASS_SCORES; `samples` are those of `draw`, made if not given.

        All are `share_interval`. Micro and weighted scores are of cases as the accuracy is (and
        micro and weighted recall are the accuracy), and have the variance of the samples. Of macro
        scores that is too small, where classes are of a case or two, down to a third: a single case
        is right in every resample that holds it, and it is too large near 1, where resamples that
        lack a class have it score 0. Theirs is made of `deletions`. It is not defined for
        values of 0 and 1: where resamples differ from these, the interval is centred on them.
        """
        samples = self.samples(draw) if samples is None else samples
        result = {}
        for name, (value, *influence) in self._influence(draw).items():
            if not 1e-9 < value < 1 - 1e-9:
                result[name] = draw.centred_interval(value, samples[name], 0, 1)
                continue
            score, average = name.split("_")
            if average == "macro":
                effect = self.deletions(draw, score)
                variance = float(((effect - effect.mean()) ** 2).sum())
                variance *= variance_factor(value, *influence, ADDED_CASES_MACRO)
            else:
                variance = unbiased_variance(samples[name], draw.count)
                variance *= variance_factor(value, *influence)
            result[name] = draw.share_interval(value, variance)
        return result

    def deletions(self, draw: PatientBootstrap, score: str) -> np.ndarray:
        """How a macro score changes without each patient [P], as its variance needs it: the sum of
        their squares around their mean.

        The jackknife's changes are exact, so its variance is not too small (Efron and Stein, Ann
        Stat 1981;9:586), even of classes of one case, without which the mean is over one class
        less. But of the share right among n cases it is s^2 / (n - 1) where s^2 / n is right: in
        classes of few cases up to twice too large. The change of a class's score a / b by a patient
        who leaves b' of b is therefore taken times sqrt(1/8 + 7/8 b' / b), b' being at least 1/2;
        sqrt(b' / b) would do for such shares, and was somewhat too small near 1. Chosen by
        simulation, see the tests.

        Args:
          score: "precision", "recall" or "f1".
        """
        tables = self._tables(draw)
        touched = (tables[1] + tables[2]).tocoo()  # a hit is both
        rows, patients = touched.row, touched.col
        totals = [np.asarray(table.sum(1)).ravel() for table in tables]
        whole = [total[rows] for total in totals]
        left = [
            total - np.asarray(table[rows, patients]).ravel()
            for total, table in zip(whole, tables, strict=True)
        ]
        over, under = _fractions(*whole)[score]
        over_left, under_left = _fractions(*left)[score]
        value, gone = _ratio(over, under), left[2] == 0
        mean = _ratio(*_fractions(*totals)[score]).mean()
        kept = _ratio(np.maximum(under_left, 0.5), np.maximum(under, 0.5))
        change = np.sqrt(0.125 + 0.875 * kept) * (_ratio(over_left, under_left) - value)
        change = np.where(gone, mean - value, change)

        def by_patient(values):
            return np.bincount(patients, weights=values, minlength=draw.count)

        return by_patient(change) / np.maximum(len(self.classes) - by_patient(gone), 1)

    def _tables(self, draw: PatientBootstrap) -> tuple[sparse.csr_matrix, ...]:
        """Hits, answers and references by class and patient, sparse [K, P]."""
        shape = len(self.classes), draw.count

        def counts(rows: np.ndarray, chosen: np.ndarray) -> sparse.csr_matrix:
            patient = draw.index[chosen]
            return sparse.csr_matrix((np.ones(len(rows)), (rows, patient)), shape=shape)

        named, hit = self._answer >= 0, self._answer == self._reference
        return (
            counts(self._reference[hit], hit),
            counts(self._answer[named], named),
            counts(self._reference, np.ones_like(named)),
        )

    def _influence(self, draw: PatientBootstrap) -> dict[str, tuple]:
        """By name of CLASS_SCORES what `variance_factor` takes, beginning with the value.

        The scores' derivatives by each class's hits, answers and references give the influence of
        a case. A wrong case has the answer of any case, at random.
        """
        tables = self._tables(draw)
        tp, predicted, support = (np.asarray(m.sum(1)).ravel() for m in tables)
        cases, each = support.sum(), np.asarray(tables[2].sum(0)).ravel()
        ratios = {  # numerator, denominator, and their derivatives by hits, answers, references
            "precision": (tp, predicted, 1, 1, 0),
            "recall": (tp, support, 1, 0, 1),
            "f1": (2 * tp, predicted + support, 2, 1, 1),
        }
        result = {}
        for name in CLASS_SCORES:
            score, average = name.split("_")
            over, under, by_hit, by_answer, by_reference = ratios[score]
            if average == "micro":
                over, under = (np.full_like(x, x.sum()) for x in (over, under))
            values = _ratio(over, under)
            weight = {
                "macro": np.full_like(tp, 1 / len(tp)),
                "micro": np.ones_like(tp),
                "weighted": support / cases,
            }[average]
            slope = _ratio(weight, under)
            hit, answer = by_hit * slope, -by_answer * values * slope
            reference = -by_reference * values * slope
            if average == "weighted":
                reference = reference + (values - weight @ values) / cases
            z = tables[0].T @ hit + tables[1].T @ answer + tables[2].T @ reference
            right = tables[2].T @ (hit + answer + reference)
            # Of a patient whose cases are all answered alike, by chance as the answers are given.
            asked, given = tables[2].T @ reference, predicted / cases
            mean, square = given @ answer, given @ answer**2
            wrong = asked + each * mean
            squares = asked**2 + 2 * asked * each * mean + each**2 * square
            result[name] = (
                float(values[0] if average == "micro" else weight @ values),
                z,
                float(each.mean()),
                (float(wrong.mean()), float(squares.mean())),
                (float(right.mean()), float((right**2).mean())),
            )
        return result


def _confusion(references: Sequence[str], answers: Sequence[str | None], task: Task) -> dict:
    """Counts by reference (rows) and answer (columns): L - 1 rows of L columns.

    `labels` [L] are the task's own where it has a closed set, else all that occur, sorted, and
    last "unparseable", which is a column only: no reference is unparseable.
    """
    seen = set(references) | (set(answers) - {None})
    labels = list(task.labels) if task.labels else sorted(seen)
    column = {label: i for i, label in enumerate([*labels, None])}
    matrix = np.zeros((len(labels), len(labels) + 1), dtype=int)
    for reference, answer in zip(references, answers, strict=True):
        matrix[column[reference], column[answer]] += 1
    return {"labels": [*labels, UNPARSEABLE], "matrix": matrix.tolist()}


def _fractions(hits: np.ndarray, answers: np.ndarray, references: np.ndarray) -> dict[str, tuple]:
    """(numerator, denominator) of each score of a class, from its counts."""
    return {
        "precision": (hits, answers),
        "recall": (hits, references),
        "f1": (2 * hits, answers + references),
    }


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """0 where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
