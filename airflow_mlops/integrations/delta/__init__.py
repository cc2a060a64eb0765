"""Delta Lake tables: read a version, replace a window atomically, find what was written, describe a version."""

from __future__ import annotations

from airflow_mlops.integrations.delta.changes import rows_changed
from airflow_mlops.integrations.delta.commits import (
    HASHED,
    find_commit,
    find_works,
    find_written,
    oldest_commit,
)
from airflow_mlops.integrations.delta.description import describe, describe_files, digest_window, with_times
from airflow_mlops.integrations.delta.history import marks_at, require_readable, version_as_of
from airflow_mlops.integrations.delta.reading import has_rows, read_table, require_columns, stream_table
from airflow_mlops.integrations.delta.removal import delete_rows, drop_before, vacuum
from airflow_mlops.integrations.delta.tables import newest_version, table_exists, table_id
from airflow_mlops.integrations.delta.watermark import column_mark, highest_read, reached_marks
from airflow_mlops.integrations.delta.writer import TableWriter
from airflow_mlops.integrations.delta.writing import (
    replace_window,
    replace_window_streamed,
    require_storable,
    stored_schema,
)

__all__ = [
    "HASHED",
    "TableWriter",
    "column_mark",
    "delete_rows",
    "describe",
    "describe_files",
    "digest_window",
    "drop_before",
    "find_commit",
    "find_works",
    "find_written",
    "has_rows",
    "highest_read",
    "marks_at",
    "newest_version",
    "oldest_commit",
    "reached_marks",
    "read_table",
    "replace_window",
    "replace_window_streamed",
    "require_columns",
    "require_readable",
    "require_storable",
    "rows_changed",
    "stored_schema",
    "stream_table",
    "table_exists",
    "table_id",
    "vacuum",
    "version_as_of",
    "with_times",
]
