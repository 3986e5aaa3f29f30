"""The page of the report: what it says where a run is odd, and what it keeps from view."""

import dataclasses
import html
import json
import re

import pytest
from reports import HOSTILE, make_cohort, make_run, run_in_memory

from radonc_jax.evaluation import codes, report, robustness
from radonc_jax.evaluation.baselines import BASELINES
from radonc_jax.evaluation.disclosure import TRIPOD_LLM
from radonc_jax.evaluation.explorer import MOST_CASES, embed_json
from radonc_jax.evaluation.figures import name_of, typeset
from radonc_jax.evaluation.findings import build_report
from radonc_jax.evaluation.markup import DASH
from radonc_jax.evaluation.page import DEFINITIONS, EFFECTS, SCORES, render_page
from radonc_jax.evaluation.published import publish
from radonc_jax.evaluation.run import VARIANTS
from radonc_jax.evaluation.run_folder import read_run

RIGHT = "Left breast, 50 Gy in 25 fractions"
WRONG_DOSE = "Left breast, 60 Gy in 25 fractions"
NO_FIGURE = r"\b(nan|NaN|None|inf|Infinity)\b"


def shown(page):
    """The words of a page, without markup, style and data."""
    page = page[page.index("</style>") :]
    page = re.sub(r"<script.*?</script>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))


def embedded(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def embedded_script(page):
    """The code of a page, its data left out; the published form has none."""
    found = re.search(r"<script>(.*?)</script>", page, re.DOTALL)
    return found[1] if found else ""


def render(*runs, include_text=True):
    content = build_report(runs, bootstrap=20)
    json.dumps(content, allow_nan=False)
    if not include_text:
        content = publish(content)
    return render_page(content, runs, include_text=include_text)


ODD = {
    "one_case": [("C61", "C61", "C50.911")],
    "nothing_readable": [("C61", HOSTILE, "")] * 5,
    "models_never_differ": [("C61", "C61", "C61"), ("C20", "C61", "C61")] * 6,
    "all_right": [("C61", "C61", "C61")] * 4,
}


@pytest.mark.parametrize("task", ["regimen", "icd"])
@pytest.mark.parametrize("odd", ODD)
def test_odd_runs_give_defined_figures(odd, task):
    answers = ODD[odd]
    if task == "regimen":
        answers = [tuple(t.replace("C61", RIGHT) for t in answer) for answer in answers]
    text = shown(render(run_in_memory(answers, task)))
    assert not re.search(NO_FIGURE, text)
    name = {"regimen": "treatment regimen", "icd": "ICD-10-CM code"}[task]
    said = {
        "one_case": (
            f"Tuning lowered the accuracy of the {name} from 100.0",
            "no gain is significant (one-sided Wilcoxon at 5 %, after Holm): the tuned model is "
            "not more accurate in the one comparison; ",
            "On 1 held-out case tuning lowered",
            "The only answer of the tuned model is wrong",
        ),
        "nothing_readable": (
            f"Tuning brought no right answer on the {name}, where the original model has none "
            "either.",
            "all 5 tuned answers are unparseable; the ceiling is not known.",
            "On 5 held-out cases no answer is right, before tuning or after it (difference",
            "All 5 answers of the tuned model are wrong, all of them unparseable; ",
        ),
        "models_never_differ": (
            f"Tuning did not change the accuracy of the {name} (50.0",
            "is not more accurate in the one comparison; no tuned answer is unparseable",
            "6 of the tuned model's 12 answers are wrong (50.0 %); ".replace("'", "&#x27;"),
        ),
        "all_right": (
            "every answer is right, before tuning and after it (difference",
            "No answer of the tuned model is wrong; ",
        ),
    }
    for sentence in said[odd]:
        assert sentence in text
    assert not re.search(r"\b[01] of 1\b", text[: text.index("Accuracy with 95 % intervals")])


def test_the_first_screen_counts_the_comparisons_in_words():
    gain, none = [("C61", "", "C61")] * 12, [("C61", "C20", "C20")] * 12
    better = run_in_memory(gain, "icd", name="better")
    some = run_in_memory([("C61", "", "C61")] + none, "icd", name="some")
    other = run_in_memory(none, "icd", name="none")
    test = "(one-sided Wilcoxon at 5 %, after Holm)"
    for runs, said in (
        ([better, better], f"the gain is significant {test} in all 2 comparisons; "),
        ([better, other, some], f"the gain is significant {test} in 1 of the 3 comparisons; "),
        ([some, other], f"the gain is significant {test} in none of the 2 comparisons; "),
        (
            [other, other],
            f"no gain is significant {test}: the tuned model is not more accurate in any of the 2",
        ),
    ):
        assert said in shown(render(*runs))


def test_the_first_screen_tells_how_many_of_the_original_s_answers_are_unparseable():
    """Where it starts from zero because nothing of it is an answer."""
    right, both, none = ("C61", "C61", "C61"), ("C61", "", ""), ("C61", "", "C61")
    for answers, said in (
        ([none] * 12, "no tuned answer is unparseable, all of the original's are; "),
        (
            [none, both] + [right] * 9,
            "1 of 11 tuned answers is unparseable, 2 of the original's are; ",
        ),
        ([right] * 12, "no tuned answer is unparseable; "),
    ):
        assert said in html.unescape(shown(render(run_in_memory(answers, "icd"))))


def test_tests_of_one_and_of_two_sides_are_told_apart():
    text = shown(render(run_in_memory([("C61", "C61", "C20")] * 7, "icd")))
    tests = text[text.index("Tests The Wilcoxon test asks") :]
    assert re.search(r"a p near 1 says that it is worse or no better\. .*either direction", tests)
    # Seven cases that only the original gets right: Wilcoxon's p beside McNemar's.
    assert "1.0000 1.0000 7 0 0.0156" in tests
    assert "worse or no better" in DEFINITIONS["Wilcoxon p"]
    assert "either direction" in DEFINITIONS["McNemar p"]


def test_the_ceiling_is_a_share_and_then_its_task():
    run = dataclasses.replace(
        run_in_memory([("C61", "", "C61")] * 12, "icd"), ceiling={"icd": 0.959}
    )
    text = shown(render(run)).replace("\N{NO-BREAK SPACE}", " ")
    assert "no tuned answer is unparseable, all of the original's are; the ceiling is 95.9 % " in (
        html.unescape(text)
    )
    assert "the ceiling is 95.9 % (ICD-10-CM code)." in text
    assert "of the tuned model is wrong; the ceiling is 95.9 %." in text
    assert "on average" in DEFINITIONS["Ceiling"]


HYPHEN = r"(?<![^\s(>])-\.?\d"  # that is the sign of a number


def test_a_minus_sign_is_no_hyphen_on_the_page_and_none_but_that_in_report_json():
    run = run_in_memory([("C61", "C61", "C20")] * 12 + [("C20", "", "C20")] * 8, "icd")
    content = build_report([dataclasses.replace(run, training=run.held_out)], bootstrap=20)
    for include_text in (True, False):
        content = content if include_text else publish(content)
        page = render_page(content, [run], include_text=include_text)
        text = shown(re.sub("<pre.*?</pre>", " ", page, flags=re.DOTALL))
        assert not re.search(HYPHEN, text), re.search(HYPHEN, text)
        difference = content["tasks"]["icd"]["tests"]["difference"]
        assert difference["value"] == pytest.approx(-0.2)

        assert "\N{MINUS SIGN}0.200" in text
        assert "(difference \N{MINUS SIGN}20.0 points, 95 % interval \N{MINUS SIGN}" in text
        assert "from \N{MINUS SIGN}1 to 1" in text
        written = json.dumps(content, ensure_ascii=False)
        assert "\N{MINUS SIGN}" not in written and "(difference -20.0 points" in written
    kept = (
        "ICD-10-CM ROUGE-1 F1, 0-39, 1e-05, 2a-2l, C50.9 - C61, x-1, doi 10.1038/s41591-024-03425"
    )
    assert typeset(kept) == kept
    assert typeset("-0.5 (-3 to .5)") == "\N{MINUS SIGN}0.5 (\N{MINUS SIGN}3 to .5)"


# 97.6 % of the cases, 1.5: a full stop that ends no sentence has no space behind it.
SENTENCE_END = r"[.!?](?=\s|$)"


@pytest.mark.parametrize("task", ["all", "icd", "regimen", "modality"])
@pytest.mark.parametrize("right", [(0.3, 0.8), (0.8, 0.3), (0.0, 0.0), (1.0, 1.0)])
def test_the_first_screen_has_three_sentences_and_one_table(tmp_path, task, right):
    run = read_run(make_run(tmp_path / "run", make_cohort(tmp_path / "cohort"), task, right))
    examples = {"original_examples": run.predictions["tuned"]}
    metrics = {"original_examples": run.metrics["tuned"]}
    run = dataclasses.replace(
        run, predictions=run.predictions | examples, metrics=run.metrics | metrics
    )
    page = render(run)
    first = page[page.index('<section id="found"') : page.index("<nav")]
    assert page.index("<h1>") < page.index('<section id="found"') and "<h3" not in first
    before, sentences, after = re.split(r'<div class="found">(.*?)</div>', first, flags=re.DOTALL)
    said = [re.sub(r"<[^>]*>", "", part) for part in re.findall("<p>(.*?)</p>", sentences)]
    starts = ("Tuning ", "Against simple baselines: ", "How sure: ")
    assert [part.startswith(start) for part, start in zip(said, starts, strict=True)] == [True] * 3
    assert [len(re.findall(SENTENCE_END, part)) for part in said] == [1] * 3
    assert all(part.endswith(".") for part in said)
    assert before.count("<p") == after.count("<p>") == before.count("<table") == 0
    assert after.count("<table") == 1 and after.index("<table") < after.index("<figure")
    rows = re.search("<tbody.*?</tbody>", after, re.DOTALL)[0].count("<tr")
    assert rows == len(run.predictions["tuned"]) == (3 if task == "all" else 1)


def test_where_no_answer_is_right_the_first_screen_names_no_rival():
    run = run_in_memory([("C61", "", "C20")] * 12, "icd")
    training = run_in_memory([("C18.9", "", "")] * 12, "icd").held_out
    examples = {"original_examples": run.predictions["tuned"]}
    metrics = {"original_examples": run.metrics["tuned"]}
    text = shown(
        render(
            dataclasses.replace(
                run,
                predictions=run.predictions | examples,
                metrics=run.metrics | metrics,
                training=training,
            )
        )
    )
    assert (
        "Against simple baselines : no answer of the tuned model or of any simple baseline is "
        "right on the ICD-10-CM code; the tuned model has no right answer, and the original model "
        "in the way that is named in brackets has none either, on the ICD-10-CM code (with "
        "examples in its prompt)."
    ) in text


BASE = {
    "base": {
        "folder": "/home/j.doe/weights/mistral-7b",
        "sha256": {name: "a7caac16391deefe" for name in ("config.json", "model.safetensors")},
    },
    "cohort": {"folder": "/home/j.doe/clinic_2024", "manifest_sha256": "2b7b25b47d375c28" * 4},
    "architecture": {"name": "MistralForCausalLM", "layers": 32, "parameters": 7241732096},
}


def test_the_first_screen_names_base_cohort_and_cases():
    run = run_in_memory(
        [("C61", "", "C61")] * 12, "icd", patients=[f"p{i // 2}" for i in range(12)]
    )
    told = run.provenance | {"model": "/home/j.doe/weights/mistral-7b", "manifest": BASE}
    run = dataclasses.replace(run, provenance=told, cohort={"ceiling": {"icd": 0.9}})
    content = build_report([run, run], bootstrap=0)
    begin = (
        "Base model: mistral-7b (MistralForCausalLM, 32 layers, 7.2 B parameters; "
        "model.safetensors SHA-256 a7caac16391d). Cohort: "
    )
    end = "Split test: 12 cases of 6 patients. The cases are synthetic."
    digest = "manifest SHA-256 2b7b25b47d37"
    assert content["about"] == [f"{begin}clinic_2024 ({digest}). {end}"]
    for form, include_text in ((content, True), (publish(content), False)):
        page = render_page(form, [run, run], include_text=include_text)
        text = shown(page)
        (about,) = form["about"]
        assert text.index(about) < text.index("What was found")
        assert "Mistral ForCausalLM 32 layers, 7.2 B parameters mistral-7b" in text
    assert about == f"{begin}{digest}. {end}" and "clinic_2024" not in page and "j.doe" not in page

    # What nothing tells is left out, and runs that differ are named.
    other = run_in_memory([("C61", "", "C61")], "icd", name="other")
    folder = {"model": "hub/base", "manifest": {"parameters": {"trainable": 9, "frozen": 2786560}}}
    lora = {"trainable": "lora", "precision": {"base": "float32"}}
    older = dataclasses.replace(other, name="older", provenance=folder, config=lora)
    coded = dataclasses.replace(older, config=lora | {"precision": {"base": "nf4"}})
    bare = dataclasses.replace(other, name="bare", provenance={"manifest": {}})
    about = build_report([older, coded, other, bare], bootstrap=0)["about"]
    plain = "Split test: 1 case of 1 patient."
    assert about == [
        f"older: Base model: base (2.8 M parameters). {plain}",
        f"older (2) and other: Base model: base. {plain}",
        f"bare: {plain}",
    ]
    text = shown(render(older, bare))
    assert "Original base 2.8 M parameters 0.000" in text and "Original not stated 0.000" in text


def test_the_sentences_of_the_first_screen_stand_in_report_json():
    runs = [full_run(), run_in_memory([(RIGHT, "", RIGHT)] * 12, name="regimens & co")]
    for include_text in (True, False):
        content = build_report(runs, bootstrap=20)
        content = content if include_text else publish(content)
        page = render_page(content, runs, include_text=include_text)
        found = re.search(r'<div class="found">(.*?)</div>', page, re.DOTALL)[1]
        sentences = [re.sub("<[^>]*>", "", part) for part in re.findall("<p>(.*?)</p>", found)]
        assert [html.unescape(part) for part in sentences] == [
            typeset(sentence) for sentence in content["findings"]
        ]
        assert len(content["findings"]) == 3 and "<" not in "".join(content["findings"])
    assert build_report([])["findings"] == []
    # The published form takes none of them over: it makes them of what it shows.
    private = build_report(runs, bootstrap=0)
    other = private | {"findings": ["of a patient"], "about": ["of a patient"]}
    assert publish(other)["findings"] == private["findings"]
    assert "of a patient" not in json.dumps(publish(other))


def held_to_sets(run, answers, *, examples=None):
    """The run, whose original model gave further answers: those of the tuned model of `answers`."""
    variants = {"original_constrained": answers} | (
        {} if examples is None else {"original_examples": examples}
    )
    return dataclasses.replace(
        run,
        predictions=run.predictions | {k: v.predictions["tuned"] for k, v in variants.items()},
        metrics=run.metrics | {k: v.metrics["tuned"] for k, v in variants.items()},
    )


def test_the_original_held_to_closed_sets_stands_in_the_first_table():
    half = run_in_memory([("C61", "", "C61")] * 12 + [("C61", "", "C20")] * 12, "icd")
    right = run_in_memory([("C61", "", "C61")] * 24, "icd")
    wrong = run_in_memory([("C61", "", "C20")] * 24, "icd")

    def first(run):
        page = render(run)
        section = page[page.index('<section id="found"') : page.index("<nav")]
        rows = re.search("<tbody.*?</tbody>", section, re.DOTALL)[0]
        cells = dict(re.findall(r'data-label="(.*?)"[^>]*><div>(.*?)</div>', rows))
        return cells, shown("</style>" + section)

    name = "Original, constrained"
    cells, text = first(half)
    assert name not in cells and "Tuned beats it" not in cells
    cells, text = first(held_to_sets(half, wrong))
    assert cells[name].startswith("0.000") and cells["Tuned beats it"] == "yes"
    assert "held to closed sets" not in text
    cells, text = first(held_to_sets(half, half))
    assert cells[name].startswith("0.500") and "unclear" in cells["Tuned beats it"]
    said = "as far as these cases tell, on the ICD-10-CM code (held to closed sets of answers 50.0"
    assert said in text
    # Each rival that is not beaten is named, not the worst alone.
    cells, text = first(held_to_sets(half, half, examples=right))
    assert said in text and "; the original model does better without tuning on the ICD" in text
    assert "(with examples in its prompt 100.0 %, tuned 50.0 %)" in text
    cells, text = first(held_to_sets(half, right))
    assert cells[name].startswith("1.000") and "<strong>no</strong>" in cells["Tuned beats it"]
    assert (
        "; the original model does better without tuning on the ICD-10-CM code (held to closed "
        "sets of answers 100.0 %, tuned 50.0 %)."
    ) in text
    # A task that was not asked so has dashes beside one that was.
    other = run_in_memory([(RIGHT, "", RIGHT)] * 12, name="regimens")
    page = render(held_to_sets(half, right), other)
    assert f'data-label="{name}"><div>{DASH}</div>' in page


def test_one_patient_has_defined_figures():
    answers = [("C61", "C20", "C61"), ("C20", "C20", "C20"), ("C61", "C61", "C20")]
    text = shown(render(run_in_memory(answers, "icd", patients=["one"] * 3)))
    assert not re.search(NO_FIGURE, text)


def test_every_measure_that_the_page_shows_has_a_definition():
    """All words of a name, whole, in one and the same definition."""

    def words(text):
        return set(re.findall(r"[a-z0-9%'-]+", text.replace("_", " ").lower()))

    defined = [words(f"{term} {text}") for term, text in DEFINITIONS.items()]
    shown_names = [*SCORES.values(), *EFFECTS.values(), *codes.DEPTHS, *codes.ERRORS]
    shown_names += [*robustness.PERTURBATIONS, *map(name_of, (*VARIANTS, *BASELINES))]
    shown_names += ["Holm", "McNemar p", "ECE", "Brier score", "Coverage at 5 % error"]
    shown_names += ["Conformal sets", "Simple baseline, the hardest to beat", "Ceiling"]
    lacking = [name for name in shown_names if not any(words(name) <= one for one in defined)]
    assert lacking == []


@pytest.mark.parametrize("include_text", [True, False])
def test_one_thing_has_one_name(include_text):
    unparseable = run_in_memory([(RIGHT, "", RIGHT)] * 12 + [(RIGHT, "", "none")] * 12, name="r")
    page = render(full_run(), unparseable, include_text=include_text)
    others = ("unreadable", "not be read", "can be read[,;.]", "best reachable", "no reader")
    for other in others:
        for told in (shown(page), embedded_script(page)):
            assert not re.search(other, told, re.IGNORECASE), other
    assert page.count("<dt>Ceiling</dt>") == 1 and "<dt>Unparseable, unfinished</dt>" in page
    assert ">Unparseable<" in page and ">Ceiling<" in page


def test_whole_decimals_are_told_of_regimens_alone():
    codes = run_in_memory([("C50.911", "C20", "C50.911")] * 12, "icd", name="codes")
    modalities = run_in_memory([("photon", "", "photon")] * 12, "modality", name="modalities")
    name = SCORES["rouge1_decimal"]
    page = render(codes, modalities)
    assert name not in page.partition('<section id="definitions"')[0]
    assert "whole decimal" not in page
    page = render(codes, modalities, run_in_memory([(RIGHT, "", RIGHT)] * 12, name="regimens"))
    table = page[page.index('<section id="scores"') : page.index('<section id="tests"')]
    heads = re.findall(r"<th scope=\"col\".*?>(.*?)</th>", table)
    rows = [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row) for row in table.split("<tr>")[2:]]
    cells = {row[0].partition(" ")[0]: row[heads.index(name)] for row in rows}
    assert cells["Modality"] == cells["ICD-10-CM"] == DASH
    assert cells["Treatment"].startswith("1.000")
    assert "whole decimal" in page


def test_definitions_say_what_a_reader_may_take_for_more():
    simple = DEFINITIONS["Simple baselines"]
    assert "20,000 most frequent words and pairs of words" in simple
    assert "20,000 training cases, drawn at random, and of their answers the 300 most" in simple
    assert "capped and not tuned" in simple and "number of neighbours, is 5 and C, the" in simple
    assert "Each rival's p is its own, not adjusted for how many there are" in simple
    assert "chosen and measured on these same cases" in DEFINITIONS["Calibration"]
    customary = DEFINITIONS["Regimens, field by field"]
    assert "whatever the stage and the intent, so that a palliative dose counts too" in customary


def test_runs_that_were_not_compared_are_named_with_the_reason(tmp_path):
    runs = [
        run_in_memory([("C61", "", "C61")] * 3, "icd", name="mistral & co"),
        run_in_memory([("C61", "", "C61")] * 4, "icd", name="llama"),
        run_in_memory([("C61", "", "C20")] * 3, "icd", name="other"),
    ]
    for include_text in (True, False):
        content = report.write_runs(runs, tmp_path, include_text=include_text, bootstrap=0)
        entry = content["tasks"]["icd"]
        why = {"run": "mistral & co", "why": "they were not asked the same cases"}
        assert [e["not_compared"] for e in entry["further_runs"]] == [why, None]
        assert entry["not_compared"] is None
        text = shown((tmp_path / "report.html").read_text())
        assert text.count("Not compared") == 1
        assert (
            "Not compared : ICD-10-CM code, the tuned models of llama and mistral &amp; co: they "
            "were not asked the same cases."
        ) in text
    told = "icd: llama not compared with mistral & co: they were not asked the same cases"
    assert told in report.describe(content, tmp_path).splitlines()
    assert "Not compared" not in shown(render(runs[0], runs[2]))


def test_a_report_without_any_task_says_so():
    content = build_report([])
    assert "This report holds no evaluation." in render_page(content, [])


def test_embedded_data_cannot_leave_its_element():
    content = {"text": "</script><!-- & \u2028\u2029 \ud800 'x' \"y\" \\ é", "n": [1, None]}
    text = embed_json(content)
    assert text.isascii() and not set("<>&") & set(text)
    assert json.loads(text) == content


def test_half_a_surrogate_pair_is_no_error():
    page = render(run_in_memory([("C61", "\ud800", "C61 \udfff")], "icd"))
    page.encode("utf-8")


def test_the_explorer_holds_every_text_and_orders_by_nearness():
    answers = [(RIGHT, HOSTILE, RIGHT), (RIGHT, RIGHT, "no idea"), (RIGHT, "", WRONG_DOSE)]
    page = render(run_in_memory(answers, logprobs=[-0.1, None, -2.0], sites=["a", None, "b"]))
    data = embedded(page)
    assert [row[2] for row in data["cases"]] == ["case-2", "case-1", "case-0"]
    closest = data["cases"][0]
    texts = data["texts"]
    assert texts[closest[4]] == f"{HOSTILE} number 2" and texts[closest[5]] == RIGHT
    assert texts[closest[3]] == "b" and data["cases"][1][3] is None
    assert texts[closest[7][0]] == WRONG_DOSE
    assert [row[7][1] for row in data["cases"]] == [0, 2, 1]  # wrong, unparseable, right
    assert data["cases"][1][7][2] is None and closest[7][2] == 0.1353


def test_a_very_large_run_leaves_right_cases_out_and_says_so():
    answers = [("C61", "C61", "C61")] * (MOST_CASES + 30) + [("C61", "C61", "C20")] * 40
    page = render(run_in_memory(answers, "icd"))
    cases = embedded(page)["cases"]
    assert len(cases) == MOST_CASES
    assert sum(row[7][1] == 0 for row in cases) == 40
    assert f"70 of {MOST_CASES + 70:,} cases are left out" in shown(page)


def test_runs_are_named_where_they_share_a_task():
    runs = [
        run_in_memory([("C61", "C20", "C61")] * 3, "icd", name="mistral"),
        run_in_memory([("C61", "C20", "C20")] * 3, "icd", name="llama & co"),
        run_in_memory([(RIGHT, "", RIGHT)] * 3, name="alone"),
    ]
    page = render(*runs)
    text = shown(page)
    assert "the ICD-10-CM code (mistral) from 0.0" in text
    assert "brought no right answer on the ICD-10-CM code (llama &amp; co), where" in text
    assert "the treatment regimen from 0.0" in text and "regimen (alone)" not in text
    # The paper's table has two rows for each run.
    table = page[page.index('id="paper"') : page.index('id="scores"')]
    assert table.count("<tr>") == 1 + 2 * 3


def test_two_adapters_are_compared_on_the_same_cases(tmp_path):
    old = run_in_memory([("C61", "", "C20")] * 6 + [("C20", "", "C20")] * 3, "icd", name="old")
    new = run_in_memory([("C61", "", "C61")] * 6 + [("C20", "", "C61")] * 3, "icd", name="new")
    content = report.write_runs([old, new], tmp_path, bootstrap=20)
    tests = content["tasks"]["icd"]["further_runs"][0]["against"]["tests"]
    assert (tests["mcnemar"]["only_original"], tests["mcnemar"]["only_tuned"]) == (3, 6)
    text = shown((tmp_path / "report.html").read_text())
    assert re.search(r"on the same cases\. .*ICD-10-CM code new old \+0\.333", text)


def test_variants_probes_and_conformal_sets_stand_where_there_are_any(tmp_path):
    answers = [("C50.911", "", "C50.911")] * 14 + [("C50.912", "", "C50.911")] * 6
    run = run_in_memory(answers, "icd")
    plain = shown(render(run))
    for absent in ("Change of the text", "Wanted coverage", "Tuned, constrained"):
        assert absent not in plain
    probes = {
        "flip_side": {"n": 20, "rate": 0.25, "low": 0.1, "high": 0.4, "expected": "flips"},
        "synonyms": {"n": 0, "rate": None, "low": None, "high": None, "expected": "same"},
    }
    tuned = {"tuned_constrained": run.predictions["tuned"]}
    full = dataclasses.replace(
        run,
        predictions=run.predictions | tuned,
        metrics=run.metrics | {"tuned_constrained": run.metrics["tuned"]},
        validation={"tuned": run.predictions["tuned"]},
        robustness={"tuned": {"icd": probes}},
    )
    text = shown(render(full))
    assert "Flip side flip 20 0.250 0.100 to 0.400" in text
    assert "Synonyms stay the same 0 &ndash;" in text and "Cases, original" not in text
    # Of another number of answers that can be read, the original has its own.
    other = {"icd": {"flip_side": probes["flip_side"] | {"n": 3}}}
    both = dataclasses.replace(full, robustness={"original": other} | full.robustness)
    assert "Flip side flip 3 0.250 0.100 to 0.400 20 0.250 0.100 to 0.400" in shown(render(both))
    assert "ICD-10-CM code Tuned, constrained 20 0.700" in text
    assert re.search(
        r"Conformal sets Wanted coverage .* the answer, or any 0\.900 [01]\.\d{3}", text
    )


def test_answers_that_are_left_out_are_told_before_the_figures_of_the_task():
    answers = [("C61", "C20", "C61")] * 3
    line = "test/tuned_constrained: not of the same checkpoint <&> cohort; evaluate it again"
    mixed = dataclasses.replace(run_in_memory(answers, "icd", name="mixed"), left_out=(line,))
    whole = run_in_memory(answers, "icd", name="whole")
    for include_text in (True, False):
        page = render(mixed, whole, include_text=include_text)
        part = page[page.index('id="task-icd"') : page.index('id="cases"')]
        told = part.index("<strong>Left out of this report, mixed.</strong>")
        assert told < part.index("In short, mixed") < part.index("In short, whole")
        assert part.count("<li>") == 1 and f"<li>{html.escape(line)}</li>" in part
    assert "Left out of this report" not in render(whole)


def test_the_first_screen_says_where_the_original_needs_no_tuning():
    run = run_in_memory([("C61", "", "C61")] * 12 + [("C61", "", "C20")] * 8, "icd")
    all_right = run_in_memory([("C61", "C61", "C61")] * 20, "icd")
    nearly = run_in_memory([("C61", "", "C61")] * 11 + [("C61", "", "C20")] * 9, "icd")
    better = (
        "; the original model does better without tuning on the ICD-10-CM code (with examples in"
    )
    unclear = (
        "; the original model without tuning is not told apart from the tuned one, as far as these "
        "cases tell, on the ICD-10-CM code (with examples in its prompt 55.0"
    )
    for examples, model, training, difference, said in (
        (run, "original", run.held_out, "+0.600", ""),
        (all_right, "tuned", run.held_out, "\N{MINUS SIGN}0.400", better),
        (all_right, "tuned", (), "\N{MINUS SIGN}0.400", better),  # without baselines
        (nearly, "tuned", run.held_out, "+0.050", unclear),
    ):
        helped = dataclasses.replace(
            run,
            predictions=run.predictions | {"original_examples": examples.predictions[model]},
            metrics=run.metrics | {"original_examples": examples.metrics[model]},
            training=training,
        )
        page = render(helped)
        first = shown(page[: page.index('id="paper"')])
        assert ("none was computed" in first) is (not training)
        assert [text in first for text in (better, unclear)] == [
            text == said for text in (better, unclear)
        ]
        rivals = shown(page).partition("against what needs no tuning")[2]
        assert f"ICD-10-CM code Original with examples {difference}" in rivals


def test_the_first_screen_and_the_task_agree_on_how_sure_the_gain_is():
    # 5 of 40 that only the tuned model gets right: Wilcoxon p 0.031, McNemar's two-sided 0.0625.
    answers = [("C61", "", "C61")] * 5 + [("C61", "C61", "C61")] * 35
    text = shown(render(run_in_memory(answers, "icd")))
    assert "in the one comparison, but there McNemar&#x27;s exact two-sided test" in text
    assert "chance alone" not in text
    assert "a gain, but McNemar&#x27;s exact two-sided test does not (p = 0.0625)" in text
    # 3: neither finds it, and both say so.
    text = shown(render(run_in_memory(answers[2:], "icd")))
    assert (
        "gain is not significant (one-sided Wilcoxon at 5 %, after Holm) in the one" in text
        and "chance alone could explain" in text
    )
    # 12: both do.
    text = shown(render(run_in_memory(answers[:1] * 7 + answers, "icd")))
    assert (
        "the gain is significant" in text
        and "in the one comparison; " in text
        and "finds a gain, but" not in text
    )


def test_significance_rests_on_patients_where_they_have_several_cases():
    # 3 of 12 patients of 4 cases each: 12 cases differ, and by case p is 2^-12, by patient 2^-3.
    answers = [("C61", "", "C61")] * 12 + [("C61", "C61", "C61")] * 36
    several = run_in_memory(answers, "icd", patients=[f"p{i // 4}" for i in range(48)])
    alone = run_in_memory(answers, "icd", name="alone")
    page = render(several)
    text = shown(page)
    first = shown(page[: page.index('id="paper"')])
    assert "not significant (one-sided Wilcoxon by patient at 5 %, after Holm)" in first
    assert "p (Wilcoxon, by patient)" in first and "p is one-sided (Wilcoxon, by patient)" in first
    assert "0.1250" in first and "0.0002" not in first
    assert "one-sided Wilcoxon by patient p = 0.1250), which chance alone could explain" in text
    tests = text[text.index("Tests The Wilcoxon test asks") :]
    assert "by patient after Holm" in tests
    # By case, after Holm; McNemar's of two sides, twice; by patient, after Holm, of two sides.
    assert re.search(r"0\.0002 0\.0002 0 12 0\.0005 0\.0005 .* 0\.1250 0\.1250 0\.2500", tests)
    # Beside a run of one case a patient Holm is over the tests by patient, and named so.
    both = build_report([several, alone], bootstrap=20)["tasks"]["icd"]
    p = both["further_runs"][0]["tests"]["wilcoxon_by_patient"]["p_holm"]
    assert p == pytest.approx(2 * 2**-12)
    first = shown(render(several, alone)).partition("The paper")[0]
    assert (
        "the gain is significant (one-sided Wilcoxon by patient at 5 %, after Holm) in 1 of"
        in first
    )
    # One case a patient: nothing is said of it.
    assert "by patient" not in shown(render(alone)).partition("Definitions Accuracy")[0].replace(
        "95 % interval by patient", ""
    )


def test_a_published_report_hides_small_groups(tmp_path):
    answers = [("C61", "C61", "C61")] * 20 + [("C34.11", "C34.11", "C34.11")] * 12
    answers += [("C20", "C61", "C50.911")] * 7 + [("C19", "C61", "C50.911")] * 6
    runs = [run_in_memory(answers, "icd", name="icd", sites=["a"] * 32 + ["b"] * 8 + ["tiny"] * 5)]
    report.write_runs(runs, tmp_path, include_text=False, bootstrap=20)
    page = (tmp_path / "report.html").read_text()
    public = json.loads((tmp_path / "report.json").read_text())
    classes = public["tasks"]["icd"]["tuned"]["per_class"]
    assert classes["C20"] == {"precision": None, "recall": None, "f1": None, "support": "<11"}
    text = shown(page)
    assert "2 small classes are not shown" in text
    groups = text[text.index("Accuracy in subgroups. Group") :]
    assert re.search(r"Site: hidden hidden &ndash; &ndash;", groups) and "tiny" not in page
    for hidden in ("pwned", "case-1"):
        assert hidden not in page and hidden not in json.dumps(public)


def test_no_small_count_of_a_confusion_matrix_can_be_worked_out():
    answers = [("photon", "photon", "photon")] * 40 + [("photon", "", "proton")] * 3
    answers += [("photon", "", "electron")] * 20 + [("proton", "", "photon")] * 12
    runs = [run_in_memory(answers, "modality")]
    confusion = publish(build_report(runs, bootstrap=0))["tasks"]["modality"]["tuned"]["confusion"]
    row = dict(zip(confusion["labels"], confusion["matrix"][0], strict=True))
    # Had only the 3 been hidden, the row's sum would tell them.
    assert row["proton"] is None and row["electron"] is None and row["photon"] == 40
    assert "<span>hidden</span>" in render(*runs, include_text=False)


MANIFEST = {
    "base": {"sha256": {"model.safetensors": "a7caac16391deefe"}},
    "parameters": {"trainable": 299008, "frozen": 2786560},
    "environment": {"python": "3.11.7", "versions": {"jax": "0.10.2"}, "code_revision": "31f9b65"},
}
COHORT = {
    "assessed": 7000,
    "kept": 3515,
    "excluded": {"several_diagnoses": 1537},
    "cases": {"train": 2917, "test": 422},
    "patients": {"train": 2900, "test": 420},
    "deidentification": {"policy": "redact", "rows": 3, "classes": {"date": 4}},
}


def disclosed(manifest=MANIFEST, cohort=COHORT, **changes):
    run = run_in_memory([(RIGHT, "", RIGHT)] * 4)
    told = {"provenance": {"manifest": manifest}, "cohort": cohort} | changes
    return build_report([dataclasses.replace(run, **told)], bootstrap=20)["disclosure"]["run"]


def answered(**told):
    """Items by their number, and what is told of them."""
    return {row["item"]: row["answer"] for row in disclosed(**told)["tripod_llm"]["items"]}


def test_model_card_tells_the_manifests_and_leaves_the_rest_to_people():
    card = disclosed()["model_card"]
    assert "299,008 parameters trained, 2,786,560 frozen" in card["Model"]["What was trained"]
    assert "train 2,917 cases of 2,900 patients" in card["Data"]["Splits"]
    assert card["Data"]["Left out"].startswith("Left out, by first reason: several diagnoses 1,537")
    assert "3 rows (date)" in card["Data"]["Identifiers"]
    assert card["Data"]["Approval and consent"] is None
    result = card["Evaluation"]["Treatment regimen"]
    assert result.startswith("accuracy 0.0 % (0.0 to ") and result.endswith("tuned, n 4.")


def test_tripod_items_are_filled_from_manifests_and_blank_without_them():
    rows = answered()
    assert len(rows) == len(TRIPOD_LLM)
    assert rows["14f"] == "Code revision 31f9b65." and "jax" not in rows["14f"]
    for for_people in ("2a-2l", "3a", "3b", "13", "14a", "14b", "15", "19a", "19d"):
        assert rows[for_people] is None
    bare = answered(manifest={}, cohort={})
    for unknown in (
        "5a",
        "5d",
        "5e",
        "6b",
        "6c",
        "6e",
        "9a",
        "9b",
        "12",
        "14f",
        "16a",
        "16b",
        "16c",
    ):
        assert bare[unknown] is None
    assert not any("None" in (text or "") for text in (rows | bare).values())


AGREEMENT = {
    "decision": {"n": 80, "equal": 0.75, "kappa": 0.4567},
    **{name: {"n": 48, "equal": 1.0, "kappa": None} for name in ("modality", "regimen", "icd10")},
    "exclude_reason": {"n": 12, "equal": 1.0, "kappa": 1.0},
}
ANNOTATION = {
    "files": [
        {"name": "dr_doe.csv", "sha256": "1a", "entries": 120},
        {"name": "dr_roe.csv", "sha256": "1b", "entries": 80},
    ],
    "annotated_twice": 80,
    "agreement": AGREEMENT,
    "adjudication": {"name": "dr_poe.csv", "sha256": "1c", "entries": 20},
    "rows_offered": 30,
}


def test_annotators_and_their_agreement_are_told_of_where_there_were_any():
    told = answered(cohort=COHORT | {"annotation": ANNOTATION})
    assert told["8b"] == (
        "2 annotators and an adjudicator. Rows annotated: 120, by both: 80. All other labels come "
        "from the records."
    )
    assert told["8c"] == (
        "Share of equal entries of two annotators and Cohen's kappa, where it is defined: decision "
        "(n 80) equal 0.75 kappa 0.46; modality (n 48) equal 1.00; regimen (n 48) equal 1.00; "
        "icd10 (n 48) equal 1.00; exclude reason (n 12) equal 1.00 kappa 1.00. Their background: "
        "for the authors."
    )
    none = {name: {"n": 0, "equal": None, "kappa": None} for name in AGREEMENT}
    one = {"files": ANNOTATION["files"][:1], "annotated_twice": 0, "agreement": none}
    told = answered(cohort=COHORT | {"annotation": one})
    assert told["8b"].startswith("1 annotator. Rows annotated: 120. All other") and not told["8c"]
    told = answered(cohort=COHORT | {"annotation": {"rows_offered": 30}})
    assert told["8b"] is told["8c"] is None
    assert "dr_" not in json.dumps(disclosed(cohort=COHORT | {"annotation": ANNOTATION}))


def test_the_published_form_tells_no_file_name_and_no_small_number_of_annotated_rows():
    few = {name: {"n": 9, "equal": 1.0, "kappa": 0.8765} for name in AGREEMENT}
    annotation = ANNOTATION | {"agreement": AGREEMENT | {"exclude_reason": few["decision"]}}
    origin = {"source": {"name": "dr_doe_extract.csv", "sha256": "8fd3" * 16}}
    run = run_in_memory([("C61", "C20", "C61")] * 4, "icd")
    run = dataclasses.replace(run, cohort=COHORT | origin | {"annotation": annotation})
    content = build_report([run], bootstrap=0)
    assert "dr_doe_extract.csv" in render_page(content, [run])
    public = publish(content)
    page = render_page(public, [run], include_text=False)
    for text in (json.dumps(public), page):
        assert "dr_" not in text and "0.8765" not in text and "0.88" not in text
    rows = {
        row["item"]: row["answer"] for row in public["disclosure"]["run"]["tripod_llm"]["items"]
    }
    assert rows["5a"].startswith("One extract for all splits (SHA-256 begins 8fd38fd38fd3).")
    assert rows["8c"].endswith("exclude reason (n <11). Their background: for the authors.")


RULES = ["patient_known", "diagnosis_present", "regimen_complete", "code_present", "code_valid"]
CONFIG = {
    "cohort": "/home/j.doe/cohort",
    "model": "base",
    "task": "all",
    "seed": 3,
    "lora": {"rank": 8, "init_from": "/home/j.doe/other"},
    "batch": {"examples": 64, "over_length": "trim_diagnosis"},
    "optimizer": {"learning_rate": 0.0003},
    "decode": {"batch": 16, "max_new_tokens": 48},
}


def with_variants(run, **settings):
    """The run with further ways of answering, each of which says what the tuned model says."""
    variants = {name: run.predictions["tuned"] for name in settings}
    answers = {"tuned": {"max_new_tokens": 40, "step": 70}} | settings
    return dataclasses.replace(
        run,
        predictions=run.predictions | variants,
        metrics=run.metrics | {name: run.metrics["tuned"] for name in settings},
        provenance=run.provenance | {"answers": answers},
    )


def items_of(run):
    items = build_report([run], bootstrap=0)["disclosure"]["run"]["tripod_llm"]["items"]
    return {row["item"]: row["answer"] for row in items}


def test_where_labels_are_scored_no_item_calls_the_answer_decoded_text_alone():
    run = run_in_memory([("photon", "proton", "photon")] * 4, "modality")
    plain = items_of(with_variants(run))
    assert plain["6e"].startswith("The answer is read from greedily decoded text, without a")
    assert "scored, and" not in plain["6e"]
    assert plain["6b"].startswith("Greedy (temperature 0), at most 40 new tokens.")
    closed = {"constraints": {"modality": "labels 1a"}}
    told = items_of(with_variants(run, tuned_constrained=closed))["6e"]
    assert "Tuned, constrained to the labels (Modality): every label is scored, and" in told
    run = run_in_memory([("C61", "C20", "C61")] * 4, "icd")
    closed = {"constraints": {"icd": "codes 1a"}, "constrained": "cohort"}
    told = items_of(with_variants(run, original_constrained=closed))["6e"]
    assert "constrained to the cohort's codes (ICD-10-CM code): the text can only become" in told


def test_training_cases_in_prompts_are_told_of_where_there_are_any():
    run = run_in_memory([("C61", "C20", "C61")] * 4, "icd")
    without = items_of(with_variants(run))
    assert without["9b"].startswith("No case stands in a prompt but the one that is asked.")
    assert "training case" not in without["9a"]
    shown = items_of(with_variants(run, original_examples={"examples": 5, "seed": 3}))
    told = "Original with 5 examples: 5 training cases of the cohort, drawn with seed 3,"
    assert f"{told} with the right answers before it." in shown["9a"]
    assert shown["9b"].startswith(f"{told} in each prompt. In other prompts no case")
    assert (
        "an untold number of training cases"
        in items_of(with_variants(run, original_examples={"max_new_tokens": 40}))["9b"]
    )


def test_what_was_left_out_of_the_cohort_is_told_by_its_rules():
    told = answered(cohort=COHORT | {"rules": RULES}, config=CONFIG)["19e"]
    assert told.startswith(
        "Left out beforehand: cases without diagnosis text, without dose and fractions that agree, "
        "without one ICD-10-CM code, with a code that cannot be billed. A diagnosis text that is "
        "too long for the model is cut at its end. An unparseable answer counts"
    )
    assert "Treatment regimen 0 of 4 tuned" in told
    skipped = COHORT | {"rules": RULES[:-1], "rules_turned_off": ["code_valid"]}
    assert "billed" not in answered(cohort=skipped)["19e"]
    assert answered(cohort={})["19e"].startswith("An unparseable answer counts")


def test_no_item_tells_what_no_manifest_tells():
    rows = answered(cohort=COHORT | {"rules": RULES}, config=CONFIG)
    for unproven in ("imputed", "weighted", "alignment step"):
        assert not any(unproven in (text or "") for text in rows.values())
    assert "field by field" in rows["6f"]
    modality = run_in_memory([("photon", "", "photon")] * 3, "modality")
    assert "field by field" not in items_of(modality)["6f"]
    trained = dataclasses.replace(
        modality,
        split="train",
        metrics={m: {"modality": v["modality"] | {"split": "train"}}
                 for m, v in modality.metrics.items()},
    )  # fmt: skip
    assert "on the same training cases (split train)" in items_of(trained)["4"]
    assert "held-out" in items_of(modality)["4"] and "held-out" not in shown(
        render(trained).partition('<section id="definitions"')[0]
    )
    manifest = MANIFEST | {"best_step": 50}
    other = disclosed(
        manifest, provenance={"manifest": manifest, "answers": {"tuned": {"step": 70}}}
    )
    assert (
        "step 50 was chosen on validation; that of step 70 gave these answers."
        in (other["model_card"]["Model"]["What was trained"])
    )


# -- every figure of the page stands in report.json ------------------------------------------

# Words of the page itself with digits in them: names, limits and units that no report changes.
FIXED = """ROUGE-1 F1 ICD-10-CM TRIPOD-LLM 95 5 0.8 1 0.0001 (95 10.1038/s41591-024-03425-5 2025 11
    2a-2l""".split()
TICKS = ("0", "0.2", "0.4", "0.6", "0.8", "1", "1.0", "\N{MINUS SIGN}1", "+1")
COUNTED = r"\d+ small classes are not shown"  # the rows of the report that the page leaves out


def standing_in(value, found):
    """Every way in which the page may write the numbers and texts of a report."""
    if isinstance(value, dict):
        for key, inner in value.items():
            standing_in(key, found)
            standing_in(inner, found)
    elif isinstance(value, list):
        for inner in value:
            standing_in(inner, found)
    elif isinstance(value, str):
        found.update(words_with_digits(value.replace("_", " ")))
        found.update(words_with_digits(value))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        if isinstance(value, int):
            found.update((f"{value:,}", str(value)))
        found.update(typeset(f"{value:{form}}") for form in (".2f", "+.2f", ".3f", "+.3f", ".4f"))
        found.update(typeset(f"{100 * value:{form}}") for form in (".1f", "+.1f"))
    return found


def words_with_digits(text):
    words = (word.strip(".,;:()[]{}<>=%'\"") for word in html.unescape(text).split())
    return [word for word in words if re.search(r"\d", word)]


def full_run():
    """A run with everything that the page can show."""
    codes = ["C61"] * 30 + ["C50.911"] * 17 + ["C20"] * 3
    answers = [(code, "" if i % 7 else code, "C61" if i % 5 == 4 else code)
               for i, code in enumerate(codes)]  # fmt: skip
    run = run_in_memory(answers, "icd", sites=["a"] * 35 + ["b"] * 15)
    probes = {"icd": {"side_flip": {"n": 23, "rate": 0.87, "low": 0.61, "high": 0.97,
                                    "expected": "flips", "left_out": 0}}}  # fmt: skip
    cohort = COHORT | {
        "rules": RULES,
        "rows": {"read": 9123},
        "source": {"name": "extract.csv", "sha256": "8fd3" * 16},
        "stripped": {"icd": 217},
        "annotation": {"rows_offered": 641},
        "table1": {"largest_difference": {"test": {"characteristic": "age", "smd": 0.1375}}},
        "near_misses": {"C50.9": ["C50.911"]},
    }
    run = dataclasses.replace(
        with_variants(run, original_examples={"examples": 5, "seed": 3}),
        training=run.held_out,
        sizes={"train": 2917, "test": 50},
        cohort=cohort,
        config=CONFIG,
        ceiling={"icd": 0.934},
        validation={"tuned": run.predictions["tuned"]},
        robustness={"tuned": probes},
        judged_anew={"tuned": {"icd": 2}},
    )
    run.provenance["manifest"] = MANIFEST | {"best_step": 70}
    return run


@pytest.mark.parametrize("public", [False, True], ids=["private", "public"])
def test_every_number_of_the_page_stands_in_report_json(public):
    run = full_run()
    content = build_report([run], bootstrap=20)
    content = publish(content) if public else content
    page = render_page(content, [run], include_text=not public)
    text = shown(re.sub(r'<section id="definitions".*?</section>', " ", page, flags=re.DOTALL))
    for card in ("7,000", "3,515", "9,123", "641", "0.14", "2,900", "0.0003"):
        assert card in text
    text = re.sub(COUNTED, " ", text)
    known = standing_in(json.loads(json.dumps(content)), {*FIXED, *TICKS})
    assert not [word for word in words_with_digits(text) if word not in known]
    told = json.dumps(content["disclosure"])
    assert "j.doe" not in told and "C50.9" not in told
    if public:
        assert content["disclosure"]["run"]["cohort"]["deidentification"]["rows"] == "<11"
        assert "found in <11 rows" in told and '"rows": 3' not in told
