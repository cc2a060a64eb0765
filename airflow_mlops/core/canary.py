"""Canary analysis: whether a new version does worse than the stable one, from what both did in the same minutes.

Which version answers a request is drawn by lot, so the two are compared as in a randomized trial: what happened in those minutes
(a slow disk, a burst of requests) happened to both. Every test is one-sided and asks for a difference beyond what is tolerated: a version that is exactly as bad as is
tolerated is stopped by chance alone. The probability that any test in any look of a whole rollout does so is bounded by one figure,
which is divided evenly (Bonferroni, "Il calcolo delle assicurazioni", 1935): nothing is assumed of how the tests depend on each
other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from airflow_mlops.core.observations import (
    TIME_GROWTH,
    AnswerCells,
    Observations,
    VersionObservations,
    time_quantile,
)

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
class Losses:
    """Losses of one version's answers whose labels have arrived.

    :param count: how many were drawn by lot: requests, or callers who stay with their version.
    :param mean: mean loss of a row.
    :param variance: ``count`` times the variance of that mean; of rows that were drawn one by one that of their losses.
    """

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedLosses:
    """Losses of both versions on the same requests: what is hard for one is mostly so for the other, and cancels out.

    :param stable: of the stable version.
    :param new: of the new one.
    :param covariance: ``count`` times the covariance of the two means.
    :param one_wrong: where answers are right or wrong and each row was asked for by itself: on how many the stable version alone was
        wrong, and the new one alone; ``None`` otherwise.
    """

    stable: Losses = Losses()
    new: Losses = Losses()
    covariance: float = 0.0
    one_wrong: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimatedLoss:
    """A mean loss that was estimated without labels.

    :param metric: it is of.
    :param count: how many were drawn by lot among what it was estimated for.
    :param mean: mean loss of a row.
    :param deviation: standard deviation of the estimate about what will turn out.
    :param folds: stretches of held-out rows that this is known from.
    """

    metric: str
    count: int
    mean: float
    deviation: float
    folds: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What one comparison found.

    :param metric: what was compared: one of :data:`METRICS`, ``split``, or ``estimate``.
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
    :param sticky: whoever asks again is answered by the same version, so that callers count, not requests.
    :param losses: of the stable and the new version, where labels are expected; paired where every request goes to both.
    :param estimates: likewise, without labels: they stop a version that is plainly worse, and are no proof that one is not.
    """
    before, after = seen.of(stable), seen.of(new)
    if sticky:
        before, after = per_caller(before), per_caller(after)
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
    worse = [one for one in findings if one.judgement == "worse"]
    missing = [one for one in findings if one.judgement == "no data"]
    judgement: Judgement = "worse" if worse else "no data" if missing else "fine"
    said = worse or missing or findings
    return Analysis(
        judgement=judgement, findings=tuple(findings), sentence="; ".join(one.sentence for one in said)
    )


def per_caller(seen: VersionObservations) -> VersionObservations:
    """Count callers instead of their requests: each of them was drawn by lot once, however often he asks."""
    if seen.requests == 0:
        return seen
    share = min(1.0, seen.callers / seen.requests)

    def scaled(counts: tuple[int, ...]) -> tuple[int, ...]:
        ends = np.round(np.cumsum(np.asarray(counts, dtype=np.float64)) * share)
        return tuple(int(count) for count in np.diff(ends, prepend=0.0))

    failed, answered = round(seen.failed * share), round((seen.requests - seen.failed) * share)
    return replace(
        seen,
        requests=failed + answered,
        failed=failed,
        rows=round(seen.rows * share),
        times=scaled(seen.times),
        answers=scaled(seen.answers),
    )


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
    """See whether the split is as asked for: by the exact binomial test."""
    total = before.requests + after.requests
    observed = after.requests / total if total else 0.0
    said = f"the new version answered {after.requests} of {total} ({observed:.1%}), asked for {share:.1%}"
    if total < policy.minimum_requests:
        return Finding(metric="split", judgement="no data", new=observed, sentence=f"{said}: too few to tell")
    p_value = float(stats.binomtest(after.requests, total, share).pvalue)
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
    """Compare what is answered, rows of one request counting as one; the bounds hold for any number.

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
    counts = [min(side.requests - side.failed, side.rows) for side in (before, after)]
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

    Source: Welch, Biometrika 34, 1947.

    :param losses: of the stable and the new version; paired where every request went to both.
    :param level: probability that a version within the tolerance is found worse.
    """
    paired = isinstance(losses, PairedLosses)
    before, after = (losses.stable, losses.new) if isinstance(losses, PairedLosses) else losses
    larger = _larger_of_pairs(losses) if isinstance(losses, PairedLosses) else _larger_of_two(before, after)
    if min(before.count, after.count) < policy.minimum_requests:
        return Finding(
            metric="quality",
            judgement="no data",
            sentence=f"{after.count} requests that both versions answered have labels, {policy.minimum_requests} are needed"
            if paired
            else f"{after.count} requests or callers of the new version have labels and {before.count} of the stable one, "
            f"{policy.minimum_requests} each are needed",
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
        + (f", on the same {after.count} requests" if paired else ""),
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


def losses_of(losses: Array, drawn: Sequence[Any]) -> Losses:
    """Sum up the losses of rows of which several were drawn together: all of a request, or all of a caller.

    The variance is that of a ratio of sums, by its linearization.

    Source: Cochran, "Sampling Techniques", 3rd edition, 1977, section 6.3 (ratio estimates), of clusters of unequal sizes.

    :param losses: one per row, shape ``(n,)``.
    :param drawn: what each row was drawn with; ``None`` and the empty text: by itself.
    """
    mean, deviations = _deviations(losses, _clusters(drawn))
    return Losses(count=len(deviations), mean=mean, variance=_spread(deviations, deviations))


def paired_losses_of(stable: Array, new: Array, drawn: Sequence[Any]) -> PairedLosses:
    """Sum up the losses of rows that both versions answered; otherwise like :func:`losses_of`.

    :param stable: of the stable version, one per row, shape ``(n,)``.
    :param new: of the new one, on the same rows.
    :param drawn: what each row was drawn with.
    """
    clusters = _clusters(drawn)
    (before, stable_off), (after, new_off) = _deviations(stable, clusters), _deviations(new, clusters)
    count, each = len(stable_off), len(stable_off) == len(stable)
    binary = each and bool(np.isin(stable, (0.0, 1.0)).all() and np.isin(new, (0.0, 1.0)).all())
    return PairedLosses(
        stable=Losses(count=count, mean=before, variance=_spread(stable_off, stable_off)),
        new=Losses(count=count, mean=after, variance=_spread(new_off, new_off)),
        covariance=_spread(stable_off, new_off),
        one_wrong=(int((stable > new).sum()), int((new > stable).sum())) if binary else None,
    )


def _clusters(drawn: Sequence[Any]) -> Array:
    """Give each row the number of what it was drawn with, shape ``(n,)``."""
    names = [f"#{row}" if name is None or name == "" else f"={name}" for row, name in enumerate(drawn)]
    return np.unique(names, return_inverse=True)[1]


def _deviations(losses: Array, clusters: Array) -> tuple[float, Array]:
    """Give the mean loss of a row, and by how much each cluster moves it: as many times as there are clusters."""
    sizes, sums = np.bincount(clusters), np.bincount(clusters, weights=losses)
    mean = float(losses.mean())
    return mean, (sums - mean * sizes) / float(sizes.mean())


def _spread(one: Array, other: Array) -> float:
    return float((one * other).sum()) / (len(one) - 1) if len(one) > 1 else 0.0


def clearly_better(analysis: Analysis, policy: CanaryPolicy) -> bool:
    """Tell whether labels show, beyond chance, that the new version is better; without labels nothing does."""
    found = next((one for one in analysis.findings if one.metric == "quality"), None)
    return (
        found is not None
        and found.better_p_value is not None
        and found.better_p_value < policy.win_significance
    )


#: Gives the probability that the mean of the named version exceeds ``margin`` times that of the other so far, if it does not.
_Larger = Callable[[Literal["stable", "new"], float], float]


def _larger_of_two(stable: Losses, new: Losses) -> _Larger:
    def larger(which: Literal["stable", "new"], margin: float) -> float:
        one, other = (new, stable) if which == "new" else (stable, new)
        own, others = one.variance / one.count, margin**2 * other.variance / other.count
        gap = one.mean - margin * other.mean
        if own + others == 0.0:
            return 0.0 if gap > 0.0 else 1.0
        freedom = (own + others) ** 2 / (own**2 / (one.count - 1) + others**2 / (other.count - 1))
        return float(stats.t.sf(gap / math.sqrt(own + others), freedom))

    return larger


def _larger_of_pairs(losses: PairedLosses) -> _Larger:
    """Test the differences by Student's test; of answers that are right or wrong, by McNemar's exact one as well: the larger of both.

    Source: Student, "The probable error of a mean", Biometrika 6, 1908; McNemar, "Note on the sampling error of the difference between
    correlated proportions or percentages", Psychometrika 12, 1947.
    """

    def larger(which: Literal["stable", "new"], margin: float) -> float:
        one, other = (losses.new, losses.stable) if which == "new" else (losses.stable, losses.new)
        gap = one.mean - margin * other.mean
        variance = one.variance + margin**2 * other.variance - 2.0 * margin * losses.covariance
        exact = 0.0
        if losses.one_wrong is not None:
            others_wrong, own_wrong = losses.one_wrong if which == "new" else losses.one_wrong[::-1]
            exact = float(stats.binom.sf(own_wrong - 1, others_wrong + own_wrong, 0.5))
        if variance <= 1e-12 * (one.variance + other.variance):
            return exact if gap > 0.0 else 1.0
        return max(exact, float(stats.t.sf(gap / math.sqrt(variance / one.count), one.count - 1)))

    return larger


def rank_test(one: Array, other: Array) -> tuple[float, float]:
    """Test whether the second of two samples, known by cell, lies above the first.

    :param one: counts by cell of time, shape ``(k,)``.
    :param other: likewise.
    :returns: one-sided p-value, and how many times as long the second takes: the median over all pairs.
    """
    counts = int(one.sum()), int(other.sum())
    below = np.concatenate([[0], np.cumsum(one)[:-1]])
    statistic = float((other * (below + one / 2.0)).sum())
    total = counts[0] + counts[1]
    ties = (one + other).astype(np.float64)
    variance = (
        counts[0] * counts[1] / 12.0 * (total + 1 - (ties**3 - ties).sum() / (total * (total - 1.0)))
        if total > 1
        else 0.0
    )
    mean = counts[0] * counts[1] / 2.0
    p_value = float(stats.norm.sf((statistic - mean) / math.sqrt(variance))) if variance > 0.0 else 1.0
    pairs = np.correlate(other.astype(np.float64), one.astype(np.float64), mode="full")
    distances = np.arange(-(len(one) - 1), len(other))
    median = distances[int(np.searchsorted(np.cumsum(pairs), pairs.sum() / 2.0))]
    return p_value, float(TIME_GROWTH**median)


def more_often(stable: tuple[int, int], new: tuple[int, int], *, tolerance: float) -> float:
    """Give the probability that so many more of the new requests are counted, if their share is larger by the tolerance only.

    The larger of two: Fisher's exact one without any tolerance, which holds for any number of requests, and the one at which
    Newcombe's interval of the difference begins at the tolerance.

    Source: Fisher, "Statistical Methods for Research Workers", 5th edition, 1934, section 21.02; Newcombe, "Interval estimation for
    the difference between independent proportions", Statistics in Medicine 17, 1998, method 10.

    :param stable: how many are counted, and of how many.
    :param new: likewise.
    """
    (counted, count), (new_counted, new_count) = stable, new
    exact = float(stats.hypergeom.sf(new_counted - 1, count + new_count, counted + new_counted, new_count))
    gap = new_counted / new_count - counted / count
    if gap <= tolerance:
        return max(exact, 0.5)
    low, high = 0.0, 40.0
    for _ in range(50):  # the level at which the interval begins at the tolerance, by bisection
        middle = (low + high) / 2.0
        below = new_counted / new_count - _wilson(new_counted, new_count, -middle)
        above = _wilson(counted, count, middle) - counted / count
        low, high = (middle, high) if gap - math.hypot(below, above) > tolerance else (low, middle)
    return max(exact, float(stats.norm.sf(low)))


def _wilson(counted: int, count: int, deviations: float) -> float:
    """Give an end of Wilson's interval of a share, so many standard deviations off.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22, 1927.
    """
    share, square = counted / count, deviations**2
    spread = math.sqrt(share * (1.0 - share) / count + square / (4.0 * count**2))
    return (share + square / (2.0 * count) + deviations * spread) / (1.0 + square / count)


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
