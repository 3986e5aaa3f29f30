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
from matplotlib.lines import Line2D

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
# Dashes of lines, so that they differ without colour too: a meaning each, and no two alike.
STROKES = {
    "tuned": "solid",
    "original": (0, (4, 2)),
    "tuned_constrained": (0, (7, 2, 1.5, 2)),
    "original_constrained": (0, (1.5, 1.5)),
    "original_examples": (0, (5, 1.5, 1, 1.5, 1, 1.5)),
    "ceiling": (0, (2.5, 2.5)),
    "Calibrated": (0, (12, 3)),
    "5 % error": (0, (4, 8)),
}
_CURVE = 1.4  # points wide, in its legend too: dashes are as long there
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


def _marker(model: str) -> str:
    return "s" if model.startswith("original") else "o"


def typeset(text: object) -> str:
    """A text of report.json, or a number of it, as page and figures show it: with a minus sign
    where the hyphen is the sign of a number, and no line break before a per cent sign."""
    text = re.sub(r"(?<![^\s(\[])-(?=[\d.])", "\N{MINUS SIGN}", str(text))
    return re.sub(r"(?<=\d) %", "\N{NO-BREAK SPACE}%", text)


def as_score(score: Mapping | float | None) -> dict:
    """{value, low, high}, whether a figure came with its interval or alone."""
    if isinstance(score, Mapping):
        return {key: score.get(key) for key in ("value", "low", "high")}
    return {"value": score, "low": None, "high": None}


def _figure(width: float, height: float, left: float, top: float = 0.1) -> tuple[Figure, Axes]:
    """Inches; margins are given, since working them out takes longer than drawing."""
    figure = Figure(figsize=(width, height))
    bottom = 0.42
    box = (left / width, bottom / height, (width - left - 0.12) / width)
    return figure, figure.add_axes((*box, (height - bottom - top) / height))


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
                axes.axvline(
                    ceiling, color=COLOURS["ink"], linestyle=STROKES["ceiling"], linewidth=1
                )
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
    scale = -1.02 * half, 1.02 * half
    with matplotlib.rc_context(_STYLE):
        figure, (axes,) = _panels([len(rivals)], _PAGE_WIDTH)
        axes.axvline(0, color=COLOURS["ink"], linewidth=0.8)
        for line, (model, score) in enumerate(rivals.items()):
            # No further than the scale: the numbers beside it stand on clear ground.
            axes.hlines(line, *scale, color=COLOURS["line"], linewidth=0.6, zorder=0)
            _whisker(axes, line, score)
            axes.plot(
                score["value"], line, color=_colour(model), markersize=6, marker=_marker(model)
            )
            number = typeset(f"{score['value']:+.2f}")
            axes.text(1.65 * half, line, number, ha="right", va="center")
        axes.set_yticks(range(len(rivals)), [_label(model) for model in rivals])
        axes.set_ylim(len(rivals) - 0.4, -0.6)
        axes.set_xlim(scale[0], 1.68 * half)
        axes.spines["bottom"].set_bounds(*scale)
        axes.set_xticks([-half, 0, half], [typeset(f"{-half:g}"), "0", f"+{half:g}"])
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
        lines = [*confidence, "Calibrated"]
        figure, axes = _unit_square("confidence of the answer", "share right", lines)
        axes.plot([0, 1], [0, 1], **_reference("Calibrated"))
        for model, values in confidence.items():
            bins = [b for b in values["reliability"] if b["accuracy"] is not None]
            most = max((b["n"] for b in bins), default=1)
            x, y = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
            axes.plot(x, y, color=_colour(model), linestyle=STROKES[model], linewidth=_CURVE)
            sizes = [8 + 42 * b["n"] / most for b in bins]  # area: how many cases
            axes.scatter(x, y, s=sizes, color=_colour(model), marker=_marker(model), zorder=3)
        axes.set_ylim(-0.03, 1.03)
    return figure


def draw_risk_coverage(confidence: Mapping[str, Mapping]) -> Figure:
    """Share wrong among the answers kept, against the share kept, most confident first."""
    with matplotlib.rc_context(_STYLE):
        lines = [*confidence, "5 % error"]
        figure, axes = _unit_square(
            "coverage: share of cases answered", "share wrong among them", lines, markers=False
        )
        highest = 0.1
        for model, values in confidence.items():
            points = [p for p in values["risk_coverage"] if p["risk"] is not None]
            x, y = [p["coverage"] for p in points], [p["risk"] for p in points]
            axes.plot(x, y, color=_colour(model), linestyle=STROKES[model], linewidth=_CURVE)
            highest = max([highest, *y])
        axes.axhline(0.05, **_reference("5 % error"))
        axes.set_ylim(0, 1.05 * highest)
    return figure


def _reference(name: str) -> dict:
    """How a line is drawn that is no model's."""
    return {"color": COLOURS["ink"], "linestyle": STROKES[name], "linewidth": 0.9}


def _unit_square(
    xlabel: str, ylabel: str, lines: Sequence[str], markers: bool = True
) -> tuple[Figure, Axes]:
    """Axes below their legend, which has a row of its own for each of `lines`, models or
    references: it lies on no curve, and no name is too long for it."""
    row, left, square = 0.18, 0.65, 2.6
    legend = row * len(lines) + 0.05
    figure, axes = _figure(_PAGE_WIDTH, square + legend, left=left, top=legend + 0.06)
    handles = [
        Line2D(
            [], [], label=_label(line), color=_colour(line), linewidth=_CURVE, markersize=4.5,
            linestyle=STROKES[line], marker=_marker(line) if markers else "",
        )
        if line in NAMES
        else Line2D([], [], label=line, **_reference(line))
        for line in lines
    ]  # fmt: skip
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(left / _PAGE_WIDTH, 1), frameon=False,
        handlelength=4.6, borderaxespad=0, borderpad=0.2, labelspacing=0.35,
    )  # fmt: skip
    axes.set_xlim(0, 1.02)
    axes.set_xticks(_TICKS)
    axes.grid(color=COLOURS["line"], linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return figure, axes


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
