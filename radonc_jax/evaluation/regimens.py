"""Regimens beyond right and wrong: field by field, leniently, with boost and kind of treatment too,
and where ROUGE hides an error."""

import functools
import importlib.resources
import json
from collections.abc import Mapping, Sequence

import numpy as np

from radonc_jax.evaluation.statistics import bootstrap_means
from radonc_jax.tasks.regimen import (
    EQD2_TOLERANCE,
    FIELDS,
    Regimen,
    alpha_beta_gy,
    contradicts,
    eqd2_gy,
    equivalent_regimen,
    parse_regimen,
    same_field,
    same_regimen,
    stated_fields,
)

HIGH_ROUGE = 0.8


# Dose per fraction, where the numbers of fractions differ: what differs by more is another dose.
DOSE_PER_FRACTION_TOLERANCE = 0.05


@functools.cache
def _site_table() -> dict[str, tuple[frozenset[Regimen], frozenset[Regimen], bool]]:
    """Site -> its primary regimens, its boosts, and whether it treats in phases of their own."""
    text = importlib.resources.files("radonc_jax.data").joinpath("sites.json").read_text("utf-8")
    found = {}
    for site in json.loads(text)["sites"]:
        by_role: dict[str, list[Regimen]] = {"primary": [], "boost": [], "phase": []}
        for regimen in site["regimens"]:
            by_role[regimen["role"]].append(
                Regimen(
                    target=None,
                    total_dose_gy=float(regimen["total_gy"]),
                    fractions=regimen["fractions"],
                    technique=regimen["technique"],
                    modality=regimen["modality"],
                    times_a_day=2 if "BID" in regimen["technique"] else 1,
                )
            )
        entry = frozenset(by_role["primary"]), frozenset(by_role["boost"]), bool(by_role["phase"])
        found[site["key"]] = found[site["site"].casefold()] = entry
    return found


def allowed_regimens() -> dict[str, frozenset[Regimen]]:
    """Site -> its primary regimens in sites.json: dose, fractions, schedule, technique, modality;
    no place.

    Sites go by their key there, by their full name in lower case, and, for the benign conditions
    of synthetic cohorts, by "benign_" and the condition (all of the site's regimens).
    """
    return {site: primary for site, (primary, _, _) in _site_table().items()}


def _key(site: str | None) -> str:
    key = (site or "").strip().casefold()
    return "benign" if key.startswith("benign_") else key


def _is_known(site: str | None) -> bool:
    return _key(site) in _site_table()


def _same_dosing(
    one: tuple[float | None, int | None], other: tuple[float | None, int | None]
) -> bool:
    """Whether (dose in Gy, fractions) are the same dose, and each fraction too.

    Doses may differ by DOSE_TOLERANCE_GY, doses of a fraction by DOSE_PER_FRACTION_TOLERANCE of
    `other`, the reference's. A reference without a number of fractions asks for none.
    """
    if not same_field("dose", one[0], other[0]):
        return False
    if one[1] == other[1] or None in (other[0], other[1]):
        return True
    if one[1] is None:
        return False
    each, right = one[0] / one[1], other[0] / other[1]
    return abs(each - right) <= DOSE_PER_FRACTION_TOLERANCE * right + 1e-9


def _boost(regimen: Regimen) -> tuple[float | None, int | None]:
    return regimen.boost_dose_gy, regimen.boost_fractions


def _is_allowed_boost(answer: Regimen, reference: Regimen, site: str) -> bool:
    """Whether the answer's boost, if it has one, may follow its first phase.

    The reference's own boost may follow what is not stronger than the reference's first phase; a
    boost of the site's table may follow external beam, unless the table has phases for it, for
    then the primary regimens are whole courses without one.
    """
    if answer.boost_dose_gy is None:
        return True
    if _same_dosing(_boost(answer), _boost(reference)):
        ratio = alpha_beta_gy(reference)
        given, right = eqd2_gy(answer, ratio), eqd2_gy(reference, ratio)
        if given is not None and right is not None and given <= right * (1 + EQD2_TOLERANCE):
            return True
    _, boosts, in_phases = _site_table()[site]
    if in_phases or answer.modality == "brachytherapy":
        return False
    return any(
        answer.boost_fractions == boost.fractions
        and same_field("dose", answer.boost_dose_gy, boost.total_dose_gy)
        for boost in boosts
    )


def is_allowed(answer: Regimen, reference: Regimen, site: str | None) -> bool | None:
    """Whether the answer is to the reference's side and target, in the dose and fractions of any
    primary regimen of the site and not more often a day, of the same kind: implanted or not, and of
    the modality that the answer states (one without may be any external beam).

    A boost must be the reference's or one of the site's (`_is_allowed_boost`); without one the
    primary regimen stands alone. An answer that contradicts itself is not allowed. None where the
    site is not known.
    """
    if not _is_known(site):
        return None
    given, right = stated_fields(answer), stated_fields(reference)
    if any(given[name] != right[name] for name in ("side", "target")):
        return False
    if contradicts(answer, reference) or not _is_allowed_boost(answer, reference, _key(site)):
        return False
    return any(
        schedule.fractions == answer.fractions
        and same_field("dose", answer.total_dose_gy, schedule.total_dose_gy)
        and answer.times_a_day <= schedule.times_a_day
        and schedule.implant == answer.implant
        and (
            schedule.modality != "brachytherapy"
            if answer.modality is None
            else schedule.modality == answer.modality
        )
        for schedule in _site_table()[_key(site)][0]
    )


def _parsed(prediction: dict) -> tuple[Regimen | None, Regimen | None]:
    answer = prediction["answer"]
    return (
        None if answer is None else parse_regimen(answer),
        parse_regimen(prediction["reference"]),
    )


def is_other_kind(answer: Regimen, reference: Regimen) -> bool:
    """Whether the first phases are of kinds that cannot stand for each other: sources implanted in
    one alone, or brachytherapy in one and stated external beam in the other.

    One without a modality may be of any, but for an implant, which must be stated: 145 Gy in one
    fraction is another treatment. Photons for protons or electrons are no other kind.
    """
    if answer.implant != reference.implant:
        return True
    modalities = {answer.modality, reference.modality}
    return None not in modalities and len(modalities) == 2 and "brachytherapy" in modalities


def same_in_boost_and_kind(answer: Regimen, reference: Regimen) -> bool:
    """Strict accuracy (`same_regimen`) that asks for boost and kind of treatment too.

    Right only if strictly right, with the reference's boost (dose within DOSE_TOLERANCE_GY, the
    same fractions) or with none where the reference has none, and not of another kind
    (`is_other_kind`).
    """
    boosts = (stated_fields(regimen)["boost"] for regimen in (answer, reference))
    return (
        same_regimen(answer, reference)
        and same_field("boost", *boosts)
        and not is_other_kind(answer, reference)
    )


def _is_dangerous(answer: Regimen | None, reference: Regimen) -> bool:
    """Whether the answer would treat another side, give another dose or be another kind of
    treatment (`is_other_kind`) than the reference.

    A dose is that of the first phase, of its fractions and of the boost: one that only the answer
    has is added, one that it leaves out is missed, and either counts. So do more fractions a day,
    and an answer that contradicts itself. Fewer a day, another technique of the same kind and
    another number of fractions of nearly the same dose do not: they change the effect, and harm far
    less.
    """
    if answer is None:
        return False
    if contradicts(answer, reference) or answer.times_a_day > reference.times_a_day:
        return True
    first = (answer.total_dose_gy, answer.fractions), (reference.total_dose_gy, reference.fractions)
    return (
        stated_fields(answer)["side"] != stated_fields(reference)["side"]
        or not _same_dosing(*first)
        or not _same_dosing(_boost(answer), _boost(reference))
        or is_other_kind(answer, reference)
    )


_ACCURACIES = {
    "strict": same_regimen,
    "lenient": equivalent_regimen,
    "strict_boost_kind": same_in_boost_and_kind,
}


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
      lenient accuracy {model: ...}, over all cases; strict_boost_kind, strict accuracy that asks
      for boost and kind of treatment too (`same_in_boost_and_kind`). allowed {n, patients, model:
      ...} over the cases of known sites, or null.
      high_rouge_wrong: ids of the tuned model's cases with ROUGE-1 of HIGH_ROUGE or more whose
      dose (first phase, fraction or boost), times a day, side or kind of treatment is wrong or
      contradictory, the highest first; high_rouge_wrong_n, their number; high_rouge_wrong_share
      {model: ...}. A case may be among them and strictly right, for strict accuracy leaves boost
      and kind out. unreadable_references: cases left out of fields and of the reading for the three
      accuracies; there the answer is right if it repeats the words.
    """
    result: dict = {
        "fields": {name: {"n": 0} for name in FIELDS},
        **{name: {} for name in _ACCURACIES},
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
        for name, is_right in _ACCURACIES.items():
            columns[name] = np.array(
                [
                    bool(p["correct"]) if None in pair else is_right(*pair)
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
            known = np.array([_is_known(sites.get(p["case_id"])) for p in predictions])
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
        for name in _ACCURACIES:
            result[name][model] = scores[name]
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
