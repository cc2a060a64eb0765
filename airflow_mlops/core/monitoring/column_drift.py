"""One column: how far its two sides are from each other, before all columns are judged together."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from airflow_mlops.core.monitoring.detectors import (
    DISTANCE_THRESHOLD,
    ColumnRows,
    Detector,
    effect_detector,
    find_detector,
    significance,
)
from airflow_mlops.core.monitoring.p_values import absence_p_value
from airflow_mlops.core.monitoring.statistics import Measured, known
from airflow_mlops.exceptions import DatasetNotFoundError, InsufficientDataError

if TYPE_CHECKING:
    from airflow_mlops.core.monitoring.drift_policy import DriftPolicy
    from airflow_mlops.core.profiles.profile_columns import ColumnProfile

#: Gives a column's values on both sides.
ReadRows = Callable[[str], ColumnRows]

#: A statistic from cells may be off by so much before the rows are read,
SCORE_TOLERANCE = 1e-3
#: where there are no more than so many of both sides. Rows that could change a verdict are read in any number.
SCORE_ROWS = 2_000_000


class ComparedColumn(NamedTuple):
    """A column before all are judged together.

    :param absent: why there is nothing to compare.
    :param rows_gone: whether rows would have told better, and are no longer there.
    """

    reference: ColumnProfile
    current: ColumnProfile
    detector: Detector
    measured: Measured
    threshold: float
    effect: float
    p_value: float
    absent: str | None = None
    rows_gone: bool = False


def compare_column(
    reference: ColumnProfile,
    current: ColumnProfile,
    *,
    detector: Detector,
    threshold: float | None,
    read_rows: ReadRows | None,
    absent: str | None,
    policy: DriftPolicy,
) -> ComparedColumn:
    """Measure how far a column's sides are apart, and how likely that is where nothing changed.

    :param threshold: instead of the detector's; ``None``: the detector's.
    :param read_rows: reads its values where only they can tell.
    :param absent: why one of the sides does not have it.
    :raises InsufficientDataError: the detector needs rows, and there are none to be had.
    :raises DatasetNotFoundError: it does, and they are gone.
    """
    if type(reference) is not type(current):
        raise ValueError(
            f"column {reference.name!r} is a {reference.layout.kind} in the reference, a {current.layout.kind} here"
        )
    limit = detector.threshold if threshold is None else threshold
    if not reference.row_count or not current.row_count:
        side = "window" if reference.row_count else "reference"
        why = absent or f"not in the rows of the {side}"
        return ComparedColumn(reference, current, detector, known(math.nan), limit, 0.0, 1.0, why)
    if not reference.count or not current.count:
        return _gone(reference, current, detector, limit, policy)
    measured, rows_gone = _measure(reference, current, detector, limit, read_rows)
    if detector.is_p_value or detector.name not in _EFFECTS:
        name = effect_detector(reference, current)
        told = find_detector(name).profiles(reference, current)
        effect = told.value if told else 0.0
    else:
        effect = measured.value
    # A test that was asked for also says whether the difference is an accident.
    p_value = measured.value if detector.is_p_value else significance(reference, current)
    effect_limit = DISTANCE_THRESHOLD if detector.is_p_value or detector.name not in _EFFECTS else limit
    return ComparedColumn(
        reference, current, detector, measured, limit, effect / effect_limit, p_value, rows_gone=rows_gone
    )


#: Distances that measure an effect themselves.
_EFFECTS = frozenset({"wasserstein", "jensen_shannon"})


def _gone(
    reference: ColumnProfile,
    current: ColumnProfile,
    detector: Detector,
    threshold: float,
    policy: DriftPolicy,
) -> ComparedColumn:
    """Compare with a side that has no values: nothing changed where neither has, everything did otherwise."""
    p_value = _chance_of_none(reference, current)
    same = reference.count == current.count and (policy.rule != "tested" or p_value == 1.0)
    return ComparedColumn(
        reference,
        current,
        detector,
        known(nearest(detector) if same else _farthest(detector)),
        threshold,
        0.0 if same else math.inf,
        p_value,
    )


def nearest(detector: Detector) -> float:
    """Give the statistic of sides that are the same."""
    return 1.0 if detector.is_p_value else 0.0


def _farthest(detector: Detector) -> float:
    return 0.0 if detector.is_p_value else math.inf


def _chance_of_none(reference: ColumnProfile, current: ColumnProfile) -> float:
    """Give the chance that one side has none of what rows of the other have: values, nulls, infinite values."""
    chances = [1.0]
    for what in ("count", "null_count", "infinite_count"):
        held, other = (getattr(side, what, 0) for side in (reference, current))
        rows, other_rows = reference.row_count, current.row_count
        if not held:
            held, other, rows, other_rows = other, held, other_rows, rows
        if held and not other:
            chances.append(absence_p_value(held, rows, other_rows))
    return min(chances)


def _measure(
    reference: ColumnProfile,
    current: ColumnProfile,
    detector: Detector,
    threshold: float,
    read_rows: ReadRows | None,
) -> tuple[Measured, bool]:
    """Measure from profiles, and from the rows where the profiles can't tell the verdict.

    :returns: also whether the rows were needed and are gone, such as those of a version that was vacuumed: what the profiles say stands.
    """
    measured = detector.profiles(reference, current)
    unsure = measured is None or detector.in_doubt(measured, threshold)
    if measured is not None and reference.row_count + current.row_count <= SCORE_ROWS:
        unsure = unsure or measured.error > SCORE_TOLERANCE
    if unsure and detector.rows is not None and read_rows is not None:
        try:
            rows = read_rows(current.name)
        except DatasetNotFoundError:
            if measured is None:
                raise
            return measured, True
        return known(detector.rows(rows.reference, rows.current)), False
    if measured is None:
        raise InsufficientDataError(
            f"{detector.name} of column {current.name!r} needs the rows of both sides, and only profiles are at hand; "
            "use wasserstein or ks, or a reference whose rows are kept"
        )
    return measured, False
