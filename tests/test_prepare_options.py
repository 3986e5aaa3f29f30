"""Annotators, external tests, near duplicates, published tables and the preflight, through the
command."""

from importlib import metadata

import numpy as np
import pandas as pd
import pytest
from preparing import run_prepare
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from radonc_jax import prepare
from radonc_jax.data import annotation, cohort, synthetic
from radonc_jax.data.batches import BatchConfig, task_examples
from radonc_jax.data.splits import SPLITS, find_duplicates
from radonc_jax.models.tokenizer import load_tokenizer
from radonc_jax.tasks import TASKS


@pytest.fixture(scope="module")
def extract():
    return synthetic.make_extract(260, 6).table


@pytest.fixture
def source(tmp_path, extract):
    extract.to_csv(tmp_path / "e.csv", index=False)
    return tmp_path / "e.csv"


def all_cases(folder):
    tables = cohort.load_cohort(folder / "cohort")
    return pd.concat([table.assign(split=name) for name, table in tables.items()])


def read_sheet(path):
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def test_two_annotators_and_an_adjudicator_settle_what_the_rules_left_open(tmp_path, source):
    first, _ = run_prepare(tmp_path, source)
    sheet = read_sheet(tmp_path / "cohort" / "annotation.csv")
    assert first["annotation"]["rows_offered"] == len(sheet) > 10
    whole = sheet[["proposed_modality", "proposed_regimen", "proposed_icd10"]].ne("").all(axis=1)
    one, two, three = sheet.index[whole & ~sheet["case"].duplicated(keep=False)][:3]
    a, b = sheet.copy(), sheet.copy()
    a.loc[[one, two], "keep"] = "yes"
    b.loc[[one, two], "keep"] = ["yes", "no"]
    a.loc[three, ["keep", "exclude_reason"]] = ["no", "Not treated here"]
    b.loc[three, "keep"] = "no"
    a.to_csv(tmp_path / "a.csv", index=False)
    b.to_excel(tmp_path / "b.xlsx", index=False)
    annotations = f"--annotations={tmp_path / 'a.csv'},{tmp_path / 'b.xlsx'}"

    second, _ = run_prepare(tmp_path, source, "--overwrite", annotations)
    told = second["annotation"]
    assert second["kept"] == first["kept"] + 1 and second["assessed"] == first["assessed"]
    assert second["assessed"] == second["kept"] + sum(second["excluded"].values())
    assert second["excluded"]["annotated_not_treated_here"] == 1
    assert told["disagreements"] == told["open_disagreements"] == 1
    # Decisions yyn and ynn: 2 of 3 equal, 4/9 expected by chance.
    assert told["agreement"]["decision"]["kappa"] == pytest.approx((2 / 3 - 4 / 9) / (5 / 9))
    c = read_sheet(tmp_path / "cohort" / "disagreements.csv")
    assert list(c["row"]) == [sheet.loc[two, "row"]]
    assert "disagreements.csv" in second["sha256"]

    c[["keep", "modality", "regimen", "icd10"]] = [
        ["yes", *sheet.loc[two, ["proposed_modality", "proposed_regimen", "proposed_icd10"]]]
    ]
    c.to_csv(tmp_path / "c.csv", index=False)
    third, _ = run_prepare(
        tmp_path, source, "--overwrite", annotations, f"--adjudication={tmp_path / 'c.csv'}"
    )
    assert third["kept"] == first["kept"] + 2 and third["annotation"]["open_disagreements"] == 0
    assert third["annotation"]["adjudication"]["sha256"] == cohort.sha256(tmp_path / "c.csv")
    kept = all_cases(tmp_path).set_index("case_id")
    for place in (one, two):
        case = kept.loc[f"row-{sheet.loc[place, 'row']}"]
        assert case["modality"] == sheet.loc[place, "proposed_modality"]
        assert case["icd10"] == sheet.loc[place, "proposed_icd10"]

    b.loc[one, "icd10"] = "carcinoma"
    b.to_excel(tmp_path / "b.xlsx", index=False)
    _, message = run_prepare(tmp_path, source, "--overwrite", annotations)
    assert f"b.xlsx: row {one + 2}, column icd10: not valid" in message
    assert "carcinoma" not in message


def test_identifiers_are_looked_for_in_every_column_that_a_sheet_shows(tmp_path, extract):
    assert set(prepare.SCANNED) >= {*annotation.GIVEN, *cohort.CARRIED}
    for column in ("icd10", "course_id", "plan_id", "total_dose_gy", "total_dose_cgy", "fractions"):
        held = extract[column] if column in extract else pd.Series("", index=extract.index)
        table = extract.assign(**{column: held.astype(str).where(held.index > 0, "MRN 4482913")})
        table.to_csv(tmp_path / "e.csv", index=False)
        _, message = run_prepare(tmp_path, tmp_path / "e.csv")
        assert f"identifiers found in {column}: mrn 1 (row 2)" in message


def test_a_sheet_can_be_a_workbook(tmp_path, source):
    manifest, _ = run_prepare(tmp_path, source, "--annotation_format=xlsx")
    book = pd.read_excel(tmp_path / "cohort" / "annotation.xlsx", dtype=str)
    assert len(book) == manifest["annotation"]["rows_offered"]
    table = {"name": "simple_icd_10_cm", "version": metadata.version("simple_icd_10_cm")}
    assert manifest["code_table"] == table
    assert not (tmp_path / "cohort" / "annotation.csv").exists()


def test_a_hospital_that_is_named_is_the_whole_test_and_nothing_else(tmp_path, extract):
    centre = extract["patient_id"].str[-1].map(lambda digit: "South" if digit < "2" else "North")
    extract.assign(institution=centre).to_csv(tmp_path / "e.csv", index=False)
    option = "--split_by=site:institution=south"
    manifest, _ = run_prepare(tmp_path, tmp_path / "e.csv", option, "--deidentify=off")
    cases = all_cases(tmp_path)
    of_south = cases["patient_id"].str[-1] < "2"
    assert ((cases["split"] == "test") == of_south).all() and of_south.any()
    assert manifest["split"] == {
        "by": "site",
        "column": "institution",
        "sites": ["South"],
        "sites_chosen": 1,
        "external_cases": int(of_south.sum()),
        "external_cases_not_tested": 0,
    }


def test_near_duplicates_stay_together_on_request(tmp_path, extract):
    # Every other patient gets the text of the one before, with a word added.
    patients = extract["patient_id"].unique()
    pairs = dict(zip(patients[1::2], patients[::2], strict=False))
    text = extract.drop_duplicates("patient_id").set_index("patient_id")["diagnosis"]
    copied = extract["patient_id"].isin(pairs)
    table = extract.copy()
    table.loc[copied, "diagnosis"] = [
        text[pairs[name]] + " Doing well." for name in extract.loc[copied, "patient_id"]
    ]
    table.to_csv(tmp_path / "e.csv", index=False)
    apart, _ = run_prepare(tmp_path, tmp_path / "e.csv")
    together, _ = run_prepare(
        tmp_path, tmp_path / "e.csv", "--group_near_duplicates", "--overwrite"
    )
    assert apart["near_duplicates"]["in_train"]["test"]["near"] > 3
    for told in together["near_duplicates"]["in_train"].values():
        assert told == {"same": 0, "near": 0}
    assert together["near_duplicates"]["groups"] == apart["near_duplicates"]["groups"] > 20
    cases = all_cases(tmp_path).reset_index(drop=True)
    group = find_duplicates(cases["diagnosis"])["group"]
    assert cases["split"].groupby(group).nunique().eq(1).all()
    assert abs(together["cases"]["test"] - apart["cases"]["test"]) <= 3


def test_table_1_is_written_and_can_be_published(tmp_path, source):
    cells = {}
    for option in ("--nopublished", "--published"):
        manifest, _ = run_prepare(tmp_path, source, option, "--overwrite")
        table = pd.read_csv(tmp_path / "cohort" / "table1.csv", dtype=str, keep_default_na=False)
        page = (tmp_path / "cohort" / "table1.html").read_text()
        assert "http" not in page and table.loc[0, "overall"] in page
        assert int(table.loc[0, "overall"].replace(",", "")) == manifest["kept"]
        lines = table[table["section"].isin(["characteristics", "codes"])]
        numbers = [lines[part].str.extract(r"^(\d+) \(")[0].dropna().astype(int) for part in SPLITS]
        cells[option] = np.concatenate(numbers)
    small = {option: ((found > 0) & (found < 11)).sum() for option, found in cells.items()}
    assert small["--nopublished"] > 20 and small["--published"] == 0
    baseline = manifest["table1"]["majority_baseline"]["modality"]
    share = (all_cases(tmp_path).query("split == 'test'")["modality"] == baseline["answer"]).mean()
    assert baseline["accuracy"]["test"] == share


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory, extract):
    folder = tmp_path_factory.mktemp("tokenizer")
    words = {word: n for n, word in enumerate(["<unk>", "<s>", "</s>", "the", "of", "Gy"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("policy", ["fail", "trim_diagnosis", "drop"])
def test_preflight_tells_what_training_will_do(tmp_path, source, tokenizer_folder, policy, capsys):
    options = (
        f"--tokenizer={tokenizer_folder}",
        "--sequence_length=46",
        f"--over_length={policy}",
    )
    manifest, _ = run_prepare(tmp_path, source, *options)
    told = manifest["preflight"]
    assert told["limit"] == 46 and told["over_length"] == policy
    assert told["tokenizer"]["sha256"] == cohort.sha256(tokenizer_folder / "tokenizer.json")
    listed = pd.read_csv(tmp_path / "cohort" / "over_length.csv")
    printed = capsys.readouterr().out
    train = cohort.load_records(tmp_path / "cohort", "train")
    for name, task in TASKS.items():
        facts = told["tasks"][name]
        assert facts["examples"] == manifest["kept"]
        assert facts["too_long"]["all"] == (listed["task"] == name).sum() > 0
        assert f"{name}: min" in printed
        settings = BatchConfig(1, 1, 46, False, "drop" if policy == "fail" else policy)
        _, report = task_examples(train, [task], load_tokenizer(tokenizer_folder), settings)
        assert report.too_long == facts["too_long"]["train"]
    texts = [words for record in train for words in record.diagnosis.split()[:3]]
    lists = (tmp_path / "cohort" / "over_length.csv").read_text()
    assert not any(word in lists for word in texts if len(word) > 7)


def test_a_wrong_option_is_told_before_the_work(tmp_path, source):
    _, message = run_prepare(tmp_path, source, f"--tokenizer={tmp_path}")
    assert "holds neither tokenizer.json nor tokenizer.model" in message
    for option in ("--seed=-1", "--test_fraction=1.5", "--validation_fraction=0"):
        _, message = run_prepare(tmp_path, tmp_path / "not_read.csv", option)
        assert message.startswith(f"error: {option.partition('=')[0]} is ")
    _, message = run_prepare(tmp_path, source, "--split_by=month")
    assert "--split_by is 'month'" in message
