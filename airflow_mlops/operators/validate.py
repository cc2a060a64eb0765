"""Validate a dataset version with a Great Expectations suite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from airflow_mlops.exceptions import DataQualityError
from airflow_mlops.operators.base import StepOperator, actor, part_of, window_spec
from airflow_mlops.operators.windows import RUN_WINDOW

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from airflow.sdk import Context


class ValidateDatasetOperator(StepOperator):
    """Judge a window of a dataset version by a suite; a gate unless told to warn.

    :param dataset: what an ingest or validation task returned, a dataset version, or a table URI for its newest. (templated)
    :param suite: path of the suite's JSON file, or the suite itself. (templated)
    :param action: ``gate`` fails the task when an expectation does, ``warn`` only writes it down.
    :param time_column: column that places a row in the window; needed when one is given. (templated)
    :param window_start: first instant of the window; default the run's data interval, or all rows without ``time_column``. (templated)
    :param window_end: first instant after it. (templated)
    :param engine: ``auto`` judges the common expectations in polars, ``great_expectations`` leaves all to it.
    """

    step = "validate"
    template_fields: Sequence[str] = (
        "dataset",
        "suite",
        "time_column",
        "window_start",
        "window_end",
    )

    def __init__(
        self,
        *,
        dataset: Any,
        suite: str | Mapping[str, Any],
        action: Literal["gate", "warn"] = "gate",
        time_column: str | None = None,
        window_start: str | None = RUN_WINDOW[0],
        window_end: str | None = RUN_WINDOW[1],
        engine: Literal["auto", "great_expectations"] = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.dataset = dataset
        self.suite = suite
        self.action = action
        self.time_column = time_column
        self.window_start = window_start
        self.window_end = window_end
        self.window_given = (window_start, window_end) != RUN_WINDOW
        self.engine = engine

    def build_spec(self, context: Context) -> dict[str, Any]:
        """Give a :class:`~airflow_mlops.steps.validate.ValidateSpec`."""
        return {
            "dataset": part_of(self.dataset, "dataset"),
            "suite": self.suite,
            "time_column": self.time_column,
            "window": window_spec(self.window_start, self.window_end)
            if self.time_column or self.window_given
            else None,
            "engine": self.engine,
        }

    def record(self, result: dict[str, Any], context: Context) -> None:
        """Write the verdict to the ledger."""
        from airflow_mlops.ledger import EntryKind

        dataset = result["dataset"]
        verdict = "accepted" if result["success"] else "not accepted"
        self.write_entry(
            context,
            kind=EntryKind.VALIDATION,
            key=f"{dataset['uri']}|{dataset['version']}|{actor(context)}|{context['ti'].try_number}",
            model_name=None,
            window=result["window"],
            subject=dataset["uri"],
            summary=f"{dataset['uri']} version {dataset['version']} {verdict}: {result['headline']}",
            payload=result,
        )

    def decide(self, result: dict[str, Any], context: Context) -> dict[str, Any]:
        """Let the dataset through, or stop.

        :raises DataQualityError: an expectation failed and ``action`` is ``gate``.
        """
        if not result["success"] and self.action == "gate":
            raise DataQualityError(
                f"{result['headline']}. Fix the source and ingest again, or change the suite if the data is right",
                evidence={"failures": result["failures"], "dataset": result["dataset"]},
            )
        return result
