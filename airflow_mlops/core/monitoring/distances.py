"""Distances of two columns of numbers, from the cells of their profiles, each with the interval that the exact value lies in.

Sides are always ``(reference, current)``.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from airflow_mlops.core.monitoring.statistics import Array, Measured, known

if TYPE_CHECKING:
    from airflow_mlops.core.profiles.profile_columns import NumericProfile

#: Smallest standard deviation a Wasserstein distance is divided by, as in Evidently.
SMALLEST_SCALE = 0.001


def wasserstein(reference: NumericProfile, current: NumericProfile) -> Measured:
    """Normed Wasserstein distance: area between the distribution functions over the reference's standard deviation.

    In each cell the area under both functions is known from the sum of its rows. Where the functions do not cross, the
    difference of both areas is the exact area between them; only a cell in which they may cross has an uncertain area.

    Source: Ramdas, Garcia Trillos and Cuturi, "On Wasserstein two-sample testing and related families of nonparametric
    tests", Entropy 19, 2017, section 2; norming as in Evidently 0.7.
    """
    scale = max(reference.standard_deviation, SMALLEST_SCALE)
    cells = _Cells.of(reference, current)
    signed = (
        cells.width * cells.start
        + cells.p * (cells.width - cells.p_at)
        - cells.q * (cells.width - cells.q_at)
    )
    # Both sides seen from the one that is ahead at the cell's start (at its end, where they are level at the start).
    ahead = np.where(cells.start != 0.0, cells.start, cells.end) >= 0.0
    lead, chase = np.where(ahead, cells.p, cells.q), np.where(ahead, cells.q, cells.p)
    lead_at, chase_at = np.where(ahead, cells.p_at, cells.q_at), np.where(ahead, cells.q_at, cells.p_at)
    start, end = np.abs(cells.start), np.where(ahead, cells.end, -cells.end)
    overtaken = np.maximum(chase - start, 0.0) * (cells.width - chase_at)
    caught_up = np.where(
        end >= 0.0, np.maximum(lead - end, 0.0) * lead_at, np.maximum(chase + end, 0.0) * chase_at
    )
    area = _area_between(cells)
    # Where both sides are single rows, all is known. What is left is in doubt, the less the more rows are spread in a cell.
    doubt = np.where(cells.p_alone & cells.q_alone, 0.0, 2.0 * np.minimum(overtaken, caught_up))
    low = np.where(cells.p_alone & cells.q_alone, area, np.abs(signed))
    fewest = np.minimum(
        np.where(cells.p_alone, np.inf, cells.p * reference.count),
        np.where(cells.q_alone, np.inf, cells.q * current.count),
    )
    smallest, largest = float(np.sum(low)), float(np.sum(low + doubt))
    value = min(max(float(np.sum(area)), smallest), largest)
    # Between the values of a discrete reference, rows may well be heaped on others: many are no better spread than few.
    error = float(np.sum(doubt / (1.0 if reference.layout.points else np.sqrt(1.0 + fewest))))
    return Measured(value / scale, smallest / scale, largest / scale, error / scale)


#: A spread below is none: dividing by it would overflow.
_NARROWEST = 1e-200


def _area_between(cells: _Cells) -> Array:
    """Integrate the difference of the distribution functions over each cell, rows spread evenly around their mean."""
    reach = [
        np.where(alone, 0.0, np.minimum(at, cells.width - at))
        for at, alone in ((cells.p_at, cells.p_alone), (cells.q_at, cells.q_alone))
    ]
    ends = [(cells.p_at - reach[0], cells.p_at + reach[0]), (cells.q_at - reach[1], cells.q_at + reach[1])]
    zero = np.zeros(len(cells.width))
    points = np.sort(np.stack((zero, *ends[0], *ends[1], cells.width)), axis=0)
    middle, length = (points[1:] + points[:-1]) / 2.0, np.diff(points, axis=0)
    height, slope = np.broadcast_to(cells.start, middle.shape).copy(), np.zeros(middle.shape)
    for share, (first, last), sign in ((cells.p, ends[0], 1.0), (cells.q, ends[1], -1.0)):
        wide = last - first > _NARROWEST
        spread = np.where(wide, last - first, 1.0)
        passed = np.where(wide, np.clip((middle - first) / spread, 0.0, 1.0), middle > first)
        rise = np.where(wide & (middle > first) & (middle < last), share / spread, 0.0)
        height += sign * share * passed
        slope += sign * rise
    # The area under a straight line's absolute value: a trapezoid, or two triangles where it crosses zero.
    left, right = height - slope * length / 2.0, height + slope * length / 2.0
    crosses = left * right < 0
    triangles = (left * left + right * right) / np.where(crosses, np.abs(left) + np.abs(right), 1.0)
    areas = length / 2.0 * np.where(crosses, triangles, np.abs(left) + np.abs(right))
    return np.asarray(areas.sum(axis=0))


def kolmogorov_smirnov_distance(reference: NumericProfile, current: NumericProfile) -> Measured:
    """Largest difference of the distribution functions; exact where every reference value has its cell.

    Source: Hodges, "The significance probability of the Smirnov two-sample test", Arkiv för Matematik 3, 1958.
    """
    cells = _Cells.of(reference, current)
    low = float(max(np.max(np.abs(cells.start), initial=0.0), np.max(np.abs(cells.end), initial=0.0)))
    # Where a cell has rows of one side only, or is a point, the difference is largest at one of its ends.
    open_cells = (cells.p > 0) & (cells.q > 0) & ~cells.is_point
    most = np.maximum(np.abs(cells.start + cells.p), np.abs(cells.start - cells.q))[open_cells]
    return Measured(low, low, max(low, float(np.max(most, initial=0.0))))


def kolmogorov_smirnov(reference: NumericProfile, current: NumericProfile) -> Measured:
    """P-value of the two-sample Kolmogorov-Smirnov test, as ``scipy.stats.ks_2samp`` gives it."""
    distance = kolmogorov_smirnov_distance(reference, current)
    sizes = (reference.count, current.count)
    if max(sizes) <= _EXACT_ROWS:
        from scipy import stats

        numbers = np.arange(len(reference.counts))
        sides = [np.repeat(numbers, side.counts) for side in (reference, current)]
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # it says when it takes its large-sample formula; the answer is the same
            value = float(stats.ks_2samp(*sides).pvalue)  # only the order matters, and cells are in order
        if distance.exact:
            return known(value)
        low = min(value, _large_sample(distance.high, *sizes))
        return Measured(value, low, value, value - low)
    low, high = (_large_sample(d, *sizes) for d in (distance.high, distance.low))
    return Measured(high, low, high, high - low)


def _large_sample(distance: float, reference_rows: int, current_rows: int) -> float:
    """Give scipy's p-value for large samples.

    Source: Simard and L'Ecuyer, "Computing the two-sided Kolmogorov-Smirnov distribution", Journal of Statistical Software
    39, 2011; with the harmonic sample size.
    """
    from scipy import stats

    size = max(1, round(reference_rows * current_rows / (reference_rows + current_rows)))
    return float(np.clip(stats.kstwo.sf(distance, size), 0.0, 1.0))


#: scipy computes the exact distribution up to so many rows a side.
_EXACT_ROWS = 10_000


def sturges_shares(reference: NumericProfile, current: NumericProfile) -> tuple[Array, Array]:
    """Give shares over Sturges' equal bins of both sides together, rows spread evenly over a cell.

    Source: Sturges, "The choice of a class interval", Journal of the American Statistical Association 21, 1926.
    """
    low, high = _range(reference, current)
    edges = np.histogram_bin_edges(
        [low, high], bins=sturges_count(reference.count + current.count), range=(low, high)
    )
    return _rebinned(reference, edges, (low, high)), _rebinned(current, edges, (low, high))


def sturges_count(rows: int) -> int:
    """Give Sturges' number of bins."""
    return int(np.ceil(np.log2(rows) + 1.0))


def _rebinned(profile: NumericProfile, edges: Array, ends: tuple[float, float]) -> Array:
    at = np.concatenate(([ends[0]], profile.edges, [ends[1]]))
    reached = np.concatenate(([0.0], np.cumsum(profile.counts))) / profile.count
    order = np.argsort(at, kind="stable")
    below = np.interp(edges, at[order], np.maximum.accumulate(reached[order]))
    below[0], below[-1] = 0.0, 1.0
    return np.diff(below)


def value_counts(profile: NumericProfile) -> dict[float, int] | None:
    """Give rows per distinct number of a column of points; ``None`` where some of the numbers are not known."""
    if not profile.layout.points:
        return None
    is_point = profile.layout.is_point
    points = profile.edges[np.flatnonzero(is_point) - 1]
    counted = {float(value): int(n) for value, n in zip(points, profile.counts[is_point], strict=True) if n}
    elsewhere = int(profile.counts[~is_point].sum())
    if elsewhere != sum(profile.unseen.values()):
        return None
    return counted | {float(value): n for value, n in profile.unseen.items()}


#: Distribution functions are level where they differ by no more than rounding does.
_LEVEL = 1e-14


class _Cells(NamedTuple):
    """Both sides over the cells: shares, distribution functions' difference at both ends, and where the rows are.

    ``p``, ``q``: share of the reference's and of the current rows; ``p_at``, ``q_at``: their mean distance to the left edge;
    ``p_alone``, ``q_alone``: whether they are at most one row, or all at the left edge, and so exactly at their mean.
    """

    p: Array
    q: Array
    p_at: Array
    q_at: Array
    start: Array
    end: Array
    width: Array
    is_point: Array
    p_alone: Array
    q_alone: Array

    @classmethod
    def of(cls, reference: NumericProfile, current: NumericProfile) -> _Cells:
        edges = reference.edges
        low, high = _range(reference, current)
        first, last = (edges[0], edges[-1]) if len(edges) else (0.0, 0.0)
        left = np.concatenate(([min(low, first)], edges)) if len(edges) else np.array([low])
        right = np.concatenate((edges, [max(high, last)])) if len(edges) else np.array([high])
        width = right - left
        # The first cell's offsets are distances to its right edge.
        moved = np.zeros(len(width))
        moved[0] = first - left[0]
        sides = []
        for side in (reference, current):
            mean = side.offsets / np.maximum(side.counts, 1) + moved
            at = np.clip(mean, 0.0, width)
            sides.append((side.counts / max(side.count, 1), at, (side.counts <= 1) | (at == 0.0)))
        (p, p_at, p_alone), (q, q_at, q_alone) = sides
        end = np.cumsum(p) - np.cumsum(q)
        end[np.abs(end) < _LEVEL] = 0.0
        start = np.concatenate(([0.0], end[:-1]))
        # Between neighboring floats nothing can be: such a cell holds one value.
        is_point = width <= np.spacing(np.abs(left))
        return cls(p, q, p_at, q_at, start, end, width, is_point, p_alone, q_alone)


def _range(reference: NumericProfile, current: NumericProfile) -> tuple[float, float]:
    ends = [
        value for side in (reference, current) for value in (side.minimum, side.maximum) if value is not None
    ]
    return (min(ends), max(ends)) if ends else (0.0, 0.0)
