"""Task `regimen`: the treatment regimen as free text, and the parser that makes it comparable.

`parse_regimen` reads the ways clinics write a course; `render_regimen` writes the one canonical
way ("Right breast, 40.05 Gy in 15 fractions, 3DCRT tangents"). Reading a canonical text gives
back the regimen it was rendered from.
"""

import functools
import re
from dataclasses import dataclass, field, replace

from radonc_jax.tasks.base import Record, Task, answer_section
from radonc_jax.tasks.modality import normalise_modality

DOSE_TOLERANCE_GY = 0.5  # strict accuracy: total doses this close count as the same
LONGEST = 4000  # characters of a regimen's text


@dataclass(frozen=True)
class Regimen:
    """One course. Doses in Gy, or Gy(RBE) when the modality is proton.

    `total_dose_gy` and `fractions` are those of the first phase; the phases after it are summed as
    its boost. A target is spelled without its side and without an initial capital ("breast", "PA
    nodes").

    `conflict` tells what a text contradicts itself about: "dose_per_fraction" ("60 Gy in 30
    fractions of 1.8 Gy", "50 Gy in 25-28 fractions"), "sum" ("66 Gy = 45 Gy + 15 Gy"),
    "other_dose" (a dose that may be no boost: "60 Gy in 30 fractions, cord max 45 Gy") or "side"
    ("right lung and left adrenal"). It is no part of the regimen: two regimens are equal without
    it. An answer with one is not right (`contradicts`).
    """

    target: str | None
    side: str | None = None  # "left", "right" or "bilateral"
    total_dose_gy: float | None = None
    fractions: int | None = None
    technique: str | None = None
    modality: str | None = None
    times_a_day: int = 1
    boost_dose_gy: float | None = None
    boost_fractions: int | None = None
    conflict: str | None = field(default=None, compare=False)

    @property
    def dose_per_fraction_gy(self) -> float | None:
        """Of the first phase, to the cGy; None where its dose or fractions are not known."""
        if self.total_dose_gy is None or not self.fractions:
            return None
        return round(self.total_dose_gy / self.fractions, 2)

    @property
    def course_dose_gy(self) -> float | None:
        """First phase and boost together."""
        if self.total_dose_gy is None:
            return None
        return round(self.total_dose_gy + (self.boost_dose_gy or 0), 4)

    @property
    def implant(self) -> bool:
        """Whether sources are implanted: LDR, seeds, a plaque, a permanent or named implant."""
        technique = self.technique or ""
        return self.modality == "brachytherapy" and _IMPLANT.search(technique) is not None


# ---------------------------------------------------------------------------------------------
# Doses
# ---------------------------------------------------------------------------------------------

# `_tidy` leaves four units, "N fx" for a number of fractions and "/fx" for "per fraction".
_UNIT = r"c?Gy(?:\(RBE\))?(?![A-Za-z])"
# A number that is no part of a range ("60-66 Gy") or of a list of dose levels after its first.
_DOSE = re.compile(
    r"(?<![\d.,/–-])(?P<dose>\d+(?:\.\d+)?)(?:\s?/\s?\d+(?:\.\d+)?)*"  # "70/63/56 Gy": the highest
    rf"\s?(?P<unit>{_UNIT})",
    re.IGNORECASE,
)
_BARE_DOSE = re.compile(  # "45/25" with no unit; more than one slash is a list of dose levels
    r"(?<![\d.,/\w-])(?P<dose>\d+(?:\.\d+)?)\s?/\s?(?P<count>\d{1,2})(?![\d./\w])(?P<words>\s?fx\b)?",
    re.IGNORECASE,
)
_NOT_COUNTED = r"(?![\d.])(?!\s?(?:weeks?|wks?|days?|months?|[cm]m|gy|cgy)\b)"
_COUNT = rf"(?P<count>\d{{1,2}}){_NOT_COUNTED}(?:\s?fx\b)?"
_AFTER_DOSE = tuple(
    (kind, re.compile(pattern, re.IGNORECASE))
    for kind, pattern in (
        # "2 Gy x 30", "7 Gy/fx x 3 fx": the dose is that of one fraction
        ("times", rf"\s?(?:/fx)?\s?[x*]\s?{_COUNT}"),
        # "2 Gy/fx, 30 fx"
        ("times", r"\s?/fx\s?[,;(]?\s?(?P<count>\d{1,2})\s?fx\b"),
        ("each", r"\s?/fx"),
        # "60 Gy in 2 Gy fractions", "60 Gy at 2 Gy/fx", "60 Gy = 2 Gy x 30", "60 Gy (2 Gy x 30)"
        (
            "of_each",
            r"(?:\s?total)?\s?(?:in|at|@|,|\(|=)\s?"
            rf"(?P<each>\d+(?:\.\d+)?)\s?(?P<each_unit>{_UNIT})"
            r"(?:\s?(?:/fx|fx\b|fractions?\b)(?:\s?[x*]\s?(?P<times>\d{1,2})(?![\d.])"
            r"|\s?(?:in|for|,)\s?(?P<later>\d{1,2})(?=\s?fx\b))?"
            r"|\s?[x*]\s?(?P<count>\d{1,2})(?![\d.]))(?:\s?fx\b)?",
        ),
        ("of_each", rf"\s?(?:at|@)\s?(?P<each>\d+(?:\.\d+)?)\s?(?P<each_unit>{_UNIT})"),
        # "60 Gy in 30 fractions of 2 Gy"
        (
            "of_each",
            r"(?P<words>(?:\s[a-z-]++){0,8}?)\s?(?:,|;|-)?\s?(?:in|/|over)?\s?"
            r"(?P<count>\d{1,2})\s?fx\s?(?:of|at|@|x)\s?"
            rf"(?P<each>\d+(?:\.\d+)?)\s?(?P<each_unit>{_UNIT})(?:\s?/fx|\seach\b)?",
        ),
        # "60 Gy in 30", "60 Gy/30fx", "1000 cGy boost/5 fx", "45 Gy to the pelvis in 25 fx"
        (
            "in",
            r"(?P<words>(?:\s[a-z-]++){0,8}?)\s?(?:,|;|-)?\s?(?:"
            rf"(?:in|/|over)\s?{_COUNT}|\(?(?<![a-z])(?P<plain>\d{{1,2}})\s?fx\b)",
        ),
        # "50.4 Gy; 1.8 Gy daily"
        ("daily", r"\s?daily\b(?!\s(?:fx|fractions?)\b)"),
    )
)
# "30 fractions of 2 Gy", "30 x 2 Gy"; "dose per fraction 2 Gy"
_BEFORE_DOSE = re.compile(
    r"(?<![\w.])(?P<count>\d{1,2})\s?(?:fx\s?(?:of|at|@|x)|[x*])\s?$", re.IGNORECASE
)
_EACH_BEFORE = re.compile(
    r"(?:(?:dose|gy)\s?/fx|(?:fraction(?:al)?|daily) dose)\s?(?:of|is|:|=)?\s?$", re.IGNORECASE
)
_FRACTIONS_AFTER = re.compile(r"\s?[,;]?\s?(?P<count>\d{1,2})\s?fx\b", re.IGNORECASE)
_TOTAL_BEFORE = re.compile(r"(?:\btotal(?: dose)?(?: of| is)?\s?[:=]?|=)\s?$", re.IGNORECASE)
# "in 25-28 fx", "25 or 28 fx": as little a number of fractions as a range of doses is a dose
_FRACTION_RANGE = re.compile(
    r"(?<![\d./-])(\d{1,2})\s?(?:-|\bto\b|\bor\b)\s?(\d{1,2})\s?fx\b", re.IGNORECASE
)
_EACH_TO = re.compile(r"\s?to\s(?:a\s)?(?:total\s(?:dose\s)?(?:of\s)?)?", re.IGNORECASE)
_ADDED = re.compile(r"\+|\bplus\b|\bthen\b|\bfollow|\bboost|\bphase\b|\bcone", re.IGNORECASE)
_BOOST = re.compile(r"\b(?:boost|cone-?\s?down)\b", re.IGNORECASE)
# "boost to 60 Gy" names the sum
_BOOST_TO = re.compile(
    r"\b(?:boost|cone-?\s?down)\s?to\s(?:a\s)?(?:total\s(?:dose\s)?(?:of\s)?)?$", re.IGNORECASE
)
_ARROW = re.compile(r"\s?-{1,2}>\s?")
# A dose beside these words limits, reports or precedes the course, and is no phase of it.
_NO_PHASE = re.compile(
    r"\b(?:max|maximum|dmax|min|minimum|mean|median|constraint|limit|tolerance|eqd2"
    r"|complet(?:ed?|ion)|stop(?:ped)?|held|hold|received|cumulative|instead"
    r"|prior|previous(?:ly)?|earlier)\b|\bdelivered\b(?!\s(?:with|by|via|using|to)\b)",
    re.IGNORECASE,
)
_EARLIER = re.compile(r"\b(?:prior|previous|previously|earlier)\b", re.IGNORECASE)
_INTEGRATED = re.compile(r"\bsib\b|\bintegrated\b|\bconcomitant boost\b", re.IGNORECASE)
_IMPLANT = re.compile(r"\bldr\b|\bseeds?\b|\bplaque\b|\bpermanent\b|\bimplant\b", re.IGNORECASE)
_ONE_FRACTION = re.compile(rf"{_IMPLANT.pattern}|\bsingle\b", re.IGNORECASE)
_MOST_A_DAY_GY = 5  # a larger dose beside "daily" or "x 15 days" may be the total
_MOST_ADDED_UP_GY = 90  # of a long boost after a shorter first phase
_MOST_EACH_GY = 34  # more than this is not given in one fraction outside an implant


def _grays(number: str, unit: str) -> float:
    value = float(number)
    return round(value / 100 if unit.casefold().startswith("c") else value, 4)


def _fractions_of(total: float, each: float) -> int | None:
    """Number of fractions when `total` is a whole multiple of `each`, rounding in print allowed."""
    count = round(total / each) if each else 0
    return count if count and abs(count * each - total) <= 0.005 * count + 1e-6 else None


def _agrees(total: float, fractions: int, each: float) -> bool:
    """Whether `each` is the dose of one fraction, printed to one decimal at least."""
    return abs(total / fractions - each) <= 0.05 + 1e-6


@dataclass(frozen=True)
class _Phase:
    """A dose as written: where it stands in the text, and what it says."""

    start: int
    end: int
    dose: float | None  # total of the phase
    fractions: int | None
    each: float | None = None  # dose of one fraction, where only that is written
    words: str = ""  # words that stood inside, such as "boost"
    conflict: str | None = None


def _read_phases(text: str) -> list[_Phase]:
    phases: list[_Phase] = []
    position = 0
    while (match := _DOSE.search(text, position)) is not None:
        phases.append(_read_phase(text, position, match))
        position = phases[-1].end
    if not phases:
        # Only where no unit is written at all: beside real doses "54/45" is a list of levels.
        for match in _BARE_DOSE.finditer(text):
            dose, count = float(match["dose"]), int(match["count"])
            if count and dose >= 500 and dose / count > _MOST_EACH_GY:
                dose /= 100  # "5040/28" is in cGy
            if match["words"] or (count and 1 <= dose / count <= _MOST_EACH_GY):
                phases.append(_Phase(match.start(), match.end(), dose, count or None))
    return phases


def _read_phase(text: str, position: int, match: re.Match) -> _Phase:
    """The dose of `match` with the fractions written around it, from `position` on."""
    dose = _grays(match["dose"], match["unit"])
    start, end = match.start(), match.end()
    if (before := _BEFORE_DOSE.search(text, position, start)) is not None:
        count = int(before["count"])
        return _Phase(before.start(), end, round(dose * count, 4), count or None)
    if (before := _EACH_BEFORE.search(text, position, start)) is not None:
        if (after := _FRACTIONS_AFTER.match(text, end)) is not None:  # ..., 30 fx"
            count = int(after["count"])
            return _Phase(
                before.start(), after.end(), round(dose * count, 4) or None, count or None
            )
        return _Phase(before.start(), end, None, None, dose)
    for kind, pattern in _AFTER_DOSE:
        after = pattern.match(text, end)
        if after is None:
            continue
        said = after.groupdict()
        counted = said.get("count") or said.get("plain") or said.get("times") or said.get("later")
        count = int(counted) or None if counted else None
        if kind == "daily" and dose > _MOST_A_DAY_GY:
            continue
        if kind in ("each", "daily"):
            return _Phase(start, after.end(), None, None, dose)
        if kind == "times":
            return _Phase(start, after.end(), round(dose * (count or 0), 4) or None, count)
        conflict = None
        if kind == "of_each":
            each = _grays(said["each"], said["each_unit"])
            if count is None:
                count = _fractions_of(dose, each)
            if count is None or not _agrees(dose, count, each):
                conflict = "dose_per_fraction"
        return _Phase(start, after.end(), dose, count, None, said.get("words") or "", conflict)
    return _Phase(start, end, dose, None)


def _merge_phases(text: str, phases: list[_Phase]) -> tuple[_Phase, _Phase | None]:
    """The first phase and its boost, with restatements, sums and dose levels resolved.

    "Total 60 Gy = 45 Gy + 15 Gy boost" names a sum before its parts, "..., total 60 Gy" after
    them; "60 Gy in 30 fractions (2 Gy per fraction)" repeats a phase by its fraction; "70 Gy, 63
    Gy and 56 Gy in 35 fractions" are the levels of one; "boost to 60 Gy" names the sum alone.
    """
    parts = _restated(text, phases)
    if not parts:
        return phases[0], None
    parts = _without_sum(text, parts)
    first, later = parts[0], parts[1:]
    conflict = next((part.conflict for part in parts if part.conflict), None)
    own = re.split(r"[,;]|\.\s", text[: first.start])[-1]
    # "prior WBRT 30 Gy/10 fx", "max dose 63 Gy, 60 Gy in 30 fx"
    if _EARLIER.search(own) or (later and _NO_PHASE.search(own)):
        conflict = conflict or "other_dose"
    first = replace(first, conflict=conflict)
    if not later:
        return first, None
    if _are_levels(text, first, later):
        return replace(first, fractions=later[-1].fractions), None
    if not all(_is_phase(text, phases, first, part) for part in later):
        return replace(first, conflict=conflict or "other_dose"), None
    return first, _sum_of_boosts(text, first, later)


def _restated(text: str, phases: list[_Phase]) -> list[_Phase]:
    """The phases that have a dose, each once: what repeats one in other words is joined to it."""
    parts: list[_Phase] = []
    each = previous = None  # `each` leads in the dose it belongs to: "1.8 Gy/fx, 50.4 Gy"
    for phase in phases:
        added = previous is not None and _ADDED.search(text[previous.end : phase.start])
        previous = phase
        if phase.dose is None:
            if parts and not added:
                parts[-1] = _with_each(parts[-1], phase.each)
            else:
                each = phase
            continue
        joined = None
        if each is not None:
            phase = replace(_with_each(phase, each.each), start=each.start)
            each = None
        elif parts and not added:
            joined = _join(text, parts[-1], phase)
        if joined is None:
            parts.append(phase)
        else:
            parts[-1] = joined
    return parts


def _with_each(phase: _Phase, each: float) -> _Phase:
    if phase.fractions is None:
        count = _fractions_of(phase.dose, each)
        return replace(phase, fractions=count, conflict=None if count else "dose_per_fraction")
    if _agrees(phase.dose, phase.fractions, each):
        return phase
    return replace(phase, conflict="dose_per_fraction")


def _join(text: str, one: _Phase, other: _Phase) -> _Phase | None:
    """Two doses that say the same phase as one, or None when they do not."""
    if abs(one.dose - other.dose) <= 0.005:
        counts = {count for count in (one.fractions, other.fractions) if count is not None}
        conflict = one.conflict or other.conflict or (len(counts) > 1 and "dose_per_fraction")
        fractions = one.fractions or other.fractions
        return replace(one, fractions=fractions, conflict=conflict or None)
    if one.fractions is None and _EACH_TO.fullmatch(text[one.end : other.start]):
        # "1.8 Gy to 50.4 Gy": what is given a fraction, and what it adds up to.
        count = _fractions_of(other.dose, one.dose)
        if count and count > 1 and other.fractions in (None, count):
            return replace(other, start=one.start, fractions=count)
    if _repeats(other, one):
        return one
    return replace(other, start=one.start) if _repeats(one, other) else None


def _is_marked_total(lead: str) -> bool:
    """Whether what leads to a dose calls it a sum: " = ", ", total ", but not " + total dose "."""
    if lead.rstrip().endswith("="):
        return True
    own = re.split(r"[,;(]", lead)[-1]
    return _TOTAL_BEFORE.search(own) is not None and not _ADDED.search(own)


def _without_sum(text: str, parts: list[_Phase]) -> list[_Phase]:
    """`parts` less the one that is the sum of the others.

    A part that is marked as a sum ("total", "=") and is none leaves a conflict behind.
    """
    for index, whole in enumerate(parts):
        rest = parts[:index] + parts[index + 1 :]
        right = len(rest) > 1 and abs(sum(part.dose for part in rest) - whole.dose) <= 0.05
        marked = (
            text[whole.end :].lstrip().startswith("=")
            if index == 0
            else _is_marked_total(text[parts[index - 1].end : whole.start])
        )
        if right:
            return rest
        if marked and (len(rest) > 1 or (index and not rest[0].conflict)):
            return [replace(rest[0], conflict="sum"), *rest[1:]]
    return parts


def _repeats(phase: _Phase, whole: _Phase) -> bool:
    """Whether `phase` is only the dose of one fraction of `whole`."""
    if phase.fractions is not None or whole.fractions is None:
        return False
    return abs(phase.dose * whole.fractions - whole.dose) <= 0.005 * whole.fractions


def _are_levels(text: str, first: _Phase, later: list[_Phase]) -> bool:
    """Whether the doses are levels given in the same fractions, which the last one names."""
    phases = [first, *later]
    return (
        later[-1].fractions is not None
        and all(p.fractions is None for p in phases[:-1])
        and all(a.dose > b.dose >= first.dose / 2 for a, b in zip(phases, later, strict=False))
        and not _ADDED.search(text[first.end : later[-1].start])
        and not _NO_PHASE.search(text[first.end : later[-1].start])
    )


def _more_fractions(first: _Phase, later: _Phase) -> int | None:
    """Fractions that `later` counts beyond those of `first`; None where it counts none more."""
    if first.fractions is None or later.fractions is None:
        return None
    return max(later.fractions - first.fractions, 0) or None


def _is_phase(text: str, phases: list[_Phase], first: _Phase, later: _Phase) -> bool:
    """Whether a later dose is surely given on top of the first one.

    It is called an addition ("+", "then", "boost"), or follows with nothing but a technique in
    between ("45 Gy in 25 fx; HDR 7 Gy x 4"). All else may be a limit, a report or another course.
    """
    lead = text[max(p.end for p in phases if p.end <= later.start) : later.start]
    following = min((p.start for p in phases if p.start >= later.end), default=len(text))
    tail = re.split(r"[,;+]|\.\s", text[later.end : following])[0]
    if _NO_PHASE.search(lead) or _NO_PHASE.search(tail):
        return False
    more = _more_fractions(first, later)
    if _ARROW.fullmatch(lead):  # "45 Gy/25 -> 50.4 Gy/28" names the sum
        return later.dose > first.dose and more is not None
    if _INTEGRATED.search(lead) or _INTEGRATED.search(tail) or _BOOST_TO.search(lead):
        return True
    if _ADDED.search(lead) or _BOOST.search(later.words) or _BOOST.search(tail):
        # "50 Gy in 25 fx, boost 60 Gy in 30 fx" may name the sum.
        longer = later.dose > first.dose and more is not None
        return not longer or later.dose + first.dose <= _MOST_ADDED_UP_GY
    _, separator, own = re.sub(r"[,:]", ";", lead).rpartition(";")
    return (
        bool(separator)
        and all(_is_technique(word) for word in own.split())
        and not re.search(r"\bto\b", tail)  # "Lung 60 Gy/30 fx, 30 Gy/10 fx to brain"
        and later.fractions not in (None, first.fractions)
        and later.dose < first.dose
    )


def _sum_of_boosts(text: str, first: _Phase, later: list[_Phase]) -> _Phase | None:
    """The later phases as one. An integrated boost adds what its level has over the first."""
    lead = text[first.end : later[0].start]
    dose = sum(p.dose for p in later)
    counts = [p.fractions for p in later]
    integrated = _INTEGRATED.search(lead) is not None
    names_sum = integrated or _BOOST_TO.search(lead) or _ARROW.fullmatch(lead)
    if len(later) == 1 and dose > first.dose and names_sum:
        dose -= first.dose
        counts = [None if integrated else _more_fractions(first, later[0])]
    elif integrated:
        return None  # lower levels of the same fractions
    return _Phase(
        later[0].start,
        later[-1].end,
        round(dose, 4),
        None if None in counts else sum(counts),
        None,
        later[0].words,
    )


# ---------------------------------------------------------------------------------------------
# Words: side, technique, target
# ---------------------------------------------------------------------------------------------

_TECHNIQUE_WORDS = frozenset(
    """
    2d 3d 3dcrt 3d-crt crt imrt vmat rapidarc arc arcs tomotherapy cyberknife hyperarc gamma knife
    tangent tangents fif field-in-field dibh gating 4dct igrt electron electrons photon photons
    proton protons pbs impt ioert iort tsebt sbrt sabr srs srt fsrs isrt inrt ebrt hdr ldr pdr
    brachy brachytherapy interstitial intracavitary implant seeds seed permanent plaque mono
    monotherapy multicatheter balloon catheters t&o t&r vcb i-125 pd-103 ir-192 cs-131 ru-106
    sib hypofx hypofractionated hyperfx hyperfractionated accelerated fractionated conventionally
    short-course short course palliative preop postop port definitive
    adjuvant salvage ap/pa bolus qod weekly daily x-ray x-rays stereotactic radiosurgery
    e- en-face ocular
    """.split()
)
_FILLER_WORDS = frozenset(
    "to the of a an in at with and for by via using total dose rt radiation radiotherapy therapy "
    "xrt then followed plus treatment course plan phase prescribed delivered boost from".split()
)
_NOT_TARGET = re.compile(
    r"\b\d+(?:\.\d+)?(?:-\d+)?\s?[cm]m\b(?:\s(?:depth|margin))?|\b\d{1,2} fx\b"
    r"|\b\d+(?:/\d+)*\s?(?:mv|mev|x)\b(?!\s?\d)"
    r"|\b(?:(?:and|with)\s)?(?:concurrent\s)?(?:chemo\w*|(?:cis|carbo)platin|temozolomide|tmz"
    r"|capecitabine|5-?fu|paclitaxel|adt)\b|\bdepth\b|[@=()\[\]<>]",
    re.IGNORECASE,
)
_MODALITY_ALONE = re.compile(r"(?:photon|proton|electron)s?|brachy(?:therapy)?", re.IGNORECASE)
_BID = re.compile(
    r"\b(?:bid|b\.i\.d\.?|twice[\s-](?:daily|(?:a|per)[\s-]day)|2x[\s/]*(?:daily|day)"
    r"|(?:x\s?)?(?<![\d.])2\s?(?:/|per\s|a\s)\s?day)(?!\w)",
    re.IGNORECASE,
)
# "1.5 Gy BID x 15 days", the schedule taken out
_TIMES_DAYS = re.compile(
    rf"(?<![\d.])(\d+(?:\.\d+)?)\s?({_UNIT})\s?[x*]\s?(\d{{1,2}})\s?days?\b", re.IGNORECASE
)
_TID = re.compile(r"\b(?:tid|t\.i\.d\.?|three times (?:daily|(?:a|per) day))(?!\w)", re.IGNORECASE)
_EYE = re.compile(r"\b(?:uvea|uveal|choroid|eye|orbit|globe|ocular|iris|ciliary|retina)", re.I)
_SIDE_NAMES = {
    "left": "left",
    "right": "right",
    "bilateral": "bilateral",
    "left-sided": "left",
    "right-sided": "right",
    "bilat": "bilateral",
    "bilat.": "bilateral",
    "bil": "bilateral",
    "both": "bilateral",
    "lt": "left",
    "lt.": "left",
    "l": "left",
    "l.": "left",
    "rt": "right",
    "rt.": "right",
    "r": "right",
    "r.": "right",
    "b": "bilateral",
    "b/l": "bilateral",
}
_PLAIN_SIDES = frozenset({"left", "right", "left-sided", "right-sided", "bilateral"})
_EYE_SIDES = {"OD": "right", "OS": "left", "OU": "bilateral"}
_LOBES = {  # abbreviations that hide a side
    "rul": ("right", "upper lobe of lung"),
    "rml": ("right", "middle lobe of lung"),
    "rll": ("right", "lower lobe of lung"),
    "lul": ("left", "upper lobe of lung"),
    "lll": ("left", "lower lobe of lung"),
}
_TARGET_WORDS = {
    "cw": "chest wall",
    "scv": "supraclavicular nodes",
    "wb": "whole breast",
    "wbi": "whole breast",
    "wbrt": "whole brain",
    "ha-wbrt": "whole brain",
}
# Where a dose is prescribed to, which is no organ: "85 Gy to apex", "20 Gy to the 80% line".
_POINT = re.compile(
    r"(?:the\s)?(?:apex|isocent(?:er|re)|dmax|surface|ptv|ctv|gtv|itv|cavity surface"
    r"|\d+(?:\.\d+)?\s?%(?:\s(?:isodose|idl))?(?:\sline)?)\s*$",
    re.IGNORECASE,
)
# A side in such words is of what is not treated now: "sparing right lung", "right lung V20 20 %",
# "prior right breast RT", "DIBH if left".
_NOT_TREATED = re.compile(
    r"\b(?:spar(?:e|ing)|avoid(?:ing|ance)?|block(?:ing)?|shield(?:ing)?|protect(?:ing)?|excluding"
    r"|if|no|not|without|prior|previous(?:ly)?|earlier|s/p|history|h/o|mean|max|maximum|limit)\s"
    r"(?:.*\s)?(?:left|right|[lr]t?)\b"
    r"|\b(?:left|right|[lr]t?)\s.*\b(?:spared|avoided|blocked|shielded|excluded|mean|max|maximum"
    r"|dmax|limit|constraint|[vd]\d+)\b",
    re.IGNORECASE,
)
# A segment that is a side and no more, as in "50 Gy in 25 fx to femur, left"
_SIDE_ALONE = re.compile(r"(?i:left|right|bilateral|bilat|both|lt)|L|R|Rt")
_SPINE = frozenset({"spine", "spinal"})  # "L spine" is the lumbar spine, not a left side


def _is_technique(word: str) -> bool:
    word = word.casefold()
    return word in _TECHNIQUE_WORDS or any(
        part in _TECHNIQUE_WORDS for part in re.split(r"[/+]", word) if part
    )


def _side_of(word: str, following: str | None, preceding: str | None, eye: bool) -> str | None:
    """The side that `word` states, told by its neighbours in the same segment."""
    if eye and word in _EYE_SIDES:
        return _EYE_SIDES[word]
    side = _SIDE_NAMES.get(word.casefold())
    if side is None or word.casefold() in _PLAIN_SIDES:
        return side
    # The abbreviations are sides only in front of what they describe: "L breast", but not
    # "L4", "L spine", "RT to breast" (radiotherapy) or "R 0"; or, in capitals, right behind it.
    if following is None:
        behind = preceding is not None and re.fullmatch(r"[A-Za-z]{3,}", preceding)
        return side if behind and word in ("L", "R", "Lt", "Rt", "LT") else None
    if not re.match(r"[A-Za-z]{2}", following):
        return None
    following = following.casefold()
    if following in _FILLER_WORDS or following in _SPINE or _is_technique(following):
        return None
    # In capitals RT is radiotherapy more often than a side.
    return None if word == "RT" else side


def _lower_first(text: str) -> str:
    """Without an initial capital, unless the first word is an abbreviation or has a number."""
    first = text.split(" ", 1)[0]
    return text[:1].lower() + text[1:] if first[1:].islower() else text


def _read_target(words: list[str], eye: bool) -> tuple[str | None, list[str]]:
    """(target, sides) of the words of one segment, technique words already taken out."""
    sides, kept = [], []
    for index, word in enumerate(words):
        following = words[index + 1] if index + 1 < len(words) else None
        found = _side_of(word, following, words[index - 1] if index else None, eye)
        if found is not None:
            sides.append(found)
        elif word.casefold() in _LOBES:
            lobe_side, target = _LOBES[word.casefold()]
            sides.append(lobe_side)
            kept.append(target)
        else:
            kept.append(_TARGET_WORDS.get(word.casefold(), word))
    while kept and kept[0].casefold() in _FILLER_WORDS:
        kept.pop(0)
    while kept and kept[-1].casefold() in _FILLER_WORDS:
        kept.pop()
    # A target is a name; a sentence in front of a dose is not one.
    if not 1 <= len(kept) <= 8 or not any(c.isalpha() for word in kept for c in word):
        return None, sides
    return _lower_first(" ".join(kept)), sides


def _sides_of_target(words: list[str], target: str, eye: bool) -> list[str]:
    """The sides in `words`, technique words taken out, where they name no place but `target`."""
    if _NOT_TREATED.search(" ".join(words)):
        return []
    place, sides = _read_target(words, eye)
    return sides if place is None or _compared(place) == _compared(target) else []


def _turned(side: str, text: str, eye: bool) -> bool:
    """Whether `text` also treats the side opposite to `side`, of whatever place.

    "Bilateral" turns nothing: a left tonsil is treated with both sides of the neck.
    """
    opposite = {"left": "right", "right": "left"}.get(side)
    for segment in _segments(text) if opposite else ():
        # In small letters "rt" is radiotherapy, and one letter may be anything.
        words = [word for word in segment.split() if word not in ("rt", "r", "l")]
        if opposite in _read_target(words, eye)[1] and not _NOT_TREATED.search(segment):
            return True
    return False


def _segments(text: str) -> list[str]:
    parts = (" ".join(part.split()).strip(" .:-") for part in re.split(r"[,;+]|:\s|\s-\s", text))
    return [part for part in parts if part]


def _read_words(
    before: str, after: str, eye: bool, has_dose: bool
) -> tuple[str | None, list[str], str | None]:
    """(target, sides, technique) from the text before and after the first phase's dose.

    What follows "to" is the target; else what stands before the dose, less technique words; else
    the first thing after the dose that is no technique.
    """
    target = None
    sides: list[str] = []  # each as often as written
    techniques: list[str] = []
    stated: list[list[str]] = []  # word lists introduced by "to"
    candidates: list[list[str]] = []
    for segment in _segments(before):
        segment, stated_words = _split_at_to(segment)
        if stated_words:
            stated.append(stated_words)
        words = segment.split()
        technique = [word for word in words if _is_technique(word)]
        rest = [word for word in words if not _is_technique(word)]
        if technique:
            techniques.append(" ".join(technique))
        if any(word.casefold() not in _FILLER_WORDS for word in rest):
            candidates.append(rest)
    # "Right eye, 85 Gy ..., to apex": a name set off by a comma before the dose is the target.
    named_first = bool(candidates) and before.rstrip().endswith(",")
    trailing = []
    for segment in _segments(after):
        segment, stated_words = (segment, []) if named_first else _split_at_to(segment)
        if stated_words:
            technique = [word for word in stated_words if _is_technique(word)]
            stated.append([word for word in stated_words if not _is_technique(word)])
            if technique:
                segment = " ".join([segment, *technique]).strip()
        if segment:
            trailing.append(segment)
    for words in candidates if named_first else stated + candidates:
        found_target, found_sides = _read_target(words, eye)
        target = target or found_target
        sides += found_sides
    for segment in trailing:
        words = segment.split()
        rest = [word for word in words if not _is_technique(word)]
        if all(word.casefold() in _FILLER_WORDS for word in rest):
            words = [word for word in words if word not in rest]
            if words:
                techniques.append(" ".join(words))
        elif _SIDE_ALONE.fullmatch(segment):
            sides.append(_SIDE_NAMES[segment.casefold()])
        elif target is not None and (own := _sides_of_target(rest, target, eye)):
            # "left tangents", or "right breast" said again; of both sides one may be boosted.
            sides += own if "bilateral" not in sides else []
            techniques.append(segment)
        elif target is None:
            target, found_sides = _read_target(rest, eye)
            sides += found_sides
            if len(rest) < len(words):
                techniques.append(" ".join(word for word in words if _is_technique(word)))
        else:
            techniques.append(segment)
    if not has_dose and not (sides or techniques or stated):
        target = None  # with no dose, side or technique any sentence would look like a target
    # A modality by itself is told by `Regimen.modality`; rendering writes it out where needed.
    techniques = [text for text in techniques if not _MODALITY_ALONE.fullmatch(text)]
    return target, sides, ", ".join(techniques) or None


def _split_at_to(segment: str) -> tuple[str, list[str]]:
    head, found, tail = re.sub(r"^to\s", " to ", segment).partition(" to ")
    if _POINT.match(tail):
        return head.strip(), []
    return (head.strip(), tail.split()) if found else (segment, [])


# ---------------------------------------------------------------------------------------------
# Reading and writing
# ---------------------------------------------------------------------------------------------


_NUMBER_WORDS = {
    word: str(number)
    for number, word in enumerate("one two three four five six seven eight nine ten".split(), 1)
} | {"a single": "1", "single": "1"}
_NUMBER_WORD = "|".join(sorted(_NUMBER_WORDS, key=len, reverse=True))
_COUNTED = r"(?:fx'?s|fx|frx?|fractions?|sessions?|treatments?|tx|#)(?![a-z])"
_SPELLINGS = tuple(
    (re.compile(pattern, re.IGNORECASE), replacement)
    for pattern, replacement in (
        (r"[×✕]", "x"),
        (r"[–—]", "-"),
        (r"→", "->"),
        (r"(?<=[a-z])_(?=[a-z])", " "),  # "Breast_L"
        (r"μ", "u"),
        # numbers
        (r"(?<![\d.,])(\d{1,3}),(\d{3})(?=\s?c(?:gy|cge|enti))", r"\1\2"),
        (r"(?<![\d.,])(\d{1,2})\s(\d{3})(?=\s?c(?:gy|cge|enti))", r"\1\2"),
        (r"(?<![\d.,])(\d{1,3}),(\d{1,2})(?=\s?(?:gy|gray|cge)\b)", r"\1.\2"),
        # units
        (r"\b(?:cobalt[\s-]gr[ae]y[\s-]equivalents?|cge|gye)\b", "Gy(RBE)"),
        (r"(?<=\d)(?:cge|gye)\b", "Gy(RBE)"),
        (r"(?<![a-z])(?:ccge|cgye)\b", "cGy(RBE)"),
        (r"(?<![a-z])centigr[ae]ys?\b", "cGy"),
        (r"(?<![a-z])gr[ae]ys?\b", "Gy"),
        (r"(?<![a-z])(c?)gy\s?[(\[]?\s?rbe\b(?:\s?[)\]])?", r"\1Gy(RBE)"),
        (r"(?<![\d.])(\d+(?:\.\d+)?)\s?Gy\s?/\s?(?=\d+(?:\.\d+)?\s?Gy)", r"\1/"),
        (r"(?<![a-z])(c?)gys\b", r"\1Gy"),
        (r"(?<![\d.])(\d{4})\s?@\s?(\d{3})(?![\d.]|\s?c?gy)", r"\1 cGy @ \2 cGy"),
        # "50+10 Gy", "60 Gy (50 + 10)", but not the fractions of "45 Gy in 25 + 5.4 Gy in 3"
        (
            r"(Gy(?:\(RBE\))?(?:\s[a-z-]+){0,8}?\s?(?:\bin|\bover|/|[x*])\s?)?"
            r"(?<![\d.])(\d+(?:\.\d+)?)\s?\+\s?(\d+(?:\.\d+)?)\s?(c?Gy(?:\(RBE\))?)(?![a-z])",
            lambda m: m[0] if m[1] else f"{m[2]} {m[4]} + {m[3]} {m[4]}",
        ),
        (
            r"(c?Gy(?:\(RBE\))?)\s?[(=]\s?(\d+(?:\.\d+)?)\s?\+\s?(\d+(?:\.\d+)?)(?![\d.]|\s?c?gy)\s?\)?",
            r"\1 = \2 \1 + \3 \1 ",
        ),
        # numbers of fractions
        (r"\b(?:over|in) \d+(?:\.\d+)? (?:weeks?|wks?|days?)\b", " "),
        (
            r"\b(?:\d|five|once)\s?(?:x|days?|fx|fractions?|times)\s?(?:/|per|a|each)\s?(?:wk|week)\b",
            " ",
        ),
        (
            rf"\b({_NUMBER_WORD})[\s-](?=(?:daily\s)?{_COUNTED})",
            lambda m: _NUMBER_WORDS[m[1].casefold()] + " ",
        ),
        (
            r"\b(?:number of |no\.? of |#\s?(?:of )?)?(?:fractions|fxs?)\s?[:=]\s?(\d\d?)(?![\d.])",
            r" \1 fx ",
        ),
        (rf"(?<![\w.])(\d{{1,2}})\s?(?:daily\s)?{_COUNTED}", r"\1 fx"),
        (r"/\s?(\d{1,2})\s?f\b", r"/ \1 fx"),
        # doses of one fraction
        (r"\s?(?:/|\bper\b|\ba\b)\s?(?:fx|fractions?|frx?|days?|treatments?)\b", "/fx"),
        (r"(Gy(?:\(RBE\))?)(?:\s|/fx)*(?:daily|qd|q\.d\.)\s(?=[x*]\s?\d)", r"\1 "),
        (r"\s?\(?(?<=[)\s(])(?:daily|each)\)?(?=\s?[x*]\s?\d)", ""),
        # "right and left lung"
        (
            r"\b(?:(?:right|(?-i:Rt|R))\s?(?:and\s|&|\+|/)\s?(?:left|lt|(?-i:L))"
            r"|(?:left|lt|(?-i:L))\s?(?:and\s|&|\+|/)\s?(?:right|(?-i:Rt|R)))\b(?=\s[a-z]{2})",
            "bilateral",
        ),
        # labels of a form
        (
            r"\b(?:treatment )?(?:site|target|volume|technique|modality|energy|plan|rx|"
            r"prescription)\s?:\s?",
            " ",
        ),
    )
)


def _tidy(text: str) -> str:
    """`text` with one spelling for units, numbers of fractions and doses of a fraction."""
    text = " ".join(text.split())
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    return " ".join(text.split())


# Exports and models repeat themselves, and a Regimen cannot be changed.
@functools.lru_cache(maxsize=65536)
def parse_regimen(text: str) -> Regimen | None:
    """Reads a regimen as clinics write it, or None when neither dose nor target can be read.

    Understands Gy, cGy, Gy(RBE), CGE and CcGE; "60Gy/30fx", "2 Gy x 30", "30 fractions of 2 Gy",
    "60 Gy at 2 Gy/fx", "1.8 Gy to 50.4 Gy"; BID; boosts, sums of phases ("total 60 Gy = 45 Gy + 15
    Gy boost") and dose levels; implants (one fraction); and sides also as L, Lt, R, Rt, bilat and,
    for eyes, OD, OS, OU. The first phase is the regimen, later ones are summed as its boost. A
    range of doses ("60-66 Gy") is not a dose, and a text of more than LONGEST characters is a whole
    note and no regimen. What `mark_conflict` has added is read back as the conflict.
    """
    if len(text) > LONGEST:
        return None
    if (marked := _MARKED.search(text)) is not None:
        inner = parse_regimen(text[: marked.start()])
        return inner and replace(inner, conflict=marked[1].replace(" ", "_"))
    eye = _EYE.search(text) is not None
    times_a_day = 2 if _BID.search(text) else 3 if _TID.search(text) else 1
    # The schedule goes first: "2 Gy BID x 30", and "twice a day" holds "a day".
    plain = _tidy(_TID.sub(" ", _BID.sub(" ", text)))
    if times_a_day > 1:
        plain = _TIMES_DAYS.sub(
            lambda m: (
                f"{m[1]} {m[2]} x {int(m[3]) * times_a_day} fx"
                if _grays(m[1], m[2]) <= _MOST_A_DAY_GY
                else m[0]
            ),
            plain,
        )
    phases = _read_phases(plain)
    first = boost = None
    before, after = plain, ""
    if phases:
        first, boost = _merge_phases(plain, phases)
        before, after = _around(plain, phases, first, boost)
    before, after = _NOT_TARGET.sub(" ", before), _NOT_TARGET.sub(" ", after)
    target, sides, technique = _read_words(before, after, eye, first is not None)
    dose = first.dose if first else None
    fractions = first.fractions if first else None
    if dose is None and target is None:
        return None
    if dose is not None and fractions is None and _ONE_FRACTION.search(plain):
        fractions = 1
    unit = plain[first.start : first.end] if first else ""
    conflict = first.conflict if first else None
    if any(one != other for one, other in _FRACTION_RANGE.findall(plain)):
        conflict = conflict or "dose_per_fraction"
    if len(set(sides)) > 1 or (sides and _turned(sides[0], plain, eye)):
        conflict = conflict or "side"
    return Regimen(
        target=target,
        side=sides[0] if sides else None,
        total_dose_gy=dose,
        fractions=fractions,
        technique=technique,
        modality=normalise_modality(f"{before} {unit} {after}"),
        times_a_day=times_a_day,
        boost_dose_gy=boost.dose if boost else None,
        boost_fractions=boost.fractions if boost else None,
        conflict=conflict,
    )


def _around(
    text: str, phases: list[_Phase], first: _Phase, boost: _Phase | None
) -> tuple[str, str]:
    """The words before and after the first phase, with every dose and the boost's words gone."""
    before = text[: first.start]
    if boost is None:
        after = text[first.end :]
    else:
        # What leads the boost in ("+ HDR", "then electron boost") belongs to it, as does the rest
        # of its own segment ("15 Gy in 5 fractions boost to cavity").
        between = text[first.end : boost.start]
        if leads := list(re.finditer(r"[+;]|\bplus\b|\bthen\b|\bfollowed by\b", between)):
            between = between[: leads[-1].start()]
        if between.rstrip() and not text[first.end + len(between) : boost.start].strip():
            between = between.rpartition(",")[0]
        _, _, rest = re.sub(r"[;\n]", ",", text[boost.end :]).partition(",")
        segments = rest.split(",")
        if _MODALITY_ALONE.fullmatch(segments[0].strip()):  # "boost 10 Gy in 5, electrons"
            del segments[0]
        after = f"{between}, {','.join(segments)}"
    after = f"{first.words} , {after}"
    for phase in phases:
        piece = text[phase.start : phase.end]
        before, after = before.replace(piece, " , "), after.replace(piece, " , ")
    return before, after


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _dose(dose: float, fractions: int | None, unit: str) -> str:
    if fractions is None:
        return f"{_number(dose)} {unit}"
    return f"{_number(dose)} {unit} in {fractions} fraction{'s' if fractions != 1 else ''}"


_MODALITY_WORDS = {
    "photon": "photons",
    "proton": "protons",
    "electron": "electrons",
    "brachytherapy": "brachytherapy",
}


def render_regimen(regimen: Regimen) -> str:
    """The canonical text: "Right breast, 40.05 Gy in 15 fractions, 3DCRT tangents".

    Protons are dosed in Gy(RBE). The modality is written out only where the unit and technique do
    not already tell it.
    """
    unit = "Gy(RBE)" if regimen.modality == "proton" else "Gy"
    parts = []
    place = " ".join(filter(None, (regimen.side, regimen.target)))
    if place:
        parts.append(place[:1].upper() + place[1:])
    if regimen.total_dose_gy is not None:
        schedule = {1: "", 2: " BID", 3: " TID"}[regimen.times_a_day]
        parts.append(_dose(regimen.total_dose_gy, regimen.fractions, unit) + schedule)
    if regimen.technique:
        parts.append(regimen.technique)
    if regimen.modality and normalise_modality(", ".join(parts)) != regimen.modality:
        parts.append(_MODALITY_WORDS[regimen.modality])
    text = ", ".join(parts)
    if regimen.boost_dose_gy is not None:
        text += f" + boost {_dose(regimen.boost_dose_gy, regimen.boost_fractions, 'Gy')}"
    return text


_MARKED = re.compile(r"\s*\[contradicts itself: (dose per fraction|sum|other dose|side)\]$")


def mark_conflict(regimen: Regimen) -> str:
    """The canonical text, and behind it what the regimen contradicts itself about, which the
    canonical text alone would hide: "... [contradicts itself: side]"."""
    text = render_regimen(regimen)
    if regimen.conflict is None:
        return text
    return f"{text} [contradicts itself: {regimen.conflict.replace('_', ' ')}]"


def _compared(target: str | None) -> tuple[str, ...]:
    """The words of a target as compared: case, order and small words do not matter."""
    words = re.findall(r"[a-z0-9]+", (target or "").casefold())
    return tuple(sorted(word for word in words if word not in _FILLER_WORDS))


def _place(regimen: Regimen) -> tuple[str | None, tuple[str, ...]]:
    """Side and target as compared."""
    return regimen.side, _compared(regimen.target)


def contradicts(answer: Regimen, reference: Regimen) -> bool:
    """Whether the answer contradicts itself, where the reference does not in the same way: which
    of two sides or doses it means is not for the reader to choose."""
    return answer.conflict not in (None, reference.conflict)


def same_regimen(answer: Regimen, reference: Regimen) -> bool:
    """Strict accuracy: same side, target and fractions, total dose within 0.5 Gy, and an answer
    that does not contradict itself.

    Definition (a) of the project's domain notes, section 2.4. Technique, modality and boost are
    not compared; a field that neither states is the same.
    """
    if contradicts(answer, reference):
        return False
    doses = answer.total_dose_gy, reference.total_dose_gy
    if None in doses:
        same_dose = doses[0] == doses[1]
    else:
        same_dose = abs(doses[0] - doses[1]) <= DOSE_TOLERANCE_GY + 1e-9
    return (
        same_dose
        and answer.fractions == reference.fractions
        and _place(answer) == _place(reference)
    )


FIELDS = ("target", "side", "dose", "fractions", "technique", "boost")


def stated_fields(regimen: Regimen) -> dict[str, object]:
    """FIELDS as compared, None where the regimen states none: words of target and technique without
    case and order, total dose in Gy, boost as (dose in Gy, fractions). The side of a regimen with
    both is "contradictory"."""
    side, target = _place(regimen)
    if regimen.conflict == "side":
        side = "contradictory"
    boost = None
    if regimen.boost_dose_gy is not None:
        boost = regimen.boost_dose_gy, regimen.boost_fractions
    technique = re.findall(r"[a-z0-9]+", (regimen.technique or "").casefold())
    return {
        "target": target or None,
        "side": side,
        "dose": regimen.total_dose_gy,
        "fractions": regimen.fractions,
        "technique": tuple(sorted(technique)) or None,
        "boost": boost,
    }


def same_field(name: str, one: object, other: object) -> bool:
    """Whether two values of `stated_fields` agree; doses within DOSE_TOLERANCE_GY."""
    if one is None or other is None or name not in ("dose", "boost"):
        return one == other
    if name == "dose":
        return abs(one - other) <= DOSE_TOLERANCE_GY + 1e-9
    return one[1] == other[1] and same_field("dose", one[0], other[0])


def alpha_beta_gy(regimen: Regimen) -> float:
    """alpha/beta by target, as the domain notes choose: prostate 1.5, breast 4, else 10.

    The chest wall counts as breast, whose place it takes after mastectomy; a chest does not.
    """
    words = set(_compared(regimen.target))
    if words & {"prostate", "prostatic", "seminal"}:
        return 1.5
    return 4.0 if "breast" in words or {"chest", "wall"} <= words else 10.0


def eqd2_gy(regimen: Regimen, alpha_beta: float) -> float | None:
    """The first phase's dose in 2 Gy fractions: D (d + a/b) / (2 + a/b), in Gy.

    From BED = n d (1 + d / (a/b)) (Fowler, Br J Radiol 1989;62:679), EQD2 = BED / (1 + 2 / (a/b)).
    None where dose or fractions are not known, and for implants: their dose rate decays, and the
    formula is of short fractions. Two fractions a day count as if repair between them were full.
    """
    if regimen.total_dose_gy is None or not regimen.fractions or regimen.implant:
        return None
    each = regimen.total_dose_gy / regimen.fractions
    return regimen.total_dose_gy * (each + alpha_beta) / (2 + alpha_beta)


def fraction_class(fractions: int) -> str:
    """Single, ultra-hypofractionated (2 to 8), hypofractionated (9 to 24) or conventional."""
    if fractions == 1:
        return "single"
    if fractions <= 8:
        return "ultra-hypofractionated"
    return "hypofractionated" if fractions <= 24 else "conventional"


EQD2_TOLERANCE = 0.05


def equivalent_regimen(answer: Regimen, reference: Regimen) -> bool:
    """Lenient accuracy: the same side and target, EQD2 within 5 % of the reference's and the same
    class of fractionation, or strictly the same.

    Definition (b) of the project's domain notes, section 2.4. alpha/beta is that of the reference's
    target. An answer that contradicts itself is equivalent to none.
    """
    if same_regimen(answer, reference):
        return True
    if contradicts(answer, reference):
        return False
    ratio = alpha_beta_gy(reference)
    doses = eqd2_gy(answer, ratio), eqd2_gy(reference, ratio)
    return (
        None not in doses
        and _place(answer) == _place(reference)
        and fraction_class(answer.fractions) == fraction_class(reference.fractions)
        and abs(doses[0] - doses[1]) <= EQD2_TOLERANCE * doses[1] + 1e-9
    )


class RegimenTask(Task):
    name = "regimen"
    instruction = "Write the regimen for this diagnosis: site and side, dose, fractions, technique."
    has_classes = False

    def reference(self, record: Record) -> str:
        """The canonical form of the record's regimen, or its own text where that is unreadable."""
        regimen = parse_regimen(record.regimen)
        return " ".join(record.regimen.split()) if regimen is None else render_regimen(regimen)

    def parse(self, output: str) -> str | None:
        """The canonical form of the first line that has a dose, else of the first line; a line
        that contradicts itself is marked so (`mark_conflict`) and is never right."""
        lines = [line for line in answer_section(output).splitlines() if line.strip()]
        parsed = [parse_regimen(line) for line in lines]
        dosed = [regimen for regimen in parsed if regimen and regimen.total_dose_gy is not None]
        regimen = (dosed + parsed + [None])[0]
        return None if regimen is None else mark_conflict(regimen)

    def correct(self, answer: str | None, reference: str) -> bool:
        """Strict accuracy (`same_regimen`); an unreadable reference is met by its very words."""
        if answer is None:
            return False
        right, given = parse_regimen(reference), parse_regimen(answer)
        if right is None or given is None:
            return answer.casefold() == reference.casefold()
        return same_regimen(given, right)
