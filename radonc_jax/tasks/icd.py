"""Task `icd`: one ICD-10-CM code. The code table is that of simple_icd_10_cm (a release of the
CMS/NCHS tabular list that is part of that package; it reads no network).
"""

import bisect
import difflib
import functools
import heapq
import re
from types import ModuleType

from radonc_jax.tasks.base import Record, Task, answer_section

# Letter, digit, then a digit, or a letter in the few categories that have one there. Holding the
# third place that narrow keeps stages such as "T1b" or "T2N0" from passing for codes.
_CODE = re.compile(
    r"(?<![a-z0-9])((?:[a-z]\d\d)|c4a|c7a|c7b|d3a|m1a|o9a|z3a)(?:\.?([0-9a-z]{1,4}))?(?![a-z0-9])",
    re.IGNORECASE,
)


@functools.cache
def _table() -> ModuleType:
    # Parsing the table takes seconds, so only those who ask for it pay.
    import simple_icd_10_cm

    return simple_icd_10_cm


def normalise_code(text: str) -> str | None:
    """The first code of `text`, dotted and in upper case, or None.

    "c50411" gives "C50.411". Where several tokens have the shape of a code, those of which the
    table knows nothing are passed over: "Bone metastasis of T12: C79.51" gives "C79.51". Of one
    token, or where none is known, only the shape is looked at: see `is_leaf` for validity.
    """
    found = list(_CODE.finditer(text))
    if len(found) > 1:  # else there is no need for the table
        found = [match for match in found if _is_known(match)] or found
    return _dotted(found[0]) if found else None


def _dotted(found: re.Match) -> str:
    category, rest = found.groups()
    return (f"{category}.{rest}" if rest else category).upper()


def _is_known(found: re.Match) -> bool:
    """Whether the token's category is in the table, or, of one that is longer and has no dot, the
    whole of it: "V600E" and "L858R" are mutations, though V60 and L85 are categories."""
    category, rest = found.groups()
    plain = rest and "." not in found[0]
    return in_table(_dotted(found) if plain else category.upper())


def distinct_codes(text: str) -> list[str]:
    """The codes that `text` holds, each once, in normal form: "C50.411; c61" gives both.

    Only those that the table knows, for "T10" may be a vertebra; a single one in any case.
    """
    found = list(_CODE.finditer(text))
    if len(found) > 1:
        found = [match for match in found if _is_known(match)]
    return list(dict.fromkeys(map(_dotted, found)))


def is_leaf(code: str) -> bool:
    """Whether `code` is in the table and has no codes below it, so that it can be billed."""
    # The table accepts any string, but calls chapters ("2") and blocks ("C00-C14") items as well.
    return bool(_CODE.fullmatch(code)) and _table().is_valid_item(code) and _table().is_leaf(code)


def description(code: str) -> str:
    """The official words of a code or category of the table ("Malignant neoplasm of prostate"),
    "" for anything else."""
    known = _CODE.fullmatch(code) and _table().is_valid_item(code)
    return _table().get_description(code) if known else ""


def in_table(code: str) -> bool:
    """Whether `code` is a category or a code of the table, one that can be billed or a header."""
    return bool(_CODE.fullmatch(code)) and _table().is_valid_item(code)


@functools.lru_cache(maxsize=65536)
def path(code: str) -> tuple[str, ...]:
    """Chapter, block, category and so on down to `code` itself: ("2", "C50-C50", "C50", "C50.4",
    "C50.41", "C50.411").

    A code that is not in the table hangs below the longest of its beginnings that is; () where not
    even its category exists. A block that holds one category has the category's name in the table,
    so it is written as a range here.
    """
    for length in range(len(code), 2, -1):
        known = code[:length]
        if known[-1] != "." and in_table(known):
            break
    else:
        return ()
    steps = [*reversed(_table().get_ancestors(known)), known]
    if len(steps) > 1 and "-" not in steps[1]:
        steps[1] = f"{steps[1]}-{steps[1]}"
    return (*steps, code) if known != code else tuple(steps)


_SIDE_WORD = re.compile(r"\b(?:right|left|bilateral|unspecified)\b")


def differs_in_side_alone(code: str, other: str) -> bool:
    """Whether two codes of the table have the same official words but for the side.

    Their digits would not do: skin codes number their sides irregularly.
    """
    words = [_SIDE_WORD.sub("*", description(each).casefold()) for each in (code, other)]
    return code != other and words[0] == words[1] != ""


@functools.cache
def leaves() -> list[str]:
    """Every leaf, sorted: what begins alike lies together."""
    return sorted(code for code in _table().get_all_codes(with_dots=True) if is_leaf(code))


@functools.lru_cache(maxsize=65536)
def other_side(code: str) -> str | None:
    """The code of the same words on the other side ("C50.411" gives "C50.412"), or None where the
    code has no side or no such counterpart."""
    words = description(code)
    sides = re.findall(r"\b(?:right|left)\b", words)
    if not sides or not is_leaf(code):
        return None
    turned = re.sub(r"\b(?:right|left)\b", lambda m: "left" if m[0] == "right" else "right", words)
    near = _below(code[:3])
    return next((leaf for leaf in near if description(leaf) == turned), None)


def _below(prefix: str) -> list[str]:
    """The leaves that begin with `prefix`, itself included; two binary searches."""
    sorted_leaves = leaves()
    # No code holds a character beyond "Z", so all that begins with `prefix` sorts below prefix~.
    first, last = (bisect.bisect_left(sorted_leaves, text) for text in (prefix, f"{prefix}~"))
    return sorted_leaves[first:last]


def nearest_valid(code: str, n: int = 3) -> list[str]:
    """Up to `n` leaf codes nearest to `code`, best first; none of another kind fill the list up.

    A code is a path from the category down, so the leaves below its longest beginning that has any
    are the nearest: for a header its own leaves in the table's order ("C50.4" gives C50.411,
    C50.412, C50.419), for a digit too many or a wrong one its siblings by likeness ("C61.0" gives
    C61). [] when `code` holds no code, or one whose very category does not exist.
    """
    wanted = normalise_code(code)
    if wanted is None:
        return []
    for length in range(len(wanted), 2, -1):
        near = _below(wanted[:length].rstrip("."))
        if not near:
            continue
        if length == len(wanted):
            return near[:n]
        # nlargest, as sorted, keeps equals in the table's order.
        return heapq.nlargest(
            n, near, key=lambda leaf: difflib.SequenceMatcher(None, wanted, leaf).ratio()
        )
    return []


class IcdTask(Task):
    """A well-formed code that is not in the table is parsed, and wrong; it is not unparseable.

    The answer is the first code (`normalise_code`). Two different codes in its sentence
    ("C50.411 or C50.412") are no answer, as two modalities are none: which of them is meant is not
    for the reader to choose. A category or header beside a code below it ("C50.411, of category
    C50") is the same answer in fewer words, and the longer one is taken. What later sentences and
    lines say does not count, for models that were not tuned go on to explain or to list.
    """

    name = "icd"
    instruction = "Give the ICD-10-CM code that describes this diagnosis most exactly."

    def reference(self, record: Record) -> str:
        code = normalise_code(record.icd10)
        if code is None:
            raise ValueError(
                f"case {record.case_id}: column icd10 holds no ICD-10-CM code; "
                "prepare the cohort again or correct that row"
            )
        return code

    def parse(self, output: str) -> str | None:
        said = answer_section(output)
        first = normalise_code(said)
        if first is None:
            return None
        # A full stop within a code has no space behind it.
        sentences = re.split(r"\n|(?<=[.!?])\s", said)
        sentence = next(part for part in sentences if first in map(_dotted, _CODE.finditer(part)))
        codes = distinct_codes(sentence) or [first]
        longest = max(codes, key=len)
        return longest if all(longest.startswith(code) for code in codes) else None
