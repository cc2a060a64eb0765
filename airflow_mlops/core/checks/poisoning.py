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

#: What a partition is held for: labels its own rows contradict, or also a relation that trusted partitions contradict.
HoldOn = Literal["noise", "noise_or_relation"]
#: ``undecided``: too few trusted partitions or rows, or the screen could not have seen what it is to see.
Verdict = Literal["enters", "held", "undecided"]

#: Share of the regression rows of all partitions together that count as contradicted (rule of thumb).
_TAIL = 0.05
#: Wrong labels that are put into trusted partitions to see how many are contradicted, and the fewest per wrong one that say anything.
DOSE, _LEAST_GAIN = 0.1, 0.2
#: Standard errors from which a slice is shown, and how many are.
_CLEAR, SHOWN_SLICES = 4.0, 5


@dataclass(frozen=True, kw_only=True, slots=True)
class PoisoningPolicy:
    """What a new partition is held for, and how often one is where nothing is wrong.

    :param false_alarm_rate: chance that a partition is held that comes from the same source as the trusted ones; at least
        ``1 / false_alarm_rate - 1`` of these are needed, and twice as many (plus one) with ``noise_or_relation``.
    :param tolerated_share: share of wrong labels that may enter, in ``[0, 1)``; a partition is held where there are surely more.
    :param detectable_share: share of wrong labels the screen has to be able to see; where it could not, it is undecided. Rule of
        thumb: from a tenth on, most models become visibly worse.
    :param trusted_partitions: how many windows before the new one are taken, at most.
    :param rows_per_partition: rows of each that are compared, evenly over its time; of the new one all are looked at for evidence.
    :param minimum_rows: smaller partitions are not compared (rule of thumb: their rates say little).
    :param hold_on: ``noise``: labels that contradict rows of their own partition; a change of concept raises no alarm.
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
    def level(self) -> float:
        """Level of each test: with two of them each has half."""
        return self.false_alarm_rate / (2 if self.hold_on == "noise_or_relation" else 1)

    @property
    def needed_partitions(self) -> int:
        """Give the fewest trusted partitions with which a test at this level can say no.

        >>> PoisoningPolicy().needed_partitions, PoisoningPolicy(hold_on="noise_or_relation").needed_partitions
        (19, 39)
        """
        return math.ceil(1.0 / self.level - 1e-9) - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelNoise:
    """How many labels of a partition are wrong, as far as its own rows tell.

    :param rate: share of its labels that a model of its other rows contradicts.
    :param trusted_rate: median of that share over the trusted partitions.
    :param p_value: see :func:`conformal_p_value`.
    :param share: estimated share of wrong labels.
    :param interval: of the share, or of 0 where it goes below; its confidence is in ``confidence``.
    :param confidence: chance that the interval holds the share, where a clean partition is like the trusted ones.
    :param detectable_share: share of wrong labels from which the test says no half of the time.
    """

    rate: float
    trusted_rate: float
    p_value: float
    share: float
    interval: tuple[float, float]
    confidence: float
    detectable_share: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Relation:
    """Whether the relation of label and features is another one than in the trusted partitions.

    :param gap: share of labels that a model of other partitions contradicts, less the share that one of its own does.
    :param trusted_gap: median over the trusted partitions.
    :param p_value: see :func:`conformal_p_value`.
    :param changed: the p-value is at most the test's level.
    """

    gap: float
    trusted_gap: float
    p_value: float
    changed: bool


class HeldBefore(NamedTuple):
    """What an earlier partition was held for, and nobody released.

    :param rate: as in :class:`LabelNoise`.
    :param gap: as in :class:`Relation`.
    """

    rate: float
    gap: float


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


def held_by_chance(held: Sequence[HeldBefore], trusted: Sequence[float], level: float) -> list[HeldBefore]:
    """Take those held partitions that a new one is compared with all the same.

    Among trusted partitions alone none is as noisy as those that were held, the false alarms included; ranked there, ever more clean
    ones would be held: half of them after some hundred. So those that chance may have held stay in the comparison: no farther above
    the largest trusted rate than that is above the median (rule of thumb), and at most twice as many as chance holds, the lowest.

    :param held: between the trusted partitions.
    :param trusted: rates of these.

    >>> found = [HeldBefore(rate, 0.0) for rate in (0.3, 0.12, 0.11, 0.13)]
    >>> [item.rate for item in held_by_chance(found, [0.08, 0.09, 0.1] * 6 + [0.09], 0.05)]
    [0.11]
    """
    most = 2.0 * max(trusted) - float(np.median(trusted))
    near = sorted(item for item in held if item.rate <= most + 1e-12)
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


def judge_noise(rate: float, trusted: Sequence[float], gain: float, level: float) -> LabelNoise:
    """Compare a partition's share of contradicted labels with that of the trusted ones.

    A clean partition's share lies, with the stated confidence, between the order statistics of the trusted shares that
    the test at ``level`` takes for its limits; so the interval begins above zero exactly where the p-value is at most ``level``.
    """
    ordered, count = sorted(trusted), len(trusted)
    steps = max(1, math.floor(level * (count + 1) + 1e-9))
    low, high = ordered[min(steps, count) - 1], ordered[max(count - steps, 0)]
    usual = float(np.median(ordered))
    bounds = [wrong_share(rate, clean, gain) for clean in (high, low)]
    return LabelNoise(
        rate=rate,
        trusted_rate=usual,
        p_value=conformal_p_value(rate, trusted),
        share=max(0.0, wrong_share(rate, usual, gain)),
        interval=(max(0.0, bounds[0]), max(0.0, bounds[1])),
        confidence=max(0.0, 1.0 - 2.0 * steps / (count + 1)),
        detectable_share=wrong_share(high, usual, gain),
    )


def judge_relation(gap: float, trusted: Sequence[float], level: float) -> Relation:
    """Compare how far a partition is from the others with how far the trusted ones are."""
    p_value = conformal_p_value(gap, trusted)
    return Relation(
        gap=gap, trusted_gap=float(np.median(trusted)), p_value=p_value, changed=p_value <= level + 1e-12
    )


def decide(noise: LabelNoise, relation: Relation, policy: PoisoningPolicy) -> tuple[Verdict, str]:
    """Give the verdict and its reason."""
    low, high = noise.interval
    told = (
        f"{noise.rate:.1%} of the labels contradict the rows around them, {noise.trusted_rate:.1%} in trusted partitions "
        f"(p = {noise.p_value:.3g}); about {noise.share:.1%} of the labels are wrong, between {low:.1%} and {high:.1%}"
    )
    if math.isnan(noise.detectable_share):
        return "undecided", "the features tell nothing of the labels, so nothing can be said of wrong ones"
    if noise.p_value <= policy.level + 1e-12 and low > policy.tolerated_share:
        return "held", told
    if policy.hold_on == "noise_or_relation" and relation.changed:
        return "held", (
            f"models of trusted partitions contradict {relation.gap:.1%} more labels than the partition's own, "
            f"{relation.trusted_gap:.1%} in trusted ones (p = {relation.p_value:.3g}): the concept has changed, or labels were "
            "changed in a pattern"
        )
    if noise.detectable_share > policy.detectable_share:
        return "undecided", (
            f"only {noise.detectable_share:.1%} of wrong labels and more would be seen, as trusted partitions differ; "
            f"{policy.detectable_share:.1%} was asked for"
        )
    return "enters", told


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
