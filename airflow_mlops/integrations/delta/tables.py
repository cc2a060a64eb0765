"""Open a Delta table, with delta-rs's errors in our words."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

from airflow_mlops.exceptions import (
    CommitConflictError,
    DatasetNotFoundError,
    SchemaMismatchError,
    StorageError,
)
from airflow_mlops.integrations.storage import locate

if TYPE_CHECKING:
    from collections.abc import Iterator

    import polars as pl
    from deltalake import DeltaTable

#: delta-rs colors its messages for terminals.
_COLORS = re.compile(r"\x1b\[[0-9;]*m")


def open_table(uri: str, version: int | None) -> DeltaTable:
    """Open a version; ``None``: the newest.

    :raises DatasetNotFoundError: no such table or version.
    :raises StorageError: the store does not answer, or refuses.
    """
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError, TableNotFoundError

    place = locate(uri)
    if version is not None and not 0 <= version < 2**63:
        raise DatasetNotFoundError(f"table {uri} has no version {version}: versions are counted from 0")
    try:
        with read_errors(uri):
            return DeltaTable(place.uri, version=version, storage_options=place.options)
    except TableNotFoundError as err:
        if version is not None and table_exists(uri):
            raise DatasetNotFoundError(
                f"table {uri} has no version {version} any more: its log was cleaned up"
            ) from err
        raise DatasetNotFoundError(
            f"no Delta table at {uri}: run the ingest step first, or check the table's URI"
        ) from err
    except DeltaError as err:
        raise DatasetNotFoundError(f"table {uri} has no version {version}: {err}") from err


def table_exists(uri: str) -> bool:
    """Tell whether a Delta table is there.

    :raises StorageError: the store does not answer, or refuses.
    """
    from deltalake import DeltaTable

    place = locate(uri)
    with read_errors(uri):
        return DeltaTable.is_deltatable(place.uri, place.options)


def newest_version(uri: str) -> int:
    """Give the number of a table's newest version.

    :raises DatasetNotFoundError: no such table.
    """
    return open_table(uri, None).version()


def table_id(uri: str) -> str:
    """Give what tells a table from one that was made anew in its place: versions are counted from 0 again there.

    :raises DatasetNotFoundError: no such table.
    """
    return str(open_table(uri, None).metadata().id)


def scan(table: DeltaTable) -> pl.LazyFrame:
    """Scan an open table; nothing is read before the frame is collected."""
    import polars as pl

    # Of a folder such as "my data" Delta says "my%20data", which polars' own reader takes for its name.
    return pl.scan_delta(table, use_pyarrow="%" in table.table_uri)


def data_files(table: DeltaTable) -> dict[str, int]:
    """Give the paths of a version's data files, and their numbers of rows (-1: unknown)."""
    import polars as pl

    actions = pl.DataFrame(table.get_add_actions(flatten=True))
    if not actions.height:
        return {}
    return dict(actions.select("path", pl.col("num_records").fill_null(-1)).rows())


@contextmanager
def read_errors(uri: str) -> Iterator[None]:
    """Name the table where a store does not answer, or refuses."""
    try:
        yield
    except OSError as err:
        raise StorageError(
            f"could not read {uri}: {_one_line(err)}. Check that the store answers, its address and the permission to read"
        ) from err


@contextmanager
def write_errors(uri: str) -> Iterator[None]:
    """Tell a lost race, which passes, from a full disk or a missing permission, which somebody has to mend.

    delta-rs reports all three as errors of its own, or as a bare OSError. It calls a commit it could not write for want
    of space or permission "failed" like one that lost; only the operating system's error number in the text tells.
    """
    from deltalake.exceptions import CommitFailedError, DeltaError

    try:
        yield
    except (OSError, DeltaError) as err:
        text = _one_line(err)
        said = text.replace(uri, "") if isinstance(err, DeltaError) else ""
        if "append-only" in said or "failed validation check" in said:
            raise SchemaMismatchError(
                f"{uri} does not take these rows: {text}. The previous version is untouched; fix the rows, "
                "or change the table's own rules (append-only, NOT NULL, constraints)"
            ) from err
        if isinstance(err, CommitFailedError) and "os error" not in text:
            raise CommitConflictError(
                f"another write to {uri} came first: {text}. Nothing was written; run the task again"
            ) from err
        raise StorageError(
            f"could not write {uri}: {text}. The previous version is untouched; "
            "check free space and write permission, then run the task again"
        ) from err


def _one_line(err: Exception) -> str:
    return _COLORS.sub("", " ".join(str(err).split())).rstrip(".")
