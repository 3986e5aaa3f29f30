"""Whatever is done to an export, it ends in a cohort whose rows add up or in a one-line error."""

import csv
import io
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from preparing import run_prepare

from radonc_jax.data import cohort, synthetic

CANARY = "Xanthoquark"  # stands in every diagnosis and must not stand in any error


@pytest.fixture(scope="module")
def export():
    """A real-looking export of 90 patients as bytes: quotes, line breaks, letters beyond ASCII."""
    table = synthetic.make_extract(90, 6).table
    table["diagnosis"] = CANARY + ' "é–ü", ' + table["diagnosis"].where(table["diagnosis"] != "")
    table["diagnosis"] = table["diagnosis"].fillna("")
    return table.to_csv(index=False).encode("utf-8")


def check_cohort(folder, content, manifest):
    """Nothing was lost: against the records of the file as Python's csv alone reads them."""
    text = content.decode(manifest["source"]["encoding"])
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=manifest["source"]["delimiter"])
    records = [record for record in reader if record][1:]
    excluded = pd.read_csv(folder / "excluded.csv")
    tables = cohort.load_cohort(folder)
    assert manifest["rows"]["read"] == len(records) == manifest["rows"]["kept"] + len(excluded)
    assert manifest["assessed"] == manifest["kept"] + sum(manifest["excluded"].values())
    assert manifest["kept"] == sum(table["patient_id"].nunique() for table in tables.values())
    assert sum(manifest["rows"]["excluded"].values()) == len(excluded)
    kept = {int(case[4:]) for table in tables.values() for case in table["case_id"]}
    assert len(kept | set(excluded["row"])) == len(records)


def check_error(message):
    assert len(message.splitlines()) == 1
    assert CANARY not in message
    assert re.search(r"row|line|column|byte|case|patient|empty|UTF-8|record", message)


def try_content(tmp_path_factory, content, suffix=".csv", options=()):
    folder = tmp_path_factory.mktemp("fuzz")
    source = folder / f"export{suffix}"
    source.write_bytes(content)
    manifest, message = run_prepare(folder, source, *options)
    if message is not None:
        check_error(message)
        assert [path.name for path in folder.iterdir()] == [source.name]  # nothing half-made
    else:
        check_cohort(folder / "cohort", content, manifest)
    return manifest, message


def records(content):
    return list(csv.reader(io.StringIO(content.decode(), newline="")))


def written(rows, **options):
    text = io.StringIO(newline="")
    csv.writer(text, **options).writerows(rows)
    return text.getvalue().encode()


# ---------------------------------------------------------------------------------------------
# Corruptions: (bytes, random generator) -> bytes
# ---------------------------------------------------------------------------------------------


def truncated(content, rng):
    return content[: rng.integers(0, len(content))]


def other_encoding(content, rng):
    encoding = rng.choice(["cp1252", "utf-16", "utf-16-le", "utf-8-sig", "latin-1", "cp437"])
    return content.decode().encode(encoding, "replace")


def shuffled_columns(content, rng):
    rows = records(content)
    order = rng.permutation(len(rows[0]))
    return written([[row[i] for i in order] for row in rows])


def a_column_gone(content, rng):
    rows = records(content)
    gone = rng.integers(0, len(rows[0]))
    return written([row[:gone] + row[gone + 1 :] for row in rows])


def headers_shuffled(content, rng):
    rows = records(content)
    return written([list(rng.permutation(rows[0])), *rows[1:]])


def no_header(content, rng):
    return written(records(content)[1:])


def bytes_flipped(content, rng):
    data = np.frombuffer(content, np.uint8).copy()
    data[rng.integers(0, len(data), rng.integers(1, 6))] = rng.integers(0, 256)
    return data.tobytes()


def bytes_inserted(content, rng):
    place = rng.integers(0, len(content))
    piece = rng.choice([b"\0", b'"', b"\r", b"\n\n", b",", b"\xff", "\u2028".encode(), b";"])
    return content[:place] + bytes(piece) + content[place:]


def a_huge_cell(content, rng):
    rows = records(content)
    rows[rng.integers(1, len(rows))][rng.integers(0, len(rows[0]))] = "ab 60 Gy, " * 100_000
    return written(rows)


def rows_repeated_and_shuffled(content, rng):
    rows = records(content)
    body = [rows[1 + i] for i in rng.integers(0, len(rows) - 1, len(rows))]
    return written([rows[0], *body])


def cells_swapped(content, rng):
    rows = records(content)
    for _ in range(40):
        a, b = rng.integers(1, len(rows), 2)
        i, j = rng.integers(0, len(rows[0]), 2)
        rows[a][i], rows[b][j] = rows[b][j], rows[a][i]
    return written(rows)


def another_dialect(content, rng):
    return written(records(content), delimiter=str(rng.choice(list(";\t|"))), lineterminator="\n")


def zero_rows(content, rng):
    return written(records(content)[:1])


def only_excluded_rows(content, rng):
    rows = records(content)
    icd = rows[0].index("icd10")
    return written([rows[0], *(row[:icd] + ["C50.4"] + row[icd + 1 :] for row in rows[1:])])


def untouched(content, rng):
    return content


CORRUPTIONS = (
    truncated, other_encoding, shuffled_columns, a_column_gone, headers_shuffled, no_header,
    bytes_flipped, bytes_inserted, a_huge_cell, rows_repeated_and_shuffled, cells_swapped,
    another_dialect, zero_rows, only_excluded_rows, untouched,
)  # fmt: skip


@pytest.mark.parametrize("corrupt", CORRUPTIONS, ids=lambda function: function.__name__)
def test_each_corruption_ends_in_a_cohort_or_an_error(tmp_path_factory, export, corrupt):
    outcomes = []
    for seed in range(2):
        content = corrupt(export, np.random.default_rng(seed))
        outcomes.append(try_content(tmp_path_factory, content))
    if corrupt in (untouched, shuffled_columns, another_dialect, a_huge_cell):
        assert all(manifest for manifest, _ in outcomes)
    if corrupt in (zero_rows, no_header, only_excluded_rows):
        assert all(message for _, message in outcomes)
    if corrupt is only_excluded_rows:
        assert "no case is left of 90" in outcomes[0][1]


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.sampled_from(CORRUPTIONS), min_size=2, max_size=4),
    st.integers(0, 2**32 - 1),
)
@example([another_dialect, truncated], 3)
def test_corruptions_on_top_of_each_other(tmp_path_factory, export, corruptions, seed):
    content, rng = export, np.random.default_rng(seed)
    for corrupt in corruptions:
        try:
            content = corrupt(content, rng)
        except (UnicodeDecodeError, csv.Error, ValueError, IndexError):
            pass  # no longer the csv that this corruption works on
    try_content(tmp_path_factory, content)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_text_in_any_cell(tmp_path_factory, data):
    """Cells of arbitrary characters under the right header."""
    header = ["patient_id", "diagnosis", "icd10", "prescription", "fractions", "total_dose_cgy"]
    cell = st.one_of(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12),
        st.sampled_from(["p1", "C61", "60 Gy in 30 fx, 6 MV", "٣", "1e309", "nan", "-1", "1e400"]),
    )
    rows = data.draw(st.lists(st.lists(cell, min_size=6, max_size=6), min_size=1, max_size=8))
    try_content(tmp_path_factory, written([header, *rows], quoting=csv.QUOTE_ALL))


@pytest.mark.parametrize("suffix", [".xlsx", ".parquet", ".jsonl", ".tsv"])
def test_damaged_files_of_other_kinds_end_in_an_error(tmp_path_factory, export, suffix):
    table = pd.read_csv(io.BytesIO(export), dtype=str, keep_default_na=False).head(12)
    whole = tmp_path_factory.mktemp("whole") / f"export{suffix}"
    {
        ".xlsx": lambda: table.to_excel(whole, index=False),
        ".parquet": lambda: table.to_parquet(whole),
        ".jsonl": lambda: table.to_json(whole, orient="records", lines=True),
        ".tsv": lambda: table.to_csv(whole, index=False, sep="\t"),
    }[suffix]()
    content = whole.read_bytes()
    for seed in range(8):
        rng = np.random.default_rng(seed)
        damaged = (truncated if seed % 2 else bytes_flipped)(content, rng)
        folder = tmp_path_factory.mktemp("fuzz")
        source = folder / f"export{suffix}"
        source.write_bytes(damaged)
        manifest, message = run_prepare(folder, source)
        if message is None:
            assert manifest["assessed"] == manifest["kept"] + sum(manifest["excluded"].values())
        else:
            assert CANARY not in message and len(message.splitlines()) == 1
