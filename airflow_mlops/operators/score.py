"""Score a dataset version with a model version."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_mlops.operators.base import StepOperator, dataset_ref, optional, optional_text
from airflow_mlops.run_windows import RUN_WINDOW, window_spec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow.sdk import Context


class ScoreBatchOperator(StepOperator):
    """Write a version's predictions for a window to a Delta table; the window is replaced in one commit, or in one per partition.

    Rows are read, predicted and written in a stream. A retry does not do again what an earlier attempt has committed.

    :param dataset: what an ingest or validation task returned, a dataset version, or a table URI for its newest. (templated)
    :param as_of: with a table URI, read it as it was: a version number or an instant such as ``2024-03-01T00:00:00Z``. (templated)
    :param table: URI of the table of predictions. (templated)
    :param model_name: registered model. (templated)
    :param model_version: version number; default the one ``alias`` points at. (templated)
    :param alias: see ``model_version``. (templated)
    :param id_column: copied to the predictions, to join them. (templated)
    :param time_column: copied too; places a row in the window. (templated)
    :param window_start: first instant of the rows to score; default the run's data interval. (templated)
    :param window_end: first instant after them. (templated)
    :param partition: ``hour``, ``day`` or ``month``: commits each by itself, so that a retry goes on where it was; default one commit
        for the window. (templated)
    """

    step = "score"
    needs = frozenset({"mlflow", "ledger"})
    template_fields: Sequence[str] = (
        "dataset",
        "table",
        "model_name",
        "model_version",
        "alias",
        "id_column",
        "time_column",
        "window_start",
        "window_end",
        "partition",
        "as_of",
    )

    def __init__(
        self,
        *,
        dataset: Any,
        table: str,
        model_name: str,
        model_version: str | None = None,
        alias: str = "champion",
        id_column: str,
        time_column: str,
        window_start: str | None = RUN_WINDOW[0],
        window_end: str | None = RUN_WINDOW[1],
        partition: str | None = None,
        as_of: str | int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.as_of = as_of
        self.dataset = dataset
        self.table = table
        self.model_name = model_name
        self.model_version = model_version
        self.alias = alias
        self.id_column = id_column
        self.time_column = time_column
        self.window_start = window_start
        self.window_end = window_end
        self.partition = partition

    def build_spec(self, context: Context) -> dict[str, Any]:
        """Give a :class:`~airflow_mlops.steps.score.ScoreSpec`."""
        return {
            "dataset": dataset_ref(self.dataset, self.as_of),
            "table": self.table,
            "model_name": self.model_name,
            "model_version": optional_text(self.model_version),
            "alias": self.alias,
            "id_column": self.id_column,
            "time_column": self.time_column,
            "window": window_spec(self.window_start, self.window_end, context),
            "partition": optional(self.partition),
        }

    def record(self, result: dict[str, Any], context: Context) -> None:
        """Write the predictions' table version to the ledger."""
        from airflow_mlops.ledger import EntryKind

        predictions = result["predictions"]
        self.write_entry(
            context,
            kind=EntryKind.SCORING,
            key=f"{predictions['uri']}|{predictions['version']}",
            model_name=result["model_name"],
            window=window_spec(self.window_start, self.window_end, context),
            subject=result["model_version"],
            summary=f"{result['model_name']} version {result['model_version']} scored {result['row_count']} rows "
            f"into {predictions['uri']}",
            payload=result,
        )
        self.fill_outlets(context, {"dataset": predictions})
