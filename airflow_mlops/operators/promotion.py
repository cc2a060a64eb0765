"""Promote a model version, or go back to the one before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from airflow.sdk import timezone

from airflow_mlops.exceptions import PromotionRejectedError
from airflow_mlops.hooks.ledger import LedgerHook
from airflow_mlops.links import ModelVersionLink
from airflow_mlops.operators.base import StepOperator, actor, optional, optional_text, part_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow.sdk import Context


#: What ``approval`` is where nobody is asked. It is no answer: what comes out as nothing, such as that of an approval task
#: that was marked as success, is not this, and promotes nothing.
NOT_ASKED = "not asked"

CHAMPION = "champion"

#: All that a person who promotes without an evaluation says.
BY_HAND = frozenset({"champion_version", "reason"})

#: What an answer says.
_ANSWER = frozenset(
    {
        "approved",
        "model_name",
        "model_version",
        "package_digest",
        "champion_version",
        "champion_alias",
        "ledger_position",
        "responded_by",
        "responded_at",
    }
)


class PromoteModelOperator(StepOperator):
    """Move the champion alias to a version, if the champion is still the one it was compared with.

    Of two promotions that race, one wins; the other fails and says who won.

    :param model_name: registered model. (templated)
    :param model_version: the version that earned it, or what the registration task returned. (templated)
    :param evaluation: what the evaluation task returned: a "promote" for this very package, whom it beat, and why. By hand,
        without an evaluation: ``{"champion_version": ..., "reason": ...}`` and nothing else. Where an earlier champion comes back:
        what the decision returned. (templated)
    :param alias: the alias to move, the one the evaluation compared with; the version that ``champion`` leaves gets ``previous``.
        (templated)
    :param decision_key: retraining decision that this promotion answers; the deployment closes it. (templated)
    :param approval: what the approval task returned, where a person is asked; without a yes for this model, version, package and
        champion nothing is promoted, least of all when nothing comes out. Leave it out where nobody is asked. (templated)
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
        approval: Any = NOT_ASKED,
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
        answer = self._approved(version, evaluated["expected_version"])
        return {
            "model_name": self.model_name,
            "model_version": version,
            "alias": self.alias,
            **evaluated,
            "reason": evaluated["reason"]
            + (f"; approved by {answer['responded_by']['name']}" if answer else ""),
            "package_digest": answer["package_digest"] if answer else self._registered(),
            "asked_after": answer["ledger_position"] if answer else None,
            "approved_at": answer["responded_at"] if answer else None,
            "decision_key": optional(self.decision_key),
            "actor": actor(context),
            "requested_at": timezone.utcnow().isoformat(),
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
            self._require_alias(given)
        return {
            "expected_version": optional_text(given["champion_version"]),
            "reason": f"by hand: {given['reason']}" if by_hand else str(given["reason"]),
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

    def _require_alias(self, evaluation: Mapping[str, Any]) -> None:
        """Refuse what beat the version of another alias: it says nothing of this one's."""
        compared = evaluation.get("champion_alias") or CHAMPION  # an older release knew no other
        if compared != self.alias:
            raise PromotionRejectedError(
                f"the evaluation compared with the {compared} of {self.model_name}, and {self.alias!r} is to be moved; it stays. "
                f"Evaluate with champion_alias={self.alias!r}, or move it by hand: "
                'evaluation={"champion_version": "<whom it replaces, or None>", "reason": "<why>"}',
                evidence={"champion_alias": compared, "alias": self.alias},
            )

    def _registered(self) -> str | None:
        """Give the digest of what was registered, where the registration's result is at hand."""
        given = self.model_version
        return given.get("package_digest") if isinstance(given, Mapping) else None

    def _approved(self, version: str, champion: str | None) -> dict[str, Any] | None:
        """Give the yes to exactly this, ``None`` where nobody is asked, or stop."""
        if self.approval == NOT_ASKED:
            return None
        answer = self.approval
        if not isinstance(answer, Mapping) or not answer.keys() >= _ANSWER:
            why = (
                f"the approval task gave no answer (approval came out as {answer!r:.80}). It was marked as success or "
                "skipped, or its answer was deleted: clear it, so that it asks"
            )
            raise self._not_approved(version, why, {"approval": str(answer)[:80]})
        who = answer["responded_by"]["name"] if answer["responded_by"] else None
        asked = (
            answer["model_name"],
            optional_text(answer["model_version"]),
            optional_text(answer["champion_version"]),
            answer["champion_alias"],
        )
        if answer["approved"] is not True or who is None:
            why = f"{who} said no" if who else "nobody said yes in time"
        elif asked != (self.model_name, version, champion, self.alias):
            why = (
                f"the yes was about {asked[0]} version {asked[1]} against {asked[3]} {asked[2]}, not against {self.alias} {champion}. "
                "Clear the approval's task, and it asks about this one"
            )
        elif self._registered() not in {None, answer["package_digest"]}:
            why = f"the yes was about package {answer['package_digest']}, and {self._registered()} was registered"
        else:
            return dict(answer)
        raise self._not_approved(version, why, {"approval": dict(answer)})

    def _not_approved(self, version: str, why: str, evidence: dict[str, Any]) -> PromotionRejectedError:
        return PromotionRejectedError(
            f"version {version} of {self.model_name} was not approved, the {self.alias} stays: {why}",
            evidence=evidence,
        )

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
            "model_version": optional_text(self.model_version),
            "alias": self.alias,
            "reason": str(self.reason),  # native rendering makes a number of a ticket's
            "actor": actor(context),
            "requested_at": timezone.utcnow().isoformat(),
            "request": actor(context),
        }

    def record(self, result: dict[str, Any], context: Context) -> None:
        """Link to the version; the ledger was written by the step."""
        self.note_link(ModelVersionLink, result["version_url"])
        self.log.info(
            "%s of %s is version %s again", result["alias"], result["model_name"], result["model_version"]
        )
        self.fill_outlets(context, {"model_version": result["model_version"], "alias": result["alias"]})
