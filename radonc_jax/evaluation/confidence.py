"""Would the model know when it does not know? Its confidence against what it got right.

Confidence is the probability that the model itself gives: of its whole answer, exp of the summed
log-probability of the answer's tokens, or, where the labels themselves were scored, that of the
best label among all labels. An unparseable answer keeps the probability of its text and is wrong.

Definitions (accuracy of case i: a_i, 1 or 0; confidence c_i):
* reliability: BINS bins of equal width; mean confidence and accuracy in each that holds a case.
* ECE: sum over the bins of (cases in the bin / all) |accuracy - confidence| (Guo et al. 2017).
* Brier: mean of (c_i - a_i)^2 (Brier 1950, of the event that the answer is right).
* Risk-coverage: cases in falling order of confidence, equal ones together; risk is the share of
  wrong answers among the covered (El-Yaniv and Wiener 2010). AURC is the risk's mean over cases.
* Conformal sets: see `conformal`.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

BINS = 10
CONFORMAL_LEVEL = 0.9
_POINTS = 100  # of a risk-coverage curve


def confidence_of(prediction: Mapping) -> float | None:
    """Between 0 and 1; None where the prediction has no log-probability."""
    labels = prediction.get("label_logprobs")
    if labels:
        return max(label_probabilities(labels).values())
    logprob = prediction.get("logprob")
    return None if logprob is None else math.exp(min(0.0, logprob))


def confidences(predictions: Sequence[Mapping]) -> np.ndarray | None:
    """[N], or None where a prediction has none."""
    found = [confidence_of(prediction) for prediction in predictions]
    return None if None in found else np.array(found)


def label_probabilities(logprobs: dict[str, float]) -> dict[str, float]:
    """The labels' probabilities, made to sum to 1."""
    most = max(logprobs.values())
    raw = {label: math.exp(value - most) for label, value in logprobs.items()}
    total = sum(raw.values())
    return {label: value / total for label, value in raw.items()}


def reliability(confidence: np.ndarray, correct: np.ndarray, patients: Sequence[str]) -> list[dict]:
    """The bins that hold a case, from the lowest: [{confidence, accuracy, n, patients}], the last
    two how many cases and different patients."""
    patients = np.asarray(patients)
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    return [
        {
            "confidence": float(confidence[bins == i].mean()),
            "accuracy": float(correct[bins == i].mean()),
            "n": int((bins == i).sum()),
            "patients": len(set(patients[bins == i])),
        }
        for i in np.unique(bins)
    ]


def expected_calibration_error(table: Sequence[dict]) -> float:
    """ECE of a reliability table."""
    cases = sum(row["n"] for row in table)
    return sum(row["n"] * abs(row["accuracy"] - row["confidence"]) for row in table) / cases


def risk_coverage(confidence: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(coverage [T], risk [T]) at the T distinct confidences, from the highest down."""
    order = np.argsort(-confidence, kind="stable")
    ends = np.flatnonzero(np.diff(confidence[order], append=-1.0))  # last case of each confidence
    wrong = np.cumsum(~correct[order].astype(bool))[ends]
    return (ends + 1) / len(order), wrong / (ends + 1)


def conformal(
    validation: Sequence[dict], test: Sequence[dict], *, level: float = CONFORMAL_LEVEL
) -> dict:
    """Split conformal sets of the test cases, calibrated on the validation split's answers.

    With n validation cases the threshold is the ceil((n + 1) level)-th smallest of their
    nonconformities, so that the set of a new case holds the right answer with a probability of at
    least `level` as long as the two splits are alike (Vovk et al. 2005). What is nonconform:

    * "labels", where the predictions hold the scores of all labels: 1 - p(right label); the set is
      every label with 1 - p at most the threshold (Sadinle et al. 2019).
    * "answer", for free answers, of which only the one given has a known probability: that
      probability where the answer is wrong, 0 where it is right. The set is the answer alone where
      the model is surer than the threshold, and otherwise every answer there is: nothing can be
      ruled out, and a person has to decide.

    Returns {kind, level, threshold, measured_coverage, answered, mean_size, n_validation}.
    `answered` is the share of sets of one answer; `mean_size` is null for "answer".

    Raises:
      ValueError: no validation case, or predictions without log-probabilities.
    """
    if not validation or not test:
        raise ValueError("conformal sets need cases of both splits; evaluate the validation split")
    by_label = all(p.get("label_logprobs") for p in (*validation, *test))
    # Beyond the largest rank nothing can be promised but the set of everything.
    rank = math.ceil((len(validation) + 1) * level)
    if by_label:
        scores = np.sort([_label_score(p) for p in validation])
        threshold = float(scores[rank - 1]) if rank <= len(scores) else 1.0
        sets = [
            {
                label
                for label, share in label_probabilities(p["label_logprobs"]).items()
                if 1 - share <= threshold
            }
            for p in test
        ]
        covered = [p["reference"] in chosen for p, chosen in zip(test, sets, strict=True)]
        answered = [len(chosen) == 1 for chosen in sets]
        mean_size = float(np.mean([len(chosen) for chosen in sets]))
    else:
        calibration, confidence = confidences(validation), confidences(test)
        if calibration is None or confidence is None:
            raise ValueError("predictions without log-probabilities; evaluate the model again")
        right = np.array([bool(p["correct"]) for p in validation])
        scores = np.sort(np.where(right, 0.0, calibration))
        threshold = float(scores[rank - 1]) if rank <= len(scores) else 1.0
        answered = confidence > threshold
        covered = ~answered | np.array([bool(p["correct"]) for p in test])
        mean_size = None
    return {
        "kind": "labels" if by_label else "answer",
        "level": level,
        "threshold": threshold,
        "measured_coverage": float(np.mean(covered)),
        "answered": float(np.mean(answered)),
        "mean_size": mean_size,
        "n_validation": len(validation),
    }


def _label_score(prediction: dict) -> float:
    return 1 - label_probabilities(prediction["label_logprobs"]).get(prediction["reference"], 0.0)


def assess(predictions: Sequence[dict], validation: Sequence[dict] | None = None) -> dict | None:
    """The `confidence` of one model on one task in report.json, or None without probabilities.

    {reliability, ece, brier, risk_coverage [{coverage, risk}], aurc, coverage_at_5_percent_error,
    conformal or null}. The curve is thinned to about a hundred points, its last one included. The
    coverage at 5 % error is the largest at which at most one covered answer in twenty is wrong, 0
    where there is none. It is chosen and measured on the same cases: on new ones more may be wrong.
    """
    confidence = confidences(predictions)
    if confidence is None or not len(confidence):
        return None
    correct = np.array([bool(prediction["correct"]) for prediction in predictions])
    table = reliability(confidence, correct, [p["patient_id"] for p in predictions])
    coverage, risk = risk_coverage(confidence, correct)
    safe = coverage[risk <= 0.05]
    shown = np.unique(np.linspace(0, len(coverage) - 1, _POINTS).round().astype(int))
    # Every case of one confidence is covered at its end, with the risk there.
    width = np.diff(coverage, prepend=0.0)
    sets = None
    if validation and confidences(validation) is not None:
        sets = conformal(validation, predictions)
    return {
        "reliability": table,
        "ece": expected_calibration_error(table),
        "brier": float(np.mean((confidence - correct) ** 2)),
        "risk_coverage": [{"coverage": float(coverage[i]), "risk": float(risk[i])} for i in shown],
        "aurc": float((risk * width).sum()),
        "coverage_at_5_percent_error": float(safe.max()) if len(safe) else 0.0,
        "conformal": sets,
    }
