"""What happened to a model, window by window, and how all models stand: typed answers for a page, a command, a notebook."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from datetime import datetime
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from airflow_mlops.core.comparison.metrics import resolve_metric
from airflow_mlops.core.windows import Window
from airflow_mlops.ledger.entries import ACTING, EntryKind
from airflow_mlops.ledger.tables import aliases, entries
from airflow_mlops.ledger.timeline_values import (
    ColumnShift,
    ContenderLoss,
    EstimatedMetric,
    ModelOverview,
    ModelState,
    OpenRetraining,
    RealizedMetric,
    Timeline,
    TimelineEvent,
    TimelineWindow,
    WindowDecision,
    WindowDrift,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from airflow_mlops.ledger.store import Ledger


#: Columns a window's drift names, the largest parts of the shift first.
TOP_COLUMNS = 5

#: Two-sided 95 % of the normal distribution.
_Z = 1.959964

#: What is found out about a window, and decided for it.
_OF_WINDOWS = (
    EntryKind.PERFORMANCE_CHECK,
    EntryKind.DRIFT_CHECK,
    EntryKind.CHALLENGER_CHECK,
    EntryKind.RETRAINING_DECISION,
)

_MOVES = (EntryKind.PROMOTION, EntryKind.ROLLBACK)

_EVENTS = (*_MOVES, EntryKind.DEPLOYMENT, EntryKind.APPROVAL)


def read_timeline(
    ledger: Ledger,
    model_name: str,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    before: Window | None = None,
    limit: int = 500,
) -> Timeline:
    """Read the newest windows of a range, with what happened meanwhile. Five queries, however long the range.

    :param since: only windows that begin then or later, and events from then on; ``None``: all.
    :param until: only windows that begin, and events that happened, before; ``None``: all.
    :param before: only windows before this one: ``older`` of a later page.
    :param limit: at most so many windows, from 1.
    :raises ValueError: ``limit`` is below 1.
    """
    if limit < 1:
        raise ValueError(f"limit={limit}: a page has at least one window")
    mine = (entries.c.model_name == model_name, entries.c.window_start.is_not(None))
    with ledger._reading() as connection:  # one transaction: all answers are of the same moment
        listed = [
            Window(start=row.window_start, end=row.window_end)
            for row in connection.execute(_windows(mine, since, until, before).limit(limit + 1))
        ]
        windows = sorted(listed[:limit])
        older = windows[0] if len(listed) > limit else None
        found = connection.execute(_checks(mine, windows)).all() if windows else []
        outcomes = connection.execute(_outcomes(model_name, windows)).all() if windows else []
        moves = connection.execute(_of_model(model_name, _MOVES)).all()
        begin = older.start if older else since
        end = before.start if before else until
        events = connection.execute(_between(_of_model(model_name, _EVENTS), begin, end)).all()
    told = _Told.of(found, moves, outcomes)
    return Timeline(
        model_name=model_name,
        windows=tuple(told.window(window) for window in windows),
        events=tuple(_event(row) for row in events),
        older=older,
    )


def read_overview(ledger: Ledger) -> list[ModelOverview]:
    """List all models with how they stand, by name. Six queries, however many models."""
    named = entries.c.model_name.is_not(None)
    kinds = entries.c.kind.in_([str(kind) for kind in _OF_WINDOWS])
    newest = (
        sa.select(entries.c.model_name, sa.func.max(entries.c.window_start).label("start"))
        .where(named, kinds)
        .group_by(entries.c.model_name)
        .subquery()
    )
    retrain = (
        sa.select(sa.func.max(entries.c.entry_id).label("entry_id"))
        .where(
            named,
            entries.c.kind == str(EntryKind.RETRAINING_DECISION),
            entries.c.payload["outcome"].as_string().in_(ACTING),
        )
        .group_by(entries.c.model_name)
        .subquery()
    )
    with ledger._reading() as connection:
        names = connection.execute(
            sa.select(entries.c.model_name, sa.func.max(entries.c.recorded_at).label("at"))
            .where(named)
            .group_by(entries.c.model_name)
            .order_by(entries.c.model_name)
        ).all()
        pointers = connection.execute(
            sa.select(aliases.c.model_name, aliases.c.model_version, entries.c.recorded_at)
            .join(entries, entries.c.entry_id == aliases.c.entry_id)
            .where(aliases.c.alias == "champion")
        ).all()
        same = sa.and_(entries.c.model_name == newest.c.model_name, entries.c.window_start == newest.c.start)
        checks = connection.execute(
            sa.select(entries).join(newest, same).where(kinds).order_by(entries.c.entry_id)
        ).all()
        decisions = connection.execute(
            sa.select(entries).join(retrain, retrain.c.entry_id == entries.c.entry_id)
        ).all()
        keys = sa.select(entries.c.key).join(retrain, retrain.c.entry_id == entries.c.entry_id)
        outcomes = connection.execute(
            sa.select(entries).where(
                entries.c.kind == str(EntryKind.RETRAINING_OUTCOME), entries.c.key.in_(keys)
            )
        ).all()
        moves = connection.execute(
            sa.select(entries)
            .where(named, entries.c.kind.in_([str(kind) for kind in _MOVES]))
            .order_by(entries.c.entry_id)
        ).all()
    champions = {row.model_name: row for row in pointers}
    ended = {row.key for row in outcomes}
    waiting = {row.model_name: row for row in decisions if row.key not in ended}
    by_model, moves_of = _by_model(checks), _by_model(moves)
    told = {name: _Told.of(by_model[name], moves_of[name], outcomes) for name, _ in names}
    return [_overview(name, at, champions.get(name), told[name], waiting.get(name)) for name, at in names]


def _windows(
    mine: Iterable[sa.ColumnElement[bool]],
    since: datetime | None,
    until: datetime | None,
    before: Window | None,
) -> sa.Select[Any]:
    start, end = entries.c.window_start, entries.c.window_end
    query = sa.select(start, end).where(*mine, entries.c.kind.in_([str(kind) for kind in _OF_WINDOWS]))
    if since is not None:
        query = query.where(start >= since)
    if until is not None:
        query = query.where(start < until)
    if before is not None:
        earlier = sa.or_(start < before.start, sa.and_(start == before.start, end < before.end))
        query = query.where(earlier)
    return query.distinct().order_by(start.desc(), end.desc())


def _checks(mine: Iterable[sa.ColumnElement[bool]], windows: Sequence[Window]) -> sa.Select[Any]:
    return (
        sa.select(entries)
        .where(
            *mine,
            entries.c.kind.in_([str(kind) for kind in _OF_WINDOWS]),
            entries.c.window_start.between(windows[0].start, windows[-1].start),
        )
        .order_by(entries.c.entry_id)
    )


def _outcomes(model_name: str, windows: Sequence[Window]) -> sa.Select[Any]:
    """Select how the retrainings that were decided for the windows ended."""
    decided = sa.select(entries.c.key).where(
        entries.c.model_name == model_name,
        entries.c.kind == str(EntryKind.RETRAINING_DECISION),
        entries.c.window_start.between(windows[0].start, windows[-1].start),
    )
    return sa.select(entries).where(
        entries.c.kind == str(EntryKind.RETRAINING_OUTCOME), entries.c.key.in_(decided)
    )


def _of_model(model_name: str, kinds: Sequence[EntryKind]) -> sa.Select[Any]:
    return (
        sa.select(entries)
        .where(entries.c.model_name == model_name, entries.c.kind.in_([str(kind) for kind in kinds]))
        .order_by(entries.c.entry_id)
    )


def _between(query: sa.Select[Any], begin: datetime | None, end: datetime | None) -> sa.Select[Any]:
    if begin is not None:
        query = query.where(entries.c.recorded_at >= begin)
    return query.where(entries.c.recorded_at < end) if end is not None else query


class _Told:
    """The rows of a page, by window."""

    def __init__(self, rows: Mapping[Window, list[Any]], champions: _Champions) -> None:
        self._rows = rows
        self._champions = champions
        self.promoted: dict[str, str] = {}
        self.outcomes: dict[str, Any] = {}

    @classmethod
    def of(cls, rows: Iterable[Any], moves: Sequence[Any], outcomes: Iterable[Any]) -> _Told:
        """Sort what the queries gave, each in the order of writing."""
        by_window: dict[Window, list[Any]] = defaultdict(list)
        for row in rows:
            by_window[Window(start=row.window_start, end=row.window_end)].append(row)
        told = cls(by_window, _Champions(moves))
        told.promoted = {
            str(row.payload["decision_key"]): str(row.payload.get("model_version"))
            for row in moves
            if row.payload.get("decision_key")
        }
        told.outcomes = {row.key: row for row in outcomes}
        return told

    def window(self, window: Window) -> TimelineWindow:
        """Put together what is known of a window; of several checks of a kind the newest counts, a grade more than none."""
        by_kind: dict[str, list[Any]] = defaultdict(list)
        for row in self._rows[window]:
            by_kind[row.kind].append(row)
        grades = by_kind[EntryKind.PERFORMANCE_CHECK]
        measured = [row for row in grades if row.payload.get("measured")]
        grade = (measured or grades or [None])[-1]
        drift = _newest(by_kind, EntryKind.DRIFT_CHECK)
        compared = _newest(by_kind, EntryKind.CHALLENGER_CHECK)
        decision = _newest(by_kind, EntryKind.RETRAINING_DECISION)
        graded = grade.payload if grade is not None else {}
        return TimelineWindow(
            window=window,
            champion=graded.get("model_version") or self._champions.at(window.end),
            served=tuple(map(str, graded.get("model_versions") or ())),
            realized=_realized(grade, len(grades)) if grade is not None else None,
            estimated=_estimated(graded),
            drift=_drift(drift.payload) if drift is not None else None,
            challengers=_contenders(compared.payload["check"]) if compared is not None else (),
            decision=self._decision(decision) if decision is not None else None,
        )

    def newest(self) -> TimelineWindow | None:
        """Give the newest window; of several that begin with it the longest."""
        return self.window(max(self._rows)) if self._rows else None

    def _decision(self, row: Any) -> WindowDecision:
        payload, ended = row.payload, self.outcomes.get(row.key)
        training = payload.get("training") or {}
        return WindowDecision(
            outcome=str(payload["outcome"]),
            reason=str(payload.get("reason") or row.summary),
            training_start=_time(training.get("start")),
            training_end=_time(training.get("end")),
            recipe=payload.get("recipe"),
            decided_at=row.recorded_at,
            actor=row.actor,
            key=row.key,
            result=str(ended.payload.get("outcome")) if ended is not None else None,
            result_reason=ended.summary if ended is not None else None,
            promoted_version=self.promoted.get(row.key),
        )


class _Champions:
    """Who was champion when, by the order the moves were written in: the rule of :meth:`Ledger.who_was_champion`."""

    def __init__(self, moves: Iterable[Any]) -> None:
        mine = [row for row in moves if row.payload.get("alias") == "champion"]
        self._times: list[datetime] = []
        self._versions: list[str] = []
        last = 0
        for row in sorted(mine, key=lambda row: (row.recorded_at, row.entry_id)):
            if row.entry_id > last:  # one with a clock ahead of its successor's never counts again
                last = row.entry_id
                self._times.append(row.recorded_at)
                self._versions.append(str(row.payload["model_version"]))

    def at(self, time: datetime) -> str | None:
        place = bisect_right(self._times, time)
        return self._versions[place - 1] if place else None


def _newest(by_kind: Mapping[str, list[Any]], kind: EntryKind) -> Any:
    return (by_kind.get(kind) or [None])[-1]


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


def _realized(row: Any, grades: int) -> RealizedMetric:
    payload = row.payload
    measured = bool(payload.get("measured"))
    return RealizedMetric(
        metric=str(payload.get("metric", "")),
        value=payload.get("value"),
        interval=_interval(payload),
        promised=payload.get("reference_value"),
        relative_change=payload.get("relative_change"),
        measured=measured,
        degraded=bool(payload.get("degraded")),
        labelled_share=float(payload.get("labelled_share") or 0.0),
        row_count=int(payload.get("row_count") or 0),
        final=bool(payload.get("final", measured or not payload.get("awaits_labels", True))),
        reason=str(payload.get("reason") or row.summary),
        graded_at=row.recorded_at,
        grades=grades,
    )


def _interval(payload: Mapping[str, Any]) -> tuple[float, float] | None:
    """Give the metric's interval from its losses: their mean is normal, whatever they are, for the row counts at hand."""
    value, mean = payload.get("value"), payload.get("loss_mean")
    deviation, count = payload.get("loss_deviation"), payload.get("effective_rows")
    if value is None or mean is None or deviation is None or not count:
        return None
    half = _Z * deviation / math.sqrt(count)
    name = str(payload.get("metric", ""))
    # A user's metric is not imported for this; with a loss per row it is their mean, up to its sign.
    of_mean = resolve_metric(name).of_mean_loss if name.isidentifier() else None
    if of_mean is None:
        return (value - half, value + half)
    return (float(of_mean(max(mean - half, 0.0))), float(of_mean(mean + half)))


def _estimated(payload: Mapping[str, Any]) -> EstimatedMetric | None:
    value = payload.get("estimated_value")
    if value is None:
        return None
    ends = payload.get("estimate_interval")
    return EstimatedMetric(
        value=value,
        interval=(ends[0], ends[1]) if ends else None,
        trusted=bool(payload.get("estimate_trusted")),
        why=str((payload.get("estimator") or {}).get("reason", "")),
        degraded=bool(payload.get("estimate_degraded")),
    )


def _drift(payload: Mapping[str, Any]) -> WindowDrift:
    features = payload.get("features") or ()
    prediction = payload.get("prediction") or {}
    return WindowDrift(
        drifted=bool(payload.get("drifted")),
        drifted_count=int(payload.get("drifted_count") or 0),
        feature_count=int(payload.get("feature_count") or 0),
        headline=str(payload.get("headline", "")),
        columns=tuple(
            ColumnShift(
                column=str(item["feature"]),
                drifted=bool(item.get("drifted")),
                share_of_shift=float(item.get("share_of_shift") or 0.0),
                sentence=str(item.get("sentence", "")),
            )
            for item in features[:TOP_COLUMNS]
        ),
        prediction_drifted=bool(prediction["drifted"])
        if prediction.get("measured", bool(prediction))
        else None,
        report_url=payload.get("report_url"),
    )


def _contenders(check: Mapping[str, Any] | None) -> tuple[ContenderLoss, ...]:
    if check is None:  # the champion had learned from the window
        return ()
    losses = [
        ContenderLoss(
            model_version=str(one["version"]),
            recipe=one.get("recipe"),
            champion=one["version"] == check["champion"],
            trained_until=datetime.fromisoformat(one["trained_until"]),
            loss=float(one["loss"]),
        )
        for one in check["contenders"]
    ]
    return tuple(sorted(losses, key=lambda one: one.loss))


def _event(row: Any) -> TimelineEvent:
    return TimelineEvent(
        kind=EntryKind(row.kind),
        at=row.recorded_at,
        alias=row.payload.get("alias"),
        model_version=row.payload.get("model_version") or row.subject,
        previous_version=row.payload.get("previous_version"),
        summary=row.summary,
        actor=row.actor,
    )


def _by_model(rows: Iterable[Any]) -> dict[str, list[Any]]:
    sorted_out: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        sorted_out[row.model_name].append(row)
    return sorted_out


def _open(row: Any, told: _Told) -> OpenRetraining:
    window = Window(start=row.window_start, end=row.window_end) if row.window_start is not None else None
    return OpenRetraining(
        key=row.key,
        window=window,
        decided_at=row.recorded_at,
        reason=str(row.payload.get("reason") or row.summary),
        promoted_version=told.promoted.get(row.key),
    )


def _overview(name: str, at: datetime, pointer: Any, told: _Told, waiting: Any) -> ModelOverview:
    champion = str(pointer.model_version) if pointer is not None else None
    last = told.newest()
    opened = _open(waiting, told) if waiting is not None else None
    return ModelOverview(
        model_name=name,
        champion=champion,
        champion_since=pointer.recorded_at if pointer is not None else None,
        last=last,
        state=_state(champion, last, opened),
        open_retraining=opened,
        last_entry_at=at,
    )


def _state(champion: str | None, last: TimelineWindow | None, opened: OpenRetraining | None) -> ModelState:
    if opened is not None:
        if opened.promoted_version is None:
            return ModelState.RETRAINING
        if opened.promoted_version == champion:  # else somebody has moved the alias on since
            return ModelState.DEPLOYING
    if champion is None:
        return ModelState.NO_CHAMPION
    realized = last.realized if last is not None else None
    estimated = last.estimated if last is not None else None
    if (realized and realized.degraded) or (estimated and estimated.degraded):
        return ModelState.DEGRADED
    if last is not None and last.drift is not None and last.drift.drifted:
        return ModelState.DRIFTED
    known = (realized and realized.measured) or (estimated and estimated.trusted)
    return ModelState.HEALTHY if known else ModelState.UNMEASURED
