"""Train: search and fit a pipeline on a window, prove its serving form, log the run and its package to MLflow."""

from __future__ import annotations

import json
import logging
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from airflow_mlops.core.codec import canonical_json, from_dict, to_dict
from airflow_mlops.core.comparison.metrics import resolve_metric
from airflow_mlops.core.data.dataset import DatasetVersion
from airflow_mlops.exceptions import UnsafeModelError
from airflow_mlops.integrations import sklearn
from airflow_mlops.integrations.mlflow import (
    MODEL_NAME_TAG,
    PACKAGE_DIGEST_TAG,
    PACKAGE_FOLDER,
    TASK_KEY_TAG,
    TWIN_FOLDER,
    HeldElsewhereError,
    ModelCopy,
    Registry,
    patiently,
    wait_seconds,
)
from airflow_mlops.serving.model import PICKLED_MODELS_VARIABLE, TRUSTED_TYPES_VARIABLE
from airflow_mlops.serving.package import write_manifest
from airflow_mlops.serving.probe import peak_memory_mb
from airflow_mlops.steps.base import Step
from airflow_mlops.steps.common import resolve_dataset, work_key
from airflow_mlops.steps.registry.provenance import note_package, noted_trainings
from airflow_mlops.steps.training.code_version import code_version
from airflow_mlops.steps.training.fit import Made, Work, choose_metric, require_measurable, search_and_fit
from airflow_mlops.steps.training.model_package import FittedModel, example_rows, refused_types, write_package
from airflow_mlops.steps.training.record import TRAINING_FOLDER, Clock, flat_params, row_facts, write_evidence
from airflow_mlops.steps.training.rows import choose_window, require_instants, split_rows
from airflow_mlops.steps.training.spec import (
    TrainResult,
    TrainSpec,
    method_digest,
    own_code,
    require_model_name,
    training_digest,
)

if TYPE_CHECKING:
    from airflow_mlops.core.model.package import PackageManifest, ServingForm
    from airflow_mlops.core.windows import Window
    from airflow_mlops.services import Services
    from airflow_mlops.steps.training.rows import Split

log = logging.getLogger(__name__)

#: Rows of MLflow's input example.
_COPY_EXAMPLES = 3

#: Artifact of a finished run, so that a retry can give its result again; a tag would be cut off at 8,000 characters.
_RESULT_FILE = f"{TRAINING_FOLDER}/result.json"


def run(spec: TrainSpec, services: Services) -> TrainResult:
    """Train once: the same spec on the same data finds the finished run.

    :raises SchemaMismatchError: naming a column the table does not have, or a time column that holds no instants.
    :raises InsufficientDataError: too few rows to train and hold out.
    :raises TransientError: another process is at the same training for very long, or took this one for dead and replaced it.
    :raises UnsafeModelError: the model can be stored in no form that is safe to load.
    :raises ValueError: an estimator path or parameter that is wrong, or a column with two roles.
    """
    columns, _ = spec.columns(), spec.to_try()
    require_model_name(spec.model_name)
    if spec.metric is not None:
        resolve_metric(spec.metric)
    registry = Registry.connect(services)
    dataset = resolve_dataset(spec.dataset, time_column=spec.time_column)
    require_instants(dataset, spec.time_column)
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
        split = split_rows(dataset, columns, window, spec.holdout_share, spec.holdout_start)
        metric = choose_metric(spec, columns, split.training[spec.target])
        require_measurable(spec, columns, metric, split)
        name = f"{spec.model_name} {split.training_window.end:%Y-%m-%d}"
        with (
            suppress(HeldElsewhereError),  # one that began at once was first: wait for what it makes
            registry.closing_dead_runs(experiment_id, spec.model_name),
            registry.leased_run(
                experiment_id, name, step_key=key, what=spec.model_name, tags=_tags(spec, dataset)
            ) as run_id,
        ):
            return _train(
                Work(spec, columns, metric, dataset, split, registry, experiment_id, run_id, key), services
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
    sources = [file for path in own_code(spec) if (file := sklearn.source_file(path))]
    return {
        MODEL_NAME_TAG: spec.model_name,
        "airflow_mlops.dataset_digest": dataset.dataset_digest,
        TASK_KEY_TAG: _task_key(spec),
        **{
            f"airflow_mlops.{name}": value
            for name, value in (spec.dag_code | code_version(sources, spec.dag_code)).items()
        },
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
    code = [sklearn.code_of(path) for path in own_code(spec)]
    return work_key(
        "train", spec.asked() | {"dataset": None}, dataset.dataset_digest, window, code, sklearn.libraries()
    )


def _task_key(spec: TrainSpec) -> str:
    """Digest of what was asked for, whatever rows, code and libraries it finds: what a retry has in common with the attempt."""
    table = spec.dataset.uri if isinstance(spec.dataset, DatasetVersion) else spec.dataset
    return work_key("train task", spec.asked() | {"dataset": table})


class _Stored(NamedTuple):
    """What a training uploaded: the package, its digest, that of its twin's, and the copy for MLflow's own loaders."""

    manifest: PackageManifest
    digest: str
    twin_digest: str | None
    copy: ModelCopy | None


def _train(work: Work, services: Services) -> TrainResult:
    registry, clock = work.registry, Clock()
    registry.log_dataset(work.run_id, work.dataset, "training")
    made = search_and_fit(work, services, clock)
    with tempfile.TemporaryDirectory() as temporary:
        stored = _store(work, made, Path(temporary), clock)
    result = _result(work, made, stored)
    patiently(
        registry.require_running, work.run_id
    )  # a run that was closed shall not say that it holds a package
    patiently(registry.write_text, work.run_id, _RESULT_FILE, canonical_json(to_dict(result)))
    patiently(
        registry.log,
        work.run_id,
        params=flat_params(work.spec, made.winner) | row_facts(work.dataset, made.split, measured=work.split),
        metrics=clock.laps
        | {
            f"holdout_{result.metric}": result.metric_value,
            f"validation_{result.metric}": result.validation_value,
            "peak_memory_mb": peak_memory_mb(),
        },
        tags={PACKAGE_DIGEST_TAG: stored.digest},
    )
    note_package(services, step_key=work.key, training=to_dict(result))
    return result


def _store(work: Work, made: Made, temporary: Path, clock: Clock) -> _Stored:
    """Write the package and upload it, with the evidence and the copy for MLflow's own loaders."""
    registry = work.registry
    background_rows = work.spec.background_rows
    manifest, digest = _package(
        work, made.model, made.split, temporary / PACKAGE_FOLDER, background_rows=background_rows
    )
    twin_digest = None
    if work.spec.keep_twin and made.twin is not None:
        twin, twin_digest = _package(work, made.twin, work.split, temporary / TWIN_FOLDER)
        if twin.serving_form == "pickle":
            raise UnsafeModelError(
                f"{work.spec.model_name} can only be stored as a pickle, so its measured twin, which nobody signs, could not be "
                "loaded for the test against the champion: train without keep_twin and refit"
            )
    clock.lap("package_seconds")
    patiently(registry.upload, work.run_id, temporary / PACKAGE_FOLDER, PACKAGE_FOLDER)
    if twin_digest is not None:
        patiently(registry.upload, work.run_id, temporary / TWIN_FOLDER, TWIN_FOLDER)
    patiently(registry.upload, work.run_id, write_evidence(temporary, made.search), TRAINING_FOLDER)
    copy = _log_copy(work, made.model, manifest.serving_form, temporary)
    clock.lap("upload_seconds")
    return _Stored(manifest, digest, twin_digest, copy)


def _package(
    work: Work, fitted: FittedModel, split: Split, folder: Path, *, background_rows: int = 0
) -> tuple[PackageManifest, str]:
    spec = work.spec
    folder.mkdir()
    manifest = write_package(
        folder,
        fitted,
        work.columns,
        work.dataset,
        split,
        recipe=spec.recipe,
        method_digest=method_digest(spec),
        limits=spec.parity,
        quantize=spec.quantize,
        allow_pickle=spec.allow_pickle,
        background_rows=background_rows,
        private_columns=spec.private_columns,
        seed=spec.seed,
    )
    return manifest, write_manifest(folder, manifest)


def _result(work: Work, made: Made, stored: _Stored) -> TrainResult:
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
        untried=made.search.untried if made.search else (),
        folds=settings.folds if made.search and (settings := work.spec.how_to_search()) else None,
        metric=score.metric,
        metric_value=score.value,
        recipe=work.spec.recipe,
        twin_digest=stored.twin_digest,
        training_digest=training_digest(work.spec),
        reused=False,
    )


def _log_copy(work: Work, fitted: FittedModel, form: ServingForm, temporary: Path) -> ModelCopy | None:
    """Store the pipeline for MLflow's own loaders too, unless they would have to trust what nobody vouches for."""
    if not work.spec.mlflow_copy:
        return None
    if form == "pickle":
        log.warning(
            "training: %s is stored as a pickle, which runs code where it is loaded: it needs a signature, and its name in %s. "
            "There is no copy of it for mlflow.pyfunc.load_model, which asks for neither",
            work.spec.model_name,
            PICKLED_MODELS_VARIABLE,
        )
        return None
    pipeline = sklearn.with_served_inputs(fitted.pipeline, fitted.features, work.columns)
    types = sklearn.save_skops(pipeline, temporary / "model.skops")
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
    return patiently(
        work.registry.log_model,
        work.experiment_id,
        work.run_id,
        pipeline,
        name=work.spec.model_name,
        features=fitted.features,
        example=example_rows(fitted.features, _COPY_EXAMPLES, work.spec.private_columns),
        trusted=types,
    )


STEP = Step(name="train", spec=TrainSpec, result=TrainResult, run=run)
