"""Turns a raw extract into a cohort folder in which every row can be explained.

    python -m radonc_jax.prepare --input=extract.csv --output=cohort
    python -m radonc_jax.prepare --input=export.xlsx --output=cohort \\
        --columns=diagnosis=Dx,icd10=Code

Reads .csv, .tsv, .xlsx, .parquet and .jsonl. Writes train, validation and test .parquet,
excluded.csv (row of the extract, reason) and manifest.json (counts, hashes, rules).
"""

import sys
from pathlib import Path

import pandas as pd
from absl import app, flags

from radonc_jax.data import cohort
from radonc_jax.data.extract import parse_columns, read_extract
from radonc_jax.data.synthetic import ceiling_paths, mean_ceiling

_INPUT = flags.DEFINE_string("input", None, "The extract to read.")
_OUTPUT = flags.DEFINE_string("output", None, "The cohort folder to write.")
_COLUMNS = flags.DEFINE_list("columns", [], "Names of columns in the file: diagnosis=Dx,...")
_SEED = flags.DEFINE_integer("seed", 0, "The same seed gives the same splits.")
_TEST = flags.DEFINE_float("test_fraction", 0.15, "Share of the patients to test on.")
_VALIDATION = flags.DEFINE_float("validation_fraction", 0.10, "Share of the patients to select on.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace a finished cohort.")


def prepare() -> dict:
    source, folder = Path(_INPUT.value), Path(_OUTPUT.value)
    cohort.check_output(folder, _OVERWRITE.value)  # before the work, not after it

    # --- Read and select ---------------------------------------------------------------------
    extract = read_extract(source, parse_columns(_COLUMNS.value))
    kept, excluded, case_reasons = cohort.apply_rules(extract)
    if kept.empty:
        counts = ", ".join(f"{k} {v}" for k, v in case_reasons.value_counts().items())
        raise ValueError(f"{source}: no case is left; excluded: {counts}. Check --columns")
    assessed = len(kept) + len(case_reasons)

    # --- Clean and split ---------------------------------------------------------------------
    cases, stripped = cohort.build_cases(kept)
    cases = cohort.split_cases(cases, _SEED.value, _TEST.value, _VALIDATION.value)

    # --- Write -------------------------------------------------------------------------------
    facts = {
        "assessed": assessed,
        "kept": len(cases),
        "excluded": case_reasons.value_counts().to_dict(),
        "rows": {
            "read": len(extract),
            "kept": len(kept),
            "excluded": excluded["reason"].value_counts().to_dict(),
        },
        "rules": [rule.__name__ for rule in cohort.RULES],
        "near_misses": cohort.near_misses(extract, excluded),
        "stripped": stripped,
        "seed": _SEED.value,
        "test_fraction": _TEST.value,
        "validation_fraction": _VALIDATION.value,
        "source": {"name": source.name, "sha256": cohort.sha256(source)},
        "columns": dict(parse_columns(_COLUMNS.value)),
        "ceiling": ceiling_of_test(source, cases),
    }
    return cohort.write_cohort(folder, cases, excluded, facts, _OVERWRITE.value)


def ceiling_of_test(source: Path, cases: pd.DataFrame) -> dict[str, float] | None:
    """Best reachable accuracy per task on the test split, where `synthesize` left it beside the
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
    width = max(len(reason) for reason in [*manifest["excluded"], "validation"]) + 2
    lines = [("assessed", manifest["assessed"])]
    lines += [(f"  {reason}", count) for reason, count in manifest["excluded"].items()]
    lines += [("kept", manifest["kept"])]
    lines += [(f"  {name}", count) for name, count in manifest["cases"].items()]
    for name, count in lines:
        print(f"{name:<{width + 2}}{count:>8,}")
    found = ", ".join(f"{task} {count}" for task, count in manifest["stripped"].items())
    print(f"answers taken out of diagnosis texts: {found}")
    repeats = ", ".join(f"{name} {count}" for name, count in manifest["near_duplicates"].items())
    print(f"texts that also stand in train: {repeats}")
    if manifest["ceiling"]:
        best = ", ".join(f"{task} {value:.3f}" for task, value in manifest["ceiling"].items())
        print(f"best reachable on test: {best}")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}; every option is a --flag")
    try:
        manifest = prepare()
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        sys.exit(f"error: {error}")
    print_counts(manifest)


if __name__ == "__main__":
    flags.mark_flags_as_required(["input", "output"])
    app.run(main)
