"""Performance: whether realized quality has fallen behind what was promised at training."""

from __future__ import annotations

import math
from dataclasses import dataclass

from airflow_mlops.core.evaluation import normal_tail
from airflow_mlops.core.metrics import MetricValue, resolve_metric


@dataclass(frozen=True, kw_only=True, slots=True)
class PerformancePolicy:
    """When a change counts.

    :param maximum_relative_change: worsening that is tolerated, 0.2 is twenty percent (rule of thumb).
    :param significance: largest p-value; both conditions must hold, so neither noise nor sheer row count triggers.
    :param minimum_rows: fewer labelled rows are not judged.
    :param minimum_labelled_share: a smaller share of labelled predictions is not judged, in ``[0, 1]``.
    """

    maximum_relative_change: float = 0.2
    significance: float = 0.001
    minimum_rows: int = 100
    minimum_labelled_share: float = 0.8


@dataclass(frozen=True, kw_only=True, slots=True)
class PerformanceReport:
    """The judgement.

    :param relative_change: worsening relative to the reference, above zero is worse; ``None`` when not measured.
    :param z_score: of the difference of the mean losses; ``None`` where the metric has no per-row losses.
    :param p_value: probability of so large a worsening if nothing had changed (one-sided).
    :param measured: whether there was enough to judge; unmeasured is never "fine".
    :param degraded: worse beyond tolerance and beyond chance.
    :param reason: one sentence.
    """

    relative_change: float | None
    z_score: float | None
    p_value: float | None
    measured: bool
    degraded: bool
    reason: str


def judge_performance(
    *, current: MetricValue | None, reference: MetricValue, labelled_share: float, policy: PerformancePolicy
) -> PerformanceReport:
    """Compare the window's metric with the reference.

    The test is Welch's on the mean per-row loss of two independent samples, normal for the row counts at hand.

    Source: Welch, "The generalization of Student's problem when several different population variances are
    involved", Biometrika 34, 1947.

    :param current: the window's metric; ``None``: not one row has a label.
    :param reference: the same metric on rows held out at training.
    :param labelled_share: share of the window's predictions that have a label, in ``[0, 1]``.
    :param policy: when a change counts.
    """
    short = _too_little(current.row_count if current else 0, labelled_share, policy)
    if current is None or short is not None:
        return PerformanceReport(
            relative_change=None,
            z_score=None,
            p_value=None,
            measured=False,
            degraded=False,
            reason=f"performance not measured: {short or 'no labelled rows'}",
        )
    greater_is_better = resolve_metric(current.metric).greater_is_better
    scale = abs(reference.value) or 1.0
    change = (current.value - reference.value) / scale * (-1.0 if greater_is_better else 1.0)
    z_score = _z_score(current, reference)
    p_value = normal_tail(z_score) if z_score is not None else None
    beyond_chance = p_value is None or p_value <= policy.significance
    degraded = change > policy.maximum_relative_change and beyond_chance
    return PerformanceReport(
        relative_change=change,
        z_score=z_score,
        p_value=p_value,
        measured=True,
        degraded=degraded,
        reason=_reason(current, reference, change, z_score, policy, degraded=degraded),
    )


def _too_little(row_count: int, labelled_share: float, policy: PerformancePolicy) -> str | None:
    if row_count == 0 and labelled_share == 0.0:
        return "no label so far (or do labels and predictions not share their ids?)"
    if labelled_share < policy.minimum_labelled_share:
        return f"{labelled_share:.0%} labelled so far, {policy.minimum_labelled_share:.0%} needed to judge"
    if row_count < policy.minimum_rows:
        return f"{row_count} labelled rows, {policy.minimum_rows} needed to judge"
    return None


def _z_score(current: MetricValue, reference: MetricValue) -> float | None:
    mean_loss = resolve_metric(current.metric).mean_loss
    if mean_loss is None or current.standard_deviation is None or reference.standard_deviation is None:
        return None
    error = math.sqrt(
        current.standard_deviation**2 / current.row_count
        + reference.standard_deviation**2 / reference.row_count
    )
    worse = mean_loss(current.value) - mean_loss(reference.value)
    if error == 0.0:
        return math.copysign(math.inf, worse) if worse else 0.0
    return worse / error


def _reason(
    current: MetricValue,
    reference: MetricValue,
    change: float,
    z_score: float | None,
    policy: PerformancePolicy,
    *,
    degraded: bool,
) -> str:
    name = current.metric.upper()
    now = f"{name} {current.value:.3g} on {current.row_count} labelled rows"
    if change <= 0:
        return f"as promised: {now}, {reference.value:.3g} at training"
    chance = f", z = {z_score:.1f}" if z_score is not None else ""
    numbers = f"{now}, {reference.value:.3g} at training ({change:.0%} worse{chance})"
    if degraded:
        return f"degraded: {numbers}"
    if change > policy.maximum_relative_change:
        return f"worse, but not beyond chance: {numbers}"
    return f"within the tolerated {policy.maximum_relative_change:.0%}: {numbers}"
