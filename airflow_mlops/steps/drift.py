"""Drift: what the service was asked in a window against what the champion was trained on."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from airflow_mlops.core.codec import to_dict
from airflow_mlops.core.drift import compare_profiles
from airflow_mlops.core.profile import profile_frame
from airflow_mlops.core.windows import Window
from airflow_mlops.integrations import delta, evidently
from airflow_mlops.integrations.mlflow import STEP_KEY_TAG, Registry
from airflow_mlops.serving.inference_log import read_inference_log
from airflow_mlops.steps.base import Step
from airflow_mlops.steps.common import work_key
from airflow_mlops.steps.labels import labelled_predictions
from airflow_mlops.steps.packages import champion_profile

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl

    from airflow_mlops.core.package import PackageManifest
    from airflow_mlops.services import Services

_LOG = logging.getLogger(__name__)

#: Experiment that holds the reports of a model's windows.
MONITORING_EXPERIMENT = "{model_name} monitoring"
REPORT_FILE = "drift_report.html"
#: Rows per side of the report: an explanation needs a picture, not every row.
REPORT_ROWS = 5_000


@dataclass(frozen=True, kw_only=True, slots=True)
class DriftSpec:
    """What to compare.

    :param model_name: model whose inference log is read.
    :param window: predictions whose time is inside: the current window.
    :param champion_alias: the version whose training data is the reference.
    :param detector: ``wasserstein``, ``jensen_shannon``, ``psi`` or import path of one; ``None`` chooses by column type.
    :param share_threshold: share of drifted features from which the dataset counts as drifted.
    :param report: write an Evidently report ``never``, when ``fired``, or ``always``.
    :param labels: table URI with labels, for the target in the report.
    :param id_column: column of the labels that equals the prediction id.
    """

    model_name: str
    window: Window
    champion_alias: str = "champion"
    detector: str | None = None
    share_threshold: float = 0.5
    report: Literal["never", "fired", "always"] = "fired"
    labels: str | None = None
    id_column: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DriftResult:
    """The verdict per dataset; per feature in ``features``, largest share of its threshold first."""

    model_name: str
    window: Window
    row_count: int
    drifted: bool
    drifted_count: int
    feature_count: int
    headline: str
    features: tuple[dict[str, Any], ...]
    report_url: str | None


def run(spec: DriftSpec, services: Services) -> DriftResult:
    """Profile the window, compare with the reference profile, explain when it fired.

    The verdict stands without its explanation: a report that can't be written is logged and left out.

    :raises InsufficientDataError: nothing was predicted in the window.
    """
    registry = Registry.connect(services)
    manifest, reference = champion_profile(registry, spec.model_name, spec.champion_alias)
    log = Path(services.require("serving_dir")) / "inference_log"
    rows = _requests(log, spec, manifest)
    fields = manifest.signature.inputs
    numeric = [field.name for field in fields if field.type == "number"]
    categorical = [field.name for field in fields if field.type == "string"]
    current = profile_frame(rows, numeric=numeric, categorical=categorical, like=reference)
    report = compare_profiles(
        reference, current, detector=spec.detector, share_threshold=spec.share_threshold
    )
    url = None
    if spec.report == "always" or (spec.report == "fired" and report.drifted):
        try:
            url = _explain(spec, registry, manifest, rows, log, numeric=numeric, categorical=categorical)
        except Exception:  # noqa: BLE001 - labels that are late or mistyped, Evidently, MLflow, the disk
            _LOG.exception(
                "no report for %s in %s: the verdict is recorded without it", spec.model_name, spec.window
            )
    return DriftResult(
        model_name=spec.model_name,
        window=spec.window,
        row_count=rows.height,
        drifted=report.drifted,
        drifted_count=report.drifted_count,
        feature_count=report.feature_count,
        headline=report.headline,
        features=tuple(to_dict(feature) for feature in report.features),
        report_url=url,
    )


def _requests(log: Path, spec: DriftSpec, manifest: PackageManifest) -> pl.DataFrame:
    """Read the inputs the service was asked with, under their own names, beside prediction and id."""
    names = manifest.signature.names
    logged = read_inference_log(log, spec.model_name, spec.window)
    return logged.select("prediction_id", "prediction", *(f"feature_{name}" for name in names)).rename(
        {f"feature_{name}": name for name in names}
    )


def _explain(
    spec: DriftSpec,
    registry: Registry,
    manifest: PackageManifest,
    rows: pl.DataFrame,
    log: Path,
    *,
    numeric: list[str],
    categorical: list[str],
) -> str:
    """Write an Evidently report of both windows and keep it as an artifact of a monitoring run."""
    import polars as pl

    target = manifest.target if spec.labels and spec.id_column else None
    current = rows
    if spec.labels and spec.id_column:
        joined = labelled_predictions(
            log,
            spec.model_name,
            spec.window,
            labels=spec.labels,
            id_column=spec.id_column,
            target=manifest.target,
        )
        current = rows.join(joined.select("prediction_id", manifest.target), on="prediction_id").drop_nulls(
            manifest.target
        )
    trained = manifest.trained_on
    reference = delta.read_table(
        trained.dataset_uri,
        version=trained.dataset_version,
        columns=[*numeric, *categorical, *([target] if target else [])],
        window=trained.window,
        time_column=trained.time_column,
    ).with_columns(pl.col(name).cast(pl.String) for name in categorical)
    columns = [*numeric, *categorical, *([target] if target else [])]
    experiment_id = registry.experiment_id(MONITORING_EXPERIMENT.format(model_name=spec.model_name))
    key = work_key("drift", to_dict(spec), trained.dataset_digest)
    registry.close_interrupted_runs(experiment_id, key)
    tags = {STEP_KEY_TAG: key, "airflow_mlops.window": spec.window.key}
    with registry.run(experiment_id, f"window {spec.window}", tags) as run_id:
        with tempfile.TemporaryDirectory() as temporary:
            evidently.write_drift_report(
                reference=_sample(reference.collect(), columns),
                current=_sample(current, columns),
                numeric=[*numeric, *([target] if target and manifest.task == "regression" else [])],
                categorical=[
                    *categorical,
                    *([target] if target and manifest.task == "classification" else []),
                ],
                share_threshold=spec.share_threshold,
                path=Path(temporary) / REPORT_FILE,
            )
            registry.upload(run_id, Path(temporary), "")
        return registry.run_url(experiment_id, run_id, REPORT_FILE)


def _sample(rows: pl.DataFrame, columns: list[str]) -> pd.DataFrame:
    chosen = rows.select(columns)
    return (chosen.sample(REPORT_ROWS, seed=0) if chosen.height > REPORT_ROWS else chosen).to_pandas()


STEP = Step(name="drift", spec=DriftSpec, result=DriftResult, run=run)
