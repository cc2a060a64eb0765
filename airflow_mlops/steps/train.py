"""Train: search and fit a pipeline on a window, prove its serving form, log the run and its package to MLflow."""

from __future__ import annotations

import json
import logging
import resource
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from airflow_mlops.core.codec import canonical_json, from_dict, to_dict
from airflow_mlops.core.columns import ColumnRoles
from airflow_mlops.core.dataset import DatasetVersion
from airflow_mlops.core.metrics import DEFAULT_METRICS, Metric, evaluate_metric, resolve_metric
from airflow_mlops.core.parity import ParityLimits
from airflow_mlops.core.tuning import Candidate, Search, SearchResult, Trial, time_ordered_folds
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import SchemaMismatchError
from airflow_mlops.integrations import halving, onnx, optuna, sklearn
from airflow_mlops.integrations.mlflow import (
    PACKAGE_DIGEST_TAG,
    PACKAGE_FOLDER,
    TASK_KEY_TAG,
    HeldElsewhereError,
    ModelCopy,
    Registry,
    wait_seconds,
)
from airflow_mlops.ledger.studies import studies_url
from airflow_mlops.serving.model import PICKLED_MODELS_VARIABLE, TRUSTED_TYPES_VARIABLE
from airflow_mlops.serving.package import write_manifest
from airflow_mlops.steps.base import Step
from airflow_mlops.steps.code_version import code_version
from airflow_mlops.steps.common import DatasetRef, resolve_dataset, work_key
from airflow_mlops.steps.model_package import FittedModel, refused_types, require_safe_form, write_package
from airflow_mlops.steps.provenance import note_package, noted_trainings
from airflow_mlops.steps.training_rows import RowRule, Split, choose_window, row_weights, split_rows

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl
    from numpy.typing import NDArray

    from airflow_mlops.core.package import PackageManifest, ServingForm
    from airflow_mlops.services import Services

log = logging.getLogger(__name__)

#: Folder of the run's artifacts with the trials, the environment and the result.
TRAINING_FOLDER = "training"

#: What MLflow takes in no name of a logged or registered model.
_NOT_IN_NAMES = "/:.%\"'"

#: Artifact of a finished run, so that a retry can give its result again; a tag would be cut off at 8,000 characters.
_RESULT_FILE = f"{TRAINING_FOLDER}/result.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSpec:
    """What to train, and on what.

    :param dataset: dataset version, or table URI for its newest.
    :param model_name: name of the model to be; also the default MLflow experiment.
    :param estimator: import path of a scikit-learn estimator or of a factory function; or give ``candidates``.
    :param estimator_params: its arguments; ``a__b`` reaches into a nested estimator.
    :param candidates: estimators to try, each with its space; the best in cross-validation is kept.
    :param search: how candidates are compared; default for more than one, or with a space: 20 trials of Optuna.
    :param target: column to predict.
    :param numeric: inputs that are numbers.
    :param categorical: inputs that are one of some values.
    :param text: inputs that are free text.
    :param time_column: orders the rows; the newest are held out.
    :param id_column: names the row; never an input.
    :param weight_column: how much a row counts.
    :param preprocessing: ``auto``, ``codes``, ``scaled`` or ``none``, see
        :data:`airflow_mlops.integrations.sklearn.Preprocessing`.
    :param feature_selection: stage that keeps the most useful features; ``None`` keeps all.
    :param window: rows to use; ``None`` uses all.
    :param rows: which rows: the ``window`` itself, ``all`` before its end, ``trailing`` days before its end, or
        ``since_change``: since the world last changed, as the retraining decisions have it.
    :param trailing_days: for ``trailing``.
    :param half_life_days: weight of a row halves with this age (before the newest row); ``None``: equal weights.
    :param holdout_share: newest share of the rows, held out of the fit that is measured, ``(0, 0.5]``.
    :param refit: fit once more on all rows, and package that model: nothing is left to test it on, but its measured twin says
        what to expect of it.
    :param recipe: name of this way of making a model, under which its models of different age are compared.
    :param metric: name of a built-in metric or import path of one; ``None``: ``mae`` for numbers, ``log_loss`` for labels,
        ``accuracy`` where an estimator gives no probabilities.
    :param parity: how far the ONNX form may be from the scikit-learn form.
    :param quantize: make the ONNX form smaller, if that stays within ``parity``.
    :param allow_pickle: store a model that has neither an ONNX form nor a skops form that a service would load as a pickle: code,
        which runs where it is loaded. That takes a trusted signature and ``AIRFLOW_MLOPS_PICKLED_MODELS``.
    :param seed: random state.
    :param experiment: MLflow experiment.
    """

    dataset: DatasetRef
    model_name: str
    estimator: str | None = None
    estimator_params: dict[str, Any] = field(default_factory=dict)
    candidates: tuple[Candidate, ...] = ()
    search: Search | None = None
    target: str
    numeric: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    time_column: str
    id_column: str | None = None
    weight_column: str | None = None
    preprocessing: sklearn.Preprocessing = "auto"
    feature_selection: sklearn.FeatureSelection | None = None
    window: Window | None = None
    rows: RowRule = "window"
    trailing_days: float | None = None
    half_life_days: float | None = None
    holdout_share: float = 0.2
    refit: bool = False
    recipe: str | None = None
    metric: str | None = None
    parity: ParityLimits = field(default_factory=ParityLimits)
    quantize: onnx.Quantization | None = None
    allow_pickle: bool = False
    seed: int = 0
    experiment: str | None = None

    def columns(self) -> ColumnRoles:
        """Give the roles.

        :raises ValueError: a column with two roles, or no input.
        """
        return ColumnRoles(
            target=self.target,
            time=self.time_column,
            numeric=self.numeric,
            categorical=self.categorical,
            text=self.text,
            id=self.id_column,
            weight=self.weight_column,
        )

    def to_try(self) -> tuple[Candidate, ...]:
        """Give the candidates.

        :raises ValueError: neither ``estimator`` nor ``candidates``, or both.
        """
        if (self.estimator is None) == (not self.candidates):
            raise ValueError("give either estimator (with estimator_params) or candidates")
        if self.estimator is None:
            return self.candidates
        return (Candidate(estimator=self.estimator, params=self.estimator_params),)

    def how_to_search(self) -> Search | None:
        """Give the search; ``None`` when there is one candidate, nothing to search and no cross-validation asked for."""
        candidates = self.to_try()
        if self.search is not None or (len(candidates) == 1 and not candidates[0].space):
            return self.search
        return Search()


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """A finished run and the package it holds.

    :param model_id: the copy for MLflow's own loaders; ``None`` when it holds types that nobody vouches for.
    :param copy_digest: of all files of that copy.
    :param estimator: import path of what was fitted.
    :param estimator_params: its arguments; the winning ones after a search.
    :param validation_value: the metric in cross-validation on the training rows; ``None`` without a search.
    :param trials: parameter sets that were tried.
    :param metric_value: the metric on the held-out rows.
    :param reused: whether a former attempt had already finished this work.
    """

    model_name: str
    run_id: str
    run_url: str
    model_id: str | None
    copy_digest: str | None = None
    package_digest: str
    serving_form: str
    serving_reason: str
    dataset: DatasetVersion
    training: Window
    holdout: Window
    training_rows: int
    holdout_rows: int
    estimator: str
    estimator_params: dict[str, Any]
    validation_value: float | None
    trials: int
    metric: str
    metric_value: float | None
    reused: bool


class _Work(NamedTuple):
    """What one training has at hand."""

    spec: TrainSpec
    columns: ColumnRoles
    metric: Metric
    dataset: DatasetVersion
    split: Split
    registry: Registry
    experiment_id: str
    run_id: str
    key: str


def run(spec: TrainSpec, services: Services) -> TrainResult:
    """Train once: the same spec on the same data finds the finished run.

    :raises SchemaMismatchError: naming a column the table does not have.
    :raises InsufficientDataError: too few rows to train and hold out.
    :raises TransientError: another process is at the same training for very long, or took this one for dead and replaced it.
    :raises UnsafeModelError: the model can be stored in no form that is safe to load.
    :raises ValueError: an estimator path or parameter that is wrong, or a column with two roles.
    """
    columns, _ = spec.columns(), spec.to_try()
    _require_model_name(spec.model_name)
    if spec.metric is not None:
        resolve_metric(spec.metric)
    registry = Registry.connect(services)
    dataset = resolve_dataset(spec.dataset, time_column=spec.time_column)
    window = choose_window(
        spec.rows,
        spec.window,
        dataset=dataset,
        trailing_days=spec.trailing_days,
        model_name=spec.model_name,
        services=services,
    )
    key = _key(spec, dataset, window)
    experiment_id = registry.experiment_id(spec.experiment or spec.model_name)
    while True:
        done = _done(registry, services, experiment_id, key) or _done_meanwhile(
            registry, services, experiment_id, key, spec
        )
        if done is not None:
            return replace(done, reused=True)
        split = split_rows(dataset, columns, window, spec.holdout_share)
        metric = _metric(spec, columns, split.training[spec.target])
        name = f"{spec.model_name} {split.training_window.end:%Y-%m-%d}"
        with (
            suppress(HeldElsewhereError),  # one that began at once was first: wait for what it makes
            registry.leased_run(
                experiment_id, name, step_key=key, what=spec.model_name, tags=_tags(spec, dataset)
            ) as run_id,
        ):
            return _train(
                _Work(spec, columns, metric, dataset, split, registry, experiment_id, run_id, key), services
            )


def _require_model_name(name: str) -> None:
    """See that MLflow takes the name, for the model and for its copy."""
    wrong = sorted({*name} & {*_NOT_IN_NAMES})
    if wrong or not name.strip():
        raise ValueError(
            f"model_name {name!r} {'holds ' + ' '.join(wrong) if wrong else 'is empty'}: MLflow takes names without any of "
            f"{' '.join(_NOT_IN_NAMES)}"
        )


def _done_meanwhile(
    registry: Registry, services: Services, experiment_id: str, key: str, spec: TrainSpec
) -> TrainResult | None:
    """Wait for a process that is at this work, close what dead ones left, and look again."""
    there = registry.take_over_dead_runs(
        experiment_id, key, spec.model_name, task_key=_task_key(spec), wait_seconds=wait_seconds()
    )
    return _done(registry, services, experiment_id, key) if there else None


def _tags(spec: TrainSpec, dataset: DatasetVersion) -> dict[str, str]:
    sources = [file for path in _own_code(spec) if (file := sklearn.source_file(path))]
    return {
        "airflow_mlops.model_name": spec.model_name,
        "airflow_mlops.dataset_digest": dataset.dataset_digest,
        TASK_KEY_TAG: _task_key(spec),
        **{f"airflow_mlops.{name}": value for name, value in code_version(sources).items()},
    }


def _done(registry: Registry, services: Services, experiment_id: str, key: str) -> TrainResult | None:
    """Find what another attempt at this work made.

    Where packages are signed only the ledger is believed: a run with this key can be made by anybody who may write to MLflow.
    """
    if services.signing_key or services.signing_public_keys:
        trainings = [from_dict(TrainResult, training) for training in noted_trainings(services, key)]
        return next((one for one in trainings if registry.is_finished(one.run_id)), None)
    run = registry.finished_run(experiment_id, key)
    if run is None:
        return None
    return from_dict(TrainResult, json.loads(registry.read_text(run.info.run_id, _RESULT_FILE)))


def _key(spec: TrainSpec, dataset: DatasetVersion, window: Window | None) -> str:
    """Digest of all that decides the model: what was asked for, the rows, and the code that fits and judges them."""
    code = [sklearn.code_of(path) for path in _own_code(spec)]
    return work_key(
        "train", to_dict(spec) | {"dataset": None}, dataset.dataset_digest, window, code, sklearn.libraries()
    )


def _task_key(spec: TrainSpec) -> str:
    """Digest of what was asked for, whatever rows, code and libraries it finds: what a retry has in common with the attempt."""
    table = spec.dataset.uri if isinstance(spec.dataset, DatasetVersion) else spec.dataset
    return work_key("train task", to_dict(spec) | {"dataset": table})


def _own_code(spec: TrainSpec) -> list[str]:
    """Name what is found by import path: the estimators, and a metric that is not built in."""
    estimators = [candidate.estimator for candidate in spec.to_try()]
    metric = spec.metric or ""
    built_in = "@" in metric or not {":", "."} & set(metric)
    return estimators if built_in else [*estimators, metric]


class _Made(NamedTuple):
    """What a training found.

    :param winner: what was fitted.
    :param search: how it was chosen; ``None`` without a search.
    :param model: the model.
    :param split: the rows it learned from and was measured on.
    """

    winner: Candidate
    search: SearchResult | None
    model: FittedModel
    split: Split


class _Stored(NamedTuple):
    """What a training uploaded: the package, its digest, and the copy for MLflow's own loaders."""

    manifest: PackageManifest
    digest: str
    copy: ModelCopy | None


def _train(work: _Work, services: Services) -> TrainResult:
    registry, clock = work.registry, _Clock()
    registry.log_dataset(work.run_id, work.dataset, "training")
    made = _make(work, services, clock)
    with tempfile.TemporaryDirectory() as temporary:
        stored = _store(work, made, Path(temporary), clock)
    result = _result(work, made, stored)
    registry.require_running(work.run_id)  # a run that was closed shall not say that it holds a package
    registry.write_text(work.run_id, _RESULT_FILE, canonical_json(to_dict(result)))
    registry.log(
        work.run_id,
        params=_flat(work.spec, made.winner) | _facts(work),
        metrics=clock.laps
        | {
            f"holdout_{result.metric}": result.metric_value,
            f"validation_{result.metric}": result.validation_value,
            "peak_memory_mb": _peak_memory_mb(),
        },
        tags={PACKAGE_DIGEST_TAG: stored.digest},
    )
    note_package(services, step_key=work.key, training=to_dict(result))
    return result


def _make(work: _Work, services: Services, clock: _Clock) -> _Made:
    """Search, fit and measure."""
    spec, split = work.spec, work.split
    features = sklearn.to_features(split.training, work.columns)
    target = sklearn.to_target(split.training[spec.target], _pipeline(work, spec.to_try()[0].example()))
    weights = row_weights(split.training, work.columns, spec.half_life_days)
    clock.lap("prepare_seconds")
    found = _search(work, features, target, services)
    clock.lap("search_seconds")
    winner = found.best if found else spec.to_try()[0]
    fitted = _fit(work, winner, features, target, weights)
    if spec.refit:
        split = split.whole
        fitted = _refit(work, winner, fitted, split)
    clock.lap("fit_seconds")
    return _Made(winner, found, fitted, split)


def _store(work: _Work, made: _Made, temporary: Path, clock: _Clock) -> _Stored:
    """Write the package and upload it, with the evidence and the copy for MLflow's own loaders."""
    spec, registry = work.spec, work.registry
    folder = temporary / PACKAGE_FOLDER
    folder.mkdir()
    manifest = write_package(
        folder,
        made.model,
        work.columns,
        work.dataset,
        made.split,
        recipe=spec.recipe,
        limits=spec.parity,
        quantize=spec.quantize,
        allow_pickle=spec.allow_pickle,
    )
    digest = write_manifest(folder, manifest)
    clock.lap("package_seconds")
    registry.upload(work.run_id, folder, PACKAGE_FOLDER)
    registry.upload(work.run_id, _evidence(temporary, made.search), TRAINING_FOLDER)
    copy = _log_copy(work, made.model, manifest.serving_form, temporary)
    clock.lap("upload_seconds")
    return _Stored(manifest, digest, copy)


def _result(work: _Work, made: _Made, stored: _Stored) -> TrainResult:
    split, score = made.split, made.model.score
    return TrainResult(
        model_name=work.spec.model_name,
        run_id=work.run_id,
        run_url=work.registry.run_url(work.experiment_id, work.run_id),
        model_id=stored.copy.model_id if stored.copy else None,
        copy_digest=stored.copy.digest if stored.copy else None,
        package_digest=stored.digest,
        serving_form=stored.manifest.serving_form,
        serving_reason=stored.manifest.serving_reason,
        dataset=work.dataset,
        training=split.training_window,
        holdout=split.holdout_window,
        training_rows=split.training.height,
        holdout_rows=split.holdout.height,
        estimator=made.winner.estimator,
        estimator_params=made.winner.params,
        validation_value=made.search.value if made.search else None,
        trials=len(made.search.trials) if made.search else 0,
        metric=score.metric,
        metric_value=score.value,
        reused=False,
    )


def _fit(
    work: _Work,
    candidate: Candidate,
    features: pd.DataFrame,
    target: NDArray[Any],
    weights: NDArray[Any] | None,
) -> FittedModel:
    """Fit on all training rows and score on the held-out ones."""
    pipeline = _pipeline(work, candidate)
    sklearn.fit(pipeline, features, target, weights)
    log.info("training: fitted %s on %d rows", candidate.name, len(features))
    holdout = sklearn.to_features(work.split.holdout, work.columns)
    predictions = sklearn.predict(pipeline, holdout)
    score = evaluate_metric(
        work.metric, target=work.split.holdout[work.spec.target].to_numpy(), prediction=predictions
    )
    return FittedModel(pipeline=pipeline, features=holdout, predictions=predictions.values, score=score)


def _refit(work: _Work, candidate: Candidate, measured: FittedModel, split: Split) -> FittedModel:
    """Fit on all rows; the score stays that of the twin that had not seen the newest ones."""
    pipeline = _pipeline(work, candidate)
    features = sklearn.to_features(split.training, work.columns)
    target = sklearn.to_target(split.training[work.spec.target], pipeline)
    sklearn.fit(
        pipeline, features, target, row_weights(split.training, work.columns, work.spec.half_life_days)
    )
    log.info("training: fitted %s again on all %d rows", candidate.name, len(features))
    return measured._replace(
        pipeline=pipeline,
        predictions=sklearn.predict(pipeline, measured.features).values,
        twin=measured.pipeline,
    )


def _log_copy(work: _Work, fitted: FittedModel, form: ServingForm, temporary: Path) -> ModelCopy | None:
    """Store the pipeline for MLflow's own loaders too, unless they would have to trust what nobody vouches for."""
    if form == "pickle":
        log.warning(
            "training: %s is stored as a pickle, which runs code where it is loaded: it needs a signature, and its name in %s. "
            "There is no copy of it for mlflow.pyfunc.load_model, which asks for neither",
            work.spec.model_name,
            PICKLED_MODELS_VARIABLE,
        )
        return None
    types = sklearn.save_skops(fitted.pipeline, temporary / "model.skops")
    refused = refused_types(types)
    if refused:
        log.warning(
            "training: no copy of %s for mlflow.pyfunc.load_model, which would have to trust %s: name them in %s where tasks "
            "run, and the next training has one. The package holds the model in a form that needs no trust",
            work.spec.model_name,
            ", ".join(refused[:10]),
            TRUSTED_TYPES_VARIABLE,
        )
        return None
    return work.registry.log_model(
        work.experiment_id,
        work.run_id,
        fitted.pipeline,
        name=work.spec.model_name,
        features=fitted.features,
        trusted=types,
    )


def _metric(spec: TrainSpec, columns: ColumnRoles, target: pl.Series) -> Metric:
    """Find the metric, and see before anything is fitted that it, the target and the estimators fit together.

    :raises SchemaMismatchError: a regression of what is no number.
    :raises UnsafeModelError: an estimator that could be stored in no form that is safe to load.
    :raises ValueError: classifiers beside regressors, or a metric that can't measure their answers.
    """
    estimators = [_build(spec, columns, candidate.example()) for candidate in spec.to_try()]
    kinds = {sklearn.is_classification(estimator) for estimator in estimators}
    if len(kinds) > 1:
        raise ValueError("some candidates are classifiers and some are not; give either, as the target needs")
    labels = kinds == {True}
    numbers = target.dtype.is_numeric()
    if not labels and not numbers and str(target.dtype) != "Boolean":
        raise SchemaMismatchError(
            f"target {spec.target!r} holds {target.dtype}, and {spec.to_try()[0].name} predicts numbers; give a classifier"
        )
    probabilities = all(sklearn.gives_probabilities(estimator) for estimator in estimators)
    default = "mae" if not labels else "log_loss" if probabilities else "accuracy"
    metric = resolve_metric(spec.metric or default)
    if not labels and metric.name in DEFAULT_METRICS["classification"]:
        raise ValueError(
            f"{metric.name} measures labels, and {spec.to_try()[0].name} predicts numbers: choose mae, rmse or another metric "
            "of numbers, or give a classifier"
        )
    if not spec.allow_pickle:
        for estimator in estimators:
            require_safe_form(estimator)
    of_numbers = {*DEFAULT_METRICS["regression"]} | {f"quantile_loss@{metric.name.partition('@')[2]}"}
    if labels and not numbers and metric.name in of_numbers:
        raise ValueError(
            f"{metric.name} measures numbers, and {spec.target!r} holds {target.dtype}: choose {default}, or leave metric out"
        )
    if metric.needs_probabilities and not probabilities:
        raise ValueError(
            f"{metric.name} needs probabilities, and not every estimator here gives them: choose accuracy, f1 or another "
            "metric of labels"
        )
    return metric


def _pipeline(work: _Work, candidate: Candidate) -> Any:
    return _build(work.spec, work.columns, candidate)


def _build(spec: TrainSpec, columns: ColumnRoles, candidate: Candidate) -> Any:
    return sklearn.build_pipeline(
        candidate,
        columns,
        preprocessing=spec.preprocessing,
        selection=spec.feature_selection,
        seed=spec.seed,
    )


def _search(
    work: _Work,
    features: pd.DataFrame,
    target: NDArray[Any],
    services: Services,
) -> SearchResult | None:
    """Compare the candidates inside the training rows, oldest to newest."""
    spec, settings = work.spec, work.spec.how_to_search()
    if settings is None:
        return None
    folds = time_ordered_folds(work.split.training[spec.time_column].to_numpy(), settings.folds)

    def score(candidate: Candidate, learn: NDArray[Any], check: NDArray[Any]) -> float:
        weights = row_weights(work.split.training[learn], work.columns, spec.half_life_days)
        pipeline = _pipeline(work, candidate)
        sklearn.fit(pipeline, features.iloc[learn], target[learn], weights)
        predictions = sklearn.predict(pipeline, features.iloc[check])
        return evaluate_metric(work.metric, target=target[check], prediction=predictions).value

    def tell(number: int, trial: Trial) -> None:
        work.registry.log_step(work.run_id, f"trial_{work.metric.name}", trial.value, number)

    if settings.method == "halving":
        each = max(2, settings.trials // len(spec.to_try()))
        return halving.search(
            [sklearn.draw(one, each, spec.seed) if one.space else [one] for one in spec.to_try()],
            settings,
            score,
            folds=folds,
            greater_is_better=work.metric.greater_is_better,
            on_trial=tell,
        )
    return optuna.search(
        spec.to_try(),
        settings,
        lambda candidate, fold: score(candidate, *folds[fold]),
        greater_is_better=work.metric.greater_is_better,
        study_name=work.key,
        storage_url=studies_url(services.ledger_url),
        seed=spec.seed,
        on_trial=tell,
    )


def _evidence(folder: Path, found: SearchResult | None) -> Path:
    """Write what a person needs to do the training again: every installed version, and every trial."""
    target = folder / TRAINING_FOLDER
    target.mkdir()
    installed = {dist.metadata["Name"]: dist.version for dist in distributions()}
    lines = [
        f"{name}=={version}" for name, version in sorted(installed.items(), key=lambda item: item[0].lower())
    ]
    (target / "environment.txt").write_text("\n".join(lines) + "\n")
    if found is not None:
        (target / "trials.json").write_text(json.dumps([to_dict(trial) for trial in found.trials], indent=1))
    return target


class _Clock:
    """Wall time since the last lap, by name."""

    def __init__(self) -> None:
        self.laps: dict[str, float | None] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name], self._last = now - self._last, now


def _peak_memory_mb() -> float:
    """Peak resident memory of this process in megabytes."""
    try:
        # The peak that getrusage knows is the larger of ours and that of the process we were forked from.
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) * 1024 / 1e6
    except (OSError, KeyError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, else kilobytes
        return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def _flat(spec: TrainSpec, winner: Candidate) -> dict[str, Any]:
    """Parameters as MLflow shows them: one level, the estimator's own under ``estimator.``."""
    values = to_dict(spec)
    for name in ("dataset", "estimator_params", "candidates"):
        values.pop(name)
    params = {f"estimator.{name}": value for name, value in winner.params.items()}
    return values | {"estimator": winner.estimator} | params


def _facts(work: _Work) -> dict[str, Any]:
    return {
        "dataset_version": work.dataset.version,
        "training_window": str(work.split.training_window),
        "training_rows": work.split.training.height,
        "holdout_rows": work.split.holdout.height,
    }


STEP = Step(name="train", spec=TrainSpec, result=TrainResult, run=run)
