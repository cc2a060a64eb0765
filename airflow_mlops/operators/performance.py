"""Check a model's realized performance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_mlops.operators.base import StepOperator, check_key, part_of, window_spec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow.sdk import Context


class CheckPerformanceOperator(StepOperator):
    """Join a window's predictions with their labels and compare with what was promised at training.

    A finding does not fail the task: it goes into the ledger, where the retraining decision reads it.

    :param model_name: model whose inference log is read. (templated)
    :param labels: what holds the labels: an ingest or validation task's result, a dataset version or a table URI. (templated)
    :param id_column: column of the labels that equals the prediction id. (templated)
    :param target: label column. (templated)
    :param metric: name of a built-in metric, or import path of one. (templated)
    :param window_start: first instant of the window; default the run's data interval. (templated)
    :param window_end: first instant after it. (templated)
    :param maximum_relative_change: worsening that is tolerated, 0.2 is twenty percent. (templated)
    :param minimum_labelled_share: below it nothing is judged, in ``[0, 1]``. (templated)
    """

    step = "performance"
    needs = frozenset({"mlflow", "bentoml"})
    template_fields: Sequence[str] = (
        "model_name",
        "labels",
        "id_column",
        "target",
        "metric",
        "window_start",
        "window_end",
        "maximum_relative_change",
        "minimum_labelled_share",
    )

    def __init__(
        self,
        *,
        model_name: str,
        labels: Any,
        id_column: str,
        target: str,
        metric: str = "mae",
        window_start: str = "{{ data_interval_start }}",
        window_end: str = "{{ data_interval_end }}",
        maximum_relative_change: float | str = 0.2,
        minimum_labelled_share: float | str = 0.8,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.model_name = model_name
        self.labels = labels
        self.id_column = id_column
        self.target = target
        self.metric = metric
        self.window_start = window_start
        self.window_end = window_end
        self.maximum_relative_change = maximum_relative_change
        self.minimum_labelled_share = minimum_labelled_share

    def build_spec(self, context: Context) -> dict[str, Any]:
        """Give a :class:`~airflow_mlops.steps.performance.PerformanceSpec`."""
        return {
            "model_name": self.model_name,
            "window": window_spec(self.window_start, self.window_end),
            "labels": part_of(self.labels, "dataset"),
            "id_column": self.id_column,
            "target": self.target,
            "metric": self.metric,
            "policy": {
                "maximum_relative_change": float(self.maximum_relative_change),
                "minimum_labelled_share": float(self.minimum_labelled_share),
            },
        }

    def record(self, result: dict[str, Any], context: Context) -> None:
        """Write the grade to the ledger: one per model and window, once it was measured."""
        if not result["measured"]:
            self.log.warning(
                "%s of %s not measured: %s", result["metric"], result["model_name"], result["reason"]
            )
            return
        from airflow_mlops.ledger import EntryKind

        window = window_spec(self.window_start, self.window_end)
        self.write_entry(
            context,
            kind=EntryKind.PERFORMANCE_CHECK,
            key=check_key(result),
            model_name=result["model_name"],
            window=window,
            subject=",".join(result["model_versions"]),
            summary=f"performance of {result['model_name']}: {result['reason']}",
            payload=result,
        )
        self.fill_outlets(
            context, {"window": window, "degraded": result["degraded"], "reason": result["reason"]}
        )
