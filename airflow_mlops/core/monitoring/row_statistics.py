"""Statistics of two columns from their values themselves, as Evidently calculates them.

Sides are always ``(reference, current)``, arrays without missing values.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from airflow_mlops.core.monitoring import statistics
from airflow_mlops.core.monitoring.distances import SMALLEST_SCALE

if TYPE_CHECKING:
    from airflow_mlops.core.monitoring.statistics import Array

#: Up to so many distinct reference numbers, Evidently's divergences are over values instead of equal bins.
VALUES_AS_CELLS = 20


def wasserstein(reference: Array, current: Array) -> float:
    """Normed Wasserstein distance, see :func:`~airflow_mlops.core.monitoring.distances.wasserstein`."""
    from scipy import stats

    scale = max(float(np.std(reference)), SMALLEST_SCALE)
    return float(stats.wasserstein_distance(reference, current)) / scale


def scipy_test(name: str, **arguments: Any) -> Callable[[Array, Array], float]:
    """Give the p-value of a test of ``scipy.stats`` by name, with its arguments."""

    def test(reference: Array, current: Array) -> float:
        from scipy import stats

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about p-values outside a table, and formulas for large samples
            return float(getattr(stats, name)(reference, current, **arguments).pvalue)

    return test


def anderson(reference: Array, current: Array) -> float:
    """P-value of the Anderson-Darling test for two samples, which scipy bounds to 0.001 and 0.25."""
    from scipy import stats

    if min(reference.min(), current.min()) == max(reference.max(), current.max()):
        return 1.0  # one value on both sides: nothing to test
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(stats.anderson_ksamp([reference, current]).pvalue)


def divergence(
    function: Callable[[Array, Array], float], *, distinct: bool = False
) -> Callable[[Array, Array], float]:
    """Measure as Evidently does: over values of text and few numbers, over Sturges' bins of many."""

    def measure(reference: Array, current: Array) -> float:
        few = len(np.unique(reference)) <= VALUES_AS_CELLS
        if reference.dtype.kind != "f" or (few and not distinct):
            return function(*statistics.shares(*(_tally(side) for side in (reference, current))))
        both = np.concatenate((reference, current))
        edges = np.histogram_bin_edges(np.unique(both) if distinct else both, bins="sturges")
        return function(*(np.histogram(side, edges)[0] / len(side) for side in (reference, current)))

    return measure


def counted(function: Callable[[Array, Array], float]) -> Callable[[Array, Array], float]:
    """Give a statistic of two lists of counts as one of values."""

    def test(reference: Array, current: Array) -> float:
        return function(*statistics.counts_over(_tally(reference), _tally(current)))

    return test


def _tally(values: Array) -> dict[Any, int]:
    names, counts = np.unique(values, return_counts=True)
    return dict(zip(names.tolist(), counts.tolist(), strict=True))
