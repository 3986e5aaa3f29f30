"""How sure: intervals by bootstrap over patients, and paired tests of two models.

Cases of one patient are not independent, so the bootstrap draws patients and takes all their
cases. No function returns NaN: where nothing differs, the result is defined and documented.
"""

import functools
import math
from collections.abc import Iterator, Sequence

import numpy as np
from scipy import stats

LEVEL = 0.95
# Counted up whenever an interval is defined anew: scores written before are then scored again.
INTERVAL_METHOD = 5
EXACT_CASES = 300  # that differ; enumerating the Wilcoxon test takes 20 ms there, and grows cubed
ADDED_CASES = 0.25  # wrong and right ones each, see `variance_factor`; of macro scores, where a
ADDED_CASES_MACRO = 0.5  # single case may be all of a class
_CHUNK_ENTRIES = 4_000_000  # weights held at once: 32 MB
_KEPT_ENTRIES = 200_000_000  # draws kept from one use to the next, at most: 400 MB


def _draw(rng: np.random.Generator, count: int, rows: int) -> np.ndarray:
    """How often each of `count` patients is drawn: uint16 [rows, count]."""
    drawn = np.empty((rows, count), dtype=np.uint16)
    for row in drawn:
        row[:] = np.bincount(rng.integers(count, size=count), minlength=count)
    return drawn


# The scores and tests of a report all draw from the same patients with the same seed.
@functools.lru_cache(maxsize=2)
def _kept_draws(count: int, resamples: int, seed: int) -> np.ndarray:
    return _draw(np.random.default_rng(seed), count, resamples)


class PatientBootstrap:
    """Draws patients with replacement; the same seed and patients give the same draws.

    Attributes:
      count: number of distinct patients, P.
      index: int [N], each case's patient, patients in sorted order.
    """

    def __init__(self, patients: Sequence[str], resamples: int, seed: int):
        if not len(patients):
            raise ValueError("no cases to resample; the split or the predictions are empty")
        names, self.index = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
        self.count = len(names)
        self.resamples = resamples
        self.seed = seed

    def weights(self) -> Iterator[np.ndarray]:
        """How often each patient is drawn, resample by resample.

        Yields float64 [chunk, P]; each row sums to P. The draws depend on the number of patients
        and the seed alone, not on the chunking.
        """
        chunk = max(1, _CHUNK_ENTRIES // self.count)
        if self.resamples * self.count <= _KEPT_ENTRIES:
            drawn = _kept_draws(self.count, self.resamples, self.seed)
            for start in range(0, self.resamples, chunk):
                yield drawn[start : start + chunk].astype(np.float64)
            return
        rng = np.random.default_rng(self.seed)
        for start in range(0, self.resamples, chunk):
            rows = min(chunk, self.resamples - start)
            yield _draw(rng, self.count, rows).astype(np.float64)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sums within each patient: `values` [N, M] -> [P, M]."""
        return np.stack(
            [
                np.bincount(self.index, weights=column, minlength=self.count)
                for column in np.asarray(values, dtype=np.float64).T
            ],
            axis=1,
        )

    def mean_samples(self, values: np.ndarray, within: np.ndarray | None = None) -> np.ndarray:
        """Means over the drawn cases: `values` [N, M] -> [resamples, M].

        `within` (bool [N, M]) tells the cases that each column's mean is taken of; a resample that
        draws none of them is NaN, which `interval` leaves out.
        """
        counted = np.ones_like(values) if within is None else within.astype(np.float64)
        totals, sizes = self.sums(values * counted), self.sums(counted)
        samples = []
        for weights in self.weights():
            drawn = weights @ sizes
            samples.append(
                np.divide(weights @ totals, drawn, out=np.full_like(drawn, np.nan), where=drawn > 0)
            )
        return np.concatenate(samples)

    def interval(
        self, samples: np.ndarray, patients: int | None = None
    ) -> tuple[float, float] | tuple[None, None]:
        """The central 95 % of bootstrap samples [B], expanded for few patients.

        The percentile interval is too narrow with few draws' worth of patients, by the factor that
        tells a t interval from a normal one; its quantiles are moved outward to
        Phi(sqrt(P / (P - 1)) t(0.025, P - 1)) (Hesterberg, The American Statistician 2015;69:371).
        `patients` is P where the samples are of a part of the patients only. (None, None) where
        no sample is defined.
        """
        samples = samples[~np.isnan(samples)]
        if not len(samples):
            return None, None
        count = self.count if patients is None else patients
        tail = (1 - LEVEL) / 2
        if count > 1:
            tail = float(
                stats.norm.cdf(math.sqrt(count / (count - 1)) * stats.t.ppf(tail, count - 1))
            )
        low, high = np.quantile(samples, [tail, 1 - tail])
        return float(low), float(high)

    def share_interval(
        self, value: float, variance: float, patients: int | None = None
    ) -> tuple[float, float]:
        """Wilson's 95 % interval of a score from 0 to 1 of which `variance` is an estimate.

        Its ratio to the binomial one tells how many independent cases these are worth,
        n = value (1 - value) / variance, and the score interval of n cases holds: all u with
        |value - u| <= t sqrt(u (1 - u) / n) (Wilson, J Am Stat Assoc 1927;22:209; effective size
        as Korn and Graubard, Survey Methodology 1998;24:193), with t Student's with P - 1 degrees
        of freedom. The simulations in the tests show the coverage near 1, where the percentile
        interval falls to about 90 %. Without a variance: see `constant_interval`.

        Args:
          value: of the score, between 0 and 1 where there is a variance.
          variance: of the score, over test splits; unbiased, see `unbiased_variance`.
          patients: P where the score is of a part of the patients only.
        """
        count = self.count if patients is None else patients
        if count == 1 or variance < 1e-24:
            return constant_interval(value, count)
        t = float(stats.t.ppf((1 + LEVEL) / 2, count - 1))
        over_n = t**2 * variance / (value * (1 - value))  # t^2 / n
        centre = value + over_n / 2
        half = math.sqrt(over_n * value * (1 - value) + over_n**2 / 4)
        low, high = ((centre + end) / (1 + over_n) for end in (-half, half))
        return max(low, 0.0), min(high, 1.0)

    def centred_interval(
        self, value: float, samples: np.ndarray, least: float, most: float
    ) -> tuple[float, float]:
        """`interval` moved so that the samples' mean lies on `value`, cut to [least, most].

        For scores of 0 or 1 whose resamples differ, which then lie on one side of it, and for
        ratios of sums. Where no sample differs from another: see `constant_interval`.
        """
        if _alike(samples):
            return constant_interval(value, self.count, least, most)
        low, high = self.interval(samples - samples.mean() + value)
        # The value is inside unless the samples are very skewed; then the end is the value itself.
        return max(min(low, value), least), min(max(high, value), most)


def paired_interval(
    original: dict[str, float], tuned: dict[str, float], changes: np.ndarray
) -> tuple[float, float]:
    """The 95 % interval of tuned less original, of two scores {value, low, high} from 0 to 1 on the
    same patients.

    Newcombe's: each end is as far from the difference as sqrt(a^2 + b^2 - 2 r a b), a and b being
    how far the ends of the two are from their values on that side, and r their correlation (Stat
    Med 1998;17:2635, method 10; Zou and Donner, Stat Med 2008;27:1693). So it is as good near 0 and
    1 as theirs are, where the central 95 % of paired resamples cover 84 to 90 %.

    Args:
      changes: float [2, N], how both change together, by resample or by patient left out: r is
        their correlation, 0 where one of them does not change.
    """
    changes = changes - changes.mean(axis=1, keepdims=True)
    both, (first, second) = float(changes[0] @ changes[1]), (changes**2).sum(axis=1)
    r = both / math.sqrt(first * second) if min(first, second) > 1e-24 else 0.0

    def away(a: float, b: float) -> float:
        return math.sqrt(max(a**2 + b**2 - 2 * r * a * b, 0.0))

    difference = tuned["value"] - original["value"]
    down = away(tuned["value"] - tuned["low"], original["high"] - original["value"])
    up = away(tuned["high"] - tuned["value"], original["value"] - original["low"])
    return max(difference - down, -1.0), min(difference + up, 1.0)


def unbiased_variance(samples: np.ndarray, patients: int) -> float:
    """The variance of bootstrap samples [B] over (P - 1) / P, by which it is too small; 0 of one
    patient."""
    if patients == 1 or _alike(samples):
        return 0.0
    return float(samples.var()) * patients / (patients - 1)


def variance_factor(
    value: float,
    influence: np.ndarray,
    size: float,
    wrong: tuple[float, float],
    right: tuple[float, float],
    cases: float = ADDED_CASES,
) -> float:
    """How many times a score's variance is larger where a part of a wrong case and as much of a
    right one (a quarter, or `cases`) are added to the split, in patients all of whose cases are so.

    Where few patients hold the errors, these are often alone by chance, and the resamples then
    tell nothing of how the cases of a patient agree: the effective number of cases comes out too
    high just where the score does. Agresti and Coull (Am Stat 1998;52:119) add cases to a share;
    here they go into the effective number alone, as whole patients, and how many they are was
    chosen by simulation. With the linear influences z of the P patients on the score (their
    squares sum to its variance V), e added patients of either kind, and their influences a,
    V becomes (V + e sum a^2 - (e sum a)^2 / (P + 2 e)) P / (P + 2 e), and the value u becomes
    u + e sum a P / (P + 2 e), the sums being over both kinds.
    The factor is the growth of V / (u (1 - u)). It is 1 exactly for a share of right answers where
    each patient has one case, and nears 1 with many errors.

    Args:
      influence: z, float [P], of sum 0.
      size: cases of a patient, on average; e = `cases` / size.
      wrong, right: mean and mean square of the influence of a patient, over the patients, if all
        of its cases were wrong, or right.
      cases: how many of either kind are added.
    """
    added, patients = cases / size, len(influence)
    variance = float(influence @ influence)
    if variance <= 0:
        return 1.0
    total, shift = patients + 2 * added, added * (wrong[0] + right[0])
    grown = (variance + added * (wrong[1] + right[1]) - shift**2 / total) * patients / total
    moved = min(max(value + shift * patients / total, 1e-9), 1 - 1e-9)
    return grown / variance * value * (1 - value) / (moved * (1 - moved))


def exact_share_interval(hits: int, patients: int) -> tuple[float, float]:
    """Clopper and Pearson's 95 % interval of `hits` among `patients` (Biometrika 1934;26:404)."""
    result = stats.binomtest(hits, patients).proportion_ci(LEVEL, method="exact")
    return float(result.low), float(result.high)


def constant_interval(
    value: float, patients: int, least: float = 0.0, most: float = 1.0
) -> tuple[float, float]:
    """The 95 % interval of a score from which no resample of `patients` patients differs.

    A bootstrap would call it certain, even of a single patient. At most a share u of all patients
    differ from it, u the upper Clopper-Pearson end of 0 of `patients`, and none of these by more
    than to `least` or `most`: (1 - u) value + u least to (1 - u) value + u most. For a share of 0
    or 1 this is the exact binomial interval. F1 is no mean over patients; there it is a rule of
    thumb, and better than a point.
    """
    share = exact_share_interval(0, patients)[1]
    low, high = ((1 - share) * value + share * end for end in (least, most))
    return max(low, least), min(high, most)


def _alike(samples: np.ndarray) -> bool:
    return bool(np.ptp(samples) < 1e-12)


def bootstrap_means(
    columns: dict[str, Sequence[float]],
    patients: Sequence[str],
    *,
    resamples: int = 1000,
    seed: int = 0,
    shares: Sequence[str] = (),
    within: dict[str, np.ndarray] | None = None,
) -> dict[str, dict[str, float | None]]:
    """Mean over cases of each column with its 95 % interval by patient: {name: {value, low, high}}.

    All columns [N] are resampled together, so they cost little more than one.

    Args:
      resamples: 0 leaves the intervals out (None).
      shares: names of columns within 0 and 1; their intervals are `share_interval`, the others'
        the percentile `interval`.
      within: bool [N] for the columns that are averaged over some of the cases only. With none
        of them the value is None.
    """
    names = list(columns)
    values = np.stack([np.asarray(columns[name], dtype=np.float64) for name in names], axis=1)
    draw = PatientBootstrap(patients, resamples, seed)
    inside = np.ones(values.shape, dtype=bool)
    for name, chosen in (within or {}).items():
        inside[:, names.index(name)] = chosen
    samples = draw.mean_samples(values, inside) if resamples else None
    result = {}
    for i, name in enumerate(names):
        chosen = values[inside[:, i], i]
        if not len(chosen):
            result[name] = {"value": None, "low": None, "high": None}
            continue
        value = float(chosen.mean())
        low = high = None
        if resamples:
            count = len(np.unique(draw.index[inside[:, i]]))
            drawn = samples[~np.isnan(samples[:, i]), i]
            if name in shares and (len(drawn) or count == 1):
                variance = unbiased_variance(drawn, count)
                variance *= _factor_of_mean(value, values[:, i], inside[:, i], draw)
                low, high = draw.share_interval(value, variance, count)
            else:
                low, high = draw.interval(drawn, count)
        result[name] = {"value": value, "low": low, "high": high}
    return result


def _factor_of_mean(
    value: float, column: np.ndarray, inside: np.ndarray, draw: PatientBootstrap
) -> float:
    """`variance_factor` of the mean of the cases `inside` [N]. Wrong is the least of their values,
    right the largest: 0 and 1 of right and wrong, but less of a score whose values lie close."""
    effect = np.where(inside, column - value, 0.0) / inside.sum()
    influence, sizes = draw.sums(np.stack([effect, inside], axis=1)).T
    influence, sizes = influence[sizes > 0], sizes[sizes > 0]
    ends = (effect[inside].min(), effect[inside].max())
    wrong, right = ((end * sizes.mean(), end**2 * (sizes**2).mean()) for end in ends)
    return variance_factor(value, influence, float(sizes.mean()), wrong, right)


def bootstrap_mean(
    values: Sequence[float],
    patients: Sequence[str],
    *,
    resamples: int = 1000,
    seed: int = 0,
    share: bool = False,
) -> dict[str, float | None]:
    """`bootstrap_means` of one column: {value, low, high}.

    `share`: the values lie within 0 and 1, and the interval is `share_interval`. Of other values of
    a single patient, or of patients all alike, it is the mean itself: there is nothing to resample.
    """
    return bootstrap_means(
        {"mean": values},
        patients,
        resamples=resamples,
        seed=seed,
        shares=("mean",) if share else (),
    )["mean"]


def _differences(tuned: Sequence[float], original: Sequence[float]) -> np.ndarray:
    # Rounding undoes the last bits of float arithmetic, which would break ties between ranks.
    return np.round(
        np.asarray(tuned, dtype=np.float64) - np.asarray(original, dtype=np.float64), 12
    )


def wilcoxon_one_sided(tuned: Sequence[float], original: Sequence[float]) -> dict:
    """One-sided Wilcoxon signed-rank test that `tuned` is greater than `original`, case by case.

    Cases on which the models tie are left out (zero_method "wilcox"); differences of one size share
    their mean rank. Under the null hypothesis each of the n that are left is as likely for tuned as
    against it, and p is the exact probability of a statistic as large or larger, given the ranks:
    binomial where all differences are of one size, as with right or wrong, else enumerated (see
    `_signed_rank_tail`) for n up to EXACT_CASES. Above that it is scipy.stats.wilcoxon's normal
    approximation, its variance corrected for ties, without continuity correction. Where the models
    never differ the statistic is 0 and p is 1.

    Returns {statistic, p_value, method, alternative, n, n_nonzero, zero_method}; the statistic is
    the sum of the ranks of the cases in which tuned is better; method is "exact" or "normal".
    """
    difference = _differences(tuned, original)
    nonzero = difference[difference != 0]
    ranks = stats.rankdata(np.abs(nonzero))
    statistic, count = float(ranks[nonzero > 0].sum()), len(nonzero)
    method = "exact"
    if not count:
        p_value = 1.0
    elif np.ptp(ranks) == 0:
        wins = int((nonzero > 0).sum())
        p_value = float(stats.binomtest(wins, count, alternative="greater").pvalue)
    elif count <= EXACT_CASES:
        p_value = _signed_rank_tail(ranks, statistic)
    else:
        p_value, method = float(stats.wilcoxon(nonzero, alternative="greater").pvalue), "normal"
    return {
        "statistic": statistic,
        "p_value": p_value,
        "method": method,
        "alternative": "greater",
        "n": len(difference),
        "n_nonzero": count,
        "zero_method": "wilcox",
    }


def _signed_rank_tail(ranks: np.ndarray, statistic: float) -> float:
    """The chance that those of `ranks` [n] that n fair coins choose sum to `statistic` or more.

    The sum of those not chosen is then at most the rest; its chances are built up rank by rank.
    Doubled, mean ranks of ties are whole numbers.
    """
    doubled = np.sort(np.rint(2 * ranks).astype(int))
    most = int(doubled.sum()) - round(2 * statistic)
    chances = np.zeros(most + 1)
    chances[0] = 1.0
    for rank in doubled:
        chances /= 2
        if rank <= most:
            chances[rank:] += chances[:-rank].copy()
    return min(float(chances.sum()), 1.0)


def rank_biserial(tuned: Sequence[float], original: Sequence[float]) -> float:
    """Matched-pairs rank-biserial correlation: (W+ - W-) / (W+ + W-) of the signed ranks, between
    -1 and 1 (Kerby, Comprehensive Psychology 2014;3:11.IT.3.1). 0 where the models never differ.
    """
    difference = _differences(tuned, original)
    difference = difference[difference != 0]
    if not len(difference):
        return 0.0
    ranks = stats.rankdata(np.abs(difference))
    return float((ranks * np.sign(difference)).sum() / ranks.sum())


def cohen_h(tuned: float, original: float) -> float:
    """Cohen's h of two shares: 2 asin sqrt(tuned) - 2 asin sqrt(original), between -pi and pi."""
    return 2 * math.asin(math.sqrt(tuned)) - 2 * math.asin(math.sqrt(original))


def paired_odds_ratio(only_original: int, only_tuned: int) -> float | None:
    """only_tuned / only_original, McNemar's odds ratio; 0.5 is added to both where one of them is 0
    (Haldane). None where there are no such cases."""
    if not only_original and not only_tuned:
        return None
    if not only_original or not only_tuned:
        return (only_tuned + 0.5) / (only_original + 0.5)
    return only_tuned / only_original


def mcnemar_exact(only_original: int, only_tuned: int) -> float:
    """Two-sided p of McNemar's exact test: binomial on the cases that just one model gets right.

    1.0 where there are no such cases.
    """
    discordant = only_original + only_tuned
    return float(stats.binomtest(only_tuned, discordant, 0.5).pvalue) if discordant else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given (Holm, Scand J Stat 1979;6:65)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted
