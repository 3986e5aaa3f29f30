"""Reads a raw extract (csv, tsv, xlsx, parquet, jsonl) into a table with the project's names.

Every value is text as it stands in the file; what it means is decided in `cohort`. The index of the
table is called "row" and counts as a spreadsheet does: the header is row 1, the first record row 2
(in jsonl, which has no header, a row is a line).
"""

import csv
import io
import json
from pathlib import Path

import pandas as pd

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
    "plan_intent": "primary, boost ...",
}
REQUIRED = ("patient_id", "diagnosis", "icd10")
ALTERNATIVES = (
    ("prescription", "total_dose_gy", "total_dose_cgy"),
    ("modality", "technique", "energy", "prescription"),
)


def parse_columns(pairs: list[str]) -> dict[str, str]:
    """["diagnosis=Dx", ...] -> {"diagnosis": "Dx"}: the project's name and the file's name.

    Raises:
      ValueError: an entry is no pair, names an unknown column, or names a column twice.
    """
    mapping: dict[str, str] = {}
    for pair in pairs:
        name, separator, header = pair.partition("=")
        name, header = name.strip(), header.strip()
        if not separator or not name or not header:
            raise ValueError(f"--columns entry {pair!r} is not NAME=HEADER, e.g. diagnosis=Dx")
        if name not in COLUMNS:
            raise ValueError(f"--columns names {name!r}; the columns are {', '.join(COLUMNS)}")
        if name in mapping:
            raise ValueError(f"--columns names {name!r} twice; give one header for it")
        mapping[name] = header
    return mapping


def read_extract(path: str | Path, columns: dict[str, str] | None = None) -> pd.DataFrame:
    """The records of an extract as text, index "row", columns named as in COLUMNS.

    Columns that COLUMNS does not know keep their own names. A header matches a name whatever its
    case and however its words are joined ("Patient ID"); `columns` maps the others.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: unknown kind of file, no records, bytes that are not UTF-8, a row of another
        length than the header, a header twice, or a column that is needed and not there.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give the extract with --input")
    readers = {
        ".csv": lambda p: _read_delimited(p, ","),
        ".tsv": lambda p: _read_delimited(p, "\t"),
        ".xlsx": _read_xlsx,
        ".parquet": _read_parquet,
        ".jsonl": _read_jsonl,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"{path}: {path.suffix or 'a file without an ending'} is not read; "
            f"use one of {', '.join(readers)}"
        )
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty; export it again")
    table = reader(path)
    table.columns = [str(name).strip() for name in table.columns]
    table = _name_columns(path, table, columns or {})
    if table.empty:
        raise ValueError(f"{path}: a header but no records below it; export it again")
    return table.rename_axis("row")


def _read_delimited(path: Path, delimiter: str) -> pd.DataFrame:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        column = error.start - content.rfind(b"\n", 0, error.start)
        raise ValueError(
            f"{path}: line {line}, byte {column} is not UTF-8; save the file as UTF-8"
        ) from None
    # csv rather than pandas.read_csv, which fills short rows up without a word.
    csv.field_size_limit(2**31 - 1)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    records: list[list[str]] = []
    numbers: list[int] = []
    header: list[str] | None = None
    number = 0
    try:
        for number, fields in enumerate(rows, 1):
            if header is None:
                header = fields
            elif fields:
                if len(fields) != len(header):
                    raise ValueError(
                        f"{path}: row {number} (line {rows.line_num}) has {len(fields)} "
                        f"columns, the header has {len(header)}; look for a stray delimiter or "
                        "quote there"
                    )
                records.append(fields)
                numbers.append(number)
    except csv.Error as error:
        raise ValueError(
            f"{path}: row {number + 1} (line {rows.line_num}): {error}; correct the quotes there"
        ) from None
    return pd.DataFrame(records, index=numbers, columns=header or [], dtype=str)


def _read_xlsx(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_excel(path, dtype=str, keep_default_na=False, engine="openpyxl")
    except Exception as error:  # openpyxl and zipfile raise many kinds for a broken workbook
        raise ValueError(f"{path}: not a readable workbook ({type(error).__name__})") from None
    return _numbered(table.fillna("").astype(str))


def _read_parquet(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable Parquet file ({type(error).__name__})") from None
    return _numbered(_as_text(table))


def _numbered(table: pd.DataFrame) -> pd.DataFrame:
    return table.set_axis(pd.RangeIndex(2, len(table) + 2))


def _read_jsonl(path: Path) -> pd.DataFrame:
    records, numbers = [], []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            raise ValueError(f"{path}: line {number} is not JSON; correct it") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}: line {number} is not a JSON object of column: value")
        records.append(record)
        numbers.append(number)
    return _as_text(pd.DataFrame(records, index=numbers))


def _as_text(table: pd.DataFrame) -> pd.DataFrame:
    def text(value) -> str:
        if value is None or (isinstance(value, float) and value != value) or value is pd.NaT:
            return ""
        # Whole numbers that a gap in their column turned into floats.
        if isinstance(value, float) and value.is_integer():
            return str(int(value))
        return "" if value is pd.NA else str(value)

    return table.map(text).astype(str) if len(table) else table


def _plain(name: str) -> str:
    return "_".join(name.casefold().replace("-", " ").replace("_", " ").split())


def _name_columns(path: Path, table: pd.DataFrame, columns: dict[str, str]) -> pd.DataFrame:
    there = ", ".join(table.columns) or "none"
    repeated = table.columns[table.columns.duplicated()].unique()
    if len(repeated):
        raise ValueError(
            f"{path}: column {repeated[0]!r} stands {list(table.columns).count(repeated[0])} "
            f"times in row 1; rename all but one. Columns there: {there}"
        )
    renames: dict[str, str] = {}
    for name, header in columns.items():
        if header not in table.columns:
            raise ValueError(
                f"{path}: no column {header!r} in row 1, which --columns gives for {name}. "
                f"Columns there: {there}"
            )
        renames[header] = name
    mapped = set(columns)
    for header in table.columns:
        name = _plain(header)
        if header in renames or name not in COLUMNS:
            continue
        if name in mapped:
            # A column of that name that --columns passes over must not stand in for it.
            renames[header] = f"{header} (not used)"
        elif name in renames.values():
            raise ValueError(
                f"{path}: more than one column could be {name}; choose one with "
                f"--columns={name}=HEADER. Columns there: {there}"
            )
        else:
            renames[header] = name
    table = table.rename(columns=renames)
    missing = [name for name in REQUIRED if name not in table.columns]
    if missing:
        raise ValueError(
            f"{path}: no column for {', '.join(missing)} in row 1; name it with "
            f"--columns={missing[0]}=HEADER. Columns there: {there}"
        )
    for names in ALTERNATIVES:
        if not set(names) & set(table.columns):
            raise ValueError(
                f"{path}: at least one of {', '.join(names)} is needed in row 1; name it with "
                f"--columns={names[0]}=HEADER. Columns there: {there}"
            )
    return table
