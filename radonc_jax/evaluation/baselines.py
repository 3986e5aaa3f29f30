"""What a model must beat: answers that need no model, made from the training split.

They go through the same scoring as a model's answers. ROUGE-1 is taken of the answer itself.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence

from radonc_jax.evaluation import metrics
from radonc_jax.tasks import Record, Task


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


BASELINES = {"majority": majority_answers, "lookup": lookup_answers}


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
    scores = {}
    for name, answers in BASELINES.items():
        predictions = [
            metrics.judge(task, record, output)
            for record, output in zip(records, answers(task, training, records), strict=True)
        ]
        scores[name] = metrics.score(
            predictions, task, split=split, model=name, bootstrap=bootstrap, seed=seed
        )
    return scores
