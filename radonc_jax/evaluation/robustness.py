"""Does the answer hang on what it should: answers to diagnosis texts that were changed a little.

Each perturbation is a pure function of a text and a random generator; it gives the changed text,
or None where it does not apply. A flip of the side must flip the answer's side, and is not asked of
the modality, which may hang on it (protons for a left breast); the others change nothing that an
answer may depend on, so the parsed answer must stay the same by the task's own accuracy (a regimen:
target, side, dose and fractions). What is measured is the model against itself, right or wrong: an
answer that ignores the text is steady and still fails the flip.
"""

import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from radonc_jax.data.cohort import sha256
from radonc_jax.evaluation.run import PREDICTIONS, PREDICTIONS_SHA256, write_file
from radonc_jax.evaluation.statistics import bootstrap_mean
from radonc_jax.tasks import Record, Task
from radonc_jax.tasks.icd import other_side
from radonc_jax.tasks.regimen import parse_regimen, render_regimen

ROBUSTNESS = "robustness.json"
ROBUSTNESS_CASES = "robustness.jsonl"

_OTHER_SIDE = {"right": "left", "rt": "lt", "r": "l", "od": "os"}
_OTHER_SIDE |= {f"r{lobe}": f"l{lobe}" for lobe in ("ul", "ll")}
_OTHER_SIDE |= {other: one for one, other in _OTHER_SIDE.items()}
_SIDE = re.compile(
    # A letter alone is a side in capitals only ("R breast"), and not as a stage or after a digit.
    r"\b(?:[Rr]ight|RIGHT|[Ll]eft|LEFT|[Rr]t|RT|[Ll]t|LT|R|L|O[DS]|[RL](?:UL|LL))"
    r"(?:(?=-?(?:sided|SIDED)\b)|\b(?![/&'0-9-]))"
)
_NO_COUNTERPART = re.compile(
    # The middle lobe, both sides, and a place on the clock, which says its side in its own way.
    r"\b(?:RML|lingula|right middle lobe|bilateral|O\.?U)\b|o['\u2019]?\s?clock",
    re.IGNORECASE,
)
# What may still be a side once all that is surely one is put aside; a level is not ("L4", "L2-3").
_MAYBE_SIDE = re.compile(
    r"right|left|\b[rl]t\b|\bo\.?[ds]\b|\b[rl]\b(?![/&'0-9])|\b[rl][ul]l\b"
    r"|\b(?:dextr|sinist)\w*",
    re.IGNORECASE,
)
# "RT" is radiotherapy as often as right, and "s/p" or a level ("L4 spine") stands before digits.
_RADIOTHERAPY = re.compile(r"\bRT\b|\bL spine\b|\bR/L\b")

# Each pair says the same in any note of this field; the first is replaced by the second or, where
# it is not there, the second by the first.
SYNONYMS = (
    ("adenocarcinoma", "adenoca"),
    ("squamous cell carcinoma", "SCC"),
    ("carcinoma", "ca"),
    ("year-old", "y/o"),
    ("status post", "s/p"),
    ("biopsy", "bx"),
    ("lymph node", "LN"),
    ("history of", "h/o"),
    ("with", "w/"),
    ("right", "Rt"),
    ("left", "Lt"),
)
# "SCC" is a compressed spinal cord too, "ca" calcium, "Rt" radiotherapy.
_ONE_WAY = frozenset({"squamous cell carcinoma", "carcinoma", "right", "left"})
_LEFT_OVER = r"(?!\s(?:in\s(?:place|situ)|over|behind|untreated)\b)"  # where no side is meant

# A full stop behind these ends no sentence: "Lt. breast".
_ABBREVIATION = re.compile(
    r"\b(?:[LR]|Lt|Rt|Bil|Bilat|Lat|Med|Ant|Post|Sup|Inf|Dr|Drs|Mr|Mrs|Ms|Prof|St|No|Nr|Gr|Fig"
    r"|Dept|Pt|Wt|Ht|Dx|Hx|Tx|Rx|Bx|Vs|Ca|Approx|Incl|Resp|Est|Ref|Min|Max|Vol|Neg|Pos|Inv|Cm|Mm|Yr|Yrs"
    r"|e\.g|i\.e|etc|b\.i\.d|q\.d|o\.[dsu]|y\.o|p\.o|a\.m|p\.m)\.$",
    re.IGNORECASE,
)

IRRELEVANT = (
    "Lives with a partner and two dogs.",
    "Prefers appointments in the afternoon.",
    "Drove to the visit with a neighbor.",
    "Enjoys gardening and bird watching.",
    "Parking was validated at the front desk.",
)


def flip_side(text: str, rng: np.random.Generator) -> str | None:
    """Right for left and left for right, in every spelling of it; None where no side stands, one
    that has no counterpart (the middle lobe, both sides, a place on the clock), or one in a
    spelling that is not turned: a text with both sides would contradict itself."""
    if _NO_COUNTERPART.search(text) or _RADIOTHERAPY.search(text):
        return None

    def other(found: re.Match) -> str:
        word = found[0]
        turned = _OTHER_SIDE[word.casefold()]
        if word.isupper():
            return turned.upper()
        return turned.capitalize() if word[0].isupper() else turned

    if _MAYBE_SIDE.search(_SIDE.sub("", text)):
        return None
    flipped = _SIDE.sub(other, text)
    return flipped if flipped != text else None


def swap_synonyms(text: str, rng: np.random.Generator) -> str | None:
    """Up to two terms in another wording of the same; None where the text has none of them."""
    options = []
    for one, other in SYNONYMS:
        for old, new in ((one, other), (other, one)):
            if old == other and one in _ONE_WAY:
                continue
            after = _LEFT_OVER if old == "left" else ""
            pattern = re.compile(rf"(?<![\w-]){re.escape(old)}(?![\w-]){after}", re.IGNORECASE)
            if pattern.search(text):
                options.append((pattern, new))
                break
    if not options:
        return None
    for index in rng.permutation(len(options))[:2]:
        pattern, new = options[index]
        text = pattern.sub(lambda _, new=new: new, text, count=1)
    return text


def _fields(text: str) -> list[str]:
    """The sentences and lines of a text. Not split behind an abbreviation, nor at a line break
    inside a sentence: before a small letter, where no sentence ends."""
    parts: list[str] = []
    for piece in re.split(r"(?<=[.;])\s+|\n+(?![a-z])", text):
        if parts and _ABBREVIATION.search(parts[-1]):
            parts[-1] += f" {piece.strip()}"
        elif piece.strip():
            parts.append(piece.strip())
    return parts


def shuffle_fields(text: str, rng: np.random.Generator) -> str | None:
    """The sentences in another order; None where there is one alone, or its parts are."""
    parts = _fields(text)
    if len(set(parts)) < 2:
        return None
    while True:
        mixed = [parts[i] for i in rng.permutation(len(parts))]
        if mixed != parts:
            # A line without a full stop must not run into the one that follows it now.
            ended = [part if part[-1] in ".;:,!?" else f"{part}." for part in mixed[:-1]]
            return " ".join([*ended, mixed[-1]])


def add_irrelevant_sentence(text: str, rng: np.random.Generator) -> str | None:
    """One sentence of daily life at the end or the beginning."""
    sentence = IRRELEVANT[int(rng.integers(len(IRRELEVANT)))]
    if rng.random() < 0.5:
        return f"{sentence} {text}"
    return f"{text.rstrip()}{'' if text.rstrip()[-1:] in ('.', ';') else '.'} {sentence}"


PERTURBATIONS: dict[str, Callable[[str, np.random.Generator], str | None]] = {
    "side_flip": flip_side,
    "synonyms": swap_synonyms,
    "shuffled_fields": shuffle_fields,
    "irrelevant_sentence": add_irrelevant_sentence,
}


def asked_of(task: str) -> tuple[str, ...]:
    """The perturbations that a task is asked. A flip of the side says nothing of a modality: the
    site table has "left" among the reasons for protons, so either answer may be right."""
    return tuple(name for name in PERTURBATIONS if (task, name) != ("modality", "side_flip"))


def expected_answer(task: str, perturbation: str, answer: str) -> str | None:
    """The answer that a changed text must get where the text as it was got `answer`.

    None where nothing follows: a flipped side says nothing of a modality, of a code or a regimen
    without one, or of a regimen that contradicts itself.
    """
    if perturbation not in asked_of(task):
        return None
    if perturbation != "side_flip":
        return answer
    if task == "icd":
        return other_side(answer)
    regimen = parse_regimen(answer)
    if regimen is None or regimen.side not in ("right", "left") or regimen.conflict:
        return None
    side = "left" if regimen.side == "right" else "right"
    return render_regimen(replace(regimen, side=side))


def _generator(seed: int, case_id: str, perturbation: str) -> np.random.Generator:
    # Of the case and not of its place, so that a part of the split is changed as the whole is.
    return np.random.default_rng([seed, zlib.crc32(f"{perturbation} {case_id}".encode())])


def probe(
    decode: Callable[[Task, list[str]], list],
    records: Sequence[Record],
    task: Task,
    predictions: Sequence[Mapping],
    *,
    fits: Callable[[Task, str], bool] = lambda task, text: True,
    seed: int = 0,
    bootstrap: int = 1000,
) -> tuple[dict, list[dict]]:
    """Lets a model answer the changed texts of one task.

    Args:
      decode: a task and diagnoses -> generations, in order; the very decoder of `predictions`.
      records: the cases; those whose answer is unparseable are left out, for there is nothing to
        hold the new answer against.
      predictions: the model's answers to the texts as they are.
      fits: a task and a diagnosis -> whether the model can read all of it; changed texts that are
        too long are left out and counted.

    Returns:
      {perturbation: {n, patients, left_out, rate, low, high, expected}} of the perturbations
      `asked_of` the task: the share of the n cases (of so many patients) to which it applies whose
      answer did what it must, `expected` being "flips" or "same", with its interval by patient
      (rate null where n is 0); and the cases, {case_id, patient_id, task, perturbation,
      as_expected}.

    Raises:
      ValueError: a record has no prediction, or the decoder gives another number of answers.
    """
    given = {prediction["case_id"]: prediction["answer"] for prediction in predictions}
    missing = [record.case_id for record in records if record.case_id not in given]
    if missing:
        raise ValueError(
            f"task {task.name}: {len(missing)} cases have no answer to their own text, such as "
            f"{', '.join(missing[:3])}; evaluate the split first"
        )
    asked, texts, left_out = [], [], Counter()
    for name in asked_of(task.name):
        for record in records:
            answer = given[record.case_id]
            wanted = None if answer is None else expected_answer(task.name, name, answer)
            if wanted is None:
                continue
            text = PERTURBATIONS[name](record.diagnosis, _generator(seed, record.case_id, name))
            if text is not None and not fits(task, text):
                left_out[name] += 1
            elif text is not None:
                asked.append((name, record, wanted))
                texts.append(text)
    generations = decode(task, texts) if texts else []
    if len(generations) != len(texts):
        raise ValueError(
            f"task {task.name}: the decoder returned {len(generations)} answers to "
            f"{len(texts)} diagnoses"
        )
    cases = [
        {
            "case_id": record.case_id,
            "patient_id": record.patient_id,
            "task": task.name,
            "perturbation": name,
            "as_expected": _same(task, task.parse(generation.text), wanted),
        }
        for (name, record, wanted), generation in zip(asked, generations, strict=True)
    ]
    summary = {}
    for name in asked_of(task.name):
        own = [case for case in cases if case["perturbation"] == name]
        score = {"value": None, "low": None, "high": None}
        if own:
            score = bootstrap_mean(
                [float(case["as_expected"]) for case in own],
                [case["patient_id"] for case in own],
                resamples=bootstrap,
                seed=seed,
                share=True,
            )
        summary[name] = {
            "n": len(own),
            "patients": len({case["patient_id"] for case in own}),
            "left_out": left_out[name],
            "rate": score["value"],
            "low": score["low"],
            "high": score["high"],
            "expected": "flips" if name == "side_flip" else "same",
        }
    return summary, cases


def describe(task: str, summary: Mapping[str, Mapping]) -> str:
    """One line for the terminal on a `probe` summary."""
    shown = [
        f"{name.replace('_', ' ')} {entry['rate']:.3f} of {entry['n']}"
        for name, entry in summary.items()
        if entry["n"]
    ]
    if not shown:
        return f"{task}: no text could be changed and asked again, so robustness is not known"
    return f"{task}, as expected after: {', '.join(shown)}"


def _same(task: Task, answer: str | None, wanted: str) -> bool:
    # A regimen in other words or another order of words is the same regimen.
    return bool(task.correct(answer, wanted))


def probe_tasks(
    decode: Callable[[Task, list[str]], list],
    records: Sequence[Record],
    tasks: Sequence[Task],
    predictions: Mapping[str, Sequence[Mapping]],
    output: Path | None,
    *,
    fits: Callable[[Task, str], bool] = lambda task, text: True,
    seed: int = 0,
) -> dict[str, dict]:
    """`probe` for each task, held against `predictions` by task; {task: summary}.

    Writes robustness.json, which names the predictions by their hash, and, a line a case and
    without any text, robustness.jsonl beside the predictions in the folder `output`; None writes
    nothing (the other processes of several, who may not see the folder). Raises as `probe`.
    """
    summaries, lines = {}, []
    for task in tasks:
        summaries[task.name], cases = probe(
            decode, records, task, predictions.get(task.name, ()), fits=fits, seed=seed
        )
        lines += [json.dumps(case) + "\n" for case in cases]
    if output is not None:
        write_file(output / ROBUSTNESS_CASES, "".join(lines))
        content = {PREDICTIONS_SHA256: sha256(output / PREDICTIONS)} | summaries
        write_file(output / ROBUSTNESS, json.dumps(content, indent=1, allow_nan=False) + "\n")
    return summaries
