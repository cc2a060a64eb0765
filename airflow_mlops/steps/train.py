"""Train: fit a pipeline on a window, prove its serving form, log the run and its package to MLflow."""

from __future__ import annotations

import json
import platform
import resource
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from airflow_mlops.core.codec import canonical_json, from_dict, json_safe, to_dict
from airflow_mlops.core.dataset import DatasetVersion
from airflow_mlops.core.metrics import MetricValue, evaluate_metric, resolve_metric
from airflow_mlops.core.package import Holdout, PackageManifest, TrainedOn
from airflow_mlops.core.profile import profile_frame
from airflow_mlops.core.signature import FieldSpec, ModelSignature
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import InsufficientDataError
from airflow_mlops.integrations import onnx, sklearn
from airflow_mlops.integrations.mlflow import PACKAGE_DIGEST_TAG, PACKAGE_FOLDER, STEP_KEY_TAG, Registry
from airflow_mlops.serving.package import hash_files, write_manifest
from airflow_mlops.steps.base import Step
from airflow_mlops.steps.code_version import code_version
from airflow_mlops.steps.common import DatasetRef, read_rows, resolve_dataset, work_key

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl
    from numpy.typing import NDArray

    from airflow_mlops.services import Services

#: Rows stored in the package with their predictions; a service that loads it must give the same.
KNOWN_ROWS = 5

#: Tag of a finished run that holds its result, so that a retry can give it again.
_RESULT_TAG = "airflow_mlops.result"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSpec:
    """What to train, and on what.

    :param dataset: dataset version, or table URI for its newest.
    :param model_name: name of the model to be; also the default MLflow experiment.
    :param estimator: import path of a scikit-learn estimator or of a factory function.
    :param estimator_params: its arguments.
    :param target: column to predict.
    :param numeric: numeric input columns.
    :param categorical: categorical input columns.
    :param time_column: orders the rows; the newest are held out.
    :param window: rows to use; ``None`` uses all.
    :param half_life_days: weight of a row halves with this age (before the newest row); ``None``: equal weights.
    :param holdout_share: newest share of the rows, never trained on, ``(0, 0.5]``.
    :param metric: name of a built-in metric or import path of one.
    :param maximum_parity_difference: how far ONNX may be from scikit-learn, in standard deviations of the output.
    :param seed: random state.
    :param experiment: MLflow experiment.
    """

    dataset: DatasetRef
    model_name: str
    estimator: str
    estimator_params: dict[str, Any] = field(default_factory=dict)
    target: str
    numeric: tuple[str, ...]
    categorical: tuple[str, ...] = ()
    time_column: str
    window: Window | None = None
    half_life_days: float | None = None
    holdout_share: float = 0.2
    metric: str = "mae"
    maximum_parity_difference: float = 1e-3
    seed: int = 0
    experiment: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """A finished run and the package it holds."""

    model_name: str
    run_id: str
    run_url: str
    model_id: str | None
    package_digest: str
    serving_form: str
    serving_reason: str
    dataset: DatasetVersion
    training: Window
    holdout: Window
    training_rows: int
    holdout_rows: int
    metric: str
    metric_value: float | None
    reused: bool


class _Split(NamedTuple):
    training: pl.DataFrame
    holdout: pl.DataFrame
    training_window: Window
    holdout_window: Window


def run(spec: TrainSpec, services: Services) -> TrainResult:
    """Train once: the same spec on the same data finds the finished run.

    :raises SchemaMismatchError: naming a column the table does not have.
    :raises InsufficientDataError: too few rows to train and hold out.
    :raises ValueError: an estimator path or parameter that is wrong.
    """
    registry = Registry.connect(services)
    dataset = resolve_dataset(spec.dataset, time_column=spec.time_column)
    key = work_key("train", to_dict(spec) | {"dataset": None}, dataset.dataset_digest)
    experiment_id = registry.experiment_id(spec.experiment or spec.model_name)
    done = registry.finished_run(experiment_id, key)
    if done is not None:
        return replace(from_dict(TrainResult, json.loads(done.data.tags[_RESULT_TAG])), reused=True)
    registry.close_interrupted_runs(experiment_id, key)
    split = _split(spec, dataset)
    tags = {
        STEP_KEY_TAG: key,
        "airflow_mlops.model_name": spec.model_name,
        "airflow_mlops.dataset_digest": dataset.dataset_digest,
        **{f"airflow_mlops.{name}": value for name, value in code_version().items()},
    }
    name = f"{spec.model_name} {split.training_window.end:%Y-%m-%d}"
    with registry.run(experiment_id, name, tags) as run_id:
        return _train(spec, dataset, split, registry, experiment_id, run_id)


def _train(
    spec: TrainSpec,
    dataset: DatasetVersion,
    split: _Split,
    registry: Registry,
    experiment_id: str,
    run_id: str,
) -> TrainResult:
    started = time.monotonic()
    roles = {"numeric": spec.numeric, "categorical": spec.categorical}
    pipeline = sklearn.build_pipeline(spec.estimator, spec.estimator_params, **roles, seed=spec.seed)
    features = sklearn.to_features(split.training, **roles)
    sklearn.fit(pipeline, features, split.training[spec.target].to_numpy(), _weights(spec, split))
    fit_seconds = time.monotonic() - started
    holdout_features = sklearn.to_features(split.holdout, **roles)
    predictions = pipeline.predict(holdout_features)
    score = evaluate_metric(
        resolve_metric(spec.metric), target=split.holdout[spec.target].to_numpy(), prediction=predictions
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / PACKAGE_FOLDER
        folder.mkdir()
        untrusted = sklearn.save_skops(pipeline, Path(temporary) / "model.skops")
        manifest = _package(spec, dataset, split, pipeline, holdout_features, predictions, score, folder)
        digest = write_manifest(folder, manifest)
        registry.upload(run_id, folder, PACKAGE_FOLDER)
    model_id = registry.log_model(
        experiment_id, run_id, pipeline, name=spec.model_name, features=holdout_features, untrusted=untrusted
    )
    registry.log_dataset(run_id, dataset, "training")
    result = TrainResult(
        model_name=spec.model_name,
        run_id=run_id,
        run_url=registry.run_url(experiment_id, run_id),
        model_id=model_id,
        package_digest=digest,
        serving_form=manifest.serving_form,
        serving_reason=manifest.serving_reason,
        dataset=dataset,
        training=split.training_window,
        holdout=split.holdout_window,
        training_rows=split.training.height,
        holdout_rows=split.holdout.height,
        metric=score.metric,
        metric_value=score.value,
        reused=False,
    )
    registry.log(
        run_id,
        params=_flat(spec) | {"dataset_version": dataset.version, "training_rows": split.training.height},
        metrics={
            f"holdout_{score.metric}": score.value,
            "fit_seconds": fit_seconds,
            "peak_memory_mb": _peak_memory_mb(),
        },
    )
    registry.client.set_tag(run_id, PACKAGE_DIGEST_TAG, digest)
    registry.client.set_tag(run_id, _RESULT_TAG, canonical_json(to_dict(result)))
    return result


def _package(
    spec: TrainSpec,
    dataset: DatasetVersion,
    split: _Split,
    pipeline: Any,
    holdout_features: pd.DataFrame,
    predictions: Any,
    score: MetricValue,
    folder: Path,
) -> PackageManifest:
    """Write the model in the form it will be served in, and describe it."""
    signature = ModelSignature(
        inputs=(
            *(FieldSpec(name=name, type="number") for name in spec.numeric),
            *(FieldSpec(name=name, type="string") for name in spec.categorical),
        ),
        output=spec.target,
    )
    form, reason = _serving_form(spec, pipeline, signature, holdout_features, predictions, folder)
    profile = profile_frame(
        split.training,
        numeric=_numeric_profile(spec, pipeline),
        categorical=_categorical_profile(spec, pipeline),
    )
    (folder / "reference_profile.json").write_text(canonical_json(to_dict(profile)))
    model_file = "model.onnx" if form == "onnx" else "model.skops"
    known = holdout_features.head(KNOWN_ROWS)
    return PackageManifest(
        task="classification" if sklearn.is_classification(pipeline) else "regression",
        signature=signature,
        serving_form=form,
        serving_reason=reason,
        model_file=model_file,
        files=hash_files(folder),
        target=spec.target,
        classes=tuple(str(label) for label in pipeline.classes_) if hasattr(pipeline, "classes_") else None,
        known_rows=tuple(json_safe(known.to_dict(orient="records"))),
        known_predictions=tuple(_builtin(value) for value in predictions[:KNOWN_ROWS]),
        trained_on=TrainedOn(
            dataset_uri=dataset.uri,
            dataset_version=dataset.version,
            dataset_digest=dataset.dataset_digest,
            window_start=split.training_window.start,
            window_end=split.training_window.end,
            rows=split.training.height,
            simple_prediction=_simple_prediction(split.training[spec.target]),
        ),
        holdout=Holdout(
            metric=score.metric,
            value=score.value,
            standard_deviation=score.standard_deviation,
            row_count=score.row_count,
            window_start=split.holdout_window.start,
            window_end=split.holdout_window.end,
        ),
        environment={"python": platform.python_version()}
        | {name: version(name) for name in ("scikit-learn", "skl2onnx", "onnxruntime", "numpy")},
    )


def _serving_form(
    spec: TrainSpec,
    pipeline: Any,
    signature: ModelSignature,
    features: pd.DataFrame,
    predictions: Any,
    folder: Path,
) -> tuple[Literal["onnx", "sklearn"], str]:
    """Choose ONNX when it converts and agrees with scikit-learn on the held-out rows; else say why not."""
    try:
        converted = onnx.convert(pipeline, signature)
    except Exception as err:  # noqa: BLE001 - converters raise anything; the model is served as it is then
        reason = f"no ONNX form: {type(err).__name__}: {str(err)[:200]}"
    else:
        parity = onnx.check_parity(
            converted, features, predictions, maximum_difference=spec.maximum_parity_difference
        )
        if parity.passed:
            (folder / "model.onnx").write_bytes(converted)
            return "onnx", parity.reason
        reason = f"the ONNX form disagrees with scikit-learn: {parity.reason}"
    sklearn.save_skops(pipeline, folder / "model.skops")
    return "sklearn", reason


def _split(spec: TrainSpec, dataset: DatasetVersion) -> _Split:
    """Hold out the newest rows: a random split would let the model see the future."""
    import polars as pl

    columns = [*dict.fromkeys([*spec.numeric, *spec.categorical, spec.target, spec.time_column])]
    rows = read_rows(dataset, columns=columns, time_column=spec.time_column, window=spec.window)
    rows = rows.drop_nulls([spec.target, spec.time_column]).sort(spec.time_column)
    if not 0.0 < spec.holdout_share <= 0.5:
        raise ValueError(f"holdout_share is {spec.holdout_share}; it must be in (0, 0.5]")
    if rows.height == 0:
        raise InsufficientDataError(
            f"no row of {dataset.uri} in {spec.window} has a {spec.target}: nothing to train on"
        )
    times = rows[spec.time_column]
    boundary = cast("datetime", times[int(rows.height * (1.0 - spec.holdout_share))])
    training = rows.filter(pl.col(spec.time_column) < boundary)
    holdout = rows.filter(pl.col(spec.time_column) >= boundary)
    if training.height == 0 or holdout.height == 0:
        raise InsufficientDataError(
            f"{rows.height} rows of {dataset.uri} can't be split by {spec.time_column!r} at {boundary}: "
            f"{training.height} to train on, {holdout.height} held out"
        )
    start = spec.window.start if spec.window else cast("datetime", times.min())
    end = spec.window.end if spec.window else cast("datetime", times.max()) + timedelta(microseconds=1)
    return _Split(
        training=training,
        holdout=holdout,
        training_window=Window(start=start, end=boundary),
        holdout_window=Window(start=boundary, end=end),
    )


def _weights(spec: TrainSpec, split: _Split) -> NDArray[Any] | None:
    """Weight rows by age: ``0.5 ** (age / half_life)``, age counted back from the newest training row."""
    if spec.half_life_days is None:
        return None
    if spec.half_life_days <= 0:
        raise ValueError(
            f"half_life_days is {spec.half_life_days}; it must be positive, or None for equal weights"
        )
    import polars as pl

    times = pl.col(spec.time_column)
    age = split.training.select((times.max() - times).dt.total_seconds()).to_series()
    weights: NDArray[Any] = 0.5 ** (age.to_numpy() / 86_400.0 / spec.half_life_days)
    return weights


def _numeric_profile(spec: TrainSpec, pipeline: Any) -> list[str]:
    return [*spec.numeric] if sklearn.is_classification(pipeline) else [*spec.numeric, spec.target]


def _categorical_profile(spec: TrainSpec, pipeline: Any) -> list[str]:
    return [*spec.categorical, spec.target] if sklearn.is_classification(pipeline) else [*spec.categorical]


def _simple_prediction(target: pl.Series) -> Any:
    """Median of a number (best constant under absolute error), most frequent value of a label."""
    return _builtin(target.median() if target.dtype.is_numeric() else target.mode().sort()[0])


def _builtin(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _peak_memory_mb() -> float:
    """Peak resident memory of this process; kilobytes on Linux, bytes on macOS."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024.0 * 1024.0 if sys.platform == "darwin" else 1024.0)


def _flat(spec: TrainSpec) -> dict[str, Any]:
    """Parameters as MLflow shows them: one level, the estimator's own under ``estimator.``."""
    values = to_dict(spec)
    values.pop("dataset")
    params = values.pop("estimator_params")
    return values | {f"estimator.{name}": value for name, value in params.items()}


STEP = Step(name="train", spec=TrainSpec, result=TrainResult, run=run)
