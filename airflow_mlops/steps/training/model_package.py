"""Packaging a fitted model: the form it is served in, proof that the form is right, and the manifest."""

from __future__ import annotations

import pickle
import platform
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from airflow_mlops.core.codec import canonical_json, json_safe, to_dict
from airflow_mlops.core.comparison.metrics import resolve_metric
from airflow_mlops.core.comparison.predictions import Graded, Predictions
from airflow_mlops.core.model.background import BACKGROUND_FILE, Background
from airflow_mlops.core.model.package import (
    MAXIMUM_MANIFEST_BYTES,
    MAXIMUM_PACKAGE_BYTES,
    Holdout,
    PackageManifest,
    SafeForm,
    ServingForm,
    TrainedOn,
)
from airflow_mlops.core.model.parity import ParityLimits
from airflow_mlops.core.model.signature import FieldSpec, ModelSignature
from airflow_mlops.core.monitoring.estimation import ESTIMATION_FILE, Estimation, learn_labels_estimation
from airflow_mlops.core.profiles.profile_format import REFERENCE_PROFILE_FILE, profile_to_json
from airflow_mlops.exceptions import UnsafeModelError
from airflow_mlops.integrations import onnx, sklearn
from airflow_mlops.serving.model import (
    PICKLED_MODELS_VARIABLE,
    TRUSTED_TYPES_VARIABLE,
    allowed_types,
)
from airflow_mlops.serving.package import hash_files
from airflow_mlops.steps.monitoring.estimation import (
    ErrorModel,
    error_model_signature,
    fit_error_model,
    with_effective_count,
)
from airflow_mlops.steps.training.reference_profile import reference_profile
from airflow_mlops.steps.training.rows import class_shares, constant_answers, simple_prediction

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    import pandas as pd
    import polars as pl

    from airflow_mlops.core.comparison.metric import MetricValue
    from airflow_mlops.core.data.dataset import DatasetVersion
    from airflow_mlops.core.model.columns import ColumnRoles
    from airflow_mlops.core.model.parity import Parity
    from airflow_mlops.steps.training.rows import Split

#: Rows stored in the package with their predictions; a service that loads it must give the same.
KNOWN_ROWS = 5

#: Characters of a text in a known row.
_LONGEST_EXAMPLE = 1_000

#: Names of the model files without their ending, and the endings.
MODEL_STEM, ERROR_MODEL_STEM = "model", "error_model"
ENDINGS: dict[ServingForm, str] = {"onnx": ".onnx", "sklearn": ".skops", "pickle": ".pkl"}

#: The way out that is left, in messages.
_OR_PICKLE = ", or, where models are signed, store it as a pickle with allow_pickle=True"


class FittedModel(NamedTuple):
    """A fitted pipeline and what it did on the rows it never saw.

    :param pipeline: the fitted pipeline.
    :param features: the held-out rows as the model takes them.
    :param unseen: answers to them by a pipeline that had not learned from them: this one, or its measured twin where this
        one was fitted again on all rows.
    :param score: the metric of these answers.
    """

    pipeline: Any
    features: pd.DataFrame
    unseen: Predictions
    score: MetricValue

    @property
    def classification(self) -> bool:
        """Whether the output is a label."""
        return sklearn.is_classification(self.pipeline)


def write_package(
    folder: Path,
    fitted: FittedModel,
    columns: ColumnRoles,
    dataset: DatasetVersion,
    split: Split,
    *,
    recipe: str | None = None,
    method_digest: str | None = None,
    limits: ParityLimits,
    quantize: onnx.Quantization | None,
    allow_pickle: bool = False,
    background_rows: int = 0,
    private_columns: Sequence[str] = (),
    seed: int = 0,
) -> PackageManifest:
    """Write every file of the package but its manifest, and give the manifest.

    :param allow_pickle: store a model that converts to no safe form as a pickle.
    :param background_rows: training rows to store for explanations by the service; 0: none.
    :param private_columns: inputs of which the known rows have made-up values.
    :param seed: of their draw.
    :raises UnsafeModelError: the model converts to no safe form.
    :raises ValueError: the files are larger than a package that is loaded.
    """
    signature = ModelSignature(
        inputs=(
            *(FieldSpec(name=name, type="number") for name in columns.numeric),
            *(FieldSpec(name=name, type="string") for name in (*columns.categorical, *columns.text)),
        ),
        output=columns.target,
    )
    form, reason = _write_model(
        folder / MODEL_STEM, fitted, signature, limits, quantize, allow_pickle=allow_pickle
    )
    profile = reference_profile(split, columns, fitted.unseen.values, classification=fitted.classification)
    (folder / REFERENCE_PROFILE_FILE).write_text(profile_to_json(profile))
    estimation = _write_estimation(folder, fitted, columns, signature, split, private_columns)
    (folder / ESTIMATION_FILE).write_text(canonical_json(to_dict(estimation)))
    if background_rows:
        background = _draw_background(split.training, columns, background_rows, seed)
        (folder / BACKGROUND_FILE).write_text(background.to_json())
    _require_loadable_size(folder)
    classes = tuple(str(name) for name in fitted.pipeline.classes_) if fitted.classification else None
    known = example_rows(fitted.features, KNOWN_ROWS, private_columns)
    manifest = PackageManifest(
        task="classification" if fitted.classification else "regression",
        signature=signature,
        serving_form=form,
        serving_reason=reason,
        model_file=MODEL_STEM + ENDINGS[form],
        files=hash_files(folder),
        target=columns.target,
        classes=classes,
        probabilities=sklearn.gives_probabilities(fitted.pipeline),
        known_rows=tuple(json_safe(known.to_dict(orient="records"))),
        known_predictions=tuple(
            _known(value, fitted) for value in sklearn.predict(fitted.pipeline, known).values
        ),
        trained_on=TrainedOn(
            dataset_uri=dataset.uri,
            dataset_version=dataset.version,
            dataset_digest=dataset.dataset_digest,
            time_column=columns.time,
            window_start=split.training_window.start,
            window_end=split.training_window.end,
            rows=split.training.height,
            recipe=recipe,
            method_digest=method_digest,
            simple_prediction=simple_prediction(
                split.training[columns.target], resolve_metric(fitted.score.metric), classes=classes or ()
            ),
            constants=() if fitted.classification else constant_answers(split.training[columns.target]),
            class_shares=class_shares(split.training[columns.target]) if fitted.classification else {},
        ),
        holdout=Holdout(
            metric=fitted.score.metric,
            value=fitted.score.value,
            standard_deviation=fitted.score.standard_deviation,
            row_count=fitted.score.row_count,
            window_start=split.holdout_window.start,
            window_end=split.holdout_window.end,
        ),
        environment={"python": platform.python_version()}
        | {name: version(name) for name in ("scikit-learn", "skl2onnx", "onnxruntime", "numpy")},
    )
    size = len(manifest.to_bytes())
    if size > MAXIMUM_MANIFEST_BYTES:
        raise ValueError(
            f"the manifest of the package would have {size:,} bytes, and at most {MAXIMUM_MANIFEST_BYTES:,} are loaded: it has "
            f"{len(classes or ()):,} labels and {len(signature.inputs):,} inputs. Take fewer"
        )
    return manifest


def example_rows(features: pd.DataFrame, count: int, private_columns: Sequence[str]) -> pd.DataFrame:
    """Give the first rows, as they may be shown: with made-up values in private columns, and the beginning of long texts."""
    rows = features.head(count).copy()
    for name in rows.columns:
        if name in private_columns:
            rows[name] = 0.0 if rows[name].dtype.kind in "fiub" else "private"
        elif rows[name].dtype.kind not in "fiub":
            rows[name] = [
                value[:_LONGEST_EXAMPLE] if isinstance(value, str) else value for value in rows[name]
            ]
    return rows


def _require_loadable_size(folder: Path) -> None:
    """Refuse what no service, evaluation or registration would load, before it is stored."""
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    largest = max(sizes, key=sizes.__getitem__)
    if sum(sizes.values()) > MAXIMUM_PACKAGE_BYTES:
        raise ValueError(
            f"the package of the model has {sum(sizes.values()):,} bytes, {sizes[largest]:,} of them in {largest}; at most "
            f"{MAXIMUM_PACKAGE_BYTES:,} are loaded. Train a smaller model: bound the depth or the leaves of trees, take fewer of "
            "them, or an estimator that does not keep the training rows"
        )


def refused_types(untrusted: Iterable[str]) -> list[str]:
    """Of the types skops asks about give those that nobody here vouches for: no service would load them."""
    return sorted({*untrusted} - allowed_types())


def require_safe_form(pipeline: Any) -> None:
    """See before the fit that the model will have a form that a service loads: ONNX, or scikit-learn's with known types.

    :param pipeline: not fitted yet.
    :raises UnsafeModelError: naming the estimator without a converter, and every type to vouch for.
    """
    without = [type(one) for one in sklearn.stages(pipeline) if not onnx.has_converter(one)]
    names = {f"{one.__module__}.{one.__qualname__}" for one in without}
    try:
        refused = refused_types(sklearn.untrusted_types(pipeline)) if names else []
    except Exception:  # noqa: BLE001 - skops raises anything on what it can't write; the fitted form decides then
        return
    if names & {*refused}:
        raise UnsafeModelError(
            f"{', '.join(sorted(names & {*refused}))} has no ONNX form, and its scikit-learn form holds types that no service "
            f"would load: {', '.join(refused)}. Use scikit-learn's own parts, or name these in {TRUSTED_TYPES_VARIABLE} where "
            f"tasks and service run{_OR_PICKLE}"
        )


def _draw_background(rows: pl.DataFrame, columns: ColumnRoles, count: int, seed: int) -> Background:
    """Draw training rows, each once, as the model takes them."""
    chosen = np.random.default_rng(seed).permutation(rows.height)[:count]
    features = sklearn.to_features(rows[chosen], columns)
    return Background(
        columns={str(name): tuple(features[name].tolist()) for name in features.columns},
        drawn_from=rows.height,
        seed=seed,
    )


def _write_estimation(
    folder: Path,
    fitted: FittedModel,
    columns: ColumnRoles,
    signature: ModelSignature,
    split: Split,
    private_columns: Sequence[str],
) -> Estimation:
    """Learn on the held-out rows how the metric can be estimated without labels; write the error model if there is one."""
    metric = resolve_metric(fitted.score.metric)
    target = split.holdout[columns.target].to_numpy()
    if fitted.classification:
        estimation = learn_labels_estimation(metric, target=target, answers=fitted.unseen)
        return with_effective_count(estimation, metric, Graded(target, fitted.unseen))
    graded = Graded(target, fitted.unseen)
    model = fit_error_model(metric, graded, fitted.features, columns)
    estimation = with_effective_count(model.estimation, metric, graded)
    if model.pipeline is None:
        return estimation
    inputs = error_model_signature(signature, model.answer_field)
    form, reason = _write_safe_form(folder / ERROR_MODEL_STEM, model, inputs, ParityLimits(), None)
    if form is None:
        return Estimation(metric=metric.name, method="none", reason=reason)
    known = example_rows(model.features, KNOWN_ROWS, private_columns)
    return replace(
        estimation,
        model_file=ERROR_MODEL_STEM + ENDINGS[form],
        model_form=form,
        answer_field=model.answer_field,
        known_rows=tuple(json_safe(known.to_dict(orient="records"))),
        known_errors=tuple(float(value) for value in model.pipeline.predict(known)),
    )


def _write_model(
    stem: Path,
    fitted: FittedModel,
    signature: ModelSignature,
    limits: ParityLimits,
    quantize: onnx.Quantization | None,
    *,
    allow_pickle: bool = False,
) -> tuple[ServingForm, str]:
    """Write the model in a form that is safe to load; a pickle only where there is none and it is asked for.

    :raises UnsafeModelError: there is none, and ``allow_pickle`` is not set.
    """
    form, reason = _write_safe_form(stem, fitted, signature, limits, quantize)
    if form is not None:
        return form, reason
    if not allow_pickle:
        raise UnsafeModelError(
            f"{reason}. Use scikit-learn's own parts, or name these in {TRUSTED_TYPES_VARIABLE} where tasks and service "
            f"run{_OR_PICKLE}"
        )
    _write_pickle(stem.with_suffix(ENDINGS["pickle"]), fitted.pipeline)
    return "pickle", (
        "a pickle, as allow_pickle asks for: loading it runs whatever code it names, so it is loaded only when a trusted key "
        f"signed it and {PICKLED_MODELS_VARIABLE} names its model. {reason}"
    )


def _write_safe_form(
    stem: Path,
    fitted: FittedModel | ErrorModel,
    signature: ModelSignature,
    limits: ParityLimits,
    quantize: onnx.Quantization | None,
) -> tuple[SafeForm | None, str]:
    """Choose ONNX when it converts and agrees with scikit-learn on hard rows, else the skops form; say why."""
    rows, real = onnx.hard_rows(fitted.pipeline, fitted.features, signature)

    def compare(form: bytes) -> Parity:
        return onnx.check_parity(form, fitted.pipeline, rows, signature, limits, real_rows=real)

    try:
        converted = onnx.convert(fitted.pipeline, signature)
        parity = compare(converted)
    except Exception as err:  # noqa: BLE001 - converters raise anything; the model is served as it is then
        reason = f"no ONNX form: {type(err).__name__}: {str(err)[:200]}"
    else:
        if parity.passed:
            data, change = _quantized(converted, quantize, compare)
            stem.with_suffix(ENDINGS["onnx"]).write_bytes(data)
            return "onnx", change or parity.reason
        reason = f"the ONNX form disagrees with scikit-learn: {parity.reason}"
    refused = _write_skops(stem.with_suffix(ENDINGS["sklearn"]), fitted.pipeline)
    return (None, f"{reason}; and its scikit-learn form {refused}") if refused else ("sklearn", reason)


def _write_skops(path: Path, pipeline: Any) -> str | None:
    """Write the skops form.

    :returns: why no service would load it, and nothing was left there; ``None`` when it will.
    """
    try:
        refused = refused_types(sklearn.save_skops(pipeline, path))
    except Exception as err:  # noqa: BLE001 - skops raises anything on what it can't write
        why = f"can't be written by skops ({type(err).__name__}: {str(err)[:200]})"
    else:
        if not refused:
            return None
        why = f"holds types that no service would load: {', '.join(refused)}"
    path.unlink(missing_ok=True)
    return why


def _write_pickle(path: Path, pipeline: Any) -> None:
    """Write a plain pickle.

    Not with cloudpickle: that puts the code itself into the file, bound to one version of Python, unseen by whoever reviews the
    code that is installed. A plain pickle names its classes and functions, and they must be importable where it is loaded.

    :raises UnsafeModelError: a part of it can't be named.
    """
    try:
        path.write_bytes(pickle.dumps(pipeline, protocol=5))
    except (pickle.PicklingError, AttributeError, TypeError) as err:
        raise UnsafeModelError(
            f"the model can't be stored as a pickle either ({type(err).__name__}: {str(err)[:300]}): give its functions and classes "
            "a name in a module that is installed where it is served, instead of a lambda or a local one"
        ) from err


def _quantized(
    converted: bytes, how: onnx.Quantization | None, compare: Callable[[bytes], Parity]
) -> tuple[bytes, str | None]:
    """Make the ONNX form smaller where that changes no answer beyond the limits."""
    if how is None:
        return converted, None
    try:
        smaller = onnx.quantize(converted, how)
        parity = compare(smaller)
    except Exception as err:  # noqa: BLE001 - quantizers raise anything; the exact form is there
        return converted, f"kept exact, {how} failed: {type(err).__name__}: {str(err)[:200]}"
    if len(smaller) >= len(converted):
        return converted, f"kept exact, {how} has {len(smaller)} instead of {len(converted)} bytes"
    if not parity.passed:
        return converted, f"kept exact, {how} changes answers: {parity.reason}"
    return smaller, f"{how}, {len(smaller)} instead of {len(converted)} bytes: {parity.reason}"


def _known(value: Any, fitted: FittedModel) -> float | str:
    return str(value) if fitted.classification else float(value)
