"""The screen of a partition's labels against trusted partitions, on rows in memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from airflow_mlops.core.checks.label_shares import (
    label_shares,
    nearest_distances,
    possible_overwriting,
    visible_overwriting,
)
from airflow_mlops.core.checks.poisoning import (
    DOSE,
    Direction,
    HeldBefore,
    Joint,
    LabelNoise,
    LabelShift,
    PoisoningPolicy,
    Relation,
    SuspiciousSlice,
    Verdict,
    conformal_p_value,
    contradiction_limit,
    decide,
    disagreement,
    held_by_chance,
    judge_jointly,
    judge_noise,
    judge_relation,
    suspicion,
    suspicious_slices,
    with_overwritten_labels,
    with_wrong_labels,
)
from airflow_mlops.integrations.label_consistency import as_numbers, others_answers, own_answers
from airflow_mlops.steps.common import with_float_target

if TYPE_CHECKING:
    import polars as pl

Array = NDArray[Any]

#: Labels of a whole-number column with at most so many values are classes.
_MOST_CLASSES = 20
#: Classes a screen takes: the models' time grows with them, and of more nearly each row is its own.
_CLASSES_TAKEN = 100
#: Trusted partitions that wrong labels are put into, to see how many are contradicted.
_DOSED = 3
#: Values for which it is measured how many overwritten labels are contradicted, those first of which the labels' shares tell least.
_MODELLED = 4
_SHOWN_NAME = 40
#: Rows that are named as evidence.
SHOWN_ROWS = 20


class AnswersOf(Protocol):
    """Answers for every row of a partition, as :func:`~airflow_mlops.integrations.label_consistency.own_answers`."""

    def __call__(self, features: Array, labels: Array, compared: Array, *, classes: int | None) -> Array:
        """Answer."""


class Screened(NamedTuple):
    """What the screen found.

    :param rows: positions of the most suspicious rows in the new partition, the clearest first.
    """

    verdict: Verdict
    reason: str
    noise: LabelNoise | None
    relation: Relation | None
    labels: LabelShift | None
    slices: tuple[SuspiciousSlice, ...] = ()
    rows: tuple[int, ...] = ()
    trusted: int = 0


def screen_partitions(
    new: pl.DataFrame,
    trusted: Sequence[pl.DataFrame],
    *,
    features: Sequence[str],
    target: str,
    time_column: str,
    policy: PoisoningPolicy,
    held: Sequence[HeldBefore] = (),
    answers_of: AnswersOf = own_answers,
    private: Collection[str] = (),
) -> Screened:
    """Compare a partition's labels with those of trusted partitions.

    :param new: its rows whose label is known, in the order of time.
    :param trusted: the same of the trusted partitions; those with too few rows are left out.
    :param held: what partitions between the trusted ones were held for.
    :param answers_of: what answers for a partition's rows by models of its others; who screens the same partitions often can
        give one that remembers.
    :param private: columns whose values nothing shows: no slice is named by one, and no class where the label is one.
    :raises ValueError: naming the column, where a label or feature is of a kind no model learns, or there are too many classes.
    """
    import polars as pl

    new, *trusted = (with_float_target(frame, target) for frame in (new, *trusted))
    if new.height < policy.minimum_rows:
        return _undecided(f"{new.height} rows with a label, {policy.minimum_rows} are needed", len(trusted))
    trusted = [frame for frame in trusted if frame.height >= policy.minimum_rows]
    if len(trusted) < policy.needed_partitions:
        return _undecided(
            f"{len(trusted)} trusted partitions of {policy.minimum_rows} rows and more, a false-alarm rate of "
            f"{policy.false_alarm_rate} needs {policy.needed_partitions}",
            len(trusted),
        )
    size = min(policy.rows_per_partition, *(frame.height for frame in (new, *trusted)))
    frames = [evenly(frame, size) for frame in trusted] + [new]
    rows = pl.concat([frame.select(*features, time_column, target) for frame in frames])
    classes = _class_count(rows[target])
    if classes == 1:
        return _undecided("all labels are the same, so wrong ones could not be seen", len(trusted))
    ends = np.cumsum([frame.height for frame in frames])[:-1]
    tables = np.split(as_numbers(rows.select(*features, time_column)), ends)
    pooled = np.split(_labels(rows[target], classes), ends)
    # Numbers are ranked within their partition: what its rows say of each other is no matter of the others' level.
    truths = pooled if classes else [_labels(frame[target], None) for frame in frames]
    compared = [_positions(len(truth), size) for truth in truths]
    own = [
        answers_of(given, truth, learn, classes=classes)
        for given, truth, learn in zip(tables, truths, compared, strict=True)
    ]
    # The new partition is compared by as many rows as the others; all of its rows are evidence.
    at = compared[-1]
    mine, right = [*own[:-1], own[-1][at]], [*truths[:-1], truths[-1][at]]
    apart = [disagreement(given, truth, classes=classes) for given, truth in zip(mine, right, strict=True)]
    limit = contradiction_limit(apart, classes=classes)
    rates = np.array([np.mean(item > limit) for item in apart])
    plain = [item[:, :-1] for item in [*tables[:-1], tables[-1][at]]]  # without time: others have other times
    levels = [*pooled[:-1], pooled[-1][at]]
    others = others_answers(plain, levels, classes=classes)
    gaps = _other_rates(others, levels, classes=classes) - rates
    shares = label_shares(levels, classes=classes)
    values = _compared(rates, gaps, nearest_distances(shares), held, policy)
    joint = judge_jointly(
        {name: values[name] for name in _tests(policy)}, _floors(rates, size), policy.false_alarm_rate
    )
    label_names = _names(rows[target], classes, hidden=target in private)
    shift = _shift(values["labels"], pooled, joint, label_names, policy)
    directions = _directions(
        answers_of, tables[:-1], truths[:-1], rates, shares, joint.limits["labels"], limit,
        names=label_names, classes=classes, policy=policy,
    )  # fmt: skip
    *usual, rate = values["high"].tolist()
    odd = shift.constant or bool(shift.missing)
    noise = judge_noise(rate, usual, joint, directions, policy, odd=odd)
    *usual, gap = values["relation"].tolist()
    relation = judge_relation(gap, usual, policy.false_alarm_rate)
    verdict, reason = decide(noise, shift, relation, joint, policy)
    found = Screened(verdict, reason, noise, relation, shift, trusted=len(trusted))
    if verdict != "held" and noise.p_value > policy.false_alarm_rate and not relation.changed:
        return found
    doubt = suspicion(own[-1], truths[-1], classes=classes)
    shown = [name for name in features if name not in private]
    return found._replace(
        slices=suspicious_slices(
            _columns(
                pl.concat([*(frame.select(shown) for frame in frames[:-1]), new[at.tolist()].select(shown)])
            ),
            np.concatenate(apart) > limit,
            np.repeat([False, True], [sum(map(len, right[:-1])), len(at)]),
        ),
        rows=tuple(int(i) for i in np.argsort(-doubt, kind="stable")[:SHOWN_ROWS]),
    )


def _undecided(reason: str, trusted: int) -> Screened:
    return Screened("undecided", reason, None, None, None, trusted=trusted)


def _tests(policy: PoisoningPolicy) -> tuple[str, ...]:
    return ("high", "low", "labels", *(["relation"] if policy.hold_on == "noise_or_relation" else []))


def _compared(
    rates: Array, gaps: Array, distances: Array, held: Sequence[HeldBefore], policy: PoisoningPolicy
) -> dict[str, Array]:
    """Give what each test compares, of the trusted partitions, those that chance may have held, and the new one."""
    asked = policy.hold_on == "noise_or_relation"
    known = [HeldBefore(*map(float, row)) for row in zip(rates, gaps, distances, strict=True)]

    # What no test asks for makes no partition one that chance can't have held.
    def seen(item: HeldBefore) -> HeldBefore:
        return item if asked else item._replace(gap=0.0)

    unlike = {seen(item): item for item in held}
    beside = held_by_chance(list(unlike), [seen(item) for item in known[:-1]], policy.false_alarm_rate)
    rate, gap, distance = np.array([*known[:-1], *(unlike[item] for item in beside), known[-1]]).T
    return {"high": rate, "low": -rate, "labels": distance, "relation": gap}


def _floors(rates: Array, size: int) -> dict[str, float]:
    """Give of each test what chance alone may do among so many rows, roughly: nothing smaller is measured by."""
    usual = float(np.median(rates))
    spread = float(np.sqrt(max(usual * (1.0 - usual), 1.0 / size) / size))
    return {"high": spread, "low": spread, "relation": spread, "labels": 0.25 / float(np.sqrt(size))}


def _names(column: pl.Series, classes: int | None, *, hidden: bool) -> list[str] | None:
    """Name the classes, unless nobody may see them."""
    if classes is None:
        return None
    # In the order of their numbers, see _labels.
    values = column.drop_nulls().unique() if column.dtype.is_numeric() else column.cast(str).unique()
    shown = [str(value)[:_SHOWN_NAME] for value in values.sort().to_list()]
    return [f"class {number}" for number in range(1, len(shown) + 1)] if hidden else shown


def _shift(
    distances: Array, labels: Sequence[Array], joint: Joint, names: list[str] | None, policy: PoisoningPolicy
) -> LabelShift:
    """Compare the labels by themselves."""
    *usual, distance = distances.tolist()
    present = [frozenset(np.unique(truth).tolist()) for truth in labels]
    gone = frozenset.intersection(*present[:-1]) - present[-1] if names else ()
    return LabelShift(
        distance=distance,
        trusted_distance=float(np.median(usual)),
        p_value=conformal_p_value(distance, usual),
        changed="labels" in joint.beyond,
        missing=tuple(names[int(number)] for number in sorted(gone)) if names else (),
        constant=len(present[-1]) == 1 and min(map(len, present[:-1])) > 1,
    )


def _directions(
    answers_of: AnswersOf,
    tables: Sequence[Array],
    truths: Sequence[Array],
    rates: Array,
    shares: Array,
    far: float,
    limit: float,
    *,
    names: list[str] | None,
    classes: int | None,
    policy: PoisoningPolicy,
) -> list[Direction]:
    """Find how well wrong labels are seen, at random and overwritten with one value, on trusted partitions.

    :param far: distance from which the shares of labels tell.
    :param limit: see :func:`~airflow_mlops.core.checks.poisoning.contradiction_limit`.
    """
    trusted, new = shares[:-1], shares[-1]
    measured = partial(_gain, answers_of, tables, truths, rates, classes=classes, limit=limit)
    found = [
        Direction(
            "wrong at random",
            measured(lambda labels, seed: with_wrong_labels(labels, DOSE, classes=classes, seed=seed)),
        )
    ]
    hidden = []
    for name, part, quantile in _values(names, trusted):
        found.append(
            Direction(
                f"overwritten with {name}",
                (),
                visible_overwriting(trusted, part, far),
                possible_overwriting(new, trusted, part, far),
                float(np.median(1.0 - trusted[:, part])),
            )
        )
        # What the labels' shares tell needs no model.
        if max(found[-1].visible, found[-1].possible) > policy.detectable_share:
            hidden.append((found[-1].visible, len(found) - 1, part, quantile))
    for _, place, part, quantile in sorted(hidden, reverse=True)[:_MODELLED]:
        put_in = partial(_overwritten, part=part, quantile=quantile)
        found[place] = found[place]._replace(gains=measured(put_in))
    return found


def _values(names: list[str] | None, trusted: Array) -> list[tuple[str, int, float | None]]:
    """List what labels may be overwritten with: name, part of their distribution, and quantile of numbers."""
    if names is not None:
        return [(name, part, None) for part, name in enumerate(names)]
    there = np.flatnonzero(trusted.sum(axis=0)).tolist()
    return [
        ("the lowest", there[0], 0.0),
        ("a middle one", there[len(there) // 2], 0.5),
        ("the highest", there[-1], 1.0),
    ]


def _overwritten(labels: Array, seed: int, *, part: int, quantile: float | None) -> Array:
    value = part if quantile is None else float(np.quantile(labels, quantile, method="nearest"))
    return with_overwritten_labels(labels, value, DOSE, seed=seed)


def _gain(
    answers_of: AnswersOf,
    tables: Sequence[Array],
    truths: Sequence[Array],
    rates: Array,
    put_in: Callable[[Array, int], Array],
    *,
    classes: int | None,
    limit: float,
) -> tuple[float, ...]:
    """Measure how many labels more are contradicted per wrong one, on a few trusted partitions.

    :param put_in: puts wrong labels in, by labels and seed.
    """
    gains = []
    for index in np.unique(np.linspace(0, len(truths) - 1, _DOSED).astype(int)).tolist():
        wrong = put_in(truths[index], index)
        dose = np.mean(wrong != truths[index])
        if not dose:
            continue
        if classes is None:
            wrong = _ranks(wrong)
        given = answers_of(tables[index], wrong, np.arange(len(wrong)), classes=classes)
        rate = np.mean(disagreement(given, wrong, classes=classes) > limit)
        gains.append(float((rate - rates[index]) / dose))
    return tuple(gains)


def _other_rates(answers: Sequence[Array], labels: Sequence[Array], *, classes: int | None) -> Array:
    apart = [
        disagreement(given, truth, classes=classes) for given, truth in zip(answers, labels, strict=True)
    ]
    limit = contradiction_limit(apart, classes=classes)
    return np.array([np.mean(item > limit) for item in apart])


def evenly(frame: pl.DataFrame, size: int) -> pl.DataFrame:
    """Take at most so many rows, evenly over the frame."""
    return frame[_positions(frame.height, size).tolist()] if frame.height > size else frame


def _positions(height: int, size: int) -> Array:
    return np.unique(np.linspace(0, height - 1, size).round().astype(int))


def _class_count(column: pl.Series) -> int | None:
    if column.dtype.is_nested():
        raise ValueError(
            f"the target {column.name} is {column.dtype}, and a screen's target is a number, a text or a truth value"
        )
    distinct = column.n_unique()
    if column.dtype.is_float() or (column.dtype.is_numeric() and distinct > _MOST_CLASSES):
        return None
    if distinct > _CLASSES_TAKEN:
        raise ValueError(
            f"the target {column.name} has {distinct} classes in the partitions that are compared, and a screen takes at most "
            f"{_CLASSES_TAKEN}: is it a free text or an id? Name a target of fewer classes, such as their groups, or a number"
        )
    return distinct


def _labels(column: pl.Series, classes: int | None) -> Array:
    """Give labels as class numbers, or numbers by their rank in [0, 1]: a rank is not ruled by a few large values."""
    if not column.dtype.is_numeric():
        column = column.cast(str)
    if classes is None:
        return _ranks(column.to_numpy())
    return np.asarray(column.rank(method="dense").to_numpy().astype(int) - 1)


def _ranks(values: Array) -> Array:
    import polars as pl

    return np.asarray((pl.Series(values).rank(method="average").to_numpy() - 0.5) / len(values))


def _columns(rows: pl.DataFrame) -> dict[str, Array]:
    """Give features to cut into slices: numbers, and all else as text."""
    import polars as pl

    return {
        column.name: column.cast(pl.Float64).to_numpy()
        if column.dtype.is_numeric()
        else column.cast(pl.String).fill_null("missing").to_numpy().astype(str)
        for column in rows
    }
