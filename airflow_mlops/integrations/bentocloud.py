"""BentoCloud, by BentoML's own client: push a Bento, keep a secret, read and apply a deployment."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from airflow_mlops.core.codec import canonical_json
from airflow_mlops.exceptions import ArtifactIntegrityError, ConnectionConfigError, TransientError
from airflow_mlops.integrations.bentoml_build import digest_of
from airflow_mlops.integrations.kubernetes_manifests import object_name
from airflow_mlops.integrations.object_store import ObjectStore

if TYPE_CHECKING:
    from bentoml._internal.cloud.deployment import Deployment

log = logging.getLogger(__name__)

#: Variable of the service that ``/status`` tells: a digest of what it was started with.
_DEPLOYMENT = "AIRFLOW_MLOPS_DEPLOYMENT"

_REQUEST_SECONDS = 60


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


def started_for(config: Mapping[str, Any]) -> str | None:
    """Read what a service that was started with this tells about it."""
    return next((one["value"] for one in config.get("envs") or () if one["name"] == _DEPLOYMENT), None)


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
