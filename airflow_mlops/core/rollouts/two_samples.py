"""Tests of two samples of requests: whether the second took longer, or has more of what is counted."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from airflow_mlops.core.rollouts.observations import TIME_GROWTH

Array = NDArray[Any]


def rank_test(one: Array, other: Array) -> tuple[float, float]:
    """Test whether the second of two samples, known by cell, lies above the first.

    :param one: counts by cell of time, shape ``(k,)``.
    :param other: likewise.
    :returns: one-sided p-value, and how many times as long the second takes: the median over all pairs.
    """
    counts = int(one.sum()), int(other.sum())
    below = np.concatenate([[0], np.cumsum(one)[:-1]])
    statistic = float((other * (below + one / 2.0)).sum())
    total = counts[0] + counts[1]
    ties = (one + other).astype(np.float64)
    variance = (
        counts[0] * counts[1] / 12.0 * (total + 1 - (ties**3 - ties).sum() / (total * (total - 1.0)))
        if total > 1
        else 0.0
    )
    mean = counts[0] * counts[1] / 2.0
    p_value = float(stats.norm.sf((statistic - mean) / math.sqrt(variance))) if variance > 0.0 else 1.0
    pairs = np.correlate(other.astype(np.float64), one.astype(np.float64), mode="full")
    distances = np.arange(-(len(one) - 1), len(other))
    median = distances[int(np.searchsorted(np.cumsum(pairs), pairs.sum() / 2.0))]
    return p_value, float(TIME_GROWTH**median)


def more_often(stable: tuple[int, int], new: tuple[int, int], *, tolerance: float) -> float:
    """Give the probability that so many more of the new requests are counted, if their share is larger by the tolerance only.

    The larger of two: Fisher's exact one without any tolerance, which holds for any number of requests, and the one at which
    Newcombe's interval of the difference begins at the tolerance.

    Source: Fisher, "Statistical Methods for Research Workers", 5th edition, 1934, section 21.02; Newcombe, "Interval estimation for
    the difference between independent proportions", Statistics in Medicine 17, 1998, method 10.

    :param stable: how many are counted, and of how many.
    :param new: likewise.
    """
    (counted, count), (new_counted, new_count) = stable, new
    exact = float(stats.hypergeom.sf(new_counted - 1, count + new_count, counted + new_counted, new_count))
    gap = new_counted / new_count - counted / count
    if gap <= tolerance:
        return max(exact, 0.5)
    low, high = 0.0, 40.0
    for _ in range(50):  # the level at which the interval begins at the tolerance, by bisection
        middle = (low + high) / 2.0
        below = new_counted / new_count - _wilson(new_counted, new_count, -middle)
        above = _wilson(counted, count, middle) - counted / count
        low, high = (middle, high) if gap - math.hypot(below, above) > tolerance else (low, middle)
    return max(exact, float(stats.norm.sf(low)))


def _wilson(counted: int, count: int, deviations: float) -> float:
    """Give an end of Wilson's interval of a share, so many standard deviations off.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22, 1927.
    """
    share, square = counted / count, deviations**2
    spread = math.sqrt(share * (1.0 - share) / count + square / (4.0 * count**2))
    return (share + square / (2.0 * count) + deviations * spread) / (1.0 + square / count)
