"""Task `regimen`: the treatment regimen as free text, and the parser that makes it comparable.

`parse_regimen` reads the ways clinics write a course; `render_regimen` writes the one canonical
way ("Right breast, 40.05 Gy in 15 fractions, 3DCRT tangents"). Reading a canonical text gives
back the regimen it was rendered from.
"""

import re
from dataclasses import dataclass

from radonc_jax.tasks.base import Record, Task, answer_section
from radonc_jax.tasks.modality import normalise_modality

DOSE_TOLERANCE_GY = 0.5  # strict accuracy: total doses this close count as the same


@dataclass(frozen=True)
class Regimen:
    """One course. Doses in Gy, or Gy(RBE) when the modality is proton.

    `total_dose_gy` and `fractions` are those of the first phase; a boost stands apart. A target is
    spelled without its side and without an initial capital ("breast", "PA nodes").
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


# ---------------------------------------------------------------------------------------------
# Doses
# ---------------------------------------------------------------------------------------------

_UNIT = r"(?P<unit>cc?ge|gye|c?gy(?:\s?\(?rbe\b\)?)?)(?![a-z])"
# A number that is no part of a range ("60-66 Gy") or of a list of dose levels after its first.
_NUMBER = r"(?<![\d.,/–-])(?P<dose>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?)"
_LEVELS = r"(?:\s?/\s?\d+(?:\.\d+)?)*"  # "70/63/56 Gy": the highest level leads
_COUNTED = r"(?:fx|fractions?|frx?|#)(?![a-z])"
_NOT_COUNTED = r"(?![\d.])(?!\s?(?:weeks?|wks?|days?|months?|[cm]m)\b)"
_PER_FRACTION = r"(?:/|per|a)\s?(?:fx|fractions?|frx?)\b"
_DOSE = re.compile(rf"{_NUMBER}{_LEVELS}\s?{_UNIT}", re.IGNORECASE)
_BARE_DOSE = re.compile(  # "45/25" with no unit; more than one slash is a list of dose levels
    r"(?<![\d.,/\w-])(?P<dose>\d+(?:\.\d+)?)\s?/\s?(?P<count>\d{1,2})(?![\d./\w])"
    r"(?P<words>\s?(?:fx|fractions?|frx?)\b)?",
    re.IGNORECASE,
)
_AFTER_DOSE = (
    # "2 Gy x 30", "7 Gy x 3 fractions": the dose is that of one fraction
    ("times", rf"\s?(?:{_PER_FRACTION})?\s?[x*]\s?(?P<count>\d{{1,2}})(?![\d.])(?:\s?{_COUNTED})?"),
    ("each", rf"\s?{_PER_FRACTION}"),
    # "60 Gy in 2 Gy fractions", "60 Gy at 2 Gy/fx", "60 Gy (2 Gy x 30)"
    (
        "of_each",
        r"\s?(?:total)?\s?(?:in|at|@|,|\()\s?(?P<each>\d+(?:\.\d+)?)\s?(?P<each_unit>cc?ge|gye"
        rf"|c?gy(?:\s?\(?rbe\b\)?)?)\s?(?:{_PER_FRACTION}|fx\b|fractions?\b"
        r"|[x*]\s?(?P<each_count>\d{1,2}))(?:\s?[x*]\s?(?P<each_times>\d{1,2})(?![\d.]))?",
    ),
    # "60 Gy in 30", "60 Gy/30fx", "1000 cGy boost/5 fx", "45 Gy BID in 30 fractions"
    (
        "in",
        r"(?P<words>(?:\s?[a-z-]+){0,3}?)\s?(?:,|;|-)?\s?(?:"
        rf"(?:in|/|over)\s?(?P<count>\d{{1,2}}){_NOT_COUNTED}(?:\s?{_COUNTED})?"
        rf"|\(?(?P<plain>\d{{1,2}})\s?{_COUNTED})",
    ),
)
_AFTER_DOSE = tuple((kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in _AFTER_DOSE)
_BEFORE_DOSE = re.compile(  # "30 fractions of 2 Gy", "30 x 2 Gy"
    r"(?P<count>\d{1,2})\s?(?:(?:fx|fractions?)\s?(?:of|at|@)|[x*])\s?$", re.IGNORECASE
)
_BOOST = re.compile(r"\b(?:boost|cone-?\s?down)\b", re.IGNORECASE)
_IMPLANT = re.compile(r"\bldr\b|\bseeds?\b|\bplaque\b|\bpermanent\b|\bsingle\b", re.IGNORECASE)
_NUMBER_WORDS = {
    word: str(number)
    for number, word in enumerate("one two three four five six seven eight nine ten".split(), 1)
} | {"a single": "1", "single": "1"}
_COUNT_WORD = re.compile(
    rf"\b({'|'.join(sorted(_NUMBER_WORDS, key=len, reverse=True))})[\s-](?=fractions?\b|fx\b)",
    re.IGNORECASE,
)


def _grays(number: str, unit: str) -> float:
    value = float(number.replace(",", ""))
    centi = unit.casefold().startswith(("cgy", "ccge"))
    return round(value / 100 if centi else value, 4)


def _fractions_of(total: float, each: float) -> int | None:
    """Number of fractions when `total` is a whole multiple of `each`, rounding in print allowed."""
    count = round(total / each) if each else 0
    return count if count and abs(count * each - total) <= 0.005 * count + 1e-6 else None


@dataclass(frozen=True)
class _Phase:
    """A dose as written: where it stands in the text, and what it says."""

    start: int
    end: int
    dose: float | None  # total of the phase
    fractions: int | None
    each: float | None  # dose of one fraction, where only that is written
    words: str = ""  # words that stood inside, such as "boost"


def _read_phases(text: str) -> list[_Phase]:
    phases: list[_Phase] = []
    position = 0
    while (match := _DOSE.search(text, position)) is not None:
        dose = _grays(match["dose"], match["unit"])
        start, end = match.start(), match.end()
        phase = _Phase(start, end, dose, None, None)
        before = _BEFORE_DOSE.search(text, position, start)
        if before is not None:
            count = int(before["count"])
            phase = _Phase(before.start(), end, round(dose * count, 4), count, None)
        else:
            for kind, pattern in _AFTER_DOSE:
                after = pattern.match(text, end)
                if after is not None:
                    phase = _with_count(kind, after, start, dose)
                    break
        phases.append(phase)
        position = phase.end
    if not phases:
        # Only where no unit is written at all: beside real doses "54/45" is a list of levels.
        for match in _BARE_DOSE.finditer(text):
            dose, count = float(match["dose"]), int(match["count"])
            if match["words"] or (count and 1 <= dose / count <= 34):
                phases.append(_Phase(match.start(), match.end(), dose, count or None, None))
    return phases


def _with_count(kind: str, after: re.Match, start: int, dose: float) -> _Phase:
    if kind == "times":
        count = int(after["count"])
        return _Phase(start, after.end(), round(dose * count, 4), count, None)
    if kind == "each":
        return _Phase(start, after.end(), None, None, dose)
    if kind == "of_each":
        each = _grays(after["each"], after["each_unit"])
        written = after["each_count"] or after["each_times"]
        count = int(written) if written else _fractions_of(dose, each)
        return _Phase(start, after.end(), dose, count, None)
    count = int(after["count"] or after["plain"])
    return _Phase(start, after.end(), dose, count or None, None, after["words"])


def _merge_phases(text: str, phases: list[_Phase]) -> tuple[_Phase, _Phase | None]:
    """The first phase and the boost, with restatements resolved.

    "Total 60 Gy = 45 Gy + 15 Gy boost" names a sum before its parts; "60 Gy in 30 fractions
    (2 Gy per fraction)" repeats the phase by its fraction.
    """
    each = next((p.each for p in phases if p.each is not None), None)
    totals = [p for p in phases if p.dose is not None]
    if not totals:
        return phases[0], None
    if len(totals) > 2 and "=" in text[totals[0].end : totals[1].start]:
        totals = totals[1:]
    first = totals[0]
    if first.fractions is None and each is not None:
        count = _fractions_of(first.dose, each)
        first = _Phase(first.start, first.end, first.dose, count, None, first.words)
    for other in totals[1:]:
        if _repeats(other, first):
            continue
        if not _repeats(first, other):
            return first, other
        first = other
    return first, None


def _repeats(phase: _Phase, whole: _Phase) -> bool:
    """Whether `phase` is only the dose of one fraction of `whole`."""
    if phase.fractions is not None or whole.fractions is None:
        return False
    return abs(phase.dose * whole.fractions - whole.dose) <= 0.005 * whole.fractions


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
    sib hypofx hypofractionated short-course short course palliative preop postop port definitive
    adjuvant salvage ap/pa bolus qod weekly daily x-ray x-rays stereotactic radiosurgery
    e- en-face ocular
    """.split()
)
_FILLER_WORDS = frozenset(
    "to the of a an in at with and for by via using total dose rt radiation radiotherapy therapy "
    "xrt then followed plus treatment course plan phase prescribed delivered boost from".split()
)
_NOT_TARGET = re.compile(
    r"\b\d+(?:\.\d+)?(?:-\d+)?\s?[cm]m\b(?:\s(?:depth|margin))?|\b\d+(?:/\d+)*\s?(?:mv|mev|x)\b(?!\s?\d)"
    r"|\b(?:(?:and|with)\s)?(?:concurrent\s)?(?:chemo\w*|(?:cis|carbo)platin|temozolomide|tmz"
    r"|capecitabine|5-?fu|paclitaxel|adt)\b|\bdepth\b|[@=()\[\]<>]",
    re.IGNORECASE,
)
_MODALITY_ALONE = re.compile(r"(?:photon|proton|electron)s?|brachy(?:therapy)?", re.IGNORECASE)
_BID = re.compile(r"\b(?:bid|b\.i\.d\.|twice[\s-](?:daily|a[\s-]day))(?!\w)", re.IGNORECASE)
_TID = re.compile(r"\b(?:tid|t\.i\.d\.|three times (?:daily|a day))(?!\w)", re.IGNORECASE)
_EYE = re.compile(r"\b(?:uvea|uveal|choroid|eye|orbit|globe|ocular|iris|ciliary|retina)", re.I)
_SIDE_NAMES = {
    "left": "left",
    "right": "right",
    "bilateral": "bilateral",
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
_EYE_SIDES = {"OD": "right", "OS": "left", "OU": "bilateral"}
_LOBES = {  # abbreviations that hide a side
    "rul": ("right", "upper lobe of lung"),
    "rml": ("right", "middle lobe of lung"),
    "rll": ("right", "lower lobe of lung"),
    "lul": ("left", "upper lobe of lung"),
    "lll": ("left", "lower lobe of lung"),
}
_TARGET_WORDS = {"cw": "chest wall", "scv": "supraclavicular nodes", "wb": "whole breast"}
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
    if side is None or word.casefold() in ("left", "right", "bilateral"):
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


def _read_target(words: list[str], eye: bool) -> tuple[str | None, str | None]:
    """(target, side) of the words of one segment, technique words already taken out."""
    side, kept = None, []
    for index, word in enumerate(words):
        following = words[index + 1] if index + 1 < len(words) else None
        found = _side_of(word, following, words[index - 1] if index else None, eye)
        if found is not None:
            side = side or found
        elif word.casefold() in _LOBES:
            lobe_side, target = _LOBES[word.casefold()]
            side = side or lobe_side
            kept.append(target)
        else:
            kept.append(_TARGET_WORDS.get(word.casefold(), word))
    while kept and kept[0].casefold() in _FILLER_WORDS:
        kept.pop(0)
    while kept and kept[-1].casefold() in _FILLER_WORDS:
        kept.pop()
    # A target is a name; a sentence in front of a dose is not one.
    if not 1 <= len(kept) <= 8 or not any(c.isalpha() for word in kept for c in word):
        return None, side
    return _lower_first(" ".join(kept)), side


def _segments(text: str) -> list[str]:
    parts = (" ".join(part.split()).strip(" .:-") for part in re.split(r"[,;+]|\s-\s", text))
    return [part for part in parts if part]


def _read_words(
    before: str, after: str, eye: bool, has_dose: bool
) -> tuple[str | None, str | None, str | None]:
    """(target, side, technique) from the text before and after the first phase's dose.

    What follows "to" is the target; else what stands before the dose, less technique words; else
    the first thing after the dose that is no technique.
    """
    target = side = None
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
        found_target, found_side = _read_target(words, eye)
        target = target or found_target
        side = side or found_side
    for segment in trailing:
        words = segment.split()
        rest = [word for word in words if not _is_technique(word)]
        if all(word.casefold() in _FILLER_WORDS for word in rest):
            words = [word for word in words if word not in rest]
            if words:
                techniques.append(" ".join(words))
        elif target is None:
            target, side = _read_target(rest, eye)
            if len(rest) < len(words):
                techniques.append(" ".join(word for word in words if _is_technique(word)))
        else:
            techniques.append(segment)
    if not has_dose and not (side or techniques or stated):
        target = None  # with no dose, side or technique any sentence would look like a target
    # A modality by itself is told by `Regimen.modality`; rendering writes it out where needed.
    techniques = [text for text in techniques if not _MODALITY_ALONE.fullmatch(text)]
    return target, side, ", ".join(techniques) or None


def _split_at_to(segment: str) -> tuple[str, list[str]]:
    head, found, tail = re.sub(r"^to\s", " to ", segment).partition(" to ")
    return (head.strip(), tail.split()) if found else (segment, [])


# ---------------------------------------------------------------------------------------------
# Reading and writing
# ---------------------------------------------------------------------------------------------


def _tidy(text: str) -> str:
    text = text.replace("×", "x").replace("–", "-").replace("μ", "u")
    text = _COUNT_WORD.sub(lambda m: _NUMBER_WORDS[m[1].casefold()] + " ", text)
    text = re.sub(r"\b(?:over|in) \d+(?:\.\d+)? (?:weeks?|wks?|days?)\b", " ", text)
    return " ".join(text.split())


def parse_regimen(text: str) -> Regimen | None:
    """Reads a regimen as clinics write it, or None when neither dose nor target can be read.

    Understands Gy, cGy, Gy(RBE) and CGE; "60Gy/30fx", "2 Gy x 30", "30 fractions of 2 Gy", "60 Gy
    at 2 Gy/fx"; BID; boosts; implants (one fraction); and sides also as L, Lt, R, Rt, bilat and,
    for eyes, OD, OS, OU. The first phase is the regimen, a later one its boost. A range of doses
    ("60-66 Gy") is not a dose.
    """
    text = _tidy(text)
    eye = _EYE.search(text) is not None
    times_a_day = 2 if _BID.search(text) else 3 if _TID.search(text) else 1
    plain = " ".join(_TID.sub(" ", _BID.sub(" ", text)).split())
    phases = _read_phases(plain)
    first = boost = None
    before, after = plain, ""
    if phases:
        first, boost = _merge_phases(plain, phases)
        before, after = _around(plain, phases, first, boost)
    before, after = _NOT_TARGET.sub(" ", before), _NOT_TARGET.sub(" ", after)
    target, side, technique = _read_words(before, after, eye, first is not None)
    dose = first.dose if first else None
    fractions = first.fractions if first else None
    if dose is None and target is None:
        return None
    if dose is not None and fractions is None and _IMPLANT.search(text):
        fractions = 1
    unit = plain[first.start : first.end] if first else ""
    return Regimen(
        target=target,
        side=side,
        total_dose_gy=dose,
        fractions=fractions,
        technique=technique,
        modality=normalise_modality(f"{before} {unit} {after}"),
        times_a_day=times_a_day,
        boost_dose_gy=boost.dose if boost else None,
        boost_fractions=boost.fractions if boost else None,
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
        between = re.split(r"[+;]|\bthen\b|\bfollowed by\b", text[first.end : boost.start])[0]
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


def _place(regimen: Regimen) -> tuple[str | None, tuple[str, ...]]:
    """Side and target as compared: case, order of words and small words do not matter."""
    words = re.findall(r"[a-z0-9]+", (regimen.target or "").casefold())
    return regimen.side, tuple(sorted(word for word in words if word not in _FILLER_WORDS))


def same_regimen(answer: Regimen, reference: Regimen) -> bool:
    """Strict accuracy: same side, target and fractions, total dose within 0.5 Gy.

    Definition (a) of the project's domain notes, section 2.4. Technique, modality and boost are
    not compared; a field that neither states is the same.
    """
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


class RegimenTask(Task):
    name = "regimen"
    instruction = "Write the regimen for this diagnosis: site and side, dose, fractions, technique."
    has_classes = False

    def reference(self, record: Record) -> str:
        """The canonical form of the record's regimen, or its own text where that is unreadable."""
        regimen = parse_regimen(record.regimen)
        return " ".join(record.regimen.split()) if regimen is None else render_regimen(regimen)

    def parse(self, output: str) -> str | None:
        """The canonical form of the first line that has a dose, else of the first line."""
        lines = [line for line in answer_section(output).splitlines() if line.strip()]
        parsed = [parse_regimen(line) for line in lines]
        dosed = [regimen for regimen in parsed if regimen and regimen.total_dose_gy is not None]
        regimen = (dosed + parsed + [None])[0]
        return None if regimen is None else render_regimen(regimen)

    def correct(self, answer: str | None, reference: str) -> bool:
        """Strict accuracy (`same_regimen`); an unreadable reference is met by its very words."""
        if answer is None:
            return False
        right, given = parse_regimen(reference), parse_regimen(answer)
        if right is None or given is None:
            return answer.casefold() == reference.casefold()
        return same_regimen(given, right)
