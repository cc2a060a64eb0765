"""What to ingest, and which arguments go together."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from airflow_mlops.core.data.cleaning import Cleaning
from airflow_mlops.core.data.partitions import Partition
from airflow_mlops.core.data.schema_policy import SchemaPolicy
from airflow_mlops.core.windows import Window
from airflow_mlops.steps.ingestion.csv import CsvFormat
from airflow_mlops.steps.ingestion.retention import Retention

IngestMode = Literal["replace", "append", "upsert", "incremental"]

_ASKS_WATERMARK = re.compile(r"(?<![:\w\\]):watermark\b")


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestSpec:
    """What to ingest.

    :param source: path, glob or URI of ``.parquet``, ``.csv``, ``.jsonl``, ``.orc`` or ``.avro`` files; ``http(s)://`` address of
        one; or URI of a Delta table.
    :param sql: a query instead of a source; ``:watermark`` in it is the table's highest ``watermark_column``, less ``overlap``.
    :param source_conn_id: connection of the query, or of the web server.
    :param source_version: version of the Delta table that is the source; default its newest.
    :param csv_separator: between the values of CSV files; default a comma.
    :param csv_encoding: of CSV files, as Python names it.
    :param column_types: what columns of CSV files are, by name; default what all of their texts read as.
    :param table: URI of the Delta table; created when missing.
    :param time_column: places a row in a window; naive times are UTC, dates their midnight. Needed with ``window``.
    :param window: only these rows; ``replace`` replaces what the table has there, ``None`` means the whole table.
    :param partition: only the rows with a column's value; ``replace`` replaces those of the table.
    :param id_column: must be unique and not null in what is ingested, when given.
    :param mode: ``replace`` the window or table; ``append`` each file once; ``upsert`` by ``keys``; ``incremental``: append
        what is above the highest ``watermark_column`` of the table.
    :param keys: columns that together name a row, for ``upsert`` and ``overlap``.
    :param watermark_column: a column that only grows from one ingest to the next, for ``incremental``.
    :param first_watermark: value of ``:watermark`` while the table has no rows.
    :param overlap: read again from so much below the highest value, and upsert by ``keys``: for late rows. Seconds for times,
        days for dates that are not ``time_column``, else in the column's unit.
    :param work_key: names what is appended: once per key, whatever its files are; default each file is appended once.
    :param schema_policy: what becomes of new columns and other types.
    :param new_categories: how many values a column may have that the table does not, by column.
    :param cleaning: what becomes of the rows before anything is written.
    :param retention: what becomes of the table's old rows and versions afterwards.
    """

    source: str | None = None
    table: str
    sql: str | None = None
    source_conn_id: str | None = None
    source_version: int | None = None
    csv_separator: str | None = None
    csv_encoding: str = "utf-8"
    column_types: dict[str, str] = field(default_factory=dict)
    time_column: str | None = None
    window: Window | None = None
    partition: Partition | None = None
    id_column: str | None = None
    mode: IngestMode = "replace"
    keys: tuple[str, ...] = ()
    watermark_column: str | None = None
    first_watermark: float | str | None = None
    overlap: float = 0.0
    work_key: str | None = None
    schema_policy: SchemaPolicy = "strict"
    new_categories: dict[str, int] = field(default_factory=dict)
    cleaning: Cleaning = field(default_factory=Cleaning)
    retention: Retention = field(default_factory=Retention)

    @property
    def written(self) -> CsvFormat:
        """How CSV files are written."""
        return CsvFormat(self.csv_separator, self.csv_encoding, self.column_types)


def replaces_all(spec: IngestSpec) -> bool:
    """Tell whether the table holds just the rows that are ingested."""
    return spec.mode == "replace" and spec.window is None and spec.partition is None


def upserts(spec: IngestSpec) -> bool:
    """Tell whether rows take the place of those with the same keys."""
    return spec.mode == "upsert" or spec.overlap > 0


def filled_columns(spec: IngestSpec) -> dict[str, str]:
    """Give the columns that may hold no null, and what each is."""
    columns = dict.fromkeys(spec.keys, "key")
    if spec.watermark_column is not None:
        columns[spec.watermark_column] = "watermark"
    if spec.id_column is not None:
        columns[spec.id_column] = "id"
    if spec.time_column is not None:
        columns[spec.time_column] = "time"
    if spec.partition is not None:
        columns[spec.partition.column] = "partition"
    return columns


def unique_columns(spec: IngestSpec) -> list[str]:
    """Give the columns that together name a row once."""
    return list(spec.keys) or ([spec.id_column] if spec.id_column is not None else [])


def unique_beside_keys(spec: IngestSpec) -> list[str]:
    """Give the id column where keys name the rows: it is to be unique as well."""
    if not spec.keys or spec.id_column is None or spec.keys == (spec.id_column,):
        return []
    return [spec.id_column]


def require_arguments(spec: IngestSpec) -> None:
    """Refuse arguments that do not go together, or would skip rows unnoticed.

    :raises ValueError: naming them, and what to give instead.
    """
    _require_source(spec)
    _require_csv(spec)
    if spec.window is not None and spec.time_column is None:
        raise ValueError(
            f"a window of {spec.table} needs time_column, which places a row in it; "
            "give no window to replace the whole table"
        )
    if spec.partition is not None and (spec.mode != "replace" or spec.window is not None):
        raise ValueError(
            f"partition {spec.partition} of {spec.table} is replaced as a whole: it takes mode 'replace' and no window"
        )
    if spec.window is not None and spec.mode == "incremental":
        raise ValueError(
            f"mode 'incremental' into {spec.table} takes no window: it reads what is above the watermark, so that of an earlier window "
            "nothing would be. Give no window, or take mode 'replace', which writes a window again"
        )
    if spec.window is not None and spec.mode == "append" and spec.work_key is None:
        raise ValueError(
            f"mode 'append' into {spec.table} takes no window: each file is added once, so that the rest of it would never be. Take "
            "mode 'replace', which writes a window again, or name the work with work_key"
        )
    if spec.mode == "upsert" and not spec.keys:
        raise ValueError(f"mode 'upsert' into {spec.table} needs keys: the columns that together name a row")
    if spec.mode == "incremental" and spec.watermark_column is None:
        raise ValueError(
            f"mode 'incremental' into {spec.table} needs watermark_column: a column that only grows from one ingest to the next"
        )
    if spec.overlap and not (spec.mode == "incremental" and spec.keys):
        raise ValueError(
            "overlap needs mode 'incremental' and keys: rows that are read again are told by them"
        )
    if spec.work_key is not None and spec.mode != "append":
        raise ValueError(f"work_key belongs to mode 'append'; mode {spec.mode!r} needs none")
    _require_values(spec)
    parted = () if spec.partition is None else (spec.partition.column,)
    spec.retention.require_arguments(time_column=spec.time_column, window=spec.window)
    spec.cleaning.require_kept(
        [*filled_columns(spec), *spec.new_categories, *parted],
        as_they_are=(spec.time_column, spec.watermark_column, *parted),
    )


def _require_source(spec: IngestSpec) -> None:
    if (spec.source is None) == (spec.sql is None):
        raise ValueError(f"an ingest into {spec.table} needs either source or sql")
    if spec.sql is not None and spec.source_conn_id is None:
        raise ValueError(f"sql of {spec.table} needs source_conn_id: the connection of the database")
    if spec.mode != "incremental" and _ASKS_WATERMARK.search(spec.sql or ""):
        raise ValueError(
            f"sql of {spec.table} names :watermark, which has a value in mode 'incremental' only, not in {spec.mode!r}"
        )
    web = str(spec.source).startswith(("http://", "https://"))
    if spec.source_conn_id is not None and spec.sql is None and not web:
        raise ValueError(
            f"source_conn_id belongs to sql and to http(s) addresses; a store's connection is in its address: "
            f"s3://{spec.source_conn_id}@bucket/key"
        )


def _require_csv(spec: IngestSpec) -> None:
    if spec.written == CsvFormat(types={}):
        return
    if not urlsplit(str(spec.source)).path.endswith(".csv"):
        raise ValueError(
            f"csv_separator, csv_encoding and column_types belong to .csv files: the source of {spec.table} has types of its own"
        )
    spec.written.require()
    both = [name for name in spec.cleaning.hash_columns if name in spec.column_types]
    if both:
        raise ValueError(f"column {both[0]!r} is hashed as the text it is: take it out of column_types")


def _require_values(spec: IngestSpec) -> None:
    if not 0 <= spec.overlap < math.inf:
        raise ValueError(
            f"overlap {spec.overlap:g} is no distance below the watermark: give 0 or a positive number"
        )
    if spec.work_key in ("", "None"):
        raise ValueError(
            f"work_key {spec.work_key!r} names nothing, so only the first run would append: was it rendered from nothing?"
        )
    if len(set(spec.keys)) < len(spec.keys):
        raise ValueError(f"keys {', '.join(spec.keys)} name a column twice")
