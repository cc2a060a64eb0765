"""Metrics: how good predictions are. A metric is a function of sums over rows, so that resampling it is cheap."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from airflow_mlops.core.comparison.label_metrics import (
    BY_LABEL,
    LABEL_METRICS,
    RANKINGS,
    label_weights,
    log_losses,
    mistakes,
)
from airflow_mlops.core.comparison.metric import Array, Metric, MetricValue, RowLosses, mean_of_sums
from airflow_mlops.core.comparison.number_metrics import NUMBER_METRICS, absolute_errors, quantile_loss
from airflow_mlops.core.comparison.predictions import Graded, Predictions
from airflow_mlops.core.extension import load_object
from airflow_mlops.exceptions import InsufficientDataError

#: What is reported when nothing else is asked for, per kind of output.
DEFAULT_METRICS = {
    "regression": ("mae", "rmse", "mape", "r2"),
    "classification": (
        "accuracy",
        "balanced_accuracy",
        "precision",
        "recall",
        "f1",
        "roc_auc",
        "pr_auc",
        "log_loss",
        "brier",
        "calibration_error",
    ),
}


def value_range(name: str) -> tuple[float, float]:
    """Give the smallest and largest value a metric can have.

    >>> value_range("accuracy"), value_range("r2"), value_range("my_metrics:profit")
    ((0.0, 1.0), (-inf, 1.0), (-inf, inf))
    """
    kind, _, _ = name.partition("@")
    if kind == "r2":
        return -math.inf, 1.0
    if kind == "brier":
        return 0.0, 2.0  # summed over the labels
    if kind in {*DEFAULT_METRICS["classification"]} - {"log_loss"}:
        return 0.0, 1.0
    return (0.0 if kind in {*_BUILT_IN, "quantile_loss"} else -math.inf), math.inf


def resolve_metric(name: str) -> Metric:
    """Find a built-in metric by name, or a user's by import path.

    A user's metric is a function ``metric(target, prediction) -> float``; it says that more is better by an attribute
    ``greater_is_better = True``. With an attribute ``per_row = True`` it gives one loss (or gain) per row, whose mean is the
    metric; then it is as cheap to resample as a built-in one. ``quantile_loss@0.9`` is the loss of a 90 % quantile.

    :raises ValueError: listing the built-in names, or saying what can't be imported.
    """
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    kind, _, level = name.partition("@")
    if kind == "quantile_loss":
        return quantile_loss(name, level)
    if ":" not in name and "." not in name:
        known = ", ".join([*_BUILT_IN, "quantile_loss@0.5"])
        raise ValueError(
            f"no metric named {name!r}; built in: {known}, or give an import path module:function"
        )
    function = load_object(name)
    if not callable(function):
        raise ValueError(f"metric {name!r} is not a function")
    return _users(name, function)


def evaluate_metric(metric: Metric, *, target: Array, prediction: Array | Predictions) -> MetricValue:
    """Score predictions.

    :param target: what turned out, shape ``(n,)``.
    :param prediction: what was predicted, shape ``(n,)``, or with probabilities.
    :raises InsufficientDataError: no rows, or the metric is not a number on them.
    :raises ValueError: the lengths differ, or the metric needs probabilities and there are none.

    >>> evaluate_metric(resolve_metric("mae"), target=np.array([1.0, 2.0]), prediction=np.array([1.0, 4.0])).value
    1.0
    """
    answers = (
        prediction if isinstance(prediction, Predictions) else Predictions(values=np.asarray(prediction))
    )
    graded = Graded(np.asarray(target), answers)
    value = measure(metric, graded)
    losses = metric.losses(graded) if metric.losses else None
    return MetricValue(
        metric=metric.name,
        value=value,
        standard_deviation=float(np.std(losses)) if losses is not None else None,
        row_count=len(graded),
    )


def measure(metric: Metric, graded: Graded) -> float:
    """Give the metric's value; see :func:`evaluate_metric` for what may be wrong."""
    if len(graded.target) != len(graded.answers):
        raise ValueError(f"{len(graded.target)} targets and {len(graded.answers)} predictions")
    if len(graded) == 0:
        raise InsufficientDataError(f"{metric.name} can't be measured on no rows")
    numbers = graded.answers.values.dtype.kind == "f" and not graded.answers.classes
    if numbers and metric.name in DEFAULT_METRICS["classification"]:
        raise ValueError(
            f"{metric.name} measures labels, and the model predicts numbers: choose mae, rmse or another metric of numbers"
        )
    if metric.needs_probabilities and graded.answers.probabilities is None:
        raise ValueError(
            f"{metric.name} needs probabilities, and the model gives none: choose accuracy, f1 or another metric of labels"
        )
    value = float(metric.score(graded))
    if not math.isfinite(value):
        raise InsufficientDataError(
            f"{metric.name} is {value} on {len(graded)} rows: look for missing or infinite targets and predictions, or "
            "for a class that does not occur"
        )
    return value


def row_losses(metric: Metric, graded: Graded) -> RowLosses:
    """Give a loss per row for parts of the rows: the metric's own, else mistakes of labels or absolute errors of numbers."""
    if metric.losses is not None and not (
        metric.needs_probabilities and graded.answers.probabilities is None
    ):
        name = metric.loss_name or metric.name
        return RowLosses(name=name, values=metric.losses(graded), of_mean=metric.of_mean_loss)
    if graded.answers.classes:
        return RowLosses(name="error rate", values=mistakes(graded))
    return RowLosses(name="mae", values=absolute_errors(graded))


def slice_losses(metric: Metric, graded: Graded) -> RowLosses:
    """Give a loss per row that sees in parts of the rows what the metric sees on the whole; see :func:`row_losses`.

    Where the metric counts a rare label as much as a frequent one, so does the loss: each label's rows weigh as much together. It is
    the mistakes, and for rankings the log loss; for the calibration error it is the Brier score.
    """
    known = graded.answers.probabilities is not None
    if metric.name in RANKINGS and known:
        return RowLosses(name="log loss by label", values=log_losses(graded) * label_weights(graded))
    if metric.name in {*BY_LABEL, *RANKINGS} and graded.answers.classes:
        return RowLosses(name="error rate by label", values=mistakes(graded) * label_weights(graded))
    return row_losses(resolve_metric("brier") if metric.name == "calibration_error" else metric, graded)


def require_decisive(metric: Metric, label_count: int) -> None:
    """See that a metric can tell a good model from one that knows nothing.

    :param label_count: labels there are; 0 for numbers.
    :raises ValueError: it is the recall of two labels, by which saying yes to everything is perfect.
    """
    if metric.name == "recall" and label_count == 2:
        raise ValueError(
            "recall can't decide between two labels: whoever always says yes is perfect by it. Choose f1 or pr_auc, or a metric of "
            "your own by import path that says what a false alarm costs"
        )


def _users(name: str, function: Callable[[Array, Array], Any]) -> Metric:
    greater_is_better = bool(getattr(function, "greater_is_better", False))
    if not getattr(function, "per_row", False):
        return Metric(
            name=name,
            greater_is_better=greater_is_better,
            score=lambda graded: _asked(name, function, graded, float),
        )

    def per_row(graded: Graded) -> Array:
        losses: Array = _asked(name, function, graded, lambda given: np.asarray(given, dtype=np.float64))
        if losses.shape != (len(graded),):
            raise ValueError(
                f"metric {name!r} gave values of shape {losses.shape} for {len(graded)} rows: per_row = True promises one per row"
            )
        return losses

    sign = -1.0 if greater_is_better else 1.0
    return Metric(
        name=name,
        greater_is_better=greater_is_better,
        score=lambda graded: float(np.mean(per_row(graded))),
        terms=lambda graded: per_row(graded)[:, None],
        of_sums=mean_of_sums,
        losses=lambda graded: sign * per_row(graded),
        mean_loss=lambda value: sign * value,
        of_mean_loss=(lambda mean: -mean) if greater_is_better else None,
    )


def _asked(
    name: str, function: Callable[[Array, Array], Any], graded: Graded, read: Callable[[Any], Any]
) -> Any:
    """Call a user's function and read its answer; what goes wrong names the metric."""
    try:
        return read(function(graded.target, graded.native_answers))
    except Exception as err:
        raise ValueError(
            f"metric {name!r} failed on {len(graded)} rows: {type(err).__name__}: {err}; it takes targets and predictions and gives "
            "a number, or with per_row = True one for each row"
        ) from err


_BUILT_IN = {metric.name: metric for metric in (*NUMBER_METRICS, *LABEL_METRICS)}
