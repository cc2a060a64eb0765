"""Drift: how far the current window's columns are from the reference, from their profiles alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from airflow_mlops.core.extension import load_object
from airflow_mlops.core.profile import FEW_VALUES, CategoricalProfile, ColumnProfile, NumericProfile, Profile
from airflow_mlops.exceptions import InsufficientDataError

Array = NDArray[Any]

#: Threshold of every built-in statistic; Evidently's default, a rule of thumb.
DEFAULT_THRESHOLD = 0.1

#: Smallest share in the population stability index; an empty bin would make it infinite.
_SMALLEST_SHARE = 1e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureDrift:
    """One column's comparison.

    :param feature: column.
    :param detector: statistic that was used.
    :param statistic: its value.
    :param threshold: value from which the column counts as drifted.
    :param drifted: whether it does.
    :param sentence: what moved, in words.
    """

    feature: str
    detector: str
    statistic: float
    threshold: float
    drifted: bool
    sentence: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DriftReport:
    """All columns' comparisons, furthest over its threshold first."""

    features: tuple[FeatureDrift, ...]
    drifted_count: int
    feature_count: int
    drifted_share: float
    drifted: bool
    headline: str


def compare_profiles(
    reference: Profile, current: Profile, *, detector: str | None = None, share_threshold: float = 0.5
) -> DriftReport:
    """Compare every column of ``current`` with the reference.

    :param reference: profile of the training rows.
    :param current: profile of the window, made with ``like=reference``.
    :param detector: ``wasserstein``, ``jensen_shannon``, ``psi`` or the import path of
        ``detector(reference_column, current_column) -> float`` (its attribute ``threshold`` is used, if it has one); ``None`` takes the
        normed Wasserstein distance for numbers and the Jensen-Shannon distance for categories and for numbers with at most
        five values, as Evidently 0.7 does with more than 1,000 reference rows.
    :param share_threshold: share of drifted columns from which the window counts as drifted.
    :raises InsufficientDataError: the current window has no rows; that is not "no drift".
    """
    if current.row_count == 0:
        raise InsufficientDataError("the current window has no rows; drift can't be judged")
    features = [_compare(reference.column(column.name), column, detector) for column in current.columns]
    features.sort(key=lambda item: item.statistic / item.threshold, reverse=True)
    drifted = [item for item in features if item.drifted]
    share = len(drifted) / len(features)
    return DriftReport(
        features=tuple(features),
        drifted_count=len(drifted),
        feature_count=len(features),
        drifted_share=share,
        drifted=share >= share_threshold,
        headline=_headline(drifted, features),
    )


def wasserstein(reference: NumericProfile, current: NumericProfile) -> float:
    """Normed Wasserstein distance: area between the distribution functions over the reference's standard deviation.

    Source: Ramdas, Garcia Trillos and Cuturi, "On Wasserstein two-sample testing and related families of nonparametric
    tests", Entropy 19, 2017, section 2; norming as in Evidently 0.7.
    """
    scale = max(reference.standard_deviation, 0.001)
    if reference.count == 0 or current.count == 0:
        return float("inf") if reference.count != current.count else 0.0
    # Each bin's mass sits at its mean: exact for a bin of one value, off by less than a bin's width otherwise.
    positions, weights = [], []
    for profile in (reference, current):
        counts, sums = np.asarray(profile.counts, dtype=float), np.asarray(profile.sums)
        full = counts > 0
        positions.append(sums[full] / counts[full])
        weights.append(counts[full] / counts.sum())
    points = np.sort(np.concatenate(positions))
    heights = [_distribution(x, w, points[:-1]) for x, w in zip(positions, weights, strict=True)]
    return float(np.sum(np.abs(heights[0] - heights[1]) * np.diff(points)) / scale)


def jensen_shannon(reference: ColumnProfile, current: ColumnProfile) -> float:
    """Jensen-Shannon distance with natural logarithm, in ``[0, 0.833]``.

    Source: Endres and Schindelin, "A new metric for probability distributions", IEEE Trans. Information Theory 49, 2003.
    """
    p, q = _shares(reference, current)
    middle = (p + q) / 2.0
    return float(np.sqrt(max(0.0, (_relative_entropy(p, middle) + _relative_entropy(q, middle)) / 2.0)))


def population_stability_index(reference: ColumnProfile, current: ColumnProfile) -> float:
    """Symmetric relative entropy of the binned shares; a share of zero counts as 0.0001.

    Source: Siddiqi, "Credit Risk Scorecards", 2006, chapter 6.
    """
    p, q = (np.maximum(share, _SMALLEST_SHARE) for share in _shares(reference, current, bins=10))
    return float(np.sum((q - p) * np.log(q / p)))


def _distribution(positions: Array, weights: Array, points: Array) -> Array:
    order = np.argsort(positions)
    cumulative = np.concatenate([[0.0], np.cumsum(weights[order])])
    return cumulative[np.searchsorted(positions[order], points, side="right")]


def _shares(
    reference: ColumnProfile, current: ColumnProfile, *, bins: int | None = None
) -> tuple[Array, Array]:
    """Give both columns as shares over the same cells."""
    if isinstance(reference, NumericProfile) and isinstance(current, NumericProfile):
        left, right = np.asarray(reference.counts, dtype=float), np.asarray(current.counts, dtype=float)
        if bins is not None and len(left) > bins:
            cells = np.minimum((np.cumsum(left) - left) / max(left.sum(), 1.0) * bins, bins - 1).astype(int)
            left, right = (np.bincount(cells, weights=side, minlength=bins) for side in (left, right))
    elif isinstance(reference, CategoricalProfile) and isinstance(current, CategoricalProfile):
        names = sorted({*reference.counts, *current.counts})
        left, right = (
            np.array([*(side.counts.get(name, 0) for name in names), side.other_count], dtype=float)
            for side in (reference, current)
        )
    else:
        raise ValueError(f"column {reference.name!r} is a number on one side and a category on the other")
    return left / max(left.sum(), 1.0), right / max(right.sum(), 1.0)


def _relative_entropy(p: Array, q: Array) -> float:
    full = p > 0
    return float(np.sum(p[full] * np.log(p[full] / q[full])))


def _compare(reference: ColumnProfile, current: ColumnProfile, detector: str | None) -> FeatureDrift:
    name = detector or _default_detector(reference)
    threshold = DEFAULT_THRESHOLD
    if name in _BUILT_IN:
        statistic = _BUILT_IN[name](reference, current)
    elif ":" in name or "." in name:
        function = load_object(name)
        statistic = float(function(reference, current))
        threshold = float(getattr(function, "threshold", DEFAULT_THRESHOLD))
    else:
        raise ValueError(
            f"no detector named {name!r}; built in: {', '.join(_BUILT_IN)}, or give an import path"
        )
    drifted = statistic >= threshold
    return FeatureDrift(
        feature=current.name,
        detector=name,
        statistic=statistic,
        threshold=threshold,
        drifted=drifted,
        sentence=_sentence(reference, current),
    )


def _default_detector(reference: ColumnProfile) -> str:
    few = isinstance(reference, NumericProfile) and len(reference.edges) <= FEW_VALUES
    return "jensen_shannon" if few or isinstance(reference, CategoricalProfile) else "wasserstein"


def _wasserstein_of(reference: ColumnProfile, current: ColumnProfile) -> float:
    if isinstance(reference, NumericProfile) and isinstance(current, NumericProfile):
        return wasserstein(reference, current)
    raise ValueError(f"column {reference.name!r} is no number: use jensen_shannon or psi")


_BUILT_IN = {
    "wasserstein": _wasserstein_of,
    "jensen_shannon": jensen_shannon,
    "psi": population_stability_index,
}


def _sentence(reference: ColumnProfile, current: ColumnProfile) -> str:
    if isinstance(reference, NumericProfile) and isinstance(current, NumericProfile):
        return f"{current.name}: mean {reference.mean:.3g} to {current.mean:.3g}"
    p, q = _shares(reference, current)
    names = [*sorted({*_counts(reference), *_counts(current)}), "other"]
    widest = int(np.argmax(np.abs(q - p)))
    return f"{current.name}: {names[widest]!r} {p[widest]:.1%} to {q[widest]:.1%}"


def _counts(profile: ColumnProfile) -> dict[str, int]:
    return profile.counts if isinstance(profile, CategoricalProfile) else {}


def _headline(drifted: list[FeatureDrift], features: list[FeatureDrift]) -> str:
    if not drifted:
        return f"none of {len(features)} inputs moved"
    shown = ", ".join(item.sentence for item in drifted[:3])
    return f"{len(drifted)} of {len(features)} inputs moved ({shown})"
