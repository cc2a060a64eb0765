"""Explain a trained model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_mlops.links import ReportLink
from airflow_mlops.operators.base import StepOperator, optional_number, optional_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow.sdk import Context


class ExplainModelOperator(StepOperator):
    """Say what a model pays attention to: importance, partial dependence, contributions per row, counterfactuals.

    The model is explained as it will be served, on the rows the training held out. Pictures and numbers become
    artifacts of its MLflow run.

    :param training: what the training task returned. (templated)
    :param metric: name of a built-in metric, or import path of one; default the training's. (templated)
    :param explained_label: class whose probability is explained; default the last of the model's. (templated)
    :param maximum_rows: rows drawn for the importance. (templated)
    :param explained_rows: rows whose answers are explained one by one. (templated)
    :param counterfactual_shift: also look for the smallest change that moves each of these answers this far, or to
        another label; default none. (templated)
    """

    step = "explain"
    needs = frozenset({"mlflow"})
    operator_extra_links = (ReportLink(),)
    template_fields: Sequence[str] = (
        "training",
        "metric",
        "explained_label",
        "maximum_rows",
        "explained_rows",
        "counterfactual_shift",
    )

    def __init__(
        self,
        *,
        training: Any,
        metric: str | None = None,
        explained_label: str | None = None,
        maximum_rows: int | str = 5_000,
        explained_rows: int | str = 100,
        counterfactual_shift: float | str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.training = training
        self.metric = metric
        self.explained_label = explained_label
        self.maximum_rows = maximum_rows
        self.explained_rows = explained_rows
        self.counterfactual_shift = counterfactual_shift

    def build_spec(self, context: Context) -> dict[str, Any]:
        """Give an :class:`~airflow_mlops.steps.explain.ExplainSpec`."""
        training = self.training
        return {
            "dataset": training["dataset"],
            "model_name": training["model_name"],
            "run_id": training["run_id"],
            "package_digest": training["package_digest"],
            "window": training["holdout"],
            "time_column": training["dataset"]["time_column"],
            "metric": self.metric or training["metric"],
            "explained_label": optional_text(self.explained_label),
            "maximum_rows": int(self.maximum_rows),
            "explained_rows": int(self.explained_rows),
            "counterfactual_shift": optional_number(self.counterfactual_shift),
        }

    def record(self, result: dict[str, Any], context: Context) -> None:
        """Write the headline to the ledger and link to the pictures."""
        from airflow_mlops.ledger import EntryKind

        self.note_link(ReportLink, result["explanation_url"])
        self.write_entry(
            context,
            kind=EntryKind.EXPLANATION,
            key=result["run_id"],
            model_name=result["model_name"],
            window=None,
            subject=result["run_id"],
            summary=f"explained {result['model_name']}: {result['headline']}",
            payload={"headline": result["headline"], "explanation_url": result["explanation_url"]},
        )
