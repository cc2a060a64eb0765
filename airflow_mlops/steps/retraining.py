"""Retraining: read the windows nobody has decided on yet, decide each exactly once, say why."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.codec import to_dict
from airflow_mlops.core.extension import load_object
from airflow_mlops.core.retraining import (
    Outcome,
    RetrainingDecision,
    RetrainingHistory,
    RetrainingPolicy,
    WindowEvidence,
)
from airflow_mlops.core.windows import Window
from airflow_mlops.ledger import EntryKind, Ledger, LedgerEntry
from airflow_mlops.steps.base import Step

if TYPE_CHECKING:
    from airflow_mlops.services import Services

#: Checks of earlier windows that a policy may look back on.
LOOK_BACK = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrainingSpec:
    """What to decide.

    :param model_name: registered model.
    :param required_checks: a window is ripe when these are in the ledger.
    :param policy: parameters of the decision.
    :param decide: import path of the decision, ``decide(evidence, history, policy, previous_checks=...)``.
    :param actor: who decides.
    :param now: time of the decision.
    """

    model_name: str
    required_checks: tuple[EntryKind, ...] = (EntryKind.PERFORMANCE_CHECK, EntryKind.DRIFT_CHECK)
    policy: RetrainingPolicy = field(default_factory=RetrainingPolicy)
    decide: str = "airflow_mlops.core.retraining:decide_retraining"
    actor: str
    now: datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrainingResult:
    """What was decided, and the training to carry out if there is one.

    :param retrain: whether a training is to be carried out now.
    :param decision_key: ledger key of the decision that wants it.
    :param training: window to train on.
    :param half_life_days: weight of a row halves with this age; ``None``: equal weights.
    :param resumed: the decision was taken earlier, its training never ended.
    """

    model_name: str
    retrain: bool
    reason: str
    decision_key: str | None = None
    training: Window | None = None
    half_life_days: float | None = None
    resumed: bool = False
    decisions: tuple[dict[str, Any], ...] = ()


def run(spec: RetrainingSpec, services: Services) -> RetrainingResult:
    """Decide all windows that are ripe; what another decider wrote first stands."""
    ledger = Ledger.open(services.require("ledger_url"))
    try:
        windows = ledger.undecided_windows(spec.model_name, required=spec.required_checks)
        decided = _decide(ledger, spec, windows) if windows else []
        return _result(spec, decided, ledger.open_retraining(spec.model_name))
    finally:
        ledger.close()


def _decide(ledger: Ledger, spec: RetrainingSpec, windows: list[Window]) -> list[LedgerEntry]:
    decide: Any = load_object(spec.decide)
    decisions: list[RetrainingDecision] = decide(
        [_evidence(ledger, spec.model_name, window) for window in windows],
        _history(ledger, spec.model_name),
        spec.policy,
        previous_checks=_previous(ledger, spec.model_name, before=windows[0]),
    )
    entries = [
        LedgerEntry(
            kind=EntryKind.RETRAINING_DECISION,
            key=f"{spec.model_name}|{decision.window.key}",
            model_name=spec.model_name,
            window=decision.window,
            subject=None,
            summary=f"{decision.outcome} for {decision.window}: {decision.reason}",
            payload=to_dict(decision),
            actor=spec.actor,
            recorded_at=spec.now,
        )
        for decision in decisions
    ]
    return [recorded.entry for recorded in ledger.record_all(entries) if recorded.created]


def _result(spec: RetrainingSpec, decided: list[LedgerEntry], opened: LedgerEntry | None) -> RetrainingResult:
    decisions = tuple(
        {"window": entry.window.key if entry.window else None, **_brief(entry)} for entry in decided
    )
    if opened is None:
        reason = decided[-1].summary if decided else f"no undecided window of {spec.model_name}"
        return RetrainingResult(model_name=spec.model_name, retrain=False, reason=reason, decisions=decisions)
    training = opened.payload["training"]
    return RetrainingResult(
        model_name=spec.model_name,
        retrain=True,
        reason=opened.payload["reason"],
        decision_key=opened.key,
        training=Window.parse(training["start"], training["end"]),
        half_life_days=training["half_life_days"],
        resumed=all(entry.key != opened.key for entry in decided),
        decisions=decisions,
    )


def _brief(entry: LedgerEntry) -> dict[str, Any]:
    return {"outcome": Outcome(entry.payload["outcome"]), "reason": entry.payload["reason"]}


def _evidence(ledger: Ledger, model_name: str, window: Window) -> WindowEvidence:
    key = f"{model_name}|{window.key}"
    performance = ledger.find(EntryKind.PERFORMANCE_CHECK, key)
    drift = ledger.find(EntryKind.DRIFT_CHECK, key)
    checked = performance or drift
    return WindowEvidence(
        window=window,
        performance=performance.payload if performance else None,
        drift=drift.payload if drift else None,
        row_count=int(checked.payload["row_count"]) if checked else 0,
    )


def _previous(ledger: Ledger, model_name: str, *, before: Window) -> list[WindowEvidence]:
    """Give the checks of the windows before, oldest first."""
    checks = ledger.entries(
        kind=(EntryKind.PERFORMANCE_CHECK, EntryKind.DRIFT_CHECK), model_name=model_name, limit=4 * LOOK_BACK
    )
    earlier = sorted({check.window for check in checks if check.window and check.window.end <= before.start})
    return [_evidence(ledger, model_name, window) for window in earlier[-LOOK_BACK:]]


def _history(ledger: Ledger, model_name: str) -> RetrainingHistory:
    outcomes = ledger.entries(kind=EntryKind.RETRAINING_OUTCOME, model_name=model_name, limit=10)
    ends = [Window.from_key(entry.key.split("|", 1)[1]).end for entry in outcomes]
    champion_moves = ledger.entries(kind=EntryKind.PROMOTION, model_name=model_name, limit=1)
    return RetrainingHistory(
        last_retraining_window_end=max(ends, default=None),
        champion_since=champion_moves[0].recorded_at if champion_moves else None,
        recent_outcomes=tuple(str(entry.payload["outcome"]) for entry in outcomes),
    )


STEP = Step(name="retraining", spec=RetrainingSpec, result=RetrainingResult, run=run)
