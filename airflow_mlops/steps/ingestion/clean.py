"""Rows of a source as they are to be written: cleaned a batch at a time, the same at each reading."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from airflow_mlops.core.codec import canonical_json, to_dict
from airflow_mlops.core.data.cleaning import Cleaning, CleaningReport, KeptRows, ValueHasher, keep_condition
from airflow_mlops.exceptions import (
    CommitConflictError,
    DatasetNotFoundError,
    MLOpsError,
    SchemaMismatchError,
)
from airflow_mlops.integrations import delta
from airflow_mlops.steps.ingestion.files import read_batches, reading
from airflow_mlops.steps.ingestion.rows import PassingRows, among, key_hashes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import polars as pl

    from airflow_mlops.services import Services
    from airflow_mlops.steps.ingestion.source import TableSource

#: What a commit says about how its rows were cleaned.
_CLEANING = "airflow_mlops.cleaning"


class Cleaner:
    """Clean the rows of one source.

    :param cleaning: what is to be done.
    :param services: hold the key, where values are hashed.
    :param source: for messages.
    :raises ConnectionConfigError: values are to be hashed, and there is no key or one that is too short.
    :raises ValueError: ``keep_where`` is no condition.
    """

    def __init__(self, cleaning: Cleaning, services: Services, *, source: str) -> None:
        self.source = source
        self._cleaning = cleaning
        if cleaning.keep_where is not None:
            keep_condition(cleaning.keep_where)
        self._hasher = ValueHasher(services.require("hash_key")) if cleaning.hash_columns else None
        self._left_out = 0
        self._given: Counter[str] = Counter()
        self._chosen: _Chosen | None = None

    def shape(self, frame: pl.LazyFrame) -> pl.LazyFrame:
        """Give the columns as they are to be written.

        :raises SchemaMismatchError: one that is to be dropped or hashed is not there; was it renamed?
        """
        import polars as pl

        delta.require_columns(self._cleaning.columns, frame.collect_schema().names(), self.source)
        frame = frame.drop(self._cleaning.drop_columns)
        if self._hasher is None:
            return frame
        return frame.with_columns(
            pl.col(name).map_batches(self._hasher.hash_values, return_dtype=pl.String, is_elementwise=True)
            for name in self._cleaning.hash_columns
        )

    def read(
        self, frame: pl.LazyFrame, shape: Callable[[pl.LazyFrame], pl.LazyFrame]
    ) -> Iterator[pl.DataFrame]:
        """Read the rows; no frame is empty.

        :param shape: applied to the rows that are kept.
        :raises SchemaMismatchError: keys are null, or have rows that differ and none of them is the last or first one.
        :raises CommitConflictError: the source changed between two readings of it.
        """
        if self._cleaning.keep_where is None and not self._cleaning.deduplicate_by:
            yield from read_batches(shape(frame), self.source)
            return
        for batch in self._kept(frame):
            if batch.height:
                with reading(self.source):
                    shaped = shape(batch.lazy()).collect()
                yield shaped

    def report(self) -> CleaningReport | None:
        """Tell what the last reading did; ``None`` where nothing was to be done."""
        if self._cleaning == Cleaning():
            return None
        return CleaningReport(
            left_out=self._left_out,
            equal_rows=self._given["equal"],
            differing_rows=self._given["differing"],
            dropped_columns=self._cleaning.drop_columns,
            hashed_columns=self._cleaning.hash_columns,
            hash_key_id=self._hasher.key_id if self._hasher else None,
        )

    def notes(self) -> dict[str, str]:
        """Give what the commit says about the cleaning."""
        declared = {name: value for name, value in to_dict(self._cleaning).items() if value}
        if declared and self._hasher:
            declared["hash_key_id"] = self._hasher.key_id
        return {_CLEANING: canonical_json(declared)} if declared else {}

    def marks(
        self, writer: delta.TableWriter, columns: Sequence[str], *, whole: bool, table: TableSource | None
    ) -> dict[str, int]:
        """Give the marks of columns with hashes that the table does not have yet.

        :param columns: what is to be written.
        :param whole: all of the table's rows are replaced.
        :param table: the source where that is a table: its hashes are read as they are, and stay what they are.
        :raises SchemaMismatchError: the table has values where hashes are to be written, hashes of another key, or hashes
            where values are to be written; or there would be hashes of hashes.
        """
        number = int(self._hasher.key_id, 16) if self._hasher else 0
        wanted = {
            f"{delta.HASHED}={name}": number if name in self._cleaning.hash_columns else 0 for name in columns
        }
        known = writer.marks(list(wanted))
        if table is not None:
            held = table.table_marks(list(wanted))
            self._require_unhashed(held)
            wanted |= {mark: number for mark, number in held.items() if number}
        changed = {name: number for name, number in wanted.items() if number != known.get(name, 0)}
        rows = writer.scan() if changed and not whole else None
        if rows is not None:
            there = {f"{delta.HASHED}={name}" for name in rows.collect_schema()}
            mixed = [name for name in changed if name in there]
            if mixed and rows.select(list(rows.collect_schema())[:1]).head(1).collect().height:
                raise _mixed(
                    writer.uri, mixed[0].partition("=")[2], known.get(mixed[0], 0), changed[mixed[0]]
                )
        return changed

    def _require_unhashed(self, known: Mapping[str, int]) -> None:
        twice = [name for name in self._cleaning.hash_columns if known.get(f"{delta.HASHED}={name}", 0)]
        if twice:
            raise SchemaMismatchError(
                f"{self.source} holds hashes in {', '.join(map(repr, twice))} already, which would be hashed again: leave them out of "
                "hash_columns; they stay marked as hashes"
            )

    def _kept(self, frame: pl.LazyFrame) -> Iterator[pl.DataFrame]:
        if not self._cleaning.deduplicate_by:
            yield from self._meeting(frame)
            return
        if self._chosen is None:
            self._chosen = self._choose(frame)
        chosen, seen = self._chosen, _Seen()
        given: Counter[str] = Counter()
        done = np.zeros(0 if chosen.best is None else chosen.best.height, dtype=np.bool_)
        for batch in self._meeting(frame):
            hashes = key_hashes(batch, self._cleaning.deduplicate_by)
            seen.add(hashes)
            yield chosen.keep(batch, hashes, given, done)
        if seen != chosen.seen or given["unknown"] or not done.all():
            raise CommitConflictError(
                f"{self.source} changed while it was read. Nothing was written; run the task again when it is whole"
            )
        self._given = given

    def _meeting(self, frame: pl.LazyFrame) -> Iterator[pl.DataFrame]:
        """Give the rows that meet ``keep_where``, of the columns that are needed."""
        import polars as pl

        if self._cleaning.keep_where is None:
            yield from read_batches(frame, self.source)
            return
        condition = keep_condition(self._cleaning.keep_where)
        delta.require_columns(condition.meta.root_names(), frame.collect_schema().names(), self.source)
        left_out = 0
        try:
            for batch in read_batches(frame, self.source):
                kept = batch.filter(condition)
                left_out += batch.height - kept.height
                yield kept
        except (pl.exceptions.PolarsError, TypeError) as err:
            raise SchemaMismatchError(
                f"keep_where can't be applied to the rows of {self.source}: {err}"
            ) from err
        self._left_out = left_out

    def _choose(self, frame: pl.LazyFrame) -> _Chosen:
        cleaning = self._cleaning
        passing = PassingRows(
            self.source,
            filled=dict.fromkeys(cleaning.deduplicate_by, "deduplicate_by"),
            unique=cleaning.deduplicate_by,
            categories={},
        )
        needed = [*cleaning.deduplicate_by]
        if cleaning.keep_where is not None:
            needed += keep_condition(cleaning.keep_where).meta.root_names()
        seen = _Seen()
        for batch in passing.watch(self._meeting(frame.select(list(dict.fromkeys(needed))))):
            seen.add(key_hashes(batch, cleaning.deduplicate_by))
        suspects = passing.suspects()
        if not suspects.size:
            return _Chosen(seen, suspects)
        rows = KeptRows(cleaning, _written(frame, cleaning))
        for batch in self._meeting(frame):
            rows.add(batch.filter(among(key_hashes(batch, cleaning.deduplicate_by), suspects)))
        best = rows.settle()
        self._require_best(best)
        return _Chosen(seen, suspects, rows, best)

    def _require_best(self, best: pl.DataFrame) -> None:
        ties = best.filter("\0tie")
        if not ties.height:
            return
        by = self._cleaning.deduplicate_by
        told = "" if self._hidden(by) else f", such as {ties.select(by).row(0)!r}"
        raise SchemaMismatchError(
            f"{self.source}: {ties.height} values of {', '.join(map(repr, by))} have rows that differ, and "
            + (
                "deduplicate_order does not tell which is"
                if self._cleaning.deduplicate_order
                else "nothing says which is"
            )
            + f" the one to keep{told}. Name more columns in deduplicate_order, or remove the rows at the source"
        )

    def _hidden(self, columns: Sequence[str]) -> bool:
        return bool({*columns} & {*self._cleaning.hash_columns, *self._cleaning.drop_columns})


class _Seen:
    """Number and sum of key hashes: two readings of the same rows, in any order, have the same."""

    def __init__(self) -> None:
        self._told = (0, 0)

    def add(self, hashes: np.ndarray[Any, np.dtype[np.uint64]]) -> None:
        count, total = self._told
        self._told = (count + len(hashes), (total + int(hashes.sum(dtype=np.uint64))) % 2**64)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Seen) and self._told == other._told

    __hash__ = None  # type: ignore[assignment]


class _Chosen:
    """The rows that are kept, and what was seen when they were chosen."""

    def __init__(
        self,
        seen: _Seen,
        suspects: np.ndarray[Any, np.dtype[np.uint64]],
        rows: KeptRows | None = None,
        best: pl.DataFrame | None = None,
    ) -> None:
        self.seen, self.best = seen, best
        self._suspects, self._rows = suspects, rows

    def keep(self, batch: pl.DataFrame, hashes: Any, given: Counter[str], done: Any) -> pl.DataFrame:
        """Give the batch without the rows that another one stands for."""
        import polars as pl

        suspected = among(hashes, self._suspects)
        if self._rows is None or self.best is None or not suspected.any():
            return batch
        mask = np.ones(batch.height, dtype=np.bool_)
        mask[suspected.to_numpy()] = self._rows.choose(
            batch.filter(suspected), self.best, given, done
        ).to_numpy()
        return batch.filter(pl.Series(mask))


def _written(frame: pl.LazyFrame, cleaning: Cleaning) -> list[str]:
    return [name for name in frame.collect_schema().names() if name not in cleaning.drop_columns]


def _mixed(uri: str, column: str, known: int, wanted: int) -> SchemaMismatchError:
    if not known:
        what = f"{uri} holds values in column {column!r}, and their hashes are to be written"
    elif not wanted:
        what = (
            f"{uri} holds hashes in column {column!r}, and values are to be written: name it in hash_columns"
        )
    else:
        what = f"{uri} holds hashes of another key in column {column!r}: the same values would no longer be the same"
    return SchemaMismatchError(
        f"{what}. Replace the whole table (mode 'replace' without a window), or write into a new one"
    )


def _about_values(err: Exception, cause: BaseException) -> bool:
    """Tell whether something else than polars says what it can't do with a value."""
    import sqlalchemy as sa

    if isinstance(cause, sa.exc.DBAPIError):  # of these one is about the query's own text
        return isinstance(err, ValueError) and not isinstance(cause, sa.exc.ProgrammingError)
    read = isinstance(err, SchemaMismatchError | DatasetNotFoundError)
    return read and isinstance(cause, ValueError | TypeError | ArithmeticError)


def without_values(source: str, err: Exception) -> Exception:
    """Give the error to raise instead, of a source with values that nobody is to see: polars and databases show what they can't read."""
    import polars as pl

    cause = err if isinstance(err, pl.exceptions.PolarsError) else err.__cause__
    if cause is None or not (isinstance(cause, pl.exceptions.PolarsError) or _about_values(err, cause)):
        err.__suppress_context__ = True  # a traceback would show what polars had said before
        return err
    kind = type(err) if isinstance(err, MLOpsError) else SchemaMismatchError
    return kind(
        f"{source} can't be read ({type(cause).__name__}); what stands there is not shown, as columns are dropped or hashed. "
        "Read it without the ingest to see it, and fix it at the source"
    )
