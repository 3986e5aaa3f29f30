"""From extract to cohort folder: every row explained, every bad input a clear error."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from preparing import run_prepare

from radonc_jax.data import cohort, rules, synthetic
from radonc_jax.data.extract import parse_columns, read_extract
from radonc_jax.data.splits import SPLITS, split_cases
from radonc_jax.tasks.icd import is_leaf, normalise_code
from radonc_jax.tasks.regimen import Regimen, parse_regimen, render_regimen, same_regimen


def run(module, *arguments):
    return subprocess.run(
        [sys.executable, "-m", f"radonc_jax.{module}", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An extract of 2,000 patients, and the cohort that the two commands make of it."""
    root = tmp_path_factory.mktemp("prepare")
    made = run("synthesize", "--cases=2000", "--seed=4", f"--output={root / 'extract.csv'}")
    assert made.returncode == 0, made.stderr
    done = run("prepare", f"--input={root / 'extract.csv'}", f"--output={root / 'cohort'}")
    assert done.returncode == 0, done.stderr
    (root / "stdout.txt").write_text(done.stdout)
    return root


@pytest.fixture(scope="module")
def manifest(folder):
    return json.loads((folder / "cohort" / "manifest.json").read_text())


def minimal(**columns):
    """A table of one good case, with these columns set otherwise."""
    values = {
        "patient_id": "p1",
        "diagnosis": "IDC of the right breast, UOQ",
        "icd10": "C50.411",
        "prescription": "Right breast, 40.05 Gy in 15 fractions, 3DCRT tangents",
        "modality": "Photon",
    } | columns
    rows = max(len(v) if isinstance(v, list) else 1 for v in values.values())
    table = {k: v if isinstance(v, list) else [v] * rows for k, v in values.items()}
    return pd.DataFrame(table, index=pd.RangeIndex(2, rows + 2, name="row"))


# ---------------------------------------------------------------------------------------------
# The cohort
# ---------------------------------------------------------------------------------------------


def test_counts_add_up(folder, manifest):
    extract = read_extract(folder / "extract.csv")
    excluded = pd.read_csv(folder / "cohort" / "excluded.csv")
    assert list(excluded.columns) == ["row", "reason"]
    assert manifest["assessed"] == 2000 == extract["patient_id"].nunique()
    assert manifest["assessed"] == manifest["kept"] + sum(manifest["excluded"].values())
    assert manifest["rows"]["read"] == len(extract) == manifest["kept"] + len(excluded)
    assert excluded["row"].is_unique
    kept_rows = {
        int(case.removeprefix("row-"))
        for table in cohort.load_cohort(folder / "cohort").values()
        for case in table["case_id"]
    }
    assert kept_rows | set(excluded["row"]) == set(range(2, len(extract) + 2))
    assert kept_rows.isdisjoint(excluded["row"])


def test_case_ids_name_rows_of_the_file(folder):
    raw = pd.read_csv(folder / "extract.csv", dtype=str, keep_default_na=False)
    for case in cohort.load_split(folder / "cohort", "test").itertuples():
        row = raw.iloc[int(case.case_id.removeprefix("row-")) - 2]
        assert row["patient_id"] == case.patient_id
        assert row["diagnosis"].startswith(case.diagnosis[:8])


def test_cohort_is_the_clean_patients_with_their_latent_answers(folder):
    latents = synthetic.make_extract(2000, 4).latents
    cases = pd.concat(cohort.load_cohort(folder / "cohort").values())
    assert set(cases["patient_id"]) == set(latents)
    for case in cases.itertuples():
        latent = latents[case.patient_id]
        option, (target, side) = latent.regimen, latent.treated
        regimen = parse_regimen(case.regimen)
        assert same_regimen(regimen, Regimen(target, side, option.dose, option.fractions))
        assert option.technique in case.regimen
        assert render_regimen(regimen) == case.regimen
        assert case.modality == option.modality
        assert case.icd10 == latent.code


def test_no_code_stands_in_a_diagnosis(folder, manifest):
    cases = pd.concat(cohort.load_cohort(folder / "cohort").values())
    for case in cases.itertuples():
        words = case.diagnosis.replace("(", " ").replace(")", " ").replace("[", " ").split()
        codes = {normalise_code(word.strip(".,;:]")) for word in words}
        assert case.icd10 not in codes
        assert "Planned" not in case.diagnosis and "Referred for" not in case.diagnosis
    raw = pd.read_csv(folder / "extract.csv", dtype=str, keep_default_na=False)
    own = raw[raw["patient_id"].isin(cases["patient_id"])].drop_duplicates("patient_id")
    planted = sum(
        code.upper().replace(".", "") in text.upper().replace(".", "")
        for text, code in zip(own["diagnosis"], own["icd10"], strict=True)
    )
    assert manifest["stripped"]["icd"] == planted > 10
    assert manifest["stripped"]["regimen"] == own["diagnosis"].str.contains("Planned").sum()
    assert manifest["stripped"]["modality"] == own["diagnosis"].str.contains("Referred for").sum()


def test_splits_and_manifest_tell_the_same(folder, manifest):
    tables = cohort.load_cohort(folder / "cohort")
    for name, table in tables.items():
        assert list(table.columns) == [*cohort.FIELDS, "site", "sex", "age"]
        assert manifest["cases"][name] == len(table)
        assert manifest["patients"][name] == table["patient_id"].nunique()
        assert manifest["label_counts"][name]["modality"] == table["modality"].value_counts(
        ).to_dict()  # fmt: skip
        assert sum(manifest["label_counts"][name]["icd10"].values()) == len(table)
    assert len(tables["test"]) == pytest.approx(0.15 * manifest["kept"], abs=1)
    assert manifest["rules"][0] == "patient_known"


def test_ceiling_of_the_test_split(folder, manifest):
    known = pd.read_parquet(folder / "extract.csv.ceiling.parquet").set_index("patient_id")
    test = cohort.load_split(folder / "cohort", "test")
    for task in synthetic.TASKS:
        wanted = known.loc[test["patient_id"], task].mean()
        assert manifest["ceiling"][task] == pytest.approx(wanted)
        assert manifest["ceiling"][task] != pytest.approx(known[task].mean(), abs=1e-9)


def test_printed_table_holds_counts_and_no_text(folder, manifest):
    printed = (folder / "stdout.txt").read_text()
    assert f"{manifest['kept']:,}" in printed
    for reason in manifest["excluded"]:
        assert reason in printed
    assert "carcinoma" not in printed.lower() and "SYN0" not in printed


def test_about_half_is_kept_at_the_size_of_the_paper():
    extract = synthetic.make_extract(15_724, 0).table
    done = rules.select(extract.rename(index=lambda i: i + 2).rename_axis("row"))
    assert len(done.kept) + len(done.cases) == done.assessed == 15_724
    assert abs(len(done.kept) - 7_903) < 250


def test_records_are_what_the_tasks_read(folder):
    records = cohort.load_records(folder / "cohort", "validation")
    table = cohort.load_split(folder / "cohort", "validation")
    assert [r.case_id for r in records] == list(table["case_id"])
    assert records[3].icd10 == table["icd10"][3] and records[3].regimen == table["regimen"][3]


def test_the_same_seed_gives_the_same_files(folder, manifest, tmp_path):
    again, _ = run_prepare(tmp_path, folder / "extract.csv")
    assert again == manifest
    other, _ = run_prepare(tmp_path, folder / "extract.csv", "--seed=1", "--overwrite")
    assert other["sha256"]["test.parquet"] != manifest["sha256"]["test.parquet"]
    assert other["sha256"]["excluded.csv"] == manifest["sha256"]["excluded.csv"]


# ---------------------------------------------------------------------------------------------
# Rules
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"patient_id": " "}, "no_patient_id"),
        ({"diagnosis": ["IDC right breast", "GBM"]}, "several_diagnoses"),
        ({"icd10": ["C50.411", "C61"]}, "several_diagnoses"),
        ({"diagnosis_id": ["1", "2"]}, "several_diagnoses"),
        ({"plan_status": "Cancelled"}, "plan_cancelled"),
        ({"plan_status": "unapproved"}, "plan_cancelled"),
        ({"plan_status": "Superseded"}, "plan_superseded"),
        ({"plan_status": "Voided"}, "plan_cancelled"),
        ({"plan_status": "Discontinued"}, "plan_not_completed"),
        ({"plan_status": "On hold"}, "plan_not_completed"),
        ({"plan_status": "Not started"}, "plan_not_completed"),
        ({"plan_status": "Planned"}, "plan_not_completed"),
        ({"plan_status": "Planning Approved"}, "plan_not_completed"),
        ({"plan_status": "CompletedEarly"}, "plan_not_completed"),
        ({"plan_name": "QA phantom"}, "only_qa_plan"),
        ({"plan_intent": "BOOST"}, "only_boost_plan"),
        ({"plan_name": "R BRST BST"}, "only_boost_plan"),
        ({"course_id": ["1", "2"]}, "several_courses"),
        ({"plan_id": ["1", "2"]}, "several_primary_plans"),
        ({"diagnosis": " - "}, "no_diagnosis_text"),
        ({"modality": "", "prescription": "40.05 Gy in 15 fractions"}, "modality_unknown"),
        ({"technique": "PBS"}, "modality_contradiction"),
        ({"prescription": "Right breast, VMAT"}, "no_dose"),
        ({"prescription": "Right breast, 40.05 Gy"}, "no_fractions"),
        ({"total_dose_cgy": "5000"}, "regimen_contradiction"),
        ({"fractions": "16"}, "regimen_contradiction"),
        ({"prescription": "R breast", "total_dose_gy": "60", "total_dose_cgy": "4500",
          "fractions": "30"}, "regimen_contradiction"),
        ({"prescription": "R breast 50 Gy in 25 fx + boost 10 Gy in 5 fx", "total_dose_gy": "60",
          "fractions": "28"}, "regimen_contradiction"),
        ({"treatment_site": "Left breast"}, "regimen_contradiction"),
        ({"treatment_site": "Right breast and left axilla"}, "regimen_contradiction"),
        ({"prescription": "R breast", "total_dose_gy": "6000", "fractions": "30"},
         "dose_implausible"),
        ({"prescription": "R breast", "total_dose_cgy": "60", "fractions": "30"},
         "dose_implausible"),
        ({"prescription": "R breast", "total_dose_gy": "504", "fractions": "28"},
         "dose_implausible"),
        ({"prescription": "R breast", "total_dose_gy": "60", "fractions": "1"},
         "dose_implausible"),
        ({"icd10": "n/a"}, "no_code"),
        ({"icd10": "C50.4"}, "code_not_valid"),
        ({"icd10": "C61.0"}, "code_not_valid"),
        ({"icd10": "see chart"}, "code_not_valid"),
        ({"icd10": "C50.411; C61"}, "code_contradiction"),
        ({"icd10": "c50411/C7951"}, "code_contradiction"),
    ],
)  # fmt: skip
def test_each_reason(columns, reason):
    table = minimal(**columns)
    done = rules.select(table)
    assert done.kept.empty
    assert set(done.excluded["reason"]) == {reason}
    assert list(done.excluded["row"]) == list(table.index)
    assert set(done.cases) == {reason}


@pytest.mark.parametrize(
    ("columns", "regimen"),
    [
        ({}, "Right breast, 40.05 Gy in 15 fractions, 3DCRT tangents"),
        (
            {"modality": "", "energy": "6 MV", "prescription": "4005 cGy in 15 fx",
             "treatment_site": "R breast", "technique": "3DCRT tangents"},
            "Right breast, 40.05 Gy in 15 fractions, 3DCRT tangents",
        ),
        (
            {"prescription": "", "total_dose_gy": "40.05", "fractions": "15",
             "treatment_site": "Rt breast", "technique": "3DCRT tangents"},
            "Right breast, 40.05 Gy in 15 fractions, 3DCRT tangents",
        ),
        (
            {"prescription": "", "total_dose_gy": "50,4", "fractions": "28",
             "treatment_site": "Rt breast"},
            "Right breast, 50.4 Gy in 28 fractions, photons",
        ),
        (
            {"prescription": "", "total_dose_cgy": "5,040", "fractions": "28",
             "treatment_site": "Rt breast"},
            "Right breast, 50.4 Gy in 28 fractions, photons",
        ),
        (  # the fields hold the whole course
            {"prescription": "R breast 50 Gy in 25 fx + boost 10 Gy in 5 fx",
             "total_dose_gy": "60", "total_dose_cgy": "6000", "fractions": "30"},
            "Right breast, 50 Gy in 25 fractions, photons + boost 10 Gy in 5 fractions",
        ),
        (
            {"prescription": "", "total_dose_gy": "85", "fractions": "1",
             "treatment_site": "Rt trigeminal nerve", "technique": "SRS"},
            "Right trigeminal nerve, 85 Gy in 1 fraction, SRS",
        ),
        (
            {"modality": "Proton", "prescription": "50 Gy(RBE)/25 fx PBS to left chest wall"},
            "Left chest wall, 50 Gy(RBE) in 25 fractions, PBS",
        ),
    ],
)  # fmt: skip
def test_regimen_from_wherever_it_stands(columns, regimen):
    kept = rules.select(minimal(**columns)).kept
    assert kept["regimen"].iloc[0] == regimen
    assert render_regimen(parse_regimen(regimen)) == regimen


def test_primary_plan_is_told_from_the_others():
    table = minimal(
        plan_id=["1", "2", "3", "4"],
        plan_status=["Superseded", "Completed", "Completed", "Cancelled"],
        plan_name=["R BREAST", "R BREAST", "R BREAST BST", "R BREAST"],
    )
    done = rules.select(table)
    assert list(done.kept.index) == [3] and len(done.cases) == 0
    assert dict(zip(done.excluded["row"], done.excluded["reason"], strict=True)) == {
        2: "plan_superseded",
        4: "boost_plan",
        5: "plan_cancelled",
    }


_JUNK = st.sampled_from(["", "C50.4", "??", "Proton", "6 MV", "40 Gy", "p1", "é" * 50, "Boost"])


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_assessed_is_kept_plus_excluded_whatever_is_corrupted(data):
    table = synthetic.make_extract(60, data.draw(st.integers(0, 5))).table.copy()
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    for _ in range(data.draw(st.integers(1, 25))):
        column = data.draw(st.sampled_from(synthetic.COLUMNS))
        row = data.draw(st.integers(0, len(table) - 1))
        table.loc[row, column] = data.draw(_JUNK)
    table = table.iloc[rng.permutation(len(table))][list(rng.permutation(table.columns))]
    table = table.set_axis(pd.RangeIndex(2, len(table) + 2, name="row"))
    done = rules.select(table)
    kept, rows, cases = done.kept, done.excluded, done.cases
    nameless = (table["patient_id"].str.strip() == "").sum()
    units = table["patient_id"][table["patient_id"].str.strip() != ""].nunique() + nameless
    assert units == len(kept) + len(cases)
    assert sorted([*kept.index, *rows["row"]]) == list(table.index)
    assert kept["patient_id"].is_unique and (kept["patient_id"] != "").all()
    assert kept["icd10"].map(is_leaf).all()


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".xlsx", ".parquet", ".jsonl"])
def test_every_format_reads_the_same(tmp_path, suffix):
    table = minimal(
        patient_id=["1", "2"], diagnosis=['IDC, "left"\nbreast', "Café 日本"], age=["61", ""]
    ).reset_index(drop=True)
    path = tmp_path / f"extract{suffix}"
    if suffix in (".csv", ".tsv"):
        separator = "\t" if suffix == ".tsv" else ","
        table.to_csv(path, index=False, sep=separator, encoding="utf-8-sig")
    elif suffix == ".xlsx":
        table.to_excel(path, index=False)
    elif suffix == ".parquet":
        table.to_parquet(path, index=False)
    else:
        table.to_json(path, orient="records", lines=True, force_ascii=False)
    read = read_extract(path)
    assert list(read.index) == ([1, 2] if suffix == ".jsonl" else [2, 3])
    pd.testing.assert_frame_equal(read.reset_index(drop=True), table, check_dtype=False)


def test_numbers_come_back_as_they_are_written(tmp_path):
    frame = minimal(patient_id=["a", "b"], fractions=[15.0, None]).reset_index(drop=True)
    frame.to_parquet(tmp_path / "e.parquet")
    assert list(read_extract(tmp_path / "e.parquet")["fractions"]) == ["15", ""]


def test_columns_are_mapped_by_flag_and_by_likeness(tmp_path):
    table = minimal().rename(
        columns={"diagnosis": "Dx", "patient_id": "Patient ID", "icd10": "ICD10"}
    )
    table["Diagnosis"] = "not this one"
    table.to_csv(tmp_path / "e.csv", index=False)
    read = read_extract(tmp_path / "e.csv", parse_columns(["diagnosis=Dx"]))
    assert read["diagnosis"].iloc[0].startswith("IDC")
    assert {"patient_id", "icd10"} <= set(read.columns)


GOOD = "patient_id,diagnosis,icd10,prescription\n"


@pytest.mark.parametrize(
    ("name", "content", "columns", "parts"),
    [
        ("gone.csv", None, [], ["gone.csv", "no such file"]),
        ("empty.csv", b"", [], ["empty.csv", "is empty"]),
        ("header.csv", GOOD.encode(), [], ["no records"]),
        ("odd.doc", b"x", [], [".doc is not read", ".csv"]),
        ("bytes.csv", GOOD.encode() + b"p,IDC \xff,C61,x\n", [], ["line 2, byte 7", "UTF-8"]),
        ("long.csv", GOOD.encode() + b"p,a,b,c\np,a,b,c,d\n", [], ["row 3", "5 columns", "has 4"]),
        ("short.csv", GOOD.encode() + b"p,a\n", [], ["row 2 (line 2)", "has 2 columns"]),
        ("quote.csv", GOOD.encode() + b'p,"a,b,c\n', [], ["row 2", "quotes"]),
        ("twice.csv", b"patient_id,icd10,icd10\n1,2,3\n", [], ["'icd10' stands 2 times"]),
        ("nodx.csv", b"patient_id,icd10,Dx\n1,2,3\n", [], ["diagnosis", "Columns there", "Dx"]),
        ("norx.csv", b"patient_id,icd10,diagnosis\n1,2,3\n", [], ["prescription", "at least one"]),
        ("map.csv", GOOD.encode() + b"1,2,3,4\n", ["diagnosis=Dz"], ["'Dz'", "Columns there"]),
        ("map.csv", GOOD.encode() + b"1,2,3,4\n", ["dx=Dz"], ["'dx'", "diagnosis"]),
        ("map.csv", GOOD.encode() + b"1,2,3,4\n", ["diagnosis"], ["NAME=HEADER"]),
        ("obeyed.csv", b"patient_id,icd10,diagnosis,prescription,annotated_decision\n1,2,3,4,5\n",
         [], ["'annotated_decision' in row 1", "--annotations"]),
        ("book.xlsx", b"not a workbook", [], ["book.xlsx", "workbook"]),
        ("cut.parquet", b"PAR1 cut", [], ["cut.parquet", "Parquet"]),
        ("bad.jsonl", b'{"patient_id": "1"}\n{oops\n', [], ["line 2 is not JSON"]),
    ],
)  # fmt: skip
def test_bad_input_names_the_place(tmp_path, name, content, columns, parts):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        read_extract(tmp_path / name, parse_columns(columns))
    for part in parts:
        assert part in str(caught.value)


def test_errors_never_hold_clinical_text(tmp_path):
    secret = "SecretiveSarcoma"
    (tmp_path / "e.csv").write_text(GOOD + f'p,"{secret}",C61\n')
    with pytest.raises(ValueError) as caught:
        read_extract(tmp_path / "e.csv")
    assert secret not in str(caught.value)


# ---------------------------------------------------------------------------------------------
# The commands and the folder
# ---------------------------------------------------------------------------------------------


def one_line_error(done):
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_commands_fail_in_one_line(folder, tmp_path):
    done = run("prepare", f"--input={tmp_path / 'no.csv'}", f"--output={tmp_path / 'c'}")
    assert "no such file" in one_line_error(done)
    assert "--overwrite" in run_prepare(folder, folder / "extract.csv")[1]
    done = run("synthesize", "--cases=3", f"--output={tmp_path / 'no' / 'e.csv'}")
    assert "no such folder" in one_line_error(done)
    minimal(icd10="C61.0").to_csv(tmp_path / "bad.csv", index=False)
    assert "code_not_valid 1" in run_prepare(tmp_path, tmp_path / "bad.csv")[1]
    minimal().to_csv(tmp_path / "one.csv", index=False)
    assert "split would be empty" in run_prepare(tmp_path, tmp_path / "one.csv")[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.csv", "one.csv"]


def _write(folder, seed=0, overwrite=False, n=40):
    cases = pd.DataFrame(
        {
            "case_id": [f"row-{i}" for i in range(n)],
            "patient_id": [f"p{i}" for i in range(n)],
            "diagnosis": [f"IDC of the right breast, lesion {i}" for i in range(n)],
            "regimen": "Right breast, 40.05 Gy in 15 fractions, 3DCRT tangents",
            "modality": "photon",
            "icd10": "C50.411",
        }
    )
    cases, _ = split_cases(cases, seed, 0.2, 0.2)
    excluded = pd.DataFrame({"row": [99], "reason": ["no_code"]})
    return cohort.write_cohort(folder, cases, excluded, {"kept": n}, overwrite)


def test_only_a_finished_cohort_is_overwritten(tmp_path):
    _write(tmp_path / "c")
    with pytest.raises(FileExistsError, match="overwrite"):
        _write(tmp_path / "c")
    _write(tmp_path / "c", seed=3, overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="no finished cohort"):
        _write(tmp_path / "other", overwrite=True)
    assert (tmp_path / "other" / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "other"]


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    _write(tmp_path / "c")
    before = (tmp_path / "c" / "manifest.json").read_bytes()

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(cohort, "sha256", fail)
    for target, overwrite in (("c", True), ("new", False)):
        with pytest.raises(OSError, match="disk full"):
            _write(tmp_path / target, seed=5, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert (tmp_path / "c" / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("split", SPLITS)
def test_a_changed_file_is_refused(tmp_path, split):
    _write(tmp_path / "c")
    path = tmp_path / "c" / f"{split}.parquet"
    table = pd.read_parquet(path)
    table.loc[0, "icd10"] = "C61"
    table.to_parquet(path, index=False)
    with pytest.raises(ValueError, match=rf"{split}\.parquet: changed since prepare"):
        cohort.load_cohort(tmp_path / "c")


def _rewrite(folder, split, table):
    """Changes a split and its hash, as a careless script would."""
    path = folder / f"{split}.parquet"
    table.to_parquet(path, index=False)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"][path.name] = cohort.sha256(path)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="icd10"), "no column icd10; there are case_id"),
        (lambda t: t.iloc[:0], "the train split has no cases"),
        (lambda t: t.assign(regimen=["", *t["regimen"][1:]]), "row 1, column regimen is empty"),
    ],
)
def test_a_broken_split_is_refused(tmp_path, change, message):
    _write(tmp_path / "c")
    _rewrite(tmp_path / "c", "train", change(cohort.load_split(tmp_path / "c", "train")))
    with pytest.raises(ValueError, match=message):
        cohort.load_records(tmp_path / "c", "train")


def test_a_patient_in_two_splits_is_refused(tmp_path):
    _write(tmp_path / "c")
    tables = cohort.load_cohort(tmp_path / "c")
    _rewrite(tmp_path / "c", "test", pd.concat([tables["test"], tables["train"].head(1)]))
    with pytest.raises(ValueError, match="1 patients are in more than one split"):
        cohort.load_cohort(tmp_path / "c")


def test_missing_pieces_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such cohort folder"):
        cohort.load_records(tmp_path / "none", "train")
    (tmp_path / "half").mkdir()
    with pytest.raises(FileNotFoundError, match="did not finish"):
        cohort.load_records(tmp_path / "half", "train")
    _write(tmp_path / "c")
    with pytest.raises(ValueError, match="no split 'dev'"):
        cohort.load_records(tmp_path / "c", "dev")
    (tmp_path / "c" / "test.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"test\.parquet: missing"):
        cohort.load_cohort(tmp_path / "c")
    (tmp_path / "c" / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="not a cohort's manifest"):
        cohort.load_records(tmp_path / "c", "train")


def test_ceilings_of_another_extract_are_refused(tmp_path):
    synthetic.write_extract(synthetic.make_extract(120, 8), tmp_path / "e.csv")
    known = tmp_path / "e.csv.ceiling.parquet"
    stranger = pd.read_parquet(known)
    stranger.assign(patient_id="X" + stranger["patient_id"]).to_parquet(known)
    _, message = run_prepare(tmp_path, tmp_path / "e.csv")
    assert "belongs to another extract" in message
    known.unlink()
    manifest, _ = run_prepare(tmp_path, tmp_path / "e.csv")
    assert manifest["ceiling"] is None


# ---------------------------------------------------------------------------------------------
# The whole way, with every part
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    return synthetic.make_extract(160, 3).table


def files_text(folder):
    """All that stands in a cohort's files."""
    texts = {path.name: path.read_bytes().decode("utf-8", "replace") for path in folder.iterdir()}
    for path in folder.glob("*.parquet"):
        texts[path.name] = pd.read_parquet(path).to_csv()
    return texts


def test_identifiers_stop_prepare_until_a_policy_is_chosen(tmp_path, small):
    planted = ["Dr. Jane Whitfield", "MRN 4482913", "jane@example.org", "03/14/2021"]
    note = f" Referred by {planted[0]}, {planted[1]}, {planted[2]}, seen {planted[3]}."
    table = small.copy()
    table["diagnosis"] = table["diagnosis"] + note
    table.to_csv(tmp_path / "e.csv", index=False)
    for options in ((), ("--deidentify=stop",)):
        _, message = run_prepare(tmp_path, tmp_path / "e.csv", *options)
        assert "identifiers found in diagnosis" in message and "--deidentify=redact" in message
        assert "Whitfield" not in message and "4482913" not in message
        assert [path.name for path in tmp_path.iterdir()] == ["e.csv"]
    manifest, _ = run_prepare(tmp_path, tmp_path / "e.csv", "--deidentify=redact")
    for name, text in files_text(tmp_path / "cohort").items():
        for words in ("Whitfield", "4482913", "example.org", "03/14"):
            assert words not in text, name
        assert "SYN0" not in text, name
    assert manifest["deidentification"]["policy"] == "redact"
    assert manifest["deidentification"]["classes"]["email"] == len(table)
    kept = pd.concat(cohort.load_cohort(tmp_path / "cohort").values())
    assert kept["diagnosis"].str.contains("[EMAIL]", regex=False).all()
    assert manifest["assessed"] == 160 == manifest["kept"] + sum(manifest["excluded"].values())
    manifest, _ = run_prepare(tmp_path, tmp_path / "e.csv", "--deidentify=off", "--overwrite")
    assert manifest["deidentification"]["classes"]["email"] == len(table)
    assert "Whitfield" in files_text(tmp_path / "cohort")["train.parquet"]


def test_a_filled_in_sheet_brings_its_case_into_the_cohort(tmp_path, small):
    small.to_csv(tmp_path / "e.csv", index=False)
    first, _ = run_prepare(tmp_path, tmp_path / "e.csv")
    assert first["flow"]["annotated"] is None
    sheet = pd.read_csv(tmp_path / "cohort" / "annotation.csv", dtype=str, keep_default_na=False)
    place = sheet.index[sheet["reason"] == "modality_contradiction"][0]
    sheet.loc[place, ["keep", "modality"]] = ["yes", "photon"]
    sheet.loc[place, "regimen"] = "Left breast, 40 Gy in 15 fractions"
    sheet.to_csv(tmp_path / "filled.csv", index=False)
    # Filled in where prepare wrote it: the cohort is still good, but not overwritten.
    sheet.to_csv(tmp_path / "cohort" / "annotation.csv", index=False)
    cohort.load_cohort(tmp_path / "cohort")
    _, message = run_prepare(tmp_path, tmp_path / "e.csv", "--overwrite")
    assert "has been changed since prepare wrote it" in message
    shutil.rmtree(tmp_path / "cohort")
    second, _ = run_prepare(
        tmp_path, tmp_path / "e.csv", f"--annotations={tmp_path / 'filled.csv'}"
    )
    assert second["assessed"] == first["assessed"] and second["kept"] == first["kept"] + 1
    assert second["flow"]["annotated"] == 1
    assert second["annotation"]["files"][0]["sha256"] == cohort.sha256(tmp_path / "filled.csv")
    kept = pd.concat(cohort.load_cohort(tmp_path / "cohort").values()).set_index("case_id")
    case = kept.loc[f"row-{sheet.loc[place, 'row']}"]
    assert (case["modality"], case["regimen"][:11]) == ("photon", "Left breast")


def test_the_latest_patients_are_the_test_and_their_dates_stay_out(tmp_path, small):
    small.to_csv(tmp_path / "e.csv", index=False)
    manifest, _ = run_prepare(tmp_path, tmp_path / "e.csv", "--split_by=date:start_day")
    assert manifest["split"]["by"] == "date"
    tables = cohort.load_cohort(tmp_path / "cohort")
    day = small.assign(day=small["start_day"].astype(int)).groupby("patient_id")["day"].max()
    earliest = day[tables["test"]["patient_id"]].min()
    assert earliest >= day[tables["train"]["patient_id"]].quantile(0.9)
    assert all("start_day" not in table.columns for table in tables.values())
    _, message = run_prepare(tmp_path, tmp_path / "e.csv", "--split_by=date:dose", "--overwrite")
    assert "no column 'dose'. Columns there: " in message
    _, message = run_prepare(
        tmp_path, tmp_path / "e.csv", "--split_by=date:Start_Day", "--overwrite"
    )
    assert "no column 'Start_Day' (did you mean 'start_day'?). Columns there: " in message


@pytest.mark.parametrize("name", ["excluded.csv", "flow.svg"])
def test_any_changed_file_is_refused(tmp_path, small, name):
    small.to_csv(tmp_path / "e.csv", index=False)
    manifest, _ = run_prepare(tmp_path, tmp_path / "e.csv")
    assert set(manifest["sha256"]) | {"manifest.json"} == {
        path.name for path in (tmp_path / "cohort").iterdir()
    }
    with (tmp_path / "cohort" / name).open("a") as file:
        file.write(" ")
    with pytest.raises(ValueError, match=f"{name}: changed since prepare"):
        cohort.load_records(tmp_path / "cohort", "train")


def test_the_manifest_tells_which_rules_ran(tmp_path, small):
    small.to_csv(tmp_path / "e.csv", index=False)
    own = tmp_path / "mine.py"
    own.write_text("def not_too_old(rows):\n    return rows['age'].astype(int) > 80\n")
    manifest, _ = run_prepare(
        tmp_path, tmp_path / "e.csv", f"--rules={own}", "--skip_rules=code_valid"
    )
    assert manifest["rules"][-1] == "not_too_old" and "code_valid" not in manifest["rules"]
    assert manifest["rules_turned_off"] == ["code_valid"]
    assert manifest["rules_added"]["sha256"] == cohort.sha256(own)
    assert manifest["excluded"]["not_too_old"] > 0
    assert manifest["assessed"] == manifest["kept"] + sum(manifest["excluded"].values())
    kept = pd.concat(cohort.load_cohort(tmp_path / "cohort").values())
    assert kept["age"].astype(int).max() <= 80
