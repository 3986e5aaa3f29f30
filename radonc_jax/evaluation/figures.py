"""The report's figures: vector graphics for the page, the first one also as a file.

Every figure is drawn in the colours of `COLOURS`; `inline_svg` turns each of them into a variable
of the page's style sheet, so the figure follows light, dark and print. What a figure shows stands
in a table as well.
"""

import io
import re
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

NAMES = {
    "original": "Original",
    "tuned": "Tuned",
    "original_constrained": "Original, constrained",
    "tuned_constrained": "Tuned, constrained",
    "original_examples": "Original with examples",
    "majority": "Majority class",
    "lookup": "Dictionary lookup",
    "nearest": "Nearest neighbours",
    "tfidf": "TF-IDF, logistic regression",
}
TITLES = {"regimen": "Treatment regimen", "modality": "Modality", "icd": "ICD-10-CM code"}
# Each is the page's variable of the same name; no two may be equal.
COLOURS = {
    "ink": "#1b2a37",  # text and axes
    "line": "#d4dbe3",  # grid and diagonal
    "original": "#75828f",
    "tuned": "#1f77b4",
    "baseline": "#b3672b",
}
_STYLE = {
    "svg.fonttype": "none",  # the text of an SVG stays text
    "svg.hashsalt": "radonc_jax",  # the same report, the same bytes
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"),
        COLOURS["ink"],
    ),
}
# Inches of a figure of the page: at 9 points its words are 11 pixels high on a screen of 360.
_PAGE_WIDTH = 3.7
_TICKS = [0, 0.2, 0.4, 0.6, 0.8, 1]


_CLOSED_SETS = {
    "labels": "constrained to the labels",
    "table": "constrained to the code table",
    "cohort": "constrained to the cohort's codes",
}


def name_of(model: str, asked: Mapping | None = None) -> str:
    """A model's name, with what `variant_settings` of an entry tells of it: how many examples its
    prompts show, which closed set its answers are from."""
    name, asked = NAMES.get(model, model.replace("_", " ")), asked or {}
    if asked.get("examples"):
        number = asked["examples"]
        return name.replace("examples", f"{number:,} example{'s' if number > 1 else ''}")
    return name.replace("constrained", _CLOSED_SETS.get(asked.get("closed_set"), "constrained"))


def _label(model: str) -> str:
    """A model's name where there is little room for it."""
    return _plain({"tfidf": "TF-IDF, logistic"}.get(model, name_of(model)))


def _colour(model: str) -> str:
    return COLOURS.get(model.partition("_")[0], COLOURS["baseline"])


def _line(model: str) -> str | tuple:
    """A line's dashes, so that lines differ without colour too."""
    if model.partition("_")[2]:
        return (0, (1, 1.5))
    return (0, (4, 2)) if model == "original" else "-"


def _marker(model: str) -> str:
    return "s" if model.startswith("original") else "o"


def as_score(score: Mapping | float | None) -> dict:
    """{value, low, high}, whether a figure came with its interval or alone."""
    if isinstance(score, Mapping):
        return {key: score.get(key) for key in ("value", "low", "high")}
    return {"value": score, "low": None, "high": None}


def _figure(width: float, height: float, left: float, bottom: float = 0.42) -> tuple[Figure, Axes]:
    """Inches; margins are given, since working them out takes longer than drawing."""
    figure = Figure(figsize=(width, height))
    box = (left / width, bottom / height, (width - left - 0.12) / width)
    return figure, figure.add_axes((*box, (height - bottom - 0.1) / height))


# ---------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------


def draw_accuracy(
    panels: Sequence[tuple[str, Mapping[str, Mapping], float | None]], width: float = 4.8
) -> Figure:
    """Accuracy with 95 % intervals of models and baselines, a panel per task and run.

    Args:
      panels: (title, metrics by model or baseline, ceiling or None).
      width: inches.
    """
    with matplotlib.rc_context(_STYLE):
        figure, grid = _panels([len(models) for _, models, _ in panels], width)
        for axes, (title, models, ceiling) in zip(grid, panels, strict=True):
            for line, (model, metrics) in enumerate(models.items()):
                score = as_score(metrics["accuracy"])
                axes.barh(line, score["value"], color=_colour(model), height=0.72)
                _whisker(axes, line, score)
                # In a column of their own, clear of whiskers and of the ceiling.
                axes.text(1.29, line, f"{score['value']:.2f}", ha="right", va="center")
            if ceiling is not None:
                axes.axvline(ceiling, color=COLOURS["ink"], linestyle=(0, (3, 2)), linewidth=1)
                axes.text(ceiling, -0.62, "ceiling", ha="center", va="bottom")
            axes.set_yticks(range(len(models)), [_label(model) for model in models])
            axes.set_ylim(len(models) - 0.4, -0.6)
            axes.set_xlim(0, 1.3)
            axes.set_xticks(_TICKS)
            axes.tick_params(axis="y", length=0)
            _title(axes, title)
        grid[-1].set_xlabel("accuracy, 95 % interval")
    return figure


def draw_panel(title: str, models: Mapping[str, Mapping], ceiling: float | None) -> Figure:
    """One panel of `draw_accuracy`, for the page."""
    return draw_accuracy([(title, models, ceiling)], _PAGE_WIDTH)


def draw_differences(title: str, rivals: Mapping[str, Mapping]) -> Figure:
    """The tuned model's accuracy less each rival's, {value, low, high} of the paired difference."""
    widest = max(
        abs(score[end] or 0) for score in rivals.values() for end in ("value", "low", "high")
    )
    half = next(limit for limit in (0.1, 0.2, 0.5, 1) if widest <= limit + 1e-9)
    with matplotlib.rc_context(_STYLE):
        figure, (axes,) = _panels([len(rivals)], _PAGE_WIDTH)
        axes.axvline(0, color=COLOURS["ink"], linewidth=0.8)
        for line, (model, score) in enumerate(rivals.items()):
            axes.axhline(line, color=COLOURS["line"], linewidth=0.6, zorder=0)
            _whisker(axes, line, score)
            axes.plot(
                score["value"], line, color=_colour(model), markersize=6, marker=_marker(model)
            )
            axes.text(1.55 * half, line, f"{score['value']:+.2f}", ha="right", va="center")
        axes.set_yticks(range(len(rivals)), [_label(model) for model in rivals])
        axes.set_ylim(len(rivals) - 0.4, -0.6)
        axes.set_xlim(-1.05 * half, 1.58 * half)
        axes.set_xticks([-half, 0, half], [f"{-half:g}", "0", f"+{half:g}"])
        axes.tick_params(axis="y", length=0)
        _title(axes, title, ": tuned less ...")
        axes.set_xlabel("difference, 95 % interval")
    return figure


def _panels(rows: Sequence[int], width: float) -> tuple[Figure, list[Axes]]:
    """A figure with a panel of as many rows each, one below the other.

    Places are given, not solved for: a solver's last bits differ from one process to another, and
    with them the file.
    """
    row, head, foot, left = 0.22, 0.3, 0.3, 1.6
    height = sum(row * count + head + foot for count in rows) + 0.2
    figure = Figure(figsize=(width, height))
    top, grid = height, []
    for count in rows:
        top -= head + row * count
        box = left / width, top / height, (width - left - 0.1) / width
        grid.append(figure.add_axes((*box, row * count / height)))
        top -= foot
    return figure, grid


def _title(axes: Axes, title: str, suffix: str = "") -> None:
    # From the figure's left edge, so that there is room for a run's name; of a long one its end
    # stays, by which runs differ.
    longest, begin = 34 - len(suffix), 10
    if len(title) > longest:
        title = f"{title[:begin]}…{title[begin + 1 - longest :]}"
    place = axes.get_position()
    axes.set_title(
        _plain(title + suffix), loc="left", x=-place.x0 / place.width, fontsize=9,
        fontweight="bold",
    )  # fmt: skip


def draw_rows(rows: Sequence[tuple[str, Mapping[str, Mapping | float | None]]], xlabel: str):
    """A dot per row and model on a scale from 0 to 1, with intervals where they are known."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(_PAGE_WIDTH, 0.24 * len(rows) + 0.62, left=1.6)
        for row, (_, scores) in enumerate(rows):
            axes.axhline(row, color=COLOURS["line"], linewidth=0.6, zorder=0)
            for shift, (model, score) in zip((-0.13, 0.13), scores.items(), strict=False):
                score = as_score(score)
                if score["value"] is None:
                    continue
                if score["low"] is not None:
                    axes.plot(
                        [score["low"], score["high"]], [row + shift] * 2, color=_colour(model),
                        linewidth=1.4,
                    )  # fmt: skip
                axes.plot(
                    score["value"], row + shift, color=_colour(model), markersize=4.5,
                    marker=_marker(model),
                )  # fmt: skip
        axes.set_yticks(range(len(rows)), [_plain(_shorten(label)) for label, _ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(-0.02, 1.02)
        axes.set_xticks(_TICKS)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(xlabel)
    return figure


def draw_reliability(confidence: Mapping[str, Mapping]) -> Figure:
    """Share right against stated confidence, by model; on the diagonal a model is calibrated."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _unit_square("confidence of the answer", "share right")
        axes.plot([0, 1], [0, 1], color=COLOURS["ink"], linestyle=(0, (3, 2)), linewidth=0.8)
        for model, values in confidence.items():
            bins = [b for b in values["reliability"] if b["accuracy"] is not None]
            most = max((b["n"] for b in bins), default=1)
            x, y = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
            axes.plot(
                x, y, color=_colour(model), linewidth=1.2, linestyle=_line(model),
                label=name_of(model),
            )  # fmt: skip
            sizes = [8 + 42 * b["n"] / most for b in bins]  # area: how many cases
            axes.scatter(x, y, s=sizes, color=_colour(model), marker=_marker(model), zorder=3)
        axes.set_ylim(-0.03, 1.03)
        _legend(axes, confidence)
    return figure


def draw_risk_coverage(confidence: Mapping[str, Mapping]) -> Figure:
    """Share wrong among the answers kept, against the share kept, most confident first."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _unit_square("coverage: share of cases answered", "share wrong among them")
        highest = 0.1
        for model, values in confidence.items():
            points = [p for p in values["risk_coverage"] if p["risk"] is not None]
            x, y = [p["coverage"] for p in points], [p["risk"] for p in points]
            axes.plot(
                x, y, color=_colour(model), linewidth=1.6, linestyle=_line(model),
                label=name_of(model),
            )  # fmt: skip
            highest = max([highest, *y])
        axes.axhline(0.05, color=COLOURS["ink"], linestyle=(0, (1, 2)), linewidth=0.9)
        axes.set_ylim(0, 1.05 * highest)
        _legend(axes, confidence)
    return figure


def _unit_square(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure, axes = _figure(3.4, 2.7, left=0.65)
    axes.set_xlim(0, 1.02)
    axes.set_xticks(_TICKS)
    axes.grid(color=COLOURS["line"], linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return figure, axes


def _legend(axes: Axes, models: Mapping) -> None:
    if len(models) > 1:
        axes.legend(loc="best", frameon=False)


def _whisker(axes: Axes, row: float, score: Mapping) -> None:
    if score["low"] is not None:
        axes.plot([score["low"], score["high"]], [row, row], color=COLOURS["ink"], linewidth=1.2)


def _shorten(label: str, longest: int = 22) -> str:
    return label if len(label) <= longest else label[: longest - 1].rstrip() + "…"


def _plain(label: str) -> str:
    """A label as it is: a dollar sign would be read as mathematics, a control character refused."""
    label = "".join(c if c.isprintable() else " " for c in label)
    return label.replace("$", r"\$")


# ---------------------------------------------------------------------------------------------
# Output
# ---------------------------------------------------------------------------------------------


def figure_bytes(figure: Figure, kind: str) -> bytes:
    """A figure as "svg" (transparent) or "png" (white ground, 200 dots per inch)."""
    buffer = io.BytesIO()
    # Dates and versions are left out, so that the same report gives the same bytes.
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format=kind, dpi=200, metadata=metadata, transparent=kind == "svg")
    return buffer.getvalue()


def inline_svg(figure: Figure, number: int) -> str:
    """A figure as an element of a page.

    Args:
      number: of the figure on the page; its ids carry it, since ids of a page must differ.
    """
    svg = figure_bytes(figure, "svg").decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>f{number}-", svg)
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg.strip()
