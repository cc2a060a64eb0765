"""Numbers that need a column as a whole, exactly and with bounded memory: read again rather than held."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import polars as pl

#: Values that are looked at to divide a column, and parts it is divided into.
_SAMPLE, _PARTS = 20_000, 200

_VALUE = "value"


def exact_median(frame: pl.LazyFrame, value: pl.Expr, *, rows_at_once: int) -> float | None:
    """Give the middle of a column's values, or the mean of the two.

    More rows than may be held are narrowed down around the middle first: each pass counts how many values are below some points.

    :param value: the values, nulls left out.
    :param rows_at_once: values that may be in memory.
    :returns: ``None`` where there are none.
    """
    import polars as pl

    values = frame.select(value.alias(_VALUE)).drop_nulls()
    one = pl.col(_VALUE)
    count, low, high = (
        values.select(count=one.count(), low=one.min(), high=one.max()).collect(engine="streaming").row(0)
    )
    if count <= rows_at_once:
        middle: float | None = values.select(one.median()).collect(engine="streaming").item()
        return middle
    ranks = ((count - 1) // 2, count // 2)
    below, inside, left = 0, values, count
    while left > rows_at_once and low < high:
        points = _points(inside, left)
        under, upto = _counts(inside, points)
        first = np.flatnonzero(below + under <= ranks[0])
        last = np.flatnonzero(below + upto > ranks[1])
        outside = int(under[first[-1]]) if len(first) else 0
        kept = (int(upto[last[0]]) if len(last) else left) - outside
        if kept == left:  # the same few values again and again: there is no more to narrow
            break
        low = points[first[-1]] if len(first) else low
        high = points[last[0]] if len(last) else high
        below, left = below + outside, kept
        inside = values.filter(one.is_between(pl.lit(low), pl.lit(high)))
    counted = inside.group_by(_VALUE).agg(pl.len().alias("times")).collect(engine="streaming").sort(_VALUE)
    ends = np.cumsum(counted["times"].to_numpy()) + below
    two = [counted[_VALUE][int(np.searchsorted(ends, rank, side="right"))] for rank in ranks]
    return float((two[0] + two[1]) / 2)


def _points(values: pl.LazyFrame, count: int) -> list[Any]:
    """Take values that divide the others into parts of about one size."""
    import polars as pl

    every = count // _SAMPLE + 1
    sample = values.select(pl.col(_VALUE).gather_every(every)).collect(engine="streaming")[_VALUE].sort()
    return sample.gather_every(len(sample) // _PARTS + 1).unique().sort().to_list()


def _counts(values: pl.LazyFrame, points: list[Any]) -> tuple[Any, Any]:
    """Count how many values are below each point, and how many are not above it."""
    import polars as pl

    edges = np.asarray(points)

    def cell_of(batch: pl.Series) -> pl.Series:
        """Tell in which space between the points, or on which point, each value is."""
        found = batch.to_numpy()
        places = np.searchsorted(edges, found, side="left") + np.searchsorted(edges, found, side="right")
        return pl.Series(batch.name, places, dtype=pl.Int64)

    cell = pl.col(_VALUE).map_batches(cell_of, return_dtype=pl.Int64, is_elementwise=True)
    counted = values.select(cell=cell).group_by("cell").agg(pl.len()).collect(engine="streaming")
    rows = np.zeros(2 * len(edges) + 1, dtype=np.int64)
    rows[counted["cell"].to_numpy()] = counted["len"].to_numpy()
    ends = np.cumsum(rows)
    return ends[:-1:2], ends[1::2]


def count_distinct(frame: pl.LazyFrame, value: pl.Expr, *, rows_at_once: int) -> int:
    """Count distinct values; many are counted in parts by their hash.

    :param value: the values, nulls left out.
    :param rows_at_once: distinct values that may be in memory.
    """
    import polars as pl

    values = frame.select(value.alias(_VALUE)).drop_nulls()
    one = pl.col(_VALUE)
    about = int(values.select(one.approx_n_unique()).collect(engine="streaming").item())
    parts = about // rows_at_once + 1
    mine = (values.filter(one.hash() % parts == part) if parts > 1 else values for part in range(parts))
    return sum(int(part.select(one.n_unique()).collect(engine="streaming").item()) for part in mine)
