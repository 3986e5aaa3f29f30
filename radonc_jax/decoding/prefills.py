"""Which prompts are run together, in as few compiled shapes as little padding allows.

Prompts are taken longest first, some rows of them at a time, each row padded to the width of its
prefill. Every shape (rows, width) is compiled once, which takes seconds; every place of it that
holds no prompt's token is computed for nothing.
"""

from collections.abc import Callable, Collection, Sequence

import numpy as np

LENGTH_STEP = 16
FINER_STEPS = (8, 4, 2, 1)  # of short prompts, whose rounding alone may be more than
MOST_PADDING = 0.12  # of the prompts' tokens, up to which shapes are spared,
MOST_EXCESS = 0.04  # or of the fewest places, where short prompts have more padding in any case


def padded_length(length: int, least: int = LENGTH_STEP) -> int:
    """`length` rounded up to a multiple of `least`, or of a sixteenth of the next power of two:
    eight widths for each doubling beyond 128 tokens; never a single token."""
    step = max(least, (1 << (max(length, 1) - 1).bit_length()) // 16)
    return max(2, -(-length // step) * step)


def plan(
    lengths: Sequence[int],
    rows_of: Callable[[int], Sequence[int]],
    known: Collection[tuple[int, int]] = (),
    *,
    overhead: int = 0,
) -> list[tuple[int, int]]:
    """The prefills of prompts of these lengths.

    First the cheapest of all. Then one shape after another is given up, the one without which the
    others cost least, as long as padding is at most `MOST_PADDING` of the tokens. Widths are finer
    where that is not had otherwise; and where it cannot be had, as for few prompts, shapes are
    given up as long as there are at most `MOST_EXCESS` more places than from the first. Known
    shapes are free and are not given up, and where they suffice there is no other.

    Args:
      lengths: tokens of each prompt, longest first.
      rows_of: the numbers of rows that a prefill of a width may have.
      known: shapes (rows, width) that are compiled already.
      overhead: what a prefill costs besides its places, counted in places.

    Returns:
      the shape (rows, width) of each prefill. One after another they take as many prompts as they
      have rows; the last one may have rows left.
    """
    if not lengths:
        return []
    known = sorted(set(known))
    little = (1 + MOST_PADDING) * sum(lengths)
    coarse = _plan(lengths, rows_of, known, overhead, LENGTH_STEP)
    if _places(coarse) <= little:
        return coarse
    # Planning takes a second for 2,048 prompts: not for nothing, as with few of them.
    if _places(cheapest(lengths, _shapes(lengths, rows_of, known, 1), overhead)) > little:
        return coarse
    plans = (_plan(lengths, rows_of, known, overhead, step) for step in FINER_STEPS)
    return next((found for found in plans if _places(found) <= little), coarse)


def _shapes(lengths, rows_of, known, step: int) -> list[tuple[int, int]]:
    widths = {padded_length(length, step) for length in set(lengths)}
    return sorted({(rows, width) for width in widths for rows in rows_of(width)}.union(known))


def _plan(lengths, rows_of, known, overhead: int, step: int) -> list[tuple[int, int]]:
    """As `plan`, with widths that are multiples of `step`."""
    found = cheapest(lengths, _shapes(lengths, rows_of, known, step), overhead)
    most = (1 + MOST_PADDING) * sum(lengths)
    if _places(found) > most:
        most = (1 + MOST_EXCESS) * _places(found)
    most_cost = (1 + MOST_PADDING) * (_places(found) + overhead * len(found))

    def suffice(prefills):
        places = _places(prefills)
        return places <= most and places + overhead * len(prefills) <= most_cost

    if any(width >= lengths[0] for _, width in known):
        alone = cheapest(lengths, known, overhead)
        if suffice(alone):
            return alone
    shapes = sorted(set(found).union(known))
    while spared := _least_needed(lengths, shapes, known, overhead):
        shapes = [shape for shape in shapes if shape != spared]
        fewer = cheapest(lengths, shapes, overhead)
        if not suffice(fewer):
            break
        found = fewer
    return found


def _places(prefills) -> int:
    return sum(rows * width for rows, width in prefills)


def cheapest(
    lengths: Sequence[int], shapes: Sequence[tuple[int, int]], overhead: int
) -> list[tuple[int, int]]:
    """The prefills that cost least together, of these shapes; as `plan`."""
    _, choices = _costs(lengths, shapes, np.ones((len(shapes), 1), bool), overhead)
    found, at = [], 0
    while at < len(lengths):
        found.append(shapes[choices[at, 0]])
        at += found[-1][0]
    return found


def _least_needed(lengths, shapes, known, overhead: int) -> tuple[int, int] | None:
    """The shape, of those not known, without which the others cost least; None if there is none, or
    the longest prompt would have no place."""
    candidates = [shape for shape in shapes if shape not in known]
    if not candidates or len(shapes) == 1:
        return None
    allowed = np.array([[shape != other for other in candidates] for shape in shapes])
    costs, _ = _costs(lengths, shapes, allowed, overhead)
    least = int(np.argmin(costs))
    return candidates[least] if np.isfinite(costs[least]) else None


def _costs(lengths, shapes, allowed, overhead: int) -> tuple[np.ndarray, np.ndarray]:
    """Least costs by dynamic programming from the shortest prompt on.

    Args:
      allowed: bool [shapes, sets], which shapes there are, for several sets of them at once.

    Returns:
      cost of all prompts [sets], infinite where one fits nowhere, and the shape with which each
      prompt would begin a prefill [prompts, sets].
    """
    rows, widths = np.array(shapes).T
    own = np.where(allowed, (rows * widths + overhead)[:, None], np.inf)
    narrow = np.argsort(widths, kind="stable")[::-1]  # widest first
    rows, own, ascending = rows[narrow], own[narrow], widths[narrow][::-1]
    fitting = len(shapes) - np.searchsorted(ascending, lengths)
    count = len(lengths)
    costs = np.zeros((count + 1, allowed.shape[1]))
    choices = np.zeros((count, allowed.shape[1]), np.int32)
    for at in range(count - 1, -1, -1):
        fits = fitting[at]
        if not fits:
            costs[at] = np.inf
            continue
        total = own[:fits] + costs[np.minimum(at + rows[:fits], count)]
        costs[at] = total.min(axis=0)
        choices[at] = narrow[total.argmin(axis=0)]
    return costs[0], choices
