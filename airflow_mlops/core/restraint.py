"""Restraint: reasons not to retrain now although the checks call for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, tzinfo
from typing import TYPE_CHECKING, Literal, NamedTuple
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

if TYPE_CHECKING:
    from airflow_mlops.core.evidence import RetrainingHistory, WindowEvidence
    from airflow_mlops.core.retraining import RetrainingPolicy

#: Longest pause after retrainings that did not beat the champion, in windows.
_LONGEST_PAUSE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Blackout:
    """A time in which nothing is retrained.

    :param start: first instant, with its time zone.
    :param end: first instant after it.
    :param repeat: ``never``, or every ``week`` after the first: a freeze from Friday evening to Monday morning.
    :param time_zone: whose clock the weeks follow, such as ``Europe/Berlin``, with its summer time; ``None``: that of ``start``.
    :param why: for the sentence of the decision.
    :raises ValueError: times without a time zone, in the wrong order, a week that would never end, or no such time zone.
    """

    start: datetime
    end: datetime
    repeat: Literal["never", "week"] = "never"
    time_zone: str | None = None
    why: str = "blackout"

    def __post_init__(self) -> None:
        if self.start.tzinfo is None or self.end.tzinfo is None:
            raise ValueError(
                f"blackout {self.start} to {self.end}: a time has no time zone, write it as 2026-12-24T00:00:00+00:00"
            )
        if self.end <= self.start:
            raise ValueError(f"blackout {self.start} to {self.end} is empty: its end must be after its start")
        if self.repeat == "week" and self.end - self.start >= timedelta(weeks=1):
            raise ValueError(
                f"blackout {self.start} to {self.end} comes every week and lasts one: it never ends"
            )
        self._zone()

    def until(self, now: datetime) -> datetime | None:
        """Give the end of the blackout that ``now`` lies in; ``None`` when it lies in none."""
        if self.repeat == "never":
            return self.end if self.start <= now < self.end else None
        zone = self._zone()
        # By the clock on the wall: a week in which summer time begins has an hour less.
        start, end, clock = (
            time.astimezone(zone).replace(tzinfo=None) for time in (self.start, self.end, now)
        )
        shift = max((clock - start) // timedelta(weeks=1), 0) * timedelta(weeks=1)
        return (end + shift).replace(tzinfo=zone) if start + shift <= clock < end + shift else None

    def _zone(self) -> tzinfo | None:
        if self.time_zone is None:
            return self.start.tzinfo
        try:
            return ZoneInfo(self.time_zone)
        except (ZoneInfoNotFoundError, ValueError, OSError) as err:
            raise ValueError(
                f"blackout {self.start} to {self.end}: there is no time zone {self.time_zone!r}, write it as Europe/Berlin"
            ) from err


class Restraint(NamedTuple):
    """What is decided instead of a retraining, and half a sentence why."""

    outcome: Literal["alert", "covered", "postponed"]
    why: str


class Case(NamedTuple):
    """A window whose checks call for a retraining, and all that may speak against it.

    :param seen: this window and those before it, oldest first.
    :param trains: whether there would be a training; else an earlier champion would come back.
    :param tested: whether the new model would be held against the champion, and may lose.
    """

    evidence: WindowEvidence
    seen: Sequence[WindowEvidence]
    history: RetrainingHistory
    policy: RetrainingPolicy
    trains: bool
    tested: bool

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


def _cooling_down(case: Case) -> Restraint | None:
    since, days = case.history.last_retraining_window_end, case.policy.cool_down_days
    if since is None or case.evidence.window.end >= since + timedelta(days=days):
        return None
    return Restraint("alert", f"it is cooling down for {days:g} days after the last retraining")


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


def blacked_out(blackouts: Sequence[Blackout], now: datetime) -> str | None:
    """Say until when a blackout lasts, and which; ``None``: there is none now."""
    for blackout in blackouts:
        end = blackout.until(now)
        if end is not None:
            return f"has to wait until {end:%Y-%m-%d %H:%M %Z}: {blackout.why}"
    return None


def _blacked_out(case: Case) -> Restraint | None:
    now = case.history.now
    until = blacked_out(case.policy.blackouts, now) if now is not None else None
    return Restraint("postponed", f"it {until}") if until is not None else None


#: In order: a retraining that nothing else speaks against is worth waiting for the end of a blackout.
_RULES = (_covered, _cooling_down, _few_new_rows, _paused, _not_worth_it, _over_budget, _blacked_out)
_RULES_WITHOUT_TRAINING = (_covered, _cooling_down, _blacked_out)
