"""Retraining: one decision per window, from what the checks found, with its reason in a sentence."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

from airflow_mlops.core.challengers import (
    ALL,
    FEWEST_LEVELS,
    RECENT,
    ChallengerCheck,
    ChallengerPolicy,
    judge_challengers,
)
from airflow_mlops.core.windows import Window

if TYPE_CHECKING:
    from collections.abc import Sequence


class Outcome(StrEnum):
    """What was decided for a window; ``WAIT_FOR_LABELS`` is no decision: the window stays undecided."""

    RETRAIN = "retrain"
    ALERT = "alert"
    WAIT_FOR_LABELS = "wait_for_labels"
    NOTHING = "nothing"
    COVERED = "covered"


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowEvidence:
    """What the checks of one window found.

    :param window: the window.
    :param performance: payload of its performance check; ``None`` when there was none.
    :param drift: payload of its drift check; ``None`` when there was none.
    :param challengers: models side by side on it; ``None`` when none were compared.
    :param row_count: labelled rows in the window.
    :param waited_days: time since its first check.
    """

    window: Window
    performance: dict[str, Any] | None
    drift: dict[str, Any] | None
    challengers: ChallengerCheck | None = None
    row_count: int
    waited_days: float = 0.0

    @property
    def measured(self) -> bool:
        """Whether realized performance is known."""
        return bool(self.performance and self.performance.get("measured"))

    @property
    def awaits_labels(self) -> bool:
        """Whether realized performance is unknown and labels may still come."""
        return not self.measured and (self.performance or {}).get("awaits_labels", True)

    @property
    def degraded(self) -> bool:
        """Whether realized performance fell behind what was promised."""
        return bool(self.measured and self.performance and self.performance.get("degraded"))

    @property
    def drifted(self) -> bool:
        """Whether the inputs moved."""
        return bool(self.drift and self.drift.get("drifted"))


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrainingHistory:
    """What happened before.

    :param last_retraining_window_end: end of the newest window a retraining was decided for.
    :param champion_since: when the present champion was promoted.
    :param recent_outcomes: outcomes of retrainings, newest first.
    :param world_since: start of the rows the champion was trained on after the world had changed; ``None``: it never has.
    """

    last_retraining_window_end: datetime | None = None
    champion_since: datetime | None = None
    recent_outcomes: tuple[str, ...] = ()
    world_since: datetime | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrainingPolicy:
    """When to retrain, and on what.

    :param cool_down_days: time after a retraining in which only alerts are given.
    :param minimum_training_rows: rows after a change that suffice to train on them alone (rule of thumb).
    :param trailing_days: training window otherwise, back from the end of the decided window.
    :param half_life_days: weight of a row halves with this age in the trailing window; ``None``: equal weights.
    :param retrain_on_drift: retrain when only the inputs moved; by default that is an alert.
    :param challengers: when a fresh model is worth a promotion, where challengers are compared.
    :param patience_days: how long a window waits for labels and checks that are late, from its first check on; then
        it is decided without them. 0: there are no labels to wait for.
    """

    cool_down_days: float = 0.0
    minimum_training_rows: int = 2000
    trailing_days: float = 92.0
    half_life_days: float | None = 30.0
    retrain_on_drift: bool = False
    patience_days: float = 45.0
    challengers: ChallengerPolicy = field(default_factory=ChallengerPolicy)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingChoice:
    """What to train on.

    :param start: first instant of the training window; ``None``: with the first row there is.
    :param end: first instant after it.
    :param half_life_days: weight of a row halves with this age; ``None``: equal weights.
    :param why: half a sentence.
    """

    start: datetime | None
    end: datetime
    half_life_days: float | None
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrainingDecision:
    """The decision for one window.

    :param training: what to train the next champion on; ``None`` when there will be none.
    :param promote_on: what it is promoted on: its own test on rows ``held_out``, or the tests of its ``predecessors``.
    :param recipe: how it is made; ``None`` when it is no model of a recipe.
    :param shadow: recipes whose next model is worth a training, so that it can be compared in the next window.
    """

    window: Window
    outcome: Outcome
    reason: str
    training: TrainingChoice | None = None
    promote_on: Literal["held_out", "predecessors"] = "held_out"
    recipe: str | None = None
    shadow: tuple[str, ...] = ()


def decide_retraining(
    evidence: Sequence[WindowEvidence],
    history: RetrainingHistory,
    policy: RetrainingPolicy,
    *,
    previous_checks: Sequence[WindowEvidence] = (),
) -> list[RetrainingDecision]:
    """Decide every undecided window, oldest first; of several that call for a retraining the newest gets it.

    Degraded performance calls for a retraining. Moved inputs alone do not: a model may not care. A window whose labels
    are late waits for them, then for no longer than the policy's patience.

    :param evidence: windows nobody has decided on yet, oldest first.
    :param history: earlier retrainings.
    :param policy: when and on what.
    :param previous_checks: windows that were decided before, oldest first, whatever was decided for them.
    :returns: one decision per window of ``evidence``, in the same order.
    """
    known = sorted([*previous_checks, *evidence], key=lambda item: item.window)
    decisions = []
    for window_evidence in evidence:
        seen = [item for item in known if item.window <= window_evidence.window]
        decisions.append(_decide(window_evidence, seen, history, policy))
    return _only_newest_retrains(decisions)


def _decide(
    evidence: WindowEvidence,
    seen: Sequence[WindowEvidence],
    history: RetrainingHistory,
    policy: RetrainingPolicy,
) -> RetrainingDecision:
    window, found = evidence.window, _findings(evidence)
    if evidence.awaits_labels and evidence.waited_days < policy.patience_days:
        return RetrainingDecision(window=window, outcome=Outcome.WAIT_FOR_LABELS, reason=found)
    if evidence.challengers is not None:
        return _by_challengers(evidence, seen, history, policy)
    if not evidence.degraded and not (evidence.drifted and policy.retrain_on_drift):
        # Never graded is not the same as fine, unless nobody wanted to wait for labels.
        given_up = evidence.awaits_labels and policy.patience_days > 0
        outcome = Outcome.ALERT if evidence.drifted or given_up else Outcome.NOTHING
        return RetrainingDecision(window=window, outcome=outcome, reason=found)
    since = history.last_retraining_window_end
    if since is not None and window.end <= since:
        why = f"covered by the retraining decided for a window that ended on {since:%Y-%m-%d}"
        return RetrainingDecision(window=window, outcome=Outcome.COVERED, reason=f"{found}; {why}")
    if since is not None and window.end < since + timedelta(days=policy.cool_down_days):
        why = f"cooling down for {policy.cool_down_days:g} days after the last retraining"
        return RetrainingDecision(window=window, outcome=Outcome.ALERT, reason=f"{found}; {why}")
    training = _choose_training(seen, history, policy)
    return RetrainingDecision(
        window=window, outcome=Outcome.RETRAIN, reason=f"{found}; {training.why}", training=training
    )


def _by_challengers(
    evidence: WindowEvidence,
    seen: Sequence[WindowEvidence],
    history: RetrainingHistory,
    policy: RetrainingPolicy,
) -> RetrainingDecision:
    """Decide by what fresh models were worth; where the world changed at once there are none yet, and a test has to tell."""
    since = history.world_since
    checks = [
        item.challengers
        for item in seen
        if item.challengers is not None and (since is None or item.window.start > since)
    ]
    window, found = evidence.window, _findings(evidence)
    if not checks:
        return RetrainingDecision(
            window=window,
            outcome=Outcome.NOTHING,
            reason=f"{found}; no window since the change of {since:%Y-%m-%d} has been compared",
            shadow=(RECENT, ALL),
        )
    verdict = judge_challengers(checks, policy.challengers)
    # Until it is known how much the loss varies between windows, what was promised at training has to do.
    if verdict.alarm or (evidence.degraded and len(checks) <= FEWEST_LEVELS):
        enough = evidence.row_count >= policy.minimum_training_rows
        training = (
            TrainingChoice(
                start=window.start, end=window.end, half_life_days=None, why="training on this window alone"
            )
            if enough
            else recipe_rows(verdict.recipe, window, since)
        )
        return RetrainingDecision(
            window=window,
            outcome=Outcome.RETRAIN,
            reason=f"{found}; the newest models are as surprised as the champion: the world changed; {training.why}",
            training=training,
            recipe=verdict.recipe,
            shadow=verdict.train,
        )
    return RetrainingDecision(
        window=window,
        outcome=Outcome.RETRAIN
        if verdict.promote
        else Outcome.ALERT
        if evidence.degraded
        else Outcome.NOTHING,
        reason=f"{found}; {verdict.reason}",
        training=recipe_rows(verdict.recipe, window, since) if verdict.promote else None,
        promote_on="predecessors" if verdict.promote else "held_out",
        recipe=verdict.recipe if verdict.promote else None,
        shadow=verdict.train,
    )


def recipe_rows(recipe: str, window: Window, since: datetime | None) -> TrainingChoice:
    """Give the rows and weights of a recipe's model that is made after a window.

    :param since: where the present world begins; ``None``: with the first row.
    """
    if recipe == ALL:
        return TrainingChoice(
            start=since, end=window.end, half_life_days=None, why="training on all rows alike"
        )
    return TrainingChoice(
        start=since,
        end=window.end,
        half_life_days=window.days,
        why=f"training on all rows, their weight halving every {window.days:g} days",
    )


def _findings(evidence: WindowEvidence) -> str:
    """Say what both checks found."""
    performance = (evidence.performance or {}).get("reason", "performance not measured: no check of it")
    drift = (evidence.drift or {}).get("headline", "inputs were not checked")
    return f"{performance}; {drift}"


def _choose_training(
    seen: Sequence[WindowEvidence], history: RetrainingHistory, policy: RetrainingPolicy
) -> TrainingChoice:
    """Train on what came after the change when there is enough of it, else on recent rows weighted by age.

    Rows from before a change teach a relation that no longer holds; a few thousand after it teach more.
    """
    end = seen[-1].window.end
    run = _degraded_run(seen)
    rows = sum(item.row_count for item in run)
    if run and rows >= policy.minimum_training_rows:
        return TrainingChoice(
            start=run[0].window.start,
            end=end,
            half_life_days=None,
            why=f"training on the {rows} rows since the change",
        )
    return TrainingChoice(
        start=end - timedelta(days=policy.trailing_days),
        end=end,
        half_life_days=policy.half_life_days,
        why=f"training on the last {policy.trailing_days:g} days, newer rows weighing more",
    )


def _degraded_run(seen: Sequence[WindowEvidence]) -> list[WindowEvidence]:
    """Give the unbroken run of degraded windows that ends with the newest."""
    run: list[WindowEvidence] = []
    for evidence in reversed(seen):
        if not evidence.degraded:
            break
        run.insert(0, evidence)
    return run


def _only_newest_retrains(decisions: list[RetrainingDecision]) -> list[RetrainingDecision]:
    wanting = [decision for decision in decisions if decision.outcome is Outcome.RETRAIN]
    if len(wanting) < 2:
        return decisions
    newest = wanting[-1]
    return [
        replace(
            decision,
            outcome=Outcome.COVERED,
            reason=f"{decision.reason}; covered by the retraining decided for {newest.window}",
            training=None,
        )
        if decision.outcome is Outcome.RETRAIN and decision is not newest
        else decision
        for decision in decisions
    ]
