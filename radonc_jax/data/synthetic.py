"""A synthetic raw extract with no patient data, whose best reachable accuracy is known.

Every patient is drawn from one latent record: site, then place (subsite and side, hence the code),
then a clinical fact, the cue, and given the cue a regimen. The diagnosis text prints the place and
the cue; the plan rows print the regimen; nothing else in the text depends on the code or the
regimen. The posterior of every answer given the text is therefore a finite sum (`SiteLaw.ceiling`),
and no reader of the text, however good, can be right more often than that.

    P(place, side)            place weights, sides alike
    P(printed | place, side)  subsite omitted, side omitted, wrong side printed, or all of it
    P(cue)                    the share of the cue's own regimen
    P(regimen | cue)          FOLLOWS_CUE on the cue's own regimen, the rest by the regimen shares

so that the shares of regimens and modalities are those of sites.json whatever FOLLOWS_CUE is.
Doses and shares are design values of sites.json: for synthetic text, not for care.
"""

import functools
import importlib.resources
import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from radonc_jax.data.phrases import BENIGN, SITES
from radonc_jax.tasks.regimen import DOSE_TOLERANCE_GY

FOLLOWS_CUE = 0.58
OMITS_SUBSITE = 0.08  # the coder saw the subsite, the note names only the organ
OMITS_SIDE = 0.025
WRONG_SIDE = 0.008  # label noise: the note contradicts the code
OFFICIAL_WORDING = 0.06  # the place in the words of the code table

TASKS = ("regimen", "modality", "icd")

# Shares of what happens to a patient's records. "clean" alone is what a cohort keeps; the paper
# kept 7,903 of 15,724 cases and gives no shares of its reasons, so the others are our own choice.
KINDS = {
    "clean": 0.511,
    "several_diagnoses": 0.220,
    "several_courses": 0.078,
    "competing_plans": 0.050,
    "no_primary": 0.022,
    "no_diagnosis_text": 0.018,
    "no_prescription": 0.026,
    "no_modality": 0.018,
    "modality_contradiction": 0.015,
    "no_code": 0.022,
    "invalid_code": 0.020,
}


# ---------------------------------------------------------------------------------------------
# The law of a site
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A subsite: its code (right, left) or its one code, and how notes word it."""

    codes: tuple[str, ...]
    weight: float
    wordings: tuple[str, ...]
    target: str
    fixed_side: str | None  # the wording itself tells the side ("RML")
    sided_target: bool

    @property
    def sides(self) -> tuple[str | None, ...]:
        return ("right", "left") if "{side}" in self.wordings[0] else (None,)

    def code(self, side: str | None) -> str:
        return self.codes[-1] if side == "left" else self.codes[0]

    def treated(self, side: str | None) -> tuple[str, str | None]:
        """(target, side) of the regimen."""
        return self.target, side if self.sided_target else self.fixed_side


@dataclass(frozen=True)
class Option:
    """A primary regimen of the site. Doses in Gy, or Gy(RBE) for protons."""

    dose: float
    fractions: int
    technique: str
    modality: str
    times_a_day: int
    target: str | None  # treats this instead of the place


@dataclass(frozen=True)
class Cue:
    wordings: tuple[str, ...]
    ages: tuple[int, int]


@dataclass(frozen=True)
class Latent:
    """What is true of a patient's disease and primary plan, and how the note prints the place."""

    law: "SiteLaw"
    place: int
    side: str | None
    printed: tuple[int, str | None, bool]  # place, side, official wording
    cue: int
    option: int
    sex: str
    age: int

    @property
    def code(self) -> str:
        return self.law.places[self.place].code(self.side)

    @property
    def regimen(self) -> Option:
        return self.law.options[self.option]

    @property
    def treated(self) -> tuple[str, str | None]:
        return self.law.treated(self.place, self.side, self.option)


def _technique(text: str, modality: str) -> str:
    """The technique of sites.json in a form that one plan would carry."""
    for mark, name in (
        ("ocular proton", "ocular proton"),
        ("PBS", "PBS"),
        ("IOERT", "IOERT"),
        ("TSEBT", "TSEBT"),
        ("I-125 permanent", "LDR I-125 seeds"),
        ("Pd-103", "LDR Pd-103 seeds"),
        ("plaque", "I-125 plaque"),
        ("electronic", "electronic brachytherapy"),
        ("HDR", "HDR"),
        ("fSRS", "fSRS"),
        ("SRS", "SRS"),
        ("SBRT", "SBRT"),
        ("WBRT", "WBRT"),
        ("tangents", "3DCRT tangents"),
        ("AP/PA", "AP/PA"),
        ("VMAT", "VMAT"),
        ("IMRT", "IMRT"),
        ("3D", "3DCRT"),
    ):
        if mark in text and not (modality == "electron" and name in ("VMAT", "IMRT", "3DCRT")):
            return name
    common = {"photon": "VMAT", "proton": "PBS", "electron": "electrons", "brachytherapy": "HDR"}
    return common[modality]


class SiteLaw:
    """The joint law of place, printed place, cue and regimen at one site; all of it finite."""

    def __init__(self, key: str, weight: float, site: dict, phrases: dict, regimens: list[dict]):
        self.key = key
        self.weight = weight
        self.sexes = "FM" if phrases["sex"] == "*" else phrases["sex"]
        self.ages = phrases["age"]
        self.general = phrases.get("general", False)
        self.phased = phrases.get("phased", 0.0)
        self.wordings = {
            name: phrases[name].split("|") for name in ("histology", "stages", "history", "biology")
        }
        self.places = [self._place(phrases["target"], *entry) for entry in phrases["places"]]
        override = phrases.get("override", {})
        self.options = [
            Option(
                dose=float(regimen["total_gy"]),
                fractions=regimen["fractions"],
                technique=_technique(regimen["technique"], regimen["modality"]),
                modality=regimen["modality"],
                times_a_day=2 if "BID" in regimen["technique"] else 1,
                target=override.get(index),
            )
            for index, regimen in enumerate(regimens)
        ]
        self.cues = [self._cue(text) for text in phrases["cues"]]
        if len(self.cues) != len(self.options):
            raise ValueError(
                f"site {key}: {len(self.cues)} cues for {len(self.options)} primary regimens; "
                "phrases.py needs one cue per primary regimen of sites.json, in its order"
            )
        self.extra_phases = [r for r in site["regimens"] if r["role"] == "phase"]
        self.boosts = [r for r in site["regimens"] if r["role"] == "boost"]
        self.shares = self._shares(site["modality_mix_pct"])
        weights = np.array([place.weight for place in self.places], dtype=float)
        self.place_shares = weights / weights.sum()

    @staticmethod
    def _place(default: str, codes: str, weight: float, wordings: str, target: str | None = None):
        codes, target = tuple(codes.split()), default if target is None else target
        without_side = target.startswith("=")
        target = target.removeprefix("=") or default
        fixed = target.split()[0] if target.split()[0] in ("right", "left") else None
        if fixed:
            target = target.removeprefix(fixed).strip()
        return Place(
            codes, weight, tuple(wordings.split("|")), target, fixed,
            sided_target=len(codes) == 2 and not without_side,
        )  # fmt: skip

    def _cue(self, text: str) -> Cue:
        # Wordings of one cue share the narrowest of their age limits, or the printed age would
        # tell the wordings apart.
        low, high = self.ages
        wordings = []
        for wording in text.split("|"):
            wording, _, limits = wording.partition("@")
            wordings.append(wording)
            if limits:
                least, most = map(int, limits.split("-"))
                low, high = max(low, least), min(high, most)
        return Cue(tuple(wordings), (low, high))

    def _shares(self, mix: dict[str, float]) -> np.ndarray:
        """Share of each option: the modality mix, and Zipf-like by order within a modality."""
        seen: dict[str, int] = defaultdict(int)
        raw = []
        for option in self.options:
            seen[option.modality] += 1
            raw.append(seen[option.modality] ** -0.8)
        totals: dict[str, float] = defaultdict(float)
        for option, value in zip(self.options, raw, strict=True):
            totals[option.modality] += value
        shares = np.array(
            [
                mix.get(option.modality, 1) * value / totals[option.modality]
                for option, value in zip(self.options, raw, strict=True)
            ]
        )
        return shares / shares.sum()

    def treated(self, place: int, side: str | None, option: int) -> tuple[str, str | None]:
        """(target, side) that the regimen names."""
        other = self.options[option].target
        return (other, None) if other else self.places[place].treated(side)

    def option_shares(self, cue: int) -> np.ndarray:
        """P(regimen | cue)."""
        shares = (1 - FOLLOWS_CUE) * self.shares
        shares[cue] += FOLLOWS_CUE
        return shares

    @functools.cache  # noqa: B019 (the laws live as long as the process)
    def printings(self, place: int, side: str | None) -> dict[tuple[int, str | None, bool], float]:
        """P(printed place, printed side, official wording | place, side)."""
        last = len(self.places) - 1
        here = self.places[place]
        shares: dict[tuple[int, str | None, bool], float] = defaultdict(float)
        rest = 1.0
        if self._has_official_wording(place):
            shares[place, side if len(here.codes) == 2 else None, True] += OFFICIAL_WORDING
            rest -= OFFICIAL_WORDING
        # A male patient's sex would give away what "right breast" leaves open.
        male_breast = here.codes[0].startswith("C50.92")
        if self.general and place != last and not male_breast:
            side_of_organ = side or here.fixed_side
            known = side_of_organ if self.places[last].sides != (None,) else None
            shares[last, known, False] += OMITS_SUBSITE
            rest -= OMITS_SUBSITE
        if side is not None:
            shares[place, None, False] += OMITS_SIDE
            rest -= OMITS_SIDE
            if len(here.codes) == 2:
                shares[place, "left" if side == "right" else "right", False] += WRONG_SIDE
                rest -= WRONG_SIDE
        shares[place, side, False] += rest
        return dict(shares)

    def _has_official_wording(self, place: int) -> bool:
        # Only where the description says as much as the wordings do: one place per code, and both
        # sides told apart.
        here = self.places[place]
        if len(set(here.codes)) < len(here.codes):
            return False
        return sum(bool(set(here.codes) & set(other.codes)) for other in self.places) == 1

    @functools.cache  # noqa: B019
    def posterior(
        self, printed: tuple[int, str | None, bool]
    ) -> list[tuple[int, str | None, float]]:
        """P(place, side | what the note prints of the place)."""
        found = []
        for index, place in enumerate(self.places):
            for side in place.sides:
                share = self.printings(index, side).get(printed, 0.0)
                if share:
                    prior = self.place_shares[index] / len(place.sides)
                    found.append((index, side, prior * share))
        total = sum(weight for _, _, weight in found)
        return [(index, side, weight / total) for index, side, weight in found]

    @functools.cache  # noqa: B019
    def ceiling(self, printed: tuple[int, str | None, bool], cue: int) -> dict[str, float]:
        """Best reachable probability of a right answer per task, given what the note prints.

        `regimen` is under strict accuracy: target with side and fractions equal, total dose within
        DOSE_TOLERANCE_GY; `modality` and `icd` under equality.
        """
        codes: dict[str, float] = defaultdict(float)
        regimens: dict[tuple, dict[float, float]] = defaultdict(lambda: defaultdict(float))
        shares = self.option_shares(cue)
        for place, side, weight in self.posterior(printed):
            codes[self.places[place].code(side)] += weight
            for index, option in enumerate(self.options):
                named = (*self.treated(place, side, index), option.fractions)
                regimens[named][option.dose] += weight * shares[index]
        modalities: dict[str, float] = defaultdict(float)
        for index, option in enumerate(self.options):
            modalities[option.modality] += shares[index]
        return {
            "regimen": max(_best_dose(doses) for doses in regimens.values()),
            "modality": max(modalities.values()),
            "icd": max(codes.values()),
        }

    def draw(self, rng: np.random.Generator, sex: str | None = None, age: int | None = None):
        """One latent record; of a patient already known, with this sex and age."""
        place = _index(rng, self.place_shares)
        sides = self.places[place].sides
        side = sides[_below(rng, len(sides))]
        printings = self.printings(place, side)
        printed = list(printings)[_index(rng, np.array(list(printings.values())))]
        cue = _index(rng, self.shares)
        option = _index(rng, self.option_shares(cue))
        if sex is None:
            sex = self.sexes[_below(rng, len(self.sexes))]
        if self.places[place].codes[0].startswith("C50.92"):
            sex = "M"
        if age is None:
            low, high = self.cues[cue].ages
            age = low + _below(rng, high - low + 1)
        return Latent(self, place, side, printed, cue, option, sex, age)


def _best_dose(doses: dict[float, float]) -> float:
    """The largest share that one stated dose can meet within the tolerance."""
    stated = [dose + shift for dose in doses for shift in (0.0, DOSE_TOLERANCE_GY)]
    reach = DOSE_TOLERANCE_GY + 1e-9
    return max(
        sum(share for dose, share in doses.items() if abs(dose - centre) <= reach)
        for centre in stated
    )


def _below(rng: np.random.Generator, n: int) -> int:
    return int(rng.random() * n)


def _index(rng: np.random.Generator, shares: np.ndarray) -> int:
    return min(int(np.searchsorted(np.cumsum(shares), rng.random(), side="right")), len(shares) - 1)


def _pick(rng: np.random.Generator, choices):
    return choices[_below(rng, len(choices))]


@functools.cache
def _design() -> dict:
    text = importlib.resources.files("radonc_jax.data").joinpath("sites.json").read_text("utf-8")
    return json.loads(text)


@functools.cache
def site_laws() -> tuple[SiteLaw, ...]:
    """One law per site of sites.json (the benign conditions are a site each)."""
    laws = []
    for site in _design()["sites"]:
        primary = [r for r in site["regimens"] if r["role"] == "primary"]
        if site["key"] == "benign":
            for part in BENIGN:
                chosen = [primary[i] for i in part["regimens"]]
                weight = site["weight"] * part["share"]
                laws.append(SiteLaw(f"benign_{part['name']}", weight, site, part, chosen))
        else:
            laws.append(SiteLaw(site["key"], site["weight"], site, SITES[site["key"]], primary))
    return tuple(laws)


# ---------------------------------------------------------------------------------------------
# The diagnosis text
# ---------------------------------------------------------------------------------------------

_TEMPLATES = (
    "{who} with {histology}, {place}, {stages}, {history}. {cue}. {biology}.",
    "{histology}, {place}; {stages}; {history}; {cue}; {biology}. {who}.",
    "Dx: {histology}, {place}. Stage: {stages}. Hx: {history}. {cue}. {biology}. {who}.",
    "{place}: {histology}, {stages}, {history}, {cue}. {who}, {biology}.",
)
_REMARKS = (
    "Presents to discuss treatment options",
    "Hypertension, well controlled",
    "Type 2 diabetes on metformin",
    "Reviewed at multidisciplinary conference",
    "No known drug allergies",
    "Former smoker, quit 10 years ago",
    "Lives with family, good support",
    "Hyperlipidemia on statin",
    "Labs within normal limits",
    "Outside pathology reviewed and agreed",
    "Symptoms stable since last visit",
    "Hypothyroidism on replacement",
    "Imaging reviewed with the patient",
    "Osteoarthritis of both knees",
    "Family history not contributory",
    "Atrial fibrillation on apixaban",
)
_TYPOS = {
    "carcinoma": "carcinmoa",
    "metastatic": "metastaic",
    "resection": "resecton",
    "negative": "negatve",
    "positive": "postive",
    "concurrent": "concurent",
    "lesion": "leison",
    "residual": "resdiual",
    "with": "wiht",
}
_SIDE_WORDS = {
    "right": ("right", "right", "right", "R", "Rt"),
    "left": ("left", "left", "left", "L", "Lt"),
}


def _place_wordings(law: SiteLaw, printed: tuple[int, str | None, bool]) -> list[str]:
    """Every wording that can stand for what is printed of the place, sides still open."""
    index, side, official = printed
    place = law.places[index]
    if official:
        return [_design()["icd_description"][place.code(side)]]
    if "{side}" in place.wordings[0] and side is None:
        return [place.wordings[0].replace("{side} ", "")]
    return list(place.wordings)


def _print_place(rng: np.random.Generator, latent: Latent) -> str:
    wording = _pick(rng, _place_wordings(latent.law, latent.printed))
    side = latent.printed[1]
    if side is None:
        return wording
    word = _pick(rng, _SIDE_WORDS[side])
    return wording.replace("{side}", word).replace("{S}", side[0].upper())


def _printed_age(latent: Latent) -> int:
    # An age over 89 identifies a person under HIPAA Safe Harbor, and a plain extract holds nothing
    # that `deidentify` would have to stop. The draw itself stays as it is: ceilings are unmoved.
    return min(latent.age, 89)


def _print_who(rng: np.random.Generator, sex: str, age: int) -> str:
    long, short = {"F": ("female", "woman"), "M": ("male", "man")}[sex]
    return _pick(rng, (f"{age} yo {long}", f"{age} y/o {long}", f"{age}-year-old {short}"))


def print_diagnosis(rng: np.random.Generator, latent: Latent) -> str:
    """A clinic's note on the record: place and cue in one of their wordings, the rest at random."""
    parts = {name: _pick(rng, choices) for name, choices in latent.law.wordings.items()}
    text = _pick(rng, _TEMPLATES).format(
        who=_print_who(rng, latent.sex, _printed_age(latent)),
        place=_print_place(rng, latent),
        cue=_pick(rng, latent.law.cues[latent.cue].wordings),
        **parts,
    )
    amount = rng.random()
    remarks = 0 if amount < 0.45 else 1 if amount < 0.78 else 2 if amount < 0.93 else 0
    if amount >= 0.93:
        remarks = 4 + _below(rng, 9)  # the long tail: whole consultation notes
    for index in rng.permutation(len(_REMARKS))[:remarks] if remarks else ():
        text += f" {_REMARKS[index]}."
    text = re.sub(r"(^|\. )([a-z])", lambda m: m[1] + m[2].upper(), text)
    if rng.random() < 0.08:
        present = [word for word in _TYPOS if word in text]
        if present:
            word = _pick(rng, present)
            text = text.replace(word, _TYPOS[word], 1)
    style = rng.random()
    if style < 0.05:
        text = text.upper()
    elif style < 0.14:
        text = text.lower()
    elif style < 0.18:
        text = text.replace(". ", ".\n")
    return text


# ---------------------------------------------------------------------------------------------
# The plan rows
# ---------------------------------------------------------------------------------------------


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def print_prescription(
    rng: np.random.Generator, regimen: Option, site: str, with_technique: bool = True
) -> str:
    """A regimen as free text, in one of the styles that clinics write; `site` names the target."""
    dose, fractions = regimen.dose, regimen.fractions
    # Without a technique the unit must not tell the modality either.
    unit = "Gy(RBE)" if regimen.modality == "proton" and with_technique else "Gy"
    twice = " BID" if regimen.times_a_day == 2 else ""
    technique = f", {regimen.technique}" if with_technique else ""
    if regimen.technique.startswith("LDR") and with_technique and rng.random() < 0.5:
        return f"{regimen.technique} implant {_number(dose)} Gy"
    each = round(dose / fractions, 2)
    styles = [
        f"{_capital(site)}, {_number(dose)} {unit} in {fractions} fractions{twice}{technique}",
        f"{_number(dose * 100)} c{unit} in {fractions} fx{twice} to {site}{technique}",
        f"{_number(dose)} {unit} / {fractions} fractions{twice}{technique}",
        f"{_number(dose)}{unit}/{fractions}fx{twice}{technique}",
    ]
    if fractions > 1 and abs(each * fractions - dose) < 1e-6:
        styles.append(f"{_number(each)} {unit} x {fractions}{twice} to {site}{technique}")
    return _pick(rng, styles)


_ENERGIES = {
    "photon": ("6 MV", "6X", "10 MV", "6 MV FFF"),
    "proton": ("",),
    "electron": ("6 MeV", "9 MeV", "12 MeV"),
    "brachytherapy": ("",),
}
_MODALITY_WORDS = {
    "photon": ("Photon", "photons", "X-ray", "PHOTON"),
    "proton": ("Proton", "protons", "PROTON"),
    "electron": ("Electron", "electrons", "ELECTRON"),
    "brachytherapy": ("Brachytherapy", "Brachy", "BRACHYTHERAPY"),
}


def _site_text(rng: np.random.Generator, treated: tuple[str, str | None]) -> str:
    target, side = treated
    return target if side is None else f"{_pick(rng, _SIDE_WORDS[side])} {target}"


def _plan_row(
    rng: np.random.Generator, regimen: Option, treated: tuple[str, str | None], *,
    course: int, plan: int, start_day: int, intent: str = "Primary", status: str = "Completed",
    suffix: str = "",
) -> dict[str, str]:  # fmt: skip
    site = _site_text(rng, treated)
    name = f"{(treated[1] or '')[:1]} {treated[0]}".strip().upper()[:16].strip()
    hidden = rng.random() < 0.22  # the modality stands in technique and energy alone
    written = rng.random() >= 0.06  # dose and fractions stand in the prescription alone
    return {
        "course_id": f"C{course}",
        "plan_id": f"PL{plan}",
        "plan_name": f"{name}{suffix}",
        "plan_status": status,
        "plan_intent": intent if rng.random() >= 0.1 or not suffix else "",
        "treatment_site": _capital(site) if rng.random() < 0.7 else site,
        "prescription": print_prescription(rng, regimen, site),
        "technique": regimen.technique,
        "energy": _pick(rng, _ENERGIES[regimen.modality]),
        "modality": "" if hidden else _pick(rng, _MODALITY_WORDS[regimen.modality]),
        "total_dose_cgy": _number(regimen.dose * 100) if written else "",
        "fractions": str(regimen.fractions) if written else "",
        "start_day": str(start_day),
    }


def _clean_rows(rng: np.random.Generator, latent: Latent, start_day: int) -> list[dict[str, str]]:
    """The primary plan with, sometimes, what a cohort has to tell from it."""
    regimen, treated = latent.regimen, latent.treated
    rows, plan = [], 1
    extra = rng.random()
    if extra < 0.06:
        other = latent.law.options[_index(rng, latent.law.shares)]
        rows.append(
            _plan_row(rng, other, treated, course=1, plan=plan, start_day=start_day - 9,
                      status=_pick(rng, ("Cancelled", "Unapproved", "Rejected")))
        )  # fmt: skip
        plan += 1
    elif extra < 0.11:
        rows.append(
            _plan_row(rng, regimen, treated, course=1, plan=plan, start_day=start_day - 4,
                      status=_pick(rng, ("Superseded", "Replanned", "Retired")))
        )  # fmt: skip
        plan += 1
    rows.append(_plan_row(rng, regimen, treated, course=1, plan=plan, start_day=start_day))
    if latent.law.boosts and regimen.modality != "brachytherapy" and rng.random() < 0.4:
        rows.append(_boost_row(rng, latent, plan + 1, start_day + 28))
    return rows


def _regimen_of(entry: dict) -> Option:
    """An entry of sites.json that is no primary regimen (a phase, a boost)."""
    technique = _technique(entry["technique"], entry["modality"])
    return Option(
        float(entry["total_gy"]), entry["fractions"], technique, entry["modality"], 1, None
    )


def _boost_row(rng: np.random.Generator, latent: Latent, plan: int, start_day: int):
    boosts = latent.law.boosts
    regimen = _regimen_of(_pick(rng, boosts)) if boosts else latent.regimen
    return _plan_row(
        rng, regimen, latent.treated, course=1, plan=plan, start_day=start_day,
        intent="Boost", suffix=_pick(rng, (" BST", " BOOST", " CD")),
    )  # fmt: skip


def _print_code(rng: np.random.Generator, code: str) -> str:
    style = rng.random()
    return code if style < 0.86 else code.replace(".", "") if style < 0.95 else code.lower()


def _invalid_code(rng: np.random.Generator, code: str) -> str:
    """What exports hold instead of a leaf: a header, an invented digit, another code system."""
    header = code[:5] if len(code) > 5 else f"{code[:3]}.0X9" if "." not in code else code[:3]
    return _pick(rng, (header, header, f"{code[:3]}.ZZ", "174.9", "see chart"))


def _add_leak(rng: np.random.Generator, text: str, latent: Latent) -> str:
    """Sometimes the code or the answer stands in the note itself, as in real exports."""
    draw, regimen = rng.random(), latent.regimen
    if draw < 0.03:
        return f"{text} {_pick(rng, ('({})', 'ICD-10: {}', '[{}]')).format(latent.code)}"
    if draw < 0.04:
        return f"{text} Planned {_number(regimen.dose)} Gy in {regimen.fractions} fractions."
    if draw < 0.047:
        return f"{text} Referred for {regimen.modality} therapy."
    return text


def _patient_rows(rng: np.random.Generator, kind: str, latent: Latent) -> list[dict[str, str]]:
    """All rows of one patient: plan rows with the patient's and the diagnosis' columns."""
    start_day = 20 + _below(rng, 3000)
    regimen, treated, law = latent.regimen, latent.treated, latent.law
    diagnosis = _add_leak(rng, print_diagnosis(rng, latent), latent)
    common = {
        "diagnosis_id": "D1",
        "age": str(_printed_age(latent)),
        "sex": latent.sex,
        "site": law.key,
        "diagnosis": diagnosis,
        "icd10": _print_code(rng, latent.code),
    }

    def plan(option=regimen, course=1, number=1, day=start_day, **keywords):
        return _plan_row(
            rng, option, treated, course=course, plan=number, start_day=day, **keywords
        )

    if kind == "several_courses":
        again = law.options[_index(rng, law.shares)]
        rows = [plan(), plan(again, 2, 2, start_day + 90 + _below(rng, 700))]
    elif kind == "competing_plans":
        other = law.options[_index(rng, law.shares)]
        rows = [plan(), plan(other, 1, 2, start_day + _below(rng, 12))]
    elif kind == "phases":
        phases = [_regimen_of(entry) for entry in law.extra_phases]
        first = next((p for p in phases if p.modality != "brachytherapy"), regimen)
        second = next((p for p in reversed(phases) if p.modality == "brachytherapy"), regimen)
        rows = [plan(first), plan(second, 1, 2, start_day + 35)]
    elif kind == "no_primary":
        if law.boosts and rng.random() < 0.5:
            rows = [_boost_row(rng, latent, 1, start_day)]
        else:
            rows = [plan(status=_pick(rng, ("Cancelled", "Unapproved", "Rejected")))]
    else:
        rows = _clean_rows(rng, latent, start_day)
        primary = next(
            row
            for row in rows
            if row["plan_status"] == "Completed" and "B" not in row["plan_intent"]
        )
        if kind == "no_diagnosis_text":
            common["diagnosis"] = _pick(rng, ("", "", "-", "n/a"))
        elif kind == "no_prescription":
            primary |= {"prescription": _pick(rng, ("", "TBD", "see plan")), "total_dose_cgy": ""}
            primary["fractions"] = ""
        elif kind == "no_modality":
            text = print_prescription(rng, regimen, treated[0], with_technique=False)
            primary |= {"modality": "", "technique": "", "energy": "", "prescription": text}
        elif kind == "modality_contradiction":
            other = "Electron" if regimen.modality != "electron" else "Proton"
            primary |= {"modality": other, "technique": regimen.technique}
            if regimen.modality == "photon":
                primary["energy"] = "6 MV"
        elif kind == "no_code":
            common["icd10"] = ""
        elif kind == "invalid_code":
            common["icd10"] = _invalid_code(rng, latent.code)
    return [common | row for row in rows]


COLUMNS = (
    "patient_id", "diagnosis_id", "course_id", "plan_id", "plan_name", "plan_status",
    "plan_intent", "age", "sex", "site", "diagnosis", "icd10", "treatment_site", "prescription",
    "technique", "energy", "modality", "total_dose_cgy", "fractions", "start_day",
)  # fmt: skip


@dataclass(frozen=True)
class Extract:
    """`table`: the raw rows, all columns text. `ceiling`: patient_id and a column per task, the
    best reachable probability of a right answer, for the clean patients. `latents`: what is true
    of each clean patient."""

    table: pd.DataFrame
    ceiling: pd.DataFrame
    latents: dict[str, Latent]


def draw_kind(rng: np.random.Generator, law: SiteLaw) -> str:
    """What happens to a patient's records; some sites treat in phases that compete as primary."""
    if rng.random() < law.phased:
        return "phases"
    return list(KINDS)[_index(rng, np.array(list(KINDS.values())))]


def make_extract(cases: int, seed: int) -> Extract:
    """Draws `cases` patients. The same arguments give the same extract, bit for bit.

    Raises:
      ValueError: `cases` is not positive or `seed` is negative.
    """
    if cases < 1:
        raise ValueError(f"cases must be at least 1, not {cases}; raise --cases")
    if seed < 0:
        raise ValueError(f"seed must not be negative, it is {seed}; choose another --seed")
    rng = np.random.Generator(np.random.PCG64(seed))
    laws = site_laws()
    weights = np.array([law.weight for law in laws])
    weights /= weights.sum()
    rows, ceilings, latents = [], [], {}
    for number in range(1, cases + 1):
        patient = f"SYN{number:07d}"
        law = laws[_index(rng, weights)]
        latent = law.draw(rng)
        kind = draw_kind(rng, law)
        own = _patient_rows(rng, kind, latent)
        if kind == "several_diagnoses":
            for index in range(2, 3 + (rng.random() < 0.2)):
                own += _another_diagnosis(rng, laws, weights, latent, index)
        rows += [{"patient_id": patient} | row for row in own]
        if kind == "clean":
            ceilings.append({"patient_id": patient} | law.ceiling(latent.printed, latent.cue))
            latents[patient] = latent
    ceiling = pd.DataFrame(ceilings, columns=["patient_id", *TASKS])
    return Extract(pd.DataFrame(rows, columns=list(COLUMNS)), ceiling, latents)


def _another_diagnosis(rng, laws, weights, first: Latent, index: int) -> list[dict[str, str]]:
    """A further diagnosis of the same person: another site that the sex and age allow."""
    while True:
        law = laws[_index(rng, weights)]
        if law.key == first.law.key or first.sex not in law.sexes:
            continue
        latent = law.draw(rng, sex=first.sex, age=first.age)
        low, high = law.cues[latent.cue].ages
        # Ages at the edge fit few sites; a decade of slack keeps the search short.
        if latent.sex == first.sex and low - 10 <= first.age <= high + 10:
            break
    rows = _patient_rows(rng, "clean", latent)
    for row in rows:
        row |= {"diagnosis_id": f"D{index}", "course_id": f"C{index}"}
        row["plan_id"] = f"{row['plan_id']}-{index}"
    return rows


DEFINITIONS = {
    "cases": "patients with one diagnosis and a complete, unambiguous primary plan",
    "regimen": "mean over cases of the largest probability, given the diagnosis text, that one "
    "regimen is strictly right: target and side and fractions equal, total dose within "
    f"{DOSE_TOLERANCE_GY} Gy",
    "modality": "the same for the modality, under equality",
    "icd": "the same for the ICD-10-CM code, under equality",
}


def mean_ceiling(ceiling: pd.DataFrame) -> dict[str, float]:
    """Best reachable accuracy per task over these cases."""
    return {task: math.fsum(ceiling[task]) / len(ceiling) for task in TASKS}


def ceiling_paths(extract: Path) -> tuple[Path, Path]:
    """Where the ceilings of an extract file lie: the summary and the values per patient."""
    return Path(f"{extract}.ceiling.json"), Path(f"{extract}.ceiling.parquet")


def write_extract(extract: Extract, path: Path) -> dict[str, float]:
    """Writes the CSV and beside it the ceilings; returns the mean ceiling per task.

    Raises:
      ValueError: no patient is clean, so that there is no ceiling to tell.
      FileNotFoundError: the folder of `path` does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder to write {path.name} to; create it")
    if extract.ceiling.empty:
        raise ValueError("no patient of this extract is clean enough for a cohort; raise --cases")
    summary, per_patient = ceiling_paths(path)
    means = mean_ceiling(extract.ceiling)
    extract.table.to_csv(path, index=False, lineterminator="\n", encoding="utf-8")
    extract.ceiling.to_parquet(per_patient, index=False)
    content = {**means, "cases": len(extract.ceiling), "definitions": DEFINITIONS}
    summary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return means
