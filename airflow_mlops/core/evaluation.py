"""Evaluation: challenger, champion and a simple baseline on the same rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from airflow_mlops.core.metrics import Metric, evaluate_metric, resolve_metric

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricInterval:
    """A metric with a bootstrap percentile interval.

    :param value: the metric on all rows.
    :param low: lower end.
    :param high: upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationReport:
    """Numbers of a comparison.

    :param metric: name of the metric.
    :param greater_is_better: its direction.
    :param row_count: rows all models were scored on.
    :param confidence: of the intervals.
    :param challenger: the candidate.
    :param champion: the present version; ``None`` when there is none.
    :param baseline: a constant guess.
    :param uplift: relative improvement of the challenger over the champion, above zero is better; ``None`` without champion.
    :param p_value: probability of an improvement this large if both were equally good (one-sided, paired).
    :param minimum_detectable_difference: improvement in units of the metric that this many rows find with
        80 % power at one-sided 5 %; ``None`` where the metric is no mean over rows.
    """

    metric: str
    greater_is_better: bool
    row_count: int
    confidence: float
    challenger: MetricInterval
    champion: MetricInterval | None
    baseline: MetricInterval
    uplift: float | None
    p_value: float | None
    minimum_detectable_difference: float | None


def compare_models(
    *,
    target: Array,
    challenger: Array,
    champion: Array | None,
    baseline: Array,
    metric: str,
    confidence: float = 0.95,
    resamples: int = 500,
    seed: int = 0,
) -> EvaluationReport:
    """Score all models on the same rows and test the challenger against the champion, row by row.

    Where the metric is a mean over rows the test is the paired one on the mean loss difference, normal by the
    central limit theorem; else a paired bootstrap. Intervals are bootstrap percentiles.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 13 and 16.

    :param target: what turned out, shape ``(n,)``.
    :param challenger: its predictions, shape ``(n,)``.
    :param champion: its predictions, shape ``(n,)``; ``None`` when there is no champion.
    :param baseline: a constant guess, shape ``(n,)``.
    :param metric: name or import path.
    :param confidence: of the intervals, in ``(0, 1)``.
    :param resamples: of the bootstrap.
    :param seed: of the bootstrap.
    :raises InsufficientDataError: no rows, or a metric that is not a number on them.
    """
    how = resolve_metric(metric)
    values = evaluate_metric(how, target=target, prediction=challenger)
    draws = np.random.default_rng(seed).integers(0, len(target), size=(resamples, len(target)))

    def interval(prediction: Array) -> MetricInterval:
        value = evaluate_metric(how, target=target, prediction=prediction).value
        tail = (1.0 - confidence) / 2.0
        low, high = np.quantile(_resampled(how, target, prediction, draws), [tail, 1.0 - tail])
        return MetricInterval(value=value, low=float(low), high=float(high))

    scored = interval(challenger)
    rival = interval(champion) if champion is not None else None
    uplift = p_value = detectable = None
    if champion is not None and rival is not None:
        uplift = _uplift(scored.value, rival.value, greater_is_better=how.greater_is_better)
        p_value, detectable = _paired_test(how, target, challenger, champion, draws)
    return EvaluationReport(
        metric=how.name,
        greater_is_better=how.greater_is_better,
        row_count=values.row_count,
        confidence=confidence,
        challenger=scored,
        champion=rival,
        baseline=interval(baseline),
        uplift=uplift,
        p_value=p_value,
        minimum_detectable_difference=detectable,
    )


def normal_tail(z: float) -> float:
    """Probability that a standard normal variable exceeds ``z``.

    >>> round(normal_tail(1.6449), 4)
    0.05
    """
    return 0.5 * math.erfc(z / math.sqrt(2.0))


def _resampled(metric: Metric, target: Array, prediction: Array, draws: Array) -> Array:
    """Score every resample; a metric that is the mean loss is one gather, any other is scored draw by draw."""
    if metric.name == "mae" and metric.losses is not None:
        return np.asarray(metric.losses(target, prediction)[draws].mean(axis=1))
    return np.array([metric.score(target[draw], prediction[draw]) for draw in draws])


def _uplift(challenger: float, champion: float, *, greater_is_better: bool) -> float | None:
    if champion == 0.0:
        return None
    change = (challenger - champion) / abs(champion)
    return change if greater_is_better else -change


def _paired_test(
    metric: Metric, target: Array, challenger: Array, champion: Array, draws: Array
) -> tuple[float, float | None]:
    if metric.losses is not None:
        gain = metric.losses(target, champion) - metric.losses(target, challenger)
        error = float(np.std(gain, ddof=1)) / math.sqrt(len(gain)) if len(gain) > 1 else math.inf
        if error == 0.0:
            return (0.5 if float(np.mean(gain)) == 0.0 else 0.0), 0.0
        # 1.645 + 0.842: the normal quantiles of one-sided 5 % and of 80 % power.
        return normal_tail(float(np.mean(gain)) / error), 2.487 * error
    sign = 1.0 if metric.greater_is_better else -1.0
    gains = np.array(
        [
            sign * (metric.score(target[d], challenger[d]) - metric.score(target[d], champion[d]))
            for d in draws
        ]
    )
    # Adding one to both counts keeps the value above zero however few resamples there are.
    return float((1 + np.sum(gains <= 0.0)) / (1 + len(gains))), None
