"""What is decided: performance and retraining against independent numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings, strategies as st

from airflow_mlops.core.comparison.metric import MetricValue
from airflow_mlops.core.decision.evidence import RetrainingHistory, WindowEvidence
from airflow_mlops.core.decision.retraining import Outcome, RetrainingPolicy, decide_retraining
from airflow_mlops.core.monitoring.performance import PerformancePolicy, judge_performance
from airflow_mlops.core.windows import Window


def value(mean: float, *, spread: float = 2.0, rows: int = 2000) -> MetricValue:
    return MetricValue(metric="mae", value=mean, standard_deviation=spread, row_count=rows)


class TestPerformance:
    def test_worse_beyond_tolerance_and_chance(self) -> None:
        report = judge_performance(
            current=value(2.8), reference=value(1.78), labelled_share=1.0, policy=PerformancePolicy()
        )
        expected = (2.8 - 1.78) / math.sqrt(2 * 2.0**2 / 2000)
        assert report.degraded
        assert report.z_score == pytest.approx(expected)
        assert report.relative_change == pytest.approx(2.8 / 1.78 - 1)
        assert "57% worse" in report.reason

    @pytest.mark.parametrize(
        ("current", "why"),
        [
            (value(1.9), "within the tolerated 20%"),
            (value(1.5), "as promised"),
            (value(3.0, spread=30.0, rows=120), "worse, but not beyond chance"),
        ],
    )
    def test_not_degraded(self, current: MetricValue, why: str) -> None:
        report = judge_performance(
            current=current, reference=value(1.78), labelled_share=1.0, policy=PerformancePolicy()
        )
        assert report.measured
        assert not report.degraded
        assert report.reason.startswith(why)

    def test_too_few_labels_are_not_fine(self) -> None:
        report = judge_performance(
            current=value(9.0), reference=value(1.0), labelled_share=0.42, policy=PerformancePolicy()
        )
        assert (report.measured, report.degraded) == (False, False)
        assert report.reason == "performance not measured: 42% labelled so far, 80% needed to judge"

    @pytest.mark.parametrize(
        ("share", "minimum", "why"),
        [
            (0.0, 0.8, "no label so far"),
            (1.0, 0.8, "0 labelled rows, 100 needed"),
            (0.1, 0.0, "0 labelled rows"),
        ],
    )
    def test_no_labels_are_not_fine(self, share: float, minimum: float, why: str) -> None:
        policy = PerformancePolicy(minimum_labelled_share=minimum)
        report = judge_performance(current=None, reference=value(1.0), labelled_share=share, policy=policy)
        assert not report.measured
        assert why in report.reason


def evidence(
    index: int,
    *,
    degraded: bool = False,
    drifted: bool = False,
    measured: bool = True,
    rows: int = 5000,
    **more,
):
    start = datetime(2024, 1, 1, tzinfo=UTC) + timedelta(days=30 * index)
    return WindowEvidence(
        window=Window(start=start, end=start + timedelta(days=30)),
        performance={
            "measured": measured,
            "degraded": degraded,
            "reason": "graded" if measured else "performance not measured: 12% labelled so far",
            "awaits_labels": not measured,
        },
        drift={"drifted": drifted, "headline": "inputs"},
        row_count=rows,
        **more,
    )


def decide(windows, previous=(), **policy):
    return decide_retraining(
        windows, RetrainingHistory(), RetrainingPolicy(**policy), previous_checks=previous
    )


class TestRetraining:
    def test_a_worse_error_retrains_on_what_came_after_the_change(self) -> None:
        (decision,) = decide([evidence(4, degraded=True)], previous=[evidence(3)])
        assert decision.outcome is Outcome.RETRAIN
        assert decision.training is not None
        assert (decision.training.start, decision.training.half_life_days) == (evidence(4).window.start, None)

    def test_too_little_since_the_change_takes_recent_rows_too(self) -> None:
        (decision,) = decide([evidence(4, degraded=True, rows=100)], previous=[evidence(3)])
        assert decision.training is not None
        assert decision.training.start == evidence(4).window.end - timedelta(days=92)
        assert decision.training.half_life_days == 30.0

    def test_the_change_is_where_the_run_of_bad_windows_began(self) -> None:
        (decision,) = decide([evidence(5, degraded=True)], previous=[evidence(3), evidence(4, degraded=True)])
        assert decision.training is not None
        assert decision.training.start == evidence(4).window.start

    def test_moved_inputs_alone_are_an_alert(self) -> None:
        assert decide([evidence(1, drifted=True)])[0].outcome is Outcome.ALERT
        assert decide([evidence(1, drifted=True)], retrain_on_drift=True)[0].outcome is Outcome.RETRAIN

    def test_nothing_and_not_yet(self) -> None:
        assert decide([evidence(1)])[0].outcome is Outcome.NOTHING
        assert decide([evidence(1, measured=False)])[0].outcome is Outcome.WAIT_FOR_LABELS

    @pytest.mark.parametrize("drifted", [True, False])
    def test_labels_that_do_not_come_are_not_waited_for_for_ever(self, drifted: bool) -> None:
        late = evidence(1, measured=False, drifted=drifted, waited_days=8)
        assert decide([late], patience_days=9)[0].outcome is Outcome.WAIT_FOR_LABELS
        (decision,) = decide([late], patience_days=7)
        assert decision.outcome is Outcome.ALERT  # drifted or not: never graded is not fine
        assert decision.reason == "performance not measured: 12% labelled so far; inputs"
        wanted = Outcome.RETRAIN if drifted else Outcome.ALERT
        assert decide([late], patience_days=7, retrain_on_drift=True)[0].outcome is wanted

    def test_without_labels_drift_alone_decides_at_once(self) -> None:
        unlabelled = [replace(evidence(index, drifted=index == 2), performance=None) for index in (1, 2)]
        outcomes = [item.outcome for item in decide(unlabelled, patience_days=0)]
        assert outcomes == [Outcome.NOTHING, Outcome.ALERT]

    def test_what_no_label_can_measure_is_not_waited_for(self) -> None:
        settled = evidence(1, measured=False)
        settled = replace(settled, performance=settled.performance | {"awaits_labels": False})
        assert decide([settled])[0].outcome is Outcome.NOTHING

    def test_a_late_window_is_covered_by_a_newer_retraining(self) -> None:
        history = RetrainingHistory(last_retraining_window_end=evidence(3).window.end)
        (decision,) = decide_retraining([evidence(2, degraded=True)], history, RetrainingPolicy())
        assert decision.outcome is Outcome.COVERED

    def test_a_late_window_starts_nothing_where_newer_ones_were_measured_and_decided(self) -> None:
        late, after = evidence(1, degraded=True), [evidence(index) for index in range(2, 8)]
        (decision,) = decide([late], previous=after)
        assert (decision.outcome, decision.training) == (Outcome.COVERED, None)
        assert decision.reason == (
            f"graded; inputs; {decision.reason.split('; ')[2]}; but newer windows are known, and {after[-1].window} "
            "is not degraded"
        )
        unmeasured = [replace(item, performance=None) for item in after]
        assert decide([late], previous=unmeasured)[0].outcome is Outcome.RETRAIN
        assert decide([evidence(9, degraded=True)], previous=after)[0].outcome is Outcome.RETRAIN

    def test_what_another_version_did_is_not_held_against_the_champion(self) -> None:
        bad = evidence(1, degraded=True)
        bad = replace(bad, performance=bad.performance | {"model_version": "1"})
        for champion, outcome in (("1", Outcome.RETRAIN), (None, Outcome.RETRAIN), ("2", Outcome.COVERED)):
            history = RetrainingHistory(champion_version=champion)
            (decision,) = decide_retraining([bad], history, RetrainingPolicy())
            assert decision.outcome is outcome

    def test_labels_that_were_given_up_are_an_alert_too(self) -> None:
        given_up = {"measured": False, "awaits_labels": False, "final": True, "labelled_share": 0.1}
        lost = replace(evidence(1), performance=given_up)
        assert decide([lost], patience_days=120)[0].outcome is Outcome.ALERT
        none = replace(evidence(1), performance=given_up | {"labels": None})
        assert decide([none], patience_days=120)[0].outcome is Outcome.NOTHING

    def test_a_window_decided_in_between_belongs_to_the_run_of_bad_ones(self) -> None:
        late, between = evidence(4, measured=False), evidence(5, degraded=True)
        decisions = decide([late, evidence(6, degraded=True)], previous=[evidence(3), between])
        assert decisions[-1].training is not None
        assert decisions[-1].training.start == between.window.start

    def test_of_several_windows_the_newest_is_retrained(self) -> None:
        bad = [evidence(1, degraded=True), evidence(2, degraded=True)]
        decisions = decide([*bad, evidence(3, measured=False)])
        assert [item.outcome for item in decisions] == [
            Outcome.COVERED,
            Outcome.RETRAIN,
            Outcome.WAIT_FOR_LABELS,
        ]
        assert "[2024-03-01, 2024-03-31)" in decisions[0].reason

    def test_what_is_over_by_the_newest_window_starts_nothing(self) -> None:
        bad, good = evidence(1, degraded=True), evidence(2)
        decisions = decide([bad, good])
        assert [item.outcome for item in decisions] == [Outcome.COVERED, Outcome.NOTHING]
        assert decisions[0].reason.endswith(f"but newer windows are known, and {good.window} is not degraded")
        again = decide([bad, good, evidence(3, degraded=True)])
        assert [item.outcome for item in again] == [Outcome.COVERED, Outcome.NOTHING, Outcome.RETRAIN]

    def test_cooling_down(self) -> None:
        history = RetrainingHistory(last_retraining_window_end=evidence(1).window.end)
        policy = RetrainingPolicy(cool_down_days=90)
        (decision,) = decide_retraining([evidence(2, degraded=True)], history, policy)
        assert decision.outcome is Outcome.ALERT
        assert "cooling down for 90 days" in decision.reason

    @settings(max_examples=100)
    @given(st.lists(st.booleans(), min_size=1, max_size=8), st.integers(0, 7))
    def test_however_the_windows_are_cut_into_wake_ups_each_gets_one_decision(
        self, bad: list[bool], cut: int
    ) -> None:
        windows = [evidence(index, degraded=flag) for index, flag in enumerate(bad)]
        cut = min(cut, len(windows))
        decisions = [*decide(windows[:cut]), *decide(windows[cut:], previous=windows[:cut])]
        assert [item.window for item in decisions] == [item.window for item in windows]
        wanted = [item.outcome in {Outcome.RETRAIN, Outcome.COVERED} for item in decisions]
        assert wanted == bad
