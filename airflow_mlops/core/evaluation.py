"""Evaluation: challenger, champion and simple baselines on the same rows, and what can be said of their difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from airflow_mlops.core.metrics import Metric, Predictions, evaluate_metric, resolve_metric
from airflow_mlops.core.resampling import Blocks, standard_error, t_quantile, upper_tail
from airflow_mlops.exceptions import InsufficientDataError

Array = NDArray[Any]

#: Power at which the minimum detectable difference is stated, and the one-sided level it is stated for.
POWER, LEVEL = 0.8, 0.05


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
class MetricComparison:
    """One metric of all models on the same rows.

    :param metric: its name.
    :param greater_is_better: its direction.
    :param challenger: the candidate.
    :param champion: the present version; ``None`` when there is none.
    :param baseline: a constant guess; ``None`` where it can't be measured (probabilities).
    :param uplift: relative improvement of the challenger over the champion, above zero is better; ``None`` without
        champion, or when the champion's value is zero.
    :param difference: improvement in units of the metric, above zero is better, with its interval.
    :param p_value: probability of an improvement this large if both were equally good (one-sided, paired).
    :param minimum_detectable_difference: improvement that these rows find with 80 % power at one-sided 5 %.
    :param not_measured: why the metric could not be measured; the numbers are meaningless then.
    """

    metric: str
    greater_is_better: bool
    challenger: MetricInterval
    champion: MetricInterval | None = None
    baseline: MetricInterval | None = None
    uplift: float | None = None
    difference: MetricInterval | None = None
    p_value: float | None = None
    minimum_detectable_difference: float | None = None
    not_measured: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationReport:
    """Numbers of a comparison.

    :param row_count: rows all models were scored on.
    :param block_count: blocks of neighbors they were cut into for resampling.
    :param confidence: of the intervals.
    :param deciding: the metric that decides.
    :param others: metrics that are reported beside it.
    """

    row_count: int
    block_count: int
    confidence: float
    deciding: MetricComparison
    others: tuple[MetricComparison, ...] = ()

    @property
    def metrics(self) -> tuple[MetricComparison, ...]:
        """All of them, the deciding one first."""
        return (self.deciding, *self.others)


def compare_models(
    *,
    target: Array,
    challenger: Predictions,
    champion: Predictions | None,
    baseline: Predictions,
    metrics: Sequence[str],
    confidence: float = 0.95,
    resamples: int = 1_000,
    seed: int = 0,
) -> EvaluationReport:
    """Score all models on the same rows and test the challenger against the champion, block by block.

    Both models are resampled with the same blocks, so that what makes rows hard for either cancels out. The improvement
    over its standard error is judged by Student's t with one degree of freedom per block but one.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 13 and 16; see
    :class:`~airflow_mlops.core.resampling.Blocks` for the blocks.

    :param target: what turned out, in time order, shape ``(n,)``.
    :param challenger: its answers.
    :param champion: its answers; ``None`` when there is no champion.
    :param baseline: a constant guess.
    :param metrics: names or import paths; the first one decides.
    :param confidence: of the intervals, in ``(0, 1)``.
    :param resamples: of the bootstrap.
    :param seed: of the bootstrap.
    :raises InsufficientDataError: no rows, or the deciding metric is not a number on them.
    """
    if len(target) == 0:
        raise InsufficientDataError("there are no rows to compare models on")
    blocks = Blocks.draw(len(target), resamples=resamples, seed=seed)
    tail = (1.0 - confidence) / 2.0
    compared = []
    for place, name in enumerate(dict.fromkeys(metrics)):
        metric = resolve_metric(name)
        try:
            compared.append(_compare(metric, target, challenger, champion, baseline, blocks, tail))
        except (InsufficientDataError, ValueError) as err:
            if place == 0:
                raise
            compared.append(_unmeasured(metric, err))
    return EvaluationReport(
        row_count=len(target),
        block_count=blocks.count,
        confidence=confidence,
        deciding=compared[0],
        others=tuple(compared[1:]),
    )


def normal_tail(z: float) -> float:
    """Probability that a standard normal variable exceeds ``z``.

    >>> round(normal_tail(1.6449), 4)
    0.05
    """
    return 0.5 * math.erfc(z / math.sqrt(2.0))


def _compare(
    metric: Metric,
    target: Array,
    challenger: Predictions,
    champion: Predictions | None,
    baseline: Predictions,
    blocks: Blocks,
    tail: float,
) -> MetricComparison:
    value, drawn = _measure(metric, target, challenger, blocks)
    measurable = not metric.needs_probabilities or baseline.probabilities is not None
    simple = _interval(*_measure(metric, target, baseline, blocks), tail) if measurable else None
    if champion is None:
        return MetricComparison(
            metric=metric.name,
            greater_is_better=metric.greater_is_better,
            challenger=_interval(value, drawn, tail),
            baseline=simple,
        )
    rival, rival_drawn = _measure(metric, target, champion, blocks)
    sign = 1.0 if metric.greater_is_better else -1.0
    gain, gains = sign * (value - rival), sign * (drawn - rival_drawn)
    error = standard_error(gains, blocks.count)
    freedom = max(1, blocks.count - 1)
    return MetricComparison(
        metric=metric.name,
        greater_is_better=metric.greater_is_better,
        challenger=_interval(value, drawn, tail),
        champion=_interval(rival, rival_drawn, tail),
        baseline=simple,
        uplift=gain / abs(rival) if rival else None,
        difference=_interval(gain, gains, tail),
        p_value=_p_value(gain, error, freedom),
        minimum_detectable_difference=_detectable(error, freedom),
    )


def _measure(metric: Metric, target: Array, answers: Predictions, blocks: Blocks) -> tuple[float, Array]:
    value = evaluate_metric(metric, target=target, prediction=answers).value
    return value, blocks.resample(metric, target, answers)


def _interval(value: float, drawn: Array, tail: float) -> MetricInterval:
    known = drawn[np.isfinite(drawn)]
    low, high = np.quantile(known, [tail, 1.0 - tail]) if known.size else (value, value)
    return MetricInterval(value=value, low=float(low), high=float(high))


def _p_value(gain: float, error: float, freedom: int) -> float:
    if error == 0.0:
        return 0.5 if gain == 0.0 else float(gain < 0.0)
    return upper_tail(gain / error, freedom)


def _detectable(error: float, freedom: int) -> float | None:
    """Improvement at which the test says yes with the stated power.

    Source: Cohen, "Statistical Power Analysis for the Behavioral Sciences", 2nd edition, 1988, chapter 2.
    """
    if not math.isfinite(error):
        return None
    return (t_quantile(1.0 - LEVEL, freedom) + t_quantile(POWER, freedom)) * error


def _unmeasured(metric: Metric, err: Exception) -> MetricComparison:
    nothing = MetricInterval(value=math.nan, low=math.nan, high=math.nan)
    return MetricComparison(
        metric=metric.name,
        greater_is_better=metric.greater_is_better,
        challenger=nothing,
        not_measured=str(err),
    )
