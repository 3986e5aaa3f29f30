"""Splits by patient, and answers that stand in the question."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import StratifiedGroupKFold

from radonc_jax.data import synthetic
from radonc_jax.data.splits import (
    answers_left,
    assign_splits,
    check_no_patient_crosses,
    external_cases,
    find_duplicates,
    near_duplicates,
    normalise_text,
    parse_split_by,
    split_cases,
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


def test_ids_that_differ_by_case_or_blanks_are_one_patient():
    patients, labels = _cases(200, 5)
    other = patients.where(patients.index % 2 == 0, " " + patients.str.upper())
    split = assign_splits(other, labels, 3, 0.2, 0.1)
    assert split.groupby(patients).nunique().eq(1).all()
    assert split.equals(assign_splits(patients, labels, 3, 0.2, 0.1))
    crossing = pd.DataFrame({"patient_id": ["ab1", "AB1"], "split": ["train", "test"]})
    with pytest.raises(ValueError, match="1 patients are in more than one split"):
        check_no_patient_crosses(crossing)


def test_leak_check():
    cases = pd.DataFrame({"patient_id": ["a", "b", "a"], "split": ["train", "test", "train"]})
    check_no_patient_crosses(cases)
    cases.loc[2, "split"] = "test"
    with pytest.raises(ValueError, match="1 patients are in more than one split"):
        check_no_patient_crosses(cases)


@settings(max_examples=20, deadline=None)
@given(st.integers(60, 200), st.integers(0, 10_000))
def test_groups_stay_together_and_shares_are_kept(n, seed):
    patients, labels = _cases(n, seed)
    rng = np.random.default_rng(seed)
    groups = patients.map(lambda name: f"g{int(name.strip('p')) // 3}")
    alone = rng.random(len(patients)) < 0.6
    groups[alone] = [f"alone{i}" for i in range(alone.sum())]
    split = assign_splits(patients, labels, seed, 0.2, 0.15, groups=groups)
    assert split.groupby(patients).nunique().eq(1).all()
    assert split.groupby(groups).nunique().eq(1).all()


def test_shares_are_kept_where_groups_are_small():
    rng = np.random.default_rng(2)
    patients = pd.Series([f"p{i}" for i in range(3000)])
    labels = pd.DataFrame({"code": rng.choice(list("abcd"), 3000, p=[0.7, 0.2, 0.08, 0.02])})
    groups = pd.Series(np.where(np.arange(3000) < 900, np.arange(3000) // 3, np.arange(3000)))
    split = assign_splits(patients, labels, 0, 0.2, 0.1, groups=groups)
    assert split.groupby(groups).nunique().eq(1).all()
    assert abs((split == "test").sum() - 600) <= 3
    assert abs((split == "validation").sum() - 300) <= 3
    several = groups.duplicated(keep=False)
    assert abs((split[several] == "test").mean() - 0.2) < 0.02


def test_a_group_larger_than_a_held_out_split_trains():
    patients = pd.Series([f"p{i}" for i in range(1000)])
    groups = pd.Series([0] * 500 + list(range(1, 501)))
    for seed in range(5):
        split = assign_splits(
            patients, pd.DataFrame({"code": ["a"] * 1000}), seed, 0.1, 0.1, groups=groups
        )
        assert set(split[:500]) == {"train"}
        assert (split == "test").sum() == 100 and (split == "validation").sum() == 100


def test_labels_are_spread_at_least_as_well_as_by_scikit_learn():
    rng = np.random.default_rng(0)
    patients = pd.Series([f"p{i}" for i in range(1500)])
    weights = 1 / np.arange(1, 61)
    labels = pd.DataFrame({"code": rng.choice(60, 1500, p=weights / weights.sum())})
    ours = assign_splits(patients, labels, 0, 0.2, 0.1) == "test"
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    _, rows = next(folds.split(labels, labels["code"], patients))
    theirs = pd.Series(labels.index.isin(rows))

    def imbalance(test):
        share = test.groupby(labels["code"]).mean()
        return (labels["code"].value_counts() * (share - 0.2) ** 2).sum()

    assert ours.sum() == 300
    assert imbalance(ours) <= 1.1 * imbalance(theirs)


# ---------------------------------------------------------------------------------------------
# External tests
# ---------------------------------------------------------------------------------------------


def _dated(n=200, **columns):
    table = pd.DataFrame(
        {
            "case_id": [f"row-{i + 2}" for i in range(n)],
            "patient_id": [f"p{i}" for i in range(n)],
            "diagnosis": [f"tumour {i} of the {'left' if i % 2 else 'right'}" for i in range(n)],
            "modality": "photon",
            "icd10": "C61",
            "start_date": [f"2{i // 28:03d}-0{1 + i % 2}-{1 + i % 28:02d}" for i in range(n)],
            "institution": ["North", "South ", "east", "North"] * (n // 4),
        }
    )  # fmt: skip
    return table.assign(**columns)


def test_the_latest_dates_are_the_external_test():
    cases = _dated().sample(frac=1, random_state=0)
    done, facts = split_cases(cases, 0, 0.15, 0.1, by=parse_split_by("date:start_date"))
    test = done[done["split"] == "test"]["start_date"]
    assert abs(len(test) - 30) <= 1
    assert test.min() > done[done["split"] != "test"]["start_date"].max()
    assert facts["split"]["first"] == test.min()
    assert (done["split"] == "validation").sum() == pytest.approx(20, abs=1)


def test_a_given_date_begins_the_external_test():
    by = parse_split_by("date:start_date=2004-01-01")
    done, facts = split_cases(_dated(), 0, 0.15, 0.1, by=by)
    assert ((done["split"] == "test") == (done["start_date"] >= "2004-01-01")).all()
    assert facts["split"]["first"] == "2004-01-01"


@pytest.mark.parametrize(
    ("form", "first"),
    [("%Y", 2007.0), ("%d.%m.%Y", "2007-01-01"), ("%m/%d/%Y", "2007-01-01"), ("%j", None)],
)
def test_dates_are_read_as_they_are_written(form, first):
    days = pd.to_datetime(pd.Series(range(200)) * 20, unit="D", origin="2000-01-01")
    cases = _dated(start_date=days.dt.strftime(form))
    external, facts = external_cases(cases, parse_split_by("date:start_date"), 0.36)
    if first is None:  # day of the year: numbers in their own order
        assert (external == (days.dt.day_of_year >= float(facts["first"]))).all()
    else:
        assert abs((days.dt.year >= 2007).mean() - external.mean()) < 0.02
        assert days[external].min() > days[~external].max()


def test_named_institutions_are_the_external_test():
    by = parse_split_by("site:institution=south, East")
    done, facts = split_cases(_dated(), 0, 0.15, 0.1, by=by)
    assert set(done[done["split"] == "test"]["institution"]) == {"South ", "east"}
    assert set(done[done["split"] != "test"]["institution"]) == {"North"}
    assert facts["split"]["sites"] == ["South", "east"]
    assert facts["split"]["external_cases"] == 100


def test_who_was_on_both_sides_is_not_tested_and_is_counted():
    cases = _dated()
    cases.loc[1, "patient_id"] = "p0"  # of South, as well as of North
    done, facts = split_cases(cases, 0, 0.15, 0.1, by=parse_split_by("site:institution=south"))
    assert done.loc[1, "split"] != "test"
    assert facts["split"]["external_cases_not_tested"] == 1


@pytest.mark.parametrize(
    ("by", "columns", "message"),
    [
        ("year:start_date", {}, "give patient, date:COLUMN"),
        ("site:institution", {}, "give patient, date:COLUMN"),
        ("date:", {}, "give patient, date:COLUMN"),
        ("date:start_date=", {}, "give patient, date:COLUMN"),
        ("patient:x", {}, "give patient, date:COLUMN"),
        ("date:begun", {}, "names the column 'begun'; there are case_id"),
        ("site:institution=West", {}, "no case has 'west'.*'North', 'South', 'east'"),
        ("site:institution=north,south,east", {}, "leaves nothing to train on"),
        ("date:start_date=2999-01-01", {}, "leaves no case to test on"),
        ("date:start_date=4", {}, "not written as column start_date"),
        ("date:start_date", {"start_date": ["soon"] + ["2001-01-01"] * 199}, "row-2 holds no date"),
        ("date:start_date", {"start_date": ["01/02/2001", "02/03/2002"] * 100}, "month/day or day"),
        ("date:start_date", {"start_date": "2001-01-01"}, "leaves nothing to train on"),
    ],
)  # fmt: skip
def test_external_tests_that_cannot_be(by, columns, message):
    with pytest.raises(ValueError, match=message) as caught:
        split_cases(_dated(**columns), 0, 0.15, 0.1, by=parse_split_by(by))
    assert "soon" not in str(caught.value)


@pytest.mark.parametrize("by", ["site:diagnosis=Mayo", "site:patient_id=p1,p2", "date:patient_id"])
def test_columns_of_texts_and_ids_choose_no_test(by):
    with pytest.raises(ValueError, match="of texts, numbers or ids"):
        parse_split_by(by)


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("remarks", ["Smith saw him", "Jones saw her"] * 100),
        ("institution", ["Smith saw him " * 9, "Jones saw her"] * 100),
        ("institution", ["Jones saw her", *(f"Smith {i}" for i in range(199))]),
    ],
)
def test_values_that_may_be_of_patients_are_counted_not_told(column, values):
    cases = _dated(**{column: values})
    with pytest.raises(ValueError, match=r"it has \d+ distinct values") as caught:
        external_cases(cases, parse_split_by(f"site:{column}=West"), 0.15)
    assert "Smith" not in str(caught.value) and "Jones" not in str(caught.value)
    external, facts = external_cases(cases, parse_split_by(f"site:{column}=jones saw her"), 0.15)
    assert external.any() and facts == {"by": "site", "column": column, "sites_chosen": 1}


# ---------------------------------------------------------------------------------------------
# Repeated texts
# ---------------------------------------------------------------------------------------------


def test_repeated_texts_are_told_per_split():
    texts = ["IDC, left breast.", "GBM", "idc left  BREAST", "gbm, right", "GBM!", "Ca. próstata"]
    split = pd.Series(["train", "train", "test", "test", "validation", "test"])
    told = near_duplicates(find_duplicates(pd.Series(texts)), split, False)
    assert told["in_train"] == {
        "validation": {"same": 1, "near": 0},
        "test": {"same": 1, "near": 0},
    }
    assert told["groups"] == 2 and told["cases_in_groups"] == 4 and told["largest_group"] == 2


def _pieces(text):
    raw = text.encode().ljust(5)
    return {raw[i : i + 5] for i in range(len(raw) - 4)}


def test_near_duplicates_are_those_of_all_pairs():
    extract = synthetic.make_extract(350, 5).table.drop_duplicates("diagnosis")
    extract = extract[extract["diagnosis"].str.len() > 20]
    rng = np.random.default_rng(1)
    texts = list(extract["diagnosis"])[:200]
    for text in texts[:80]:  # a typing error, a word less, another number, the sentence again
        spot = int(rng.integers(len(text)))
        words = text.split()
        texts.append(text[:spot] + "x" + text[spot + 1 :])
        texts.append(" ".join(words[: spot % len(words)] + words[spot % len(words) + 1 :]))
        texts.append(text.replace("1", "2").upper() + " 7")
    texts += ["", "?", "a", "ab", "日本語の診断", "日本語の診断。", texts[0] * 3]
    found = find_duplicates(pd.Series(texts))
    pieces = [_pieces(normalise_text(text)) for text in texts]
    pairs = [
        (i, j)
        for i in range(len(texts))
        for j in range(i)
        if len(pieces[i] & pieces[j]) >= 0.8 * len(pieces[i] | pieces[j])
    ]
    graph = sparse.coo_array(
        (np.ones(len(pairs)), tuple(zip(*pairs, strict=True))), shape=(len(texts),) * 2
    )
    expected = connected_components(graph, directed=False)[1]
    together = [(i, j) for i, j in pairs if found["group"][i] == found["group"][j]]
    assert len(pairs) > 200 and len(together) >= 0.99 * len(pairs)
    # No group joins what all pairs do not join.
    assert pd.Series(expected).groupby(found["group"]).nunique().eq(1).all()


def test_grouping_leaves_no_repeated_text_across_splits():
    organs = synthetic.make_extract(90, 5).table["diagnosis"].drop_duplicates().head(60)
    texts = [f"{text} Seen {n % 3} times" for n, text in enumerate([*organs] * 5)]
    cases = _dated(300, diagnosis=texts)
    apart = split_cases(cases, 0, 0.2, 0.1)[1]["near_duplicates"]
    done, facts = split_cases(cases, 0, 0.2, 0.1, group=True)
    together = facts["near_duplicates"]
    assert apart["in_train"]["test"]["same"] > 0 and not apart["kept_together"]
    assert together["in_train"] == {name: {"same": 0, "near": 0} for name in ("validation", "test")}
    assert together["kept_together"]
    assert done["split"].groupby(find_duplicates(done["diagnosis"])["group"]).nunique().eq(1).all()


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


def test_what_still_points_at_the_answer_is_counted():
    cases = pd.DataFrame(
        {
            "diagnosis": [
                "Malignant neoplasm of prostate, for 60 Gy with VMAT",
                "Prostate cancer, 6000 cGy planned",
                "Prostate cancer, prior 160 Gy, 60 pack years, PBS elsewhere",
            ],
            "regimen": "Prostate, 60 Gy in 20 fractions, VMAT",
            "modality": "photon",
            "icd10": "C61",
        }
    )
    assert answers_left(cases) == {"read": 3, "icd": 1, "regimen": 2, "modality": 1}
    assert answers_left(cases, limit=2)["read"] == 2
