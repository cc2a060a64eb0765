"""Tell people of a model's incidents, through any of Airflow's notifiers, once each."""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING, Any, cast

from airflow.sdk import BaseNotifier, timezone

from airflow_mlops.exceptions import NotificationError
from airflow_mlops.hooks.ledger import LedgerHook

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from airflow.sdk import Context

    from airflow_mlops.core.monitoring.incidents import IncidentEvent

#: Characters of a channel's complaint that are shown.
_SHOWN = 300
#: Seconds that a channel may fail for in a run: one that is down would be waited for with every message, while one that refuses
#: a message says so at once, and takes the others.
_PATIENCE_SECONDS = 10.0


class IncidentNotifier(BaseNotifier):
    """Tell each channel the incident events it has not been told yet.

    What to tell stands in the ledger, written by :class:`~airflow_mlops.operators.incidents.UpdateIncidentsOperator`; so does who
    was told what, after the channel took it. A channel that is down keeps nobody else from hearing, and hears later; a message
    that a channel refuses keeps it from no other. A process that dies between sending and writing sends again: at least once, and
    a channel with a dedup key shows it once.

    A channel is any notifier. Its templates find the event as ``incident``: see
    :func:`~airflow_mlops.core.monitoring.incidents.compose_message`, and :mod:`airflow_mlops.notifiers.channels` for ready ones.

    :param model_name: registered model. (templated)
    :param channels: notifiers by name. Under this name the ledger remembers what a channel was told: a new name is told all that
        is open.
    :param causes: by channel, what it is told of; default everything.
    :param ledger_conn_id: connection of the ledger.
    """

    template_fields: Sequence[str] = ("model_name",)

    def __init__(
        self,
        *,
        model_name: str,
        channels: Mapping[str, BaseNotifier],
        causes: Mapping[str, Sequence[str]] | None = None,
        ledger_conn_id: str = LedgerHook.default_conn_name,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.model_name = model_name
        self.channels = channels
        self.causes = causes
        self.ledger_conn_id = ledger_conn_id

    def notify(self, context: Context) -> None:
        """Tell what is untold.

        :raises NotificationError: naming the channels that could not be told; the others were.
        """
        failed: dict[str, Exception] = {}
        for name, events in self._untold().items():
            patience = _PATIENCE_SECONDS
            for event in events:
                began = time.monotonic()
                channel, told = self._prepared(name, event, context)
                try:
                    channel(told)
                except Exception as err:  # noqa: BLE001 - whatever a channel raises, the others are told
                    failed.setdefault(name, err)
                    patience -= time.monotonic() - began
                    if patience <= 0.0:
                        break
                    continue
                self._record(name, event, context)
        self._require_all_told(failed)

    async def async_notify(self, context: Context) -> None:
        """Tell what is untold, off the event loop where a channel or the ledger would block it.

        :raises NotificationError: naming the channels that could not be told; the others were.
        """
        from asgiref.sync import sync_to_async

        failed: dict[str, Exception] = {}
        untold = await sync_to_async(self._untold)()
        for name, events in untold.items():
            patience = _PATIENCE_SECONDS
            for event in events:
                began = time.monotonic()
                channel, told = self._prepared(name, event, context)
                try:
                    if type(channel).async_notify is BaseNotifier.async_notify:
                        await sync_to_async(channel)(told)
                    else:
                        channel.context = cast("Context", told)
                        await channel
                except Exception as err:  # noqa: BLE001 - whatever a channel raises, the others are told
                    failed.setdefault(name, err)
                    patience -= time.monotonic() - began
                    if patience <= 0.0:
                        break
                    continue
                await sync_to_async(self._record)(name, event, context)
        self._require_all_told(failed)

    def _untold(self) -> dict[str, list[IncidentEvent]]:
        """Read from the ledger what each channel has to be told.

        :raises ValueError: a cause, or a channel that is to be told of some, is not there.
        """
        from airflow_mlops.core.monitoring.incidents import Cause, untold
        from airflow_mlops.ledger import EntryKind
        from airflow_mlops.steps.incidents import read_story

        causes = {name: [Cause(cause) for cause in chosen] for name, chosen in (self.causes or {}).items()}
        unknown = sorted(set(causes) - set(self.channels))
        if unknown:
            raise ValueError(
                f"causes names {', '.join(unknown)}, channels has {', '.join(sorted(self.channels))}: use the same names"
            )
        found = {}
        with LedgerHook(ledger_conn_id=self.ledger_conn_id).get_conn() as ledger:
            story = read_story(ledger, self.model_name)
            for name in self.channels:
                told = ledger.entries(
                    kind=EntryKind.NOTIFICATION, model_name=self.model_name, subject=name, limit=len(story)
                )
                chosen = [event for event in story if event.cause in causes.get(name, [*Cause])]
                found[name] = untold(chosen, {str(entry.payload["event"]) for entry in told})
        return found

    def _prepared(
        self, name: str, event: IncidentEvent, context: Context
    ) -> tuple[BaseNotifier, dict[str, Any]]:
        """Give a copy of the channel, since rendering writes into it, and the context it renders with."""
        from airflow_mlops.core.monitoring.incidents import compose_message

        told: dict[str, Any] = dict(context)
        told["incident"] = compose_message(event, {"Airflow run": getattr(told.get("ti"), "log_url", "")})
        return copy.copy(self.channels[name]), told

    def _record(self, name: str, event: IncidentEvent, context: Context) -> None:
        """Write down that a channel was told."""
        from airflow_mlops.ledger import EntryKind, LedgerEntry

        with LedgerHook(ledger_conn_id=self.ledger_conn_id).get_conn() as ledger:
            ledger.record(
                LedgerEntry(
                    kind=EntryKind.NOTIFICATION,
                    key=f"{event.key}|{name}",
                    model_name=self.model_name,
                    window=None,
                    subject=name,
                    summary=f"{name} was told: {event.title}",
                    payload={"event": event.key, "incident": event.incident, "kind": str(event.kind)},
                    actor=_actor(context),
                    recorded_at=timezone.utcnow(),
                )
            )
        self.log.info("told %s: %s", name, event.title)

    def _require_all_told(self, failed: Mapping[str, Exception]) -> None:
        if not failed:
            return
        complaints = "; ".join(
            f"{name}: {type(err).__name__}: {' '.join(str(err).split())[:_SHOWN]}"
            for name, err in failed.items()
        )
        others = [name for name in self.channels if name not in failed]
        reached = f"{', '.join(others)} heard all there was" if others else "no channel heard all there was"
        raise NotificationError(
            f"incidents of {self.model_name} could not be told to {complaints}. {reached}; see that the channel answers and its "
            "connection is right, a retry tells only what is missing"
        ) from next(iter(failed.values()))


def _actor(context: Context) -> str:
    """Name who tells: a task, or, in a callback of a Dag, its run."""
    who: Any = context.get("ti") or context.get("dag_run")
    parts = [getattr(who, name, None) for name in ("dag_id", "run_id", "task_id")]
    return "/".join(str(part) for part in parts if part) or "a callback"
