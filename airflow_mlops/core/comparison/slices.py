"""Slices: parts of the rows in which a challenger that is better on the whole may be worse."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from airflow_mlops.core.comparison.predictions import text_codes
from airflow_mlops.core.comparison.resampling import require_level, upper_tail

Array = NDArray[Any]

#: Parts a number is cut into, at its quantiles, and categories kept by name; the rest is one part together.
NUMBER_PARTS, NAMED_PARTS = 5, 12
#: Columns whose pairs are searched: more make hundreds of thousands of slices, and each has to be paid for in power.
PAIRED_COLUMNS = 20
#: Rows of fewer blocks of neighbors say nothing about other times.
FEWEST_BLOCKS = 3
#: Slices a report shows.
SHOWN_SLICES = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class SlicePolicy:
    """When a slice counts, and what may not happen to it.

    :param minimum_rows: smaller slices are not judged.
    :param maximum_regression: how much worse than the champion a slice may get, relative to the champion's loss there.
    :param significance: rate at which any slice at all would be called worse if none was (over all slices together).
    :param pairs: whether slices by two columns are searched too.
    """

    minimum_rows: int = 200
    maximum_regression: float = 0.05
    significance: float = 0.05
    pairs: bool = True

    def __post_init__(self) -> None:
        if not self.minimum_rows >= 1:
            raise ValueError(f"minimum_rows of a slice is {self.minimum_rows}: give at least 1")
        if not self.maximum_regression >= 0.0:
            raise ValueError(
                f"maximum_regression of a slice is {self.maximum_regression}: give a share from 0 on, such as 0.05"
            )
        require_level("significance of slices", self.significance)


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """Rows with certain values, and how both models do on them.

    :param where: column to its part, ``{"rate_code_id": "2"}`` or ``{"distance": "3.1 to 8"}``.
    :param row_count: rows in it.
    :param challenger: mean loss of the challenger, as it is told: a root of mean squares, a gain.
    :param champion: the same of the champion.
    :param regression: how much worse the challenger is, relative to the size of the champion's; below zero is better;
        ``None`` where that is zero.
    :param p_value: probability of so large a worsening by chance, adjusted for the number of slices looked at.
    :param block_count: blocks of neighbors that its rows are worth: unequal ones count as fewer equal ones, rounded down.
    """

    where: dict[str, str]
    row_count: int
    challenger: float
    champion: float
    regression: float | None
    p_value: float
    block_count: int

    def __str__(self) -> str:
        """``rate_code_id 2 and hour 17 to 23``."""
        return " and ".join(f"{column} {part}" for column, part in self.where.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class SliceReport:
    """What the search found.

    :param loss: what is compared, such as ``mae`` or ``error rate``.
    :param looked_at: slices with enough rows.
    :param worst: the ones that got worst, relative to the champion.
    :param broken: those of them that got worse beyond tolerance and beyond chance.
    :param doubtful: those that got worse beyond tolerance, and beyond chance if all their rows were independent; but they are
        worth fewer than three blocks of neighbors, so that nobody can tell.
    :param unmeasured: columns without a single part that has enough rows.
    :param minimum_rows: how many are enough.
    """

    loss: str
    looked_at: int
    worst: tuple[Slice, ...]
    broken: tuple[Slice, ...]
    doubtful: tuple[Slice, ...] = ()
    unmeasured: tuple[str, ...] = ()
    minimum_rows: int = 0


@dataclass(frozen=True, slots=True)
class Parts:
    """A column cut into parts: a part number per row, and the parts' names."""

    numbers: Array
    names: tuple[str, ...]


def find_worse_slices(
    columns: Mapping[str, Array],
    challenger: Array,
    champion: Array,
    starts: Array,
    policy: SlicePolicy,
    *,
    loss: str = "loss",
    of_mean: Callable[[float], float] | None = None,
) -> SliceReport:
    """Look at every part of every column, and of every pair of columns, for rows on which the challenger is worse.

    The difference of the losses in a slice is judged by Student's t, with the blocks of neighboring rows as clusters, of which
    as many count as there would be equal ones; the p-values are adjusted for having looked at many slices, whatever their overlap.

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6, 1979;
    Liang and Zeger, "Longitudinal data analysis using generalized linear models", Biometrika 73, 1986 (errors by
    cluster).

    :param columns: what to cut by: numbers, dates and times or text, each of shape ``(n,)``.
    :param challenger: its loss per row, smaller is better, shape ``(n,)``.
    :param champion: its loss per row.
    :param starts: first row of each block of neighbors.
    :param policy: when a slice counts.
    :param loss: what is told of them is called.
    :param of_mean: turns a mean of losses into what is told, and what ``maximum_regression`` is a share of, such as the root
        of a mean of squares; default as it is.
    """
    parts = {name: cut_column(column) for name, column in columns.items()}
    blocks = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(challenger))))
    groups: list[tuple[str, ...]] = [(name,) for name in parts]
    if policy.pairs:
        groups += list(itertools.combinations(list(parts)[:PAIRED_COLUMNS], 2))
    found: list[Slice] = []
    for group in groups:
        found += _slices(group, parts, challenger, champion, blocks, len(starts), policy.minimum_rows)
    adjusted = _holm([item.p_value for item in found])
    judged = [
        replace(_told(item, of_mean) if of_mean else item, p_value=p)
        for item, p in zip(found, adjusted, strict=True)
    ]
    worst = sorted(judged, key=lambda item: (item.p_value, -_regression(item)))
    beyond = [
        item
        for item in worst
        if item.p_value <= policy.significance and _regression(item) > policy.maximum_regression
    ]
    broken = [item for item in beyond if item.block_count >= FEWEST_BLOCKS]
    doubtful = [item for item in beyond if item.block_count < FEWEST_BLOCKS]
    return SliceReport(
        loss=loss,
        looked_at=len(judged),
        worst=tuple(worst[:SHOWN_SLICES]),
        broken=tuple(broken[:SHOWN_SLICES]),
        doubtful=tuple(doubtful[:SHOWN_SLICES]),
        unmeasured=tuple(
            name for name, part in parts.items() if np.bincount(part.numbers).max() < policy.minimum_rows
        ),
        minimum_rows=policy.minimum_rows,
    )


def _told(item: Slice, of_mean: Callable[[float], float]) -> Slice:
    new, old = of_mean(item.challenger), of_mean(item.champion)
    worse = math.copysign(abs(new - old), item.challenger - item.champion)
    return replace(item, challenger=new, champion=old, regression=worse / abs(old) if old else None)


def _regression(item: Slice) -> float:
    """Give the regression; without end where a champion without loss is followed by one with."""
    return item.regression if item.regression is not None else math.inf


def _short(text: str) -> str:
    return (text if len(text) <= 60 else f"{text[:59]}…") or "(empty)"


def cut_column(column: Array) -> Parts:
    """Cut a column into parts: numbers, dates and times at their quantiles, text by its most frequent values."""
    if column.dtype.kind == "M":
        return _cut_numbers(_microseconds(column), _times)
    return _cut_numbers(column, _numbers) if column.dtype.kind in "fiu" else _cut_text(column)


def _microseconds(column: Array) -> Array:
    return np.where(np.isnat(column), np.nan, column.astype("datetime64[us]").astype(np.float64))


def _numbers(values: Array) -> list[str]:
    return [f"{value:.6g}" for value in values]


def _times(microseconds: Array) -> list[str]:
    """Spell instants, days where all of them are days, else as briefly as they differ."""
    times = microseconds.astype(np.int64).astype("datetime64[us]")
    days = (times == times.astype("datetime64[D]")).all()
    units: tuple[Literal["D", "m", "s", "us"], ...] = ("D",) if days else ("m", "s", "us")
    spellings = [
        [text.replace("T", " ") for text in np.datetime_as_string(times, unit=unit)] for unit in units
    ]
    return next((spelled for spelled in spellings if len({*spelled}) == len(times)), spellings[-1])


def _cut_numbers(column: Array, spell: Callable[[Array], list[str]]) -> Parts:
    values = column.astype(np.float64)
    known = values[np.isfinite(values)]
    distinct = np.unique(known)
    if len(distinct) <= NAMED_PARTS:
        numbers = np.where(
            np.isfinite(values), np.searchsorted(distinct, np.nan_to_num(values)), len(distinct)
        )
        return Parts(np.minimum(numbers, len(distinct)), (*spell(distinct), "missing"))
    cuts = np.unique(np.quantile(known, np.linspace(0.0, 1.0, NUMBER_PARTS + 1)))
    numbers = np.clip(np.searchsorted(cuts, values, side="right") - 1, 0, len(cuts) - 2)
    names = [f"{low} to {high}" for low, high in itertools.pairwise(spell(cuts))]
    return Parts(np.where(np.isfinite(values), numbers, len(names)), (*names, "missing"))


def _cut_text(column: Array) -> Parts:
    values, numbers = text_codes(column)
    counts = np.bincount(numbers)
    named = np.argsort(-counts, kind="stable")[:NAMED_PARTS]
    places = np.full(len(values), len(named))
    places[named] = np.arange(len(named))
    return Parts(places[numbers], (*(_short(values[place]) for place in named), "(any other)"))


def _slices(
    group: tuple[str, ...],
    parts: Mapping[str, Parts],
    challenger: Array,
    champion: Array,
    blocks: Array,
    block_count: int,
    minimum_rows: int,
) -> list[Slice]:
    """Measure every combination of the group's parts in one pass over the rows."""
    sizes = [len(parts[name].names) for name in group]
    cells = np.ravel_multi_index([parts[name].numbers for name in group], sizes)
    size = math.prod(sizes)
    place = blocks * size + cells
    rows = np.bincount(place, minlength=block_count * size).reshape(block_count, size)
    differences = challenger - champion
    worse = np.bincount(place, weights=differences, minlength=block_count * size).reshape(block_count, size)
    squares = np.bincount(cells, weights=np.square(differences), minlength=size)
    old = np.bincount(cells, weights=champion, minlength=size)
    counts = rows.sum(axis=0)
    found = []
    for cell in np.flatnonzero((counts >= minimum_rows) & (counts < len(cells))):
        count, mean = int(counts[cell]), float(worse[:, cell].sum() / counts[cell])
        before = float(old[cell] / count)
        names = np.unravel_index(cell, sizes)
        worth = _equal_blocks(rows[:, cell])
        found.append(
            Slice(
                where={name: parts[name].names[int(part)] for name, part in zip(group, names, strict=True)},
                row_count=count,
                challenger=before + mean,
                champion=before,
                regression=mean / abs(before) if before else None,
                p_value=_of_blocks(worse[:, cell], rows[:, cell], mean, worth)
                if worth >= FEWEST_BLOCKS
                else _of_rows(mean, float(squares[cell]), count),
                block_count=int(worth),
            )
        )
    return found


def _equal_blocks(rows: Array) -> float:
    """Give the number of equal blocks that know as much of other times as these.

    Source: Carter, Schnepel and Steigerwald, "Asymptotic behavior of a t-test robust to cluster heterogeneity", Review of Economics
    and Statistics 99, 2017 (the effective number of clusters, for rows of a cluster that are all alike).

    >>> _equal_blocks(np.array([100, 100, 100, 0])), round(_equal_blocks(np.array([100, 100, 1, 1])), 1)
    (3.0, 2.0)
    """
    return float(rows.sum()) ** 2 / float(np.sum(np.square(rows, dtype=np.float64)))


def _of_blocks(worse: Array, rows: Array, mean: float, worth: float) -> float:
    """Judge a mean whose rows come in clusters that are worth so many equal ones."""
    clusters = int(np.count_nonzero(rows))
    residuals = worse - mean * rows
    error = math.sqrt(float(np.sum(np.square(residuals))) * clusters / (clusters - 1.0)) / float(rows.sum())
    return _tail(mean, error, worth - 1.0)


def _of_rows(mean: float, squares: float, count: int) -> float:
    """Judge a mean as if its rows were independent, which makes any worsening look surer than it is."""
    variance = max(0.0, squares / count - mean**2) * count / (count - 1.0) if count > 1 else math.inf
    return _tail(mean, math.sqrt(variance / count), count - 1)


def _tail(mean: float, error: float, freedom: float) -> float:
    """Give the p-value; without any spread a worsening is certain."""
    if error <= abs(mean) * 1e-12:
        return 0.0 if mean > 0.0 else 1.0
    return upper_tail(mean / error, freedom)


def _holm(p_values: Sequence[float]) -> list[float]:
    order = np.argsort(p_values)
    adjusted = np.empty(len(p_values))
    highest = 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return [float(value) for value in adjusted]
