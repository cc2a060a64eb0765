"""Chances of a statistic where nothing changed, in closed form: a check of one window need not load a statistics library."""

from __future__ import annotations

import math

#: Up to here the two series of Kolmogorov's distribution meet with a handful of terms each.
_SERIES_MEET = 1.0
_TERMS = 8


def kolmogorov_p_value(distance: float, first_rows: int, second_rows: int) -> float:
    """Chance of at least such a distance of two distribution functions; the large-sample formula, good from ten rows on.

    Source: Kolmogorov, Giornale dell'Istituto Italiano degli Attuari 4, 1933; correction for the number of rows by Stephens,
    Journal of the Royal Statistical Society B 32, 1970, p. 118.

    >>> round(kolmogorov_p_value(0.05, 2000, 1000), 3)  # scipy.stats.kstwo.sf(0.05, 667): 0.0688
    0.069
    """
    size = math.sqrt(first_rows * second_rows / (first_rows + second_rows))
    at = (size + 0.12 + 0.11 / size) * distance
    if at <= 0.0:
        return 1.0
    if at < _SERIES_MEET:
        terms = (math.exp(-(((2 * k - 1) * math.pi / at) ** 2) / 8.0) for k in range(1, _TERMS))
        return max(0.0, 1.0 - math.sqrt(2.0 * math.pi) / at * sum(terms))
    return max(
        0.0, 2.0 * sum((1.0 if k % 2 else -1.0) * math.exp(-2.0 * (k * at) ** 2) for k in range(1, _TERMS))
    )


def chi_square_p_value(statistic: float, freedom: int) -> float:
    """Chance of at least such a chi-square, for whole degrees of freedom.

    Source: Abramowitz and Stegun, "Handbook of Mathematical Functions", 1964, equations 26.4.4 and 26.4.5.

    >>> round(chi_square_p_value(3.841459, 1), 6), round(chi_square_p_value(18.307038, 10), 6)
    (0.05, 0.05)
    """
    if statistic <= 0.0:
        return 1.0
    half, odd = statistic / 2.0, freedom % 2
    tail = math.erfc(math.sqrt(half)) if odd else 0.0
    # The terms of the sum are built as logarithms: with a thousand cells they are too large or too small otherwise.
    first = 0.5 if odd else 0.0
    logs = (-half + (k + first) * math.log(half) - math.lgamma(k + first + 1.0) for k in range(freedom // 2))
    return min(1.0, tail + math.fsum(map(math.exp, logs)))


def normal_p_value(deviation: float) -> float:
    """Chance of at least such a deviation of a standard normal value, to either side.

    >>> round(normal_p_value(1.959964), 6)
    0.05
    """
    return math.erfc(abs(deviation) / math.sqrt(2.0))


def absence_p_value(values: int, rows: int, rows_without: int) -> float:
    """Chance that all of so many values are among the rows of one side, and none among those of the other; of both sides, doubled.

    Source: Fisher, "Statistical Methods for Research Workers", fifth edition, 1934, section 21.02 (the exact test's outermost table).

    :param values: rows that have a value, all on one side.
    :param rows: rows of that side.
    :param rows_without: rows of the other side.

    >>> round(absence_p_value(20, 2000, 200), 4)  # 2 * scipy.stats.hypergeom.pmf(0, 2200, 20, 200): 0.2947
    0.2947
    """
    both = rows + rows_without
    log = (
        math.lgamma(rows + 1)
        - math.lgamma(rows - values + 1)
        - math.lgamma(both + 1)
        + math.lgamma(both - values + 1)
    )
    return min(1.0, 2.0 * math.exp(min(log, 0.0)))
