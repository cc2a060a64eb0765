"""Metrics of numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from airflow_mlops.core.comparison.metric import SMALLEST_SHARE, Array, Metric, mean_metric, mean_of_sums
from airflow_mlops.exceptions import InsufficientDataError

if TYPE_CHECKING:
    from airflow_mlops.core.comparison.predictions import Graded


def absolute_errors(graded: Graded) -> Array:
    """Give each row's absolute error, shape ``(n,)``."""
    return np.abs(graded.errors)


def squared_errors(graded: Graded) -> Array:
    """Give each row's squared error, shape ``(n,)``."""
    return np.square(graded.errors)


def _relative_errors(graded: Graded) -> Array:
    """Absolute errors as a share of the target; where that is zero, of the smallest number, as scikit-learn has it."""
    return np.abs(graded.errors) / np.maximum(np.abs(graded.target.astype(np.float64)), SMALLEST_SHARE)


def require_nonzero(name: str, target: Array) -> None:
    """See that errors can be told as shares of the target.

    :param name: what the target is called.
    :raises InsufficientDataError: some are zero; with how many and what to do.
    """
    zeros = int(np.count_nonzero(target == 0))
    if zeros:
        raise InsufficientDataError(
            f"mape divides by the target, and {name} is zero in {zeros} of {len(target)} rows: choose mae, rmse or r2, or a metric "
            "of your own by import path, such as the sum of the errors over the sum of the targets"
        )


def _mean_relative_error(graded: Graded) -> float:
    require_nonzero("it", graded.target.astype(np.float64))
    return float(np.mean(_relative_errors(graded)))


def _r2_terms(graded: Graded) -> Array:
    numbers = graded.target.astype(np.float64)
    # The spread is the same about any point, and sums about the mean lose no digits.
    about = numbers - np.mean(numbers)
    return np.column_stack([np.square(graded.errors), about, np.square(about)])


def _r2_of_sums(sums: Array) -> Array:
    """Share of the target's variance that is explained.

    Source: Wright, "Correlation and causation", Journal of Agricultural Research 20, 1921.
    """
    residual, total, squares, count = (sums[..., place] for place in range(4))
    spread = squares - np.square(total) / count
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(spread > 0.0, 1.0 - residual / spread, np.nan))


def quantile_loss(name: str, level: str) -> Metric:
    """Loss whose best constant is a quantile.

    Source: Koenker and Bassett, "Regression quantiles", Econometrica 46, 1978.
    """
    try:
        share = float(level)
    except ValueError:
        share = math.nan
    if not 0.0 < share < 1.0:
        raise ValueError(f"{name!r}: give the quantile between 0 and 1, such as quantile_loss@0.9")

    def losses(graded: Graded) -> Array:
        short = -graded.errors
        return np.maximum(share * short, (share - 1.0) * short)

    return mean_metric(name, losses)


NUMBER_METRICS = (
    mean_metric("mae", absolute_errors),
    replace(mean_metric("mape", _relative_errors), score=_mean_relative_error),
    Metric(
        name="rmse",
        greater_is_better=False,
        score=lambda graded: float(np.sqrt(np.mean(squared_errors(graded)))),
        terms=lambda graded: squared_errors(graded)[:, None],
        of_sums=lambda sums: np.sqrt(mean_of_sums(sums)),
        losses=squared_errors,
        mean_loss=lambda value: value**2,
        of_mean_loss=math.sqrt,
    ),
    Metric(
        name="r2",
        greater_is_better=True,
        score=lambda graded: float(_r2_of_sums(np.append(_r2_terms(graded).sum(axis=0), len(graded)))),
        terms=_r2_terms,
        of_sums=_r2_of_sums,
        losses=squared_errors,
        loss_name="rmse",
        of_mean_loss=math.sqrt,
    ),
)
