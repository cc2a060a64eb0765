"""What is decided: metrics, evaluation, promotion, performance and retraining against independent numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats
from sklearn import metrics as oracle

from airflow_mlops.core.evaluation import compare_models
from airflow_mlops.core.metrics import MetricValue, evaluate_metric, resolve_metric
from airflow_mlops.core.performance import PerformancePolicy, judge_performance
from airflow_mlops.core.promotion import PromotionPolicy, Verdict, decide_promotion
from airflow_mlops.core.retraining import (
    Outcome,
    RetrainingHistory,
    RetrainingPolicy,
    WindowEvidence,
    decide_retraining,
)
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import InsufficientDataError

RANDOM = np.random.default_rng(3)
TARGET, GUESS = RANDOM.normal(10, 3, 500), RANDOM.normal(10, 3, 500)
LABELS, GUESSED = RANDOM.choice(["a", "b", "c"], 500, p=[0.7, 0.2, 0.1]), RANDOM.choice(["a", "b", "c"], 500)


class TestMetrics:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("mae", oracle.mean_absolute_error(TARGET, GUESS)),
            ("rmse", math.sqrt(oracle.mean_squared_error(TARGET, GUESS))),
            ("r2", oracle.r2_score(TARGET, GUESS)),
        ],
    )
    def test_of_numbers(self, name: str, expected: float) -> None:
        assert evaluate_metric(resolve_metric(name), target=TARGET, prediction=GUESS).value == pytest.approx(
            expected
        )

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("accuracy", oracle.accuracy_score(LABELS, GUESSED)),
            ("balanced_accuracy", oracle.balanced_accuracy_score(LABELS, GUESSED)),
        ],
    )
    def test_of_labels(self, name: str, expected: float) -> None:
        got = evaluate_metric(resolve_metric(name), target=LABELS, prediction=GUESSED)
        assert got.value == pytest.approx(expected)

    def test_not_a_number_is_not_measured(self) -> None:
        with pytest.raises(InsufficientDataError, match="mae is nan on 2 rows"):
            evaluate_metric(
                resolve_metric("mae"), target=np.array([1.0, np.nan]), prediction=np.array([1.0, 1.0])
            )

    def test_no_rows_are_not_measured(self) -> None:
        with pytest.raises(InsufficientDataError, match="no rows"):
            evaluate_metric(resolve_metric("mae"), target=np.array([]), prediction=np.array([]))

    def test_a_users_own_by_import_path(self) -> None:
        value = evaluate_metric(
            resolve_metric("numpy:dot"), target=np.array([1.0, 2.0]), prediction=np.array([3.0, 4.0])
        )
        assert value.value == 11.0


def compare(
    challenger: np.ndarray, champion: np.ndarray | None, target: np.ndarray = TARGET, metric: str = "mae"
):
    return compare_models(
        target=target, challenger=challenger, champion=champion, baseline=np.full(len(target), 10.0), metric=metric,
        resamples=200,
    )  # fmt: skip


class TestPromotion:
    def test_the_paired_test_is_the_textbooks(self) -> None:
        challenger, champion = TARGET + RANDOM.normal(0, 1, 500), TARGET + RANDOM.normal(0, 1.1, 500)
        report = compare(challenger, champion)
        gains = np.abs(champion - TARGET) - np.abs(challenger - TARGET)
        assert report.p_value == pytest.approx(
            stats.ttest_1samp(gains, 0, alternative="greater").pvalue, abs=2e-3
        )

    def test_a_first_model_has_to_beat_a_constant(self) -> None:
        good, bad = compare(TARGET + 0.1, None), compare(np.full(500, 10.5), None)
        assert decide_promotion(good, PromotionPolicy()).verdict is Verdict.PROMOTE
        assert decide_promotion(bad, PromotionPolicy()).verdict is Verdict.REJECT

    def test_better_is_promoted_worse_is_not(self) -> None:
        near, far = TARGET + RANDOM.normal(0, 0.5, 500), TARGET + RANDOM.normal(0, 1.5, 500)
        assert decide_promotion(compare(near, far), PromotionPolicy()).verdict is Verdict.PROMOTE
        assert decide_promotion(compare(far, near), PromotionPolicy()).verdict is Verdict.REJECT

    def test_an_uplift_that_is_too_small_is_said(self) -> None:
        near, far = TARGET + RANDOM.normal(0, 0.5, 500), TARGET + RANDOM.normal(0, 1.5, 500)
        decision = decide_promotion(compare(near, far), PromotionPolicy(minimum_uplift=0.99))
        assert decision.verdict is Verdict.REJECT
        assert decision.reason.startswith("less than the 99.0% asked for")

    def test_not_a_number_is_no_verdict(self) -> None:
        report = compare(TARGET + 0.1, TARGET + 0.5)
        lost = replace(report, challenger=replace(report.challenger, value=math.nan))
        assert decide_promotion(lost, PromotionPolicy()).verdict is Verdict.NOT_MEASURED

    def test_equal_models_are_promoted_at_the_nominal_rate(self) -> None:
        """600 pairs of equally good models; five percent of 600 is 30, with a standard deviation of 5.3."""
        random = np.random.default_rng(11)
        promoted = 0
        for _ in range(600):
            target = random.normal(10, 3, 400)
            report = compare(target + random.normal(0, 1, 400), target + random.normal(0, 1, 400), target)
            promoted += (
                decide_promotion(report, PromotionPolicy(significance=0.05)).verdict is Verdict.PROMOTE
            )
        assert 10 <= promoted <= 46


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

    def test_a_window_decided_in_between_belongs_to_the_run_of_bad_ones(self) -> None:
        late, between = evidence(4, measured=False), evidence(5, degraded=True)
        decisions = decide([late, evidence(6, degraded=True)], previous=[evidence(3), between])
        assert decisions[-1].training is not None
        assert decisions[-1].training.start == between.window.start

    def test_of_several_windows_the_newest_is_retrained(self) -> None:
        decisions = decide([evidence(1, degraded=True), evidence(2, degraded=True), evidence(3)])
        assert [item.outcome for item in decisions] == [Outcome.COVERED, Outcome.RETRAIN, Outcome.NOTHING]
        assert "[2024-03-01, 2024-03-31)" in decisions[0].reason

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
