"""Reasons not to retrain now although the checks call for it."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from airflow_mlops.core.codec import from_dict, to_dict
from airflow_mlops.core.decision.blackouts import Blackout
from airflow_mlops.core.decision.evidence import RetrainingHistory, WindowEvidence
from airflow_mlops.core.decision.retraining import (
    Outcome,
    RetrainingDecision,
    RetrainingPolicy,
    decide_retraining,
)
from airflow_mlops.core.windows import Window

START = datetime(2024, 1, 1, tzinfo=UTC)


def degraded(index: int, **more: Any) -> WindowEvidence:
    start = START + timedelta(days=30 * index)
    performance = {
        "measured": True,
        "degraded": True,
        "reason": "degraded",
        "awaits_labels": False,
        "value": 3.0,
        "reference_value": 2.0,
        "loss_mean": 3.0,
        "reference_loss_mean": 2.0,
        "row_count": 1000,
    }
    return WindowEvidence(
        window=Window(start=start, end=start + timedelta(days=30)),
        performance=performance,
        drift=None,
        row_count=1000,
        **more,
    )


def decide(
    index: int, history: RetrainingHistory | None = None, *, previous: int = 0, **policy: Any
) -> RetrainingDecision:
    (decision,) = decide_retraining(
        [degraded(index)],
        history or RetrainingHistory(),
        RetrainingPolicy(**policy),
        previous_checks=[degraded(number) for number in range(index - previous, index)],
    )
    return decision


def after(index: int, **more: Any) -> RetrainingHistory:
    """A retraining was decided for the window of this number."""
    return RetrainingHistory(last_retraining_window_end=degraded(index).window.end, **more)


class TestBudget:
    NOW = START + timedelta(days=100)

    def spent(self, *days: float) -> RetrainingHistory:
        return RetrainingHistory(
            now=self.NOW, retrained_at=tuple(self.NOW - timedelta(days=day) for day in days)
        )

    def test_a_month_has_so_many_retrainings(self) -> None:
        assert decide(3, self.spent(1), budget=2).outcome is Outcome.RETRAIN
        stopped = decide(3, self.spent(1, 29), budget=2)
        assert (stopped.outcome, stopped.training) == (Outcome.ALERT, None)
        assert "the budget of 2 in 30 days is used up" in stopped.reason

    def test_those_of_before_do_not_count(self) -> None:
        assert decide(3, self.spent(1, 31), budget=2).outcome is Outcome.RETRAIN
        assert decide(3, self.spent(1, 31), budget=2, budget_days=60).outcome is Outcome.ALERT


class TestBlackout:
    FRIDAY = datetime(2024, 1, 5, 18, tzinfo=UTC)

    def test_a_window_waits_for_its_end_and_stays_undecided(self) -> None:
        freeze = Blackout(start=self.FRIDAY, end=self.FRIDAY + timedelta(days=2), why="year's end")
        inside = RetrainingHistory(now=self.FRIDAY + timedelta(days=1))
        waiting = decide(3, inside, blackouts=(freeze,))
        assert waiting.outcome is Outcome.POSTPONED
        assert waiting.outcome.leaves_undecided
        assert "it has to wait until 2024-01-07 18:00 UTC: year's end" in waiting.reason
        late = RetrainingHistory(now=freeze.end)
        assert decide(3, late, blackouts=(freeze,)).outcome is Outcome.RETRAIN

    @pytest.mark.parametrize("weeks", [0, 1, 200])
    def test_every_week(self, weeks: int) -> None:
        weekend = Blackout(start=self.FRIDAY, end=self.FRIDAY + timedelta(hours=60), repeat="week")
        later = self.FRIDAY + timedelta(weeks=weeks)
        assert weekend.until(later) == later + timedelta(hours=60)
        assert weekend.until(later + timedelta(hours=60)) is None
        assert weekend.until(later + timedelta(hours=59)) is not None

    def test_a_weekly_one_follows_the_clock_on_the_wall(self) -> None:
        told = {"start": "2026-01-02T17:00:00+01:00", "end": "2026-01-05T07:00:00+01:00", "repeat": "week"}
        berlin = from_dict(Blackout, told | {"time_zone": "Europe/Berlin"})
        fixed, zone = from_dict(Blackout, told), ZoneInfo("Europe/Berlin")
        friday, monday = datetime(2026, 7, 3, 17, tzinfo=zone), datetime(2026, 7, 6, 7, tzinfo=zone)
        minute = timedelta(minutes=1)
        for now, inside in (
            (friday - minute, False),
            (friday, True),
            (monday - minute, True),
            (monday, False),
        ):
            assert (berlin.until(now.astimezone(UTC)) == monday) is inside
        assert fixed.until(friday.astimezone(UTC)) is None  # 16:00 by the offset of its start
        assert fixed.until(monday.astimezone(UTC)) is not None
        # The same in Python, where a time knows its zone; and over the night in which summer time begins.
        own = Blackout(
            start=datetime(2026, 1, 2, 17, tzinfo=zone),
            end=datetime(2026, 1, 5, 7, tzinfo=zone),
            repeat="week",
        )
        assert own.until(friday.astimezone(UTC)) == monday
        spring = datetime(
            2026, 3, 30, 4, 59, tzinfo=UTC
        )  # a Monday, 6:59 by the clock that has just been put forward
        assert (berlin.until(spring), berlin.until(spring + minute)) == (spring + minute, None)

    def test_none_before_the_first(self) -> None:
        weekend = Blackout(start=self.FRIDAY, end=self.FRIDAY + timedelta(hours=60), repeat="week")
        assert weekend.until(self.FRIDAY - timedelta(weeks=1)) is None

    def test_another_reason_not_to_retrain_is_not_worth_waiting(self) -> None:
        freeze = Blackout(start=self.FRIDAY, end=self.FRIDAY + timedelta(days=2))
        history = RetrainingHistory(now=self.FRIDAY, retrained_at=(self.FRIDAY,))
        assert decide(3, history, blackouts=(freeze,), budget=1).outcome is Outcome.ALERT

    def test_it_reads_from_the_arguments_of_a_task(self) -> None:
        given = {"blackouts": [{"start": "2024-01-05T18:00:00+01:00", "end": "2024-01-08T06:00:00+01:00"}]}
        policy = from_dict(RetrainingPolicy, given)
        assert policy.blackouts[0].until(self.FRIDAY) is not None
        assert from_dict(RetrainingPolicy, to_dict(policy)) == policy

    @pytest.mark.parametrize(
        ("start", "end", "repeat", "why"),
        [
            (datetime(2024, 1, 5), FRIDAY, "never", "no time zone"),
            (FRIDAY, FRIDAY, "never", "is empty"),
            (FRIDAY, FRIDAY + timedelta(weeks=1), "week", "never ends"),
        ],
    )
    def test_what_makes_no_sense(self, start: datetime, end: datetime, repeat: Any, why: str) -> None:
        with pytest.raises(ValueError, match=why):
            Blackout(start=start, end=end, repeat=repeat)

    def test_a_zone_that_is_not_there(self) -> None:
        with pytest.raises(ValueError, match="there is no time zone 'Berlin', write it as Europe/Berlin"):
            Blackout(start=self.FRIDAY, end=self.FRIDAY + timedelta(days=1), time_zone="Berlin")


class TestRejections:
    def lost(self, count: int) -> RetrainingHistory:
        return after(2, recent_outcomes=("reject",) * count + ("promoted", "reject"))

    def test_the_pause_doubles_with_every_one(self) -> None:
        for rejections, pause in [(0, 1), (1, 1), (2, 2), (3, 4), (4, 8), (9, 8)]:
            waited = next(
                windows
                for windows in range(1, 20)
                if decide(2 + windows, self.lost(rejections), previous=windows + 1).outcome is Outcome.RETRAIN
            )
            assert waited == pause

    def test_the_sentence_says_what_happened(self) -> None:
        told = decide(3, self.lost(2), previous=2)
        assert told.outcome is Outcome.ALERT
        assert (
            "the last 2 retrainings did not beat the champion: the next may come 2 windows after"
            in told.reason
        )


class TestCost:
    def test_a_window_that_lost_less_than_a_retraining_costs(self) -> None:
        assert degraded(1).lost == pytest.approx(1000.0)
        assert decide(1, cost=900.0).outcome is Outcome.RETRAIN
        told = decide(1, cost=1100.0)
        assert told.outcome is Outcome.ALERT
        assert "the window lost 1000, less than the 1100 a retraining costs" in told.reason

    def test_it_is_counted_in_losses_whichever_way_the_metric_points(self) -> None:
        """Accuracy fell from .8 to .6: of 1,000 rows 200 more were wrong."""
        window = degraded(1)
        figures = {"value": 0.6, "reference_value": 0.8, "loss_mean": 0.4, "reference_loss_mean": 0.2}
        accuracy = replace(window, performance={**(window.performance or {}), **figures})
        assert accuracy.lost == pytest.approx(200.0)
        (told,) = decide_retraining([accuracy], RetrainingHistory(), RetrainingPolicy(cost=100.0))
        assert told.outcome is Outcome.RETRAIN


class TestRows:
    def test_labelled_rows_since_the_last_retraining(self) -> None:
        assert decide(3, after(2), previous=2, minimum_new_rows=1001).outcome is Outcome.ALERT
        assert decide(4, after(2), previous=2, minimum_new_rows=1001).outcome is Outcome.RETRAIN
        assert decide(1, minimum_new_rows=10_000).outcome is Outcome.RETRAIN  # the first ever


class TestAge:
    def fine(self, history: RetrainingHistory, **policy: Any) -> RetrainingDecision:
        window = degraded(9)
        performance = {"measured": True, "degraded": False, "reason": "as promised"}
        good = WindowEvidence(window=window.window, performance=performance, drift=None, row_count=1000)
        return decide_retraining([good], history, RetrainingPolicy(**policy))[0]

    def test_a_champion_gets_too_old(self) -> None:
        now = START + timedelta(days=300)
        history = RetrainingHistory(now=now, champion_since=START)
        assert self.fine(history).outcome is Outcome.NOTHING
        assert self.fine(history, maximum_age_days=300).outcome is Outcome.NOTHING
        told = self.fine(history, maximum_age_days=299)
        assert (told.outcome, told.promote_on) == (Outcome.RETRAIN, "held_out")
        assert "300 days ago" in told.reason

    def test_an_attempt_counts_though_it_lost(self) -> None:
        now = START + timedelta(days=300)
        tried = RetrainingHistory(
            now=now,
            champion_since=START,
            retrained_at=(now - timedelta(days=3),),
            recent_outcomes=("reject",),
        )
        assert self.fine(tried, maximum_age_days=299).outcome is Outcome.NOTHING


class TestEstimate:
    def unlabelled(self, **policy: Any) -> RetrainingDecision:
        performance = {
            "measured": False,
            "awaits_labels": True,
            "degraded": False,
            "estimate_degraded": True,
            "reason": "estimated",
        }
        found = WindowEvidence(window=degraded(1).window, performance=performance, drift=None, row_count=0)
        return decide_retraining([found], RetrainingHistory(), RetrainingPolicy(**policy))[0]

    def test_labels_are_waited_for_unless_told_otherwise(self) -> None:
        assert self.unlabelled().outcome is Outcome.WAIT_FOR_LABELS
        assert self.unlabelled(retrain_on_estimate=True).outcome is Outcome.RETRAIN

    def test_where_none_will_come_it_is_an_alert(self) -> None:
        assert self.unlabelled(patience_days=0).outcome is Outcome.ALERT


@pytest.mark.parametrize(
    "wrong",
    [
        {"budget": 0},
        {"cost": 0.0},
        {"budget_days": -1.0},
        {"maximum_age_days": 0.0},
        {"minimum_new_rows": -1},
        {"rejections_before_pause": 0},
        {"patience_days": 1e9},
        {"patience_days": math.nan},
        {"cool_down_days": math.inf},
        {"cost": math.nan},
    ],
)
def test_a_policy_that_makes_no_sense_names_the_field(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RetrainingPolicy(**wrong)


def test_a_cool_down_of_seven_days_is_a_week_of_the_zone_where_summer_time_begins() -> None:
    week = Window.parse(
        "2024-03-25T00:00:00+01:00", "2024-04-01T00:00:00+02:00"
    )  # an hour short of 7 days of 24
    evidence = replace(degraded(0), window=week)
    history = RetrainingHistory(last_retraining_window_end=week.start)

    def outcome(zone: str) -> str:
        policy = RetrainingPolicy(cool_down_days=7, time_zone=zone)
        (decision,) = decide_retraining([evidence], history, policy)
        return decision.outcome.value

    assert outcome("Europe/Berlin") == Outcome.RETRAIN.value
    assert outcome("UTC") == Outcome.ALERT.value
    with pytest.raises(ValueError, match="no time zone 'Berlin/Europe'"):
        RetrainingPolicy(time_zone="Berlin/Europe")
