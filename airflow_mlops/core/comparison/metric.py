"""What a metric is: its value, what each row adds to it, and the loss per row that orders models as it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from airflow_mlops.core.comparison.predictions import Graded

Array = NDArray[Any]

#: A probability of zero for what happened would cost infinitely much; scikit-learn clips alike.
SMALLEST_SHARE = float(np.finfo(np.float64).eps)

#: ``rows(graded) -> (n, k)``: what each row adds to the sums.
RowTerms = Callable[[Graded], Array]

#: ``cells(graded) -> (cell numbers, number of cells, (n,) weights)``: which sum each row adds its weight to, shape ``(n,)``, or
#: which ones it adds one to, shape ``(n, m)``, where the weights are ``None``.
RowCells = Callable[[Graded], tuple[Array, int, Array | None]]

#: ``cells(graded, label) -> ((n,) cell numbers, number of cells)``: which sum each row adds one to, of one label against the rest.
LabelCells = Callable[[Graded, int], tuple[Array, int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """How to score predictions.

    :param name: name, or import path of a user's own.
    :param greater_is_better: direction of the value.
    :param score: ``score(graded) -> float``, exact.
    :param terms: what each row adds to the sums; ``None`` when rows are counted in ``cells``, or for a metric that is only
        a number.
    :param cells: which counts each row adds one to.
    :param label_cells: the same for one label against the rest; of more than two labels the metric is the mean over them.
    :param of_sums: turns sums of shape ``(..., k + 1)`` into values of shape ``(...)``; the last sum is the row count.
    :param bases: turns sums of shape ``(..., k + 1)`` into the rows that each ratio in the metric is taken of, shape
        ``(..., ratios)``: what hangs on a few of them is not measured; ``None`` where the metric has no such ratios.
    :param losses: per-row losses of shape ``(n,)``, smaller is better, whose mean orders models as the metric does;
        ``None`` where the metric is no mean over rows.
    :param mean_loss: turns the metric's value into the mean of ``losses``; ``None`` where that can't be done.
    :param loss_name: what a mean of ``losses`` is called when it is told; default the metric's own name.
    :param of_mean_loss: turns a mean of ``losses`` into what is told; default as it is.
    :param needs_probabilities: whether bare labels are not enough.
    :param biased: whether chance alone makes it larger, as the sum of absolute differences, and so once more on every resample.
    """

    name: str
    greater_is_better: bool
    score: Callable[[Graded], float]
    terms: RowTerms | None = None
    cells: RowCells | None = None
    label_cells: LabelCells | None = None
    of_sums: Callable[[Array], Array] | None = None
    bases: Callable[[Array], Array] | None = None
    losses: Callable[[Graded], Array] | None = None
    mean_loss: Callable[[float], float] | None = None
    loss_name: str | None = None
    of_mean_loss: Callable[[float], float] | None = None
    needs_probabilities: bool = False
    biased: bool = False

    def block_sums(self, graded: Graded, starts: Array) -> Array:
        """Sum what the rows add, block by block.

        :param starts: first row of each block, ascending, shape ``(blocks,)``.
        :returns: shape ``(blocks, k + 1)``, row counts last.
        :raises ValueError: the metric is only a number.
        """
        ends = np.append(starts[1:], len(graded))
        counts = (ends - starts).astype(np.float64)[:, None]
        if self.terms is not None:
            return np.hstack([np.add.reduceat(self.terms(graded), starts, axis=0), counts])
        if self.cells is None:
            raise ValueError(f"{self.name} is no function of sums over rows")
        numbers, size, weights = self.cells(graded)
        return np.hstack([_by_block(numbers, size, weights, starts), counts])

    def label_sums(self, graded: Graded, starts: Array, label: int) -> Array:
        """Count rows block by block, of one label against the rest; see :meth:`block_sums`."""
        if self.label_cells is None:
            raise ValueError(f"{self.name} is no mean over labels")
        numbers, size = self.label_cells(graded, label)
        rows = np.diff(np.append(starts, len(graded))).astype(np.float64)
        return np.column_stack([_by_block(numbers, size, None, starts), rows])


def _by_block(numbers: Array, size: int, weights: Array | None, starts: Array) -> Array:
    """Count cells block by block, shape ``(blocks, size)``."""
    blocks = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(numbers)))) * size
    places = (blocks + numbers.T).ravel()
    table = np.bincount(places, weights=weights, minlength=len(starts) * size)
    return table.reshape(len(starts), size).astype(np.float64)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowLosses:
    """A loss per row, and how a mean of them is told.

    :param name: what is told, such as ``rmse`` or ``error rate``.
    :param values: smaller is better, shape ``(n,)``.
    :param of_mean: turns a mean of them into what is told, such as the root of mean squares; ``None``: as it is.
    """

    name: str
    values: Array
    of_mean: Callable[[float], float] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricValue:
    """A metric on some rows.

    :param metric: its name.
    :param value: its value.
    :param standard_deviation: of the per-row losses; ``None`` where the metric has none.
    :param row_count: rows it was measured on.
    """

    metric: str
    value: float
    standard_deviation: float | None
    row_count: int


def mean_of_sums(sums: Array) -> Array:
    """Give the mean per row, of sums of one term and of rows."""
    return np.asarray(sums[..., 0] / sums[..., 1])


def mean_metric(name: str, losses: Callable[[Graded], Array], *, needs_probabilities: bool = False) -> Metric:
    """Make a metric that is the mean of per-row losses."""
    return Metric(
        name=name,
        greater_is_better=False,
        score=lambda graded: float(np.mean(losses(graded))),
        terms=lambda graded: losses(graded)[:, None],
        of_sums=mean_of_sums,
        losses=losses,
        mean_loss=lambda value: value,
        needs_probabilities=needs_probabilities,
    )


def count_metric(
    name: str,
    cells: RowCells,
    of_sums: Callable[[Array], Array],
    *,
    bases: Callable[[Array], Array] | None = None,
    greater_is_better: bool = True,
    needs_probabilities: bool = False,
    biased: bool = False,
) -> Metric:
    """Make a metric of counts of rows by cell."""

    def score(graded: Graded) -> float:
        numbers, size, weights = cells(graded)
        counts = np.bincount(numbers.ravel(), weights=weights, minlength=size)
        return float(of_sums(np.append(counts, len(graded))))

    return Metric(
        name=name,
        greater_is_better=greater_is_better,
        score=score,
        cells=cells,
        of_sums=of_sums,
        bases=bases,
        needs_probabilities=needs_probabilities,
        biased=biased,
    )
