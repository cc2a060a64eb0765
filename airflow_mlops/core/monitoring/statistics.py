"""Statistics of two lists of shares or counts, and what a value measured from cells is.

Sides are always ``(reference, current)``. A value from cells is a :class:`Measured`: rows inside a cell can lie anywhere in it,
so the value of the rows lies between ``low`` and ``high``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from airflow_mlops.core.monitoring.p_values import chi_square_p_value, normal_p_value

if TYPE_CHECKING:
    from airflow_mlops.core.profiles.profile_columns import CategoricalProfile

Array = NDArray[Any]

#: Cells whose expected count is smaller are pooled, so that chi-square holds. Source: Cochran, "Some methods for
#: strengthening the common chi-square tests", Biometrics 10, 1954.
SMALLEST_EXPECTED = 5.0


class Measured(NamedTuple):
    """A value and the interval that the value of the rows lies in.

    :param value: best estimate.
    :param low: smallest value the rows can have.
    :param high: largest value the rows can have.
    :param error: how far off the estimate is likely to be.
    """

    value: float
    low: float
    high: float
    error: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether the interval is a point, but for rounding."""
        return self.high - self.low <= 1e-9 * max(1.0, abs(self.value))


def known(value: float) -> Measured:
    """Give a value that is exact."""
    return Measured(value, value, value)


def category_shares(reference: CategoricalProfile, current: CategoricalProfile) -> tuple[Array, Array, int]:
    """Give shares over the categories, and how many of the last of them are buckets that may hold several.

    A category that is new is one of its own where all new ones are known by name.
    """
    named = len(reference.layout.categories)
    sides = [side.counts / max(side.count, 1) for side in (reference, current)]
    if all(sum(side.unseen.values()) == side.other_count for side in (reference, current)):
        names = sorted({*reference.unseen, *current.unseen})
        sides = [
            np.concatenate((share[:named], [side.unseen.get(name, 0) / max(side.count, 1) for name in names]))
            for share, side in zip(sides, (reference, current), strict=True)
        ]
        return sides[0], sides[1], 0
    return sides[0], sides[1], reference.layout.buckets


def measured_over(statistic: Any, p: Array, q: Array, buckets: int) -> Measured:
    """Measure a divergence over categories of which the last are buckets.

    Splitting a cell never makes such a divergence smaller (data processing inequality), and it is largest where the sides
    share nothing.

    :param statistic: of ``(p, q)``.
    """
    low = float(statistic(p, q))
    if buckets == 0:
        return known(low)
    apart = [
        np.concatenate((side[:-buckets], *pieces))
        for side, pieces in ((p, (p[-buckets:], np.zeros(buckets))), (q, (np.zeros(buckets), q[-buckets:])))
    ]
    high = max(low, float(statistic(*apart)))
    return Measured(low, low, high, high - low)


def jensen_shannon(p: Array, q: Array) -> float:
    """Jensen-Shannon distance with natural logarithm, in ``[0, 0.833]``.

    Source: Endres and Schindelin, "A new metric for probability distributions", IEEE Trans. Information Theory 49, 2003.

    >>> round(jensen_shannon(np.array([0.5, 0.5]), np.array([0.9, 0.1])), 4)
    0.319
    """
    middle = (p + q) / 2.0
    return float(np.sqrt(max(0.0, (_entropy(p, middle) + _entropy(q, middle)) / 2.0)))


def kullback_leibler(p: Array, q: Array) -> float:
    """Relative entropy of the reference to the current shares, zeros filled as Evidently does.

    Source: Kullback and Leibler, "On information and sufficiency", Annals of Mathematical Statistics 22, 1951.
    """
    p, q = _without_zeros(p), _without_zeros(q)
    return _entropy(p / p.sum(), q / q.sum())


def population_stability_index(p: Array, q: Array) -> float:
    """Symmetric relative entropy of the shares, zeros filled as Evidently does.

    Source: Siddiqi, "Credit Risk Scorecards", 2006, chapter 6.

    >>> round(population_stability_index(np.array([0.5, 0.5]), np.array([0.6, 0.4])), 4)
    0.0405
    """
    p, q = _without_zeros(p), _without_zeros(q)
    return float(np.sum((p - q) * np.log(p / q)))


def hellinger(p: Array, q: Array) -> float:
    """Hellinger distance, in ``[0, 1]``.

    Source: Hellinger, Journal für Mathematik 136, 1909.
    """
    return float(np.sqrt(1.0 - np.clip(np.sum(np.sqrt(p * q)), 0.0, 1.0)))


def total_variation(p: Array, q: Array) -> float:
    """Total variation distance: the largest difference in the probability of any event, in ``[0, 1]``.

    Source: Levin and Peres, "Markov Chains and Mixing Times", 2017, proposition 4.2.

    >>> total_variation(np.array([0.5, 0.5]), np.array([0.75, 0.25]))
    0.25
    """
    return float(np.sum(np.abs(p - q)) / 2.0)


def chi_square_fit(reference: Array, current: Array) -> float:
    """P-value of the current counts where the reference's shares are taken as given, as Evidently tests.

    Source: Pearson, "On the criterion...", Philosophical Magazine 50, 1900.
    """
    expected = reference * (current.sum() / reference.sum())
    if np.any((expected == 0) & (current > 0)):
        return 0.0
    full = expected > 0
    statistic = np.sum((current[full] - expected[full]) ** 2 / expected[full])
    return chi_square_p_value(float(statistic), len(expected) - 1)


def chi_square_homogeneity(reference: Array, current: Array) -> float:
    """P-value of the test that both sides were drawn from the same shares; rare cells are pooled.

    Source: Agresti, "Categorical Data Analysis", 2013, section 3.2.
    """
    table = np.stack((reference, current)).astype(float)
    table = table[:, table.sum(axis=0) > 0]
    expected = np.outer(table.sum(axis=1), table.sum(axis=0)) / table.sum()
    rare = expected.min(axis=0) < SMALLEST_EXPECTED
    if rare.any():
        table, expected = (
            np.column_stack((side[:, ~rare], side[:, rare].sum(axis=1))) for side in (table, expected)
        )
    if table.shape[1] < 2:
        return 1.0
    statistic = float(np.sum((table - expected) ** 2 / expected))
    return chi_square_p_value(statistic, table.shape[1] - 1)


def proportions(reference: Array, current: Array) -> float:
    """P-value of the z-test that two proportions are equal, for at most two categories.

    Source: Fleiss, Levin and Paik, "Statistical Methods for Rates and Proportions", 2003, section 3.3.
    """
    sizes = np.array([reference.sum(), current.sum()], dtype=float)
    hits = np.array([reference[0], current[0]], dtype=float)
    pooled = hits.sum() / sizes.sum()
    spread = np.sqrt(pooled * (1.0 - pooled) * np.sum(1.0 / sizes))
    if spread == 0.0:
        return 1.0
    return normal_p_value(float(np.diff(hits / sizes)[0] / spread))


def shares(reference: dict[Any, int], current: dict[Any, int]) -> tuple[Array, Array]:
    """Give both sides as shares over the same sorted values."""
    first, second = counts_over(reference, current)
    return first / max(first.sum(), 1.0), second / max(second.sum(), 1.0)


def counts_over(reference: dict[Any, int], current: dict[Any, int]) -> tuple[Array, Array]:
    """Give both sides as counts over the same sorted values."""
    names = sorted({*reference, *current})
    first, second = (
        np.array([side.get(name, 0) for name in names], dtype=float) for side in (reference, current)
    )
    return first, second


def _entropy(p: Array, q: Array) -> float:
    full = p > 0
    return float(np.sum(p[full] * np.log(p[full] / q[full])))


def _without_zeros(share: Array) -> Array:
    smallest = float(np.min(share[share > 0], initial=1.0))
    filler = smallest / 10**6 if smallest <= 1e-4 else 1e-4
    return np.where(share == 0, filler, share)
