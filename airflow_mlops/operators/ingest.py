"""Ingest files into a Delta table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_mlops.operators.base import StepOperator, window_spec
from airflow_mlops.operators.windows import RUN_WINDOW

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow.sdk import Context


class IngestDatasetOperator(StepOperator):
    """Make one window of a Delta table hold what the source has for it.

    The window is replaced in one commit: a retry or a backfill of the same window changes nothing.

    :param source: path, glob or URI of ``.parquet``, ``.csv`` or ``.jsonl`` files. (templated)
    :param table: URI of the Delta table; created when missing. (templated)
    :param time_column: column that places a row in a window, needed when one is given; naive times are UTC. (templated)
    :param id_column: column that must be unique and not null in the window. (templated)
    :param window_start: first instant of the window; default the run's data interval, or all rows without ``time_column``. (templated)
    :param window_end: first instant after it. (templated)
    """

    step = "ingest"
    template_fields: Sequence[str] = (
        "source",
        "table",
        "time_column",
        "id_column",
        "window_start",
        "window_end",
    )

    def __init__(
        self,
        *,
        source: str,
        table: str,
        time_column: str | None = None,
        id_column: str | None = None,
        window_start: str | None = RUN_WINDOW[0],
        window_end: str | None = RUN_WINDOW[1],
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.source = source
        self.table = table
        self.time_column = time_column
        self.id_column = id_column
        self.window_start = window_start
        self.window_end = window_end
        self.window_given = (window_start, window_end) != RUN_WINDOW

    def build_spec(self, context: Context) -> dict[str, Any]:
        """Give an :class:`~airflow_mlops.steps.ingest.IngestSpec`."""
        return {
            "source": self.source,
            "table": self.table,
            "time_column": self.time_column,
            "id_column": self.id_column,
            "window": window_spec(self.window_start, self.window_end)
            if self.time_column or self.window_given
            else None,
        }

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
