"""Train, validation and test by patient, and what may leak between them."""

import re
from dataclasses import dataclass

import numpy as np
import pandas as pd

from radonc_jax.tasks.icd import normalise_code
from radonc_jax.tasks.regimen import DOSE_TOLERANCE_GY, parse_regimen

SPLITS = ("train", "validation", "test")


def assign_splits(
    patients: pd.Series, labels: pd.DataFrame, seed: int, test: float, validation: float
) -> pd.Series:
    """The split of each case; all cases of a patient share one.

    Patients are put in order of their labels (columns of `labels`, most important first; those of
    a patient's first case count), in random order among equals, and taken out of that order at
    even distances from a random start. Common labels thus keep their share exactly, and rare ones
    share a place with their neighbours in the order: codes of one category lie side by side.

    Args:
      patients: patient of each case.
      labels: labels of each case, same index.
      seed: the same seed gives the same split.
      test, validation: shares of the patients, the rest trains.

    Raises:
      ValueError: a share is not between 0 and 1, nothing is left to train on, or a split would
        hold no patient.
    """
    for name, share in (("test_fraction", test), ("validation_fraction", validation)):
        if not 0 < share < 1:
            raise ValueError(f"{name} is {share}; it must lie between 0 and 1")
    if test + validation >= 1:
        raise ValueError(
            f"test_fraction {test} and validation_fraction {validation} leave nothing to train on"
        )
    rng = np.random.Generator(np.random.PCG64(seed))
    first = ~patients.duplicated()
    names = patients[first].to_numpy()
    keys = [labels.loc[first, column].astype(str).to_numpy() for column in labels.columns]
    order = np.lexsort((rng.random(len(names)), *reversed(keys)))
    split = np.full(len(names), "train", dtype=object)
    taken = _evenly(len(order), test, rng)
    split[order[taken]] = "test"
    rest = order[~taken]
    split[rest[_evenly(len(rest), validation / (1 - test), rng)]] = "validation"
    for name in SPLITS:
        if not (split == name).any():
            raise ValueError(
                f"{len(names)} patients are too few: the {name} split would be empty; give more "
                "records or other fractions"
            )
    return patients.map(dict(zip(names, split, strict=True)))


def _evenly(n: int, share: float, rng: np.random.Generator) -> np.ndarray:
    """Mask of `share` of n positions at even distances: systematic sampling."""
    marks = np.floor(np.arange(n + 1) * share + rng.random())
    return np.diff(marks) > 0


def check_no_patient_crosses(cases: pd.DataFrame) -> None:
    """
    Raises:
      ValueError: a patient of `cases` (columns patient_id, split) is in more than one split.
    """
    crossing = cases.groupby("patient_id")["split"].nunique() > 1
    if crossing.any():
        raise ValueError(
            f"{int(crossing.sum())} patients are in more than one split; scores on held-out cases "
            "would be worth nothing"
        )


def normalise_text(text: str) -> str:
    """Letters and digits alone, in lower case: what near-duplicates share."""
    return " ".join(re.findall(r"[a-z0-9]+", text.casefold()))


def near_duplicates(cases: pd.DataFrame) -> dict[str, int]:
    """Cases whose diagnosis text, punctuation and case aside, also stands in the training split."""
    texts = cases["diagnosis"].map(normalise_text)
    train = set(texts[cases["split"] == "train"])
    held_out = cases["split"] != "train"
    found = texts[held_out].isin(train)
    counts = found.groupby(cases.loc[held_out, "split"]).sum()
    return {name: int(counts.get(name, 0)) for name in SPLITS[1:]}


# ---------------------------------------------------------------------------------------------
# Answers that stand in the question
# ---------------------------------------------------------------------------------------------

_CODE = re.compile(
    r"[\s,;-]*(?:icd-?\s?10(?:-?cm)?(?:\s?codes?)?\s?[:=]?\s*)?[\[(]?\s*"
    r"\b(?P<code>(?:[a-z]\d\d|c4a|d3a|c7a|c7b)(?:\.?[0-9a-z]{1,4})?)\b(?:\s*[\])])?",
    re.IGNORECASE,
)
_DOSE = re.compile(
    r"[\s,;]*\b(?:plan(?:ned)?(?: for)?|prescribed|treated with|to receive)?[:\s]*"
    r"(?P<dose>\d[\d.,]*\s?c?gy(?:\s?\(?rbe\)?)?\s?(?:in|/|x|over)\s?\d{1,2}"
    r"(?:\s?(?:fractions?|fx))?)\.?",
    re.IGNORECASE,
)
_MODALITY = (
    r"[\s,;]*\b(?:(?:referred|planned|here|seen) for |plan: )?{label}s?"
    r"(?: (?:beam|therapy|radiotherapy|radiation|rt|treatment))+\b\.?"
)


@dataclass(frozen=True)
class Stripped:
    """A diagnosis text without its own answers, and which were found: "icd", "regimen" ..."""

    text: str
    found: tuple[str, ...]


def strip_answers(diagnosis: str, code: str, regimen: str, modality: str) -> Stripped:
    """Takes a case's own code, dose with fractions, and named modality out of its diagnosis text.

    Only what answers this case goes: another code, a former course or a modality that was not
    used says something about the disease and stays. An ancestor of the code ("C50.4" beside
    C50.411) gives most of the answer away and goes too.
    """
    found = []
    text = diagnosis

    def own_code(match: re.Match) -> str:
        said = normalise_code(match["code"])
        # Three bare characters may be a vertebra or a stage ("T10"): only its own category goes.
        return "" if said and (code.startswith(said)) else match[0]

    def own_dose(match: re.Match) -> str:
        said, own = parse_regimen(match["dose"]), parse_regimen(regimen)
        if said is None or own is None or None in (said.total_dose_gy, own.total_dose_gy):
            return match[0]
        same = abs(said.total_dose_gy - own.total_dose_gy) <= DOSE_TOLERANCE_GY
        return "" if same and said.fractions == own.fractions else match[0]

    own_modality = re.compile(_MODALITY.format(label=re.escape(modality)), re.IGNORECASE)
    for task, pattern, replace in (
        ("icd", _CODE, own_code),
        ("regimen", _DOSE, own_dose),
        ("modality", own_modality, ""),
    ):
        shorter = pattern.sub(replace, text)
        if shorter != text:
            found.append(task)
            text = shorter
    return Stripped(text.strip() if found else text, tuple(found))
