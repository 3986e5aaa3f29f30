"""Splits by patient, and answers that stand in the question."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radonc_jax.data.splits import (
    assign_splits,
    check_no_patient_crosses,
    near_duplicates,
    strip_answers,
)


def _cases(n_patients: int, seed: int):
    rng = np.random.default_rng(seed)
    patients = [f"p{i}" for i in range(n_patients) for _ in range(rng.integers(1, 4))]
    labels = pd.DataFrame({"code": rng.choice(list("aaaaaabbbcd"), len(patients))})
    return pd.Series(rng.permutation(patients)), labels


@settings(max_examples=30, deadline=None)
@given(st.integers(40, 300), st.integers(0, 10_000))
def test_a_patient_never_crosses(n, seed):
    patients, labels = _cases(n, seed)
    split = assign_splits(patients, labels, seed, 0.2, 0.1)
    assert split.notna().all()
    assert split.groupby(patients).nunique().eq(1).all()
    by_patient = split.groupby(patients).first().value_counts()
    assert abs(by_patient["test"] - 0.2 * n) <= 1
    assert abs(by_patient["validation"] - 0.1 * n) <= 1.5


def test_labels_keep_their_share():
    patients = pd.Series([f"p{i}" for i in range(2000)])
    labels = pd.DataFrame({"code": ["common"] * 1700 + ["rare"] * 300})
    split = assign_splits(patients, labels, 4, 0.15, 0.1)
    for label in ("common", "rare"):
        own = split[labels["code"] == label]
        assert abs((own == "test").mean() - 0.15) < 0.01
        assert abs((own == "validation").mean() - 0.10) < 0.015


def test_rare_labels_share_a_place_with_their_category():
    # 40 codes of 5 patients in one category: no code can keep its share, the category must.
    patients = pd.Series([f"p{i}" for i in range(1000)])
    category = ["x"] * 200 + ["y"] * 800
    codes = [f"x{i % 40}" for i in range(200)] + ["y"] * 800
    labels = pd.DataFrame({"category": category, "code": codes})
    split = assign_splits(patients, labels, 0, 0.1, 0.1)
    assert abs((split[:200] == "test").sum() - 20) <= 1


def test_seed_decides():
    patients, labels = _cases(200, 1)
    first = assign_splits(patients, labels, 7, 0.2, 0.2)
    assert first.equals(assign_splits(patients, labels, 7, 0.2, 0.2))
    assert not first.equals(assign_splits(patients, labels, 8, 0.2, 0.2))


@pytest.mark.parametrize(
    ("test", "validation", "n", "message"),
    [
        (0.0, 0.1, 100, "test_fraction is 0.0"),
        (0.2, 1.5, 100, "validation_fraction is 1.5"),
        (0.6, 0.4, 100, "leave nothing to train on"),
        (0.1, 0.1, 1, "split would be empty"),
    ],
)
def test_impossible_splits(test, validation, n, message):
    patients, labels = pd.Series([f"p{i}" for i in range(n)]), pd.DataFrame({"code": ["a"] * n})
    with pytest.raises(ValueError, match=message):
        assign_splits(patients, labels, 0, test, validation)


def test_leak_check():
    cases = pd.DataFrame({"patient_id": ["a", "b", "a"], "split": ["train", "test", "train"]})
    check_no_patient_crosses(cases)
    cases.loc[2, "split"] = "test"
    with pytest.raises(ValueError, match="1 patients are in more than one split"):
        check_no_patient_crosses(cases)


def test_near_duplicates_ignore_case_and_punctuation():
    cases = pd.DataFrame(
        {
            "diagnosis": ["IDC, left breast.", "GBM", "idc left  BREAST", "gbm, right", "GBM!"],
            "split": ["train", "train", "test", "test", "validation"],
        }
    )
    assert near_duplicates(cases) == {"validation": 1, "test": 1}


@pytest.mark.parametrize(
    ("text", "left", "found"),
    [
        ("IDC of UOQ R breast (C50.411)", "IDC of UOQ R breast", ("icd",)),
        ("IDC [c50411], pT1c", "IDC, pT1c", ("icd",)),
        ("IDC ICD-10: C50.411. Stage I", "IDC. Stage I", ("icd",)),
        ("IDC, code C50.4 on file", "IDC, code on file", ("icd",)),
        ("IDC. Planned 40.05 Gy in 15 fractions.", "IDC.", ("regimen",)),
        ("IDC, 4005 cGy/15 fx", "IDC", ("regimen",)),
        ("IDC. Referred for photon therapy.", "IDC.", ("modality",)),
        # What answers another question stays.
        ("IDC, former C61, T10 metastasis", "IDC, former C61, T10 metastasis", ()),
        ("IDC, prior 50 Gy in 25 fractions", "IDC, prior 50 Gy in 25 fractions", ()),
        ("IDC, prior proton therapy", "IDC, prior proton therapy", ()),
        ("pT2 N0 M0, ER+/PR+, 3/12 nodes", "pT2 N0 M0, ER+/PR+, 3/12 nodes", ()),
    ],
)
def test_answers_are_taken_out_of_the_question(text, left, found):
    result = strip_answers(text, "C50.411", "Right breast, 40.05 Gy in 15 fractions", "photon")
    assert (result.text, result.found) == (left, found)
