"""Inclusion rules, and the cohort folder they lead to.

The unit that is assessed, kept or excluded is the patient case: all rows of one patient. A kept
case is the one row of its patient that the rules leave, the primary plan. Every other row has a
reason, those of kept patients too ("boost_plan").
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from radonc_jax.data.splits import (
    SPLITS,
    assign_splits,
    check_no_patient_crosses,
    near_duplicates,
    strip_answers,
)
from radonc_jax.tasks.base import Record
from radonc_jax.tasks.icd import is_leaf, nearest_valid, normalise_code
from radonc_jax.tasks.modality import normalise_modality
from radonc_jax.tasks.regimen import DOSE_TOLERANCE_GY, Regimen, parse_regimen, render_regimen

FIELDS = ("case_id", "patient_id", "diagnosis", "regimen", "modality", "icd10")
CARRIED = ("site", "sex", "age")  # of the extract's further columns, where it has them
TASK_FIELDS = ("regimen", "modality", "icd10")

_NO_TEXT = {"", "-", "--", "n/a", "na", "nan", "none", "null", "unknown", "."}


# ---------------------------------------------------------------------------------------------
# Rules. Each takes the rows that are left and gives a reason for those that go, "" for the others;
# it may fill columns that later rules and the cohort need.
# ---------------------------------------------------------------------------------------------


def _column(rows: pd.DataFrame, name: str) -> pd.Series:
    if name in rows.columns:
        return rows[name].fillna("").astype(str).str.strip()
    return pd.Series("", index=rows.index)


def _reasons(rows: pd.DataFrame, *cases: tuple[pd.Series, str]) -> pd.Series:
    """The first reason whose mask holds."""
    reasons = pd.Series("", index=rows.index)
    for mask, reason in reversed(cases):
        reasons[mask] = reason
    return reasons


def patient_known(rows: pd.DataFrame) -> pd.Series:
    """A row without a patient cannot be kept out of two splits. Each counts as a case."""
    return _reasons(rows, (_column(rows, "patient_id") == "", "no_patient_id"))


def single_diagnosis(rows: pd.DataFrame) -> pd.Series:
    """One diagnosis record per patient: one record number, one text, one code, where given."""
    several = pd.Series(False, index=rows.index)
    for name in ("diagnosis_id", "diagnosis", "icd10"):
        values = _column(rows, name).str.casefold().str.split().str.join(" ")
        if name == "icd10":
            values = values.str.replace(".", "", regex=False)
        counts = values[~values.isin(_NO_TEXT)].groupby(rows["patient_id"]).nunique()
        several |= rows["patient_id"].map(counts).fillna(0) > 1
    return _reasons(rows, (several, "several_diagnoses"))


def plan_delivered(rows: pd.DataFrame) -> pd.Series:
    """Plans that were given up or replaced are not what the patient was treated with."""
    status, name = _column(rows, "plan_status"), _column(rows, "plan_name")
    cancelled = status.str.contains(
        r"cancel|unapprov|reject|abort|not treated|draft|planning only", case=False
    )
    superseded = status.str.contains(r"supersed|replan|retired|replaced|obsolete", case=False)
    test = name.str.contains(r"\b(?:qa|phantom|test)\b", case=False)
    return _reasons(
        rows, (cancelled, "plan_cancelled"), (superseded, "plan_superseded"), (test, "qa_plan")
    )


def plan_not_boost(rows: pd.DataFrame) -> pd.Series:
    """A boost has no regimen of its own: it is part of the primary plan's course."""
    intent, name = _column(rows, "plan_intent"), _column(rows, "plan_name")
    boost = intent.str.contains(r"boost|cone.?down", case=False) | name.str.contains(
        r"\b(?:boost|bst|cd)\b|cone.?down", case=False
    )
    return _reasons(rows, (boost, "boost_plan"))


def one_primary_plan(rows: pd.DataFrame) -> pd.Series:
    """What is left must be one plan. Two of one course compete, two courses are a re-treatment."""
    plans = rows.groupby("patient_id")["patient_id"].transform("size")
    courses = _column(rows, "course_id").groupby(rows["patient_id"]).transform("nunique")
    return _reasons(rows, (courses > 1, "several_courses"), (plans > 1, "several_primary_plans"))


def diagnosis_present(rows: pd.DataFrame) -> pd.Series:
    missing = _column(rows, "diagnosis").str.casefold().isin(_NO_TEXT)
    return _reasons(rows, (missing, "no_diagnosis_text"))


def modality_identifiable(rows: pd.DataFrame) -> pd.Series:
    """From the field, technique, energy and prescription together; a contradiction is no guess.

    Fills the column `modality` with the label.
    """
    names = ("modality", "technique", "energy", "prescription")
    parts = pd.DataFrame({name: _column(rows, name) for name in names})
    known: dict[str, str | None] = {}

    def read(text: str) -> str | None:
        if text not in known:
            known[text] = normalise_modality(text)
        return known[text]

    labels = (parts.agg(" ; ".join, axis=1)).map(read)
    stated = parts.map(lambda text: bool(read(text))).any(axis=1)
    rows["modality"] = labels
    return _reasons(
        rows,
        (labels.isna() & stated, "modality_contradiction"),
        (labels.isna(), "modality_unknown"),
    )


def regimen_complete(rows: pd.DataFrame) -> pd.Series:
    """Dose and fractions, from the prescription or the number fields; both must agree.

    Fills the column `regimen` with the canonical text.
    """
    names = (
        "prescription", "treatment_site", "technique", "modality", "fractions",
        "total_dose_gy", "total_dose_cgy",
    )  # fmt: skip
    fields = pd.DataFrame({name: _column(rows, name) for name in names})
    # Exports repeat themselves: each distinct set of fields is read once.
    distinct = {values: _read_regimen(dict(zip(names, values, strict=True)))
                for values in set(fields.itertuples(index=False, name=None))}  # fmt: skip
    read = [distinct[values] for values in fields.itertuples(index=False, name=None)]
    rows["regimen"] = pd.Series([text for text, _ in read], index=rows.index, dtype=object)
    return pd.Series([reason for _, reason in read], index=rows.index, dtype=object)


def _number(text: str) -> float | None:
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return None
    return value if 0 < value < float("inf") else None


def _read_regimen(given: dict[str, str]) -> tuple[str | None, str]:
    """(canonical text or None, reason or "")."""
    written = parse_regimen(given["prescription"]) if given["prescription"] else None
    dose = _number(given["total_dose_gy"])
    if dose is None and (centigray := _number(given["total_dose_cgy"])) is not None:
        dose = centigray / 100
    fractions = _number(given["fractions"])
    if written is not None and written.total_dose_gy is not None:
        if dose is not None and abs(dose - written.total_dose_gy) > DOSE_TOLERANCE_GY:
            return None, "regimen_contradiction"
        if fractions is not None and written.fractions not in (None, fractions):
            return None, "regimen_contradiction"
        dose = written.total_dose_gy
        fractions = written.fractions or fractions
    if dose is None:
        return None, "no_dose"
    if fractions is None or fractions != int(fractions):
        return None, "no_fractions"
    # The site field names the target more plainly than the prescription does; the words around a
    # dose let the parser read it as it reads a regimen.
    place = parse_regimen(f"{given['treatment_site']}, {dose} Gy in 1 fraction")
    target, side = (place.target, place.side) if place else (None, None)
    if written is not None:
        if side and written.side and side != written.side:
            return None, "regimen_contradiction"
        target, side = target or written.target, side or written.side
    if target is None:
        return None, "no_target"
    regimen = Regimen(
        target=target,
        side=side,
        total_dose_gy=dose,
        fractions=int(fractions),
        technique=given["technique"] or (written.technique if written else None),
        modality=given["modality"],
        times_a_day=written.times_a_day if written else 1,
        boost_dose_gy=written.boost_dose_gy if written else None,
        boost_fractions=written.boost_fractions if written else None,
    )
    text = render_regimen(regimen)
    again = parse_regimen(text)
    if again is None or (again.total_dose_gy, again.fractions) != (dose, int(fractions)):
        return None, "regimen_unreadable"
    return render_regimen(again), ""


def code_valid(rows: pd.DataFrame) -> pd.Series:
    """A leaf of the pinned code table; headers and invented codes cannot be an answer.

    Fills the column `icd10` with the dotted upper-case form.
    """
    text = _column(rows, "icd10")
    codes = text.map({value: normalise_code(value) for value in text.unique()})
    leaves = {code for code in codes.dropna().unique() if is_leaf(code)}
    rows["icd10"] = codes
    return _reasons(
        rows,
        (text.str.casefold().isin(_NO_TEXT), "no_code"),
        (~codes.isin(leaves), "code_not_valid"),
    )


RULES: tuple[Callable[[pd.DataFrame], pd.Series], ...] = (
    patient_known,
    single_diagnosis,
    plan_delivered,
    plan_not_boost,
    one_primary_plan,
    diagnosis_present,
    modality_identifiable,
    regimen_complete,
    code_valid,
)


def apply_rules(extract: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, pd.Series]:
    """Applies RULES in order.

    Args:
      extract: as `read_extract` gives it, index "row".

    Returns:
      kept rows, one per patient, with `modality`, `regimen` and `icd10` in canonical form; the
      excluded rows (columns row, reason); and the reason of each excluded patient case, that of
      the rule that took its last row.

    Raises:
      AssertionError: rows or cases were lost or counted twice.
    """
    left = extract.copy()
    left["patient_id"] = _column(left, "patient_id")
    # A row without a patient is a case of its own; its number cannot be a patient's name.
    unit = left["patient_id"].where(
        left["patient_id"] != "", pd.Series([(row,) for row in left.index], index=left.index)
    )
    excluded = pd.Series(index=left.index, dtype=object)
    case_reasons: dict = {}
    for rule in RULES:
        if left.empty:
            break
        reasons = rule(left)
        gone = reasons != ""
        excluded[left.index[gone]] = reasons[gone]
        survivors = set(unit[left.index[~gone]])
        for case, reason in zip(unit[left.index[gone]], reasons[gone], strict=True):
            if case not in survivors:
                case_reasons.setdefault(case, reason)
        left = left[~gone].copy()
    rows = excluded.dropna().rename("reason").rename_axis("row").reset_index()
    cases = pd.Series(case_reasons.values(), dtype=object, name="reason")
    assert len(extract) == len(left) + len(rows), "rows were lost"
    assert unit.nunique() == len(left) + len(cases), "cases were lost"
    assert left["patient_id"].is_unique, "a patient was kept twice"
    return left, rows, cases


def near_misses(extract: pd.DataFrame, excluded: pd.DataFrame) -> dict[str, list[str]]:
    """The commonest codes that are not valid leaves -> the three nearest that are."""
    rows = excluded.loc[excluded["reason"] == "code_not_valid", "row"]
    codes = _column(extract.loc[rows], "icd10").map(normalise_code).dropna()
    # A look-up reads the whole letter of the table, and nobody reads a list of hundreds.
    common = sorted(codes.value_counts().head(20).index)
    return {code: nearest_valid(code, 3) for code in common}


# ---------------------------------------------------------------------------------------------
# The folder
# ---------------------------------------------------------------------------------------------


def build_cases(kept: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, int]]:
    """Cohort rows (FIELDS and CARRIED), and how many texts held their own answer, by task.

    The case id tells the row of the extract. Answers that stand in the diagnosis text are taken
    out of it.
    """
    cases = kept.assign(case_id=[f"row-{row}" for row in kept.index])
    stripped = [
        strip_answers(case.diagnosis.strip(), case.icd10, case.regimen, case.modality)
        for case in cases.itertuples()
    ]
    cases["diagnosis"] = [result.text for result in stripped]
    found = pd.Series([task for result in stripped for task in result.found], dtype=object)
    counts = {task: int((found == task).sum()) for task in ("icd", "regimen", "modality")}
    columns = [*FIELDS, *(name for name in CARRIED if name in cases.columns)]
    return cases[columns].reset_index(drop=True), counts


def split_cases(cases: pd.DataFrame, seed: int, test: float, validation: float) -> pd.DataFrame:
    """`cases` with a column split; see `splits.assign_splits` for arguments and errors."""
    labels = pd.DataFrame(
        {
            "modality": cases["modality"],
            "category": cases["icd10"].str[:3],
            "code": cases["icd10"],
        }
    )
    split = assign_splits(cases["patient_id"], labels, seed, test, validation)
    cases = cases.assign(split=split)
    check_no_patient_crosses(cases)
    return cases


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_finished_cohort(folder: Path) -> bool:
    return (folder / "manifest.json").is_file()


def check_output(folder: Path, overwrite: bool) -> None:
    """
    Raises:
      FileExistsError: something is there that may not be replaced.
      FileNotFoundError: the folder it would stand in does not exist.
    """
    if folder.exists():
        if not overwrite:
            raise FileExistsError(
                f"{folder} exists; choose another --output, or --overwrite a finished cohort"
            )
        if not is_finished_cohort(folder):
            raise FileExistsError(
                f"{folder} is no finished cohort (no manifest.json), so it is not overwritten; "
                "remove it or choose another --output"
            )
    elif not folder.absolute().parent.is_dir():
        raise FileNotFoundError(f"{folder.parent}: no such folder; create it first")


def write_cohort(
    folder: Path, cases: pd.DataFrame, excluded: pd.DataFrame, facts: dict, overwrite: bool = False
) -> dict:
    """Writes a cohort folder whole or not at all; returns its manifest.

    Args:
      cases: cohort rows with a column split.
      excluded: columns row, reason.
      facts: what else the manifest tells (counts, seed, rules ...).

    Raises:
      FileExistsError, FileNotFoundError: as `check_output`.
    """
    check_output(folder, overwrite)
    parts = {name: cases[cases["split"] == name].drop(columns="split") for name in SPLITS}
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.absolute().parent))
    try:
        for name, part in parts.items():
            part.to_parquet(draft / f"{name}.parquet", index=False)
        excluded.to_csv(draft / "excluded.csv", index=False, lineterminator="\n")
        manifest = {
            **facts,
            "cases": {name: len(part) for name, part in parts.items()},
            "patients": {name: part["patient_id"].nunique() for name, part in parts.items()},
            "label_counts": {
                name: {
                    field: part[field].value_counts().sort_index().to_dict()
                    for field in ("modality", "icd10")
                }
                for name, part in parts.items()
            },
            "codes_not_in_train": {
                name: int((~parts[name]["icd10"].isin(parts["train"]["icd10"])).sum())
                for name in SPLITS[1:]
            },
            "near_duplicates": near_duplicates(cases),
            "sha256": {path.name: sha256(path) for path in sorted(draft.iterdir())},
        }
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        (draft / "manifest.json").write_text(text, encoding="utf-8")
        draft.chmod(0o755)
        if folder.exists():
            # Two renames, so that at no time half a cohort stands under the name.
            old = folder.rename(f"{draft}-replaced")
            draft.rename(folder)
            shutil.rmtree(old)
        else:
            draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return manifest


def load_manifest(folder: str | Path) -> dict:
    """
    Raises:
      FileNotFoundError: no cohort folder, or one that was not finished.
      ValueError: the manifest cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such cohort folder; make it with prepare")
    if not is_finished_cohort(folder):
        raise FileNotFoundError(f"{folder}: no manifest.json; prepare did not finish it")
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if isinstance(manifest["sha256"], dict):
            return manifest
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{folder / 'manifest.json'}: not a cohort's manifest; run prepare again")


def load_split(folder: str | Path, split: str) -> pd.DataFrame:
    """The rows of one split, checked against the manifest.

    Raises:
      FileNotFoundError: folder, manifest or file is missing.
      ValueError: unknown split, a file that is not the one the manifest tells of, a missing
        column, an empty split, or an empty field.
    """
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; choose one of {', '.join(SPLITS)}")
    folder = Path(folder)
    manifest = load_manifest(folder)
    path = folder / f"{split}.parquet"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing from the cohort; run prepare again")
    if sha256(path) != manifest["sha256"].get(path.name):
        raise ValueError(
            f"{path}: changed since prepare wrote it (sha256 differs from manifest.json); run "
            "prepare again"
        )
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable Parquet file ({type(error).__name__})") from None
    missing = [name for name in FIELDS if name not in table.columns]
    if missing:
        raise ValueError(
            f"{path}: no column {', '.join(missing)}; there are {', '.join(table.columns)}. "
            "Run prepare again"
        )
    if table.empty:
        raise ValueError(f"{path}: the {split} split has no cases; run prepare on more records")
    for name in FIELDS:
        blank = table[name].isna() | (table[name].astype(str).str.strip() == "")
        if blank.any():
            raise ValueError(
                f"{path}: row {int(blank.to_numpy().argmax()) + 1}, column {name} is empty; run "
                "prepare again"
            )
    return table


def load_cohort(folder: str | Path) -> dict[str, pd.DataFrame]:
    """All three splits by name. Raises as `load_split`, and if a patient is in two of them."""
    tables = {name: load_split(folder, name) for name in SPLITS}
    check_no_patient_crosses(
        pd.concat([part[["patient_id"]].assign(split=name) for name, part in tables.items()])
    )
    return tables


def load_records(folder: str | Path, split: str) -> list[Record]:
    """One split as the tasks read it. Raises as `load_split`."""
    table = load_split(folder, split)[list(FIELDS)].astype(str)
    return [Record(*values) for values in table.itertuples(index=False, name=None)]
