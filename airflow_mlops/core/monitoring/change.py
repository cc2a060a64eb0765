"""Change: whether the level of a model's loss has gone up for good, window after window, at a stated rate of false alarms."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from airflow_mlops.core.comparison.resampling import best_block_length, require_level
from airflow_mlops.core.figures import figures

Array = NDArray[Any]

#: Sizes of a worsening, in standard errors of one window, that the test is tuned to; it mixes them evenly.
_BETS = (0.25, 0.5, 1.0, 2.0, 4.0)
#: No window counts for more than so many standard errors: its own are estimated, and tails are heavier than normal.
_LARGEST_SURPRISE = 6.0
#: Windows that make a level; the level of fewer is not called stable.
_LEVEL_WINDOWS = 3
#: How surely the baseline is not set too low, for each baseline.
_BASELINE_RISK = 0.025
#: Scatter between windows before any was seen, as a share of the promised loss, and the windows this guess counts for.
_FIRST_SCATTER, _FIRST_SCATTER_WEIGHT = 0.03, 2.0
#: Scatter is estimated from neighbors; a memory from window to window makes neighbors more alike than the rest. So many
#: times the scatter is what holds the stated rate up to an autocorrelation of 0.5 (``benchmarks/change.py``).
_SCATTER_FACTOR = 1.5

Baseline = Literal["promised", "earlier"]


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowLoss:
    """The losses of a window, of some version of a model.

    :param label: names the window in sentences.
    :param model_version: whose losses they are.
    :param mean: mean loss; smaller is better.
    :param standard_deviation: of the losses.
    :param effective_count: independent losses they amount to, see :func:`effective_count`.
    """

    label: str
    model_version: str
    mean: float
    standard_deviation: float
    effective_count: float

    @property
    def standard_error(self) -> float:
        """Of the mean."""
        return self.standard_deviation / math.sqrt(max(self.effective_count, 1.0))


@dataclass(frozen=True, kw_only=True, slots=True)
class ChangePolicy:
    """What counts as a change, and how often one may be seen where there is none.

    :param tolerated_share: a level that is worse by less than this share is no change (rule of thumb).
    :param false_alarm_rate: per window; its inverse is the number of windows until the first false alarm, on average, at least.
    :param memory_windows: how far back the best earlier level is looked for; what is older counts as another world.
    """

    tolerated_share: float = 0.05
    false_alarm_rate: float = 0.002
    memory_windows: int = 24

    def __post_init__(self) -> None:
        require_level("false_alarm_rate", self.false_alarm_rate)
        if not 0.0 <= self.tolerated_share < math.inf:
            raise ValueError(
                f"tolerated_share is {self.tolerated_share}: give a share from 0 on, such as 0.05"
            )
        if self.memory_windows < 1:
            raise ValueError(f"memory_windows is {self.memory_windows}: give a number of windows from 1 on")


@dataclass(frozen=True, kw_only=True, slots=True)
class ChangeReport:
    """What the windows up to now say together.

    :param changed: whether the level is worse now.
    :param evidence: against "nothing changed", in times; 1 is none.
    :param threshold: evidence from which a change is called one.
    :param baseline: what it is worse than: what was ``promised`` at training, or the best ``earlier`` level.
    :param baseline_level: mean loss there.
    :param level: mean loss since the change; ``None`` without one.
    :param relative_change: worsening of the level, 0.1 is ten percent; ``None`` without a change.
    :param since: label of the first window of the worse level; ``None`` without a change.
    :param window_count: windows of the worse level.
    :param reason: one sentence.
    """

    changed: bool
    evidence: float
    threshold: float
    baseline: Baseline
    baseline_level: float
    level: float | None
    relative_change: float | None
    since: str | None
    window_count: int
    reason: str


def detect_change(
    windows: Sequence[WindowLoss], *, promised: WindowLoss, policy: ChangePolicy | None = None
) -> ChangeReport:
    """Look whether the level of the newest window's version is worse than it should be.

    The baseline is the lower one of what was promised when this version was trained and the best level that *any* version kept
    for three windows. So a version that was trained, and held out, after a change does not make the change its own baseline.

    Each window is a bet against "the level is the baseline, or not worse by more than is tolerated". A bet that is lost is
    dropped, one that is won is let ride; wins of more than the inverse of the rate are a change, until a window is back. Where nothing changed, the
    expected win is at most 1 per bet, and so the expected number of windows until the first false alarm is at least the
    inverse of the rate.

    Source: Shin, Ramdas and Rinaldo, "E-detectors: a nonparametric framework for sequential change detection", New England
    Journal of Statistics in Data Science 2, 2024, definition 2.2 and theorem 2.4 (CUSUM e-detectors and their average run
    length); Lorden, "Procedures for reacting to a change in distribution", Annals of Mathematical Statistics 42, 1971.

    :param windows: graded windows, oldest first, of any versions; the version of the last one is judged.
    :param promised: the losses on the rows held out at its training.
    :param policy: what counts.
    :raises ValueError: no windows.
    """
    if not windows:
        raise ValueError("no graded window; a change can't be looked for")
    rules = policy or ChangePolicy()
    *_, last = _path(windows, promised, rules)
    return _report(windows, last, rules)


def evidence_path(
    windows: Sequence[WindowLoss], *, promised: WindowLoss, policy: ChangePolicy | None = None
) -> list[float]:
    """Give the evidence as it stood after each window of the newest version, see :func:`detect_change`."""
    return [state.evidence for state in _path(windows, promised, policy or ChangePolicy())]


class _State(NamedTuple):
    """Where the bets stand after a window."""

    evidence: float
    since: int
    baseline: Baseline
    baseline_level: float


def _path(windows: Sequence[WindowLoss], promised: WindowLoss, rules: ChangePolicy) -> Iterator[_State]:
    version = windows[-1].model_version
    first = len(windows)
    while first and windows[first - 1].model_version == version:
        first -= 1
    bets = np.array(_BETS)
    # One bet can win enough alone. More it need not keep.
    ceiling = math.log(2.0 * len(bets) / rules.false_alarm_rate)
    wealth, starts = np.zeros(len(bets)), np.full(len(bets), first)
    for place in range(first, len(windows)):
        earlier = windows[max(0, place - rules.memory_windows) : place]
        scatter = _scatter(earlier, promised)
        kind, reference, highest = _baseline(earlier, promised, scatter)
        limit = highest + rules.tolerated_share * abs(reference)
        error = math.hypot(windows[place].standard_error, scatter)
        surprise = _surprise(windows[place].mean - limit, error)
        if surprise <= 0.0 and float(np.mean(np.exp(wealth))) * rules.false_alarm_rate >= 1.0:
            wealth = np.zeros(len(bets))  # the level is back: the alarm is over, and all bets begin anew
        starts = np.where(wealth <= 0.0, place, starts)
        wealth = np.minimum(np.maximum(wealth, 0.0) + bets * surprise - bets**2 / 2.0, ceiling)
        yield _State(float(np.mean(np.exp(wealth))), int(starts[np.argmax(wealth)]), kind, reference)


def effective_count(losses: Array) -> float:
    """Tell how many independent losses some amount to: neighbors in time err alike.

    Source: Carlstein, "The use of subseries values for estimating the variance of a general statistic from a stationary
    sequence", Annals of Statistics 14, 1986; the length of the blocks as in :func:`~airflow_mlops.core.comparison.resampling.best_block_length`.

    :param losses: shape ``(n,)``, in time order.
    :returns: between 1 and ``n``.
    """
    count = len(losses)
    spread = float(np.var(losses)) if count else 0.0
    if count < 8 or spread <= 0.0:
        return float(max(count, 1))
    length = math.ceil(max(best_block_length(losses), count ** (1.0 / 3.0)))
    blocks = count // min(length, count // 4)
    means = np.array([part.mean() for part in np.array_split(np.asarray(losses, dtype=np.float64), blocks)])
    inflation = float(np.var(means, ddof=1)) * (count / blocks) / spread
    return float(count / max(inflation, 1.0))


def _surprise(excess: float, error: float) -> float:
    if error == 0.0:  # of a model that is never wrong: as good as promised is no surprise
        return math.copysign(_LARGEST_SURPRISE, excess) if excess else 0.0
    return min(excess / error, _LARGEST_SURPRISE)


def _scatter(earlier: Sequence[WindowLoss], promised: WindowLoss) -> float:
    """Give the standard deviation of window levels about the true one, beyond what their rows explain.

    Differences of neighbors see a lasting change once only, and that once is cut off.

    Source: von Neumann, "Distribution of the ratio of the mean square successive difference to the variance", Annals of
    Mathematical Statistics 12, 1941.
    """
    first = (_FIRST_SCATTER * abs(promised.mean)) ** 2
    total, weight = _FIRST_SCATTER_WEIGHT * first, _FIRST_SCATTER_WEIGHT
    for before, after in pairwise(earlier):
        if before.model_version != after.model_version:
            continue
        known = before.standard_error**2 + after.standard_error**2
        squared = ((after.mean - before.mean) ** 2 - known) / 2.0
        total += min(max(squared, 0.0), 9.0 * total / weight)
        weight += 1.0
    return _SCATTER_FACTOR * math.sqrt(total / weight)


def _baseline(
    earlier: Sequence[WindowLoss], promised: WindowLoss, scatter: float
) -> tuple[Baseline, float, float]:
    """Give the lower baseline: which one, its level, and how high the level may be within its uncertainty.

    The best of several levels is the best by luck, too: each gets its share of the risk.
    """
    reach = NormalDist().inv_cdf(1.0 - _BASELINE_RISK)
    best: tuple[Baseline, float, float] = (
        "promised",
        promised.mean,
        promised.mean + reach * promised.standard_error,
    )
    stretches = len(earlier) - _LEVEL_WINDOWS + 1
    if stretches < 1:
        return best
    reach = NormalDist().inv_cdf(1.0 - _BASELINE_RISK / stretches)
    for start in range(stretches):
        stretch = earlier[start : start + _LEVEL_WINDOWS]
        means = np.array([window.mean for window in stretch])
        errors = np.array([math.hypot(window.standard_error, scatter) for window in stretch])
        level, error = float(means.mean()), float(np.sqrt(np.sum(errors**2))) / len(stretch)
        if np.all(errors > 0.0) and not _stable(means, errors):
            continue
        if level + reach * error < best[2]:
            best = ("earlier", level, level + reach * error)
    return best


def _stable(means: Array, errors: Array) -> bool:
    """Tell whether windows may have one level (chi-square of heterogeneity, at 2.5 %).

    Source: Cochran, "The combination of estimates from different experiments", Biometrics 10, 1954.
    """
    from scipy.special import chdtrc

    weights = 1.0 / errors**2
    center = np.sum(weights * means) / np.sum(weights)
    return bool(chdtrc(len(means) - 1, np.sum(weights * (means - center) ** 2)) >= _BASELINE_RISK)


def _report(windows: Sequence[WindowLoss], state: _State, rules: ChangePolicy) -> ChangeReport:
    threshold = 1.0 / rules.false_alarm_rate
    changed = state.evidence >= threshold
    worse = windows[state.since :]
    level = float(np.mean([window.mean for window in worse]))
    relative = (level - state.baseline_level) / (abs(state.baseline_level) or 1.0)
    words = {"promised": "what was promised at training", "earlier": "the best earlier level"}[state.baseline]
    if changed:
        now, before = figures(level, state.baseline_level)
        reason = (
            f"changed: mean loss {now} in {len(worse)} window{'s' if len(worse) > 1 else ''} since "
            f"{worse[0].label}, {relative:.0%} worse than {words} ({before})"
        )
    else:
        reason = f"no lasting change: evidence {state.evidence:.2g} to 1 against {words}, {threshold:.0f} to 1 needed"
    return ChangeReport(
        changed=changed,
        evidence=state.evidence,
        threshold=threshold,
        baseline=state.baseline,
        baseline_level=state.baseline_level,
        level=level if changed else None,
        relative_change=relative if changed else None,
        since=worse[0].label if changed else None,
        window_count=len(worse) if changed else 0,
        reason=reason,
    )
