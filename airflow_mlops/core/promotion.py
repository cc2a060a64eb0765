"""Promotion: whether a challenger has earned the champion's place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from airflow_mlops.core.evaluation import EvaluationReport


class Verdict(StrEnum):
    """What an evaluation concluded."""

    PROMOTE = "promote"
    REJECT = "reject"
    NOT_MEASURED = "not_measured"


@dataclass(frozen=True, kw_only=True, slots=True)
class PromotionPolicy:
    """What a challenger has to show.

    :param minimum_uplift: relative improvement over the champion, 0.01 is one percent.
    :param significance: largest p-value, the rate at which an equally good challenger would be promoted.
    """

    minimum_uplift: float = 0.0
    significance: float = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class PromotionDecision:
    """The verdict and one sentence."""

    verdict: Verdict
    reason: str


def decide_promotion(report: EvaluationReport, policy: PromotionPolicy) -> PromotionDecision:
    """Judge a comparison.

    Without a champion the challenger has to beat the simple baseline beyond its interval; with one, it has to
    be better by the policy's uplift and significantly so, and still beat the baseline.
    """
    name = report.metric.upper()
    challenger, champion, baseline = report.challenger, report.champion, report.baseline
    if not all(map(math.isfinite, (challenger.value, baseline.value))):
        return PromotionDecision(verdict=Verdict.NOT_MEASURED, reason=f"{name} could not be measured")
    beats_baseline = (
        challenger.low > baseline.value if report.greater_is_better else challenger.high < baseline.value
    )
    if not beats_baseline:
        return PromotionDecision(
            verdict=Verdict.REJECT,
            reason=f"{name} {challenger.value:.4g} is no better than always guessing the same ({baseline.value:.4g})",
        )
    if champion is None:
        return PromotionDecision(
            verdict=Verdict.PROMOTE,
            reason=f"first model: {name} {challenger.value:.4g} against {baseline.value:.4g} for a constant guess",
        )
    if report.uplift is None or report.p_value is None:
        return PromotionDecision(
            verdict=Verdict.NOT_MEASURED, reason=f"{name} can't be compared with the champion's"
        )
    numbers = (
        f"{name} {challenger.value:.4g} against the champion's {champion.value:.4g} on the same "
        f"{report.row_count} rows ({report.uplift:+.1%} better, p = {report.p_value:.2g})"
    )
    if report.p_value > policy.significance:
        return PromotionDecision(verdict=Verdict.REJECT, reason=f"not beyond chance: {numbers}")
    if report.uplift < policy.minimum_uplift:
        return PromotionDecision(
            verdict=Verdict.REJECT, reason=f"less than the {policy.minimum_uplift:.1%} asked for: {numbers}"
        )
    return PromotionDecision(verdict=Verdict.PROMOTE, reason=numbers)
