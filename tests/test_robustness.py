"""Changed texts and what must follow from them."""

import hashlib
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

from radonc_jax.evaluation import robustness
from radonc_jax.tasks import TASKS, Record

TEXT = "IDC, Rt breast. Stage: cT1 cN0. Left lung nodule, LUL; with L axilla node. 60 yo woman."


def rng():
    return np.random.default_rng(0)


def test_every_spelling_of_the_side_is_flipped():
    flipped = robustness.flip_side(TEXT, rng())
    assert flipped == (
        "IDC, Lt breast. Stage: cT1 cN0. Right lung nodule, RUL; with R axilla node. 60 yo woman."
    )
    assert robustness.flip_side(flipped, rng()) == TEXT
    assert robustness.flip_side("RIGHT BREAST", rng()) == "LEFT BREAST"
    for text, other in (
        ("right-sided ca, right breast", "left-sided ca, left breast"),
        ("Leftsided colon ca", "Rightsided colon ca"),
        ("uveal melanoma OD, right eye", "uveal melanoma OS, left eye"),
        ("right lung mass, mets to L4", "left lung mass, mets to L4"),
    ):
        assert robustness.flip_side(text, rng()) == other
        assert robustness.flip_side(other, rng()) == text


@pytest.mark.parametrize(
    "text",
    [
        "prostate ca, T2",
        "NSCLC of the RML, right lung",
        "bilateral breast ca, left larger",
        "mets to L4 and L5",
        "right-handed man with a glioma",
        "s/p RT to the left breast",
        # Half of the sides flipped would be a text that contradicts itself.
        "right breast at 2 o'clock",
        "right breast, 10 oclock",
        "left breast mass, right-handed",
        "right breast; r axilla node",
        "left lung, Rt-sided effusion, R/L nodes",
        "right breast, upright position",
        "melanoma of the right eye, o.d.",
    ],
)
def test_a_text_without_a_side_that_has_a_counterpart_is_not_flipped(text):
    assert robustness.flip_side(text, rng()) is None


def test_synonyms_keep_the_rest_of_the_text():
    text = "60 yo woman with adenocarcinoma of the lung, s/p biopsy"
    changed = robustness.swap_synonyms(text, rng())
    assert changed != text
    back = changed
    for one, other in robustness.SYNONYMS:
        back = re.sub(rf"(?<![\w-]){re.escape(other)}(?![\w-])", one, back)
    whole = re.sub("s/p", "status post", text)
    assert back == whole
    assert robustness.swap_synonyms("nothing here", rng()) is None


REVIEWED = [
    # (text, what each term alone becomes), read by a person: does it still say the same?
    ("60 yo woman with adenocarcinoma of the lung", {
        "60 yo woman with adenoca of the lung",
        "60 yo woman w/ adenocarcinoma of the lung",
    }),
    ("Adenoca, low rectum", {"adenocarcinoma, low rectum"}),
    ("Squamous cell carcinoma, Lt tonsil", {"SCC, Lt tonsil", "Squamous cell ca, Lt tonsil"}),
    ("T8 metastasis, SCC on MRI", None),  # spinal cord compression
    ("Dx: ductal carcinoma in situ, R breast", {"Dx: ductal ca in situ, R breast"}),
    ("Elevated Ca 19-9", None),
    ("metastatic to L4 and iliac bone", None),
    ("metastatic prostate adenocarcinoma, for prostate RT", {
        "metastatic prostate adenoca, for prostate RT"
    }),
    ("NSCLC, mets from primary of the RUL", None),
    ("Hx: S/p lumpectomy", {"Hx: status post lumpectomy"}),
    ("status post TURBT", {"s/p TURBT"}),
    ("laryngoscopy, biopsy proven", {"laryngoscopy, bx proven"}),
    ("biopsy-proven", None),
    ("63 y/o male", {"63 year-old male"}),
    ("one lymph node, history of keloids", {
        "one LN, history of keloids", "one lymph node, h/o keloids"
    }),
    ("w/o contrast, without node", None),
    ("right frontal lobe, right side", {"Rt frontal lobe, right side"}),
    ("left sided mass", {"Lt sided mass"}),
    ("right-handed", None),
    ("Rt to the pelvis", None),  # radiotherapy
    ("drain left in place", None),
    ("left lung, residual left behind", {"Lt lung, residual left behind"}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), REVIEWED, ids=range(len(REVIEWED)))
def test_synonyms_say_the_same(text, expected):
    def one_at_a_time(monkeypatched):
        for pair in robustness.SYNONYMS:
            monkeypatched.setattr(robustness, "SYNONYMS", (pair,))
            yield robustness.swap_synonyms(text, rng())

    with pytest.MonkeyPatch.context() as patch:
        changed = set(one_at_a_time(patch)) - {None}
    assert changed == (expected or set())


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("IDC of the Lt. breast. Stage II.", ["IDC of the Lt. breast.", "Stage II."]),
        ("rt. axilla; ER pos. and PR neg. tumor", ["rt. axilla;", "ER pos. and PR neg. tumor"]),
        ("By Dr. Roe at St. Anne. No. 3 node.", ["By Dr. Roe at St. Anne.", "No. 3 node."]),
        ("60 Gy b.i.d. planned. 20/40 o.d. then", ["60 Gy b.i.d. planned.", "20/40 o.d. then"]),
        ("IDC of the right\nbreast. Stage II", ["IDC of the right\nbreast.", "Stage II"]),
        ("IDC of the Rt.\nBreast", ["IDC of the Rt. Breast"]),
        ("Site: breast\nSide: left\n3/12 nodes", ["Site: breast", "Side: left", "3/12 nodes"]),
        ("Nodule of 2.4 cm. Stage I. Grade 2.", ["Nodule of 2.4 cm.", "Stage I.", "Grade 2."]),
    ],
)  # fmt: skip
def test_no_field_ends_behind_an_abbreviation(text, fields):
    mixed = robustness.shuffle_fields(text, rng())
    if len(fields) == 1:
        assert mixed is None
        return
    assert mixed != text
    pieces = [field.rstrip(".") for field in fields]
    assert all(piece in mixed for piece in pieces)
    # Nothing but full stops is added, where a line has none.
    assert sorted(mixed.replace(".", "").split()) == sorted(text.replace(".", "").split())
    assert "left 3/12" not in mixed and "breast Side" not in mixed


def test_shuffled_fields_are_the_same_fields_in_another_order():
    changed = robustness.shuffle_fields("A one. B two; C three.\nD four.", rng())
    assert changed != "A one. B two; C three. D four."
    assert sorted(re.split(r"(?<=[.;]) ", changed)) == ["A one.", "B two;", "C three.", "D four."]
    assert robustness.shuffle_fields("One sentence of 40.05 Gy", rng()) is None


def test_an_irrelevant_sentence_is_added_and_nothing_taken():
    for seed in range(6):
        changed = robustness.add_irrelevant_sentence("Breast ca", np.random.default_rng(seed))
        assert "Breast ca" in changed
        assert any(sentence in changed for sentence in robustness.IRRELEVANT)


def test_what_a_flipped_side_must_do_to_an_answer():
    expected = robustness.expected_answer
    assert expected("icd", "side_flip", "C50.411") == "C50.412"
    assert expected("icd", "side_flip", "C44.212") == "C44.219"  # numbered irregularly
    assert expected("icd", "side_flip", "C61") is None
    # Protons for a left breast, photons for a right one: either may be right.
    assert expected("modality", "side_flip", "photon") is None
    assert expected("modality", "synonyms", "photon") == "photon"
    flipped = expected("regimen", "side_flip", "Right breast, 40 Gy in 15 fractions, VMAT")
    assert flipped == "Left breast, 40 Gy in 15 fractions, VMAT"
    assert expected("regimen", "side_flip", "Prostate, 70 Gy in 28 fractions") is None
    assert expected("icd", "synonyms", "C61") == "C61"
    both = "Left breast, 50 Gy in 25 fractions [contradicts itself: side]"
    assert expected("regimen", "side_flip", both) is None
    assert expected("regimen", "synonyms", both) == both


RECORDS = [
    Record(f"c{i}", f"p{i}", f"IDC of the {side} breast. Stage II.", "", "", "")
    for i, side in enumerate(["right", "left"] * 6)
]


def read_side(task, diagnoses):
    """A model that reads the side and nothing else."""
    return [
        SimpleNamespace(text="C50.911" if "right" in p.casefold() or "Rt " in p else "C50.912")
        for p in diagnoses
    ]


def always_right(task, diagnoses):
    """A model that reads nothing."""
    return [SimpleNamespace(text="C50.911")] * len(diagnoses)


def answers(decode):
    task = TASKS["icd"]
    generations = decode(task, [record.diagnosis for record in RECORDS])
    return [
        {"case_id": record.case_id, "answer": task.parse(generation.text)}
        for record, generation in zip(RECORDS, generations, strict=True)
    ]


def test_a_model_that_reads_passes_and_one_that_does_not_fails_the_flip():
    summary, cases = robustness.probe(read_side, RECORDS, TASKS["icd"], answers(read_side))
    assert {name: entry["rate"] for name, entry in summary.items()} == dict.fromkeys(summary, 1.0)
    assert summary["side_flip"]["expected"] == "flips"
    assert summary["synonyms"]["expected"] == "same"
    assert summary["side_flip"]["n"] == 12
    assert set(cases[0]) == {"case_id", "patient_id", "task", "perturbation", "as_expected"}
    summary, _ = robustness.probe(always_right, RECORDS, TASKS["icd"], answers(always_right))
    assert summary["side_flip"]["rate"] == 0.0
    assert summary["side_flip"]["high"] > 0.2  # twelve cases do not make it certain
    assert summary["irrelevant_sentence"]["rate"] == 1.0
    json.dumps(summary, allow_nan=False)


def test_a_flipped_side_is_not_asked_of_the_modality():
    """Protons for the left breast, which the site table knows, is no failure."""
    task, asked = TASKS["modality"], []

    def decode(task, diagnoses):
        asked.extend(diagnoses)
        return [
            SimpleNamespace(text="proton" if re.search("left|Lt", text) else "photon")
            for text in diagnoses
        ]

    given = [
        {"case_id": record.case_id, "answer": task.parse(generation.text)}
        for record, generation in zip(
            RECORDS, decode(task, [record.diagnosis for record in RECORDS]), strict=True
        )
    ]
    asked.clear()
    summary, cases = robustness.probe(decode, RECORDS, task, given)
    assert set(summary) == set(robustness.PERTURBATIONS) - {"side_flip"}
    assert {case["perturbation"] for case in cases} == set(summary)
    assert len(asked) == len(cases) == 3 * len(RECORDS)
    assert {entry["rate"] for entry in summary.values()} == {1.0}
    assert {entry["expected"] for entry in summary.values()} == {"same"}
    assert all(
        set(robustness.asked_of(t)) == set(robustness.PERTURBATIONS) for t in ("regimen", "icd")
    )


def test_texts_are_changed_alike_whatever_the_order_of_the_cases():
    def recording(seen):
        def decode(task, diagnoses):
            seen.append(sorted(diagnoses))
            return always_right(task, diagnoses)

        return decode

    seen = []
    for records in (RECORDS, RECORDS[::-1]):
        robustness.probe(recording(seen), records, TASKS["icd"], answers(always_right))
    assert seen[0] == seen[1]


def test_unreadable_answers_are_left_out_and_missing_ones_refused():
    nothing = [{"case_id": record.case_id, "answer": None} for record in RECORDS]
    summary, cases = robustness.probe(always_right, RECORDS, TASKS["icd"], nothing)
    assert cases == [] and summary["synonyms"]["rate"] is None
    with pytest.raises(ValueError, match="12 cases have no answer to their own text, such as c0"):
        robustness.probe(always_right, RECORDS, TASKS["icd"], [])
    with pytest.raises(ValueError, match="returned 1 answers to"):
        robustness.probe(lambda *_: [1], RECORDS, TASKS["icd"], answers(always_right))


def test_changed_texts_that_are_too_long_are_left_out_and_counted():
    longest = max(len(record.diagnosis) for record in RECORDS)

    def decode(task, diagnoses):
        assert all(len(text) <= longest for text in diagnoses)
        return read_side(task, diagnoses)

    summary, cases = robustness.probe(
        decode,
        RECORDS,
        TASKS["icd"],
        answers(read_side),
        fits=lambda task, text: len(text) <= longest,
    )
    found = summary["irrelevant_sentence"]
    assert found["n"] + found["left_out"] == len(RECORDS) and found["left_out"] > 0
    assert sum(entry["n"] for entry in summary.values()) == len(cases)
    whole, _ = robustness.probe(read_side, RECORDS, TASKS["icd"], answers(read_side))
    assert {entry["left_out"] for entry in whole.values()} == {0}


def test_files_hold_no_text(tmp_path):
    lines = [
        json.dumps(answer | {"patient_id": "p", "task": "icd", "output": "", "reference": "C61"}
                   | {"correct": False, "rouge1": 0.0, "finished": True})
        for answer in answers(read_side)
    ]  # fmt: skip
    (tmp_path / "predictions.jsonl").write_text("\n".join(lines) + "\n")
    given = {"icd": answers(read_side)}
    summary = robustness.probe_tasks(read_side, RECORDS, [TASKS["icd"]], given, tmp_path)
    # Another process of several neither reads nor writes.
    alone = robustness.probe_tasks(read_side, RECORDS, [TASKS["icd"]], given, None)
    assert alone == summary
    written = json.loads((tmp_path / "robustness.json").read_text())
    predictions = (tmp_path / "predictions.jsonl").read_bytes()
    assert written.pop("predictions_sha256") == hashlib.sha256(predictions).hexdigest()
    assert written == summary and written["icd"]["side_flip"]["rate"] == 1.0
    text = (tmp_path / "robustness.jsonl").read_text()
    assert "breast" not in text and text.count("\n") == sum(e["n"] for e in summary["icd"].values())


def test_a_task_in_which_nothing_could_be_changed_is_told_in_words():
    one = {"synonyms": {"n": 4, "rate": 0.75}, "side_flip": {"n": 0, "rate": None}}
    assert robustness.describe("icd", one) == "icd, as expected after: synonyms 0.750 of 4"
    none = {name: {"n": 0, "rate": None} for name in robustness.PERTURBATIONS}
    said = "modality: no text could be changed and asked again, so robustness is not known"
    assert robustness.describe("modality", none) == said
