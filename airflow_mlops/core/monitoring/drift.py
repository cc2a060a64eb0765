"""Drift: how far the current window's columns are from the reference, from their profiles alone."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from airflow_mlops.core.monitoring.column_drift import ComparedColumn, ReadRows, compare_column, nearest
from airflow_mlops.core.monitoring.detectors import (
    Detector,
    default_detector,
    find_detector,
)
from airflow_mlops.core.monitoring.drift_policy import Correction, DriftPolicy
from airflow_mlops.core.monitoring.root_cause import describe, shares_of_shift
from airflow_mlops.core.monitoring.statistics import known
from airflow_mlops.core.profiles.profile_columns import ColumnProfile, PairProfile
from airflow_mlops.exceptions import InsufficientDataError

if TYPE_CHECKING:
    from airflow_mlops.core.profiles.profile import Profile

#: Name of a detector for all columns, or by column.
DetectorChoice = str | Mapping[str, str] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureDrift:
    """One column's comparison.

    :param feature: column.
    :param detector: statistic that was used.
    :param statistic: its value.
    :param threshold: value from which (of a p-value: up to which) the column counts as drifted.
    :param drifted: whether it does.
    :param sentence: what moved, in words.
    :param low: smallest value the statistic of the rows can have.
    :param high: largest value it can have.
    :param exact: whether the statistic is that of the rows.
    :param p_value: chance of such a difference where nothing changed, corrected for the number of columns; ``None`` under
        Evidently's rule.
    :param share_of_shift: the column's part in the whole shift, in ``[0, 1]``.
    :param measured: ``False``: one of the sides does not have the column, has too few values to judge, has none and so few rows
        that this may be an accident, or the detector gave no number.
    """

    feature: str
    detector: str
    statistic: float
    threshold: float
    drifted: bool
    sentence: str
    low: float
    high: float
    exact: bool
    p_value: float | None = None
    share_of_shift: float = 0.0
    measured: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class DriftReport:
    """All columns' comparisons, those that drifted first, largest part in the shift first.

    :param feature_count: columns, pairs not among them.
    :param measured_count: of them, those that could be judged.
    :param drifted_share: share of drifted columns among those that could be judged.
    """

    features: tuple[FeatureDrift, ...]
    drifted_count: int
    feature_count: int
    measured_count: int
    drifted_share: float
    drifted: bool
    headline: str


def compare_profiles(
    reference: Profile,
    current: Profile,
    *,
    detector: DetectorChoice = None,
    thresholds: Mapping[str, float] | None = None,
    policy: DriftPolicy | None = None,
    read_rows: ReadRows | None = None,
    absent: Mapping[str, str] | None = None,
    what: str = "inputs",
) -> DriftReport:
    """Compare every column of ``current`` with the reference.

    :param reference: profile of the reference rows.
    :param current: profile of the window, with the same cells.
    :param detector: name of a detector or import path of ``detector(reference_column, current_column) -> float`` (its attributes
        ``threshold`` and ``is_p_value`` are used, if it has them), for all columns or by column; ``None`` chooses by column type.
    :param thresholds: by column, instead of the detector's.
    :param policy: when a column, and when the window has drifted.
    :param read_rows: reads a column's values where only they can tell on which side of its threshold a statistic is.
    :param absent: by column that one of the sides does not have (see :func:`absent_columns`), why, and from when on it will.
        That is no drift; a column that has nothing but nulls on one side is, unless so few rows may have no value by accident:
        then it is not measured.
    :param what: what the columns are, for the headline.
    :raises InsufficientDataError: one of the sides has no rows, or fewer than the policy needs, or no column can be judged; that is
        not "no drift".
    :raises ValueError: a detector or a threshold is for no column, or can't be one.
    """
    policy = policy or DriftPolicy()
    _require_rows(reference, current, policy)
    _require_choices(current.names, detector, thresholds or {})
    compared = [
        compare_column(
            reference.column(column.name),
            column,
            detector=_chosen(detector, reference.column(column.name), column, policy),
            threshold=(thresholds or {}).get(column.name),
            read_rows=read_rows,
            absent=(absent or {}).get(column.name),
            policy=policy,
        )
        for column in current.columns
    ]
    compared, p_values = _corrected(compared, policy)
    features = _judge(compared, p_values, policy)
    pairs = {part.current.name for part in compared if isinstance(part.current, PairProfile)}
    features.sort(key=lambda item: (item.drifted, item.share_of_shift), reverse=True)
    columns = [item for item in features if item.feature not in pairs]
    judged = [item for item in columns if item.measured]
    not_there = {part.current.name for part in compared if part.absent}
    if not judged:
        raise InsufficientDataError(
            f"none of {len(columns)} {what} can be judged: {_unmeasured(columns, not_there, policy)}"
        )
    drifted = [item for item in judged if item.drifted]
    share = len(drifted) / len(judged)
    return DriftReport(
        features=tuple(features),
        drifted_count=len(drifted),
        feature_count=len(columns),
        measured_count=len(judged),
        drifted_share=share,
        drifted=bool(drifted) and share >= policy.share_threshold,
        headline=_headline(columns, [item for item in features if item.feature in pairs], not_there, what)
        + _without_rows(compared),
    )


def absent_columns(reference: Profile, current: Profile) -> list[str]:
    """Name the columns that no row of one of the sides has: the model took them only later, or no more."""
    return [
        column.name
        for column in current.columns
        if not (column.row_count and reference.column(column.name).row_count)
    ]


def adjusted_p_values(p_values: Sequence[float], correction: Correction) -> list[float]:
    """Correct p-values for their number.

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6, 1979;
    Benjamini and Hochberg, "Controlling the false discovery rate", Journal of the Royal Statistical Society B 57, 1995.

    >>> [round(p, 3) for p in adjusted_p_values([0.01, 0.04, 0.03], "holm")]
    [0.03, 0.06, 0.06]
    >>> [round(p, 3) for p in adjusted_p_values([0.01, 0.04, 0.03], "benjamini_hochberg")]
    [0.03, 0.04, 0.04]
    """
    values = np.asarray(p_values, dtype=float)
    order = np.argsort(values, kind="stable")
    count, ranks = len(values), np.arange(len(values))
    adjusted = values.copy()
    if correction == "holm":
        adjusted[order] = np.maximum.accumulate(values[order] * (count - ranks))
    elif correction == "benjamini_hochberg":
        stepped = values[order] * count / (ranks + 1)
        adjusted[order] = np.minimum.accumulate(stepped[::-1])[::-1]
    return [float(value) for value in np.minimum(adjusted, 1.0)]


def _require_rows(reference: Profile, current: Profile, policy: DriftPolicy) -> None:
    if current.row_count == 0:
        raise InsufficientDataError("the current window has no rows; drift can't be judged")
    if reference.row_count == 0:
        raise InsufficientDataError("the reference has no rows; drift can't be judged")
    if policy.rule != "tested":
        return
    for side, rows in (("current window", current.row_count), ("reference", reference.row_count)):
        if rows < policy.minimum_rows:
            raise InsufficientDataError(
                f"the {side} has {rows} rows, {policy.minimum_rows} are needed to judge drift: take a longer window, or lower "
                "minimum_rows"
            )


def _require_choices(names: Sequence[str], detector: DetectorChoice, thresholds: Mapping[str, float]) -> None:
    """Refuse what is meant for a column that is not there: a mistyped name would be judged by another rule in silence."""
    by_column = {
        "detector": {} if isinstance(detector, str) or detector is None else detector,
        "threshold": thresholds,
    }
    for kind, chosen in by_column.items():
        unknown = [name for name in chosen if name not in names]
        if unknown:
            raise ValueError(
                f"a {kind} is given for {unknown[0]!r}, which is not compared; there are {', '.join(names)}"
            )
    for name, threshold in thresholds.items():
        if not 0.0 < threshold < math.inf:
            raise ValueError(f"the threshold of {name!r} is {threshold}: give a number above zero")


def _chosen(
    choice: DetectorChoice, reference: ColumnProfile, current: ColumnProfile, policy: DriftPolicy
) -> Detector:
    name = choice if isinstance(choice, str) or choice is None else choice.get(reference.name)
    return find_detector(name or default_detector(reference, current, distances=policy.rule == "tested"))


def _corrected(
    compared: Sequence[ComparedColumn], policy: DriftPolicy
) -> tuple[list[ComparedColumn], list[float]]:
    """Correct the p-values for the number of columns, and take back what is then an accident of a side without values.

    Such a column stays one of those the others are corrected for: leaving it out because of its own p-value would bring false
    alarms.
    """
    enough = [_can_be_judged(item, policy) for item in compared]
    corrected = iter(
        adjusted_p_values(
            [item.p_value for item, use in zip(compared, enough, strict=True) if use], policy.correction
        )
    )
    p_values = [next(corrected) if use else 1.0 for use in enough]
    if policy.rule != "tested":
        return list(compared), p_values
    return [
        _by_accident(item) if use and _is_empty(item) and p_value > policy.significance else item
        for item, use, p_value in zip(compared, enough, p_values, strict=True)
    ], p_values


def _is_empty(item: ComparedColumn) -> bool:
    """Tell whether one of the sides has no values."""
    return not (item.reference.count and item.current.count)


def _by_accident(item: ComparedColumn) -> ComparedColumn:
    """Give what is known of a column where a side may have no values by accident: nothing, or with none at all no change."""
    if item.reference.count == item.current.count:
        return item._replace(measured=known(nearest(item.detector)), effect=0.0)
    side = "window" if item.reference.count else "reference"
    why = f"0 values in the {side}, so few rows may have none by accident: take a longer window"
    return item._replace(measured=known(math.nan), effect=0.0, absent=why)


def _judge(
    compared: Sequence[ComparedColumn], p_values: Sequence[float], policy: DriftPolicy
) -> list[FeatureDrift]:
    """Judge all columns together."""
    tested = policy.rule == "tested"
    enough = [_can_be_judged(item, policy) for item in compared]
    parts = shares_of_shift([item.effect if use else 0.0 for item, use in zip(compared, enough, strict=True)])
    judged = []
    for item, use, part, p_value in zip(compared, enough, parts, p_values, strict=True):
        fires = use and item.detector.fires(item.measured.value, item.threshold)
        if tested:
            large = item.effect >= 1.0 if item.detector.is_p_value else fires
            fires = use and large and p_value <= policy.significance
        sentence = (
            f"{item.current.name}: {item.absent}" if item.absent else describe(item.reference, item.current)
        )
        judged.append(
            FeatureDrift(
                feature=item.current.name,
                detector=item.detector.name,
                statistic=item.measured.value,
                threshold=item.threshold,
                drifted=fires,
                sentence=f"{sentence}; {part:.0%} of the shift" if fires else sentence,
                low=item.measured.low,
                high=item.measured.high,
                exact=item.measured.exact and not item.rows_gone,
                p_value=p_value if tested and use else None,
                share_of_shift=part,
                measured=use,
            )
        )
    return judged


def _can_be_judged(item: ComparedColumn, policy: DriftPolicy) -> bool:
    """Tell whether there is a number, and under the tested rule enough values; a column that is all gone has been judged."""
    if math.isnan(item.measured.value):
        return False
    values = (item.reference.count, item.current.count)
    return policy.rule != "tested" or min(values) == 0 or min(values) >= policy.minimum_rows


def _headline(
    columns: Sequence[FeatureDrift], pairs: Sequence[FeatureDrift], absent: Collection[str], what: str
) -> str:
    drifted = [item for item in columns if item.drifted]
    judged = [item for item in columns if item.measured]
    unmeasured = [item.feature for item in columns if not item.measured and item.feature not in absent]
    parts = [f"{len(drifted) or 'none'} of {len(judged)} {what} moved"]
    if drifted:
        parts[0] += f" ({', '.join(item.sentence for item in drifted[:3])})"
    if apart := [item.feature for item in pairs if item.drifted]:
        parts.append(f"columns that go together differently: {_named(apart)}")
    if unmeasured:
        parts.append(f"{len(unmeasured)} could not be judged ({_named(unmeasured)})")
    if there := [item for item in columns if item.feature in absent]:
        parts.append(_not_measured(there))
    return "; ".join(parts)


def _without_rows(compared: Sequence[ComparedColumn]) -> str:
    """Say which columns were judged less exactly than they could have been."""
    names = [item.current.name for item in compared if item.rows_gone]
    return f"; by profiles alone, as the rows are gone: {_named(names)}" if names else ""


def _not_measured(absent: Sequence[FeatureDrift]) -> str:
    """Say which columns one side does not have, and why: those that have come together share a reason."""
    together: dict[str, list[str]] = {}
    for item in absent:
        together.setdefault(item.sentence.removeprefix(f"{item.feature}: "), []).append(item.feature)
    return "not measured: " + ", ".join(f"{_named(names)} ({why})" for why, names in together.items())


def _unmeasured(columns: Sequence[FeatureDrift], absent: Collection[str], policy: DriftPolicy) -> str:
    """Say why columns could not be judged, and what to do."""
    if there := [item for item in columns if item.feature in absent]:
        return _not_measured(there)
    without = [f"{item.feature} (by {item.detector})" for item in columns if math.isnan(item.statistic)]
    if without:
        return f"the detector gave no number for {_named(without)}; choose another one"
    names = _named([item.feature for item in columns])
    return f"fewer than {policy.minimum_rows} values of {names}; take a longer window, or lower minimum_rows"


def _named(names: Iterable[str]) -> str:
    first, *rest = ", ".join(list(names)[:3]), *list(names)[3:]
    return f"{first} and {len(rest)} more" if rest else first
