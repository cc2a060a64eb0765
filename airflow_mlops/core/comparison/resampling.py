"""Resampling: what a metric would have been on other rows of the same kind."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from airflow_mlops.core.comparison.metrics import row_losses

if TYPE_CHECKING:
    from airflow_mlops.core.comparison.metric import Metric
    from airflow_mlops.core.comparison.predictions import Graded

Array = NDArray[Any]

#: More blocks make the standard error no better worth having, and the matrix product slower.
MOST_BLOCKS = 1_000
#: Fewer rows say nothing of others, whatever they show.
FEWEST_ROWS = 20
#: Slow waves an error is measured with: a share (half the one of the source) of the blocks to the power 2/3, at least six. More see little of what
#: rows remember, fewer cost power: see ``benchmarks/false_promotion.py``.
WAVE_SHARE, FEWEST_WAVES = 0.2, 6
#: A memory beyond this can't be told from rows that drift away for ever. What so few rows leave open about it is this many of its standard
#: errors more than one, over the number of rows: see ``benchmarks/false_promotion.py``.
LONGEST_MEMORY, SHORT_SERIES = 0.99, 40.0
#: Fewer periods than this show no rhythm.
FEWEST_PERIODS = 4
#: Rows per cluster at least, in cube roots of all rows, and multiple of the length that estimates an error best.
CLUSTER_FACTOR, SAFETY_FACTOR = 3.0, 2.0
#: Clusters at least, however long the rows remember.
FEWEST_CLUSTERS = 10
#: Rows that a ratio is taken of, at least: what so few show is chance. A ratio counts where it is this share of a mean of ratios or
#: more: one rare label among dozens does not make the others' unmeasured.
FEWEST_OF_RATIO, COUNTED_SHARE = 5, 0.1
#: A metric that is only a number is scored again on every resample; so many are affordable.
SLOW_RESAMPLES = 200


@dataclass(frozen=True, slots=True)
class Resampled:
    """A metric, or the difference of two, on other rows.

    :param values: on every resample, shape ``(resamples,)``.
    :param shares: what each block adds to it, shape ``(blocks,)``; up to a factor for a metric that is only a number. No number
        where the metric hangs on the block.
    """

    values: Array
    shares: Array

    def __sub__(self, other: Resampled) -> Resampled:
        """Give the difference, resample by resample."""
        return Resampled(self.values - other.values, self.shares - other.shares)

    def times(self, factor: float) -> Resampled:
        """Give the same in other units or the other direction."""
        return Resampled(factor * self.values, factor * self.shares)

    @property
    def standard_error(self) -> float:
        """Standard error: of the resamples, which hold blocks for independent, times what neighboring blocks have in common.

        Infinite where there is nothing to estimate it from.
        """
        known = self.values[np.isfinite(self.values)]
        if len(known) < 2:
            return math.inf
        return float(np.std(known, ddof=1)) * common_factor(self.shares)


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """Rows in time order cut into blocks of neighbors, and how often each block is drawn in each resample.

    A block is a single row where there are no more than a thousand of them. What neighbors have in common is not left to the
    draws: it is measured, by :func:`common_factor`.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 6 and 8.

    :param starts: first row of each block, shape ``(blocks,)``.
    :param row_count: rows in all.
    :param weights: how often each block is drawn, shape ``(resamples, blocks)``.
    """

    starts: Array
    row_count: int
    weights: Array
    #: Sums of metrics that count the same cells (precision, recall, ...), per answers: counted once.
    _counted: dict[tuple[Any, int], Array] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def draw(cls, row_count: int, *, resamples: int = 1_000, seed: int = 0) -> Blocks:
        """Cut and draw.

        :param row_count: at least one.
        :param resamples: bootstrap samples.
        :param seed: of the draws.
        """
        count = min(row_count, MOST_BLOCKS)
        drawn = np.random.default_rng(seed).integers(0, count, (resamples, count))
        drawn += np.arange(resamples)[:, None] * count
        times = np.bincount(drawn.ravel(), minlength=resamples * count).reshape(resamples, count)
        return cls(starts=_cut(row_count, count), row_count=row_count, weights=times.astype(np.float64))

    @property
    def count(self) -> int:
        """Number of blocks."""
        return len(self.starts)

    @property
    def freedom(self) -> int:
        """Degrees of freedom of an error that is estimated from them: the waves it is measured with, less one each for memory and rhythm."""
        return degrees_of_freedom(self.count)

    def resample(self, metric: Metric, graded: Graded, value: float) -> Resampled:
        """Give the metric on every resample, and what each block adds to it.

        Metrics that are functions of sums over rows cost one pass over the rows and one matrix product. Where the sums are
        coarser than the metric (ranking, in bins of the score), the resamples are moved by what the binning takes; so are those of a metric
        that chance makes larger, by what resampling adds.

        :param value: the metric on all rows.
        :returns: fewer resamples for a metric that is only a number.
        """
        if metric.of_sums is None:
            return Resampled(self._score_again(metric, graded), self._losses(metric, graded))
        if metric.label_cells is None or graded.label_count == 2:
            sums = self._sums(metric, graded)
            drawn, whole = self._again(metric.of_sums, sums)
            if metric.bases is not None:
                drawn = Resampled(drawn.values, np.where(_hang_on(metric.bases, sums), np.nan, drawn.shares))
        else:
            drawn, whole = self._again_by_label(metric, metric.of_sums, graded)
        if metric.biased:
            whole = float(np.mean(drawn.values))
        return Resampled(drawn.values + (value - whole), drawn.shares)

    def _again(self, of_sums: Callable[[Array], Array], sums: Array) -> tuple[Resampled, float]:
        """Give a function of sums on every resample, what each block adds to it, and what it is on all rows."""
        total = sums.sum(axis=0)
        whole = float(of_sums(total))
        with np.errstate(invalid="ignore", divide="ignore"):
            shares = whole - np.asarray(of_sums(total - sums))
        return Resampled(np.asarray(of_sums(self.weights @ sums)), shares), whole

    def _again_by_label(
        self, metric: Metric, of_sums: Callable[[Array], Array], graded: Graded
    ) -> tuple[Resampled, float]:
        """Give the mean over labels, one after the other: the sums of hundreds would not fit into memory."""
        values, shares, whole = np.zeros(len(self.weights)), np.zeros(self.count), 0.0
        for label in range(graded.label_count):
            drawn, part = self._again(of_sums, metric.label_sums(graded, self.starts, label))
            values += drawn.values / graded.label_count
            shares += drawn.shares / graded.label_count
            whole += part / graded.label_count
        return Resampled(values, shares), whole

    def _losses(self, metric: Metric, graded: Graded) -> Array:
        """Sum the losses of each block, in the direction of the metric."""
        losses = row_losses(metric, graded).values
        return np.add.reduceat(losses, self.starts) * (-1.0 if metric.greater_is_better else 1.0)

    def _sums(self, metric: Metric, graded: Graded) -> Array:
        if metric.cells is None:
            return metric.block_sums(graded, self.starts)
        key = (metric.cells, id(graded))
        if key not in self._counted:
            self._counted[key] = metric.block_sums(graded, self.starts)
        return self._counted[key]

    def _score_again(self, metric: Metric, graded: Graded) -> Array:
        ends = np.append(self.starts[1:], self.row_count)
        rows = [np.arange(start, end) for start, end in zip(self.starts, ends, strict=True)]
        values = []
        for weights in self.weights[:SLOW_RESAMPLES].astype(int):
            drawn = np.concatenate([rows[block] for block in np.repeat(np.arange(self.count), weights)])
            values.append(metric.score(graded.take(drawn)))
        return np.array(values)


def _hang_on(bases: Callable[[Array], Array], sums: Array) -> Array:
    """Tell without which blocks a ratio would have no row left to be taken of, shape ``(blocks,)``; all, where it has few anyway.

    A ratio that is zero of zero on all rows, such as the precision of a model that never says yes, is zero on any of them.
    """
    whole = bases(sums.sum(axis=0))
    few = (whole > 0) & (whole < FEWEST_OF_RATIO)
    lost = (whole > 0) & (bases(sums.sum(axis=0) - sums) <= 0)
    return np.asarray((few | lost).mean(axis=-1) >= COUNTED_SHARE)


def common_factor(shares: Array) -> float:
    """Give how much larger the error of a sum is than if its terms were independent, for terms in time order.

    Neighbors err alike: an hour of rain makes every trip in it late. Taking such rows for independent evidence finds
    differences where there are none. What they have in common shows in slow waves: the terms are held against cosines of the
    longest periods, whose mean square estimates the variance of the sum; see :func:`degrees_of_freedom` for Student's t.
    Rows that remember long have less in the waves than in the sum itself; that is made up for, for a memory of the row before,
    at the upper end of what the rows leave open, and for one of the row a day, or any other rhythm, before where it is
    beyond chance. A trend is not memory: it is taken out before.

    Source: Lazarus, Lewis, Stock and Watson, "HAR inference: recommendations for practice", Journal of Business and
    Economic Statistics 36, 2018 (cosines); Andrews and Monahan, "An improved heteroskedasticity and
    autocorrelation consistent covariance matrix estimator", Econometrica 60, 1992 (recoloring).

    :param shares: shape ``(n,)``, about any level.
    :returns: infinite for fewer than 20 terms, or when one is not a number; one when all are equal.
    """
    count = len(shares)
    if count < FEWEST_ROWS or not np.isfinite(shares).all():
        return math.inf
    from scipy.fft import dct

    largest = float(np.max(np.abs(shares)))
    if largest == 0.0:
        return 1.0
    scaled = shares / largest  # squares of very large or small numbers are none
    centered = scaled - np.mean(scaled)
    spread = float(np.mean(np.square(centered)))
    if spread <= 1e-24:
        return 1.0
    memory, error = _memory(centered)
    longest = min(memory + (1.0 + SHORT_SERIES / count) * error, LONGEST_MEMORY)
    waves = _waves(count)
    power = np.square(dct(centered, type=2, norm="ortho")[1 : waves + 1])
    angles = np.pi * np.arange(1, waves + 1) / count
    repeated, rhythm = _rhythm(centered[1:] - max(memory, 0.0) * centered[:-1])
    seen = _seen(max(longest, 0.0), angles) * _seen(repeated, rhythm * angles)
    return math.sqrt(float(np.mean(power / seen)) / spread)


def degrees_of_freedom(count: int) -> int:
    """Give those of an error of so many terms: the waves it is measured with, less one each for memory and rhythm.

    >>> degrees_of_freedom(100), degrees_of_freedom(10_000)
    (4, 90)
    """
    return _waves(count) - 2


def _waves(count: int) -> int:
    return max(FEWEST_WAVES, int(WAVE_SHARE * count ** (2.0 / 3.0)))


def _seen(memory: float, angles: Array) -> Array:
    """Give the variance of a wave as a share of the one of the longest wave there could be, for a memory of the first order."""
    return np.asarray((1.0 - memory) ** 2 / (1.0 + memory**2 - 2.0 * memory * np.cos(angles)))


def _memory(centered: Array) -> tuple[float, float]:
    """Give what a term takes over from the one before, with its standard error.

    Source: Marriott and Pope, "Bias in the estimation of autocorrelations", Biometrika 41, 1954, and Shaman and Stine, "The
    bias of autoregressive coefficient estimators", JASA 83, 1988 (the bias, with a trend).
    """
    count = len(centered)
    time = np.linspace(-1.0, 1.0, count)
    rest = centered - time * (float(time @ centered) / float(time @ time))
    before = float(rest[:-1] @ rest[:-1])
    if before <= 1e-24 * float(centered @ centered):
        return 0.0, 0.0
    found = float(rest[1:] @ rest[:-1]) / before
    found += (2.0 + 4.0 * found) / count
    return found, math.sqrt(max(0.0, 1.0 - found**2) / count)


def _rhythm(news: Array) -> tuple[float, int]:
    """Find the distance at which terms resemble each other most, beyond what chance finds among so many distances.

    What is the same in every period is not memory: it does not make the sum less certain, and is taken out. What it hides is made
    up for by the bias of an autoregression whose mean is estimated from so few periods, and half a standard error.

    Source: Donoho and Johnstone, "Ideal spatial adaptation by wavelet shrinkage", Biometrika 81, 1994 (the largest of many);
    Marriott and Pope, "Bias in the estimation of autocorrelations", Biometrika 41, 1954.

    :param news: what a term has that the one before did not tell.
    :returns: how much it takes over from the one at that distance, and the distance in terms, of at most a quarter of them; zero
        where there is no rhythm.
    """
    count = len(news)
    centered = news - np.mean(news)
    power = np.abs(np.fft.rfft(centered, 2 * count)) ** 2
    common = np.fft.irfft(power)[:count]
    distances = np.arange(2, count // FEWEST_PERIODS + 1)
    pairs = count - distances
    alike = common[distances] / max(common[0], np.finfo(float).tiny) * count / pairs
    best = int(np.argmax(alike * np.sqrt(pairs)))
    if alike[best] * math.sqrt(pairs[best]) <= math.sqrt(2.0 * math.log(len(distances))):
        return 0.0, 0
    distance = int(distances[best])
    phase = np.arange(count) % distance
    rest = centered - (np.bincount(phase, weights=centered) / np.bincount(phase))[phase]
    within = float(rest @ rest)
    if within <= 1e-24 * float(common[0]):
        return 0.0, 0
    periods = count / distance
    repeated = float(rest[distance:] @ rest[:-distance]) / within * count / pairs[best]
    repeated = (repeated + 1.0 / periods + 0.5 / math.sqrt(pairs[best])) / (1.0 - 3.0 / periods)
    return min(max(repeated, 0.0), float(alike[best]), LONGEST_MEMORY), distance


def cut_clusters(row_count: int, differences: Array | None = None) -> Array:
    """Cut rows, in time order, into clusters that know little of each other: as long as the differences remember.

    Source: Carlstein, "The use of subseries values for estimating the variance of a general statistic from a stationary
    sequence", Annals of Statistics 14, 1986 (clusters that grow with the cube root of the rows).

    :param row_count: at least one.
    :param differences: per row, between the losses that are compared.
    :returns: first row of each cluster, ascending.
    """
    length = max(math.ceil(CLUSTER_FACTOR * row_count ** (1.0 / 3.0)), math.ceil(row_count / MOST_BLOCKS))
    if differences is not None:
        wanted = math.ceil(SAFETY_FACTOR * best_block_length(differences))
        length = max(length, min(wanted, row_count // FEWEST_CLUSTERS))
    return _cut(row_count, max(1, row_count // length))


def _cut(row_count: int, count: int) -> Array:
    return np.linspace(0, row_count, count, endpoint=False).astype(np.int64)


def best_block_length(series: Array) -> float:
    """Give the length of blocks with which the error of the series' mean is estimated best.

    Source: Politis and White, "Automatic block-length selection for the dependent bootstrap", Econometric Reviews 23,
    2004, section 3.2, with the correction of Patton, Politis and White, Econometric Reviews 28, 2009.

    :param series: shape ``(n,)``, in time order.
    """
    count = len(series)
    if count < 4:
        return 1.0
    centered = np.asarray(series, dtype=np.float64) - np.mean(series)
    power = np.abs(np.fft.rfft(centered, 2 * count)) ** 2
    lags = np.fft.irfft(power)[: count // 2] / count
    if not lags[0] > 0.0:
        return 1.0
    # The first lag after which a run of lags is no larger than chance.
    run = min(max(5, math.ceil(math.sqrt(math.log10(count)))), len(lags) - 1)
    small = np.abs(lags[1:] / lags[0]) < 2.0 * math.sqrt(math.log10(max(count, 10)) / count)
    runs = np.flatnonzero(np.convolve(small, np.ones(run), mode="valid") == run)
    memory = int(runs[0]) if runs.size else len(small)
    reach = min(max(1, 2 * memory), len(lags) - 1)
    distance = np.arange(1, reach + 1)
    taper = np.clip(2.0 * (1.0 - distance / reach), 0.0, 1.0)
    spectrum = lags[0] + 2.0 * float(np.sum(taper * lags[1 : reach + 1]))
    slope = 2.0 * float(np.sum(taper * distance * lags[1 : reach + 1]))
    if spectrum <= 0.0:
        return 1.0
    return max(1.0, float((1.5 * (slope / spectrum) ** 2 * count) ** (1.0 / 3.0)))


def percentile_interval(
    value: float, resampled: Resampled, freedom: int, tail: float
) -> tuple[float, float] | None:
    """Give a percentile interval, stretched about the value by what neighbors have in common, and by Student's t.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, section 13.3; Hesterberg, "What teachers should
    know about the bootstrap", The American Statistician 69, 2015, section 3.4 (the stretch by Student's t).

    :param value: on all rows.
    :param resampled: on the resamples.
    :param freedom: degrees of freedom.
    :param tail: probability left out on either side, such as 0.025.
    :returns: lower and upper end, with the value between them; ``None`` with too few rows to say.
    """
    known = resampled.values[np.isfinite(resampled.values)]
    factor = common_factor(resampled.shares)
    if len(known) < 2 or not math.isfinite(factor):
        return None
    stretch = factor * t_quantile(1.0 - tail, freedom) / _normal_quantile(1.0 - tail)
    low, high = value + stretch * (np.quantile(known, [tail, 1.0 - tail]) - value)
    return min(float(low), value), max(float(high), value)


def require_level(name: str, value: float) -> None:
    """Refuse a level of significance that tests nothing.

    :raises ValueError: naming it.
    """
    if not 0.0 < value < 0.5:
        raise ValueError(
            f"{name} is {value}: give a probability above 0 and below 0.5, such as 0.05 for five percent"
        )


def upper_tail(t: float, degrees_of_freedom: float) -> float:
    """Probability that Student's t exceeds ``t``.

    Source: Student, "The probable error of a mean", Biometrika 6, 1908.

    >>> round(upper_tail(1.812, 10), 3)
    0.05
    """
    from scipy.special import stdtr

    return float(stdtr(degrees_of_freedom, -t))


def describe_p(p_value: float) -> str:
    """Write a p-value for people: beyond four digits nobody should read anything into it.

    >>> describe_p(0.0312), describe_p(3e-19)
    ('p = 0.031', 'p < 0.0001')
    """
    return f"p = {p_value:.2g}" if p_value >= 1e-4 else "p < 0.0001"


def t_quantile(probability: float, degrees_of_freedom: float) -> float:
    """Quantile of Student's t.

    >>> round(t_quantile(0.95, 10), 3)
    1.812
    """
    from scipy.special import stdtrit

    return float(stdtrit(degrees_of_freedom, probability))


def _normal_quantile(probability: float) -> float:
    return NormalDist().inv_cdf(probability)
