"""Check a model's realized performance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import InsufficientDataError
from airflow_mlops.hooks.ledger import LedgerHook
from airflow_mlops.operators.base import StepOperator, check_key, part_of, window_spec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow.sdk import Context


class CheckPerformanceOperator(StepOperator):
    """Join a window's predictions with their labels and compare with what was promised at training.

    A finding does not fail the task: it goes into the ledger, where the retraining decision reads it. So does a window
    that has too few labels yet; later runs grade it again, until it is graded or decided without.

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

    def execute(self, context: Context) -> dict[str, Any]:
        """Grade the earlier windows whose labels were late, then this one; the result is about this one."""
        spec = self.build_spec(context)
        for window in self._ungraded(spec["window"]):
            try:
                late = self._runner.run(self.step, spec | {"window": window}, self.services())
            except InsufficientDataError as err:
                self.log.warning("an earlier window can't be graded: %s", err)
            else:
                self._write(late, context)
        return super().execute(context)

    def record(self, result: dict[str, Any], context: Context) -> dict[str, Any]:
        """Write the grade to the ledger.

        :returns: the grade that stands: a window gets one.
        """
        grade = self._write(result, context)
        facts = {name: grade[name] for name in ("window", "measured", "degraded", "reason")}
        self.fill_outlets(context, facts)
        return grade

    def _write(self, result: dict[str, Any], context: Context) -> dict[str, Any]:
        """Write one grade per window; before that, what is missing for it, each time that is something else."""
        from airflow_mlops.ledger import EntryKind

        key = check_key(result)
        if not result["measured"]:
            with LedgerHook(ledger_conn_id=self.ledger_conn_id).get_conn() as ledger:
                graded = ledger.find(EntryKind.PERFORMANCE_CHECK, key)
            if graded is not None:
                return graded.payload
            key += f"|version {result['model_version']}|{result['row_count']} labelled"
        standing = self.write_entry(
            context,
            kind=EntryKind.PERFORMANCE_CHECK,
            key=key,
            model_name=result["model_name"],
            window=result["window"],
            subject=result["model_version"],
            summary=f"performance of {result['model_name']}: {result['reason']}",
            payload=result,
        )
        return standing.payload

    def _ungraded(self, window: dict[str, str] | None) -> list[dict[str, Any]]:
        from airflow_mlops.core.codec import to_dict

        if window is None:
            return []
        with LedgerHook(ledger_conn_id=self.ledger_conn_id).get_conn() as ledger:
            return [
                to_dict(late)
                for late in ledger.ungraded_windows(self.model_name, before=Window.parse(**window).start)
            ]
