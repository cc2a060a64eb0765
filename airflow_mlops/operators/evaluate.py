"""Evaluate a challenger against the champion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from airflow.sdk.exceptions import AirflowSkipException

from airflow_mlops.exceptions import PromotionRejectedError
from airflow_mlops.links import MLflowRunLink
from airflow_mlops.operators.base import StepOperator

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow.sdk import Context


class EvaluateModelOperator(StepOperator):
    """Compare challenger, champion and a simple baseline on the rows the training held out, and judge.

    :param training: what the training task returned. (templated)
    :param metric: name of a built-in metric, or import path of one; default the training's. (templated)
    :param minimum_uplift: relative improvement the challenger has to show, 0.01 is one percent. (templated)
    :param significance: largest p-value, the rate at which an equally good challenger would pass. (templated)
    :param decision_key: retraining decision that is being carried out; a rejection closes it. (templated)
    :param on_reject: ``fail`` the task (a gate), or ``skip`` what follows: not every retraining has to win.
    """

    step = "evaluate"
    needs = frozenset({"mlflow"})
    operator_extra_links = (MLflowRunLink(),)
    template_fields: Sequence[str] = (
        "training",
        "metric",
        "minimum_uplift",
        "significance",
        "decision_key",
    )

    def __init__(
        self,
        *,
        training: Any,
        metric: str | None = None,
        minimum_uplift: float | str = 0.0,
        significance: float | str = 0.05,
        decision_key: str | None = None,
        on_reject: Literal["fail", "skip"] = "fail",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.training = training
        self.metric = metric
        self.minimum_uplift = minimum_uplift
        self.significance = significance
        self.decision_key = decision_key
        self.on_reject = on_reject

    def build_spec(self, context: Context) -> dict[str, Any]:
        """Give an :class:`~airflow_mlops.steps.evaluate.EvaluateSpec`."""
        training = self.training
        return {
            "dataset": training["dataset"],
            "model_name": training["model_name"],
            "run_id": training["run_id"],
            "package_digest": training["package_digest"],
            "window": training["holdout"],
            "time_column": training["dataset"]["time_column"],
            "metric": self.metric or training["metric"],
            "policy": {
                "minimum_uplift": float(self.minimum_uplift),
                "significance": float(self.significance),
            },
        }

    def record(self, result: dict[str, Any], context: Context) -> None:
        """Write the verdict to the ledger; a rejection also closes the retraining decision."""
        from airflow_mlops.ledger import EntryKind

        self.note_link(MLflowRunLink, result["run_url"])
        self.write_entry(
            context,
            kind=EntryKind.EVALUATION,
            key=f"{result['run_id']}|{result['champion_version']}",
            model_name=result["model_name"],
            window=result["window"],
            subject=result["run_id"],
            summary=f"verdict on the challenger of {result['model_name']}: {result['verdict']}: {result['reason']}",
            payload=result,
        )
        if result["verdict"] != "promote" and self.decision_key:
            self.write_entry(
                context,
                kind=EntryKind.RETRAINING_OUTCOME,
                key=self.decision_key,
                model_name=result["model_name"],
                window=None,
                subject=result["run_id"],
                summary=f"the retraining of {result['model_name']} ended without a new champion: {result['reason']}",
                payload={
                    "outcome": str(result["verdict"]),
                    "reason": result["reason"],
                    "run_id": result["run_id"],
                },
            )

    def decide(self, result: dict[str, Any], context: Context) -> dict[str, Any]:
        """Let the challenger through, or stop.

        :raises PromotionRejectedError: it did not earn the place and ``on_reject`` is ``fail``.
        """
        if result["verdict"] == "promote":
            return result
        if self.on_reject == "skip":
            raise AirflowSkipException(f"{result['verdict']}: {result['reason']}; the champion stays")
        raise PromotionRejectedError(
            f"{result['verdict']}: {result['reason']}; the champion stays",
            evidence={"report": result["report"]},
        )
