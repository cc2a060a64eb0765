"""Detectors: the statistics by name, their thresholds, and which one Evidently would take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from airflow_mlops.core.extension import load_object
from airflow_mlops.core.monitoring import distances, row_statistics, statistics
from airflow_mlops.core.monitoring.p_values import kolmogorov_p_value
from airflow_mlops.core.monitoring.statistics import Array, Measured, known
from airflow_mlops.core.profiles.counting import stable_hash
from airflow_mlops.core.profiles.profile_columns import (
    CategoricalProfile,
    ColumnProfile,
    NumericProfile,
    PairProfile,
)

#: Threshold of distances; Evidently's default, a rule of thumb.
DISTANCE_THRESHOLD = 0.1
#: Significance of tests; Evidently's default.
P_VALUE_THRESHOLD = 0.05
#: Evidently takes p-value tests up to so many reference rows, and distances above.
P_VALUE_ROWS = 1000
#: Up to so many distinct numbers on both sides together, Evidently compares a column value by value.
FEW_VALUES = 5


class ColumnRows(NamedTuple):
    """A column's values on both sides, without missing ones: float64, or text."""

    reference: Array
    current: Array


@dataclass(frozen=True, kw_only=True)
class Detector:
    """One way to compare two columns.

    :param name: what it is called.
    :param threshold: from which value on (of a p-value: up to which) a column counts as drifted.
    :param is_p_value: whether small values mean drift.
    :param profiles: ``profiles(reference, current)`` from profiles; ``None`` as its value: rows are needed.
    :param rows: ``rows(reference, current)`` from the values themselves; ``None``: profiles are enough.
    """

    name: str
    threshold: float
    is_p_value: bool = False
    profiles: Callable[[Any, Any], Measured | None]
    rows: Callable[[Array, Array], float] | None = None

    def fires(self, value: float, threshold: float) -> bool:
        """Tell whether a value means drift; NaN is no measurement, and whoever judges has to say so."""
        return value <= threshold if self.is_p_value else value >= threshold

    def in_doubt(self, measured: Measured, threshold: float) -> bool:
        """Tell whether the rows could change the verdict."""
        return self.fires(measured.low, threshold) != self.fires(measured.high, threshold)


def find_detector(name: str) -> Detector:
    """Find a detector by name, or a user's own by import path.

    :raises ValueError: listing the built-in ones.
    """
    if name in DETECTORS:
        return DETECTORS[name]
    if ":" not in name and "." not in name:
        raise ValueError(
            f"no detector named {name!r}; built in: {', '.join(DETECTORS)}, or give an import path"
        )
    function = load_object(name)

    def measure(reference: ColumnProfile, current: ColumnProfile) -> Measured:
        try:
            return known(float(function(reference, current)))
        except Exception as err:
            raise ValueError(
                f"detector {name!r} failed on column {current.name!r}: {type(err).__name__}: {err}; it takes the column's profile "
                "on both sides and gives a number"
            ) from err

    return Detector(
        name=name,
        threshold=float(getattr(function, "threshold", DISTANCE_THRESHOLD)),
        is_p_value=bool(getattr(function, "is_p_value", False)),
        profiles=measure,
    )


def default_detector(reference: ColumnProfile, current: ColumnProfile, *, distances: bool) -> str:
    """Choose as Evidently 0.7 does.

    Evidently counts the reference rows that have a value. Above 1,000 it takes distances: normed Wasserstein for numbers,
    Jensen-Shannon for categories and for numbers of at most five values. Up to 1,000 it takes p-values: Kolmogorov-Smirnov for
    numbers, chi-square for categories and few values, a z-test for two. So the same change can be judged by another measure
    when the reference grows by a row.

    :param distances: take distances whatever the number of rows.
    """
    few = _distinct(reference, current)
    if distances or reference.count > P_VALUE_ROWS:
        return "wasserstein" if few is None else "jensen_shannon"
    if few is None:
        return "ks"
    return "z" if few <= 2 else "chi_square"


def _distinct(reference: ColumnProfile, current: ColumnProfile) -> int | None:
    """Count distinct values of both sides; ``None`` for numbers of more than a few."""
    if isinstance(reference, NumericProfile) and isinstance(current, NumericProfile):
        counts = [distances.value_counts(side) for side in (reference, current)]
        if counts[0] is None or counts[1] is None:
            return None
        distinct = len({*counts[0], *counts[1]})
        return distinct if distinct <= FEW_VALUES else None
    if isinstance(reference, CategoricalProfile) and isinstance(current, CategoricalProfile):
        named = np.count_nonzero((reference.counts + current.counts)[: len(reference.layout.categories)])
        return int(named) + max(len({*reference.unseen, *current.unseen}), int(reference.other_count > 0))
    return int(np.count_nonzero(reference.counts + current.counts))


def effect_detector(reference: ColumnProfile, current: ColumnProfile) -> str:
    """Name the distance that says how far a column moved, whatever decides whether it did."""
    return default_detector(reference, current, distances=True)


def significance(reference: ColumnProfile, current: ColumnProfile) -> float:
    """P-value that both sides come from one distribution; at most that of the rows where a cell is wider than a value."""
    if isinstance(reference, NumericProfile) and isinstance(current, NumericProfile):
        distance = distances.kolmogorov_smirnov_distance(reference, current)
        return kolmogorov_p_value(distance.low, reference.count, current.count)
    if isinstance(reference, CategoricalProfile) and isinstance(current, CategoricalProfile):
        return statistics.chi_square_homogeneity(*_unselected_counts(reference, current))
    return statistics.chi_square_homogeneity(*_cell_counts(reference, current))


def _unselected_counts(reference: CategoricalProfile, current: CategoricalProfile) -> tuple[Array, Array]:
    """Give both sides' counts in cells that were not chosen by what chance gave the reference.

    A category has a name because it is frequent in the reference. The rarest of the named ones are so by chance as well, and
    are rarer in any other rows; those without a name are more frequent there. Of many categories that alone is a difference no
    chance explains. So a category counts by itself where both sides together have so many rows of it that it would be named
    with these or any other reference rows, and the rest by the hash of their names.
    """
    if not reference.other_count and not current.other_count:
        return _cell_counts(reference, current)
    names = reference.layout.categories
    sides = [side.counts.astype(float) for side in (reference, current)]
    together = sides[0][: len(names)] + sides[1][: len(names)]
    # What is rarest among the named is as rare as a category without a name can be; where all have names that is zero.
    rarest = float(np.min(sides[0][: len(names)], initial=np.inf)) if reference.other_count and names else 0.0
    share = reference.count / max(reference.count + current.count, 1)
    spread = _SURELY_NAMED * np.sqrt(share * (1.0 - share))
    # The least x of share * x**2 - spread * x = rarest: of x**2 rows, the reference has more than the rarest.
    least = ((spread + np.sqrt(spread**2 + 4.0 * share * rarest)) / (2.0 * max(share, 1e-12))) ** 2
    alone = together >= least
    hashed = [
        len(names) + stable_hash(names[cell]) % reference.layout.buckets for cell in np.flatnonzero(~alone)
    ]
    for counts in sides:
        np.add.at(counts, hashed, counts[: len(names)][~alone])
    cells = np.concatenate((alone, np.ones(reference.layout.buckets, dtype=bool)))
    return sides[0][cells], sides[1][cells]


#: Standard errors by which a category is above the rarest named one, to count by itself.
_SURELY_NAMED = 4.0


def _wasserstein(reference: ColumnProfile, current: ColumnProfile) -> Measured:
    return distances.wasserstein(*_numbers("wasserstein", reference, current))


def _ks(reference: ColumnProfile, current: ColumnProfile) -> Measured:
    return distances.kolmogorov_smirnov(*_numbers("ks", reference, current))


def _rows_only(name: str) -> Callable[[ColumnProfile, ColumnProfile], None]:
    def refuse(reference: ColumnProfile, current: ColumnProfile) -> None:
        _numbers(name, reference, current)

    return refuse


#: Divergences in which zeros are filled: they depend on how finely the rest is divided.
_FILLED = (statistics.population_stability_index, statistics.kullback_leibler)


def _divergence(
    function: Callable[[Array, Array], float], *, distinct: bool
) -> Callable[[Any, Any], Measured | None]:
    """Measure a divergence over categories, over few distinct values, or over Sturges' bins as Evidently cuts them.

    :param distinct: bins of numbers, and of few as well, are cut by the number of distinct values.
    """

    def measure(reference: ColumnProfile, current: ColumnProfile) -> Measured | None:
        if isinstance(reference, NumericProfile) and isinstance(current, NumericProfile):
            counts = [distances.value_counts(side) for side in (reference, current)]
            if counts[0] is not None and counts[1] is not None:
                return known(function(*_shares_of_values(counts[0], counts[1], distinct=distinct)))
            value = function(*distances.sturges_shares(reference, current))
            return Measured(
                value, 0.0, float("inf"), float("inf")
            )  # a bin's edge cuts through cells: how far is not known
        if isinstance(reference, CategoricalProfile) and isinstance(current, CategoricalProfile):
            p, q, buckets = statistics.category_shares(reference, current)
            if buckets and function in _FILLED:  # every single category that is missing counts
                return Measured(function(p, q), 0.0, float("inf"), float("inf"))
            return statistics.measured_over(function, p, q, buckets)
        if isinstance(reference, PairProfile) and isinstance(current, PairProfile):
            return known(
                function(reference.counts / max(reference.count, 1), current.counts / max(current.count, 1))
            )
        raise ValueError(_mismatch(reference))

    return measure


def _counted(function: Callable[[Array, Array], float]) -> Callable[[Any, Any], Measured | None]:
    """Test counts per category or per distinct value."""

    def measure(reference: ColumnProfile, current: ColumnProfile) -> Measured | None:
        if isinstance(reference, NumericProfile) and isinstance(current, NumericProfile):
            counts = [distances.value_counts(side) for side in (reference, current)]
            if counts[0] is None or counts[1] is None:
                return None
            return known(function(*statistics.counts_over(counts[0], counts[1])))
        return known(function(*_cell_counts(reference, current)))

    return measure


def _cell_counts(reference: ColumnProfile, current: ColumnProfile) -> tuple[Array, Array]:
    """Give both sides' counts per category, new ones by name where they are known, in the order of their names."""
    if isinstance(reference, CategoricalProfile) and isinstance(current, CategoricalProfile):
        if all(sum(side.unseen.values()) == side.other_count for side in (reference, current)):
            sides = [
                {name: n for name, n in (side.named_counts | side.unseen).items() if n}
                for side in (reference, current)
            ]
            return statistics.counts_over(*sides)
    elif type(reference) is not type(current):
        raise ValueError(_mismatch(reference))
    return reference.counts.astype(float), current.counts.astype(float)


def _numbers(
    name: str, reference: ColumnProfile, current: ColumnProfile
) -> tuple[NumericProfile, NumericProfile]:
    if isinstance(reference, NumericProfile) and isinstance(current, NumericProfile):
        return reference, current
    raise ValueError(
        f"column {reference.name!r} is no number: {name} needs one; use jensen_shannon, psi or chi_square"
    )


def _mismatch(column: ColumnProfile) -> str:
    return f"column {column.name!r} is a number on one side and a category on the other"


def _shares_of_values(
    reference: dict[float, int], current: dict[float, int], *, distinct: bool
) -> tuple[Array, Array]:
    """Give shares per value of a few, per Sturges' bin of many."""
    if len(reference) <= row_statistics.VALUES_AS_CELLS and not distinct:
        return statistics.shares(reference, current)
    values = np.array(sorted({*reference, *current}), dtype=float)
    rows = len(values) if distinct else sum(reference.values()) + sum(current.values())
    edges = np.histogram_bin_edges(values, bins=distances.sturges_count(rows))
    first, second = (
        np.histogram(list(side), edges, weights=list(side.values()))[0] / sum(side.values())
        for side in (reference, current)
    )
    return first, second


def _distance(name: str, function: Callable[[Array, Array], float], *, distinct: bool = False) -> Detector:
    return Detector(
        name=name,
        threshold=DISTANCE_THRESHOLD,
        profiles=_divergence(function, distinct=distinct),
        rows=row_statistics.divergence(function, distinct=distinct),
    )


DETECTORS: dict[str, Detector] = {
    item.name: item
    for item in (
        Detector(
            name="wasserstein",
            threshold=DISTANCE_THRESHOLD,
            profiles=_wasserstein,
            rows=row_statistics.wasserstein,
        ),
        _distance("jensen_shannon", statistics.jensen_shannon),
        _distance("psi", statistics.population_stability_index),
        _distance("kl", statistics.kullback_leibler),
        _distance("hellinger", statistics.hellinger, distinct=True),
        _distance("total_variation", statistics.total_variation),
        Detector(
            name="ks",
            threshold=P_VALUE_THRESHOLD,
            is_p_value=True,
            profiles=_ks,
            rows=row_statistics.scipy_test("ks_2samp"),
        ),
        Detector(
            name="chi_square",
            threshold=P_VALUE_THRESHOLD,
            is_p_value=True,
            profiles=_counted(statistics.chi_square_fit),
            rows=row_statistics.counted(statistics.chi_square_fit),
        ),
        Detector(
            name="z",
            threshold=P_VALUE_THRESHOLD,
            is_p_value=True,
            profiles=_counted(statistics.proportions),
            rows=row_statistics.counted(statistics.proportions),
        ),
        Detector(
            name="cramer_von_mises",
            threshold=DISTANCE_THRESHOLD,  # Evidently's: 0.1 for these two tests
            is_p_value=True,
            profiles=_rows_only("cramer_von_mises"),
            rows=row_statistics.scipy_test("cramervonmises_2samp", method="asymptotic"),
        ),
        Detector(
            name="anderson",
            threshold=DISTANCE_THRESHOLD,
            is_p_value=True,
            profiles=_rows_only("anderson"),
            rows=row_statistics.anderson,
        ),
    )
}
