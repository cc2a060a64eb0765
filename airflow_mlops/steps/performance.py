"""Performance: what was predicted in a window against the labels that arrived since."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.codec import to_dict
from airflow_mlops.core.metrics import MetricValue, Predictions, evaluate_metric, resolve_metric
from airflow_mlops.core.performance import PerformancePolicy, judge_performance
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import InsufficientDataError
from airflow_mlops.integrations.mlflow import Registry
from airflow_mlops.steps.base import Step
from airflow_mlops.steps.common import DatasetRef
from airflow_mlops.steps.labels import labelled_predictions
from airflow_mlops.steps.packages import champion_manifest

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
    :param champion_alias: the version whose held-out performance is the reference.
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
    """The grade, next to what was promised at training."""

    model_name: str
    window: Window
    model_versions: tuple[str, ...]
    metric: str
    value: float | None
    reference_value: float | None
    relative_change: float | None
    labelled_share: float
    row_count: int
    measured: bool
    degraded: bool
    reason: str
    report: dict[str, Any]


def run(spec: PerformanceSpec, services: Services) -> PerformanceResult:
    """Join predictions with labels by id and judge.

    :raises InsufficientDataError: nothing was predicted in the window, or no label has arrived at all.
    """
    registry = Registry.connect(services)
    manifest = champion_manifest(registry, spec.model_name, spec.champion_alias)
    log = Path(services.require("serving_dir")) / "inference_log"
    joined = labelled_predictions(
        log, spec.model_name, spec.window, labels=spec.labels, id_column=spec.id_column, target=spec.target
    )
    labelled = joined.drop_nulls([spec.target])
    if labelled.height == 0:
        raise InsufficientDataError(
            f"none of the {joined.height} predictions of {spec.model_name} in {spec.window} has a label yet: "
            "wait with LabelsArrivedSensor, or check id_column"
        )
    metric = resolve_metric(spec.metric)
    answers = Predictions(values=labelled["prediction"].to_numpy(), classes=manifest.classes or ())
    current = evaluate_metric(metric, target=labelled[spec.target].to_numpy(), prediction=answers)
    reference = _reference(manifest.holdout, current)
    report = judge_performance(
        current=current,
        reference=reference,
        labelled_share=labelled.height / joined.height,
        policy=spec.policy,
    )
    return PerformanceResult(
        model_name=spec.model_name,
        window=spec.window,
        model_versions=_versions(joined),
        metric=current.metric,
        value=current.value,
        reference_value=reference.value,
        relative_change=report.relative_change,
        labelled_share=labelled.height / joined.height,
        row_count=labelled.height,
        measured=report.measured,
        degraded=report.degraded,
        reason=report.reason,
        report=to_dict(report),
    )


def _reference(holdout: Holdout, current: MetricValue) -> MetricValue:
    """Take the champion's performance on the rows held out at training.

    :raises ValueError: it was measured with another metric.
    """
    if holdout.metric != current.metric:
        raise ValueError(
            f"the champion was held against {holdout.metric} at training, not {current.metric}: "
            "check with the same metric, or train with this one"
        )
    return MetricValue(
        metric=holdout.metric,
        value=holdout.value,
        standard_deviation=holdout.standard_deviation,
        row_count=holdout.row_count,
    )


def _versions(joined: pl.DataFrame) -> tuple[str, ...]:
    return tuple(sorted(joined["model_version"].unique().to_list()))


STEP = Step(name="performance", spec=PerformanceSpec, result=PerformanceResult, run=run)
