"""Reads a raw extract (csv, tsv, xlsx, parquet, jsonl, a `datasets` folder) into a table with the
project's names.

Every value is text as it stands in the file; what it means is decided in `rules`. The index of the
table is called "row" and counts as a spreadsheet does: the header is row 1, the first record row 2
(in jsonl, which has no header, a row is a line).
"""

import difflib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa

from radonc_jax.data.rows import Layout, Row, find_layout, read_rows

# Columns that the inclusion rules read. Files may carry more.
COLUMNS = {
    "patient_id": "identifies the patient",
    "diagnosis": "free text of the diagnosis",
    "icd10": "ICD-10-CM code",
    "prescription": "free text of the regimen",
    "total_dose_gy": "total dose in Gy",
    "total_dose_cgy": "total dose in cGy",
    "fractions": "number of fractions",
    "treatment_site": "what is treated, with its side",
    "technique": "VMAT, PBS, HDR ...",
    "energy": "6 MV, 9 MeV ...",
    "modality": "photon, proton, electron or brachytherapy",
    "diagnosis_id": "tells a patient's diagnosis records apart",
    "course_id": "tells a patient's courses apart",
    "plan_id": "identifies the plan",
    "plan_name": "short name of the plan",
    "plan_status": "completed, cancelled, superseded ...",
    "plan_intent": "primary, boost, palliative ...",
    "site": "disease site",
    "stage": "stage or stage group",
    "sex": "of the patient",
    "age": "of the patient in years",
    "institution": "hospital or machine site, for a split by site",
    "start_date": "first day of treatment, for a split by date",
}
# What annotators settled. Rules obey these before all else, so only annotation sheets bring them.
ANNOTATED = (
    "annotated_decision",
    "annotated_reason",
    "annotated_modality",
    "annotated_regimen",
    "annotated_icd10",
)
REQUIRED = ("patient_id", "diagnosis", "icd10")
ALTERNATIVES = (
    ("prescription", "total_dose_gy", "total_dose_cgy"),
    ("modality", "technique", "energy", "prescription"),
)
UNITS = ("plan", "course", "patient")
# How exports of oncology information systems head these columns. Only ever a suggestion: a column
# of another meaning must not slip in unseen.
_USUAL_HEADERS = {
    "patient_id": "mrn|patient|pat id|patient number|patient no|medical record number|subject|pid",
    "diagnosis": "dx|diagnosis text|diagnosis description|diagnosis name|dx description|"
    "primary diagnosis|clinical diagnosis|problem|diag|description",
    "icd10": "icd|icd 10|icd code|icd 10 code|icd10 code|icd 10 cm|icd10cm|diagnosis code|dx code|"
    "diagnosis icd|code",
    "prescription": "rx|regimen|dose prescription|prescription text|rx text|prescribed dose text|"
    "treatment regimen|fractionation",
    "total_dose_gy": "dose gy|total dose|prescribed dose gy|rx dose gy|dose|prescribed dose",
    "total_dose_cgy": "dose cgy|prescribed dose cgy|rx dose cgy|dose total cgy",
    "fractions": "fx|number of fractions|no of fractions|nfx|fraction count|planned fractions",
    "treatment_site": "target|tx site|rx site|treated site|region|anatomical site|body site",
    "technique": "treatment technique|rx technique|tx technique|delivery technique",
    "energy": "beam energy|energies|nominal energy",
    "modality": "treatment modality|beam type|radiation type|particle|treatment type",
}
_CHUNK = 20_000  # rows that are Python objects at a time


def parse_columns(entries: Sequence[str]) -> dict[str, str]:
    """["diagnosis=Dx", ...] -> {"diagnosis": "Dx"}: the project's name and the file's name.

    An entry that ends in .json is a file that holds such a mapping.

    Raises:
      FileNotFoundError: there is no such mapping file.
      ValueError: an entry is no pair, names an unknown column, or names a column or a header twice.
    """
    pairs: list[tuple[str, str]] = []
    for entry in entries:
        if "=" not in entry and entry.strip().casefold().endswith(".json"):
            pairs += _mapping_file(Path(entry.strip()))
            continue
        name, separator, header = entry.partition("=")
        name, header = name.strip(), header.strip()
        if not separator or not name or not header:
            raise ValueError(
                f"--columns entry {entry!r} is not NAME=HEADER, e.g. diagnosis=Dx, or a .json file"
            )
        pairs.append((name, header))
    mapping: dict[str, str] = {}
    for name, header in pairs:
        if name not in COLUMNS:
            raise ValueError(f"--columns names {name!r}; the columns are {', '.join(COLUMNS)}")
        if name in mapping:
            raise ValueError(f"--columns names {name!r} twice; give one header for it")
        if header in mapping.values():
            raise ValueError(f"--columns gives header {header!r} to two columns; give each its own")
        mapping[name] = header
    return mapping


def _mapping_file(path: Path) -> list[tuple[str, str]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give --columns=NAME=HEADER or a .json file")
    try:
        pairs = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=list)
        if isinstance(pairs, list) and all(
            isinstance(header, str) and header.strip() for _, header in pairs
        ):
            return [(name.strip(), header.strip()) for name, header in pairs]
    except (ValueError, TypeError, RecursionError):
        pass
    raise ValueError(f'{path}: not a JSON object of column: header, e.g. {{"diagnosis": "Dx"}}')


def read_extract(
    path: str | Path, columns: dict[str, str] | None = None, layout: Layout | None = None
) -> pd.DataFrame:
    """The records of an extract as text, index "row", columns named as in COLUMNS.

    Columns that COLUMNS does not know keep their own names. A header matches a name whatever its
    case and however its words are joined ("Patient ID"); `columns` maps the others.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: unknown kind of file, no records, bytes that are no text, a row of another
        length than the header, a header twice, or a column that is needed and not there.
    """
    path = Path(path)
    if path.is_file() and path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty; export it again")
    layout = layout or find_layout(path)
    rows = read_rows(path, layout)
    _, header = next(rows, (1, []))
    # Programs leave a delimiter at the end of every row, and so a column without a name.
    header = [
        name.strip() or f"(column {place} has no name)" for place, name in enumerate(header, 1)
    ]
    names = _name_columns(path, header, columns or {})
    table = _collect(path, rows, names)
    if table.empty:
        raise ValueError(f"{path}: a header but no records below it; export it again")
    return table


def _collect(path: Path, rows: Iterator[Row], names: list[str]) -> pd.DataFrame:
    """Rows as Arrow text, a chunk at a time: as Python objects a million of them take 2 GiB."""
    schema = pa.schema([(name, pa.large_string()) for name in names])
    parts, numbers = [], []
    while chunk := list(itertools.islice(rows, _CHUNK)):
        numbers += [number for number, _ in chunk]
        cells = zip(*(values for _, values in chunk), strict=True)
        try:
            columns = [pa.array(column, pa.large_string()) for column in cells]
        except UnicodeEncodeError:
            raise ValueError(
                f"{path}: a cell of rows {chunk[0][0]} to {chunk[-1][0]} holds half a surrogate "
                "pair, which is no text; export it again"
            ) from None
        parts.append(pa.RecordBatch.from_arrays(columns, schema=schema))
    table = pa.Table.from_batches(parts, schema=schema)
    parts.clear()
    return table.to_pandas().set_axis(pd.Index(numbers, dtype="int64", name="row"))


def _plain(name: str) -> str:
    return "_".join(name.casefold().replace("-", " ").replace("_", " ").split())


def looks_like_a_record(header: Sequence[str]) -> bool:
    """Whether row 1 is no header, so that an error must not quote it."""
    known = {_plain(name) for name in (*COLUMNS, *"|".join(_USUAL_HEADERS.values()).split("|"))}
    return not known & {_plain(name) for name in header} and any(
        len(name) > 40 or any(sign.isdigit() for sign in name) for name in header
    )


def _name_columns(path: Path, header: list[str], columns: dict[str, str]) -> list[str]:
    if looks_like_a_record(header) and not set(columns.values()) & set(header):
        raise ValueError(
            f"{path}: row 1 has {len(header)} cells and no known column name; it looks like a "
            "record. Put the names of the columns into row 1, or give another --delimiter"
        )
    there = ", ".join(header) or "none"
    repeated = next((name for name in header if header.count(name) > 1), None)
    if repeated is not None:
        raise ValueError(
            f"{path}: column {repeated!r} stands {header.count(repeated)} times in row 1; rename "
            f"all but one. Columns there: {there}"
        )
    obeyed = next((name for name in header if name in ANNOTATED), None)
    if obeyed is not None:
        raise ValueError(
            f"{path}: column {obeyed!r} in row 1 is kept for what annotators settled; rename or "
            "remove it, and give annotation sheets with --annotations"
        )
    renames: dict[str, str] = {}
    for name, wanted in columns.items():
        if wanted not in header:
            raise ValueError(
                f"{path}: no column {wanted!r} in row 1, which --columns gives for {name}"
                f"{did_you_mean(wanted, header)}. Columns there: {there}"
            )
        renames[wanted] = name
    for found in header:
        name = _plain(found)
        if found in renames or name not in COLUMNS:
            continue
        if name in columns:
            # A column of that name that --columns passes over must not stand in for it.
            renames[found] = f"{found} (not used)"
        elif name in renames.values():
            raise ValueError(
                f"{path}: more than one column could be {name}; choose one with "
                f"--columns={name}=HEADER. Columns there: {there}"
            )
        else:
            renames[found] = name
    names = [renames.get(found, found) for found in header]
    missing = [name for name in REQUIRED if name not in names]
    alternatives = [group for group in ALTERNATIVES if not set(group) & set(names)]
    if not missing and not alternatives:
        return names
    free = [found for found in header if found not in renames]
    guesses = {name: guess_header(name, free) for name in [*missing, *sum(alternatives, ())]}
    offer = ",".join(f"{name}={guess}" for name, guess in guesses.items() if guess)
    offer = f"Perhaps --columns={offer}. " if offer else ""
    if missing:
        raise ValueError(
            f"{path}: no column for {', '.join(missing)} in row 1; name it with "
            f"--columns={missing[0]}=HEADER. {offer}Columns there: {there}"
        )
    raise ValueError(
        f"{path}: at least one of {', '.join(alternatives[0])} is needed in row 1; name it with "
        f"--columns={alternatives[0][0]}=HEADER. {offer}Columns there: {there}"
    )


def guess_header(name: str, header: Sequence[str]) -> str | None:
    """The header that most likely stands for the column `name`, or None where none is like it."""
    plain = {_plain(found).replace("_", " "): found for found in header if "," not in found}
    usual = [name.replace("_", " "), *_USUAL_HEADERS.get(name, "").split("|")]
    for wanted in usual:
        if wanted in plain:
            return plain[wanted]
    for wanted in usual:
        close = difflib.get_close_matches(wanted, plain, n=1, cutoff=0.85)
        if close and len(wanted) > 3:
            return plain[close[0]]
    return None


def did_you_mean(wanted: str, header: Sequence[str]) -> str:
    """What an error adds where no header is `wanted` to the letter: the one that is likely meant,
    such as the same in another case; "" where none is like it."""
    guess = guess_header(_plain(wanted), header)
    return "" if guess is None else f" (did you mean {guess!r}?)"


def check_unit(path: str | Path, extract: pd.DataFrame, unit: str) -> None:
    """Holds the table to what a row of it is said to be.

    Args:
      unit: "patient": no patient has two rows. "course": no course of a patient has two rows.
        "plan": fields, beams or fractions of a plan are no rows of their own.

    Raises:
      ValueError: it is otherwise; the first rows are named.
    """
    if unit not in UNITS:
        raise ValueError(f"--rows must be one of {', '.join(UNITS)}, not {unit!r}")
    keys = {
        "patient": ["patient_id"],
        "course": ["patient_id", "course_id"],
        # A patient's plans stand once for each of the diagnoses in some exports.
        "plan": ["patient_id", "course_id", "plan_id", "diagnosis_id", "diagnosis", "icd10"],
    }[unit]
    ids = pd.DataFrame({key: extract[key].str.strip() for key in keys if key in extract.columns})
    if unit == "plan" and "plan_id" not in ids.columns:
        return  # nothing tells plans apart; the rules count rows
    known = (ids[["patient_id", *(["plan_id"] if unit == "plan" else [])]] != "").all(axis=1)
    repeated = ids[known].duplicated(keep=False)
    rows = extract.loc[repeated.index[repeated]].drop_duplicates()  # whole repeats: see the rules
    repeated = ids.loc[rows.index].duplicated(keep=False)
    repeated = ids.loc[repeated.index[repeated]]
    count = len(repeated)
    # Single plans that stand twice are the rules' business; many say that rows are no plans.
    if count == 0 or (unit == "plan" and count <= 0.1 * len(extract)):
        return
    same = repeated.index[(repeated == repeated.iloc[0]).all(axis=1)]
    lesser = "field, beam or fraction" if unit == "plan" else "plan"
    column = {"patient": "patient_id", "course": "course_id", "plan": "plan_id"}[unit]
    raise ValueError(
        f"{path}: rows {same[0]} and {same[1]}, column {column}, are of the same {unit}, as are "
        f"{count:,} of {len(extract):,} rows; --rows={unit} needs one row each. Is a row a "
        f"{lesser}? "
        + (
            "Export one row a plan"
            if unit == "plan"
            else f"Choose --rows={UNITS[UNITS.index(unit) - 1]}"
        )
    )
