"""What the rules leave open, settled by people who read the record.

`propose` writes the uncertain rows of an extract on a sheet: what the record says, what the machine
makes of it field by field, and empty columns for an annotator. `settle` reads the sheets of one or
two annotators back, measures how far they agree, and gives what is settled as columns that the
rules put before the record's own fields. Rows on which two annotators differ go to a third sheet,
for adjudication, which is read back in the same way.

An annotator fills `keep` with yes or no. For a row that is kept, an empty `modality`, `regimen` or
`icd10` accepts the machine's proposal; for one that is not, `exclude_reason` says why in a word or
two ("not_treated_here"), without clinical detail: it goes into the manifest. A row without any
entry is left open.
"""

import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from radonc_jax.data import rules
from radonc_jax.data.rows import find_layout, read_rows
from radonc_jax.tasks.icd import nearest_valid, normalise_code
from radonc_jax.tasks.modality import normalise_modality
from radonc_jax.tasks.regimen import parse_regimen, render_regimen

FIELDS = ("modality", "regimen", "icd10")
GIVEN = (
    "diagnosis", "icd10", "prescription", "total_dose_gy", "total_dose_cgy", "fractions",
    "treatment_site", "technique", "energy", "modality", "plan_name", "plan_status", "plan_intent",
    "course_id", "plan_id",
)  # fmt: skip
PROPOSED = tuple(f"proposed_{name}" for name in FIELDS)
ENTRIES = ("keep", *FIELDS, "exclude_reason")
COLUMNS = (
    "row", "record", "case", "reason", *(f"given_{name}" for name in GIVEN), *PROPOSED,
    "other_codes", *ENTRIES,
)  # fmt: skip

_YES = frozenset({"yes", "y", "keep", "1", "true", "x", "ja", "oui"})
_NO = frozenset({"no", "n", "exclude", "0", "false", "nein", "non"})
_LONGEST_CELL = 32_767  # characters, in Excel
_CUT = " [the rest does not fit into a cell]"
_FORMULA = re.compile(r"'*[=+@\-\t\r]")  # to spreadsheet programs, or with apostrophes before it
_NOT_IN_WORKBOOKS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")


# ---------------------------------------------------------------------------------------------
# Out
# ---------------------------------------------------------------------------------------------


# What is not proposed after these reasons: the annotator must say it.
CONTRADICTED = {
    "modality_contradiction": ("modality", "regimen"),
    "regimen_contradiction": ("regimen",),
    "code_contradiction": ("icd10",),
}


def propose(
    extract: pd.DataFrame,
    selection: rules.Selection,
    uncertain: Sequence[str] = rules.UNCERTAIN,
) -> pd.DataFrame:
    """The sheet of uncertain rows, COLUMNS, of patients of whom no row is kept.

    `record` is a fingerprint of the row, by which `settle` knows that a sheet belongs to an
    extract. Rows of one patient share a number in `case`: at most one of them can be kept.
    """
    excluded = selection.excluded
    excluded = excluded[excluded["reason"].isin(uncertain)]
    rows = extract.loc[excluded["row"]]
    patients = rows["patient_id"].str.strip()
    open_ = ~patients.isin(selection.kept["patient_id"].str.strip())
    rows, patients = rows[open_], patients[open_]
    sheet = pd.DataFrame({"row": rows.index.astype(str)}, index=rows.index)
    sheet["record"] = _fingerprints(rows)
    sheet["case"] = (pd.factorize(patients)[0] + 1).astype(str)
    sheet["reason"] = excluded["reason"][open_.to_numpy()].to_numpy()
    for name in GIVEN:
        sheet[f"given_{name}"] = _column(rows, name)
    proposed = _proposals(rows)
    for name in FIELDS:
        sheet[f"proposed_{name}"] = proposed[name]
    # Where the record contradicts itself, any proposal is a guess that a quick "yes" would keep.
    for reason, names in CONTRADICTED.items():
        sheet.loc[sheet["reason"] == reason, [f"proposed_{name}" for name in names]] = ""
    sheet["other_codes"] = proposed["other_codes"]
    sheet[list(ENTRIES)] = ""
    return sheet[list(COLUMNS)].reset_index(drop=True)


def _column(rows: pd.DataFrame, name: str) -> pd.Series:
    if name in rows.columns:
        return rows[name].fillna("").astype(str)
    return pd.Series("", index=rows.index, dtype="str")


def _fingerprints(rows: pd.DataFrame) -> pd.Series:
    # Of nothing but what the sheet shows: whoever holds it could try out patient ids otherwise.
    columns = [_column(rows, name) for name in GIVEN]
    prints = []
    for row, *values in zip(rows.index, *columns, strict=True):
        whole = "\x1f".join([str(row), *values]).encode("utf-8", "replace")
        # The letter keeps spreadsheet programs from reading 12 digits, or 1e5, as a number.
        prints.append("r" + hashlib.sha256(whole).hexdigest()[:12])
    return pd.Series(prints, index=rows.index, dtype="str")


def _read(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(values in normal form, reasons against them) of FIELDS, by the rules' own reading."""
    rows = rows.copy()
    reasons = {"modality": rules.modality_identifiable(rows)}
    reasons["regimen"] = rules.regimen_complete(rows)
    reasons["icd10"] = rules.code_present(rows)
    shaped = reasons["icd10"] == ""
    if shaped.any():
        reasons["icd10"][shaped] = rules.code_valid(rows[shaped])
    reasons = pd.DataFrame(reasons)
    values = rows[list(FIELDS)].fillna("").astype(str)
    return values.where(reasons == "", ""), reasons


def _proposals(rows: pd.DataFrame) -> pd.DataFrame:
    """FIELDS and other_codes: what the rules read, else the likeliest of what they doubt."""
    names = (*GIVEN, *(f"annotated_{name}" for name in FIELDS))
    table = pd.DataFrame({name: _column(rows, name) for name in names}).astype(object)
    if table.empty:
        return pd.DataFrame(columns=[*FIELDS, "other_codes"], dtype=str)
    proposed, _ = _read(table)
    # A contradiction between fields: what the field that is meant for it says.
    for name in ("modality", "technique", "energy", "prescription"):
        missing = proposed["modality"] == ""
        labels = {text: normalise_modality(text) or "" for text in table.loc[missing, name]}
        proposed.loc[missing, "modality"] = table.loc[missing, name].map(labels)
    missing = proposed["regimen"] == ""
    if missing.any():
        # The prescription alone, without the number fields; then the other way round.
        alone = table.assign(
            annotated_modality=proposed["modality"], annotated_regimen=table["prescription"]
        )
        proposed.loc[missing, "regimen"] = _read(alone[missing])[0]["regimen"]
        missing = proposed["regimen"] == ""
        numbers = table.assign(annotated_modality=proposed["modality"], prescription="")
        if missing.any():
            proposed.loc[missing, "regimen"] = _read(numbers[missing])[0]["regimen"]
    pairs = zip(proposed["regimen"], proposed["modality"], strict=True)
    proposed["regimen"] = [_without_other_modality(*pair) for pair in pairs]
    near = {
        text: nearest_valid(code, 4) if (code := normalise_code(text)) else []
        for text in table.loc[proposed["icd10"] == "", "icd10"].unique()
    }
    codes = [near.get(text, []) for text in table["icd10"]]
    known = proposed["icd10"] != ""
    proposed["icd10"] = proposed["icd10"].where(known, [(c or [""])[0] for c in codes])
    proposed["other_codes"] = [
        "" if is_known else " ".join(c[1:]) for c, is_known in zip(codes, known, strict=True)
    ]
    return proposed


def _without_other_modality(regimen: str, modality: str) -> str:
    """The regimen without its technique where that belongs to another modality."""
    if not regimen or normalise_modality(regimen) in (None, modality):
        return regimen
    return render_regimen(replace(parse_regimen(regimen), technique=None, modality=modality))


def to_bytes(sheet: pd.DataFrame, kind: str) -> bytes:
    """The sheet as a file that spreadsheet programs open: csv (UTF-8 with its mark) or xlsx.

    In csv a text that would be a formula begins with an apostrophe, which reading takes off.
    """
    if kind == "csv":
        sheet = sheet.map(lambda text: "'" + text if _FORMULA.match(text) else text)
        return sheet.to_csv(index=False, lineterminator="\r\n").encode("utf-8-sig", "replace")
    from openpyxl import Workbook
    from openpyxl.cell import WriteOnlyCell

    book = Workbook(write_only=True)
    page = book.create_sheet("annotation")
    page.freeze_panes = "A2"

    def cell(text: str) -> WriteOnlyCell:
        text = _NOT_IN_WORKBOOKS.sub(" ", str(text))
        if len(text) > _LONGEST_CELL:
            text = text[: _LONGEST_CELL - len(_CUT)] + _CUT
        made = WriteOnlyCell(page, text)
        made.data_type = "s"  # a text that begins with "=" is no formula
        return made

    page.append([cell(name) for name in sheet.columns])
    for values in sheet.itertuples(index=False, name=None):
        page.append([cell(value) for value in values])
    content = io.BytesIO()
    book.save(content)
    return content.getvalue()


# ---------------------------------------------------------------------------------------------
# Back
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settled:
    """
    Attributes:
      columns: index "row": annotated_decision ("primary" or "exclude"), annotated_modality,
        annotated_regimen, annotated_icd10 (in normal form, for "primary") and annotated_reason
        (for "exclude"), as the rules read them.
      facts: what the manifest tells: files and hashes, agreement, what is settled and open.
      disagreements: the sheet for adjudication: COLUMNS and what each annotator entered. In it,
        `proposed_*` is what both entered, empty where they differ.
    """

    columns: pd.DataFrame
    facts: dict
    disagreements: pd.DataFrame


def settle(
    extract: pd.DataFrame,
    files: Sequence[str | Path],
    adjudication: str | Path | None = None,
    one_per_patient: bool = True,
) -> Settled:
    """Reads the sheets of one or two annotators, and of an adjudicator, and settles what it can.

    A row that one annotator alone filled in is settled by that entry; one that both filled in, by
    what they agree on (decision, and for a kept row all three answers in normal form), else by the
    adjudicator. Where both keep a row of a patient but not the same one, the adjudicator settles
    all rows of that patient. Cohen's kappa is scikit-learn's.

    Args:
      extract: index "row", as it was when the sheets were written.
      files: of the annotators; csv, tsv, xlsx ...
      adjudication: the filled-in sheet of disagreements.
      one_per_patient: whether a patient can have one kept row only.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not one or two annotators, a sheet that is damaged, lacks columns, has a row twice
        or belongs to another extract, an entry that is not valid (file, row and column are named,
        never what stands there), an adjudication of what nobody disagrees on, or two rows of one
        patient that the same person keeps.
    """
    files = [Path(file) for file in files]
    if len(files) not in (1, 2):
        raise ValueError(f"--annotations names {len(files)} files; give one or two annotators'")
    sheets = [_read_sheet(file, extract) for file in files]
    hashes = [_sha256(file) for file in files]
    if len(set(hashes)) < len(files):
        raise ValueError(
            f"{files[0]} and {files[1]} are the same; agreement with oneself means nothing"
        )
    facts = {
        "files": [
            {"name": file.name, "sha256": value, "entries": len(sheet)}
            for file, value, sheet in zip(files, hashes, sheets, strict=True)
        ]
    }
    first = sheets[0]
    second = sheets[1] if len(sheets) == 2 else first.iloc[:0]
    both = first.index.intersection(second.index)
    differ = both[~_agree(first.loc[both], second.loc[both])]
    if one_per_patient:
        for file, sheet in zip(files, sheets, strict=True):
            _check_one_each(extract, sheet, file)
        differ = differ.union(_of_other_primary(extract, first, second))
    settled = pd.concat([first, second.drop(both)]).drop(differ)
    facts["annotated_twice"] = len(both)
    facts["agreement"] = _agreement(first.loc[both], second.loc[both])
    facts["disagreements"] = len(differ)
    disagreements = _for_adjudication(first.reindex(differ), second.reindex(differ))
    if adjudication is not None:
        path = Path(adjudication)
        final = _read_sheet(path, extract)
        strange = final.index.difference(differ)
        if len(strange):
            raise ValueError(
                f"{path}: row {int(final.loc[strange[0], 'line'])} settles row {strange[0]} of the "
                "extract, on which the annotators do not disagree; take it out, or correct their "
                "sheets"
            )
        if one_per_patient:
            _check_one_each(extract, final, path)
        settled = pd.concat([settled, final])
        disagreements = disagreements[~disagreements["row"].astype(int).isin(final.index)]
        facts["adjudication"] = {
            "name": path.name, "sha256": _sha256(path), "entries": len(final)
        }  # fmt: skip
    settled = settled.sort_index()
    primary = settled["decision"] == "primary"
    facts["settled"] = {
        "primary": int(primary.sum()),
        "exclude": settled.loc[~primary, "exclude_reason"].value_counts().sort_index().to_dict(),
    }
    facts["open_disagreements"] = len(disagreements)
    columns = pd.DataFrame(
        {
            "annotated_decision": settled["decision"],
            **{f"annotated_{name}": settled[name] for name in FIELDS},
            "annotated_reason": settled["exclude_reason"],
        }
    ).rename_axis("row")
    return Settled(columns, facts, disagreements.reset_index(drop=True))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _without_quote(text: str) -> str:
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def _read_sheet(path: Path, extract: pd.DataFrame) -> pd.DataFrame:
    """The filled-in rows of a sheet: index the extract's row, columns COLUMNS, `line` (row of the
    sheet), `decision`; FIELDS in normal form, `exclude_reason` as a slug."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give an annotator's sheet")
    lines = read_rows(path, find_layout(path))
    _, header = next(lines, (1, []))
    header = [name.strip() for name in header]
    needed = ["row", "record", *ENTRIES, *PROPOSED]
    missing = [name for name in needed if name not in header]
    if missing:
        raise ValueError(
            f"{path}: no column {', '.join(missing)} in row 1; give a sheet that prepare wrote as "
            f"annotation.csv or disagreements.csv. Columns there: {', '.join(header) or 'none'}"
        )
    table = [(line, *values) for line, values in lines]
    sheet = pd.DataFrame(table, columns=["line", *header]).reindex(columns=["line", *COLUMNS])
    sheet[list(COLUMNS)] = sheet[list(COLUMNS)].fillna("").map(_without_quote)
    for name in needed:
        sheet[name] = sheet[name].str.strip()
    filled = (sheet[list(ENTRIES)] != "").any(axis=1)
    sheet = sheet[filled | (sheet["row"] != "")]

    def check(wrong: pd.Series, column: str, problem: str) -> None:
        if wrong.any():
            line = int(sheet.loc[wrong, "line"].iloc[0])
            more = f" (and {int(wrong.sum()) - 1} more rows)" if wrong.sum() > 1 else ""
            raise ValueError(f"{path}: row {line}, column {column}: {problem}{more}")

    numbers = pd.to_numeric(sheet["row"], errors="coerce")
    known = numbers.isin(extract.index)
    check(~known, "row", "no such row in the extract; the sheet belongs to another one")
    sheet.index = numbers.astype(int)
    check(sheet["row"].duplicated(), "row", "stands twice in the sheet; keep one of them")
    record = _fingerprints(extract.loc[sheet.index])
    check(
        sheet["record"] != record,
        "record",
        "the extract has another record in that row; the extract or its de-identification has "
        "changed since the sheet was written",
    )
    sheet = sheet[(sheet[list(ENTRIES)] != "").any(axis=1)].copy()
    keep = sheet["keep"].str.casefold()
    yes, no = keep.isin(_YES), keep.isin(_NO)
    check(~(yes | no), "keep", "yes or no is needed where anything is filled in")
    sheet["decision"] = np.where(yes, "primary", "exclude")
    check(yes & (sheet["exclude_reason"] != ""), "exclude_reason", "given for a row that is kept")
    slug = sheet["exclude_reason"].str.casefold().str.replace(r"[\s-]+", "_", regex=True)
    slug = slug.mask(slug == "", "no_reason_given")
    check(
        no & ~slug.str.fullmatch(r"[a-z0-9_]{1,40}"),
        "exclude_reason",
        "write a word or two of letters and digits, such as not_treated_here",
    )
    sheet["exclude_reason"] = ("annotated_" + slug).where(no, "")
    for name in FIELDS:
        sheet[name] = sheet[name].mask(sheet[name] == "", sheet[f"proposed_{name}"]).where(yes, "")
        check(yes & (sheet[name] == ""), name, "empty, and nothing was proposed that it could mean")
    if yes.any():
        kept = sheet[yes]
        blank = pd.DataFrame("", index=kept.index, columns=list(GIVEN), dtype=object)
        entries = {f"annotated_{name}": kept[name].astype(object) for name in FIELDS}
        values, reasons = _read(blank.assign(**entries))
        for name in FIELDS:
            against = reasons[name].str.partition(":")[0].reindex(sheet.index, fill_value="")
            for reason in against[against != ""].unique():
                check(against == reason, name, f"not valid ({reason})")
        said = kept["regimen"].map(normalise_modality)
        other = said.notna() & (said != values["modality"])
        check(
            other.reindex(sheet.index, fill_value=False),
            "regimen",
            "names another modality than the column modality",
        )
        sheet.loc[yes, list(FIELDS)] = values
    return sheet


def _agree(first: pd.DataFrame, second: pd.DataFrame) -> np.ndarray:
    same = (first["decision"] == second["decision"]).to_numpy()
    kept = (first["decision"] == "primary").to_numpy()
    answers = (first[list(FIELDS)] == second[list(FIELDS)]).to_numpy().all(axis=1)
    return same & (answers | ~kept)


def _agreement(first: pd.DataFrame, second: pd.DataFrame) -> dict[str, dict]:
    """Per field: `n` rows that both filled in, share of `equal` entries, Cohen's `kappa` (None
    where it is not defined: no rows, or one single entry throughout)."""
    same = first["decision"] == second["decision"]
    kept = same & (first["decision"] == "primary")
    left_out = same & ~kept
    everyone = pd.Series(True, index=first.index)
    rows = {"decision": everyone, **dict.fromkeys(FIELDS, kept), "exclude_reason": left_out}
    return {name: _kappa(first.loc[r, name], second.loc[r, name]) for name, r in rows.items()}


def _kappa(first: pd.Series, second: pd.Series) -> dict:
    from sklearn.metrics import cohen_kappa_score

    if first.empty:
        return {"n": 0, "equal": None, "kappa": None}
    several = len(set(first) | set(second)) > 1
    kappa = float(cohen_kappa_score(first, second)) if several else None
    return {"n": len(first), "equal": float((first == second).mean()), "kappa": kappa}


def _of_other_primary(extract: pd.DataFrame, first: pd.DataFrame, second: pd.DataFrame) -> pd.Index:
    """Rows, filled in by anybody, of patients of whom each annotator keeps another row."""
    rows = first.index.union(second.index)
    patients = extract.loc[rows, "patient_id"].str.strip()
    primary = [sheet.index[sheet["decision"] == "primary"] for sheet in (first, second)]
    one, two = (pd.Series(kept, index=patients[kept]) for kept in primary)
    twice = one.index.intersection(two.index)
    return rows[patients.isin(twice[(one[twice] != two[twice]).to_numpy()])]


def _for_adjudication(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """Of two sheets with the same index; the rows that one annotator left empty are NaN in it."""
    sheet = first[list(COLUMNS)].fillna(second[list(COLUMNS)])
    for name in FIELDS:
        agreed = (first[name] == second[name]) & (first[name] != "")
        sheet[f"proposed_{name}"] = first[name].where(agreed, "")
    keep = {"primary": "yes", "exclude": "no"}
    for title, entries in (("first", first), ("second", second)):
        sheet[f"{title}_keep"] = entries["decision"].map(keep).fillna("")
        for name in (*FIELDS, "exclude_reason"):
            sheet[f"{title}_{name}"] = entries[name].fillna("").str.removeprefix("annotated_")
    sheet[list(ENTRIES)] = ""
    seen = [name for name in sheet.columns if name not in ENTRIES]
    return sheet[[*seen, *ENTRIES]]


def _check_one_each(extract: pd.DataFrame, sheet: pd.DataFrame, file: Path) -> None:
    primary = sheet.index[sheet["decision"] == "primary"]
    patients = extract.loc[primary, "patient_id"].str.strip()
    again = patients[patients.duplicated(keep=False)]
    if len(again):
        rows = again.index[again == again.iloc[0]]
        raise ValueError(
            f"{file}: rows {' and '.join(map(str, rows))} of the extract are of one patient and "
            "all are kept; keep one of them"
        )


def check_sheets_are_safe(folder: Path, hashes: dict[str, str]) -> None:
    """
    Args:
      folder: a cohort that is about to be replaced.
      hashes: of its files, from its manifest.

    Raises:
      FileExistsError: somebody has filled in a sheet where prepare wrote it.
    """
    for path in sorted([*folder.glob("annotation.*"), *folder.glob("disagreements.*")]):
        if _sha256(path) != hashes.get(path.name):
            raise FileExistsError(
                f"{path} has been changed since prepare wrote it, and --overwrite would delete "
                "it; move it elsewhere first"
            )
