"""Performance: what was predicted in a window against the labels that arrived since."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.codec import to_dict
from airflow_mlops.core.metrics import MetricValue, evaluate_metric, resolve_metric
from airflow_mlops.core.performance import PerformancePolicy, judge_performance
from airflow_mlops.core.predictions import Predictions
from airflow_mlops.core.windows import Window
from airflow_mlops.integrations.mlflow import Registry
from airflow_mlops.steps.base import Step
from airflow_mlops.steps.common import DatasetRef
from airflow_mlops.steps.labels import labelled_predictions
from airflow_mlops.steps.packages import version_manifest

if TYPE_CHECKING:
    import polars as pl

    from airflow_mlops.core.package import Holdout
    from airflow_mlops.services import Services


@dataclass(frozen=True, kw_only=True, slots=True)
class PerformanceSpec:
    """What to grade.

    :param model_name: model whose inference log is read.
    :param window: predictions whose time is inside.
    :param labels: dataset version or table URI that holds the labels.
    :param id_column: column of the labels that equals the prediction id.
    :param target: label column.
    :param metric: name of a built-in metric or import path of one.
    :param champion_alias: the version whose answers are graded; its held-out performance is the reference.
    :param policy: when a change counts.
    """

    model_name: str
    window: Window
    labels: DatasetRef
    id_column: str
    target: str
    metric: str = "mae"
    champion_alias: str = "champion"
    policy: PerformancePolicy = field(default_factory=PerformancePolicy)


@dataclass(frozen=True, kw_only=True, slots=True)
class PerformanceResult:
    """The grade, next to what was promised at training.

    :param model_version: the champion, whose answers alone are graded: others promised something else.
    :param model_versions: all versions that answered in the window.
    :param labelled_share: share of the champion's answers that have a label; 1 when it gave none.
    :param row_count: labelled answers of the champion.
    :param awaits_labels: it was not measured, and labels that have yet to come may change that.
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
    degraded: bool
    reason: str
    report: dict[str, Any]


def run(spec: PerformanceSpec, services: Services) -> PerformanceResult:
    """Join the champion's predictions with labels by id and judge; too few labels are a result, too: not measured.

    :raises InsufficientDataError: nothing was predicted in the window.
    """
    registry = Registry.connect(services)
    champion = registry.version_by_alias(spec.model_name, spec.champion_alias)
    manifest = version_manifest(registry, champion)
    log = Path(services.require("serving_dir")) / "inference_log"
    joined = labelled_predictions(
        log, spec.model_name, spec.window, labels=spec.labels, id_column=spec.id_column, target=spec.target
    )
    answered = joined.filter(joined["model_version"] == champion.model_version)
    labelled = answered.drop_nulls([spec.target])
    labelled_share = labelled.height / answered.height if answered.height else 1.0
    current = _current(spec, labelled, manifest.classes or ())
    reference = _reference(manifest.holdout, resolve_metric(spec.metric).name)
    report = judge_performance(
        current=current, reference=reference, labelled_share=labelled_share, policy=spec.policy
    )
    return PerformanceResult(
        model_name=spec.model_name,
        window=spec.window,
        model_version=champion.model_version,
        model_versions=tuple(sorted(joined["model_version"].unique().to_list())),
        metric=reference.metric,
        value=current.value if current else None,
        reference_value=reference.value,
        relative_change=report.relative_change,
        labelled_share=labelled_share,
        row_count=labelled.height,
        measured=report.measured,
        awaits_labels=not report.measured and labelled_share < 1.0,
        degraded=report.degraded,
        reason=report.reason + _left_out(joined.height - answered.height, champion.model_version),
        report=to_dict(report),
    )


def _current(spec: PerformanceSpec, labelled: pl.DataFrame, classes: tuple[str, ...]) -> MetricValue | None:
    """Measure; ``None`` when there is nothing to measure on."""
    if labelled.height == 0:
        return None
    return evaluate_metric(
        resolve_metric(spec.metric),
        target=labelled[spec.target].to_numpy(),
        prediction=Predictions(values=labelled["prediction"].to_numpy(), classes=classes),
    )


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
