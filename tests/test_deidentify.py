"""Identifiers are found, taken out and told without their text; numbers of the field are none."""

import json
import sys
import time

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from radonc_jax.data import deidentify
from radonc_jax.data.deidentify import (
    CLASSES,
    DEFAULT_ACTIONS,
    RULES,
    find,
    find_spans,
    find_spans_of,
    parse_actions,
    redact,
    redact_text,
)
from radonc_jax.data.synthetic import make_extract

sys.path.insert(0, str(ROOT))
from benchmarks.planting import SETS, TRAPS, Planter  # noqa: E402


@pytest.fixture(scope="module")
def notes():
    texts = make_extract(900, seed=11).table["diagnosis"].drop_duplicates()
    return [text for text in texts if len(text) > 20]


@pytest.fixture(scope="module")
def planted(notes):
    """(note, what is planted) of every family of every set, by set."""
    result = {}
    for which in SETS:
        planter = Planter(np.random.Generator(np.random.PCG64(3)), which)
        families = list(planter.families)
        result[which] = [
            planter.plant(note, [families[i % len(families)], families[(i + 7) % len(families)]])
            for i, note in enumerate(notes[:260])
        ]
    return result


# -- what is found ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("Referred by Dr. Smith for XRT", "name", ["Smith"]),
        ("referred by dr. smith for xrt", "name", ["smith"]),
        ("Drs. Okafor and Lindqvist concur", "name", ["Okafor and Lindqvist"]),
        ("Dr. Gleason read Gleason 3+4", "name", ["Gleason"]),  # one is a person
        ("DOE, JANE Q. seen today", "name", ["DOE, JANE Q."]),
        ("Maria L. Gonzalez presents", "name", ["Maria L. Gonzalez"]),
        ("Patient: Ngozi de la Cruz.", "name", ["Ngozi de la Cruz"]),
        ("daughter Oluwaseun drives", "name", ["Oluwaseun"]),
        ("Plan reviewed by Jane Roe, MD", "name", ["Jane Roe"]),
        ("Signed by J. O'Brien-Hall", "name", ["J. O'Brien-Hall"]),
        ("lives in Flagstaff, AZ 86001", "place", ["Flagstaff", "86001"]),
        ("at 123 N. Maple St., Apt 4", "place", ["123 N. Maple St., Apt 4"]),
        ("P.O. Box 55", "place", ["P.O. Box 55"]),
        ("biopsy 3/14/2021", "date", ["3/14/2021"]),
        ("biopsy on 3/14", "date", ["3/14"]),
        ("2021-03-14T09:30 and 14 Mar 2021", "date", ["2021-03-14T09:30", "14 Mar 2021"]),
        ("in March 2020 and 03/2021", "date", ["March 2020", "03/2021"]),
        ("12-DEC-21", "date", ["12-DEC-21"]),
        ("92 yo female", "age", ["92"]),
        ("a 101-year-old man", "age", ["101"]),
        ("Age: 90.", "age", ["90"]),
        ("89 yo female", "age", []),
        ("call (602) 555-0134 ext 12", "phone", ["(602) 555-0134 ext 12"]),
        ("fax 602.555.0134", "fax", ["602.555.0134"]),
        ("j.roe+rt@clinic.example.org", "email", ["j.roe+rt@clinic.example.org"]),
        ("SSN 123-45-6789", "ssn", ["123-45-6789"]),
        ("SSN ending in 6789", "ssn", ["6789"]),
        ("MRN# 00123456", "mrn", ["00123456"]),
        ("member ID XYZ123456789", "health_plan", ["XYZ123456789"]),
        ("1EG4-TE5-MK73", "health_plan", ["1EG4-TE5-MK73"]),
        ("acct # 88-123456", "account", ["88-123456"]),
        ("driver's license D12345678", "licence", ["D12345678"]),
        ("VIN 1HGCM82633A004352", "vehicle", ["1HGCM82633A004352"]),
        ("pacemaker serial PJN123456", "device", ["PJN123456"]),
        ("see https://example.com/p/1", "url", ["https://example.com/p/1"]),
        ("from 192.168.10.24", "ip", ["192.168.10.24"]),
        ("accession S23-12345", "other_id", ["S23-12345"]),
    ],
)
def test_what_each_class_finds(text, kind, said):
    spans = find_spans(text)
    assert [text[s.start : s.end] for s in spans if s.kind == kind] == said
    assert all(s.kind == kind for s in spans)


MORE_TRAPS = [
    "ER+/PR+/HER2-, Ki-67 15%", "energies 6/10/15 MV", "levels 66/60/54 Gy", "seen on 3/4 slices",
    "biopsy 3/12 cores positive", "smoked 95 pack years", "102 F fever", "90 F-18 FDG",
    "93 M-protein", "Dr recommends surgery", "Mother: Breast cancer at 45", "wife is supportive",
    "Attending: Radiation Oncology", "Treated with Keytruda (Pembrolizumab)", "HCC, CT, PA, MD",
    "Moved from Photon to Proton", "lives in Arizona", "Van Nuys index 8", "TG-263, NRG-GY018",
    "CPT 77427", "10/2000 cGy", "account for 1234", "policy of 2000", "ICD 10 code 174.9",
    "titanium plate C5 C6", "Jack Knife position; Dean Flap", "Bell Palsy; Baker Cyst; Hill Sachs",
    "Kidney, Left; Breast, Right", "v16.1.2", "every 3-4 months", "May 5 fractions", "stage 1-2-3",
    "12 Left Chest Wall Dr", "Lancinating pain. No MS. Symptoms stable",
    "Reviewed with Gleason 4+3", "read by Deauville criteria", "followed by Whipple",
    "no ms. Planned 85 Gy", "no ms. atrial fibrillation on apixaban", "Dec 15 mg", "BP 120/80",
    "Kadish C. Outside pathology", "S/p P/D. PleurX catheter.", "EBV 12000000 copies", "E. Coli",
]  # fmt: skip


@pytest.mark.parametrize("change", [str, str.upper, str.lower], ids=["mixed", "upper", "lower"])
def test_eponyms_and_numbers_of_the_field_are_no_identifiers(change):
    for text in (*TRAPS, *MORE_TRAPS):
        assert find_spans(change(text)) == (), change(text)


def test_a_plain_synthetic_extract_holds_none():
    table = make_extract(2500, seed=2).table
    findings = find(table, [name for name in table.columns if name != "patient_id"])
    assert findings.empty, findings.summary()


def test_sifting_loses_nothing(planted):
    for which, pairs in planted.items():
        texts = [text for text, _ in pairs]
        slow = {i: spans for i, text in enumerate(texts) if (spans := find_spans(text))}
        assert find_spans_of(texts) == slow, which
        assert {rule.kind for rule in RULES} == set(CLASSES)


def recall(pairs):
    """Per class: share of planted identifiers of which no letter or digit is left."""
    hits, of = dict.fromkeys(CLASSES, 0), dict.fromkeys(CLASSES, 0)
    for text, truth in pairs:
        covered = {i for span in find_spans(text) for i in range(span.start, span.end)}
        for spot in truth:
            letters = {i for i in range(spot.start, spot.end) if text[i].isalnum()}
            of[spot.kind] += 1
            hits[spot.kind] += letters <= covered
    return {kind: hits[kind] / of[kind] for kind in CLASSES}


def test_recall_on_planted_identifiers_does_not_fall(planted):
    tuned = recall(planted["tuned"])
    assert min(tuned.values()) >= 0.97, tuned
    # Not a promise: what the benchmark measured on families no rule was written against.
    held_out = recall(planted["held_out"])
    assert np.mean(list(held_out.values())) > 0.85, held_out
    assert held_out["name"] > 0.5


def test_what_is_found_in_planted_notes_was_planted(planted):
    for text, truth in planted["tuned"]:
        for span in find_spans(text):
            assert any(s.start < span.end and span.start < s.end for s in truth), span


# -- what is done with it --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "actions", "expected"),
    [
        ("Dr. Smith, 3/14/2021", {}, "Dr. [NAME], 2021"),
        ("Dr. Smith, 3/14/21", {}, "Dr. [NAME], [DATE]"),
        ("a 92 yo from Tucson, AZ 85719", {}, "a 90+ yo from [PLACE], AZ 857"),
        ("Lamy, NM 87801-1234", {"name": "remove"}, "[PLACE], NM 000"),
        ("zip 03601", {}, "zip 000"),
        ("zip 03601", {"place": "tag"}, "zip [PLACE]"),
        ("MRN 1234567, call 602-555-0134", {"mrn": "remove"}, "MRN , call [PHONE]"),
        ("seen 3/14/2021", {"date": "remove"}, "seen "),
    ],
)
def test_actions(text, actions, expected):
    assert redact_text(text, find_spans(text), DEFAULT_ACTIONS | actions) == expected


def test_a_redacted_note_is_clean_and_stays_as_it_is(planted):
    for text, truth in planted["tuned"]:
        spans = find_spans(text)
        clean = redact_text(text, spans, DEFAULT_ACTIONS)
        assert find_spans(clean) == (), [s.rule for s in find_spans(clean)]
        for spot in truth:
            inside = any(s.start <= spot.start and spot.end <= s.end for s in spans)
            if inside and spot.kind in ("ssn", "email", "mrn", "phone"):
                assert text[spot.start : spot.end] not in clean


def test_tables():
    table = pd.DataFrame(
        {
            "diagnosis": ["Dr. Smith saw T2N0", "clean", "Dr. Smith saw T2N0", None],
            "age": ["91", "60", "45.0", "104 y"],
            "prescription": ["60 Gy in 30 fx", "MRN 1234567", "", ""],
        },
        index=pd.Index([2, 3, 5, 9], name="row"),
    )
    findings = find(table, ["diagnosis", "age", "prescription", "not there"])
    assert findings.counts == {"name": 2, "age": 2, "mrn": 1}
    assert findings.rows_with("name") == [2, 5]
    assert findings.summary() == {
        "rows": 4,
        "classes": {"name": 2, "age": 2, "mrn": 1},
        "rules": {"name_title": 2, "age_column": 2, "mrn_label": 1},
    }
    message = findings.stop_message()
    assert "name 2 (rows 2, 5)" in message and "mrn 1 (row 3)" in message
    assert "--deidentify=redact" in message and "\n" not in message
    clean = redact(table, findings)
    assert clean["diagnosis"].tolist()[:3] == [
        "Dr. [NAME] saw T2N0",
        "clean",
        "Dr. [NAME] saw T2N0",
    ]
    assert clean["age"].tolist() == ["90+", "60", "45.0", "90+"]
    assert clean.loc[3, "prescription"] == "MRN [MRN]"
    assert table.loc[2, "diagnosis"] == "Dr. Smith saw T2N0"  # a copy was changed
    assert find(clean, table.columns).empty

    audit = list(deidentify.audit_lines(findings, "redact"))
    head, *lines = map(json.loads, audit)
    assert head["policy"] == "redact" and head["classes"] == findings.counts
    assert [(x["row"], x["class"]) for x in lines if x["column"] == "diagnosis"] == [
        (2, "name"),
        (5, "name"),
    ]
    for line in lines:  # offsets point into the original; the text is nowhere
        said = str(table.loc[line["row"], line["column"]])[line["start"] : line["end"]]
        assert said and said.lower() in ("smith", "91", "104 y", "1234567")
    for shown in ("\n".join(audit), message, repr(findings.summary())):
        assert not any(word in shown for word in ("Smith", "1234567", "T2N0", "104"))


def test_nothing_found_is_told_as_such():
    findings = find(pd.DataFrame({"diagnosis": ["clean"]}), ["diagnosis"])
    assert findings.empty and findings.counts == {} and findings.summary()["rows"] == 0
    assert find(pd.DataFrame({"diagnosis": []}, dtype=str), ["diagnosis"]).empty


def test_bad_actions_are_told():
    assert parse_actions([]) == DEFAULT_ACTIONS
    assert parse_actions(["date=remove", "name = tag"])["date"] == "remove"
    for pair in ("date", "dates=tag", "date=shift"):
        with pytest.raises(ValueError, match="is not CLASS=ACTION; classes are name, place"):
            parse_actions([pair])


def test_pseudonyms_keep_patients_apart_and_tell_nothing_of_their_ids():
    ids = pd.Series(["m9", "m1", "m9", "m5"], index=[4, 5, 6, 7])
    new = deidentify.pseudonyms(ids, seed=1)
    assert new.index.equals(ids.index)
    assert new[4] == new[6] and new.nunique() == 3
    assert set(new) == {"P000001", "P000002", "P000003"}
    renamed = deidentify.pseudonyms(ids.map({"m9": "a", "m1": "b", "m5": "c"}), seed=1)
    assert renamed.equals(new)  # the ids themselves have no say


@pytest.mark.parametrize(
    "piece", ["a1 ", "Dr. ", "12/", "name: ", "1-", "John ", "5 Oak ", "a.", "@"]
)
def test_a_cell_of_half_a_million_characters_takes_no_time_to_speak_of(piece):
    started = time.process_time()
    find_spans_of([piece * (500_000 // len(piece))])
    assert time.process_time() - started < 6
