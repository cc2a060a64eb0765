"""Simple policies to hold ours against. Each is right somewhere and wrong somewhere else."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.decision.retraining import Outcome, RetrainingDecision, TrainingChoice

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from airflow_mlops.core.decision.evidence import RetrainingHistory, WindowEvidence
    from airflow_mlops.core.decision.retraining_policy import RetrainingPolicy

#: Policies by name, as ``airflow-mlops replay --policy`` takes them; any other import path will do as well.
NAMED = {
    "challengers": "airflow_mlops.core.decision.retraining:decide_retraining",
    "never": "airflow_mlops.replay.policies:never",
    "always": "airflow_mlops.replay.policies:always",
    "always_all": "airflow_mlops.replay.policies:always_all",
    "on_degradation": "airflow_mlops.replay.policies:on_degradation",
    "on_drift": "airflow_mlops.replay.policies:on_drift",
    "gated": "airflow_mlops.replay.policies:gated",
}


def never(
    evidence: Sequence[WindowEvidence], history: RetrainingHistory, policy: RetrainingPolicy, **_: Any
) -> list[RetrainingDecision]:
    """Keep the first model."""
    return _each(evidence, policy, lambda _: False)


def always(
    evidence: Sequence[WindowEvidence], history: RetrainingHistory, policy: RetrainingPolicy, **_: Any
) -> list[RetrainingDecision]:
    """Retrain after every window on the trailing rows, and promote without a test."""
    return _each(evidence, policy, lambda _: True)


def always_all(
    evidence: Sequence[WindowEvidence], history: RetrainingHistory, policy: RetrainingPolicy, **_: Any
) -> list[RetrainingDecision]:
    """Retrain after every window on all rows alike, and promote without a test."""
    return [
        replace(decision, training=replace(decision.training, start=None, why="training on all rows"))
        for decision in _each(evidence, policy, lambda _: True)
        if decision.training is not None
    ]


def on_degradation(
    evidence: Sequence[WindowEvidence], history: RetrainingHistory, policy: RetrainingPolicy, **_: Any
) -> list[RetrainingDecision]:
    """Retrain when performance fell behind what was promised, and promote without a test."""
    return _each(evidence, policy, lambda item: item.degraded)


def on_drift(
    evidence: Sequence[WindowEvidence], history: RetrainingHistory, policy: RetrainingPolicy, **_: Any
) -> list[RetrainingDecision]:
    """Retrain when the inputs moved, and promote without a test."""
    return _each(evidence, policy, lambda item: item.drifted)


def gated(
    evidence: Sequence[WindowEvidence], history: RetrainingHistory, policy: RetrainingPolicy, **_: Any
) -> list[RetrainingDecision]:
    """Retrain when the inputs moved, and promote what beats the champion on the newest half of the window, held out."""
    return [
        replace(
            decision,
            training=replace(
                decision.training,
                holdout_start=decision.window.start + (decision.window.end - decision.window.start) / 2,
            ),
            promote_on="held_out",
        )
        if decision.training is not None
        else decision
        for decision in on_drift(evidence, history, policy)
    ]


def _each(
    evidence: Sequence[WindowEvidence], policy: RetrainingPolicy, wants: Callable[[WindowEvidence], bool]
) -> list[RetrainingDecision]:
    decisions = []
    for item in evidence:
        start = item.window.end - timedelta(days=policy.trailing_days)
        training = TrainingChoice(
            start=start,
            end=item.window.end,
            half_life_days=None,
            why=f"training on {policy.trailing_days:g} days",
        )
        decisions.append(
            RetrainingDecision(
                window=item.window,
                outcome=Outcome.RETRAIN if wants(item) else Outcome.NOTHING,
                reason=training.why if wants(item) else "nothing to do",
                training=training if wants(item) else None,
                promote_on="untested",
            )
        )
    return decisions
