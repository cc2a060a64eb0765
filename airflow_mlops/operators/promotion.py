"""Promote a model version, or go back to the one before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.sdk import timezone

from airflow_mlops.exceptions import PromotionRejectedError
from airflow_mlops.hooks.ledger import LedgerHook
from airflow_mlops.links import ModelVersionLink
from airflow_mlops.operators.base import StepOperator, actor, part_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow.sdk import Context


class PromoteModelOperator(StepOperator):
    """Move the champion alias to a version, if the champion is still the one it was compared with.

    Of two promotions that race, one wins; the other fails and says who won.

    :param model_name: registered model. (templated)
    :param model_version: the version that earned it, or what the registration task returned. (templated)
    :param evaluation: what the evaluation task returned: whom it beat, and why. (templated)
    :param alias: the alias to move; the version that ``champion`` leaves gets ``previous``. (templated)
    :param decision_key: retraining decision that this promotion answers; the deployment closes it. (templated)
    :param approval: what the approval task returned, where a person is asked; without a yes nothing is promoted. (templated)
    """

    step = "promote"
    needs = frozenset({"mlflow", "ledger"})
    operator_extra_links = (ModelVersionLink(),)
    template_fields: Sequence[str] = (
        "model_name",
        "model_version",
        "evaluation",
        "alias",
        "decision_key",
        "approval",
    )

    def __init__(
        self,
        *,
        model_name: str,
        model_version: Any,
        evaluation: Any,
        alias: str = "champion",
        decision_key: str | None = None,
        approval: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.model_name = model_name
        self.model_version = model_version
        self.evaluation = evaluation
        self.alias = alias
        self.decision_key = decision_key
        self.approval = approval

    def build_spec(self, context: Context) -> dict[str, Any]:
        """Give a :class:`~airflow_mlops.steps.promote.PromoteSpec`.

        :raises PromotionRejectedError: a person was asked and did not approve this version.
        :raises ValueError: ``decision_key`` names no retraining decision of this model.
        """
        if self.decision_key:
            with LedgerHook(ledger_conn_id=self.ledger_conn_id).get_conn() as ledger:
                ledger.require_decision(self.decision_key, self.model_name)
        version = str(part_of(self.model_version, "model_version"))
        return {
            "model_name": self.model_name,
            "model_version": version,
            "expected_version": self.evaluation["champion_version"],
            "alias": self.alias,
            "reason": self.evaluation["reason"] + self._approved(version),
            "decision_key": self.decision_key or None,
            "actor": actor(context),
            "now": timezone.utcnow().isoformat(),
        }

    def _approved(self, version: str) -> str:
        """Say who approved, or stop."""
        if not self.approval:
            return ""
        if not self.approval["approved"] or str(self.approval["model_version"]) != version:
            raise PromotionRejectedError(
                f"version {version} of {self.model_name} was not approved; the champion stays",
                evidence={"approval": self.approval},
            )
        return f"; approved by {self.approval['responded_by']['name']}"

    def record(self, result: dict[str, Any], context: Context) -> None:
        """Link to the version; the ledger was written by the step, in one transaction with the alias."""
        self.note_link(ModelVersionLink, result["version_url"])
        self.log.info(
            "%s of %s is version %s", result["alias"], result["model_name"], result["model_version"]
        )
        self.fill_outlets(context, {"model_version": result["model_version"], "alias": result["alias"]})


class RollBackModelOperator(StepOperator):
    """Move the champion alias back: one step, or to a named version. Deploy the alias afterwards.

    :param model_name: registered model. (templated)
    :param model_version: version to go back to; default the champion before this one. (templated)
    :param alias: the alias to move. (templated)
    :param reason: why, for the ledger. (templated)
    """

    step = "roll-back"
    needs = frozenset({"mlflow", "ledger"})
    operator_extra_links = (ModelVersionLink(),)
    template_fields: Sequence[str] = ("model_name", "model_version", "alias", "reason")

    def __init__(
        self,
        *,
        model_name: str,
        model_version: str | None = None,
        alias: str = "champion",
        reason: str = "rolled back",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.model_name = model_name
        self.model_version = model_version
        self.alias = alias
        self.reason = reason

    def build_spec(self, context: Context) -> dict[str, Any]:
        """Give a :class:`~airflow_mlops.steps.roll_back.RollBackSpec`; it is named after the task, so a retry is no second step back."""
        return {
            "model_name": self.model_name,
            "model_version": str(self.model_version) if self.model_version else None,
            "alias": self.alias,
            "reason": self.reason,
            "actor": actor(context),
            "now": timezone.utcnow().isoformat(),
            "request": actor(context),
        }

    def record(self, result: dict[str, Any], context: Context) -> None:
        """Link to the version; the ledger was written by the step."""
        self.note_link(ModelVersionLink, result["version_url"])
        self.log.info(
            "%s of %s is version %s again", result["alias"], result["model_name"], result["model_version"]
        )
        self.fill_outlets(context, {"model_version": result["model_version"], "alias": result["alias"]})
