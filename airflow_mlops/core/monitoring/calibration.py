"""Calibration: what the probabilities of a model are worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from airflow_mlops.core.monitoring.stretches import FOLDS, ROWS_PER_FOLD, left_out

Array = NDArray[Any]

#: Points of a stored curve at most.
_POINTS = 256

CalibrationKind = Literal["none", "isotonic", "platt"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """A monotone, piecewise linear function of a probability; flat outside its points.

    :param given: what the model says, ascending.
    :param true: how often it happens.
    """

    given: tuple[float, ...]
    true: tuple[float, ...]

    def __call__(self, probabilities: Array) -> Array:
        return np.interp(probabilities, self.given, self.true)


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """What the probabilities of a model are worth, learned on rows it never saw.

    :param kind: how it was learned.
    :param curves: one per class; of two classes, for the positive one only.
    """

    kind: CalibrationKind
    curves: tuple[Curve, ...]

    def __call__(self, probabilities: Array) -> Array:
        """Give calibrated probabilities.

        :param probabilities: of the classes, shape ``(n, classes)``.
        :returns: same shape, rows that add up to 1.
        """
        if len(self.curves) == 1:
            positive = self.curves[0](probabilities[:, 1])
            return np.column_stack([1.0 - positive, positive])
        each = np.column_stack([curve(probabilities[:, place]) for place, curve in enumerate(self.curves)])
        total = each.sum(axis=1, keepdims=True)
        return np.where(total > 0.0, each / np.where(total > 0.0, total, 1.0), probabilities)


def fit_calibration(
    probabilities: Array, truth: Array, *, kind: CalibrationKind | None = None
) -> Calibration:
    """Learn what the probabilities are worth; each class against the rest.

    Source: Zadrozny and Elkan, "Transforming classifier scores into accurate multiclass probability estimates", KDD 2002
    (isotonic, one against the rest); Platt, "Probabilistic outputs for support vector machines", 1999.

    :param probabilities: of the classes, shape ``(n, classes)``, in time order.
    :param truth: number of each row's class, shape ``(n,)``.
    :param kind: how; ``None`` takes what has the smallest Brier score on rows that were left out.
    """
    chosen = kind or best_kind(probabilities, truth)
    places = [1] if probabilities.shape[1] == 2 else range(probabilities.shape[1])
    fit = {"none": _as_it_is, "isotonic": _isotonic, "platt": _platt}[chosen]
    curves = tuple(fit(probabilities[:, place], truth == place) for place in places)
    return Calibration(kind=chosen, curves=curves)


def best_kind(probabilities: Array, truth: Array) -> CalibrationKind:
    """Find what has the smallest Brier score on rows that were left out."""
    happened = np.eye(probabilities.shape[1])[truth]
    kinds: tuple[CalibrationKind, ...] = ("isotonic", "platt", "none")
    scores = dict.fromkeys(kinds, 0.0)
    for learn, check in left_out(len(truth), min(FOLDS, max(2, len(truth) // ROWS_PER_FOLD))):
        for kind in kinds:
            given = fit_calibration(probabilities[learn], truth[learn], kind=kind)(probabilities[check])
            scores[kind] += float(np.square(given - happened[check]).sum())
    return min(kinds, key=lambda kind: scores[kind])


def _as_it_is(given: Array, happened: Array) -> Curve:
    return Curve(given=(0.0, 1.0), true=(0.0, 1.0))


def _isotonic(given: Array, happened: Array) -> Curve:
    """Learn the best monotone curve.

    Source: Ayer et al., "An empirical distribution function for sampling with incomplete information", Annals of Mathematical
    Statistics 26, 1955 (pool adjacent violators).
    """
    from scipy.optimize import isotonic_regression

    points, places, counts = np.unique(given, return_inverse=True, return_counts=True)
    shares = np.bincount(places, weights=happened) / counts
    fitted = isotonic_regression(shares, weights=counts).x
    # Only the ends of each step are needed: between them the curve is flat, from one to the next it is straight.
    step = np.flatnonzero(np.diff(fitted)) + 1
    kept = np.unique(np.concatenate([[0, len(points) - 1], step - 1, step]).astype(int))
    if len(kept) > _POINTS:
        kept = kept[np.linspace(0, len(kept) - 1, _POINTS).astype(int)]
    return Curve(given=tuple(points[kept].tolist()), true=tuple(fitted[kept].tolist()))


def _platt(given: Array, happened: Array) -> Curve:
    """Fit a sigmoid of the log-odds, with targets pulled in as Platt has it; tabulated."""
    from scipy.optimize import minimize

    hits = float(happened.sum())
    misses = len(happened) - hits
    wanted = np.where(happened, (hits + 1.0) / (hits + 2.0), 1.0 / (misses + 2.0))
    odds = _log_odds(given)
    design = np.column_stack([odds, np.ones_like(odds)])

    def loss(beta: Array) -> tuple[float, Array]:
        logits = design @ beta
        fitted = 1.0 / (1.0 + np.exp(-np.clip(logits, -500.0, 500.0)))
        value = np.mean(np.logaddexp(0.0, logits) - wanted * logits)
        return float(value), design.T @ (fitted - wanted) / len(wanted)

    beta = minimize(loss, np.zeros(2), jac=True, method="BFGS").x
    if beta[0] <= 0.0:  # scores the wrong way round are worth nothing: the rate is all that is known
        rate = float(np.mean(happened))
        return Curve(given=(0.0, 1.0), true=(rate, rate))
    grid = np.linspace(-12.0, 12.0, _POINTS - 1)
    true = 1.0 / (1.0 + np.exp(-(grid * beta[0] + beta[1])))
    return Curve(given=tuple((1.0 / (1.0 + np.exp(-grid))).tolist()), true=tuple(true.tolist()))


def _log_odds(probabilities: Array) -> Array:
    inside = np.clip(probabilities, 6e-6, 1.0 - 6e-6)
    return np.asarray(np.log(inside / (1.0 - inside)))
