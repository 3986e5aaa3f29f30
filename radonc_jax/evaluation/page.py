"""report.html: what report.json says, to be read by people.

One file without a request: style and script are part of it, figures are inline vector graphics,
and its content security policy forbids the rest and any script but its own. Every text is escaped
unless it is `Html`; the texts of cases are data that the script shows as text. A section stands
only where report.json has its figures, and an unknown figure is a dash.
"""

import base64
import hashlib
import html
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources

from matplotlib.figure import Figure

from radonc_jax.evaluation import figures
from radonc_jax.evaluation.disclosure import Source, model_card, tripod_llm
from radonc_jax.evaluation.figures import TITLES, as_score, name_of
from radonc_jax.evaluation.findings import NOTICE, Run, entries
from radonc_jax.evaluation.run import MODELS

MOST_CASES = 5000  # of a run and task in the explorer; a browser should open the page at once
SHOWN_ERRORS = 12  # regimens with the right words and a wrong dose, in the table before it
LONGEST_ANSWER = 2000  # characters; a model without a stop can go on for pages
WIDEST_MATRIX = 12  # classes of a confusion matrix that is shown whole
SHOWN_CONFUSIONS = 15


class Html(str):
    """A text that is markup already."""


def escape(value: object) -> str:
    return value if isinstance(value, Html) else html.escape(str(value), quote=True)


def _join(parts: Iterable[object], separator: str = "") -> Html:
    return Html(separator.join(escape(part) for part in parts))


# ---------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------


def render_page(report: Mapping, runs: Sequence[Run], *, include_text: bool = True) -> str:
    """report.html as one text.

    Args:
      report: the content of report.json, in its published form if the page is to be shared.
      runs: the runs behind it, in the report's order: their cases and manifests.
      include_text: False leaves out diagnoses, answers and references: no clinical text at all.
    """
    drawer = _Drawer()
    several = len(runs) > 1
    sections: list[tuple[str, str, str]] = [
        ("found", "What was found", _found(report, drawer)),
        ("paper", "The paper's table", _paper_table(report)),
        ("scores", "All scores", _score_table(report)),
        ("tests", "Tests", _test_table(report)),
    ]
    texts = _Texts(runs, report["runs"]) if include_text else None
    for task in report["tasks"]:
        parts = []
        for of_task, entry in entries(report):
            if of_task == task:
                run = f", {entry['run']}" if several else ""
                parts += _task_parts(task, entry, run, drawer, texts)
        sections.append((f"task-{task}", TITLES[task], "".join(parts)))
    script = ""
    if texts is not None:
        data = texts.explorer(report)
        sections.append(("cases", "Cases", _explorer(data)))
        script = _read("page.js")
    else:
        omitted = "<p>Left out: this report was written without clinical text.</p>"
        sections.append(("cases", "Cases", omitted))
    sources = [
        (name, _source(report, run, name)) for run, name in zip(runs, report["runs"], strict=True)
    ]
    sections += [
        ("definitions", "Definitions", _definitions()),
        ("card", "Model card", "".join(_card(s, name, several) for name, s in sources)),
        ("tripod", "TRIPOD-LLM items", "".join(_tripod(s, name, several) for name, s in sources)),
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
    runs = f"{len(report['runs'])} run{'s' if len(report['runs']) != 1 else ''}"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>radonc_jax report</title>\n<style>\n{_read('page.css')}</style>\n</head>\n<body>\n"
        '<a class="skip" href="#main">Skip to the findings</a>\n<header>\n'
        "<h1>Original and tuned model on the same held-out cases</h1>\n"
        f'<p class="soft">Split: {escape(report["split"])}. {runs}.</p>\n'
        f'<p class="notice"><strong>{escape(NOTICE)}</strong></p>\n</header>\n'
        f'<main id="main" tabindex="-1">\n{body}\n</main>\n'
        "<footer><p>Every figure of this page stands in report.json.</p></footer>\n"
        + (f"<script>{script}</script>\n" if script else "")
        + "</body>\n</html>\n"
    )


def _read(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


class _Drawer:
    """Puts figures on the page and counts them."""

    def __init__(self):
        self.count = 0

    def __call__(self, figure: Figure, caption: str, label: str) -> Html:
        self.count += 1
        svg = Html(figures.inline_svg(figure, self.count))
        return Html(
            f'<figure><div role="img" aria-label="{escape(label)}; the figures are in the table">'
            f"{svg}</div><figcaption>{escape(caption)}</figcaption></figure>"
        )


# ---------------------------------------------------------------------------------------------
# Cells and tables
# ---------------------------------------------------------------------------------------------

DASH = Html("&ndash;")


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{100 * value:.1f} %"


def format_p(p: float | None) -> Html:
    if p is None:
        return DASH
    return Html("&lt; 0.0001" if p < 1e-4 else f"{p:.4f}")


def _score(score: Mapping | float | None, signed: bool = False) -> Html:
    """A figure with its interval in small print, or a dash."""
    score = as_score(score)
    if score["value"] is None:
        return DASH
    form = "+.3f" if signed else ".3f"
    text = f"{score['value']:{form}}"
    if score["low"] is not None:
        text += f"<small>{score['low']:{form}} to {score['high']:{form}}</small>"
    return Html(text)


def _plain(value: object) -> object:
    """A number as it is customarily shown, a dash for what is unknown."""
    if value is None:
        return DASH
    if isinstance(value, float):
        if not math.isfinite(value):
            return DASH
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value


def _table(
    caption: str,
    heads: Sequence[object],
    rows: Sequence[Sequence[object]],
    *,
    texts: int = 1,
    wrap: bool = False,
    stack: bool = False,
) -> str:
    """A table whose first column names its rows.

    Args:
      texts: how many columns, from the left, are words and not figures.
      wrap: lets words break into lines (long texts).
      stack: on a narrow screen each row becomes a block of its own. The roles are stated since
        some browsers drop them from rows that are shown as blocks.
    """

    def role(name: str) -> str:
        return f' role="{name}"' if stack else ""

    def kind(column: int) -> str:
        return ' class="text"' if column < texts else ""

    head = "".join(
        f'<th scope="col"{role("columnheader")}{kind(i)}>{escape(title)}</th>'
        for i, title in enumerate(heads)
    )
    body = []
    for row in rows:
        cells = [f'<th scope="row"{role("rowheader")}>{escape(row[0])}</th>']
        for i, cell in enumerate(row[1:], 1):
            label = f' data-label="{escape(heads[i])}"' if stack else ""
            cells.append(f"<td{role('cell')}{label}{kind(i)}>{escape(cell)}</td>")
        body.append(f"<tr{role('row')}>{''.join(cells)}</tr>")
    names = " ".join(name for name, on in (("wrap", wrap), ("stack", stack)) if on)
    table = (
        f'<table class="{names}"{role("table")}>'
        f"<caption>{escape(caption)}</caption>"
        f"<thead{role('rowgroup')}><tr{role('row')}>{head}</tr></thead>"
        f"<tbody{role('rowgroup')}>{''.join(body)}</tbody></table>"
    )
    # What may be wider than the screen scrolls by itself, and by the keyboard too.
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f"{table}</div>"
    )


def _named(task: str, entry: Mapping, several: bool) -> Html:
    run = f"<small>{escape(entry['run'])}</small>" if several else ""
    return Html(f"{TITLES[task]}{run}")


def _with_columns(
    heads: Sequence[str], rows: Sequence[Sequence[object]], keep: int
) -> tuple[list[str], list[list[object]]]:
    """Without the columns, after the first `keep`, in which every row has a dash."""
    used = [i for i in range(len(heads)) if i < keep or any(row[i] is not DASH for row in rows)]
    return [heads[i] for i in used], [[row[i] for i in used] for row in rows]


# ---------------------------------------------------------------------------------------------
# The first screen
# ---------------------------------------------------------------------------------------------


def _accuracy(metrics: Mapping) -> float:
    return metrics["accuracy"]["value"]


def _models(entry: Mapping) -> dict[str, Mapping]:
    """Metrics by name: the two models, their variants, the baselines."""
    models = {model: entry[model] for model in MODELS}
    return models | dict(entry.get("variants") or {}) | dict(entry["baselines"] or {})


def _best_baseline(entry: Mapping) -> tuple[str, Mapping] | None:
    baselines = entry["baselines"] or {}
    if not baselines:
        return None
    # The first of equals, in the order of the report.
    return max(baselines.items(), key=lambda item: _accuracy(item[1]))


def _baseline_wins(entry: Mapping) -> bool:
    best = _best_baseline(entry)
    return best is not None and _accuracy(best[1]) >= _accuracy(entry["tuned"])


def _holm(entry: Mapping) -> float:
    test = entry["tests"]["wilcoxon"]
    return test.get("p_holm", test["p_value"])


def _found(report: Mapping, drawer: _Drawer) -> str:
    listed = entries(report)
    if not listed:
        return "<p>This report holds no evaluation.</p>"
    several = len(report["runs"]) > 1
    sentences = (_changes(listed, several), _rivals(listed, several), _certainty(listed, several))
    rows = []
    for task, entry in listed:
        best = _best_baseline(entry)
        wins = _baseline_wins(entry)
        better: object = DASH if best is None else "no" if wins else "yes"
        shown = DASH
        if best is not None:
            shown = _join(
                [_score(best[1]["accuracy"]), Html(f"<small>{escape(name_of(best[0]))}</small>")]
            )
        rows.append(
            [
                _named(task, entry, several),
                _plain(entry["tuned"]["n"]),
                _score(entry["original"]["accuracy"]),
                _score(entry["tuned"]["accuracy"]),
                format_p(_holm(entry)),
                shown,
                Html("<strong>no</strong>") if better == "no" else better,
                _score(entry["ceiling"]),
            ]
        )
    heads = (
        "Task",
        "Cases",
        "Original",
        "Tuned",
        "p that tuning helps",
        "Best simple baseline",
        "Tuned beats it",
        "Best reachable",
    )
    caption = "Accuracy with 95 % intervals; p is one-sided (Wilcoxon), after Holm over all rows."
    figure = drawer(
        accuracy_figure(report),
        "Accuracy of each model and baseline; lines are 95 % intervals.",
        "Accuracy of each model and baseline with 95 percent intervals",
    )
    found = "".join(f"<p>{sentence}</p>" for sentence in sentences)
    return f'<div class="found">{found}</div>{_table(caption, heads, rows, stack=True)}{figure}'


def accuracy_figure(report: Mapping) -> Figure:
    """Accuracy of every model and baseline of the report; raises ValueError if it has no task."""
    several = len(report["runs"]) > 1
    if not entries(report):
        raise ValueError("the report holds no evaluation, so there is nothing to draw")
    return figures.draw_accuracy(
        [
            (
                TITLES[task] + (f", {entry['run']}" if several else ""),
                _models(entry),
                entry["ceiling"],
            )
            for task, entry in entries(report)
        ]
    )


def _called(task: str, entry: Mapping, several: bool) -> str:
    title = TITLES[task] if task == "icd" else TITLES[task].lower()
    return escape(f"{title} ({entry['run']})" if several else title)


def _sentence(parts: Sequence[str], most: int = 4) -> str:
    """Joined with commas and "and"; the rest is counted where there are many."""
    shown = list(parts[:most])
    if len(parts) > most:
        shown.append(f"{len(parts) - most} more")
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def _changes(listed: Sequence[tuple[str, Mapping]], several: bool) -> str:
    groups: dict[str, list[str]] = {"raised": [], "lowered": [], "did not change": []}
    for task, entry in listed:
        before, after = (_accuracy(entry[model]) for model in MODELS)
        name = _called(task, entry, several)
        if before == after:
            groups["did not change"].append(f"{name} ({_share(after)})")
        else:
            verb = "raised" if after > before else "lowered"
            groups[verb].append(f"{name} from {_share(before)} to {_share(after)}")
    clauses = [f"{verb} the accuracy of {_sentence(g)}" for verb, g in groups.items() if g]
    return f"<strong>Tuning</strong> {'; it '.join(clauses)}."


def _rivals(listed: Sequence[tuple[str, Mapping]], several: bool) -> str:
    known = [(task, entry) for task, entry in listed if entry["baselines"]]
    start = "<strong>Against simple baselines</strong>: "
    if not known:
        return start + "none was computed, because the cohort is not at hand."
    won = [
        f"{_called(task, entry, several)} ({escape(name_of(best[0]).lower())} "
        f"{_share(_accuracy(best[1]))}, tuned {_share(_accuracy(entry['tuned']))})"
        for task, entry in known
        if (best := _best_baseline(entry)) and _baseline_wins(entry)
    ]
    if won:
        return start + f"a simple baseline does no worse than the tuned model on {_sentence(won)}."
    nearest = min(
        known, key=lambda item: _accuracy(item[1]["tuned"]) - _accuracy(_best_baseline(item[1])[1])
    )
    best = _best_baseline(nearest[1])
    return start + (
        f"the tuned model beats the best of them on every comparison; the closest is "
        f"{_called(*nearest, several)}, where {escape(name_of(best[0]).lower())} reaches "
        f"{_share(_accuracy(best[1]))}."
    )


def _certainty(listed: Sequence[tuple[str, Mapping]], several: bool) -> str:
    sure = sum(_holm(entry) <= 0.05 for _, entry in listed)
    unread = sum(entry["tuned"]["unparseable"] for _, entry in listed)
    total = sum(entry["tuned"]["n"] for _, entry in listed)
    text = (
        "<strong>How sure</strong>: the gain is significant (one-sided Wilcoxon at 5 %, after "
        f"Holm) in {sure} of {len(listed)} comparison{'s' if len(listed) > 1 else ''}; {unread:,} "
        f"of {total:,} tuned answers cannot be read"
    )
    ceilings = [
        f"{_called(task, entry, several)} {_share(entry['ceiling'])}"
        for task, entry in listed
        if entry["ceiling"] is not None
    ]
    if ceilings:
        return (
            text
            + f"; no reader of these texts could be right more often than {_sentence(ceilings)}."
        )
    return text + "; the best reachable accuracy is not known."


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
    "unparseable_share": "Unreadable",
    "unfinished_share": "Unfinished",
}
PAPER_SCORES = ("accuracy", "rouge1", "precision_weighted", "recall_weighted", "f1_weighted")


def _paper_table(report: Mapping) -> str:
    several = len(report["runs"]) > 1
    rows = []
    for task, entry in entries(report):
        for model in MODELS:
            tests = entry["tests"] if model == "tuned" else {}
            rows.append(
                [
                    _named(task, entry, several),
                    _base_name(entry),
                    name_of(model),
                    *(_score(entry[model].get(score)) for score in PAPER_SCORES),
                    format_p(tests.get("wilcoxon", {}).get("p_value")),
                    format_p(tests.get("wilcoxon_rouge1", {}).get("p_value")),
                ]
            )
    heads = ["Task", "Base", "Model", *(SCORES[score] for score in PAPER_SCORES)]
    heads += ["p, accuracy", "p, ROUGE-1"]
    caption = (
        "Original against tuned model, as the paper compares them; one-sided Wilcoxon "
        "signed-rank tests, not adjusted. Free-text regimens have no classes."
    )
    return _table(caption, heads, rows, texts=3)


def _base_name(entry: Mapping) -> str:
    """The last part of a folder or hub id: the rest is in the provenance."""
    return str(entry.get("model") or "not stated").rstrip("/").rpartition("/")[2]


def _score_table(report: Mapping) -> str:
    several = len(report["runs"]) > 1
    rows = [
        [
            _named(task, entry, several),
            name_of(name),
            _plain(metrics["n"]),
            *(_score(metrics.get(score)) for score in SCORES),
            _plain(metrics["unparseable"]),
            _plain(metrics["unfinished"]),
        ]
        for task, entry in entries(report)
        for name, metrics in _models(entry).items()
    ]
    heads = ["Task", "Model", "Cases", *SCORES.values(), "Unreadable, cases", "Unfinished, cases"]
    heads, rows = _with_columns(heads, rows, 3)
    caption = "Every score of every model and baseline; small print: 95 % interval by patient."
    return _table(caption, heads, rows, texts=2)


def _test_table(report: Mapping) -> str:
    several = len(report["runs"]) > 1
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
        "Difference in F1 macro",
        "Rank-biserial r",
        "Cohen's h",
        "Odds ratio",
    ]
    rows = []
    for task, entry in entries(report):
        tests = entry["tests"]
        effect = tests.get("effect") or {}
        rows.append(
            [
                _named(task, entry, several),
                _score(tests["difference"], signed=True),
                format_p(tests["wilcoxon"]["p_value"]),
                format_p(tests["wilcoxon"].get("p_holm")),
                _plain(tests["mcnemar"]["only_original"]),
                _plain(tests["mcnemar"]["only_tuned"]),
                format_p(tests["mcnemar"]["p_value"]),
                format_p(tests["mcnemar"].get("p_holm")),
                _score(tests["difference_rouge1"], signed=True),
                format_p(tests["wilcoxon_rouge1"]["p_value"]),
                format_p(tests["wilcoxon_rouge1"].get("p_holm")),
                _score(tests.get("f1_macro"), signed=True),
                *(_plain(effect.get(key)) for key in ("rank_biserial", "cohen_h", "odds_ratio")),
            ]
        )
    heads, rows = _with_columns(heads, rows, 3)
    return _table("Tuned against original, case by case.", heads, rows)


# ---------------------------------------------------------------------------------------------
# One task of one run
# ---------------------------------------------------------------------------------------------


def _task_parts(
    task: str, entry: Mapping, run: str, drawer: _Drawer, texts: "_Texts | None"
) -> list[str]:
    parts = []
    verdict = entry.get("verdict") or {}
    if verdict.get("sentences"):
        heading = f"<h3>In short{escape(run)}</h3>" if run else ""
        parts.append(heading + "".join(f"<p>{escape(s)}</p>" for s in verdict["sentences"]))
    details = entry.get("details") or {}
    shown = {"regimen": _regimen, "icd": _icd, "modality": _modality}[task]
    sections = [
        *(shown(entry, details, drawer) if details else ()),
        ("Regimens with the right words and a wrong dose or side", _errors(entry, details, texts)),
        ("Confusion", _confusion(entry)),
        ("Each class", _per_class(entry)),
        ("Confidence", _confidence(entry, drawer)),
        ("Robustness", _robustness(entry, drawer)),
        ("Subgroups", _subgroups(entry, drawer)),
    ]
    parts += [
        f"<h3>{escape(title)}{escape(run)}</h3>{content}" for title, content in sections if content
    ]
    if not parts:
        parts.append(f"<p>Nothing beyond the tables above{escape(run)}.</p>")
    return parts


Section = tuple[str, str]


def _pair(values: Mapping) -> dict[str, object]:
    return {model: values[model] for model in MODELS if model in values}


def _rows(values: Mapping[str, Mapping], names: Mapping[str, str] | None = None) -> list:
    return [((names or {}).get(key, _words(key)), _pair(value)) for key, value in values.items()]


def _words(key: str) -> str:
    text = str(key).replace("_", " ")
    return text[:1].upper() + text[1:]


def _compared(caption: str, first: str, rows: Sequence[tuple], counts: Sequence | None = None):
    """A table of rows (label, scores of the two models), with how many cases stand behind each."""
    heads = [first, *(["Cases"] if counts is not None else []), "Original", "Tuned"]
    body = []
    for i, (label, scores) in enumerate(rows):
        n = [_plain(counts[i])] if counts is not None else []
        body.append([label, *n, *(_score(scores.get(model)) for model in MODELS)])
    return _table(caption, heads, body)


def _regimen(entry: Mapping, details: Mapping, drawer: _Drawer) -> list[Section]:
    whole = {
        key: name
        for key, name in (
            ("strict", "All of target, side, dose and fractions"),
            ("lenient", "The same effect (EQD2 within 5 %)"),
            ("allowed", "Among the regimens customary for the site"),
        )
        if details.get(key)
    }
    rows = _rows({key: details[key] for key in whole}, whole)
    counts = [details[key].get("n", entry["tuned"]["n"]) for key in whole]
    fields = details.get("fields") or {}
    rows += _rows(fields)
    counts += [field.get("n") for field in fields.values()]
    if not rows:
        return []
    figure = drawer(
        figures.draw_rows(rows, "share right"),
        "Share right, whole regimens and each field; circles: tuned, squares: original.",
        "Share right of each field of a regimen",
    )
    table = _compared("Regimens, whole and field by field.", "What", rows, counts)
    return [("Field by field", figure + table)]


def _icd(entry: Mapping, details: Mapping, drawer: _Drawer) -> list[Section]:
    sections = []
    rows = _rows(details.get("by_depth") or {})
    for key, prefix in (("valid_leaf", ""), ("hierarchical", "Hierarchical ")):
        values = details.get(key) or {}
        rows += (
            [("A valid code of the finest level", _pair(values))]
            if key == "valid_leaf" and values
            else [(prefix + name, _pair(value)) for name, value in values.items()]
        )
    if rows:
        figure = drawer(
            figures.draw_rows(rows, "share"),
            "Agreement by depth of the code; circles: tuned, squares: original.",
            "Agreement of codes by depth",
        )
        table = _compared("Agreement by depth of the code.", "Depth", rows)
        sections.append(("By depth of the code", figure + table))
    errors = details.get("errors") or {}
    if errors:
        by_kind = errors if not set(errors) & set(MODELS) else None
        if by_kind is None:
            kinds = list(errors.get("tuned") or errors.get("original") or {})
            by_kind = {kind: {model: errors[model].get(kind) for model in errors} for kind in kinds}
        body = [
            [_words(kind), *(_plain(values.get(m)) for m in MODELS)]
            if isinstance(values, Mapping)
            else [_words(kind), DASH, _plain(values)]
            for kind, values in by_kind.items()
        ]
        table = _table("Wrong codes, cases by kind of error.", ["Error", "Original", "Tuned"], body)
        sections.append(("Kinds of error", table))
    rarity = details.get("by_rarity") or []
    if rarity:
        rows = [(str(bin_["bin"]), _pair(bin_)) for bin_ in rarity]
        caption = "Accuracy by how often the code occurs in training."
        table = _compared(caption, "Training cases", rows, [b["n"] for b in rarity])
        sections.append(("By rarity of the code", table))
    return sections


def _modality(entry: Mapping, details: Mapping, drawer: _Drawer) -> list[Section]:
    cost = details.get("cost") or {}
    if not cost:
        return []
    table = _compared("Mean cost of an answer.", "Measure", [("Cost", _pair(cost))])
    matrix = cost.get("matrix")
    labels = cost.get("labels") or (entry["tuned"].get("confusion") or {}).get("labels")
    if isinstance(matrix, Mapping):
        labels, matrix = matrix.get("labels", labels), matrix.get("matrix", matrix.get("costs"))
    if matrix and labels and len(matrix[0]) <= len(labels):
        heads = ["Reference", *labels[: len(matrix[0])]]
        body = [[labels[i], *map(_plain, row)] for i, row in enumerate(matrix)]
        table += _table("The costs: reference in rows, answer in columns.", heads, body)
    return [("Cost-weighted error", table)]


def _errors(entry: Mapping, details: Mapping, texts: "_Texts | None") -> str:
    listed = details.get("high_rouge_wrong")
    if listed is None:
        hidden = details.get("high_rouge_wrong_n")
        return f"<p>{_plain(hidden)} cases; left out here.</p>" if hidden is not None else ""
    if not listed:
        return (
            "<p>None: no answer shares most of its words with a reference whose dose or side "
            "it gets wrong.</p>"
        )
    if texts is None:
        return f"<p>{_plain(len(listed))} cases; left out here.</p>"
    more = len(listed) - SHOWN_ERRORS
    rest = f" The other {more:,} come first under Cases." if more > 0 else ""
    rows = [texts.error(entry["run"], case) for case in listed[:SHOWN_ERRORS]]
    return f"<p>{len(listed):,} cases.{rest}</p>" + _table(
        "ROUGE-1 is high, dose or side is wrong.",
        ["Case", "Reference", "Tuned answer", "ROUGE-1"],
        rows,
        texts=3,
        wrap=True,
    )


def _confusion(entry: Mapping) -> str:
    confusion = entry["tuned"].get("confusion") or {}
    labels, matrix = confusion.get("labels") or [], confusion.get("matrix") or []
    if not matrix:
        return ""
    if len(matrix) <= WIDEST_MATRIX:
        most = max((n for row in matrix for n in row if n), default=1)

        def cell(n: int | None) -> Html:
            if n is None:
                return Html("<span>&lt; 11</span>")
            return Html(f'<span style="--share:{n / most:.3f}">{n:,}</span>')

        rows = [[labels[i], *map(cell, row)] for i, row in enumerate(matrix)]
        caption = "Tuned model: reference in rows, answer in columns, cases."
        return f'<div class="matrix">{_table(caption, ["Reference", *labels], rows)}</div>'
    wrong = Counter(
        {
            (labels[i], labels[j]): n
            for i, row in enumerate(matrix)
            for j, n in enumerate(row)
            if n and i != j
        }
    )
    if not wrong:
        return "<p>No class was taken for another.</p>"
    common = sorted(wrong.items(), key=lambda item: (-item[1], item[0]))[:SHOWN_CONFUSIONS]
    rows = [[reference, answer, n] for (reference, answer), n in common]
    caption = f"Tuned model: the {len(rows)} commonest confusions of {len(wrong):,}."
    return _table(caption, ["Reference", "Answer", "Cases"], rows, texts=2)


def _per_class(entry: Mapping) -> str:
    tuned, original = (entry[model].get("per_class") or {} for model in ("tuned", "original"))
    hidden = entry["tuned"].get("classes_hidden")
    note = f"<p>{hidden:,} classes of fewer than 11 cases are not shown.</p>" if hidden else ""
    if not tuned:
        return note
    heads = ["Class", "Cases", "F1, original", "Precision, tuned", "Recall, tuned", "F1, tuned"]
    rows = [
        [
            label,
            _plain(values["support"]),
            _plain((original.get(label) or {}).get("f1")),
            *(_plain(values[score]) for score in ("precision", "recall", "f1")),
        ]
        for label, values in sorted(tuned.items(), key=lambda item: (-item[1]["support"], item[0]))
    ]
    table = _table("Classes among the references, the commonest first.", heads, rows)
    if len(rows) > WIDEST_MATRIX:
        table = f"<details><summary>All {len(rows):,} classes</summary>{table}</details>"
    return table + note


def _confidence(entry: Mapping, drawer: _Drawer) -> str:
    confidence = {m: v for m, v in (entry.get("confidence") or {}).items() if v}
    if not confidence:
        return ""
    drawn = ""
    if any(values.get("reliability") for values in confidence.values()):
        drawn += drawer(
            figures.draw_reliability(confidence),
            "Reliability: share right against confidence; a larger point is more cases, and on "
            "the dashed line confidence is what it claims to be.",
            "Reliability curve",
        )
    if any(values.get("risk_coverage") for values in confidence.values()):
        drawn += drawer(
            figures.draw_risk_coverage(confidence),
            "Risk and coverage: share wrong if only the most confident answers are kept; the "
            "dotted line is 5 % error.",
            "Risk-coverage curve",
        )
    rows = []
    for model, values in confidence.items():
        conformal = values.get("conformal") or {}
        rows.append(
            [
                name_of(model),
                _score(values.get("ece")),
                _score(values.get("brier")),
                _score(values.get("coverage_at_5_percent_error")),
                _plain(conformal.get("level")),
                _plain(conformal.get("measured_coverage")),
                _plain(conformal.get("mean_size")),
            ]
        )
    heads = [
        "Model",
        "Calibration error (ECE)",
        "Brier score",
        "Coverage at 5 % error",
        "Conformal level",
        "Conformal coverage",
        "Mean set size",
    ]
    heads, rows = _with_columns(heads, rows, 4)
    bins = [
        [
            name_of(model),
            _plain(bin_["confidence"]),
            _plain(bin_["accuracy"]),
            _plain(bin_["n"]),
        ]
        for model, values in confidence.items()
        for bin_ in values.get("reliability") or ()
    ]
    curve = _table(
        "Reliability, bin by bin.", ["Model", "Mean confidence", "Share right", "Cases"], bins
    )
    return (
        f'<div class="figures">{drawn}</div>'
        + _table("How far confidence can be trusted.", heads, rows)
        + f"<details><summary>Bins of the reliability curve</summary>{curve}</details>"
    )


def _robustness(entry: Mapping, drawer: _Drawer) -> str:
    robustness = {m: v for m, v in (entry.get("robustness") or {}).items() if v}
    kinds = list(dict.fromkeys(kind for values in robustness.values() for kind in values))
    rows, drawn = [], []
    for kind in kinds:
        found = {m: values.get(kind) or {} for m, values in robustness.items()}
        some = next(value for value in found.values() if value)
        rates = {m: value.get("rate") for m, value in found.items()}
        rows.append(
            [
                _words(kind),
                _words(some["expected"]) if some.get("expected") is not None else DASH,
                _plain(some.get("n")),
                *(_score(rates.get(model)) for model in MODELS),
            ]
        )
        if any(as_score(rate)["value"] is not None for rate in rates.values()):
            drawn.append((_words(kind), _pair(rates)))
    if not rows:
        return ""
    figure = ""
    if drawn:
        figure = drawer(
            figures.draw_rows(drawn, "share of answers as they should be"),
            "Share of answers that did what they should when the text was changed.",
            "Robustness to changes of the text",
        )
    heads = ["Change of the text", "The answer should", "Cases", "Original", "Tuned"]
    return figure + _table("Share of answers that did what they should.", heads, rows, texts=2)


def _subgroups(entry: Mapping, drawer: _Drawer) -> str:
    groups = entry.get("subgroups") or []
    if not groups:
        return ""
    rows = [(f"{_words(g['by'])}: {g['group']}", _pair(g)) for g in groups]
    # A dot of two cases says nothing; the table has them all.
    large = [
        row for row, g in zip(rows, groups, strict=True) if isinstance(g["n"], int) and g["n"] >= 11
    ]
    figure = ""
    if large:
        figure = drawer(
            figures.draw_rows(large, "accuracy"),
            "Accuracy in groups of at least 11 cases; circles: tuned, squares: original.",
            "Accuracy in subgroups",
        )
    table = _compared("Accuracy in subgroups.", "Group", rows, [g["n"] for g in groups])
    if len(rows) > WIDEST_MATRIX:
        table = f"<details><summary>All {len(rows):,} groups</summary>{table}</details>"
    return figure + table


# ---------------------------------------------------------------------------------------------
# Cases
# ---------------------------------------------------------------------------------------------

WRONG, RIGHT, UNREADABLE = 0, 1, 2


def embed_json(content: object) -> str:
    """JSON that is safe inside a script element: no markup, no line separator, ASCII alone."""
    text = json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def confidence_of(prediction: Mapping) -> float | None:
    """The probability of the whole answer, given the prompt; None where it was not recorded."""
    logprob = prediction.get("logprob")
    return None if logprob is None else min(1.0, math.exp(logprob))


def _cut(text: str) -> str:
    text = text.strip()
    return text if len(text) <= LONGEST_ANSWER else text[:LONGEST_ANSWER] + " ..."


class _Texts:
    """The texts of all runs' cases, as the page shows them."""

    def __init__(self, runs: Sequence[Run], names: Sequence[str]):
        self.runs = dict(zip(names, runs, strict=True))
        self._tuned: dict[tuple[str, str], dict[str, Mapping]] = {}

    def _predictions(self, run: str, task: str) -> dict[str, Mapping]:
        key = run, task
        if key not in self._tuned:
            predictions = self.runs[run].predictions["tuned"].get(task, ())
            self._tuned[key] = {p["case_id"]: p for p in predictions}
        return self._tuned[key]

    def error(self, run: str, case: str) -> list[object]:
        prediction = self._predictions(run, "regimen").get(case)
        if prediction is None:
            return [case, DASH, DASH, DASH]
        output = _cut(prediction["output"])
        return [case, prediction["reference"], output, _plain(float(prediction["rouge1"]))]

    def explorer(self, report: Mapping) -> dict:
        """What the script reads: texts once, and cases that point to them, the most telling first.

        First the regimens whose words are right and whose dose or side is wrong, then wrong
        answers, those nearest to the reference in wording first, then right ones.
        """
        tasks = list(report["tasks"])
        texts: dict[str, int] = {}

        def place(text: str) -> int:
            return texts.setdefault(text, len(texts))

        def answer(prediction: Mapping) -> list:
            state = RIGHT if prediction["correct"] else WRONG
            if prediction["answer"] is None:
                state = UNREADABLE
            confidence = confidence_of(prediction)
            output = _cut(prediction["output"])
            read = prediction["answer"]
            return [
                place(output),
                state,
                None if confidence is None else round(confidence, 4),
                place(read) if read is not None and read != output else None,
            ]

        ranked, total = [], 0
        for task, entry in entries(report):
            name = entry["run"]
            run = self.runs[name]
            diagnoses = {record.case_id: record.diagnosis for record in run.held_out}
            sites = _sites(run)
            flagged = set((entry.get("details") or {}).get("high_rouge_wrong") or ())
            original = {p["case_id"]: p for p in run.predictions["original"][task]}
            tuned = self._predictions(name, task)
            total += len(tuned)
            order = sorted(
                tuned.values(),
                key=lambda p: (
                    p["case_id"] not in flagged, p["correct"], -p["rouge1"], str(p["case_id"])
                ),
            )  # fmt: skip
            for number, prediction in enumerate(order[:MOST_CASES]):
                case = prediction["case_id"]
                flag = case in flagged
                case_row = [
                    report["runs"].index(name),
                    tasks.index(task),
                    str(case),
                    place(str(sites[case])) if case in sites else None,
                    place(diagnoses[case]) if case in diagnoses else None,
                    place(prediction["reference"]),
                    answer(original[case]),
                    answer(prediction),
                    round(float(prediction["rouge1"]), 3),
                    int(flag),
                ]
                ranked.append((not flag, prediction["correct"], number, len(ranked), case_row))
        ranked.sort(key=lambda item: item[:4])
        return {
            "runs": list(report["runs"]),
            "tasks": [TITLES[task] for task in tasks],
            "total": total,
            "texts": list(texts),
            "cases": [row for *_, row in ranked],
        }


def _sites(run: Run) -> dict[str, str]:
    """Case id -> site, where the cohort is at hand and tells it."""
    if run.cases is None or "site" not in run.cases.columns:
        return {}
    told = run.cases[["case_id", "site"]].dropna().astype(str)
    told = told[told["site"].str.strip() != ""]
    return dict(told.itertuples(index=False, name=None))


def _explorer(data: Mapping) -> str:
    def choice(key: str, label: str, options: Iterable[tuple[object, str]]) -> str:
        listed = "".join(f'<option value="{escape(v)}">{escape(t)}</option>' for v, t in options)
        return f'<label>{escape(label)} <select id="{key}">{listed}</select></label>'

    cases = data["cases"]
    places = sorted({row[3] for row in cases if row[3] is not None}, key=data["texts"].__getitem__)
    results = [
        ("", "Any"),
        ("tuned-right", "Tuned right"),
        ("tuned-wrong", "Tuned wrong"),
        ("tuned-unreadable", "Tuned cannot be read"),
        ("only-tuned", "Only tuned right"),
        ("only-original", "Only original right"),
        ("both-wrong", "Both wrong"),
    ]
    if any(row[9] for row in cases):
        results.append(("close", "Right words, wrong dose or side"))
    fields = []
    if len(data["runs"]) > 1:
        runs = [("", "All"), *enumerate(data["runs"])]
        fields.append(choice("by-run", "Run", runs))
    if len(data["tasks"]) > 1:
        fields.append(choice("by-task", "Task", [("", "All"), *enumerate(data["tasks"])]))
    fields.append(choice("by-result", "Result", results))
    if places:
        sites = [("", "All"), *((i, data["texts"][i].replace("_", " ")) for i in places)]
        fields.append(choice("by-site", "Site", sites))
    if any(row[7][2] is not None for row in cases):
        fields.append(
            '<label>Confidence from <input id="least" type="number" min="0" max="1" step="any" '
            'inputmode="decimal"></label><label>to <input id="most" type="number" min="0" max="1" '
            'step="any" inputmode="decimal"></label>'
        )
    fields.append('<label class="wide">Search <input id="words" type="search"></label>')
    fields.append('<button type="reset">Clear</button>')
    left = data["total"] - len(cases)
    note = (
        f"<p>{left:,} of {data['total']:,} cases are left out, right ones first, so that the page "
        "opens quickly; predictions.jsonl has them all.</p>"
        if left
        else ""
    )
    pager = (
        '<p class="pager"><button type="button" id="previous">Previous</button> '
        '<button type="button" id="next">Next</button></p>'
    )
    return (
        "<p>Regimens with the right words and a wrong dose or side come first, then wrong answers, "
        "those nearest to the reference in wording at the top. Confidence is the tuned model's."
        f"</p>{note}<noscript><p>The list of cases needs scripts; predictions.jsonl has them."
        "</p></noscript>"
        f'<form id="filter" role="search" aria-label="Filter the cases">{"".join(fields)}</form>'
        '<p id="state" role="status"></p><ol id="list" class="cases"></ol>'
        f"{pager}"
        f'<script type="application/json" id="data">{embed_json(data)}</script>'
    )


# ---------------------------------------------------------------------------------------------
# What the figures mean, and where they come from
# ---------------------------------------------------------------------------------------------

DEFINITIONS = {
    "Accuracy": "Share of cases answered right. Regimen: the same side, target and number of "
    "fractions and a total dose within 0.5 Gy; modality and ICD code: the same answer. An answer "
    "that cannot be read counts as wrong.",
    "ROUGE-1": "Words shared by the raw answer and the reference, without stemming: precision is "
    "their share of the answer, recall their share of the reference, F1 = 2PR / (P + R). The "
    "customary tokenizer splits 40.05 in two, and a wrong dose costs it little: read it beside "
    "the accuracy.",
    "Precision, recall, F1": "Over the answers that occur among the references; macro is their "
    "plain mean, weighted by their number of cases, micro over all answers together. An "
    "unreadable answer, or one that is no case's reference, is a miss. Free-text regimens have no "
    "classes.",
    "95 % interval": "Percentile bootstrap over patients, with all cases of a patient together.",
    "Wilcoxon p": "One-sided signed-rank test, case by case, that the tuned model is better; cases "
    "on which the models tie are left out. Holm adjusts for all comparisons of this report.",
    "McNemar p": "Exact two-sided test on the cases that only one of the two models gets right.",
    "Effect sizes": "Rank-biserial r: (ranks for tuned - ranks for original) / all ranks, from -1 "
    "to 1. Cohen's h: 2 asin(sqrt(p tuned)) - 2 asin(sqrt(p original)). Odds ratio: cases only "
    "tuned gets right over cases only original gets right.",
    "Simple baselines": "Answers that need no language model, made from the training cases: the "
    "most frequent answer; the most frequent answer to the very same text; the answer of the most "
    "similar texts; logistic regression on the words. A model that does not beat them is of no "
    "use.",
    "Best reachable": "The best accuracy any reader of these texts could reach. It is known for "
    "synthetic cohorts only.",
    "Same effect": "EQD2 = BED / (1 + 2 / (alpha/beta)) with BED = nd (1 + d / (alpha/beta)), "
    "within 5 %, and the number of fractions of the same class.",
    "Hierarchical scores": "Over a code together with all codes above it: precision is the share "
    "of the answer's that are the reference's too, recall the reverse.",
    "Calibration": "ECE: mean distance between confidence and share right over the bins, weighted "
    "by their cases. Brier score: mean squared distance between confidence and right (1) or wrong "
    "(0). Coverage at 5 % error: the largest share of cases, most confident first, of which at "
    "most 5 % are wrong. Conformal sets hold the right answer in at least the stated share of "
    "cases if new cases are like those of the validation split.",
    "Small groups": "Below 11 cases a share says little, and in a report without clinical text "
    "such groups are not shown.",
}


def _definitions() -> str:
    terms = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in DEFINITIONS.items())
    return f"<dl>{terms}</dl>"


def _source(report: Mapping, run: Run, name: str) -> Source:
    return Source(
        entries={task: entry for task, entry in entries(report) if entry["run"] == name},
        split=run.split,
        config=run.config,
        manifest=run.provenance.get("manifest") or {},
        cohort=run.cohort,
    )


BLANK = Html('<span class="blank">To be filled in by a person.</span>')


def _card(source: Source, name: str, several: bool) -> str:
    parts = [f"<h3>{escape(name)}</h3>"] if several else []
    level = "h4" if several else "h3"
    for heading, lines in model_card(source).items():
        terms = "".join(
            f"<dt>{escape(key)}</dt><dd>{BLANK if text is None else escape(text)}</dd>"
            for key, text in lines.items()
        )
        parts.append(f"<{level}>{escape(heading)}</{level}><dl>{terms}</dl>")
    return "".join(parts)


def _tripod(source: Source, name: str, several: bool) -> str:
    rows = tripod_llm(source)
    filled = sum(row["answer"] is not None for row in rows)
    head = f"<h3>{escape(name)}</h3>" if several else ""
    table = _table(
        "TRIPOD-LLM (Gallifant et al. 2025, doi 10.1038/s41591-024-03425-5), items in short.",
        ["Item", "Section", "Asks for", "Told by the manifests"],
        [
            [r["item"], r["section"], r["asks"], BLANK if r["answer"] is None else r["answer"]]
            for r in rows
        ],
        texts=4,
        wrap=True,
    )
    return (
        f"{head}<p>{filled} of {len(rows)} lines are filled; the others are for people.</p>{table}"
    )


def _provenance(report: Mapping) -> str:
    provenance = json.dumps(report["provenance"], indent=1)
    return (
        "<details><summary>Models, data, versions</summary>"
        f'<pre tabindex="0">{escape(provenance)}</pre></details>'
    )
