"""Ingest files into a Delta table."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from airflow_mlops.hooks.databases import database_of
from airflow_mlops.hooks.hashing import HashingHook
from airflow_mlops.hooks.ledger import LedgerHook
from airflow_mlops.hooks.web import web_of
from airflow_mlops.operators.base import StepOperator, names, optional, optional_number
from airflow_mlops.operators.dataset import RecordingDatasets
from airflow_mlops.run_windows import RUN_WINDOW, as_spec, run_partition_window, window_spec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from airflow.sdk import Context

    from airflow_mlops.core.data.partitions import PartitionUnit
    from airflow_mlops.core.data.schema_policy import SchemaPolicy
    from airflow_mlops.services import Services
    from airflow_mlops.steps.ingestion.spec import IngestMode


class IngestDatasetOperator(RecordingDatasets, StepOperator):
    """Bring what the source has into a Delta table, once, in one commit, a batch of rows at a time.

    Whatever happens to the task, the table has the rows once or is as it was: a retry or a backfill replaces the same window,
    an append knows what was appended, an increment starts at the table's own highest value, an upsert finds its rows by key.

    :param source: path, glob or URI of ``.parquet``, ``.csv``, ``.jsonl``, ``.orc`` or ``.avro`` files, such as
        ``s3://conn_id@bucket/*.csv``; ``http(s)://`` address of one file; or URI of a Delta table. Or give ``sql``. (templated)
    :param table: URI of the Delta table; created when missing. (templated)
    :param sql: a query, with ``source_conn_id``; in mode ``incremental``, ``:watermark`` in it is the highest
        ``watermark_column``, less ``overlap``. (templated)
    :param source_conn_id: connection of the database, any whose hook is a ``DbApiHook`` with an SQLAlchemy dialect; or an http
        connection with the login or headers of a download. (templated)
    :param source_version: version of the Delta table that is the source; default its newest. (templated)
    :param csv_separator: one character between the values of CSV files, such as ``;``; default a comma, and then a header of one
        column with another separator in its name is refused. (templated)
    :param csv_encoding: of CSV files, as Python names it, such as ``latin-1``; another than ``utf-8`` is written anew on the local
        disk first. (templated)
    :param column_types: what columns of CSV files are, by name, such as ``{"zip": "String"}``: ``String``, ``Boolean``, ``Int8`` to
        ``Int64``, ``Float32``, ``Float64``, ``Date``, ``Decimal(10,2)``; default what all of their texts read as. (templated)
    :param time_column: column that places a row in a window, needed when one is given; naive times are UTC, a date is its midnight
        (and stays a date where the table has dates; all of such a table is not replaced). (templated)
    :param id_column: column that must be unique and not null in what is ingested; 8 bytes of memory per row. (templated)
    :param window_start: first instant of the window; default in mode ``replace`` with a ``time_column`` the run's data interval,
        or in a partitioned run what its key names, else all rows. (templated)
    :param window_end: first instant after it. (templated)
    :param mode: ``replace`` the window or partition, or without one the table; ``append`` each file once, one that changed since is
        refused; ``upsert``: a row takes the place of the one with its ``keys``; ``incremental``: append what is above the
        table's highest ``watermark_column``.
    :param keys: columns that together name a row, none of them null; for ``upsert`` and ``overlap``. (templated)
    :param watermark_column: column that only grows from one ingest to the next; for ``incremental``. (templated)
    :param first_watermark: value of ``:watermark`` while the table has no rows; default ``NULL``. (templated)
    :param overlap: read again from so much below the highest value and upsert by ``keys``, for rows that come late. Seconds
        for times, days for dates beside ``time_column``, else in the column's unit. (templated)
    :param work_key: name of what is appended, such as ``{{ run_id }}``: appended once per name, whatever its files are;
        default each file once. (templated)
    :param schema_policy: ``strict`` takes the table's columns and types only; ``add_columns`` takes new columns too; ``widen``
        also types that hold more (whole numbers, floats, digits of decimals), for which the table is written again once. A column that is missing
        is refused always.
    :param new_categories: how many values a column may have that the table does not, by column. (templated)
    :param keep_where: condition in polars' SQL, such as ``fare > 0``; rows for which it is not true are left out and counted. (templated)
    :param deduplicate_by: columns that together name a row: of rows with the same values one is kept, the others are counted;
        default rows that repeat a key are an error. (templated)
    :param deduplicate_order: columns that say which one is kept of rows that differ; without any, those are an error. (templated)
    :param deduplicate_keep: the ``last`` row by these columns, or the ``first``.
    :param drop_columns: columns that are not written. (templated)
    :param hash_columns: columns of which an HMAC-SHA256 of each value is written instead, 64 hexadecimal digits. (templated)
    :param hash_conn_id: connection with the key for ``hash_columns``.
    :param partition_column: column whose value the partition key is, in mode ``replace``: that value's rows are replaced and
        rows with another value left out. A table made by this has a folder for each value.
    :param partition_unit: which hour, day, week, month, quarter or year a key that is a time names; default from the tick of a
        ``CronPartitionTimetable`` to its next one, else as the key is written.
    :param partition_key: default the run's own; another one goes into the outlets' events. (templated)
    :param drop_before: rows of the table with an earlier time are dropped after the ingest, such as
        ``{{ data_interval_end.subtract(days=365) }}``; default none. (templated)
    :param vacuum_days: files that have been in no version for so many days are deleted, after which older versions can't be
        read; at least 7, default never. (templated)
    :param keep_trained_versions: leave the files of the table's versions that models learned from which are in use, as the ledger
        knows them: champion, previous, and those registered since. ``False`` deletes them too, and warns by name.
    """

    step = "ingest"
    template_ext: Sequence[str] = (".sql",)
    template_fields_renderers: ClassVar[dict[str, str]] = {"sql": "sql"}
    template_fields: Sequence[str] = (
        "source",
        "sql",
        "source_conn_id",
        "source_version",
        "csv_separator",
        "csv_encoding",
        "column_types",
        "table",
        "time_column",
        "id_column",
        "window_start",
        "window_end",
        "keys",
        "watermark_column",
        "first_watermark",
        "overlap",
        "work_key",
        "new_categories",
        "keep_where",
        "deduplicate_by",
        "deduplicate_order",
        "drop_columns",
        "hash_columns",
        "partition_key",
        "drop_before",
        "vacuum_days",
    )

    def __init__(
        self,
        *,
        source: str | None = None,
        table: str,
        sql: str | None = None,
        source_conn_id: str | None = None,
        source_version: int | str | None = None,
        csv_separator: str | None = None,
        csv_encoding: str = "utf-8",
        column_types: Mapping[str, str] | None = None,
        time_column: str | None = None,
        id_column: str | None = None,
        window_start: str | None = RUN_WINDOW[0],
        window_end: str | None = RUN_WINDOW[1],
        mode: IngestMode = "replace",
        keys: str | Sequence[str] = (),
        watermark_column: str | None = None,
        first_watermark: float | str | None = None,
        overlap: float | str = 0.0,
        work_key: str | None = None,
        schema_policy: SchemaPolicy = "strict",
        new_categories: Mapping[str, int] | None = None,
        keep_where: str | None = None,
        deduplicate_by: str | Sequence[str] = (),
        deduplicate_order: str | Sequence[str] = (),
        deduplicate_keep: Literal["last", "first"] = "last",
        drop_columns: str | Sequence[str] = (),
        hash_columns: str | Sequence[str] = (),
        hash_conn_id: str = HashingHook.default_conn_name,
        partition_column: str | None = None,
        partition_unit: PartitionUnit | None = None,
        partition_key: str | None = None,
        drop_before: str | None = None,
        vacuum_days: float | str | None = None,
        keep_trained_versions: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.source = source
        self.table = table
        self.sql = sql
        self.source_conn_id = source_conn_id
        self.source_version = source_version
        self.csv_separator = csv_separator
        self.csv_encoding = csv_encoding
        self.column_types = column_types
        self.time_column = time_column
        self.id_column = id_column
        self.window_start = window_start
        self.window_end = window_end
        self.mode = mode
        self.keys = keys
        self.watermark_column = watermark_column
        self.first_watermark = first_watermark
        self.overlap = overlap
        self.work_key = work_key
        self.schema_policy = schema_policy
        self.new_categories = new_categories
        self.keep_where = keep_where
        self.deduplicate_by = deduplicate_by
        self.deduplicate_order = deduplicate_order
        self.deduplicate_keep = deduplicate_keep
        self.drop_columns = drop_columns
        self.hash_columns = hash_columns
        self.hash_conn_id = hash_conn_id
        self.partition_column = partition_column
        self.partition_unit = partition_unit
        self.partition_key = partition_key
        self.drop_before = drop_before
        self.vacuum_days = vacuum_days
        self.keep_trained_versions = keep_trained_versions
        self.window_given = (window_start, window_end) != RUN_WINDOW

    def build_spec(self, context: Context) -> dict[str, Any]:
        """Give an :class:`~airflow_mlops.steps.ingestion.spec.IngestSpec`."""
        version = optional(self.source_version)
        return {
            "source": self.source,
            "table": self.table,
            "sql": self.sql,
            "source_conn_id": self.source_conn_id,
            "source_version": int(version) if version is not None else None,
            "csv_separator": optional(self.csv_separator),
            "csv_encoding": self.csv_encoding or "utf-8",
            "column_types": dict(self.column_types or {}),
            "time_column": self.time_column,
            "id_column": self.id_column,
            "window": self._window(context),
            "partition": self._partition(context),
            "mode": self.mode,
            "keys": names(self.keys),
            "watermark_column": self.watermark_column,
            "first_watermark": self.first_watermark,
            "overlap": self.overlap,
            "work_key": self.work_key,
            "schema_policy": self.schema_policy,
            "new_categories": dict(self.new_categories or {}),
            "cleaning": {
                "keep_where": optional(self.keep_where),
                "deduplicate_by": names(self.deduplicate_by),
                "deduplicate_order": names(self.deduplicate_order),
                "deduplicate_keep": self.deduplicate_keep,
                "drop_columns": names(self.drop_columns),
                "hash_columns": names(self.hash_columns),
            },
            "retention": self._retention(),
        }

    def _retention(self) -> dict[str, Any]:
        days = optional_number(self.vacuum_days)
        return {
            "drop_before": optional(self.drop_before),
            "vacuum_days": days,
            "in_use": self._versions_in_use() if days is not None else [],
            "keep_in_use": self.keep_trained_versions,
        }

    def _versions_in_use(self) -> list[dict[str, Any]]:
        """Find the versions of this table, whatever address they were trained by."""
        from airflow_mlops.core.codec import to_dict
        from airflow_mlops.integrations.storage import same_place
        from airflow_mlops.ledger.lineage import versions_in_use

        with LedgerHook(ledger_conn_id=self.ledger_conn_id).get_conn() as ledger:
            found = versions_in_use(ledger)
        return [
            to_dict(replace(item, dataset_uri=self.table))
            for item in found
            if same_place(item.dataset_uri, self.table)
        ]

    def services(self) -> Services:
        """Resolve the connection of the source as well, and that of the key where values are hashed."""
        services = super().services()
        if names(self.hash_columns):
            hash_key = HashingHook(hash_conn_id=self.hash_conn_id).services().hash_key
            services = replace(services, hash_key=hash_key)
        if self.source_conn_id is None:
            return services
        if self.sql is not None:
            facts = database_of(self.source_conn_id)
        elif str(self.source).startswith(("http://", "https://")):
            facts = web_of(self.source_conn_id, str(self.source))
        else:
            return services  # the step says that no connection belongs to such a source
        return replace(services, connections=services.connections | {self.source_conn_id: facts})

    def _key(self, context: Context) -> str | None:
        return self.partition_key or context.get("partition_key")

    def _window(self, context: Context) -> dict[str, str] | None:
        if self.window_given:
            return window_spec(self.window_start, self.window_end, context)
        if self.partition_column is not None or self.mode != "replace":
            return None
        key = self._key(context)
        if key is None:
            return window_spec(self.window_start, self.window_end, context) if self.time_column else None
        if self.time_column is None:
            raise ValueError(
                f"partition key {key!r}: which rows of {self.table} does it stand for? Give time_column if it is a time, "
                "partition_column if it is the value of one; or window_start=None and window_end=None to replace the whole table"
            )
        return as_spec(run_partition_window(context, key=self.partition_key, unit=self.partition_unit))

    def _partition(self, context: Context) -> dict[str, str] | None:
        if self.partition_column is None:
            return None
        key = self._key(context)
        if key is None:
            raise ValueError(
                f"partition_column {self.partition_column!r} needs a partition key: start the Dag with one, or give partition_key"
            )
        return {"column": self.partition_column, "key": key}

    def record(self, result: dict[str, Any], context: Context) -> None:
        """Write the dataset version to the ledger and into the outlets' events."""
        dataset, partition = result["dataset"], result["partition"]
        place = f" of {partition['column']}={partition['key']}" if partition else ""
        self.write_version(
            result,
            context,
            summary=f"{result['row_count']} rows{place} into {dataset['uri']}, now version {dataset['version']} "
            f"with {dataset['row_count']} rows{_tell(result['cleaning'], result['retention'])}",
            payload=result,
        )
        cleaned = {"cleaning": result["cleaning"]} if result["cleaning"] else {}
        self.fill_outlets(context, {"dataset": dataset, **cleaned})
        for told in _versions(result["retention"], "lost"):
            self.log.warning("the vacuum took files of %s: it can't be read any more", told)
        self._name_partition(context)
        if result["watermark"] is not None:
            self._show_watermark(result["watermark"], context)

    def _name_partition(self, context: Context) -> None:
        """Put a partition key that is not the run's, which Airflow adds itself, into the outlets' events."""
        from airflow.sdk import Asset

        if self.partition_key is None or self.partition_key == context.get("partition_key"):
            return
        for outlet in self.outlets:
            if isinstance(outlet, Asset):
                context["outlet_events"][outlet].add_partitions(self.partition_key)

    def _show_watermark(self, watermark: str, context: Context) -> None:
        """Put the watermark where Airflow's page of the asset shows it; the next run takes it from the table."""
        from airflow.sdk import Asset

        for outlet in self.outlets:
            if isinstance(outlet, Asset):
                context["asset_state_store"][outlet].set("watermark", watermark)


def _tell(cleaning: Mapping[str, Any] | None, retention: Mapping[str, Any] | None) -> str:
    """Say in words what was not written, and what was taken away."""
    left = cleaning or {}
    gone = retention or {}
    counts = {
        "rows left out by keep_where": left.get("left_out"),
        "rows that repeat another": left.get("equal_rows"),
        "rows that differ from the one kept of their key": left.get("differing_rows"),
        "old rows dropped": gone.get("dropped_rows"),
        "files of old versions deleted": gone.get("vacuumed_files"),
    }
    told = [f"{count} {what}" for what, count in counts.items() if count]
    for what in ("kept", "lost"):
        told += [f"{what} {version}" for version in _versions(gone, what)]
    return "".join(f"; {item}" for item in told)


def _versions(retention: Mapping[str, Any] | None, what: str) -> list[str]:
    from airflow_mlops.core.codec import from_dict
    from airflow_mlops.core.data.dataset import VersionInUse

    return [str(from_dict(VersionInUse, item)) for item in (retention or {}).get(what, [])]
