"""Layouts of profiles: the cells in which a column's values are counted, fixed by the reference."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Array = NDArray[Any]
Kind = Literal["number", "datetime", "text", "category", "boolean", "pair"]

#: Edges of a histogram of many distinct numbers: 13 kB a column, edges and sums included.
HISTOGRAM_EDGES = 256
#: Up to so many distinct numbers, each value has a cell of its own. Above 1,000: Evidently's tests with p-values
#: apply to at most 1,000 reference rows, and a Kolmogorov-Smirnov distance from such a profile is exact.
POINTS = 1024
#: Categories counted by name; the rest is counted in buckets.
NAMED_CATEGORIES = 1000
#: Buckets for the rest, by a hash of the value: no matter in which order values arrive, or which parts are merged.
BUCKETS = 64
#: Quantiles of each side that a pair of columns is cut at: 8 x 8 cells.
PAIR_EDGES = 7

_HISTOGRAM_KINDS = frozenset({"number", "datetime", "text"})


@dataclass(frozen=True, kw_only=True, eq=False)
class ColumnLayout:
    """Cells of one column.

    :param name: column; of a pair both names with ``*`` between them.
    :param kind: ``number``, ``datetime`` (in microseconds), ``text`` (its length), ``category``, ``boolean`` or ``pair``.
    :param edges: of a histogram: ``k`` increasing edges of ``k + 1`` cells: below the first, ``[edge_i, edge_{i+1})``, from
        the last up. Of a pair: the edges of both sides, shape ``(2, k)``.
    :param points: whether every reference value has a cell of its own, ``[value, next float)``.
    :param categories: categories counted by name.
    :param buckets: cells behind them, for all other categories.
    :param parts: names of a pair's columns.
    """

    name: str
    kind: Kind
    edges: Array = field(default_factory=lambda: np.empty(0))
    points: bool = False
    categories: tuple[str, ...] = ()
    buckets: int = 0
    parts: tuple[str, ...] = ()

    @property
    def is_histogram(self) -> bool:
        """Whether its values are numbers, or measured by one."""
        return self.kind in _HISTOGRAM_KINDS

    @cached_property
    def cells(self) -> int:
        """Number of cells."""
        if self.kind == "pair":
            return int((self.edges.shape[1] + 1) ** 2)
        return len(self.edges) + 1 if self.is_histogram else len(self.categories) + self.buckets

    @cached_property
    def numbers_by_category(self) -> dict[str, int]:
        """Cell of each named category."""
        return {name: number for number, name in enumerate(self.categories)}

    @cached_property
    def is_point(self) -> Array:
        """Which cells of a histogram hold a single number: between neighboring floats there is none."""
        alone = self.edges[1:] == np.nextafter(self.edges[:-1], np.inf)
        return np.concatenate(([False], alone, [False])) if len(self.edges) else np.array([False])

    @cached_property
    def is_single(self) -> bool:
        """Whether the reference has fractions of 32 bits, in which 0.1 is 0.10000000149."""
        if self.kind != "number":
            return False
        values = self.edges[~np.isin(self.edges, np.nextafter(self.edges, np.inf))]
        with np.errstate(over="ignore"):
            return bool(np.any(values % 1.0) and np.array_equal(values.astype(np.float32), values))

    def identity(self) -> bytes:
        """Everything that decides in which cell a value is counted."""
        text = repr((self.name, self.kind, self.points, self.categories, self.buckets, self.parts))
        return text.encode() + np.ascontiguousarray(self.edges, dtype="<f8").tobytes()


class Layout:
    """Cells of all columns, laid out one after the other.

    :param columns: layouts of the columns.
    """

    def __init__(self, columns: Iterable[ColumnLayout]) -> None:
        self.columns = tuple(columns)
        self.histograms = tuple(item for item in self.columns if item.is_histogram)
        self.places = _places(self.columns, extra=2)
        self.offset_places = _places(self.histograms, extra=0)
        self.size = sum(item.cells + 2 for item in self.columns)
        self.offset_size = sum(item.cells for item in self.histograms)
        self.rows = {item.name: number for number, item in enumerate(self.histograms)}

    @cached_property
    def by_name(self) -> dict[str, ColumnLayout]:
        """Layouts by column."""
        return {item.name: item for item in self.columns}

    @cached_property
    def digest(self) -> str:
        """Hex digest: profiles of equal digests can be merged."""
        digest = hashlib.sha256()
        for item in self.columns:
            digest.update(item.identity())
        return digest.hexdigest()

    def select(self, names: Sequence[str]) -> Layout:
        """Give the layout of some of the columns.

        :raises ValueError: listing the columns there are.
        """
        missing = [name for name in names if name not in self.by_name]
        if missing:
            raise ValueError(f"no profile of column {missing[0]!r}; there are {', '.join(self.by_name)}")
        return Layout(self.by_name[name] for name in names)


def choose_edges(values: Array, *, edges: int = HISTOGRAM_EDGES) -> tuple[Array, bool]:
    """Put edges where they tell most about the distribution.

    Few distinct values get a cell each. Otherwise half of the edges lie at equal shares of the rows, which bounds the error
    of a Kolmogorov-Smirnov distance; the other half at equal shares of the square root of the density, which makes the sum
    over cells of width times share smallest, and that bounds the error of a Wasserstein distance. A value that many rows
    share has a cell of its own.

    :param values: finite values, sorted.
    :returns: the edges, and whether each value has its cell.
    """
    if len(values) == 0:
        return np.empty(0), False
    starts = np.flatnonzero(np.concatenate(([True], values[1:] != values[:-1])))
    distinct = values[starts]
    if len(distinct) <= POINTS:
        return _point_cells(distinct), True
    repeats = np.diff(np.append(starts, len(values)))
    heavy = distinct[repeats * edges >= len(values)]
    half = edges // 2
    at_rows = values[np.linspace(0, len(values) - 1, half).astype(int)]
    # One cell of the grid holds an equal share of the rows: its density is proportional to one over its width.
    grid = values[np.linspace(0, len(values) - 1, min(len(values), 32 * edges)).astype(int)]
    reached = np.concatenate(([0.0], np.cumsum(np.sqrt(np.diff(grid)))))
    at_density = grid[np.searchsorted(reached, np.linspace(0.0, reached[-1], half)).clip(0, len(grid) - 1)]
    last = np.nextafter(values[-1:], np.inf)  # what is beyond the reference has a cell of its own
    return np.unique(np.concatenate((at_rows, at_density, _point_cells(heavy), last))), False


def choose_pair_edges(first: Array, second: Array) -> Array:
    """Cut both sides of a pair at equal shares of their rows; shape ``(2, PAIR_EDGES)``."""
    shares = np.arange(1, PAIR_EDGES + 1) / (PAIR_EDGES + 1)
    return np.stack(
        [np.quantile(side, shares) if len(side) else np.zeros(PAIR_EDGES) for side in (first, second)]
    )


def _point_cells(values: Array) -> Array:
    return np.unique(np.concatenate((values, np.nextafter(values, np.inf))))


def _places(columns: Sequence[ColumnLayout], *, extra: int) -> dict[str, slice]:
    places, start = {}, 0
    for item in columns:
        places[item.name] = slice(start, start + item.cells + extra)
        start += item.cells + extra
    return places
