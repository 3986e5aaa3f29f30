"""Table 1: counts that add up, differences as others compute them, nothing small when published."""

import re

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from radonc_jax.data import rules, synthetic
from radonc_jax.data.splits import SPLITS, split_cases
from radonc_jax.data.table1 import GROUPS, RARE, characteristics, stage_groups, table1
from radonc_jax.evaluation.baselines import score_baselines
from radonc_jax.tasks import TASKS, Record


@pytest.fixture(scope="module")
def cases():
    table = synthetic.make_extract(1300, 2).table
    kept = rules.select(table.set_index(pd.RangeIndex(2, len(table) + 2, name="row"))).kept
    kept = kept.reset_index(drop=True).assign(case_id=[f"row-{n}" for n in range(len(kept))])
    return split_cases(kept, 0, 0.2, 0.15)[0]


@pytest.fixture(scope="module")
def table(cases):
    return table1(cases)


def count(cell):
    return int(re.match(r"[\d,]+", cell)[0].replace(",", ""))


def lines_of(table, name):
    lines = table.rows[table.rows["characteristic"] == name]
    lines = lines[lines["section"] == "characteristics"]
    return lines.iloc[0], lines.iloc[1:]


@pytest.mark.parametrize("published", [False, True])
def test_every_characteristic_adds_up_to_the_split(cases, published):
    table = table1(cases, published)
    sizes = {"overall": len(cases), **cases["split"].value_counts()}
    names = ("site", "stage group", "modality", "code category", "sex")
    for name in names:
        _, levels = lines_of(table, name)
        for group in GROUPS:
            counts = levels[group].map(count)
            assert counts.sum() == sizes[group]
            assert not (published and counts.between(1, 10).any())
    codes = table.rows[table.rows["section"] == "codes"]
    for group in GROUPS:
        assert codes[group].map(count).sum() == sizes[group]
        assert not (published and codes[group].map(count).between(1, 10).any())


def test_a_hidden_count_cannot_be_found_by_subtraction(cases):
    cases = cases.assign(age=cases["age"].where(cases.index >= 30, ""))
    told, hidden = table1(cases), table1(cases, published=True)
    lines = [
        table.rows[(table.rows["characteristic"] == "age") & (table.rows["level"] == "not stated")]
        for table in (told, hidden)
    ]
    known, shown = (line.iloc[0] for line in lines)
    small = [part for part in SPLITS if 0 < count(known[part]) < 11]
    assert known["overall"] == "30" and small
    assert shown["overall"] == "" and all(shown[part] == "<11" for part in small)
    assert "<11" in hidden.csv and "&lt;11" in hidden.html and "&lt;11" not in told.html


def test_counts_are_those_of_the_cases(cases, table):
    _, levels = lines_of(table, "modality")
    expected = pd.crosstab(cases["modality"], cases["split"])
    for row in levels.to_dict("records"):
        for part in SPLITS:
            assert count(row[part]) == expected.loc[row["level"], part]
    first = cases.loc[cases["split"] == "test", "diagnosis"].str.split().str.len()
    line, _ = lines_of(table, "words of the diagnosis")
    low, middle, high = np.percentile(first, [25, 50, 75])
    assert line["test"] == f"{middle:g} [{low:g}, {high:g}]"


def test_differences_of_numbers(cases, table):
    line, _ = lines_of(table, "age")
    train, test, validation = (
        cases.loc[cases["split"] == part, "age"].astype(float)
        for part in ("train", "test", "validation")
    )
    smd = abs(train.mean() - test.mean()) / np.sqrt((train.std() ** 2 + test.std() ** 2) / 2)
    assert float(line["smd_test"]) == pytest.approx(smd, abs=6e-4)
    p = stats.kruskal(train, test, validation).pvalue
    assert float(line["p_value"]) == pytest.approx(p, abs=6e-4)


def test_differences_of_categories(cases, table):
    line, _ = lines_of(table, "sex")
    counts = pd.crosstab(cases["sex"], cases["split"])
    p, q = (counts[part]["F"] / counts[part].sum() for part in ("train", "test"))
    smd = abs(p - q) / np.sqrt((p * (1 - p) + q * (1 - q)) / 2)
    assert float(line["smd_test"]) == pytest.approx(smd, abs=6e-4)
    expected = stats.chi2_contingency(counts.to_numpy()).pvalue
    assert float(line["p_value"]) == pytest.approx(expected, abs=6e-4)


def test_a_shifted_split_shows(cases):
    shifted = cases.copy()
    shifted["split"] = np.where(shifted["modality"] == "proton", "test", shifted["split"])
    table = table1(shifted)
    line, _ = lines_of(table, "modality")
    assert float(line["smd_test"]) > 0.5 and line["p_value"] == "<0.001"
    assert float(line["smd_validation"]) < 0.5
    worst = table.facts["largest_difference"]["test"]
    assert worst["smd"] >= float(line["smd_test"]) - 1e-3


def test_three_categories_differ_alike_whichever_comes_first(cases):
    # Yang and Dalton's distance does not depend on the category that is left out.
    rng = np.random.default_rng(0)
    values = pd.Series(rng.choice(list("abc"), len(cases), p=[0.6, 0.3, 0.1]))
    found = []
    for names in ("abc", "bca", "cab"):
        renamed = values.map(dict(zip("abc", names, strict=True)))
        found.append(lines_of(table1(cases.assign(site=renamed)), "site")[0]["smd_test"])
    assert len(set(found)) == 1 and float(found[0]) > 0


def test_rare_labels_are_counted(cases, table):
    training = cases.loc[cases["split"] == "train", "icd10"].value_counts()
    rare = {code for code in cases["icd10"] if training.get(code, 0) < RARE}
    facts = table.facts["rare_labels"]["icd"]
    assert facts["labels"] == cases["icd10"].nunique() and facts["rare_labels"] == len(rare)
    for part in SPLITS:
        own = cases.loc[cases["split"] == part, "icd10"]
        assert facts["cases"][part] == own.isin(rare).sum()


def test_the_majority_baseline_is_that_of_the_evaluation(cases, table):
    fields = ["case_id", "patient_id", "diagnosis", "regimen", "modality", "icd10"]
    records = {
        part: [Record(*row) for row in cases.loc[cases["split"] == part, fields].values]
        for part in SPLITS
    }
    for name, task in TASKS.items():
        scores = score_baselines(
            task, records["train"], records["test"], split="test", bootstrap=20
        )
        facts = table.facts["majority_baseline"][name]
        assert facts["accuracy"]["test"] == scores["majority"]["accuracy"]["value"]


@pytest.mark.parametrize(
    ("text", "column", "group"),
    [
        ("IDC, pT1c N0, stage IA, ER+", "", "I"),
        ("IDC, stage iiib", "", "III"),
        ("cervix; FIGO IVA; biopsy", "", "IV"),
        ("NHL, Ann Arbor IIE", "", "II"),
        ("DCIS, Stage: 0", "", "0"),
        ("Stage 3 lung ca", "", "III"),
        ("Stage: cT2 N0", "", ""),
        ("Stage: M1", "", ""),
        ("staged in 2/3 places, stage 2-3", "", ""),
        ("GBM", "", ""),
        ("GBM, stage II", "IIIC", "III"),
        ("GBM, stage II", "Stage 4", "IV"),
        ("GBM, stage II", "unknown", "II"),
    ],
)
def test_stage_groups(text, column, group):
    cases = pd.DataFrame({"diagnosis": [text], "stage": [column]})
    assert stage_groups(cases)[0] == group
    if not column:
        assert stage_groups(cases[["diagnosis"]])[0] == group


def test_the_page_stands_alone_and_runs_nothing(cases):
    page = table1(cases.assign(site="<script>alert(1)</script>")).html
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "http" not in page and "src=" not in page and len(page) < 60_000
    assert not any(text[:40] in page for text in cases["diagnosis"].head(50))


def test_columns_that_are_not_there_or_empty_are_no_trouble(cases):
    few = cases[["case_id", "patient_id", "diagnosis", "regimen", "modality", "icd10", "split"]]
    assert "sex" not in characteristics(few) and "stage group" in characteristics(few)
    table = table1(few.assign(age="", sex=None, site=" "))
    line, rest = lines_of(table, "age")
    assert line["p_value"] == line["overall"] == "" and count(rest.iloc[0]["overall"]) == len(few)
    assert lines_of(table, "sex")[1]["level"].tolist() == ["not stated"]
