"""Uncertain rows go out on a sheet and come back settled, or with a place to correct."""

import io

import pandas as pd
import pytest

from radonc_jax.data import annotation, rules, synthetic
from radonc_jax.data.annotation import ENTRIES, propose, settle, to_bytes

GOOD = {
    "diagnosis": "IDC of the right breast, UOQ",
    "icd10": "C50.411",
    "prescription": "Right breast, 40.05 Gy in 15 fractions, 3DCRT tangents",
    "modality": "photon",
}
REGIMEN = GOOD["prescription"]


def extract_of(*changes):
    """One row per change of a good row; patients p0, p1 ... unless given."""
    rows = [{"patient_id": f"p{n}"} | GOOD | change for n, change in enumerate(changes)]
    table = pd.DataFrame(rows).fillna("")
    return table.set_index(pd.RangeIndex(2, len(table) + 2, name="row"))


@pytest.fixture
def extract():
    return extract_of(
        {},  # row 2 is kept by the rules
        {"icd10": "C50.4"},
        {"technique": "PBS"},
        {"patient_id": "q", "plan_name": "R BREAST A"},
        {"patient_id": "q", "plan_name": "R BREAST B", "diagnosis": "IDC of the right breast, UOQ"},
        {"fractions": "16"},
        {"icd10": "n/a"},
    )


@pytest.fixture
def sheet(extract):
    return propose(extract, rules.select(extract)).set_index("row", drop=False)


def fill(sheet, path, **entries):
    """A sheet with entries, {"r3": {"keep": "yes"}}, as an annotator saves it."""
    sheet = sheet.copy()
    for row, values in entries.items():
        for name, value in values.items():
            sheet.loc[row.removeprefix("r"), name] = value
    path.write_bytes(to_bytes(sheet, path.suffix[1:]))
    return path


def decided(extract, settled):
    joined = extract.join(settled.columns).fillna("")
    return rules.select(joined)


def test_the_sheet_holds_the_uncertain_rows_with_a_proposal_for_each_field(sheet):
    assert list(sheet.columns) == list(annotation.COLUMNS)
    assert dict(sheet["reason"]) == {
        "3": "code_not_valid",
        "4": "modality_contradiction",
        "5": "several_primary_plans",
        "6": "several_primary_plans",
        "7": "regimen_contradiction",
        "8": "no_code",
    }
    assert (sheet[list(ENTRIES)] == "").all(axis=None)
    # What the record contradicts itself about is not proposed: a quick "yes" must not keep it.
    assert (sheet.loc[["4", "7"], "proposed_regimen"] == "").all()
    assert sheet.loc["4", "proposed_modality"] == ""
    assert (sheet["proposed_regimen"].drop(["4", "7"]) == REGIMEN).all()
    assert (sheet["proposed_modality"].drop("4") == "photon").all()
    assert sheet.loc["3", "proposed_icd10"] == "C50.411"
    assert sheet.loc["3", "other_codes"].split()[:2] == ["C50.412", "C50.419"]
    assert sheet.loc["8", "proposed_icd10"] == "" and sheet.loc["5", "other_codes"] == ""
    assert sheet.loc["5", "case"] == sheet.loc["6", "case"] != sheet.loc["3", "case"]
    assert sheet["record"].is_unique


def test_the_sheet_tells_nothing_of_patient_ids(extract, sheet):
    renamed = extract.assign(patient_id="MRN-" + extract["patient_id"])
    other = propose(renamed, rules.select(renamed)).set_index("row", drop=False)
    pd.testing.assert_frame_equal(other, sheet)


@pytest.mark.parametrize("kind", ["csv", "xlsx"])
def test_settled_rows_are_kept_or_leave_with_the_annotators_reason(extract, sheet, tmp_path, kind):
    file = fill(
        sheet,
        tmp_path / f"a.{kind}",
        r3={"keep": "yes", "icd10": "c50412"},
        r4={"keep": "No", "exclude_reason": "Not treated here"},
        r5={"keep": "no"},
        r6={"keep": "YES"},
        r7={"keep": "yes", "regimen": "R breast 4256 cGy/16 fx"},
    )
    before, settled = rules.select(extract), settle(extract, [file])
    after = decided(extract, settled)
    assert list(before.kept.index) == [2] and list(after.kept.index) == [2, 3, 6, 7]
    assert after.kept.loc[3, "icd10"] == "C50.412"
    assert after.kept.loc[7, "regimen"].startswith("Right breast, 42.56 Gy in 16 fractions")
    assert (
        dict(zip(after.excluded["row"], after.excluded["reason"], strict=True))
        == {
            4: "annotated_not_treated_here",
            5: "not_the_annotated_plan",
            8: "no_code",
        }
        or after.excluded.set_index("row").loc[5, "reason"] == "annotated_no_reason_given"
    )
    assert after.assessed == before.assessed == len(after.kept) + len(after.cases)
    facts = settled.facts
    assert facts["settled"] == {
        "primary": 3,
        "exclude": {"annotated_no_reason_given": 1, "annotated_not_treated_here": 1},
    }
    assert facts["files"][0]["entries"] == 5 and len(facts["files"][0]["sha256"]) == 64
    assert settled.disagreements.empty and facts["annotated_twice"] == 0


def test_two_annotators_agree_or_an_adjudicator_settles(extract, sheet, tmp_path):
    first = fill(
        sheet,
        tmp_path / "a.csv",
        r3={"keep": "yes"},
        r4={"keep": "yes", "regimen": REGIMEN, "modality": "photon"},
        r5={"keep": "yes"},
        r6={"keep": "no"},
        r7={"keep": "yes", "regimen": "Right breast, 42.5 Gy in 16 fractions"},
    )
    second = fill(
        sheet,
        tmp_path / "b.xlsx",
        r3={"keep": "yes", "icd10": "C50.411"},  # what was proposed to the first
        r4={"keep": "no", "exclude_reason": "unclear"},
        r5={"keep": "no"},
        r6={"keep": "no"},
        r7={"keep": "yes", "regimen": "Right breast, 40 Gy in 16 fractions"},
    )
    settled = settle(extract, [first, second])
    assert list(settled.columns.index) == [3, 6]
    assert list(settled.disagreements["row"]) == ["4", "5", "7"]
    agreement = settled.facts["agreement"]
    # Decisions yyyny and ynnny: 3 of 5 equal, expected by chance 4/5 x 2/5 + 1/5 x 3/5 = 0.44.
    assert agreement["decision"] == {
        "n": 5,
        "equal": pytest.approx(0.6),
        "kappa": pytest.approx((0.6 - 0.44) / 0.56),
    }
    assert agreement["icd10"] == {"n": 2, "equal": 1.0, "kappa": None}
    assert agreement["regimen"]["equal"] == 0.5 and agreement["exclude_reason"]["n"] == 1

    sheet = settled.disagreements.set_index("row", drop=False)
    assert list(sheet.loc["7", ["first_regimen", "second_regimen"]]) == [
        "Right breast, 42.5 Gy in 16 fractions, photons",
        "Right breast, 40 Gy in 16 fractions, photons",
    ]
    assert (
        sheet.loc["7", "proposed_regimen"] == "" and sheet.loc["7", "proposed_icd10"] == "C50.411"
    )
    final = fill(
        sheet,
        tmp_path / "c.csv",
        r5={"keep": "yes", "modality": "photon", "regimen": REGIMEN, "icd10": "C50.411"},
        r7={"keep": "yes", "regimen": "Right breast, 42.5 Gy in 16 fractions"},
    )
    done = settle(extract, [first, second], final)
    assert list(done.columns.index) == [3, 5, 6, 7] and list(done.disagreements["row"]) == ["4"]
    assert done.facts["open_disagreements"] == 1 and done.facts["adjudication"]["entries"] == 2
    kept = decided(extract, done).kept
    assert list(kept.index) == [2, 3, 5, 7]
    assert kept.loc[7, "regimen"].startswith("Right breast, 42.5 Gy in 16 fractions")
    # Without an own entry the adjudicator cannot accept what the two did not share.
    fill(sheet, tmp_path / "c.csv", r7={"keep": "yes"})
    with pytest.raises(ValueError, match=r"c\.csv: row 4, column regimen: empty"):
        settle(extract, [first, second], tmp_path / "c.csv")


@pytest.mark.parametrize(
    "choices",
    [
        ({"r5": {"keep": "yes"}}, {"r6": {"keep": "yes"}}),
        ({"r5": {"keep": "yes"}}, {"r5": {"keep": "no"}, "r6": {"keep": "yes"}}),
        ({"r5": {"keep": "yes"}, "r6": {"keep": "no"}}, {"r6": {"keep": "yes"}}),
    ],
)
def test_annotators_who_keep_another_row_of_a_patient_settle_none_of_them(
    extract, sheet, tmp_path, choices
):
    files = [fill(sheet, tmp_path / "a.csv", **choices[0], r3={"keep": "yes"})]
    files += [fill(sheet, tmp_path / "b.csv", **choices[1])]
    settled = settle(extract, files)
    assert list(settled.columns.index) == [3]
    assert list(settled.disagreements["row"]) == ["5", "6"]
    assert settled.facts["disagreements"] == settled.facts["open_disagreements"] == 2
    open_ = settled.disagreements.set_index("row", drop=False)
    for title, entries in zip(("first", "second"), choices, strict=True):
        for row in ("5", "6"):
            assert open_.loc[row, f"{title}_keep"] == entries.get(f"r{row}", {}).get("keep", "")
    assert list(open_["given_plan_name"]) == ["R BREAST A", "R BREAST B"]
    assert (open_["case"] == sheet.loc["5", "case"]).all()

    answers = {"keep": "yes", "modality": "photon", "regimen": REGIMEN, "icd10": "C50.411"}
    final = fill(open_, tmp_path / "c.csv", r6=answers, r5={"keep": "no"})
    done = settle(extract, files, final)
    assert list(done.columns.index) == [3, 5, 6] and done.disagreements.empty
    assert list(decided(extract, done).kept.index) == [2, 3, 6]
    final = fill(open_, tmp_path / "c.csv", r6=answers, r5=answers)
    with pytest.raises(ValueError, match=r"c\.csv: rows 5 and 6 .* are of one patient"):
        settle(extract, files, final)
    # Where a patient can have several, rows that one alone filled in are settled.
    several = settle(extract, files, one_per_patient=False)
    assert len(several.disagreements) == len(set(choices[0]) & set(choices[1]))


SECRET = "angiosarcoma of the scalp"


@pytest.mark.parametrize(
    ("entries", "place"),
    [
        ({"r3": {"keep": SECRET}}, "row 2, column keep: yes or no"),
        ({"r4": {"icd10": "C61"}}, "row 3, column keep: yes or no"),
        (
            {"r4": {"keep": "yes", "modality": SECRET, "regimen": REGIMEN}},
            "row 3, column modality: not valid",
        ),
        ({"r3": {"keep": "yes", "icd10": "C50.4"}}, r"row 2, column icd10: not valid \(code_not"),
        ({"r3": {"keep": "yes", "regimen": SECRET}}, r"row 2, column regimen: not valid \(no_dose"),
        ({"r8": {"keep": "yes"}}, "row 7, column icd10: empty, and nothing was proposed"),
        ({"r3": {"keep": "yes", "modality": "electron", "regimen": "R breast 50 Gy/25 fx VMAT"}},
         "row 2, column regimen: names another modality"),
        ({"r3": {"keep": "no", "exclude_reason": SECRET + " of 2001 and 2004, unclear"}},
         "row 2, column exclude_reason: write a word or two"),
        ({"r3": {"keep": "yes", "exclude_reason": "late"}}, "column exclude_reason: given for a"),
        ({"r3": {"record": "0" * 12}}, "row 2, column record: the extract has another record"),
        ({"r3": {"row": "900"}}, "row 2, column row: no such row"),
        ({"r3": {"row": "4"}}, "row 3, column row: stands twice"),
        ({"r5": {"keep": "yes"}, "r6": {"keep": "yes"}}, "rows 5 and 6 .* are of one patient"),
    ],
)  # fmt: skip
def test_a_wrong_entry_is_named_by_its_place(extract, sheet, tmp_path, entries, place):
    file = fill(sheet, tmp_path / "a.csv", **entries)
    with pytest.raises(ValueError, match=place) as caught:
        settle(extract, [file])
    assert "a.csv" in str(caught.value) and SECRET not in str(caught.value)


def test_wrong_files_are_named(extract, sheet, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.csv: no such file"):
        settle(extract, [tmp_path / "no.csv"])
    file = fill(sheet, tmp_path / "a.csv", r3={"keep": "yes"})
    with pytest.raises(ValueError, match="names 3 files"):
        settle(extract, [file] * 3)
    with pytest.raises(ValueError, match="are the same"):
        settle(extract, [file, file])
    (tmp_path / "b.csv").write_text("row,keep\n3,yes\n")
    with pytest.raises(ValueError, match=r"b\.csv: no column record, modality.*there: row, keep"):
        settle(extract, [tmp_path / "b.csv"])
    with pytest.raises(ValueError, match=r"a\.csv: row 2 settles row 3 .* do not disagree"):
        settle(extract, [file], file)
    changed = extract.assign(diagnosis="IDC")
    with pytest.raises(ValueError, match="changed since the sheet was written"):
        settle(changed, [file])


def test_a_sheet_saved_by_a_spreadsheet_program_comes_back(extract, sheet, tmp_path):
    extract = extract.assign(diagnosis=extract["diagnosis"] + "; \u201cMüller\u201d; =SUM(A1)\n2nd")
    sheet = propose(extract, rules.select(extract)).set_index("row", drop=False)
    sheet.loc["3", ["keep", "icd10"]] = ["ja", "C50.412"]
    (tmp_path / "a.csv").write_bytes(sheet.to_csv(index=False, sep=";").encode("cp1252"))
    (tmp_path / "b.xlsx").write_bytes(to_bytes(sheet, "xlsx"))
    for name in ("a.csv", "b.xlsx"):
        assert list(settle(extract, [tmp_path / name]).columns["annotated_icd10"]) == ["C50.412"]
    book = pd.read_excel(io.BytesIO(to_bytes(sheet, "xlsx")), dtype=str, keep_default_na=False)
    assert list(book["given_diagnosis"]) == list(sheet["given_diagnosis"])
    long = to_bytes(sheet.assign(given_diagnosis="word " * 10_000), "xlsx")
    cell = pd.read_excel(io.BytesIO(long), dtype=str)["given_diagnosis"][0]
    assert len(cell) == 32_767 and cell.endswith("[the rest does not fit into a cell]")
    formula = sheet.assign(given_plan_name="=1+1", given_plan_id="a\x02b")
    book = pd.read_excel(io.BytesIO(to_bytes(formula, "xlsx")), dtype=str)
    assert set(book["given_plan_name"]) == {"=1+1"} and set(book["given_plan_id"]) == {"a b"}


def test_no_cell_of_a_csv_sheet_is_a_formula_or_a_number_to_spreadsheet_programs(
    extract, sheet, tmp_path
):
    assert sheet["record"].str.fullmatch(r"r[0-9a-f]{12}").all()
    names = ["=1+1", "+1", "@SUM(A1)", "-", "'=1+1", "'69 plan"]
    sheet["given_plan_name"] = names
    sheet["keep"] = "no"
    (tmp_path / "a.csv").write_bytes(to_bytes(sheet, "csv"))
    written = pd.read_csv(tmp_path / "a.csv", dtype=str, keep_default_na=False)
    assert list(written["given_plan_name"]) == [
        "'=1+1", "'+1", "'@SUM(A1)", "'-", "''=1+1", "'69 plan"
    ]  # fmt: skip
    assert not written.map(lambda text: text[:1] in tuple("=+-@")).any(axis=None)
    read = annotation._read_sheet(tmp_path / "a.csv", extract)
    assert list(read["given_plan_name"]) == names


def test_proposals_are_what_the_record_was_made_from(tmp_path):
    made = synthetic.make_extract(1500, 3)
    extract = made.table.set_index(pd.RangeIndex(2, len(made.table) + 2, name="row"))
    selection = rules.select(extract)
    sheet = propose(extract, selection)
    uncertain = selection.excluded["reason"].isin(rules.UNCERTAIN)
    kept = set(selection.kept["patient_id"])
    assert set(sheet["row"].astype(int)) == {
        row
        for row, patient in selection.excluded.loc[uncertain, ["row", "patient_id"]].values
        if patient not in kept
    }
    assert len(sheet) > 100
    # Whatever is proposed whole is accepted whole, and the counts still add up.
    complete = (sheet[[f"proposed_{name}" for name in annotation.FIELDS]] != "").all(axis=1)
    chosen = complete & ~sheet["case"].where(complete).duplicated()
    sheet.loc[chosen, "keep"] = "yes"
    (tmp_path / "a.csv").write_bytes(to_bytes(sheet, "csv"))
    settled = settle(extract, [tmp_path / "a.csv"])
    after = decided(extract, settled)
    assert len(settled.columns) == chosen.sum() > 60
    firm = set(selection.cases) - set(rules.UNCERTAIN)
    added = set(sheet.loc[chosen, "row"].astype(int))
    missing = added - set(after.kept.index)
    reasons = after.excluded.set_index("row").loc[sorted(missing), "reason"]
    assert set(reasons) <= firm and len(missing) < 0.2 * len(added)
    assert after.assessed == len(after.kept) + len(after.cases) == selection.assessed


def test_a_filled_in_sheet_is_not_overwritten(sheet, tmp_path):
    written = to_bytes(sheet, "csv")
    (tmp_path / "annotation.csv").write_bytes(written)
    hashes = {"annotation.csv": annotation._sha256(tmp_path / "annotation.csv")}
    annotation.check_sheets_are_safe(tmp_path, hashes)
    fill(sheet, tmp_path / "annotation.csv", r3={"keep": "yes"})
    with pytest.raises(FileExistsError, match=r"annotation\.csv has been changed"):
        annotation.check_sheets_are_safe(tmp_path, hashes)
