"""The screen of a partition's labels against trusted partitions, on rows in memory."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from airflow_mlops.core.checks.poisoning import (
    DOSE,
    HeldBefore,
    LabelNoise,
    PoisoningPolicy,
    Relation,
    SuspiciousSlice,
    Verdict,
    contradiction_limit,
    decide,
    disagreement,
    held_by_chance,
    judge_noise,
    judge_relation,
    suspicion,
    suspicious_slices,
    with_wrong_labels,
)
from airflow_mlops.integrations.label_consistency import as_numbers, others_answers, own_answers

if TYPE_CHECKING:
    import polars as pl

Array = NDArray[Any]

#: Labels of a whole-number column with at most so many values are classes.
_MOST_CLASSES = 20
#: Trusted partitions that wrong labels are put into, to see how many are contradicted.
_DOSED = 3
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
    :param private: features that no slice is named by, as its name shows values.
    """
    import polars as pl

    if new.height < policy.minimum_rows:
        return _undecided(f"{new.height} rows with a label, {policy.minimum_rows} are needed", len(trusted))
    trusted = [frame for frame in trusted if frame.height >= policy.minimum_rows]
    if len(trusted) < policy.needed_partitions:
        return _undecided(
            f"{len(trusted)} trusted partitions of {policy.minimum_rows} rows and more, a false-alarm rate of "
            f"{policy.false_alarm_rate} with hold_on={policy.hold_on!r} needs {policy.needed_partitions}",
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
    gain = _gain(answers_of, tables[:-1], truths[:-1], rates, classes=classes, limit=limit)
    beside = held_by_chance(held, rates[:-1].tolist(), policy.level)
    usual = [*rates[:-1].tolist(), *(item.rate for item in beside)]
    noise = judge_noise(float(rates[-1]), usual, gain, policy.level)
    plain = [item[:, :-1] for item in [*tables[:-1], tables[-1][at]]]  # without time: others have other times
    levels = [*pooled[:-1], pooled[-1][at]]
    others = others_answers(plain, levels, classes=classes)
    gaps = _other_rates(others, levels, classes=classes) - rates
    usual = [*gaps[:-1].tolist(), *(item.gap for item in beside)]
    relation = judge_relation(float(gaps[-1]), usual, policy.level)
    verdict, reason = decide(noise, relation, policy)
    if noise.p_value > policy.level and not relation.changed:
        return Screened(verdict, reason, noise, relation, trusted=len(trusted))
    doubt = suspicion(own[-1], truths[-1], classes=classes)
    shown = [name for name in features if name not in private]
    return Screened(
        verdict,
        reason,
        noise,
        relation,
        suspicious_slices(
            _columns(
                pl.concat([*(frame.select(shown) for frame in frames[:-1]), new[at.tolist()].select(shown)])
            ),
            np.concatenate(apart) > limit,
            np.repeat([False, True], [sum(map(len, right[:-1])), len(at)]),
        ),
        tuple(int(i) for i in np.argsort(-doubt, kind="stable")[:SHOWN_ROWS]),
        len(trusted),
    )


def _undecided(reason: str, trusted: int) -> Screened:
    return Screened("undecided", reason, None, None, trusted=trusted)


def _gain(
    answers_of: AnswersOf,
    tables: Sequence[Array],
    truths: Sequence[Array],
    rates: Array,
    *,
    classes: int | None,
    limit: float,
) -> float:
    """Measure how many labels more are contradicted per wrong one, on a few trusted partitions."""
    gains = []
    for index in np.unique(np.linspace(0, len(truths) - 1, _DOSED).astype(int)).tolist():
        wrong = with_wrong_labels(truths[index], DOSE, classes=classes, seed=index)
        given = answers_of(tables[index], wrong, np.arange(len(wrong)), classes=classes)
        rate = np.mean(disagreement(given, wrong, classes=classes) > limit)
        gains.append((rate - rates[index]) / DOSE)
    return float(np.mean(gains))


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
    distinct = column.n_unique()
    numbers = column.dtype.is_float() or (column.dtype.is_numeric() and distinct > _MOST_CLASSES)
    return None if numbers else distinct


def _labels(column: pl.Series, classes: int | None) -> Array:
    """Give labels as class numbers, or numbers by their rank in [0, 1]: a rank is not ruled by a few large values."""
    if not column.dtype.is_numeric():
        column = column.cast(str)
    if classes is None:
        return np.asarray((column.rank(method="average").to_numpy() - 0.5) / len(column))
    return np.asarray(column.rank(method="dense").to_numpy().astype(int) - 1)


def _columns(rows: pl.DataFrame) -> dict[str, Array]:
    """Give features to cut into slices: numbers, and all else as text."""
    import polars as pl

    return {
        column.name: column.cast(pl.Float64).to_numpy()
        if column.dtype.is_numeric()
        else column.cast(pl.String).fill_null("missing").to_numpy().astype(str)
        for column in rows
    }
