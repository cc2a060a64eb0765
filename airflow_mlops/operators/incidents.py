"""Keep a model's incidents up to date, and tell people what is new."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.sdk import timezone

from airflow_mlops.notifiers.incidents import IncidentNotifier
from airflow_mlops.operators.base import StepOperator, actor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from airflow.sdk import BaseNotifier, Context


class UpdateIncidentsOperator(StepOperator):
    """Read what the checks and retrainings of a model found, open, update or close its incidents, and tell each channel once.

    It works from the ledger: a retry, a second run or a second scheduler finds what was written and adds nothing. What was found
    is written before anybody is told, and a channel that is down fails the task after the others were told; its retry tells only
    what is missing.

    :param model_name: registered model. (templated)
    :param policy: parameters of :class:`~airflow_mlops.core.monitoring.incidents.IncidentPolicy`. (templated)
    :param channels: Airflow notifiers by name; see :class:`~airflow_mlops.notifiers.incidents.IncidentNotifier`. Without any the
        incidents are only written down.
    :param causes: by channel, what it is told of; default everything.
    """

    step = "incidents"
    needs = frozenset({"ledger"})
    template_fields: Sequence[str] = ("model_name", "policy")

    def __init__(
        self,
        *,
        model_name: str,
        policy: Mapping[str, Any] | None = None,
        channels: Mapping[str, BaseNotifier] | None = None,
        causes: Mapping[str, Sequence[str]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.model_name = model_name
        self.policy = policy
        self.channels = channels
        self.causes = causes

    def build_spec(self, context: Context) -> dict[str, Any]:
        """Give an :class:`~airflow_mlops.steps.incidents.IncidentsSpec`."""
        return {
            "model_name": self.model_name,
            "policy": dict(self.policy or {}),
            "actor": actor(context),
            "now": timezone.utcnow().isoformat(),
        }

    def record(self, result: dict[str, Any], context: Context) -> None:
        """Log what is new, then tell the channels; the ledger was written by the step.

        :raises NotificationError: a channel could not be told.
        """
        for event in result["events"]:
            self.log.info("%s: %s: %s", event["kind"], event["title"], event["reason"])
        self.log.info("%s", result["headline"])
        self.fill_outlets(context, {name: result[name] for name in ("headline", "event_count")})
        if self.channels:
            IncidentNotifier(
                model_name=self.model_name,
                channels=self.channels,
                causes=self.causes,
                ledger_conn_id=self.ledger_conn_id,
            ).notify(context)
