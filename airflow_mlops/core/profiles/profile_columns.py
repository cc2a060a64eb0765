"""Profiles of single columns: what a statistic, a sentence or a user's own detector looks at."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from airflow_mlops.core.profiles.profile_layout import Array, ColumnLayout


@dataclass(frozen=True, kw_only=True, eq=False)
class NumericProfile:
    """A column of numbers, of instants (in microseconds) or of text (its length).

    :param layout: its cells.
    :param null_count: rows without a value (null or NaN).
    :param infinite_count: rows with an infinite value, or one whose square is.
    :param counts: rows per cell, shape ``(k + 1,)``.
    :param offsets: sum over the rows of a cell of the distance to its left edge (of the first cell: to its right one, so
        negative), shape ``(k + 1,)``: where in the cell its rows are.
    :param mean: mean of the finite values; 0.0 when there are none.
    :param m2: sum of squared deviations from the mean.
    :param minimum: smallest finite value; ``None`` when there are none.
    :param maximum: largest finite value.
    :param unseen: values without a cell of their own, with their rows; see :attr:`all_unseen_named`.
    """

    layout: ColumnLayout
    null_count: int
    infinite_count: int
    counts: Array
    offsets: Array
    mean: float
    m2: float
    minimum: float | None
    maximum: float | None
    unseen: dict[str, int]

    @property
    def name(self) -> str:
        """Column."""
        return self.layout.name

    @property
    def edges(self) -> Array:
        """Edges of its cells."""
        return self.layout.edges

    @property
    def count(self) -> int:
        """Rows with a finite value."""
        return int(self.counts.sum())

    @property
    def row_count(self) -> int:
        """All rows."""
        return self.count + self.null_count + self.infinite_count

    @property
    def standard_deviation(self) -> float:
        """Population standard deviation; exactly zero when all values are one."""
        if self.minimum == self.maximum:
            return 0.0
        return float(np.sqrt(self.m2 / self.count)) if self.count else 0.0

    @property
    def outside_count(self) -> int:
        """Rows below the smallest or above the largest value the layout was made from."""
        return int(self.counts[0] + self.counts[-1]) if len(self.counts) > 1 else 0


@dataclass(frozen=True, kw_only=True, eq=False)
class CategoricalProfile:
    """A column of categories, or of truth values.

    :param layout: its cells.
    :param null_count: rows without a value.
    :param counts: rows per cell: the layout's categories, then its buckets.
    :param unseen: categories the layout does not name, with their rows; at most ``UNSEEN_NAMED`` of them.
    """

    layout: ColumnLayout
    null_count: int
    counts: Array
    unseen: dict[str, int]

    @property
    def name(self) -> str:
        """Column."""
        return self.layout.name

    @property
    def count(self) -> int:
        """Rows with a value."""
        return int(self.counts.sum())

    @property
    def row_count(self) -> int:
        """All rows."""
        return self.count + self.null_count

    @property
    def named_counts(self) -> dict[str, int]:
        """Rows per category of the layout."""
        return dict(zip(self.layout.categories, self.counts.tolist(), strict=False))

    @property
    def other_count(self) -> int:
        """Rows of categories the layout does not name."""
        return int(self.counts[len(self.layout.categories) :].sum())


@dataclass(frozen=True, kw_only=True, eq=False)
class PairProfile:
    """Two columns of numbers together.

    :param layout: its cells.
    :param null_count: rows without a value on one of the sides.
    :param counts: rows per cell, the first column's cells outside.
    """

    layout: ColumnLayout
    null_count: int
    counts: Array

    @property
    def name(self) -> str:
        """Both columns."""
        return self.layout.name

    @property
    def count(self) -> int:
        """Rows with both values."""
        return int(self.counts.sum())

    @property
    def row_count(self) -> int:
        """All rows."""
        return self.count + self.null_count


ColumnProfile = NumericProfile | CategoricalProfile | PairProfile
