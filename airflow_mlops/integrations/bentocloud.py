"""BentoCloud, by BentoML's own client: push a Bento, deploy it, see it answer, or put back what served before."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import tarfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from airflow_mlops.core.codec import canonical_json
from airflow_mlops.exceptions import (
    ArtifactIntegrityError,
    ConnectionConfigError,
    EndpointUnavailableError,
    RolloutError,
    TransientError,
)
from airflow_mlops.integrations.bentoml import EndpointClient
from airflow_mlops.integrations.bentoml_build import bento_name, digest_of
from airflow_mlops.integrations.kubernetes_manifests import object_name
from airflow_mlops.integrations.object_store import ObjectStore
from airflow_mlops.integrations.way_back import NotReadyError, carry_out

if TYPE_CHECKING:
    from bentoml._internal.cloud.deployment import Deployment

log = logging.getLogger(__name__)

#: BentoCloud's words for a deployment that answers, or would when somebody asks; and for one that will not.
_RUNNING = frozenset({"running", "scaled-to-zero"})
_FAILED = frozenset({"failed", "image-build-failed", "terminated", "terminating", "unhealthy"})

#: How often in a row BentoCloud or the service has to say what may still be about the deployment before.
_LOOKS = 2

#: Variable of the service that ``/status`` tells: a digest of what it was started with.
_DEPLOYMENT = "AIRFLOW_MLOPS_DEPLOYMENT"

_REQUEST_SECONDS = 60

#: A deployment that sleeps takes its time to answer its first request.
_ANSWER_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class CloudEndpoint:
    """A model's service on BentoCloud: one deployment of one Bento.

    Its address is open to whoever knows it: the token that requests must bring is the service's own, not BentoCloud's.

    :param model_name: registered model; gives the name.
    :param model_version: that the Bento serves.
    :param package_digest: of that version.
    :param tag: of the Bento.
    :param name: of the deployment; default made of the model's.
    :param minimum: of replicas; with 0 the service sleeps when nobody asks.
    :param maximum: of replicas.
    :param instance_type: BentoCloud's name for a size of machine; default its choice.
    :param strategy: how replicas are replaced.
    :param secret: name of the secret with the service's variables; ``None``: it has none.
    :param env: variables that anybody may read.
    :param env_secrets: names of secrets of yours on BentoCloud, whose keys become variables: credentials of the inference log's store.
    :param ready_seconds: in which the version has to answer; the image is built in them, too.
    """

    model_name: str
    model_version: str
    package_digest: str
    tag: str
    name: str = ""
    minimum: int = 1
    maximum: int = 2
    instance_type: str | None = None
    strategy: Literal["RollingUpdate", "Recreate", "RampedSlowRollout", "BestEffortControlledRollout"] = (
        "RollingUpdate"
    )
    secret: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    env_secrets: tuple[str, ...] = ()
    ready_seconds: float = 1800.0

    def __post_init__(self) -> None:
        if not (0 <= self.minimum <= self.maximum and self.maximum > 0):
            raise ValueError(
                f"from {self.minimum} to {self.maximum} replicas: give at least one at most, and no fewer at most than at least"
            )

    @property
    def deployment(self) -> str:
        """Name of the deployment."""
        return self.name or object_name(self.model_name)

    def config(self, service: str) -> dict[str, Any]:
        """Give all that BentoCloud is to know of the deployment, so that nothing of what was there before stays.

        :param service: name of the service in the Bento.
        """
        of_service = {
            "scaling": {"min_replicas": self.minimum, "max_replicas": self.maximum},
            "instance_type": self.instance_type,
            "deployment_strategy": self.strategy,
        }
        secrets = [*filter(None, [self.secret]), *self.env_secrets]
        # What new replicas are started for; no other number of them, which starts none in their place.
        made_of = canonical_json([self.tag, dict(self.env), secrets])
        env = {**self.env, _DEPLOYMENT: hashlib.sha256(made_of.encode()).hexdigest()[:16]}
        return {
            "name": self.deployment,
            "bento": self.tag,
            "access_authorization": False,
            "envs": [{"name": name, "value": value} for name, value in env.items()],
            "secrets": secrets,
            "services": {service: {key: value for key, value in of_service.items() if value is not None}},
        }


class BentoCloud:
    """An organization on BentoCloud, as far as a model's service needs it.

    The token is given to the client and to nothing else: no context of it is saved.

    :param url: of the organization, such as ``https://team.cloud.bentoml.com``.
    :param token: API token, which may manage deployments.
    :param conn_id: of the connection, for messages.
    :param cluster: default the organization's.
    """

    def __init__(self, url: str, token: str, conn_id: str, *, cluster: str | None = None) -> None:
        from bentoml.cloud import BentoCloudClient
        from rich.console import Console

        self.conn_id, self.cluster = conn_id, cluster
        client: Any = BentoCloudClient  # its constructor is hidden from type checkers
        self._client = client(api_key=token, endpoint=url, timeout=_REQUEST_SECONDS)
        # Its own draws boxes and bars for a terminal.
        spinner = type(self._client.bento.spinner)(Console(quiet=True))
        self._bentos = type(self._client.bento)(self._client.client, spinner)

    def close(self) -> None:
        """Give the connections back."""
        self._client.client.session.close()

    def require_access(self) -> None:
        """Say now what would fail later.

        :raises ConnectionConfigError: the token is none.
        """
        with self._errors():
            user = self._client.client.v1.get_current_user()
        if user is None:
            raise ConnectionConfigError(
                f"BentoCloud does not know whose the token of connection {self.conn_id!r} is: create one"
            )

    def push(self, folder: Path) -> str:
        """Upload a Bento, unless it is there.

        :returns: the name of its service.
        :raises TransientError: not all of it got there.
        """
        from bentoml import Bento
        from bentoml.exceptions import BentoMLException, CloudRESTApiClientError

        bento = Bento.from_path(str(folder))
        log.info("pushing %s, unless it is there", bento.tag)
        with self._errors():
            try:
                self._bentos.push(bento)
            except CloudRESTApiClientError:
                raise
            except BentoMLException as err:
                raise TransientError(f"{bento.tag} did not get to BentoCloud: {err}") from err
        return str(bento.entry_service)

    def keep_secret(self, name: str, values: Mapping[str, str]) -> None:
        """Create a secret that never changes, unless it is there."""
        from bentoml.exceptions import CloudRESTApiClientError

        with self._errors():
            try:
                self._client.secret.get(name, cluster=self.cluster)
            except CloudRESTApiClientError as err:
                if err.error_code != 404 and "not found" not in str(err):
                    raise
            else:
                return
            self._client.secret.create(
                name,
                "env",
                cluster=self.cluster,
                description="Made by airflow-mlops; a deployment names it",
                key_vals=list(values.items()),
                stage="runtime",
            )

    def find(self, name: str) -> Deployment | None:
        """Read a deployment; ``None`` when there is none."""
        try:
            with self._errors():
                found: Deployment = self._client.deployment.get(name, self.cluster)
        except LookupError:
            return None
        return found

    def apply(self, config: Mapping[str, Any], found: Deployment | None) -> Deployment:
        """Make a deployment what a configuration says, or create it.

        :param config: whole, see :meth:`CloudEndpoint.config` and :func:`config_of`.
        :param found: the deployment, where there is one.
        """
        from bentoml import deployment as api

        cluster = found.cluster if found is not None else self.cluster
        whole = dict(config) | ({"cluster": cluster} if cluster else {})
        apply: Any = api.apply  # its overloads leave out the client; given ours, it looks for no saved one
        with self._errors():
            made: Deployment = apply(
                name=whole["name"], cluster=cluster, config_dict=whole, _cloud_client=self._client
            )
        return made

    def why_not_ready(self, name: str) -> str:
        """Say what BentoCloud knows of the replicas."""
        with contextlib.suppress(Exception):  # it is for a message about something else
            pods = self._client.client.v2.list_deployment_pods(name, self.cluster)
            told = {
                f"{pod.pod_status.status}: {pod.pod_status.reason}".rstrip(": ")
                for pod in pods
                if not pod.status.ready
            }
            return "; ".join(sorted(told)[:3])
        return ""

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Translate what BentoCloud answers."""
        import httpx
        from bentoml.exceptions import BentoMLException, CloudRESTApiClientError, NotFound

        try:
            yield
        except NotFound as err:
            raise LookupError(str(err)) from err
        except CloudRESTApiClientError as err:
            raise self._translated(int(err.error_code), str(err)) from err
        except BentoMLException as err:
            # The client wraps what it was answered while it looked at the configuration.
            cause = err.__context__
            if isinstance(cause, CloudRESTApiClientError):
                raise self._translated(int(cause.error_code), str(cause)) from err
            raise ValueError(f"BentoML refuses what was to be deployed: {err}") from err
        except httpx.HTTPError as err:
            raise TransientError(
                f"BentoCloud can't be reached by connection {self.conn_id!r}: {type(err).__name__}: {err}"
            ) from err

    def _translated(self, status: int, said: str) -> Exception:
        if status == 401:
            return ConnectionConfigError(
                f"BentoCloud does not take the token of connection {self.conn_id!r}: make a new API token and put it into "
                f"Password ({said})"
            )
        if status == 403:
            return ConnectionConfigError(
                f"the token of connection {self.conn_id!r} may not do this: it takes one for developer operations ({said})"
            )
        if status in (400, 409, 422):
            return ValueError(f"BentoCloud refuses what was to be deployed: {said}")
        return TransientError(f"BentoCloud failed, asked by connection {self.conn_id!r}: {said}")


def config_of(found: Deployment) -> dict[str, Any]:
    """Give what a deployment was asked to be, to compare it or to ask for it again."""
    config = found.get_config(refetch=False)
    return config.to_dict() if config is not None else {}


def fetched(bento: Mapping[str, Any], folder: Path) -> Path:
    """Get a Bento that was built, from wherever that is.

    :param bento: what the build step returned.
    :param folder: to put it into.
    :returns: its folder.
    :raises ArtifactIntegrityError: it is not what was built.
    :raises FileNotFoundError: it is gone.
    """
    home, _, name = str(bento["path"]).rstrip("/").rpartition("/")
    if bento["form"] == "tar":
        archive = folder / "bento.tar"
        archive.write_bytes(ObjectStore(home).read(name))
        target = folder / "bento"
        with tarfile.open(archive) as tar:
            tar.extractall(target, filter="data")
        archive.unlink()
    else:
        target, store = folder / "bento", ObjectStore(str(bento["path"]))
        for file in store.find(""):
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            (target / file).write_bytes(store.read(file))
    found = digest_of(target) if target.is_dir() else "nothing"
    if found != bento["digest"]:
        raise ArtifactIntegrityError(
            f"{bento['path']} is not the Bento that was built: {found}, built was {bento['digest']}; build it again"
        )
    return target


@dataclass(frozen=True, kw_only=True, slots=True)
class CloudRollout:
    """What serves now.

    :param state: ``serving``: the new version. ``rolled_back``: the one before it, as the new one did not become ready.
    :param endpoint_url: where it answers.
    :param console_url: where BentoCloud shows it.
    :param serving_version: that answers.
    :param previous_version: the version before the one that answers; ``None`` at the first deployment, and for an attempt
        that goes on with one that was lost.
    :param deployment_uid: BentoCloud's name for the deployment: one that was deleted and made again has another.
    :param revision: BentoCloud's name for this state of the deployment.
    :param started: whether there was no such deployment.
    :param restore_seconds: that it took to see the former version serve again.
    :param reason: why the new version was taken back.
    """

    state: Literal["serving", "rolled_back"]
    endpoint_url: str
    console_url: str
    serving_version: str
    previous_version: str | None
    deployment_uid: str
    revision: str
    seconds: float
    started: bool
    restore_seconds: float | None = None
    reason: str = ""


def roll_out(
    cloud: BentoCloud,
    endpoint: CloudEndpoint,
    bento: Path,
    *,
    variables: Mapping[str, str],
    poll_seconds: float = 10.0,
) -> CloudRollout:
    """Push, deploy and wait until the service itself says that it serves the version; the former one answers until then.

    What is there already stays, so a retry goes on where a killed task was.

    :param bento: its folder.
    :param variables: of the service, for the secret that the endpoint names.
    :returns: which version serves: the new one, or the former one when the new one did not become ready.
    :raises RolloutError: it did not, and there is no former one; or a deployment of this name serves something else.
    :raises ConnectionConfigError: BentoCloud does not know us, or does not let us do what this takes.
    """
    started = time.monotonic()
    cloud.require_access()
    before = cloud.find(endpoint.deployment)
    served = before.get_bento(refetch=False) if before is not None else ""
    if before is not None and served.partition(":")[0] != bento_name(endpoint.model_name):
        raise RolloutError(
            f"deployment {endpoint.deployment} is there and serves {served or 'nothing'}, which is no Bento of model "
            f"{endpoint.model_name!r}: delete it, or give another name in settings. Nothing was changed"
        )
    service = cloud.push(bento)
    if endpoint.secret is not None:
        cloud.keep_secret(endpoint.secret, variables)
    token = variables.get("AIRFLOW_MLOPS_ENDPOINT_TOKEN")
    rollout = _Rollout(cloud, endpoint, service, before, token, poll_seconds)
    taken_back = carry_out(rollout)
    now = rollout.now or rollout.found()
    return CloudRollout(
        state="rolled_back" if taken_back else "serving",
        endpoint_url=_url_of(now),
        console_url=now.admin_console,
        serving_version=taken_back.version if taken_back else endpoint.model_version,
        previous_version=_version_in(served) if rollout.former and not taken_back else None,
        deployment_uid=str(now._schema.uid),
        revision=_revision_of(now),
        seconds=time.monotonic() - started,
        started=before is None,
        restore_seconds=taken_back.seconds if taken_back else None,
        reason=taken_back.reason if taken_back else "",
    )


class _Rollout:
    """One attempt: what it found, what it asked for, and the way back.

    :param service: name of the service in the Bento.
    :param before: the deployment as it was found.
    """

    def __init__(
        self,
        cloud: BentoCloud,
        endpoint: CloudEndpoint,
        service: str,
        before: Deployment | None,
        token: str | None,
        poll_seconds: float,
    ) -> None:
        self.cloud, self.endpoint, self.before = cloud, endpoint, before
        self.token, self.poll_seconds = token, poll_seconds
        self.where = endpoint.deployment
        self.what = f"version {endpoint.model_version} of {endpoint.model_name}"
        #: What served before, as it can be asked for again; empty where that is nothing, or not known any more.
        self.former: dict[str, Any] = {}
        #: The deployment when it was seen to serve.
        self.now: Deployment | None = None
        self._wanted = endpoint.config(service)
        #: What the service has to say of itself: its version, and which deployment it was started for.
        self._awaited = (endpoint.model_version, _started_for(self._wanted))
        self._asking = False
        self._asked: str | None = None
        self._undone: str | None = None

    def ask(self) -> None:
        """Ask for the version, unless an attempt before has."""
        before = self.before
        asked_before = before is not None and _says(before, self._wanted)
        if before is not None and not asked_before:
            self.former = config_of(before)
        if before is not None and asked_before and before.get_status(refetch=False).status not in _FAILED:
            log.info("%s was asked for already", self.endpoint.tag)
            self._asked = _revision_of(before)
            return
        self._asking = True  # the answer may get lost
        self._asked = _revision_of(self.cloud.apply(self._wanted, before))

    def settle(self) -> None:
        """Do nothing: BentoCloud has all of it."""

    def found(self) -> Deployment:
        """Read the deployment again."""
        found = self.cloud.find(self.endpoint.deployment)
        if found is None:
            raise RolloutError(f"deployment {self.endpoint.deployment} was deleted meanwhile")
        return found

    def wait(self) -> None:
        """Wait until the service says that it serves what was asked for last.

        :raises NotReadyError: it does not; says what is known.
        :raises RolloutError: the deployment is not asked to be this any more.
        """
        deadline = time.monotonic() + self.endpoint.ready_seconds
        said, failures, answers = "", 0, 0
        while True:
            try:
                status, reason = self._look()
            except TransientError as err:
                log.warning("%s; looking again", err)
                status, reason = "unknown", str(err)
            if status == "ready":
                return
            # Not at the first look: that may still be about what was there before.
            answers = answers + 1 if status == "answers" else 0
            if answers >= _LOOKS:
                return
            failures = failures + 1 if status in _FAILED else 0
            if failures >= _LOOKS:
                raise NotReadyError(self._explained(f"BentoCloud says {reason}"))
            if reason != said:
                log.info("%s: %s", self.endpoint.deployment, reason)
                said = reason
            if time.monotonic() > deadline:
                raise NotReadyError(
                    self._explained(
                        f"after {self.endpoint.ready_seconds:.0f} s (ready_seconds) BentoCloud says {reason}"
                    )
                )
            time.sleep(self.poll_seconds)

    def undo(self) -> str | None:
        """Ask for what was there before again, unless somebody else has deployed since.

        :returns: the version that is asked for now; ``None`` where none is known to have served.
        """
        if not self._asking:
            return None
        if self._undone is not None:
            return self._undone
        found = self.cloud.find(self.endpoint.deployment)
        if found is None:
            return None
        if not self._is_asked_for(found):
            return self._accept(found)  # theirs, not asked for, or put back already
        if not self.former:
            return None
        return self._accept(self.cloud.apply(self.former, found))

    def _is_asked_for(self, found: Deployment) -> bool:
        if self._asked is not None:
            return _revision_of(found) == self._asked
        news = self.before is None or _revision_of(found) != _revision_of(self.before)
        return news and _says(found, self._wanted)

    def _accept(self, found: Deployment) -> str | None:
        """Wait for what a deployment is asked to be from here on."""
        self._asked = _revision_of(found)
        version = _version_in(found.get_bento(refetch=False))
        self._awaited = (version or "", _started_for(config_of(found)))
        self._undone = version
        return version

    def _look(self) -> tuple[str, str]:
        """Say how far it is, and a sentence.

        :returns: ``ready``; ``answers`` where the service can't tell which deployment it was started for; or BentoCloud's word.
        """
        found = self.found()
        if self._asked and _revision_of(found) != self._asked:
            raise RolloutError(
                f"{self.what} does not serve in {self.where}: meanwhile {found.get_bento(refetch=False)} was asked for, not by "
                "this task. It was left as it is"
            )
        status = found.get_status(refetch=False).status
        if status not in _RUNNING:
            return status, repr(status)
        url = _url_of(found)
        if not url:
            return status, f"{status!r}, and no address yet"
        try:
            with EndpointClient(url, self.token, timeout_seconds=_ANSWER_SECONDS, trust_env=True) as client:
                told = client.ready()
        except (EndpointUnavailableError, ValueError) as err:
            return status, f"{status!r}, but {err}"
        version, started_for = self._awaited
        if str(told.get("model_version")) != version:
            return status, f"{status!r}, but version {told.get('model_version')} answers"
        if started_for is None or "deployment" not in told:
            self.now = found
            return "answers", f"version {version} answers, of this deployment or the one before"
        if told["deployment"] != started_for:
            return status, f"{status!r}, but what answers was started for the deployment before"
        self.now = found
        return "ready", f"version {version} answers"

    def _explained(self, reason: str) -> str:
        troubles = self.cloud.why_not_ready(self.endpoint.deployment)
        return f"{reason} ({troubles})" if troubles else reason


def _says(found: Deployment, wanted: Mapping[str, Any]) -> bool:
    """Tell whether a deployment is asked to be this."""
    config = config_of(found)
    services = config.get("services") or {}
    return (
        config.get("bento") == wanted["bento"]
        and sorted(config.get("secrets") or ()) == sorted(wanted["secrets"])
        and sorted(config.get("envs") or (), key=str) == sorted(wanted["envs"], key=str)
        and all(
            (services.get(name) or {}).get(key) == value
            for name, service in wanted["services"].items()
            for key, value in service.items()
        )
    )


def _started_for(config: Mapping[str, Any]) -> str | None:
    """Read what a service that was started with this tells about it."""
    return next((one["value"] for one in config.get("envs") or () if one["name"] == _DEPLOYMENT), None)


def _url_of(found: Deployment) -> str:
    from bentoml.exceptions import BentoMLException

    try:
        return str(found.get_endpoint_urls(refetch=False)[0])
    except BentoMLException:
        return ""


def _revision_of(found: Deployment) -> str:
    revision = found._schema.latest_revision
    return str(revision.uid) if revision is not None else ""


def _version_in(tag: str) -> str | None:
    """Read the model's version from a Bento's tag: ``name:version-digest``."""
    return tag.partition(":")[2].rpartition("-")[0] or None
