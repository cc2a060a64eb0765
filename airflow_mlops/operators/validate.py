"""Validate a dataset version with a Great Expectations suite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from airflow_mlops.exceptions import ConnectionConfigError, DataQualityError
from airflow_mlops.hooks.ledger import LedgerHook
from airflow_mlops.hooks.services import with_mlflow
from airflow_mlops.links import DataDocsLink
from airflow_mlops.operators.base import StepOperator, dataset_ref, names, part_of
from airflow_mlops.operators.dataset import RecordingDatasets
from airflow_mlops.run_windows import RUN_WINDOW, window_spec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from airflow.sdk import Context

    from airflow_mlops.services import Services


ACTIONS = ("gate", "warn", "quarantine")
#: Earlier verdicts that a page shows.
PAST_VERDICTS = 10


class ValidateDatasetOperator(RecordingDatasets, StepOperator):
    """Judge a window of a dataset version by a suite; a gate unless told otherwise.

    Only expectations of severity ``critical``, which is the default, decide; the others are reported. What goes on is this task's
    ``output``: with ``quarantine`` it may be a newer version of the table than the one that was judged.

    :param dataset: what an ingest or validation task returned, a dataset version, or a table URI for its newest. (templated)
    :param as_of: with a table URI, read it as it was: a version number or an instant such as ``2024-03-01T00:00:00Z``. (templated)
    :param suite: path of the suite's JSON file, or the suite itself. (templated)
    :param action: ``gate`` fails the task when a critical expectation does, ``warn`` only writes it down, ``quarantine`` sets aside
        the rows that break one and fails the task where that does not help.
    :param time_column: column that places a row in the window; needed when one is given. (templated)
    :param window_start: first instant of the window; default the run's data interval, or all rows without ``time_column``. (templated)
    :param window_end: first instant after it. (templated)
    :param engine: ``auto`` judges the common expectations in polars, ``great_expectations`` leaves all to it.
    :param id_column: column that names a row: of each failed expectation up to 20 rows are named in the evidence. (templated)
    :param allow_empty: judge a window without rows as well, instead of failing.
    :param quarantine_table: URI of the Delta table of rows that were set aside; default the dataset's with ``_quarantine`` behind. (templated)
    :param quarantine_budget: largest share of the window's rows that may be set aside, in ``[0, 1)``; with more of them the task
        fails and nothing is written. The default is a rule of thumb: a hundredth hardly moves what a model learns.
    :param private_columns: columns whose values neither log, ledger, XCom nor page show; a list, or names separated by commas. (templated)
    :param expectation_modules: importable modules that define expectations of your own, such as ``["my_company.expectations"]``.
    :param report: when the verdict's page goes to MLflow, linked from the task: ``always``, ``failed`` (when an expectation failed, of
        any severity) or ``never``. Without an MLflow connection, or while MLflow is down, there is none, and the verdict stands.
    """

    step = "validate"
    operator_extra_links = (DataDocsLink(),)
    template_fields: Sequence[str] = (
        "dataset",
        "suite",
        "time_column",
        "window_start",
        "window_end",
        "id_column",
        "quarantine_table",
        "private_columns",
        "as_of",
    )

    def __init__(
        self,
        *,
        dataset: Any,
        suite: str | Mapping[str, Any],
        action: Literal["gate", "warn", "quarantine"] = "gate",
        time_column: str | None = None,
        window_start: str | None = RUN_WINDOW[0],
        window_end: str | None = RUN_WINDOW[1],
        engine: Literal["auto", "great_expectations"] = "auto",
        id_column: str | None = None,
        allow_empty: bool = False,
        quarantine_table: str | None = None,
        quarantine_budget: float = 0.01,
        private_columns: str | Sequence[str] = (),
        expectation_modules: Sequence[str] = (),
        report: Literal["always", "failed", "never"] = "always",
        as_of: str | int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.as_of = as_of
        self.dataset = dataset
        self.suite = suite
        self.action = action
        self.time_column = time_column
        self.window_start = window_start
        self.window_end = window_end
        self.window_given = (window_start, window_end) != RUN_WINDOW
        self.engine = engine
        self.id_column = id_column
        self.allow_empty = allow_empty
        self.quarantine_table = quarantine_table
        self.quarantine_budget = quarantine_budget
        self.private_columns = private_columns
        self.expectation_modules = expectation_modules
        self.report = report

    def build_spec(self, context: Context) -> dict[str, Any]:
        """Give a :class:`~airflow_mlops.steps.validate.ValidateSpec`.

        :raises ValueError: when ``action`` is unknown.
        """
        if self.action not in ACTIONS:
            raise ValueError(f"unknown action {self.action!r}; known: {', '.join(ACTIONS)}")
        dataset = dataset_ref(self.dataset, self.as_of)
        return {
            "dataset": dataset,
            "suite": self.suite,
            "time_column": self.time_column,
            "window": window_spec(self.window_start, self.window_end, context)
            if self.time_column or self.window_given
            else None,
            "engine": self.engine,
            "id_column": self.id_column,
            "allow_empty": self.allow_empty,
            "quarantine": {
                "table": self.quarantine_table or f"{part_of(dataset, 'uri').rstrip('/')}_quarantine",
                "budget": self.quarantine_budget,
            }
            if self.action == "quarantine"
            else None,
            "private_columns": names(self.private_columns),
            "expectation_modules": names(self.expectation_modules),
            "report": self.report,
            "history": self._past_verdicts(part_of(dataset, "uri")) if self.report != "never" else [],
        }

    def _past_verdicts(self, uri: str) -> list[dict[str, Any]]:
        from airflow_mlops.ledger import EntryKind

        with LedgerHook(ledger_conn_id=self.ledger_conn_id).get_conn() as ledger:
            found = ledger.entries_of_table(uri, kind=EntryKind.VALIDATION, limit=PAST_VERDICTS)
        return [
            {
                "recorded_at": entry.recorded_at.isoformat(),
                "version": entry.payload["dataset"]["version"],
                "window": str(entry.window) if entry.window else None,
                "success": entry.payload["success"],
                "headline": entry.payload["headline"],
            }
            for entry in found
        ]

    def services(self) -> Services:
        """Resolve the MLflow connection too where there is one and a page may be written; a verdict needs none."""
        services = super().services()
        if self.report == "never":
            return services
        try:
            return with_mlflow(services, self.mlflow_conn_id)
        except ConnectionConfigError as err:
            self.log.info("no page of this validation, as there is no MLflow to keep it: %s", err)
            return services

    def record(self, result: dict[str, Any], context: Context) -> dict[str, Any]:
        """Write the verdict to the ledger, the log and the outlets' events, and the new version where rows were set aside.

        :returns: the result with ``quality``, which an operator behind this one tells its outlets.
        """
        from airflow_mlops.core.checks.verdict import draw_failures, sum_up_quality
        from airflow_mlops.ledger import EntryKind

        dataset = result["dataset"]
        if result["quarantine"] is not None:
            self.write_version(
                result,
                context,
                summary=f"{result['quarantined']} rows of {dataset['uri']} went to {result['quarantine']['uri']}, "
                f"the rest is version {dataset['version']} with {dataset['row_count']} rows",
                payload={
                    "dataset": dataset,
                    "window": result["window"],
                    "row_count": result["row_count"] - result["quarantined"],
                },
            )
        verdict = "accepted" if result["success"] else "not accepted"
        key = self.write_verdict(
            result,
            context,
            kind=EntryKind.VALIDATION,
            summary=f"{dataset['uri']} version {dataset['version']} {verdict}: {result['headline']}",
        )
        if result["report_url"]:
            self.note_link(DataDocsLink, result["report_url"])
            self.log.info("the page of this validation: %s", result["report_url"])
        if result["failures"]:
            self.log.info("expectations that failed:\n%s", draw_failures(result["failures"]))
        self.fill_outlets(context, {"dataset": dataset})
        counted = {name: result[name] for name in ("suite_name", "evaluated", "failed", "failed_critical")}
        quality = sum_up_quality(key=key, table=dataset["uri"], failures=result["failures"], **counted)
        self.tell_quality(context, quality)
        return {**result, "quality": quality}

    def decide(self, result: dict[str, Any], context: Context) -> dict[str, Any]:
        """Let the dataset through, or stop.

        :raises DataQualityError: a critical expectation failed and ``action`` is ``gate``, or is ``quarantine`` and that did not help.
        """
        if not result["success"] and self.action != "warn":
            raise DataQualityError(
                f"{result['headline']}. Fix the source and ingest again, or change the suite if the data is right",
                evidence={"failures": result["failures"], "dataset": result["dataset"]},
            )
        return result
