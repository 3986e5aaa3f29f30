"""Regimens beyond right and wrong: field by field, leniently, and where ROUGE hides an error."""

import functools
import importlib.resources
import json
from collections.abc import Mapping, Sequence

import numpy as np

from radonc_jax.evaluation.statistics import bootstrap_means
from radonc_jax.tasks.regimen import (
    FIELDS,
    Regimen,
    equivalent_regimen,
    parse_regimen,
    same_field,
    same_regimen,
    stated_fields,
)

HIGH_ROUGE = 0.8


@functools.cache
def allowed_regimens() -> dict[str, frozenset[Regimen]]:
    """Site -> its primary regimens in sites.json: dose, fractions, technique, modality; no place.

    Sites go by their key there, by their full name in lower case, and, for the benign conditions
    of synthetic cohorts, by "benign_" and the condition (all of the site's regimens).
    """
    text = importlib.resources.files("radonc_jax.data").joinpath("sites.json").read_text("utf-8")
    found = {}
    for site in json.loads(text)["sites"]:
        schedules = frozenset(
            Regimen(
                target=None,
                total_dose_gy=float(regimen["total_gy"]),
                fractions=regimen["fractions"],
                technique=regimen["technique"],
                modality=regimen["modality"],
            )
            for regimen in site["regimens"]
            if regimen["role"] == "primary"
        )
        found[site["key"]] = found[site["site"].casefold()] = schedules
    return found


def _allowed_at(site: str | None) -> frozenset[Regimen] | None:
    key = (site or "").strip().casefold()
    return allowed_regimens().get("benign" if key.startswith("benign_") else key)


def is_allowed(answer: Regimen, reference: Regimen, site: str | None) -> bool | None:
    """Whether the answer is to the reference's side and target, in the dose and fractions of any
    primary regimen of the site, of the same kind: implanted or not, and of the modality that the
    answer states (one without may be any external beam). None where the site is not known."""
    schedules = _allowed_at(site)
    if schedules is None:
        return None
    given, right = stated_fields(answer), stated_fields(reference)
    if any(given[name] != right[name] for name in ("side", "target")):
        return False
    return any(
        schedule.fractions == answer.fractions
        and same_field("dose", answer.total_dose_gy, schedule.total_dose_gy)
        and schedule.implant == answer.implant
        and (
            schedule.modality != "brachytherapy"
            if answer.modality is None
            else schedule.modality == answer.modality
        )
        for schedule in schedules
    )


def _parsed(prediction: dict) -> tuple[Regimen | None, Regimen | None]:
    answer = prediction["answer"]
    return (
        None if answer is None else parse_regimen(answer),
        parse_regimen(prediction["reference"]),
    )


def _is_dangerous(answer: Regimen | None, reference: Regimen) -> bool:
    """The dose or the side is not the reference's."""
    if answer is None:
        return False
    given, right = stated_fields(answer), stated_fields(reference)
    return not all(same_field(name, given[name], right[name]) for name in ("dose", "side"))


def _counts(chosen: np.ndarray, patients: Sequence[str]) -> dict[str, int]:
    """How many cases are chosen (bool [N]), and how many patients these have."""
    return {"n": int(chosen.sum()), "patients": len(set(np.asarray(patients)[chosen]))}


def assess(
    models: Mapping[str, Sequence[dict]],
    sites: Mapping[str, str] | None = None,
    *,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict:
    """`details` of task regimen: each figure {value, low, high} by model.

    Args:
      models: name -> predictions of the same cases in the same order.
      sites: case id -> site, where the cohort tells it.

    Returns:
      fields {name: {n, patients, model: {value, low, high, precision, f1}}}: of the n cases (of so
      many patients) whose reference states the field, the share in which the answer has the same
      (recall), the share right among the answers that state it, and their harmonic mean. strict and
      lenient accuracy {model: ...}, over all cases. allowed {n, patients, model: ...} over the
      cases of known sites, or null.
      high_rouge_wrong: ids of the tuned model's cases with ROUGE-1 of HIGH_ROUGE or more whose
      dose or side is wrong, the highest first; high_rouge_wrong_n, their number;
      high_rouge_wrong_share {model: ...}.
      unreadable_references: cases left out of fields and lenient accuracy's reading; there the
      answer is right if it repeats the words.
    """
    result: dict = {
        "fields": {name: {"n": 0} for name in FIELDS},
        "strict": {},
        "lenient": {},
        "allowed": None,
        "high_rouge_wrong": [],
        "high_rouge_wrong_n": 0,
        "high_rouge_wrong_share": {},
    }
    for model, predictions in models.items():
        patients = [prediction["patient_id"] for prediction in predictions]
        pairs = [_parsed(prediction) for prediction in predictions]
        columns: dict[str, np.ndarray] = {}
        within: dict[str, np.ndarray] = {}
        stated = [
            (given and stated_fields(given), right and stated_fields(right))
            for given, right in pairs
        ]
        precision = {}
        for name in FIELDS:
            right = np.array([bool(r) and r[name] is not None for _, r in stated])
            given = np.array([bool(r and g) and g[name] is not None for g, r in stated])
            same = np.array(
                [bool(r and g) and same_field(name, g[name], r[name]) for g, r in stated]
            )
            columns[name], within[name] = same & right, right
            precision[name] = (
                float((same & given & right).sum() / given.sum()) if given.any() else None
            )
            result["fields"][name] |= _counts(right, patients)
        columns["strict"] = np.array(
            [
                bool(p["correct"]) if None in pair else same_regimen(*pair)
                for p, pair in zip(predictions, pairs, strict=True)
            ]
        )
        columns["lenient"] = np.array(
            [
                bool(p["correct"]) if None in pair else equivalent_regimen(*pair)
                for p, pair in zip(predictions, pairs, strict=True)
            ]
        )
        hidden = np.array(
            [
                p["rouge1"] >= HIGH_ROUGE and right is not None and _is_dangerous(given, right)
                for p, (given, right) in zip(predictions, pairs, strict=True)
            ]
        )
        columns["hidden"] = hidden
        if sites is not None:
            known = np.array(
                [_allowed_at(sites.get(p["case_id"])) is not None for p in predictions]
            )
            if known.any():
                columns["allowed"] = np.array(
                    [
                        bool(given and right)
                        and bool(is_allowed(given, right, sites.get(p["case_id"])))
                        for p, (given, right) in zip(predictions, pairs, strict=True)
                    ]
                )
                within["allowed"] = known
        scores = bootstrap_means(
            columns,
            patients,
            resamples=bootstrap,
            seed=seed,
            shares=tuple(columns),
            within=within,
        )
        for name in FIELDS:
            recall, precise = scores[name]["value"], precision[name]
            f1 = None
            if recall is not None:
                precise_or_none = precise or 0.0
                total = recall + precise_or_none
                f1 = 2 * recall * precise_or_none / total if total else 0.0
            result["fields"][name][model] = scores[name] | {"precision": precise, "f1": f1}
        result["strict"][model] = scores["strict"]
        result["lenient"][model] = scores["lenient"]
        result["high_rouge_wrong_share"][model] = scores["hidden"]
        if "allowed" in scores:
            result["allowed"] = result["allowed"] or _counts(within["allowed"], patients)
            result["allowed"][model] = scores["allowed"]
        if model == "tuned":
            found = [p for p, wrong in zip(predictions, hidden, strict=True) if wrong]
            found.sort(key=lambda p: (-p["rouge1"], p["case_id"]))
            result["high_rouge_wrong"] = [p["case_id"] for p in found]
            result["high_rouge_wrong_n"] = len(found)
        result["unreadable_references"] = sum(right is None for _, right in pairs)
    return result
