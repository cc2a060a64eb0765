"""Incidents: one per model and cause, told when it opens, when it gets worse, and when it is over."""

from __future__ import annotations

import hashlib
import html
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from typing import Any

from airflow_mlops.core.windows import Window


class Cause(StrEnum):
    """What is wrong; a model has at most one open incident of each."""

    PERFORMANCE = "performance"
    ESTIMATE = "estimate"
    INPUTS = "inputs"
    LABELS = "labels"
    REJECTED_RETRAININGS = "rejected_retrainings"
    UNFINISHED_RETRAINING = "unfinished_retraining"
    DEPLOYMENT = "deployment"


class EventKind(StrEnum):
    """What there is to tell of an incident."""

    OPENED = "opened"
    WORSENED = "worsened"
    REMINDED = "reminded"
    RECOVERED = "recovered"


#: What is said of a cause while it lasts, and when it is over.
_WORDS = {
    Cause.PERFORMANCE: ("realized performance is degraded", "realized performance is good again"),
    Cause.ESTIMATE: (
        "performance is estimated to be degraded",
        "performance is no longer estimated to be degraded",
    ),
    Cause.INPUTS: ("inputs drifted", "inputs no longer drift"),
    Cause.LABELS: ("labels are overdue", "labels are no longer overdue"),
    Cause.REJECTED_RETRAININGS: (
        "retrainings end without a new champion",
        "a retraining gave a new champion",
    ),
    Cause.UNFINISHED_RETRAINING: ("a retraining does not get done", "the retraining is done"),
    Cause.DEPLOYMENT: ("a promoted version does not serve", "the promoted version is no longer awaited"),
}

#: How loud, in PagerDuty's words: what users feel is an error, what they may come to feel a warning.
_SEVERITIES = {
    Cause.PERFORMANCE: "error",
    Cause.ESTIMATE: "warning",
    Cause.INPUTS: "warning",
    Cause.LABELS: "warning",
    Cause.REJECTED_RETRAININGS: "warning",
    Cause.UNFINISHED_RETRAINING: "error",
    Cause.DEPLOYMENT: "error",
}

#: Causes that scatter from window to window, so that one clean window is no recovery yet.
_SCATTERING = frozenset({Cause.PERFORMANCE, Cause.ESTIMATE, Cause.INPUTS})

#: Windows of one schedule differ in length, as a weekend from a day; those of two schedules by more.
_AS_LONG = 1 / 3

#: Characters of a reason that are told; all of it is in the ledger's entry of the check.
_MAX_REASON = 1000

#: PagerDuty takes this many characters as the name of an alert.
_MAX_INCIDENT = 250


@dataclass(frozen=True, kw_only=True, slots=True)
class IncidentPolicy:
    """When something is told.

    :param causes: what incidents are made of.
    :param clean_windows: so many measured windows in a row have to be clean before degraded or drifted is over. They end after
        the bad one, and one that is shorter than a third of it counts by its length: two clean hours say little about a bad day.
    :param worse_factor: an open incident is told again when its level is so many times the worst that was told, and
    :param worse_by: higher by this much (rules of thumb, both). Levels are relative worsening, share of drifted inputs, or a count.
    :param reminder_days: an incident nothing new is told of is brought to mind by a bad window that ends so much later, in days,
    :param reminder_windows: and at least so many windows later.
    :param labels_overdue_days: labels are overdue so long after the window's first check, in days.
    :param failed_retrainings: so many retrainings in a row without a new champion are an incident.
    :param unfinished_days: a retraining, or the deployment it earned, should be done after this time, in days.
    """

    causes: tuple[Cause, ...] = tuple(Cause)
    clean_windows: int = 2
    worse_factor: float = 1.5
    worse_by: float = 0.1
    reminder_days: float = 7.0
    reminder_windows: int = 3
    labels_overdue_days: float = 14.0
    failed_retrainings: int = 3
    unfinished_days: float = 2.0

    def __post_init__(self) -> None:
        if min(self.clean_windows, self.reminder_windows, self.failed_retrainings) < 1:
            raise ValueError(
                "clean_windows, reminder_windows and failed_retrainings are counts: at least 1 is needed"
            )
        for name in ("reminder_days", "labels_overdue_days", "unfinished_days"):
            if not getattr(self, name) >= 0.0:
                raise ValueError(f"{name}={getattr(self, name):g} is no time: at least 0 days are needed")
        if not (self.worse_factor >= 1.0 and self.worse_by >= 0.0):
            raise ValueError(
                f"worse_factor={self.worse_factor:g} must be at least 1 and worse_by={self.worse_by:g} not below 0: "
                "less would be told as worse"
            )

    def clean_needed(self, cause: Cause) -> int:
        """Give how many clean windows in a row end an incident."""
        return self.clean_windows if cause in _SCATTERING else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What is known of one cause in one window; where nothing was measured there is no finding.

    :param bad: whether the window shows the cause.
    :param level: how bad, comparable within a cause; ``None``: there is no such thing.
    :param reason: a sentence.
    :param links: addresses to look at, by label.
    :param found_by: who found it: ``dag_id/dag_run_id/task_id``.
    """

    cause: Cause
    window: Window
    bad: bool
    reason: str
    level: float | None = None
    links: dict[str, str] = field(default_factory=dict)
    found_by: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class IncidentEvent:
    """One step of an incident's story.

    :param number: position among the events of this model and cause, from 1: two writers can't both write the next one.
    :param incident: names the incident in all its events.
    :param window: the window that shows it.
    :param opened: the window that opened the incident.
    :param worst: highest level that was told.
    :param title: what happened, in a line.
    :param reason: what was found, in a sentence.
    """

    model_name: str
    cause: Cause
    number: int
    incident: str
    kind: EventKind
    window: Window
    opened: Window
    worst: float | None
    title: str
    reason: str
    links: dict[str, str] = field(default_factory=dict)
    found_by: str = ""

    @property
    def key(self) -> str:
        """Name the event: model, cause, number."""
        return f"{self.model_name}|{self.cause}|{self.number}"

    @property
    def is_open(self) -> bool:
        """Whether the incident goes on after this event."""
        return self.kind is not EventKind.RECOVERED


def next_events(
    model_name: str,
    cause: Cause,
    findings: Iterable[Finding],
    story: Sequence[IncidentEvent],
    policy: IncidentPolicy,
) -> list[IncidentEvent]:
    """Tell what a cause's findings add to its story so far.

    The story goes forward only. A bad window is told when it is newer than all that was told, so a window is told once at most,
    in whatever order windows arrive; an older one that arrives late, or turns bad later, is no news. A window whose verdict
    turned counts as it stands now, so what a late label takes back is taken back.

    :param findings: what is known, in any order; of several for a window the last counts.
    :param story: the events so far, oldest first.
    :returns: new events, oldest first; none when they were all told.

    >>> from datetime import datetime
    >>> days = [Window(start=datetime(2024, 1, day), end=datetime(2024, 1, day + 1)) for day in (1, 2, 3, 4)]
    >>> verdicts = zip(days, (True, True, False, False), strict=True)
    >>> found = [Finding(cause=Cause.INPUTS, window=day, bad=bad, reason="x") for day, bad in verdicts]
    >>> [f"{event.kind} {event.window}" for event in next_events("fare", Cause.INPUTS, found, [], IncidentPolicy())]
    ['opened [2024-01-01, 2024-01-02)', 'recovered [2024-01-04, 2024-01-05)']
    """
    known = {finding.window: finding for finding in findings if finding.cause is cause}
    told = list(story)
    seen: list[Finding] = []  # since the newest event, from its own window on
    for window in sorted(known):
        last = told[-1] if told else None
        if last is not None and window < last.window:
            continue
        seen.append(known[window])
        kind = _kind(cause, last, seen, policy)
        if kind is not None:
            told.append(_event(model_name, kind, last, known[window], policy))
            seen = [known[window]]
    return told[len(story) :]


def _kind(
    cause: Cause, last: IncidentEvent | None, seen: Sequence[Finding], policy: IncidentPolicy
) -> EventKind | None:
    """Decide what the newest finding is worth telling as."""
    finding = seen[-1]
    is_news = last is None or finding.window > last.window
    if last is None or not last.is_open:
        return EventKind.OPENED if finding.bad and is_news else None
    if not finding.bad:
        return EventKind.RECOVERED if _is_over(last, seen, policy.clean_needed(cause)) else None
    if not is_news:
        return None
    if _worse(finding.level, last.worst, policy):
        return EventKind.WORSENED
    days = (finding.window.end - last.window.end) / timedelta(days=1)
    since = sum(item.window > last.window for item in seen)
    due = days >= policy.reminder_days and since >= policy.reminder_windows
    return EventKind.REMINDED if due else None


def _is_over(last: IncidentEvent, seen: Sequence[Finding], needed: int) -> bool:
    """Tell whether enough clean windows follow the newest bad one."""
    clean = list(itertools.takewhile(lambda item: not item.bad, reversed(seen)))
    if len(clean) == len(
        seen
    ):  # the bad one has turned clean since, or so many have followed that it is no longer looked at
        return len(clean) >= needed
    bad = seen[-len(clean) - 1].window
    longest = max(last.opened.days, bad.days)
    after = (item.window for item in clean if item.window.end > bad.end)
    counted = sum(1.0 if one.days >= longest * _AS_LONG else one.days / longest for one in after)
    return counted > needed - 1e-9


def _worse(level: float | None, worst: float | None, policy: IncidentPolicy) -> bool:
    if level is None or worst is None:
        return False
    return level >= worst * policy.worse_factor and level - worst >= policy.worse_by


def _event(
    model_name: str,
    kind: EventKind,
    last: IncidentEvent | None,
    finding: Finding,
    policy: IncidentPolicy,
) -> IncidentEvent:
    is_new = kind is EventKind.OPENED or last is None
    opened = finding.window if is_new or last is None else last.opened
    worst = finding.level
    if not is_new and last is not None and last.worst is not None:
        worst = max(last.worst, finding.level or 0.0) if finding.bad else last.worst
    lasts, over = _WORDS[finding.cause]
    said = {
        EventKind.OPENED: lasts,
        EventKind.WORSENED: f"{lasts}, and it got worse",
        EventKind.REMINDED: f"{lasts}, still",
        EventKind.RECOVERED: over,
    }[kind]
    return IncidentEvent(
        model_name=model_name,
        cause=finding.cause,
        number=(last.number if last else 0) + 1,
        incident=_incident(model_name, finding.cause, opened),
        kind=kind,
        window=finding.window,
        opened=opened,
        worst=worst,
        title=f"{model_name}: {said}",
        reason=_reason(kind, finding, policy),
        links=dict(finding.links),
        found_by=finding.found_by,
    )


def _reason(kind: EventKind, finding: Finding, policy: IncidentPolicy) -> str:
    """Say what was found; of a recovery also by which rule."""
    needed = policy.clean_needed(finding.cause)
    where = str(finding.window)
    if kind is EventKind.RECOVERED and needed > 1:
        where = f"{needed} measured windows in a row are clean, the newest {where}"
    text = f"{where}: {finding.reason}"
    return text if len(text) <= _MAX_REASON else f"{text[: _MAX_REASON - 1]}…"


def _incident(model_name: str, cause: Cause, opened: Window) -> str:
    """Name an incident. A window opens one at most, so this is unique, and the same for whoever works it out."""
    name = f"{model_name}|{cause}|{opened.key}"
    if len(name) <= _MAX_INCIDENT:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return f"{model_name[:100]}|{cause}|{opened.key}|{digest}"


def untold(events: Iterable[IncidentEvent], told: Collection[str]) -> list[IncidentEvent]:
    """Give what somebody has to be told: of each incident the newest event, once.

    Who was away hears where things stand, not every step that led there; of an incident that came and went meanwhile, nothing.

    :param events: all events, oldest first.
    :param told: keys of those that were told before.
    """
    newest: dict[str, IncidentEvent] = {}
    heard_of = set()
    for event in events:
        newest.pop(event.incident, None)
        if event.key in told:
            heard_of.add(event.incident)
        else:
            newest[event.incident] = event
    return [event for event in newest.values() if event.is_open or event.incident in heard_of]


def open_incidents(events: Iterable[IncidentEvent]) -> list[IncidentEvent]:
    """Give the newest event of every incident that is open.

    :param events: all events, oldest first.
    """
    newest = {event.cause: event for event in events}
    return [event for event in newest.values() if event.is_open]


def compose_message(event: IncidentEvent, links: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Give what a channel's templates find under ``incident``.

    :param links: addresses to add, by label; empty ones are left out.
    :returns: ``title``, ``text``, ``html`` and ``slack`` (escaped as each needs it), ``severity``, ``action`` (``trigger`` or
        ``resolve``), ``dedup_key``, ``kind``, ``cause``, ``model_name``, ``window``, ``since``, ``reason``, ``links``.
    """
    named = {label: url for label, url in {**event.links, **(links or {})}.items() if url}
    since = f"{event.opened.start:%Y-%m-%d %H:%M} UTC"
    lines = [_sentence(event.reason)]
    if event.kind is not EventKind.OPENED:
        lines.append(f"It {'was' if event.kind is EventKind.RECOVERED else 'is'} so since {since}.")
    if event.found_by:
        lines.append(f"Found by {event.found_by}.")
    plain = [event.title, *lines, *(f"{label}: {url}" for label, url in named.items())]
    anchors = [
        f'<a href="{html.escape(url, quote=True)}">{html.escape(label)}</a>' for label, url in named.items()
    ]
    paragraphs = [f"<b>{html.escape(event.title)}</b>", *map(html.escape, lines), *anchors]
    return {
        "title": event.title,
        "text": "\n".join(plain),
        "html": "".join(f"<p>{item}</p>" for item in paragraphs),
        "slack": "\n".join(
            [
                f"*{_slack(event.title)}*",
                *map(_slack, lines),
                " · ".join(f"<{_slack(url)}|{_slack(label)}>" for label, url in named.items()),
            ]
        ).strip(),
        "severity": _SEVERITIES[event.cause] if event.is_open else "info",
        "action": "trigger" if event.is_open else "resolve",
        "dedup_key": event.incident,
        "kind": str(event.kind),
        "cause": str(event.cause),
        "model_name": event.model_name,
        "window": str(event.window),
        "since": since,
        "reason": event.reason,
        "links": named,
    }


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _slack(text: str) -> str:
    """Escape what Slack's markup reads as its own."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
