"""Inclusion rules: plans told apart, a reason for every row, rules off, rules of one's own."""

import re
import xml.etree.ElementTree as ElementTree

import pandas as pd
import pytest

from radonc_jax.data import flow, rules, synthetic


def table(**columns):
    """One good case, with these columns set otherwise; a list gives a row each."""
    values = {
        "patient_id": "p1",
        "diagnosis": "IDC of the right breast, UOQ",
        "icd10": "C50.411",
        "course_id": "1",
        "prescription": "Right breast, 40.05 Gy in 15 fractions, 3DCRT tangents",
        "modality": "Photon",
    } | columns
    count = max(len(v) if isinstance(v, list) else 1 for v in values.values())
    data = {k: v if isinstance(v, list) else [v] * count for k, v in values.items()}
    return pd.DataFrame(data, index=pd.RangeIndex(2, count + 2, name="row"))


def reasons(selection):
    return dict(zip(selection.excluded["row"], selection.excluded["reason"], strict=True))


@pytest.fixture(scope="module")
def extract():
    made = synthetic.make_extract(300, 2).table
    return made.set_axis(pd.RangeIndex(2, len(made) + 2, name="row"))


@pytest.mark.parametrize(
    ("columns", "kept", "wanted"),
    [
        # A re-plan of the same course goes on with the plan that it adapts ...
        ({"plan_name": ["R_BREAST", "R_BREAST_REPLAN"]}, [2], {3: "replan"}),
        ({"plan_name": ["PROST adapt1", "PROST"]}, [3], {2: "replan"}),
        # ... or, where that one is superseded, may hold no more than what was left to give ...
        (
            {"plan_name": ["PROST", "PROST REPLAN"], "plan_status": ["Retired", "Completed"]},
            [],
            {2: "plan_superseded", 3: "replan_of_superseded"},
        ),
        (
            {"plan_name": ["PROST", "PROST", "PROST REPLAN"],
             "plan_status": ["Retired", "Completed", "Completed"]},
            [3],
            {2: "plan_superseded", 4: "replan"},
        ),
        # ... and stands for itself where nothing else does.
        ({"plan_name": ["R BREAST REPLAN"]}, [2], {}),
        ({"plan_name": ["PELVIS PH1", "PELVIS PH2"]}, [2], {3: "later_phase"}),
        ({"plan_name": ["PELVIS_BST", "PELVIS"]}, [3], {2: "boost_plan"}),
        ({"plan_name": ["PH2 only"]}, [2], {}),
        # An integrated boost is part of the plan ...
        ({"plan_name": ["R BREAST SIB boost"]}, [2], {}),
        ({"plan_intent": ["Boost"], "technique": ["VMAT"],
          "prescription": ["R breast 40 Gy in 15 fx, simultaneous integrated boost"]}, [2], {}),
        ({"plan_name": ["R BREAST", "TEST"]}, [2], {3: "qa_plan"}),
        # ... and someone must look where only a boost or a test is left.
        ({"plan_name": ["R TEST", "R BREAST"], "plan_status": ["Completed", "Cancelled"]}, [],
         {2: "only_qa_plan", 3: "plan_cancelled"}),
        (
            {"plan_intent": ["Curative", "Palliative"], "course_id": ["1", "2"]},
            [2],
            {3: "palliative_plan"},
        ),
        ({"plan_intent": ["Palliative"]}, [2], {}),
        (
            {"plan_intent": ["Palliative"] * 2, "course_id": ["1", "2"]},
            [],
            {2: "several_palliative_plans", 3: "several_palliative_plans"},
        ),
        ({"age": ["61", "61"]}, [2], {3: "repeated_row"}),
        ({"patient_id": ["n/a", "unknown"]}, [], {2: "no_patient_id", 3: "no_patient_id"}),
        ({"modality": ["carbon ions"], "prescription": ["60 Gy/20"]}, [], {2: "modality_outside"}),
        ({"prescription": ["R breast 60 Gy in 30 fx at 1.5 Gy/fx"]}, [],
         {2: "regimen_contradiction"}),
        # between the technique and the place
        ({"technique": ["left tangents"]}, [], {2: "regimen_contradiction"}),
        ({"icd10": ["T12 vertebra, C79.51"]}, [2], {}),
        ({"diagnosis": ["C50.411"]}, [], {2: "diagnosis_is_its_answer"}),
    ],
)  # fmt: skip
def test_plans_are_told_apart(columns, kept, wanted):
    done = rules.select(table(**columns))
    assert list(done.kept.index) == kept
    assert reasons(done) == wanted


@pytest.mark.parametrize(
    ("code", "near"),
    [("C61.0", ["C61"]), ("C50.4", ["C50.411", "C50.412", "C50.419"]), ("Q99.Z", ["Q99."])],
)
def test_a_near_miss_is_named_with_its_nearest_codes(code, near):
    (detail,) = rules.select(table(icd10=code)).excluded["detail"]
    assert detail.startswith(f"{code}; nearest ")
    assert detail.split()[2:][: len(near)] == near or detail.split()[2].startswith(near[0])


def test_statuses_that_nobody_knows_are_counted_and_no_text_of_one_patient_is_told():
    odd = ["Awaiting physics"] * 11 + ["Jane Doe"] * 10 + ["see note of 3 May"] * 11
    known = ["Completed", "TreatmentApproved", "", "Replanned", "PlanningApproved", "Treated"]
    patients = [str(number) for number in range(len(odd) + len(known))]
    done = rules.select(table(patient_id=patients, plan_status=odd + known))
    assert done.statuses == {"(other)": 21, "awaiting physics": 11}
    assert flow.count_flow(done, split(done))["statuses_not_recognised"] == done.statuses


def test_what_someone_may_resolve_is_uncertain():
    found = {
        reasons(rules.select(table(**columns)))[2]
        for columns in (
            {"plan_name": "TEST"},
            {"plan_name": "BST"},
            {"plan_name": ["REPLAN", "PROST"], "plan_status": ["", "Retired"]},
            {"icd10": "C50.411 C61"},
            {"prescription": "R breast", "total_dose_gy": "6000", "fractions": "30"},
        )
    }
    assert len(found) == 5 and found <= set(rules.UNCERTAIN)


@pytest.mark.parametrize(
    ("cell", "code"),
    [("C50.411, c50411", "C50.411"), ("C79.51 (T10, T12)", "C79.51"), ("C61 - prostate", "C61")],
)
def test_one_code_that_is_written_twice_or_beside_a_vertebra_is_one_code(cell, code):
    assert list(rules.select(table(icd10=cell)).kept["icd10"]) == [code]


def test_contradictions_say_what_contradicts():
    (detail,) = rules.select(table(energy="9 MeV")).excluded["detail"]
    assert "photon" in detail and "electron" in detail


def test_what_annotators_settled_goes_before_what_can_be_read():
    two = table(
        plan_name=["BREAST", "BREAST BOOST"],
        icd10="C50.4",
        annotated_decision=["", "primary"],
        annotated_modality=["", "electron"],
        annotated_regimen=["", "Right breast, 10 Gy in 5 fractions"],
        annotated_icd10=["", "C50.412"],
    )
    done = rules.select(two)
    (case,) = done.kept.itertuples()
    assert (case.Index, case.modality, case.icd10) == (3, "electron", "C50.412")
    assert case.regimen == "Right breast, 10 Gy in 5 fractions, electrons"
    assert reasons(done) == {2: "not_the_annotated_plan"}
    out = rules.select(table(annotated_decision="exclude", annotated_reason="annotated_lost"))
    assert reasons(out) == {2: "annotated_lost"}
    # Two diagnoses stay two diagnoses.
    firm = rules.select(two.assign(diagnosis=["GBM", "IDC"]))
    assert set(reasons(firm).values()) == {"several_diagnoses"}


def test_counts_of_every_step_add_up(extract):
    done = rules.select(extract)
    assert [step.rule for step in done.steps] == [rule.__name__ for rule in rules.RULES]
    assert sum(sum(step.rows.values()) for step in done.steps) == len(done.excluded)
    assert sum(sum(step.cases.values()) for step in done.steps) == len(done.cases)
    assert done.assessed == extract["patient_id"].nunique() == len(done.kept) + len(done.cases)
    assert sorted([*done.kept.index, *done.excluded["row"]]) == list(extract.index)
    patients = extract.loc[done.excluded["row"], "patient_id"]
    assert list(done.excluded["patient_id"]) == list(patients)
    fallen = set(extract["patient_id"]) - set(done.kept["patient_id"])
    last = done.excluded[done.excluded["patient_id"].isin(fallen)]
    assert last["patient_id"].nunique() == len(done.cases)
    assert set(done.cases) <= set(last["reason"])


@pytest.mark.parametrize(
    "rule", [rule.__name__ for rule in rules.RULES if rule not in rules.INDISPENSABLE]
)
def test_a_rule_that_is_turned_off_excludes_nothing(extract, rule):
    every, fewer = rules.select(extract), rules.select(extract, [rule])
    (step,) = [step for step in every.steps if step.rule == rule]
    (off,) = [step for step in fewer.steps if step.rule == rule]
    assert off.cases is None and off.rows is None
    assert fewer.assessed == fewer.kept["patient_id"].nunique() + len(fewer.cases)
    assert len(extract) == len(fewer.kept) + len(fewer.excluded)
    # Reasons that two rules share ("code_not_valid") may stay.
    only_here = set(step.rows) - {r for s in every.steps if s is not step for r in s.rows}
    assert not only_here & set(fewer.excluded["reason"])


def test_indispensable_and_unknown_rules_cannot_be_turned_off():
    with pytest.raises(ValueError, match="modality_identifiable: cannot be turned off"):
        rules.check_skipped(["modality_identifiable"])
    with pytest.raises(ValueError, match="no_such: is no rule; choose among row_not_repeated"):
        rules.check_skipped(["no_such"])


# ---------------------------------------------------------------------------------------------
# Rules of one's own
# ---------------------------------------------------------------------------------------------

OWN = """
from pandas import Series

def adults_only(rows):
    return rows["age"].astype(int) < 18

def one_site_at_a_time(rows):
    return Series("", index=rows.index).mask(rows["site"] == "breast_early", "breast: not ours")

def _helper(rows):
    raise RuntimeError

def another(helper, of, mine):
    raise RuntimeError
"""


def test_rules_of_a_file_run_last_and_in_order(tmp_path):
    path = tmp_path / "my_rules.py"
    path.write_text(OWN)
    own = rules.load_rules(path)
    assert [rule.__name__ for rule in own] == ["adults_only", "one_site_at_a_time"]
    rows = table(
        patient_id=["a", "b", "c"], age=["12", "40", "41"], site=["x", "breast_early", "x"]
    )
    done = rules.select(rows, own=own)
    assert list(done.kept.index) == [4]
    assert reasons(done) == {2: "adults_only", 3: "breast"}
    assert list(done.excluded["detail"]) == ["", "not ours"]
    assert [step.rule for step in done.steps[-2:]] == ["adults_only", "one_site_at_a_time"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(rows):\n    return 1 +\n", "line 2: SyntaxError"),
        ("import nothing_of_that_name\n", "line 1: ModuleNotFoundError"),
        ("x = 3\n", "no rule in it"),
        ("def single_diagnosis(rows):\n    return rows\n", "is a built-in rule"),
        ("def f(rows):\n    raise KeyError(rows['diagnosis'][2])\n", "line 2: rule f failed"),
        ("def f(rows):\n    return True\n", "must return a Series"),
        ("def f(rows):\n    return rows['age']\n", "rule f failed .KeyError"),
        ("def f(rows):\n    return rows['icd10'].head(0)\n", "must return a Series"),
        ("def f(rows):\n    return rows['icd10'].map({})\n", "must return a Series"),
    ],
)
def test_a_broken_rule_is_told_with_its_line(tmp_path, source, message):
    path = tmp_path / "mine.py"
    path.write_text(source)
    with pytest.raises(ValueError, match=message) as caught:
        rules.select(table(), own=rules.load_rules(path))
    assert "IDC" not in str(caught.value) and "mine.py" in str(caught.value)


def test_a_rule_cannot_change_the_rows(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def f(rows):\n    rows['icd10'] = 'C61'\n    return rows['icd10'] == ''\n")
    done = rules.select(table(), own=rules.load_rules(path))
    assert list(done.kept["icd10"]) == ["C50.411"]


# ---------------------------------------------------------------------------------------------
# The diagram
# ---------------------------------------------------------------------------------------------


def split(selection):
    """Of the kept cases: not by chance, and of each at least one."""
    names = ["train", "validation", "test"] * len(selection.kept)
    return selection.kept.assign(split=names[: len(selection.kept)])


def drawn(svg):
    root = ElementTree.fromstring(svg)
    return [t.text for t in root.iter("{http://www.w3.org/2000/svg}text") if t.text]


def test_the_diagram_draws_the_counts_of_the_log(extract):
    done = rules.select(extract)
    counts = flow.count_flow(done, split(done))
    lines = drawn(flow.flow_svg(counts))
    text = "\n".join(lines)
    assert f"Assessed: patients in the extract (n = {done.assessed:,})" in text
    for reason, count in done.cases.value_counts().items():
        assert f"{reason.replace('_', ' ')} (n = {count:,})" in lines
    numbers = [int(n) for line in lines for n in re.findall(r"^Train.*n = (\d+)", line)]
    assert numbers == [counts["splits"]["train"]["patients"]]
    assert flow.flow_svg(counts) == flow.flow_svg(counts)


def test_unknown_counts_stay_unknown(extract):
    done = rules.select(extract, ["single_diagnosis"])
    counts = flow.count_flow(done, split(done))
    assert counts["source_patients"] is counts["annotated"] is counts["outputs_rated"] is None
    text = "\n".join(drawn(flow.flow_svg(counts)))
    assert "In the source system (n unknown)" in text
    assert "single diagnosis: rule turned off (n unknown)" in text
    known = flow.count_flow(done, split(done), source_patients=1000)
    assert known["not_in_the_extract"] == 1000 - done.assessed
    with pytest.raises(ValueError, match="--source_patients=3 is less than"):
        flow.count_flow(done, split(done), source_patients=3)


def test_a_flow_that_does_not_add_up_is_never_drawn(extract):
    done = rules.select(extract)
    with pytest.raises(AssertionError, match="add up"):
        flow.count_flow(done, split(done).iloc[1:])
