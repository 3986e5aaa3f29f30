"""report.html: what report.json says, to be read by people.

One file without a request: style and script are part of it, figures are inline vector graphics,
and its content security policy forbids the rest and any script but its own. Every text is escaped
unless it is `Html`; an unknown figure is a dash.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources

from matplotlib.figure import Figure

from radonc_jax.evaluation import figures
from radonc_jax.evaluation.baselines import (
    MOST_ANSWERS,
    MOST_FEATURES,
    MOST_TRAINING,
    NEIGHBOURS,
)
from radonc_jax.evaluation.disclosure import cases_of, size_of_base
from radonc_jax.evaluation.explorer import Texts, explorer_section
from radonc_jax.evaluation.figures import TITLES, name_of, typeset
from radonc_jax.evaluation.findings import NOTICE, entries
from radonc_jax.evaluation.markup import (
    DASH,
    Drawer,
    Html,
    drop_unknown,
    escape,
    format_p,
    join,
    make_table,
    plain_cell,
    score_cell,
)
from radonc_jax.evaluation.run import CONSTRAINED, MODELS
from radonc_jax.evaluation.run_folder import Run
from radonc_jax.evaluation.sections import task_parts
from radonc_jax.evaluation.summary import (
    SUBJECTS,
    best_baseline,
    by_patient,
    standing_to_baselines,
)
from radonc_jax.evaluation.verdict import adjusted_p, standing


def render_page(report: Mapping, runs: Sequence[Run], *, include_text: bool = True) -> str:
    """report.html as one text.

    Args:
      report: the content of report.json, in its published form if the page is to be shared.
      runs: the runs behind it, in the report's order: their cases and manifests.
      include_text: False leaves out diagnoses, answers and references: no clinical text at all.
    """
    drawer = Drawer()
    several = len(runs) > 1
    sections: list[tuple[str, str, str]] = [
        ("found", "What was found", _found(report, drawer)),
        ("paper", "The paper's table", _paper_table(report)),
        ("scores", "All scores", _score_table(report)),
        ("tests", "Tests", _tests(report)),
    ]
    texts = Texts(runs, report["runs"]) if include_text else None
    for task in report["tasks"]:
        parts = []
        for of_task, entry in entries(report):
            if of_task == task:
                run = f", {entry['run']}" if _is_shared(report, task) else ""
                parts += task_parts(task, entry, run, drawer, texts)
        sections.append((f"task-{task}", TITLES[task], "".join(parts)))
    script = ""
    if texts is not None:
        data = texts.explorer(report)
        sections.append(("cases", "Cases", explorer_section(data)))
        script = _read("page.js")
    else:
        omitted = "<p>Left out: this report was written without clinical text.</p>"
        sections.append(("cases", "Cases", omitted))
    told = report["disclosure"].items()
    sections += [
        ("definitions", "Definitions", _definitions()),
        ("card", "Model card", "".join(_card(d, name, several) for name, d in told)),
        ("tripod", "TRIPOD-LLM items", "".join(_tripod(d, name, several) for name, d in told)),
        ("provenance", "Provenance", _provenance(report)),
    ]
    contents = "".join(f'<li><a href="#{key}">{escape(t)}</a></li>' for key, t, _ in sections)
    body = [
        f'<section id="{key}" aria-labelledby="{key}-title">'
        f'<h2 id="{key}-title">{escape(title)}</h2>{content}</section>'
        for key, title, content in sections
    ]
    # After the first screen, so that what was found comes before what else there is.
    body.insert(1, f'<nav aria-label="Contents"><ul>{contents}</ul></nav>')
    return _document(report, "\n".join(body), script)


def _document(report: Mapping, body: str, script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    scripts = f"'sha256-{digest}'" if script else "'none'"
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src {scripts}; "
        "base-uri 'none'; form-action 'none'"
    )
    about = "".join(f'<p class="about">{escape(line)}</p>\n' for line in report["about"])
    runs = f"{len(report['runs'])} run{'s' if len(report['runs']) != 1 else ''}"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>radonc_jax report</title>\n<style>\n{_read('page.css')}</style>\n</head>\n<body>\n"
        '<a class="skip" href="#main">Skip to the findings</a>\n<header>\n'
        f"<h1>Original and tuned model on the same {cases_of(report['split'])}</h1>\n"
        f'<p class="soft">Split: {escape(report["split"])}. {runs}.</p>\n{about}'
        f'<p class="notice"><strong>{escape(NOTICE)}</strong></p>\n</header>\n'
        f'<main id="main" tabindex="-1">\n{body}\n</main>\n'
        "<footer><p>Every figure of this page stands in report.json, or counts what stands there."
        "</p></footer>\n"
        + (f"<script>{script}</script>\n" if script else "")
        + "</body>\n</html>\n"
    )


def _read(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _is_shared(report: Mapping, task: str) -> bool:
    """Whether several runs have this task, so that the run must be named with it."""
    return bool(report["tasks"][task]["further_runs"])


def _named(report: Mapping, task: str, entry: Mapping) -> Html:
    run = f"<small>{escape(entry['run'])}</small>" if _is_shared(report, task) else ""
    return Html(f"{TITLES[task]}{run}")


def _of_model(report: Mapping, task: str, entry: Mapping, name: str) -> Html:
    """What names a row of a table of models, in one cell: it stays when the table is scrolled."""
    called = name_of(name, entry["variant_settings"].get(name))
    model = f'<span class="model">{escape(called)}</span>'
    return Html(f"{_named(report, task, entry)} {model}")


# ---------------------------------------------------------------------------------------------
# The first screen
# ---------------------------------------------------------------------------------------------


def _models(entry: Mapping) -> dict[str, Mapping]:
    """Metrics by name: the two models, their variants, the baselines."""
    models = {model: entry[model] for model in MODELS}
    return models | dict(entry.get("variants") or {}) | dict(entry["baselines"] or {})


_STANDINGS = {
    None: DASH,
    "better": "yes",
    "worse": Html("<strong>no</strong>"),
    "unclear": Html("<strong>unclear</strong>"),
}


def _found(report: Mapping, drawer: Drawer) -> str:
    listed = entries(report)
    if not listed:
        return "<p>This report holds no evaluation.</p>"
    rows = []
    for task, entry in listed:
        best = best_baseline(entry)
        shown = DASH
        if best is not None:
            shown = join([score_cell(best[1]["accuracy"]), _small_name(name_of(best[0]))])
        rows.append(
            [
                _named(report, task, entry),
                plain_cell(entry["tuned"]["n"]),
                score_cell(entry["original"]["accuracy"]),
                score_cell(entry["tuned"]["accuracy"]),
                format_p(adjusted_p(entry["tests"])),
                *_constrained_cells(entry),
                shown,
                _STANDINGS[standing_to_baselines(entry)],
                score_cell(entry["ceiling"]),
            ]
        )
    by = ", by patient" if by_patient(listed) else ""
    heads = [
        "Task",
        "Cases",
        "Original",
        "Tuned",
        f"p (Wilcoxon{by})",
        name_of(_CONSTRAINED),
        "Tuned beats it",
        "Simple baseline, the hardest to beat",
        "Tuned beats all of them",
        "Ceiling",
    ]
    if not any(_CONSTRAINED in entry["variants"] for _, entry in listed):
        place = heads.index(name_of(_CONSTRAINED))
        for row in (heads, *rows):
            del row[place : place + 2]
    caption = (
        f"Accuracy with 95 % intervals; p is one-sided (Wilcoxon{by}), after Holm over all rows."
    )
    found = "".join(
        f"<p><strong>{subject}</strong>{escape(typeset(sentence.removeprefix(subject)))}</p>"
        for subject, sentence in zip(SUBJECTS, report["findings"], strict=True)
    )
    return (
        f'<div class="found">{found}</div>{make_table(caption, heads, rows, stack=True)}'
        f'<div class="figures">{_found_figures(report, drawer)}</div>'
    )


_CONSTRAINED = "original" + CONSTRAINED


def _constrained_cells(entry: Mapping) -> list[Html]:
    """Accuracy of the original model held to closed sets, the fairer rival where it was asked so,
    and whether the tuned one beats it."""
    if _CONSTRAINED not in entry["variants"]:
        return [DASH, DASH]
    accuracy = score_cell(entry["variants"][_CONSTRAINED]["accuracy"])
    return [accuracy, _STANDINGS[standing(entry["variant_tests"][_CONSTRAINED])]]


def _small_name(name: str) -> Html:
    """A name in small print that breaks behind its comma alone."""
    parts = name.replace(", ", ",\n").split("\n")
    spans = join([Html(f"<span>{escape(part)}</span>") for part in parts], " ")
    return Html(f'<small class="name">{spans}</small>')


def _found_figures(report: Mapping, drawer: Drawer) -> Html:
    """Of each task and run its accuracies, and beside them what tuned differs by from the rest."""
    drawn = []
    for (_, entry), panel in zip(entries(report), _panels(report), strict=True):
        rivals = {"original": entry["tests"]}
        rivals |= dict(entry.get("variant_tests") or {}) | dict(entry["baseline_tests"] or {})
        differences = {name: tests["difference"] for name, tests in rivals.items()}
        drawn.append(
            drawer(
                figures.draw_panel(*panel),
                "Accuracy of each model and baseline; lines are 95 % intervals.",
                f"{panel[0]}: accuracy of each model and baseline with 95 percent intervals",
            )
        )
        drawn.append(
            drawer(
                figures.draw_differences(panel[0], differences),
                "Accuracy of the tuned model less that of each other on the same cases; right of 0 "
                "it is the better.",
                f"{panel[0]}: difference in accuracy of the tuned model from each other",
            )
        )
    return join(drawn)


def accuracy_figure(report: Mapping) -> Figure:
    """Accuracy of every model and baseline of the report; raises ValueError if it has no task."""
    if not entries(report):
        raise ValueError("the report holds no evaluation, so there is nothing to draw")
    return figures.draw_accuracy(_panels(report))


def _panels(report: Mapping) -> list[tuple[str, Mapping, float | None]]:
    return [
        (
            TITLES[task] + (f", {entry['run']}" if _is_shared(report, task) else ""),
            _models(entry),
            entry["ceiling"],
        )
        for task, entry in entries(report)
    ]


# ---------------------------------------------------------------------------------------------
# Tables over all runs
# ---------------------------------------------------------------------------------------------

SCORES = {
    "accuracy": "Accuracy",
    "rouge1": "ROUGE-1 F1",
    "rouge1_precision": "ROUGE-1 precision",
    "rouge1_recall": "ROUGE-1 recall",
    "rouge1_decimal": "ROUGE-1 F1, decimals whole",
    "precision_macro": "Precision, macro",
    "recall_macro": "Recall, macro",
    "f1_macro": "F1, macro",
    "precision_micro": "Precision, micro",
    "recall_micro": "Recall, micro",
    "f1_micro": "F1, micro",
    "precision_weighted": "Precision, weighted",
    "recall_weighted": "Recall, weighted",
    "f1_weighted": "F1, weighted",
    "unparseable_share": "Unparseable",
    "unfinished_share": "Unfinished",
}
EFFECTS = {"rank_biserial": "Rank-biserial r", "cohen_h": "Cohen's h", "odds_ratio": "Odds ratio"}
_REGIMENS_ALONE = ("rouge1_decimal",)  # a modality and a code hold no decimals to keep whole
PAPER_SCORES = ("accuracy", "rouge1", "precision_weighted", "recall_weighted", "f1_weighted")


def _is_foreign(score: str, task: str) -> bool:
    """Whether a score, though every metrics.json has it, says nothing of the task's answers."""
    return score in _REGIMENS_ALONE and task != "regimen"


def _paper_table(report: Mapping) -> str:
    rows = []
    for task, entry in entries(report):
        for model in MODELS:
            tests = entry["tests"] if model == "tuned" else {}
            rows.append(
                [
                    _of_model(report, task, entry, model),
                    _base_cell(report, entry),
                    *(score_cell(entry[model].get(score)) for score in PAPER_SCORES),
                    format_p(tests.get("wilcoxon", {}).get("p_value")),
                    format_p(tests.get("wilcoxon_rouge1", {}).get("p_value")),
                ]
            )
    heads = ["Task, model", "Base", *(SCORES[score] for score in PAPER_SCORES)]
    heads += ["p, accuracy", "p, ROUGE-1"]
    caption = (
        "Original against tuned model, as the paper compares them; one-sided Wilcoxon "
        "signed-rank tests, case by case and not adjusted. Free-text regimens have no classes."
    )
    return make_table(caption, heads, rows, texts=2)


def _base_cell(report: Mapping, entry: Mapping) -> Html:
    """The base's architecture, where the manifest tells it, its size, and its name: the last part
    of a folder or hub id. The rest is in the provenance."""
    base = report["disclosure"][entry["run"]]["base"]
    if base is None:
        return escape("not stated")
    family, suffix = base["architecture"] or base["name"], "ForCausalLM"
    # Too long a word for a narrow column, so it may break in the middle.
    parts = [escape(part) for part in (family.removesuffix(suffix), suffix)]
    first = Html("<wbr>".join(parts)) if family.endswith(suffix) else escape(family)
    lines = [size_of_base(base), base["name"] if base["architecture"] else ""]
    small = join([Html(f"<small>{escape(line)}</small>") for line in lines if line])
    return Html(f'<span class="base">{first}{small}</span>')


def _score_table(report: Mapping) -> str:
    rows = [
        [
            _of_model(report, task, entry, name),
            plain_cell(metrics["n"]),
            *(
                score_cell(None if _is_foreign(score, task) else metrics.get(score))
                for score in SCORES
            ),
            plain_cell(metrics["unparseable"]),
            plain_cell(metrics["unfinished"]),
        ]
        for task, entry in entries(report)
        for name, metrics in _models(entry).items()
    ]
    heads = ["Task, model", "Cases", *SCORES.values(), "Unparseable, cases", "Unfinished, cases"]
    heads, rows = drop_unknown(heads, rows, 2)
    caption = "Every score of every model and baseline; small print: 95 % interval by patient."
    return make_table(caption, heads, rows)


SIDES = (
    "The Wilcoxon test asks one thing only, whether the tuned model is better: a p near 1 says "
    "that it is worse or no better. McNemar's test asks for a difference in either direction, so "
    "where tuning made things worse its p can be small beside a Wilcoxon p of 1."
)


def _tests(report: Mapping) -> str:
    tables = _test_table(report) + _rival_table(report) + _against_table(report)
    return f"<p>{escape(SIDES)}</p>{tables}{_not_compared(report)}"


def _test_table(report: Mapping) -> str:
    heads = [
        "Task",
        "Difference in accuracy",
        "Wilcoxon p",
        "after Holm",
        "Right only: original",
        "Right only: tuned",
        "McNemar p",
        "McNemar p after Holm",
        "Difference in ROUGE-1",
        "Wilcoxon p, ROUGE-1",
        "ROUGE-1 after Holm",
        "Wilcoxon p, by patient",
        "by patient after Holm",
        "by patient, two sides",
        "Difference in F1 macro",
        *EFFECTS.values(),
    ]
    rows = []
    for task, entry in entries(report):
        tests = entry["tests"]
        effect = tests.get("effect") or {}
        rows.append(
            [
                _named(report, task, entry),
                score_cell(tests["difference"], signed=True),
                format_p(tests["wilcoxon"]["p_value"]),
                format_p(tests["wilcoxon"].get("p_holm")),
                plain_cell(tests["mcnemar"]["only_original"]),
                plain_cell(tests["mcnemar"]["only_tuned"]),
                format_p(tests["mcnemar"]["p_value"]),
                format_p(tests["mcnemar"].get("p_holm")),
                score_cell(tests["difference_rouge1"], signed=True),
                format_p(tests["wilcoxon_rouge1"]["p_value"]),
                format_p(tests["wilcoxon_rouge1"].get("p_holm")),
                *_by_patient_cells(report, tests),
                score_cell(tests.get("f1_macro"), signed=True),
                *(
                    plain_cell(effect.get(key))
                    for key in ("rank_biserial", "cohen_h", "odds_ratio")
                ),
            ]
        )
    heads, rows = drop_unknown(heads, rows, 3)
    return make_table("Tuned against original, case by case.", heads, rows)


def _rival_table(report: Mapping) -> str:
    """Tuned against what needs no tuning, case by case."""
    rows = [
        [_of_model(report, task, entry, name), *_test_cells(report, tests)]
        for task, entry in entries(report)
        for rivals in (entry.get("variant_tests"), entry["baseline_tests"])
        for name, tests in (rivals or {}).items()
    ]
    if not rows:
        return ""
    heads, rows = drop_unknown(["Task, rival", *_TEST_CELLS], rows, 7)
    return make_table("Tuned model against what needs no tuning, case by case.", heads, rows)


def _against_table(report: Mapping) -> str:
    """The tuned models of two runs, where they answered the same cases."""
    rows = [
        [TITLES[task], entry["run"], entry["against"]["run"]]
        + _test_cells(report, entry["against"]["tests"])
        for task, entry in entries(report)
        if entry.get("against")
    ]
    if not rows:
        return ""
    heads = ["Task", "Tuned model of", "Against that of", *_TEST_CELLS]
    heads, rows = drop_unknown(heads, rows, 9)
    return make_table("The tuned models of two runs on the same cases.", heads, rows, texts=3)


def _not_compared(report: Mapping) -> str:
    """The runs that the table before has no row of, and why."""
    return "".join(
        f"<p><strong>Not compared</strong>: {escape(TITLES[task])}, the tuned models of "
        f"{escape(entry['run'])} and {escape(entry['not_compared']['run'])}: "
        f"{escape(entry['not_compared']['why'])}.</p>"
        for task, entry in entries(report)
        if entry.get("not_compared")
    )


_TEST_CELLS = (
    "Difference in accuracy",
    "Wilcoxon p",
    "after Holm",
    "Right only: the other",
    "Right only: tuned",
    "McNemar p",
    "Wilcoxon p, by patient",
    "by patient after Holm",
    "by patient, two sides",
)


def _test_cells(report: Mapping, tests: Mapping) -> list[object]:
    return [
        score_cell(tests["difference"], signed=True),
        format_p(tests["wilcoxon"]["p_value"]),
        format_p(tests["wilcoxon"].get("p_holm")),
        plain_cell(tests["mcnemar"]["only_original"]),
        plain_cell(tests["mcnemar"]["only_tuned"]),
        format_p(tests["mcnemar"]["p_value"]),
        *_by_patient_cells(report, tests),
    ]


def _by_patient_cells(report: Mapping, tests: Mapping) -> list[object]:
    """Dashes where every patient has one case: they would say again what stands before them."""
    found = tests["wilcoxon_by_patient"] if by_patient(entries(report)) else {}
    return [format_p(found.get(key)) for key in ("p_value", "p_holm", "p_two_sided")]


# ---------------------------------------------------------------------------------------------
# What the figures mean, and where they come from
# ---------------------------------------------------------------------------------------------

DEFINITIONS = {
    "Accuracy": "Share of cases answered right. Regimen: the same side, target and number of "
    "fractions and a total dose within 0.5 Gy, with the boost left out; modality and ICD code: the "
    "same answer. An unparseable answer counts as wrong, and so does a regimen that "
    "contradicts itself (two sides, another dose that is no boost, a dose per fraction or a sum "
    "that does not fit), which is marked so.",
    "Unparseable, unfinished": "Unparseable: no answer of the task's kind can be read from the "
    "text, or two are given: of two modalities, or of two different codes in one sentence, none is "
    "chosen. Of several sentences with a code the first counts; what only looks like a code (the "
    "vertebra T12) is passed over where a known one stands beside it. Unfinished: the text was cut "
    "at the limit of new tokens. Shares are of all cases.",
    "Models": "Original: the base as it was given. With examples: training cases and their "
    "answers stand in its prompt. Constrained: only answers of a closed set can be given, the "
    "four modalities or ICD codes: those of the whole code table or, where asked so, those of the "
    "cohort's training and validation cases.",
    "ROUGE-1": "Words shared by the raw answer and the reference, without stemming: precision is "
    "their share of the answer, recall their share of the reference, F1 = 2PR / (P + R). The "
    "customary tokenizer splits 40.05 in two, and a wrong dose costs it little: read it beside "
    "the accuracy. With decimals whole, which is told of regimens alone, a number is one word.",
    "Precision, recall, F1": "Over the answers that occur among the references; macro is their "
    "plain mean, weighted by their number of cases, micro over all answers together. An "
    "unparseable answer, or one that is no case's reference, is a miss. Free-text regimens have no "
    "classes.",
    "95 % interval": "Bootstrap over patients, with all cases of a patient together; widened for "
    "few patients. Of accuracy, ROUGE-1 and other means of scores from 0 to 1, and of micro and "
    "weighted scores strictly between 0 and 1, it is Wilson's interval with the bootstrap's "
    "variance, which holds near 0 and 1 too; of macro scores it is that too, with the variance "
    "that leaving out one patient after the other tells (jackknife): a class of one case is the "
    "same in all resamples that hold it. Of differences it is Newcombe's (1998, method 10), made "
    "of the intervals of both and of how they change together. Variances of scores are enlarged "
    "as if a quarter of a wrong and of a right case (half of each in macro scores) were added, in "
    "patients wholly so: this tells where patients with several cases hold few errors. Where all "
    "patients score alike: what the score would be if the largest share of all patients that may "
    "differ (exact binomial) were wholly wrong or wholly right. Accuracies of 0.5 to 0.98 lie in "
    "their interval in 93 to 97 of 100 test splits of 120 or 422 patients, and in 94 to 98 of 40 "
    "patients or where there is a handful of errors, also where a few of 40 patients hold nearly "
    "all errors, each in most of its three cases; in 90 to 97 where it has eight such cases, and "
    "fewer where one patient in eight has most of the cases. The macro F1 to be expected lies in "
    "its interval in 93 to 97 of 100 simulated test splits of 60 to 420 cases in 4 to 400 "
    "classes, half of which may have a single case; macro precision and recall in 93 to 98; "
    "differences in accuracy and macro F1 in 93 to 98, and in nearly all where hardly any case "
    "differs.",
    "Wilcoxon p": "One-sided signed-rank test, case by case, that the tuned model is better; "
    "cases on which the models tie are left out. It is exact, with tied ranks too (of right and "
    "wrong the binomial test), but for a normal approximation where more than 300 cases differ "
    "by unequal amounts. Holm adjusts over the tests of the same kind in this report: all of tuned "
    "against original, all against simple baselines, all against the original model with examples "
    "or constrained, all between the tuned models of two runs. By patient: of each patient's mean "
    "difference, since the cases of a patient are not independent and the test by case then finds "
    "too much. What this report calls significant rests on the test by patient; where each patient "
    "has one case the two are the same. Two sides: twice the smaller p of either side. A p near 1 "
    "says that the tuned model is worse or no better.",
    "Difference": "Tuned less the other model on the same cases, with its paired interval.",
    "McNemar p": "Exact two-sided test on the cases that only one of the two models gets right: it "
    "asks for a difference in either direction, and where tuning made things worse it is small "
    "beside a one-sided Wilcoxon p near 1. It is by case: where patients have several, the verdict "
    "asks the Wilcoxon test by patient, of two sides, in its place.",
    "Effect sizes": "Rank-biserial r: (ranks for tuned \N{MINUS SIGN} ranks for original) / all "
    "ranks, from -1 to 1. Cohen's h: 2 asin(sqrt(p tuned)) \N{MINUS SIGN} 2 asin(sqrt(p "
    "original)). Odds ratio: cases only tuned gets right over cases only original gets right; "
    "where one of them is 0, 0.5 is added to both.",
    "Simple baselines": "Answers that need no language model, made from the training cases. "
    "Majority class: the most frequent answer. Dictionary lookup: the most frequent answer to the "
    "very same text. Nearest neighbours: the answers of the most similar texts. TF-IDF, logistic "
    "regression: a classifier on the words. They are capped and not tuned: the last two see the "
    f"{MOST_FEATURES:,} most frequent words and pairs of words, the classifier at most "
    f"{MOST_TRAINING:,} training cases, drawn at random, and of their answers the {MOST_ANSWERS} "
    f"most frequent; k, the number of neighbours, is {NEIGHBOURS} and C, the classifier's, 10 in "
    "every cohort. A model that does not beat them is of no use. The simple baseline that is the "
    "hardest to beat is the one that the tuned model stands worst to, of several the most "
    "accurate. Better or worse is said where the interval of the difference lies on one side of 0 "
    "and McNemar's p (by patient, of two sides, where patients have several cases) is at most "
    "0.05, and of all else that it is unclear. Each rival's p is its own, not adjusted for how "
    "many there are: the tuned model beats all of them where it is better than each, and where it "
    "is worse than one, that one does better; beside these p stand Holm's, of the one-sided "
    "Wilcoxon tests under Tests, of McNemar's in report.json.",
    "Ceiling": "The accuracy that the best reader of these texts would have on average, so that on "
    "these very cases a model can reach a little more. It is known of the test split of synthetic "
    "cohorts only.",
    "Regimens, field by field": "Share of the references that state a field whose answer states "
    "the same (recall), of the answers that state it the share right (precision), and their "
    "harmonic mean (F1). Strict: side, target, fractions and dose as above. Strict, boost and "
    "kind of treatment too: also the reference's boost, or none where it has none, and no wrong "
    "kind (see below). Same effect: EQD2 = BED / (1 + 2 / (alpha/beta)) with BED = nd (1 + d / "
    "(alpha/beta)) within 5 %, with an alpha/beta of 1.5 Gy for the prostate, 4 for the breast "
    "and the chest wall and 10 elsewhere, and a number of fractions of the same class (1, 2 to 8, "
    "9 to 24, 25 and more). Customary for the site: any dose and number of fractions that the "
    "site table lists for it, whatever the stage and the intent, so that a palliative dose counts "
    "too, not more often a day, to the reference's side and target, of the same kind of treatment "
    "(modality; implant or not), with no boost, the reference's (behind a first phase whose EQD2 "
    "is at most 5 % above the reference's) or one that the table lists for such regimens. The "
    "right words: a ROUGE-1 of 0.8 or more. A wrong dose: a first phase or a boost that is more "
    "than 0.5 Gy away, missing or added, or is given in another number of fractions with a dose "
    "per fraction more than 5 % away; or more fractions a day. A wrong kind, of the first phase: "
    "sources implanted for anything else (or for what is not stated), brachytherapy for external "
    "beam, or the reverse. An answer that contradicts itself is neither right nor customary, and "
    "counts as wrong in dose or side.",
    "Cost": "0 for the right modality; 1 unparseable, or photon for proton and the reverse; 2 "
    "electron for them or the reverse; 3 brachytherapy for external beam or the reverse. A scale "
    "of our own choice. In the interval 3 is wholly wrong and 0 wholly right.",
    "Robustness": "The text is changed a little: where the side in it is flipped the side of a "
    "regimen or a code must follow (a modality may hang on the side, and is not asked); synonyms, "
    "shuffled fields or an irrelevant sentence must not change the answer. Each answer is held "
    "against the model's own to the text as it was, right or wrong. Left out are cases whose own "
    "answer is unparseable or, of a regimen or a code, has no side to flip, and texts to which the "
    "change does not apply or that it makes too long for the model.",
    "Codes": "A code that can be billed is one of the table without codes below it. By depth: the "
    "chapter, block or category of the answer is the reference's; full: the code itself. Errors: "
    "too general is a code above the reference, too specific one below it; side only differs in "
    "nothing but the side; not a code is unparseable or not in the table; other is the rest. By "
    "rarity: how many training cases have the case's code, in the subgroups of every task.",
    "Hierarchical scores": "Over a code together with all codes above it: precision is the share "
    "of the answer's that are the reference's too, recall the reverse.",
    "Calibration": "Confidence is the probability that the model gives its own answer; where "
    "all labels were scored, over these labels, so that theirs sum to 1. ECE: mean "
    "distance between confidence and share right over the bins, weighted by their cases. Brier "
    "score: mean squared distance between confidence and right (1) or wrong (0). Coverage at 5 % "
    "error: the largest share of cases, most confident first, of which at most 5 % are wrong; it "
    "is chosen and measured on these same cases, so on new ones more of that share may be wrong. "
    "Conformal sets hold the right answer in at least the stated share of cases if new cases are "
    "like those of the validation split. They stand where the same model answered that split too, "
    "asked in the same way.",
    "Small groups": "Of fewer than 11 patients or cases a share says little, and in a report "
    "without clinical text such groups are not shown (nor, of a site or a sex, their names), nor "
    "is a score, a share or a count that would tell a number of 1 to 10 right or wrong answers.",
}


def _definitions() -> str:
    terms = "".join(
        f"<dt>{escape(k)}</dt><dd>{escape(typeset(v))}</dd>" for k, v in DEFINITIONS.items()
    )
    return f"<dl>{terms}</dl>"


BLANK = Html('<span class="blank">To be filled in by a person.</span>')


def _card(disclosure: Mapping, name: str, several: bool) -> str:
    parts = [f"<h3>{escape(name)}</h3>"] if several else []
    level = "h4" if several else "h3"
    for heading, lines in disclosure["model_card"].items():
        terms = "".join(
            f"<dt>{escape(key)}</dt><dd>{BLANK if text is None else escape(typeset(text))}</dd>"
            for key, text in lines.items()
        )
        parts.append(f"<{level}>{escape(heading)}</{level}><dl>{terms}</dl>")
    return "".join(parts)


def _tripod(disclosure: Mapping, name: str, several: bool) -> str:
    items = disclosure["tripod_llm"]
    head = f"<h3>{escape(name)}</h3>" if several else ""
    table = make_table(
        "TRIPOD-LLM (Gallifant et al. 2025, doi 10.1038/s41591-024-03425-5), items in short.",
        ["Item", "Section", "Asks for", "Told by the manifests"],
        [
            [
                r["item"],
                r["section"],
                r["asks"],
                BLANK if r["answer"] is None else typeset(r["answer"]),
            ]
            for r in items["items"]
        ],
        texts=4,
        wrap=True,
        stack=True,
    )
    return (
        f"{head}<p>{items['filled']} of {items['lines']} lines are filled; the others are for "
        f"people.</p>{table}"
    )


def _provenance(report: Mapping) -> str:
    provenance = json.dumps(report["provenance"], indent=1)
    return (
        "<details><summary>Models, data, versions</summary>"
        f'<pre tabindex="0">{escape(provenance)}</pre></details>'
    )
