"""Promote a model version, or go back to the one before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from airflow.sdk import timezone

from airflow_mlops.exceptions import PromotionRejectedError
from airflow_mlops.hooks.ledger import LedgerHook
from airflow_mlops.links import ModelVersionLink
from airflow_mlops.operators.base import StepOperator, actor, part_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow.sdk import Context


#: All that a person who promotes without an evaluation says.
BY_HAND = frozenset({"champion_version", "reason"})


class PromoteModelOperator(StepOperator):
    """Move the champion alias to a version, if the champion is still the one it was compared with.

    Of two promotions that race, one wins; the other fails and says who won.

    :param model_name: registered model. (templated)
    :param model_version: the version that earned it, or what the registration task returned. (templated)
    :param evaluation: what the evaluation task returned: a "promote" for this very package, whom it beat, and why. By hand,
        without an evaluation: ``{"champion_version": ..., "reason": ...}`` and nothing else. (templated)
    :param alias: the alias to move; the version that ``champion`` leaves gets ``previous``. (templated)
    :param decision_key: retraining decision that this promotion answers; the deployment closes it. (templated)
    :param approval: what the approval task returned, where a person is asked; without a yes for this model, version, package and
        champion nothing is promoted. (templated)
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

        :raises PromotionRejectedError: a person was asked and did not approve this version, or a result is another model's.
        :raises ValueError: there is no evaluation, or ``decision_key`` names no retraining decision of this model.
        """
        evaluated = self._evaluated()
        if self.decision_key:
            with LedgerHook(ledger_conn_id=self.ledger_conn_id).get_conn() as ledger:
                ledger.require_decision(self.decision_key, self.model_name)
        version = str(part_of(self.model_version, "model_version"))
        return {
            "model_name": self.model_name,
            "model_version": version,
            "alias": self.alias,
            **evaluated,
            "reason": evaluated["reason"] + self._approved(version, evaluated["expected_version"]),
            "package_digest": self.approval["package_digest"] if self.approval else None,
            "decision_key": self.decision_key or None,
            "actor": actor(context),
            "now": timezone.utcnow().isoformat(),
        }

    def _evaluated(self) -> dict[str, Any]:
        """Give what the step compares with the version itself, or stop."""
        given = self.evaluation
        if not isinstance(given, Mapping) or not given.keys() >= BY_HAND or not str(given["reason"]).strip():
            raise ValueError(
                f"nothing says why {self.model_name} gets a new {self.alias}: give evaluation=evaluate.output. To promote by "
                'hand, give evaluation={"champion_version": "<whom it replaces, or None>", "reason": "<why>"}'
            )
        by_hand = given.keys() == BY_HAND
        self._require_own("model_version", self.model_version)
        if not by_hand:
            self._require_own("evaluation", given)
        return {
            "expected_version": _version(given["champion_version"]),
            "reason": f"by hand: {given['reason']}" if by_hand else given["reason"],
            "verdict": None if by_hand else given.get("verdict") or "none",
            "evaluated_run_id": given.get("run_id"),
        }

    def _require_own(self, argument: str, given: Any) -> None:
        """Refuse what a task said about another model."""
        if isinstance(given, Mapping) and given.get("model_name") != self.model_name:
            raise PromotionRejectedError(
                f"{argument} is about {given.get('model_name')!r}, and {self.model_name!r} is to be promoted; the {self.alias} "
                "stays. Give the results of this model's own tasks",
                evidence={argument: {name: given.get(name) for name in ("model_name", "run_id")}},
            )

    def _approved(self, version: str, champion: str | None) -> str:
        """Say who approved exactly this, or stop."""
        answer = self.approval
        if not answer:
            return ""
        who = answer["responded_by"]["name"] if answer["responded_by"] else None
        asked = answer["model_name"], _version(answer["model_version"]), _version(answer["champion_version"])
        if not answer["approved"]:
            why = f"{who} said no" if who else "nobody said yes in time"
        elif asked != (self.model_name, version, champion):
            why = f"the yes was about {asked[0]} version {asked[1]} against champion {asked[2]}, not against {champion}"
        else:
            return f"; approved by {who}"
        raise PromotionRejectedError(
            f"version {version} of {self.model_name} was not approved, the {self.alias} stays: {why}",
            evidence={"approval": answer},
        )

    def record(self, result: dict[str, Any], context: Context) -> None:
        """Link to the version; the ledger was written by the step, in one transaction with the alias."""
        self.note_link(ModelVersionLink, result["version_url"])
        self.log.info(
            "%s of %s is version %s", result["alias"], result["model_name"], result["model_version"]
        )
        self.fill_outlets(context, {"model_version": result["model_version"], "alias": result["alias"]})


def _version(given: Any) -> str | None:
    """Give a version as text: rendering may have made it a number."""
    return None if given is None else str(given)


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
