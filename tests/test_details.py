"""Regimens field by field, codes by depth, the cost of a modality: figures made by hand."""

import json
import re
from collections import Counter

import pytest

from radonc_jax.evaluation import codes, details, metrics, regimens, run, sections
from radonc_jax.tasks import TASKS, icd, regimen


def predictions(task, pairs, rouge=0.0):
    return [
        {
            "case_id": f"c{i}",
            "patient_id": f"p{i}",
            "task": task,
            "answer": None if answer is None else TASKS[task].parse(answer),
            "reference": reference,
            "correct": TASKS[task].correct(
                None if answer is None else TASKS[task].parse(answer), reference
            ),
            "rouge1": rouge,
        }
        for i, (answer, reference) in enumerate(pairs)
    ]


RIGHT = "Right breast, 40.05 Gy in 15 fractions, 3DCRT tangents"
REGIMENS = [
    (RIGHT, RIGHT),
    ("Left breast, 40.05 Gy in 15 fractions, 3DCRT tangents", RIGHT),  # side
    ("Right breast, 60.05 Gy in 15 fractions, 3DCRT tangents", RIGHT),  # dose
    ("Right breast, 42.56 Gy in 16 fractions, VMAT", RIGHT),  # equivalent: EQD2 within 5 %
    (None, RIGHT),
    ("Prostate, 70 Gy in 28 fractions, VMAT", "Prostate, 60 Gy in 20 fractions, VMAT"),
]


def assessed(**options):
    given = predictions("regimen", REGIMENS, rouge=0.9)
    return regimens.assess({"original": given, "tuned": given}, **options)


def test_regimen_fields_by_hand():
    fields = assessed(bootstrap=0)["fields"]
    assert {name: row["n"] for name, row in fields.items()} == {
        "target": 6,
        "side": 5,
        "dose": 6,
        "fractions": 6,
        "technique": 6,
        "boost": 0,
    }
    assert fields["side"]["tuned"]["value"] == 3 / 5
    assert fields["side"]["tuned"]["precision"] == 3 / 4
    assert fields["side"]["tuned"]["f1"] == pytest.approx(2 / (5 / 3 + 4 / 3))
    assert fields["dose"]["tuned"]["value"] == 2 / 6
    assert fields["fractions"]["tuned"]["value"] == 3 / 6
    assert fields["technique"]["tuned"]["value"] == 4 / 6
    assert fields["target"]["tuned"]["value"] == 5 / 6
    # No reference states a boost: null, and neither 0 nor NaN.
    assert fields["boost"]["tuned"] == {
        "value": None,
        "low": None,
        "high": None,
        "precision": None,
        "f1": None,
    }


def test_a_field_that_the_answer_invents_costs_precision_and_not_recall():
    plain = "Prostate, 60 Gy in 20 fractions, VMAT"
    boosted = f"{plain} + boost 10 Gy in 5 fractions"
    given = predictions("regimen", [(boosted, plain), (boosted, boosted), (plain, plain)])
    boost = regimens.assess({"tuned": given}, bootstrap=0)["fields"]["boost"]
    assert boost["n"] == 1 and boost["tuned"]["value"] == 1
    assert boost["tuned"]["precision"] == 1 / 2
    assert boost["tuned"]["f1"] == pytest.approx(2 / 3)


def cells(table, row):
    """The texts of a table's row, without markup."""
    found = re.search(rf'<tr><th scope="row">{re.escape(row)}</th>(.*?)</tr>', table)[1]
    return [re.sub(r"<small>.*?</small>|<.*?>", "", cell) for cell in found.split("</td>")[:-1]]


def test_the_pages_table_of_fields_shows_what_an_invented_boost_costs():
    plain = "Prostate, 60 Gy in 20 fractions, VMAT"
    boosted = f"{plain} + boost 10 Gy in 5 fractions"
    pairs = [(boosted, plain), (boosted, boosted), (plain, plain)]
    models = {"original": predictions("regimen", [(plain, right) for _, right in pairs])}
    models["tuned"] = predictions("regimen", pairs)
    drawn = []
    ((_, page),) = sections._regimen(
        {"tuned": {"n": 3}},
        regimens.assess(models, bootstrap=20),
        lambda figure, *words: drawn.append(figure) or "",
    )
    heads = re.findall(r'<th scope="col"[^>]*>(.*?)</th>', page)[-8:]
    assert heads == ["Field", "Cases that state it"] + [
        f"{score}, {model}"
        for score in ("Recall", "Precision", "F1")
        for model in ("original", "tuned")
    ]
    # The original states no boost at all.
    assert cells(page, "Boost") == ["1", "0.000", "1.000", "&ndash;", "0.500", "0.000", "0.667"]
    assert cells(page, "Dose") == ["3"] + ["1.000"] * 6
    assert cells(page, "Whole regimen, strict") == ["3", "1.000", "1.000"]
    assert cells(page, "Strict, boost and kind of treatment too") == ["3", "0.667", "0.667"]
    (axes,) = drawn[0].axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[:3] == ["Whole regimen, strict", "Strict, boost and kind", "Same effect (EQD2)"]


def test_a_field_or_an_accuracy_that_is_not_shown_has_dashes():
    details = regimens.assess(
        {m: predictions("regimen", REGIMENS) for m in run.MODELS}, bootstrap=0
    )
    details["fields"]["side"] = {"n": "<11", "original": None, "tuned": None}
    details["strict_boost_kind"] = {"original": None, "tuned": None}
    ((_, page),) = sections._regimen({"tuned": {"n": 6}}, details, lambda *words: "")
    assert cells(page, "Side") == ["&lt;11"] + ["&ndash;"] * 6
    assert cells(page, "Strict, boost and kind of treatment too") == ["6", "&ndash;", "&ndash;"]


def test_lenient_accuracy_takes_equivalent_doses_and_nothing_else():
    result = assessed(bootstrap=0)
    assert result["strict"]["tuned"]["value"] == 1 / 6
    # 42.56 / 16 to the breast (alpha/beta 4): EQD2 47.24 Gy beside 44.52 Gy is 6 % away.
    assert result["lenient"]["tuned"]["value"] == 1 / 6
    given = predictions(
        "regimen",
        [
            ("Right breast, 41.6 Gy in 16 fractions, VMAT", RIGHT),  # EQD2 45.8, 2.7 % above
            ("Left breast, 41.6 Gy in 16 fractions, VMAT", RIGHT),
            ("Right breast, 26 Gy in 5 fractions", RIGHT),  # another class of fractionation
        ],
    )
    lenient = regimens.assess({"tuned": given}, bootstrap=0)["lenient"]["tuned"]["value"]
    assert lenient == pytest.approx(1 / 3)


def test_eqd2_is_the_textbooks():
    def eqd2(text, ratio):
        return regimen.eqd2_gy(regimen.parse_regimen(text), ratio)

    assert eqd2("Prostate, 60 Gy in 30 fractions", 1.5) == pytest.approx(60)
    assert eqd2("Prostate, 60 Gy in 20 fractions", 1.5) == pytest.approx(60 * 4.5 / 3.5)
    bed = 20 * 3 * (1 + 3 / 10)
    assert eqd2("Lung, 60 Gy in 20 fractions", 10) == pytest.approx(bed / (1 + 2 / 10))
    assert eqd2("Prostate, 145 Gy LDR I-125 seeds implant", 1.5) is None
    assert eqd2("Prostate, 60 Gy", 1.5) is None
    ratios = [
        regimen.alpha_beta_gy(regimen.parse_regimen(f"{target}, 50 Gy in 25 fractions"))
        for target in ("Prostate bed", "Left breast", "Right chest wall", "Left lung", "Chest")
    ]
    assert ratios == [1.5, 4, 4, 10, 10]
    classes = [regimen.fraction_class(n) for n in (1, 2, 8, 9, 24, 25)]
    assert len(set(classes)) == 4 and classes[1] == classes[2] and classes[3] == classes[4]


def test_a_high_rouge_with_a_wrong_dose_or_side_is_listed():
    result = assessed(bootstrap=50)
    assert set(result["high_rouge_wrong"]) == {"c1", "c2", "c3", "c5"}
    assert result["high_rouge_wrong_share"]["tuned"]["value"] == pytest.approx(4 / 6)
    low = predictions("regimen", REGIMENS, rouge=0.79)
    assert regimens.assess({"tuned": low}, bootstrap=0)["high_rouge_wrong"] == []
    json.dumps(result, allow_nan=False)


PLAIN = "Left breast, 50 Gy in 25 fractions, VMAT"
BOOSTED = f"{PLAIN} + boost 10 Gy in 5 fractions"


@pytest.mark.parametrize(
    ("answer", "reference", "listed"),
    [
        (BOOSTED, BOOSTED, False),
        (f"{PLAIN} + boost 10.5 Gy in 5 fractions", BOOSTED, False),
        (f"{PLAIN} + boost 60 Gy in 5 fractions", BOOSTED, True),
        (f"{PLAIN} + boost 10.6 Gy in 5 fractions", BOOSTED, True),
        (f"{PLAIN} + boost 10 Gy in 1 fraction", BOOSTED, True),
        (f"{PLAIN} + boost 10 Gy", BOOSTED, True),
        (PLAIN, BOOSTED, True),  # left out
        (BOOSTED, PLAIN, True),  # added
        ("Left breast, 50 Gy in 5 fractions, VMAT", PLAIN, True),
        ("Left breast, 50 Gy in 26 fractions, VMAT", PLAIN, False),  # 1.92 Gy each, 4 % less
        ("Left breast, 50 Gy in 27 fractions, VMAT", PLAIN, True),  # 7 % less
        ("Left breast, 50 Gy in 24 fractions, VMAT", PLAIN, False),
        ("Left breast, 50 Gy in 23 fractions, VMAT", PLAIN, True),
        ("Left breast, 50 Gy, VMAT", PLAIN, True),
        (PLAIN, "Left breast, 50 Gy, VMAT", False),  # the reference asks for no number
        ("Left breast, 8.4 Gy in 1 fraction", "Left breast, 8 Gy in 1 fraction", False),
        ("Left breast, 50 Gy in 25 fractions BID, VMAT", PLAIN, True),
        (PLAIN, "Left breast, 50 Gy in 25 fractions BID, VMAT", False),
        ("Left breast, 50 Gy in 25 fractions, right breast, VMAT", PLAIN, True),
        ("Left breast, 50 Gy in 25 fractions of 5 Gy, VMAT", PLAIN, True),
        ("Left breast, 50 Gy in 25 fractions or 60 Gy in 30 fractions", PLAIN, True),
        ("Left breast, 50 Gy in 25 fractions, 3DCRT", PLAIN, False),
    ],
)
def test_right_words_with_a_dangerous_dose_boost_or_contradiction(answer, reference, listed):
    given = predictions("regimen", [(answer, reference)], rouge=0.93)
    result = regimens.assess({"tuned": given}, bootstrap=0)
    assert result["high_rouge_wrong"] == (["c0"] if listed else [])


SEEDS = "Prostate, 145 Gy LDR I-125 seeds implant"
HDR_ALONE = "Prostate, 27 Gy in 2 fractions, HDR mono"


@pytest.mark.parametrize(
    ("answer", "reference", "other"),
    [
        (SEEDS, SEEDS, False),
        ("Prostate, 145 Gy in 1 fraction, VMAT", SEEDS, True),  # deadly
        ("Prostate, 145 Gy in 1 fraction", SEEDS, True),
        (SEEDS, "Prostate, 145 Gy in 1 fraction, VMAT", True),
        ("Prostate, 145 Gy in 1 fraction, HDR", SEEDS, True),
        ("Prostate, 145 Gy Pd-103 seeds", SEEDS, False),
        ("Prostate, 27 Gy in 2 fractions, VMAT", HDR_ALONE, True),
        ("Prostate, 27 Gy in 2 fractions, SBRT", HDR_ALONE, True),
        ("Prostate, 27 Gy(RBE) in 2 fractions, PBS", HDR_ALONE, True),
        (HDR_ALONE, "Prostate, 27 Gy in 2 fractions, VMAT", True),
        ("Prostate, 27 Gy in 2 fractions", HDR_ALONE, False),  # says nothing of its kind
        (HDR_ALONE, "Prostate, 27 Gy in 2 fractions", False),
        ("Left breast, 50 Gy in 25 fractions, electrons", PLAIN, False),
        ("Left breast, 50 Gy(RBE) in 25 fractions, PBS", PLAIN, False),
    ],
)
def test_another_kind_of_treatment_is_dangerous_and_not_wholly_right(answer, reference, other):
    given = predictions("regimen", [(answer, reference)], rouge=0.93)
    result = regimens.assess({"tuned": given}, bootstrap=0)
    assert result["high_rouge_wrong"] == (["c0"] if other else [])
    # Which domain.md 2.4 (a) leaves out: dose, fractions and place are the same.
    assert result["strict"]["tuned"]["value"] == 1
    assert result["strict_boost_kind"]["tuned"]["value"] == 1 - other


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        (BOOSTED, BOOSTED, True),
        (f"{PLAIN} + boost 10.5 Gy in 5 fractions", BOOSTED, True),
        (f"{PLAIN} + boost 10.6 Gy in 5 fractions", BOOSTED, False),
        (f"{PLAIN} + boost 10 Gy in 4 fractions", BOOSTED, False),
        (PLAIN, BOOSTED, False),  # left out
        (BOOSTED, PLAIN, False),  # invented
    ],
)
def test_the_third_accuracy_asks_for_the_boost_too(answer, reference, right):
    given = predictions("regimen", [(answer, reference)])
    result = regimens.assess({"tuned": given}, bootstrap=0)
    assert result["strict"]["tuned"]["value"] == result["lenient"]["tuned"]["value"] == 1
    assert result["strict_boost_kind"]["tuned"]["value"] == right


def test_the_third_accuracy_is_of_all_cases_as_the_strict_one_is():
    same_effect = "Right breast, 41.6 Gy in 16 fractions, VMAT"
    pairs = [*REGIMENS, (BOOSTED, PLAIN), (same_effect, RIGHT)]
    result = regimens.assess({"tuned": predictions("regimen", pairs)}, bootstrap=50)
    assert result["lenient"]["tuned"]["value"] == 3 / 8
    assert result["strict"]["tuned"]["value"] == 2 / 8
    found = result["strict_boost_kind"]["tuned"]
    assert found["value"] == 1 / 8 and found["low"] < 1 / 8 < found["high"]


def test_a_wrong_boost_sounds_right():
    answer = f"{PLAIN} + boost 60 Gy in 5 fractions"
    assert metrics.rouge1(answer, BOOSTED) > 0.9
    given = predictions("regimen", [(answer, BOOSTED)], rouge=0.93)
    result = regimens.assess({"tuned": given}, {"c0": "breast_wbi"}, bootstrap=0)
    assert result["strict"]["tuned"]["value"] == 1  # which leaves the boost out
    assert result["allowed"]["tuned"]["value"] == 0
    assert result["high_rouge_wrong_share"]["tuned"]["value"] == 1


def test_an_answer_that_contradicts_itself_is_neither_right_nor_allowed():
    texts = [
        "Left breast, right breast, 50 Gy in 25 fractions, VMAT",
        "Left breast, 50 Gy in 25 fractions, right breast, VMAT",
        "Left breast, 50 Gy in 25 fractions of 5 Gy, VMAT",
        "Left breast, 50 Gy in 25 fractions or 60 Gy in 30 fractions, VMAT",
    ]
    given = predictions("regimen", [(text, PLAIN) for text in [*texts, PLAIN]])
    sites = {f"c{i}": "breast_wbi" for i in range(5)}
    result = regimens.assess({"tuned": given}, sites, bootstrap=0)
    for name in ("strict", "lenient", "allowed"):
        assert result[name]["tuned"]["value"] == 1 / 5, name
    assert [p["correct"] for p in given] == [False] * 4 + [True]
    # Two sides state neither of them.
    assert result["fields"]["side"]["tuned"]["value"] == 3 / 5


def test_allowed_regimens_are_those_of_the_site():
    sites = {f"c{i}": "breast_wbi" for i in range(5)} | {"c5": "somewhere else"}
    allowed = assessed(sites=sites, bootstrap=0)["allowed"]
    # Right as it stands, and 42.56 Gy in 16: the wrong side and 60.05 Gy in 15 are never allowed.
    assert allowed["n"] == 5
    assert allowed["tuned"]["value"] == 2 / 5
    assert assessed(sites={"c0": "unheard of"}, bootstrap=0)["allowed"] is None
    assert assessed(bootstrap=0)["allowed"] is None
    doses = {(r.total_dose_gy, r.fractions) for r in regimens.allowed_regimens()["breast_wbi"]}
    assert (40.05, 15) in doses
    assert (10.0, 5) not in doses  # a boost


@pytest.mark.parametrize(
    ("answer", "site", "allowed"),
    [
        ("Right breast, 42.56 Gy in 16 fractions, VMAT", "breast_wbi", True),
        ("Right breast, 42.56 Gy in 16 fractions", "breast_wbi", True),
        ("Breast, 42.56 Gy in 16 fractions, VMAT", "breast_wbi", False),  # which?
        ("Right lung, 42.56 Gy in 16 fractions, VMAT", "breast_wbi", False),
        ("Right breast, 42.56 Gy(RBE) in 16 fractions, PBS", "breast_wbi", False),
        ("Right breast, 40.05 Gy(RBE) in 15 fractions, PBS", "breast_wbi", True),
        ("Prostate, 145 Gy LDR I-125 seeds implant", "prostate_intact", True),
        ("Prostate, 145 Gy in 1 fraction, VMAT", "prostate_intact", False),  # deadly
        ("Prostate, 145 Gy in 1 fraction", "prostate_intact", False),
        ("Prostate, 27 Gy in 2 fractions, HDR mono", "prostate_intact", True),
        ("Prostate, 27 Gy in 2 fractions, SBRT", "prostate_intact", False),
    ],
)
def test_a_customary_regimen_is_so_in_place_and_kind_too(answer, site, allowed):
    reference = RIGHT if site == "breast_wbi" else "Prostate, 70 Gy in 28 fractions, VMAT"
    found = regimens.is_allowed(
        regimen.parse_regimen(answer), regimen.parse_regimen(reference), site
    )
    assert found is allowed


HN = "Oropharynx, 50 Gy in 25 fractions, VMAT + boost 20 Gy in 10 fractions"
HDR = "Prostate, 45 Gy in 25 fractions, VMAT + boost 15 Gy in 1 fraction"


@pytest.mark.parametrize(
    ("answer", "reference", "site", "allowed"),
    [
        # the site's own boost, 10 Gy in 5, may follow any external beam
        ("Left breast, 40.05 Gy in 15 fractions + boost 10 Gy in 5 fractions", PLAIN,
         "breast_wbi", True),
        ("Left breast, 40.05 Gy in 15 fractions + boost 60 Gy in 5 fractions", PLAIN,
         "breast_wbi", False),
        ("Left breast, 40.05 Gy in 15 fractions + boost 10 Gy in 1 fraction", PLAIN,
         "breast_wbi", False),
        (PLAIN, BOOSTED, "breast_wbi", True),
        # the reference's, behind what is not stronger than the reference's first phase
        ("Left breast, 40.05 Gy in 15 fractions + boost 16 Gy in 8 fractions",
         f"{PLAIN} + boost 16 Gy in 8 fractions", "breast_wbi", True),
        (PLAIN + " + boost 16 Gy in 8 fractions", PLAIN, "breast_wbi", False),
        ("Oropharynx, 70 Gy in 35 fractions, VMAT", HN, "oropharynx", True),
        ("Oropharynx, 70 Gy in 35 fractions, VMAT + boost 20 Gy in 10 fractions", HN,
         "oropharynx", False),
        # the table's boost of the prostate follows its pelvic phase, and no whole course
        ("Prostate, 70 Gy in 28 fractions, VMAT + boost 15 Gy in 1 fraction", HDR,
         "prostate_intact", False),
        ("Prostate, 70 Gy in 28 fractions, VMAT", HDR, "prostate_intact", True),
        # more often a day
        (PLAIN.replace("fractions", "fractions BID"), PLAIN, "breast_wbi", False),
        ("Left breast, 38.5 Gy in 10 fractions BID, 3DCRT", PLAIN, "breast_apbi", True),
    ],
)  # fmt: skip
def test_a_boost_must_be_customary_too(answer, reference, site, allowed):
    given, right = regimen.parse_regimen(answer), regimen.parse_regimen(reference)
    assert regimens.is_allowed(given, right, site) is allowed


@pytest.mark.parametrize(
    ("answer", "reference", "kind"),
    [
        ("C50.411", "C50.411", None),
        (None, "C50.411", "not_a_code"),
        ("C61.0", "C61", "not_a_code"),
        ("C50.4", "C50.411", "too_general"),
        ("C50", "C50.411", "too_general"),
        ("C50.411", "C50.4", "too_specific"),
        ("C50.412", "C50.411", "side_only"),
        ("C44.219", "C44.212", "side_only"),  # left and right, numbered irregularly
        ("C44.222", "C44.212", "other"),
        ("C50.911", "C50.411", "other"),
        ("C61", "C50.411", "other"),
    ],
)
def test_kinds_of_wrong_codes(answer, reference, kind):
    assert codes.kind_of_error(answer, reference) == kind


def test_codes_by_depth_and_hierarchy_by_hand():
    pairs = [
        ("C50.411", "C50.411"),
        ("C50.412", "C50.411"),
        ("C61", "C50.411"),
        (None, "C61"),
        ("C34.1", "C34.11"),
    ]
    result = codes.assess(
        {"tuned": predictions("icd", pairs)}, Counter({"C50.411": 7, "C61": 2}), bootstrap=100
    )
    value = {depth: result["by_depth"][depth]["tuned"]["value"] for depth in codes.DEPTHS}
    assert value == {"chapter": 4 / 5, "block": 3 / 5, "category": 3 / 5, "full": 1 / 5}
    assert result["valid_leaf"]["tuned"]["value"] == 3 / 5
    # Steps from the chapter: 6 of 6, 5 of 6, 1 of 3 (chapter alone), 0 of 0, 4 of 4 given;
    # of 6, 6, 6, 3 and 5 that are right.
    precise, recalled = 16 / 19, 16 / 26
    found = {name: score["tuned"]["value"] for name, score in result["hierarchical"].items()}
    assert found["precision"] == pytest.approx(precise)
    assert found["recall"] == pytest.approx(recalled)
    assert found["f1"] == pytest.approx(2 / (1 / precise + 1 / recalled))
    assert {kind: count["tuned"] for kind, count in result["errors"].items()} == {
        "too_general": 1,
        "too_specific": 0,
        "side_only": 1,
        "other": 1,
        "not_a_code": 1,
    }
    rarity = {row["bin"]: (row["n"], row["tuned"]["value"]) for row in result["by_rarity"]}
    assert rarity == {"0": (1, 0.0), "1-5": (1, 0.0), "6-20": (3, 1 / 3)}
    assert codes.assess({"tuned": predictions("icd", pairs)}, bootstrap=0)["by_rarity"] is None
    json.dumps(result, allow_nan=False)


def test_a_path_names_each_step_once():
    assert icd.path("C50.411") == ("2", "C50-C50", "C50", "C50.4", "C50.41", "C50.411")
    assert icd.path("C61.0") == ("2", "C60-C63", "C61", "C61.0")
    assert icd.path("A3X") == icd.path("") == ()
    assert icd.other_side("C50.411") == "C50.412" and icd.other_side("C44.219") == "C44.212"
    assert icd.other_side("C61") is None and icd.other_side("C50.4") is None


def test_modality_costs():
    pairs = [
        ("photon", "photon"),
        ("photon", "proton"),
        ("electron", "photon"),
        ("HDR", "photon"),
        (None, "electron"),
    ]
    result = details.assess("modality", {"tuned": predictions("modality", pairs)}, bootstrap=20)
    assert result["cost"]["tuned"]["value"] == (0 + 1 + 2 + 3 + 1) / 5
    matrix = result["cost"]["matrix"]
    assert [row[i] for i, row in enumerate(matrix)] == [0, 0, 0, 0]
    assert [[row[c] for c in range(4)] for row in matrix] == [
        [matrix[c][r] for c in range(4)] for r in range(4)
    ]


@pytest.mark.parametrize(
    ("answer", "patients", "cost"),
    [("photon", 12, 0), ("HDR", 12, 3), ("6 MeV electrons", 1, 2)],
)
def test_equal_costs_have_an_interval_as_accuracy_has(answer, patients, cost):
    given = predictions("modality", [(answer, "photon")] * patients)
    found = details.assess("modality", {"tuned": given}, bootstrap=20)["cost"]["tuned"]
    differ = 1 - 0.025 ** (1 / patients)  # of the patients, at most (Clopper and Pearson)
    low, high = (cost + differ * (end - cost) for end in (0, 3))
    assert found == pytest.approx({"value": cost, "low": low, "high": high})
