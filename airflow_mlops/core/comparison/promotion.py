"""Promotion: whether a challenger has earned the champion's place; one verdict from several checks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from airflow_mlops.core.comparison.fairness import MINIMUM_ROWS
from airflow_mlops.core.comparison.resampling import FEWEST_ROWS, describe_p, require_level

if TYPE_CHECKING:
    from airflow_mlops.core.comparison.evaluation import EvaluationReport, MetricComparison, Rival
    from airflow_mlops.core.comparison.fairness import FairnessReport
    from airflow_mlops.core.comparison.slices import SliceReport


#: Columns, or groups, that a reason names.
_SHOWN_COLUMNS = 5


class Verdict(StrEnum):
    """What an evaluation concluded."""

    PROMOTE = "promote"
    REJECT = "reject"
    NO_VERDICT = "no_verdict"


class Outcome(StrEnum):
    """What one check concluded."""

    PASS = "pass"  # noqa: S105 - no password
    FAIL = "fail"
    NOT_MEASURED = "not_measured"


@dataclass(frozen=True, kw_only=True, slots=True)
class PromotionPolicy:
    """What a challenger has to show. With neither threshold nothing can be concluded: there is no verdict then.

    :param minimum_uplift: relative improvement over the champion, 0.01 is one percent; ``None`` asks for none.
    :param significance: largest p-value, the rate at which an equally good challenger would be promoted; ``None`` takes the
        numbers as they are, however few rows they come from.
    :param maximum_group_difference: largest difference of selection or error rates between groups; ``None``: reported only.
    :param minimum_group_rows: a group of fewer rows is not measured, nor is a rate that is a share of fewer; with a limit that is
        no pass.
    """

    minimum_uplift: float | None = 0.0
    significance: float | None = 0.05
    maximum_group_difference: float | None = None
    minimum_group_rows: int = MINIMUM_ROWS

    def __post_init__(self) -> None:
        if self.significance is not None:
            require_level("significance", self.significance)
        for name in ("minimum_uplift", "maximum_group_difference"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < math.inf:
                raise ValueError(
                    f"{name} is {value}: give a share from 0 on, such as 0.01 for one percent, or None"
                )
        if self.minimum_group_rows < 1:
            raise ValueError(f"minimum_group_rows is {self.minimum_group_rows}: give at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One thing that was looked at.

    :param name: ``champion``, ``baseline``, ``slices``, ``artifact``, or ``groups by`` a column.
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
    named_slices: bool = False,
    groups: Sequence[FairnessReport] = (),
    further: Sequence[Check] = (),
) -> PromotionDecision:
    """Join all checks into one verdict: any failure rejects; what could not be measured is never a pass.

    A first model has to be better than every simple guess; a later one than the champion as well. Better means by the
    policy's uplift (the champion only) and at its significance. No slice may get significantly worse.

    :param report: the numbers.
    :param policy: what has to be shown.
    :param slices: of challenger against champion; ``None`` when there is no champion, or none were asked for.
    :param named_slices: whether somebody named the columns of the slices: one that can't be measured is no pass then.
    :param groups: per column that was asked for.
    :param further: checks made elsewhere, such as of the artifact.
    """
    checks = []
    if report.deciding.champion is not None:
        checks.append(_against_champion(report, report.deciding.champion, policy))
    checks.append(_against_baselines(report.deciding, policy))
    if slices is not None:
        checks.append(_slices(slices, named=named_slices))
    checks += [_groups(group, policy.maximum_group_difference) for group in groups]
    checks += further
    failed = [check for check in checks if check.outcome is Outcome.FAIL]
    unmeasured = [check for check in checks if check.outcome is Outcome.NOT_MEASURED]
    if failed:
        verdict, told = Verdict.REJECT, failed
    elif unmeasured:
        verdict, told = Verdict.NO_VERDICT, unmeasured
    else:
        verdict, told = Verdict.PROMOTE, checks[:1]
    first = "first model: " if report.deciding.champion is None else ""
    return PromotionDecision(
        verdict=verdict, reason=first + "; ".join(check.reason for check in told), checks=tuple(checks)
    )


def _against_champion(report: EvaluationReport, champion: Rival, policy: PromotionPolicy) -> Check:
    deciding = report.deciding
    numbers = (
        f"{deciding.metric.upper()} {deciding.challenger.value:.4g} against the champion's {champion.value.value:.4g} "
        f"on the same {report.row_count} rows ({_uplift(champion)}{_chance(champion.p_value)})"
    )
    return _judge(
        "champion", champion, numbers, significance=policy.significance, uplift=policy.minimum_uplift
    )


def _against_baselines(deciding: MetricComparison, policy: PromotionPolicy) -> Check:
    name = deciding.metric.upper()
    if not deciding.baselines and not deciding.unmeasured:
        return Check(
            name="baseline",
            outcome=Outcome.NOT_MEASURED,
            reason=f"there is no simple guess to compare {name} with",
        )
    judged = [
        Check(
            name="baseline",
            outcome=Outcome.NOT_MEASURED,
            reason=f"{name} of {kind} could not be measured: it gives labels without probabilities, so let a metric of "
            "labels decide, such as accuracy or f1",
        )
        for kind in deciding.unmeasured
    ]
    judged += [
        _judge(
            "baseline",
            guess,
            f"{name} {deciding.challenger.value:.4g} against {guess.value.value:.4g} for {kind}",
            significance=policy.significance,
            uplift=0.0 if policy.minimum_uplift is not None else None,
        )
        for kind, guess in deciding.baselines.items()
    ]
    outcomes = {check.outcome for check in judged}
    outcome = next(one for one in (Outcome.FAIL, Outcome.NOT_MEASURED, Outcome.PASS) if one in outcomes)
    told = "; ".join(check.reason for check in judged if check.outcome is outcome)
    return Check(name="baseline", outcome=outcome, reason=told)


def _judge(
    name: str, rival: Rival, numbers: str, *, significance: float | None, uplift: float | None
) -> Check:
    if significance is None and uplift is None:
        return Check(
            name=name, outcome=Outcome.NOT_MEASURED, reason=f"no threshold is set to judge by: {numbers}"
        )
    gained = rival.uplift if rival.uplift is not None else rival.difference.value
    if gained <= 0.0:
        return Check(name=name, outcome=Outcome.FAIL, reason=f"no better: {numbers}")
    if significance is not None and rival.p_value is None:
        return Check(
            name=name,
            outcome=Outcome.NOT_MEASURED,
            reason=f"too few rows to tell it from chance ({FEWEST_ROWS} at least, and several of a rare label and of answers with it), judge on a longer window: {numbers}",
        )
    if significance is not None and rival.p_value is not None and rival.p_value > significance:
        return Check(name=name, outcome=Outcome.FAIL, reason=f"not beyond chance: {numbers}")
    if uplift is not None and gained < uplift:
        return Check(
            name=name, outcome=Outcome.FAIL, reason=f"less than the {uplift:.1%} asked for: {numbers}"
        )
    return Check(name=name, outcome=Outcome.PASS, reason=numbers)


def _uplift(rival: Rival) -> str:
    if rival.uplift is None:
        return ""
    if rival.uplift == 0.0:
        return "just as good, "
    return f"{abs(rival.uplift):.1%} {'worse' if rival.uplift < 0.0 else 'better'}, "


def _chance(p_value: float | None) -> str:
    return describe_p(p_value) if p_value is not None else "p not measured"


def _slices(slices: SliceReport, *, named: bool) -> Check:
    if not slices.broken and slices.doubtful:
        worst = slices.doubtful[0]
        return Check(
            name="slices",
            outcome=Outcome.NOT_MEASURED,
            reason=f"worse than the champion where {worst}: {slices.loss} {worst.challenger:.4g} against "
            f"{worst.champion:.4g} on {worst.row_count} rows; but these lie so close together in time that it may be "
            "chance: judge on a longer window",
        )
    if not slices.broken:
        return _no_worse(slices, named=named)
    worst = slices.broken[0]
    more = f" and {len(slices.broken) - 1} more" if len(slices.broken) > 1 else ""
    by = f"{worst.regression:+.0%}, " if worst.regression is not None else ""
    return Check(
        name="slices",
        outcome=Outcome.FAIL,
        reason=f"worse than the champion where {worst}: {slices.loss} {worst.challenger:.4g} against "
        f"{worst.champion:.4g} on {worst.row_count} rows ({by}adjusted {describe_p(worst.p_value)}){more}",
    )


def _no_worse(slices: SliceReport, *, named: bool) -> Check:
    told = []
    if slices.looked_at:
        told.append(
            f"none of {slices.looked_at} slices got worse by {slices.loss} beyond tolerance and chance"
        )
    if slices.unmeasured and (named or not told):
        shown = ", ".join(slices.unmeasured[:_SHOWN_COLUMNS])
        more = (
            f" and {len(slices.unmeasured) - _SHOWN_COLUMNS} more columns"
            if slices.unmeasured[_SHOWN_COLUMNS:]
            else ""
        )
        remedy = "lower it, or leave them out of slices" if named else "or lower it"
        told.append(
            f"not measured by {shown}{more}: no part of the rows has {slices.minimum_rows}, the minimum_rows of slice_policy. "
            f"Judge on a longer window, {remedy}"
        )
    outcome = Outcome.NOT_MEASURED if named and slices.unmeasured else Outcome.PASS
    reason = "; ".join(told) or "there are no slices: all rows have the same values in the columns"
    return Check(name="slices", outcome=outcome, reason=reason)


def _groups(report: FairnessReport, limit: float | None) -> Check:
    name = f"groups by {report.column}"
    apart = report.largest_difference
    shown = _apart(report, apart) if apart is not None else _incomparable(report)
    left_out = f"; {_left_out(report)}" if report.unmeasured else ""
    if limit is None:
        return Check(name=name, outcome=Outcome.PASS, reason=f"{name}: {shown}{left_out}; no limit is set")
    if apart is not None and apart > limit:
        return Check(name=name, outcome=Outcome.FAIL, reason=f"{name}: {shown} (limit {limit:.2f})")
    if apart is None or report.unmeasured:
        return Check(
            name=name,
            outcome=Outcome.NOT_MEASURED,
            reason=f"{name}: {shown}{left_out}. Judge on a longer window, lower minimum_group_rows, join small groups, "
            "or set no limit",
        )
    return Check(name=name, outcome=Outcome.PASS, reason=f"{name}: {shown} (limit {limit:.2f})")


def _left_out(report: FairnessReport) -> str:
    shown = ", ".join(str(item) for item in report.unmeasured[:_SHOWN_COLUMNS])
    hidden = report.unmeasured_count - len(report.unmeasured[:_SHOWN_COLUMNS])
    more = f" and {hidden} more" if hidden > 0 else ""
    return f"not measured, as of fewer than {report.minimum_rows} rows: {shown}{more}"


def _incomparable(report: FairnessReport) -> str:
    if len(report.groups) < 2:
        return "fewer than two groups with enough rows to compare"
    if report.positive is not None:
        return "no rate of two groups has enough rows to compare"
    return f"{report.loss} may be below zero, so no group's is so many times another's: let a metric of errors decide"


def _apart(report: FairnessReport, difference: float) -> str:
    if report.positive is None:
        if math.isinf(difference):
            return "one group has no loss at all, and another has"
        return f"the {report.loss} of the worst group is {difference:.0%} above the best's"
    return f"selection or error rates are {difference:.2f} apart"
