"""Promotion: whether a challenger has earned the champion's place; one verdict from several checks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from airflow_mlops.core.evaluation import EvaluationReport
    from airflow_mlops.core.fairness import FairnessReport
    from airflow_mlops.core.slices import SliceReport


class Verdict(StrEnum):
    """What an evaluation concluded."""

    PROMOTE = "promote"
    REJECT = "reject"
    NOT_MEASURED = "not_measured"


class Outcome(StrEnum):
    """What one check concluded."""

    PASS = "pass"  # noqa: S105 - no password
    FAIL = "fail"
    NOT_MEASURED = "not_measured"


@dataclass(frozen=True, kw_only=True, slots=True)
class PromotionPolicy:
    """What a challenger has to show.

    :param minimum_uplift: relative improvement over the champion, 0.01 is one percent.
    :param significance: largest p-value, the rate at which an equally good challenger would be promoted.
    :param maximum_group_difference: largest difference of selection or error rates between groups; ``None``: reported only.
    """

    minimum_uplift: float = 0.0
    significance: float = 0.05
    maximum_group_difference: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One thing that was looked at.

    :param name: ``baseline``, ``champion``, ``slices``, ``groups``, ``artifact``.
    :param outcome: pass, fail, or not measured.
    :param reason: one sentence.
    """

    name: str
    outcome: Outcome
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PromotionDecision:
    """The verdict, one sentence, and the checks it follows from."""

    verdict: Verdict
    reason: str
    checks: tuple[Check, ...]


def decide_promotion(
    report: EvaluationReport,
    policy: PromotionPolicy,
    *,
    slices: SliceReport | None = None,
    groups: Sequence[FairnessReport] = (),
    further: Sequence[Check] = (),
) -> PromotionDecision:
    """Join all checks into one verdict: any failure rejects; what could not be measured is never a pass.

    Without a champion the challenger has to beat the simple baseline beyond its interval; with one, it has to be better by
    the policy's uplift and significantly so, still beat the baseline, and get no slice significantly worse.

    :param report: the numbers.
    :param policy: what has to be shown.
    :param slices: of challenger against champion; ``None`` when there is no champion.
    :param groups: per column that was asked for.
    :param further: checks made elsewhere, such as of the artifact.
    """
    checks = [_against_baseline(report), _against_champion(report, policy)]
    if slices is not None:
        checks.append(_slices(slices))
    checks += [_groups(group, policy.maximum_group_difference) for group in groups]
    checks += further
    failed = [check for check in checks if check.outcome is Outcome.FAIL]
    unmeasured = [check for check in checks if check.outcome is Outcome.NOT_MEASURED]
    if failed:
        verdict, told = Verdict.REJECT, failed
    elif unmeasured:
        verdict, told = Verdict.NOT_MEASURED, unmeasured
    else:
        verdict, told = Verdict.PROMOTE, [checks[1], *(check for check in checks[2:])][:1]
    return PromotionDecision(
        verdict=verdict, reason="; ".join(check.reason for check in told), checks=tuple(checks)
    )


def _against_baseline(report: EvaluationReport) -> Check:
    deciding = report.deciding
    name, challenger, baseline = deciding.metric.upper(), deciding.challenger, deciding.baseline
    if baseline is None or not all(map(math.isfinite, (challenger.value, baseline.value))):
        return Check(
            name="baseline", outcome=Outcome.NOT_MEASURED, reason=f"{name} of a simple guess could not be measured"
        )
    better = challenger.low > baseline.value if deciding.greater_is_better else challenger.high < baseline.value
    if not better:
        return Check(
            name="baseline",
            outcome=Outcome.FAIL,
            reason=f"{name} {challenger.value:.4g} is no better than a simple guess ({baseline.value:.4g})",
        )
    return Check(
        name="baseline",
        outcome=Outcome.PASS,
        reason=f"{name} {challenger.value:.4g} against {baseline.value:.4g} for a simple guess",
    )


def _against_champion(report: EvaluationReport, policy: PromotionPolicy) -> Check:
    deciding = report.deciding
    name, challenger, champion = deciding.metric.upper(), deciding.challenger, deciding.champion
    if champion is None:
        baseline = f" against {deciding.baseline.value:.4g} for a simple guess" if deciding.baseline else ""
        return Check(
            name="champion", outcome=Outcome.PASS, reason=f"first model: {name} {challenger.value:.4g}{baseline}"
        )
    if deciding.uplift is None or deciding.p_value is None:
        return Check(
            name="champion", outcome=Outcome.NOT_MEASURED, reason=f"{name} can't be compared with the champion's"
        )
    numbers = (
        f"{name} {challenger.value:.4g} against the champion's {champion.value:.4g} on the same "
        f"{report.row_count} rows ({deciding.uplift:+.1%} better, p = {deciding.p_value:.2g})"
    )
    if deciding.p_value > policy.significance:
        return Check(name="champion", outcome=Outcome.FAIL, reason=f"not beyond chance: {numbers}")
    if deciding.uplift < policy.minimum_uplift:
        return Check(
            name="champion",
            outcome=Outcome.FAIL,
            reason=f"less than the {policy.minimum_uplift:.1%} asked for: {numbers}",
        )
    return Check(name="champion", outcome=Outcome.PASS, reason=numbers)


def _slices(slices: SliceReport) -> Check:
    if not slices.broken:
        return Check(
            name="slices",
            outcome=Outcome.PASS,
            reason=f"none of {slices.looked_at} slices got worse beyond tolerance and chance",
        )
    worst = slices.broken[0]
    more = f" and {len(slices.broken) - 1} more" if len(slices.broken) > 1 else ""
    return Check(
        name="slices",
        outcome=Outcome.FAIL,
        reason=f"worse than the champion where {worst}: loss {worst.challenger:.4g} against {worst.champion:.4g} on "
        f"{worst.row_count} rows ({worst.regression:+.0%}, adjusted p = {worst.p_value:.2g}){more}",
    )


def _groups(report: FairnessReport, limit: float | None) -> Check:
    differences = [
        value
        for value in (report.demographic_parity_difference, report.equalized_odds_difference)
        if value is not None
    ]
    name = f"groups by {report.column}"
    if limit is None:
        shown = f", rates up to {max(differences):.2f} apart" if differences else ""
        return Check(
            name=name, outcome=Outcome.PASS, reason=f"{len(report.groups)} {name}{shown}; no limit was set"
        )
    if not differences:
        return Check(name=name, outcome=Outcome.NOT_MEASURED, reason=f"{name}: no rates to compare")
    apart = max(differences)
    words = f"{name}: rates are {apart:.2f} apart (limit {limit:.2f})"
    return Check(name=name, outcome=Outcome.FAIL if apart > limit else Outcome.PASS, reason=words)
