"""Evaluation: challenger, champion and simple baselines on the same rows, and what can be said of their difference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from airflow_mlops.core.comparison.metrics import measure, resolve_metric, value_range
from airflow_mlops.core.comparison.predictions import Graded, Predictions, spelled_as, text_codes
from airflow_mlops.core.comparison.resampling import (
    Blocks,
    Resampled,
    percentile_interval,
    t_quantile,
    upper_tail,
)
from airflow_mlops.exceptions import InsufficientDataError, SchemaMismatchError

if TYPE_CHECKING:
    from airflow_mlops.core.comparison.metric import Metric

Array = NDArray[Any]

#: Power at which the minimum detectable difference is stated, and the one-sided level it is stated for where none is asked for.
POWER, LEVEL = 0.8, 0.05
#: Labels an error names.
_NAMED = 5
#: Share of a label that never turned up.
_RARE = 1e-9


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricInterval:
    """A metric with a bootstrap percentile interval.

    :param value: the metric on all rows.
    :param low: lower end, within what the metric can be; ``None`` with too few rows to say.
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
    :param p_value: probability of an improvement this large if both were equally good (one-sided, paired); ``None`` where
        that can't be told: fewer than 20 rows, or a metric that hangs on one block of them, or on a ratio of fewer than five.
    :param minimum_detectable_difference: improvement that these rows find with 80 % power at the one-sided level asked for; ``None`` where
        there is no p-value.
    """

    value: MetricInterval
    uplift: float | None
    difference: MetricInterval
    p_value: float | None
    minimum_detectable_difference: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricComparison:
    """One metric of all models on the same rows.

    :param metric: its name.
    :param greater_is_better: its direction.
    :param challenger: the candidate.
    :param champion: the present version; ``None`` when there is none.
    :param baselines: guesses that know nothing, by name.
    :param unmeasured: guesses the metric can't be measured on: bare labels where it needs probabilities.
    """

    metric: str
    greater_is_better: bool
    challenger: MetricInterval
    champion: Rival | None = None
    baselines: dict[str, Rival] = field(default_factory=dict)
    unmeasured: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationReport:
    """Numbers of a comparison.

    :param row_count: rows all models were scored on.
    :param block_count: blocks of neighbors they were cut into for resampling; single rows where there are few.
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
    seed: int = 0,
    confidence: float = 0.95,
    significance: float | None = None,
) -> EvaluationReport:
    """Score all models on the same rows and test the challenger against every rival, row by row.

    Both models are resampled with the same blocks of rows, so that what makes rows hard for either cancels out. The
    improvement over its standard error is judged by Student's t.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 13 and 16; see
    :func:`~airflow_mlops.core.comparison.resampling.common_factor` for what neighboring rows have in common.

    :param target: what turned out, in time order, shape ``(n,)``.
    :param challenger: its answers.
    :param champion: its answers; ``None`` when there is no champion.
    :param baselines: answers of guesses that know nothing, by name.
    :param metrics: names or import paths; the first one decides.
    :param seed: of the resampling.
    :param confidence: of the intervals, in ``(0, 1)``.
    :param significance: one-sided level that the minimum detectable difference is stated for; default 0.05.
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
    drawn = Blocks.draw(len(target), seed=seed)
    field_of = _Field(
        challenger=new,
        champion=old,
        baselines=guesses,
        blocks=drawn,
        tail=(1.0 - confidence) / 2.0,
        level=LEVEL if significance is None else significance,
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


def repeat_last(
    target: Array, first: Array, *, classes: Sequence[str] = (), shares: Sequence[float] = ()
) -> Predictions:
    """Answer each row with the target of the row before, as somebody would who knows no model.

    A label is given the probability with which this was right so far, plus one row of either outcome; the rest is shared out
    among the other labels as they were in training.

    Source: Laplace, "Essai philosophique sur les probabilités", 1814 (rule of succession).

    :param target: what turned out, in time order, shape ``(n,)``.
    :param first: answer to the first row, shape ``(1,)``.
    :param classes: labels of the model; empty for numbers.
    :param shares: of the labels in training.

    >>> answers = repeat_last(np.array(["a", "a", "b"]), np.array(["a"]), classes=("a", "b"), shares=(0.5, 0.5))
    >>> answers.values.tolist(), answers.probabilities[:, 0].round(3).tolist()
    (['a', 'a', 'a'], [0.5, 0.667, 0.75])
    """
    values = np.concatenate([first, target[:-1]])
    if not classes:
        return Predictions(values=values)
    right = np.asarray(values == target, dtype=np.float64)
    same = (np.cumsum(right) - right + 1.0) / (np.arange(len(target)) + 2.0)
    texts, numbers = text_codes(values)
    known_as = spelled_as(texts, classes)
    place = np.array([classes.index(known_as[text]) if known_as[text] in classes else -1 for text in texts])[
        numbers
    ]
    known = np.flatnonzero(place >= 0)
    weights = np.asarray(shares) if sum(shares) > 0.0 else np.ones(len(classes))
    given = np.tile(np.maximum(weights, _RARE), (len(target), 1))
    given[known, place[known]] = 0.0
    given *= np.where(place >= 0, 1.0 - same, 1.0)[:, None] / np.maximum(given.sum(axis=1), _RARE)[:, None]
    given[known, place[known]] = same[known]
    return Predictions(values=values, probabilities=given, classes=tuple(classes))


def _labels(target: Array, models: Sequence[Predictions]) -> list[str]:
    """Every label that a model knows or that turned out: with the same ones, all are measured by the same formulas."""
    if not any(model.classes for model in models):
        return []
    texts, _ = text_codes(target)
    labels: list[str] = []
    for further in (*(model.classes for model in models), texts):
        labels = list(dict.fromkeys([*labels, *spelled_as(further, labels).values()]))
    return labels


def require_known_labels(who: str, classes: Sequence[str], target: Array) -> None:
    """Refuse a model that can't be right in any row, as its labels are called otherwise.

    :param who: what the model is called.
    :param classes: its labels; empty for numbers.
    :param target: what turned out, shape ``(n,)``.
    :raises SchemaMismatchError: they have no label in common.
    """
    if not classes:
        return
    texts, _ = text_codes(target)
    if not {*spelled_as(texts, classes).values()} & {*classes}:
        raise SchemaMismatchError(
            f"the {who} answers {', '.join(classes[:_NAMED])}, and the rows to judge on hold {', '.join(texts[:_NAMED])}: they have no "
            "label in common, so every answer would be wrong. Keep the names of the labels, or give the new model a name of its own"
        )


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
    level: float

    def compare(self, metric: Metric) -> MetricComparison:
        value, drawn = self._measure(metric, self.challenger)
        unmeasured = tuple(
            name
            for name, guess in self.baselines.items()
            if metric.needs_probabilities and guess.answers.probabilities is None
        )
        return MetricComparison(
            metric=metric.name,
            greater_is_better=metric.greater_is_better,
            challenger=self._interval(value, drawn, value_range(metric.name)),
            champion=self._against(metric, value, drawn, self.champion)
            if self.champion is not None
            else None,
            baselines={
                name: self._against(metric, value, drawn, guess)
                for name, guess in self.baselines.items()
                if name not in unmeasured
            },
            unmeasured=unmeasured,
        )

    def _measure(self, metric: Metric, graded: Graded) -> tuple[float, Resampled]:
        value = measure(metric, graded)
        return value, self.blocks.resample(metric, graded, value)

    def _interval(
        self, value: float, drawn: Resampled, possible: tuple[float, float] = (-math.inf, math.inf)
    ) -> MetricInterval:
        ends = percentile_interval(value, drawn, self.blocks.freedom, self.tail)
        if ends is None:
            return MetricInterval(value=value, low=None, high=None)
        # Stretched, it may reach beyond what the metric can be.
        return MetricInterval(value=value, low=max(ends[0], possible[0]), high=min(ends[1], possible[1]))

    def _against(self, metric: Metric, value: float, drawn: Resampled, graded: Graded) -> Rival:
        rival, rival_drawn = self._measure(metric, graded)
        sign = 1.0 if metric.greater_is_better else -1.0
        gain, gains = sign * (value - rival), (drawn - rival_drawn).times(sign)
        error, freedom = gains.standard_error, self.blocks.freedom
        return Rival(
            value=self._interval(rival, rival_drawn, value_range(metric.name)),
            uplift=gain / abs(rival) if rival else None,
            difference=self._interval(gain, gains),
            p_value=_p_value(gain, error, freedom),
            minimum_detectable_difference=_detectable(error, freedom, self.level),
        )


def _p_value(gain: float, error: float, freedom: float) -> float | None:
    if not math.isfinite(error):
        return None
    if error == 0.0:
        return 0.5 if gain == 0.0 else float(gain < 0.0)
    return upper_tail(gain / error, freedom)


def _detectable(error: float, freedom: float, level: float) -> float | None:
    """Improvement at which the test says yes with the stated power.

    Source: Cohen, "Statistical Power Analysis for the Behavioral Sciences", 2nd edition, 1988, chapter 2.
    """
    if not math.isfinite(error):
        return None
    return (t_quantile(1.0 - level, freedom) + t_quantile(POWER, freedom)) * error
