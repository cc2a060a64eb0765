"""Metrics of labels and of their probabilities."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from airflow_mlops.core.comparison.metric import (
    SMALLEST_SHARE,
    Array,
    Metric,
    count_metric,
    mean_metric,
    mean_of_sums,
)

if TYPE_CHECKING:
    from airflow_mlops.core.comparison.predictions import Graded

#: Bins of confidence in the calibration error.
CALIBRATION_BINS = 15

#: Bins of the score in the resampling of ranking metrics; their value itself is exact. Many labels share them, down to a few each.
RANKING_BINS, FEWEST_BINS = 512, 32


#: Metrics that count a rare label as much as a frequent one: of answers, and of rankings.
BY_LABEL, RANKINGS = ("balanced_accuracy", "precision", "recall", "f1"), ("roc_auc", "pr_auc")


def mistakes(graded: Graded) -> Array:
    """Give 1 for each wrong label and 0 for each right one, shape ``(n,)``."""
    return np.asarray(graded.truth != graded.answered, dtype=np.float64)


def label_weights(graded: Graded) -> Array:
    """Give each row a weight with which every label that occurs weighs as much, and the mean is one, shape ``(n,)``."""
    counts = np.bincount(graded.truth)
    return np.asarray(len(graded) / (np.count_nonzero(counts) * counts[graded.truth]))


def _confusion_cells(graded: Graded) -> tuple[Array, int, None]:
    """Count per label the rows that are it and were found, that are it and were not, and that were given it."""
    size = graded.label_count
    missed = graded.truth != graded.answered
    return np.column_stack([graded.truth + size * missed, graded.answered + 2 * size]), 3 * size, None


def _confusion(sums: Array) -> tuple[Array, Array, Array]:
    """Give true positives, actual and predicted rows per label, each of shape ``(..., labels)``."""
    size = sums.shape[-1] // 3
    hits, missed, predicted = (sums[..., part * size : (part + 1) * size] for part in range(3))
    return hits, hits + missed, predicted


def _ratio(part: Array, whole: Array) -> Array:
    """Zero of zero is zero, as scikit-learn has it."""
    return np.divide(part, whole, out=np.zeros_like(part, dtype=np.float64), where=whole > 0)


def _of_labels(values: Array) -> Array:
    """Of two labels take the positive, last one; of more the plain mean."""
    return values[..., -1] if values.shape[-1] == 2 else values.mean(axis=-1)


def _ratios(wholes: Array) -> Array:
    """Give the ratios' wholes that a metric is taken of: of two labels the positive one's, of more all."""
    return wholes[..., -1:] if wholes.shape[-1] == 2 else wholes


def _balanced_accuracy_of_sums(sums: Array) -> Array:
    """Mean recall over the labels that occur.

    Source: Brodersen et al., "The balanced accuracy and its posterior distribution", ICPR 2010, section II.
    """
    hits, actual, _ = _confusion(sums)
    return np.asarray(_ratio(hits, actual).sum(axis=-1) / np.maximum((actual > 0).sum(axis=-1), 1))


def _precision_of_sums(sums: Array) -> Array:
    hits, _, predicted = _confusion(sums)
    return _of_labels(_ratio(hits, predicted))


def _recall_of_sums(sums: Array) -> Array:
    hits, actual, _ = _confusion(sums)
    return _of_labels(_ratio(hits, actual))


def _f1_of_sums(sums: Array) -> Array:
    """Harmonic mean of precision and recall.

    Source: van Rijsbergen, "Information Retrieval", 2nd edition, 1979, chapter 7.
    """
    hits, actual, predicted = _confusion(sums)
    return _of_labels(_ratio(2.0 * hits, actual + predicted))


def log_losses(graded: Graded) -> Array:
    """Minus the logarithm of what was given to what happened.

    Source: Good, "Rational decisions", JRSS B 14, 1952.
    """
    happened = graded.probabilities[np.arange(len(graded)), graded.truth]
    return np.asarray(-np.log(np.clip(happened, SMALLEST_SHARE, 1.0)))


def _brier_losses(graded: Graded) -> Array:
    """Squared distance between the probabilities and what happened; of two labels, of the positive one alone.

    Source: Brier, "Verification of forecasts expressed in terms of probability", Monthly Weather Review 78, 1950.
    """
    given = graded.probabilities
    if given.shape[1] == 2:
        return np.asarray(np.square(given[:, 1] - (graded.truth == 1)))
    happened = graded.truth[:, None] == np.arange(given.shape[1])
    return np.asarray(np.square(given - happened).sum(axis=1))


def _calibration_cells(graded: Graded) -> tuple[Array, int, Array]:
    """Give each row's bin of confidence, and how far its confidence is above what turned out, 1 for right and 0 for wrong."""
    given = graded.probabilities
    confidence = given.max(axis=1)
    right = given.argmax(axis=1) == graded.truth
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    return bins, CALIBRATION_BINS, confidence - right


def _calibration_of_sums(sums: Array) -> Array:
    """Give the expected calibration error, in bins of equal width.

    Source: Guo et al., "On calibration of modern neural networks", ICML 2017, equation 3.
    """
    return np.asarray(np.abs(sums[..., :-1]).sum(axis=-1) / sums[..., -1])


def _roc_auc(graded: Graded) -> float:
    """Probability that a positive row gets the higher score; of more than two labels, the mean of one against the rest.

    Source: Hanley and McNeil, "The meaning and use of the area under a ROC curve", Radiology 143, 1982.
    """
    if graded.label_count != 2:
        return float(np.mean(graded.once(_against_rest).roc_areas))
    _, _, counts = graded.ranked
    return float(_rank_auc_of_counts(counts[:, 1], counts[:, 0]))


def _pr_auc(graded: Graded) -> float:
    """Average precision: the step-wise area under precision over recall, as scikit-learn has it."""
    if graded.label_count != 2:
        return float(np.mean(graded.once(_against_rest).pr_areas))
    _, _, counts = graded.ranked
    return float(_average_precision_of_counts(counts[:, 1], counts[:, 0]))


class _AgainstRest(NamedTuple):
    """Each of several labels against the rest.

    :param roc_areas: area under the ROC curve, exact, shape ``(labels,)``.
    :param pr_areas: average precision, exact.
    :param bins: each row's bin of the label's score, shape ``(labels, n)``.
    :param size: bins per label.
    """

    roc_areas: Array
    pr_areas: Array
    bins: Array
    size: int


def _against_rest(graded: Graded) -> _AgainstRest:
    given, labels = graded.probabilities, graded.label_count
    size = max(FEWEST_BINS, min(RANKING_BINS, 3 * RANKING_BINS // labels))
    found = _AgainstRest(
        np.empty(labels), np.empty(labels), np.empty((labels, len(graded)), dtype=np.uint16), size
    )
    for label in range(labels):
        distinct, places = np.unique(given[:, label], return_inverse=True)
        counted = np.bincount(places * 2 + (graded.truth == label), minlength=2 * len(distinct))
        counts = counted.reshape(-1, 2).astype(np.float64)
        found.roc_areas[label] = _rank_auc_of_counts(counts[:, 1], counts[:, 0])
        found.pr_areas[label] = _average_precision_of_counts(counts[:, 1], counts[:, 0])
        found.bins[label] = _bins(counts, size)[places]
    return found


def _bins(counts: Array, size: int) -> Array:
    """Give the bin of each score, with as much of the label as of the rest in all bins together before it.

    By rows alone, those of a rare label would lie in the few highest bins, and their order be lost.

    :param counts: rows without the label and with it, by ascending score, shape ``(scores, 2)``.
    :param size: bins.
    """
    there = counts[:, counts.sum(axis=0) > 0.0]
    middle = ((np.cumsum(there, axis=0) - there / 2.0) / there.sum(axis=0)).mean(axis=1)
    return np.asarray(np.minimum((middle * size).astype(np.int64), size - 1))


def _against_rest_cells(graded: Graded, label: int) -> tuple[Array, int]:
    """Count rows with the label and without in bins of its score."""
    found = graded.once(_against_rest)
    return found.bins[label] * np.int64(2) + (graded.truth == label), 2 * found.size


def _rank_auc_of_counts(hits: Array, misses: Array) -> Array:
    """Count the pairs in order, ties by half; counts of shape ``(..., scores)``, by ascending score."""
    below = np.cumsum(misses, axis=-1) - misses
    pairs = hits.sum(axis=-1) * misses.sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((hits * (below + 0.5 * misses)).sum(axis=-1) / pairs)


def _average_precision_of_counts(hits: Array, misses: Array) -> Array:
    found = np.cumsum(hits[..., ::-1], axis=-1)
    shown = found + np.cumsum(misses[..., ::-1], axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(shown > 0, found / shown, 0.0)
        return np.asarray((precision * hits[..., ::-1]).sum(axis=-1) / hits.sum(axis=-1))


def _ranking_cells(graded: Graded) -> tuple[Array, int, None]:
    """Count positive and negative rows in bins of the score; of two labels."""
    _, places, counts = graded.ranked
    return _bins(counts, RANKING_BINS)[places] * 2 + (graded.truth == 1), 2 * RANKING_BINS, None


def _ranking(area: Callable[[Array, Array], Array]) -> Callable[[Array], Array]:
    return lambda sums: area(sums[..., 1:-1:2], sums[..., 0:-1:2])


LABEL_METRICS = (
    Metric(
        name="accuracy",
        greater_is_better=True,
        score=lambda graded: float(1.0 - np.mean(mistakes(graded))),
        terms=lambda graded: mistakes(graded)[:, None],
        of_sums=lambda sums: 1.0 - mean_of_sums(sums),
        losses=mistakes,
        mean_loss=lambda value: 1.0 - value,
        loss_name="error rate",
    ),
    count_metric(
        "balanced_accuracy",
        _confusion_cells,
        _balanced_accuracy_of_sums,
        bases=lambda sums: _confusion(sums)[1],
    ),
    count_metric(
        "precision",
        _confusion_cells,
        _precision_of_sums,
        bases=lambda sums: _ratios(_confusion(sums)[2]),
    ),
    count_metric(
        "recall",
        _confusion_cells,
        _recall_of_sums,
        bases=lambda sums: _ratios(_confusion(sums)[1]),
    ),
    count_metric(
        "f1",
        _confusion_cells,
        _f1_of_sums,
        bases=lambda sums: _ratios(np.add(*_confusion(sums)[1:])),
    ),
    Metric(
        name="roc_auc",
        greater_is_better=True,
        score=_roc_auc,
        cells=_ranking_cells,
        label_cells=_against_rest_cells,
        of_sums=_ranking(_rank_auc_of_counts),
        needs_probabilities=True,
    ),
    Metric(
        name="pr_auc",
        greater_is_better=True,
        score=_pr_auc,
        cells=_ranking_cells,
        label_cells=_against_rest_cells,
        of_sums=_ranking(_average_precision_of_counts),
        needs_probabilities=True,
    ),
    mean_metric("log_loss", log_losses, needs_probabilities=True),
    mean_metric("brier", _brier_losses, needs_probabilities=True),
    count_metric(
        "calibration_error",
        _calibration_cells,
        _calibration_of_sums,
        greater_is_better=False,
        needs_probabilities=True,
        biased=True,
    ),
)
