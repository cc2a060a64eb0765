"""Resampling: what a metric would have been on other rows of the same kind."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from airflow_mlops.core.metrics import Metric
    from airflow_mlops.core.predictions import Graded

Array = NDArray[Any]

#: More blocks make the standard error no better worth having, and the matrix product slower.
MOST_BLOCKS = 1_000
#: Rows per block at least, in cube roots of all rows, and multiple of the length that estimates the error best. Longer blocks
#: than that estimate it less well but err to the safe side: see ``benchmarks/false_promotion.py``.
BLOCK_LENGTH_FACTOR, SAFETY_FACTOR = 3.0, 2.0
#: Blocks at least, however long the rows remember; the test has as many degrees of freedom as there are independent pieces.
FEWEST_BLOCKS = 10
#: A metric that is only a number is scored again on every resample; so many are affordable.
SLOW_RESAMPLES = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """Rows in time order cut into blocks of neighbors, and how often each block is drawn in each resample.

    Neighbors err alike: an hour of rain makes every trip in it late. Drawing single rows would take such rows for
    independent evidence and find differences where there are none; drawing blocks keeps neighbors together.

    Source: Carlstein, "The use of subseries values for estimating the variance of a general statistic from a stationary
    sequence", Annals of Statistics 14, 1986; Künsch, "The jackknife and the bootstrap for general stationary
    observations", Annals of Statistics 17, 1989 (block length growing with the cube root of the rows).

    :param starts: first row of each block, shape ``(blocks,)``.
    :param row_count: rows in all.
    :param weights: how often each block is drawn, shape ``(resamples, blocks)``.
    :param pieces: independent pieces the rows amount to; fewer than the blocks where rows remember longer than a block.
    """

    starts: Array
    row_count: int
    weights: Array
    pieces: float
    #: Sums of metrics that count the same cells (precision, recall, ...), per answers: counted once.
    _counted: dict[tuple[Any, int], Array] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def draw(
        cls, row_count: int, *, differences: Array | None = None, resamples: int = 1_000, seed: int = 0
    ) -> Blocks:
        """Cut and draw.

        :param row_count: at least one.
        :param differences: per row, between the losses that are compared; how long they remember decides the length of the
            blocks.
        :param resamples: bootstrap samples.
        :param seed: of the draws.
        """
        length = max(
            math.ceil(BLOCK_LENGTH_FACTOR * row_count ** (1.0 / 3.0)), math.ceil(row_count / MOST_BLOCKS)
        )
        wanted = length
        if differences is not None:
            wanted = max(length, math.ceil(SAFETY_FACTOR * best_block_length(differences)))
            length = min(wanted, max(length, row_count // FEWEST_BLOCKS))
        count = max(1, row_count // length)
        starts = np.linspace(0, row_count, count, endpoint=False).astype(np.int64)
        draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1.0 / count), size=resamples)
        return cls(
            starts=starts,
            row_count=row_count,
            weights=draws.astype(np.float64),
            pieces=min(float(count), row_count / wanted),
        )

    def standard_error(self, resampled: Array) -> float:
        """Give the standard error from resamples; draws from few blocks vary too little by ``sqrt((blocks - 1) / blocks)``.

        Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, section 5.3.

        :param resampled: shape ``(resamples,)``.
        :returns: infinite where there is nothing to estimate it from.
        """
        known = resampled[np.isfinite(resampled)]
        if self.count < 2 or len(known) < 2:
            return math.inf
        return float(np.std(known, ddof=1)) * math.sqrt(self.count / (self.count - 1.0))

    @property
    def freedom(self) -> float:
        """Degrees of freedom of an error that is estimated from them."""
        return max(2.0, self.pieces - 1.0)

    @property
    def count(self) -> int:
        """Number of blocks."""
        return len(self.starts)

    def resample(self, metric: Metric, graded: Graded, value: float) -> Array:
        """Give the metric on every resample.

        Metrics that are functions of sums over rows cost one pass over the rows and one matrix product. Where the sums are
        coarser than the metric (ranking, in bins of the score), the resamples are moved by what the binning takes.

        :param value: the metric on all rows.
        :returns: shape ``(resamples,)``; fewer for a metric that is only a number.
        """
        sums = self._sums(metric, graded)
        if sums is None or metric.of_sums is None:
            return self._score_again(metric, graded)
        whole = float(metric.of_sums(sums.sum(axis=0)))
        return np.asarray(metric.of_sums(self.weights @ sums) + (value - whole))

    def _sums(self, metric: Metric, graded: Graded) -> Array | None:
        if metric.cells is None:
            return metric.block_sums(graded, self.starts)
        key = (metric.cells, id(graded))
        if key not in self._counted:
            sums = metric.block_sums(graded, self.starts)
            if sums is None:
                return None
            self._counted[key] = sums
        return self._counted[key]

    def _score_again(self, metric: Metric, graded: Graded) -> Array:
        ends = np.append(self.starts[1:], self.row_count)
        rows = [np.arange(start, end) for start, end in zip(self.starts, ends, strict=True)]
        values = []
        for weights in self.weights[:SLOW_RESAMPLES].astype(int):
            drawn = np.concatenate([rows[block] for block in np.repeat(np.arange(self.count), weights)])
            values.append(metric.score(graded.take(drawn)))
        return np.array(values)


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
    value: float, resampled: Array, blocks: Blocks, tail: float
) -> tuple[float, float] | None:
    """Give a percentile interval, stretched about the value where few blocks would make it too narrow.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, section 13.3; Hesterberg, "What teachers should
    know about the bootstrap", The American Statistician 69, 2015, section 3.4 (the stretch by Student's t).

    :param value: on all rows.
    :param resampled: on the resamples.
    :param blocks: that were drawn.
    :param tail: probability left out on either side, such as 0.025.
    :returns: lower and upper end; ``None`` with fewer than two blocks.
    """
    known = resampled[np.isfinite(resampled)]
    if blocks.count < 2 or len(known) < 2:
        return None
    stretch = t_quantile(1.0 - tail, blocks.freedom) / _normal_quantile(1.0 - tail)
    stretch *= math.sqrt(blocks.count / (blocks.count - 1.0))
    low, high = value + stretch * (np.quantile(known, [tail, 1.0 - tail]) - value)
    return float(low), float(high)


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
