"""Counting: rows of one batch into the cells of a layout."""

from __future__ import annotations

import hashlib
import zlib
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from airflow_mlops.core.data.categories import category_texts

if TYPE_CHECKING:
    import polars as pl

    from airflow_mlops.core.profiles.profile_layout import Array, ColumnLayout

#: Numbers beyond count as infinite: their squares, and so a standard deviation, can't be represented.
LARGEST = 1e150
#: Values without a cell of their own that are kept by name: those with the smallest hashes, so that it does not matter
#: which part of the rows was seen first.
UNSEEN_NAMED = 20
#: Characters of a category that is kept as it is.
LONGEST_NAME = 80
#: Up to so many distinct reference numbers, new numbers are kept by name as new categories are.
FEW_POINTS = 20


class CountedNumbers(NamedTuple):
    """One batch of a column of numbers; ``moments`` are count, mean, m2, minimum and maximum."""

    nulls: int
    infinite: int
    counts: Array
    offsets: Array
    moments: tuple[float, float, float, float, float]
    unseen: dict[str, int]


class CountedCategories(NamedTuple):
    """One batch of a column of categories."""

    nulls: int
    counts: Array
    unseen: dict[str, int]


def as_numbers(column: pl.Series, kind: str) -> Array:
    """Give a column as float64 with NaN for null: numbers, microseconds of instants, lengths of text."""
    import polars as pl

    if kind == "datetime":
        column = column.cast(pl.Datetime("us")).to_physical()
    elif kind == "text":
        column = category_texts(column).str.len_chars()
    return column.cast(pl.Float64).to_numpy()


def in_precision(values: Array, layout: ColumnLayout) -> Array:
    """Take numbers that a reference of 32 bits can't tell from a value of its own for that: requests in JSON write it with other digits."""
    if not layout.is_single:
        return values
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float32).astype(np.float64)
    others = np.flatnonzero(rounded != values)
    places = np.searchsorted(layout.edges, rounded[others]).clip(max=len(layout.edges) - 1)
    meant = others[layout.edges[places] == rounded[others]]
    taken = values.copy()
    taken[meant] = rounded[meant]
    return taken


def sort_finite(values: Array) -> tuple[Array, int, int]:
    """Sort, and set apart what is no number.

    :returns: the finite values, how many are NaN, how many infinite.
    """
    ordered = np.sort(values)
    first, last, numbers = np.searchsorted(ordered, (-LARGEST, np.nextafter(LARGEST, np.inf), np.nan))
    return ordered[first:last], len(ordered) - int(numbers), int(numbers - last + first)


def count_numbers(values: Array, layout: ColumnLayout) -> CountedNumbers:
    """Count a batch of numbers: sorted once, every cell is a stretch of rows.

    :param values: float64 with NaN for null.
    """
    ordered, nulls, infinite = sort_finite(in_precision(values, layout))
    starts = np.concatenate(([0], np.searchsorted(ordered, layout.edges, side="left")))
    counts = np.diff(np.append(starts, len(ordered)))
    left = np.concatenate((layout.edges[:1], layout.edges)) if len(layout.edges) else np.zeros(1)
    full = np.flatnonzero(counts)
    offsets = np.zeros(len(counts))
    moments = (0.0, 0.0, 0.0, np.inf, -np.inf)
    if len(full):
        # Sums of distances to the mean: of large numbers close together, sums of the values would lose the digits.
        mean = float(ordered.mean())
        deviations = ordered - mean
        sums = np.add.reduceat(deviations, starts[full])
        offsets[full] = sums - counts[full] * (left[full] - mean)
        moments = (
            float(len(ordered)),
            mean,
            float(deviations @ deviations),
            float(ordered[0]),
            float(ordered[-1]),
        )
    return CountedNumbers(
        nulls, infinite, counts, offsets, moments, _new_numbers(ordered, starts, counts, layout)
    )


def count_categories(column: pl.Series, layout: ColumnLayout) -> CountedCategories:
    """Count a batch of categories."""
    found = category_counts(column)
    counts = np.zeros(layout.cells, dtype=np.int64)
    unseen = {}
    named = layout.numbers_by_category
    for value, rows in found.items():
        cell = named.get(value)
        if cell is None:
            unseen[value] = rows
            cell = len(named) + stable_hash(value) % layout.buckets
        counts[cell] += rows
    return CountedCategories(column.len() - int(counts.sum()), counts, smallest_hashes(unseen))


def category_counts(column: pl.Series) -> dict[str, int]:
    """Count a column's values as text, long ones by a name; nulls and NaN are left out."""
    known = column.fill_nan(None) if column.dtype.is_float() else column
    counted = known.drop_nulls().alias("value").value_counts(name="rows")
    texts = category_texts(counted.to_series(0))
    names = texts.to_list()
    if (texts.str.len_chars() > LONGEST_NAME).any():
        names = [_name(text) for text in names]
    return dict(zip(names, counted["rows"].to_list(), strict=True))


def _name(text: str) -> str:
    """Give a long value a name: its beginning and a digest, so that a thousand documents make no profile of megabytes."""
    if len(text) <= LONGEST_NAME:
        return text
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
    return f"{text[: LONGEST_NAME // 2]}… {digest}"


def count_pairs(first: Array, second: Array, layout: ColumnLayout) -> tuple[int, Array]:
    """Count a batch of two columns together.

    :returns: rows without one of the values, and the rows per cell.
    """
    both = ~(np.isnan(first) | np.isnan(second))
    side = layout.edges.shape[1] + 1
    numbers = [
        np.searchsorted(edges, values[both], side="right")
        for edges, values in zip(layout.edges, (first, second), strict=True)
    ]
    counts = np.bincount(numbers[0] * side + numbers[1], minlength=side * side)
    return len(first) - int(both.sum()), counts


def stable_hash(value: str) -> int:
    """Hash that is the same on every machine and in every version: CRC-32, here of its published check value.

    >>> hex(stable_hash("123456789"))
    '0xcbf43926'
    """
    return zlib.crc32(value.encode(errors="surrogatepass"))


def smallest_hashes(counts: dict[str, int]) -> dict[str, int]:
    """Keep the values with the smallest hashes: every part that holds one of them keeps it, so merging loses nothing."""
    if len(counts) <= UNSEEN_NAMED:
        return counts
    kept = sorted(counts, key=lambda value: (stable_hash(value), value))[:UNSEEN_NAMED]
    return {value: counts[value] for value in kept}


def _new_numbers(ordered: Array, starts: Array, counts: Array, layout: ColumnLayout) -> dict[str, int]:
    """Name the values between a few reference values, to know how many distinct ones there are."""
    if not layout.points or len(layout.edges) > 2 * FEW_POINTS:
        return {}
    new: dict[str, int] = {}
    for cell in np.flatnonzero((counts > 0) & ~layout.is_point):
        values, rows = np.unique(ordered[starts[cell] : starts[cell] + counts[cell]], return_counts=True)
        new |= {
            repr(float(value) + 0.0): int(n)  # no negative zero
            for value, n in zip(values, rows, strict=True)
        }
    return smallest_hashes(new)
