"""Drift: how far the current window's columns are from the reference, from their profiles alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from airflow_mlops.core.detectors import (
    DISTANCE_THRESHOLD,
    ColumnRows,
    Detector,
    default_detector,
    effect_detector,
    find_detector,
    significance,
)
from airflow_mlops.core.profile_columns import ColumnProfile, PairProfile
from airflow_mlops.core.root_cause import describe, shares_of_shift
from airflow_mlops.core.statistics import Measured, known
from airflow_mlops.exceptions import InsufficientDataError

if TYPE_CHECKING:
    from airflow_mlops.core.profile import Profile

Rule = Literal["tested", "evidently"]
Correction = Literal["holm", "benjamini_hochberg", "none"]
#: Name of a detector for all columns, or by column.
DetectorChoice = str | Mapping[str, str] | None
#: Gives a column's values on both sides.
ReadRows = Callable[[str], ColumnRows]

#: A statistic from cells may be off by so much before the rows are read,
SCORE_TOLERANCE = 1e-3
#: where there are no more than so many of both sides. Rows that could change a verdict are read in any number.
SCORE_ROWS = 2_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class DriftPolicy:
    """When a column, and when a window counts as drifted.

    :param rule: ``tested``: a column has drifted when its distance reaches the threshold *and* the difference is no accident
        of the sample. ``evidently``: the verdict Evidently's ``DataDriftPreset`` gives.
    :param significance: of the tests of all columns of a window together, in ``(0, 1)``. With Holm's correction this bounds
        the share of windows in which any column is called drifted by accident.
    :param correction: for testing many columns: ``holm`` bounds the chance of any false alarm, however columns depend on each
        other; ``benjamini_hochberg`` bounds the share of false ones among the alarms and finds more; ``none``.
    :param minimum_rows: fewer values of a column can't be judged (rule of thumb).
    :param share_threshold: share of drifted columns from which the window counts as drifted.
    """

    rule: Rule = "tested"
    significance: float = 0.01
    correction: Correction = "holm"
    minimum_rows: int = 30
    share_threshold: float = 0.5


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
    :param measured: ``False``: there are too few values to judge.
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
    """All columns' comparisons, those that drifted first, largest part in the shift first."""

    features: tuple[FeatureDrift, ...]
    drifted_count: int
    feature_count: int
    drifted_share: float
    drifted: bool
    headline: str


class _Compared(NamedTuple):
    """A column before all are judged together."""

    reference: ColumnProfile
    current: ColumnProfile
    detector: Detector
    measured: Measured
    threshold: float
    effect: float
    p_value: float


def compare_profiles(
    reference: Profile,
    current: Profile,
    *,
    detector: DetectorChoice = None,
    thresholds: Mapping[str, float] | None = None,
    policy: DriftPolicy | None = None,
    read_rows: ReadRows | None = None,
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
    :param what: what the columns are, for the headline.
    :raises InsufficientDataError: the current window has no rows, or fewer than the policy needs; that is not "no drift".
    """
    policy = policy or DriftPolicy()
    _require_rows(reference, current, policy)
    compared = [
        _compare(
            reference.column(column.name),
            column,
            detector=_chosen(detector, reference.column(column.name), column, policy),
            threshold=(thresholds or {}).get(column.name),
            read_rows=read_rows,
        )
        for column in current.columns
    ]
    features = _judge(compared, policy)
    columns = [
        item
        for item, part in zip(features, compared, strict=True)
        if not isinstance(part.current, PairProfile)
    ]
    drifted = [item for item in columns if item.drifted]
    share = len(drifted) / len(columns) if columns else 0.0
    features.sort(key=lambda item: (item.drifted, item.share_of_shift), reverse=True)
    return DriftReport(
        features=tuple(features),
        drifted_count=len(drifted),
        feature_count=len(columns),
        drifted_share=share,
        drifted=bool(drifted) and share >= policy.share_threshold,
        headline=_headline([item for item in features if item.drifted], len(columns), what),
    )


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
    if policy.rule == "tested" and current.row_count < policy.minimum_rows:
        raise InsufficientDataError(
            f"the current window has {current.row_count} rows, {policy.minimum_rows} are needed to judge drift: take a longer "
            "window, or lower minimum_rows"
        )


def _chosen(
    choice: DetectorChoice, reference: ColumnProfile, current: ColumnProfile, policy: DriftPolicy
) -> Detector:
    name = choice if isinstance(choice, str) or choice is None else choice.get(reference.name)
    return find_detector(name or default_detector(reference, current, distances=policy.rule == "tested"))


def _compare(
    reference: ColumnProfile,
    current: ColumnProfile,
    *,
    detector: Detector,
    threshold: float | None,
    read_rows: ReadRows | None,
) -> _Compared:
    if type(reference) is not type(current):
        raise ValueError(
            f"column {reference.name!r} is a {reference.layout.kind} in the reference, a {current.layout.kind} here"
        )
    limit = detector.threshold if threshold is None else threshold
    if not reference.count or not current.count:
        return _gone(reference, current, detector, limit)
    measured = _measure(reference, current, detector, limit, read_rows)
    if detector.is_p_value or detector.name not in _EFFECTS:
        name = effect_detector(reference, current)
        told = find_detector(name).profiles(reference, current)
        effect = told.value if told else 0.0
    else:
        effect = measured.value
    # A test that was asked for also says whether the difference is an accident.
    p_value = measured.value if detector.is_p_value else significance(reference, current)
    effect_limit = DISTANCE_THRESHOLD if detector.is_p_value or detector.name not in _EFFECTS else limit
    return _Compared(reference, current, detector, measured, limit, effect / effect_limit, p_value)


#: Distances that measure an effect themselves.
_EFFECTS = frozenset({"wasserstein", "jensen_shannon"})


def _gone(
    reference: ColumnProfile, current: ColumnProfile, detector: Detector, threshold: float
) -> _Compared:
    """Compare with a side that has no values: nothing changed where neither has, everything did otherwise."""
    same = reference.count == current.count
    far = 0.0 if detector.is_p_value else float("inf")
    near = 1.0 if detector.is_p_value else 0.0
    return _Compared(
        reference,
        current,
        detector,
        known(near if same else far),
        threshold,
        0.0 if same else float("inf"),
        1.0 if same else 0.0,
    )


def _measure(
    reference: ColumnProfile,
    current: ColumnProfile,
    detector: Detector,
    threshold: float,
    read_rows: ReadRows | None,
) -> Measured:
    """Measure from profiles, and from the rows where the profiles can't tell the verdict."""
    measured = detector.profiles(reference, current)
    unsure = measured is None or detector.in_doubt(measured, threshold)
    if measured is not None and reference.row_count + current.row_count <= SCORE_ROWS:
        unsure = unsure or measured.error > SCORE_TOLERANCE
    if unsure and detector.rows is not None and read_rows is not None:
        rows = read_rows(current.name)
        return known(detector.rows(rows.reference, rows.current))
    if measured is None:
        raise InsufficientDataError(
            f"{detector.name} of column {current.name!r} needs the rows of both sides, and only profiles are at hand; "
            "use wasserstein or ks, or a reference whose rows are kept"
        )
    return measured


def _judge(compared: Sequence[_Compared], policy: DriftPolicy) -> list[FeatureDrift]:
    """Judge all columns together."""
    tested = policy.rule == "tested"
    p_values = adjusted_p_values([item.p_value for item in compared], policy.correction)
    parts = shares_of_shift([item.effect for item in compared])
    judged = []
    for item, p_value, part in zip(compared, p_values, parts, strict=True):
        fires = item.detector.fires(item.measured.value, item.threshold)
        enough = not tested or item.current.row_count >= policy.minimum_rows
        if tested:
            large = item.effect >= 1.0 if item.detector.is_p_value else fires
            fires = enough and large and p_value <= policy.significance
        sentence = describe(item.reference, item.current)
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
                exact=item.measured.exact,
                p_value=p_value if tested else None,
                share_of_shift=part,
                measured=enough,
            )
        )
    return judged


def _headline(drifted: list[FeatureDrift], count: int, what: str) -> str:
    if not drifted:
        return f"none of {count} {what} moved"
    shown = ", ".join(item.sentence for item in drifted[:3])
    return f"{len(drifted)} of {count} {what} moved ({shown})"
