"""Challenger against champion: metrics, intervals, tests, slices, groups and the verdict, against independent numbers."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
import tracemalloc
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats
from sklearn import metrics as oracle
from statsmodels.stats.multitest import multipletests

from airflow_mlops.core.codec import from_dict, to_dict
from airflow_mlops.core.comparison.artifact import ArtifactFacts, ArtifactLimits, judge_artifact
from airflow_mlops.core.comparison.evaluation import (
    EvaluationReport,
    MetricInterval,
    compare_models,
    repeat_last,
    require_known_labels,
)
from airflow_mlops.core.comparison.fairness import FairnessReport, compare_groups
from airflow_mlops.core.comparison.metrics import (
    DEFAULT_METRICS,
    evaluate_metric,
    measure,
    resolve_metric,
    row_losses,
    slice_losses,
)
from airflow_mlops.core.comparison.predictions import Graded, Predictions
from airflow_mlops.core.comparison.promotion import (
    Outcome,
    PromotionDecision,
    PromotionPolicy,
    Verdict,
    decide_promotion,
)
from airflow_mlops.core.comparison.resampling import Blocks, common_factor, cut_clusters
from airflow_mlops.core.comparison.slices import SlicePolicy, SliceReport, cut_column, find_worse_slices
from airflow_mlops.core.model.simple_guess import as_in
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import InsufficientDataError, SchemaMismatchError
from airflow_mlops.serving.probe import time_answers
from airflow_mlops.steps.evaluate import EvaluateSpec

RANDOM = np.random.default_rng(3)
TARGET, GUESS = RANDOM.normal(10, 3, 500), RANDOM.normal(10, 3, 500)


def labels(count: int, classes: str, seed: int = 5) -> tuple[np.ndarray, Predictions]:
    """Draw labels, and a model that often knows them."""
    random = np.random.default_rng(seed)
    names = np.array(list(classes))
    truth = random.choice(names, count, p=np.arange(len(names), 0, -1) / sum(range(len(names) + 1)))
    scores = random.normal(0, 1, (count, len(names))) + 1.2 * (truth[:, None] == names)
    given = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    given = np.round(given[:, :-1], 3)  # ties
    given = np.column_stack([given, 1.0 - given.sum(axis=1)])
    return truth, Predictions(values=names[given.argmax(axis=1)], probabilities=given, classes=tuple(classes))


def said(yes: np.ndarray) -> Predictions:
    """Give the answers of a model that says ``b`` to some rows and ``a`` to the others."""
    sure = np.where(yes, 0.9, 0.1)
    return Predictions(
        values=np.where(yes, "b", "a"), probabilities=np.column_stack([1.0 - sure, sure]), classes=("a", "b")
    )


TRUTH, ANSWERS = labels(700, "ab")
TRUTH3, ANSWERS3 = labels(700, "abc")


def calibration_error(truth: np.ndarray, answers: Predictions) -> float:
    """Sum the gaps bin by bin, as the paper writes it."""
    assert answers.probabilities is not None
    confidence, right = answers.probabilities.max(axis=1), answers.values == truth
    total = 0.0
    for number in range(15):
        inside = (confidence >= number / 15) & ((confidence < (number + 1) / 15) | (number == 14))
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return total


P2, P3 = ANSWERS.probabilities, ANSWERS3.probabilities
assert P2 is not None
assert P3 is not None
BINARY = {
    "accuracy": oracle.accuracy_score(TRUTH, ANSWERS.values),
    "balanced_accuracy": oracle.balanced_accuracy_score(TRUTH, ANSWERS.values),
    "precision": oracle.precision_score(TRUTH, ANSWERS.values, pos_label="b"),
    "recall": oracle.recall_score(TRUTH, ANSWERS.values, pos_label="b"),
    "f1": oracle.f1_score(TRUTH, ANSWERS.values, pos_label="b"),
    "roc_auc": oracle.roc_auc_score(TRUTH == "b", P2[:, 1]),
    "pr_auc": oracle.average_precision_score(TRUTH == "b", P2[:, 1]),
    "log_loss": oracle.log_loss(TRUTH, P2),
    "brier": oracle.brier_score_loss(TRUTH == "b", P2[:, 1]),
    "calibration_error": calibration_error(TRUTH, ANSWERS),
}
SEVERAL = {
    "accuracy": oracle.accuracy_score(TRUTH3, ANSWERS3.values),
    "balanced_accuracy": oracle.balanced_accuracy_score(TRUTH3, ANSWERS3.values),
    "precision": oracle.precision_score(TRUTH3, ANSWERS3.values, average="macro"),
    "recall": oracle.recall_score(TRUTH3, ANSWERS3.values, average="macro"),
    "f1": oracle.f1_score(TRUTH3, ANSWERS3.values, average="macro"),
    "roc_auc": oracle.roc_auc_score(TRUTH3, P3 / P3.sum(axis=1, keepdims=True), multi_class="ovr"),
    "log_loss": oracle.log_loss(TRUTH3, P3),
    "calibration_error": calibration_error(TRUTH3, ANSWERS3),
}
NUMBERS = {
    "mae": oracle.mean_absolute_error(TARGET, GUESS),
    "rmse": oracle.root_mean_squared_error(TARGET, GUESS),
    "mape": oracle.mean_absolute_percentage_error(TARGET, GUESS),
    "r2": oracle.r2_score(TARGET, GUESS),
    "quantile_loss@0.9": oracle.mean_pinball_loss(TARGET, GUESS, alpha=0.9),
}


def per_row_cost(target: np.ndarray, prediction: np.ndarray) -> Any:
    return np.where(prediction < target, 3.0, 1.0) * np.abs(target - prediction)


per_row_cost.per_row = True  # type: ignore[attr-defined]


def large_gain(target: np.ndarray, prediction: np.ndarray) -> Any:
    return 1_000.0 - np.abs(target - prediction)


def small_gain(target: np.ndarray, prediction: np.ndarray) -> Any:
    return 3.0 - np.abs(target - prediction)


for gain in (large_gain, small_gain):
    gain.per_row = gain.greater_is_better = True  # type: ignore[attr-defined]


class TestMetrics:
    @pytest.mark.parametrize("name", NUMBERS)
    def test_of_numbers(self, name: str) -> None:
        got = evaluate_metric(resolve_metric(name), target=TARGET, prediction=GUESS)
        assert got.value == pytest.approx(NUMBERS[name], rel=1e-9)

    @pytest.mark.parametrize("name", BINARY)
    def test_of_two_labels(self, name: str) -> None:
        got = evaluate_metric(resolve_metric(name), target=TRUTH, prediction=ANSWERS)
        assert got.value == pytest.approx(BINARY[name], rel=1e-9)

    @pytest.mark.parametrize("name", SEVERAL)
    def test_of_several_labels(self, name: str) -> None:
        got = evaluate_metric(resolve_metric(name), target=TRUTH3, prediction=ANSWERS3)
        assert got.value == pytest.approx(SEVERAL[name], rel=1e-9)

    def test_the_usual_ones_are_all_there(self) -> None:
        assert set(DEFAULT_METRICS["classification"]) == set(BINARY)
        assert set(DEFAULT_METRICS["regression"]) < set(NUMBERS)

    @given(st.integers(2, 60), st.integers(0, 10_000))
    @settings(max_examples=60)
    def test_sums_over_blocks_give_the_metric(self, count: int, seed: int) -> None:
        truth, answers = labels(count, "ab", seed)
        starts = np.unique(np.random.default_rng(seed).integers(0, count, 4) * np.array([0, 1, 1, 1]))
        for name in (
            "accuracy",
            "balanced_accuracy",
            "f1",
            "precision",
            "log_loss",
            "brier",
            "calibration_error",
        ):
            metric = resolve_metric(name)
            sums = metric.block_sums(Graded(truth, answers), starts)
            assert sums is not None
            assert metric.of_sums is not None
            assert float(metric.of_sums(sums.sum(axis=0))) == pytest.approx(
                metric.score(Graded(truth, answers)), abs=1e-9
            )

    def test_not_a_number_is_not_measured(self) -> None:
        with pytest.raises(InsufficientDataError, match="mae is nan on 2 rows"):
            evaluate_metric(
                resolve_metric("mae"), target=np.array([1.0, np.nan]), prediction=np.array([1.0, 1.0])
            )

    def test_no_rows_are_not_measured(self) -> None:
        with pytest.raises(InsufficientDataError, match="no rows"):
            evaluate_metric(resolve_metric("mae"), target=np.array([]), prediction=np.array([]))

    def test_bare_labels_have_no_log_loss(self) -> None:
        with pytest.raises(ValueError, match="log_loss needs probabilities, and the model gives none"):
            evaluate_metric(resolve_metric("log_loss"), target=TRUTH, prediction=ANSWERS.values)

    def test_a_class_that_does_not_occur(self) -> None:
        same = np.full(len(TRUTH), "a")
        with pytest.raises(InsufficientDataError, match="a class that does not occur"):
            evaluate_metric(resolve_metric("roc_auc"), target=same, prediction=ANSWERS)

    def test_a_label_the_model_never_saw_costs_as_much_as_can_be(self) -> None:
        one = Predictions(values=np.array(["a"]), probabilities=np.array([[0.9, 0.1]]), classes=("a", "b"))
        got = evaluate_metric(resolve_metric("log_loss"), target=np.array(["z"]), prediction=one)
        assert got.value == pytest.approx(-math.log(np.finfo(float).eps))

    def test_a_users_own_by_import_path(self) -> None:
        value = evaluate_metric(
            resolve_metric("numpy:dot"), target=np.array([1.0, 2.0]), prediction=np.array([3.0, 4.0])
        )
        assert value.value == 11.0

    def test_a_users_own_per_row_is_its_mean(self) -> None:
        metric = resolve_metric(f"{__name__}:per_row_cost")
        value = evaluate_metric(metric, target=TARGET, prediction=GUESS)
        assert value.value == pytest.approx(per_row_cost(TARGET, GUESS).mean())
        assert value.standard_deviation == pytest.approx(per_row_cost(TARGET, GUESS).std())

    @pytest.mark.parametrize("name", ["quantile_loss", "quantile_loss@1.5", "quantile_loss@x"])
    def test_a_quantile_has_to_be_said(self, name: str) -> None:
        with pytest.raises(ValueError, match="give the quantile between 0 and 1"):
            resolve_metric(name)

    def test_an_unknown_name_lists_the_known_ones(self) -> None:
        with pytest.raises(ValueError, match="no metric named 'mea'; built in: mae, mape"):
            resolve_metric("mea")


def numbers(values: np.ndarray) -> Predictions:
    return Predictions(values=values)


def compare(
    challenger: np.ndarray, champion: np.ndarray | None, target: np.ndarray = TARGET, **more: Any
) -> EvaluationReport:
    return compare_models(
        target=target,
        challenger=numbers(challenger),
        champion=numbers(champion) if champion is not None else None,
        baselines={"a simple guess": numbers(np.full(len(target), 10.0))},
        **{"metrics": ["mae"]} | more,
    )


def related(random: np.random.Generator, count: int, correlation: float, distance: int = 1) -> np.ndarray:
    """Draw errors of which each resembles the one before, or the one further back."""
    noise = random.normal(0, 1, count + 50 * distance)
    for place in range(distance, len(noise)):
        noise[place] += correlation * noise[place - distance]
    return noise[50 * distance :] * math.sqrt(1.0 - correlation**2)


class TestComparison:
    def test_the_interval_is_the_textbooks(self) -> None:
        target = RANDOM.normal(0, 1, 20_000)
        report = compare(target + RANDOM.normal(0, 1, 20_000), None, target)
        losses = np.abs(report.deciding.challenger.value)
        deviation = math.sqrt(1.0 - 2.0 / math.pi)  # of the absolute value of a standard normal number
        expected = 1.96 * deviation / math.sqrt(20_000)
        measured = report.deciding.challenger
        assert losses == pytest.approx(math.sqrt(2.0 / math.pi), abs=0.02)
        assert (measured.high - measured.low) / 2 == pytest.approx(expected, rel=0.1)

    def test_the_paired_test_is_the_textbooks(self) -> None:
        """On the average of 60 pairs: an error with 10 degrees of freedom is 22 % off, their mean 3 %."""
        random, statistics, detectable = np.random.default_rng(4), [], []
        for _ in range(60):
            target = random.normal(10, 3, 400)
            challenger, champion = target + random.normal(0, 1, 400), target + random.normal(0, 1.3, 400)
            gains = np.abs(champion - target) - np.abs(challenger - target)
            rival = compare(challenger, champion, target).deciding.champion
            assert rival is not None
            assert rival.p_value is not None
            expected = stats.ttest_1samp(gains, 0, alternative="greater")
            statistics.append(stats.t.isf(rival.p_value, 10) / expected.statistic)
            power = stats.t.isf(0.05, 10) + stats.t.isf(0.2, 10)
            detectable.append(rival.minimum_detectable_difference / (power * gains.std() / 20.0))
        assert np.median(statistics) == pytest.approx(1.0, abs=0.1)
        assert np.mean(detectable) == pytest.approx(1.0, abs=0.1)

    def test_what_makes_rows_hard_for_both_cancels_out(self) -> None:
        hard = RANDOM.normal(0, 5, 500)  # far larger than the difference
        rival = compare(TARGET + hard, TARGET + hard * 1.05).deciding.champion
        assert rival is not None
        assert rival.p_value < 1e-6

    def test_a_rank_metric_is_resampled_about_its_exact_value(self) -> None:
        truth, answers = labels(20_000, "ab", 1)
        assert answers.probabilities is not None
        score = answers.probabilities[:, 1]
        report = compare_models(
            target=truth, challenger=answers, champion=None, baselines={}, metrics=["roc_auc", "pr_auc"]
        )
        random, values = np.random.default_rng(0), []
        for _ in range(200):
            rows = random.integers(0, len(truth), len(truth))
            values.append(
                (
                    oracle.roc_auc_score(truth[rows] == "b", score[rows]),
                    oracle.average_precision_score(truth[rows] == "b", score[rows]),
                )
            )
        # Twenty waves tell an error to a sixth of it: the width is held to the oracle's in the mean of several sets of rows.
        widths = []
        for seed in range(1, 9):
            target, given = labels(20_000, "ab", seed)
            others = compare_models(
                target=target, challenger=given, champion=None, baselines={}, metrics=["roc_auc", "pr_auc"]
            )
            widths.append([one.challenger.high - one.challenger.low for one in others.metrics])
        for column, measured in enumerate(report.metrics):
            drawn = np.array(values)[:, column]
            assert measured.challenger.value == pytest.approx(drawn.mean(), abs=drawn.std())
            assert np.mean(widths, axis=0)[column] == pytest.approx(3.92 * drawn.std(), rel=0.25)

    @pytest.mark.parametrize("count", [200, 3_000])
    def test_nineteen_of_twenty_intervals_hold_the_truth(self, count: int) -> None:
        """400 intervals at 95 %: 20 should miss, give or take 4.4; whatever the number of blocks."""
        random, truth = np.random.default_rng(1), math.sqrt(2.0 / math.pi)
        missed = 0
        for _ in range(400):
            errors = random.normal(0, 1, count)
            measured = compare(errors, None, np.zeros(count)).deciding.challenger
            missed += not measured.low <= truth <= measured.high
        assert 8 <= missed <= 34

    def test_a_metric_that_is_only_a_number_is_scored_again(self) -> None:
        report = compare(TARGET + 0.5, TARGET + 1.0, metrics=["sklearn.metrics:median_absolute_error"])
        assert report.deciding.challenger == MetricInterval(
            value=pytest.approx(0.5), low=pytest.approx(0.5), high=pytest.approx(0.5)
        )

    @pytest.mark.parametrize("name", ["roc_auc", "pr_auc"])
    @pytest.mark.parametrize("count", [3, 40])
    def test_ranks_of_several_labels_vary_as_the_exact_metric_does(self, name: str, count: int) -> None:
        """Against the metric computed anew on the same resamples; the mean of 40 labels is binned coarser."""
        random, metric = np.random.default_rng(1), resolve_metric(name)
        classes = tuple(f"c{number:02d}" for number in range(count))
        truth = np.array(classes)[random.integers(0, count, 1_200)]
        scores = random.normal(0, 1, (1_200, count)) + 1.5 * (truth[:, None] == np.array(classes))
        given = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        answers = Predictions(
            values=np.array(classes)[given.argmax(axis=1)], probabilities=given, classes=classes
        )
        graded, blocks = Graded(truth, answers), Blocks.draw(1_200, resamples=40)
        drawn = blocks.resample(metric, graded, measure(metric, graded)).values
        exact = blocks._score_again(metric, graded)
        assert np.std(drawn - exact) < 0.25 * np.std(exact)
        assert np.std(drawn) == pytest.approx(np.std(exact), rel=0.05)

    def test_hundreds_of_labels_fit_into_memory(self) -> None:
        random = np.random.default_rng(0)
        classes = tuple(f"c{number:03d}" for number in range(200))
        truth = np.array(classes)[random.integers(0, 200, 1_000)]
        given = random.dirichlet(np.ones(200), 1_000)
        answers = Predictions(
            values=np.array(classes)[given.argmax(axis=1)], probabilities=given, classes=classes
        )
        tracemalloc.start()
        report = compare_models(
            target=truth, challenger=answers, champion=None, baselines={}, metrics=["f1", "brier"]
        )
        blocks = Blocks.draw(1_000, resamples=50)
        graded = Graded(truth, answers)
        blocks.resample(resolve_metric("roc_auc"), graded, 0.5)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 100e6
        assert report.deciding.challenger.value == pytest.approx(
            oracle.f1_score(truth, answers.values, average="macro", labels=classes, zero_division=0)
        )

    @pytest.mark.parametrize("metric", ["f1", "precision", "recall", "balanced_accuracy"])
    @pytest.mark.parametrize("found", [1, 4])
    def test_a_ratio_of_a_few_rows_promotes_nobody(self, metric: str, found: int) -> None:
        positive = np.isin(np.arange(1_000), [100, 300, 500, 900][:found])
        report = compare_models(
            target=np.where(positive, "b", "a"),
            challenger=said(positive),
            champion=said(np.zeros(1_000, dtype=bool)),
            baselines={},
            metrics=[metric],
        )
        assert report.deciding.champion is not None
        assert report.deciding.champion.difference.value > 0.0
        assert report.deciding.champion.p_value is None
        check = decide_promotion(report, PromotionPolicy()).checks[0]
        assert (check.outcome, "several of a rare label" in check.reason) == (Outcome.NOT_MEASURED, True)

    @pytest.mark.parametrize("metric", ["f1", "precision", "balanced_accuracy"])
    def test_a_champion_that_never_says_yes_is_beaten_by_one_that_finds_many(self, metric: str) -> None:
        positive = np.arange(1_000) % 10 == 3
        report = compare_models(
            target=np.where(positive, "b", "a"),
            challenger=said(positive & (np.arange(1_000) % 3 > 0)),
            champion=said(np.zeros(1_000, dtype=bool)),
            baselines={},
            metrics=[metric],
        )
        assert report.deciding.champion is not None
        assert report.deciding.champion.p_value is not None
        assert report.deciding.champion.p_value < 0.001

    def test_the_error_of_a_ranking_is_right_where_positives_are_rare(self) -> None:
        """Beside resamples that are ranked anew; in bins of equally many rows it was several times as large."""
        random, metric = np.random.default_rng(3), resolve_metric("pr_auc")
        positive = np.isin(np.arange(50_000), random.choice(50_000, 50, replace=False))
        shared, graded = random.normal(0, 0.7, 50_000), []
        for _ in range(2):
            sure = 1.0 / (1.0 + np.exp(4.0 - 5.5 * positive - shared - random.normal(0, 0.7, 50_000)))
            answers = said(sure > 0.5)
            graded.append(
                Graded(
                    np.where(positive, "b", "a"),
                    Predictions(
                        values=answers.values,
                        probabilities=np.column_stack([1.0 - sure, sure]),
                        classes=("a", "b"),
                    ),
                )
            )
        blocks = Blocks.draw(50_000)
        new, old = (blocks.resample(metric, one, metric.score(one)) for one in graded)
        orders = [np.argsort(-one.probabilities[:, 1]) for one in graded]
        exact = []
        for _ in range(100):
            times = random.poisson(1.0, 50_000)
            areas = []
            for order in orders:
                drawn, hits = times[order], times[order] * positive[order]
                found = np.cumsum(hits) / np.maximum(np.cumsum(drawn), 1)
                areas.append(float(found @ hits) / hits.sum())
            exact.append(areas[0] - areas[1])
        # A hundred resamples tell a spread to 7 %.
        assert float(np.std((new - old).values)) == pytest.approx(float(np.std(exact)), rel=0.4)

    @pytest.mark.parametrize("level", [0.05, 0.01])
    def test_the_detectable_difference_is_found_four_times_out_of_five_at_the_level_asked_for(
        self, level: float
    ) -> None:
        report = compare_models(
            target=TARGET,
            challenger=Predictions(values=GUESS),
            champion=Predictions(values=GUESS[::-1]),
            baselines={},
            metrics=["mae"],
            significance=level,
        )
        rival, freedom = report.deciding.champion, Blocks.draw(500).freedom
        assert rival is not None
        assert rival.p_value is not None
        assert rival.minimum_detectable_difference is not None
        error = rival.difference.value / stats.t.isf(rival.p_value, freedom)
        power = stats.nct.sf(
            stats.t.isf(level, freedom), freedom, rival.minimum_detectable_difference / error
        )
        assert power == pytest.approx(0.8, abs=0.03)

    def test_the_interval_of_a_calibration_error_holds_it(self) -> None:
        """A well calibrated model's is mostly chance, and resampling adds chance once more."""
        random = np.random.default_rng(4)
        sure = random.uniform(0.0, 1.0, 300)
        truth = np.where(random.random(300) < sure, "b", "a")
        values, both = np.where(sure > 0.5, "b", "a"), np.column_stack([1.0 - sure, sure])
        report = compare_models(
            target=truth,
            challenger=Predictions(values=values, probabilities=both, classes=("a", "b")),
            champion=None,
            baselines={},
            metrics=["calibration_error"],
        )
        found = report.deciding.challenger
        assert found.low is not None
        assert found.high is not None
        assert 0.0 <= found.low < found.value < found.high

    def test_a_rare_label_among_many_leaves_the_others_measured(self) -> None:
        truth = np.array([f"{place:02}" for place in [*range(1, 21)] * 50 + [0]])
        classes = tuple(sorted({*truth}))
        report = compare_models(
            target=truth,
            challenger=Predictions(values=truth, classes=classes),
            champion=Predictions(values=np.roll(truth, 1), classes=classes),
            baselines={},
            metrics=["f1"],
        )
        assert report.deciding.champion is not None
        assert report.deciding.champion.p_value is not None

    def test_what_can_not_be_measured_is_said_and_hinders_nobody(self) -> None:
        report = compare(TARGET + 0.5, TARGET + 1.0, metrics=["mae", "log_loss", "r2"])
        assert [item.metric for item in report.metrics] == ["mae", "r2"]
        assert "measures labels" in report.not_measured["log_loss"]

    def test_no_error_is_told_as_a_share_of_a_target_of_zero(self) -> None:
        target = np.where(np.arange(500) < 3, 0.0, TARGET)
        guesses = {"median": Predictions(values=np.full(500, 9.0))}
        report = compare_models(
            target=target,
            challenger=Predictions(values=TARGET + 0.5),
            champion=None,
            baselines=guesses,
            metrics=["mae", "mape"],
        )
        assert "it is zero in 3 of 500 rows: choose mae" in report.not_measured["mape"]
        with pytest.raises(InsufficientDataError, match="zero in 3 of 500 rows"):
            evaluate_metric(resolve_metric("mape"), target=target, prediction=TARGET)

    def test_what_decides_has_to_be_measured(self) -> None:
        for metric in ("log_loss", "accuracy"):
            with pytest.raises(
                ValueError, match=f"{metric} measures labels, and the model predicts numbers: choose mae"
            ):
                compare(TARGET + 0.5, None, metrics=[metric])
        words = Graded(np.array(["a", "b"]), Predictions(values=np.array(["a", "a"]), classes=("a", "b")))
        with pytest.raises(ValueError, match=r"labels have no distance to measure .*: choose accuracy"):
            measure(resolve_metric("mae"), words)

    def test_no_interval_reaches_beyond_what_the_metric_can_be(self) -> None:
        """Errors that come in a row stretch the interval of an accuracy of 95 % beyond one."""
        truth = np.array(["a", "b"] * 300)
        values = truth.copy()
        values[-30:] = "a"
        sure = np.where(values[:, None] == np.array(["a", "b"]), 0.99, 0.01)
        report = compare_models(
            target=truth,
            challenger=Predictions(values=values, probabilities=sure, classes=("a", "b")),
            champion=None,
            baselines={},
            metrics=["accuracy", "log_loss", "brier", "f1"],
        )
        ends = {item.metric: (item.challenger.low, item.challenger.high) for item in report.metrics}
        assert ends["accuracy"][1] == 1.0
        assert ends["log_loss"][0] == ends["brier"][0] == 0.0

    def test_the_same_rows_give_the_same_numbers(self) -> None:
        first, again = (compare(TARGET + 0.1, GUESS, metrics=["mae", "r2"]) for _ in range(2))
        assert first == again
        assert from_dict(EvaluationReport, json.loads(json.dumps(to_dict(first)))) == first


def verdict(challenger: np.ndarray, champion: np.ndarray | None, **policy: Any) -> PromotionDecision:
    return decide_promotion(compare(challenger, champion), PromotionPolicy(**policy))


NEAR, FAR = TARGET + RANDOM.normal(0, 0.5, 500), TARGET + RANDOM.normal(0, 1.5, 500)


class TestPromotion:
    def test_a_first_model_has_to_beat_a_constant(self) -> None:
        good, bad = verdict(TARGET + 0.1, None), verdict(np.full(500, 10.5), None)
        assert good.verdict is Verdict.PROMOTE
        assert good.reason.startswith("first model: MAE 0.1 against 2.")
        assert bad.verdict is Verdict.REJECT

    def test_better_is_promoted_worse_is_not(self) -> None:
        assert verdict(NEAR, FAR).verdict is Verdict.PROMOTE
        worse = verdict(FAR, NEAR)
        assert worse.verdict is Verdict.REJECT
        assert worse.reason.startswith("no better: MAE 1.")
        assert re.search(r"rows \(\d+\.\d% worse, p", worse.reason), worse.reason
        assert "rows (just as good, p" in verdict(NEAR, NEAR).reason

    def test_an_uplift_that_is_too_small_is_said(self) -> None:
        decision = verdict(NEAR, FAR, minimum_uplift=0.99)
        assert decision.verdict is Verdict.REJECT
        assert decision.reason.startswith("less than the 99.0% asked for")

    def test_better_than_the_champion_but_not_than_a_guess(self) -> None:
        decision = verdict(TARGET + 8.0, TARGET + 9.0)
        assert decision.verdict is Verdict.REJECT
        assert [check.outcome for check in decision.checks] == [Outcome.PASS, Outcome.FAIL]
        assert decision.reason.startswith("no better: MAE 8 against")

    def test_no_threshold_is_no_verdict(self) -> None:
        decision = verdict(NEAR, FAR, significance=None, minimum_uplift=None)
        assert decision.verdict is Verdict.NO_VERDICT
        assert decision.reason.startswith("no threshold is set to judge by")

    def test_without_a_test_the_numbers_are_taken_as_they_are(self) -> None:
        barely = TARGET + 0.999 * (FAR - TARGET)
        assert verdict(barely, FAR, significance=None).verdict is Verdict.PROMOTE
        assert verdict(barely, FAR, significance=None, minimum_uplift=0.01).verdict is Verdict.REJECT

    def test_a_guess_that_can_not_be_measured_is_no_pass(self) -> None:
        report = compare_models(
            target=TRUTH,
            challenger=ANSWERS,
            champion=None,
            baselines={
                "a coin": Predictions(
                    values=TRUTH, probabilities=np.full((len(TRUTH), 2), 0.5), classes=("a", "b")
                ),
                "the value before": Predictions(values=TRUTH, classes=("a", "b")),
            },
            metrics=["brier"],
        )
        assert list(report.deciding.baselines) == ["a coin"]
        decision = decide_promotion(report, PromotionPolicy())
        assert decision.verdict is Verdict.NO_VERDICT
        assert "BRIER of the value before could not be measured" in decision.reason
        assert "let a metric of labels decide" in decision.reason

    def test_without_any_guess_there_is_no_verdict(self) -> None:
        report = compare_models(
            target=TARGET, challenger=numbers(NEAR), champion=None, baselines={}, metrics=["mae"]
        )
        assert decide_promotion(report, PromotionPolicy()).verdict is Verdict.NO_VERDICT

    @pytest.mark.parametrize("count", [1, 3, 19])
    def test_too_few_rows_are_not_measured(self, count: int) -> None:
        report = compare(TARGET[:count] + 0.01, TARGET[:count] + 90.0, TARGET[:count])
        assert report.deciding.challenger.low is None
        assert report.deciding.champion is not None
        assert report.deciding.champion.p_value is None
        assert from_dict(EvaluationReport, json.loads(json.dumps(to_dict(report)))) == report
        decision = decide_promotion(report, PromotionPolicy())
        assert decision.verdict is Verdict.NO_VERDICT
        assert (
            "too few rows to tell it from chance (20 at least, and several of a rare label and of answers with it), judge on a longer window"
            in decision.reason
        )
        worse = decide_promotion(
            compare(TARGET[:count] + 90.0, TARGET[:count], TARGET[:count]), PromotionPolicy()
        )
        assert worse.verdict is Verdict.REJECT

    @pytest.mark.parametrize(
        "wrong",
        [
            {"significance": 5},
            {"significance": 0.0},
            {"significance": math.nan},
            {"minimum_uplift": -1.0},
            {"minimum_uplift": math.nan},
            {"maximum_group_difference": -0.1},
            {"minimum_group_rows": 0},
        ],
    )
    def test_a_policy_that_tests_nothing_is_refused(self, wrong: dict[str, float]) -> None:
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .*: give a"):
            PromotionPolicy(**wrong)

    def test_a_limit_for_groups_nobody_named_is_refused(self) -> None:
        window = Window(start=datetime(2024, 1, 1, tzinfo=UTC), end=datetime(2024, 2, 1, tzinfo=UTC))
        with pytest.raises(ValueError, match=r"maximum_group_difference is 0\.01, but groups is empty"):
            EvaluateSpec(
                dataset="table",
                model_name="fare",
                run_id="1",
                window=window,
                time_column="t",
                policy=PromotionPolicy(maximum_group_difference=0.01),
            )

    def test_a_worse_slice_is_a_rejection_that_names_it(self) -> None:
        report = decide_promotion(compare(NEAR, FAR), PromotionPolicy(), slices=broken_slice())
        assert report.verdict is Verdict.REJECT
        assert report.reason.startswith("worse than the champion where shop b: mae ")

    def test_an_artifact_that_costs_too_much_is_a_rejection(self) -> None:
        facts = ArtifactFacts(size_mb=2.0, cold_start_seconds=1.0, p99_milliseconds=180.0, memory_mb=90.0)
        check = judge_artifact(facts, ArtifactLimits())
        decision = decide_promotion(compare(NEAR, FAR), PromotionPolicy(), further=[check])
        assert decision.verdict is Verdict.REJECT
        assert decision.reason == "the packaged model takes 1.8e+02 ms for a row (p99) (limit 100)"

    @pytest.mark.parametrize(
        ("correlation", "distance", "count"),
        [
            (0.0, 1, 20),
            (0.95, 1, 20),
            (0.0, 1, 300),
            (0.8, 1, 300),
            (0.95, 1, 300),
            (0.99, 1, 300),
            (0.7, 24, 120),
            (0.7, 24, 300),
        ],
    )
    def test_equal_models_are_promoted_at_the_nominal_rate(
        self, correlation: float, distance: int, count: int
    ) -> None:
        """600 pairs of equally good models; five percent of 600 is 30, with a standard deviation of 5.3: 46 is three above.

        ``benchmarks/false_promotion.py`` gives the rates for more kinds of errors, rows and metrics.
        """
        random = np.random.default_rng(11)
        promoted = 0
        for _ in range(600):
            target = np.zeros(count)
            new, old = (related(random, count, correlation, distance) for _ in range(2))
            report = compare_models(
                target=target,
                challenger=numbers(new),
                champion=numbers(old),
                baselines={"far off": numbers(np.full(count, 9.0))},
                metrics=["mae"],
            )
            promoted += decide_promotion(report, PromotionPolicy()).verdict is Verdict.PROMOTE
        assert (1 if count == 20 else 10) <= promoted <= 46

    def test_what_is_the_same_every_day_is_no_memory(self) -> None:
        """A daily pattern of the errors, as large as they, makes their mean no less certain."""
        random, hours = np.random.default_rng(13), np.arange(720) % 24
        pattern = random.normal(0, 1, 24)[hours]
        noise = random.normal(0, 1, 720)
        daily = common_factor(noise + pattern) * float(np.std(noise + pattern))
        assert daily == pytest.approx(common_factor(noise), rel=0.25)
        memory = related(random, 720, 0.8, 24)
        assert common_factor(memory) * float(np.std(memory)) > 2.0

    def test_a_clear_rhythm_of_four_periods_leaves_the_error_a_number(self) -> None:
        random, times = np.random.default_rng(14), np.arange(1_000)
        for period in (200, 249, 250) * 30:
            wave = np.sin(2.0 * np.pi * times / period + random.uniform(0.0, 6.0))
            assert common_factor(wave + random.normal(0.0, 1e-9, 1_000)) < 1_000.0

    @pytest.mark.parametrize("unit", [1e-200, 1e200])
    def test_the_unit_of_a_loss_does_not_matter(self, unit: float) -> None:
        loss = np.random.default_rng(15).normal(0.0, 1.0, 50)
        assert common_factor(unit * loss) == pytest.approx(common_factor(loss))

    @pytest.mark.parametrize("metric", ["f1", "roc_auc"])
    def test_metrics_that_are_no_mean_see_what_neighbors_have_in_common(self, metric: str) -> None:
        """200 pairs of classifiers whose mistakes resemble the ones before; ten expected, 20 is three deviations above."""
        random, promoted = np.random.default_rng(12), 0
        for _ in range(200):
            truth = np.array([0, 1] * 200)
            both = []
            for _ in range(2):
                score = 1.0 / (1.0 + np.exp(-(truth - 0.5 + 1.5 * related(random, 400, 0.9))))
                given = np.column_stack([1.0 - score, score])
                both.append(
                    Predictions(
                        values=np.where(score > 0.5, "1", "0"), probabilities=given, classes=("0", "1")
                    )
                )
            rival = compare_models(
                target=truth, challenger=both[0], champion=both[1], baselines={}, metrics=[metric]
            ).deciding.champion
            assert rival is not None
            assert rival.p_value is not None
            promoted += rival.p_value <= 0.05
        assert promoted <= 20

    def test_so_does_a_users_metric_that_is_only_a_number(self) -> None:
        random = np.random.default_rng(5)
        new, old = related(random, 400, 0.95), 1.4 * related(random, 400, 0.95)
        report = compare(new, old, np.zeros(400), metrics=["mae", "sklearn.metrics:mean_absolute_error"])
        mean, number = (item.champion for item in report.metrics)
        assert mean is not None
        assert number is not None
        assert number.minimum_detectable_difference == pytest.approx(
            mean.minimum_detectable_difference, rel=0.15
        )

    def test_a_trend_does_not_hide_a_plainly_better_model(self) -> None:
        """From no gain at all to twice the mean, and noise that remembers: longer windows are not to be waited for."""
        random = np.random.default_rng(3)
        gain = np.linspace(0.0, 2.0, 2_000) + 0.5 * related(random, 2_000, 0.8)
        rival = compare(np.full(2_000, 20.0), 20.0 + gain, np.zeros(2_000)).deciding.champion
        assert rival is not None
        assert rival.p_value is not None
        assert rival.p_value < 1e-3


def slices_of(columns: dict[str, np.ndarray], new: np.ndarray, old: np.ndarray, **policy: Any) -> SliceReport:
    return find_worse_slices(columns, new, old, cut_clusters(len(new)), SlicePolicy(**policy), loss="mae")


def slices_by(
    metric: str, columns: dict[str, np.ndarray], target: np.ndarray, new: Predictions, old: Predictions
) -> SliceReport:
    losses, before = (slice_losses(resolve_metric(metric), Graded(target, both)) for both in (new, old))
    return find_worse_slices(
        columns,
        losses.values,
        before.values,
        cut_clusters(len(target)),
        SlicePolicy(),
        loss=losses.name,
        of_mean=losses.of_mean,
    )


def campaigns(random: np.random.Generator, count: int, length: int) -> np.ndarray:
    """Number eleven stretches of rows, that do not overlap; all other rows are 0."""
    part = np.zeros(count)
    starts = np.sort(random.choice(count // length - 1, 11, replace=False)) * length
    for number, start in enumerate(starts + random.integers(0, length)):
        part[start : start + length] = number + 1
    return part


def broken_slice() -> SliceReport:
    random = np.random.default_rng(8)
    shop = random.choice(np.array(list("abc")), 6_000, p=[0.6, 0.1, 0.3])
    old = np.abs(random.normal(0, 1, 6_000))
    new = np.abs(random.normal(0, 0.8, 6_000)) * np.where(shop == "b", 2.0, 1.0)
    return slices_of({"shop": shop, "size": random.uniform(0, 10, 6_000)}, new, old)


class TestSlices:
    def test_the_slice_that_got_worse_is_found(self) -> None:
        report = broken_slice()
        assert report.broken[0].where == {"shop": "b"}
        assert report.broken[0].regression == pytest.approx(0.6, abs=0.25)
        assert all("b" in item.where.values() for item in report.broken)
        assert report.looked_at == 3 + 5 + len("ac") * 5  # shop b by size has fewer than 200 rows each

    @pytest.mark.parametrize(
        ("metric", "loss"),
        [("f1", "error rate by label"), ("recall", "error rate by label"), ("pr_auc", "log loss by label")],
    )
    def test_a_group_whose_positives_are_all_missed_is_found_though_false_alarms_fell(
        self, metric: str, loss: str
    ) -> None:
        random = np.random.default_rng(0)
        positive, missed = random.random(20_000) < 0.03, random.random(20_000) < 0.3
        old = said(np.where(positive, random.random(20_000) < 0.75, random.random(20_000) < 0.05))
        found = ~missed & (random.random(20_000) < 0.95)
        new = said(np.where(positive, found, random.random(20_000) < 0.01))
        columns = {"group": np.where(missed, "b", "a")}
        report = slices_by(metric, columns, np.where(positive, "b", "a"), new, old)
        assert [(item.where, report.loss) for item in report.broken] == [({"group": "b"}, loss)]

    def test_the_error_rate_by_label_is_that_of_the_balanced_accuracy(self) -> None:
        for truth, answers in ((TRUTH, ANSWERS), (TRUTH3, ANSWERS3)):
            losses = slice_losses(resolve_metric("balanced_accuracy"), Graded(truth, answers))
            expected = 1.0 - oracle.balanced_accuracy_score(truth, answers.values)
            assert float(np.mean(losses.values)) == pytest.approx(expected)

    def test_a_pair_of_columns_hides_what_neither_shows(self) -> None:
        random = np.random.default_rng(9)
        x, y = (random.choice(np.array(["0", "1"]), 8_000) for _ in range(2))
        old = np.abs(random.normal(0, 1, 8_000))
        new = np.abs(random.normal(0, 1, 8_000)) * np.where(x == y, 1.4, 0.7)
        found = slices_of({"x": x, "y": y}, new, old).broken
        assert {tuple(item.where.values()) for item in found} == {("0", "0"), ("1", "1")}
        assert not slices_of({"x": x, "y": y}, new, old, pairs=False).broken

    def test_missing_values_and_rare_categories_have_parts_of_their_own(self) -> None:
        number = np.where(np.arange(4_000) % 4 == 0, np.nan, np.arange(4_000.0))
        text = np.array([f"c{place % 40}" for place in range(4_000)])
        report = slices_of({"number": number, "text": text}, np.ones(4_000), np.ones(4_000), pairs=False)
        assert report.looked_at == 5 + 1 + 1  # fifths, missing, and the rare together
        assert not report.broken

    def test_dates_and_times_are_cut_in_fifths_with_bounds_to_read(self) -> None:
        hours = np.datetime64("2024-03-01T06:30") + np.arange(3_000).astype("timedelta64[h]")
        cut = cut_column(hours.astype("datetime64[us]"))
        assert cut.names[0] == "2024-03-01 06:30 to 2024-03-26 06:18"
        assert np.bincount(cut.numbers).tolist() == [600] * 5
        hours[0] = np.datetime64("NaT")
        days = cut_column(hours.astype("datetime64[D]"))
        assert days.names[-2:] == ("2024-06-09 to 2024-07-04", "missing")
        assert np.bincount(days.numbers)[-1] == 1
        seconds = np.datetime64("2024-03-01T06:30:00") + (np.arange(6) // 2).astype("timedelta64[s]")
        assert cut_column(seconds).names[:2] == ("2024-03-01 06:30:00", "2024-03-01 06:30:01")
        assert cut_column(np.full(3, np.datetime64("NaT", "us"))).numbers.tolist() == [0, 0, 0]

    def test_what_is_too_small_to_judge_is_said_and_no_pass_where_it_was_asked_for(self) -> None:
        same = np.ones(400)
        few = np.array([f"c{place % 10}" for place in range(400)])
        halves = np.array([f"h{place % 2}" for place in range(400)])
        report = slices_of({"few": few, "halves": halves, "one": np.full(400, "x")}, same, same, pairs=False)
        assert (report.looked_at, report.unmeasured) == (2, ("few",))
        for slices, named, outcome, words in (
            (report, True, Outcome.NOT_MEASURED, r"none of 2 slices .*; not measured by few: no part .* 200"),
            (report, False, Outcome.PASS, "none of 2 slices got worse by mae beyond tolerance and chance$"),
            (
                slices_of({"few": few}, same, same),
                False,
                Outcome.PASS,
                "^not measured by few: .*longer window",
            ),
            (slices_of({"one": np.full(400, "x")}, same, same), True, Outcome.PASS, "there are no slices"),
        ):
            policy = PromotionPolicy()
            decision = decide_promotion(compare(NEAR, FAR), policy, slices=slices, named_slices=named)
            check = next(one for one in decision.checks if one.name == "slices")
            assert check.outcome is outcome
            assert re.search(words, check.reason), check.reason

    def test_small_worsenings_are_tolerated(self) -> None:
        random = np.random.default_rng(2)
        old = np.abs(random.normal(1, 0.1, 4_000))
        shop = random.choice(np.array(["a", "b"]), 4_000)
        new = old * np.where(shop == "a", 1.04, 0.9)
        assert not slices_of({"shop": shop}, new, old).broken
        assert slices_of({"shop": shop}, new, old, maximum_regression=0.02).broken

    def test_p_values_are_adjusted_as_holm_has_it(self) -> None:
        random = np.random.default_rng(1)
        shop = random.choice(np.array(list("abcdefgh")), 8_000)
        new, old = (np.abs(random.normal(0, 1, 8_000)) for _ in range(2))
        report = slices_of({"shop": shop}, new, old)
        assert report.looked_at == 8
        starts = cut_clusters(8_000)
        raw = []
        for item in report.worst:
            inside = shop == item.where["shop"]
            sums = np.add.reduceat((new - old) * inside, starts)
            counts = np.add.reduceat(inside.astype(float), starts)
            mean = sums.sum() / counts.sum()
            error = (
                math.sqrt(np.square(sums - mean * counts).sum() * len(starts) / (len(starts) - 1))
                / counts.sum()
            )
            effective = counts.sum() ** 2 / np.square(counts).sum()
            raw.append(stats.t.sf(mean / error, effective - 1))
        adjusted = multipletests(raw, method="holm")[1]
        assert [item.p_value for item in report.worst] == pytest.approx(adjusted, rel=1e-6)

    def test_equal_models_rarely_have_a_worse_slice(self) -> None:
        """300 pairs of equally good models over 100 slices each; five percent would be 15."""
        random = np.random.default_rng(6)
        alarms = 0
        for _ in range(300):
            columns = {
                "shop": random.choice(np.array(list("abcd")), 4_000),
                "x": random.normal(size=4_000),
                "y": random.normal(size=4_000),
            }
            new, old = (np.abs(related(random, 4_000, 0.5)) for _ in range(2))
            alarms += bool(slices_of(columns, new, old).broken)
        assert alarms <= 27

    def test_blocks_of_unequal_size_raise_no_more_alarms_than_was_asked_for(self) -> None:
        """A slice of two long blocks and two slivers; taken for four equal ones, 24 alarms of 700 instead of 7 at most."""
        random, alarms = np.random.default_rng(0), 0
        part, starts = np.array(["now"] * 400 + ["later"] * 200), np.array([0, 10, 200, 390, 400, 500])
        policy = SlicePolicy(minimum_rows=300, maximum_regression=0.0, significance=0.01)
        for _ in range(700):
            new, old = (np.abs(random.normal(size=600)) for _ in range(2))
            alarms += bool(find_worse_slices({"part": part}, new, old, starts, policy).broken)
        assert alarms <= 7

    def test_a_campaign_that_got_worse_is_found(self) -> None:
        random = np.random.default_rng(0)
        columns = {"campaign": campaigns(random, 20_000, 1_000)}
        new, old = (
            (random.random(20_000) < 0.2 + 0.2 * (columns["campaign"] == 3)),
            random.random(20_000) < 0.2,
        )
        found = slices_of(columns, new.astype(float), old.astype(float)).broken
        assert [item.where for item in found] == [{"campaign": "3"}]

    def test_a_slice_that_is_wholly_wrong_is_certain(self) -> None:
        """No spread at all: every row of the slice is wrong now and was right before."""
        kind = np.where(np.arange(4_000) % 5 == 0, "electric", "gas")
        old = np.zeros(4_000)
        report = slices_of({"kind": kind}, (kind == "electric").astype(float), old)
        assert [item.where for item in report.broken] == [{"kind": "electric"}]
        assert report.broken[0].regression is None

    @pytest.mark.parametrize("elsewhere", [[], [450, 2_000, 2_500, 5_000]])
    def test_a_slice_of_one_day_is_doubtful(self, elsewhere: list[int]) -> None:
        """Rows of one block and a bit, and single ones of others."""
        random, rows = np.random.default_rng(0), np.arange(6_000)
        kind = np.where((rows < 380) | np.isin(rows, elsewhere), "first", "later")
        old, new = np.abs(random.normal(0, 1, 6_000)), np.abs(random.normal(0, 0.9, 6_000))
        new[:380] += 50.0
        report = find_worse_slices(
            {"kind": kind}, new, old, np.array([0, 200, 400, 600, 3_000]), SlicePolicy(), loss="mae"
        )
        assert not report.broken
        assert report.doubtful[0].where == {"kind": "first"}
        decision = decide_promotion(compare(NEAR, FAR), PromotionPolicy(), slices=report)
        assert decision.verdict is Verdict.NO_VERDICT
        assert "judge on a longer window" in decision.reason

    @pytest.mark.parametrize(
        "wrong", [{"significance": 7.0}, {"minimum_rows": -3}, {"maximum_regression": -0.1}]
    )
    def test_a_policy_that_judges_nothing_is_refused(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} of .*slice.* is .*: give"):
            SlicePolicy(**wrong)

    @pytest.mark.parametrize(("factor", "broken"), [(1.04, False), (1.08, True)])
    def test_the_tolerance_is_a_share_of_the_root_of_mean_squares(self, factor: float, broken: bool) -> None:
        """RMSE 4 % worse: within five percent, though its square is 8 % worse."""
        random = np.random.default_rng(0)
        part, target = np.where(np.arange(6_000) % 2 == 0, "a", "b"), random.normal(100, 5, 6_000)
        errors = random.normal(0, 2, 6_000)
        new = target + np.where(part == "a", factor, 0.5) * errors
        for metric in ("rmse", "r2"):
            report = slices_by(metric, {"part": part}, target, numbers(new), numbers(target + errors))
            assert report.loss == "rmse"
            assert [item.where for item in report.broken] == ([{"part": "a"}] if broken else [])
            worse = next(item for item in report.worst if item.where == {"part": "a"})
            inside = part == "a"
            assert worse.challenger == pytest.approx(
                oracle.root_mean_squared_error(target[inside], new[inside])
            )
            assert worse.regression == pytest.approx(factor - 1.0)

    def test_mistakes_are_told_as_an_error_rate(self) -> None:
        random = np.random.default_rng(0)
        truth = random.choice(np.array(["x", "y"]), 6_000)
        part = np.where(np.arange(6_000) % 2 == 0, "a", "b")

        def wrong(share: Any) -> Predictions:
            missed = random.random(6_000) < share
            return Predictions(
                values=np.where(missed, np.where(truth == "x", "y", "x"), truth), classes=("x", "y")
            )

        report = slices_by(
            "accuracy", {"part": part}, truth, wrong(np.where(part == "a", 0.2, 0.02)), wrong(0.1)
        )
        decision = decide_promotion(compare(NEAR, FAR), PromotionPolicy(), slices=report)
        assert decision.reason.startswith("worse than the champion where part a: error rate 0.")

    @pytest.mark.parametrize(("worth", "broken"), [(1_000.0, False), (3.0, True)])
    def test_a_gain_is_told_as_a_gain_and_tolerated_by_its_size(self, worth: float, broken: bool) -> None:
        """A hair less of a large gain is within five percent of it; the same of a small gain is not."""
        random = np.random.default_rng(0)
        part, target = np.where(np.arange(6_000) % 2 == 0, "a", "b"), random.normal(100, 5, 6_000)
        errors = random.normal(0, 1, 6_000)
        new = target + np.where(part == "a", 1.3, 0.5) * errors
        metric = f"{__name__}:{'large' if worth > 10 else 'small'}_gain"
        report = slices_by(metric, {"part": part}, target, numbers(new), numbers(target + errors))
        assert [item.where for item in report.broken] == ([{"part": "a"}] if broken else [])
        worse = next(item for item in report.worst if item.where == {"part": "a"})
        assert 0.0 < worse.challenger < worse.champion < worth
        assert worse.regression is not None
        assert worse.regression > 0.0

    def test_one_long_text_does_not_cost_a_column_of_long_ones(self) -> None:
        texts = np.array(["short"] * 99_999 + ["x" * 100_000], dtype=object)
        tracemalloc.start()
        slices_of({"text": texts}, np.ones(100_000), np.ones(100_000))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 200e6


class TestLabels:
    def test_models_that_know_different_labels_are_measured_alike(self) -> None:
        """The same answers; one model has heard of a third label, and gives it nothing."""
        given = np.column_stack([ANSWERS.probabilities, np.zeros(len(TRUTH))])  # type: ignore[list-item]
        knows_more = Predictions(values=ANSWERS.values, probabilities=given, classes=("a", "b", "c"))
        report = compare_models(
            target=TRUTH,
            challenger=ANSWERS,
            champion=knows_more,
            baselines={},
            metrics=DEFAULT_METRICS["classification"],
        )
        for item in report.metrics:
            assert item.champion is not None
            assert item.champion.value.value == pytest.approx(item.challenger.value), item.metric

    def test_a_label_that_no_model_knows_counts_as_missed(self) -> None:
        truth = np.where(np.arange(len(TRUTH)) % 2 == 0, "z", TRUTH)
        measured = evaluate_metric(resolve_metric("brier"), target=truth, prediction=ANSWERS)
        assert measured.value > 0.7
        assert evaluate_metric(resolve_metric("recall"), target=truth, prediction=ANSWERS).value < 0.7

    @pytest.mark.parametrize("kind", [int, bool, float, str])
    def test_a_users_metric_sees_answers_of_the_targets_kind(self, kind: type) -> None:
        truth = np.array([0, 1, 1, 0]).astype(kind)
        answers = Predictions(values=np.array([str(label) for label in truth[[0, 1, 0, 0]].tolist()]))
        metric = resolve_metric("sklearn.metrics:accuracy_score")
        assert evaluate_metric(metric, target=truth, prediction=answers).value == 0.75

    @pytest.mark.parametrize(
        ("kind", "spelled"),
        [(float, ("0", "1")), (int, ("0.0", "1.0")), (bool, ("0", "1")), (int, ("False", "True"))],
    )
    def test_the_same_labels_spelled_otherwise_are_the_same(
        self, kind: type, spelled: tuple[str, str]
    ) -> None:
        """A column that became another type since the champion was trained: a good champion stays one."""
        random = np.random.default_rng(0)
        truth = random.integers(0, 2, 600).astype(kind)
        own = tuple(str(label) for label in np.unique(truth))
        good, bad = (
            np.clip(0.5 + reach * (truth.astype(float) - 0.5) + random.normal(0, 0.15, 600), 0.01, 0.99)
            for reach in (0.8, 0.2)
        )

        def answers(score: np.ndarray, classes: tuple[str, ...]) -> Predictions:
            return Predictions(
                values=np.array(classes, dtype=object)[(score > 0.5).astype(int)],
                probabilities=np.column_stack([1 - score, score]),
                classes=classes,
            )

        for metric in DEFAULT_METRICS["classification"]:
            if metric == "calibration_error":
                continue
            held = compare_models(
                target=truth,
                challenger=answers(bad, own),
                champion=answers(good, spelled),
                baselines={"before": repeat_last(truth, truth[:1], classes=spelled, shares=(0.5, 0.5))},
                metrics=[metric],
            )
            alike = compare_models(
                target=truth,
                challenger=answers(bad, own),
                champion=answers(good, own),
                baselines={"before": repeat_last(truth, truth[:1], classes=own, shares=(0.5, 0.5))},
                metrics=[metric],
            )
            assert held == alike, metric
            assert decide_promotion(held, PromotionPolicy()).verdict is Verdict.REJECT, metric
        rates = [
            compare_groups(
                "sex",
                np.array(["m", "w"] * 300),
                target=truth,
                predicted=answers(good, spelled).values,
                losses=np.zeros(600),
                labels=labels,
            ).groups
            for labels in (own, spelled)
        ]
        assert rates[0] == rates[1]

    def test_a_champion_whose_labels_were_renamed_is_no_bad_champion(self) -> None:
        truth = np.array(["yes", "no"] * 50, dtype=object)
        with pytest.raises(
            SchemaMismatchError,
            match=r"the champion answers 0, 1, and the rows to judge on hold no, yes: they",
        ):
            require_known_labels("champion", ("0", "1"), truth)
        require_known_labels("champion", ("no", "perhaps"), truth)
        require_known_labels("champion", ("0.0", "1.0"), truth == "yes")

    def test_texts_of_one_meaning_that_stand_side_by_side_are_different_labels(self) -> None:
        truth = np.array(["1", "1.0"] * 50, dtype=object)
        known = Predictions(values=truth, classes=("1", "1.0"))
        assert evaluate_metric(resolve_metric("accuracy"), target=truth, prediction=known).value == 1.0
        assert Graded(truth, known).label_count == 2

    def test_a_users_metric_gets_whole_numbers_to_the_last_digit(self) -> None:
        truth = np.array([10**18 + 1, 10**18 + 2, 10**18 + 3])
        answers = Predictions(values=truth.astype(str).astype(object), classes=tuple(truth.astype(str)))
        assert Graded(truth, answers).native_answers.tolist() == truth.tolist()


class TestGroups:
    def test_rates_are_fairlearns(self) -> None:
        from fairlearn import metrics as fairness

        random = np.random.default_rng(0)
        groups = random.choice(np.array(["x", "y", "z"]), len(TRUTH), p=[0.5, 0.3, 0.2])
        losses = row_losses(resolve_metric("accuracy"), Graded(TRUTH, ANSWERS)).values
        report = compare_groups(
            "sex", groups, target=TRUTH, predicted=ANSWERS.values, losses=losses, labels="ab"
        )
        given: dict[str, Any] = {
            "y_true": TRUTH == "b",
            "y_pred": ANSWERS.values == "b",
            "sensitive_features": groups,
        }
        assert report.demographic_parity_difference == pytest.approx(
            fairness.demographic_parity_difference(**given)
        )
        assert report.demographic_parity_ratio == pytest.approx(fairness.demographic_parity_ratio(**given))
        assert report.equalized_odds_difference == pytest.approx(fairness.equalized_odds_difference(**given))
        for group in report.groups:
            inside = groups == group.group
            assert group.row_count == inside.sum()
            assert group.mean_loss == pytest.approx((TRUTH[inside] != ANSWERS.values[inside]).mean())

    def test_rates_of_several_labels_are_fairlearns(self) -> None:
        from fairlearn import metrics as fairness

        truth, answers = labels(3_000, "abcd")
        groups = np.random.default_rng(0).choice(np.array(["x", "y", "z"]), len(truth))
        report = compare_groups(
            "sex", groups, target=truth, predicted=answers.values, losses=np.zeros(len(truth)), labels="abcd"
        )
        assert not report.unmeasured
        frames = {
            label: fairness.MetricFrame(
                metrics={
                    "selection_rate": fairness.selection_rate,
                    "true_positive_rate": fairness.true_positive_rate,
                    "false_positive_rate": fairness.false_positive_rate,
                },
                y_true=truth == label,
                y_pred=answers.values == label,
                sensitive_features=groups,
            )
            for label in "abcd"
        }
        spreads = {label: float(frame.difference().max()) for label, frame in frames.items()}
        assert report.positive == max(spreads, key=lambda label: spreads[label])
        assert report.largest_difference == pytest.approx(max(spreads.values()))
        rates = frames[report.positive].by_group
        for group in report.groups:
            for name, value in rates.loc[group.group].items():
                assert getattr(group, name) == pytest.approx(value), name

    def test_a_group_too_small_to_measure_is_named_and_no_pass(self) -> None:
        groups, truth = (
            np.array(["m", "w"] * 300 + ["x"] * 49),
            np.array(["a", "a", "b", "b"] * 150 + ["b"] * 49),
        )
        report, decision = self.limited(groups, truth, np.where(groups == "x", "a", truth))
        assert [str(item) for item in report.unmeasured] == ["x (49 rows)"]
        assert decision.verdict is Verdict.NO_VERDICT
        assert "not measured, as of fewer than 50 rows: x (49 rows)" in decision.reason
        _, told = self.limited(groups, truth, np.where(groups == "x", "a", truth), minimum_rows=49)
        assert told.verdict is Verdict.REJECT

    def test_every_group_is_judged_however_many_there_are(self) -> None:
        """Thirty groups of growing size; the smallest is never given the label, and is shown."""
        names = np.repeat([f"g{number}" for number in range(30)], [100 + 2 * number for number in range(30)])
        truth = np.where(np.arange(len(names)) % 2 == 0, "a", "b")
        report, decision = self.limited(names, truth, np.where(names == "g0", "a", truth))
        assert decision.verdict is Verdict.REJECT
        assert (report.group_count, len(report.groups)) == (30, 20)
        assert report.groups[-1].group == "g0"

    def test_a_rate_of_few_rows_is_neither_a_failure_nor_a_pass(self) -> None:
        """Of one group a single row is truly positive, and missed; of the other all sixty are found."""
        groups = np.repeat(["m", "w"], 500)
        truth = np.array(["b"] * 60 + ["a"] * 440 + ["b"] + ["a"] * 499)
        answers = np.where(groups == "m", truth, "a")
        answers[500:560] = "b"
        answers[500] = "a"
        report, decision = self.limited(groups, truth, answers, limit=0.2)
        assert report.equalized_odds_difference == pytest.approx(59 / 499)
        assert [str(item) for item in report.unmeasured] == ["the true positive rate of b in w (1 row)"]
        assert decision.verdict is Verdict.NO_VERDICT

    def test_thousands_of_small_groups_are_counted_and_the_largest_named(self) -> None:
        names = np.array([f"n{number}" for number in range(2_000)] + ["m"] * 100 + ["n7"] * 9)
        truth = np.where(np.arange(len(names)) % 2 == 0, "a", "b")
        report, decision = self.limited(names, truth, truth)
        assert (report.unmeasured_count, len(report.unmeasured)) == (2_000, 20)
        assert "n7 (10 rows), n0 (1 row)" in decision.reason
        assert "and 1995 more" in decision.reason

    def test_a_failure_of_those_measured_needs_no_others(self) -> None:
        groups = np.array(["m", "w"] * 300 + ["x"] * 3)
        truth = np.array(["a", "a", "b", "b"] * 150 + ["b"] * 3)
        _, decision = self.limited(groups, truth, np.where(groups == "m", "a", truth))
        assert decision.verdict is Verdict.REJECT

    @staticmethod
    def limited(
        groups: np.ndarray, truth: np.ndarray, answers: np.ndarray, limit: float = 0.1, minimum_rows: int = 50
    ) -> tuple[FairnessReport, PromotionDecision]:
        report = compare_groups(
            "sex",
            groups,
            target=truth,
            predicted=answers,
            losses=np.zeros(len(truth)),
            labels="ab",
            minimum_rows=minimum_rows,
        )
        policy = PromotionPolicy(maximum_group_difference=limit)
        return report, decide_promotion(compare(NEAR, FAR), policy, groups=[report])

    @pytest.mark.parametrize(
        ("limit", "outcome"), [(None, Outcome.PASS), (0.9, Outcome.PASS), (0.01, Outcome.FAIL)]
    )
    def test_a_limit_makes_it_a_gate(self, limit: float | None, outcome: Outcome) -> None:
        groups = np.where(np.arange(len(TRUTH)) % 3 == 0, "x", "")
        report = compare_groups(
            "sex", groups, target=TRUTH, predicted=ANSWERS.values, losses=np.zeros(len(TRUTH)), labels="ab"
        )
        assert {group.group for group in report.groups} == {"x", "(empty)"}
        decision = decide_promotion(
            compare(NEAR, FAR), PromotionPolicy(maximum_group_difference=limit), groups=[report]
        )
        assert decision.checks[-1].outcome is outcome

    def test_of_several_labels_the_one_that_is_given_most_differently_counts(self) -> None:
        groups = np.array(["m", "w"] * 300)
        predicted = np.where(groups == "m", "a", "b")
        report = compare_groups(
            "sex", groups, target=predicted, predicted=predicted, losses=np.zeros(600), labels="abc"
        )
        assert report.demographic_parity_difference == pytest.approx(1.0)
        assert report.positive in {"a", "b"}

    def test_a_group_without_any_loss_is_infinitely_better(self) -> None:
        groups = np.array(["m", "w"] * 300)
        losses = np.where(groups == "m", 0.0, 1.0)
        report = compare_groups("sex", groups, target=losses, predicted=losses, losses=losses, labels=())
        decision = decide_promotion(
            compare(NEAR, FAR), PromotionPolicy(maximum_group_difference=5.0), groups=[report]
        )
        assert decision.verdict is Verdict.REJECT
        assert "one group has no loss at all" in decision.reason

    def test_gains_have_no_ratio(self) -> None:
        """Losses below zero: neither a failure nor a pass."""
        groups = np.array(["m", "w"] * 300)
        losses = np.where(groups == "m", -999.0, -998.0)
        report = compare_groups("sex", groups, target=losses, predicted=losses, losses=losses, labels=())
        assert report.loss_ratio is None
        decision = decide_promotion(
            compare(NEAR, FAR), PromotionPolicy(maximum_group_difference=0.5), groups=[report]
        )
        assert decision.verdict is Verdict.NO_VERDICT
        assert "may be below zero" in decision.reason

    def test_groups_are_compared_by_the_root_of_mean_squares(self) -> None:
        groups = np.array(["m", "w"] * 300)
        squares = np.where(groups == "m", 4.0, 1.0)
        report = compare_groups(
            "sex",
            groups,
            target=squares,
            predicted=squares,
            losses=squares,
            labels=(),
            loss="rmse",
            of_mean=math.sqrt,
        )
        assert report.loss_ratio == pytest.approx(2.0)
        decision = decide_promotion(
            compare(NEAR, FAR), PromotionPolicy(maximum_group_difference=0.5), groups=[report]
        )
        assert (
            decision.reason
            == "groups by sex: the rmse of the worst group is 100% above the best's (limit 0.50)"
        )

    def test_one_group_is_nothing_to_compare(self) -> None:
        groups = np.array(["x"] * 690 + ["y"] * 10)
        report = compare_groups(
            "sex", groups, target=TRUTH, predicted=ANSWERS.values, losses=np.zeros(len(TRUTH)), labels="ab"
        )
        policy = PromotionPolicy(maximum_group_difference=0.1)
        decision = decide_promotion(compare(NEAR, FAR), policy, groups=[report])
        assert decision.verdict is Verdict.NO_VERDICT

    def test_numbers_are_compared_by_their_loss(self) -> None:
        groups = np.where(np.arange(500) % 2 == 0, "x", "y")
        losses = np.where(groups == "x", 1.0, 1.5)
        report = compare_groups("sex", groups, target=TARGET, predicted=GUESS, losses=losses, labels=())
        assert report.loss_ratio == pytest.approx(1.5)
        assert report.largest_difference == pytest.approx(0.5)


class TestLastValue:
    def test_it_is_as_sure_as_it_was_right_so_far(self) -> None:
        random = np.random.default_rng(0)
        target = np.repeat(random.random(150) > 0.5, 20).astype(int)
        guess = repeat_last(target, np.array([0]), classes=("0", "1"), shares=(0.6, 0.4))
        assert guess.values[1:].tolist() == target[:-1].tolist()
        assert guess.probabilities is not None
        assert guess.probabilities.sum(axis=1) == pytest.approx(1.0)
        for place in (1, 700, 2_999):
            right = sum(target[row] == guess.values[row] for row in range(place))
            assert guess.probabilities[place, target[place - 1]] == pytest.approx((right + 1) / (place + 2))
        scored = evaluate_metric(resolve_metric("log_loss"), target=target, prediction=guess)
        assert scored.value < 0.2  # a coin: 0.693

    def test_labels_the_model_never_saw_are_no_obstacle(self) -> None:
        target = np.array(["z", "z", "a", "b"])
        guess = repeat_last(target, np.array(["a"]), classes=("a", "b", "c"), shares=(0.5, 0.5, 0.0))
        assert guess.probabilities is not None
        assert guess.probabilities.sum(axis=1) == pytest.approx(1.0)
        assert guess.probabilities[1].tolist() == pytest.approx([0.5, 0.5, 0.0], abs=1e-6)

    @pytest.mark.parametrize(
        ("target", "label", "first"),
        [
            (np.array([True, False]), "False", False),
            (np.array([0, 1]), "1.0", 1),
            (np.array([0.0, 1.0]), "1", 1.0),
            (np.array(["1", "0"], dtype=object), "1.0", "1"),
            (np.array([0, 1]), "rare", "rare"),
            (np.array([3, 4]), 3.5, 3.5),
        ],
    )
    def test_its_first_answer_is_spelled_as_the_rows_do(self, target: Any, label: Any, first: Any) -> None:
        given = as_in(target, label)
        assert given.tolist() == [first]
        guess = repeat_last(target, given, classes=(label, "0") if isinstance(label, str) else ())
        assert guess.values.tolist() == [first, target.tolist()[0]]

    def test_numbers_have_no_probabilities(self) -> None:
        guess = repeat_last(np.array([1.0, 2.0, 3.0]), np.array([9.0]))
        assert guess.values.tolist() == [9.0, 1.0, 2.0]
        assert guess.probabilities is None


class TestProbe:
    def test_a_slow_model_is_measured_on_fewer_answers(self) -> None:
        asked: list[Any] = []

        def slow(rows: list[dict[str, Any]]) -> None:
            asked.append(rows)
            time.sleep(0.02)

        spent = time_answers(slow, [{"x": 1}, {"x": 2}], budget_seconds=0.3)
        assert 1 <= len(spent) <= 20
        assert len(asked) <= 25
        assert all(value >= 0.02 for value in spent)
        assert time_answers(slow, [{"x": 1}], budget_seconds=0.001)

    def test_a_fast_one_on_all(self) -> None:
        assert len(time_answers(lambda rows: rows, [{"x": 1}])) == 450

    @pytest.mark.parametrize(("limit", "waits"), [(0.5, 120.0), (300.0, 390.0), (None, 3_600.0)])
    def test_a_start_that_is_allowed_is_waited_for(self, limit: float | None, waits: float) -> None:
        assert ArtifactLimits(cold_start_seconds=limit).timeout_seconds == waits

    def test_of_how_many_answers_is_said(self) -> None:
        facts = ArtifactFacts(
            size_mb=2.0, cold_start_seconds=1.0, p99_milliseconds=260.0, memory_mb=90.0, timed_answers=70
        )
        assert (
            "2.6e+02 ms for a row (p99 of 70) (limit 100)" in judge_artifact(facts, ArtifactLimits()).reason
        )


def test_importing_it_needs_no_model_library() -> None:
    code = (
        "import sys, airflow_mlops.core.comparison.evaluation, airflow_mlops.core.comparison.slices, airflow_mlops.core.comparison.promotion;"
        "sys.exit(bool({'sklearn', 'scipy', 'fairlearn', 'polars'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path.cwd()).returncode == 0
