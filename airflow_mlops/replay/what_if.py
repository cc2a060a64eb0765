"""What if: the decisions that another policy would have taken on what the ledger has seen."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from airflow_mlops.core.codec import from_dict, unknown_fields
from airflow_mlops.core.decision.evidence import RetrainingHistory, WindowEvidence
from airflow_mlops.core.decision.retraining import Outcome, RetrainingDecision
from airflow_mlops.core.decision.retraining_policy import RetrainingPolicy
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import InsufficientDataError
from airflow_mlops.ledger import EntryKind, LedgerEntry
from airflow_mlops.steps.retraining import CHECKS, LOOK_BACK, ask_policy, collect_evidence

if TYPE_CHECKING:
    from airflow_mlops.ledger import Ledger

_MAXIMUM_ENTRIES = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowWhatIf:
    """One window, as it was decided and as it would have been.

    :param decided_at: when it was decided.
    :param was: outcome.
    :param would_be: outcome under the other policy, then or later.
    :param reason: of the other policy.
    """

    window: Window
    decided_at: datetime
    was: str
    would_be: str
    reason: str

    @property
    def differs(self) -> bool:
        """Whether the other policy would have decided otherwise."""
        return self.was != self.would_be


@dataclass(frozen=True, kw_only=True, slots=True)
class WhatIf:
    """All decided windows of a model, oldest first."""

    model_name: str
    windows: tuple[WindowWhatIf, ...]

    def count(self, outcome: Outcome) -> tuple[int, int]:
        """Count an outcome: as it was, and as it would have been."""
        return (
            sum(item.was == outcome for item in self.windows),
            sum(item.would_be == outcome for item in self.windows),
        )


def what_if(
    ledger: Ledger,
    model_name: str,
    policy: RetrainingPolicy,
    *,
    decide: str = "airflow_mlops.core.decision.retraining:decide_retraining",
) -> WhatIf:
    """Take every decision again with another policy, each on what was known when it was taken. Nothing is written.

    A retraining that was not carried out has no outcome, and is taken to have given a champion; the checks stay those of the
    champions there were. What its models would have been worth only a replay of the data tells.

    :param policy: parameters of the decision.
    :param decide: import path of the decision.
    :raises InsufficientDataError: no window of the model has been decided yet.
    :raises ValueError: there is no such decision, or it gave no sound ones.
    """
    decisions = ledger.entries(
        kind=EntryKind.RETRAINING_DECISION,
        model_name=model_name,
        limit=_MAXIMUM_ENTRIES,
        newest_first=False,
    )
    if not decisions:
        raise InsufficientDataError(
            f"no window of {model_name!r} has been decided yet: there is nothing to decide otherwise. "
            "`airflow-mlops timeline` lists the models the ledger knows"
        )
    past = _Past.read(ledger, model_name, decisions)
    would_be = dict(_decide_again(past, policy, decide))
    windows = [
        _compare(entry.window, entry, would_be.get(entry.window)) for entry in decisions if entry.window
    ]
    return WhatIf(model_name=model_name, windows=tuple(sorted(windows, key=lambda item: item.window)))


def policy_of(settings: Sequence[str]) -> RetrainingPolicy:
    """Read ``name=value`` settings; ``challengers.minimum_gain=0.1`` reaches into a nested one.

    >>> policy_of(["budget=2", "challengers.memory=0.5"]).challengers.memory
    0.5

    :raises ValueError: a name the policy does not have, or a value that does not fit.
    """
    values: dict[str, Any] = {}
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"{setting!r} sets nothing: write NAME=VALUE, such as budget=2")
        *outer, name = path.strip().split(".")
        place = values
        for part in outer:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise ValueError(
                    f"{setting!r} reaches into {part!r}, which was set to {place!r} before: set one or the other"
                )
        place[name] = _value(text.strip())
    unknown = unknown_fields(RetrainingPolicy, values)
    if unknown:
        known = ", ".join(field.name for field in fields(RetrainingPolicy))
        raise ValueError(f"the policy has no {', '.join(unknown)}; it has {known}")
    return from_dict(RetrainingPolicy, values)


def _value(text: str) -> Any:
    """Read JSON, or else take the text as it is."""
    try:
        return json.loads(text)
    except ValueError:
        return None if text == "None" else text


def what_if_text(found: WhatIf) -> str:
    """Write a line per window that would have been decided otherwise, and what it comes to."""
    differ = [item for item in found.windows if item.differs]
    was, would_be = found.count(Outcome.RETRAIN)
    lines = [
        f"{item.window}  {item.was} -> {item.would_be}\n    {item.reason or 'its checks are not in the ledger'}"
        for item in differ
    ]
    lines.append(
        f"{len(differ)} of {len(found.windows)} windows would have been decided otherwise; {would_be} retrainings instead of {was}."
    )
    return "\n".join(lines) + "\n"


def _compare(window: Window, entry: LedgerEntry, other: RetrainingDecision | None) -> WindowWhatIf:
    return WindowWhatIf(
        window=window,
        decided_at=entry.recorded_at,
        was=str(entry.payload["outcome"]),
        would_be=str(other.outcome) if other else "unknown",
        reason=other.reason if other else "",
    )


class _Occasion(NamedTuple):
    """Windows that were decided together.

    :param entry_id: of the first of them; what was in the ledger before was known. Clocks may differ, this does not.
    """

    entry_id: int
    now: datetime
    windows: list[Window]


@dataclass(frozen=True, slots=True)
class _Past:
    """What the ledger knows of a model.

    :param occasions: in the order in which they were.
    :param checks: of each window, newest first.
    :param outcomes: of the retrainings that were carried out.
    :param first_promotion: of its first champion; ``None``: it has had none.
    """

    occasions: list[_Occasion]
    checks: dict[Window, list[LedgerEntry]]
    outcomes: dict[Window, str]
    first_promotion: LedgerEntry | None

    @classmethod
    def read(cls, ledger: Ledger, model_name: str, decisions: Sequence[LedgerEntry]) -> _Past:
        def entries(
            kind: EntryKind | tuple[EntryKind, ...], limit: int = _MAXIMUM_ENTRIES
        ) -> list[LedgerEntry]:
            return ledger.entries(kind=kind, model_name=model_name, limit=limit)

        checks = defaultdict[Window, list[LedgerEntry]](list)
        for entry in entries(CHECKS):
            if entry.window is not None:
                checks[entry.window].append(entry)
        closed = {entry.key: str(entry.payload["outcome"]) for entry in entries(EntryKind.RETRAINING_OUTCOME)}
        promotions = [move for move in ledger.moves(model_name) if move.kind is EntryKind.PROMOTION]
        return cls(
            occasions=_occasions(decisions),
            checks=checks,
            outcomes={
                entry.window: closed[entry.key] for entry in decisions if entry.window and entry.key in closed
            },
            first_promotion=promotions[0] if promotions else None,
        )

    def evidence(self, window: Window, occasion: _Occasion) -> WindowEvidence | None:
        """Collect what was known of a window; ``None``: nothing yet."""
        known = [entry for entry in self.checks.get(window, ()) if (entry.entry_id or 0) < occasion.entry_id]
        return collect_evidence(window, known, occasion.now) if known else None

    def champion_since(self, occasion: _Occasion) -> datetime | None:
        """Say since when there was a champion, had nobody ever been promoted since."""
        first = self.first_promotion
        return first.recorded_at if first and (first.entry_id or 0) < occasion.entry_id else None


def _occasions(decisions: Sequence[LedgerEntry]) -> list[_Occasion]:
    occasions: list[_Occasion] = []
    by = None
    for entry in decisions:
        if entry.window is None:
            continue
        if by != (entry.actor, entry.recorded_at):
            occasions.append(_Occasion(entry.entry_id or 0, entry.recorded_at, []))
        occasions[-1].windows.append(entry.window)
        by = (entry.actor, entry.recorded_at)
    return occasions


def _decide_again(
    past: _Past, policy: RetrainingPolicy, decide: str
) -> Iterator[tuple[Window, RetrainingDecision]]:
    history = RetrainingHistory()
    changes: list[datetime] = []  # of the world, those that were not taken back
    waiting: list[Window] = []
    seen: list[Window] = []
    for occasion in past.occasions:
        waiting = sorted({*waiting, *occasion.windows})
        known = [found for window in waiting if (found := past.evidence(window, occasion)) is not None]
        if not known:
            continue
        earlier = sorted(window for window in seen if window.end <= waiting[-1].start)[-LOOK_BACK:]
        newer = sorted(window for window in seen if window.start >= waiting[-1].end)[-LOOK_BACK:]
        previous = [
            found for window in [*earlier, *newer] if (found := past.evidence(window, occasion)) is not None
        ]
        since = history.champion_since or past.champion_since(occasion)
        history = replace(history, now=occasion.now, champion_since=since)
        for decision in ask_policy(decide, known, history, policy, previous=previous):
            # What is left waiting is shown as such, until a later occasion decides it.
            yield decision.window, decision
            if not decision.outcome.leaves_undecided:
                waiting.remove(decision.window)
                seen.append(decision.window)
            history = _after(history, decision, past.outcomes, occasion.now, changes)


def _after(
    history: RetrainingHistory,
    decision: RetrainingDecision,
    outcomes: Mapping[Window, str],
    now: datetime,
    changes: list[datetime],
) -> RetrainingHistory:
    """Give the history with one more decision in it.

    :param changes: brought up to date, by the rule of :meth:`Ledger.world_since`.
    """
    if not decision.outcome.acts:
        return history
    outcome = outcomes.get(decision.window, "promoted")
    promoted = outcome == "promoted"
    if promoted and decision.training is not None and decision.training.change is not None:
        changes.append(decision.training.change)
    if promoted and decision.undoes_since is not None:
        changes[:] = [change for change in changes if change < decision.undoes_since]
    history = replace(history, world_since=changes[-1] if changes else None)
    end = decision.window.end
    if decision.outcome is not Outcome.RETRAIN:
        return replace(history, last_return_window_end=max(end, history.last_return_window_end or end))
    ends = [end, history.last_retraining_window_end or end]
    return replace(
        history,
        champion_since=now if promoted else history.champion_since,
        retrained_at=(now, *history.retrained_at),
        last_retraining_window_end=max(ends),
        recent_outcomes=(outcome, *history.recent_outcomes),
    )
