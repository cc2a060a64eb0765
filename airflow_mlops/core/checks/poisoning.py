"""Poisoning: whether the labels of a new partition fit its features as well as those of trusted partitions do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from airflow_mlops.core.comparison.resampling import require_level
from airflow_mlops.core.comparison.slices import cut_column

Array = NDArray[Any]

#: What a partition is held for: the labels and what its own rows say of them, or also a relation that trusted partitions contradict.
HoldOn = Literal["noise", "noise_or_relation"]
#: ``undecided``: too few trusted partitions or rows, or the screen could not have seen what it is to see.
Verdict = Literal["enters", "held", "undecided"]

#: Share of the regression rows of all partitions together that count as contradicted (rule of thumb).
_TAIL = 0.05
#: Wrong labels that are put into trusted partitions to see how many are contradicted, and the fewest per wrong one that say anything.
DOSE, _LEAST_GAIN = 0.1, 0.2
#: How many times as far from the median as the farthest trusted value chance may be: of rates, gaps, and of distances, whose tails
#: are longer (rules of thumb, by simulation).
_CHANCE = (2.0, 2.0, 4.0)
#: Standard errors from which a slice is shown, and how many are.
_CLEAR, SHOWN_SLICES = 4.0, 5


@dataclass(frozen=True, kw_only=True, slots=True)
class PoisoningPolicy:
    """What a new partition is held for, and how often one is where nothing is wrong.

    :param false_alarm_rate: chance that a partition is held that comes from the same source as the trusted ones, by all tests
        together; at least ``1 / false_alarm_rate - 1`` of these are needed.
    :param tolerated_share: share of wrong labels that may enter, in ``[0, 1)``; a partition is held where there are surely more.
    :param detectable_share: share of wrong labels the screen has to be able to see, at random or overwritten with any one value;
        where it could not, it is undecided. Rule of thumb: from a tenth on, most models become visibly worse.
    :param trusted_partitions: how many windows before the new one are taken, at most.
    :param rows_per_partition: rows of each that are compared, evenly over its time; of the new one all are looked at for evidence.
    :param minimum_rows: smaller partitions are not compared (rule of thumb: their rates say little).
    :param hold_on: ``noise``: labels that contradict rows of their own partition, or hardly any, and labels that are distributed unlike
        those of every trusted partition; a change of concept that leaves their shares raises no alarm.
        ``noise_or_relation``: also where a model of the trusted partitions contradicts the labels more than the partition's own
        does: targeted poisoning, or a true change of concept.
    """

    false_alarm_rate: float = 0.05
    tolerated_share: float = 0.0
    detectable_share: float = 0.1
    trusted_partitions: int = 39
    rows_per_partition: int = 5000
    minimum_rows: int = 200
    hold_on: HoldOn = "noise"

    def __post_init__(self) -> None:
        require_level("false_alarm_rate", self.false_alarm_rate)
        for name in ("tolerated_share", "detectable_share"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} is a share of labels in [0, 1), got {getattr(self, name)}")
        if self.hold_on not in ("noise", "noise_or_relation"):
            raise ValueError(f"unknown hold_on {self.hold_on!r}; known: noise, noise_or_relation")
        if min(self.trusted_partitions, self.minimum_rows) < 1 or self.rows_per_partition < self.minimum_rows:
            raise ValueError(
                f"trusted_partitions={self.trusted_partitions}, minimum_rows={self.minimum_rows}, "
                f"rows_per_partition={self.rows_per_partition}: give numbers from 1 on, the last not below the second"
            )

    @property
    def needed_partitions(self) -> int:
        """Give the fewest trusted partitions with which a test at this level can say no.

        >>> PoisoningPolicy().needed_partitions
        19
        """
        return math.ceil(1.0 / self.false_alarm_rate - 1e-9) - 1


class Direction(NamedTuple):
    """A way in which labels are wrong.

    :param name: such as ``at random`` or ``all 0``.
    :param gains: contradicted labels per wrong one, each measured on another trusted partition; none where it was not measured.
    :param visible: share of labels from which their distribution alone tells, half of the time; 1: none.
    :param possible: share of the new partition's labels that may be wrong in this way, by their distribution alone.
    :param most: share of the labels that can be wrong in this way at most.
    """

    name: str
    gains: tuple[float, ...] = ()
    visible: float = 1.0
    possible: float = 1.0
    most: float = 1.0

    @property
    def gain(self) -> float:
        return float(np.mean(self.gains)) if self.gains else math.nan

    def share_of(self, excess: float, *, at_most: bool = False) -> float:
        """Give the share of wrong labels that makes so many more contradicted; 1 where they hardly make any.

        :param at_most: by the smallest of the gains.
        """
        if not self.gain >= _LEAST_GAIN:
            return 1.0
        gain = max(_LEAST_GAIN, min(self.gains)) if at_most else self.gain
        return min(1.0, max(0.0, excess / gain))


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelNoise:
    """How many labels of a partition are wrong, as far as its own rows tell.

    :param rate: share of its labels that a model of its other rows contradicts.
    :param trusted_rate: median of that share over the trusted partitions.
    :param p_value: see :func:`conformal_p_value`; of this share alone.
    :param share: estimated share of wrong labels, were they wrong at random; ``None`` where the labels themselves are others than
        usual, or easier to answer, so that the estimate means nothing.
    :param interval: of the share of wrong labels, at random or overwritten with any one value; up to 1 where there is no estimate.
    :param confidence: chance that the interval holds the share, where a clean partition is like the trusted ones.
    :param detectable_share: share of wrong labels from which the screen says no half of the time, in the direction where it sees least.
    :param detectable_by: the same for each direction: labels that are wrong at random, or overwritten with one value; 1: none is seen.
    """

    rate: float
    trusted_rate: float
    p_value: float
    share: float | None
    interval: tuple[float, float]
    confidence: float
    detectable_share: float
    detectable_by: dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Relation:
    """Whether the relation of label and features is another one than in the trusted partitions.

    :param gap: share of labels that a model of other partitions contradicts, less the share that one of its own does.
    :param trusted_gap: median over the trusted partitions.
    :param p_value: see :func:`conformal_p_value`; of this gap alone.
    :param changed: the p-value is at most the false-alarm rate.
    """

    gap: float
    trusted_gap: float
    p_value: float
    changed: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelShift:
    """Whether the labels are distributed as in a trusted partition, whatever the features are.

    :param distance: Hellinger distance of the shares of classes, or of ten ranges of numbers, to the trusted partition most like it.
    :param trusted_distance: median over the trusted partitions.
    :param p_value: see :func:`conformal_p_value`; of this distance alone.
    :param changed: the labels are others than the screen lets enter.
    :param missing: classes that every trusted partition has and this one has not.
    :param constant: all labels are the same, in none of the trusted partitions.
    """

    distance: float
    trusted_distance: float
    p_value: float
    changed: bool
    missing: tuple[str, ...] = ()
    constant: bool = False


class HeldBefore(NamedTuple):
    """What an earlier partition was held for, and nobody released.

    :param rate: as in :class:`LabelNoise`.
    :param gap: as in :class:`Relation`.
    :param distance: as in :class:`LabelShift`.
    """

    rate: float
    gap: float
    distance: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SuspiciousSlice:
    """Rows in which more labels are contradicted than in the same rows of trusted partitions.

    :param where: such as ``distance 0.5 to 1.2`` or ``vendor 2``.
    :param row_count: rows of the new partition in it.
    :param share: share of their labels that is contradicted.
    :param trusted_share: the same in trusted partitions.
    """

    where: str
    row_count: int
    share: float
    trusted_share: float


def conformal_p_value(value: float, trusted: Sequence[float]) -> float:
    """Chance of being ranked at least so high among the trusted values, where all come from the same source.

    ``p = (1 + #{i: trusted_i >= value}) / (k + 1)``. Where the ``k + 1`` values are exchangeable, ``P(p <= a) <= a`` for every
    ``a`` and any distribution; no value can have a smaller one than ``1 / (k + 1)``.

    Source: Vovk, Gammerman and Shafer, "Algorithmic Learning in a Random World", 2005, proposition 2.4; Bates et al.,
    "Testing for outliers with conformal p-values", Annals of Statistics 51, 2023, equation 2.

    >>> conformal_p_value(0.2, [0.1] * 18 + [0.3])
    0.1
    """
    return (1 + sum(item >= value for item in trusted)) / (len(trusted) + 1)


class Joint(NamedTuple):
    """Several tests of one partition as one, with one level.

    :param p_value: see :func:`conformal_p_value`, of the farthest of the partition's values.
    :param limits: of each test, the value from which it says no; where none does, the partition enters.
    :param beyond: tests that say no.
    """

    p_value: float
    limits: dict[str, float]
    beyond: frozenset[str]


def judge_jointly(values: Mapping[str, Array], floors: Mapping[str, float], level: float) -> Joint:
    """Rank a partition among the others by whichever of several values is the farthest out.

    Each value is measured by how far the largest ones of all partitions are above their median, those the level lets be held left
    out, so that no test drowns another. All partitions, the new one included, are treated alike: where they are exchangeable, the
    largest of their measures is as well, and the chance of a false alarm is at most ``level`` in all, however many tests there are.

    Source: Vovk, Gammerman and Shafer, "Algorithmic Learning in a Random World", 2005, proposition 2.4, for the maximum as score.

    :param values: per test one value of each partition, the new one last; large is bad.
    :param floors: least unit of each test, for values that are all but the same.
    """
    count = len(next(iter(values.values())))
    steps = max(1, math.floor(level * count + 1e-9))
    centers = {name: float(np.median(column)) for name, column in values.items()}
    units = {
        name: max(float(np.sort(column)[-min(steps + 1, count)]) - centers[name], floors[name])
        for name, column in values.items()
    }
    scores = np.array([(column - centers[name]) / units[name] for name, column in values.items()])
    farthest = scores.max(axis=0)
    limit = float(np.sort(farthest[:-1])[-min(steps, count - 1)])
    return Joint(
        p_value=conformal_p_value(float(farthest[-1]), (farthest[:-1] + 1e-12).tolist()),
        limits={name: centers[name] + limit * units[name] for name in values},
        beyond=frozenset(name for name, row in zip(values, scores, strict=True) if row[-1] > limit + 1e-12),
    )


def held_by_chance(
    held: Sequence[HeldBefore], trusted: Sequence[HeldBefore], level: float
) -> list[HeldBefore]:
    """Take those held partitions that a new one is compared with all the same.

    Among trusted partitions alone none is as far out as those that were held, the false alarms included; ranked there, ever more
    clean ones would be held: half of them after some hundred. So those that chance may have held stay in the comparison: none of
    their values much farther out than the farthest trusted one, and at most twice as many as chance holds, the nearest.

    :param held: between the trusted partitions.
    :param trusted: the same values of these.

    >>> found = [HeldBefore(rate, 0.0) for rate in (0.3, 0.12, 0.11, 0.13)]
    >>> trusted = [HeldBefore(rate, 0.0) for rate in [0.08, 0.09, 0.1] * 6 + [0.09]]
    >>> [item.rate for item in held_by_chance(found, trusted, 0.05)]
    [0.11]
    """
    known = np.array(trusted)
    center = np.median(known, axis=0)
    above = np.maximum(known.max(axis=0) - center, 1e-12)
    below = np.maximum(center - known.min(axis=0), 1e-12)
    below[1:] = np.inf  # only too low a rate is out of the usual
    above, below = above * _CHANCE, below * _CHANCE
    out = [
        float(max(((item - center) / above).max(), ((center - item) / below).max()))
        for item in np.array(held)
    ]
    near = [held[index] for index in np.argsort(out, kind="stable") if out[index] <= 1.0 + 1e-9]
    return near[: math.ceil(2.0 * level * (len(trusted) + 1) - 1e-9)]


def wrong_share(rate: float, clean_rate: float, gain: float) -> float:
    """Estimate the share of wrong labels from how many are contradicted.

    Where a share ``s`` of labels is wrong at random, ``rate = clean_rate + s * gain`` are contradicted. Of two classes and a model
    that is not led astray by wrong labels, ``gain = 1 - 2 * clean_rate``; a model of few rows is, somewhat, so the gain is
    measured, on trusted partitions with known wrong labels.

    Source: Angluin and Laird, "Learning from noisy examples", Machine Learning 2, 1988, section 2.2.

    :param rate: share that is contradicted.
    :param clean_rate: share that would be without any wrong label.
    :param gain: contradicted labels per wrong label.
    :returns: NaN where the features tell too little of the labels.

    >>> round(wrong_share(0.14, 0.05, 0.9), 3)
    0.1
    """
    return (rate - clean_rate) / gain if gain >= _LEAST_GAIN else math.nan


def disagreement(answers: Array, labels: Array, *, classes: int | None) -> Array:
    """Tell how far each label is from the answer of a model that has not seen it.

    :param answers: class probabilities, shape ``(rows, classes)``, or ranks, shape ``(rows,)``.
    :param labels: class numbers, or ranks in ``[0, 1]``.
    :returns: 1 where another class is the likeliest, else 0; or the distance of the ranks.
    """
    if classes is not None:
        return np.asarray(answers.argmax(axis=1) != labels, dtype=float)
    return np.asarray(np.abs(answers - labels))


def contradiction_limit(disagreements: Sequence[Array], *, classes: int | None) -> float:
    """Give the disagreement from which a label counts as contradicted; of numbers so many of all partitions together are beyond."""
    return 0.5 if classes is not None else float(np.quantile(np.concatenate(disagreements), 1.0 - _TAIL))


def suspicion(answers: Array, labels: Array, *, classes: int | None) -> Array:
    """Rank rows: one minus the probability of the label they have, or the distance of the ranks.

    Source: the self-confidence of Northcutt, Jiang and Chuang, "Confident learning: estimating uncertainty in dataset labels",
    Journal of Artificial Intelligence Research 70, 2021, section 3.2.
    """
    if classes is None:
        return np.asarray(np.abs(answers - labels))
    return np.asarray(1.0 - answers[np.arange(len(labels)), labels])


def with_wrong_labels(labels: Array, share: float, *, classes: int | None, seed: int) -> Array:
    """Put wrong labels in: any other class, or another row's number."""
    random = np.random.default_rng(seed)
    chosen = random.random(len(labels)) < share
    if classes is None:
        return np.where(chosen, random.permutation(labels), labels)
    others = (labels + random.integers(1, max(classes, 2), len(labels))) % max(classes, 2)
    return np.where(chosen, others, labels)


def with_overwritten_labels(labels: Array, value: float, share: float, *, seed: int) -> Array:
    """Overwrite so many of the labels with one value, or all others where they are fewer."""
    others = np.flatnonzero(labels != value)
    count = min(len(others), round(share * len(labels)))
    changed = labels.copy()
    changed[np.random.default_rng(seed).choice(others, count, replace=False)] = value
    return changed


def judge_noise(
    rate: float,
    trusted: Sequence[float],
    joint: Joint,
    directions: Sequence[Direction],
    policy: PoisoningPolicy,
    *,
    odd: bool = False,
) -> LabelNoise:
    """Compare a partition's share of contradicted labels with that of the trusted ones.

    A clean partition's share lies, with the stated confidence, between the limits of the tests for too high and too low a share; so
    the interval begins above zero exactly where the first of them says no.

    :param directions: ways in which labels may be wrong; the first is at random.
    :param odd: the labels look overwritten, so that nothing can be estimated.
    """
    usual, count = float(np.median(trusted)), len(trusted)
    high, low = joint.limits["high"], -joint.limits["low"]
    gains = [gain for item in directions if item.gain >= _LEAST_GAIN for gain in item.gains]
    least = max(0.0, (rate - high) / max(gains)) if gains else math.nan
    told = not odd and joint.beyond.isdisjoint(("labels", "low")) and rate >= min(trusted) and bool(gains)
    most = [min(item.possible, item.share_of(rate - low, at_most=True)) for item in directions]
    needs = {item.name: min(item.visible, item.share_of(high - usual)) for item in directions}
    # What can be wrong of fewer labels than the screen is to see is no matter of it.
    asked = [needs[item.name] for item in directions if item.most > policy.detectable_share]
    steps = max(1, math.floor(policy.false_alarm_rate * (count + 1) + 1e-9))
    return LabelNoise(
        rate=rate,
        trusted_rate=usual,
        p_value=conformal_p_value(rate, trusted),
        share=max(0.0, wrong_share(rate, usual, directions[0].gain)) if told else None,
        interval=(min(least, 1.0), max(least, *most)) if told else (min(least, 1.0) if gains else 0.0, 1.0),
        confidence=max(0.0, 1.0 - steps / (count + 1)),
        detectable_share=max(asked) if gains else math.nan,
        detectable_by=needs,
    )


def judge_relation(gap: float, trusted: Sequence[float], level: float) -> Relation:
    """Compare how far a partition is from the others with how far the trusted ones are."""
    p_value = conformal_p_value(gap, trusted)
    return Relation(
        gap=gap, trusted_gap=float(np.median(trusted)), p_value=p_value, changed=p_value <= level + 1e-12
    )


def decide(
    noise: LabelNoise, shift: LabelShift, relation: Relation, joint: Joint, policy: PoisoningPolicy
) -> tuple[Verdict, str]:
    """Give the verdict and its reason."""
    told = _tell_noise(noise)
    found = (
        f"by chance one of {1 / joint.p_value:.3g} clean partitions is so far out (p = {joint.p_value:.3g})"
    )
    if "labels" in joint.beyond:
        return "held", f"{_tell_shift(shift)}: they were overwritten, or the world has changed; {found}"
    if "low" in joint.beyond:
        return (
            "held",
            f"{told}: labels that were overwritten, or answered by a model, are too easy to answer; {found}",
        )
    if "high" in joint.beyond and noise.interval[0] > policy.tolerated_share:
        return "held", f"{told}; {found}"
    if "relation" in joint.beyond:
        return "held", (
            f"models of trusted partitions contradict {relation.gap:.1%} more labels than the partition's own, "
            f"{relation.trusted_gap:.1%} in trusted ones: the concept has changed, or labels were changed in a pattern; {found}"
        )
    doubt = _doubt(noise, shift, policy)
    return ("undecided", doubt) if doubt else ("enters", told)


def _doubt(noise: LabelNoise, shift: LabelShift, policy: PoisoningPolicy) -> str | None:
    """Say why wrong labels may be there all the same, if they may."""
    if shift.constant or shift.missing:
        return f"{_tell_shift(shift)}: none was there, or they were overwritten"
    if math.isnan(noise.detectable_share):
        return "the features tell nothing of the labels, so nothing can be said of wrong ones"
    if noise.share is None:
        return f"{_tell_noise(noise)}, fewer than in any trusted one: chance, or labels that were overwritten or answered by a model"
    if noise.detectable_share > policy.detectable_share:
        worst = max(noise.detectable_by, key=lambda name: noise.detectable_by[name])
        return (
            f"only {noise.detectable_share:.1%} of wrong labels and more would be seen, as trusted partitions differ; "
            f"{policy.detectable_share:.1%} was asked for (least is seen of labels that are {worst})"
        )
    return None


def _tell_noise(noise: LabelNoise) -> str:
    low, high = noise.interval
    share = (
        f"; at random about {noise.share:.1%} of the labels would be wrong, in all between {low:.1%} and {high:.1%}"
        if noise.share is not None
        else "; how many are wrong can't be told"
    )
    return (
        f"{noise.rate:.1%} of the labels contradict the rows around them, {noise.trusted_rate:.1%} in trusted partitions "
        f"(p = {noise.p_value:.3g}){share}"
    )


def _tell_shift(shift: LabelShift) -> str:
    if shift.constant:
        return "all labels are the same, in no trusted partition are they"
    if shift.missing:
        return f"no label is {' or '.join(shift.missing)}, in every trusted partition some are"
    return (
        f"the labels are distributed unlike those of any trusted partition (distance {shift.distance:.3g} from the nearest, "
        f"usual is {shift.trusted_distance:.3g})"
    )


def suspicious_slices(columns: Mapping[str, Array], flags: Array, new: Array) -> tuple[SuspiciousSlice, ...]:
    """Find parts of columns where contradicted labels are more than in trusted partitions, the clearest first.

    :param columns: values of trusted and new rows together, numbers or text.
    :param flags: whether a row's label is contradicted.
    :param new: whether the row is of the new partition.
    """
    found = []
    for name, column in columns.items():
        parts = cut_column(column)
        size = len(parts.names)
        rows, wrong, before, usual = (
            np.bincount(parts.numbers[mask], minlength=size)
            for mask in (new, new & flags, ~new, ~new & flags)
        )
        # Half a wrong label more: a slice where none was wrong is not infinitely surprised by one.
        expected = (usual + 0.5) / (before + 1.0)
        excess = (wrong - rows * expected) / np.sqrt(np.maximum(rows * expected * (1.0 - expected), 1e-12))
        found += [
            (
                float(excess[part]),
                SuspiciousSlice(
                    where=f"{name} {parts.names[part]}",
                    row_count=int(rows[part]),
                    share=float(wrong[part] / rows[part]),
                    trusted_share=float(expected[part]),
                ),
            )
            for part in np.flatnonzero((rows > 0) & (excess > _CLEAR))
        ]
    return tuple(item for _, item in sorted(found, key=lambda pair: -pair[0])[:SHOWN_SLICES])
