"""Retraining: read the windows nobody has decided on yet, decide each exactly once, say why."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, is_dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.codec import from_dict, to_dict
from airflow_mlops.core.comparison.promotion import Verdict
from airflow_mlops.core.decision.blackouts import blacked_out
from airflow_mlops.core.decision.challengers import MOST_WINDOWS, ChallengerCheck
from airflow_mlops.core.decision.evidence import RetrainingHistory, WindowEvidence
from airflow_mlops.core.decision.retraining import (
    Outcome,
    RetrainingDecision,
    TrainingChoice,
    TrainingPlan,
)
from airflow_mlops.core.decision.retraining_policy import RetrainingPolicy
from airflow_mlops.core.extension import load_object
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import TransientError
from airflow_mlops.ledger import EntryKind, Ledger, LedgerEntry
from airflow_mlops.ledger.lineage import CHAMPION
from airflow_mlops.steps.base import Step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from airflow_mlops.services import Services

#: Windows before that a policy may look back on: new rows, pauses and a run of degraded windows may go on for months of an hour each.
#: Half a second of reading at most.
LOOK_BACK = MOST_WINDOWS

#: Retrainings that a policy may count.
_REMEMBERED = 100

#: Windows in the result, of those decided and of those that wait: there may be thousands of an hour each.
_SHOWN = 100
#: Who loses a race reads again what the winner decided. Somebody wins every round, so this ends long before.
_ROUNDS = 100

#: What a window is decided on.
CHECKS = (EntryKind.PERFORMANCE_CHECK, EntryKind.DRIFT_CHECK, EntryKind.CHALLENGER_CHECK)


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrainingSpec:
    """What to decide.

    :param model_name: registered model.
    :param required_checks: a window is ripe when these are in the ledger, or the policy's patience with labels is over and all are
        that need none.
    :param policy: parameters of the decision.
    :param decide: import path of the decision, ``decide(evidence, history, policy, previous_checks=...)``.
    :param may_bring_back: whether there is somebody to carry out that an earlier champion comes back.
    :param actor: who decides.
    :param now: time of the decision.
    """

    model_name: str
    required_checks: tuple[EntryKind, ...] = (EntryKind.PERFORMANCE_CHECK, EntryKind.DRIFT_CHECK)
    policy: RetrainingPolicy = field(default_factory=RetrainingPolicy)
    decide: str = "airflow_mlops.core.decision.retraining:decide_retraining"
    may_bring_back: bool = True
    actor: str
    now: datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrainingResult:
    """What was decided, and the training to carry out if there is one.

    :param retrain: whether a training is to be carried out now.
    :param decision_key: ledger key of the decision that wants it.
    :param plan: the training; ``None`` when there is none to carry out.
    :param bring_back: the earlier champion that is to come back now; ``None``: none.
    :param champion_version: in whose place.
    :param verdict: "promote" where a version is to come back: it has met the champion, and earned it.
    :param resumed: the decision was taken earlier, its training never ended.
    :param deploy: its version was promoted, but does not serve yet: it only has to be deployed.
    :param held_out: what is trained or deployed earns its promotion on rows held out of one window, and on no other: a trial before
        it serves can tell more. Not where it has passed one (a rollout in the shadow) since it was promoted.
    :param decisions: what was decided now, window by window; the newest 100, as the ledger has them all.
    :param decision_count: how many they are.
    :param waiting: windows that stay undecided for now, and why; the newest 100.
    :param waiting_count: how many they are.
    """

    model_name: str
    retrain: bool
    reason: str
    decision_key: str | None = None
    plan: TrainingPlan | None = None
    bring_back: str | None = None
    champion_version: str | None = None
    verdict: Verdict | None = None
    resumed: bool = False
    deploy: bool = False
    held_out: bool = False
    decisions: tuple[dict[str, Any], ...] = ()
    decision_count: int = 0
    waiting: tuple[dict[str, Any], ...] = ()
    waiting_count: int = 0


def run(spec: RetrainingSpec, services: Services) -> RetrainingResult:
    """Decide all windows that are ripe; where another decider was faster its decisions stand, and count in what is left to decide."""
    with Ledger.open(services.require("ledger_url")) as ledger:
        for _ in range(_ROUNDS):
            newest = ledger.newest_decision(spec.model_name)
            evidence = _evidence(ledger, spec, _undecided(ledger, spec))
            figures = [
                found.figures() for found in evidence
            ]  # as they are before a policy has had them in hand
            decisions = _decide(ledger, spec, evidence)
            waiting = [item for item in decisions if item.outcome.leaves_undecided]
            new = [
                _entry(spec, item, found)
                for item, found in zip(decisions, figures, strict=True)
                if item not in waiting
            ]
            written = ledger.record_decisions(spec.model_name, new, newest=newest) if new else []
            if written is not None:
                return _result(ledger, spec, written, waiting)
    raise TransientError(
        f"others decided windows of {spec.model_name} {_ROUNDS} times while this task was at it; a retry finds what is left"
    )


def _undecided(ledger: Ledger, spec: RetrainingSpec) -> list[Window]:
    """List the windows that are ripe: with all checks, or with those that are to be had.

    Labels that do not come keep a window from being compared, and patience with them may be none; a check that needs no labels is
    waited for all the same: it comes, unless its task failed for good.
    """
    policy, required = spec.policy, spec.required_checks
    without_labels = tuple(kind for kind in required if kind is not EntryKind.CHALLENGER_CHECK)
    patience = spec.now - timedelta(days=policy.patience_days)
    missing = spec.now - timedelta(days=max(policy.patience_days, policy.missing_check_days))
    listed = ledger.undecided_windows
    ripe = {*listed(spec.model_name, required=required, overdue_since=missing)}
    if len(without_labels) == len(required):
        return sorted(ripe)
    ripe |= {*listed(spec.model_name, required=without_labels, checked_by=patience)}
    if policy.retrain_on_estimate:
        uncompared = sorted({*listed(spec.model_name, required=without_labels)} - ripe)
        ripe |= {found.window for found in _evidence(ledger, spec, uncompared) if found.estimate_degraded}
    return sorted(ripe)


def _decide(ledger: Ledger, spec: RetrainingSpec, evidence: list[WindowEvidence]) -> list[RetrainingDecision]:
    if not evidence:
        return []
    windows = [item.window for item in evidence]
    policy = spec.policy if spec.may_bring_back else replace(spec.policy, bring_back=False)
    return ask_policy(
        spec.decide, evidence, _history(ledger, spec), policy, previous=_previous(ledger, spec, windows)
    )


def ask_policy(
    path: str,
    evidence: Sequence[WindowEvidence],
    history: RetrainingHistory,
    policy: RetrainingPolicy,
    *,
    previous: Sequence[WindowEvidence],
) -> list[RetrainingDecision]:
    """Ask a policy, and see that what it says can be carried out: once it is in the ledger it stands.

    :param path: import path of the policy.
    :raises ValueError: there is none, it failed, or it did not give one sound decision for each window, in their order.
    """
    decide: Any = load_object(path)
    try:
        given = list(decide(evidence, history, policy, previous_checks=previous))
    except Exception as err:
        raise ValueError(
            f"policy {path} failed, so nothing was decided: {type(err).__name__}: {err}. It is called as decide(evidence, "
            "history, policy, previous_checks=...) and gives a list with one RetrainingDecision per window"
        ) from err
    decisions = [_sound(path, item) for item in given]
    windows = [item.window for item in evidence]
    if [decision.window for decision in decisions] != windows:
        raise ValueError(
            f"policy {path} was asked about {len(windows)} windows and gave {len(decisions)} decisions, or gave them in "
            "another order: it must give one per window, in the order of the evidence"
        )
    return decisions


def _sound(path: str, given: Any) -> RetrainingDecision:
    """Give a policy's decision with every field of its type.

    :raises ValueError: it is none, or asks for a training that can't be.
    """
    if not is_dataclass(given) or isinstance(given, type):
        raise ValueError(f"policy {path} gave {given!r:.80}: give RetrainingDecision objects")
    try:
        decision = from_dict(RetrainingDecision, asdict(given))
    except ValueError as err:
        raise ValueError(f"policy {path} gave a decision that is none: {err}") from err
    wrong = _wrong_training(decision)
    if wrong is not None:
        raise ValueError(f"policy {path} decided to retrain for {decision.window}, but {wrong}")
    if decision.outcome is Outcome.BRING_BACK and not (decision.version and decision.champion_version):
        raise ValueError(
            f"policy {path} decided to bring an earlier champion back for {decision.window}, but does not say which version, "
            "and in whose place: give version and champion_version"
        )
    if decision.undoes_since is not None and decision.undoes_since.tzinfo is None:
        raise ValueError(
            f"policy {path} decided for {decision.window} that no change since {decision.undoes_since} lasted, without a time zone: "
            "give undoes_since as an aware time"
        )
    return decision


def _wrong_training(decision: RetrainingDecision) -> str | None:
    """Say why a decision to retrain can't be carried out; ``None`` where it can."""
    training = decision.training
    if decision.outcome is not Outcome.RETRAIN:
        return None
    if training is None:
        return "does not say on what: give its training"
    times = {name: getattr(training, name) for name in ("start", "end", "change", "holdout_start")}
    naive = [name for name, time in times.items() if time is not None and time.tzinfo is None]
    if naive:
        return f"{', '.join(naive)} of its training has no time zone: give aware times, such as those of the window"
    try:
        rows = _plan_window(decision.window, training)
    except ValueError as err:
        return f"its training has no rows: {err}"
    if training.half_life_days is not None and not training.half_life_days > 0:
        return f"half_life_days of its training is {training.half_life_days}: give days above zero, or None"
    if training.holdout_start is not None and not rows.contains(training.holdout_start):
        return f"its training holds out rows from {training.holdout_start} on, which is not in {rows}"
    if decision.promote_on == "predecessors" and not (decision.recipe and decision.champion_version):
        return "promote_on='predecessors' needs the recipe that was compared, and champion_version, which it beat"
    return None


def _entry(spec: RetrainingSpec, decision: RetrainingDecision, figures: dict[str, Any]) -> LedgerEntry:
    return LedgerEntry(
        kind=EntryKind.RETRAINING_DECISION,
        key=f"{spec.model_name}|{decision.window.key}",
        model_name=spec.model_name,
        window=decision.window,
        subject=None,
        summary=f"{decision.outcome} for {decision.window}: {decision.reason}",
        payload=to_dict(decision) | {"evidence": figures},
        actor=spec.actor,
        recorded_at=spec.now,
    )


def _result(
    ledger: Ledger, spec: RetrainingSpec, decided: list[LedgerEntry], waiting: list[RetrainingDecision]
) -> RetrainingResult:
    """Say what is to be done: an open retraining comes first, whenever it was decided."""
    told = RetrainingResult(
        model_name=spec.model_name,
        retrain=False,
        reason=_idle(spec, decided, waiting),
        decisions=tuple(
            {"window": entry.window.key if entry.window else None, **_brief(entry)}
            for entry in decided[-_SHOWN:]
        ),
        decision_count=len(decided),
        waiting=tuple({"window": item.window.key, "reason": item.reason} for item in waiting[-_SHOWN:]),
        waiting_count=len(waiting),
    )
    opened = ledger.open_retraining(spec.model_name)
    if opened is None:
        return told
    until = blacked_out(spec.policy.blackouts, spec.now)
    if (
        until is not None
    ):  # it was decided before, or by a policy that knows no blackouts: nothing is touched all the same
        return replace(told, reason=f"{told.reason}; the retraining decided for {opened.window} {until}")
    current = ledger.aliases(spec.model_name).get(CHAMPION)  # before what may move it is looked for
    promotion = ledger.promotion_for(opened)
    if promotion is not None:
        return _promoted(ledger, told, opened, promotion)
    told = replace(
        told,
        reason=opened.payload["reason"],
        decision_key=opened.key,
        resumed=all(entry.key != opened.key for entry in decided),
    )
    if opened.payload["outcome"] == Outcome.RETRAIN:
        return replace(told, retrain=True, plan=_plan(opened), held_out=_held_out(opened))
    version, champion = str(opened.payload["version"]), str(opened.payload["champion_version"])
    why = f"version {version} was to come back in place of version {champion}"
    if current not in {champion, None}:  # none: it was set before there was a ledger
        why = f"{why}, and the champion is version {current} by now"
    elif not spec.may_bring_back:
        why = f"{why}, and there is no task for it any more"
    else:
        return replace(told, bring_back=version, champion_version=champion, verdict=Verdict.PROMOTE)
    ledger.record(_not_brought_back(spec, opened, why))
    return replace(told, reason=f"{told.reason}; {why}", decision_key=None)


def _not_brought_back(spec: RetrainingSpec, opened: LedgerEntry, why: str) -> LedgerEntry:
    """Close a decision that can't be carried out any more: left open it would be, should that champion ever be champion again."""
    return LedgerEntry(
        kind=EntryKind.RETRAINING_OUTCOME,
        key=opened.key,
        model_name=spec.model_name,
        window=None,
        subject=opened.payload["version"],
        summary=f"the champion of {spec.model_name} stays: {why}",
        payload={"outcome": "rejected", "reason": why, "model_version": opened.payload["version"]},
        actor=spec.actor,
        recorded_at=spec.now,
    )


def _plan(decision: LedgerEntry) -> TrainingPlan:
    choice = from_dict(TrainingChoice, decision.payload["training"])
    return TrainingPlan(
        window=_plan_window(decision.window, choice),
        rows="window" if choice.start else "all",
        half_life_days=choice.half_life_days,
        holdout_start=choice.holdout_start,
        keep_twin=_held_out(decision),
        recipe=decision.payload["recipe"],
    )


def _held_out(decision: LedgerEntry) -> bool:
    """Tell whether a decision's version is promoted on rows held out, and not on what its predecessors earned."""
    return decision.payload["outcome"] == Outcome.RETRAIN and decision.payload.get("promote_on") == "held_out"


def _plan_window(decided: Window | None, choice: TrainingChoice) -> Window:
    start = choice.start or (decided.start if decided else choice.end - timedelta(days=1))
    return Window(start=start, end=choice.end)


def _promoted(
    ledger: Ledger, told: RetrainingResult, opened: LedgerEntry, promotion: LedgerEntry
) -> RetrainingResult:
    """Have the promoted version deployed, not trained again; nothing when somebody has moved the alias on since."""
    alias, version = str(promotion.payload["alias"]), str(promotion.payload["model_version"])
    current = ledger.aliases(told.model_name).get(alias)
    if current != version:
        return replace(
            told, reason=f"{told.reason}; version {version} was promoted, and version {current} since"
        )
    return replace(
        told,
        deploy=True,
        decision_key=opened.key,
        resumed=True,
        held_out=_held_out(opened) and not _passed_trial(ledger, promotion),
        reason=f"version {version} was promoted for {opened.window}, but its deployment was never recorded",
    )


def _passed_trial(ledger: Ledger, promotion: LedgerEntry) -> bool:
    """Tell whether the version ended its last shadow since it was promoted well: another one would be another chance to be rejected by chance.

    Other strategies do not count: what they let through serves, and a deployment that failed says nothing about the trial before it.
    """
    rollouts = ledger.entries(
        kind=EntryKind.ROLLOUT, model_name=promotion.model_name, subject=promotion.subject, limit=1_000
    )
    ends = (
        str(entry.payload["event"]["what"])
        for entry in rollouts
        if (entry.entry_id or 0) > (promotion.entry_id or 0) and entry.payload.get("strategy") == "shadow"
    )
    return next((what for what in ends if what in ("finished", "rolled_back")), None) == "finished"


def _idle(spec: RetrainingSpec, decided: list[LedgerEntry], waiting: list[RetrainingDecision]) -> str:
    if decided:
        return decided[-1].summary
    if waiting:
        last = waiting[-1]
        why = "is postponed" if last.outcome is Outcome.POSTPONED else "waits for labels"
        return f"{last.window} {why}: {last.reason}"
    return f"no window of {spec.model_name} is ripe for a decision"


def _brief(entry: LedgerEntry) -> dict[str, Any]:
    return {"outcome": Outcome(entry.payload["outcome"]), "reason": entry.payload["reason"]}


def _evidence(ledger: Ledger, spec: RetrainingSpec, windows: Sequence[Window]) -> list[WindowEvidence]:
    found = ledger.checks_of(spec.model_name, windows, CHECKS)
    return [
        collect_evidence(window, of.checks, spec.now, first_checked_at=of.first_checked_at)
        for window in windows
        if (of := found.get(window)) is not None
    ]


def collect_evidence(
    window: Window, checks: Sequence[LedgerEntry], now: datetime, *, first_checked_at: datetime | None = None
) -> WindowEvidence:
    """Collect what the checks of a window found; of several of a kind the newest counts, a grade more than none.

    :param checks: of this window, newest first; at least one.
    :param now: time of the decision.
    :param first_checked_at: when it was first looked at; ``None``: by the first of these checks.
    """
    compared = next(
        (entry.payload["check"] for entry in checks if entry.kind is EntryKind.CHALLENGER_CHECK), None
    )
    drift = next((check for check in checks if check.kind is EntryKind.DRIFT_CHECK), None)
    grades = [check for check in checks if check.kind is EntryKind.PERFORMANCE_CHECK]
    grades.sort(key=lambda check: not check.payload.get("measured"))
    checked = grades[0] if grades else drift
    first = first_checked_at or min(check.recorded_at for check in checks)
    return WindowEvidence(
        window=window,
        performance=grades[0].payload if grades else None,
        drift=drift.payload if drift else None,
        challengers=from_dict(ChallengerCheck, compared) if compared else None,
        row_count=int(checked.payload["row_count"]) if checked else 0,
        waited_days=(now - first) / timedelta(days=1),
    )


def _previous(ledger: Ledger, spec: RetrainingSpec, undecided: list[Window]) -> list[WindowEvidence]:
    """Give what was found in the windows before the newest undecided one, and in those after it where it is late, oldest first."""
    newest = undecided[-1]
    before = ledger.checked_windows(
        spec.model_name, CHECKS, ended_by=newest.start, limit=LOOK_BACK + len(undecided)
    )
    earlier = [window for window in before if window not in set(undecided)][-LOOK_BACK:]
    newer = ledger.checked_windows(spec.model_name, CHECKS, decided_from=newest.end, limit=LOOK_BACK)
    return _evidence(ledger, spec, [*earlier, *newer])


def _history(ledger: Ledger, spec: RetrainingSpec) -> RetrainingHistory:
    retrainings = ledger.retrainings(spec.model_name, limit=_REMEMBERED)
    ended = {
        entry.key: str(entry.payload["outcome"])
        for entry in ledger.entries(
            kind=EntryKind.RETRAINING_OUTCOME, model_name=spec.model_name, limit=_REMEMBERED
        )
    }
    promotions = [move for move in ledger.moves(spec.model_name) if move.kind is EntryKind.PROMOTION]
    returns = ledger.retrainings(spec.model_name, outcomes=[Outcome.BRING_BACK], limit=_REMEMBERED)
    came_back = {entry.key for entry in returns}
    fresh = [move for move in promotions if move.payload.get("decision_key") not in came_back]
    # One that was promoted, and not deployed before the next was decided, beat the champion all the same.
    earned = {str(move.payload.get("decision_key")): "promoted" for move in promotions}
    outcomes = [(earned | ended).get(entry.key) for entry in retrainings]
    return RetrainingHistory(
        now=spec.now,
        retrained_at=tuple(entry.recorded_at for entry in retrainings),
        last_retraining_window_end=max(
            (entry.window.end for entry in retrainings if entry.window), default=None
        ),
        last_return_window_end=max((entry.window.end for entry in returns if entry.window), default=None),
        champion_since=fresh[-1].recorded_at if fresh else None,
        champion_version=ledger.aliases(spec.model_name).get(CHAMPION),
        recent_outcomes=tuple(outcome for outcome in outcomes if outcome is not None),
        world_since=ledger.world_since(spec.model_name),
    )


STEP = Step(name="retraining", spec=RetrainingSpec, result=RetrainingResult, run=run)
