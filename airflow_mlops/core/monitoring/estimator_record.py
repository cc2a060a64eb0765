"""How far estimates can be believed, from those that could be graded since."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from airflow_mlops.core.monitoring.estimation import COVERAGE


@dataclass(frozen=True, kw_only=True, slots=True)
class GradedEstimate:
    """An estimate and what turned out."""

    value: float
    low: float
    high: float
    realized: float

    @property
    def covered(self) -> bool:
        """Whether the interval holds what turned out."""
        return self.low <= self.realized <= self.high


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimatorRecord:
    """How good the estimates of the last windows were.

    :param windows: estimates that could be graded.
    :param covered: of them, those whose interval held the realized value.
    :param bias: mean of estimated less realized; ``None`` without any.
    :param mean_error: mean distance; ``None`` without any.
    :param trusted: whether a new estimate may be acted on.
    :param reason: one sentence.
    """

    windows: int
    covered: int
    bias: float | None
    mean_error: float | None
    trusted: bool
    reason: str


def judge_estimator(
    past: Sequence[GradedEstimate],
    *,
    concept_drift: bool,
    minimum_windows: int = 3,
    significance: float = 0.05,
    memory: int = 12,
) -> EstimatorRecord:
    """Decide whether estimates may be acted on.

    They may not when so few of the last intervals held the realized value that, were their coverage what it should be, it
    would happen less often than ``significance`` (exact binomial test); nor while there are few to tell from and labels have
    shown that the relation of inputs and target changed, which no estimate sees.

    Source: Clopper and Pearson, "The use of confidence or fiducial limits illustrated in the case of the binomial",
    Biometrika 26, 1934.

    :param past: graded estimates of this version, oldest first.
    :param concept_drift: whether the newest labels showed a worsening.
    :param minimum_windows: graded estimates that are not few.
    :param memory: only so many of the newest count: an estimator may have got better.

    >>> fine = GradedEstimate(value=1.0, low=0.9, high=1.1, realized=1.05)
    >>> wrong = GradedEstimate(value=1.0, low=0.9, high=1.1, realized=2.0)
    >>> judge_estimator([fine, fine, wrong], concept_drift=False).trusted
    True
    >>> judge_estimator([fine, wrong, wrong], concept_drift=False).trusted
    False
    """
    from scipy.special import bdtr

    recent = list(past)[-memory:]
    covered = sum(item.covered for item in recent)
    if not recent:
        trusted = not concept_drift
        reason = "no estimate could be graded yet" + (
            "" if trusted else ", and the last labels showed a worsening"
        )
        return EstimatorRecord(
            windows=0, covered=0, bias=None, mean_error=None, trusted=trusted, reason=reason
        )
    misses = [item.value - item.realized for item in recent]
    bias, error = float(np.mean(misses)), float(np.mean(np.abs(misses)))
    reason = (
        f"{covered} of the last {len(recent)} intervals held what turned out, off by {error:.2g} on average "
        f"({bias:+.2g})"
    )
    too_few = float(bdtr(covered, len(recent), COVERAGE)) < significance and covered < len(recent)
    unsure = len(recent) < minimum_windows and concept_drift
    if unsure and not too_few:
        reason += ", and the last labels showed a worsening"
    return EstimatorRecord(
        windows=len(recent),
        covered=covered,
        bias=bias,
        mean_error=error,
        trusted=not too_few and not unsure,
        reason=reason,
    )
