"""Performance: whether realized quality has fallen behind what was promised at training, in one window or for good."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from airflow_mlops.core.comparison.evaluation import normal_tail
from airflow_mlops.core.comparison.metrics import resolve_metric
from airflow_mlops.core.comparison.predictions import Graded, Predictions
from airflow_mlops.core.comparison.resampling import (
    Blocks,
    Resampled,
    common_factor,
    require_level,
    upper_tail,
)
from airflow_mlops.core.figures import figures
from airflow_mlops.core.monitoring.change import ChangePolicy, ChangeReport, WindowLoss, detect_change
from airflow_mlops.core.monitoring.estimator_record import EstimatorRecord, GradedEstimate
from airflow_mlops.core.windows import Window

if TYPE_CHECKING:
    from airflow_mlops.core.comparison.metric import Metric, MetricValue
    from airflow_mlops.core.monitoring.estimation import Estimate

Array = NDArray[Any]

#: Groups of like answers that labelled and waiting ones are compared in.
_GROUPS = 10
#: Difference between labelled and waiting answers, in standard errors, from which the first labels are called one-sided.
_ONE_SIDED = 4.0
#: Resamples that the error of a metric without a loss per row is estimated from.
_RESAMPLES = 400
#: Metrics of the order of the scores, and rows of the rarest label they need to be called worse beyond chance (rule of thumb).
_RANKING, _RAREST_LABEL = ("roc_auc", "pr_auc"), 20


@dataclass(frozen=True, kw_only=True, slots=True)
class PerformancePolicy:
    """When a change counts.

    :param maximum_relative_change: worsening that is tolerated in a window, 0.2 is twenty percent (rule of thumb).
    :param significance: largest p-value; both conditions must hold, so neither noise nor sheer row count triggers.
    :param minimum_rows: fewer labelled rows are not judged.
    :param minimum_labelled_share: a smaller share of labelled predictions is not judged, in ``[0, 1]``.
    :param maximum_invalid_share: share of labelled rows that may be left out because the label or the answer is infinite or no
        number; with more, the rest tells too little of the window (rule of thumb).
    :param maturity_days: how long, from a window's first check on, labels that are late still change its grade.
    :param change: when window after window together are a change.
    """

    maximum_relative_change: float = 0.2
    significance: float = 0.001
    minimum_rows: int = 100
    minimum_labelled_share: float = 0.8
    maximum_invalid_share: float = 0.05
    maturity_days: float = 90.0
    change: ChangePolicy = field(default_factory=ChangePolicy)

    def __post_init__(self) -> None:
        require_level("significance", self.significance)
        for name, such in (
            ("minimum_labelled_share", "0.8 for eighty"),
            ("maximum_invalid_share", "0.05 for five"),
        ):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}: give a share, such as {such} percent")
        for name in ("maximum_relative_change", "minimum_rows", "maturity_days"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: give a number from 0 on")


@dataclass(frozen=True, kw_only=True, slots=True)
class PastGrade:
    """What an earlier window's grade says, as the ledger holds it.

    :param window: the window.
    :param model_version: who was graded.
    :param degraded: the verdict.
    :param value: the realized metric.
    :param loss_mean: mean loss; ``None`` for a metric that has no loss per row, as the two that follow.
    :param loss_deviation: standard deviation of the losses.
    :param effective_rows: independent losses among them.
    :param estimated_value: what was estimated without labels; ``None``: nothing.
    :param estimate_interval: with its interval.
    """

    window: Window
    model_version: str
    degraded: bool
    value: float
    loss_mean: float | None = None
    loss_deviation: float | None = None
    effective_rows: float | None = None
    estimated_value: float | None = None
    estimate_interval: tuple[float, float] | None = None

    @property
    def losses(self) -> WindowLoss | None:
        """Give what the search for a change reads."""
        if self.loss_mean is None or self.loss_deviation is None or self.effective_rows is None:
            return None
        return WindowLoss(
            label=str(self.window),
            model_version=self.model_version,
            mean=self.loss_mean,
            standard_deviation=self.loss_deviation,
            effective_count=self.effective_rows,
        )

    @property
    def graded_estimate(self) -> GradedEstimate | None:
        """Give the estimate beside what turned out; ``None`` without an estimate."""
        if self.estimated_value is None or self.estimate_interval is None:
            return None
        low, high = self.estimate_interval
        return GradedEstimate(value=self.estimated_value, low=low, high=high, realized=self.value)


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlyLabels:
    """Whether the answers whose labels came first are like those that still wait.

    :param difference: between them, in standard errors.
    :param one_sided: whether that is more than chance.
    :param adjusted_value: the metric with each kind of answer counted as often as it was given; ``None`` where that can't be done.
    """

    difference: float
    one_sided: bool
    adjusted_value: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Uncertainty:
    """How far off a window's metric may be by chance, where it is no mean of losses.

    :param value: the metric, pulled in where few rows decide it.
    :param standard_error: of it.
    :param freedom: degrees of freedom of the error.
    """

    value: float
    standard_error: float
    freedom: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PerformanceReport:
    """The judgement.

    :param relative_change: worsening relative to the reference, above zero is worse; ``None`` when not measured.
    :param z_score: of the difference: of the mean losses, or of a metric that is none; ``None`` where no error is known.
    :param p_value: probability of so large a worsening if nothing had changed (one-sided).
    :param measured: whether there was enough to judge; unmeasured is never "fine".
    :param degraded: worse than tolerated and beyond chance in this window, or a lasting change of the level.
    :param reason: one sentence.
    """

    relative_change: float | None
    z_score: float | None
    p_value: float | None
    measured: bool
    degraded: bool
    reason: str


def judge_performance(
    *,
    current: MetricValue | None,
    reference: MetricValue,
    labelled_share: float,
    policy: PerformancePolicy,
    early: EarlyLabels | None = None,
    change: ChangeReport | None = None,
    reference_count: float | None = None,
    uncertainty: Uncertainty | None = None,
    problem: str | None = None,
) -> PerformanceReport:
    """Compare the window's metric with the reference.

    The test is Welch's on the mean per-row loss of two independent samples, normal for the row counts at hand; of a metric that
    is no mean of losses, Student's on the metric itself. A window that is not worse enough by itself can still be one of a row
    that together are: see :func:`~airflow_mlops.core.monitoring.change.detect_change`.

    Source: Welch, "The generalization of Student's problem when several different population variances are
    involved", Biometrika 34, 1947.

    :param current: the window's metric; ``None``: not one row has a label.
    :param reference: the same metric on rows held out at training.
    :param labelled_share: share of the window's predictions that have a label, in ``[0, 1]``.
    :param policy: when a change counts.
    :param early: whether the labels that came first are one-sided; if so, the adjusted value has to be degraded, too.
    :param change: what this window and earlier ones say together.
    :param reference_count: independent losses among the reference's rows; ``None``: all of them are. The window's are taken to
        depend on each other as much: its own can't tell a change within it from a memory.
    :param uncertainty: of a metric that is no mean of losses, see :func:`uncertainty_of`.
    :param problem: why there is no metric where there are labels.
    """
    short = _too_little(current.row_count if current else 0, labelled_share, policy)
    if problem is not None and labelled_share >= policy.minimum_labelled_share:
        short = problem
    if current is None or short is not None:
        return PerformanceReport(
            relative_change=None,
            z_score=None,
            p_value=None,
            measured=False,
            degraded=False,
            reason=f"performance not measured: {short or 'no labelled rows'}",
        )
    worsening = relative_worsening(current.value, reference)
    z_score, p_value = _test(current, reference, reference_count, uncertainty)
    beyond_chance = p_value is None or p_value <= policy.significance
    degraded = worsening > policy.maximum_relative_change and beyond_chance
    adjusted = early.adjusted_value if early is not None else None
    unknown = early is not None and early.one_sided and adjusted is None
    if early is not None and early.one_sided and adjusted is not None:
        degraded &= relative_worsening(adjusted, reference) > policy.maximum_relative_change
    lasting = change is not None and change.changed and not unknown
    reason = _reason(current, reference, worsening, z_score, policy, degraded=degraded)
    if change is not None and lasting:
        reason = f"{reason}; {change.reason}" if degraded else f"degraded: {change.reason}; {reason}"
    return PerformanceReport(
        relative_change=worsening,
        z_score=z_score,
        p_value=p_value,
        measured=True,
        degraded=degraded or lasting,
        reason=reason + _so_far(labelled_share, early, current.metric),
    )


def relative_worsening(value: float, reference: MetricValue) -> float:
    """Give the worsening relative to the reference; above zero is worse."""
    sign = -1.0 if resolve_metric(reference.metric).greater_is_better else 1.0
    return sign * (value - reference.value) / (abs(reference.value) or 1.0)


def uncertainty_of(metric: Metric, graded: Graded, value: float) -> Uncertainty | None:
    """Tell how far off a metric that is no mean of losses may be by chance: what it would be on other rows of the same kind.

    Of few rows of a label, all or none may be found by chance, and resampling them knows no other outcome. So one row of each
    label with each answer is added, as is usual for shares.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 6; Agresti and Coull, "Approximate is better
    than exact for interval estimation of binomial proportions", The American Statistician 52, 1998 (added rows).

    :param graded: labelled rows, in time order.
    :param value: the metric on them.
    :returns: an infinite error where too few rows tell; ``None`` for a mean of losses, and where a function of the user can't be
        asked again.
    """
    if metric.mean_loss is not None or len(graded) == 0:
        return None
    if metric.name in _RANKING and np.min(np.bincount(graded.truth)) < _RAREST_LABEL:
        return Uncertainty(value=value, standard_error=math.inf, freedom=1)
    if metric.cells is not None and not metric.needs_probabilities:
        graded = _with_each_outcome(graded)
        value = metric.score(graded)
    blocks = Blocks.draw(len(graded), resamples=_RESAMPLES)
    try:
        drawn = blocks.resample(metric, graded, value)
    except ValueError:  # a function that refuses some resamples
        return None
    alone = Resampled(drawn.values, np.ones_like(drawn.shares)).standard_error
    memory = max(1.0, common_factor(_without_step(drawn.shares)))
    return Uncertainty(value=value, standard_error=alone * memory, freedom=blocks.freedom)


def _without_step(shares: Array) -> Array:
    """Take out the largest step: rows after a change within the window resemble each other, and that is no memory."""
    count = np.arange(1, len(shares))
    before = np.cumsum(shares)[:-1]
    gap = before / count - (np.sum(shares) - before) / count[::-1]
    cut = int(np.argmax(np.square(gap) * count * count[::-1])) + 1 if len(count) else len(shares)
    return np.concatenate([part - np.mean(part) for part in (shares[:cut], shares[cut:]) if len(part)])


def _with_each_outcome(graded: Graded) -> Graded:
    """Add a row of each label with each answer, spread over the rows: side by side they would look like a memory."""
    count = graded.label_count
    if count**2 > len(graded) // 2:
        return graded
    truth, answered = np.divmod(np.arange(count**2), count)
    places = np.linspace(0, len(graded), count**2, endpoint=False).astype(np.int64)
    classes = tuple(str(label) for label in range(count))
    return Graded(
        np.insert(graded.truth, places, truth),
        Predictions(values=np.insert(graded.answered, places, answered), classes=classes),
    )


def look_for_change(
    current: WindowLoss,
    reference: MetricValue,
    *,
    reference_count: float | None,
    past: Sequence[PastGrade],
    policy: ChangePolicy,
) -> ChangeReport | None:
    """Look at this window and the earlier ones together.

    :param reference_count: independent losses among the reference's rows; ``None``: all of them are.
    :param past: earlier windows, oldest first.
    :returns: ``None`` for a metric that has no loss per row.
    """
    mean_loss = resolve_metric(reference.metric).mean_loss
    if mean_loss is None or reference.standard_deviation is None:
        return None
    promised = WindowLoss(
        label="training",
        model_version=current.model_version,
        mean=mean_loss(reference.value),
        standard_deviation=reference.standard_deviation,
        effective_count=reference_count or float(reference.row_count),
    )
    earlier = [grade.losses for grade in past]
    windows = [losses for losses in earlier if losses is not None]
    return detect_change([*windows, current], promised=promised, policy=policy)


def judge_estimate(
    estimate: Estimate, reference: MetricValue, record: EstimatorRecord, policy: PerformancePolicy
) -> tuple[bool, str]:
    """Decide whether performance is worse by an estimate: beyond tolerance, with the whole interval, and to be believed.

    :returns: the verdict, and a sentence.
    """
    worsening = relative_worsening(estimate.value, reference)
    ends = (relative_worsening(estimate.low, reference), relative_worsening(estimate.high, reference))
    worse = worsening > policy.maximum_relative_change and min(ends) > 0.0
    words = (
        f"worse by {worsening:.0%}"
        if worse
        else ("within what is tolerated" if worsening > 0 else "as promised")
    )
    belief = "trusted" if record.trusted else "not trusted"
    value, low, high = figures(estimate.value, estimate.low, estimate.high)
    return worse and record.trusted, (
        f"estimated without labels: {estimate.metric.upper()} {value} ({low} to {high}), {words}; "
        f"{belief}: {record.reason}"
    )


def compare_early_labels(metric: Metric, graded: Graded, answers: Array, labelled: Array) -> EarlyLabels:
    """Tell whether the answers whose labels are here differ from those that wait, and what the metric would be otherwise.

    Where labels of one kind take longer, the first ones are no fair sample. What was answered is known of all rows: each kind
    of answer is counted as often as it was given. That takes away what the answers tell of the delay, and no more.

    Source: Holt and Smith, "Post stratification", JRSS A 142, 1979.

    :param graded: labelled rows.
    :param answers: of all rows, shape ``(n,)``.
    :param labelled: which rows have a label, shape ``(n,)``; in the order of ``graded``.
    """
    groups = _groups_of(answers)
    count = int(groups.max()) + 1 if len(groups) else 0
    given = np.bincount(groups, minlength=count).astype(np.float64)
    here = np.bincount(groups[labelled], minlength=count).astype(np.float64)
    waiting = given - here
    difference = _largest_difference(here, waiting)
    adjusted = None
    if metric.of_sums is not None and np.all(here[given > 0.0] > 0.0):
        weights = (given / np.where(here > 0.0, here, 1.0) * here.sum() / given.sum())[groups[labelled]]
        adjusted = _weighted(metric, graded, weights)
    return EarlyLabels(
        difference=difference,
        one_sided=difference > _ONE_SIDED,
        adjusted_value=adjusted if adjusted is not None and math.isfinite(adjusted) else None,
    )


def _groups_of(answers: Array) -> Array:
    """Give each answer the number of its kind: labels as they are, numbers by tenths."""
    if answers.dtype.kind in "fiu" and len(np.unique(answers)) > _GROUPS:
        numbers = answers.astype(np.float64)
        edges = np.unique(np.quantile(numbers, np.linspace(0.0, 1.0, _GROUPS + 1)[1:-1]))
        return np.searchsorted(edges, numbers, side="right")
    return np.unique(answers.astype(str), return_inverse=True)[1]


def _largest_difference(here: Array, waiting: Array) -> float:
    """Give the largest z-score over the groups' shares; with ten of them, four standard errors are chance in 1 of 1,600 windows."""
    labelled, open_ = here.sum(), waiting.sum()
    if labelled == 0 or open_ == 0:
        return 0.0
    pooled = (here + waiting) / (labelled + open_)
    error = np.sqrt(pooled * (1.0 - pooled) * (1.0 / labelled + 1.0 / open_))
    gaps = np.abs(here / labelled - waiting / open_)
    return float(np.max(np.divide(gaps, error, out=np.zeros_like(gaps), where=error > 0.0), initial=0.0))


def _weighted(metric: Metric, graded: Graded, weights: Array) -> float | None:
    """Give a metric with weighted rows."""
    if metric.of_sums is None:
        return None
    if metric.terms is not None:
        sums = (metric.terms(graded) * weights[:, None]).sum(axis=0)
    else:
        if metric.cells is None or (metric.label_cells is not None and graded.label_count != 2):
            return None
        numbers, size, own = metric.cells(graded)
        if own is not None:
            return None
        each = weights if numbers.ndim == 1 else np.repeat(weights, numbers.shape[1])
        sums = np.bincount(numbers.ravel(), weights=each, minlength=size)
    return float(metric.of_sums(np.append(sums, weights.sum())))


def _too_little(row_count: int, labelled_share: float, policy: PerformancePolicy) -> str | None:
    if row_count == 0 and labelled_share == 0.0:
        return "no label so far (or do labels and predictions not share their ids?)"
    if labelled_share < policy.minimum_labelled_share:
        return f"{labelled_share:.0%} labelled so far, {policy.minimum_labelled_share:.0%} needed to judge"
    if row_count < policy.minimum_rows:
        return f"{row_count} labelled rows, {policy.minimum_rows} needed to judge"
    return None


def _so_far(labelled_share: float, early: EarlyLabels | None, metric: str) -> str:
    """Say on what part of the labels a grade rests."""
    if labelled_share >= 1.0:
        return ""
    shown = f"; {math.floor(100.0 * labelled_share)}% labelled so far"
    if early is None or not early.one_sided:
        return shown
    counted = (
        f", counted as they were given {metric.upper()} is {early.adjusted_value:.3g}"
        if early.adjusted_value is not None
        else ""
    )
    return f"{shown}, and the labels that came first are one-sided (z = {early.difference:.1f}){counted}"


def _test(
    current: MetricValue,
    reference: MetricValue,
    reference_count: float | None,
    uncertainty: Uncertainty | None,
) -> tuple[float | None, float | None]:
    """Give the z-score and the p-value of a worsening; ``None`` where no error is known."""
    if uncertainty is None:
        z_score = _z_score(current, reference, reference_count)
        return z_score, normal_tail(z_score) if z_score is not None else None
    sign = -1.0 if resolve_metric(reference.metric).greater_is_better else 1.0
    # The reference's error is not known: its rows are taken to scatter as those of the window.
    error = uncertainty.standard_error * math.sqrt(1.0 + current.row_count / reference.row_count)
    worse = sign * (uncertainty.value - reference.value)
    if error == 0.0:
        score = math.copysign(math.inf, worse) if worse else 0.0
        return score, 0.0 if score > 0 else 1.0
    return worse / error, upper_tail(worse / error, uncertainty.freedom)


def _z_score(current: MetricValue, reference: MetricValue, reference_count: float | None) -> float | None:
    mean_loss = resolve_metric(current.metric).mean_loss
    if mean_loss is None or current.standard_deviation is None or reference.standard_deviation is None:
        return None
    independent = min((reference_count or reference.row_count) / reference.row_count, 1.0)
    error = math.sqrt(
        current.standard_deviation**2 / (current.row_count * independent)
        + reference.standard_deviation**2 / (reference.row_count * independent)
    )
    worse = mean_loss(current.value) - mean_loss(reference.value)
    if error == 0.0:
        return math.copysign(math.inf, worse) if worse else 0.0
    return worse / error


def _reason(
    current: MetricValue,
    reference: MetricValue,
    change: float,
    z_score: float | None,
    policy: PerformancePolicy,
    *,
    degraded: bool,
) -> str:
    name = current.metric.upper()
    measured, promised = figures(current.value, reference.value)
    now = f"{name} {measured} on {current.row_count} labelled rows"
    if change <= 0:
        return f"as promised: {now}, {promised} at training"
    chance = f", z = {z_score:.1f}" if z_score is not None else ""
    numbers = f"{now}, {promised} at training ({change:.0%} worse{chance})"
    if degraded:
        return f"degraded: {numbers}"
    if change > policy.maximum_relative_change:
        return f"worse, but not beyond chance: {numbers}"
    return f"within the tolerated {policy.maximum_relative_change:.0%}: {numbers}"
