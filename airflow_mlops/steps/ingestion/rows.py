"""What is looked at while rows pass from a source into a table: nulls, repeated keys, new categories, the digest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from airflow_mlops.core.data.batches import stream_batches
from airflow_mlops.core.data.digest import RowDigest, RowSum
from airflow_mlops.exceptions import SchemaMismatchError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from datetime import datetime

    import polars as pl


class PassingRows:
    """Rows on their way; what is wrong with them is raised before the last batch is handed on, so nothing is committed.

    :param source: for messages.
    :param filled: columns that may not be null, and what each is called.
    :param unique: columns that together name a row once; 8 bytes of memory per row.
    :param categories: known values and the number of new ones that are allowed, by column.
    :param named: columns whose values name folders of the table.
    """

    def __init__(
        self,
        source: str,
        *,
        filled: Mapping[str, str],
        unique: Sequence[str],
        categories: Mapping[str, tuple[set[Any], int]],
        named: Sequence[str] = (),
    ) -> None:
        self.source = source
        self.row_count = 0
        self._nulls = dict.fromkeys(filled, 0)
        self._filled = dict(filled)
        self._named = list(named)
        self._also: dict[str, str] = {}
        self._unique = list(unique)
        self._keys: list[np.ndarray[Any, np.dtype[np.uint64]]] = []
        self._categories = {name: (known, budget, set[Any]()) for name, (known, budget) in categories.items()}

    def watch(self, frames: Iterator[pl.DataFrame]) -> Iterator[pl.DataFrame]:
        """Hand on the frames.

        :raises SchemaMismatchError: nulls where none may be, more new categories than allowed, or an empty name of a folder.
        """
        for frame in frames:
            self.row_count += frame.height
            for name in self._nulls:
                self._also[name] = _also_null(frame[name], self._filled[name])
                self._nulls[name] += _count_nulls(frame[name])
            for name in self._named:
                self._require_folder(name, frame[name])
            for name in self._categories:
                self._count_categories(name, frame[name])
            if self._unique:
                self._keys.append(key_hashes(frame, self._unique))
            yield frame
        for name, nulls in self._nulls.items():
            if nulls:
                raise SchemaMismatchError(
                    f"{self.source}: {self._filled[name]} column {name!r} has {nulls} nulls{self._also[name]}; "
                    "fill them in or remove the rows at the source"
                )

    def suspects(self) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """Give the hashes that came more than once: of keys that are the same, or, hardly ever, of two that are not."""
        return _repeated(self.hashes())

    def hashes(self) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """Give the hashes of what names the rows, sorted."""
        hashes = np.concatenate([np.empty(0, np.uint64), *self._keys])
        hashes.sort()
        self._keys = [hashes]
        return hashes

    def _require_folder(self, name: str, values: pl.Series) -> None:
        import polars as pl

        if values.dtype == pl.String and (values == "").any():
            raise SchemaMismatchError(
                f"{self.source}: column {name!r} names partitions of the table, and is an empty text in some rows, which is null in the "
                "name of a partition: give them another value at the source, or leave them out (keep_where)"
            )

    def _count_categories(self, name: str, values: pl.Series) -> None:
        known, budget, new = self._categories[name]
        new.update(value for value in values.unique().to_list() if value is not None and value not in known)
        if len(new) > budget:
            shown = ", ".join(repr(value) for value in sorted(new, key=str)[:5])
            raise SchemaMismatchError(
                f"{self.source}: column {name!r} has more than {budget} new categories ({shown}); the table has "
                f"{len(known)}. Fix them at the source, or raise new_categories[{name!r}]"
            )


def _also_null(values: pl.Series, what: str) -> str:
    """Name what counts as null in such a column."""
    import polars as pl

    if values.dtype.is_float():
        return " or NaN"
    return " or empty texts" if what == "partition" and values.dtype == pl.String else ""


def _count_nulls(values: pl.Series) -> int:
    """Count nulls; NaN is one, too: it is above every watermark, and the same as no other key."""
    nans = int(values.is_nan().sum()) if values.dtype.is_float() else 0
    return values.null_count() + nans


def require_unique(
    frames: Iterator[pl.DataFrame],
    columns: Sequence[str],
    suspects: np.ndarray[Any, np.dtype[np.uint64]],
    *,
    source: str,
    what: str,
) -> None:
    """Look at the rows again whose keys came more than once.

    :raises SchemaMismatchError: they did.
    """
    import polars as pl
    from polars.selectors import by_name

    if not suspects.size:
        return
    found = []
    for frame in frames:
        hashes = key_hashes(frame, columns)
        found.append(frame.select(by_name(columns)).filter(pl.Series(np.isin(hashes, suspects))))
    keys = pl.concat(found)
    repeated = keys.filter(keys.is_duplicated()).unique(maintain_order=True)
    if repeated.height:
        example = repeated.row(0)[0] if len(columns) == 1 else repeated.row(0)
        raise SchemaMismatchError(
            f"{source}: {what} {', '.join(map(repr, columns))} has {repeated.height} repeated values, "
            f"such as {example!r}; remove them at the source"
        )


def require_single(
    table: pl.LazyFrame, keys: Sequence[str], hashes: np.ndarray[Any, np.dtype[np.uint64]], *, uri: str
) -> None:
    """Look for rows of a table that an upsert takes for one, by its key columns alone.

    :param hashes: sorted, of the keys that are upserted.
    :raises SchemaMismatchError: the table has several rows of such a key; all of them would be the same afterwards.
    """
    import polars as pl
    from polars.selectors import by_name

    rows = table.select(by_name(keys))
    found = [np.empty(0, np.uint64)]
    for batch in stream_batches(rows):
        given = np.sort(key_hashes(batch, keys))  # looked for in order they are found many times as fast
        found.append(given[among(given, hashes).to_numpy()])
    twice = np.concatenate(found)
    twice.sort()
    suspects = _repeated(twice)
    if not suspects.size:
        return
    suspected = (batch.filter(among(key_hashes(batch, keys), suspects)) for batch in stream_batches(rows))
    counts = (
        pl.concat(suspected)
        .group_by(by_name(keys))
        .len("\0rows")
        .filter(pl.col("\0rows") > 1)
        .sort(by_name(keys))
    )
    if counts.height:
        *key, count = counts.row(0)
        raise SchemaMismatchError(
            f"{uri} has several rows of {counts.height} of the keys that are upserted, such as {count} of "
            f"{', '.join(f'{name}={value!r}' for name, value in zip(keys, key, strict=True))}; they would all become the same row. "
            f"If they are one row, replace the table by itself once, with source={uri!r}, mode='replace' and deduplicate_by={list(keys)!r}, "
            "without time_column and hash_columns (hashes stay hashes); "
            "if they are not, name more columns in keys"
        )


def _repeated(hashes: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Give what comes more than once in sorted hashes."""
    found: np.ndarray[Any, np.dtype[np.uint64]] = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    return found


def among(
    hashes: np.ndarray[Any, np.dtype[np.uint64]], wanted: np.ndarray[Any, np.dtype[np.uint64]]
) -> pl.Series:
    """Tell which hashes are among the sorted ones."""
    import polars as pl

    if not wanted.size:
        return pl.Series(np.zeros(len(hashes), dtype=np.bool_))
    places = np.minimum(np.searchsorted(wanted, hashes), wanted.size - 1)
    return pl.Series(wanted[places] == hashes)


def key_hashes(frame: pl.DataFrame, columns: Sequence[str]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Hash what names each row; within one process the same values have the same hash."""
    from polars.selectors import by_name

    hashes: np.ndarray[Any, np.dtype[np.uint64]] = frame.select(by_name(columns)).hash_rows(seed=0).to_numpy()
    return hashes


class PassingDigest:
    """Digest and time range of the rows that pass, so that what was just written is not read again."""

    def __init__(self, schema: Mapping[str, pl.DataType], time_column: str | None) -> None:
        self.times: tuple[datetime, datetime] | None = None
        self._digest = RowDigest({name: str(dtype) for name, dtype in schema.items()})
        self._time_column = time_column

    @property
    def total(self) -> RowSum:
        """Sum over the rows so far."""
        return self._digest.total

    def watch(self, frames: Iterator[pl.DataFrame]) -> Iterator[pl.DataFrame]:
        """Hand on the frames."""
        for frame in frames:
            self._digest.update(frame)
            if self._time_column is not None:
                self._widen(frame[self._time_column])
            yield frame

    def _widen(self, times: pl.Series) -> None:
        import polars as pl

        times = times.cast(
            pl.Datetime("us", "UTC")
        )  # as a dataset's description tells dates, and times without a zone
        first: Any = times.min()
        last: Any = times.max()
        if first is None:
            return  # what a batch without any time means is not for here to say
        self.times = (
            (first, last) if self.times is None else (min(first, self.times[0]), max(last, self.times[1]))
        )
