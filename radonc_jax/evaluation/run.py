"""One evaluation for the training loop, `evaluate` and the notebook: decode, parse, score, write.

The decoder is handed in as a function, so this module knows no model and no jax.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from radonc_jax.evaluation import metrics
from radonc_jax.tasks import Record, Task

PREDICTIONS = "predictions.jsonl"
METRICS = "metrics.json"
SOURCE = "source.json"  # which model answered, on what
PREDICTIONS_SHA256 = "predictions_sha256"  # key of files that tell of predictions.jsonl
MODELS = ("original", "tuned")
# Each in a folder of its own: the answers of MODELS are free, and comparable with the paper.
CONSTRAINED = "_constrained"
VARIANTS = (*MODELS, *(model + CONSTRAINED for model in MODELS), "original_examples")


class Generation(Protocol):
    """What a decoder returns for one prompt; radonc_jax.decoding.greedy has the real one."""

    text: str
    tokens: list[int]
    logprob: float
    finished: bool
    gap: float | None
    trimmed: bool
    label_logprobs: dict[str, float] | None


def evaluate(
    decode: Callable[[Task, list[str]], list[Generation]],
    records: Sequence[Record],
    tasks: Sequence[Task],
    *,
    split: str,
    model: str,
    output: Path | None,
    seed: int = 0,
    ceiling: Mapping[str, float] | None = None,
    bootstrap: int = 1000,
) -> dict:
    """Lets a model answer every task for every record, and scores the answers.

    Args:
      decode: a task and diagnoses -> generations, in the same order.
      split: name of the split, written into the metrics.
      model: one of VARIANTS.
      output: folder for predictions.jsonl and metrics.json, or None to write nothing.
      ceiling: accuracy of the best reader by task name, where known (synthetic cohorts).
      bootstrap: resamples for the 95 % intervals; 0 is for quick scores inside the training loop.

    Returns:
      What metrics.json holds: the metrics of the one task, or for several tasks
      {"task": "all", "split", "model", "n", "tasks": {name: metrics}}; and, where it is written,
      predictions_sha256, the hash of the predictions.jsonl that it tells of.

    Raises:
      ValueError: no records, a case id twice, a decoder that returns another number of answers or
        a log-probability that is not finite.
    """
    if model not in VARIANTS:
        raise ValueError(f"model is {model!r}; it must be one of {', '.join(VARIANTS)}")
    if not records:
        raise ValueError(f"split {split!r} has no cases; nothing can be evaluated")
    options = {"split": split, "model": model, "output": output, "seed": seed}
    predictions = {task.name: _answer(decode, records, task) for task in tasks}
    return score_all(predictions, tasks, **options, ceiling=ceiling, bootstrap=bootstrap)


def score_all(
    predictions: Mapping[str, Sequence[dict]],
    tasks: Sequence[Task],
    *,
    split: str,
    model: str,
    output: Path | None,
    seed: int = 0,
    ceiling: Mapping[str, float] | None = None,
    bootstrap: int = 1000,
) -> dict:
    """The second half of `evaluate`: scores predictions, by task, and writes both."""
    scores = {}
    for task in tasks:
        scores[task.name] = metrics.score(
            predictions[task.name],
            task,
            split=split,
            model=model,
            bootstrap=bootstrap,
            seed=seed,
        )
        if ceiling is not None:
            scores[task.name]["ceiling"] = ceiling.get(task.name)
    result = join_tasks(scores, split=split, model=model)
    if output is not None:
        content = "".join(
            json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"
            for task in tasks
            for line in predictions[task.name]
        ).encode()
        result = result | {PREDICTIONS_SHA256: hashlib.sha256(content).hexdigest()}
        write_file(output / PREDICTIONS, content)
        write_file(output / METRICS, json.dumps(result, indent=1, allow_nan=False) + "\n")
    return result


def _answer(
    decode: Callable[[Task, list[str]], list[Generation]], records: Sequence[Record], task: Task
) -> list[dict]:
    prompts = [task.prompt(record.diagnosis) for record in records]
    generations = decode(task, [record.diagnosis for record in records])
    if len(generations) != len(prompts):
        raise ValueError(
            f"task {task.name}: the decoder returned {len(generations)} answers to "
            f"{len(prompts)} prompts"
        )
    broken = sum(not math.isfinite(generation.logprob) for generation in generations)
    if broken:
        raise ValueError(
            f"task {task.name}: {broken} of {len(prompts)} answers have a log-probability that is "
            "not finite; the weights or the precision are broken, so the answers mean nothing"
        )
    return [
        metrics.judge(
            task,
            record,
            generation.text,
            prompt_sha256=hashlib.sha256(prompt.encode()).hexdigest(),
            logprob=float(generation.logprob),
            finished=bool(generation.finished),
        )
        | {
            "gap": generation.gap,
            "trimmed": generation.trimmed,
        }
        | (
            {}
            if generation.label_logprobs is None
            else {"label_logprobs": generation.label_logprobs}
        )
        for record, prompt, generation in zip(records, prompts, generations, strict=True)
    ]


def join_tasks(scores: Mapping[str, dict], *, split: str, model: str) -> dict:
    """metrics.json of several tasks, or the metrics of the only one as they are."""
    if len(scores) == 1:
        return next(iter(scores.values()))
    n = sum(task_metrics["n"] for task_metrics in scores.values())
    return {"task": "all", "split": split, "model": model, "n": n, "tasks": dict(scores)}


def split_tasks(result: Mapping) -> dict[str, dict]:
    """The inverse of `join_tasks`: task name -> metrics, whichever form a metrics.json has."""
    if "tasks" in result:
        return dict(result["tasks"])
    return {result["task"]: {k: v for k, v in result.items() if k != PREDICTIONS_SHA256}}


def read_predictions(path: Path) -> dict[str, list[dict]]:
    """predictions.jsonl by task, in the file's order.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a line is no prediction (file and line are named, its text is not).
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; evaluate this model on this split first")
    by_task: dict[str, list[dict]] = {}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                prediction = json.loads(line)
            except json.JSONDecodeError:  # its own message could quote the line
                prediction = None
            fault = _fault(prediction)
            if fault:
                raise ValueError(f"{path}, line {number}: {fault}; evaluate this model again")
            by_task.setdefault(prediction["task"], []).append(prediction)
    if not by_task:
        raise ValueError(f"{path} holds no predictions; evaluate this model again")
    return by_task


_TEXTS = ("case_id", "patient_id", "task", "output", "reference")
_YES_OR_NO = ("correct", "finished")


def _fault(prediction: object) -> str | None:
    """What keeps an object from being a prediction, without its text; None if nothing does.

    Scores are held to their range here, since one that is no number would spread from case to mean,
    interval and test.
    """
    if not isinstance(prediction, dict):
        return "not a JSON object"
    absent = sorted({*_TEXTS, *_YES_OR_NO, "answer", "rouge1"} - prediction.keys())
    if absent:
        return f"no {', '.join(absent)}"
    for name in _TEXTS:
        if not isinstance(prediction[name], str):
            return f"{name} is no text"
    for name in _YES_OR_NO:
        if not isinstance(prediction[name], bool):
            return f"{name} is neither true nor false"
    if not isinstance(prediction["answer"], str | None):
        return "answer is neither a text nor null"
    if prediction["correct"] and prediction["answer"] is None:
        return "an answer that could not be read is called correct"
    if not is_number(prediction["rouge1"]) or not 0 <= prediction["rouge1"] <= 1:
        return "rouge1 is no number from 0 to 1"
    logprob, labels = prediction.get("logprob"), prediction.get("label_logprobs")
    if logprob is not None and not is_number(logprob):
        return "logprob is neither a finite number nor null"
    if labels is not None and not (
        isinstance(labels, dict) and labels and all(map(is_number, labels.values()))
    ):
        return "label_logprobs are no finite numbers"
    return None


def is_number(value: object) -> bool:
    """Whether a value of a JSON file is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def write_file(path: Path, content: str | bytes) -> None:
    """Writes a whole file or none: aside first, then renamed into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
