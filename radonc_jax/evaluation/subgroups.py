"""Where does it fail: accuracy by site, modality, sex, age, length of the text and rarity."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from radonc_jax.evaluation.codes import RARITY, rarity_bin
from radonc_jax.evaluation.statistics import bootstrap_means

_AGES = ((0, 39), (40, 49), (50, 59), (60, 69), (70, 79), (80, None))
_LENGTHS = ((0, 99), (100, 199), (200, 399), (400, 799), (800, None))  # characters
ORDER = ("site", "modality", "sex", "age", "length", "rarity")


def _band(value: float, bands: Sequence[tuple[int, int | None]]) -> str:
    for low, high in bands:
        if high is None or value < high + 1:
            return f"{low}+" if high is None else f"{low}-{high}"
    raise AssertionError(value)


def _number(text: object) -> float | None:
    try:
        value = float(str(text).strip().rstrip("+"))
    except ValueError:
        return None
    return value if 0 <= value < 150 else None


def group_of(by: str, case: Mapping[str, object]) -> str | None:
    """The group of one cohort row (its columns by name), or None where it is not known."""
    if by == "length":
        return _band(len(str(case["diagnosis"])), _LENGTHS) if "diagnosis" in case else None
    value = case.get(by)
    if value is None or value != value or not str(value).strip():
        return None
    if by == "age":
        years = _number(value)
        return None if years is None else _band(years, _AGES)
    return str(value).strip()


def assess(
    models: Mapping[str, Sequence[dict]],
    cases: Mapping[str, Mapping[str, object]] | None,
    rarity: Mapping[str, int] | None = None,
    *,
    bootstrap: int = 1000,
    seed: int = 0,
) -> list[dict]:
    """[{by, group, n, patients, model: accuracy {value, low, high}}], in ORDER, groups by name.

    `patients` is how many different ones the n cases have; intervals are of a bootstrap of these. A
    case whose group is not known is in none.

    Args:
      models: name -> predictions of the same cases in the same order.
      cases: case id -> cohort row (site, modality, sex, age, diagnosis), where at hand.
      rarity: case id -> number of training cases that have the case's ICD-10-CM code, whatever the
        task, where at hand.
    """
    answered = next(iter(models.values()))
    groups: dict[str, dict[str, list[int]]] = {by: defaultdict(list) for by in ORDER}
    for index, prediction in enumerate(answered):
        case = None if cases is None else cases.get(prediction["case_id"])
        for by in ORDER:
            if by == "rarity":
                count = None if rarity is None else rarity.get(prediction["case_id"])
                group = None if count is None else rarity_bin(count)
            else:
                group = None if case is None else group_of(by, case)
            if group is not None:
                groups[by][group].append(index)
    order = {"age": _AGES, "length": _LENGTHS}
    rows = []
    for by in ORDER:
        names = sorted(groups[by])
        if by in order:
            names.sort(key=[_band(low, order[by]) for low, _ in order[by]].index)
        if by == "rarity":
            names.sort(key=[rarity_bin(low) for low, _ in RARITY].index)
        for name in names:
            chosen = groups[by][name]
            patients = [answered[i]["patient_id"] for i in chosen]
            scores = bootstrap_means(
                {
                    model: np.array([bool(predictions[i]["correct"]) for i in chosen])
                    for model, predictions in models.items()
                },
                patients,
                resamples=bootstrap,
                seed=seed,
                shares=tuple(models),
            )
            found = {"by": by, "group": name, "n": len(chosen), "patients": len(set(patients))}
            rows.append(found | scores)
    return rows
