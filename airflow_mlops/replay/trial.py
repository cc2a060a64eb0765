"""Trial: what a rollout in the shadow does to a promotion that was tested on one window alone, where labels come as the next lasts."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from airflow_mlops.core.comparison.metrics import resolve_metric
from airflow_mlops.core.comparison.predictions import Graded
from airflow_mlops.core.rollouts.canary import CanaryPolicy, compare_losses
from airflow_mlops.core.rollouts.mean_losses import paired_losses_of

if TYPE_CHECKING:
    from datetime import datetime

    import polars as pl

    from airflow_mlops.core.comparison.predictions import Array, Predictions
    from airflow_mlops.core.rollouts.canary import Finding
    from airflow_mlops.core.windows import Window

_POLICY = CanaryPolicy()


class Promoted(NamedTuple):
    """A promotion that has not answered anybody yet.

    :param version: that was promoted.
    :param before: that was champion before it.
    """

    version: str
    before: str


def trial_end(window: Window, times: pl.Series, share: float) -> datetime | None:
    """Give the time until which the version before still answers; ``None`` where the window is too small to tell anything.

    :param times: of the window's rows, ascending.
    :param share: of the window; more where that has too few rows to compare two versions by.
    """
    if share == 0.0 or len(times) <= _POLICY.minimum_requests:
        return None
    enough: datetime = times[_POLICY.minimum_requests]
    end = max(window.start + share * (window.end - window.start), enough)
    return end if end < window.end else None


def compare(metric: str, target: Array, before: Predictions, promoted: Predictions) -> Finding:
    """Compare both versions' losses on the rows of the trial, as a rollout does that labels are named for.

    :raises ValueError: the metric has no loss per row.
    """
    losses = resolve_metric(metric).losses
    if losses is None:
        raise ValueError(f"{metric} is no mean of losses row by row, by which a trial could be judged")
    pairs = paired_losses_of(
        losses(Graded(target, before)), losses(Graded(target, promoted)), [None] * len(target)
    )
    return compare_losses(pairs, _POLICY, _POLICY.significance)
