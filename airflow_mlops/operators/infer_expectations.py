"""Infer a suite of expectations from a reference, to be reviewed and committed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_mlops.operators.base import StepOperator, dataset_ref, names
from airflow_mlops.run_windows import RUN_WINDOW, window_spec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow.sdk import Context


class InferExpectationsOperator(StepOperator):
    """Write a suite that says what reference rows look like, for a person to review.

    A suite that is there is never replaced unless asked; the same one again is no error, so a retry is none.

    :param dataset: what an ingest or validation task returned, a dataset version, or a table URI for its newest: the reference. (templated)
    :param as_of: with a table URI, read it as it was: a version number or an instant such as ``2024-03-01T00:00:00Z``. (templated)
    :param suite: path of the JSON file to write; its folder must be there. (templated)
    :param time_column: column that places a row in the window; needed when one is given. (templated)
    :param window_start: first instant of the window; default the run's data interval, or all rows without ``time_column``. (templated)
    :param window_end: first instant after it. (templated)
    :param exclude: columns to say nothing about, as a list or comma-separated. (templated)
    :param private_columns: columns whose values may not be in the suite, which says that they are there and how many are missing; a list,
        or names separated by commas. (templated)
    :param policy: fields of :class:`~airflow_mlops.core.checks.inference.InferencePolicy`, such as ``{"share": 0.01}``. (templated)
    :param overwrite: replace a suite that is there.
    """

    step = "infer-expectations"
    template_fields: Sequence[str] = (
        "dataset",
        "suite",
        "time_column",
        "window_start",
        "window_end",
        "exclude",
        "private_columns",
        "policy",
        "as_of",
    )

    def __init__(
        self,
        *,
        dataset: Any,
        suite: str,
        time_column: str | None = None,
        window_start: str | None = RUN_WINDOW[0],
        window_end: str | None = RUN_WINDOW[1],
        exclude: str | Sequence[str] = (),
        private_columns: str | Sequence[str] = (),
        policy: dict[str, Any] | None = None,
        overwrite: bool = False,
        as_of: str | int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.as_of = as_of
        self.dataset = dataset
        self.suite = suite
        self.time_column = time_column
        self.window_start = window_start
        self.window_end = window_end
        self.window_given = (window_start, window_end) != RUN_WINDOW
        self.exclude = exclude
        self.private_columns = private_columns
        self.policy = policy
        self.overwrite = overwrite

    def build_spec(self, context: Context) -> dict[str, Any]:
        """Give an :class:`~airflow_mlops.steps.infer_expectations.InferExpectationsSpec`."""
        return {
            "dataset": dataset_ref(self.dataset, self.as_of),
            "suite": self.suite,
            "time_column": self.time_column,
            "window": window_spec(self.window_start, self.window_end, context)
            if self.time_column or self.window_given
            else None,
            "exclude": names(self.exclude),
            "private_columns": names(self.private_columns),
            "policy": self.policy or {},
            "overwrite": self.overwrite,
        }

    def record(self, result: dict[str, Any], context: Context) -> None:
        """Say in the log where the suite is; the file itself, once committed, is the record."""
        self.log.info("%s", result["headline"])
