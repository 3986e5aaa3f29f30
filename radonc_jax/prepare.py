"""Turns a raw extract into a cohort folder in which every row can be explained.

    python -m radonc_jax.prepare --input=extract.csv --output=cohort
    python -m radonc_jax.prepare --input=export.xlsx --output=cohort \\
        --columns=diagnosis=Dx,icd10=Code
    python -m radonc_jax.prepare --input=export.csv --output=cohort \\
        --columns=columns.json --encoding=cp1252 --rows=course --rules=my_rules.py

Reads .csv, .tsv, .xlsx, .parquet, .jsonl and folders of datasets.save_to_disk. Writes train,
validation and test .parquet, excluded.csv (row of the extract, reason), flow.svg (the same as a
diagram), annotation.csv (uncertain rows, to be filled in and given back with --annotations),
deid_audit.jsonl (identifiers by class and place), table1.csv and .html, and manifest.json (counts,
hashes, rules).
"""

from importlib import metadata
from pathlib import Path

import pandas as pd
from absl import flags

from radonc_jax import command
from radonc_jax.data import annotation, batches, cohort, deidentify, flow, rules, splits, table1
from radonc_jax.data.extract import UNITS, check_unit, parse_columns, read_extract
from radonc_jax.data.rows import find_layout
from radonc_jax.data.synthetic import ceiling_paths, mean_ceiling
from radonc_jax.models.tokenizer import JSON, SENTENCEPIECE, load_tokenizer
from radonc_jax.tasks import TASKS

_INPUT = flags.DEFINE_string("input", None, "The extract to read.")
_OUTPUT = flags.DEFINE_string("output", None, "The cohort folder to write.")
_COLUMNS = flags.DEFINE_list(
    "columns", [], "Names of columns in the file: diagnosis=Dx,..., or a .json file of them."
)
_ROWS = flags.DEFINE_enum("rows", "plan", UNITS, "What a row of the extract is.")
_ENCODING = flags.DEFINE_string("encoding", "", "Of a csv or tsv; found out if not given.")
_DELIMITER = flags.DEFINE_string(
    "delimiter", "", "comma, semicolon, tab, pipe or one character; found out if not given."
)
_SHEET = flags.DEFINE_string("sheet", "", "Of a workbook with several.")
_SKIP = flags.DEFINE_list("skip_rules", [], "Names of inclusion rules to turn off.")
_RULES = flags.DEFINE_string("rules", None, "Python file with inclusion rules of your own.")
_SOURCE_PATIENTS = flags.DEFINE_integer(
    "source_patients", None, "Patients in the system that the extract was drawn from, if known."
)
_DEIDENTIFY = flags.DEFINE_enum(
    "deidentify",
    "stop",
    deidentify.POLICIES,
    "What to do about identifiers: stop where some are found, redact them, or keep them (off).",
)
_ACTIONS = flags.DEFINE_list(
    "deidentify_actions", [], "For redact: CLASS=tag, generalise or remove, e.g. date=remove."
)
_ANNOTATIONS = flags.DEFINE_list(
    "annotations", [], "Filled-in annotation sheets, of one or two annotators."
)
_ADJUDICATION = flags.DEFINE_string(
    "adjudication", None, "The filled-in sheet of what two annotators disagreed on."
)
_ANNOTATION_FORMAT = flags.DEFINE_enum(
    "annotation_format", "csv", ("csv", "xlsx"), "Of the sheet that is written."
)
_PUBLISHED = flags.DEFINE_bool(
    "published", False, "Leave counts below 11 out of table 1, so that it can be shown."
)
_SEED = flags.DEFINE_integer("seed", 0, "The same seed gives the same splits.")
_TEST = flags.DEFINE_float("test_fraction", 0.15, "Share of the patients to test on.")
_VALIDATION = flags.DEFINE_float("validation_fraction", 0.10, "Share of the patients to select on.")
_SPLIT_BY = flags.DEFINE_string(
    "split_by",
    "patient",
    "patient, date:COLUMN, date:COLUMN=FIRST_DATE_OF_TEST or site:COLUMN=NAME,NAME.",
)
_GROUP = flags.DEFINE_bool(
    "group_near_duplicates", False, "Keep texts that nearly repeat each other in one split."
)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "Model folder whose tokenizer counts what training will read."
)
_LENGTH = flags.DEFINE_integer("sequence_length", 2048, "Tokens, for --tokenizer.")
_OVER_LENGTH = flags.DEFINE_enum(
    "over_length", "fail", batches.OVER_LENGTH, "What training will do about longer examples."
)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace a finished cohort.")

CODE_TABLE = "simple_icd_10_cm"  # its version tells the release of ICD-10-CM
# Everything of the extract that may come to stand in a file of the cohort.
SCANNED = (*annotation.GIVEN, *cohort.CARRIED)


def prepare() -> dict:
    source, folder = Path(_INPUT.value), Path(_OUTPUT.value)
    # Before the work, not after it.
    cohort.check_output(folder, _OVERWRITE.value)
    if folder.exists():
        annotation.check_sheets_are_safe(folder, cohort.load_manifest(folder)["sha256"])
    splits.check_draw(_SEED.value, _TEST.value, _VALIDATION.value)
    columns = parse_columns(_COLUMNS.value)
    skipped = rules.check_skipped(_SKIP.value)
    own = rules.load_rules(_RULES.value) if _RULES.value else []
    actions = deidentify.parse_actions(_ACTIONS.value)
    by = splits.parse_split_by(_SPLIT_BY.value)
    tokenizer = load_tokenizer(Path(_TOKENIZER.value)) if _TOKENIZER.value else None

    # --- Read --------------------------------------------------------------------------------
    layout = find_layout(source, _ENCODING.value, _DELIMITER.value, _SHEET.value)
    extract = read_extract(source, columns, layout)
    check_unit(source, extract, _ROWS.value)
    rows_read, columns_read = len(extract), list(extract.columns)

    # --- De-identify: before anything that could be written is made of it ----------------------
    findings = deidentify.find(extract, SCANNED)
    if not findings.empty and _DEIDENTIFY.value == "stop":
        raise ValueError(f"{source}: {findings.stop_message()}")
    if _DEIDENTIFY.value == "redact":
        extract = deidentify.redact(extract, findings, actions)

    # --- Select ------------------------------------------------------------------------------
    settled = None
    if _ANNOTATIONS.value:
        settled = annotation.settle(
            extract,
            _ANNOTATIONS.value,
            _ADJUDICATION.value,
            one_per_patient=rules.one_primary_plan.__name__ not in skipped,
        )
        extract = extract.join(settled.columns)
        extract[settled.columns.columns] = extract[settled.columns.columns].fillna("")
    selection = rules.select(extract, skipped, own)
    files = {}
    sheet = annotation.propose(extract, selection)
    del extract  # a gigabyte, at a million rows
    files[f"annotation.{_ANNOTATION_FORMAT.value}"] = annotation.to_bytes(
        sheet, _ANNOTATION_FORMAT.value
    )
    if settled is not None and len(settled.disagreements):
        files["disagreements.csv"] = annotation.to_bytes(settled.disagreements, "csv")
    excluded = selection.cases.value_counts().to_dict()
    if selection.kept.empty:
        counts = ", ".join(f"{reason} {count}" for reason, count in excluded.items())
        raise ValueError(
            f"{source}: no case is left of {selection.assessed}; excluded: {counts}. Check "
            "--columns and --rows"
        )

    # --- Split -------------------------------------------------------------------------------
    cases, stripped = cohort.build_cases(selection, [by.column] if by.column else [])
    cases, split_facts = splits.split_cases(
        cases, _SEED.value, _TEST.value, _VALIDATION.value, by=by, group=_GROUP.value
    )
    ceiling = ceiling_of_test(source, cases)
    characteristics = table1.table1(cases, _PUBLISHED.value)
    if by.column and by.column not in cohort.CARRIED:
        cases = cases.drop(columns=by.column)  # a date or a place: nothing that tasks need
    if _DEIDENTIFY.value == "redact":
        cases["patient_id"] = deidentify.pseudonyms(cases["patient_id"], _SEED.value)

    lengths = None
    if tokenizer is not None:
        records = {name: cohort.as_records(cases[cases["split"] == name]) for name in splits.SPLITS}
        lengths = batches.preflight(
            records, list(TASKS.values()), tokenizer, _LENGTH.value, _OVER_LENGTH.value
        )
        files["over_length.csv"] = (
            pd.DataFrame(
                lengths.too_long, columns=["case_id", "split", "task", "tokens", "tokens_cut"]
            )
            .to_csv(index=False, lineterminator="\n")
            .encode()
        )

    # --- Write -------------------------------------------------------------------------------
    annotated = None
    if settled is not None:
        decided = selection.kept["annotated_decision"] == "primary"
        annotated = selection.kept.loc[decided, "patient_id"].nunique()
    counts = flow.count_flow(selection, cases, _SOURCE_PATIENTS.value, annotated)
    facts = {
        "assessed": selection.assessed,
        "kept": counts["kept"],
        "excluded": excluded,
        "rows": {
            "unit": _ROWS.value,
            "read": rows_read,
            "kept": len(selection.kept),
            "excluded": selection.excluded["reason"].value_counts().to_dict(),
        },
        "rules": [step.rule for step in selection.steps if step.cases is not None],
        "rules_turned_off": list(skipped),
        "rules_added": _hashed(_RULES.value) | {"names": [rule.__name__ for rule in own]},
        "flow": counts,
        "deidentification": {
            "policy": _DEIDENTIFY.value,
            "actions": actions,
            "columns": [name for name in SCANNED if name in columns_read],
            **findings.summary(),
        },
        "table1": characteristics.facts,
        "preflight": None if lengths is None else lengths.facts | {"tokenizer": _tokenizer()},
        "annotation": (settled.facts if settled else {}) | {"rows_offered": len(sheet)},
        "near_misses": cohort.near_misses(selection),
        "stripped": stripped,
        "left_in_text": splits.answers_left(cases),
        **split_facts,
        "code_table": {"name": CODE_TABLE, "version": metadata.version(CODE_TABLE)},
        "seed": _SEED.value,
        "test_fraction": _TEST.value,
        "validation_fraction": _VALIDATION.value,
        "source": {
            **_hashed(source),
            "encoding": layout.encoding,
            "encoding_guessed": layout.guessed,
            "delimiter": layout.delimiter,
            "sheet": layout.sheet,
            "notes": list(layout.notes),
        },
        "columns": columns,
        "ceiling": ceiling,
    }
    audit = deidentify.audit_lines(findings, _DEIDENTIFY.value, actions)
    files |= {
        "flow.svg": flow.flow_svg(counts),
        "table1.csv": characteristics.csv.encode(),
        "table1.html": characteristics.html.encode(),
        "deid_audit.jsonl": "".join(f"{line}\n" for line in audit).encode(),
    }
    return cohort.write_cohort(folder, cases, selection.excluded, facts, _OVERWRITE.value, files)


def _hashed(path: str | Path | None) -> dict[str, str | None]:
    """Name and sha256 of an input, so that its use can be proven."""
    if path is None:
        return {"name": None, "sha256": None}
    return {"name": Path(path).name, "sha256": cohort.sha256(Path(path))}


def _tokenizer() -> dict[str, str | None]:
    folder = Path(_TOKENIZER.value)
    file = next(folder / name for name in (JSON, SENTENCEPIECE) if (folder / name).is_file())
    return _hashed(file) | {"name": folder.name}


def ceiling_of_test(source: Path, cases: pd.DataFrame) -> dict[str, float] | None:
    """Ceiling of each task on the test split, where `synthesize` left it beside the
    extract; None for real records, whose ceiling nobody knows.

    Raises:
      ValueError: the file is there but does not know all test patients.
    """
    _, path = ceiling_paths(source)
    if not path.is_file():
        return None
    known = pd.read_parquet(path).set_index("patient_id")
    patients = cases.loc[cases["split"] == "test", "patient_id"]
    if not patients.isin(known.index).all():
        raise ValueError(
            f"{path}: {int((~patients.isin(known.index)).sum())} test patients are not in it, so "
            "it belongs to another extract; remove it or synthesize again"
        )
    return mean_ceiling(known.loc[patients])


def print_counts(manifest: dict) -> None:
    for note in manifest["source"]["notes"]:
        print(f"note: {note}")
    width = max(len(reason) for reason in [*manifest["excluded"], "validation"]) + 2
    lines = [("assessed", manifest["assessed"])]
    lines += [(f"  {reason}", count) for reason, count in manifest["excluded"].items()]
    lines += [("kept", manifest["kept"])]
    lines += [(f"  {name}", count) for name, count in manifest["cases"].items()]
    for name, count in lines:
        print(f"{name:<{width + 2}}{count:>8,}")
    found = ", ".join(f"{task} {count}" for task, count in manifest["stripped"].items())
    print(f"answers taken out of diagnosis texts: {found}")
    repeats = ", ".join(
        f"{name} {found['same']} (and {found['near']} nearly)"
        for name, found in manifest["near_duplicates"]["in_train"].items()
    )
    print(f"texts that also stand in train: {repeats}")
    found = manifest["deidentification"]
    classes = ", ".join(f"{kind} {count}" for kind, count in found["classes"].items()) or "none"
    print(f"identifiers found: {classes} (--deidentify={found['policy']})")
    print(f"uncertain rows offered to annotators: {manifest['annotation']['rows_offered']}")
    if manifest["preflight"]:
        print(batches.Preflight(manifest["preflight"], []))
    if manifest["ceiling"]:
        best = ", ".join(f"{task} {value:.3f}" for task, value in manifest["ceiling"].items())
        print(f"ceiling on test: {best}")


def main() -> None:
    print_counts(prepare())


if __name__ == "__main__":
    flags.mark_flags_as_required(["input", "output"])
    command.run(main)
