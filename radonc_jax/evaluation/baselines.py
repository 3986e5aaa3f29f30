"""What a model must beat: answers that need no language model, made from the training split.

They go through the same scoring as a model's answers. ROUGE-1 is taken of the answer itself.
"""

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from radonc_jax.evaluation import metrics
from radonc_jax.tasks import Record, Task

NEIGHBOURS = 5
# So that the classifier is fitted in seconds on a clinic's cohort, and in minutes on any.
MOST_ANSWERS = 300
MOST_TRAINING = 20_000
MOST_FEATURES = 20_000
_CELLS = 1 << 24  # cosines held at a time, in float32: 64 MiB


def _most_common(answers: Counter) -> str:
    # Equal counts are settled by spelling, so the order of the rows does not matter.
    return min(answers, key=lambda answer: (-answers[answer], answer))


def _key(diagnosis: str) -> str:
    return " ".join(diagnosis.casefold().split())


def majority_answers(
    task: Task, training: Sequence[Record], records: Sequence[Record]
) -> list[str]:
    """The most frequent answer of the training split, for every record."""
    if not training:
        raise ValueError("the training split is empty; baselines need its answers")
    return [_most_common(Counter(map(task.reference, training)))] * len(records)


def lookup_answers(task: Task, training: Sequence[Record], records: Sequence[Record]) -> list[str]:
    """The most frequent training answer to the very same diagnosis text, else the majority's.

    Texts are the same if they differ in case and white space only.
    """
    known: defaultdict[str, Counter] = defaultdict(Counter)
    for record in training:
        known[_key(record.diagnosis)][task.reference(record)] += 1
    fallback = majority_answers(task, training, records)
    return [
        _most_common(known[key]) if (key := _key(record.diagnosis)) in known else other
        for record, other in zip(records, fallback, strict=True)
    ]


def _features(
    training: Sequence[Record], records: Sequence[Record]
) -> tuple[sparse.csr_matrix, sparse.csr_matrix] | None:
    """TF-IDF of words and pairs of words, rows of length 1; None where no text holds a word."""
    vectorizer = TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, max_features=MOST_FEATURES, dtype=np.float32
    )
    try:
        known = vectorizer.fit_transform([record.diagnosis for record in training])
    except ValueError:  # an empty vocabulary
        return None
    return known, vectorizer.transform([record.diagnosis for record in records])


def nearest_answers(task: Task, training: Sequence[Record], records: Sequence[Record]) -> list[str]:
    """What the NEIGHBOURS training texts nearest in TF-IDF cosine answer, weighted by it.

    A text that shares no word with any gets the majority's answer. Of texts at equal distance
    those with the first case ids count.
    """
    fallback = majority_answers(task, training, records)
    # Sorted, so that neighbours at equal distance do not depend on the order of the rows.
    training = sorted(training, key=lambda record: record.case_id)
    features = _features(training, records)
    if features is None:
        return fallback
    known, asked = features
    given = [task.reference(record) for record in training]
    rows = max(1, _CELLS // len(given))
    answers = []
    for start in range(0, asked.shape[0], rows):
        cosine = (asked[start : start + rows] @ known.T).toarray()
        for row, other in zip(cosine, fallback[start : start + rows], strict=True):
            votes: Counter = Counter()
            for index in _nearest(row):
                votes[given[index]] += float(row[index])
            answers.append(_most_common(votes) if votes else other)
    return answers


def _nearest(cosine: np.ndarray) -> np.ndarray:
    """Places of the NEIGHBOURS largest positive values, the largest first, ties by place.

    A partition finds the last value that counts; which of those equal to it do, it leaves to
    chance, so all of them are sorted.
    """
    last = len(cosine) - NEIGHBOURS
    least = np.partition(cosine, last)[last] if last > 0 else 0
    places = np.flatnonzero((cosine >= least) & (cosine > 0))
    return places[np.argsort(-cosine[places], kind="stable")[:NEIGHBOURS]]


def tfidf_answers(task: Task, training: Sequence[Record], records: Sequence[Record]) -> list[str]:
    """scikit-learn's multinomial logistic regression on TF-IDF, each answer being a class.

    It knows the MOST_ANSWERS most frequent answers of at most MOST_TRAINING training cases, drawn
    with a fixed seed. Its strength of regularisation (C = 10) is not tuned.
    """
    fallback = majority_answers(task, training, records)
    training = sorted(training, key=lambda record: record.case_id)
    if len(training) > MOST_TRAINING:
        chosen = np.random.default_rng(0).choice(len(training), MOST_TRAINING, replace=False)
        training = [training[i] for i in np.sort(chosen)]
    counts = Counter(map(task.reference, training))
    classes = set(sorted(counts, key=lambda answer: (-counts[answer], answer))[:MOST_ANSWERS])
    training = [record for record in training if task.reference(record) in classes]
    features = _features(training, records)
    if features is None or len(classes) < 2:
        return fallback
    known, asked = features
    model = LogisticRegression(C=10, max_iter=100, tol=1e-3)
    with warnings.catch_warnings():
        # Rare codes make many classes of few cases; that is so, and no mistake.
        warnings.filterwarnings("ignore", message="The number of unique classes")
        model.fit(known, [task.reference(record) for record in training])
    return [str(answer) for answer in model.predict(asked)]


BASELINES: dict[str, Callable[[Task, Sequence[Record], Sequence[Record]], list[str]]] = {
    "majority": majority_answers,
    "lookup": lookup_answers,
    "nearest": nearest_answers,
    "tfidf": tfidf_answers,
}


def judge_baselines(
    task: Task, training: Sequence[Record], records: Sequence[Record]
) -> dict[str, list[dict]]:
    """Name of the baseline -> its predictions for `records`, as those of a model."""
    return {
        name: [
            metrics.judge(task, record, output)
            for record, output in zip(records, answers(task, training, records), strict=True)
        ]
        for name, answers in BASELINES.items()
    }


def score_baselines(
    task: Task,
    training: Sequence[Record],
    records: Sequence[Record],
    *,
    split: str,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, dict]:
    """Name of the baseline -> its metrics (as in metrics.json, `model` is the baseline's name)."""
    return {
        name: metrics.score(
            predictions, task, split=split, model=name, bootstrap=bootstrap, seed=seed
        )
        for name, predictions in judge_baselines(task, training, records).items()
    }
