"""Which cells of a table are kept back, so that no count of 1 to 10 can be worked out of the rest.

A count is small if it is 1 to 10 (the CMS cell size rule). Keeping a small count back is not
enough where the sum of a line is known: another has to go with it (complementary suppression).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

SMALLEST_CELL = 11


def is_small(count: int) -> bool:
    return 0 < count < SMALLEST_CELL


@dataclass
class Group:
    """Some of a split's cases, and whether their number and each model's score are kept back."""

    n: int
    patients: int
    right: dict[str, int]  # by model: its right answers
    hidden: bool = False  # n and every score
    unscored: set[str] = field(default_factory=set)  # models whose score tells a count

    def marks(self) -> int:
        return self.hidden + len(self.unscored)


def rest_of(groups: Sequence[Group], n: int, patients: int, right: dict[str, int]) -> list[Group]:
    """The cases that are in none of `groups`, as a group of their own: the sums tell its counts.

    How many patients these have is not known; at least all but those of the groups.
    """
    left = n - sum(group.n for group in groups)
    if not left:
        return []
    others = max(patients - sum(group.patients for group in groups), 1)
    rights = {m: right[m] - sum(group.right[m] for group in groups) for m in right}
    return [Group(left, others, rights)]


def partner(counts: Sequence[tuple[int | None, int]], zeros: bool = True) -> int | None:
    """The place of the count to hide with the only hidden one, whose sum would tell it, or with
    several that are small even together; of (shown, count), the smallest that is not 0, then, with
    the only one, a 0 if `zeros`. None where none has to or can be."""
    hidden = [n for shown, n in counts if shown is None]
    if len(hidden) != 1 and not is_small(sum(hidden)):
        return None
    zeros = zeros and len(hidden) == 1
    others = [i for i, (shown, n) in enumerate(counts) if shown is not None and (n or zeros)]
    return min(others, key=lambda i: (not counts[i][1], counts[i][1]), default=None)


def protect(partition: Sequence[Group], patients: int) -> None:
    """Marks what is kept back of groups that are a whole together, of `patients` patients.

    A group is hidden that has fewer than 11 cases or patients; with one alone, or several that may
    be of fewer than 11 patients together, the next smallest. A model's score of a group is kept
    back where its right or its wrong answers are small; where the whole's would tell them all the
    same, the score of the group with the next fewest too. Marks that are there already stay.
    """
    for group in partition:
        group.hidden |= is_small(group.n) or is_small(group.patients)
    while (shown := [group for group in partition if not group.hidden]) and len(shown) < len(
        partition
    ):
        hidden = [group for group in partition if group.hidden]
        # A patient may have cases in several groups; these are together of at least so many.
        least = max(group.patients for group in hidden)
        least = max(least, patients - sum(group.patients for group in shown))
        if len(hidden) > 1 and least >= SMALLEST_CELL:
            break
        min(shown, key=lambda group: group.n).hidden = True
    for model in partition[0].right if partition else ():
        for group in partition:
            wrong = group.n - group.right[model]
            if group.hidden or is_small(group.right[model]) or is_small(wrong):
                group.unscored.add(model)
        changed = True
        while changed:
            changed = False
            for right in (True, False):
                counts = [g.right[model] if right else g.n - g.right[model] for g in partition]
                place = partner(
                    [
                        (None if model in group.unscored else count, count)
                        for group, count in zip(partition, counts, strict=True)
                    ]
                )
                if place is not None:
                    partition[place].unscored.add(model)
                    changed = True


def protect_alike(partitions: Sequence[Sequence[Group]], patients: int) -> None:
    """`protect` of several partitions of the same cases, among which a group can stand twice.

    All cases of a site may have the same code, and a modality is a class of its task: groups of as
    many cases, patients and right answers are taken for the same, and none is scored where another
    is not.
    """
    groups = [group for partition in partitions for group in partition]
    before = None
    while before != (before := sum(group.marks() for group in groups)):
        for partition in partitions:
            protect(partition, patients)
        unscored = {(g.n, g.patients, m, g.right[m]) for g in groups for m in g.unscored}
        for group in groups:
            group.unscored |= {
                m
                for m, right in group.right.items()
                if (group.n, group.patients, m, right) in unscored
            }


def thin_out(
    points: Iterable[tuple[int, ...]], known: Sequence[tuple[int, ...]]
) -> list[tuple[int, ...]]:
    """Running counts, of cases and kinds of them, that differ by no small count.

    Args:
      points: those to choose from, the first first.
      known: those that are told anyhow, and are chosen where they are among the points.
    """
    told, chosen = list(known), []
    for point in points:
        if point not in known and any(
            is_small(abs(a - b)) for other in told for a, b in zip(point, other, strict=True)
        ):
            continue
        told.append(point)
        chosen.append(point)
    return chosen
