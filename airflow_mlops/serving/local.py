"""Deploying a package to the local service: copy, verify, ask for it, see it answer, or put everything back."""

from __future__ import annotations

import fcntl
import logging
import shutil
import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from airflow_mlops.core.model.signing import Trust
from airflow_mlops.core.rollouts.desired_state import DesiredState, ServedVersion, serve_alone, version_folder
from airflow_mlops.exceptions import (
    ArtifactIntegrityError,
    EndpointUnavailableError,
    RolloutError,
    RolloutInterruptedError,
    VersionRefusedError,
)
from airflow_mlops.integrations.bentoml import EndpointClient, LocalServer, wait_until
from airflow_mlops.integrations.signals import deferred_signals
from airflow_mlops.serving.files import storage_errors, write_whole
from airflow_mlops.serving.lease import end_lease, grant_lease, read_lease
from airflow_mlops.serving.log_settings import (
    LOG_FOLDER,
    LogSettings,
    keep_in_folder,
    read_settings,
    write_settings,
)
from airflow_mlops.serving.model import load_model
from airflow_mlops.serving.package import read_package, read_signature, write_signature
from airflow_mlops.serving.reconciler import (
    DESIRED_FILE,
    why_refused,
    workers_behind,
    workers_with_old_tokens,
)
from airflow_mlops.serving.settings import ServiceSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from airflow_mlops.integrations.service_process import RunningServer

log = logging.getLogger(__name__)

#: What bringing a version to the service, or asking for it, ends in where the version does not come up.
REFUSALS = (RolloutError, ArtifactIntegrityError)

#: Whoever deploys holds it; it keeps the folder's name.
_LOCK = ".lock"


@dataclass(frozen=True, kw_only=True, slots=True)
class Deployment:
    """What serves now, and how it came about.

    :param started: whether the service had to be started.
    """

    previous_version: str | None
    revision: int
    pid: int
    seconds: float
    started: bool


class LocalEndpoint:
    """The service of one serving folder, as whoever deploys sees it: what is desired, and whether it is so.

    :param server: its process.
    :param timeout_seconds: how long it may take to serve what is asked for.
    :param own_log: let the service's inference log stay in its folder, from the next state on that is served.
    """

    def __init__(self, server: LocalServer, *, timeout_seconds: float = 120.0, own_log: bool = False) -> None:
        self.server, self.own_log = server, own_log
        self.serving_dir = server.serving_dir
        self.timeout_seconds = timeout_seconds

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Let one deployment at a time touch the folder; the lock goes with the process that holds it."""
        with storage_errors(f"create {self.serving_dir}"):
            self.serving_dir.mkdir(parents=True, exist_ok=True)
        with storage_errors(f"lock {self.serving_dir}"), (self.serving_dir / _LOCK).open("a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not lock.tell():
                lock.write(uuid.uuid4().hex)
                lock.flush()
            yield

    @property
    def uid(self) -> str:
        """Name of the folder: one that was lost and is made again has another, though its revisions begin at 1 again."""
        return (self.serving_dir / _LOCK).read_text()

    def desired(self) -> DesiredState | None:
        """Read what is to be served; ``None`` where nothing was ever deployed."""
        try:
            return DesiredState.from_bytes((self.serving_dir / DESIRED_FILE).read_bytes())
        except FileNotFoundError:
            return None

    def require_no_rollout(self, current: DesiredState | None, *, but: str | None = None) -> None:
        """See that nobody else is rolling out a version here.

        :param but: name of the rollout that may be under way.
        :raises RolloutError: somebody is, and steers.
        """
        if current is None or not current.leased or current.rollout == but:
            return
        lease = read_lease(self.serving_dir)
        if lease is not None and lease.covers(current.revision):
            versions = ", ".join(one.model_version for one in current.versions[1:])
            raise RolloutError(
                f"a rollout of version {versions} is under way at {self.server.url} (revision {current.revision}): wait for its "
                "end, or end its task, which rolls it back. Nothing was changed"
            )

    def bring(self, package_folder: Path, model_name: str, version: ServedVersion) -> None:
        """Copy a version's package into the serving folder, after it was verified and has answered its known rows.

        :raises ArtifactIntegrityError: the package is not the registered one, or can't be loaded.
        """
        trust = Trust.of(self.server.public_keys, model_name)
        load_model(package_folder, expected_digest=version.package_digest, trust=trust)
        _copy_package(
            package_folder,
            self.serving_dir / version_folder(model_name, version.model_version),
            version.package_digest,
        )

    def serve(self, desired: DesiredState, *, lease_seconds: float = 0.0) -> tuple[RunningServer, bool]:
        """Ask for a state and see that all workers serve it; if they do not, all is put back.

        A service that runs with another address, keys or settings is started again, but never in the middle of a rollout. Other tokens
        it takes as it is.

        :param lease_seconds: for how long, where the state is leased; it begins when the state is served.
        :returns: the process, and whether it had to be started.
        :raises RolloutError: it was not served in time, no worker can load it, or the port is taken; says what serves now.
        """
        current, server = self.desired(), self.server
        log_folder = self.serving_dir / LOG_FOLDER
        ran = running = server.running()
        settings = read_settings(log_folder)
        try:
            in_the_middle = desired.rollout is not None and current is not None and current.leased
            if self.own_log and not in_the_middle:
                keep_in_folder(log_folder)
            if running is not None and running.settings != server.settings and not in_the_middle:
                running = _restart(server, running)
            server.hand_tokens()
            if desired.leased:
                grant_lease(self.serving_dir, desired.revision, lease_seconds)
            write_whole(self.serving_dir / DESIRED_FILE, desired.to_bytes())
            process = running or server.start()
            _wait_until_live(
                server,
                desired,
                self.timeout_seconds,
                lease_seconds=lease_seconds,
                otherwise=_goes_on(desired, started=running is None),
            )
        except BaseException:
            with deferred_signals():
                _restore(self.serving_dir, current, desired.revision)
                if running is ran:  # readers look where it writes
                    write_settings(log_folder, settings)
                self._run_as_before(ran=ran is not None)
            raise
        return process, running is None

    def _run_as_before(self, *, ran: bool) -> None:
        """Let the service run, or not, as it did before something was asked of it."""
        if not ran:
            self.server.stop()
        elif self.server.running() is None:
            try:
                self.server.start()
            except RolloutError:  # why all is put back is what whoever asked shall see
                log.exception("the service of %s ended, and can't be started again", self.serving_dir)

    def take_back(self, desired: DesiredState) -> None:
        """Ask for a state in which the stable version serves alone, and see that it does; never put back what was before.

        :raises RolloutError: the service did not say in time that it does; it will, as soon as it can.
        """
        current = self.desired()
        if current is not None and current.leased:
            end_lease(self.serving_dir, current.revision)
        write_whole(self.serving_dir / DESIRED_FILE, desired.to_bytes())
        self.server.hand_tokens()
        if self.server.running() is None:
            self.server.start()
        _wait_until_live(self.server, desired, self.timeout_seconds)

    def remove_others(self, desired: DesiredState) -> None:
        """Keep the versions that are served and the one before them, for a way back."""
        keep = {desired.previous_version, *(one.model_version for one in desired.versions)}
        for folder in (self.serving_dir / desired.folder(desired.stable)).parent.iterdir():
            if folder.name not in keep:
                shutil.rmtree(folder, ignore_errors=True)

    def client(self) -> EndpointClient:
        """Give a client of the service; the caller closes it."""
        server = self.server
        return EndpointClient(
            server.url, server.token, steering_token=server.current_steering_token(), timeout_seconds=5.0
        )


def deploy_package(
    endpoint: LocalEndpoint,
    package_folder: Path,
    model_name: str,
    version: ServedVersion,
    *,
    on_refusal: Callable[[Exception], None] = lambda _: None,
) -> Deployment:
    """Make the folder's service answer with a version; the old version answers until the new one does.

    :param on_refusal: is told why, where the version was brought here and did not come up.
    :raises RolloutError: the new version did not answer in time, the service can't load it, the port is taken, or a rollout is
        under way; says what serves now.
    :raises ArtifactIntegrityError: the package is not the registered one, or can't be loaded.
    :raises StorageError: the folder can't be written.
    """
    started_at = time.monotonic()
    with endpoint.exclusive():
        current = endpoint.desired()
        desired = serve_alone(
            current,
            model_name=model_name,
            model_version=version.model_version,
            package_digest=version.package_digest,
        )
        endpoint.require_no_rollout(current)
        try:
            endpoint.bring(package_folder, model_name, version)
            process, started = endpoint.serve(desired)
        except REFUSALS as err:
            if not isinstance(err, RolloutInterruptedError):  # which says nothing of the version
                on_refusal(err)
            raise
        endpoint.remove_others(desired)
    return Deployment(
        previous_version=desired.previous_version,
        revision=desired.revision,
        pid=process.pid,
        seconds=time.monotonic() - started_at,
        started=started,
    )


def _restart(server: LocalServer, running: RunningServer) -> RunningServer:
    """Start the service again with another address, keys or settings; what it serves stays the same.

    :raises ValueError: with these settings it would not start; it runs on with the old ones.
    :raises ConnectionConfigError: likewise.
    """
    ServiceSettings.from_environment()
    LogSettings.load(server.serving_dir / LOG_FOLDER).key()
    log.info(
        "starting the service of %s again: its address, keys, trusted types, accepted pickles or settings have changed",
        server.serving_dir,
    )
    return server.restart(running)


def _copy_package(source: Path, destination: Path, digest: str) -> None:
    """Copy under a temporary name and rename, so that a version's folder is whole or not there; replace what was damaged."""
    if destination.exists():
        try:
            read_package(destination, digest)
        except ArtifactIntegrityError as err:
            log.warning("%s is copied again: %s", destination, err)
            shutil.rmtree(destination)
        else:
            _copy_signature(source, destination)
            return
    temporary = destination.parent / f".{destination.name}-{uuid.uuid4().hex}"
    with storage_errors(f"copy the model to {destination}"):
        destination.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.mkdir()
            for file in source.iterdir():  # a package is flat; copytree would hide what the disk said
                write_whole(temporary / file.name, file.read_bytes())
            temporary.rename(destination)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _copy_signature(source: Path, destination: Path) -> None:
    """Bring the signature of a folder that is already there up to date: it may have been signed since, or again."""
    signature = read_signature(source)
    if signature is not None:
        write_signature(destination, signature)


def _wait_until_live(
    server: LocalServer,
    desired: DesiredState,
    timeout_seconds: float,
    *,
    lease_seconds: float = 0.0,
    otherwise: str = "",
) -> None:
    """Wait until every worker serves what is desired.

    :param otherwise: what serves where that can't be, a sentence to go on with.
    :raises RolloutError: they do not in time, or have said that they can't; says what serves.
    """
    problem: str | None = "it did not answer"

    def live(client: EndpointClient) -> bool:
        nonlocal problem
        if desired.leased:  # a model that takes longer to load than the lease lasts is no reason to give up
            grant_lease(server.serving_dir, desired.revision, lease_seconds)
        if server.running() is None:
            raise RolloutError(f"the service ended while it started; its log ends with\n{server.log_tail()}")
        refusal = why_refused(server.serving_dir, desired.revision)
        if refusal is not None:
            raise VersionRefusedError(
                f"the service at {server.url} can't serve {_asked(desired)}: {refusal}{otherwise}"
            )
        problem = workers_with_old_tokens(server.serving_dir)
        if problem is not None:  # who asks has a new one
            return False
        try:
            status = client.ready()
        except EndpointUnavailableError as err:
            problem = str(err)
            return False
        problem = status["error"] or f"it serves version {status['model_version']}"
        if status["revision"] != desired.revision or status["error"] is not None:
            return False
        problem = workers_behind(server.serving_dir, desired.revision)
        return problem is None

    with EndpointClient(server.url, server.token, timeout_seconds=5) as client:
        if not wait_until(lambda: live(client), timeout_seconds=timeout_seconds):
            raise RolloutError(
                f"{_asked(desired)} did not answer at {server.url} within {timeout_seconds:g} s: {problem}{otherwise}"
            )


def _asked(desired: DesiredState) -> str:
    """Name the version that was to come."""
    return f"version {desired.versions[-1].model_version} of {desired.model_name}"


def _goes_on(desired: DesiredState, *, started: bool) -> str:
    """Say what serves where what is desired can't be, and all is put back.

    :param started: whether the service was started for it, and is stopped again.
    """
    before = desired.stable.model_version if len(desired.versions) > 1 else desired.previous_version
    return ". Nothing serves" if started or before is None else f". Version {before} serves on"


def _restore(serving_dir: Path, current: DesiredState | None, revision: int) -> None:
    """Ask for what was asked for before, under a number of its own: what was counted under the failed one is not its."""
    if current is None:
        (serving_dir / DESIRED_FILE).unlink(missing_ok=True)
    else:
        write_whole(serving_dir / DESIRED_FILE, replace(current, revision=revision + 1).to_bytes())
