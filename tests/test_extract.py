"""What hospitals export is read as it stands, or refused with the place that is wrong."""

import json

import datasets
import pandas as pd
import pytest

from radonc_jax.data import synthetic
from radonc_jax.data.extract import check_unit, guess_header, parse_columns, read_extract
from radonc_jax.data.rows import find_layout

TABLE = pd.DataFrame(
    {
        "patient_id": ["1", "2", "3"],
        "diagnosis": ['Müller-Gang; "T2", N0\nsecond line', "CA mamma – rechts, 5 µm", ""],
        "icd10": ["C57.7", "C50.911", "C61"],
        "prescription": ["45 Gy in 25 fractions, VMAT", "40 Gy/15", "60|30"],
    }
)


def rows_of(path, **layout):
    table = read_extract(path, layout=find_layout(path, **layout))
    assert list(table.index) == [2, 3, 4]
    return table.reset_index(drop=True)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_encoding_and_delimiter_are_found(tmp_path, encoding, delimiter):
    path = tmp_path / "e.csv"
    TABLE.to_csv(path, index=False, sep=delimiter, encoding=encoding, lineterminator="\r\n")
    layout = find_layout(path)
    assert layout.delimiter == delimiter
    assert layout.guessed == (encoding == "cp1252") == bool(layout.notes)
    pd.testing.assert_frame_equal(rows_of(path), TABLE, check_dtype=False)


def test_utf_16_without_a_mark_is_found(tmp_path):
    for encoding in ("utf-16-le", "utf-16-be"):
        (tmp_path / "e.tsv").write_bytes(TABLE.to_csv(index=False, sep="\t").encode(encoding))
        pd.testing.assert_frame_equal(rows_of(tmp_path / "e.tsv"), TABLE, check_dtype=False)


def test_what_is_given_goes_before_what_is_found(tmp_path):
    path = tmp_path / "e.csv"
    path.write_bytes(TABLE.replace("–", "-", regex=True).to_csv(index=False).encode("mac-roman"))
    read = rows_of(path, encoding="mac-roman", delimiter="comma")
    assert read["diagnosis"][0].startswith("Müller") and "µm" in read["diagnosis"][1]
    assert "Müller" not in rows_of(path, encoding="latin-1")["diagnosis"][0]


@pytest.mark.parametrize(
    ("layout", "part"),
    [
        ({"encoding": "klingon"}, "--encoding='klingon' is not known"),
        ({"encoding": "base64"}, "is not known"),
        ({"encoding": "utf-16"}, "not utf-16 after row 0"),
        ({"encoding": "ascii"}, "not ascii after row 0"),
        ({"delimiter": ";;"}, "--delimiter must be comma"),
        ({"delimiter": '"'}, "--delimiter must be comma"),
        ({"delimiter": "pipe"}, "row 1 has 1 cells and no known column name"),
        ({"sheet": "1"}, "--sheet does not go with .csv"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, layout, part):
    TABLE.to_csv(tmp_path / "e.csv", index=False)
    with pytest.raises(ValueError) as caught:
        read_extract(tmp_path / "e.csv", layout=find_layout(tmp_path / "e.csv", **layout))
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"patient_id,diagnosis\n1,caf\xc3\xa9\n2,caf\xe9\n", "line 3, byte 6 is not UTF-8"),
        (b"patient_id,diagnosis\n1,\x81\n", "line 2, byte 3 is not UTF-8"),
        (b"patient_id,diagnosis\n1,a\0b\n", "line 2 holds a NUL byte"),
        (b'patient_id,diagnosis,icd10,prescription\n1,"a"b,c,d\n', "row 2 (line 2)"),
    ],
)
def test_damaged_text_is_refused_and_not_guessed(tmp_path, content, part):
    (tmp_path / "e.csv").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_extract(tmp_path / "e.csv")
    assert part in str(caught.value)


def test_a_file_that_may_be_cut_or_damaged_is_noted(tmp_path):
    text = TABLE.to_csv(index=False)
    (tmp_path / "cut.csv").write_text(text[:-1])
    assert "cut short" in find_layout(tmp_path / "cut.csv").notes[0]
    (tmp_path / "lost.csv").write_text(text.replace("ü", "\N{REPLACEMENT CHARACTER}"))
    assert "1 characters were lost" in find_layout(tmp_path / "lost.csv").notes[0]


def test_a_column_without_a_name_loses_nothing(tmp_path):
    (tmp_path / "e.csv").write_text(
        "patient_id,diagnosis,icd10,prescription,\n1,GBM,C71.1,60/30,kept\n"
    )
    assert read_extract(tmp_path / "e.csv")["(column 5 has no name)"].tolist() == ["kept"]


def test_a_workbook_with_several_sheets_needs_a_choice(tmp_path):
    path = tmp_path / "e.xlsx"
    with pd.ExcelWriter(path) as book:
        pd.DataFrame({"a": ["not", "these"]}).to_excel(book, sheet_name="About", index=False)
        TABLE.to_excel(book, sheet_name="Export", index=False)
        pd.DataFrame().to_excel(book, sheet_name="Empty", index=False)
    with pytest.raises(ValueError, match=r"several sheets hold cells \(About, Export\)"):
        read_extract(path)
    pd.testing.assert_frame_equal(rows_of(path, sheet="Export"), TABLE, check_dtype=False)
    with pytest.raises(ValueError, match="no sheet 'Eport'; there are About, Export"):
        find_layout(path, sheet="Eport")


def test_a_datasets_folder_reads_as_its_table(tmp_path):
    labels = datasets.ClassLabel(names=["electron", "photon"])
    table = datasets.Dataset.from_pandas(TABLE.assign(modality=[1, 0, 1]), preserve_index=False)
    table = table.cast_column("modality", labels)
    table.save_to_disk(tmp_path / "one")
    wanted = TABLE.assign(modality=["photon", "electron", "photon"])
    pd.testing.assert_frame_equal(rows_of(tmp_path / "one"), wanted, check_dtype=False)
    datasets.DatasetDict({"first": table, "second": table}).save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match=r"several tables \(first, second\)"):
        read_extract(tmp_path / "two")
    with pytest.raises(ValueError, match="none of datasets.save_to_disk"):
        read_extract(tmp_path)
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="not a readable dataset"):
        read_extract(tmp_path / "one")


@pytest.mark.parametrize(
    "line",
    ['{"patient_id": "1", "patient_id": "2"}', '{"diagnosis": "\\ud83d"}', "[" * 100_000],
)
def test_json_that_would_lose_something_is_refused(tmp_path, line):
    (tmp_path / "e.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match="line 1"):
        read_extract(tmp_path / "e.jsonl")


# ---------------------------------------------------------------------------------------------
# Columns and units
# ---------------------------------------------------------------------------------------------


def test_a_missing_column_comes_with_a_guess(tmp_path):
    table = TABLE.set_axis(["MRN", "Dx Description", "ICD-10 Code", "Rx"], axis=1)
    table.to_csv(tmp_path / "e.csv", index=False)
    with pytest.raises(ValueError) as caught:
        read_extract(tmp_path / "e.csv")
    offer = "patient_id=MRN,diagnosis=Dx Description,icd10=ICD-10 Code,prescription=Rx"
    assert f"Perhaps --columns={offer}." in str(caught.value)
    read = read_extract(tmp_path / "e.csv", parse_columns(offer.split(",")))
    assert list(read.columns) == list(TABLE.columns)
    # A header that --columns names is taken to the letter, and one in another case is offered.
    with pytest.raises(
        ValueError, match=r"'DX description' .* for diagnosis \(did you mean 'Dx Desc"
    ):
        read_extract(tmp_path / "e.csv", parse_columns(["diagnosis=DX description"]))
    with pytest.raises(ValueError, match=r"'Zebra' in row 1, .* for diagnosis\. Columns there"):
        read_extract(tmp_path / "e.csv", parse_columns(["diagnosis=Zebra"]))


def test_a_guess_is_made_for_slips_and_for_nothing_else():
    assert guess_header("diagnosis", ["Diagnsis", "Dose"]) == "Diagnsis"
    assert guess_header("fractions", ["Comment", "Physician"]) is None


def test_columns_may_be_mapped_by_a_file(tmp_path):
    path = tmp_path / "columns.json"
    path.write_text(json.dumps({"diagnosis": "Dx, free text", "icd10": "Code"}))
    assert parse_columns([str(path), "patient_id=MRN"]) == {
        "diagnosis": "Dx, free text",
        "icd10": "Code",
        "patient_id": "MRN",
    }
    for content, part in (
        ('{"dx": "Code"}', "the columns are"),
        ('{"icd10": 3}', "not a JSON object"),
        ("[1]", "not a JSON object"),
        ("{", "not a JSON object"),
        ('{"icd10": "A", "icd10": "B"}', "twice"),
        ('{"icd10": "A", "diagnosis": "A"}', "to two columns"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=part):
            parse_columns([str(path)])
    with pytest.raises(FileNotFoundError, match=r"none\.json: no such file"):
        parse_columns(["none.json"])


def test_a_file_without_a_header_is_not_quoted(tmp_path):
    (tmp_path / "e.csv").write_text("4711,Zebra stripes,C61,60 Gy\n4712,Zebra,C61,60 Gy\n")
    with pytest.raises(ValueError, match="row 1 has 4 cells .* looks like a record") as caught:
        read_extract(tmp_path / "e.csv")
    assert "Zebra" not in str(caught.value)


@pytest.fixture(scope="module")
def plans():
    table = synthetic.make_extract(60, 1).table
    return table.set_axis(pd.RangeIndex(2, len(table) + 2, name="row"))


def test_rows_are_what_the_flag_says_they_are(plans):
    check_unit("e.csv", plans, "plan")
    check_unit("e.csv", plans.drop_duplicates("patient_id"), "patient")
    courses = plans.drop_duplicates(["patient_id", "course_id"])
    check_unit("e.csv", courses, "course")
    second = plans.index[plans["patient_id"].duplicated()][0]
    with pytest.raises(ValueError, match=rf"rows {second - 1} and {second}, column patient_id"):
        check_unit("e.csv", plans, "patient")
    with pytest.raises(ValueError, match="column course_id.*Choose --rows=plan"):
        check_unit("e.csv", plans, "course")
    with pytest.raises(ValueError, match="Choose --rows=course"):
        check_unit("e.csv", courses, "patient")


def test_beams_and_fractions_are_no_plans(plans):
    fractions = pd.concat([plans.assign(beam=str(n)) for n in (1, 2)], ignore_index=True)
    with pytest.raises(ValueError, match="field, beam or fraction"):
        check_unit("e.csv", fractions.rename(index=lambda i: i + 2), "plan")
    again = pd.concat([plans, plans], ignore_index=True)  # whole rows twice: the rules tell them
    check_unit("e.csv", again.rename(index=lambda i: i + 2), "plan")
    diagnoses = pd.concat([plans.assign(diagnosis=n) for n in "ab"], ignore_index=True)
    check_unit("e.csv", diagnoses.rename(index=lambda i: i + 2), "plan")
