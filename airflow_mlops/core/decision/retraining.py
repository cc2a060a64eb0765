"""Retraining: one decision per window, from what the checks found, with its reason in a sentence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Literal

from airflow_mlops.core.decision.challengers import (
    ALL,
    FEWEST_LEVELS,
    RECENT,
    came_back,
    judge_challengers,
    world_changed,
)
from airflow_mlops.core.decision.restraint import Case, find_restraint
from airflow_mlops.core.decision.retraining_policy import RetrainingPolicy as RetrainingPolicy  # noqa: TC001  # users do so from here
from airflow_mlops.core.windows import Window

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow_mlops.core.decision.challengers import ChallengerCheck, Contender
    from airflow_mlops.core.decision.evidence import RetrainingHistory, WindowEvidence


#: What a new model may be promoted on, see :class:`RetrainingDecision`.
PromoteOn = Literal["held_out", "predecessors", "untested"]

#: Newest share of the decided window that a model is tested on.
_TESTED_ON = 0.2


class Outcome(StrEnum):
    """What was decided for a window."""

    RETRAIN = "retrain"
    BRING_BACK = "bring_back"
    ALERT = "alert"
    WAIT_FOR_LABELS = "wait_for_labels"
    POSTPONED = "postponed"
    NOTHING = "nothing"
    COVERED = "covered"

    @property
    def acts(self) -> bool:
        """Whether the champion may be replaced."""
        return self in {Outcome.RETRAIN, Outcome.BRING_BACK}

    @property
    def leaves_undecided(self) -> bool:
        """Whether it is no decision yet: labels are late, or a retraining has to wait for the end of a blackout."""
        return self in {Outcome.WAIT_FOR_LABELS, Outcome.POSTPONED}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingChoice:
    """What to train on.

    :param start: first instant of the training window; ``None``: with the first row there is.
    :param end: first instant after it.
    :param half_life_days: weight of a row halves with this age; ``None``: equal weights.
    :param why: half a sentence.
    :param change: when the world changed, where the rows are those since then.
    :param holdout_start: rows from here on are held out for the test against the champion; ``None``: the usual share.
    """

    start: datetime | None
    end: datetime
    half_life_days: float | None
    why: str
    change: datetime | None = None
    holdout_start: datetime | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingPlan:
    """What a training is asked for, as ``TrainModelOperator(plan=...)`` takes it.

    :param window: rows to use; of other rules than ``window`` only its end counts.
    :param rows: ``window``, ``all`` before its end, or ``since_change``.
    :param half_life_days: weight of a row halves with this age; ``None``: equal weights.
    :param holdout_start: rows from here on are held out; ``None``: the usual share.
    :param refit: whether the model learns from all rows in the end, the held-out ones as well.
    :param keep_twin: whether its twin that has not is kept, to be held against the champion.
    :param mlflow_copy: whether it is stored for MLflow's own loaders as well.
    :param recipe: name of the way it is made; ``None``: it has none.
    """

    window: Window
    rows: Literal["window", "all", "since_change"]
    half_life_days: float | None = None
    holdout_start: datetime | None = None
    refit: bool = True
    keep_twin: bool = False
    mlflow_copy: bool = True
    recipe: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrainingDecision:
    """The decision for one window.

    :param training: what to train the next champion on; ``None`` when there will be none.
    :param promote_on: what it is promoted on: its twin's test on rows ``held_out``, the tests of its ``predecessors``, or
        nothing: ``untested``, for a policy of yours that wants that.
    :param recipe: how it is made; ``None`` when it is no model of a recipe.
    :param version: the earlier champion that is to come back.
    :param undoes_since: it knows the world before this time only: no change since then lasted, and older rows count again.
    :param champion_version: the champion that its predecessors, or it, were held against.
    :param grounds: what they showed, a sentence.
    :param shadow: recipes whose next model is worth a training, so that it can be compared in the next window.
    """

    window: Window
    outcome: Outcome
    reason: str
    training: TrainingChoice | None = None
    promote_on: PromoteOn = "held_out"
    recipe: str | None = None
    version: str | None = None
    undoes_since: datetime | None = None
    champion_version: str | None = None
    grounds: str = ""
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
    :param previous_checks: windows that were decided before, oldest first, whatever was decided for them. Those after a window of
        ``evidence`` say that it comes late: where one of them is measured, the older one starts nothing any more. Nor does one of
        ``evidence`` where all is well in the newest measured one of it.
    :returns: one decision per window of ``evidence``, in the same order.
    """
    known = sorted([*previous_checks, *evidence], key=lambda item: item.window)
    decisions = []
    for window_evidence in evidence:
        seen = [item for item in known if item.window <= window_evidence.window]
        newer = [item for item in previous_checks if item.window.start >= window_evidence.window.end]
        newer += _over_by_now(window_evidence, evidence, seen, history, policy)
        decisions.append(_decide(window_evidence, seen, history, policy, newer=newer))
    return _only_newest_acts(decisions)


def _over_by_now(
    late: WindowEvidence,
    undecided: Sequence[WindowEvidence],
    seen: Sequence[WindowEvidence],
    history: RetrainingHistory,
    policy: RetrainingPolicy,
) -> list[WindowEvidence]:
    """Give the newest measured one of the undecided windows after this one, if all is well in it.

    Where it is not, each has its say: what an alarm is in the first window after a change is none in the second. Nor where the models
    of before this window are as surprised by that one: a model may keep what was promised in a world that is another one.
    """
    newest = max(
        (item for item in undecided if item.measured and item.window.start >= late.window.end),
        key=lambda item: item.window,
        default=None,
    )
    if newest is None or newest.degraded:
        return []
    if late.challengers is not None and newest.challengers is not None:
        instead = [*(item for item in seen if item.window != late.window), newest]
        checks = _compared(instead, history.world_since)
        if newest.challengers.window in [check.window for check in checks[-1:]] and world_changed(
            checks, policy.challengers
        ):
            return []
    return [newest]


def _compared(seen: Sequence[WindowEvidence], since: datetime | None) -> list[ChallengerCheck]:
    """Give the comparisons of the present world, and in each the models that know something of it."""
    checks = [item.challengers for item in seen if item.challengers is not None]
    if since is None:
        return checks
    return [check.after(since) for check in checks if check.window.start > since]


def _decide(
    evidence: WindowEvidence,
    seen: Sequence[WindowEvidence],
    history: RetrainingHistory,
    policy: RetrainingPolicy,
    *,
    newer: Sequence[WindowEvidence],
) -> RetrainingDecision:
    known_enough = not evidence.awaits_labels or (policy.retrain_on_estimate and evidence.estimate_degraded)
    if not known_enough and evidence.waited_days < policy.patience_days:
        return RetrainingDecision(
            window=evidence.window, outcome=Outcome.WAIT_FOR_LABELS, reason=_findings(evidence)
        )
    if evidence.challengers is not None:
        wished = _by_challengers(evidence, seen, history, policy)
    else:
        wished = _by_checks(evidence, seen, history, policy)
    if not wished.outcome.acts:
        return wished
    trains = wished.outcome is Outcome.RETRAIN
    tested = wished.promote_on == "held_out"
    restraint = find_restraint(
        Case(evidence, seen, history, policy, trains=trains, tested=tested, newer=newer)
    )
    if restraint is None:
        return wished
    return replace(
        wished,
        outcome=Outcome(restraint.outcome),
        reason=f"{wished.reason}; but {restraint.why}",
        training=None,
        recipe=None,
        version=None,
        undoes_since=None,
        promote_on="held_out",
    )


def _by_checks(
    evidence: WindowEvidence,
    seen: Sequence[WindowEvidence],
    history: RetrainingHistory,
    policy: RetrainingPolicy,
) -> RetrainingDecision:
    """Decide by what was promised at training, where no challengers are compared."""
    window, found = evidence.window, _findings(evidence)
    called_for = (
        evidence.degraded
        or (evidence.drifted and policy.retrain_on_drift)
        or (evidence.estimate_degraded and policy.retrain_on_estimate)
    )
    old = _too_old(history, policy)
    if called_for or old:
        training = _choose_training(seen, policy)
        reason = "; ".join(part for part in (found, old, training.why) if part)
        return RetrainingDecision(window=window, outcome=Outcome.RETRAIN, reason=reason, training=training)
    # Never graded is not the same as fine, unless nobody wanted to wait for labels.
    given_up = (evidence.awaits_labels or evidence.labels_given_up) and policy.patience_days > 0
    odd = evidence.drifted or evidence.estimate_degraded or given_up
    return RetrainingDecision(window=window, outcome=Outcome.ALERT if odd else Outcome.NOTHING, reason=found)


def _by_challengers(
    evidence: WindowEvidence,
    seen: Sequence[WindowEvidence],
    history: RetrainingHistory,
    policy: RetrainingPolicy,
) -> RetrainingDecision:
    """Decide by what fresh models were worth; where the world changed at once there are none yet, and a test has to tell."""
    since = history.world_since
    checks = _compared(seen, since)
    window, found = evidence.window, _findings(evidence)
    if not checks:
        return RetrainingDecision(
            window=window,
            outcome=Outcome.NOTHING,
            reason=f"{found}; no window since the change of {since:%Y-%m-%d} has been compared",
            shadow=(RECENT, ALL),
        )
    verdict = judge_challengers(checks, policy.challengers, cost=policy.cost)
    decision = RetrainingDecision(
        window=window, outcome=Outcome.NOTHING, reason=f"{verdict.reason}; {found}", shadow=verdict.train
    )
    earlier = came_back(_compared(seen, None), policy.challengers, since=since) if policy.bring_back else None
    if earlier is not None:
        return _brought_back(decision, checks[-1], earlier, since, found)
    # Until it is known how much the loss varies between windows, what was promised at training has to do.
    changed = verdict.alarm or (evidence.degraded and len(checks) <= FEWEST_LEVELS)
    afresh = _with_test(_after_change(evidence, verdict.recipe, since, policy), window)
    # Of all rows it is the model its predecessors have earned a promotion for, if they have.
    if changed and (afresh.change is not None or not verdict.promote):
        surprised = "the newest models are as surprised as the champion: the world changed"
        words = surprised if verdict.alarm else "challengers are too young to tell by"
        return replace(
            decision,
            outcome=Outcome.RETRAIN,
            reason=f"{words}; {afresh.why}; {found}",
            training=afresh,
            recipe=ALL if afresh.change else verdict.recipe,
        )
    if verdict.promote:
        return replace(
            decision,
            outcome=Outcome.RETRAIN,
            training=recipe_rows(verdict.recipe, window, since),
            promote_on="predecessors",
            recipe=verdict.recipe,
            champion_version=checks[-1].champion,
            grounds=verdict.reason,
        )
    old = _too_old(history, policy)
    if old:
        training = _with_test(recipe_rows(verdict.recipe, window, since), window)
        return replace(
            decision,
            outcome=Outcome.RETRAIN,
            reason=f"{old}; {training.why}; {decision.reason}",
            training=training,
            recipe=verdict.recipe,
        )
    return replace(decision, outcome=Outcome.ALERT) if evidence.degraded else decision


def _brought_back(
    decision: RetrainingDecision,
    check: ChallengerCheck,
    earlier: Contender,
    since: datetime | None,
    found: str,
) -> RetrainingDecision:
    """Go back to a model that is there: what it knows is true again, and no training tells it better."""
    today = check.best_today
    undone = since is not None and earlier.trained_until <= since
    lasted = f": the change of {since:%Y-%m-%d} did not last" if undone else ""
    grounds = (
        f"version {earlier.version} lost {earlier.loss:.4g} a row, and the best model of today, version {today.version}, "
        f"{today.loss:.4g}: what it knew is true again{lasted}"
    )
    return replace(
        decision,
        outcome=Outcome.BRING_BACK,
        reason=f"{grounds}; {found}",
        version=earlier.version,
        undoes_since=earlier.trained_until if undone else None,
        champion_version=check.champion,
        grounds=grounds,
        shadow=(RECENT, ALL) if undone else decision.shadow,
    )


def _after_change(
    evidence: WindowEvidence, recipe: str, since: datetime | None, policy: RetrainingPolicy
) -> TrainingChoice:
    """Train on the first window after a change alone, if it is large enough."""
    window = evidence.window
    if evidence.row_count < policy.minimum_training_rows:
        return recipe_rows(recipe, window, since)
    return TrainingChoice(
        start=window.start,
        end=window.end,
        half_life_days=None,
        why="training on this window alone",
        change=window.start,
    )


def _with_test(training: TrainingChoice, window: Window) -> TrainingChoice:
    return replace(training, holdout_start=window.end - _TESTED_ON * (window.end - window.start))


def _too_old(history: RetrainingHistory, policy: RetrainingPolicy) -> str | None:
    age, limit = history.age_days, policy.maximum_age_days
    if age is None or limit is None or age <= limit:
        return None
    return f"the last retraining was {age:.0f} days ago, and at least every {limit:g} days there is to be one"


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


def _choose_training(seen: Sequence[WindowEvidence], policy: RetrainingPolicy) -> TrainingChoice:
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
            change=run[0].window.start,
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


def _only_newest_acts(decisions: list[RetrainingDecision]) -> list[RetrainingDecision]:
    acting = [decision for decision in decisions if decision.outcome.acts]
    if len(acting) < 2:
        return decisions
    newest = acting[-1]
    return [
        replace(
            decision,
            outcome=Outcome.COVERED,
            reason=f"{decision.reason}; covered by the decision for {newest.window}",
            training=None,
            version=None,
            undoes_since=None,
        )
        if decision.outcome.acts and decision is not newest
        else decision
        for decision in decisions
    ]
