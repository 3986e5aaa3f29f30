"""Train, validation and test by patient, and what may leak between them."""

import functools
import re
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from radonc_jax.tasks.icd import description, normalise_code
from radonc_jax.tasks.modality import normalise_modality
from radonc_jax.tasks.regimen import DOSE_TOLERANCE_GY, parse_regimen

SPLITS = ("train", "validation", "test")


def assign_splits(
    patients: pd.Series,
    labels: pd.DataFrame,
    seed: int,
    test: float,
    validation: float,
    *,
    groups: pd.Series | None = None,
    external: pd.Series | None = None,
) -> pd.Series:
    """The split of each case; all cases of a patient, and of a group, share one. Patient ids that
    differ by case or by blanks around them alone count as one.

    Units (patients, or patients joined by groups) are put in order of their labels (columns of
    `labels`, most important first; those of a unit's first case count), in random order among
    equals, and taken out of that order at even distances from a random start. Common labels thus
    keep their share exactly, and rare ones share a place with their neighbours in the order: codes
    of one category lie side by side. (scikit-learn's StratifiedGroupKFold takes time that grows
    with groups times folds, minutes for a large extract, and knows no shares but 1/folds.)

    Args:
      patients: patient of each case.
      labels: labels of each case, same index.
      seed: the same seed gives the same split.
      test, validation: shares of the patients, the rest trains.
      groups: of cases that must not be parted either, such as near-duplicate texts.
      external: True for cases of an external test set, which takes the place of a drawn one
        (`test` is not used). A unit that stands on both sides goes to the other splits, so that
        the test holds nothing but external cases.

    Raises:
      ValueError: as `check_draw`, or a split would hold no patient.
    """
    check_draw(seed, test, validation)
    patients = _one_spelling(patients)
    rng = np.random.Generator(np.random.PCG64(seed))
    patient = pd.factorize(patients)[0]
    unit = patient if groups is None else _joined(patient, pd.factorize(groups)[0])
    first = np.unique(unit, return_index=True)[1]  # units count in order of appearance
    sizes = np.bincount(unit[np.unique(patient, return_index=True)[1]])  # patients of each unit
    keys = [labels[column].astype(str).to_numpy()[first] for column in labels.columns]
    order = np.lexsort((rng.random(len(first)), *reversed(keys)))
    split = np.full(len(first), "train", dtype=object)
    if external is None:
        taken = _draw(sizes[order], test, rng)
    else:
        outside = np.bincount(unit, weights=~external.to_numpy(bool)) == 0
        taken, test = outside[order], sizes[outside].sum() / sizes.sum()
    split[order[taken]] = "test"
    rest = order[~taken]
    if test + validation < 1:
        split[rest[_draw(sizes[rest], validation / (1 - test), rng)]] = "validation"
    for name in SPLITS:
        if not (split == name).any():
            raise ValueError(
                f"{patients.nunique()} patients are too few: the {name} split would be empty; give "
                "more records or other fractions"
            )
    return pd.Series(split[unit], index=patients.index)


def check_draw(seed: int, test: float, validation: float) -> None:
    """
    Raises:
      ValueError: the seed is negative, a share is not between 0 and 1, or nothing is left to train
        on.
    """
    if seed < 0:
        raise ValueError(f"--seed is {seed}; it must not be negative")
    for name, share in (("test_fraction", test), ("validation_fraction", validation)):
        if not 0 < share < 1:
            raise ValueError(f"--{name} is {share}; it must lie between 0 and 1")
    if test + validation >= 1:
        raise ValueError(
            f"--test_fraction={test} and --validation_fraction={validation} leave nothing to train "
            "on"
        )


def _one_spelling(patients: pd.Series) -> pd.Series:
    # Two ids that differ so are most likely one patient; at worst two of them share a split.
    return patients.astype(str).str.strip().str.casefold()


def _joined(patient: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Number of the connected part of each case, where patients and groups tie cases together;
    parts count in order of appearance."""
    n = patient.max() + 1
    edges = sparse.coo_array(
        (np.ones(len(patient), np.int8), (patient, n + group)), shape=(n + group.max() + 1,) * 2
    )
    return pd.factorize(connected_components(edges, directed=False)[1][patient])[0]


def _draw(sizes: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Mask of units that together hold `share` of the patients, spread over the given order.

    Units of several patients come first: one is taken when the share owed so far is nearer to its
    size than to nothing, so a group that is larger than the split it would fill stays out of it.
    Units of one patient then make up what is missing.
    """
    taken = np.zeros(len(sizes), bool)
    owed = 0.0
    for i in np.flatnonzero(sizes > 1):
        owed += share * sizes[i]
        if owed >= sizes[i] / 2:
            taken[i] = True
            owed -= sizes[i]
    single = sizes == 1
    if single.any():
        missing = share * sizes.sum() - sizes[taken].sum()
        part = share if single.all() else float(np.clip(missing / single.sum(), 0, 1))
        taken[single] = _evenly(int(single.sum()), part, rng)
    return taken


def _evenly(n: int, share: float, rng: np.random.Generator) -> np.ndarray:
    """Mask of `share` of n positions at even distances: systematic sampling."""
    marks = np.floor(np.arange(n + 1) * share + rng.random())
    return np.diff(marks) > 0


# ---------------------------------------------------------------------------------------------
# External test sets
# ---------------------------------------------------------------------------------------------


# Texts and numbers of single patients: no choice of a test set, and nothing to show.
_NOT_TO_SPLIT_BY = frozenset({
    "case_id", "patient_id", "diagnosis", "diagnosis_id", "icd10", "prescription", "regimen",
    "total_dose_gy", "total_dose_cgy", "fractions", "course_id", "plan_id", "plan_name",
})  # fmt: skip
# Columns whose values are named in messages and the manifest, where they are few and short.
_PLACES = frozenset(
    {"institution", "site", "hospital", "centre", "center", "clinic", "facility", "campus"}
)
_MOST_PLACES, _LONGEST_PLACE = 50, 40


@dataclass(frozen=True)
class SplitBy:
    """How the test set is chosen: "patient" (drawn), "date" (the latest) or "site" (named)."""

    kind: str
    column: str = ""
    value: str = ""


def parse_split_by(text: str) -> SplitBy:
    """ "patient", "date:COLUMN", "date:COLUMN=2023-01-01" or "site:COLUMN=NAME,NAME".

    Raises:
      ValueError: it is none of these, or the column is one of texts or ids.
    """
    kind, _, rest = text.partition(":")
    column, equals, value = (part.strip() for part in rest.partition("="))
    well = {
        "patient": not rest,
        "date": bool(column) and bool(value) == bool(equals),
        "site": bool(column and value),
    }
    if not well.get(kind):
        raise ValueError(
            f"--split_by is {text!r}; give patient, date:COLUMN, date:COLUMN=FIRST_DATE_OF_TEST or "
            "site:COLUMN=NAME,NAME"
        )
    if column.casefold() in _NOT_TO_SPLIT_BY:
        raise ValueError(
            f"--split_by names the column {column}, which is of texts, numbers or ids of single "
            "patients; name one of places or of dates"
        )
    return SplitBy(kind, column, value)


def external_cases(cases: pd.DataFrame, by: SplitBy, test: float) -> tuple[pd.Series, dict]:
    """Which cases an external test set takes, and what the manifest tells of the choice.

    By date: cases from the given date on, else from the date that leaves as nearly as possible
    `test` of the patients behind it; a patient counts by the earliest case, and cases of one date
    stay together. By site: cases of the named institutions. Values of the column are told only
    where it is one of places, with few and short ones; else their number is.

    Args:
      cases: with columns case_id, patient_id and the one that `by` names.
      by: "date" or "site".

    Raises:
      ValueError: no such column, a date that is missing or cannot be read, no such site, or one
        side is empty.
    """
    if by.column not in cases.columns:
        raise ValueError(
            f"--split_by names the column {by.column!r}; there are {', '.join(cases.columns)}"
        )
    values = cases[by.column].fillna("").astype(str).str.strip()
    facts = {"by": by.kind, "column": by.column}
    if by.kind == "site":
        wanted = {name.strip().casefold() for name in by.value.split(",")}
        folded = values.str.casefold()
        absent = sorted(wanted - set(folded))
        distinct = values.value_counts().index
        shown = (
            by.column.casefold() in _PLACES
            and len(distinct) <= _MOST_PLACES
            and distinct.str.len().max() <= _LONGEST_PLACE
        )
        if absent:
            there = f"the commonest values are {', '.join(map(repr, distinct[:10]))}"
            raise ValueError(
                f"--split_by: no case has {absent[0]!r} in column {by.column}; "
                + (there if shown else f"it has {len(distinct)} distinct values")
            )
        external = folded.isin(wanted)
        if shown:
            facts["sites"] = sorted(values[external].unique())
        facts["sites_chosen"] = int(folded[external].nunique())
    else:
        dates = _dates(values, cases["case_id"], by.column)
        earliest = dates.groupby(_one_spelling(cases["patient_id"])).min()
        if by.value:
            first = _dates(pd.Series([by.value]), pd.Series(["--split_by"]), by.column)[0]
            if type(first) is not type(dates.iloc[0]):
                raise ValueError(
                    f"--split_by: {by.value!r} is not written as column {by.column} is; copy a "
                    "value's form from there"
                )
        else:
            candidates, counts = np.unique(earliest.to_numpy(), return_counts=True)
            behind = np.cumsum(counts[::-1])[::-1] / len(earliest)
            first = candidates[np.abs(behind - test).argmin()]
        external = dates >= first
        facts["first"] = str(pd.Timestamp(first).date() if dates.dtype.kind == "M" else first)
    if external.all() or not external.any():
        raise ValueError(
            f"--split_by: the choice in column {by.column} leaves "
            f"{'nothing to train on' if external.all() else 'no case to test on'}"
        )
    return external, facts


def _dates(values: pd.Series, case_ids: pd.Series, column: str) -> pd.Series:
    """Dates, or numbers where all values are numbers (years, days since a start)."""
    if values.str.fullmatch(r"\d{1,6}(\.\d+)?").all():
        return values.astype(float)
    forms = ("ISO8601", "%m/%d/%Y", "%d/%m/%Y", "%d.%m.%Y", "%Y%m%d")
    read = [pd.to_datetime(values, format=form, errors="coerce", utc=True) for form in forms]
    bad = min(dates.isna().sum() for dates in read)
    best = [dates for dates in read if dates.isna().sum() == bad]
    if bad:
        worst = best[0].isna().to_numpy()
        raise ValueError(
            f"--split_by: column {column} of {case_ids.iloc[worst.argmax()]} holds no date that "
            f"can be read, nor do {int(bad) - 1} other cases; write YYYY-MM-DD, or exclude them"
        )
    if not best[0].equals(best[-1]):
        raise ValueError(
            f"--split_by: column {column} may be month/day or day/month; write YYYY-MM-DD"
        )
    return best[0].dt.tz_localize(None)


def split_cases(
    cases: pd.DataFrame,
    seed: int,
    test: float,
    validation: float,
    *,
    by: SplitBy = SplitBy("patient"),
    group: bool = False,
) -> tuple[pd.DataFrame, dict]:
    """`cases` with a column split, and what the manifest tells of the splits.

    Args:
      cases: cohort rows (case_id, patient_id, diagnosis, modality, icd10, the column of `by`).
      seed, test, validation: as in `assign_splits`, errors too.
      by: how the test is chosen; errors as in `external_cases`.
      group: keep near-duplicate texts in one split.
    """
    labels = pd.DataFrame(
        {
            "modality": cases["modality"],
            "category": cases["icd10"].str[:3],
            "code": cases["icd10"],
        }
    )
    found = find_duplicates(cases["diagnosis"])
    external, facts = None, {"by": "patient"}
    if by.kind != "patient":
        external, facts = external_cases(cases, by, test)
    split = assign_splits(
        cases["patient_id"],
        labels,
        seed,
        test,
        validation,
        groups=found["group"] if group else None,
        external=external,
    )
    if external is not None:
        facts["external_cases"] = int(external.sum())
        # Of patients (or groups) that also stand on the other side.
        facts["external_cases_not_tested"] = int((external & (split != "test")).sum())
    cases = cases.assign(split=split)
    check_no_patient_crosses(cases)
    return cases, {"split": facts, "near_duplicates": near_duplicates(found, split, group)}


def check_no_patient_crosses(cases: pd.DataFrame) -> None:
    """
    Raises:
      ValueError: a patient of `cases` (columns patient_id, split) is in more than one split.
    """
    crossing = cases["split"].groupby(_one_spelling(cases["patient_id"])).nunique() > 1
    if crossing.any():
        raise ValueError(
            f"{int(crossing.sum())} patients are in more than one split; scores on held-out cases "
            "would be worth nothing"
        )


# ---------------------------------------------------------------------------------------------
# Near-duplicate texts
# ---------------------------------------------------------------------------------------------

SIMILARITY = 0.8  # Jaccard index of two texts' 5-byte pieces from which they are near duplicates
_PIECE = 5  # bytes: packed into one int64, so pieces are compared exactly
_BANDS, _ROWS = 14, 5  # 1 - (1 - s^5)^14: 0.996 of pairs at 0.8 become candidates, 1.000 at 0.9
_CHUNK_BYTES = 4_000_000  # of text at a time: bounds the memory


def normalise_text(text: str) -> str:
    """Letters and digits of any script alone, in lower case: what repeated texts share."""
    return " ".join(re.findall(r"[^\W_]+", text.casefold())) or text.casefold().strip()


def find_duplicates(texts: pd.Series) -> pd.DataFrame:
    """Which texts repeat each other.

    Distinct normalised texts are cut into overlapping pieces of 5 bytes. MinHash signatures of
    the piece sets (Broder 1997) in bands (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets,
    section 3.4) give candidate pairs, each of which is then verified by its exact Jaccard index.
    Texts of one band's bucket are compared with its first and with their neighbours alone, so the
    work grows in proportion to the texts.

    Returns:
      Table of the index of `texts`: `text`, the number of the normalised text, and `group`, the
      number of the group of texts that are near duplicates directly or through others.
    """
    number, distinct = pd.factorize(texts.map(normalise_text))
    group = _groups(np.asarray(distinct, dtype=object))
    return pd.DataFrame({"text": number, "group": group[number]}, index=texts.index)


def _groups(texts: np.ndarray) -> np.ndarray:
    n = len(texts)
    signatures = np.empty((n, _BANDS * _ROWS), np.uint32)
    for start, stop in _chunks(texts):
        signatures[start:stop] = _minhash(*_pieces(texts[start:stop]))
    group = np.arange(n)
    links = np.empty((2, 0), np.int64)
    refuted = np.empty(0, np.int64)  # pairs that earlier bands proposed and verification denied
    keys = [_band_key(signatures[:, b * _ROWS : (b + 1) * _ROWS]) for b in range(_BANDS)]
    for b in range(_BANDS):
        # The next band orders a bucket's texts, so that similar ones are neighbours.
        order = np.lexsort((keys[(b + 1) % _BANDS], keys[b]))
        key = keys[b][order]
        same = np.flatnonzero(key[1:] == key[:-1])
        opens = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))
        head = order[opens[np.searchsorted(opens, same, side="right") - 1]]
        pairs = np.concatenate([[order[same], order[same + 1]], [head, order[same + 1]]], axis=1)
        pairs = np.sort(pairs, axis=0)
        pairs = pairs[:, group[pairs[0]] != group[pairs[1]]]
        # By sorting: numpy's own set functions hash, and are slow on numbers as regular as these.
        codes = np.sort(pairs[0] * n + pairs[1])
        codes = codes[np.diff(codes, prepend=-1) > 0]
        if len(refuted):
            at = np.searchsorted(refuted, codes).clip(max=len(refuted) - 1)
            codes = codes[refuted[at] != codes]
        pairs = np.stack([codes // n, codes % n])
        near = _similar(texts, pairs, signatures)
        refuted = np.sort(np.concatenate([refuted, codes[~near]]))
        if near.any():
            links = np.concatenate([links, pairs[:, near]], axis=1)
            edges = sparse.coo_array((np.ones(links.shape[1], np.int8), tuple(links)), shape=(n, n))
            group = connected_components(edges, directed=False)[1]
    return group


def _chunks(texts: np.ndarray) -> list[tuple[int, int]]:
    """Bounds of runs of texts of about _CHUNK_BYTES each."""
    total = np.cumsum([len(text) for text in texts])
    cuts = np.flatnonzero(np.diff(total // _CHUNK_BYTES)) + 1
    bounds = [0, *cuts.tolist(), len(texts)]
    return list(zip(bounds[:-1], bounds[1:], strict=True))


def _pieces(texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(pieces of all texts one after the other as int64, bounds of each text's)."""
    encoded = [text.encode("utf-8", "surrogatepass").ljust(_PIECE) for text in texts]
    lengths = np.array([len(text) for text in encoded])
    flat = np.frombuffer(b"".join(encoded), np.uint8).astype(np.int64)
    count = len(flat) - _PIECE + 1
    pieces = np.zeros(count, np.int64)
    for k in range(_PIECE):
        pieces |= flat[k : count + k] << (8 * k)
    whole = np.ones(len(flat), bool)  # not across the end of a text
    for k in range(1, _PIECE):
        whole[np.cumsum(lengths) - k] = False
    bounds = np.concatenate([[0], np.cumsum(lengths - _PIECE + 1)])
    return pieces[whole[:count]], bounds


def _minhash(pieces: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Signatures [texts, hashes]."""
    rng = np.random.Generator(np.random.PCG64(2008))
    odd = rng.integers(0, 2**31, _BANDS * _ROWS, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    shift = rng.integers(0, 2**32, _BANDS * _ROWS, dtype=np.uint32)
    mixed = pieces.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed >> np.uint64(32)).astype(np.uint32)
    starts = bounds[:-1]
    hashes = [np.minimum.reduceat(mixed * a + c, starts) for a, c in zip(odd, shift, strict=True)]
    return np.stack(hashes, axis=1)


def _band_key(band: np.ndarray) -> np.ndarray:
    key = np.zeros(len(band), np.uint64)
    for column in band.T:
        key = (key ^ column) * np.uint64(0x9E3779B97F4A7C15)
        key ^= key >> np.uint64(32)
    return key


def _similar(texts: np.ndarray, pairs: np.ndarray, signatures: np.ndarray) -> np.ndarray:
    """Which pairs reach SIMILARITY, by their exact Jaccard index."""
    near = np.zeros(pairs.shape[1], bool)
    for start in range(0, pairs.shape[1], 20_000):
        part = pairs[:, start : start + 20_000]
        # The signatures tell the index to about 0.05; four times that off is not worth exact work.
        agree = (signatures[part[0]] == signatures[part[1]]).mean(axis=1)
        likely = np.flatnonzero(agree >= SIMILARITY - 0.2)
        near[start + likely] = _jaccard(texts, part[:, likely]) >= SIMILARITY
    return near


def _jaccard(texts: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    if not pairs.size:
        return np.zeros(0)
    used, local = np.unique(pairs, return_inverse=True)
    pieces, bounds = _pieces(texts[used])
    table = sparse.csr_array(
        (np.ones(len(pieces), np.int32), pieces, bounds), shape=(len(used), 2 ** (8 * _PIECE))
    )
    table.sum_duplicates()
    table.data[:] = 1
    first, second = local.reshape(pairs.shape)
    size = np.diff(table.indptr)
    common = table[first].multiply(table[second]).sum(axis=1)
    return common / (size[first] + size[second] - common)


def near_duplicates(found: pd.DataFrame, split: pd.Series, grouped: bool) -> dict:
    """What the manifest tells of repeated texts.

    Args:
      found: as `find_duplicates` gives it.
      split: of each case.
      grouped: whether the splits were drawn so that groups stay together.

    Returns:
      How many groups of two cases and more there are, and `in_train`: per held-out split the
      cases whose text also stands in train ("same", letters and digits compared) and those
      whose group of near duplicates has a case there ("near").
    """
    sizes = found["group"].value_counts()
    several = sizes[sizes > 1]
    train = found[split == "train"]
    in_train = {}
    for name in SPLITS[1:]:
        own = found[split == name]
        same = own["text"].isin(train["text"])
        near = own["group"].isin(train["group"]) & ~same
        in_train[name] = {"same": int(same.sum()), "near": int(near.sum())}
    return {
        "method": f"MinHash over {_PIECE}-byte pieces, exact Jaccard index >= {SIMILARITY}",
        "groups": len(several),
        "cases_in_groups": int(several.sum()),
        "largest_group": int(sizes.max()) if len(sizes) else 0,
        "kept_together": grouped,
        "in_train": in_train,
    }


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

    found = []
    text, lower = diagnosis, diagnosis.lower()
    # Most texts hold no answer, and a search for a few letters tells so a hundred times faster.
    for task, sign, pattern, replace in (
        ("icd", code[:3].lower(), _CODE, own_code),
        ("regimen", "gy", _DOSE, own_dose),
        ("modality", modality, _own_modality(modality), ""),
    ):
        if sign in lower and (shorter := pattern.sub(replace, text)) != text:
            found.append(task)
            text = shorter
    return Stripped(text.strip() if found else text, tuple(found))


@functools.cache
def _own_modality(modality: str) -> re.Pattern:
    return re.compile(_MODALITY.format(label=re.escape(modality)), re.IGNORECASE)


def answers_left(cases: pd.DataFrame, limit: int = 20_000) -> dict[str, int]:
    """Cases whose diagnosis text still points at their answer, by task; reported, not stripped,
    because these words describe the disease or the plan: the official words of the own code
    ("icd"), the own total dose ("regimen"), a technique or unit of the own modality ("modality").
    Of more than `limit` cases that many are read, at even distances; "read" says how many.
    """
    cases = cases.iloc[:: -(-len(cases) // limit)] if len(cases) else cases
    described = {code: normalise_text(description(code)) for code in cases["icd10"].unique()}
    doses = {text: _own_dose(text) for text in cases["regimen"].unique()}
    left = {"read": len(cases), "icd": 0, "regimen": 0, "modality": 0}
    for text, code, regimen, modality in zip(
        cases["diagnosis"], cases["icd10"], cases["regimen"], cases["modality"], strict=True
    ):
        left["icd"] += described[code] in normalise_text(text)
        dose = doses[regimen]
        left["regimen"] += bool(dose and "g" in text.lower() and dose.search(text))
        left["modality"] += normalise_modality(text) == modality
    return left


def _own_dose(regimen: str) -> re.Pattern | None:
    own = parse_regimen(regimen)
    if own is None or own.total_dose_gy is None:
        return None
    gray = re.escape(f"{own.total_dose_gy:g}")
    centigray = re.escape(f"{own.total_dose_gy * 100:g}")
    return re.compile(rf"(?<![\d.])(?:{gray}\s?(?:gy|cge)|{centigray}\s?cgy)", re.IGNORECASE)
