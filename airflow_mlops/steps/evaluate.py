"""Evaluate: challenger, champion and a simple baseline on the same rows, and one verdict with its reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from airflow_mlops.core.codec import to_dict
from airflow_mlops.core.dataset import DatasetVersion
from airflow_mlops.core.evaluation import compare_models
from airflow_mlops.core.promotion import PromotionPolicy, Verdict, decide_promotion
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import SchemaMismatchError
from airflow_mlops.integrations.mlflow import Registry
from airflow_mlops.steps.base import Step
from airflow_mlops.steps.common import DatasetRef, read_rows, resolve_dataset
from airflow_mlops.steps.packages import load_run, load_version

if TYPE_CHECKING:
    import polars as pl

    from airflow_mlops.services import Services
    from airflow_mlops.serving.model import ServedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateSpec:
    """What to compare.

    :param dataset: dataset version, or table URI for its newest.
    :param model_name: registered model whose champion is the rival.
    :param run_id: MLflow run of the challenger.
    :param package_digest: digest its package must have, from the training's result; needed where signing keys are
        configured, as a challenger is not signed yet.
    :param window: rows to judge on; neither model may have been trained on them (the training's held-out window).
    :param time_column: places a row in the window.
    :param target: column to predict; default the challenger's own.
    :param metric: name of a built-in metric or import path of one.
    :param champion_alias: alias of the rival.
    :param policy: what a challenger has to show.
    :param seed: of the resampling.
    """

    dataset: DatasetRef
    model_name: str
    run_id: str
    package_digest: str | None = None
    window: Window
    time_column: str
    target: str | None = None
    metric: str = "mae"
    champion_alias: str = "champion"
    policy: PromotionPolicy = field(default_factory=PromotionPolicy)
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateResult:
    """The verdict and the numbers behind it."""

    model_name: str
    run_id: str
    run_url: str
    champion_version: str | None
    dataset: DatasetVersion
    window: Window
    verdict: Verdict
    reason: str
    report: dict[str, Any]


def run(spec: EvaluateSpec, services: Services) -> EvaluateResult:
    """Compare on the same rows and judge.

    :raises InsufficientDataError: no rows in the window, or a metric that can't be measured on them.
    :raises ModelVersionNotFoundError: the run has no package.
    """
    registry = Registry.connect(services)
    dataset = resolve_dataset(spec.dataset, time_column=spec.time_column)
    champion_version = registry.find_alias(spec.model_name, spec.champion_alias)
    challenger = load_run(registry, spec.run_id, services, package_digest=spec.package_digest)
    champion = load_version(registry, champion_version, services) if champion_version else None
    rows = _rows(spec, dataset, challenger)
    target = rows[spec.target or challenger.manifest.target].to_numpy()
    report = compare_models(
        target=target,
        challenger=np.asarray(challenger.predict_records(rows.to_dicts())),
        champion=np.asarray(champion.predict_records(rows.to_dicts())) if champion else None,
        baseline=np.full(len(target), challenger.manifest.trained_on.simple_prediction),
        metric=spec.metric,
        seed=spec.seed,
    )
    decision = decide_promotion(report, spec.policy)
    experiment_id = registry.client.get_run(spec.run_id).info.experiment_id
    registry.log(
        spec.run_id, params={}, metrics={f"evaluation_{spec.metric}": report.challenger.value}, tags={}
    )
    registry.client.set_tag(spec.run_id, "airflow_mlops.verdict", decision.verdict)
    registry.client.set_tag(spec.run_id, "airflow_mlops.verdict_reason", decision.reason)
    return EvaluateResult(
        model_name=spec.model_name,
        run_id=spec.run_id,
        run_url=registry.run_url(experiment_id, spec.run_id),
        champion_version=champion_version.model_version if champion_version else None,
        dataset=dataset,
        window=spec.window,
        verdict=decision.verdict,
        reason=decision.reason,
        report=to_dict(report),
    )


def _rows(spec: EvaluateSpec, dataset: DatasetVersion, model: ServedModel) -> pl.DataFrame:
    target = spec.target or model.manifest.target
    names = model.manifest.signature.names
    if target in names:
        raise SchemaMismatchError(f"target {target!r} is also an input of the model of run {spec.run_id}")
    rows = read_rows(dataset, columns=[*names, target], time_column=spec.time_column, window=spec.window)
    return rows.drop_nulls([target])


STEP = Step(name="evaluate", spec=EvaluateSpec, result=EvaluateResult, run=run)
