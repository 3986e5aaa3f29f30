"""The flow of patients into a cohort, as counts and as a CONSORT-style diagram.

Counts come from the log of the rules, never from elsewhere; one that is not known is None, and the
diagram says so.
"""

import io

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from radonc_jax.data.rules import Selection
from radonc_jax.data.splits import SPLITS


def count_flow(
    selection: Selection,
    cases: pd.DataFrame,
    source_patients: int | None = None,
    annotated: int | None = None,
) -> dict:
    """The counts behind the diagram, patients unless they say otherwise.

    Args:
      selection: what the rules did.
      cases: cohort rows with a column split.
      source_patients: patients in the system that the extract was drawn from.
      annotated: patients whose case annotators settled.

    Raises:
      ValueError: the system holds fewer patients than its extract.
      AssertionError: the counts do not add up.
    """
    if source_patients is not None and source_patients < selection.assessed:
        raise ValueError(
            f"--source_patients={source_patients} is less than the {selection.assessed} patients "
            "of the extract"
        )
    excluded = [{"rule": step.rule, "reasons": step.cases} for step in selection.steps]
    total = sum(sum(step.cases.values()) for step in selection.steps if step.cases is not None)
    splits = {
        name: {
            "patients": int(cases.loc[cases["split"] == name, "patient_id"].nunique()),
            "cases": int((cases["split"] == name).sum()),
        }
        for name in SPLITS
    }
    kept = sum(split["patients"] for split in splits.values())
    assert selection.assessed == kept + total, "the flow does not add up"
    return {
        "source_patients": source_patients,
        "not_in_the_extract": None
        if source_patients is None
        else source_patients - selection.assessed,
        "assessed": selection.assessed,
        "excluded": total,
        "excluded_by_rule": excluded,
        "statuses_not_recognised": selection.statuses,
        "kept": kept,
        "annotated": annotated,
        "splits": splits,
        # What comes later is told by the run's own reports.
        "outputs_parsed": None,
        "outputs_rated": None,
    }


def flow_svg(flow: dict) -> bytes:
    """The diagram of `count_flow`; the same counts give the same bytes."""
    lines = _exclusions(flow)
    height = 3.4 + 0.19 * len(lines)
    figure = Figure(figsize=(8.4, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, 8.4)
    axes.set_ylim(0, height)
    axes.axis("off")
    middle = 2.3
    top, second, third, last = height - 0.35, height - 1.15, 1.45, 0.5
    _box(axes, middle, top, f"In the source system (n {_count(flow['source_patients'])})")
    _box(axes, middle, second, f"Assessed: patients in the extract (n {_count(flow['assessed'])})")
    _box(
        axes,
        middle,
        third,
        f"Kept (n {_count(flow['kept'])})\nsettled by annotators (n {_count(flow['annotated'])})",
    )
    _arrow(axes, (middle, top - 0.17), (middle, second + 0.2))
    _arrow(axes, (middle, second - 0.17), (middle, third + 0.3))
    side = (second + third) / 2
    _arrow(axes, (middle, side), (4.25, side))
    text = "\n".join([f"Excluded (n {_count(flow['excluded'])})", *lines])
    axes.text(4.3, side, text, va="center", ha="left", fontsize=8.5, linespacing=1.5, bbox=_FRAME)
    for x, (name, split) in zip((1.2, 4.2, 7.2), flow["splits"].items(), strict=True):
        more = "" if split["cases"] == split["patients"] else f"\n{split['cases']:,} cases"
        _box(axes, x, last, f"{name.capitalize()} (n {_count(split['patients'])}){more}")
        _arrow(axes, (middle, third - 0.3), (x, last + 0.25))
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "radonc_jax"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _exclusions(flow: dict) -> list[str]:
    counts: dict[str, int | None] = {}  # two rules may give one reason
    for step in flow["excluded_by_rule"]:
        if step["reasons"] is None:
            counts[f"{step['rule']}: rule turned off"] = None
        for reason, n in (step["reasons"] or {}).items():
            counts[reason] = (counts.get(reason) or 0) + n
    return [f"{_said(reason)} (n {_count(n)})" for reason, n in counts.items()]


def _said(name: str) -> str:
    # matplotlib reads text between dollar signs as a formula, and a user's reason may be long.
    return name.replace("_", " ").replace("$", "").replace("\n", " ")[:48]


def _count(n: int | None) -> str:
    return "unknown" if n is None else f"= {n:,}"


_FRAME = {
    "boxstyle": "square,pad=0.5",
    "facecolor": "white",
    "edgecolor": "#1b2a37",
    "linewidth": 1,
}


def _box(axes: Axes, x: float, y: float, text: str) -> None:
    axes.text(x, y, text, ha="center", va="center", fontsize=9, linespacing=1.4, bbox=_FRAME)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    style = {"arrowstyle": "-|>", "color": "#1b2a37", "linewidth": 1, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=end, xytext=start, arrowprops=style)
