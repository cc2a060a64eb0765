"""Evaluation: challenger, champion and simple baselines on the same rows, and what can be said of their difference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from airflow_mlops.core.metrics import Metric, measure, resolve_metric, row_losses
from airflow_mlops.core.predictions import Graded, Predictions, text_codes
from airflow_mlops.core.resampling import (
    Blocks,
    percentile_interval,
    t_quantile,
    upper_tail,
)
from airflow_mlops.exceptions import InsufficientDataError

Array = NDArray[Any]

#: Power at which the minimum detectable difference is stated, and the one-sided level it is stated for.
POWER, LEVEL = 0.8, 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricInterval:
    """A metric with a bootstrap percentile interval.

    :param value: the metric on all rows.
    :param low: lower end; ``None`` with too few rows to say.
    :param high: upper end; ``None`` with too few rows to say.
    """

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Rival:
    """What the challenger is held against, on the same rows.

    :param value: the rival's metric.
    :param uplift: relative improvement of the challenger, above zero is better; ``None`` when the rival's value is zero.
    :param difference: improvement in units of the metric, above zero is better, with its interval.
    :param p_value: probability of an improvement this large if both were equally good (one-sided, paired).
    :param minimum_detectable_difference: improvement that these rows find with 80 % power at one-sided 5 %; ``None`` with
        fewer than two blocks of rows.
    """

    value: MetricInterval
    uplift: float | None
    difference: MetricInterval
    p_value: float
    minimum_detectable_difference: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricComparison:
    """One metric of all models on the same rows.

    :param metric: its name.
    :param greater_is_better: its direction.
    :param challenger: the candidate.
    :param champion: the present version; ``None`` when there is none.
    :param baselines: guesses that know nothing, by name; without those the metric can't be measured on.
    """

    metric: str
    greater_is_better: bool
    challenger: MetricInterval
    champion: Rival | None = None
    baselines: dict[str, Rival] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationReport:
    """Numbers of a comparison.

    :param row_count: rows all models were scored on.
    :param block_count: blocks of neighbors they were cut into for resampling.
    :param confidence: of the intervals.
    :param deciding: the metric that decides.
    :param others: metrics that are reported beside it.
    :param not_measured: metrics that could not be measured, and why.
    """

    row_count: int
    block_count: int
    confidence: float
    deciding: MetricComparison
    others: tuple[MetricComparison, ...] = ()
    not_measured: dict[str, str] = field(default_factory=dict)

    @property
    def metrics(self) -> tuple[MetricComparison, ...]:
        """All that were measured, the deciding one first."""
        return (self.deciding, *self.others)


def compare_models(
    *,
    target: Array,
    challenger: Predictions,
    champion: Predictions | None,
    baselines: Mapping[str, Predictions],
    metrics: Sequence[str],
    blocks: Blocks | None = None,
    confidence: float = 0.95,
) -> EvaluationReport:
    """Score all models on the same rows and test the challenger against every rival, block by block.

    Both models are resampled with the same blocks, so that what makes rows hard for either cancels out. The improvement
    over its standard error is judged by Student's t with one degree of freedom per independent piece but one.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 13 and 16; see
    :class:`~airflow_mlops.core.resampling.Blocks` for the blocks.

    :param target: what turned out, in time order, shape ``(n,)``.
    :param challenger: its answers.
    :param champion: its answers; ``None`` when there is no champion.
    :param baselines: answers of guesses that know nothing, by name.
    :param metrics: names or import paths; the first one decides.
    :param blocks: how the rows are resampled; default :func:`draw_blocks`.
    :param confidence: of the intervals, in ``(0, 1)``.
    :raises InsufficientDataError: no rows, or the deciding metric is not a number on them.
    :raises ValueError: the deciding metric does not fit what the models answer.
    """
    if len(target) == 0:
        raise InsufficientDataError("there are no rows to compare models on")
    deciding, *others = dict.fromkeys(metrics)
    labels = _labels(target, [challenger, *([champion] if champion is not None else [])])
    new = Graded(target, challenger.among(labels))
    old = Graded(target, champion.among(labels)) if champion is not None else None
    guesses = {name: Graded(target, guess.among(labels)) for name, guess in baselines.items()}
    rival = old or next(iter(guesses.values()), None)
    drawn = blocks or draw_blocks(resolve_metric(deciding), new, rival)
    field_of = _Field(
        challenger=new, champion=old, baselines=guesses, blocks=drawn, tail=(1.0 - confidence) / 2.0
    )
    compared = [field_of.compare(resolve_metric(deciding))]
    not_measured = {}
    for name in others:
        try:
            compared.append(field_of.compare(resolve_metric(name)))
        except (InsufficientDataError, ValueError) as err:
            not_measured[name] = str(err)
    return EvaluationReport(
        row_count=len(target),
        block_count=drawn.count,
        confidence=confidence,
        deciding=compared[0],
        others=tuple(compared[1:]),
        not_measured=not_measured,
    )


def draw_blocks(metric: Metric, challenger: Graded, rival: Graded | None, *, seed: int = 0) -> Blocks:
    """Draw blocks that are as long as the difference between the models remembers.

    :param metric: the one that decides.
    :param challenger: the candidate.
    :param rival: whom it is held against; ``None``: nobody.
    :param seed: of the draws.
    """
    kind, differences = row_losses(metric, challenger)
    if rival is not None:
        same, losses = row_losses(metric, rival)
        differences = differences - losses if same == kind else differences
    return Blocks.draw(len(challenger), differences=np.nan_to_num(differences), seed=seed)


def _labels(target: Array, models: Sequence[Predictions]) -> list[str]:
    """Every label that a model knows or that turned out: with the same ones, all are measured by the same formulas."""
    if not any(model.classes for model in models):
        return []
    texts, _ = text_codes(target)
    return list(dict.fromkeys([*(label for model in models for label in model.classes), *texts]))


def normal_tail(z: float) -> float:
    """Probability that a standard normal variable exceeds ``z``.

    >>> round(normal_tail(1.6449), 4)
    0.05
    """
    return 0.5 * math.erfc(z / math.sqrt(2.0))


@dataclass(frozen=True, slots=True)
class _Field:
    """Everybody who takes part, on the rows they are compared on."""

    challenger: Graded
    champion: Graded | None
    baselines: Mapping[str, Graded]
    blocks: Blocks
    tail: float

    def compare(self, metric: Metric) -> MetricComparison:
        value, drawn = self._measure(metric, self.challenger)
        return MetricComparison(
            metric=metric.name,
            greater_is_better=metric.greater_is_better,
            challenger=self._interval(value, drawn),
            champion=self._against(metric, value, drawn, self.champion)
            if self.champion is not None
            else None,
            baselines={
                name: self._against(metric, value, drawn, guess)
                for name, guess in self.baselines.items()
                if not metric.needs_probabilities or guess.answers.probabilities is not None
            },
        )

    def _measure(self, metric: Metric, graded: Graded) -> tuple[float, Array]:
        value = measure(metric, graded)
        return value, self.blocks.resample(metric, graded, value)

    def _interval(self, value: float, drawn: Array) -> MetricInterval:
        ends = percentile_interval(value, drawn, self.blocks, self.tail)
        low, high = ends or (None, None)
        return MetricInterval(value=value, low=low, high=high)

    def _against(self, metric: Metric, value: float, drawn: Array, graded: Graded) -> Rival:
        rival, rival_drawn = self._measure(metric, graded)
        sign = 1.0 if metric.greater_is_better else -1.0
        gain, gains = sign * (value - rival), sign * (drawn - rival_drawn)
        error = self.blocks.standard_error(gains)
        freedom = self.blocks.freedom
        return Rival(
            value=self._interval(rival, rival_drawn),
            uplift=gain / abs(rival) if rival else None,
            difference=self._interval(gain, gains),
            p_value=_p_value(gain, error, freedom),
            minimum_detectable_difference=_detectable(error, freedom),
        )


def _p_value(gain: float, error: float, freedom: float) -> float:
    if error == 0.0:
        return 0.5 if gain == 0.0 else float(gain < 0.0)
    return upper_tail(gain / error, freedom)


def _detectable(error: float, freedom: float) -> float | None:
    """Improvement at which the test says yes with the stated power.

    Source: Cohen, "Statistical Power Analysis for the Behavioral Sciences", 2nd edition, 1988, chapter 2.
    """
    if not math.isfinite(error):
        return None
    return (t_quantile(1.0 - LEVEL, freedom) + t_quantile(POWER, freedom)) * error
