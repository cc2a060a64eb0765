"""Estimation: learn at training how the model's metric can be estimated without labels, and do it for a window."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from airflow_mlops.core.codec import from_dict
from airflow_mlops.core.comparison.predictions import Graded, Predictions
from airflow_mlops.core.model.columns import ColumnRoles
from airflow_mlops.core.model.signature import FieldSpec, ModelSignature
from airflow_mlops.core.model.signing import Trust
from airflow_mlops.core.model.tuning import Candidate
from airflow_mlops.core.monitoring.change import effective_count
from airflow_mlops.core.monitoring.estimation import (
    ESTIMATION_FILE,
    Estimate,
    Estimation,
    estimate_errors,
    estimate_labels,
    learn_error_estimation,
    row_errors,
)
from airflow_mlops.core.monitoring.stretches import stretches
from airflow_mlops.exceptions import ArtifactIntegrityError, InsufficientDataError
from airflow_mlops.integrations import sklearn
from airflow_mlops.serving.log_rows import FEATURE_PREFIX
from airflow_mlops.serving.model import ServedModel, open_model
from airflow_mlops.serving.package import read_verified

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl

    from airflow_mlops.core.comparison.metric import Metric
    from airflow_mlops.core.model.package import PackageManifest
    from airflow_mlops.integrations.mlflow import RegisteredVersion, Registry
    from airflow_mlops.services import Services

#: Small trees with large leaves: of an error only its outline can be learned.
ERROR_MODEL = Candidate(
    estimator="sklearn.ensemble.HistGradientBoostingRegressor",
    params={"max_iter": 60, "learning_rate": 0.1, "max_leaf_nodes": 15, "min_samples_leaf": 40},
)
#: Held-out rows it is learned on at most, the newest.
MOST_ROWS = 25_000


class ErrorModel(NamedTuple):
    """A model of how far off another one is.

    :param pipeline: fitted; ``None`` when there can't be one, the estimation says why.
    :param columns: what it reads: the inputs, and the answer.
    :param answer_field: name of the column that holds the answer.
    :param features: rows it was learned on.
    """

    pipeline: Any
    columns: ColumnRoles
    answer_field: str
    features: pd.DataFrame
    estimation: Estimation


def fit_error_model(
    metric: Metric, graded: Graded, features: pd.DataFrame, columns: ColumnRoles, *, seed: int = 0
) -> ErrorModel:
    """Learn on held-out rows how far off the model is, from its inputs and its answer.

    :param graded: answers to held-out rows beside what turned out, in time order.
    :param features: the rows.
    :param columns: what the features are.
    """
    answer_field = "answer"
    while answer_field in columns.inputs:
        answer_field += "_"
    roles = ColumnRoles(
        target=f"{answer_field} error",
        time=f"{answer_field} time",
        numeric=(*columns.numeric, answer_field),
        categorical=columns.categorical,
        text=columns.text,
    )
    newest = slice(max(0, len(graded) - MOST_ROWS), None)
    answers = graded.answers.values.astype(np.float32).astype(np.float64)[newest]
    rows = features.iloc[newest].assign(**{answer_field: answers})[list(roles.inputs)]
    errors = row_errors(metric, graded)
    if errors is None:
        estimation = Estimation(
            metric=metric.name, method="none", reason=f"{metric.name} is no mean of errors row by row"
        )
        return ErrorModel(None, roles, answer_field, rows, estimation)
    errors = errors[newest]

    def fit(some: Any) -> Any:
        pipeline = sklearn.build_pipeline(ERROR_MODEL, roles, seed=seed)
        return sklearn.fit(pipeline, rows.iloc[some], errors[some], None)

    left_out = [(check, fit(learn).predict(rows.iloc[check])) for learn, check in stretches(len(errors))]
    estimation = learn_error_estimation(metric, errors, left_out)
    pipeline = fit(slice(None)) if estimation.method == "error_model" else None
    return ErrorModel(pipeline, roles, answer_field, rows, estimation)


def error_model_signature(signature: ModelSignature, answer_field: str) -> ModelSignature:
    """Give what the error model reads: the model's inputs and its answer."""
    numbers = tuple(field for field in signature.inputs if field.type == "number")
    texts = tuple(field for field in signature.inputs if field.type != "number")
    answer = FieldSpec(name=answer_field, type="number")
    return ModelSignature(inputs=(*numbers, answer, *texts), output=f"{answer_field} error")


def with_effective_count(estimation: Estimation, metric: Metric, graded: Graded) -> Estimation:
    """Add how many independent losses the held-out rows amount to."""
    if metric.losses is None or (metric.needs_probabilities and graded.answers.probabilities is None):
        return estimation
    return replace(estimation, effective_count=effective_count(metric.losses(graded)))


class GradingPackage(NamedTuple):
    """What grading a version needs of its package.

    :param estimation: ``None`` in a package of a release that knew none.
    :param model: the model, where its probabilities are needed: the log holds answers only.
    :param error_model: the error model, where there is one.
    """

    manifest: PackageManifest
    estimation: Estimation | None
    model: ServedModel | None
    error_model: ServedModel | None


def load_for_grading(
    registry: Registry, version: RegisteredVersion, metric: Metric, services: Services
) -> GradingPackage:
    """Read from a version's package what grading and estimating a metric needs.

    :raises ArtifactIntegrityError: it is not the registered package, or a file is not safe.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = registry.download_version(version, Path(temporary))
        trust = Trust.of(services.signing_public_keys, version.model_name)
        return open_for_grading(folder, version.package_digest, trust=trust, metric=metric)


def open_for_grading(
    folder: Path, digest: str, *, trust: Trust | None, metric: Metric | None = None
) -> GradingPackage:
    """Read the same from a package's folder.

    :param digest: of the package.
    :param trust: keys it must be signed with.
    :param metric: to grade; ``None``: nothing but what the package itself estimates.
    :raises ArtifactIntegrityError: it is not that package, or a file is not safe.
    """
    manifest, contents = read_verified(folder, digest, trust=trust)
    estimation = _estimation(contents, folder)
    calibrated = estimation is not None and estimation.method == "calibration"
    probabilities = manifest.task == "classification" and manifest.probabilities
    wanted = probabilities and (calibrated or (metric is not None and metric.needs_probabilities))
    return GradingPackage(
        manifest=manifest,
        estimation=estimation,
        model=open_model(manifest, contents, folder, signed_as=trust.model_name if trust else None)
        if wanted
        else None,
        error_model=_open_error_model(manifest, estimation, contents, folder) if estimation else None,
    )


def _estimation(contents: Mapping[str, bytes], folder: Path) -> Estimation | None:
    if ESTIMATION_FILE not in contents:
        return None
    try:
        return from_dict(Estimation, json.loads(contents[ESTIMATION_FILE]))
    except (ValueError, RecursionError) as err:
        raise ArtifactIntegrityError(
            f"{folder / ESTIMATION_FILE} does not say how to estimate: {err}"
        ) from err


def _open_error_model(
    manifest: PackageManifest, estimation: Estimation, contents: Mapping[str, bytes], folder: Path
) -> ServedModel | None:
    """Load it by the rules for the model itself."""
    file, form, answer_field = estimation.model_file, estimation.model_form, estimation.answer_field
    if file is None or form is None or answer_field is None:
        return None
    if file not in contents:
        raise ArtifactIntegrityError(f"{folder / file} is missing from the package")
    part = replace(
        manifest,
        task="regression",
        classes=None,
        signature=error_model_signature(manifest.signature, answer_field),
        serving_form=form,
        model_file=file,
        known_rows=estimation.known_rows,
        known_predictions=estimation.known_errors,
    )
    return open_model(part, contents, folder, signed_as=None)


def estimate(
    package: GradingPackage, metric: Metric, rows: pl.DataFrame, *, maximum_invalid_share: float = 0.05
) -> tuple[Estimate | None, str]:
    """Estimate a metric for answers whose labels nobody knows.

    :param rows: ``prediction`` and the inputs, as the inference log holds them.
    :param maximum_invalid_share: share of answers that may be left out because they, or their probabilities, are no finite numbers.
    :returns: the estimate, and why there is none, or which answers it leaves out.
    """
    estimation, signature = package.estimation, package.manifest.signature
    if estimation is None:
        return None, "the model was trained before estimates were learned: train it again"
    if estimation.method == "none":
        return None, estimation.reason
    if estimation.metric != metric.name:
        return None, f"only {estimation.metric} can be estimated: it is what the model was trained for"
    missing = [name for name in signature.names if FEATURE_PREFIX + name not in rows.columns]
    if missing:
        return None, f"the inference log does not hold the input {missing[0]!r}"
    if rows.height == 0:
        return None, "this version gave no answer in the window"
    if package.error_model is None and package.model is None:
        return None, "the model gives no probabilities"
    rows, answers, invalid = _valid_answers(package, rows)
    if invalid > maximum_invalid_share * (len(answers) + invalid):
        return None, f"{invalid} of {len(answers) + invalid} answers are no finite numbers"
    left_out = f"the estimate leaves out {invalid} answers that are no finite numbers" if invalid else ""
    try:
        if package.error_model is None or estimation.answer_field is None:
            return estimate_labels(metric, answers, estimation), left_out
        asked = {**logged_inputs(signature, rows), estimation.answer_field: answers.values.astype(np.float64)}
        said = package.error_model.predict_columns(asked)
        return estimate_errors(metric, np.asarray(said, dtype=np.float64), estimation), left_out
    except InsufficientDataError as err:
        return None, str(err)


def _valid_answers(package: GradingPackage, rows: pl.DataFrame) -> tuple[pl.DataFrame, Predictions, int]:
    """Give the rows whose inputs and answers can be computed with, and how many others there are."""
    answers = answers_of(package, rows)
    valid = answers.valid
    if answers.probabilities is None:  # they are none where an input is infinite
        valid &= _finite_inputs(package.manifest.signature, rows)
    return rows.filter(valid), answers.take(valid), rows.height - int(valid.sum())


def _finite_inputs(signature: ModelSignature, rows: pl.DataFrame) -> Any:
    """Tell in which rows no input is infinite: the service refuses such a request, a model would fail on it."""
    import polars as pl

    numbers = [FEATURE_PREFIX + item.name for item in signature.inputs if item.type == "number"]
    if not numbers:
        return np.ones(rows.height, dtype=bool)
    finite = pl.all_horizontal(~pl.col(numbers).cast(pl.Float64).is_infinite().fill_null(value=False))
    return rows.select(finite).to_series().to_numpy()


def answers_of(package: GradingPackage, rows: pl.DataFrame) -> Predictions:
    """Give the logged answers, with the model's probabilities where it was loaded."""
    values = rows["prediction"].to_numpy()
    classes = package.manifest.classes or ()
    signature = package.manifest.signature
    logged = all(FEATURE_PREFIX + name in rows.columns for name in signature.names)
    if package.model is None or package.model.probabilities is None or not logged or rows.height == 0:
        return Predictions(values=values, classes=classes)
    finite = _finite_inputs(signature, rows)
    given = np.full((rows.height, len(classes)), np.nan)
    if finite.any():
        given[finite] = package.model.probabilities(logged_inputs(signature, rows.filter(finite)))
    return Predictions(values=values, probabilities=given, classes=classes)


def logged_inputs(signature: ModelSignature, rows: pl.DataFrame) -> dict[str, Any]:
    """Give the inputs as the service had them, from rows of the inference log."""
    import polars as pl

    return {
        field.name: rows[FEATURE_PREFIX + field.name].cast(pl.Float64).fill_null(float("nan")).to_numpy()
        if field.type == "number"
        else rows[FEATURE_PREFIX + field.name].cast(pl.String).to_list()
        for field in signature.inputs
    }
