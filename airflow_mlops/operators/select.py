"""Choose between trained candidates."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from airflow_mlops.links import MLflowRunLink
from airflow_mlops.operators.base import StepOperator

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow.sdk import Context


class SelectModelOperator(StepOperator):
    """Of several trained candidates keep the one that did best in cross-validation: the reduce after mapped trainings.

    Returns that training's result, so that evaluation and registration take this task as if it had trained.

    :param trainings: what the training tasks returned; ``train.output`` of a mapped one. (templated)
    """

    step = "select"
    needs = frozenset({"mlflow"})
    operator_extra_links = (MLflowRunLink(),)
    template_fields: Sequence[str] = ("trainings",)

    def __init__(self, *, trainings: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.trainings = trainings

    def build_spec(self, context: Context) -> dict[str, Any]:
        """Give a :class:`~airflow_mlops.steps.select.SelectSpec`."""
        # Columns decide nothing here, and there may be thousands for each of many candidates.
        return {"trainings": [one | {"dataset": {**one["dataset"], "columns": {}}} for one in self.trainings]}

    def record(self, result: dict[str, Any], context: Context) -> None:
        """Write the choice to the ledger and link to the chosen run."""
        from airflow_mlops.ledger import EntryKind

        training = result["training"]
        run_ids = sorted(one["run_id"] for one in self.trainings)
        self.note_link(MLflowRunLink, training["run_url"])
        self.write_entry(
            context,
            kind=EntryKind.SELECTION,
            # A ledger's key has an end, and there may be any number of candidates.
            key=hashlib.sha256("|".join(run_ids).encode()).hexdigest(),
            model_name=training["model_name"],
            window=training["training"],
            subject=training["run_id"],
            summary=f"chose a challenger for {training['model_name']}: {result['reason']}",
            payload={"run_id": training["run_id"], "run_ids": run_ids, "reason": result["reason"]},
        )

    def decide(self, result: dict[str, Any], context: Context) -> dict[str, Any]:
        """Give the chosen training."""
        run_id = result["training"]["run_id"]
        return dict(next(one for one in self.trainings if one["run_id"] == run_id))
