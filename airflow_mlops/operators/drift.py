"""Check a model's inputs for drift."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import DriftDetectedError
from airflow_mlops.hooks.ledger import LedgerHook
from airflow_mlops.links import ReportLink
from airflow_mlops.operators.base import StepOperator, check_key, dataset_ref, names
from airflow_mlops.run_windows import RUN_WINDOW, run_time_zone, window_spec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow.sdk import Context

    from airflow_mlops.ledger import LedgerEntry

#: What a verdict depends on beside the window.
_ASKED = (
    "detector",
    "thresholds",
    "policy",
    "reference",
    "reference_windows",
    "at_least",
    "of_windows",
    "columns",
    "pairs",
    "domain_classifier",
)


class CheckDriftOperator(StepOperator):
    """Compare what the service was asked and answered in a window with what the champion was trained on.

    By default a finding does not fail the task: it goes into the ledger, where the retraining decision reads it.

    :param model_name: model whose inference log is read. (templated)
    :param detector: name of a detector or import path of one, for all inputs or by input; default by column type. (templated)
    :param thresholds: by input, instead of the detector's own. (templated)
    :param share_threshold: share of drifted inputs from which the window counts as drifted. (templated)
    :param policy: other fields of :class:`~airflow_mlops.core.monitoring.drift_policy.DriftPolicy`, such as ``{"rule": "evidently"}``. (templated)
    :param reference: what the window is compared with: ``fixed``, the training rows; ``trailing``, the windows before it;
        ``last_year``, the same season a year earlier. (templated)
    :param reference_windows: how many windows ``trailing`` takes together. (templated)
    :param at_least: the window counts as drifted when it and so many of the last ``of_windows`` together did. (templated)
    :param of_windows: how many windows, this one included, ``at_least`` looks at. (templated)
    :param time_zone: whose months and days the windows are, such as ``Europe/Berlin``; default that of the Dag's schedule. (templated)
    :param columns: inputs to compare; default all of them. (templated)
    :param pairs: numeric inputs to look at together, such as ``[["distance", "duration"]]``. (templated)
    :param domain_classifier: also train a classifier to tell the window from the training rows.
    :param report: write an Evidently report ``never``, when ``fired``, or ``always``. (templated)
    :param labels: a dataset version or table URI with labels, for the drift of the target. (templated)
    :param labels_as_of: with a table URI of labels, read it as it was: a version number or an instant such as
        ``2024-03-01T00:00:00Z``. (templated)
    :param id_column: column of the labels that equals the prediction id. (templated)
    :param window_start: first instant of the window; default the run's data interval. (templated)
    :param window_end: first instant after it. (templated)
    :param fail_on_drift: make it a gate.
    """

    step = "drift"
    needs = frozenset({"mlflow", "bentoml", "ledger"})
    operator_extra_links = (ReportLink(),)
    template_fields: Sequence[str] = (
        "model_name",
        "detector",
        "thresholds",
        "share_threshold",
        "policy",
        "reference",
        "reference_windows",
        "at_least",
        "of_windows",
        "time_zone",
        "columns",
        "pairs",
        "report",
        "labels",
        "id_column",
        "window_start",
        "window_end",
        "labels_as_of",
    )

    def __init__(
        self,
        *,
        model_name: str,
        detector: str | dict[str, str] | None = None,
        thresholds: dict[str, float] | None = None,
        share_threshold: float | str = 0.5,
        policy: dict[str, Any] | None = None,
        reference: str = "fixed",
        reference_windows: int | str = 3,
        at_least: int | str = 1,
        of_windows: int | str = 1,
        time_zone: str | None = None,
        columns: str | Sequence[str] = (),
        pairs: Sequence[Sequence[str]] | None = None,
        domain_classifier: bool = False,
        report: str = "fired",
        labels: str | None = None,
        id_column: str | None = None,
        window_start: str = RUN_WINDOW[0],
        window_end: str = RUN_WINDOW[1],
        fail_on_drift: bool = False,
        labels_as_of: str | int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.labels_as_of = labels_as_of
        self.model_name = model_name
        self.detector = detector
        self.thresholds = thresholds
        self.share_threshold = share_threshold
        self.policy = policy
        self.reference = reference
        self.reference_windows = reference_windows
        self.at_least = at_least
        self.of_windows = of_windows
        self.time_zone = time_zone
        self.columns = columns
        self.pairs = pairs
        self.domain_classifier = domain_classifier
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
            "window": window_spec(self.window_start, self.window_end, context),
            "detector": self.detector or None,
            "thresholds": self.thresholds or {},
            "policy": {"share_threshold": float(self.share_threshold)} | (self.policy or {}),
            "reference": self.reference,
            "reference_windows": int(self.reference_windows),
            "at_least": int(self.at_least),
            "of_windows": int(self.of_windows),
            "time_zone": self.time_zone or run_time_zone(context),
            "columns": names(self.columns),
            "pairs": [list(pair) for pair in self.pairs or ()],
            "domain_classifier": bool(self.domain_classifier),
            "report": self.report,
            "labels": dataset_ref(self.labels, self.labels_as_of),
            "id_column": self.id_column,
        }

    def record(self, result: dict[str, Any], context: Context) -> dict[str, Any]:
        """Write the verdict to the ledger and link to the report.

        :returns: the verdict that stands: a window gets one. What only a later check could tell is added to it: the report that was
            drawn then, and the drift of a target whose labels had come. A task that was asked for something else than the one whose
            verdict stands gets its own.
        """
        spec = self.build_spec(context)
        asked = {name: spec[name] for name in _ASKED}
        standing = self._write(result, asked, context, key=check_key(result))
        first = standing.payload.get("asked") or asked
        others = [name for name in asked if first.get(name, asked[name]) != asked[name]]
        if others:
            self.log.warning(
                "a window has one verdict in the ledger: %s was first, with another %s. What this task has found decides how it ends, "
                "and is in its result",
                standing.actor,
                ", ".join(others),
            )
            verdict = result
        else:
            verdict = self._completed(result, asked, context)
        if verdict["report_url"]:
            self.note_link(ReportLink, verdict["report_url"])
        facts = {name: verdict[name] for name in ("window", "drifted", "headline")}
        self.fill_outlets(context, facts)
        return verdict

    def _completed(self, result: dict[str, Any], asked: dict[str, Any], context: Context) -> dict[str, Any]:
        """Give the verdict that stands, after adding what only this check could tell."""
        verdict = self._newest(result)
        later = {}
        if result["report_url"] and not verdict["report_url"]:
            later["report"] = {"report_url": result["report_url"]}
        if _measured(result["target"]) and not _measured(verdict["target"]):
            later["target"] = {"target": result["target"], "labels": result.get("labels")}
        for what, found in later.items():
            verdict |= found
            self._write(verdict, asked, context, key=f"{check_key(result)}|{what}")
        return verdict

    def _write(
        self, verdict: dict[str, Any], asked: dict[str, Any], context: Context, *, key: str
    ) -> LedgerEntry:
        from airflow_mlops.ledger import EntryKind

        return self.write_entry(
            context,
            kind=EntryKind.DRIFT_CHECK,
            key=key,
            model_name=verdict["model_name"],
            window=verdict["window"],
            summary=f"drift of {verdict['model_name']}: {verdict['headline']}",
            payload=verdict | {"asked": asked},
        )

    def _newest(self, verdict: dict[str, Any]) -> dict[str, Any]:
        """Give a window's verdict with all that was added to it."""
        from airflow_mlops.core.codec import from_dict
        from airflow_mlops.ledger import EntryKind

        window = from_dict(Window, verdict["window"])
        with LedgerHook(ledger_conn_id=self.ledger_conn_id).get_conn() as ledger:
            (newest,) = ledger.entries(
                kind=EntryKind.DRIFT_CHECK, model_name=verdict["model_name"], window=window, limit=1
            )
        return {name: value for name, value in newest.payload.items() if name != "asked"}

    def decide(self, result: dict[str, Any], context: Context) -> dict[str, Any]:
        """Pass on the verdict.

        :raises DriftDetectedError: the window drifted and ``fail_on_drift`` is set.
        """
        if result["drifted"] and self.fail_on_drift:
            raise DriftDetectedError(result["headline"], evidence={"features": result["features"][:10]})
        return result


def _measured(target: dict[str, Any] | None) -> bool:
    return bool(target and target.get("measured"))
