"""Prefills: their cost against trying everything, their shapes, their padding."""

import itertools

import numpy as np
import pytest

from radonc_jax.decoding import prefills
from radonc_jax.decoding.prefills import cheapest, padded_length, plan


def test_widths_waste_little():
    widths = {padded_length(length) for length in range(1, 4097)}
    assert len(widths) == 16 + 4 * 8
    for length in range(1, 4097):
        padding = padded_length(length) - length
        assert 0 <= padding < max(16, length / 8)
        finer = padded_length(length, 1)
        assert 0 <= finer - length < max(2, length / 8) and finer > 1


def rows_of(width):
    rows = max(2, 1024 // width)
    return sorted({max(2, rows >> n) for n in range(6)})


def taken(lengths, shapes):
    """(Prompts, rows, width) of each prefill."""
    start = 0
    for rows, width in shapes:
        yield lengths[start : start + rows], rows, width
        start += rows


def places(shapes):
    return sum(rows * width for rows, width in shapes)


def least_cost(lengths, shapes, overhead):
    """By trying every way."""
    if not lengths:
        return 0
    costs = [
        rows * width + overhead + least_cost(lengths[rows:], shapes, overhead)
        for rows, width in shapes
        if width >= lengths[0]
    ]
    return min(costs, default=np.inf)


@pytest.mark.parametrize("seed", range(20))
def test_the_cheapest_is_what_trying_everything_finds(seed):
    rng = np.random.default_rng(seed)
    lengths = sorted(rng.integers(1, 100, 9).tolist(), reverse=True)
    shapes = [(2, 48), (2, 112), (3, 80), (5, 112), (4, 48)]
    overhead = int(rng.integers(0, 200))
    found = cheapest(lengths, shapes, overhead)
    assert places(found) + overhead * len(found) == least_cost(lengths, shapes, overhead)
    for prompts, _, width in taken(lengths, found):
        assert prompts and prompts[0] <= width
    assert sum(rows for rows, _ in found[:-1]) < len(lengths) <= sum(rows for rows, _ in found)


@pytest.mark.parametrize("count", [1, 2, 7, 60, 400])
@pytest.mark.parametrize("seed", range(3))
def test_every_prompt_has_a_place_and_shapes_are_spared(seed, count):
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(4.8, 0.5, count), 1, 700).astype(int)
    lengths = sorted(lengths.tolist(), reverse=True)
    found = plan(lengths, rows_of, overhead=32)
    assert sum(len(prompts) for prompts, *_ in taken(lengths, found)) == count
    for prompts, rows, width in taken(lengths, found):
        assert 0 < len(prompts) <= rows and rows in rows_of(width) and prompts[0] <= width
    every = sorted({(r, padded_length(n)) for n in lengths for r in rows_of(padded_length(n))})
    free = cheapest(lengths, every, 32)
    # Padding grows up to the limit only, and for fewer shapes only.
    most = 1.12 * sum(lengths)
    if places(free) > most:
        most = 1.04 * places(free)
    assert places(found) <= most
    assert len(set(found)) <= len(set(free))
    if count == 400:
        assert len(set(found)) < len(set(free)) / 1.4
        assert places(found) <= 1.12 * sum(lengths)
        # One shape less would be too much padding, whichever is left out.
        for left in itertools.combinations(sorted(set(found)), len(set(found)) - 1):
            if max(width for _, width in left) >= lengths[0]:
                assert places(cheapest(lengths, left, 32)) > most


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng, count: rng.integers(25, 50, count),
        lambda rng, count: rng.integers(5, 60, count),
        lambda rng, count: np.clip(rng.lognormal(2.5, 0.4, count), 3, 200).astype(int),
        lambda rng, count: np.clip(rng.lognormal(3.1, 0.5, count), 3, 200).astype(int),
        lambda rng, count: np.full(count, 17),
        lambda rng, count: np.full(count, 5),
    ],
    ids=["25 to 50", "5 to 60", "about 12", "about 22", "17", "5"],
)
def test_short_prompts_have_as_little_padding(draw):
    """Whose rounding to 16 tokens alone is more than twelve percent."""
    lengths = sorted(draw(np.random.default_rng(0), 1581).tolist(), reverse=True)
    every = sorted({(r, padded_length(n)) for n in lengths for r in rows_of(padded_length(n))})
    free, found = cheapest(lengths, every, 32), plan(lengths, rows_of, overhead=32)
    assert places(free) > 1.12 * sum(lengths)
    assert places(found) <= 1.12 * sum(lengths)
    for prompts, _, width in taken(lengths, found):
        assert prompts[0] <= width and width > 1
    assert len(set(found)) <= 14
    assert set(plan(lengths, rows_of, set(found), overhead=32)) <= set(found)


def test_where_little_padding_cannot_be_had_shapes_are_few_and_coarse():
    rng = np.random.default_rng(0)
    lengths = sorted(rng.integers(3, 90, 12).tolist(), reverse=True)
    many = lambda width: [8]  # noqa: E731
    every = sorted({(8, padded_length(n)) for n in lengths})
    found = plan(lengths, many, overhead=32)
    assert places(found) > 1.12 * sum(lengths)
    assert all(width % 16 == 0 for _, width in found)
    assert places(found) <= 1.04 * places(cheapest(lengths, every, 32))


def test_a_known_shape_of_few_rows_is_no_reason_for_many_prefills():
    few = plan([45], rows_of, overhead=32)
    assert few == [(2, 48)]
    many = plan([45] * 2000, rows_of, set(few), overhead=32)
    assert len(many) <= 1.05 * 2000 / max(rows_of(48))


def test_known_shapes_are_free():
    rng = np.random.default_rng(0)
    draw = lambda: sorted(rng.integers(100, 400, 300).tolist(), reverse=True)  # noqa: E731
    first = plan(draw(), rows_of, overhead=32)
    lengths = draw()
    again = plan(lengths, rows_of, set(first), overhead=32)
    assert set(again) <= set(first) and places(again) <= 1.12 * sum(lengths)
    # Where they do not suffice, others come beside them, and they are still used.
    longer = sorted([*lengths, *[640] * 40], reverse=True)
    mixed = plan(longer, rows_of, set(first), overhead=32)
    assert set(mixed) - set(first) and places(mixed) <= 1.12 * sum(longer)
    assert len(set(mixed) - set(first)) <= 2
    # Those that would waste too much are not.
    wide = plan(lengths, rows_of, {(2, 4096)}, overhead=32)
    assert (2, 4096) not in wide


def test_nothing_to_run():
    assert plan([], rows_of, {(2, 16)}) == []
    assert prefills.plan([5], rows_of) == [(2, 16)]
