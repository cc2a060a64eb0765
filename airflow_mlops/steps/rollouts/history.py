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
    :param request: names the run of a task that asks, so that its retries are known from a new request; empty: all are new ones.
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
        request: str = "",
    ) -> None:
        self.ledger, self.name, self.request = ledger, name, request
        self.model_name, self.model_version = model_name, model_version
        self.strategy, self.endpoint, self.actor = strategy, endpoint, actor
        self.attempt = 1
        self.events: list[RolloutEvent] = []
        self._last_request = ""

    @property
    def state(self) -> RolloutState:
        """Where the attempt stands."""
        return state_after(self.events)

    @property
    def was_judged(self) -> bool:
        """Whether a look ended the attempt, and this very request had asked for it: whoever tries it again learns what it came to."""
        judged = any(event.what == "looked" and event.then == "roll_back" for event in self.events)
        return self.is_own and judged

    @property
    def is_own(self) -> bool:
        """Whether the request that asks now had asked for the attempt before."""
        return bool(self.request) and self.request == self._last_request

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
        attempt = [payload for payload in mine if payload["attempt"] == self.attempt]
        self.events = [from_dict(RolloutEvent, payload["event"]) for payload in attempt]
        self._last_request = attempt[-1].get("request", "") if attempt else ""

    def begin_again(self) -> None:
        """Begin another attempt; nothing of it is in the ledger yet."""
        self.attempt, self.events, self._last_request = self.attempt + 1, [], ""

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
                    "request": self.request,
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
        self._last_request = self.request
        log.info("%s", summary)


def version_of_request(ledger: Ledger, *, name: str, model_name: str, request: str) -> str | None:
    """Give the version that a former try of the same request rolled out, where it is not through or a look has judged it.

    An alias may have moved since: it does once such a version is taken back.
    """
    entries = ledger.entries(kind=EntryKind.ROLLOUT, model_name=model_name, limit=1_000)
    newest = next(
        (
            entry
            for entry in entries
            if entry.payload["rollout"] == name and entry.payload.get("request") == request
        ),
        None,
    )
    if newest is None or newest.subject is None:
        return None
    history = RolloutHistory(
        ledger,
        name=name,
        model_name=model_name,
        model_version=newest.subject,
        strategy=newest.payload["strategy"],
        endpoint=newest.payload["endpoint"],
        actor=newest.actor,
        request=request,
    )
    history.read()
    return newest.subject if history.state.status == "running" or history.was_judged else None
