"""Pieces of HTML: escaped text, cells, tables, figures."""

import html
import math
from collections.abc import Iterable, Mapping, Sequence

from matplotlib.figure import Figure

from radonc_jax.evaluation.figures import as_score, inline_svg, typeset


class Html(str):
    """A text that is markup already."""


def escape(value: object) -> Html:
    """Text for a page; half a surrogate pair, which no file can hold, becomes a question mark."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(str(value).encode("utf-8", "replace").decode(), quote=True))


def join(parts: Iterable[object], separator: str = "") -> Html:
    return Html(separator.join(escape(part) for part in parts))


DASH = Html("&ndash;")


def format_p(p: float | None) -> Html:
    if p is None:
        return DASH
    return Html("&lt; 0.0001" if p < 1e-4 else f"{p:.4f}")


def score_cell(score: Mapping | float | None, signed: bool = False) -> Html:
    """A figure with its interval in small print, or a dash."""
    score = as_score(score)
    if score["value"] is None:
        return DASH
    form = "+.3f" if signed else ".3f"
    text = typeset(f"{score['value']:{form}}")
    if score["low"] is not None:
        interval = typeset(f"{score['low']:{form}} to {score['high']:{form}}")
        text += f"<small>{interval}</small>"
    return Html(text)


def plain_cell(value: object) -> object:
    """A number as it is customarily shown, a dash for what is unknown."""
    if value is None:
        return DASH
    if isinstance(value, float):
        if not math.isfinite(value):
            return DASH
        return typeset(f"{value:.3f}")
    is_count = isinstance(value, int) and not isinstance(value, bool)
    return typeset(f"{value:,}") if is_count else value


def make_table(
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
            # Beside the label, a block's content must be one element.
            shown = Html(f"<div>{escape(cell)}</div>") if stack else cell
            cells.append(f"<td{role('cell')}{label}{kind(i)}>{escape(shown)}</td>")
        body.append(f"<tr{role('row')}>{''.join(cells)}</tr>")
    names = " ".join(name for name, on in (("wrap", wrap), ("stack", stack)) if on)
    table = (
        f'<table class="{names}"{role("table")}>'
        f"<caption><span>{escape(caption)}</span></caption>"
        f"<thead{role('rowgroup')}><tr{role('row')}>{head}</tr></thead>"
        f"<tbody{role('rowgroup')}>{''.join(body)}</tbody></table>"
    )
    # What may be wider than the screen scrolls by itself, and by the keyboard too.
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(caption)}">'
        f"{table}</div>"
    )


def drop_unknown(
    heads: Sequence[str], rows: Sequence[Sequence[object]], keep: int
) -> tuple[list[str], list[list[object]]]:
    """Without the columns, after the first `keep`, in which every row has a dash."""
    used = [i for i in range(len(heads)) if i < keep or any(row[i] is not DASH for row in rows)]
    return [heads[i] for i in used], [[row[i] for i in used] for row in rows]


class Drawer:
    """Puts figures on the page and counts them."""

    def __init__(self):
        self.count = 0

    def __call__(self, figure: Figure, caption: str, label: str) -> Html:
        self.count += 1
        svg = Html(inline_svg(figure, self.count))
        return Html(
            f'<figure><div role="img" aria-label="{escape(label)}; the figures are in the table">'
            f"{svg}</div><figcaption>{escape(caption)}</figcaption></figure>"
        )
