"""Restraint: reasons not to retrain now although the checks call for it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Literal, NamedTuple

from airflow_mlops.core.decision.blackouts import blacked_out
from airflow_mlops.core.windows import find_time_zone

if TYPE_CHECKING:
    from airflow_mlops.core.decision.evidence import RetrainingHistory, WindowEvidence
    from airflow_mlops.core.decision.retraining_policy import RetrainingPolicy

#: Longest pause after retrainings that did not beat the champion, in windows.
_LONGEST_PAUSE = 8


class Restraint(NamedTuple):
    """What is decided instead of a retraining, and half a sentence why."""

    outcome: Literal["alert", "covered", "postponed"]
    why: str


class Case(NamedTuple):
    """A window whose checks call for a retraining, and all that may speak against it.

    :param seen: this window and those before it, oldest first.
    :param trains: whether there would be a training; else an earlier champion would come back.
    :param tested: whether the new model would be held against the champion, and may lose.
    :param newer: windows after this one that overtook it: they were decided before it, or tell that what it found is over.
    """

    evidence: WindowEvidence
    seen: Sequence[WindowEvidence]
    history: RetrainingHistory
    policy: RetrainingPolicy
    trains: bool
    tested: bool
    newer: Sequence[WindowEvidence] = ()

    @property
    def later(self) -> Sequence[WindowEvidence]:
        """Windows after the last one a retraining was decided for."""
        since = self.history.last_retraining_window_end
        return [item for item in self.seen if since is None or item.window.end > since]


def find_restraint(case: Case) -> Restraint | None:
    """Find the first reason not to retrain for this window; ``None`` when there is none."""
    rules = _RULES if case.trains else _RULES_WITHOUT_TRAINING
    return next((found for rule in rules if (found := rule(case)) is not None), None)


def _covered(case: Case) -> Restraint | None:
    history = case.history
    ends = {
        "retraining decided": history.last_retraining_window_end,
        "return of an earlier champion": history.last_return_window_end,
    }
    what, since = max(ends.items(), key=lambda item: item[1].timestamp() if item[1] else 0.0)
    if since is None or case.evidence.window.end > since:
        return None
    why = f"it is covered by the {what} for a window that ended on {since:%Y-%m-%d}"
    return Restraint("covered", why)


def _overtaken(case: Case) -> Restraint | None:
    """Leave a window alone that is decided late: the newer ones tell how the champion does now."""
    measured = max((item for item in case.newer if item.measured), key=lambda item: item.window, default=None)
    if measured is None:
        return None
    told = "degraded" if measured.degraded else "not degraded"
    return Restraint("covered", f"newer windows are known, and {measured.window} is {told}")


def _replaced(case: Case) -> Restraint | None:
    """Hold nothing against a champion that an earlier one did; a comparison of challengers is about the present one."""
    evidence, champion = case.evidence, case.history.champion_version
    graded = (evidence.performance or {}).get("model_version")
    blamed = evidence.challengers is None and (evidence.degraded or evidence.estimate_degraded)
    if not blamed or None in (graded, champion) or str(graded) == champion:
        return None
    return Restraint("covered", f"version {graded} gave its answers, and version {champion} is champion now")


def _cooling_down(case: Case) -> Restraint | None:
    since, days = case.history.last_retraining_window_end, case.policy.cool_down_days
    if since is None or case.evidence.window.end >= _days_later(since, days, case.policy.time_zone):
        return None
    return Restraint("alert", f"it is cooling down for {days:g} days after the last retraining")


def _days_later(instant: datetime, days: float, time_zone: str) -> datetime:
    """Add days by the clock on the wall: windows of whole days end on it."""
    zone = find_time_zone(time_zone)
    clock = instant.astimezone(zone).replace(tzinfo=None) + timedelta(days=days)
    return clock.replace(tzinfo=zone).astimezone(UTC)


def _few_new_rows(case: Case) -> Restraint | None:
    rows, least = sum(item.row_count for item in case.later), case.policy.minimum_new_rows
    if case.history.last_retraining_window_end is None or rows >= least:
        return None
    return Restraint(
        "alert", f"there are only {rows} of the {least} labelled rows it needs since the last retraining"
    )


def _paused(case: Case) -> Restraint | None:
    """Pause after retrainings that lost, twice as long with every further one."""
    rejections = case.history.rejections
    beyond = rejections - case.policy.rejections_before_pause
    if not case.tested or beyond < 0 or case.history.last_retraining_window_end is None:
        return None
    pause = min(2 ** (beyond + 1), _LONGEST_PAUSE)
    if len(case.later) >= pause:
        return None
    retrainings = f"the last {rejections} retrainings" if rejections > 1 else "the last retraining"
    return Restraint(
        "alert", f"{retrainings} did not beat the champion: the next may come {pause} windows after"
    )


def _not_worth_it(case: Case) -> Restraint | None:
    """Hold the loss of one window against the cost; what predecessors saved was held against it already."""
    cost, lost = case.policy.cost, case.evidence.lost
    if cost is None or lost is None or not case.tested or lost >= cost:
        return None
    return Restraint("alert", f"the window lost {lost:.4g}, less than the {cost:.4g} a retraining costs")


def _over_budget(case: Case) -> Restraint | None:
    now, budget, days = case.history.now, case.policy.budget, case.policy.budget_days
    if now is None or budget is None:
        return None
    spent = sum(time > now - timedelta(days=days) for time in case.history.retrained_at)
    if spent < budget:
        return None
    return Restraint("alert", f"the budget of {budget} in {days:g} days is used up")


def _blacked_out(case: Case) -> Restraint | None:
    now = case.history.now
    until = blacked_out(case.policy.blackouts, now) if now is not None else None
    return Restraint("postponed", f"it {until}") if until is not None else None


#: In order: a retraining that nothing else speaks against is worth waiting for the end of a blackout.
_RULES = (
    _covered,
    _overtaken,
    _replaced,
    _cooling_down,
    _few_new_rows,
    _paused,
    _not_worth_it,
    _over_budget,
    _blacked_out,
)
_RULES_WITHOUT_TRAINING = (_covered, _overtaken, _cooling_down, _blacked_out)
