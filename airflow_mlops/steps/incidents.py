"""Incidents: read what the checks and retrainings of a model found, and write down what is news, once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.codec import from_dict, to_dict
from airflow_mlops.core.monitoring.incident_findings import (
    Retraining,
    count_overdue,
    finding_of_drift,
    findings_of_grade,
    findings_of_retrainings,
)
from airflow_mlops.core.monitoring.incidents import (
    Cause,
    Finding,
    IncidentEvent,
    IncidentPolicy,
    next_events,
    open_incidents,
)
from airflow_mlops.ledger import ACTING, EntryKind, Ledger, LedgerEntry
from airflow_mlops.steps.base import Step

if TYPE_CHECKING:
    from airflow_mlops.services import Services

#: Windows that are looked back on. Who comes later than that is told where things stand, not what happened before.
LOOK_BACK = 100
#: Decisions to retrain that are looked back on.
_RETRAININGS = 30
#: More events than any model has: all are read, since the newest may belong to another cause.
_EVENTS = 100_000
#: New events in the result; the ledger has them all.
_SHOWN = 10
#: Who loses a race reads again what the winner wrote. Somebody wins every round, so this ends long before.
_ROUNDS = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class IncidentsSpec:
    """Whose incidents to bring up to date.

    :param model_name: registered model.
    :param policy: when something is told.
    :param alias: the alias that retrainings move.
    :param actor: who does.
    :param now: time of the look.
    """

    model_name: str
    policy: IncidentPolicy = field(default_factory=IncidentPolicy)
    alias: str = "champion"
    actor: str
    now: datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class IncidentsResult:
    """What is new, and what is open.

    :param headline: both in a line.
    :param events: the newest 10 of the events this call wrote, oldest first.
    :param event_count: how many it wrote.
    :param open: the newest event of every open incident.
    """

    model_name: str
    headline: str
    events: tuple[dict[str, Any], ...] = ()
    event_count: int = 0
    open: tuple[dict[str, Any], ...] = ()


def run(spec: IncidentsSpec, services: Services) -> IncidentsResult:
    """Write what is news to the ledger; what somebody else wrote first stands, and what follows from it is worked out again."""
    written: list[IncidentEvent] = []
    with Ledger.open(services.require("ledger_url")) as ledger:
        findings = collect_findings(ledger, spec)
        for cause in spec.policy.causes:
            written += _bring_up_to_date(ledger, spec, cause, findings)
        standing = open_incidents(read_story(ledger, spec.model_name))
    told = "; ".join(event.title for event in written[-3:]) or "nothing new"
    return IncidentsResult(
        model_name=spec.model_name,
        headline=f"{told}; {len(standing)} open",
        events=tuple(to_dict(event) for event in written[-_SHOWN:]),
        event_count=len(written),
        open=tuple(to_dict(event) for event in standing),
    )


def read_story(ledger: Ledger, model_name: str, cause: Cause | None = None) -> list[IncidentEvent]:
    """Give a model's events, oldest first.

    :param cause: only those of this one.
    """
    entries = ledger.entries(
        kind=EntryKind.INCIDENT, model_name=model_name, subject=cause, limit=_EVENTS, newest_first=False
    )
    return [from_dict(IncidentEvent, entry.payload) for entry in entries]


def _bring_up_to_date(
    ledger: Ledger, spec: IncidentsSpec, cause: Cause, findings: list[Finding]
) -> list[IncidentEvent]:
    """Write a cause's new events one by one; each has a number that only one writer gets."""
    written: list[IncidentEvent] = []
    for _ in range(_ROUNDS):
        story = read_story(ledger, spec.model_name, cause)
        new = next_events(spec.model_name, cause, findings, story, spec.policy)
        for event in new:
            if not ledger.record(_entry(spec, event)).created:
                break
            written.append(event)
        else:
            break
    return written


def _entry(spec: IncidentsSpec, event: IncidentEvent) -> LedgerEntry:
    return LedgerEntry(
        kind=EntryKind.INCIDENT,
        key=event.key,
        model_name=spec.model_name,
        window=event.window,
        subject=str(event.cause),
        summary=f"{event.title}: {event.reason}",
        payload=to_dict(event),
        actor=spec.actor,
        recorded_at=spec.now,
    )


def collect_findings(ledger: Ledger, spec: IncidentsSpec) -> list[Finding]:
    """Read the ledger: the check of each window that stands, and the newest decisions to retrain."""
    pages: dict[str, str | None] = {}
    found: list[Finding] = []
    newest = ledger.grades(spec.model_name, limit=LOOK_BACK)
    # Labels are overdue after days, and in those there may be any number of windows.
    waiting = ledger.unfinished_grades(spec.model_name, before=spec.now)
    labelled = ledger.grades(spec.model_name, measured=True, limit=LOOK_BACK)
    by_window = {grade.window: grade for grade in (*waiting, *labelled, *newest)}
    looked_back_on = {grade.window for grade in newest}
    for window, grade in sorted(by_window.items()):
        waited = (spec.now - grade.first_checked_at) / timedelta(days=1)
        links = _version_link(ledger, spec.model_name, grade.entry.subject, pages)
        found += [
            replace(finding, links=links, found_by=grade.entry.actor)
            for finding in findings_of_grade(
                window, grade.entry.payload, waited_days=waited, policy=spec.policy
            )
            if finding.cause is Cause.LABELS or window in looked_back_on
        ]
    overdue = [finding for finding in found if finding.cause is Cause.LABELS]
    found = [finding for finding in found if finding.cause is not Cause.LABELS]
    checks = ledger.entries(kind=EntryKind.DRIFT_CHECK, model_name=spec.model_name, limit=2 * LOOK_BACK)
    found += [  # the newest check of a window comes last, and counts
        replace(finding_of_drift(check.window, check.payload), found_by=check.actor)
        for check in reversed(checks)
        if check.window is not None
    ]
    return [
        *found,
        *count_overdue(overdue),
        *findings_of_retrainings(_retrainings(ledger, spec), spec.policy),
    ]


def _version_link(
    ledger: Ledger, model_name: str, version: str | None, pages: dict[str, str | None]
) -> dict[str, str]:
    """Give the page of a version in MLflow, where its registration is in the ledger.

    :param pages: what was looked up before.
    """
    if version is None:
        return {}
    if version not in pages:
        registered = ledger.entries(
            kind=EntryKind.REGISTRATION, model_name=model_name, subject=version, limit=1
        )
        pages[version] = registered[0].payload.get("version_url") if registered else None
    url = pages[version]
    return {f"Version {version}": url} if url else {}


def _retrainings(ledger: Ledger, spec: IncidentsSpec) -> list[Retraining]:
    """Give the newest decisions to retrain with what became of them."""
    decisions = ledger.retrainings(spec.model_name, outcomes=ACTING, limit=_RETRAININGS)
    current = ledger.aliases(spec.model_name).get(spec.alias)
    found = []
    for position, decision in enumerate(decisions):
        if decision.window is None:
            continue
        outcome = ledger.find(EntryKind.RETRAINING_OUTCOME, decision.key)
        promotion = ledger.promotion_for(decision)
        newest = outcome or promotion or decision
        found.append(
            Retraining(
                window=decision.window,
                outcome=str(outcome.payload["outcome"]) if outcome else None,
                reason=str(newest.payload["reason"]),
                promoted_version=str(promotion.payload["model_version"]) if promotion else None,
                current_version=current,
                waited_days=(spec.now - newest.recorded_at) / timedelta(days=1),
                superseded=position > 0,
                found_by=newest.actor,
            )
        )
    return found


STEP = Step(name="incidents", spec=IncidentsSpec, result=IncidentsResult, run=run)
