"""Commits on top of a table exactly as it was when it was opened."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from airflow_mlops.core.data.batches import stream_batches
from airflow_mlops.exceptions import CommitConflictError, SchemaMismatchError
from airflow_mlops.integrations.delta.commits import REPLACED, WINDOW, place_of
from airflow_mlops.integrations.delta.conditions import equals, in_window, quoted
from airflow_mlops.integrations.delta.extremes import find_extremes
from airflow_mlops.integrations.delta.history import settled_marks, standing_marks
from airflow_mlops.integrations.delta.tables import open_table, scan, table_exists
from airflow_mlops.integrations.delta.writing import create_table, streamed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import polars as pl
    from deltalake import CommitProperties, DeltaTable

    from airflow_mlops.core.windows import Window

#: Mark of the commits that write a table again with wider types.
_WIDENING = "airflow_mlops.widening"


class TableWriter:
    """A table as it was when this was made, and commits on top of exactly that; a missing table is made by the first of them.

    What others commit meanwhile makes a commit fail where both change the same rows, replace the same window or carry a mark
    of the same name, so whatever was decided from the table as it was, holds.

    :param uri: table URI.
    :param notes: what commits say about themselves.
    """

    def __init__(self, uri: str, *, notes: Mapping[str, str] | None = None) -> None:
        self.uri = uri
        #: Marks that each commit carries beside its own.
        self.marked: dict[str, int] = {}
        self._notes = dict(notes or {})
        self._table = open_table(uri, None) if table_exists(uri) else None

    @property
    def version(self) -> int | None:
        """Version of the table; ``None`` when it is not there."""
        return None if self._table is None else self._table.version()

    @property
    def schema(self) -> dict[str, pl.DataType] | None:
        """Columns of the table; ``None`` when it is not there."""
        return None if self._table is None else dict(scan(self._table).collect_schema())

    @property
    def partition_columns(self) -> list[str]:
        """Columns by whose values the table has folders."""
        return [] if self._table is None else self._table.metadata().partition_columns

    def marks(self, names: Sequence[str]) -> dict[str, int]:
        """Find which of these marks the table's commits carry, and with which number; what a restore took back has none."""
        return {} if self._table is None else standing_marks(self.uri, self._table, names)

    def _settled(self) -> dict[str, int]:
        """Give the marks of what a restore took back, where this table's commits are told by marks."""
        return {} if self._table is None else settled_marks(self.uri, self._table)

    def scan(self) -> pl.LazyFrame | None:
        """Read the table; ``None`` when it is not there."""
        return None if self._table is None else scan(self._table)

    def highest(self, column: str) -> Any:
        """Find the highest value of a column; ``None`` where there is none."""
        return None if self._table is None else find_extremes(self._table, column)[1]

    def replace(
        self,
        frames: Iterator[pl.DataFrame],
        schema: Mapping[str, pl.DataType],
        *,
        time_column: str | None,
        window: Window | None,
        partition: tuple[str, Any] | None = None,
    ) -> int:
        """Make the rows the content of a window, a partition, or of the whole table, in one commit.

        :param schema: of the frames; columns the table does not have are added, a whole table gets these types.
        :param partition: a column and its value, which all of the rows have; a table that is made by this has a folder for
            each value of the column.
        :returns: the version of this commit.
        """
        from deltalake import write_deltalake

        # Of a folder with such a name the readers of Delta tables make other columns.
        named = partition is not None and "/" not in partition[0] and partition[0].isprintable()
        table = self._opened(schema, partition_by=partition[0] if partition and named else None)
        # A commit that names the same schema again is in conflict with whoever reads or writes meanwhile.
        same = dict(scan(table).collect_schema()) == dict(schema)
        part = window is not None or partition is not None
        other: Literal["overwrite", "merge"] = "merge" if part else "overwrite"
        place = place_of(window) if partition is None else f"{partition[0]}={partition[1]}"
        with streamed(self.uri, frames, schema) as reader:
            write_deltalake(
                table,
                reader,
                mode="overwrite",
                schema_mode=None if same else other,
                predicate=in_window(time_column, window, schema) if partition is None else equals(*partition),
                commit_properties=self._properties(
                    {f"{WINDOW}={place}": 1} | ({} if part else {REPLACED: table.version()}),
                    {WINDOW: place} if partition is None else None,
                ),
            )
        return table.version()

    def append(
        self,
        frames: Iterator[pl.DataFrame],
        schema: Mapping[str, pl.DataType],
        *,
        marks: Mapping[str, int],
    ) -> int:
        """Add the rows in one commit that carries the marks; of two with a mark in common the second one fails.

        :returns: the version of this commit.
        """
        from deltalake import write_deltalake

        table = self._opened(schema)
        with streamed(self.uri, frames, schema) as reader:
            write_deltalake(
                table,
                reader,
                mode="append",
                schema_mode="merge",
                commit_properties=self._properties(marks),
            )
        return table.version()

    def upsert(
        self,
        frames: Iterator[pl.DataFrame],
        schema: Mapping[str, pl.DataType],
        *,
        keys: Sequence[str],
        marks: Mapping[str, int],
    ) -> int:
        """Put the rows in the place of those with the same keys and add the others, in one commit.

        :param keys: not null, and no two of the rows have the same.
        :returns: the version of this commit.
        """
        table = self._opened(schema)
        same = " AND ".join(f"new.{quoted(key)} = old.{quoted(key)}" for key in keys)
        with streamed(self.uri, frames, schema) as reader:
            table.merge(
                reader,
                same,
                source_alias="new",
                target_alias="old",
                merge_schema=True,
                commit_properties=self._properties(marks),
            ).when_matched_update_all().when_not_matched_insert_all().execute()
        return table.version()

    def widen(self, types: Mapping[str, pl.DataType]) -> None:
        """Write the whole table again, the same rows with other types, in a commit of its own.

        :raises SchemaMismatchError: a value does not fit, as a decimal of too many digits.
        """
        import polars as pl
        from deltalake import write_deltalake
        from polars.selectors import by_name

        if self._table is None or not types:
            return
        rows = scan(self._table).with_columns(by_name(name).cast(dtype) for name, dtype in types.items())
        schema = rows.collect_schema()
        try:
            with streamed(self.uri, stream_batches(rows), schema) as reader:
                write_deltalake(
                    self._table,
                    reader,
                    mode="overwrite",
                    schema_mode="overwrite",
                    commit_properties=self._properties({_WIDENING: 1}),
                )
        except pl.exceptions.PolarsError as err:
            told = ", ".join(f"{name} to {dtype}" for name, dtype in types.items())
            raise SchemaMismatchError(
                f"{self.uri} can't be widened ({told}): some of its values have too many digits. Nothing was written. Round the new ones "
                "at the source, in a query with CAST(... AS NUMERIC(precision, scale))"
            ) from err

    def _opened(self, schema: Mapping[str, pl.DataType], *, partition_by: str | None = None) -> DeltaTable:
        """Give the table; of two that make it, both write into the same one."""
        if self._table is None:
            self._table = create_table(self.uri, schema, partition_by=partition_by)
            if self._table.version() > 0 or dict(scan(self._table).collect_schema()) != dict(schema):
                raise CommitConflictError(
                    f"another write made {self.uri} at this moment. Nothing was written; run the task again"
                )
        return self._table

    def _properties(
        self, marks: Mapping[str, int], metadata: Mapping[str, str] | None = None
    ) -> CommitProperties:
        from deltalake import CommitProperties, Transaction

        told = {**self._settled(), **self.marked, **marks}
        return CommitProperties(
            app_transactions=[Transaction(name, number) for name, number in told.items()],
            custom_metadata={**self._notes, **(metadata or {})} or None,
        )
