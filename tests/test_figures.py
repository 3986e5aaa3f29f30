"""The report's figures, without a browser: what a stroke means."""

import re

import pytest

from radonc_jax.evaluation import figures
from radonc_jax.evaluation.run import VARIANTS

CONFIDENCE = {
    "reliability": [
        {"confidence": 0.1 * i, "accuracy": 0.1 * i, "n": 12 + i} for i in range(1, 10)
    ],
    "risk_coverage": [{"coverage": 0.1 * i, "risk": 0.05 * i} for i in range(1, 11)],
}


def strokes(svg, part):
    """The dashes of the lines in the first group of an SVG whose id begins with `part`."""
    start = svg.index(f'<g id="{part}_1">')
    end = svg.find('<g id="legend_1">', start + 1) if part == "axes" else len(svg)
    lines = re.findall(
        r'<g id="line2d_\d+">\s*<path [^>]*style="fill: none;([^"]*)"', svg[start:end]
    )
    curves = [line for line in lines if figures.COLOURS["line"] not in line]  # no grid
    found = [re.search(r"stroke-dasharray: ([\d.,]+)", line) for line in curves]
    return [match[1] if match else "solid" for match in found]


@pytest.mark.parametrize("draw", [figures.draw_reliability, figures.draw_risk_coverage])
def test_a_stroke_has_one_meaning_and_stands_in_the_legend(draw):
    svg = figures.figure_bytes(draw(dict.fromkeys(VARIANTS, CONFIDENCE)), "svg").decode()
    shown, named = strokes(svg, "axes"), strokes(svg, "legend")
    assert len(named) == len(VARIANTS) + 1 == len(set(named))
    assert sorted(shown) == sorted(named)


def test_no_two_meanings_share_a_stroke():
    assert {*VARIANTS, "ceiling"} < figures.STROKES.keys()
    assert len(set(figures.STROKES.values())) == len(figures.STROKES)
