"""Performance: what was predicted in a window against the labels that arrived since, and an estimate where they did not."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from airflow_mlops.core.codec import to_dict
from airflow_mlops.core.comparison.metric import Metric, MetricValue
from airflow_mlops.core.comparison.metrics import evaluate_metric, resolve_metric
from airflow_mlops.core.comparison.predictions import Graded, valid_values
from airflow_mlops.core.data.dataset import DatasetVersion
from airflow_mlops.core.monitoring.change import WindowLoss, effective_count
from airflow_mlops.core.monitoring.estimator_record import EstimatorRecord, judge_estimator
from airflow_mlops.core.monitoring.performance import (
    EarlyLabels,
    PastGrade,
    PerformancePolicy,
    Uncertainty,
    compare_early_labels,
    judge_estimate,
    judge_performance,
    look_for_change,
    relative_worsening,
    uncertainty_of,
)
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import InsufficientDataError
from airflow_mlops.integrations.mlflow import Registry
from airflow_mlops.steps.base import Step
from airflow_mlops.steps.common import DatasetRef, pin_dataset
from airflow_mlops.steps.monitoring.estimation import GradingPackage, answers_of, estimate, load_for_grading
from airflow_mlops.steps.monitoring.labels import as_trained, labelled_predictions
from airflow_mlops.steps.registry.aliases import resolve_alias

if TYPE_CHECKING:
    from collections.abc import Sequence

    import polars as pl

    from airflow_mlops.core.model.package import Holdout
    from airflow_mlops.core.monitoring.estimation import Estimate
    from airflow_mlops.services import Services

Array = NDArray[Any]

#: Classes that are named in a sentence.
_NAMED = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class PerformanceSpec:
    """What to grade.

    :param model_name: model whose inference log is read.
    :param window: predictions whose time is inside.
    :param labels: dataset version or table URI that holds the labels; ``None``: there are none, performance is estimated.
    :param id_column: column of the labels that equals the prediction id.
    :param target: label column.
    :param metric: name of a built-in metric or import path of one; what the model was trained for.
    :param metrics: more of them, which are reported beside it, such as what a mistake costs.
    :param champion_alias: the version whose answers are graded; its held-out performance is the reference.
    :param model_version: a version instead; of a window that is graded again, the one that was.
    :param policy: when a change counts.
    :param waited_days: since the window's performance was first looked at.
    :param past: grades of earlier windows, oldest first.
    """

    model_name: str
    window: Window
    labels: DatasetRef | None = None
    id_column: str = ""
    target: str = "label"
    metric: str = "mae"
    metrics: tuple[str, ...] = ()
    champion_alias: str = "champion"
    model_version: str | None = None
    policy: PerformancePolicy = field(default_factory=PerformancePolicy)
    waited_days: float = 0.0
    past: tuple[PastGrade, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class PerformanceResult:
    """The grade, next to what was promised at training, and what was estimated without labels.

    :param model_version: the champion, whose answers alone are graded: others promised something else.
    :param model_versions: all versions that answered in the window.
    :param labelled_share: share of the champion's answers that have a label; 0 when it gave none.
    :param row_count: labelled answers of the champion that were graded.
    :param answer_count: answers of the champion, labelled or not.
    :param invalid_count: labelled answers that were not: the label or the answer is infinite or no number.
    :param awaits_labels: it was not measured, and labels that have yet to come may change that.
    :param final: no label is awaited any more: all are here, or the time for them is over.
    :param other_metrics: the metrics that were asked for beside.
    :param early_labels: whether the labels that came first are one-sided; ``None`` when all are here, or none.
    :param loss_mean: mean loss per row; ``None`` for a metric that has none, as the three that follow.
    :param reference_loss_mean: the same of the rows held out at training.
    :param loss_deviation: standard deviation of the losses.
    :param effective_rows: independent losses among them.
    :param change: what this window and earlier ones say together; ``None`` when not measured.
    :param estimated: whether there is an estimate without labels.
    :param estimate_interval: is to hold the realized value with a probability of 95 %.
    :param estimate_trusted: whether the estimates of earlier windows turned out well enough to act on this one.
    :param estimate_degraded: worse than tolerated by a trusted estimate, and not measured: what to act on without labels.
    :param estimator: how good the estimates of earlier windows were.
    :param labels: version of the labels' table that was read.
    :param supersedes: ledger key of the grade this one replaces.
    :param flipped: whether its verdict was the other one.
    """

    model_name: str
    window: Window
    model_version: str
    model_versions: tuple[str, ...]
    metric: str
    value: float | None
    reference_value: float | None
    relative_change: float | None
    labelled_share: float
    row_count: int
    measured: bool
    awaits_labels: bool
    final: bool
    degraded: bool
    reason: str
    report: dict[str, Any]
    answer_count: int = 0
    invalid_count: int = 0
    other_metrics: dict[str, float | None] = field(default_factory=dict)
    early_labels: dict[str, Any] | None = None
    loss_mean: float | None = None
    reference_loss_mean: float | None = None
    loss_deviation: float | None = None
    effective_rows: float | None = None
    change: dict[str, Any] | None = None
    estimated: bool = False
    estimated_value: float | None = None
    estimate_interval: tuple[float, float] | None = None
    estimate_trusted: bool = False
    estimate_degraded: bool = False
    estimator: dict[str, Any] = field(default_factory=dict)
    labels: DatasetVersion | None = None
    supersedes: str | None = None
    flipped: bool = False


def run(spec: PerformanceSpec, services: Services) -> PerformanceResult:
    """Join the champion's predictions with labels by id and judge; too few labels are a result, too: not measured.

    :raises InsufficientDataError: nothing was predicted in the window.
    """
    registry = Registry.connect(services)
    version = (
        registry.version(spec.model_name, spec.model_version)
        if spec.model_version
        else resolve_alias(registry, services, spec.model_name, spec.champion_alias)
    )
    metric = resolve_metric(spec.metric)
    package = load_for_grading(registry, version, metric, services)
    labels = None if spec.labels is None else pin_dataset(spec.labels)
    joined = labelled_predictions(
        Path(services.require("serving_dir")) / "inference_log",
        spec.model_name,
        spec.window,
        labels=labels,
        id_column=spec.id_column,
        target=spec.target,
        inputs=True,
    )
    answered = joined.filter(joined["model_version"] == version.model_version)
    reference = _reference(package.manifest.holdout, metric.name)
    record = judge_estimator(
        [
            graded
            for past in spec.past
            if past.model_version == version.model_version and (graded := past.graded_estimate) is not None
        ],
        concept_drift=bool(spec.past) and spec.past[-1].degraded,
    )
    grade = _grade(spec, package, metric, answered, version.model_version, reference)
    guess = estimate(package, metric, answered, maximum_invalid_share=spec.policy.maximum_invalid_share)
    reference_count = package.estimation.effective_count if package.estimation else None
    result = _result(
        spec, version.model_version, joined, answered, grade, guess, record, reference, reference_count
    )
    return replace(result, labels=labels)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Grade:
    """What labels say of a window.

    :param uncertainty: of a metric that is worse than tolerated, and no mean of losses.
    :param problem: why there is no metric where there are labels.
    :param invalid: rows that are not graded, with why.
    :param failed: metrics beside it that could not be measured, with why; labels the model has no answer for.
    """

    share: float
    row_count: int
    current: MetricValue | None = None
    losses: WindowLoss | None = None
    early: EarlyLabels | None = None
    uncertainty: Uncertainty | None = None
    problem: str | None = None
    invalid: tuple[int, str] = (0, "")
    others: dict[str, float | None] = field(default_factory=dict)
    failed: tuple[str, ...] = ()


def _grade(
    spec: PerformanceSpec,
    package: GradingPackage,
    metric: Metric,
    answered: pl.DataFrame,
    version: str,
    reference: MetricValue,
) -> _Grade:
    """Measure what can be measured."""
    here = answered[spec.target].is_not_null()
    labelled = answered.filter(here)
    share = labelled.height / answered.height if answered.height else 0.0
    if labelled.height == 0:
        return _Grade(share=share, row_count=0)
    graded, valid, invalid = _valid(spec, package, labelled)
    if invalid[0] > spec.policy.maximum_invalid_share * labelled.height:
        problem = (
            f"{invalid[1]}, more than {spec.policy.maximum_invalid_share:.0%} of {labelled.height} labelled rows: "
            "correct them, or raise maximum_invalid_share"
        )
        return _Grade(share=share, row_count=len(graded), problem=problem, invalid=(invalid[0], ""))
    others, failed = _beside(spec.metrics, graded)
    failed += _unknown_classes(graded.target, package.manifest.classes)
    try:
        current = evaluate_metric(metric, target=graded.target, prediction=graded.answers)
    except InsufficientDataError as err:  # such as the first labels, all of one class
        return _Grade(
            share=share,
            row_count=len(graded),
            problem=str(err),
            invalid=invalid,
            others=others,
            failed=failed,
        )
    losses = uncertainty = None
    if relative_worsening(current.value, reference) > spec.policy.maximum_relative_change:
        uncertainty = uncertainty_of(metric, graded, current.value)
    if metric.losses is not None and metric.mean_loss is not None:
        each = metric.losses(graded)
        losses = WindowLoss(
            label=str(spec.window),
            model_version=version,
            mean=float(np.mean(each)),
            standard_deviation=float(np.std(each)),
            effective_count=effective_count(each),
        )
    early = None
    if labelled.height < answered.height:
        usable = valid_values(answered["prediction"].to_numpy())
        usable[here.to_numpy()] = valid
        early = compare_early_labels(
            metric, graded, answered["prediction"].to_numpy()[usable], here.to_numpy()[usable]
        )
    return _Grade(
        share=share,
        row_count=len(graded),
        current=current,
        losses=losses,
        early=early,
        uncertainty=uncertainty,
        invalid=invalid,
        others=others,
        failed=failed,
    )


def _valid(
    spec: PerformanceSpec, package: GradingPackage, labelled: pl.DataFrame
) -> tuple[Graded, Array, tuple[int, str]]:
    """Give the rows that can be graded, which they are, and how many others there are and why."""
    known = valid_values(
        labelled[spec.target].to_numpy()
    )  # of numbers as they came: an infinite one is no class
    rows = labelled.filter(known)
    target = as_trained(rows[spec.target], package.manifest.classes).to_numpy()
    graded = Graded(target, answers_of(package, rows))
    valid_labels, valid = valid_values(target), graded.valid
    infinite = int(np.sum(~known) + np.sum(~valid_labels))
    strange = int(np.sum(valid_labels & ~valid))
    told = [
        f"{count} {'rows have' if count > 1 else 'row has'} {what}"
        for count, what in (
            (infinite, "a label that is infinite or too large"),
            (strange, "an answer that is no finite number"),
        )
        if count
    ]
    here = known.copy()
    here[known] = valid
    return graded.take(valid), here, (infinite + strange, " and ".join(told))


def _beside(names: Sequence[str], graded: Graded) -> tuple[dict[str, float | None], tuple[str, ...]]:
    """Measure metrics that are reported only; ``None``, and why, where one can't be: it costs no grade."""
    values: dict[str, float | None] = {}
    failed = []
    for name in names:
        metric = resolve_metric(name)
        try:
            values[name] = evaluate_metric(metric, target=graded.target, prediction=graded.answers).value
        except ValueError as err:
            values[name] = None
            failed.append(f"{name} not measured: {err}")
    return values, tuple(failed)


def _unknown_classes(target: Array, classes: Sequence[str] | None) -> tuple[str, ...]:
    """Say which labels are none of a classifier's answers: graded they are, but it can't be right about them."""
    if not classes:
        return ()
    values, counts = np.unique(target, return_counts=True)
    unknown = {str(value): int(count) for value, count in zip(values, counts, strict=True)}
    unknown = {value: count for value, count in unknown.items() if value not in classes}
    if not unknown:
        return ()
    named = ", ".join(sorted(unknown, key=lambda value: (-unknown[value], value))[:_NAMED])
    rows = sum(unknown.values())
    return (
        f"{rows} labelled {'rows are' if rows > 1 else 'row is'} of a class the model does not know, such as {named}",
    )


def _result(
    spec: PerformanceSpec,
    version: str,
    joined: pl.DataFrame,
    answered: pl.DataFrame,
    grade: _Grade,
    estimated: tuple[Estimate | None, str],
    record: EstimatorRecord,
    reference: MetricValue,
    reference_count: float | None,
) -> PerformanceResult:
    """Judge, and put what was found into one sentence."""
    guess, why_none = estimated
    enough = grade.share >= spec.policy.minimum_labelled_share and grade.row_count >= spec.policy.minimum_rows
    change = None
    if grade.losses is not None and enough:
        change = look_for_change(
            _as_given(grade.losses, grade.early, reference.metric),
            reference,
            reference_count=reference_count,
            past=spec.past,
            policy=spec.policy.change,
        )
    report = judge_performance(
        current=grade.current,
        reference=reference,
        labelled_share=grade.share,
        policy=spec.policy,
        early=grade.early,
        change=change,
        reference_count=reference_count,
        uncertainty=grade.uncertainty,
        problem=grade.problem,
    )
    if answered.height == 0:
        report = replace(report, reason="performance not measured: the champion gave no answers")
    reason = "; ".join((report.reason + _left_out(joined.height - answered.height, version), *grade.failed))
    if grade.invalid[1]:
        reason += f"; {grade.invalid[1]} and {'are' if grade.invalid[0] > 1 else 'is'} not graded"
    final = (
        grade.share >= 1.0
        or spec.labels is None
        or answered.height == 0
        or spec.waited_days >= spec.policy.maturity_days
    )
    estimate_degraded = False
    if not report.measured:
        if guess is not None:
            estimate_degraded, sentence = judge_estimate(guess, reference, record, spec.policy)
            reason += "; ".join(("", sentence, why_none)) if why_none else f"; {sentence}"
        elif spec.labels is None:
            reason = f"performance not measured: there are no labels; not estimated: {why_none}"
    return PerformanceResult(
        model_name=spec.model_name,
        window=spec.window,
        model_version=version,
        model_versions=tuple(sorted(joined["model_version"].unique().to_list())),
        metric=reference.metric,
        value=grade.current.value if grade.current else None,
        reference_value=reference.value,
        relative_change=report.relative_change,
        labelled_share=grade.share,
        row_count=grade.row_count,
        invalid_count=grade.invalid[0],
        measured=report.measured,
        answer_count=answered.height,
        awaits_labels=not report.measured and not final,
        final=final,
        degraded=report.degraded,
        reason=reason,
        report=to_dict(report),
        other_metrics=grade.others,
        early_labels=to_dict(grade.early) if grade.early else None,
        loss_mean=grade.losses.mean if grade.losses else None,
        reference_loss_mean=_mean_loss(reference) if grade.losses else None,
        loss_deviation=grade.losses.standard_deviation if grade.losses else None,
        effective_rows=grade.losses.effective_count if grade.losses else None,
        change=to_dict(change) if change else None,
        estimated=guess is not None,
        estimated_value=guess.value if guess else None,
        estimate_interval=(guess.low, guess.high) if guess else None,
        estimate_trusted=guess is not None and record.trusted,
        estimate_degraded=estimate_degraded,
        estimator=to_dict(record),
    )


def _as_given(losses: WindowLoss, early: EarlyLabels | None, metric: str) -> WindowLoss:
    """Give the losses for the search for a change: of one-sided labels, with each kind of answer as often as it was given.

    With many rows some one-sidedness is always there, and labels may never be complete: the search can't wait for them.
    """
    mean_loss = resolve_metric(metric).mean_loss
    if early is None or not early.one_sided or early.adjusted_value is None or mean_loss is None:
        return losses
    return replace(losses, mean=mean_loss(early.adjusted_value))


def _mean_loss(value: MetricValue) -> float | None:
    mean_loss = resolve_metric(value.metric).mean_loss
    return None if mean_loss is None else mean_loss(value.value)


def _reference(holdout: Holdout, metric: str) -> MetricValue:
    """Take the champion's performance on the rows held out at training.

    :raises ValueError: it was measured with another metric.
    """
    if holdout.metric != metric:
        raise ValueError(
            f"the champion was held against {holdout.metric} at training, not {metric}: "
            "check with the same metric, or train with this one"
        )
    return MetricValue(
        metric=holdout.metric,
        value=holdout.value,
        standard_deviation=holdout.standard_deviation,
        row_count=holdout.row_count,
    )


def _left_out(row_count: int, champion: str) -> str:
    return (
        f" (without {row_count} answers not given by the champion, version {champion})" if row_count else ""
    )


STEP = Step(name="performance", spec=PerformanceSpec, result=PerformanceResult, run=run)
