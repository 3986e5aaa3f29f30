"""report.html and the files beside it: shows what `evaluation.findings` found.

The page is self-contained: no script, no request, one inline figure, readable without colour. It
escapes every text it shows, and `include_text=False` leaves all clinical text out.
"""

import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from radonc_jax.evaluation.findings import NOTICE, Run, build_report, entries, read_run
from radonc_jax.evaluation.run import MODELS, write_file

_NAMES = {
    "original": "Original",
    "tuned": "Tuned",
    "majority": "Majority class",
    "lookup": "Dictionary lookup",
    "nearest": "Nearest neighbours",
    "tfidf": "TF-IDF, logistic regression",
}
_TITLES = {"regimen": "Treatment regimen", "modality": "Modality", "icd": "ICD-10-CM code"}


# ---------------------------------------------------------------------------------------------
# Figure
# ---------------------------------------------------------------------------------------------

_INK = "#1b2a37"  # text and axes; the page turns it into its own text colour
_COLOURS = {
    "original": "#8a97a6",
    "tuned": "#1f77b4",
    "majority": "#c9a227",
    "lookup": "#b3672b",
    "nearest": "#6a8d3c",
    "tfidf": "#8c5aa8",
}


def draw_figure(report: Mapping) -> Figure:
    """Accuracy with 95 % intervals of each model and baseline, one panel per task and run."""
    listed = entries(report)
    bars = [
        [("original", entry["original"]), ("tuned", entry["tuned"])]
        + list((entry["baselines"] or {}).items())
        for _, entry in listed
    ]
    heights = [len(panel) + 1.6 for panel in bars]
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "radonc_jax",
        "font.size": 9,
        "font.family": "sans-serif",
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK
        ),
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.8, 0.26 * sum(heights) + 0.3), layout="constrained")
        panels = figure.subplots(len(listed), squeeze=False, height_ratios=heights)[:, 0]
        for axes, (task, entry), panel in zip(panels, listed, bars, strict=True):
            _draw_panel(axes, panel, entry["ceiling"])
            run = f", {entry['run']}" if report["tasks"][task]["further_runs"] else ""
            axes.set_title(_TITLES[task] + run, loc="left", fontsize=9, fontweight="bold")
        panels[-1].set_xlabel("accuracy, 95 % interval")
    return figure


def _draw_panel(axes, panel: list[tuple[str, dict]], ceiling: float | None) -> None:
    for row, (name, metrics) in enumerate(panel):
        accuracy = metrics["accuracy"]
        axes.barh(row, accuracy["value"], color=_COLOURS[name], height=0.72)
        if accuracy["low"] is not None:
            axes.plot([accuracy["low"], accuracy["high"]], [row, row], color=_INK, linewidth=1.2)
        # In a column of their own, clear of whiskers and of the ceiling.
        axes.text(1.11, row, f"{accuracy['value']:.2f}", ha="right", va="center", fontsize=8)
    if ceiling is not None:
        axes.axvline(ceiling, color=_INK, linestyle=(0, (3, 2)), linewidth=1)
        axes.text(ceiling, -0.62, "ceiling", ha="center", va="bottom", fontsize=8)
    axes.set_yticks(range(len(panel)), [_NAMES[name] for name, _ in panel])
    axes.set_ylim(len(panel) - 0.4, -0.6)
    axes.set_xlim(0, 1.12)
    axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def figure_bytes(report: Mapping, kind: str) -> bytes:
    """The figure as "svg" (transparent) or "png" (white ground, 200 dots per inch)."""
    buffer = io.BytesIO()
    # The text of an SVG stays text, and its date is left out: the same report, the same bytes.
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "radonc_jax"}):
        draw_figure(report).savefig(
            buffer, format=kind, dpi=200, metadata=metadata, transparent=kind == "svg"
        )
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------
# report.html
# ---------------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; --ink: #1b2a37; --soft: #566472; --line: #d4dbe2;
  --ground: #fff; --tint: #f3f6f9; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6ebf0; --soft: #a3afbb; --line: #3a4651;
  --ground: #141a20; --tint: #1d252d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; background: var(--ground);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.2; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.notice { border-left: 4px solid #c0392b; padding: .4rem .8rem; background: var(--tint); }
.scroll { overflow-x: auto; overflow-wrap: normal; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .3rem; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: right;
  vertical-align: top; white-space: nowrap; }
th[scope=row], td.text, th.text { text-align: left; }
td.text { white-space: pre-wrap; min-width: 9rem; }
small { color: var(--soft); display: block; }
figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; width: 40rem; }
dt { font-weight: 600; } dd { margin: 0 0 .6rem; }
pre { white-space: pre-wrap; font-size: .8rem; background: var(--tint); padding: .6rem; }
@media print { body { max-width: none; } .scroll { overflow: visible; } }
"""

_DEFINITIONS = {
    "Accuracy": "Share of cases answered right. Regimen: the same side, target and number of "
    "fractions and a total dose within 0.5 Gy; modality and ICD code: the same answer. An answer "
    "that cannot be read counts as wrong.",
    "ROUGE-1": "F1 of the words shared by the raw answer and the reference, without stemming. Its "
    "customary tokenizer splits 40.05 in two, and a wrong dose costs it little: read it beside the "
    "accuracy.",
    "Precision, recall, F1": "Over the answers that occur among the references; macro is their "
    "plain mean, weighted by their number of cases. An unreadable answer, or one that is no "
    "case's reference, is a miss. Free-text regimens have no classes.",
    "95 % interval": "Percentile bootstrap over patients, with all cases of a patient together.",
    "Wilcoxon p": "One-sided signed-rank test, case by case, that the tuned model is better; cases "
    "on which the models tie are left out. Holm adjusts for all comparisons of this report.",
    "McNemar p": "Exact two-sided test on the cases that only one of the two models gets right.",
    "Majority class, dictionary lookup": "The most frequent answer of the training cases; their "
    "most frequent answer to the very same text. Neither needs a model.",
    "Ceiling": "The best accuracy any reader of these texts could reach. It is known for synthetic "
    "cohorts only.",
}


def render_html(
    report: Mapping, runs: Sequence[Run], *, include_text: bool = True, cases: int = 12
) -> str:
    """report.html as one text.

    Args:
      include_text: False leaves out diagnoses, answers and references: no clinical text at all.
      cases: how many cases of each task to list; those the tuned model gets wrong come first, and
        among them those whose wording is closest to the reference (a wrong dose in the right words
        is the error that ROUGE hides).
    """
    svg = figure_bytes(report, "svg").decode()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    parts = [
        "<h1>Original and tuned model on the same held-out cases</h1>",
        f'<p class="notice"><strong>{NOTICE}</strong></p>',
        *(f"<p>{_finding(task, entry)}</p>" for task, entry in entries(report)),
        _score_table(report),
        '<h2>Accuracy</h2><figure role="img" aria-label="Accuracy of each model and baseline, '
        f'with 95 percent intervals; the figures are in the tables">{svg}</figure>',
        _test_table(report),
        "<h2>Definitions</h2><dl>",
        *(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in _DEFINITIONS.items()),
        "</dl>",
        "<h2>Cases</h2>",
    ]
    if include_text:
        parts += [
            _case_table(run, name, task, cases)
            for run, name in zip(runs, report["runs"], strict=True)
            for task in run.predictions["tuned"]
        ]
    else:
        parts.append("<p>Left out: this report was written without clinical text.</p>")
    provenance = json.dumps(report["provenance"], indent=1, ensure_ascii=False)
    parts += [
        "<h2>Provenance</h2>",
        f"<details><summary>Models, data, versions</summary><pre>{escape(provenance)}</pre>",
        "</details>",
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>radonc_jax report</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def escape(value: object) -> str:
    return html.escape(str(value), quote=True)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def format_p(p: float) -> str:
    return "&lt; 0.0001" if p < 1e-4 else f"{p:.4f}"


def _finding(task: str, entry: Mapping) -> str:
    """One sentence or two in plain words, the bad news included."""
    original, tuned = (entry[model]["accuracy"]["value"] for model in MODELS)
    verb = "rose" if tuned > original else "fell" if tuned < original else "stayed the same"
    change = (
        f"accuracy {verb} from {_percent(original)} to {_percent(tuned)}"
        if verb != "stayed the same"
        else f"accuracy stayed at {_percent(tuned)}"
    )
    text = (
        f"<strong>{_TITLES[task]}</strong> ({escape(entry['run'])}, {entry['tuned']['n']} cases): "
        f"{change} with tuning (one-sided Wilcoxon p "
        f"{_equals(entry['tests']['wilcoxon']['p_value'])})."
    )
    for name, metrics in (entry["baselines"] or {}).items():
        if metrics["accuracy"]["value"] >= tuned:
            text += (
                f" A simple baseline does no worse than the tuned model: {_NAMES[name].lower()} "
                f"reaches {_percent(metrics['accuracy']['value'])}."
            )
    if entry["ceiling"] is not None:
        text += f" The best reachable accuracy is {_percent(entry['ceiling'])}."
    return text


def _equals(p: float) -> str:
    return format_p(p) if p < 1e-4 else f"= {format_p(p)}"


def _figure_cell(score: Mapping) -> str:
    if score["value"] is None:
        return "<td>&ndash;</td>"
    interval = ""
    if score["low"] is not None:
        interval = f"<small>{score['low']:.3f} to {score['high']:.3f}</small>"
    return f"<td>{score['value']:.3f}{interval}</td>"


_SCORES = {
    "accuracy": "Accuracy",
    "rouge1": "ROUGE-1",
    "precision_macro": "Precision, macro",
    "recall_macro": "Recall, macro",
    "f1_macro": "F1, macro",
    "precision_weighted": "Precision, weighted",
    "recall_weighted": "Recall, weighted",
    "f1_weighted": "F1, weighted",
}


def _score_table(report: Mapping) -> str:
    heads = ["Cases", *_SCORES.values(), "Wilcoxon p", "Unreadable", "Unfinished"]
    rows = []
    for task, entry in entries(report):
        models = {model: entry[model] for model in MODELS} | (entry["baselines"] or {})
        for name, metrics in models.items():
            p = "&ndash;"
            if name == "tuned":
                p = format_p(entry["tests"]["wilcoxon"]["p_value"])
            rows.append(
                f'<tr><th scope="row">{_TITLES[task]}<small>{escape(entry["run"])}</small></th>'
                f'<td class="text">{_NAMES[name]}</td><td>{metrics["n"]}</td>'
                + "".join(_figure_cell(metrics[score]) for score in _SCORES)
                + f"<td>{p}</td><td>{metrics['unparseable']}</td>"
                + f"<td>{metrics['unfinished']}</td></tr>"
            )
    head = "".join(f'<th scope="col">{title}</th>' for title in heads)
    return (
        '<h2>Scores</h2><div class="scroll" tabindex="0" role="region" aria-label="Scores"><table>'
        f"<caption>Split: {escape(report['split'])}. Small print: 95 % interval.</caption>"
        '<thead><tr><th scope="col" class="text">Task</th><th scope="col" class="text">Model</th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _test_table(report: Mapping) -> str:
    heads = (
        "Difference in accuracy",
        "Wilcoxon p",
        "after Holm",
        "Right only: original",
        "Right only: tuned",
        "McNemar p",
        "Difference in ROUGE-1",
        "Wilcoxon p, ROUGE-1",
    )
    rows = []
    for task, entry in entries(report):
        tests = entry["tests"]
        cells = (
            format_p(tests["wilcoxon"]["p_value"]),
            format_p(tests["wilcoxon"]["p_holm"]),
            tests["mcnemar"]["only_original"],
            tests["mcnemar"]["only_tuned"],
            format_p(tests["mcnemar"]["p_value"]),
        )
        rows.append(
            f'<tr><th scope="row">{_TITLES[task]}<small>{escape(entry["run"])}</small></th>'
            + _figure_cell(tests["difference"])
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + _figure_cell(tests["difference_rouge1"])
            + f"<td>{format_p(tests['wilcoxon_rouge1']['p_value'])}</td></tr>"
        )
    head = "".join(f'<th scope="col">{title}</th>' for title in heads)
    return (
        '<h2>Tests</h2><div class="scroll" tabindex="0" role="region" aria-label="Tests"><table>'
        "<caption>Tuned against original, case by case.</caption>"
        f'<thead><tr><th scope="col" class="text">Task</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _case_table(run: Run, name: str, task: str, limit: int) -> str:
    original = {p["case_id"]: p for p in run.predictions["original"][task]}
    tuned = sorted(
        run.predictions["tuned"][task], key=lambda p: (p["correct"], -p["rouge1"], p["case_id"])
    )
    diagnoses = {record.case_id: record.diagnosis for record in run.held_out}
    with_diagnosis = any(prediction["case_id"] in diagnoses for prediction in tuned[:limit])
    rows = []
    for prediction in tuned[:limit]:
        case = prediction["case_id"]
        texts = [diagnoses.get(case, "")] if with_diagnosis else []
        texts += [prediction["reference"]]
        cells = "".join(f'<td class="text">{escape(text)}</td>' for text in texts)
        for answered in (original[case], prediction):
            verdict = "right" if answered["correct"] else "wrong"
            if answered["answer"] is None:
                verdict = "unreadable"
            output = answered["output"].strip()
            shown = output if len(output) <= 300 else output[:300] + " ..."
            cells += f'<td class="text">{escape(shown)}<small>{verdict}</small></td>'
        rows.append(f'<tr><th scope="row">{escape(case)}</th>{cells}</tr>')
    heads = ["Case", *(["Diagnosis"] if with_diagnosis else []), "Reference", "Original", "Tuned"]
    head = "".join(f'<th scope="col" class="text">{title}</th>' for title in heads)
    return (
        f'<h3>{_TITLES[task]}, {escape(name)}</h3><div class="scroll" tabindex="0" role="region" '
        f'aria-label="Cases of {_TITLES[task]}"><table><caption>Wrong answers of the tuned model '
        "first, those nearest to the reference in wording at the top.</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


# ---------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------


def write_report(
    workdir: Path,
    split: str = "test",
    output: Path | None = None,
    *,
    cohort: Path | None = None,
    include_text: bool = True,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict:
    """Writes report.json and report.html of one run folder into it (or into `output`).

    Raises:
      FileNotFoundError, ValueError: see `read_run` and `compare_models`.
    """
    runs = [read_run(workdir, split, cohort)]
    return write_runs(
        runs, Path(output or workdir), include_text=include_text, bootstrap=bootstrap, seed=seed
    )


def write_runs(
    runs: Sequence[Run],
    output: Path,
    *,
    include_text: bool = True,
    figures: bool = False,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict:
    """Writes the report over `runs` into the folder `output`; `figures` adds figure.svg and .png.

    Everything is made before the first file is written, and each file is put in place whole.
    """
    report = build_report(runs, bootstrap=bootstrap, seed=seed)
    files: dict[str, str | bytes] = {}
    if figures:
        files |= {f"figure.{kind}": figure_bytes(report, kind) for kind in ("svg", "png")}
    files["report.html"] = render_html(report, runs, include_text=include_text)
    files["report.json"] = json.dumps(report, indent=1, allow_nan=False) + "\n"
    for name, content in files.items():
        write_file(output / name, content)
    return report
