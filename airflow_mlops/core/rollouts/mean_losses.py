"""Mean losses of two versions, of rows that were drawn together or by themselves, and whether one is larger than the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[Any]

#: Gives the probability that the mean of the named version exceeds ``margin`` times that of the other so far, if it does not.
Larger = Callable[[Literal["stable", "new"], float], float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Losses:
    """Losses of one version's answers whose labels have arrived.

    :param count: how many were drawn by lot: requests, or callers who stay with their version.
    :param mean: mean over these of the mean loss of their rows.
    :param variance: of these mean losses.
    :param left_out: rows that count for nothing: the label is infinite or too large, or the answer no finite number.
    """

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0
    left_out: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedLosses:
    """Losses of both versions on the same requests: what is hard for one is mostly so for the other, and cancels out.

    :param stable: of the stable version.
    :param new: of the new one.
    :param covariance: of the mean losses of what was drawn.
    :param one_wrong: where answers are right or wrong and each row was asked for by itself: on how many the stable version alone was
        wrong, and the new one alone; ``None`` otherwise.
    """

    stable: Losses = Losses()
    new: Losses = Losses()
    covariance: float = 0.0
    one_wrong: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimatedLoss:
    """A mean loss that was estimated without labels.

    :param metric: it is of.
    :param count: how many were drawn by lot among what it was estimated for.
    :param mean: mean loss of a row.
    :param deviation: standard deviation of the estimate about what will turn out.
    :param folds: stretches of held-out rows that this is known from.
    """

    metric: str
    count: int
    mean: float
    deviation: float
    folds: int


def losses_of(losses: Array, drawn: Sequence[Any]) -> Losses:
    """Sum up the losses of rows of which several were drawn together: all of a request, or all of a caller.

    Each of those counts once, by the mean of its rows. Weighted by rows, a few that are large would decide all, and how far their
    mean is off could not be told from so few.

    :param losses: one per row, shape ``(n,)``.
    :param drawn: what each row was drawn with; ``None`` and the empty text: by itself.
    """
    means = _means(losses, _clusters(drawn))
    return Losses(count=len(means), mean=float(means.mean()), variance=_covariance(means, means))


def paired_losses_of(stable: Array, new: Array, drawn: Sequence[Any]) -> PairedLosses:
    """Sum up the losses of rows that both versions answered; otherwise like :func:`losses_of`.

    :param stable: of the stable version, one per row, shape ``(n,)``.
    :param new: of the new one, on the same rows.
    :param drawn: what each row was drawn with.
    """
    clusters = _clusters(drawn)
    before, after = _means(stable, clusters), _means(new, clusters)
    count, each = len(before), len(before) == len(stable)
    binary = each and bool(np.isin(stable, (0.0, 1.0)).all() and np.isin(new, (0.0, 1.0)).all())
    return PairedLosses(
        stable=Losses(count=count, mean=float(before.mean()), variance=_covariance(before, before)),
        new=Losses(count=count, mean=float(after.mean()), variance=_covariance(after, after)),
        covariance=_covariance(before, after),
        one_wrong=(int((stable > new).sum()), int((new > stable).sum())) if binary else None,
    )


def _clusters(drawn: Sequence[Any]) -> Array:
    """Give each row the number of what it was drawn with, shape ``(n,)``."""
    numbers: dict[Any, int] = {}
    # A number alone is nobody's name: names are texts.
    names = (row if name is None or name == "" else name for row, name in enumerate(drawn))
    return np.fromiter((numbers.setdefault(name, len(numbers)) for name in names), np.int64, count=len(drawn))


def _means(losses: Array, clusters: Array) -> Array:
    """Give the mean loss of each cluster's rows."""
    return np.bincount(clusters, weights=losses) / np.bincount(clusters)


def _covariance(one: Array, other: Array) -> float:
    return (
        float(((one - one.mean()) * (other - other.mean())).sum()) / (len(one) - 1) if len(one) > 1 else 0.0
    )


def larger_of_two(stable: Losses, new: Losses) -> Larger:
    """Test the difference of two means by Welch's test.

    Source: Welch, Biometrika 34, 1947.
    """

    def larger(which: Literal["stable", "new"], margin: float) -> float:
        one, other = (new, stable) if which == "new" else (stable, new)
        own, others = one.variance / one.count, margin**2 * other.variance / other.count
        gap = one.mean - margin * other.mean
        if own + others == 0.0:
            return 0.0 if gap > 0.0 else 1.0
        freedom = (own + others) ** 2 / (own**2 / (one.count - 1) + others**2 / (other.count - 1))
        return float(stats.t.sf(gap / math.sqrt(own + others), freedom))

    return larger


def larger_of_pairs(losses: PairedLosses) -> Larger:
    """Test the differences by Student's test; of answers that are right or wrong, by McNemar's exact one as well: the larger of both.

    Source: Student, "The probable error of a mean", Biometrika 6, 1908; McNemar, "Note on the sampling error of the difference between
    correlated proportions or percentages", Psychometrika 12, 1947.
    """

    def larger(which: Literal["stable", "new"], margin: float) -> float:
        one, other = (losses.new, losses.stable) if which == "new" else (losses.stable, losses.new)
        gap = one.mean - margin * other.mean
        variance = one.variance + margin**2 * other.variance - 2.0 * margin * losses.covariance
        exact = 0.0
        if losses.one_wrong is not None:
            others_wrong, own_wrong = losses.one_wrong if which == "new" else losses.one_wrong[::-1]
            exact = float(stats.binom.sf(own_wrong - 1, others_wrong + own_wrong, 0.5))
        if variance <= 1e-12 * (one.variance + other.variance):
            return exact if gap > 0.0 else 1.0
        return max(exact, float(stats.t.sf(gap / math.sqrt(variance / one.count), one.count - 1)))

    return larger
