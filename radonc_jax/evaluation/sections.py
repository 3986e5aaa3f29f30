"""The page's part on one task of one run: details, confusion, confidence, robustness, subgroups.

A section stands only where report.json has its figures.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from radonc_jax.evaluation import figures
from radonc_jax.evaluation.cells import SMALLEST_CELL
from radonc_jax.evaluation.explorer import Texts
from radonc_jax.evaluation.figures import as_score, name_of, typeset
from radonc_jax.evaluation.markup import (
    DASH,
    Drawer,
    Html,
    drop_unknown,
    escape,
    make_table,
    plain_cell,
    score_cell,
)
from radonc_jax.evaluation.run import MODELS

SHOWN_ERRORS = 12  # regimens with the right words and a wrong dose; the explorer has them all
WIDEST_MATRIX = 12  # classes of a confusion matrix that is shown whole
SHOWN_CONFUSIONS = 15
_STRICT_WHOLE = "Strict, boost and kind of treatment too"
HIDDEN = "hidden"  # what the published form leaves out: a count below 11, or one that tells it


def task_parts(
    task: str, entry: Mapping, run: str, drawer: Drawer, texts: Texts | None
) -> list[str]:
    parts = [note for note in (_left_out(entry, run), _judged_anew(entry, run)) if note]
    verdict = entry.get("verdict") or {}
    if verdict.get("sentences"):
        heading = f"<h3>In short{escape(run)}</h3>" if run else ""
        parts.append(
            heading + "".join(f"<p>{escape(typeset(s))}</p>" for s in verdict["sentences"])
        )
    details = entry.get("details") or {}
    shown = {"regimen": _regimen, "icd": _icd, "modality": _modality}[task]
    sections = [
        *(shown(entry, details, drawer) if details else ()),
        ("The right words and a wrong dose, side or kind", _errors(entry, details, texts)),
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


def _left_out(entry: Mapping, run: str) -> str:
    """What lies in the run folder and is not in the report: before any figure, and plainly."""
    lines = entry.get("left_out") or ()
    if not lines:
        return ""
    listed = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return (
        '<div class="notice"><p><strong>Left out of this report'
        f"{escape(run)}.</strong> These lie in the run folder, but are not of the models and "
        f"answers that are reported here:</p><ul>{listed}</ul></div>"
    )


def _judged_anew(entry: Mapping, run: str) -> str:
    """That figures here are not those of the run folder's files, and of how many answers."""
    changed = entry.get("judged_anew") or {}
    if not changed:
        return ""
    listed = ", ".join(f"{model} {n}" for model, n in changed.items())
    return (
        f'<div class="notice"><p><strong>Judged anew{escape(run)}.</strong> An earlier version of '
        f"the code read or judged some answers otherwise ({escape(listed)}). All figures here are "
        "of this version; evaluate again to have them in the run folder's files too.</p></div>"
    )


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
        n = [plain_cell(counts[i])] if counts is not None else []
        body.append([label, *n, *(score_cell(scores.get(model)) for model in MODELS)])
    return make_table(caption, heads, body)


def _beside(figure: str, table: str) -> str:
    """A figure and its table, side by side where there is room."""
    return f'<div class="figures">{figure}<div class="table">{table}</div></div>'


def _regimen(entry: Mapping, details: Mapping, drawer: Drawer) -> list[Section]:
    whole = {
        key: name
        for key, name in (
            ("strict", "Whole regimen, strict"),
            ("strict_boost_kind", _STRICT_WHOLE),
            ("lenient", "Same effect (EQD2)"),
            ("allowed", "Customary for the site"),
        )
        if details.get(key)
    }
    rows = _rows({key: details[key] for key in whole}, whole)
    counts = [details[key].get("n", entry["tuned"]["n"]) for key in whole]
    fields = details.get("fields") or {}
    if not rows and not fields:
        return []
    short = {_STRICT_WHOLE: "Strict, boost and kind"}  # a figure has room for 22 characters
    drawn = [
        (short.get(label, label), scores)
        for label, scores in rows + _rows(fields)
        if any(as_score(score)["value"] is not None for score in scores.values())
    ]
    figure = drawer(
        figures.draw_rows(drawn, "share right"),
        "Share right, whole regimens and each field; circles: tuned, squares: original.",
        "Share right of each field of a regimen",
    )
    content = _beside(figure, _compared("Whole regimens, share right.", "Right in", rows, counts))
    return [("Field by field", content + (_field_table(fields) if fields else ""))]


def _field_table(fields: Mapping[str, Mapping]) -> str:
    """Recall alone would let an invented boost cost nothing."""
    heads = ["Field", "Cases that state it"]
    heads += [f"{score}, {m}" for score in ("Recall", "Precision", "F1") for m in MODELS]
    body = []
    for name, field in fields.items():
        scores = [field.get(model) or {} for model in MODELS]
        recall = [score_cell(score or None) for score in scores]
        others = [plain_cell(score.get(key)) for key in ("precision", "f1") for score in scores]
        body.append([_words(name), plain_cell(field.get("n")), *recall, *others])
    return make_table("Fields of a regimen: stated and right.", heads, body)


def _icd(entry: Mapping, details: Mapping, drawer: Drawer) -> list[Section]:
    sections = []
    rows = _rows(details.get("by_depth") or {})
    if details.get("valid_leaf"):
        rows.append(("A code that can be billed", _pair(details["valid_leaf"])))
    hierarchical = details.get("hierarchical") or {}
    names = {"precision": "precision", "recall": "recall", "f1": "F1"}
    rows += [(f"Hierarchical {names[key]}", _pair(v)) for key, v in hierarchical.items()]
    if rows:
        figure = drawer(
            figures.draw_rows(rows, "share"),
            "Agreement by depth of the code; circles: tuned, squares: original.",
            "Agreement of codes by depth",
        )
        table = _compared("Agreement by depth of the code.", "Depth", rows)
        sections.append(("By depth of the code", _beside(figure, table)))
    errors = details.get("errors") or {}
    if errors:
        body = [
            [_words(kind), *(HIDDEN if (n := counts[m]) is None else plain_cell(n) for m in MODELS)]
            for kind, counts in errors.items()
        ]
        heads = ["Error", "Original", "Tuned"]
        table = make_table("Wrong codes, cases by kind of error.", heads, body)
        sections.append(("Kinds of error", table))
    rarity = details.get("by_rarity") or []
    if rarity:
        rows = [(str(bin_["bin"]), _pair(bin_)) for bin_ in rarity]
        caption = "Accuracy by how often the code occurs in training."
        table = _compared(caption, "Training cases", rows, [b["n"] for b in rarity])
        sections.append(("By rarity of the code", table))
    return sections


def _modality(entry: Mapping, details: Mapping, drawer: Drawer) -> list[Section]:
    cost = details.get("cost") or {}
    if not cost:
        return []
    table = _compared("Mean cost of an answer.", "Measure", [("Cost", _pair(cost))])
    labels, matrix = cost.get("labels") or (), cost.get("matrix") or ()
    if matrix:
        body = [[labels[i], *map(plain_cell, row)] for i, row in enumerate(matrix)]
        caption = "What each error costs: reference in rows, answer in columns."
        table += make_table(caption, ["Reference", *labels], body)
    return [("Cost-weighted error", table)]


def _errors(entry: Mapping, details: Mapping, texts: Texts | None) -> str:
    shares = details.get("high_rouge_wrong_share")
    if not shares or shares.get("tuned") is None:  # the published form hides small ones
        return ""
    count = round((as_score(shares.get("tuned"))["value"] or 0) * entry["tuned"]["n"])
    if not count:
        return (
            "<p>No answer shares most of its words with a reference whose dose, boost, side or "
            "kind of treatment it gets wrong.</p>"
        )
    listed = details["high_rouge_wrong"]
    said = f"{count:,} of {entry['tuned']['n']:,} tuned answers have a ROUGE-1 of 0.8 or more and "
    said += "a wrong dose, boost, side or kind of treatment."
    if texts is None or not listed:
        return f"<p>{said}</p>"
    if len(listed) > SHOWN_ERRORS:
        said += f" The first {SHOWN_ERRORS} are here, all of them come first under Cases."
    return f"<p>{said}</p>" + make_table(
        "The right words with a wrong dose, boost, side or kind, the highest ROUGE-1 first.",
        ["Case", "Reference", "Tuned answer", "ROUGE-1"],
        [texts.error(entry["run"], case) for case in listed[:SHOWN_ERRORS]],
        texts=3,
        wrap=True,
        stack=True,
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
                return Html(f"<span>{HIDDEN}</span>")
            return Html(f'<span style="--share:{n / most:.3f}">{n:,}</span>')

        rows = [[labels[i], *map(cell, row)] for i, row in enumerate(matrix)]
        caption = "Tuned model: reference in rows, answer in columns, cases."
        return f'<div class="matrix">{make_table(caption, ["Reference", *labels], rows)}</div>'
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
    return make_table(caption, ["Reference", "Answer", "Cases"], rows, texts=2)


def _per_class(entry: Mapping) -> str:
    tuned, original = (entry[model].get("per_class") or {} for model in ("tuned", "original"))
    # In the published form the support of a small class is a word.
    shown = {label: v for label, v in tuned.items() if isinstance(v["support"], int)}
    hidden = len(tuned) - len(shown)
    note = f"<p>{hidden:,} small classes are not shown.</p>" if hidden else ""
    if not shown:
        return note
    heads = ["Class", "Cases", "F1, original", "Precision, tuned", "Recall, tuned", "F1, tuned"]
    rows = [
        [
            label,
            plain_cell(values["support"]),
            plain_cell((original.get(label) or {}).get("f1")),
            *(plain_cell(values[score]) for score in ("precision", "recall", "f1")),
        ]
        for label, values in sorted(shown.items(), key=lambda item: (-item[1]["support"], item[0]))
    ]
    table = make_table("Classes among the references, the commonest first.", heads, rows)
    if len(rows) > WIDEST_MATRIX:
        table = f"<details><summary>All {len(rows):,} classes</summary>{table}</details>"
    return table + note


def _confidence(entry: Mapping, drawer: Drawer) -> str:
    confidence = {m: v for m, v in (entry.get("confidence") or {}).items() if v}
    if not confidence:
        return ""
    drawn = ""
    if any(values.get("reliability") for values in confidence.values()):
        drawn += drawer(
            figures.draw_reliability(confidence),
            "Reliability: share right against confidence; a larger point is more cases, and on "
            'the line "Calibrated" confidence is what it claims to be.',
            "Reliability curve",
        )
    if any(values.get("risk_coverage") for values in confidence.values()):
        drawn += drawer(
            figures.draw_risk_coverage(confidence),
            "Risk and coverage: share wrong if only the most confident answers are kept, beside "
            "5 % error.",
            "Risk-coverage curve",
        )
    names = {model: name_of(model, entry["variant_settings"].get(model)) for model in confidence}
    rows = []
    for model, values in confidence.items():
        conformal = values.get("conformal") or {}
        kinds = {"labels": "sets of labels", "answer": "the answer, or any"}
        rows.append(
            [
                names[model],
                score_cell(values.get("ece")),
                score_cell(values.get("brier")),
                score_cell(values.get("coverage_at_5_percent_error")),
                kinds.get(conformal.get("kind"), DASH),
                plain_cell(conformal.get("level")),
                plain_cell(conformal.get("measured_coverage")),
                plain_cell(conformal.get("answered")),
                plain_cell(conformal.get("mean_size")),
            ]
        )
    heads = [
        "Model",
        "Calibration error (ECE)",
        "Brier score",
        "Coverage at 5 % error",
        "Conformal sets",
        "Wanted coverage",
        "Measured coverage",
        "Sets of one answer",
        "Mean set size",
    ]
    heads, rows = drop_unknown(heads, rows, 4)
    bins = [
        [
            names[model],
            plain_cell(bin_["confidence"]),
            plain_cell(bin_["accuracy"]),
            plain_cell(bin_["n"]),
        ]
        for model, values in confidence.items()
        for bin_ in values.get("reliability") or ()
    ]
    curve = make_table(
        "Reliability, bin by bin.", ["Model", "Mean confidence", "Share right", "Cases"], bins
    )
    return (
        f'<div class="figures">{drawn}</div>'
        + make_table("How far confidence can be trusted.", heads, rows)
        + f"<details><summary>Bins of the reliability curve</summary>{curve}</details>"
    )


def _robustness(entry: Mapping, drawer: Drawer) -> str:
    robustness = {m: v for m, v in (entry.get("robustness") or {}).items() if v}
    kinds = list(dict.fromkeys(kind for values in robustness.values() for kind in values))
    models = [model for model in MODELS if model in robustness]
    rows, drawn = [], []
    for kind in kinds:
        found = {m: values.get(kind) or {} for m, values in robustness.items()}
        some = next(value for value in found.values() if value)
        rates = {m: value | {"value": value.get("rate")} for m, value in found.items()}
        cells = []
        for model in models:  # each has cases of its own: those whose answer could be read
            cells += [plain_cell(found[model].get("n")), score_cell(rates[model])]
        expected = {"flips": "flip", "same": "stay the same"}.get(some.get("expected"), DASH)
        rows.append([_words(kind), expected, *cells])
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
    heads = ["Change of the text", "The answer should"]
    for model in models:
        heads += [f"Cases, {model}", name_of(model)]
    return figure + make_table("Share of answers that did what they should.", heads, rows, texts=2)


def _subgroups(entry: Mapping, drawer: Drawer) -> str:
    groups = entry.get("subgroups") or []
    if not groups:
        return ""
    rows = [(f"{_words(g['by'])}: {str(g['group']).replace('_', ' ')}", _pair(g)) for g in groups]
    # A dot of two cases says nothing; the table has them all.
    large = [
        row
        for row, g in zip(rows, groups, strict=True)
        if isinstance(g["n"], int) and g["n"] >= SMALLEST_CELL and any(row[1].values())
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
    return _beside(figure, table)
