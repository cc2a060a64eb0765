"""Metrics: how good predictions are. A metric is a function of sums over rows, so that resampling it is cheap."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from airflow_mlops.core.comparison.predictions import Graded, Predictions
from airflow_mlops.core.extension import load_object
from airflow_mlops.exceptions import InsufficientDataError

Array = NDArray[Any]

#: Bins of confidence in the calibration error.
CALIBRATION_BINS = 15
#: Bins of the score in the resampling of ranking metrics; their value itself is exact.
RANKING_BINS = 512
#: A probability of zero for what happened would cost infinitely much; scikit-learn clips alike.
_SMALLEST = float(np.finfo(np.float64).eps)


#: ``rows(graded) -> (n, k)``: what each row adds to the sums.
RowTerms = Callable[[Graded], Array]
#: ``cells(graded) -> ((n,) cell numbers, number of cells, (n,) weights)``: which sum each row adds its weight to (one when
#: the weights are ``None``); ``None`` where that won't do.
RowCells = Callable[[Graded], tuple[Array, int, Array | None] | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """How to score predictions.

    :param name: name, or import path of a user's own.
    :param greater_is_better: direction of the value.
    :param score: ``score(graded) -> float``, exact.
    :param terms: what each row adds to the sums; ``None`` when rows are counted in ``cells``, or for a metric that is only
        a number.
    :param cells: which count each row adds one to.
    :param of_sums: turns sums of shape ``(..., k + 1)`` into values of shape ``(...)``; the last sum is the row count.
    :param losses: per-row losses of shape ``(n,)``, smaller is better, whose mean orders models as the metric does;
        ``None`` where the metric is no mean over rows.
    :param mean_loss: turns the metric's value into the mean of ``losses``; ``None`` where that can't be done.
    :param loss_name: what a mean of ``losses`` is called when it is told; default the metric's own name.
    :param of_mean_loss: turns a mean of ``losses`` into what is told; default as it is.
    :param needs_probabilities: whether bare labels are not enough.
    """

    name: str
    greater_is_better: bool
    score: Callable[[Graded], float]
    terms: RowTerms | None = None
    cells: RowCells | None = None
    of_sums: Callable[[Array], Array] | None = None
    losses: Callable[[Graded], Array] | None = None
    mean_loss: Callable[[float], float] | None = None
    loss_name: str | None = None
    of_mean_loss: Callable[[float], float] | None = None
    needs_probabilities: bool = False

    def block_sums(self, graded: Graded, starts: Array) -> Array | None:
        """Sum what the rows add, block by block.

        :param starts: first row of each block, ascending, shape ``(blocks,)``.
        :returns: shape ``(blocks, k + 1)``, row counts last; ``None`` for a metric that is only a number.
        """
        ends = np.append(starts[1:], len(graded))
        counts = (ends - starts).astype(np.float64)[:, None]
        if self.terms is not None:
            return np.hstack([np.add.reduceat(self.terms(graded), starts, axis=0), counts])
        counted = self.cells(graded) if self.cells else None
        if counted is None:
            return None
        numbers, size, weights = counted
        blocks = np.repeat(np.arange(len(starts)), ends - starts)
        table = np.bincount(blocks * size + numbers, weights=weights, minlength=len(starts) * size)
        return np.hstack([table.reshape(len(starts), size).astype(np.float64), counts])


@dataclass(frozen=True, kw_only=True, slots=True)
class RowLosses:
    """A loss per row, and how a mean of them is told.

    :param name: what is told, such as ``rmse`` or ``error rate``.
    :param values: smaller is better, shape ``(n,)``.
    :param of_mean: turns a mean of them into what is told, such as the root of mean squares; ``None``: as it is.
    """

    name: str
    values: Array
    of_mean: Callable[[float], float] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricValue:
    """A metric on some rows.

    :param metric: its name.
    :param value: its value.
    :param standard_deviation: of the per-row losses; ``None`` where the metric has none.
    :param row_count: rows it was measured on.
    """

    metric: str
    value: float
    standard_deviation: float | None
    row_count: int


#: What is reported when nothing else is asked for, per kind of output.
DEFAULT_METRICS = {
    "regression": ("mae", "rmse", "mape", "r2"),
    "classification": (
        "accuracy",
        "balanced_accuracy",
        "precision",
        "recall",
        "f1",
        "roc_auc",
        "pr_auc",
        "log_loss",
        "brier",
        "calibration_error",
    ),
}


def value_range(name: str) -> tuple[float, float]:
    """Give the smallest and largest value a metric can have.

    >>> value_range("accuracy"), value_range("r2"), value_range("my_metrics:profit")
    ((0.0, 1.0), (-inf, 1.0), (-inf, inf))
    """
    kind, _, _ = name.partition("@")
    if kind == "r2":
        return -math.inf, 1.0
    if kind == "brier":
        return 0.0, 2.0  # summed over the labels
    if kind in {*DEFAULT_METRICS["classification"]} - {"log_loss"}:
        return 0.0, 1.0
    return (0.0 if kind in {*_BUILT_IN, "quantile_loss"} else -math.inf), math.inf


def resolve_metric(name: str) -> Metric:
    """Find a built-in metric by name, or a user's by import path.

    A user's metric is a function ``metric(target, prediction) -> float``; it says that more is better by an attribute
    ``greater_is_better = True``. With an attribute ``per_row = True`` it gives one loss (or gain) per row, whose mean is the
    metric; then it is as cheap to resample as a built-in one. ``quantile_loss@0.9`` is the loss of a 90 % quantile.

    :raises ValueError: listing the built-in names, or saying what can't be imported.
    """
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    kind, _, level = name.partition("@")
    if kind == "quantile_loss":
        return _quantile_loss(name, level)
    if ":" not in name and "." not in name:
        known = ", ".join([*_BUILT_IN, "quantile_loss@0.5"])
        raise ValueError(
            f"no metric named {name!r}; built in: {known}, or give an import path module:function"
        )
    function = load_object(name)
    if not callable(function):
        raise ValueError(f"metric {name!r} is not a function")
    return _users(name, function)


def evaluate_metric(metric: Metric, *, target: Array, prediction: Array | Predictions) -> MetricValue:
    """Score predictions.

    :param target: what turned out, shape ``(n,)``.
    :param prediction: what was predicted, shape ``(n,)``, or with probabilities.
    :raises InsufficientDataError: no rows, or the metric is not a number on them.
    :raises ValueError: the lengths differ, or the metric needs probabilities and there are none.

    >>> evaluate_metric(resolve_metric("mae"), target=np.array([1.0, 2.0]), prediction=np.array([1.0, 4.0])).value
    1.0
    """
    answers = (
        prediction if isinstance(prediction, Predictions) else Predictions(values=np.asarray(prediction))
    )
    graded = Graded(np.asarray(target), answers)
    value = measure(metric, graded)
    losses = metric.losses(graded) if metric.losses else None
    return MetricValue(
        metric=metric.name,
        value=value,
        standard_deviation=float(np.std(losses)) if losses is not None else None,
        row_count=len(graded),
    )


def measure(metric: Metric, graded: Graded) -> float:
    """Give the metric's value; see :func:`evaluate_metric` for what may be wrong."""
    if len(graded.target) != len(graded.answers):
        raise ValueError(f"{len(graded.target)} targets and {len(graded.answers)} predictions")
    if len(graded) == 0:
        raise InsufficientDataError(f"{metric.name} can't be measured on no rows")
    numbers = graded.answers.values.dtype.kind == "f" and not graded.answers.classes
    if numbers and metric.name in DEFAULT_METRICS["classification"]:
        raise ValueError(
            f"{metric.name} measures labels, and the model predicts numbers: choose mae, rmse or another metric of numbers"
        )
    if metric.needs_probabilities and graded.answers.probabilities is None:
        raise ValueError(
            f"{metric.name} needs probabilities, and the model gives none: choose accuracy, f1 or another metric of labels"
        )
    value = float(metric.score(graded))
    if not math.isfinite(value):
        raise InsufficientDataError(
            f"{metric.name} is {value} on {len(graded)} rows: look for missing or infinite targets and predictions, or "
            "for a class that does not occur"
        )
    return value


def row_losses(metric: Metric, graded: Graded) -> RowLosses:
    """Give a loss per row for parts of the rows: the metric's own, else mistakes of labels or absolute errors of numbers."""
    if metric.losses is not None and not (
        metric.needs_probabilities and graded.answers.probabilities is None
    ):
        name = metric.loss_name or metric.name
        return RowLosses(name=name, values=metric.losses(graded), of_mean=metric.of_mean_loss)
    if graded.answers.classes:
        return RowLosses(name="error rate", values=_mistakes(graded))
    return RowLosses(name="mae", values=_absolute_errors(graded))


# -- numbers -------------------------------------------------------------------------------------------------


def _absolute_errors(graded: Graded) -> Array:
    return np.abs(graded.errors)


def _squared_errors(graded: Graded) -> Array:
    return np.square(graded.errors)


def _relative_errors(graded: Graded) -> Array:
    """Absolute errors as a share of the target; where that is zero, of the smallest number, as scikit-learn has it."""
    return np.abs(graded.errors) / np.maximum(np.abs(graded.target.astype(np.float64)), _SMALLEST)


def require_nonzero(name: str, target: Array) -> None:
    """See that errors can be told as shares of the target.

    :param name: what the target is called.
    :raises InsufficientDataError: some are zero; with how many and what to do.
    """
    zeros = int(np.count_nonzero(target == 0))
    if zeros:
        raise InsufficientDataError(
            f"mape divides by the target, and {name} is zero in {zeros} of {len(target)} rows: choose mae, rmse or r2, or a metric "
            "of your own by import path, such as the sum of the errors over the sum of the targets"
        )


def require_decisive(metric: Metric, label_count: int) -> None:
    """See that a metric can tell a good model from one that knows nothing.

    :param label_count: labels there are; 0 for numbers.
    :raises ValueError: it is the recall of two labels, by which saying yes to everything is perfect.
    """
    if metric.name == "recall" and label_count == 2:
        raise ValueError(
            "recall can't decide between two labels: whoever always says yes is perfect by it. Choose f1 or pr_auc, or a metric of "
            "your own by import path that says what a false alarm costs"
        )


def _mean_relative_error(graded: Graded) -> float:
    require_nonzero("it", graded.target.astype(np.float64))
    return float(np.mean(_relative_errors(graded)))


def _r2_terms(graded: Graded) -> Array:
    numbers = graded.target.astype(np.float64)
    # The spread is the same about any point, and sums about the mean lose no digits.
    about = numbers - np.mean(numbers)
    return np.column_stack([np.square(graded.errors), about, np.square(about)])


def _r2_of_sums(sums: Array) -> Array:
    """Share of the target's variance that is explained.

    Source: Wright, "Correlation and causation", Journal of Agricultural Research 20, 1921.
    """
    residual, total, squares, count = (sums[..., place] for place in range(4))
    spread = squares - np.square(total) / count
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(spread > 0.0, 1.0 - residual / spread, np.nan))


def _quantile_loss(name: str, level: str) -> Metric:
    """Loss whose best constant is a quantile.

    Source: Koenker and Bassett, "Regression quantiles", Econometrica 46, 1978.
    """
    try:
        share = float(level)
    except ValueError:
        share = math.nan
    if not 0.0 < share < 1.0:
        raise ValueError(f"{name!r}: give the quantile between 0 and 1, such as quantile_loss@0.9")

    def losses(graded: Graded) -> Array:
        short = -graded.errors
        return np.maximum(share * short, (share - 1.0) * short)

    return _mean_metric(name, losses)


# -- labels --------------------------------------------------------------------------------------------------


def _mistakes(graded: Graded) -> Array:
    return np.asarray(graded.truth != graded.answered, dtype=np.float64)


def _confusion_cells(graded: Graded) -> tuple[Array, int, None]:
    size = graded.label_count
    return graded.truth * size + graded.answered, size * size, None


def _confusion(sums: Array) -> tuple[Array, Array, Array]:
    """Give true positives, actual and predicted rows per label, each of shape ``(..., labels)``."""
    size = math.isqrt(sums.shape[-1] - 1)
    table = sums[..., :-1].reshape(*sums.shape[:-1], size, size)
    return np.einsum("...ii->...i", table), table.sum(axis=-1), table.sum(axis=-2)


def _ratio(part: Array, whole: Array) -> Array:
    """Zero of zero is zero, as scikit-learn has it."""
    return np.divide(part, whole, out=np.zeros_like(part, dtype=np.float64), where=whole > 0)


def _of_labels(values: Array) -> Array:
    """Of two labels take the positive, last one; of more the plain mean."""
    return values[..., -1] if values.shape[-1] == 2 else values.mean(axis=-1)


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


# -- probabilities -------------------------------------------------------------------------------------------


def _log_losses(graded: Graded) -> Array:
    """Minus the logarithm of what was given to what happened.

    Source: Good, "Rational decisions", JRSS B 14, 1952.
    """
    happened = graded.probabilities[np.arange(len(graded)), graded.truth]
    return np.asarray(-np.log(np.clip(happened, _SMALLEST, 1.0)))


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
    return _one_against_rest(graded, _rank_auc_of_counts)


def _pr_auc(graded: Graded) -> float:
    """Average precision: the step-wise area under precision over recall, as scikit-learn has it."""
    return _one_against_rest(graded, _average_precision_of_counts)


def _one_against_rest(graded: Graded, area: Callable[[Array, Array], Array]) -> float:
    given = graded.probabilities
    if given.shape[1] == 2:
        _, _, counts = graded.ranked
        return float(area(counts[:, 1], counts[:, 0]))
    areas = []
    for label in range(given.shape[1]):
        _, places = np.unique(given[:, label], return_inverse=True)
        positive = graded.truth == label
        areas.append(area(np.bincount(places, weights=positive), np.bincount(places, weights=~positive)))
    return float(np.mean(areas))


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


def _ranking_cells(graded: Graded) -> tuple[Array, int, None] | None:
    """Count positive and negative rows in bins of the score that hold equally many rows; two labels only."""
    if graded.label_count != 2:
        return None
    _, places, counts = graded.ranked
    rows = counts.sum(axis=1)
    middle = np.cumsum(rows) - rows / 2.0
    bins = np.minimum((middle * (RANKING_BINS / len(graded))).astype(np.int64), RANKING_BINS - 1)
    return bins[places] * 2 + (graded.truth == 1), 2 * RANKING_BINS, None


def _ranking(area: Callable[[Array, Array], Array]) -> Callable[[Array], Array]:
    return lambda sums: area(sums[..., 1:-1:2], sums[..., 0:-1:2])


# -- the list ------------------------------------------------------------------------------------------------


def _mean_of_sums(sums: Array) -> Array:
    return np.asarray(sums[..., 0] / sums[..., 1])


def _mean_metric(
    name: str, losses: Callable[[Graded], Array], *, needs_probabilities: bool = False
) -> Metric:
    """Make a metric that is the mean of per-row losses."""
    return Metric(
        name=name,
        greater_is_better=False,
        score=lambda graded: float(np.mean(losses(graded))),
        terms=lambda graded: losses(graded)[:, None],
        of_sums=_mean_of_sums,
        losses=losses,
        mean_loss=lambda value: value,
        needs_probabilities=needs_probabilities,
    )


def _count_metric(
    name: str,
    cells: RowCells,
    of_sums: Callable[[Array], Array],
    *,
    greater_is_better: bool = True,
    needs_probabilities: bool = False,
) -> Metric:
    """Make a metric of counts of rows by cell."""

    def score(graded: Graded) -> float:
        counted = cells(graded)
        if counted is None:
            return math.nan
        numbers, size, weights = counted
        return float(of_sums(np.append(np.bincount(numbers, weights=weights, minlength=size), len(graded))))

    return Metric(
        name=name,
        greater_is_better=greater_is_better,
        score=score,
        cells=cells,
        of_sums=of_sums,
        needs_probabilities=needs_probabilities,
    )


def _users(name: str, function: Callable[[Array, Array], Any]) -> Metric:
    greater_is_better = bool(getattr(function, "greater_is_better", False))
    if not getattr(function, "per_row", False):
        return Metric(
            name=name,
            greater_is_better=greater_is_better,
            score=lambda graded: _asked(name, function, graded, float),
        )

    def per_row(graded: Graded) -> Array:
        losses: Array = _asked(name, function, graded, lambda given: np.asarray(given, dtype=np.float64))
        if losses.shape != (len(graded),):
            raise ValueError(
                f"metric {name!r} gave values of shape {losses.shape} for {len(graded)} rows: per_row = True promises one per row"
            )
        return losses

    sign = -1.0 if greater_is_better else 1.0
    return Metric(
        name=name,
        greater_is_better=greater_is_better,
        score=lambda graded: float(np.mean(per_row(graded))),
        terms=lambda graded: per_row(graded)[:, None],
        of_sums=_mean_of_sums,
        losses=lambda graded: sign * per_row(graded),
        mean_loss=lambda value: sign * value,
        of_mean_loss=(lambda mean: -mean) if greater_is_better else None,
    )


def _asked(
    name: str, function: Callable[[Array, Array], Any], graded: Graded, read: Callable[[Any], Any]
) -> Any:
    """Call a user's function and read its answer; what goes wrong names the metric."""
    try:
        return read(function(graded.target, graded.native_answers))
    except Exception as err:
        raise ValueError(
            f"metric {name!r} failed on {len(graded)} rows: {type(err).__name__}: {err}; it takes targets and predictions and gives "
            "a number, or with per_row = True one for each row"
        ) from err


_BUILT_IN = {
    metric.name: metric
    for metric in (
        _mean_metric("mae", _absolute_errors),
        replace(_mean_metric("mape", _relative_errors), score=_mean_relative_error),
        Metric(
            name="rmse",
            greater_is_better=False,
            score=lambda graded: float(np.sqrt(np.mean(_squared_errors(graded)))),
            terms=lambda graded: _squared_errors(graded)[:, None],
            of_sums=lambda sums: np.sqrt(_mean_of_sums(sums)),
            losses=_squared_errors,
            mean_loss=lambda value: value**2,
            of_mean_loss=math.sqrt,
        ),
        Metric(
            name="r2",
            greater_is_better=True,
            score=lambda graded: float(_r2_of_sums(np.append(_r2_terms(graded).sum(axis=0), len(graded)))),
            terms=_r2_terms,
            of_sums=_r2_of_sums,
            losses=_squared_errors,
            loss_name="rmse",
            of_mean_loss=math.sqrt,
        ),
        Metric(
            name="accuracy",
            greater_is_better=True,
            score=lambda graded: float(1.0 - np.mean(_mistakes(graded))),
            terms=lambda graded: _mistakes(graded)[:, None],
            of_sums=lambda sums: 1.0 - _mean_of_sums(sums),
            losses=_mistakes,
            mean_loss=lambda value: 1.0 - value,
            loss_name="error rate",
        ),
        _count_metric("balanced_accuracy", _confusion_cells, _balanced_accuracy_of_sums),
        _count_metric("precision", _confusion_cells, _precision_of_sums),
        _count_metric("recall", _confusion_cells, _recall_of_sums),
        _count_metric("f1", _confusion_cells, _f1_of_sums),
        Metric(
            name="roc_auc",
            greater_is_better=True,
            score=_roc_auc,
            cells=_ranking_cells,
            of_sums=_ranking(_rank_auc_of_counts),
            needs_probabilities=True,
        ),
        Metric(
            name="pr_auc",
            greater_is_better=True,
            score=_pr_auc,
            cells=_ranking_cells,
            of_sums=_ranking(_average_precision_of_counts),
            needs_probabilities=True,
        ),
        _mean_metric("log_loss", _log_losses, needs_probabilities=True),
        _mean_metric("brier", _brier_losses, needs_probabilities=True),
        _count_metric(
            "calibration_error",
            _calibration_cells,
            _calibration_of_sums,
            greater_is_better=False,
            needs_probabilities=True,
        ),
    )
}
