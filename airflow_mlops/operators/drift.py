"""Check a model's inputs for drift."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_mlops.exceptions import DriftDetectedError
from airflow_mlops.links import ReportLink
from airflow_mlops.operators.base import StepOperator, check_key, window_spec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow.sdk import Context


class CheckDriftOperator(StepOperator):
    """Compare what the service was asked in a window with what the champion was trained on.

    By default a finding does not fail the task: it goes into the ledger, where the retraining decision reads it.

    :param model_name: model whose inference log is read. (templated)
    :param detector: ``wasserstein``, ``jensen_shannon``, ``psi`` or import path of one; default by column type. (templated)
    :param share_threshold: share of drifted inputs from which the window counts as drifted. (templated)
    :param report: write an Evidently report ``never``, when ``fired``, or ``always``. (templated)
    :param labels: table URI with labels, to show the target in the report. (templated)
    :param id_column: column of the labels that equals the prediction id. (templated)
    :param window_start: first instant of the window; default the run's data interval. (templated)
    :param window_end: first instant after it. (templated)
    :param fail_on_drift: make it a gate.
    """

    step = "drift"
    needs = frozenset({"mlflow", "bentoml"})
    operator_extra_links = (ReportLink(),)
    template_fields: Sequence[str] = (
        "model_name",
        "detector",
        "share_threshold",
        "report",
        "labels",
        "id_column",
        "window_start",
        "window_end",
    )

    def __init__(
        self,
        *,
        model_name: str,
        detector: str | None = None,
        share_threshold: float | str = 0.5,
        report: str = "fired",
        labels: str | None = None,
        id_column: str | None = None,
        window_start: str = "{{ data_interval_start }}",
        window_end: str = "{{ data_interval_end }}",
        fail_on_drift: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.model_name = model_name
        self.detector = detector
        self.share_threshold = share_threshold
        self.report = report
        self.labels = labels
        self.id_column = id_column
        self.window_start = window_start
        self.window_end = window_end
        self.fail_on_drift = fail_on_drift

    def build_spec(self, context: Context) -> dict[str, Any]:
        """Give a :class:`~airflow_mlops.steps.drift.DriftSpec`."""
        return {
            "model_name": self.model_name,
            "window": window_spec(self.window_start, self.window_end),
            "detector": self.detector or None,
            "share_threshold": float(self.share_threshold),
            "report": self.report,
            "labels": self.labels,
            "id_column": self.id_column,
        }

    def record(self, result: dict[str, Any], context: Context) -> dict[str, Any]:
        """Write the verdict to the ledger and link to the report.

        :returns: the verdict that stands: a window gets one.
        """
        verdict = self._write(result, context, key=check_key(result))
        if result["report_url"] and not verdict["report_url"]:  # it was drawn after the verdict
            verdict = self._write(
                verdict | {"report_url": result["report_url"]}, context, key=f"{check_key(result)}|report"
            )
        if verdict["report_url"]:
            self.note_link(ReportLink, verdict["report_url"])
        facts = {name: verdict[name] for name in ("window", "drifted", "headline")}
        self.fill_outlets(context, facts)
        return verdict

    def _write(self, verdict: dict[str, Any], context: Context, *, key: str) -> dict[str, Any]:
        from airflow_mlops.ledger import EntryKind

        standing = self.write_entry(
            context,
            kind=EntryKind.DRIFT_CHECK,
            key=key,
            model_name=verdict["model_name"],
            window=verdict["window"],
            summary=f"drift of {verdict['model_name']}: {verdict['headline']}",
            payload=verdict,
        )
        return standing.payload

    def decide(self, result: dict[str, Any], context: Context) -> dict[str, Any]:
        """Pass on the verdict.

        :raises DriftDetectedError: the window drifted and ``fail_on_drift`` is set.
        """
        if result["drifted"] and self.fail_on_drift:
            raise DriftDetectedError(result["headline"], evidence={"features": result["features"][:10]})
        return result
