"""History of a rollout: its attempts and their events, in the ledger."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Any

from airflow_mlops.core.codec import from_dict, to_dict
from airflow_mlops.core.rollouts.rollout import RolloutEvent, RolloutState, state_after
from airflow_mlops.exceptions import RolloutError
from airflow_mlops.ledger import EntryKind, Ledger, LedgerEntry

log = logging.getLogger(__name__)


class RolloutHistory:
    """What became of a rollout so far: the events of its newest attempt.

    :param ledger: where it is written down.
    :param name: of the rollout.
    :param model_name: registered model.
    :param model_version: that is rolled out.
    :param strategy: of the plan.
    :param endpoint: address of the service.
    :param actor: who rolls out.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        name: str,
        model_name: str,
        model_version: str,
        strategy: str,
        endpoint: str,
        actor: str,
    ) -> None:
        self.ledger, self.name = ledger, name
        self.model_name, self.model_version = model_name, model_version
        self.strategy, self.endpoint, self.actor = strategy, endpoint, actor
        self.attempt = 1
        self.events: list[RolloutEvent] = []

    @property
    def state(self) -> RolloutState:
        """Where the attempt stands."""
        return state_after(self.events)

    def read(self) -> None:
        """Take the newest attempt from the ledger."""
        entries = self.ledger.entries(
            kind=EntryKind.ROLLOUT,
            model_name=self.model_name,
            subject=self.model_version,
            limit=1_000,
        )
        mine = [entry.payload for entry in reversed(entries) if entry.payload["rollout"] == self.name]
        self.attempt = max((int(payload["attempt"]) for payload in mine), default=1)
        self.events = [
            from_dict(RolloutEvent, payload["event"])
            for payload in mine
            if payload["attempt"] == self.attempt
        ]

    def begin_again(self) -> None:
        """Begin another attempt; nothing of it is in the ledger yet."""
        self.attempt, self.events = self.attempt + 1, []

    def write(self, what: Any, *, summary: str, **facts: Any) -> None:
        """Add an event.

        :param what: happened.
        :param summary: it as a sentence.
        :param facts: more fields of the event.
        :raises RolloutError: somebody else wrote another one meanwhile.
        """
        event = RolloutEvent(number=self.state.events + 1, what=what, at=datetime.now(UTC), **facts)
        recorded = self.ledger.record(
            LedgerEntry(
                kind=EntryKind.ROLLOUT,
                key=f"{self.name}|{self.model_version}|{self.attempt}|{event.number}",
                model_name=self.model_name,
                window=None,
                subject=self.model_version,
                summary=summary,
                payload={
                    "rollout": self.name,
                    "attempt": self.attempt,
                    "strategy": self.strategy,
                    "endpoint": self.endpoint,
                    "event": to_dict(event),
                },
                actor=self.actor,
                recorded_at=event.at,
            )
        )
        if not recorded.created and recorded.entry.payload["event"] != to_dict(event):
            raise RolloutError(f"somebody else is carrying out rollout {self.name}: {recorded.entry.summary}")
        self.events.append(event)
        log.info("%s", summary)
