"""Finds identifiers in clinical text and takes them out: support for HIPAA Safe Harbor, no proof.

The classes are those of 45 CFR 164.514(b)(2)(i) that occur in text. Each has rules, each rule a
name; what a rule finds is a span with class and rule, and the audit tells counts, rows and offsets
and never the text. Numbers and names of the field (3/15 fractions, T2N0, 40.05 Gy in 15, Gleason
3+4, Child-Pugh, Ann Arbor) are no identifiers.

Limits. Rules find what has a shape or a cue: numbers with their labels, dates, addresses, names
behind a title, a label, a relation, before a degree, or made of common given names and surnames.
They miss a bare surname ("Okonkwo tolerated it well"), rare names and small places without a cue,
unusual cues, names in other scripts, employers, misspelt labels, and what identifies by meaning
alone ("the mayor's wife", a rare disease in a small town). Pictures and biometrics (classes P and
Q) are not text. `benchmarks/deidentification.py` plants identifiers in synthetic notes. Of those in
sentences and with names that no rule was written against, 85 % were found: of names 62 %, ages over
89 65 %, vehicles 68 %, places 74 %, devices 75 %, of every other class 98 % or more. Real notes are
harder. So this supports a person who de-identifies and certifies nothing: somebody has to read a
sample, and attest that nobody knows of a way to tell who is in it, or obtain an expert's
determination (164.514(b)(1)).
"""

import bisect
import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import resources

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from radonc_jax.data.lexicon import (
    AMBIGUOUS_GIVEN,
    AMBIGUOUS_STATE_CODES,
    CITIES,
    EPONYMS,
    GIVEN,
    STATE_CODES,
    STATES,
    SURNAMES,
    VOCABULARY,
)

POLICIES = ("stop", "redact", "off")
ACTIONS = ("tag", "generalise", "remove")
CLASSES = {  # the letter of 164.514(b)(2)(i)
    "name": "A",
    "place": "B",
    "date": "C",
    "age": "C",
    "phone": "D",
    "fax": "E",
    "email": "F",
    "ssn": "G",
    "mrn": "H",
    "health_plan": "I",
    "account": "J",
    "licence": "K",
    "vehicle": "L",
    "device": "M",
    "url": "N",
    "ip": "O",
    "other_id": "R",
}
# To generalise is to keep what Safe Harbor lets be kept: a date's year, "90+", three digits of a
# ZIP code. Where nothing may be kept it is the same as a tag.
DEFAULT_ACTIONS = {name: "tag" for name in CLASSES} | {
    "date": "generalise",
    "age": "generalise",
    "place": "generalise",
}
# Three-digit ZIP areas of fewer than 20,001 people: those of the 2000 census that HHS lists and
# those of the 2010 census. To be checked against the current census before data are published.
SMALL_ZIP3 = frozenset(
    "036 059 063 102 203 205 369 556 692 790 821 823 830 831 878 879 884 890 893".split()
)


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of a text, what they are, and the rule that says so."""

    start: int
    end: int
    kind: str
    rule: str


# ---------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------

_WORD = re.compile(r"[^\W\d_]+(?:['’.-][^\W\d_]+)*")
_PARTICLES = frozenset(
    "de la las los van von der den del di da dos al bin el ter st. le du".split()
)
_GAP = re.compile(r"[ \t]{1,2}|,[ \t]?")  # between the words of a name
_SUFFIXES = frozenset("jr sr ii iii iv".split())


@functools.cache
def _known_words() -> frozenset[str]:
    """Lower-case words that are no names: a list, and the words of the code table's sites."""
    source = resources.files("radonc_jax.data").joinpath("sites.json")
    described = json.loads(source.read_text(encoding="utf-8"))["icd_description"].values()
    return VOCABULARY | {word for text in described for word in re.findall(r"[a-z]+", text.lower())}


def _bare(word: str) -> str:
    return word.casefold().replace("’", "'").removesuffix("'s").replace("'", "").rstrip(".")


def _is_known(word: str) -> bool:
    """Whether a word is one of the field or the language, a hyphenated one by its parts."""
    word = _bare(word)
    known = _known_words()
    if word in known or word.removesuffix("s") in known:
        return True
    return all(part in known or not part for part in re.split(r"[-.]", word))


def _is_eponym(word: str) -> bool:
    return _bare(word) in EPONYMS


def _on_lists(word: str) -> bool:
    return _bare(word) in GIVEN or _bare(word) in SURNAMES


@functools.lru_cache(maxsize=8)  # asked for every match of a long text
def _caseless(text: str) -> bool:
    return text.isupper() or text.islower()


def _could_be_name(word: str, caseless: bool, trusted: bool) -> bool:
    """Whether a word may be part of a name: capitalised and no word of the field.

    `trusted`: a title or a label stands before it, so that an eponym is a name as well.
    """
    if len(word) < 2 or (_is_known(word) and not (trusted and _bare(word) in SURNAMES)):
        return False
    if not trusted and _is_eponym(word) and _bare(word) not in GIVEN:
        return False
    if caseless:
        return trusted or _on_lists(word)
    if word.isupper() and len(word) > 1:
        # Capitals in a mixed text are abbreviations more often than names.
        return _on_lists(word) or (trusted and len(word) > 3)
    return word[0].isupper() or (trusted and _on_lists(word))


def _name_end(text: str, start: int, trusted: bool) -> int | None:
    """Where the name that begins at `start` ends, or None if none does.

    Up to four words; initials, particles ("de la", "van") and suffixes ("Jr") belong to it, and
    one comma does where a given name follows it ("Doe, Jane").
    """
    caseless = _caseless(text)
    end, names, comma, labelled = None, 0, False, trusted
    position = start
    while names < 4:
        word = _WORD.match(text, position)
        if word is None:
            break
        said = word[0]
        low = said.casefold()
        dotted = text[word.end() : word.end() + 1] == "."
        if names and low in _SUFFIXES:
            end = word.end()
            break
        if len(said) == 1 and (said.isupper() or caseless) and (dotted or low not in ("a", "i")):
            position = word.end() + dotted
            if names:
                end = position
        elif low in _PARTICLES:
            position = word.end()
            if names and low in SURNAMES:
                end = position
        elif _could_be_name(said, caseless, trusted):
            # Without capitals a third word is a part of the name only if it is listed.
            if names > 1 and caseless and not _on_lists(said):
                break
            if comma and low not in GIVEN and not (labelled and (caseless or said[0].isupper())):
                break
            names += 1
            end = position = word.end()
            # Behind a given name an eponym is a surname.
            trusted = low in GIVEN or (trusted and names < 2)
        else:
            break
        gap = _GAP.match(text, position)
        if gap is None:
            break
        if "," in gap[0]:
            if comma or names != 1:
                break
            comma = True
        position = gap.end()
    return end if names else None


# ---------------------------------------------------------------------------------------------
# Rules
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """How one shape of identifier is found.

    `pattern` finds it; its group "id", or the whole, is the span, which `ends` may move or refuse.
    `trigger` is a cheap condition, in RE2's syntax and without regard to case, that every text
    with a match fulfils: a million texts are sifted by it before Python sees one.
    """

    name: str
    kind: str
    trigger: str
    pattern: re.Pattern
    ends: Callable[[re.Match], tuple[int, int] | None] | None = None


def _compile(pattern: str) -> re.Pattern:
    return re.compile(pattern, re.IGNORECASE)


def _label(words: str, code: str, *, digits: int, tail: str = "") -> re.Pattern:
    """A label, what may stand between, and a code with at least so many digits."""
    return _compile(
        rf"(?<![\w-])(?:{words})(?![^\W_])(?:\s?(?:id|numbers?|num|no|nr|#)\b\.?|\s?#)?"
        rf"(?:\s(?:is|was|ending in|on file))?\s?[:#=-]{{0,2}}\s?"
        rf"(?P<id>(?=(?:[^\d\s]{{0,6}}\d){{{digits}}}|(?:[A-Z]{{1,3}}[ -])?(?:[ -]?\d){{{digits}}})"
        rf"{code}){tail}"
    )


# A label's trigger ends so: digits stand near behind it.
_NEAR_DIGITS = r"[^\d;]{0,30}\d(?:[^\d]{0,6}\d){2}"
_CODE = (
    r"(?:(?!(?:for|of|in|on|at|to|by|and|or|was|is|no)\b)[A-Z]{1,3} ?-? ?)?"
    r"[A-Z0-9](?:[A-Z0-9]|[-/](?=[A-Z0-9])){2,24}(?![\w])"
)
_DAY = r"(?:0?[1-9]|[12]\d|3[01])"
_MONTH_NUMBER = r"(?:0?[1-9]|1[0-2])"
_YEAR = r"(?:19|20)\d\d"
_MONTHS = (
    "January|February|March|April|May|June|July|August|September|October|November|December"
    "|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept|Sep|Oct|Nov|Dec"
)
# What makes three numbers with slashes dose levels or energies, and two a count of something.
_NOT_DATE = (
    r"(?!\s?-?\s?(?:c?gy|mv|mev|kv|cm|mm|cc|ml|fx|fractions?|fields?|%|mg|ng|cge))"
    r"(?![\d/.-]*\d)"
)
_NOT_COUNTED = (
    r"(?!\s?(?:of\b|fx|fractions?|nodes?|lns?\b|lymph|cores?|biops|sites?|slices|images|visits?"
    r"|cycles?|days?|doses?|treatments?|tx\b|positive|pos\b|neg|involved|c?gy|mm|cm|strength|power"
    r"|sln"
    r"|axillary|pelvic|sentinel|cervical|motor|in\b|points?))"
)


def _date_numbers(match: re.Match) -> tuple[int, int] | None:
    """A date of three numbers, unless they are levels of dose or energy by what stands around."""
    before = match.string[max(0, match.start() - 12) : match.start()]
    if re.search(
        r"(?:\b(?:sib|levels?|doses?|t|n|stage|v|version)|\d\s?/)\s?$", before, re.IGNORECASE
    ):
        return None
    return match.span("id")


def _month_name(match: re.Match) -> tuple[int, int] | None:
    """A month by name. "may", "mar", "dec" and "sep" in small letters are words unless a year or
    an ordinal says otherwise."""
    month, said = match["month"], match["id"]
    if re.search(r"'\d\d$|^\d{1,2}-[a-z]{3}-\d\d", said, re.IGNORECASE):
        return match.span("id")
    if month[0].islower() and not re.search(rf"{_YEAR}|\d(?:st|nd|rd|th)", said, re.IGNORECASE):
        if month.casefold() in ("may", "mar", "march", "dec", "sep", "oct"):
            return None
    if month.isupper() and month in ("MAY", "MAR", "MARCH", "DEC", "SEP"):
        return match.span("id") if re.search(rf"{_YEAR}|\d(?:ST|ND|RD|TH)", said) else None
    return match.span("id")


def _old_age(match: re.Match) -> tuple[int, int] | None:
    after = match.string[match.end("id") : match.end("id") + 12]
    if re.match(r"\s?(?:%|c?gy|pack|mg|mm|cm|cc|ml|\d)", after, re.IGNORECASE):
        return None
    return match.span("id")


_JOINT = re.compile(r"\s(?:and|&)\s(?:dr\.?\s)?", re.IGNORECASE)


def _names(text: str, start: int) -> tuple[int, int] | None:
    """The name at `start` that a title or label introduces, and those that "and" adds to it."""
    end = _name_end(text, start, True)
    for _ in range(4):
        joint = None if end is None else _JOINT.match(text, end)
        more = joint and _name_end(text, joint.end(), not _caseless(text))
        if not more:
            break
        end = more
    return None if end is None else (start, end)


def _labelled(match: re.Match) -> tuple[int, int] | None:
    return _names(match.string, match.end())


def _copied(match: re.Match) -> tuple[int, int] | None:
    """All names of a list behind "Cc"."""
    span = _names(match.string, match.end())
    for _ in range(6):
        comma = span is not None and match.string.startswith(", ", span[1])
        more = _names(match.string, span[1] + 2) if comma else None
        if more is None:
            break
        span = (span[0], more[1])
    return span


_STREET_BEFORE = re.compile(r"(?<![\w.])\d{1,6}\s(?:[NSEW]\.?\s)?(?:[A-Z][\w'’-]*\s){1,3}$")


def _titled(match: re.Match) -> tuple[int, int] | None:
    """What stands behind a title. MR is magnetic resonance and MS multiple sclerosis as well, so
    that not spelled "Mr" and "Ms" they need a name of the lists ("no ms. Planned 85 Gy")."""
    title, text = match["title"].rstrip("."), match.string
    if title.casefold() == "dr" and _STREET_BEFORE.search(text[: match.start()][-60:]):
        return None
    doubtful = title in ("MR", "MS", "ms") or (title == "mr" and "." not in match[0])
    doubtful = doubtful or (title.casefold() in ("miss", "nurse") and _caseless(text))
    word = _WORD.match(text, match.end())
    if doubtful and (word is None or not _on_lists(word[0])):
        return None
    return _names(text, match.end())


def _relative(match: re.Match) -> tuple[int, int] | None:
    """A relation's name. Family history ("Mother Breast cancer") has no word that is a name."""
    text = match.string
    end = _name_end(text, match.end(), False)
    word = _WORD.match(text, match.end())
    if end is None and match[0].endswith("(") and word and text[word.end() : word.end() + 1] == ")":
        return None if _is_known(word[0]) else word.span()  # "sister (huong)"
    if end is None or text[match.start() : end].casefold() == "sister mary joseph":
        return None
    words = _WORD.findall(text[match.end() : end])
    listed = any(map(_on_lists, words))
    direct = not match[0].rstrip().endswith((":", ",")) or text[end : end + 1] in (",", ")")
    return (match.end(), end) if listed or direct else None


def _in_care_of(match: re.Match) -> tuple[int, int] | None:
    """Who did something. What somebody was treated with or followed by is a drug more often."""
    end = _name_end(match.string, match.end(), False)
    if end is None:
        return None
    drug = re.match(r"treated|followed", match[0], re.IGNORECASE) is not None
    words = _WORD.findall(match.string[match.end() : end])
    return None if drug and not any(map(_on_lists, words)) else (match.end(), end)


def _before_degree(match: re.Match) -> tuple[int, int] | None:
    """The words before a degree that can be names, from the last one back."""
    text, first = match.string, None
    words = list(_WORD.finditer(text, match.start("id"), match.end("id")))
    caseless = _caseless(text)
    for index in range(len(words) - 1, -1, -1):
        word = words[index][0]
        last = index == len(words) - 1
        name = _could_be_name(word, caseless, last) and (not caseless or _on_lists(word))
        if not name and not (
            len(word) == 1 and (caseless or word.isupper()) and index < len(words) - 1
        ):
            break
        if len(word) > 1:
            first = words[index].start()
    return None if first is None else (first, match.end("id"))


def _initial(match: re.Match) -> tuple[int, int] | None:
    """ "J. Okafor", but not "E. Coli" or what stands behind a sentence that ends in a letter."""
    word = match["surname"]
    if _is_known(word) or _is_eponym(word) or word.casefold() in _MICROBES:
        return None
    return match.span("id")


_MICROBES = frozenset("coli difficile aureus pylori faecalis burnetii burgdorferi".split())


def _subject(match: re.Match) -> tuple[int, int] | None:
    """Who does what only a person does, at the head of a sentence."""
    words = match["id"].split()
    if any(_is_known(word) or _is_eponym(word) or word.isupper() for word in words):
        return None
    return match.span("id")


def _given_and_surname(match: re.Match) -> tuple[int, int] | None:
    """A common given name and what stands behind it, if that can be a surname."""
    text, given, surname = match.string, match["given"], match["surname"]
    caseless = _caseless(text)
    both = f"{given} {surname}".casefold()
    if both in ("ann arbor", "ivor lewis", "mary joseph", "van nuys"):
        return None
    ambiguous = _bare(given) in AMBIGUOUS_GIVEN
    sure = _bare(surname) in SURNAMES and not _is_known(surname)
    sure = sure and not (ambiguous and _is_eponym(surname))
    if ambiguous and not sure:
        return None
    if caseless:
        return match.span("id") if sure else None
    listed = _bare(surname) in SURNAMES
    if not (given[0].isupper() and surname[0].isupper()) or (_is_known(surname) and not listed):
        return None
    if surname.isupper() and not given.isupper() and not sure:
        return None
    end = _name_end(text, match.start("surname"), True) or match.end("id")
    return match.start("id"), max(end, match.end("id"))


def _surname_first(match: re.Match) -> tuple[int, int] | None:
    """ "DOE, JANE Q" and "Gonzalez, Maria": the second word is a common given name."""
    surname, given = match["surname"], match["given"]
    listed, ambiguous = _bare(surname) in SURNAMES, _bare(given) in AMBIGUOUS_GIVEN
    if _bare(given) not in GIVEN or (
        (ambiguous or not listed) and (_is_known(surname) or _is_eponym(surname))
    ):
        return None
    if (_caseless(match.string) or ambiguous) and not listed:
        return None
    if not (surname[0].isupper() and given[0].isupper()) and not listed:
        return None
    return match.span("id")


def _street(match: re.Match) -> tuple[int, int] | None:
    """A number and a street, unless its words are those of a note ("2 Left Chest Ct")."""
    kind = match["kind"]
    words = _WORD.findall(match["street"])
    if all(_is_known(word) and _bare(word) not in _STREET_WORDS for word in words):
        return None
    if kind in ("CT", "PL") or (kind in ("DR", "ST") and not match.string.isupper()):
        return None  # computed tomography, plan, doctor ...
    if match.string.islower() or not any(word[0].isupper() for word in words):
        if any(_is_known(word) and _bare(word) not in _STREET_WORDS for word in words):
            return None
    return match.span("id")


_STREET_WORDS = frozenset(
    "main north south east west first second third fourth fifth park oak school church "
    "center".split()
)


def _city_state(match: re.Match) -> tuple[int, int] | None:
    """A city before its state. The state itself may stay."""
    city, state = match["city"], match["state"]
    words = city.split()
    while words and (_is_known(words[0]) or not words[0][0].isupper()) and len(words) > 1:
        words.pop(0)
    listed = any(_bare(word) in CITIES for word in words)
    if any(_is_known(word) for word in words) and not listed:
        return None
    if _caseless(match.string) and not listed:
        return None
    if len(state) == 2 and not listed:
        # "Smith, MD", "Ga-68, CT": two letters say little.
        if state in AMBIGUOUS_STATE_CODES or not state.isupper():
            return None
    if not words[0][0].isupper() and not listed:
        return None
    return match.end("city") - len(" ".join(words)), match.end("city")


def _city_zip(match: re.Match) -> tuple[int, int] | None:
    """A city between other words and its state and ZIP code: "Mailing address Eloy AZ 85131"."""
    words = match["city"].split()
    while words and (_is_known(words[0]) or not words[0][0].isupper()) and len(words) > 1:
        words.pop(0)
    if _is_known(words[0]):
        return None
    return (match.end("city") - len(" ".join(words)), match.end("city")) if words else None


_SURE_CUE = re.compile(r"live|living|resid|originally|born|native|hometown", re.IGNORECASE)


def _residence(match: re.Match) -> tuple[int, int] | None:
    """The place where somebody lives, comes from or travels from."""
    text, start = match.string, match.end()
    end = None
    for count in range(3):
        word = _WORD.match(text, start if end is None else end + 1)
        if word is None or (end is not None and text[end] != " "):
            break
        said = word[0]
        listed, caseless = _bare(said) in CITIES, _caseless(text)
        plain = said[0].isupper() and not caseless
        # Without capitals one unknown word behind a sure cue is a place.
        sure = count == 0 and caseless and _SURE_CUE.match(match[0]) is not None
        if not listed and (_is_known(said) or not (plain or sure)):
            break
        end = word.end()
    if end is None or text[start:end].casefold() in _LARGE_PLACES:
        return None
    return start, end


# What is no geography below the state.
_LARGE_PLACES = frozenset(name.casefold() for name in STATES) | frozenset(
    "mexico canada germany india china japan brazil spain france italy vietnam korea cuba".split()
)


def _has_digits(match: re.Match) -> tuple[int, int] | None:
    """A label's code, but not a word behind the label ("account for 1234")."""
    return match.span("id") if sum(c.isdigit() for c in match["id"]) >= 3 else None


def _ip(match: re.Match) -> tuple[int, int] | None:
    return match.span("id") if all(int(part) < 256 for part in match["id"].split(".")) else None


def _vin(match: re.Match) -> tuple[int, int] | None:
    said = match["id"]
    mixed = any(c.isdigit() for c in said) and any(c.isalpha() for c in said)
    return match.span("id") if mixed else None


_CITY_WORD = r"[A-Za-z][\w'’-]{1,40}"
_STATE = "|".join([*STATES, *STATE_CODES])
_GIVEN_WORDS = "|".join(sorted(GIVEN))
_DEGREES = (
    r"M\.?D\.?|D\.?O\.|Ph\.?\s?D\.?|R\.?N\.?|N\.?P\.?|P\.?A\.?-C|FACR|FASTRO|MBBS|FRCR|DMD|DDS|CNP"
    r"|FNP"
    r"|APRN|CRNP|LCSW|PharmD|CMD"
)

# In order of precedence: where two overlap, the one that comes first stands.
RULES: tuple[Rule, ...] = (
    Rule(
        "email_address",
        "email",
        r"\S@\S|\sat\s\S+\sdot\s",
        _compile(
            r"(?<![\w.+-])(?P<id>[\w.+'-]{1,64}@[\w-]+(?:\.[\w-]+)+"
            r"|[\w.+'-]{1,64}\s(?:\[at\]|at)\s[\w-]+\s(?:\[dot\]|dot)\s(?:com|org|net|edu))(?!\w)"
        ),
    ),
    Rule(
        "url_address",
        "url",
        r"://|www\.|\.(?:com|org|net|edu|gov|io|info|health|us|co)\b",
        _compile(
            r"(?<![\w@.'-])(?P<id>(?:https?|ftp)://[^\s,;<>()]+|www\.[^\s,;<>()]+"
            r"|(?:[\w'-]{1,63}\.){1,4}(?:com|org|net|edu|gov|io|info|health)(?:/[^\s,;<>()]*)?)(?<![.])"
        ),
    ),
    Rule(
        "ssn_shape",
        "ssn",
        r"\d{3}[- ]\d{2}[- ]\d{4}",
        _compile(r"(?<![\d-])(?P<id>\d{3}-\d{2}-\d{4})(?![\d-])"),
    ),
    Rule(
        "ssn_label",
        "ssn",
        r"ssn|social sec|soc\.? sec",
        _compile(
            r"\b(?:ssn|soc(?:ial|\.)?\s?sec(?:urity|\.)?(?:\s?(?:number|no\.?|num|#))?)"
            r"(?:\s(?:is|ending in|ends in|last (?:4|four)))?(?:\s?\(?last (?:4"
            r"|four)\)?)?\s?[:#]?\s?"
            r"(?P<id>(?:[\dxX*]{3}[- ]?[\dxX*]{2}[- ]?)?\d{4})(?!\d)"
        ),
    ),
    Rule(
        "mrn_label",
        "mrn",
        r"(?:mrn|m\.r\.n|mr\s?#|med(?:ical|\.)?\s?rec|chart|patient|pt|unit|hospital|empi|record)"
        + _NEAR_DIGITS,
        _label(
            r"mrn|m\.r\.n\.?|mr\s?(?=#)|med(?:ical|\.)?\s?rec(?:ord|\.)?s?|chart(?=\s?(?:#|no|num"
            r"|id|:))"
            r"|(?:patient|pt\.?|hospital|unit|record)(?=\s?(?:#|no\b|num|id\b))|empi",
            _CODE,
            digits=4,
        ),
        _has_digits,
    ),
    Rule(
        "health_plan_label",
        "health_plan",
        r"(?:member|membership|subscriber|policy|group|beneficiary|insurance|medicare|medicaid"
        r"|hicn?|mbi"
        r"|plan|payer|bcbs|aetna|cigna|uhc|unitedhealthcare|humana|blue|shield|cross|ahcccs"
        r"|tricare)" + _NEAR_DIGITS,
        _label(
            r"(?:(?:insurance|health plan|bcbs|aetna|cigna|uhc|unitedhealthcare|humana|blue cross"
            r"(?: blue shield)?|ahcccs|tricare|medicare|medicaid)\s?)?(?:member(?:ship)?|subscriber"
            r"|policy|beneficiary|group(?=\s?(?:#|no\b|num|id\b)))"
            r"|medicare|medicaid|hicn?|mbi|ahcccs|tricare|bcbs|aetna|cigna|uhc|humana"
            r"|(?:insurance|health plan|payer)(?=\s?(?:#|no\b|num|id\b|:))",
            _CODE,
            digits=4,
        ),
        _has_digits,
    ),
    Rule(
        "health_plan_mbi",
        "health_plan",
        r"[1-9][a-z][a-z0-9]\d-?[a-z][a-z0-9]\d-?[a-z]{2}\d\d",
        _compile(r"(?<![\w-])(?P<id>[1-9][A-Z][A-Z0-9]\d-?[A-Z][A-Z0-9]\d-?[A-Z]{2}\d\d)(?![\w-])"),
    ),
    Rule(
        "account_label",
        "account",
        r"(?:account|acct|a/c|billing|invoice|guarantor|har|fin|csn|iban|card|claim)"
        + _NEAR_DIGITS,
        _label(
            r"(?:billing |hospital |patient |bank |checking )?(?:account|acct\.?|a/c)|billing"
            r"|invoice"
            r"|guarantor|har|fin|csn|iban|(?:credit|debit) card|claim",
            _CODE.replace("{2,24}", "{2,32}"),
            digits=4,
        ),
        _has_digits,
    ),
    Rule(
        "licence_label",
        "licence",
        r"(?:licen[cs]e|lic|dl|d\.l\.|npi|dea|certificate|cert|passport)" + _NEAR_DIGITS,
        _label(
            r"(?:driver'?s?'? |medical |state |nursing |professional )?licen[cs]e|lic\.?|dl|d\.l\."
            r"|npi|dea|(?:birth |board )?certificate|cert\.?|passport",
            _CODE,
            digits=3,
        ),
        _has_digits,
    ),
    Rule(
        "vehicle_vin",
        "vehicle",
        r"[a-hj-npr-z0-9]{17}",
        _compile(r"(?<!\w)(?P<id>[A-HJ-NPR-Z0-9]{17})(?!\w)"),
        _vin,
    ),
    Rule(
        "vehicle_plate",
        "vehicle",
        r"plate|\btag\b|vehicle|\bvin\b|registration",
        _compile(
            r"\b(?:licen[cs]e plates?|plates? (?=number|no\b|#)|number plate|vehicle (?:tag|plate"
            r"|reg\w*)"
            r"|(?:car |vehicle )?registration|vin|plates?(?=\s?[:#]))"
            r"(?:\s?(?:number|no\.?|#))?(?:\s(?:is|of))?\s?[:#]?\s?"
            r"(?P<id>(?=[A-Z -]{0,5}\d|\d{1,4}[ -]?[A-Z])[A-Z0-9]{1,4}[ -]?[A-Z0-9]{2,5}"
            r"(?:[ -][A-Z0-9]{1,4})?)(?!\w)"
        ),
    ),
    Rule(
        "vehicle_plate_bare",
        "vehicle",
        r"plates?\s[a-z0-9]{5,8}\b",
        _compile(r"\bplates?\s(?P<id>(?=\w*\d\w*\d\w*\d)(?=\d*[A-Z]\d*[A-Z])[A-Z0-9]{5,8})(?!\w)"),
    ),
    Rule(
        "device_label",
        "device",
        r"(?:serial|s/n|sn|lot|udi|device|pacemaker|implant|defibrillator|pump|generator)"
        + _NEAR_DIGITS,
        _label(
            r"(?:(?:device|pacemaker|defibrillator|implant|port|pump|linac|icd|generator|seed"
            r"|source)"
            r"\s)?(?:serial|s/n|sn(?=\s?[:#])|lot(?=\s?(?:#|no\b|num|:)))|udi"
            r"|(?:device|pacemaker|defibrillator|implant|pump|generator)(?=\s?(?:#|no\b|num|id\b))",
            _CODE,
            digits=3,
        ),
        _has_digits,
    ),
    Rule(
        "device_udi",
        "device",
        r"\(01\)\s?\d{14}",
        _compile(r"(?P<id>\(01\)\s?\d{14}(?:\s?\(\d\d\)\s?[A-Z0-9-]+)*)"),
    ),
    Rule(
        "other_label",
        "other_id",
        r"(?:accession|specimen|case|order|encounter|visit|requisition|study|subject|participant"
        r"|badge"
        r"|employee|student|\bid|confirmation|reference|barcode|block|slide|research)"
        + _NEAR_DIGITS,
        _label(
            r"accession|specimen(?=\s?(?:#|no\b|num|id\b|:))|(?:case|order|encounter|visit"
            r"|requisition"
            r"|study|subject|participant|badge|employee|student|confirmation|reference|barcode"
            r"|block"
            r"|slide|trial participant|research)(?=\s?(?:#|no\b|num|id\b))|id(?=\s?[:#])",
            _CODE,
            digits=3,
        ),
        _has_digits,
    ),
    Rule(
        "other_label_bare",
        "other_id",
        r"(?:\bid|badge|encounter|accession|specimen|visit|order|requisition|confirmation"
        r"|reference)\s"
        r"[a-z]{0,3}-?\d{5}",
        _compile(
            r"(?<![\w-])(?:id|badge|encounter|accession|specimen|visit|order|requisition"
            r"|confirmation"
            r"|reference)\s(?P<id>[A-Z]{0,3}-?\d{5,15})(?![\w-])"
        ),
    ),
    Rule(
        "other_accession",
        "other_id",
        r"[a-z]{1,3}-?\d\d-\d{3,7}",
        re.compile(r"(?<![\w-])(?P<id>(?!TG-)[A-Z]{1,3}-?\d\d-\d{3,7})(?![\w-])"),
    ),
    Rule(
        "other_uuid",
        "other_id",
        r"[0-9a-f]{8}-[0-9a-f]{4}-",
        _compile(r"\b(?P<id>[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\b"),
    ),
    Rule(
        "ip_v4",
        "ip",
        r"\d\.\d{1,3}\.\d{1,3}\.\d",
        _compile(r"(?<![\d.])(?P<id>\d{1,3}(?:\.\d{1,3}){3})(?![\d]|\.\d)"),
        _ip,
    ),
    Rule(
        "ip_v6",
        "ip",
        r"[0-9a-f]{1,4}:[0-9a-f]{0,4}:[0-9a-f:]*[0-9a-f]",
        _compile(
            r"(?<![\w:])(?P<id>(?:[0-9a-f]{1,4}:){7}[0-9a-f]{1,4}"
            r"|(?:[0-9a-f]{1,4}:){1,6}(?::[0-9a-f]{1,4}){1,6})(?![\w:])"
        ),
    ),
    Rule(
        "fax_number",
        "fax",
        r"fax|\bfx?:",
        _compile(
            r"\bfax(?:ed)?(?:\s(?:to|at|is|number|no\.?|#))*\s?[:#]?\s?"
            r"(?P<id>(?:\+?\d{1,2}[\s.-]?)?(?:\(\d{3}\)\s?|\d{3}[\s./-]?)\d{3}[\s.-]?\d{4}"
            r"|\d{3}[.-]\d{4})(?!\d)"
        ),
    ),
    Rule(
        "phone_shape",
        "phone",
        r"\d{3}\)?[\s./-]{1,2}\d{3}[\s.-]\d{4}",
        _compile(
            r"(?<![\d.+-])(?P<id>(?:\+?1[\s.-]?)?(?:\(\d{3}\)[\s-]?|\d{3}[\s./-])\d{3}[\s.-]\d{4}"
            r"(?:\s?(?:x|ext\.?|extension)\s?\d{1,6})?)(?![\d-])"
        ),
    ),
    Rule(
        "phone_international",
        "phone",
        r"\+\d{1,3}[\s.(-]{1,2}\d",
        _compile(r"(?<![\w+])(?P<id>\+\d{1,3}(?:[\s.-]?\(?\d{1,4}\)?){2,5})(?!\d)"),
        lambda m: m.span("id") if sum(c.isdigit() for c in m["id"]) >= 9 else None,
    ),
    Rule(
        "phone_label",
        "phone",
        r"(?:phone|tel|call|called|back|cell|mobile|pager|beeper|contact|\bph|\([hcw]\)).{0,24}"
        r"(?:\d{3}[.-]\d{4}|\d{10})",
        _compile(
            r"(?:\b(?:tele)?phone|\btel|\bcall(?:ed|back)?|\bcell|\bmobile|\bpager|\bbeeper"
            r"|\bcontact"
            r"|\bph|\([hcw]\))(?:\s(?:number|no\.?|#|at|is|him at|her at|back at|on))*\.?\s?[:#]?"
            r"\s?(?P<id>\d{3}[.-]\d{4}|\d{10}|1\d{10})(?!\d)"
        ),
    ),
    Rule(
        "date_iso",
        "date",
        r"(?:19|20)\d\d[-/.]\d{1,2}[-/.]\d{1,2}",
        _compile(
            rf"(?<![\d./-])(?P<id>{_YEAR}(?P<s>[-/.]){_MONTH_NUMBER}(?P=s){_DAY}"
            r"(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?:Z|[+-]\d\d:?\d\d)?)?)(?!\d)"
        ),
    ),
    Rule(
        "date_numbers",
        "date",
        r"\d[/.-]\d{1,2}[/.-](?:\d\d|'\d)",
        _compile(
            rf"(?<![\d./-])(?P<id>(?:{_MONTH_NUMBER}(?P<s>[/-]){_DAY}(?P=s)(?:{_YEAR}|'?\d\d)"
            rf"|{_DAY}(?P<t>[/-]){_MONTH_NUMBER}(?P=t)(?:{_YEAR}|\d\d)"
            rf"|(?:{_MONTH_NUMBER}\.{_DAY}|{_DAY}\.{_MONTH_NUMBER})\.{_YEAR}))(?!\d){_NOT_DATE}"
        ),
        _date_numbers,
    ),
    Rule(
        "date_compact",
        "date",
        r"(?:19|20)\d{6}",
        _compile(rf"(?<![\w.-])(?P<id>{_YEAR}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01]))(?![\w.-])"),
    ),
    Rule(
        "date_day_month",
        "date",
        r"\d(?:st|nd|rd|th)?[\s-]{1,2}(?:of\s)?(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)",
        _compile(
            rf"(?<![\w/-])(?P<id>{_DAY}(?:st|nd|rd|th)?[\s-](?:of\s)?(?P<month>{_MONTHS})\b\.?"
            rf"(?:,?[\s-](?:{_YEAR}|'\d\d)|-\d\d)?(?!\w))"
        ),
        _month_name,
    ),
    Rule(
        "date_month_day",
        "date",
        r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov"
        r"|dec)[a-z]*[.,]{0,2}[\s-]{0,2}(?:of\s)?'?\d",
        _compile(
            rf"(?<![\w-])(?P<id>(?P<month>{_MONTHS})\b\.?[\s-](?:of\s)?(?:{_DAY}(?:st|nd|rd|th)?"
            rf"(?![\w.]*\d|\w|/\d|\s?(?:fx|fractions?|c?gy|m[gml]|cm|%|of\s\d))(?:,?\s?-?(?:{_YEAR}"
            rf"|'\d\d))?"
            rf"|,?\s?{_YEAR}|'\d\d)(?!\w))"
        ),
        _month_name,
    ),
    Rule(
        "date_month_year",
        "date",
        r"\d/(?:19|20)\d\d",
        _compile(rf"(?<![\d./-])(?P<id>{_MONTH_NUMBER}[/-]{_YEAR})(?!\d){_NOT_DATE}"),
    ),
    Rule(
        "date_month_cue",
        "date",
        r"(?:in|since|last|this|until|by|early|late|mid)[\s-](?:jan|feb|mar|apr|may|jun|jul|aug|sep"
        r"|oct|nov|dec)",
        re.compile(
            r"\b(?i:in|since|last|this|until|by|early|late|mid)[\s-]"
            r"(?P<id>January|February|March|April|May|June|July|August|September|October|November"
            r"|December|JANUARY|FEBRUARY|APRIL|JUNE|JULY|AUGUST|SEPTEMBER|OCTOBER|NOVEMBER|DECEMBER"
            r"|january|february|april|june|july|august|september|october|november|december)\b"
        ),
    ),
    Rule(
        "date_day_cue",
        "date",
        r"(?:on|dated?|seen|since|dob|until|through|start\w*|began|due|admi\w+|disch\w+|collected"
        r"|performed|drawn|surgery|biopsy|bx|d/c)[\s:]{0,2}\d{1,2}/\d",
        _compile(
            r"\b(?:on|dated?|seen|since|dob|until|through|start(?:ed|s|ing)?|began|due|admi(?:tted"
            r"|t|"
            r"ssion)|discharged?|collected|performed|drawn|surgery|biopsy|bx|d/c)(?:\s|:\s?)"
            rf"(?P<id>{_MONTH_NUMBER}/{_DAY})(?![\d/]){_NOT_COUNTED}"
        ),
    ),
    Rule(
        "age_years",
        "age",
        r"(?:9\d|1[0-2]\d)[\s-]{0,2}(?:y|f\b|m\b|male|female|man|woman|gentleman|lady|w[mf]\b)",
        _compile(
            r"(?<![\d./-])(?P<id>9\d|1[0-2]\d)(?:[\s-]{0,2}(?:y(?:ea)?rs?\.?[\s-]?(?:old\b"
            r"|of\sage\b)"
            r"|y\.?/?o\b\.?|yo[fm]\b|y\b|year\b|yrs?\b)|\s?[fm]\b(?!-|\sfever)|\s?w[mf]\b"
            r"|[\s-](?:male|female|man|woman|gentleman|lady)\b)"
        ),
        _old_age,
    ),
    Rule(
        "age_label",
        "age",
        r"age[ds]?[\s:]{1,2}(?:of\s|is\s)?(?:9\d|1[0-2]\d)",
        _compile(r"\bage[ds]?[\s:]{1,2}(?:of\s|is\s)?(?P<id>9\d|1[0-2]\d)(?!\d|\.\d|[%+])"),
    ),
    Rule(
        "age_birthday",
        "age",
        r"turn(?:ed|s|ing)\s|birthday",
        _compile(r"\bturn(?:ed|s|ing)\s(?P<id>9\d|1[0-2]\d)(?!\d|\.\d|%|\s?(?:degrees|mm|cm))"),
    ),
    Rule(
        "age_decade",
        "age",
        r"90'?s|nineties",
        _compile(r"\bin (?:his|her|their) (?:mid|early|late)?[\s-]?(?P<id>90'?s|nineties)\b"),
    ),
    Rule(
        "age_word",
        "age",
        r"nonagenarian|centenarian",
        _compile(r"\b(?P<id>nonagenarian|centenarian)\b"),
    ),
    Rule(
        "place_street",
        "place",
        r"[a-z0-9.]\s(?:street|st|avenue|ave|road|rd|boulevard|blvd|lane|ln|drive|dr|court|ct|way"
        r"|place|pl"
        r"|terrace|ter|circle|cir|highway|hwy|parkway|pkwy|trail|trl|square)\b",
        _compile(
            r"(?<![\w./-])(?P<id>\d{1,6}\s(?:[NSEW]\.?[EW]?\.?\s)?(?P<street>(?:(?:St\."
            r"|[A-Z0-9][\w'’-]*)\s){1,4}?)"
            r"(?P<kind>street|st|avenue|ave|road|rd|boulevard|blvd|lane|ln|drive|dr|court|ct|way"
            r"|place|pl"
            r"|terrace|ter|circle|cir|highway|hwy|parkway|pkwy|trail|trl|square)\b\.?"
            r"(?:,?\s?(?:apt|apartment|suite|ste|unit|#)\.?\s?#?\w{1,6})?)"
        ),
        _street,
    ),
    Rule(
        "place_po_box",
        "place",
        r"p\.?\s?o\.?\s?box",
        _compile(r"\b(?P<id>p\.?\s?o\.?\s?box\s#?\d{1,8})\b"),
    ),
    Rule(
        "place_zip",
        "place",
        r"\d{5}",
        _compile(
            rf"(?:\b(?:zip(?:\s?code)?|postal code)\s?(?:is\s)?[:#]?\s?"
            rf"|\b(?:{_STATE})\.?,?\s{{1,2}})"
            r"(?P<id>\d{5}(?:-\d{4})?)(?![\d-])"
        ),
    ),
    Rule(
        "place_city_state",
        "place",
        r"[a-z],\s?(?:" + "|".join(STATES + STATE_CODES).lower() + r")\b",
        re.compile(
            rf"(?<![\w'’-])(?P<city>(?:(?:St|Ft|Mt)\. )?{_CITY_WORD}(?: {_CITY_WORD}){{0,3}}),\s?"
            rf"(?P<state>{_STATE}|{_STATE.lower()})(?![\w-])"
        ),
        _city_state,
    ),
    Rule(
        "place_city_zip",
        "place",
        r"[a-z]\s(?:" + "|".join(STATE_CODES).lower() + r")\s\d{5}",
        re.compile(
            rf"(?<![\w'’-])(?P<city>{_CITY_WORD}(?: {_CITY_WORD})?) "
            rf"(?P<state>{_STATE}|{_STATE.lower()}) \d{{5}}(?!\d)"
        ),
        _city_zip,
    ),
    Rule(
        "place_county",
        "place",
        r"\scount(?:y|ies)\b|\bborough\b",
        re.compile(r"\b(?P<id>[A-Z][a-z]+(?: [A-Z][a-z]+)?) (?:County|Borough|Parish)\b"),
        lambda m: None if _is_known(m["id"].split()[0]) else m.span("id"),
    ),
    Rule(
        "place_residence",
        "place",
        r"(?:live[sd]?|living|resid\w+|home)(?: alone| independently)?\s(?:in|at|near|of|outside)\s"
        r"|(?:originally|comes|travels|traveling|drives|driving|drove|flew|flies|commutes"
        r"|transferred|moved"
        r"|relocated|is|retired)(?:\s\w+){0,3}\s(?:from|to)\s|born in\s|native of\s|hometown"
        r"|visiting from\s",
        re.compile(
            r"(?i:\b(?:live[sd]?|living|resid(?:es|ing|ent)|home)(?: alone| independently)?(?: in"
            r"| at| near"
            r"| of| outside)"
            r"|\b(?:originally|comes|travels|traveling|drives|driving|drove|flew|flies|commutes"
            r"|transferred"
            r"|moved|relocated|is|retired)(?: \w+){0,3}? (?:from|to)"
            r"|\bborn in|\bnative of|\bhometown(?: is|:)|\bvisiting from)\s"
        ),
        _residence,
    ),
    Rule(
        "name_title",
        "name",
        r"\b(?:dr|doctor|drs|mr|mrs|ms|miss|mx|prof|professor|rev|reverend|nurse)\b",
        _compile(
            r"\b(?P<title>(?:dr|drs|mr|mrs|ms|mx|prof|rev)\b\.?|(?:doctor|professor|reverend|nurse"
            r"|miss)\b)[ \t]{1,2}"
        ),
        _titled,
    ),
    Rule(
        "name_label",
        "name",
        r"name\s?:|name\s(?:is|was|-)\s|(?:\bre|patient|pt|physician|attending|provider|surgeon|pcp"
        r"|author|cc|spouse"
        r"|kin|contact|person|poa|oncologist|resident|fellow|interpreter|proxy|informant|witness"
        r"|therapist"
        r"|dosimetrist|physicist|md)\s?:|named\s|nickname|known as\s|a\.?k\.?a"
        r"|(?:signed|dictated|authored|transcribed|cosigned|attested|entered)\sby",
        _compile(
            r"\b(?:(?:patient|pt|full|legal|first|last|maiden|preferred|family|mother's"
            r"|father's)'?s?\s)?"
            r"(?:name|surname)(?:\s(?:is|was)\s|\s?:|\s-\s)[ \t]{0,2}"
            r"|\b(?:re|patient|pt|physician|attending|provider|surgeon|pcp|author|cc|spouse"
            r"|next of kin"
            r"|(?:emergency )?contact(?: person)?|(?:dpoa|poa|mpoa)|oncologist|resident|fellow"
            r"|interpreter"
            r"|proxy|informant|witness|therapist|dosimetrist|physicist|ref(?:erring)? (?:md"
            r"|physician))"
            r"\s?:[ \t]{0,2}"
            r"|\b(?:named|nickname|also known as|a\.?k\.?a\.?|(?:electronically )?(?:signed"
            r"|dictated"
            r"|authored|transcribed|cosigned|attested|entered) by:?)[ \t]{1,2}"
        ),
        _labelled,
    ),
    Rule(
        "name_degree",
        "name",
        r"\b(?:m\.?d|d\.?o\.|ph\.?\s?d|r\.?n|n\.?p|p\.?a\.?-c|facr|fastro|mbbs|frcr|dmd|dds|cnp|fnp"
        r"|aprn|crnp|lcsw|pharmd|cmd)\b",
        _compile(
            r"(?<![\w'’-])(?P<id>(?:[^\W\d_][\w'’-]{0,40}\.?[ \t]){0,3}[^\W\d_][\w'’-]{1,40})"
            r",?[ \t]"
            rf"(?:{_DEGREES})(?![\w-])"
        ),
        _before_degree,
    ),
    Rule(
        "name_comma_degree",
        "name",
        r",\s(?:do|pa|np|pt|od)\b",
        re.compile(
            r"(?<![\w'’-])(?P<id>(?:[^\W\d_][\w'’-]{0,40}\.?[ \t]){1,3}[A-Z][\w'’-]{1,40})"
            r",[ \t](?:DO|PA|NP|PT|OD)(?=[ \t][a-z(]|[.,;)]|$)"
        ),
        _before_degree,
    ),
    Rule(
        "name_thanks",
        "name",
        r"thank(?:s|ing)?\s|appreciate\s|spoke (?:to|with)\s|\bcc\s",
        re.compile(
            r"\b(?:[Tt]hank(?:s|ing)?(?: you)?(?: to)?|[Aa]ppreciate|[Ss]poke (?:to|with)"
            r"|Cc)[ \t](?:Dr\.? )?"
        ),
        _copied,
    ),
    Rule(
        "name_initial",
        "name",
        r"\b[a-z]\.\s?[a-z]{3}",
        re.compile(
            r"(?:^|[.;:(]\s|[.(]|\b(?:by|with|to|from|and|per|via|of"
            r"|&)\s)(?P<id>[A-Z]\.\s?(?:[A-Z]\.\s?)?"
            r"(?P<surname>[A-Z]['’]?[A-Za-z][\w'’-]+))"
        ),
        _initial,
    ),
    Rule(
        "name_subject",
        "name",
        r"\s(?:wishes|wants|denies|agrees|lives|consented|complains|declines"
        r"|prefers|asks|asked|understands|verbaliz|was counsel|is a pleasant)",
        re.compile(
            r"(?:^|[.;:]\s)(?P<id>[A-Z][\w'’-]{2,}(?:\s[A-Z][\w'’.-]*){0,2})\s(?:wishes|wants"
            r"|denies"
            r"|agrees|lives|consented|complains|declines|prefers|asks|asked"
            r"|understands|verbaliz\w+|was counsell?ed|is a pleasant)\b",
        ),
        _subject,
    ),
    Rule(
        "name_relation",
        "name",
        r"\b(?:wife|husband|daughter|son|mother|father|sister|brother|spouse|partner|caregiver"
        r"|friend|niece"
        r"|nephew|aunt|uncle|neighbor|guardian|cousin|grandson|granddaughter|grandmother"
        r"|grandfather)"
        r"(?:-in-law)?(?:,|:|\s)",
        _compile(
            r"\b(?:wife|husband|daughter|son|mother|father|sister|brother|spouse|partner|caregiver"
            r"|friend"
            r"|niece|nephew|aunt|uncle|neighbor|guardian|cousin|grand(?:son|daughter|mother"
            r"|father))"
            r"(?:-in-law)?(?:,\s?|\s?:\s?|\s?\(|\s(?:is\s)?)(?:named\s)?"
        ),
        _relative,
    ),
    Rule(
        "name_verb",
        "name",
        r"(?:seen|evaluated|referred|reviewed|discussed|examined|followed|operated|treated"
        r"|accompanied"
        r"|performed|interpreted|read|done|ordered|resected|biopsied|consented|met|spoke"
        r"|recommended|staged)"
        r"(?: today)?\s(?:by|with)\s",
        _compile(
            r"\b(?:seen|evaluated|referred|reviewed|discussed|examined|followed|operated|treated"
            r"|accompanied|performed|interpreted|read|done|ordered|resected|biopsied|consented|met"
            r"|spoke"
            r"|recommended|staged)(?:\stoday)?\s(?:by|with)(?:\s(?:his|her|their|the))?[ \t]"
        ),
        _in_care_of,
    ),
    Rule(
        "name_surname_first",
        "name",
        rf"[a-z],\s?(?:{_GIVEN_WORDS})\b",
        _compile(
            r"(?<![\w-])(?P<id>(?P<surname>[^\W\d_][\w'’-]+),\s?(?P<given>[^\W\d_]+)"
            r"(?:\s(?-i:[A-Z])\b\.?)?)(?![\w-])"
        ),
        _surname_first,
    ),
    Rule(
        "name_given_surname",
        "name",
        rf"\b(?:{_GIVEN_WORDS})\s[a-z]",
        _compile(
            rf"(?<![\w'’-])(?P<id>(?P<given>{_GIVEN_WORDS})\s(?:[A-Z]\.?\s)?"
            r"(?P<surname>[^\W\d_][\w'’-]+))(?![\w-])"
        ),
        _given_and_surname,
    ),
    Rule(
        "other_hash_number",
        "other_id",
        r"#\s?\d{6}",
        _compile(r"#\s?(?P<id>\d{6,20})(?![\w-])"),
    ),
    Rule(
        "other_long_number",
        "other_id",
        r"\d{8}",
        _compile(r"(?<![\w.,+-])(?P<id>\d{8,20})(?![\w-]|[.,]\d|\s?(?:copies|cells|iu|units|/))"),
    ),
)


def _spans_of(rule: Rule, text: str) -> Iterable[tuple[int, int]]:
    for match in rule.pattern.finditer(text):
        span = match.span("id") if rule.ends is None else rule.ends(match)
        if span is not None and span[0] < span[1]:
            yield span


def find_spans(text: str, rules: Sequence[Rule] = RULES) -> tuple[Span, ...]:
    """The identifiers of one text, in order, none overlapping another."""
    taken: list[Span] = []  # in order
    for rule in rules:
        for start, end in _spans_of(rule, text):
            place = bisect.bisect_left(taken, start, key=lambda span: span.start)
            behind = place == 0 or taken[place - 1].end <= start
            if behind and (place == len(taken) or end <= taken[place].start):
                taken.insert(place, Span(start, end, rule.kind, rule.name))
    return tuple(taken)


# ---------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------


_GROUP = 8  # triggers that RE2 still matches as one automaton; more overflow its cache


def _sift(texts: pa.Array, rules: Sequence[Rule]) -> list[tuple[Rule, np.ndarray]]:
    """For each of a group of rules the positions of the texts that it has to look at."""

    def positions(among: pa.Array, trigger: str) -> np.ndarray:
        mask = pc.match_substring_regex(among, trigger, ignore_case=True)
        return np.flatnonzero(mask.to_numpy(zero_copy_only=False))

    some = positions(texts, "|".join(f"(?:{rule.trigger})" for rule in rules))
    among = texts.take(pa.array(some))
    return [(rule, some[positions(among, rule.trigger)]) for rule in rules]


def find_spans_of(texts: Sequence[str]) -> dict[int, tuple[Span, ...]]:
    """Position -> spans, for those of many texts that have any; as `find_spans` of each."""
    array = pa.array(texts, pa.large_string())
    groups = [RULES[first : first + _GROUP] for first in range(0, len(RULES), _GROUP)]
    candidates: dict[int, list[Rule]] = {}
    # Arrow matches outside the interpreter's lock, so the cores share the groups.
    with ThreadPoolExecutor() as pool:
        for sifted in pool.map(functools.partial(_sift, array), groups):  # in order of precedence
            for rule, positions in sifted:
                for position in positions.tolist():
                    candidates.setdefault(position, []).append(rule)
    found = {position: find_spans(texts[position], rules) for position, rules in candidates.items()}
    return {position: spans for position, spans in sorted(found.items()) if spans}


@dataclass(frozen=True)
class Findings:
    """The identifiers of a table's columns.

    `spans`: column -> text -> its spans. `rows`: column -> text -> index labels of the rows that
    hold it. Both hold only texts with identifiers, and they hold clinical text: what is written or
    shown are `summary`, `stop_message` and the audit.
    """

    spans: dict[str, dict[str, tuple[Span, ...]]]
    rows: dict[str, dict[str, list]] = field(repr=False)

    def _each(self):
        for column, texts in self.spans.items():
            for text, spans in texts.items():
                for span in spans:
                    yield column, span, self.rows[column][text]

    @property
    def empty(self) -> bool:
        return not any(self.spans.values())

    def _count(self, key: Callable[[Span], str]) -> dict[str, int]:
        counts: Counter = Counter()
        for _, span, rows in self._each():
            counts[key(span)] += len(rows)
        return dict(counts.most_common())

    @property
    def counts(self) -> dict[str, int]:
        """Class -> how often it was found, commonest first."""
        return self._count(lambda span: span.kind)

    def rows_with(self, kind: str) -> list:
        """Index labels of the rows that hold an identifier of a class, in order."""
        return sorted({row for _, span, rows in self._each() if span.kind == kind for row in rows})

    def summary(self) -> dict:
        """Counts per class and rule and the number of rows, for a manifest."""
        rows = {row for _, _, rows in self._each() for row in rows}
        return {
            "rows": len(rows),
            "classes": self.counts,
            "rules": self._count(lambda span: span.rule),
        }

    def stop_message(self) -> str:
        """One line: what was found where, and what to choose. No text."""
        parts = []
        for kind, count in self.counts.items():
            rows = self.rows_with(kind)
            shown = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
            parts.append(f"{kind} {count} (row{'s' if len(rows) > 1 else ''} {shown})")
        columns = ", ".join(column for column, texts in self.spans.items() if texts)
        return (
            f"identifiers found in {columns}: {'; '.join(parts)}; choose --deidentify=redact to "
            "take them out, or --deidentify=off to keep them"
        )


def find(table: pd.DataFrame, columns: Iterable[str]) -> Findings:
    """The identifiers in some columns of a table of text.

    A column "age" counts as a number of years. Columns that the table lacks are passed over.
    """
    spans: dict[str, dict[str, tuple[Span, ...]]] = {}
    rows: dict[str, dict[str, list]] = {}
    for column in columns:
        if column not in table.columns:
            continue
        codes, texts = pd.factorize(table[column].fillna("").astype(str))
        texts = list(texts)
        if column == "age":
            found = {i: whole for i, text in enumerate(texts) if (whole := _whole_age(text))}
        else:
            found = find_spans_of(texts)
        spans[column] = {texts[i]: found[i] for i in found}
        rows[column] = {texts[i]: [] for i in found}
        wanted = np.flatnonzero(np.isin(codes, np.fromiter(found, int, len(found))))
        for position in wanted.tolist():
            rows[column][texts[codes[position]]].append(table.index[position])
    return Findings(spans, rows)


def _whole_age(text: str) -> tuple[Span, ...]:
    number = re.fullmatch(r"\s*(\d{2,3})(?:\.\d*)?\s*(?:y\w*)?\s*", text)
    if number is None or int(number[1]) < 90:
        return ()
    return (Span(0, len(text), "age", "age_column"),)


def parse_actions(pairs: Iterable[str]) -> dict[str, str]:
    """["date=remove", ...] -> an action for every class.

    Raises:
      ValueError: an entry is no pair, or names an unknown class or action.
    """
    actions = dict(DEFAULT_ACTIONS)
    for pair in pairs:
        kind, separator, action = (part.strip() for part in pair.partition("="))
        if not separator or kind not in CLASSES or action not in ACTIONS:
            raise ValueError(
                f"--deidentify_actions entry {pair!r} is not CLASS=ACTION; classes are "
                f"{', '.join(CLASSES)}, actions {', '.join(ACTIONS)}"
            )
        actions[kind] = action
    return actions


def _generalised(span: Span, said: str) -> str | None:
    """What Safe Harbor lets be kept of an identifier, or None."""
    if span.kind == "age":
        return "90+"
    if span.kind == "date":
        year = re.search(r"(?<!\d)(?:19|20)\d\d", said)
        return year[0] if year else None
    if span.rule == "place_zip":
        return "000" if said[:3] in SMALL_ZIP3 else said[:3]
    return None


def redact_text(text: str, spans: Sequence[Span], actions: dict[str, str]) -> str:
    """`text` with each span gone, replaced by its class's tag ("[NAME]"), or generalised."""
    parts, position = [], 0
    for span in spans:
        said, action = text[span.start : span.end], actions[span.kind]
        kept = _generalised(span, said) if action == "generalise" else None
        tag = "" if action == "remove" else f"[{span.kind.upper()}]"
        parts += [text[position : span.start], tag if kept is None else kept]
        position = span.end
    return "".join([*parts, text[position:]])


def redact(
    table: pd.DataFrame, findings: Findings, actions: dict[str, str] | None = None
) -> pd.DataFrame:
    """A copy of `table` without what was found in it; `actions` as `parse_actions` gives them."""
    actions = DEFAULT_ACTIONS if actions is None else actions
    table = table.copy()
    for column, texts in findings.spans.items():
        clean = {text: redact_text(text, spans, actions) for text, spans in texts.items()}
        if clean:
            values = table[column]
            table[column] = values.map(clean).where(values.isin(clean), values)
    return table


def audit_lines(
    findings: Findings, policy: str, actions: dict[str, str] | None = None
) -> Iterable[str]:
    """The audit as JSON lines: the counts, then every finding by row, column and offsets in the
    original text, never the text."""
    actions = DEFAULT_ACTIONS if actions is None else actions
    yield json.dumps({"policy": policy, "actions": actions, **findings.summary()})
    for column, span, rows in findings._each():
        for row in rows:
            line = {
                "row": int(row) if isinstance(row, int | np.integer) else str(row),
                "column": column,
                "class": span.kind,
                "rule": span.rule,
                "start": span.start,
                "end": span.end,
                "action": actions[span.kind] if policy == "redact" else "none",
            }
            yield json.dumps(line)


def pseudonyms(patient_ids: pd.Series, seed: int) -> pd.Series:
    """Each patient's id replaced by a number of a random order: "P000001" ...

    A record number is an identifier itself. The new one is not derived from it (164.514(c)) and
    nobody keeps the key: the order depends on `seed` and on the order of the rows alone.
    """
    codes, patients = pd.factorize(patient_ids)
    order = np.random.Generator(np.random.PCG64([seed, len(patients)])).permutation(len(patients))
    width = max(6, len(str(len(patients))))
    return pd.Series(
        [f"P{order[code] + 1:0{width}d}" for code in codes], patient_ids.index, dtype=object
    )
