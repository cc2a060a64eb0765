"""Ask a person whether a version may become champion."""

from __future__ import annotations

import hashlib
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from airflow.providers.standard.operators.hitl import ApprovalOperator
from airflow.sdk import Param, timezone
from airflow.sdk.definitions.param import ParamsDict
from airflow.sdk.exceptions import TaskAwaitingInput

from airflow_mlops.hooks.ledger import LedgerHook
from airflow_mlops.links import ModelVersionLink
from airflow_mlops.operators.base import actor, optional
from airflow_mlops.operators.promotion import CHAMPION

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from airflow.sdk import Context

    from airflow_mlops.ledger import LedgerEntry

#: What an answer says of its question.
_OF_QUESTION = (
    "model_name",
    "model_version",
    "package_digest",
    "champion_version",
    "champion_alias",
    "asked_at",
    "taken_back",
    "ledger_position",
)

#: How long a person has. After it the answer is no.
RESPONSE_TIMEOUT = timedelta(days=3)


class ApproveModelOperator(ApprovalOperator):
    """Airflow's approval, asked with what one has to know: the verdict, metrics, slices, what was done differently, and links.

    The task waits without a worker until somebody answers under Required Actions. No answer in time is a no. Who answered, when,
    and their comment are in the ledger before anything follows. After a no what follows is skipped, the champion stays, and the
    retraining decision is closed. All further arguments are those of Airflow's ``ApprovalOperator``: ``assigned_users``,
    ``notifiers``, ``fail_on_reject``.

    :param registration: what the registration task returned. (templated)
    :param evaluation: what the evaluation task returned. (templated)
    :param decision_key: retraining decision that a promotion would answer. (templated)
    :param response_timeout: how long a person has to answer.
    :param ledger_conn_id: connection of the ledger.
    """

    operator_extra_links = (ModelVersionLink(),)
    template_fields: Sequence[str] = ("registration", "evaluation", "decision_key")

    def __init__(
        self,
        *,
        registration: Any,
        evaluation: Any,
        decision_key: str | None = None,
        response_timeout: timedelta = RESPONSE_TIMEOUT,
        ledger_conn_id: str = LedgerHook.default_conn_name,
        **kwargs: Any,
    ) -> None:
        # Airflow adds the Dag's params to ours, and shows only those that are the task's own.
        params = ParamsDict({"comment": Param("", type=["string", "null"], title="Comment", source="task")})
        params.update(kwargs.pop("params", None) or {})
        super().__init__(
            subject="Promote a model?",  # the names are known when it runs
            defaults=self.REJECT,
            response_timeout=response_timeout,
            params=params,
            **kwargs,
        )
        self.registration = registration
        self.evaluation = evaluation
        self.decision_key = decision_key
        self.ledger_conn_id = ledger_conn_id

    def execute(self, context: Context) -> dict[str, Any]:
        """Ask, then wait without a worker.

        :raises ValueError: ``decision_key`` names no retraining decision of this model.
        """
        # Before the question is composed: what comes into the ledger from now on is not in it.
        asked = self._asked()
        self.subject = f"Promote {asked['model_name']} version {asked['model_version']}?"
        self.body = self._question(asked["taken_back"])
        try:
            return dict(super().execute(context))
        except TaskAwaitingInput as waiting:
            waiting.kwargs = {**(waiting.kwargs or {}), "asked": asked}
            raise

    def execute_complete(
        self, context: Context, event: dict[str, Any], asked: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Write the answer down, then let what follows run, or skip it.

        :param asked: what the question was about. Airflow renders the arguments once more when the answer comes, and by then the tasks
            before this one may have been cleared and made another version, which nobody was shown.
        :returns: ``approved``, ``responded_by``, ``asked_at``, ``responded_at``, ``comment``, ``timed_out``, and of the question the
            model, version, package, champion, alias, ``taken_back`` and ``ledger_position``.
        """
        asked = asked or self._asked()
        answer = self._answer(event, asked) if "error" not in event else {}
        if answer:
            self.validate_chosen_options(event["chosen_options"])
            self.validate_params_input(event.get("params_input") or {})
            self._record(answer, asked, context)
        super().execute_complete(context, event)
        return answer

    def _asked(self) -> dict[str, Any]:
        """Say what the question is about, and what is known of it now."""
        name, alias = self.registration["model_name"], self.evaluation.get("champion_alias") or CHAMPION
        digest, key = self.registration["package_digest"], optional(self.decision_key)
        with LedgerHook(ledger_conn_id=self.ledger_conn_id).get_conn() as ledger:
            if key is not None:
                ledger.require_decision(key, name)
            moves = ledger.moves(name, alias)
        return {
            "model_name": name,
            "model_version": str(self.registration["model_version"]),
            "package_digest": digest,
            "champion_version": self.evaluation["champion_version"],
            "champion_alias": alias,
            "decision_key": key,
            "version_url": self.registration["version_url"],
            "asked_at": timezone.utcnow().isoformat(),
            "taken_back": _taken_back(moves, str(self.registration["model_version"]), digest),
            "ledger_position": moves[-1].entry_id if moves else 0,
        }

    def _question(self, taken_back: Mapping[str, Any] | None = None) -> str:
        """Compose the text from the evaluation."""
        from airflow_mlops.core.codec import from_dict
        from airflow_mlops.core.model.model_card import Change, describe_request

        registration = self.registration
        page, _, _ = registration["version_url"].rpartition("/")
        champion = self.evaluation["champion_version"]
        return describe_request(
            model_name=registration["model_name"],
            model_version=registration["model_version"],
            evaluation=self.evaluation,
            changes=[from_dict(Change, change) for change in registration.get("changes", ())],
            alias=self.evaluation.get("champion_alias") or CHAMPION,
            links={
                "This version": registration["version_url"],
                **({f"Champion, version {champion}": f"{page}/{champion}"} if champion else {}),
                "Model card": registration["card_url"],
                "Evaluation": self.evaluation.get("evaluation_url", ""),
            },
            taken_back=_told(taken_back) if taken_back else None,
        )

    def _answer(self, event: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
        user = event.get("responded_by_user") or {}
        return {
            "approved": event["chosen_options"] == [self.APPROVE] and bool(user),
            **{name: asked[name] for name in _OF_QUESTION},
            "responded_by": {"id": user["id"], "name": user["name"]} if user else None,
            "responded_at": event["responded_at"].isoformat(),
            "comment": (event.get("params_input") or {}).get("comment") or None,
            "timed_out": bool(event.get("timedout")) or not user,
        }

    def _record(self, answer: dict[str, Any], asked: Mapping[str, Any], context: Context) -> None:
        """Write who decided what; a no also closes the retraining decision."""
        from airflow_mlops.ledger import EntryKind, LedgerEntry

        name, version, alias = (answer[part] for part in ("model_name", "model_version", "champion_alias"))
        whose = f"version {version} of {name}" + (f" as {alias}" if alias != CHAMPION else "")
        who = answer["responded_by"]["name"] if answer["responded_by"] else "nobody"
        said = (
            f"nobody answered in time whether version {version} of {name} may become {alias}: no"
            if answer["timed_out"]
            else f"{who} {'approved' if answer['approved'] else 'rejected'} {whose}"
            + (f": {answer['comment']}" if answer["comment"] else "")
        )
        new = [
            LedgerEntry(
                kind=EntryKind.APPROVAL,
                key=f"{name}|{version}|{_question_id(context)}",
                model_name=name,
                window=None,
                subject=version,
                summary=said,
                payload={**answer, "asked_by": actor(context)},
                actor=actor(context) if answer["timed_out"] else who,
                recorded_at=timezone.utcnow(),
            )
        ]
        if not answer["approved"] and asked["decision_key"]:
            new.append(
                LedgerEntry(
                    kind=EntryKind.RETRAINING_OUTCOME,
                    key=asked["decision_key"],
                    model_name=name,
                    window=None,
                    subject=version,
                    summary=f"the retraining of {name} ended without a new champion: {said}",
                    payload={"outcome": "rejected", "reason": said, "model_version": version},
                    actor=actor(context),
                    recorded_at=timezone.utcnow(),
                )
            )
        self.log.info("%s", said)
        with LedgerHook(ledger_conn_id=self.ledger_conn_id).get_conn() as ledger:
            ledger.record_all(new)
        self.found_links = {str(ModelVersionLink.name): asked["version_url"]}


def _taken_back(moves: Sequence[LedgerEntry], version: str, package_digest: str) -> dict[str, Any] | None:
    """Find who took this very package back and why; nothing, once it came back."""
    from airflow_mlops.ledger.aliases import standing_rollback

    back = standing_rollback(moves, version, package_digest)
    if back is None:
        return None
    return {
        "model_version": str(back.payload["previous_version"]),
        "actor": back.actor,
        "at": back.recorded_at.isoformat(),
        "reason": back.payload.get("reason"),
    }


def _told(taken_back: Mapping[str, Any]) -> str:
    at = datetime.fromisoformat(taken_back["at"])
    return (
        f"{taken_back['actor']} took version {taken_back['model_version']}, which is this package, back at "
        f"{at:%Y-%m-%d %H:%M} UTC: {taken_back['reason'] or 'no reason was given'}"
    )


def _question_id(context: Context) -> str:
    """Name one question: a task that is cleared or tried again asks anew. Short, as a ledger's key has an end."""
    instance = context["ti"]
    told = f"{actor(context)}|{instance.map_index}|{instance.try_number}"
    return hashlib.sha256(told.encode()).hexdigest()[:32]
