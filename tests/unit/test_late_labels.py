"""Late labels: what the first ones say, when that is one-sided, and that all of them have the last word."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.signal import lfilter

from airflow_mlops.core.comparison.metric import MetricValue
from airflow_mlops.core.comparison.metrics import evaluate_metric, resolve_metric
from airflow_mlops.core.comparison.predictions import Graded, Predictions
from airflow_mlops.core.monitoring.change import WindowLoss, detect_change, effective_count
from airflow_mlops.core.monitoring.estimation import Estimate
from airflow_mlops.core.monitoring.estimator_record import EstimatorRecord
from airflow_mlops.core.monitoring.performance import (
    EarlyLabels,
    PerformancePolicy,
    compare_early_labels,
    judge_estimate,
    judge_performance,
    uncertainty_of,
)

MAE = resolve_metric("mae")
REFERENCE = MetricValue(metric="mae", value=1.0, standard_deviation=1.0, row_count=4000)


def trips(seed: int, count: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Give targets and answers; the larger the target, the larger the error."""
    random = np.random.default_rng(seed)
    target = random.gamma(2.0, 5.0, count)
    return target, target + random.standard_normal(count) * (0.2 + 0.1 * target)


def arrived(target: np.ndarray, share: float, seed: int, *, by_target: bool) -> np.ndarray:
    """Give which labels are here when a share is: at random, or the small ones first (rank and chance in equal parts)."""
    random = np.random.default_rng(seed)
    delay = random.random(len(target))
    if by_target:
        delay = delay + np.argsort(np.argsort(target)) / len(target)
    return delay <= np.quantile(delay, share)


def early(target: np.ndarray, answers: np.ndarray, here: np.ndarray) -> EarlyLabels:
    graded = Graded(target[here], Predictions(values=answers[here]))
    return compare_early_labels(MAE, graded, answers, here)


class TestOneSided:
    @pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
    def test_delays_that_depend_on_the_target_are_seen(self, share: float) -> None:
        target, answers = trips(0)
        here = arrived(target, share, 0, by_target=True)
        found = early(target, answers, here)
        truth = evaluate_metric(MAE, target=target, prediction=answers).value
        first = evaluate_metric(MAE, target=target[here], prediction=answers[here]).value
        assert found.one_sided
        assert first < truth
        assert abs(found.adjusted_value - truth) < abs(first - truth)

    def test_delays_by_chance_are_not(self) -> None:
        """Ten groups at four deviations: 0.06 % of windows by chance, so none of 100."""
        found = []
        for seed in range(100):
            target, answers = trips(seed)
            found.append(early(target, answers, arrived(target, 0.8, seed, by_target=False)).one_sided)
        assert not any(found)

    @pytest.mark.parametrize("by_target", [False, True])
    def test_it_converges_to_what_all_labels_say(self, by_target: bool) -> None:
        target, answers = trips(1)
        truth = evaluate_metric(MAE, target=target, prediction=answers).value
        gaps = []
        for share in (0.5, 0.7, 0.9, 1.0):
            here = arrived(target, share, 1, by_target=by_target)
            gaps.append(
                abs(evaluate_metric(MAE, target=target[here], prediction=answers[here]).value - truth)
            )
        assert gaps[-1] == 0.0
        if by_target:
            assert gaps == sorted(gaps, reverse=True)

    def test_labels_of_one_kind_that_take_longer(self) -> None:
        random = np.random.default_rng(0)
        truth = random.random(4000) < 0.3
        answers = np.where(random.random(4000) < 0.85, truth, ~truth).astype(str)
        here = np.where(truth, random.random(4000) < 0.6, True)
        graded = Graded(truth[here].astype(str), Predictions(values=answers[here], classes=("False", "True")))
        f1 = resolve_metric("f1")
        found = compare_early_labels(f1, graded, answers, here)
        whole = evaluate_metric(
            f1, target=truth.astype(str), prediction=Predictions(values=answers, classes=("False", "True"))
        ).value
        first = evaluate_metric(f1, target=graded.target, prediction=graded.answers).value
        assert found.one_sided
        assert abs(found.adjusted_value - whole) < abs(first - whole)


class TestJudgement:
    def judge(self, value: float, share: float, found: EarlyLabels | None = None, **more):
        current = MetricValue(metric="mae", value=value, standard_deviation=1.0, row_count=2000)
        return judge_performance(
            current=current,
            reference=REFERENCE,
            labelled_share=share,
            policy=PerformancePolicy(),
            early=found,
            **more,
        )

    def test_every_sentence_says_on_how_much_it_rests(self) -> None:
        assert self.judge(1.1, 0.849).reason.endswith("; 84% labelled so far")
        assert self.judge(1.1, 0.999).reason.endswith("; 99% labelled so far")  # never "100%" before it is
        assert "labelled so far" not in self.judge(1.1, 1.0).reason

    def test_one_sided_labels_do_not_degrade_alone(self) -> None:
        doubtful = EarlyLabels(difference=9.0, one_sided=True, adjusted_value=1.1)
        report = self.judge(1.5, 0.85, doubtful)
        assert not report.degraded
        assert report.reason.endswith(
            "; 85% labelled so far, and the labels that came first are one-sided (z = 9.0), counted as they were "
            "given MAE is 1.1"
        )
        assert self.judge(1.5, 0.85, EarlyLabels(difference=9.0, one_sided=True, adjusted_value=1.4)).degraded
        assert self.judge(
            1.5, 0.85, EarlyLabels(difference=1.0, one_sided=False, adjusted_value=1.1)
        ).degraded

    def test_small_and_lasting_is_degraded_too(self) -> None:
        def window(mean: float) -> WindowLoss:
            return WindowLoss(
                label="w", model_version="1", mean=mean, standard_deviation=1.0, effective_count=4000.0
            )

        change = detect_change([window(1.0), *[window(1.16)] * 12], promised=window(1.0))
        report = self.judge(1.16, 1.0, change=change)
        assert report.degraded
        assert report.reason.startswith("degraded: changed: mean loss 1.16 in 12 windows since w, ")
        assert not self.judge(1.16, 1.0).degraded

    def test_one_sided_labels_do_not_silence_what_lasts(self) -> None:
        def window(mean: float) -> WindowLoss:
            return WindowLoss(
                label="w", model_version="1", mean=mean, standard_deviation=1.0, effective_count=4000.0
            )

        change = detect_change([window(1.0), *[window(1.16)] * 12], promised=window(1.0))
        counted = EarlyLabels(difference=9.0, one_sided=True, adjusted_value=1.15)
        assert self.judge(1.16, 0.85, counted, change=change).degraded
        unknown = EarlyLabels(difference=9.0, one_sided=True, adjusted_value=None)
        assert not self.judge(1.16, 0.85, unknown, change=change).degraded

    def test_what_stands_in_the_way_of_a_metric_is_said(self) -> None:
        for share, words in ((0.3, "30% labelled so far"), (1.0, "roc_auc is nan on 5 rows")):
            report = judge_performance(
                current=None, reference=REFERENCE, labelled_share=share, policy=PerformancePolicy(),
                problem="roc_auc is nan on 5 rows",
            )  # fmt: skip
            assert not report.measured
            assert words in report.reason

    @pytest.mark.parametrize(
        ("name", "value", "words"),
        [
            ("minimum_labelled_share", 80.0, "minimum_labelled_share is 80.0: give a share"),
            ("significance", 5.0, "significance is 5.0: give a probability"),
            ("maximum_relative_change", -1.0, "maximum_relative_change is -1.0: give a number from 0 on"),
        ],
    )
    def test_a_policy_that_would_judge_nothing_is_refused(self, name: str, value: float, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            PerformancePolicy(**{name: value})


class TestByItself:
    """A window of its own: worse beyond chance, for every kind of metric, and no more often than stated."""

    def judge(self, name: str, reference: Graded, current: Graded) -> bool:
        metric = resolve_metric(name)
        promised, found = (
            evaluate_metric(metric, target=side.target, prediction=side.answers)
            for side in (reference, current)
        )
        return judge_performance(
            current=found,
            reference=promised,
            labelled_share=1.0,
            policy=PerformancePolicy(),
            reference_count=effective_count(metric.losses(reference)) if metric.losses is not None else None,
            uncertainty=uncertainty_of(metric, current, found.value),
        ).degraded

    def labels(self, random: np.random.Generator, rows: int, *, good: float = 0.3) -> Graded:
        """Give answers of a model that tells a label of one row in twenty by a score."""
        truth = (random.random(rows) < 0.05).astype(int)
        score = np.clip(good * truth + random.normal(0.3, 0.2, rows), 0.01, 0.99)
        answers = Predictions(
            values=(score > 0.55).astype(int).astype(str),
            probabilities=np.column_stack([1.0 - score, score]),
            classes=("0", "1"),
        )
        return Graded(truth, answers)

    @pytest.mark.parametrize(
        ("name", "rows"),
        [("f1", 200), ("recall", 200), ("pr_auc", 200), ("f1", 1000), (f"{__name__}:missed", 1000)],
    )
    def test_a_rare_label_is_no_alarm_by_chance(self, name: str, rows: int) -> None:
        random = np.random.default_rng(1)
        alarms = sum(
            self.judge(name, self.labels(random, 4000), self.labels(random, rows)) for _ in range(60)
        )
        assert alarms <= 1  # by tolerance alone it were about ten of sixty

    @pytest.mark.parametrize("name", ["f1", "recall", "pr_auc", "roc_auc", f"{__name__}:missed"])
    def test_a_model_that_lost_its_way_is(self, name: str) -> None:
        random = np.random.default_rng(2)
        assert all(
            self.judge(name, self.labels(random, 4000), self.labels(random, 3000, good=0.0)) for _ in range(5)
        )

    @pytest.mark.parametrize("name", ["mae", "f1"])
    def test_a_change_within_the_window_is_no_memory(self, name: str) -> None:
        random = np.random.default_rng(4)
        if name == "f1":
            before, after = self.labels(random, 5000), self.labels(random, 5000, good=-0.3)
            reference = self.labels(random, 4000)
        else:
            reference, before, after = (
                Graded(np.zeros(rows), Predictions(values=random.normal(0.0, size, rows)))
                for rows, size in ((4000, 1.0), (1500, 1.0), (1500, 3.0))
            )
        parts = [
            np.concatenate(pair)
            for pair in zip(
                (before.target, before.answers.values), (after.target, after.answers.values), strict=True
            )
        ]
        answers = Predictions(values=parts[1], classes=before.answers.classes)
        assert self.judge(name, reference, Graded(parts[0], answers))

    def test_rows_that_err_alike_count_for_less(self) -> None:
        random = np.random.default_rng(3)

        def errors(rows: int) -> Graded:
            noise = random.normal(size=rows) * np.sqrt(1 - 0.9**2)
            return Graded(np.zeros(rows), Predictions(values=lfilter([1.0], [1.0, -0.9], noise)))

        assert (
            sum(self.judge("mae", errors(4000), errors(300)) for _ in range(200)) <= 1
        )  # 1 in 13 were they independent


def missed(target: np.ndarray, prediction: np.ndarray) -> float:
    """Share of the rare label that was not found, as a function of the user knows it."""
    if not target.any():
        raise ValueError("nothing to miss")
    return float(np.mean(prediction[target == 1] == 0)) + 0.5


class TestEstimates:
    @pytest.mark.parametrize(
        ("value", "low", "high", "trusted", "worse"),
        [
            (1.5, 1.2, 1.8, True, True),
            (1.5, 1.2, 1.8, False, False),  # known to be bad
            (1.5, 0.9, 2.1, True, False),  # may be chance
            (1.1, 1.05, 1.15, True, False),  # tolerated
            (0.8, 0.7, 0.9, True, False),
        ],
    )
    def test_worse_only_when_it_is_sure_and_believed(
        self, value: float, low: float, high: float, trusted: bool, worse: bool
    ) -> None:
        record = EstimatorRecord(
            windows=4,
            covered=4 if trusted else 1,
            bias=0.0,
            mean_error=0.1,
            trusted=trusted,
            reason="as it was",
        )
        estimate = Estimate(metric="mae", value=value, low=low, high=high, row_count=1000)
        found, sentence = judge_estimate(estimate, REFERENCE, record, PerformancePolicy())
        assert found is worse
        assert ("not trusted: as it was" in sentence) is not trusted
