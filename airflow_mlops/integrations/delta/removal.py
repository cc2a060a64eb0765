"""Delete rows, and files that no kept version needs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING
from urllib.parse import unquote

from airflow_mlops.exceptions import DatasetNotFoundError, InsufficientDataError
from airflow_mlops.integrations.delta.conditions import bound, comparable, quoted
from airflow_mlops.integrations.delta.history import require_readable
from airflow_mlops.integrations.delta.reading import read_table
from airflow_mlops.integrations.delta.tables import data_files, open_table, scan, write_errors

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from datetime import datetime

_RETENTION = "delta.deletedFileRetentionDuration"


def delete_rows(uri: str, *, column: str, values: Sequence[str]) -> None:
    """Delete the rows that have one of these values, in one commit; none where there are no such rows.

    :raises CommitConflictError: another write came first.
    """
    import polars as pl

    rows = read_table(uri, columns=[column]).filter(pl.col(column).is_in(list(values)))
    if not values or not rows.head(1).collect().height:
        return
    listed = ", ".join("'" + value.replace("'", "''") + "'" for value in values)
    with write_errors(uri):
        open_table(uri, None).delete(f"{quoted(column)} IN ({listed})")


def drop_before(
    uri: str, first: datetime, *, time_column: str, marks: Mapping[str, int] | None = None
) -> int:
    """Delete the rows with an earlier time than ``first``, in one commit; none where there are no such rows.

    :param marks: of the commit.
    :returns: number of rows that were deleted.
    :raises InsufficientDataError: no row would be left.
    :raises CommitConflictError: another write came first.
    """
    import polars as pl
    from deltalake import CommitProperties, Transaction

    table = open_table(uri, None)
    schema = scan(table).collect_schema()
    old = pl.col(time_column) < comparable(first, schema[time_column])
    dropped, kept = (
        scan(table).select(old.sum(), (~old).sum().alias("kept")).collect(engine="streaming").row(0)
    )
    if not dropped:
        return 0
    if not kept:
        raise InsufficientDataError(
            f"all {dropped} rows of {uri} are older than {first.isoformat()}: is drop_before meant so? Nothing was dropped"
        )
    properties = CommitProperties(
        app_transactions=[Transaction(name, number) for name, number in (marks or {}).items()]
    )
    with write_errors(uri):
        table.delete(
            f"{quoted(time_column)} < '{bound(time_column, first, schema)}'", commit_properties=properties
        )
    return int(dropped)


def vacuum(uri: str, *, days: float, used: Collection[int] = (), keep: bool = True) -> tuple[int, list[int]]:
    """Delete files that have been in no version for so many days; versions that need them can't be read any more.

    :param used: versions that somebody needs; those that can't be read any more are left out.
    :param keep: leave their files.
    :returns: number of files that were deleted, and which of the versions in use need files that were due.
    :raises ValueError: the table itself keeps them for longer, by its property ``delta.deletedFileRetentionDuration``.
    """
    from deltalake.exceptions import DeltaError

    hours = math.ceil(24 * days)
    files = {version: names for version in sorted(set(used)) if (names := _file_names(uri, version))}
    table = open_table(uri, None)
    own = table.metadata().configuration.get(_RETENTION)
    with write_errors(uri):
        try:
            # It refuses before it looks at any file.
            due = {_name(path) for path in table.vacuum(hours)} if files or own else set()
        except DeltaError as err:
            if own and "minimum retention" in str(err):
                raise ValueError(
                    f"{uri} keeps the files of old versions for longer than vacuum_days={days:g}, by its property "
                    f"{_RETENTION}={own!r}: give as many days, or change the property. Its rows are written, no file was deleted"
                ) from err
            raise
        kept = list(files) if keep and files else None
        deleted = table.vacuum(hours, dry_run=False, keep_versions=kept)
    return len(deleted), [version for version, names in files.items() if names & due]


def _file_names(uri: str, version: int) -> set[str]:
    """Give the names of a version's files; none where it can't be read any more."""
    try:
        require_readable(uri, version)
        return {_name(path) for path in data_files(open_table(uri, version))}
    except DatasetNotFoundError:
        return set()


def _name(path: str) -> str:
    """Give a file's name, which no other has; delta-rs gives paths in several forms."""
    return unquote(path).rpartition("/")[2]
