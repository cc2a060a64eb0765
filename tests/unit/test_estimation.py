"""Estimates without labels: against NannyML's figures, against what turned out, and how far they are believed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from airflow_mlops.core.codec import from_dict, to_dict
from airflow_mlops.core.comparison.metrics import DEFAULT_METRICS, evaluate_metric, resolve_metric
from airflow_mlops.core.comparison.predictions import Predictions
from airflow_mlops.core.monitoring.calibration import fit_calibration
from airflow_mlops.core.monitoring.estimation import (
    Estimation,
    estimate_errors,
    estimate_labels,
    learn_error_estimation,
    learn_labels_estimation,
)
from airflow_mlops.core.monitoring.estimator_record import GradedEstimate, judge_estimator
from airflow_mlops.core.monitoring.stretches import stretches
from airflow_mlops.exceptions import InsufficientDataError
from benchmarks import estimation as benchmark

#: What NannyML 0.13.1 gave (scikit-learn 1.9.1, numpy 2.4.6) for the predictions of ``benchmarks/estimation.py``.
FIGURES = json.loads((Path(__file__).parent / "nannyml_figures.json").read_text())
LABEL_METRICS = tuple(name for name in DEFAULT_METRICS["classification"] if name != "calibration_error")

needs_data = pytest.mark.skipif(
    not (benchmark.DATA / "elec2.parquet").exists(), reason="needs the real streams in ../shared/data"
)


class TestNannyML:
    @needs_data
    def test_two_labels_on_a_real_stream(self) -> None:
        assert FIGURES["elec2"]["calibrated"] is True
        reference, later = benchmark.elec2()
        self.compare(benchmark.ours(reference, later, 1344, ("0", "1"), "isotonic"), FIGURES["elec2"])

    def test_three_labels(self) -> None:
        assert set(FIGURES["three_labels"]["calibrated"].values()) == {"IsotonicCalibrator"}
        reference, later = benchmark.three_labels()
        self.compare(
            benchmark.ours(reference, later, 2000, ("a", "b", "c"), "isotonic"), FIGURES["three_labels"]
        )

    @staticmethod
    def compare(ours: dict[str, list[dict[str, float]]], theirs: dict[str, list[float]]) -> None:
        for metric in benchmark.LABEL_METRICS:
            assert [item["value"] for item in ours[metric]] == pytest.approx(theirs[metric], abs=1e-5), metric

    @needs_data
    def test_errors_of_numbers(self) -> None:
        """Not the same trees (NannyML has LightGBM, tuned), so not the same figures: within a sixth of each other."""
        reference, later = benchmark.bike_sharing()
        for metric in ("mae", "rmse"):
            found = benchmark.errors_ours(reference, later, benchmark.CHUNK["bike_sharing"], metric)
            assert [item["value"] for item in found] == pytest.approx(
                FIGURES["bike_sharing"][metric], rel=0.17
            )


def two_labels(
    count: int, seed: int, *, shift: float = 0.0, classes: tuple[str, ...] = ("no", "yes")
) -> tuple[np.ndarray, Predictions]:
    """Give labels, and the answers of a model that is too sure of itself."""
    random = np.random.default_rng(seed)
    odds = random.standard_normal(count) * 1.5 + shift
    truth = (random.random(count) < 1 / (1 + np.exp(-odds))).astype(int)
    said = 1 / (1 + np.exp(-2.0 * odds))
    labels = np.array(classes, dtype=object)
    answers = Predictions(
        values=labels[(said > 0.5).astype(int)],
        probabilities=np.column_stack([1 - said, said]),
        classes=classes,
    )
    return labels[truth], answers


class TestLabels:
    @pytest.mark.parametrize("name", LABEL_METRICS)
    def test_it_follows_moved_inputs(self, name: str) -> None:
        """Ten windows whose inputs moved ever further; coverage of 95 % misses three or more of ten in 1 % of cases."""
        metric = resolve_metric(name)
        target, answers = two_labels(4000, 0)
        estimation = learn_labels_estimation(metric, target=target, answers=answers)
        held, gaps = 0, []
        for seed in range(10):
            turned_out, said = two_labels(2000, 100 + seed, shift=0.1 * seed)
            estimate = estimate_labels(metric, said, estimation)
            realized = evaluate_metric(metric, target=turned_out, prediction=said).value
            held += estimate.low <= realized <= estimate.high
            gaps.append(estimate.value - realized)
        assert held >= 8
        assert abs(float(np.mean(gaps))) < 0.02

    def test_calibration_is_what_makes_it_right(self) -> None:
        target, answers = two_labels(4000, 0)
        truth = (target == "yes").astype(int)
        assert fit_calibration(answers.probabilities, truth).kind in {"isotonic", "platt"}
        raw = float(np.mean(np.max(answers.probabilities, axis=1)))
        metric = resolve_metric("accuracy")
        estimate = estimate_labels(
            metric, answers, learn_labels_estimation(metric, target=target, answers=answers)
        )
        realized = evaluate_metric(metric, target=target, prediction=answers).value
        assert abs(estimate.value - realized) < 0.01 < 0.05 < raw - realized

    def test_a_calibrated_model_is_left_alone_or_nearly(self) -> None:
        random = np.random.default_rng(0)
        said = random.random(3000)
        truth = (random.random(3000) < said).astype(int)
        given = np.column_stack([1 - said, said])
        moved = fit_calibration(given, truth)(given)
        assert float(np.mean(np.abs(moved - given))) < 0.02

    def test_scores_the_wrong_way_round_are_worth_the_rate(self) -> None:
        random = np.random.default_rng(0)
        said = random.random(3000)
        truth = (random.random(3000) < 1 - said).astype(int)
        given = np.column_stack([1 - said, said])
        for kind in ("isotonic", "platt"):
            assert fit_calibration(given, truth, kind=kind)(given)[:, 1] == pytest.approx(0.5, abs=0.05)

    def test_the_users_own_metrics(self) -> None:
        target, answers = two_labels(4000, 0, classes=("0", "1"))
        numbers = target.astype(int)
        for name in ("tests.unit.test_estimation:cost", "tests.unit.test_estimation:cost_per_row"):
            metric = resolve_metric(name)
            estimation = learn_labels_estimation(metric, target=numbers, answers=answers)
            estimate = estimate_labels(metric, answers, estimation)
            realized = evaluate_metric(metric, target=numbers, prediction=answers).value
            assert estimate.low <= realized <= estimate.high
            assert estimate.value == pytest.approx(realized, rel=0.05)

    def test_it_survives_being_written_down(self) -> None:
        target, answers = two_labels(3000, 0)
        metric = resolve_metric("f1")
        estimation = learn_labels_estimation(metric, target=target, answers=answers)
        text = json.dumps(to_dict(estimation))
        assert len(text) < 40_000
        again = from_dict(Estimation, json.loads(text))
        assert estimate_labels(metric, answers, again) == estimate_labels(metric, answers, estimation)

    @pytest.mark.parametrize(
        ("name", "rows", "why"),
        [
            ("calibration_error", 3000, "takes for granted"),
            ("accuracy", 100, "100 held-out rows are too few"),
        ],
    )
    def test_where_there_is_none_it_is_said_why(self, name: str, rows: int, why: str) -> None:
        target, answers = two_labels(rows, 0)
        estimation = learn_labels_estimation(resolve_metric(name), target=target, answers=answers)
        assert estimation.method == "none"
        assert why in estimation.reason
        with pytest.raises(ValueError, match=why):
            estimate_labels(resolve_metric(name), answers, estimation)

    def test_what_is_no_number_is_no_estimate(self) -> None:
        random = np.random.default_rng(5)
        scores = random.random(400)
        target = (random.random(400) < scores).astype(int)

        def answers(given: np.ndarray) -> Predictions:
            both = np.column_stack([1.0 - given, given])
            return Predictions(
                values=(given > 0.5).astype(int).astype(str), probabilities=both, classes=("0", "1")
            )

        for name, given, words in (
            ("f1", np.array([0.3, np.nan]), "probabilities that are no numbers"),
            ("roc_auc", np.array([0.3]), "how far off 1 such answers are can't be told"),
        ):
            estimation = learn_labels_estimation(resolve_metric(name), target=target, answers=answers(scores))
            with pytest.raises(InsufficientDataError, match=words):
                estimate_labels(resolve_metric(name), answers(given), estimation)
        log_loss = resolve_metric("log_loss")
        estimation = learn_labels_estimation(log_loss, target=target, answers=answers(scores))
        assert estimate_labels(log_loss, answers(np.array([0.3])), estimation).low == 0.0

    def test_bare_labels_and_no_rows(self) -> None:
        metric = resolve_metric("accuracy")
        target, answers = two_labels(1000, 0)
        bare = Predictions(values=answers.values, classes=answers.classes)
        assert "no probabilities" in learn_labels_estimation(metric, target=target, answers=bare).reason
        estimation = learn_labels_estimation(metric, target=target, answers=answers)
        with pytest.raises(InsufficientDataError, match="no rows"):
            estimate_labels(metric, answers.take(np.arange(0)), estimation)


def cost(target: np.ndarray, prediction: np.ndarray) -> float:
    """A missed 1 costs ten, a false one costs one."""
    return float(np.mean(10.0 * ((target == 1) & (prediction == 0)) + ((target == 0) & (prediction == 1))))


def cost_per_row(target: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """The same, row by row."""
    return 10.0 * ((target == 1) & (prediction == 0)) + ((target == 0) & (prediction == 1))


cost_per_row.per_row = True  # type: ignore[attr-defined]


def margin(target: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """What a row costs, less the five it earns: below zero where it pays."""
    return np.abs(target - prediction) - 5.0


margin.per_row = True  # type: ignore[attr-defined]


class TestNumbers:
    def test_costs_below_zero(self) -> None:
        """Cut off at zero they would be worse by all that was earned, and trusted."""
        random = np.random.default_rng(0)
        metric = resolve_metric("tests.unit.test_estimation:margin")
        costs = np.abs(random.standard_normal(1000)) - 5.0
        parts = [(check, np.full(len(check), costs.mean())) for _, check in stretches(1000)]
        estimation = learn_error_estimation(metric, costs, parts)
        estimate = estimate_errors(metric, np.full(500, costs.mean()), estimation)
        assert estimate.value == pytest.approx(costs.mean())
        assert estimate.low < costs.mean() < estimate.high

    @pytest.mark.parametrize("name", ["mae", "rmse"])
    def test_intervals_hold_what_turns_out(self, name: str) -> None:
        """Errors of known size, said exactly: 200 windows, of which 95 % or nearly (binomial, two deviations: 184)."""
        metric = resolve_metric(name)
        random = np.random.default_rng(0)

        def errors(count: int) -> tuple[np.ndarray, np.ndarray]:
            size = random.uniform(0.5, 2.0, count)
            error = random.standard_normal(count) * size
            power = 1 if name == "mae" else 2
            return np.abs(error) ** power, (np.sqrt(2 / np.pi) * size) if power == 1 else size**2

        real, said = errors(4000)
        estimation = learn_error_estimation(
            metric, real, [(check, said[check]) for _, check in stretches(4000)]
        )
        held = 0
        for _ in range(200):
            turned_out, guess = errors(500)
            estimate = estimate_errors(metric, guess, estimation)
            held += (
                estimate.low <= float(metric.of_sums(np.array([turned_out.sum(), 500.0]))) <= estimate.high
            )
        assert held >= 184

    def test_an_error_that_changes_from_stretch_to_stretch_widens_the_interval(self) -> None:
        metric = resolve_metric("mae")
        steady, moving = np.ones(800), np.repeat([0.5, 1.5] * 4, 100)
        random = np.random.default_rng(0)
        for errors, excess in ((steady, 0.0), (moving, 0.5)):
            noisy = errors + 0.01 * random.standard_normal(800)
            left_out = [(check, np.ones(len(check))) for _, check in stretches(800)]
            assert learn_error_estimation(metric, noisy, left_out).excess == pytest.approx(excess, abs=0.1)

    def test_too_few_rows(self) -> None:
        assert stretches(100) == []
        estimation = learn_error_estimation(resolve_metric("mae"), np.ones(100), [])
        assert "too few" in estimation.reason
        with pytest.raises(ValueError, match="too few"):
            estimate_errors(resolve_metric("mae"), np.ones(5), estimation)


class TestTrust:
    GOOD = GradedEstimate(value=1.0, low=0.9, high=1.1, realized=1.02)
    BAD = GradedEstimate(value=1.0, low=0.9, high=1.1, realized=1.6)

    @pytest.mark.parametrize(
        ("good", "bad", "concept_drift", "trusted"),
        [
            (0, 0, False, True),  # innocent until labels say otherwise
            (0, 0, True, False),
            (2, 0, True, False),
            (3, 0, True, True),
            (0, 1, False, True),  # one miss of one happens in 5 % of cases
            (0, 2, False, False),
            (5, 1, False, True),
            (5, 2, False, False),  # 4.4 %
            (10, 2, False, True),
        ],
    )
    def test_by_the_record(self, good: int, bad: int, concept_drift: bool, trusted: bool) -> None:
        past = [self.GOOD] * good + [self.BAD] * bad
        assert judge_estimator(past, concept_drift=concept_drift).trusted is trusted

    def test_old_misses_are_forgiven(self) -> None:
        assert judge_estimator([self.BAD] * 5 + [self.GOOD] * 12, concept_drift=False).trusted

    def test_the_sentence(self) -> None:
        record = judge_estimator([self.GOOD, self.BAD], concept_drift=False)
        assert (
            record.reason == "1 of the last 2 intervals held what turned out, off by 0.31 on average (-0.31)"
        )
