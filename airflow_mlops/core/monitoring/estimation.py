"""Estimation: how good predictions are while nobody knows yet what turned out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from airflow_mlops.core.comparison.metrics import measure
from airflow_mlops.core.comparison.predictions import Graded, Predictions
from airflow_mlops.core.comparison.resampling import t_quantile
from airflow_mlops.core.monitoring.calibration import Calibration, CalibrationKind, best_kind, fit_calibration
from airflow_mlops.core.monitoring.stretches import FEWEST_FOLDS, stretches
from airflow_mlops.exceptions import InsufficientDataError

if TYPE_CHECKING:
    from airflow_mlops.core.comparison.metric import Metric

Array = NDArray[Any]

#: Name of the file inside a package folder that holds an :class:`Estimation`.
ESTIMATION_FILE = "estimation.json"
#: Share of the windows whose realized value the interval is to hold.
COVERAGE = 0.95
#: Draws of the unknown labels, and rows they are drawn for at most; more rows shrink the error by the root of their number.
_DRAWS, _DRAWN_ROWS = 200, 5_000
#: Draws for a metric that is only a number.
_SLOW_DRAWS = 40
#: Metrics of the order of the scores; more than two labels are ranked one against the rest.
_RANKING = {"roc_auc", "pr_auc"}
#: Metrics that lie between 0 and 1; an interval does not leave it.
_SHARES = {
    "accuracy",
    "balanced_accuracy",
    "precision",
    "recall",
    "f1",
    "roc_auc",
    "pr_auc",
    "calibration_error",
}

_NOT_NEGATIVE = {"log_loss", "brier"}

LabelKind = Literal["text", "integer", "number"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimation:
    """What a package knows about estimating its model's metric without labels.

    :param metric: the metric.
    :param method: ``calibration`` of probabilities (labels), ``error_model`` (numbers), or ``none``.
    :param reason: why there is none; empty otherwise.
    :param calibration: of the probabilities.
    :param label_kind: what the labels are beside text.
    :param spread: of the per-row errors about what the error model says; ``None`` without one.
    :param excess: error of the estimate for a stretch of rows it was not learned on, beyond what chance in those rows explains
        (one standard deviation; of the mean per-row loss where there is an error model).
    :param folds: stretches it was measured on.
    :param row_count: held-out rows it was learned on.
    :param effective_count: independent losses among them, see :func:`~airflow_mlops.core.monitoring.change.effective_count`; ``None`` for a
        metric that has no loss per row.
    :param model_file: the error model's file in the package.
    :param model_form: and its form.
    :param answer_field: the error model's input that holds the answer.
    :param known_rows: input rows of the error model whose output is known.
    :param known_errors: the output.
    :param format: version of this layout.
    """

    metric: str
    method: Literal["calibration", "error_model", "none"]
    reason: str = ""
    calibration: Calibration | None = None
    label_kind: LabelKind = "text"
    spread: float | None = None
    excess: float = 0.0
    folds: int = 0
    row_count: int = 0
    effective_count: float | None = None
    model_file: str | None = None
    model_form: Literal["onnx", "sklearn"] | None = None
    answer_field: str | None = None
    known_rows: tuple[dict[str, Any], ...] = ()
    known_errors: tuple[float, ...] = ()
    format: Literal[1] = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """An estimated metric.

    :param metric: its name.
    :param value: its value.
    :param low: lower end of the interval that is to hold the realized value with a probability of :data:`COVERAGE`.
    :param high: upper end.
    :param row_count: rows it is for.
    """

    metric: str
    value: float
    low: float
    high: float
    row_count: int


def learn_labels_estimation(
    metric: Metric, *, target: Array, answers: Predictions, kind: CalibrationKind | None = None
) -> Estimation:
    """Learn from held-out rows how to estimate a metric of labels, and how far off such estimates are.

    :param target: what turned out, shape ``(n,)``, in time order.
    :param answers: what the model said, with probabilities.
    """
    label_kind = _label_kind(target)
    if answers.probabilities is None:
        return _none(metric, "the model gives no probabilities")
    if metric.name == "calibration_error":
        return _none(metric, "calibration_error is what an estimate takes for granted")
    graded = Graded(target, answers)
    if graded.label_count > len(answers.classes):
        return _none(metric, "the held-out rows hold labels the model does not know")
    parts = stretches(len(target))
    if not parts:
        return _none(metric, f"{len(target)} held-out rows are too few")
    errors, chances = [], []
    given = answers.probabilities
    chosen = kind or best_kind(given, graded.truth)
    for learn, check in parts:
        known = fit_calibration(given[learn], graded.truth[learn], kind=chosen)
        part = graded.take(check)
        try:
            value, deviation = _expected(metric, part.answers, known(given[check]), label_kind)
            errors.append(measure(metric, part) - value)
        except InsufficientDataError:  # such as a class that does not occur in this stretch
            continue
        chances.append(deviation)
    if len(errors) < FEWEST_FOLDS:
        return _none(metric, f"{metric.name} can't be measured on parts of the held-out rows")
    return Estimation(
        metric=metric.name,
        method="calibration",
        calibration=fit_calibration(given, graded.truth, kind=chosen),
        label_kind=label_kind,
        excess=_excess(errors, chances),
        folds=len(errors),
        row_count=len(target),
    )


def estimate_labels(metric: Metric, answers: Predictions, estimation: Estimation) -> Estimate:
    """Estimate a metric of labels from the probabilities alone (CBPE).

    Every row counts for each label as much as that label is likely: the counts are those expected, and metrics are functions of
    counts. That holds as long as the relation of inputs and labels does: it sees inputs that moved, not a world that did.

    Source: Białek, Kivimäki, Kuberski and Perrakis, "Estimating model performance under covariate shift without labels",
    arXiv:2401.08348, 2024, section 3 (CBPE, there by NannyML).

    :param metric: any but ``calibration_error``.
    :param answers: with probabilities, in the order of the classes the calibration was learned for.
    :param estimation: of the model that gave them.
    :raises InsufficientDataError: no rows, or the metric, its interval or a probability is not a number on them.
    :raises ValueError: the estimation knows no calibration, or the answers no probabilities.
    """
    if estimation.calibration is None or answers.probabilities is None:
        raise ValueError(f"{metric.name} can't be estimated: {estimation.reason or 'no probabilities'}")
    if not np.isfinite(answers.probabilities).all():
        raise InsufficientDataError(
            f"{metric.name} can't be estimated: the model gives probabilities that are no numbers"
        )
    calibrated = estimation.calibration(answers.probabilities)
    value, deviation = _expected(metric, answers, calibrated, estimation.label_kind)
    reach = t_quantile(0.5 + COVERAGE / 2.0, max(estimation.folds - 1, 1)) * math.hypot(
        deviation, estimation.excess
    )
    if not math.isfinite(reach):
        raise InsufficientDataError(
            f"{metric.name} can't be estimated: how far off {len(answers)} such answers are can't be told"
        )
    low, high = value - reach, value + reach
    if metric.name in _SHARES:
        low, high = max(low, 0.0), min(high, 1.0)
    if metric.name in _NOT_NEGATIVE:
        low = max(low, 0.0)
    return Estimate(metric=metric.name, value=value, low=low, high=high, row_count=len(answers))


def _expected(
    metric: Metric, answers: Predictions, likely: Array, label_kind: LabelKind
) -> tuple[float, float]:
    """Give the metric's expected value, and its standard deviation over the labels that may turn out.

    :param likely: how likely each label is, shape ``(n, classes)``.
    """
    if len(answers) == 0:
        raise InsufficientDataError(f"{metric.name} can't be estimated for no rows")
    random = np.random.default_rng(0)
    if metric.of_sums is None:
        return _simulated(metric, answers, likely, label_kind, random)
    some = np.arange(len(answers))
    if len(some) > _DRAWN_ROWS:
        some = np.sort(random.choice(some, _DRAWN_ROWS, replace=False))
    shrink = math.sqrt(len(some) / len(answers))
    if metric.name in _RANKING and likely.shape[1] > 2:
        value, _ = _against_rest(metric, answers, likely)
        part = _against_rest(metric, answers.take(some), likely[some], random)
        return _finite(metric, value), part[1] * shrink
    value = float(metric.of_sums(_Sums(metric, answers, label_kind).expected(likely)))
    drawn = np.asarray(
        metric.of_sums(_Sums(metric, answers.take(some), label_kind).drawn(likely[some], random))
    )
    known = drawn[np.isfinite(drawn)]
    return _finite(metric, value), float(np.std(known)) * shrink if len(known) else math.nan


def _finite(metric: Metric, value: float) -> float:
    if not math.isfinite(value):
        raise InsufficientDataError(f"{metric.name} can't be estimated: it is {value}")
    return value


class _Sums:
    """What rows add to a metric's sums, label by label.

    :param terms: what each row adds when a label turns out, shape ``(labels, n, k)``; or ``None``, and
    :param cells: which sums it adds one to, shape ``(labels, n, m)``, of ``size``.
    """

    def __init__(self, metric: Metric, answers: Predictions, label_kind: LabelKind) -> None:
        self.count = len(answers)
        self.terms: Array | None = None
        self.size = 0
        self.cells: Array = np.empty(0, dtype=np.int64)
        if metric.name in _RANKING and answers.probabilities is not None:
            self._rank(answers.probabilities[:, 1])
            return
        labels = _labels(answers.classes, label_kind)
        known = Graded(np.full(len(answers), labels[0]), answers)
        cases = (known.where_all_are(label, number) for number, label in enumerate(labels))
        if metric.terms is not None:
            self.terms = np.stack([metric.terms(case) for case in cases])
        elif metric.cells is not None:
            counted = [metric.cells(case) for case in cases]
            self.cells, self.size = np.stack([numbers for numbers, _, _ in counted]), counted[0][1]
            self.cells = self.cells.reshape(len(counted), self.count, -1)

    def _rank(self, scores: Array) -> None:
        """Count by score, negatives before positives: exact, where the metric's own cells are coarser."""
        distinct, places = np.unique(scores, return_inverse=True)
        self.cells, self.size = np.stack([2 * places, 2 * places + 1])[:, :, None], 2 * len(distinct)

    def expected(self, likely: Array) -> Array:
        if self.terms is not None:
            return np.append(np.einsum("lnk,nl->k", self.terms, likely), self.count)
        counts = np.zeros(self.size)
        for part in np.moveaxis(self.cells, 2, 0):
            counts += np.bincount(part.ravel(), weights=likely.T.ravel(), minlength=self.size)
        return np.append(counts, self.count)

    def drawn(self, likely: Array, random: np.random.Generator) -> Array:
        """Give the sums for labels drawn again and again, shape ``(draws, k + 1)``."""
        limits = np.cumsum(likely, axis=1)[:, :-1]
        return self.of((random.random(self.count)[:, None] > limits).sum(axis=1) for _ in range(_DRAWS))

    def of(self, draws: Iterable[Array]) -> Array:
        """Give the sums for labels that turn out, shape ``(draws, k + 1)``.

        :param draws: number of each row's label.
        """
        rows = np.arange(self.count)
        sums = []
        for labels in draws:
            if self.terms is not None:
                sums.append(self.terms[labels, rows].sum(axis=0))
            else:
                sums.append(np.bincount(self.cells[labels, rows].ravel(), minlength=self.size))
        return np.column_stack([np.array(sums, dtype=np.float64), np.full(len(sums), float(self.count))])


def _against_rest(
    metric: Metric, answers: Predictions, likely: Array, random: np.random.Generator | None = None
) -> tuple[float, float]:
    """Give the expected mean of a ranking metric of each label against the rest, and its deviation over labels that are drawn.

    One label after the other: the scores of hundreds would not fit into memory.

    :param random: of the draws; ``None``: none, the deviation is 0.
    """
    if answers.probabilities is None or metric.of_sums is None:
        raise ValueError(f"{metric.name} needs probabilities")
    count, labels = likely.shape
    limits = np.cumsum(likely, axis=1)[:, :-1]
    draws = _SLOW_DRAWS if random is not None else 0
    drawn = np.empty((draws, count), dtype=np.int64)
    if random is not None:
        for draw in drawn:
            draw[:] = (random.random((count, 1)) > limits).sum(axis=1)
    value = 0.0
    values: Array = np.zeros(max(draws, 1))
    for place in range(labels):
        scores, chance = answers.probabilities[:, place], likely[:, place]
        two = Predictions(values=answers.values, probabilities=np.column_stack([1.0 - scores, scores]))
        ranked = _Sums(metric, two, "text")
        value += float(metric.of_sums(ranked.expected(np.column_stack([1.0 - chance, chance])))) / labels
        if draws:
            values += metric.of_sums(ranked.of((drawn == place).astype(np.int64))) / labels
    known = values[np.isfinite(values)]
    return value, float(np.std(known)) if len(known) else math.nan


def _simulated(
    metric: Metric, answers: Predictions, likely: Array, label_kind: LabelKind, random: np.random.Generator
) -> tuple[float, float]:
    """Score labels that are drawn, for a metric that is only a number."""
    labels = _labels(answers.classes, label_kind)
    limits = np.cumsum(likely, axis=1)[:, :-1]
    values = []
    for _ in range(_SLOW_DRAWS):
        drawn = labels[(random.random(len(answers))[:, None] > limits).sum(axis=1)]
        values.append(float(metric.score(Graded(drawn, answers))))
    return _finite(metric, float(np.nanmean(values))), float(np.nanstd(values))


def _labels(classes: Sequence[str], kind: LabelKind) -> Array:
    """Give the labels as the target has them: a function of the user compares with those."""
    if kind == "text":
        return np.array(classes, dtype=object)
    numbers = np.array(
        [float(label == "True" or label) if label in ("True", "False") else float(label) for label in classes]
    )
    return numbers.astype(np.int64) if kind == "integer" else numbers


def _label_kind(target: Array) -> LabelKind:
    return {"i": "integer", "u": "integer", "f": "number"}.get(target.dtype.kind, "text")  # type: ignore[return-value]


def row_errors(metric: Metric, graded: Graded) -> Array | None:
    """Give what each row adds to a metric that is a function of a mean; ``None`` for any other.

    An error model learns to tell it from the inputs and the answer.
    """
    if metric.terms is None or metric.of_sums is None:
        return None
    terms = metric.terms(graded)
    return terms[:, 0] if terms.shape[1] == 1 else None


def learn_error_estimation(
    metric: Metric, errors: Array, left_out: Sequence[tuple[Array, Array]]
) -> Estimation:
    """Say how far off an error model is.

    :param errors: what each held-out row really added, shape ``(n,)``, in time order.
    :param left_out: per stretch of the held-out rows, their numbers and what a model that was learned on the others said.
    """
    if len(left_out) < FEWEST_FOLDS:
        return _none(metric, f"{len(errors)} held-out rows are too few")
    residuals = [errors[rows] - said for rows, said in left_out]
    spread = float(np.std(np.concatenate(residuals)))
    return Estimation(
        metric=metric.name,
        method="error_model",
        spread=spread,
        excess=_excess(
            [float(np.mean(part)) for part in residuals],
            [spread / math.sqrt(len(part)) for part in residuals],
        ),
        folds=len(residuals),
        row_count=len(errors),
    )


def estimate_errors(metric: Metric, said: Array, estimation: Estimation) -> Estimate:
    """Estimate a metric of numbers from what the error model says of each row (DLE).

    Source: NannyML documentation, "Direct loss estimation", https://nannyml.readthedocs.io/en/stable/how_it_works/
    performance_estimation.html#direct-loss-estimation-dle.

    :param said: what each row adds, by the error model, shape ``(n,)``.
    :raises InsufficientDataError: no rows.
    :raises ValueError: the estimation knows no error model.
    """
    if estimation.spread is None or metric.of_sums is None:
        raise ValueError(f"{metric.name} can't be estimated: {estimation.reason or 'no error model'}")
    if len(said) == 0:
        raise InsufficientDataError(f"{metric.name} can't be estimated for no rows")
    mean = float(np.mean(said))
    chance = estimation.spread / math.sqrt(len(said))
    reach = t_quantile(0.5 + COVERAGE / 2.0, max(estimation.folds - 1, 1)) * math.hypot(
        chance, estimation.excess
    )
    # Errors are never negative, as those of all built-in metrics of numbers; what a user counts may be, such as a cost or a gain.
    built_in = metric.name.partition("@")[0].isidentifier()
    floor = 0.0 if built_in or np.all(said >= 0.0) else -math.inf
    ends = [max(end, floor) for end in (mean - reach, mean, mean + reach)]
    low, value, high = (float(metric.of_sums(np.array([end, 1.0]))) for end in ends)
    return Estimate(
        metric=metric.name,
        value=_finite(metric, value),
        low=min(low, high),
        high=max(low, high),
        row_count=len(said),
    )


def _excess(errors: Sequence[float], chances: Sequence[float]) -> float:
    """Give the standard deviation of errors beyond that of chance; both are per stretch."""
    return math.sqrt(max(0.0, float(np.mean(np.square(errors)) - np.mean(np.square(chances)))))


def _none(metric: Metric, reason: str) -> Estimation:
    return Estimation(metric=metric.name, method="none", reason=reason)
