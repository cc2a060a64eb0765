"""MLflow: runs, artifacts, model versions and aliases behind one small client."""

from __future__ import annotations

import errno
import os
import random
import re
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.addresses import require_http_url
from airflow_mlops.core.package import MAXIMUM_PACKAGE_BYTES, file_digest
from airflow_mlops.core.signing import SIGNATURE_FILE, PackageSignature
from airflow_mlops.exceptions import (
    ArtifactIntegrityError,
    ConnectionConfigError,
    MLOpsError,
    ModelVersionNotFoundError,
    RegistryUnavailableError,
    StorageError,
    TransientError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from mlflow import MlflowClient

    from airflow_mlops.core.dataset import DatasetVersion
    from airflow_mlops.services import Services

#: Folder of the run's artifacts that holds the model package.
PACKAGE_FOLDER = "package"

#: Tag of a run: digest of the step's inputs; a retry finds the finished run by it.
STEP_KEY_TAG = "airflow_mlops.step_key"
#: Tag of a run that goes on: another number with every sign of life.
HEARTBEAT_TAG = "airflow_mlops.heartbeat"

#: A run without a sign of life for so long is dead. Long enough for a busy machine and a slow server; a retry after a
#: kill waits for it. The variable sets another number, the same for all processes of an installation.
LEASE_SECONDS = 10.0
LEASE_VARIABLE = "AIRFLOW_MLOPS_LEASE_SECONDS"
_BEATS_PER_LEASE = 5

PACKAGE_DIGEST_TAG = "airflow_mlops.package_digest"
RUN_ID_TAG = "airflow_mlops.run_id"
#: Tag of a model version: the package's signature as this model, see :mod:`airflow_mlops.core.signing`.
SIGNATURE_TAG = "airflow_mlops.package_signature"

#: MLflow's databases cut longer ones off, or refuse them.
DESCRIPTION_CHARACTERS = 5000
TAG_CHARACTERS = 5000

#: Rows of MLflow's input example.
_EXAMPLE_ROWS = 3

# Of those who write the same row at once each round lets at least one through.
_WRITE_ATTEMPTS = 5

# What the operating system says when a file can't be written here; MLflow passes on only the text of it.
_LOCAL_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS}

# MLflow's own defaults retry for about four minutes; a task should fail soon and let Airflow retry it.
_HTTP_LIMITS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}


@dataclass(frozen=True, kw_only=True, slots=True)
class RegisteredVersion:
    """A model version as the registry knows it.

    :param signature: text of its package's signature; ``None`` when it was registered without a key.
    """

    model_name: str
    model_version: str
    run_id: str
    package_digest: str
    signature: str | None = None

    def package_signature(self) -> PackageSignature | None:
        """Read the signature.

        :raises ArtifactIntegrityError: the tag holds none.
        """
        if self.signature is None:
            return None
        try:
            return PackageSignature.from_text(self.signature)
        except ValueError as err:
            raise ArtifactIntegrityError(
                f"tag {SIGNATURE_TAG} of {self.model_name} version {self.model_version} is no signature: {err}"
            ) from err


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRun:
    """What a run says about itself.

    :param experiment_id: its experiment.
    :param params: its parameters.
    """

    experiment_id: str
    params: dict[str, str]


class Registry:
    """What this package needs of MLflow.

    :param client: a connected client.
    :param tracking_uri: address of the server, for links.
    """

    def __init__(self, client: MlflowClient, tracking_uri: str) -> None:
        self.client = client
        self.tracking_uri = tracking_uri.rstrip("/")

    @classmethod
    def connect(cls, services: Services) -> Registry:
        """Connect and see that the server answers.

        :raises ConnectionConfigError: the address is none, or not MLflow's.
        :raises RegistryUnavailableError: naming the address.
        """
        import httpx

        uri = require_http_url(services.require("tracking_uri"), purpose="MLflow")
        try:
            answer = httpx.get(f"{uri.rstrip('/')}/health", timeout=10)
            if 300 <= answer.status_code < 500 and answer.status_code != 429:
                raise ConnectionConfigError(
                    f"{uri} answered {answer.status_code} to MLflow's health check: it is no MLflow, or its path or login "
                    "is wrong; check the MLflow connection"
                )
            answer.raise_for_status()
        except httpx.HTTPError as err:
            raise RegistryUnavailableError(
                f"MLflow at {uri} does not answer ({err}); check that it runs and the MLflow connection's address"
            ) from err
        _configure_process(services)
        from mlflow import MlflowClient

        return cls(MlflowClient(tracking_uri=uri, registry_uri=uri), uri)

    # -- runs ---------------------------------------------------------------------------------------------

    def experiment_id(self, name: str) -> str:
        """Find or create an experiment."""
        with _translated(f"experiment {name!r}"):
            found = self.client.get_experiment_by_name(name)
            return str(found.experiment_id if found else self.client.create_experiment(name))

    def finished_run(self, experiment_id: str, step_key: str) -> Any | None:
        """Find the run that already did exactly this work."""
        with _translated("search runs"):
            runs = self.client.search_runs(
                [experiment_id],
                f"tags.`{STEP_KEY_TAG}` = '{step_key}' and attributes.status = 'FINISHED'",
                max_results=1,
            )
        return runs[0] if runs else None

    def is_finished(self, run_id: str) -> bool:
        """Tell whether there is such a run, not deleted, that ended well."""
        try:
            with _translated(f"run {run_id}"):
                info = self.client.get_run(run_id).info
        except ModelVersionNotFoundError:
            return False
        return (info.status, info.lifecycle_stage) == ("FINISHED", "active")

    def take_over_dead_runs(self, experiment_id: str, step_key: str, what: str) -> bool:
        """Mark runs of this same work whose process is dead as failed; those that live keep the work.

        A run lives while its heartbeat changes. Nothing is read from the clocks of two machines: this waits up to the
        lease for another heartbeat.

        :param what: what the work is, for the error.
        :returns: whether there was any, so that the caller looks again for a finished one.
        :raises TransientError: naming the run that lives.
        """
        lease = _lease_seconds()
        seen = {run.info.run_id: _heartbeat(run) for run in self._running(experiment_id, step_key)}
        deadline = time.monotonic() + lease
        waiting = bool(seen)
        while waiting and time.monotonic() < deadline:
            time.sleep(lease / (2 * _BEATS_PER_LEASE))
            running = self._running(experiment_id, step_key)
            for run in running:
                if run.info.run_id not in seen or _heartbeat(run) != seen[run.info.run_id]:
                    raise TransientError(
                        f"{what} is being trained by run {run.info.run_id}; try again when that has ended, to get what "
                        "it made"
                    )
            waiting = bool(running)
        if waiting:
            with _translated("close interrupted runs"):
                for run in self._running(experiment_id, step_key):
                    if run.info.run_id in seen and _heartbeat(run) == seen[run.info.run_id]:
                        self._fail(experiment_id, run.info.run_id)
        return bool(seen)

    def require_first(self, experiment_id: str, step_key: str, run_id: str, what: str) -> None:
        """See that of runs that began the same work at once this one is the first.

        :raises TransientError: naming the run that is.
        """
        runs = self._running(experiment_id, step_key)
        first = min(runs, key=lambda run: (run.info.start_time, run.info.run_id), default=None)
        if first is not None and first.info.run_id != run_id:
            raise TransientError(
                f"{what} is being trained by run {first.info.run_id}; try again when that has ended, to get what it made"
            )

    def _running(self, experiment_id: str, step_key: str) -> list[Any]:
        with _translated("search runs"):
            return list(
                self.client.search_runs(
                    [experiment_id],
                    f"tags.`{STEP_KEY_TAG}` = '{step_key}' and attributes.status = 'RUNNING'",
                )
            )

    @contextmanager
    def heartbeat(self, run_id: str) -> Iterator[None]:
        """Say again and again that the process of a run lives, while the block goes on."""
        from mlflow.exceptions import MlflowException

        stop = threading.Event()

        def beat() -> None:
            number = 0
            while not stop.wait(_lease_seconds() / _BEATS_PER_LEASE):
                number += 1
                # One that is lost does no harm; whether this run was closed meanwhile is asked before it ends.
                with suppress(MlflowException):
                    self.client.set_tag(run_id, HEARTBEAT_TAG, str(number))

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(timeout=_lease_seconds())

    def close_interrupted_runs(self, experiment_id: str, step_key: str) -> int:
        """Mark runs of this same work that never ended as failed: their process was killed."""
        with _translated("search runs"):
            runs = self.client.search_runs(
                [experiment_id], f"tags.`{STEP_KEY_TAG}` = '{step_key}' and attributes.status = 'RUNNING'"
            )
            for run in runs:
                self._fail(experiment_id, run.info.run_id)
        return len(runs)

    def require_running(self, run_id: str) -> None:
        """See that no other attempt at the same work has closed this run: whoever closes a run takes its place.

        :raises TransientError: it is closed; trying again finds what the other attempt made.
        """
        with _translated(f"run {run_id}"):
            status = self.client.get_run(run_id).info.status
        if status != "RUNNING":
            raise TransientError(
                f"run {run_id} is {status}: another attempt at the same work took this one for dead and closed it; "
                "try again to get what that one made"
            )

    @contextmanager
    def run(self, experiment_id: str, name: str, tags: Mapping[str, str]) -> Iterator[str]:
        """Open a run; it ends FINISHED, or FAILED when the block raises."""
        from mlflow.exceptions import MlflowException

        with _translated("create run"):
            run_id = str(self.client.create_run(experiment_id, run_name=name, tags=dict(tags)).info.run_id)
        try:
            yield run_id
        except BaseException:
            # Should MLflow be gone, then the error to report is the one that brought us here; a retry closes the run.
            with suppress(MlflowException):
                self._fail(experiment_id, run_id)
            raise
        with _translated("end run"):
            self.client.set_terminated(run_id, status="FINISHED")

    def _fail(self, experiment_id: str, run_id: str) -> None:
        """End a run as failed, and with it the models it logged: nobody may take one of them for finished."""
        self.client.set_terminated(run_id, status="FAILED")
        for model in self.client.search_logged_models([experiment_id], f"source_run_id = '{run_id}'"):
            self.client.finalize_logged_model(model.model_id, "FAILED")

    def log(
        self,
        run_id: str,
        *,
        params: Mapping[str, Any],
        metrics: Mapping[str, float | None],
        tags: Mapping[str, str],
    ) -> None:
        """Log in one request, all or nothing; a metric that could not be measured (``None``) is left out."""
        from mlflow.entities import Metric, Param, RunTag

        now = int(time.time() * 1000)
        with _translated(f"log to run {run_id}"):
            self.client.log_batch(
                run_id,
                params=[Param(key, str(value)[:500]) for key, value in params.items()],
                metrics=[Metric(key, value, now, 0) for key, value in metrics.items() if value is not None],
                tags=[RunTag(key, value) for key, value in tags.items()],
            )

    def log_step(self, run_id: str, key: str, value: float | None, step: int) -> None:
        """Log one point of a metric while the run goes on; what could not be measured is left out."""
        if value is not None:
            with _translated(f"log to run {run_id}"):
                self.client.log_metric(run_id, key, value, step=step)

    def log_dataset(self, run_id: str, dataset: DatasetVersion, context: str) -> None:
        """Attach the dataset version to the run as MLflow dataset input."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        entity = Dataset(
            name=dataset.uri.rstrip("/").rsplit("/", 1)[-1],
            digest=dataset.dataset_digest.removeprefix("sha256:")[:32],
            source_type="delta_table",
            source=f'{{"uri": "{dataset.uri}", "version": {dataset.version}}}',
        )
        with _translated(f"log dataset to run {run_id}"):
            self.client.log_inputs(run_id, [DatasetInput(entity, [InputTag("mlflow.data.context", context)])])

    def upload(self, run_id: str, folder: Path, artifact_path: str) -> None:
        """Upload a folder to the run's artifacts."""
        with _translated(f"upload to run {run_id}"):
            self.client.log_artifacts(run_id, str(folder), artifact_path)

    def write_text(self, run_id: str, artifact_file: str, text: str) -> None:
        """Store a text among the run's artifacts, with its digest as a tag."""
        with _translated(f"upload to run {run_id}"):
            self.client.log_text(run_id, text, artifact_file)
            self.client.set_tag(run_id, _digest_tag(artifact_file), file_digest(text.encode()))

    def read_text(self, run_id: str, artifact_file: str) -> str:
        """Read what :meth:`write_text` stored.

        :raises ArtifactIntegrityError: it is not there any more, or is another text.
        """
        from mlflow.artifacts import download_artifacts

        with _translated(f"run {run_id}"):
            run = self.client.get_run(run_id)
            listed = self.client.list_artifacts(run_id, artifact_file.rpartition("/")[0])
        data = None
        if artifact_file in {item.path for item in listed}:
            with tempfile.TemporaryDirectory() as folder, _translated(f"{artifact_file} of run {run_id}"):
                address = f"{run.info.artifact_uri}/{artifact_file}"
                path = download_artifacts(
                    artifact_uri=address, dst_path=folder, tracking_uri=self.tracking_uri
                )
                data = Path(path).read_bytes()
        if data is None or file_digest(data) != run.data.tags.get(_digest_tag(artifact_file)):
            raise ArtifactIntegrityError(
                f"{artifact_file} of run {run_id} is {'missing' if data is None else 'not what was stored'}; "
                "delete the run in MLflow, and the work is done again"
            )
        return data.decode()

    def download_package(self, run_id: str, destination: Path) -> Path:
        """Download the model package of a run.

        :raises ModelVersionNotFoundError: when there is no such run, or it has no package.
        :raises ArtifactIntegrityError: it is too large to be one.
        :raises StorageError: the package can't be written here.
        :raises RegistryUnavailableError: the server failed, or went away meanwhile.
        """
        from mlflow.artifacts import download_artifacts
        from mlflow.exceptions import MlflowException

        with _translated(f"run {run_id}"):
            root = self.client.get_run(run_id).info.artifact_uri
            listed = self.client.list_artifacts(run_id, PACKAGE_FOLDER)
        size = sum(item.file_size or 0 for item in listed)
        if size > MAXIMUM_PACKAGE_BYTES:
            raise ArtifactIntegrityError(
                f"the package of run {run_id} has {size} bytes; at most {MAXIMUM_PACKAGE_BYTES} are loaded. "
                "It was not downloaded"
            )
        try:
            # By its own address: asked by run, MLflow calls every failure a path that is not correct.
            return Path(
                download_artifacts(
                    artifact_uri=f"{root}/{PACKAGE_FOLDER}",
                    dst_path=str(destination),
                    tracking_uri=self.tracking_uri,
                )
            )
        except (MlflowException, OSError) as err:
            raise self._download_error(run_id, destination, err) from err

    def _download_error(self, run_id: str, destination: Path, err: Exception) -> MLOpsError:
        """Tell what a download failed of: this machine's disk, a package that is not there, or the server."""
        text = " ".join(str(err).split())[:600]
        if any(int(number) in _LOCAL_ERRORS for number in re.findall(r"\[Errno (\d+)\]", text)):
            return StorageError(
                f"could not write the model package of run {run_id} to {destination}: {text}. "
                "Check free space and write permission, then run the task again"
            )
        with _translated(f"artifacts of run {run_id}"):
            there = self.client.list_artifacts(run_id, PACKAGE_FOLDER)
        if not there:
            return ModelVersionNotFoundError(
                f"run {run_id} at {self.tracking_uri} has no artifact folder {PACKAGE_FOLDER!r}: "
                f"was it trained by TrainModelOperator? ({text})"
            )
        return RegistryUnavailableError(
            f"MLflow at {self.tracking_uri} did not give the model package of run {run_id}: {text}"
        )

    def download_version(self, version: RegisteredVersion, destination: Path) -> Path:
        """Download the package of a version, with its signature beside it.

        :raises ModelVersionNotFoundError: when its run has no package.
        """
        folder = self.download_package(version.run_id, destination)
        if version.signature is not None:
            (folder / SIGNATURE_FILE).write_text(version.signature)
        return folder

    def training_run(self, run_id: str) -> TrainingRun:
        """Read what a run says about itself.

        :raises ModelVersionNotFoundError: there is no such run.
        """
        with _translated(f"run {run_id}"):
            run = self.client.get_run(run_id)
        return TrainingRun(experiment_id=str(run.info.experiment_id), params=dict(run.data.params))

    # -- models -------------------------------------------------------------------------------------------

    def log_model(
        self,
        experiment_id: str,
        run_id: str,
        pipeline: Any,
        *,
        name: str,
        features: Any,
        untrusted: Sequence[str],
    ) -> str:
        """Store the pipeline as an MLflow model, so that ``mlflow.pyfunc.load_model`` works in a notebook.

        Requirements are given, not inferred: inference starts a process and costs 14 s.

        :returns: the logged model's id.
        """
        import mlflow.sklearn
        from mlflow.models import infer_signature

        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            mlflow.sklearn.save_model(
                pipeline,
                str(folder),
                serialization_format="skops",
                skops_trusted_types=list(untrusted),
                signature=infer_signature(features.head(100), pipeline.predict(features.head(100))),
                input_example=features.head(_EXAMPLE_ROWS),
                pip_requirements=_requirements(untrusted),
            )
            with _translated(f"log model to run {run_id}"):
                logged = self.client.create_logged_model(experiment_id, name=name, source_run_id=run_id)
                self.client.log_model_artifacts(logged.model_id, str(folder))
                self.client.finalize_logged_model(logged.model_id, "READY")
        return str(logged.model_id)

    def register(
        self,
        model_name: str,
        *,
        run_id: str,
        model_id: str | None,
        package_digest: str,
        tags: Mapping[str, str],
        description: str,
    ) -> RegisteredVersion:
        """Create a version, or find the one that already holds this package, and write its tags and description.

        MLflow can't make a tag unique, so of two processes that register the same package at once both create a version.
        Numbers are given in order: whoever finds a lower one with the same package takes its own back.

        :param tags: facts about it; a value longer than MLflow stores is cut off.
        """
        facts = {_tag_name(name): value[:TAG_CHARACTERS] for name, value in tags.items()}
        wanted = {PACKAGE_DIGEST_TAG: package_digest, RUN_ID_TAG: run_id, **facts}
        text = description[:DESCRIPTION_CHARACTERS]
        with _translated(f"register {model_name!r}"):
            self._ensure_model(model_name)
            standing = self._holding(model_name, package_digest)
            if not standing:
                created = _written(
                    self.client.create_model_version,
                    model_name,
                    source=f"models:/{model_id}" if model_id else f"runs:/{run_id}/{PACKAGE_FOLDER}",
                    run_id=run_id,
                    model_id=model_id,
                    tags=wanted,
                    description=text,
                )
                standing = self._holding(model_name, package_digest)
                if str(standing[0].version) != str(created.version):
                    _written(self.client.delete_model_version, model_name, created.version)
            number, current = str(standing[0].version), standing[0]
            for name, value in facts.items():
                if current.tags.get(name) != value:
                    _written(self.client.set_model_version_tag, model_name, number, name, value)
            if current.description != text:
                _written(self.client.update_model_version, model_name, number, text)
            return _registered(self.client.get_model_version(model_name, number))

    def run_digest(self, run_id: str) -> str | None:
        """Give the digest of the package a run holds, as its training noted it.

        :raises ModelVersionNotFoundError: there is no such run.
        """
        with _translated(f"run {run_id}"):
            digest: str | None = self.client.get_run(run_id).data.tags.get(PACKAGE_DIGEST_TAG)
        return digest

    def _ensure_model(self, model_name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self.client.get_registered_model(model_name)
        except MlflowException:
            try:
                _written(self.client.create_registered_model, model_name)
            except MlflowException as err:  # somebody else was faster
                if err.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise

    def _holding(self, model_name: str, package_digest: str) -> list[Any]:
        """List the versions with this package, lowest number first."""
        found = self.client.search_model_versions(f"name = '{model_name}'")
        same = [item for item in found if item.tags.get(PACKAGE_DIGEST_TAG) == package_digest]
        return sorted(same, key=lambda item: int(item.version))

    def version(self, model_name: str, model_version: str) -> RegisteredVersion:
        """Look a version up by number.

        :raises ModelVersionNotFoundError: naming the model and version.
        """
        with _translated(f"model {model_name!r} version {model_version!r}"):
            return _registered(self.client.get_model_version(model_name, model_version))

    def version_by_alias(self, model_name: str, alias: str) -> RegisteredVersion:
        """Look a version up by alias.

        :raises ModelVersionNotFoundError: naming the model and alias.
        """
        with _translated(f"model {model_name!r} alias {alias!r}"):
            return _registered(self.client.get_model_version_by_alias(model_name, alias))

    def find_alias(self, model_name: str, alias: str) -> RegisteredVersion | None:
        """Like :meth:`version_by_alias`, with ``None`` when there is no such model or alias."""
        try:
            return self.version_by_alias(model_name, alias)
        except ModelVersionNotFoundError:
            return None

    def set_alias(self, model_name: str, alias: str, model_version: str) -> None:
        """Point an alias at a version. The ledger decides who may; MLflow has no compare-and-set."""
        with _translated(f"model {model_name!r} alias {alias!r}"):
            _written(self.client.set_registered_model_alias, model_name, alias, model_version)

    def set_version_tag(self, model_name: str, model_version: str, name: str, value: str) -> None:
        """Write a tag of a version."""
        with _translated(f"model {model_name!r} version {model_version!r}"):
            _written(self.client.set_model_version_tag, model_name, model_version, name, value)

    def aliases(self, model_name: str) -> dict[str, str]:
        """Give every alias of a model with the version it points at.

        :raises ModelVersionNotFoundError: there is no such model.
        """
        with _translated(f"model {model_name!r}"):
            found = self.client.get_registered_model(model_name).aliases
        return {alias: str(version) for alias, version in found.items()}

    # -- links --------------------------------------------------------------------------------------------

    def run_url(self, experiment_id: str, run_id: str, artifact: str | None = None) -> str:
        """Page of a run, or of one of its artifacts."""
        page = f"{self.tracking_uri}/#/experiments/{experiment_id}/runs/{run_id}"
        return f"{page}/artifacts/{artifact}" if artifact else page

    def version_url(self, version: RegisteredVersion) -> str:
        """Page of a model version."""
        return f"{self.tracking_uri}/#/models/{version.model_name}/versions/{version.model_version}"


def _written(write: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Write to the registry, again when somebody else wrote the same row at the same time.

    MLflow looks whether a row is there and then inserts it. Who comes second breaks its database's uniqueness, which it
    answers with 400 BAD_REQUEST, and its client repeats only 408, 429 and 5xx. What is really wrong with a request is an
    INVALID_PARAMETER_VALUE.
    """
    from mlflow.exceptions import MlflowException

    for attempt in range(_WRITE_ATTEMPTS):
        try:
            return write(*arguments, **named)
        except MlflowException as err:
            if (
                err.error_code not in {"BAD_REQUEST", "TEMPORARILY_UNAVAILABLE"}
                or attempt + 1 == _WRITE_ATTEMPTS
            ):
                raise
        time.sleep(random.uniform(0.05, 0.2) * 2**attempt)  # noqa: S311  it only parts the writers
    raise AssertionError("unreachable")


def _registered(version: Any) -> RegisteredVersion:
    run_id = version.tags.get(RUN_ID_TAG) or version.run_id
    digest = version.tags.get(PACKAGE_DIGEST_TAG)
    if not run_id or not digest:
        raise ModelVersionNotFoundError(
            f"model {version.name!r} version {version.version} was not registered by RegisterModelOperator "
            f"(tag {PACKAGE_DIGEST_TAG} is missing); register the run again with it"
        )
    return RegisteredVersion(
        model_name=version.name,
        model_version=str(version.version),
        run_id=run_id,
        package_digest=digest,
        signature=version.tags.get(SIGNATURE_TAG),
    )


def _tag_name(name: str) -> str:
    """Replace what MLflow does not take in the name of a tag, such as in a metric's import path."""
    return re.sub(r"[^\w./ -]", "_", name)[:250]


def _heartbeat(run: Any) -> str | None:
    found: str | None = run.data.tags.get(HEARTBEAT_TAG)
    return found


def _lease_seconds() -> float:
    return float(os.environ.get(LEASE_VARIABLE) or LEASE_SECONDS)


def _digest_tag(artifact_file: str) -> str:
    return f"airflow_mlops.{Path(artifact_file).stem}_digest"


def _configure_process(services: Services) -> None:
    """Hand over what MLflow reads only from the environment: credentials, limits, and no telemetry.

    A task is a process of its own, so this reaches nobody else.
    """
    settings = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_TRACKING_USERNAME": services.tracking_username,
        "MLFLOW_TRACKING_PASSWORD": services.tracking_password,
        "MLFLOW_TRACKING_TOKEN": services.tracking_token,
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }
    os.environ.update({name: value for name, value in settings.items() if value})
    for name, value in _HTTP_LIMITS.items():
        os.environ.setdefault(name, value)


def _requirements(types: Sequence[str]) -> list[str]:
    """Pin what a notebook needs to load the model: scikit-learn, skops, and the packages of other types in it.

    A module of your own belongs to no package and can't be pinned.
    """
    from importlib.metadata import packages_distributions, version

    packages = packages_distributions()
    modules = {name.partition(".")[0] for name in types}
    needed = {"scikit-learn", "skops"} | {name for module in modules for name in packages.get(module, [])}
    return [f"{name}=={version(name)}" for name in sorted(needed)]


@contextmanager
def _translated(what: str) -> Iterator[None]:
    """Translate MLflow's one exception into ours: not there, not allowed, not right, or not reachable."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as err:
        if err.error_code in {"RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"} or (
            err.error_code == "INVALID_PARAMETER_VALUE" and "not found" in str(err)
        ):
            raise ModelVersionNotFoundError(f"MLflow has no {what}: {err}") from err
        if err.error_code in {"UNAUTHENTICATED", "PERMISSION_DENIED"}:
            raise ConnectionConfigError(
                f"MLflow refuses {what}: {err}; check Login and Password, or the token, of the MLflow connection"
            ) from err
        if err.error_code == "INVALID_PARAMETER_VALUE":
            raise ValueError(f"MLflow refused {what}: {err}") from err
        raise RegistryUnavailableError(f"MLflow failed on {what}: {err}") from err
