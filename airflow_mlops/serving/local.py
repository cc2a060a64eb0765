"""Deploying a package to the local service: copy, verify, ask for it, see it answer, or put everything back."""

from __future__ import annotations

import fcntl
import logging
import shutil
import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from airflow_mlops.core.rollout import DesiredState, serve_alone, version_folder
from airflow_mlops.core.signing import Trust
from airflow_mlops.exceptions import EndpointUnavailableError, RolloutError
from airflow_mlops.integrations.bentoml import EndpointClient, LocalServer, RunningServer, wait_until
from airflow_mlops.serving.files import storage_errors, write_whole
from airflow_mlops.serving.model import load_model
from airflow_mlops.serving.package import read_signature, write_signature
from airflow_mlops.serving.reconciler import DESIRED_FILE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Deployment:
    """What serves now, and how it came about.

    :param started: whether the service had to be started.
    """

    endpoint_url: str
    model_name: str
    model_version: str
    previous_version: str | None
    package_digest: str
    revision: int
    pid: int
    seconds: float
    started: bool


def deploy_package(
    *,
    serving_dir: Path,
    package_folder: Path,
    model_name: str,
    model_version: str,
    package_digest: str,
    host: str,
    port: int,
    token: str | None,
    timeout_seconds: float,
    public_keys: str | None = None,
) -> Deployment:
    """Make the folder's service answer with a version; the old version answers until the new one does.

    :param public_keys: keys the package must be signed with, here and in the service; ``None`` asks for no signature.
    :raises RolloutError: the new version did not answer in time, or the port is taken; says what serves now.
    :raises ArtifactIntegrityError: the package is not the registered one, or can't be loaded.
    :raises StorageError: the folder can't be written.
    """
    started_at = time.monotonic()
    with storage_errors(f"create {serving_dir}"):
        serving_dir.mkdir(parents=True, exist_ok=True)
    with _exclusive(serving_dir):
        current = _read_desired(serving_dir)
        desired = serve_alone(
            current, model_name=model_name, model_version=model_version, package_digest=package_digest
        )
        # Proved loadable here first: what can't be served never becomes desired.
        load_model(package_folder, expected_digest=package_digest, trust=Trust.of(public_keys, model_name))
        _copy_package(package_folder, serving_dir / version_folder(model_name, model_version))
        server = LocalServer(serving_dir, host=host, port=port, token=token, public_keys=public_keys)
        running = server.running()
        if running is not None and running.settings != server.settings:
            running = _restart(server, running)
        write_whole(serving_dir / DESIRED_FILE, desired.to_bytes())
        try:
            process = running or server.start()
            _wait_until_live(server, desired, token, timeout_seconds)
        except BaseException:
            _restore(serving_dir, current)
            if running is None:
                server.stop()
            raise
        _remove_others(serving_dir, desired)
    return Deployment(
        endpoint_url=server.url,
        model_name=model_name,
        model_version=model_version,
        previous_version=desired.previous_version,
        package_digest=package_digest,
        revision=desired.revision,
        pid=process.pid,
        seconds=time.monotonic() - started_at,
        started=running is None,
    )


def _restart(server: LocalServer, running: RunningServer) -> RunningServer:
    """Start the service again with another address, token or keys; what it serves stays the same."""
    if running.url != server.url:
        server.require_free_port()
    log.info(
        "starting the service of %s again: its address, token, keys or accepted pickles have changed",
        server.serving_dir,
    )
    server.stop()
    return server.start()


@contextmanager
def _exclusive(serving_dir: Path) -> Iterator[None]:
    """Let one deployment at a time touch the folder; the lock goes with the process that holds it."""
    with storage_errors(f"lock {serving_dir}"), (serving_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read_desired(serving_dir: Path) -> DesiredState | None:
    try:
        return DesiredState.from_bytes((serving_dir / DESIRED_FILE).read_bytes())
    except FileNotFoundError:
        return None


def _copy_package(source: Path, destination: Path) -> None:
    """Copy under a temporary name and rename, so that a version's folder is whole or not there."""
    if destination.exists():
        _copy_signature(source, destination)
        return
    temporary = destination.parent / f".{destination.name}-{uuid.uuid4().hex}"
    with storage_errors(f"copy the model to {destination}"):
        destination.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.mkdir()
            for file in source.iterdir():  # a package is flat; copytree would hide what the disk said
                shutil.copyfile(file, temporary / file.name)
            temporary.rename(destination)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _copy_signature(source: Path, destination: Path) -> None:
    """Bring the signature of a folder that is already there up to date: it may have been signed since, or again."""
    signature = read_signature(source)
    if signature is not None:
        write_signature(destination, signature)


def _wait_until_live(
    server: LocalServer, desired: DesiredState, token: str | None, timeout_seconds: float
) -> None:
    problem: str | None = "it did not answer"

    def live(client: EndpointClient) -> bool:
        nonlocal problem
        if server.running() is None:
            raise RolloutError(f"the service ended while it started; its log ends with\n{server.log_tail()}")
        try:
            status = client.ready()
        except EndpointUnavailableError as err:
            problem = str(err)
            return False
        problem = status["error"] or f"it serves version {status['model_version']}"
        return bool(status["revision"] == desired.revision and status["error"] is None)

    with EndpointClient(server.url, token, timeout_seconds=5) as client:
        if not wait_until(lambda: live(client), timeout_seconds=timeout_seconds):
            raise RolloutError(
                f"version {desired.stable.model_version} of {desired.model_name} did not answer at {server.url} within "
                f"{timeout_seconds:g} s: {problem}. "
                + (
                    f"Version {desired.previous_version} serves on"
                    if desired.previous_version
                    else "Nothing serves"
                )
            )


def _restore(serving_dir: Path, current: DesiredState | None) -> None:
    if current is None:
        (serving_dir / DESIRED_FILE).unlink(missing_ok=True)
    else:
        write_whole(serving_dir / DESIRED_FILE, current.to_bytes())


def _remove_others(serving_dir: Path, desired: DesiredState) -> None:
    """Keep the live version and the one before it, for a way back."""
    keep = {desired.previous_version, *(one.model_version for one in desired.versions)}
    for folder in (serving_dir / desired.folder(desired.stable)).parent.iterdir():
        if folder.name not in keep:
            shutil.rmtree(folder, ignore_errors=True)
