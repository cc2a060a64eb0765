"""Ingest files into a Delta table."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from airflow_mlops.hooks.databases import database_of
from airflow_mlops.hooks.web import web_of
from airflow_mlops.operators.base import StepOperator, names, window_spec
from airflow_mlops.operators.windows import RUN_WINDOW

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from airflow.sdk import Context

    from airflow_mlops.core.schema_policy import SchemaPolicy
    from airflow_mlops.services import Services
    from airflow_mlops.steps.ingest import IngestMode


class IngestDatasetOperator(StepOperator):
    """Bring what the source has into a Delta table, once, in one commit, a batch of rows at a time.

    Whatever happens to the task, the table has the rows once or is as it was: a retry or a backfill replaces the same window,
    an append knows what was appended, an increment starts at the table's own highest value, an upsert finds its rows by key.

    :param source: path, glob or URI of ``.parquet``, ``.csv``, ``.jsonl``, ``.orc`` or ``.avro`` files, such as
        ``s3://conn_id@bucket/*.csv``; ``http(s)://`` address of one file; or URI of a Delta table. Or give ``sql``. (templated)
    :param table: URI of the Delta table; created when missing. (templated)
    :param sql: a query, with ``source_conn_id``; in mode ``incremental``, ``:watermark`` in it is the table's highest
        ``watermark_column``, less ``overlap``. (templated)
    :param source_conn_id: connection of the database, any whose hook is a ``DbApiHook`` with an SQLAlchemy dialect; or an http
        connection with the login or headers of a download. (templated)
    :param source_version: version of the Delta table that is the source; default its newest. (templated)
    :param time_column: column that places a row in a window, needed when one is given; naive times are UTC. (templated)
    :param id_column: column that must be unique and not null in what is ingested; 8 bytes of memory per row. (templated)
    :param window_start: first instant of the window; default the run's data interval in mode ``replace`` with a ``time_column``,
        else all rows. (templated)
    :param window_end: first instant after it. (templated)
    :param mode: ``replace`` the window, or without one the table; ``append`` each file once, one that changed since is
        refused; ``upsert``: a row takes the place of the one with its ``keys``; ``incremental``: append what is above the
        table's highest ``watermark_column``.
    :param keys: columns that together name a row, none of them null; for ``upsert`` and ``overlap``. (templated)
    :param watermark_column: column that only grows from one ingest to the next; for ``incremental``. (templated)
    :param first_watermark: value of ``:watermark`` while the table has no rows; default ``NULL``. (templated)
    :param overlap: read again from so much below the highest value and upsert by ``keys``, for rows that come late. Seconds
        for times, else in the column's unit. (templated)
    :param work_key: name of what is appended, such as ``{{ run_id }}``: appended once per name, whatever its files are;
        default each file once. (templated)
    :param schema_policy: ``strict`` takes the table's columns and types only; ``add_columns`` takes new columns too; ``widen``
        also types that hold more (whole numbers, floats), for which the table is written again once. A column that is missing
        is refused always.
    :param new_categories: how many values a column may have that the table does not, by column. (templated)
    """

    step = "ingest"
    template_ext: Sequence[str] = (".sql",)
    template_fields_renderers: ClassVar[dict[str, str]] = {"sql": "sql"}
    template_fields: Sequence[str] = (
        "source",
        "sql",
        "source_conn_id",
        "source_version",
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
    )

    def __init__(
        self,
        *,
        source: str | None = None,
        table: str,
        sql: str | None = None,
        source_conn_id: str | None = None,
        source_version: int | str | None = None,
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
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.source = source
        self.table = table
        self.sql = sql
        self.source_conn_id = source_conn_id
        self.source_version = source_version
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
        self.window_given = (window_start, window_end) != RUN_WINDOW

    def build_spec(self, context: Context) -> dict[str, Any]:
        """Give an :class:`~airflow_mlops.steps.ingest.IngestSpec`."""
        return {
            "source": self.source,
            "table": self.table,
            "sql": self.sql,
            "source_conn_id": self.source_conn_id,
            "source_version": None if self.source_version in (None, "") else int(self.source_version),
            "time_column": self.time_column,
            "id_column": self.id_column,
            "window": window_spec(self.window_start, self.window_end)
            if self.window_given or (self.time_column and self.mode == "replace")
            else None,
            "mode": self.mode,
            "keys": names(self.keys),
            "watermark_column": self.watermark_column,
            "first_watermark": self.first_watermark,
            "overlap": self.overlap,
            "work_key": self.work_key,
            "schema_policy": self.schema_policy,
            "new_categories": dict(self.new_categories or {}),
        }

    def services(self) -> Services:
        """Resolve the connection of the source as well."""
        services = super().services()
        if self.source_conn_id is None:
            return services
        if self.sql is not None:
            facts = database_of(self.source_conn_id)
        elif str(self.source).startswith(("http://", "https://")):
            facts = web_of(self.source_conn_id, str(self.source))
        else:
            return services  # the step says that no connection belongs to such a source
        return replace(services, connections=services.connections | {self.source_conn_id: facts})

    def record(self, result: dict[str, Any], context: Context) -> None:
        """Write the dataset version to the ledger and into the outlets' events."""
        from airflow_mlops.ledger import EntryKind

        dataset = result["dataset"]
        self.write_entry(
            context,
            kind=EntryKind.DATASET,
            key=f"{dataset['uri']}|{dataset['version']}",
            model_name=None,
            window=result["window"],
            subject=dataset["uri"],
            summary=f"{result['row_count']} rows into {dataset['uri']}, now version {dataset['version']} "
            f"with {dataset['row_count']} rows",
            payload=result,
        )
        self.fill_outlets(context, {"dataset": dataset})
        if result["watermark"] is not None:
            self._show_watermark(result["watermark"], context)

    def _show_watermark(self, watermark: str, context: Context) -> None:
        """Put the watermark where Airflow's page of the asset shows it; the next run takes it from the table."""
        from airflow.sdk import Asset

        for outlet in self.outlets:
            if isinstance(outlet, Asset):
                context["asset_state_store"][outlet].set("watermark", watermark)
