"""The cohort folder: split cases, every excluded row with its reason, a manifest of it all."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from radonc_jax.data.extract import did_you_mean
from radonc_jax.data.rules import Selection
from radonc_jax.data.splits import SPLITS, check_no_patient_crosses
from radonc_jax.tasks.base import Record

FIELDS = ("case_id", "patient_id", "diagnosis", "regimen", "modality", "icd10")
# Of the extract's further columns, where it has them.
CARRIED = ("site", "stage", "sex", "age")
_SHEETS = ("annotation.", "disagreements.")  # to be filled in, so not held to their hashes
TASK_FIELDS = ("regimen", "modality", "icd10")


def build_cases(
    selection: Selection, also: Iterable[str] = ()
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Cohort rows (FIELDS, CARRIED and the columns `also`), and how many texts held their own
    answer, by task.

    The case id tells the row of the extract.

    Raises:
      ValueError: the extract has no column that `also` names.
    """
    kept = selection.kept
    cases = kept.assign(case_id=[f"row-{row}" for row in kept.index])
    found = kept["stripped"].explode().value_counts()
    counts = {task: int(found.get(task, 0)) for task in ("icd", "regimen", "modality")}
    for name in also:
        if name not in cases.columns:
            near = did_you_mean(name, list(kept.columns))
            raise ValueError(f"no column {name!r}{near}. Columns there: {', '.join(kept.columns)}")
    columns = [*FIELDS, *(name for name in CARRIED if name in cases.columns)]
    columns += [name for name in also if name not in columns]
    return cases[columns].reset_index(drop=True), counts


def near_misses(selection: Selection) -> dict[str, list[str]]:
    """The commonest codes that are not valid leaves -> the nearest that are."""
    excluded = selection.excluded
    details = excluded.loc[excluded["reason"] == "code_not_valid", "detail"]
    # Nobody reads a list of hundreds; excluded.csv has it for every row.
    common = details[details != ""].value_counts().head(20).index
    pairs = (detail.partition("; nearest ")[::2] for detail in sorted(common))
    return {code: near.split() for code, near in pairs}


def sha256(path: Path) -> str:
    """Of a file; of a folder that of the names and hashes of its files."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        listing = [f"{file.relative_to(path).as_posix()} {sha256(file)}" for file in files]
        return hashlib.sha256("\n".join(listing).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_finished_cohort(folder: Path) -> bool:
    return (folder / "manifest.json").is_file()


def keep_copy(folder: str | Path, workdir: Path) -> None:
    """Puts a cohort, all that its manifest hashes, into a run's folder, for another machine.

    As private as the cohort itself. Whole or absent: written aside, then renamed.
    """
    copy = Path(workdir) / "cohort"
    if copy.is_dir():
        return
    aside = copy.with_name(".cohort.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    needed = [name for name in load_manifest(folder)["sha256"] if not name.startswith(_SHEETS)]
    for name in (*needed, "manifest.json"):
        path = Path(folder) / name
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, aside / name)
    os.replace(aside, copy)


def is_of_run(folder: str | Path, workdir: str | Path) -> bool:
    """Whether this finished cohort is the one that a run's manifest names by its hash.

    True where the run has no manifest, which then tells nothing.
    """
    path = Path(workdir) / "manifest.json"
    if not path.is_file():
        return True
    try:
        named = (json.loads(path.read_text(encoding="utf-8")).get("cohort") or {}).get(
            "manifest_sha256"
        )
    except (ValueError, AttributeError):
        raise ValueError(f"{path}: not a run's manifest") from None
    return named in (None, sha256(Path(folder) / "manifest.json"))


def of_run(folder: str | Path, workdir: str | Path) -> Path:
    """The cohort of a run: where its config says, else the copy in its own folder.

    One that is not the run's own, by the hash in the run's manifest, comes last: another cohort may
    stand under the config's path on this machine.
    """
    places = Path(folder), Path(workdir) / "cohort"
    finished = [place for place in places if is_finished_cohort(place)]
    own = [place for place in finished if is_of_run(place, workdir)]
    return (own or finished or places)[0]


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
    folder: Path,
    cases: pd.DataFrame,
    excluded: pd.DataFrame,
    facts: dict,
    overwrite: bool = False,
    files: Mapping[str, bytes] | None = None,
) -> dict:
    """Writes a cohort folder whole or not at all; returns its manifest.

    Args:
      cases: cohort rows with a column split.
      excluded: columns row, reason and, if there, detail, which is written behind the reason.
      facts: what else the manifest tells (counts, seed, rules ...).
      files: further files by name.

    Raises:
      FileExistsError, FileNotFoundError: as `check_output`.
    """
    check_output(folder, overwrite)
    parts = {name: cases[cases["split"] == name].drop(columns="split") for name in SPLITS}
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.absolute().parent))
    try:
        for name, part in parts.items():
            part.to_parquet(draft / f"{name}.parquet", index=False)
        _with_details(excluded).to_csv(draft / "excluded.csv", index=False, lineterminator="\n")
        for name, content in (files or {}).items():
            (draft / name).write_bytes(content)
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


def _with_details(excluded: pd.DataFrame) -> pd.DataFrame:
    if "detail" not in excluded.columns:
        return excluded[["row", "reason"]]
    detail = excluded["detail"].astype("str")
    reason = excluded["reason"].astype("str")
    return pd.DataFrame(
        {"row": excluded["row"], "reason": reason.where(detail == "", reason + ": " + detail)}
    )


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


def load_split(folder: str | Path, split: str, *, for_run: bool = False) -> pd.DataFrame:
    """The rows of one split, checked against the manifest.

    Args:
      folder: of the cohort.
      split: one of SPLITS.
      for_run: whether they are read for a run that was made from the cohort. What `prepare` writes
        beside the splits may be missing then, as it is in the copies that older versions kept, and
        a file that is wrong is to be put back: a cohort prepared anew would not be the run's.

    Raises:
      FileNotFoundError: folder, manifest or a file of the cohort is missing.
      ValueError: unknown split, a file that is not the one the manifest tells of, a missing
        column, an empty split, or an empty field.
    """
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; choose one of {', '.join(SPLITS)}")
    folder = Path(folder)
    manifest = load_manifest(folder)
    path = folder / f"{split}.parquet"
    advice = "put back that of the cohort that the run was made from"
    if not for_run:
        advice = "run prepare again"
    # The other splits are held to it when they are loaded.
    others = {f"{name}.parquet" for name in SPLITS} - {path.name}
    for name in sorted({path.name, *manifest["sha256"]} - others):
        if name.startswith(_SHEETS):
            continue
        file = folder / name
        if not file.is_file():
            if for_run and file != path:
                continue
            raise FileNotFoundError(f"{file}: missing from the cohort; {advice}")
        if sha256(file) != manifest["sha256"].get(name):
            raise ValueError(
                f"{file}: changed since prepare wrote it (sha256 differs from manifest.json); "
                f"{advice}"
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


def load_records(folder: str | Path, split: str, *, for_run: bool = False) -> list[Record]:
    """One split as the tasks read it; arguments and errors as those of `load_split`."""
    return as_records(load_split(folder, split, for_run=for_run))


def as_records(cases: pd.DataFrame) -> list[Record]:
    """Cohort rows as the tasks read them."""
    table = cases[list(FIELDS)].astype(str)
    return [Record(*values) for values in table.itertuples(index=False, name=None)]
