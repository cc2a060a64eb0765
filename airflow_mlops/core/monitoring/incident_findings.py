"""What checks and retrainings say of a model, read as findings: what is bad or clean, window by window."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from airflow_mlops.core.comparison.grades import labels_given_up
from airflow_mlops.core.monitoring.incidents import Cause, Finding, IncidentPolicy
from airflow_mlops.core.windows import Window


@dataclass(frozen=True, kw_only=True, slots=True)
class Retraining:
    """A decision to retrain and what became of it.

    :param window: the decided window.
    :param outcome: how it ended; ``None``: it has not.
    :param reason: why it was decided, or ended so.
    :param promoted_version: the version that was promoted for it.
    :param current_version: the champion now.
    :param waited_days: since it was decided, or since the promotion if there was one.
    :param superseded: whether a newer decision covers it.
    """

    window: Window
    outcome: str | None
    reason: str
    promoted_version: str | None = None
    current_version: str | None = None
    waited_days: float = 0.0
    superseded: bool = False
    found_by: str = ""

    @property
    def promoted(self) -> bool:
        """Whether it ended with a version that serves."""
        return self.outcome == "promoted"


def findings_of_grade(
    window: Window, grade: Mapping[str, Any], *, waited_days: float, policy: IncidentPolicy
) -> list[Finding]:
    """Read a performance check: realized performance, or its estimate, and whether labels are overdue.

    :param grade: the check's payload.
    :param waited_days: since the window was first checked.
    """
    reason = str(grade.get("reason", ""))
    measured = bool(grade.get("measured"))
    found = []
    if measured:
        degraded = bool(grade.get("degraded"))
        found.append(
            Finding(
                cause=Cause.PERFORMANCE,
                window=window,
                bad=degraded,
                level=max(0.0, float(grade.get("relative_change") or 0.0)),
                reason=reason,
            )
        )
        # Labels have the last word: what was estimated is settled, one way or the other.
        settled = f"labels came: {reason}"
        found.append(Finding(cause=Cause.ESTIMATE, window=window, bad=False, reason=settled))
    elif grade.get("estimate_trusted"):
        found.append(
            Finding(
                cause=Cause.ESTIMATE,
                window=window,
                bad=bool(grade.get("estimate_degraded")),
                level=_distance(grade.get("estimated_value"), grade.get("reference_value")),
                reason=reason,
            )
        )
    share = float(grade.get("labelled_share") or 0.0)
    if labels_given_up(grade):
        given_up = f"given up: the time for labels is over with {share:.0%} of them"
        found.append(Finding(cause=Cause.LABELS, window=window, bad=False, reason=given_up))
    elif measured or share >= 1.0:
        found.append(
            Finding(cause=Cause.LABELS, window=window, bad=False, reason=f"{share:.0%} labelled so far")
        )
    elif grade.get("awaits_labels") and waited_days > policy.labels_overdue_days:
        waits = f"{share:.0%} labelled {waited_days:.0f} days after the first check"
        found.append(Finding(cause=Cause.LABELS, window=window, bad=True, reason=waits))
    return found


def _distance(value: float | None, reference: float | None) -> float | None:
    if value is None or reference is None:
        return None
    return abs(value - reference) / (abs(reference) or 1.0)


def finding_of_drift(window: Window, check: Mapping[str, Any]) -> Finding:
    """Read a drift check.

    :param check: the check's payload.
    """
    return Finding(
        cause=Cause.INPUTS,
        window=window,
        bad=bool(check.get("drifted")),
        level=float(check.get("drifted_count") or 0) / max(1, int(check.get("feature_count") or 0)),
        reason=str(check.get("headline", "")),
        links={"Drift report": str(check["report_url"])} if check.get("report_url") else {},
    )


def findings_of_retrainings(retrainings: Iterable[Retraining], policy: IncidentPolicy) -> list[Finding]:
    """Read the decisions to retrain: rejected again and again, never done, or promoted and not deployed."""
    found: list[Finding] = []
    failed = 0
    for item in sorted(retrainings, key=lambda each: each.window):
        if item.outcome is not None:
            failed = 0 if item.promoted else failed + 1
        found += _ended(item, failed, policy)
        found += _unfinished(item, policy)
    return found


def _ended(item: Retraining, failed: int, policy: IncidentPolicy) -> list[Finding]:
    """Tell whether retrainings end without a new champion too often; one that does is the gate doing its work."""
    bad = failed >= policy.failed_retrainings
    if item.outcome is None or not (item.promoted or bad):
        return []
    return [
        Finding(
            cause=Cause.REJECTED_RETRAININGS,
            window=item.window,
            bad=bad,
            level=float(failed),
            reason=f"{failed} retrainings in a row: {item.reason}" if bad else item.reason,
            found_by=item.found_by,
        )
    ]


def _unfinished(item: Retraining, policy: IncidentPolicy) -> list[Finding]:
    """Tell what is owed: the training, then the deployment. What a newer decision covers is owed by that one."""
    version = item.promoted_version
    late = item.waited_days > policy.unfinished_days
    found = []

    def add(cause: Cause, *, bad: bool, reason: str) -> None:
        found.append(Finding(cause=cause, window=item.window, bad=bad, reason=reason, found_by=item.found_by))

    if item.outcome is not None or version is not None:
        add(Cause.UNFINISHED_RETRAINING, bad=False, reason=item.reason)
    elif late and not item.superseded:
        waits = f"decided {item.waited_days:.0f} days ago and not ended: {item.reason}"
        add(Cause.UNFINISHED_RETRAINING, bad=True, reason=waits)
    if version is None:
        return found
    if item.outcome is not None:
        add(Cause.DEPLOYMENT, bad=False, reason=f"version {version} serves")
    elif item.current_version != version:
        add(
            Cause.DEPLOYMENT,
            bad=False,
            reason=f"version {item.current_version} took the place of version {version}",
        )
    elif late and not item.superseded:
        waits = f"version {version} was promoted {item.waited_days:.0f} days ago and was never deployed"
        add(Cause.DEPLOYMENT, bad=True, reason=waits)
    return found


def count_overdue(findings: Iterable[Finding]) -> list[Finding]:
    """Give overdue labels the number of windows that wait for theirs as level, so that more of them is worse.

    A window whose labels are here is no sign that all are, while an older one still waits: it is left out.
    """
    counted: list[Finding] = []
    waiting = 0
    for finding in sorted(findings, key=lambda each: each.window):
        if not finding.bad:
            counted += [] if waiting else [finding]
            continue
        waiting += 1
        also = f"{waiting} windows wait for labels; " if waiting > 1 else ""
        counted.append(replace(finding, reason=also + finding.reason, level=float(waiting)))
    return counted
