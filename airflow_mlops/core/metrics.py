"""Metrics: how good predictions are, with the spread that a comparison needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from airflow_mlops.core.extension import load_object
from airflow_mlops.exceptions import InsufficientDataError

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """How to score predictions.

    :param name: name, or import path of a user's own.
    :param score: ``score(target, prediction) -> float`` over arrays of shape ``(n,)``.
    :param losses: per-row losses of shape ``(n,)``, smaller is better, whose mean orders models as the metric does;
        ``None`` where the metric is no mean over rows.
    :param greater_is_better: direction of ``score``.
    :param mean_loss: turns the metric's value into the mean of ``losses``; ``None`` where that can't be done.
    """

    name: str
    score: Callable[[Array, Array], float]
    losses: Callable[[Array, Array], Array] | None
    greater_is_better: bool
    mean_loss: Callable[[float], float] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricValue:
    """A metric on some rows.

    :param metric: its name.
    :param value: its value.
    :param standard_deviation: of the per-row losses; ``None`` where the metric has none.
    :param row_count: rows it was measured on.
    """

    metric: str
    value: float
    standard_deviation: float | None
    row_count: int


def resolve_metric(name: str) -> Metric:
    """Find a built-in metric by name, or a user's by import path.

    A user's metric is a function ``metric(target, prediction) -> float``; it says that more is better by an attribute
    ``greater_is_better = True``.

    :raises ValueError: listing the built-in names, or saying what can't be imported.
    """
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    if ":" not in name and "." not in name:
        raise ValueError(
            f"no metric named {name!r}; built in: {', '.join(_BUILT_IN)}, or give an import path module:function"
        )
    function = load_object(name)
    if not callable(function):
        raise ValueError(f"metric {name!r} is not a function")
    return Metric(
        name=name,
        score=function,
        losses=None,
        greater_is_better=bool(getattr(function, "greater_is_better", False)),
    )


def evaluate_metric(metric: Metric, *, target: Array, prediction: Array) -> MetricValue:
    """Score predictions.

    :param target: what turned out, shape ``(n,)``.
    :param prediction: what was predicted, shape ``(n,)``.
    :raises InsufficientDataError: no rows, or the metric is not a number on them.
    :raises ValueError: the lengths differ.

    >>> evaluate_metric(resolve_metric("mae"), target=np.array([1.0, 2.0]), prediction=np.array([1.0, 4.0])).value
    1.0
    """
    target, prediction = np.asarray(target), np.asarray(prediction)
    if len(target) != len(prediction):
        raise ValueError(f"{len(target)} targets and {len(prediction)} predictions")
    if len(target) == 0:
        raise InsufficientDataError(f"{metric.name} can't be measured on no rows")
    value = float(metric.score(target, prediction))
    if not math.isfinite(value):
        raise InsufficientDataError(
            f"{metric.name} is {value} on {len(target)} rows: look for missing or infinite targets and predictions"
        )
    losses = metric.losses(target, prediction) if metric.losses else None
    return MetricValue(
        metric=metric.name,
        value=value,
        standard_deviation=float(np.std(losses)) if losses is not None else None,
        row_count=len(target),
    )


def _absolute_errors(target: Array, prediction: Array) -> Array:
    errors: Array = np.abs(target.astype(float) - prediction.astype(float))
    return errors


def _squared_errors(target: Array, prediction: Array) -> Array:
    errors: Array = np.square(target.astype(float) - prediction.astype(float))
    return errors


def _mistakes(target: Array, prediction: Array) -> Array:
    mistakes: Array = (target.astype(str) != prediction.astype(str)).astype(float)
    return mistakes


def _mean_absolute_error(target: Array, prediction: Array) -> float:
    return float(np.mean(_absolute_errors(target, prediction)))


def _root_mean_squared_error(target: Array, prediction: Array) -> float:
    return float(np.sqrt(np.mean(_squared_errors(target, prediction))))


def _r2(target: Array, prediction: Array) -> float:
    spread = np.sum(np.square(target.astype(float) - np.mean(target.astype(float))))
    return float(1.0 - np.sum(_squared_errors(target, prediction)) / spread) if spread > 0 else math.nan


def _accuracy(target: Array, prediction: Array) -> float:
    return float(1.0 - np.mean(_mistakes(target, prediction)))


def _balanced_accuracy(target: Array, prediction: Array) -> float:
    """Mean recall over the classes that occur.

    Source: Brodersen et al., "The balanced accuracy and its posterior distribution", ICPR 2010, section II.
    """
    right = target.astype(str) == prediction.astype(str)
    labels = target.astype(str)
    return float(np.mean([np.mean(right[labels == label]) for label in np.unique(labels)]))


_BUILT_IN = {
    metric.name: metric
    for metric in (
        Metric(
            name="mae",
            score=_mean_absolute_error,
            losses=_absolute_errors,
            greater_is_better=False,
            mean_loss=lambda value: value,
        ),
        Metric(
            name="rmse",
            score=_root_mean_squared_error,
            losses=_squared_errors,
            greater_is_better=False,
            mean_loss=lambda value: value**2,
        ),
        Metric(name="r2", score=_r2, losses=_squared_errors, greater_is_better=True),
        Metric(
            name="accuracy",
            score=_accuracy,
            losses=_mistakes,
            greater_is_better=True,
            mean_loss=lambda value: 1.0 - value,
        ),
        Metric(name="balanced_accuracy", score=_balanced_accuracy, losses=None, greater_is_better=True),
    )
}
