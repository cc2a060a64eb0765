"""Canary analysis: whether a new version does worse than the stable one, from what both did in the same minutes.

Which version answers a request is drawn by lot, so the two are compared as in a randomized trial: what happened in those minutes
(a slow disk, a burst of requests) happened to both. Every test is one-sided and asks for a difference beyond what is tolerated: a version that is exactly as bad as is
tolerated is stopped by chance alone. The probability that any test in any look of a whole rollout does so is bounded by one figure,
which is divided evenly (Bonferroni, "Il calcolo delle assicurazioni", 1935): nothing is assumed of how the tests depend on each
other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from airflow_mlops.core.rollouts.mean_losses import (
    EstimatedLoss,
    Losses,
    PairedLosses,
    larger_of_pairs,
    larger_of_two,
)
from airflow_mlops.core.rollouts.observations import (
    TIME_GROWTH,
    AnswerCells,
    Observations,
    VersionObservations,
    time_quantile,
)
from airflow_mlops.core.rollouts.two_samples import more_often, rank_test

Array = NDArray[Any]

#: What is compared; each takes its part of the probability of a false alarm.
METRICS = ("errors", "latency", "slowest", "answers", "quality")

#: A mirror answers in what time the traffic leaves it: only one that takes so much longer, as a share, is slow.
MIRROR_LATENCY = 1.0

#: ``worse``: by more than is tolerated, beyond chance. ``no data``: too little to tell, which is never a pass.
Judgement = Literal["fine", "worse", "no data"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CanaryPolicy:
    """What is tolerated of a new version.

    :param minimum_requests: that each version has to answer; with fewer there is no data.
    :param significance: probability that a version within these tolerances is stopped in a whole rollout, at most.
    :param error_tolerance: how much larger the share of failed requests may be.
    :param latency_tolerance: how much longer a typical request may take, as a share.
    :param slowest_tolerance: how much larger the share of requests may be that take longer than the stable version's slowest
        hundredth; by definition its own share is .01.
    :param answer_tolerance: largest distance between the distributions of answers, in ``[0, 1]``: Kolmogorov and Smirnov's for
        numbers, total variation for labels. A new model is there to answer differently, so this is wide. ``None``: they are not
        compared.
    :param quality_tolerance: how much larger the mean loss may be, as a share of the stable version's.
    :param estimates: whether an estimate of both mean losses may stop a rollout, as long as labels are missing.
    :param win_significance: probability that a version that is not better wins an A/B test.
    :param split_significance: probability that a split as asked for is taken for another one, in a whole rollout.
    """

    minimum_requests: int = 200
    significance: float = 0.02
    error_tolerance: float = 0.005
    latency_tolerance: float = 0.25
    slowest_tolerance: float = 0.02
    answer_tolerance: float | None = 0.3
    quality_tolerance: float = 0.05
    estimates: bool = True
    win_significance: float = 0.05
    split_significance: float = 0.001


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What one comparison found.

    :param metric: what was compared: one of :data:`METRICS`, ``split``, ``estimate``, or ``deaths``.
    :param judgement: the verdict on it.
    :param stable: figure of the stable version.
    :param new: figure of the new one.
    :param p_value: probability of so large a difference to the new version's disadvantage, by chance.
    :param better_p_value: likewise to its advantage, where that is asked for.
    :param sentence: the same in words.
    """

    metric: str
    judgement: Judgement
    stable: float | None = None
    new: float | None = None
    p_value: float | None = None
    better_p_value: float | None = None
    sentence: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Analysis:
    """One look at two versions.

    :param judgement: ``worse`` when anything is, else ``no data`` when anything is missing that has to be there.
    :param findings: by metric.
    :param sentence: what decided.
    """

    judgement: Judgement
    findings: tuple[Finding, ...]
    sentence: str


def analyze(
    seen: Observations,
    *,
    stable: str,
    new: str,
    policy: CanaryPolicy,
    looks: int,
    most_looks: int | None = None,
    share: float | None = None,
    sticky: bool = False,
    losses: tuple[Losses, Losses] | PairedLosses | None = None,
    estimates: tuple[EstimatedLoss, EstimatedLoss] | None = None,
) -> Analysis:
    """Compare two versions.

    As long as one of them has not answered enough, only failures and the split are judged: those looks come on top of the planned ones.

    :param seen: what both did in the same minutes.
    :param stable: version that was served before.
    :param new: version that is to replace it.
    :param looks: how often one looks in the whole rollout at versions that have answered enough.
    :param most_looks: how often one looks at all, at most; default the same.
    :param share: of the requests that the new version was to answer; ``None`` where every request goes to both.
    :param sticky: whoever asks again is answered by the same version, so that one request of each caller counts.
    :param losses: of the stable and the new version, where labels are expected; paired where every request goes to both.
    :param estimates: likewise, without labels: they stop a version that is plainly worse, and are no proof that one is not.
    """
    of = seen.of_callers if sticky else seen.of
    before, after = of(stable), of(new)
    level = policy.significance / (len(METRICS) * looks)
    always = most_looks or looks
    findings = [_compare_errors(before, after, policy, policy.significance / (len(METRICS) * always))]
    if share is not None:
        findings.insert(0, _check_split(before, after, share, policy, always))
    losses_level = level
    if estimates is not None:
        # Both are tests of quality, and share what is its part.
        losses_level = level / 2.0
        findings += _compare_estimates(
            estimates, losses, policy, policy.significance / (len(METRICS) * always) / 2.0
        )
    compared = [
        _compare_times(before, after, policy, level, MIRROR_LATENCY if share is None else None),
        *([_compare_slowest(before, after, policy, level)] if share is not None else []),
        *(
            [_compare_answers(before, after, policy, level, seen.cells)]
            if policy.answer_tolerance is not None
            else []
        ),
        *([compare_losses(losses, policy, losses_level)] if losses is not None else []),
    ]
    if any(one.judgement == "no data" for one in (*findings, *compared)):
        compared = [one if one.judgement == "no data" else _not_yet(one) for one in compared]
    findings += compared
    deaths = find_deaths(seen.died, new)
    findings += [deaths] if deaths is not None else []
    worse = [one for one in findings if one.judgement == "worse"]
    missing = [one for one in findings if one.judgement == "no data"]
    judgement: Judgement = "worse" if worse else "no data" if missing else "fine"
    said = worse or missing or findings
    return Analysis(
        judgement=judgement, findings=tuple(findings), sentence="; ".join(one.sentence for one in said)
    )


def find_deaths(died: Sequence[Sequence[str]], new: str) -> Finding | None:
    """Blame a version for workers that died while it computed: they took the requests of both versions with them, and nobody counted these.

    One is enough: a worker that is killed by somebody else seldom is in the middle of an answer, as most of them take a millisecond. Where
    both versions were at work nobody knows which it was, and the new one has yet to prove itself.

    :param died: workers that died, each by the versions whose answers it computed.
    :param new: the new version.
    """
    own = sum(new in versions for versions in died)
    others = len(died) - own
    if own <= others:
        return None
    said = f"workers died while they computed answers, {own} with the new version at work and {others} with the stable one alone"
    return Finding(metric="deaths", judgement="worse", stable=float(others), new=float(own), sentence=said)


def _not_yet(finding: Finding) -> Finding:
    return Finding(
        metric=finding.metric, judgement="no data", sentence=f"{finding.metric} waits for the others"
    )


def _check_split(
    before: VersionObservations,
    after: VersionObservations,
    share: float,
    policy: CanaryPolicy,
    looks: int,
) -> Finding:
    """See whether the split is as asked for: by the exact binomial test.

    A request that its version refused was drawn for it all the same: where one of the two refuses more, what is left is split otherwise.
    """
    drawn = after.requests + after.refused
    total = before.requests + before.refused + drawn
    observed = drawn / total if total else 0.0
    said = f"the new version was given {drawn} of {total} ({observed:.1%}), asked for {share:.1%}"
    if total < policy.minimum_requests:
        return Finding(metric="split", judgement="no data", new=observed, sentence=f"{said}: too few to tell")
    p_value = float(stats.binomtest(drawn, total, share).pvalue)
    off = p_value < policy.split_significance / looks
    return Finding(
        metric="split",
        judgement="worse" if off else "fine",
        stable=share,
        new=observed,
        p_value=p_value,
        sentence=f"{said}: traffic is not split as asked" if off else said,
    )


def _compare_errors(
    before: VersionObservations, after: VersionObservations, policy: CanaryPolicy, level: float
) -> Finding:
    """Compare shares of failed requests; it holds for any number of them, so it may stop a rollout early."""
    if min(before.requests, after.requests) == 0:
        return _no_data("errors", before, after, policy)
    shares = before.failed / before.requests, after.failed / after.requests
    p_value = more_often(
        (before.failed, before.requests), (after.failed, after.requests), tolerance=policy.error_tolerance
    )
    said = f"{shares[1]:.2%} of the new version's requests failed, {shares[0]:.2%} of the stable one's"
    if p_value >= level and not _enough(before, after, policy):
        return _no_data("errors", before, after, policy)
    return _judged("errors", shares, p_value, level, said)


def _compare_times(
    before: VersionObservations,
    after: VersionObservations,
    policy: CanaryPolicy,
    level: float,
    at_least: float | None,
) -> Finding:
    """Compare the time requests take: by Mann and Whitney's test against the stable version's times made longer by the tolerance.

    Source: Mann and Whitney, Annals of Mathematical Statistics 18, 1947; the ratio is Hodges and Lehmann's estimate, ibid. 34, 1963.
    The normal approximation with its correction for ties: times are known by cell.
    """
    if not _enough(before, after, policy):
        return _no_data("latency", before, after, policy)
    tolerance = max(policy.latency_tolerance, at_least or 0.0)
    one, other = np.asarray(before.times), np.asarray(after.times)
    longer = round(math.log(1.0 + tolerance) / math.log(TIME_GROWTH))
    shifted = np.concatenate([np.zeros(longer, dtype=one.dtype), one])
    p_value, _ = rank_test(shifted, np.concatenate([other, np.zeros(longer, dtype=other.dtype)]))
    _, ratio = rank_test(one, other)
    medians = time_quantile(before.times, 0.5), time_quantile(after.times, 0.5)
    said = (
        f"a request takes the new version {ratio:.2f} times as long "
        f"(median {1e3 * medians[1]:.3g} ms, stable {1e3 * medians[0]:.3g} ms)"
    )
    return _judged("latency", medians, p_value, level, said)


def _compare_slowest(
    before: VersionObservations, after: VersionObservations, policy: CanaryPolicy, level: float
) -> Finding:
    """Compare how many requests take longer than the stable version's slowest hundredth."""
    if not _enough(before, after, policy):
        return _no_data("slowest", before, after, policy)
    one, other = np.asarray(before.times), np.asarray(after.times)
    beyond = int(np.searchsorted(np.cumsum(one), 0.99 * one.sum())) + 1
    slow, counts = (int(one[beyond:].sum()), int(other[beyond:].sum())), (int(one.sum()), int(other.sum()))
    shares = slow[0] / counts[0], slow[1] / counts[1]
    p_value = more_often((slow[0], counts[0]), (slow[1], counts[1]), tolerance=policy.slowest_tolerance)
    limit = 1e3 * time_quantile(before.times, 0.99)
    said = f"{shares[1]:.1%} of the new version's requests take over {limit:.3g} ms, {shares[0]:.1%} of the stable one's"
    return _judged("slowest", shares, p_value, level, said)


def _compare_answers(
    before: VersionObservations,
    after: VersionObservations,
    policy: CanaryPolicy,
    level: float,
    cells: AnswerCells,
) -> Finding:
    """Compare what is answered to one row of each request; the bounds hold for any number.

    Source: Massart, "The tight constant in the Dvoretzky-Kiefer-Wolfowitz inequality", Annals of Probability 18, 1990 (numbers);
    Weissman et al., "Inequalities for the L1 deviation of the empirical distribution", HP Laboratories, 2003 (labels).
    """
    tolerated = policy.answer_tolerance or 0.0
    if cells.count == 1:
        said = (
            "answers can't be compared: the stable version's package does not say how its own were distributed; train it again, or "
            "give answer_tolerance=None"
        )
        return Finding(metric="answers", judgement="no data", sentence=said)
    if not _enough(before, after, policy):
        return _no_data("answers", before, after, policy)
    one, other = (np.asarray(side.answers) / sum(side.answers) for side in (before, after))
    counts = [sum(side.answers) for side in (before, after)]
    if cells.labels:
        distance = float(np.abs(one - other).sum() / 2.0)
        kinds = 2.0 ** int(((one + other) > 0.0).sum())
    else:
        distance = float(np.abs(np.cumsum(one) - np.cumsum(other)).max())
        kinds = 0.0
    beyond = max(0.0, distance - tolerated)
    if kinds:
        p_value = sum(kinds * math.exp(-count * beyond**2 / 2.0) for count in counts)
    else:
        p_value = 2.0 * math.exp(-2.0 * beyond**2 / (counts[0] ** -0.5 + counts[1] ** -0.5) ** 2)
        p_value *= 2.0
    said = f"the answers of both versions are {distance:.2f} apart, at most {tolerated:g} is tolerated"
    return _judged("answers", (0.0, distance), min(1.0, p_value), level, said)


def compare_losses(
    losses: tuple[Losses, Losses] | PairedLosses, policy: CanaryPolicy, level: float
) -> Finding:
    """Compare mean losses, by Welch's test of a difference beyond the tolerance; of the same requests by the paired one.

    :param losses: of the stable and the new version; paired where every request went to both.
    :param level: probability that a version within the tolerance is found worse.
    """
    paired = isinstance(losses, PairedLosses)
    before, after = (losses.stable, losses.new) if isinstance(losses, PairedLosses) else losses
    larger = larger_of_pairs(losses) if isinstance(losses, PairedLosses) else larger_of_two(before, after)
    left_out = _told_left_out(before, after)
    if min(before.count, after.count) < policy.minimum_requests:
        return Finding(
            metric="quality",
            judgement="no data",
            sentence=(
                f"{after.count} requests that both versions answered have labels, {policy.minimum_requests} are needed"
                if paired
                else f"{after.count} requests or callers of the new version have labels and {before.count} of the stable one, "
                f"{policy.minimum_requests} each are needed"
            )
            + left_out,
        )
    worse = larger("new", 1.0 + policy.quality_tolerance)
    return Finding(
        metric="quality",
        judgement="worse" if worse < level else "fine",
        stable=before.mean,
        new=after.mean,
        p_value=worse,
        better_p_value=larger("stable", 1.0),
        sentence=f"the new version's mean loss is {after.mean:.4g}, the stable one's {before.mean:.4g}"
        + (f", on the same {after.count} requests" if paired else "")
        + left_out,
    )


def _told_left_out(stable: Losses, new: Losses) -> str:
    """Say how many labelled answers count for nothing: a version that often answers so is not as good as the others say."""
    if not stable.left_out + new.left_out:
        return ""
    return (
        f"; {new.left_out} answers of the new version and {stable.left_out} of the stable one are left out: the label or the answer "
        "is no finite number, or too large"
    )


def _compare_estimates(
    estimates: tuple[EstimatedLoss, EstimatedLoss],
    losses: tuple[Losses, Losses] | PairedLosses | None,
    policy: CanaryPolicy,
    level: float,
) -> list[Finding]:
    """Compare what both versions are estimated to lose, where labels do not tell yet.

    Their ratio is tested, on the scale of its logarithm: an estimate is off by a share of itself. How far is known from a few stretches
    of held-out rows only, so Student's distribution with as few degrees of freedom asks for many times that. That there is no
    estimate is not missing data: nothing has to be estimated.
    """
    stable, new = estimates
    sides = (
        () if losses is None else (losses.stable, losses.new) if isinstance(losses, PairedLosses) else losses
    )
    known = bool(sides) and min(side.count for side in sides) >= policy.minimum_requests
    few = min(stable.count, new.count) < policy.minimum_requests
    if known or few or min(stable.mean, new.mean) <= 0.0:
        return []
    gap = math.log(new.mean / (stable.mean * (1.0 + policy.quality_tolerance)))
    deviation = math.hypot(new.deviation / new.mean, stable.deviation / stable.mean)
    freedom = min(stable.folds, new.folds) - 1
    p_value = float(stats.t.sf(gap / deviation, freedom)) if deviation > 0.0 else float(gap <= 0.0)
    said = (
        f"without labels, the new version's mean loss ({new.metric}) is estimated to be {new.mean:.4g} (sd {new.deviation:.2g}), the "
        f"stable one's {stable.mean:.4g} (sd {stable.deviation:.2g})"
    )
    return [_judged("estimate", (stable.mean, new.mean), p_value, level, said)]


def clearly_better(analysis: Analysis, policy: CanaryPolicy) -> bool:
    """Tell whether labels show, beyond chance, that the new version is better; without labels nothing does."""
    found = next((one for one in analysis.findings if one.metric == "quality"), None)
    return (
        found is not None
        and found.better_p_value is not None
        and found.better_p_value < policy.win_significance
    )


def _enough(before: VersionObservations, after: VersionObservations, policy: CanaryPolicy) -> bool:
    return all(side.requests - side.failed >= policy.minimum_requests for side in (before, after))


def _judged(
    metric: str, figures: tuple[float, float], p_value: float, level: float, sentence: str
) -> Finding:
    return Finding(
        metric=metric,
        judgement="worse" if p_value < level else "fine",
        stable=float(figures[0]),
        new=float(figures[1]),
        p_value=p_value,
        sentence=sentence,
    )


def _no_data(
    metric: str, before: VersionObservations, after: VersionObservations, policy: CanaryPolicy
) -> Finding:
    return Finding(
        metric=metric,
        judgement="no data",
        sentence=f"{metric}: the new version answered {after.requests - after.failed} requests and the stable one "
        f"{before.requests - before.failed}, {policy.minimum_requests} each are needed",
    )
