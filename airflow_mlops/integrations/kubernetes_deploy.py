"""Kubernetes: apply what a model's service needs, see it become ready, or put back what served before."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from airflow_mlops.exceptions import ConnectionConfigError, RolloutError, TransientError
from airflow_mlops.integrations.kubernetes_manifests import (
    ACTOR,
    TEMPLATE,
    VERSION,
    KubernetesEndpoint,
    Manifest,
    annotation_of_template,
    former_of,
    is_ours,
    progress_of,
    template_of,
)

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

log = logging.getLogger(__name__)

#: What the API server has to allow in the namespace, by group and resource; ``deploy/kubernetes/deploy-role.yaml`` grants exactly this.
RIGHTS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("", "services"): ("create", "patch"),
    ("", "secrets"): ("create",),
    ("", "pods"): ("list",),
    ("apps", "deployments"): ("create", "get", "patch"),
    ("apps", "replicasets"): ("list",),
    ("autoscaling", "horizontalpodautoscalers"): ("create", "patch"),
    ("policy", "poddisruptionbudgets"): ("create", "patch"),
}

_PLURALS = {
    "Deployment": "deployments",
    "Service": "services",
    "Secret": "secrets",
    "HorizontalPodAutoscaler": "horizontalpodautoscalers",
    "PodDisruptionBudget": "poddisruptionbudgets",
}

_ROLE = "the rules of deploy/kubernetes/deploy-role.yaml"

_MANAGER = "airflow-mlops"

_REQUEST_SECONDS = 30.0

#: How often an undo is tried while the cluster's own controllers write to the same object.
_UNDO_ATTEMPTS = 20


class Cluster:
    """A namespace of a cluster, as far as a model's service needs it.

    :param api: the client, as whoever may deploy.
    :param namespace: of all objects.
    :param conn_id: of the connection, for messages.
    """

    def __init__(self, api: ApiClient, namespace: str, conn_id: str) -> None:
        self.api, self.namespace, self.conn_id = api, namespace, conn_id

    def require_rights(self) -> None:
        """Say now what would fail later, when the old version is half replaced.

        :raises ConnectionConfigError: with every verb that is missing.
        """
        missing = []
        for (group, resource), verbs in RIGHTS.items():
            for verb in verbs:
                asked = {"namespace": self.namespace, "verb": verb, "group": group, "resource": resource}
                review = {
                    "apiVersion": "authorization.k8s.io/v1",
                    "kind": "SelfSubjectAccessReview",
                    "spec": {"resourceAttributes": asked},
                }
                path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
                if not self._call("POST", path, body=review)["status"]["allowed"]:
                    missing.append(f"{verb} {resource}")
        if missing:
            raise ConnectionConfigError(
                f"connection {self.conn_id!r} may not {', '.join(missing)} in namespace {self.namespace!r}: give its service "
                f"account {_ROLE}. Nothing was changed"
            )

    def apply(self, manifest: Manifest) -> Manifest:
        """Make an object what a manifest says, by server-side apply; unknown fields are refused."""
        query = [("fieldManager", _MANAGER), ("force", "true"), ("fieldValidation", "Strict")]
        path = self._path(manifest["apiVersion"], _PLURALS[manifest["kind"]], manifest["metadata"]["name"])
        return self._call("PATCH", path, query, manifest, content="application/apply-patch+yaml")

    def create(self, manifest: Manifest) -> None:
        """Create an object that never changes; it may be there already."""
        path = self._path(manifest["apiVersion"], _PLURALS[manifest["kind"]])
        with contextlib.suppress(_ConflictError):
            self._call("POST", path, [("fieldValidation", "Strict")], manifest)

    def deployment(self, name: str) -> Manifest | None:
        """Read a Deployment; ``None`` when there is none."""
        try:
            return self._call("GET", self._path("apps/v1", "deployments", name))
        except LookupError:
            return None

    def replica_sets(self, deployment: Manifest, selector: Mapping[str, str]) -> list[Manifest]:
        """List the ReplicaSets of a Deployment."""
        uid = deployment["metadata"]["uid"]
        found: list[Manifest] = self._list("apps/v1", "replicasets", selector)
        return [
            one
            for one in found
            if uid in {owner["uid"] for owner in one["metadata"].get("ownerReferences") or ()}
        ]

    def why_not_ready(self, selector: Mapping[str, str], version: str) -> str:
        """Say what keeps a version's pods from being ready, as far as they know."""
        told = set()
        for pod in self._list("v1", "pods", selector):
            if (pod["metadata"].get("annotations") or {}).get(VERSION) == version:
                told |= set(_troubles(pod))
        return "; ".join(sorted(told)[:3])

    def _list(self, version: str, plural: str, selector: Mapping[str, str]) -> list[Manifest]:
        labels = ",".join(f"{key}={value}" for key, value in selector.items())
        items: list[Manifest] = self._call("GET", self._path(version, plural), [("labelSelector", labels)])[
            "items"
        ]
        return items

    def _path(self, version: str, plural: str, name: str | None = None) -> str:
        root = "/apis" if "/" in version else "/api"
        return "/".join(filter(None, (root, version, "namespaces", self.namespace, plural, name)))

    def _call(
        self,
        method: str,
        path: str,
        query: Sequence[tuple[str, str]] = (),
        body: Manifest | None = None,
        *,
        content: str = "application/json",
    ) -> Manifest:
        headers = {"Accept": "application/json", "Content-Type": content}
        with self._errors():
            response = self.api.call_api(
                path,
                method,
                query_params=list(query),
                header_params=headers,
                body=body,
                auth_settings=["BearerToken"],
                _preload_content=False,  # the client's classes drop what they don't know
                _return_http_data_only=True,
                _request_timeout=_REQUEST_SECONDS,
            )
            answer: Manifest = json.loads(response.data)
        return answer

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Translate what the API server answers."""
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        try:
            yield
        except HTTPError as err:
            raise TransientError(f"the cluster of {self.conn_id!r} can't be reached: {err}") from err
        except ApiException as err:
            raise self._translated(err) from err

    def _translated(self, err: Any) -> Exception:
        said = _said(err)
        if err.status == 401:
            return ConnectionConfigError(f"the cluster does not know connection {self.conn_id!r}: {said}")
        if err.status == 403:
            return ConnectionConfigError(f"the cluster refuses: {said}; give the service account {_ROLE}")
        if err.status == 404 and said.startswith("namespaces "):
            return ConnectionConfigError(f"{said}: name one that is there, in the operator or the connection")
        if err.status == 404:
            return LookupError(said)
        if err.status == 409:
            return _ConflictError(said)
        if err.status in (400, 422):
            return ValueError(f"the cluster refuses what was to be applied: {said}")
        return TransientError(f"the cluster of {self.conn_id!r} failed: {said}")


class _ConflictError(TransientError):
    """Somebody else wrote the object first, or it is there already."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolledOut:
    """What serves now.

    :param state: ``serving``: the new version. ``rolled_back``: the one before it, as the new one did not become ready.
    :param serving_version: that answers.
    :param previous_version: the version before the one that answers; ``None`` at the first deployment.
    :param revision: of the Deployment.
    :param started: whether there was no such service.
    :param restore_seconds: that it took to see the former version serve again.
    :param reason: why the new version was taken back.
    """

    state: Literal["serving", "rolled_back"]
    serving_version: str
    previous_version: str | None
    revision: int
    seconds: float
    started: bool
    restore_seconds: float | None = None
    reason: str = ""


def roll_out(
    cluster: Cluster,
    endpoint: KubernetesEndpoint,
    *,
    actor: str,
    secret: Manifest | None = None,
    poll_seconds: float = 2.0,
) -> RolledOut:
    """Apply all objects and wait until every pod is of the new version and ready; the old pods answer until then.

    What is there already stays, so a retry goes on where a killed task was.

    :param secret: that the endpoint's variables are in.
    :returns: which version serves: the new one, or the former one when the new one did not become ready.
    :raises RolloutError: it did not, and there is no former one; or a Deployment of this name is not ours.
    :raises ConnectionConfigError: the cluster does not know us, or does not let us do what this takes.
    """
    started = time.monotonic()
    cluster.require_rights()
    before = cluster.deployment(endpoint.name)
    if before is not None and not is_ours(before, endpoint.model_name):
        raise RolloutError(
            f"Deployment {endpoint.namespace}/{endpoint.name} is there and was not made for model {endpoint.model_name!r} by "
            "this operator: delete it, or deploy to another namespace. Nothing was changed"
        )
    if secret is not None:
        cluster.create(secret)
    try:
        for manifest in (
            endpoint.service(),
            endpoint.disruption_budget(),
            endpoint.deployment(actor=actor),
            endpoint.autoscaler(),
        ):
            if manifest is not None:
                cluster.apply(manifest)
        revision = _wait(cluster, endpoint, poll_seconds)
    except _NotReadyError as err:
        return _take_back(cluster, endpoint, actor, str(err), started, poll_seconds)
    except BaseException:
        # The task ends: there is no time to look, but what served has not gone yet and need only be asked for again.
        with contextlib.suppress(Exception):
            _undo(cluster, endpoint, actor)
        raise
    return RolledOut(
        state="serving",
        serving_version=endpoint.model_version,
        previous_version=_previous_version(cluster, endpoint),
        revision=revision,
        seconds=time.monotonic() - started,
        started=before is None,
    )


class _NotReadyError(Exception):
    pass


def _wait(cluster: Cluster, endpoint: KubernetesEndpoint, poll_seconds: float) -> int:
    """Wait until the rollout is done.

    :returns: the Deployment's revision.
    :raises _NotReadyError: it failed; says why.
    """
    # The cluster says itself when there is no progress; this is for a cluster that says nothing.
    deadline = time.monotonic() + endpoint.progress_seconds * (endpoint.maximum + 1) + 60.0
    said = ""
    while True:
        try:
            found = cluster.deployment(endpoint.name)
        except _ConflictError:
            raise
        except TransientError as err:
            log.warning("%s; looking again", err)
            found = None
            reason = str(err)
        else:
            if found is None:
                raise RolloutError(f"Deployment {endpoint.namespace}/{endpoint.name} was deleted meanwhile")
            progress = progress_of(found)
            reason = progress.reason
            if progress.status == "done":
                return int(found["metadata"]["annotations"]["deployment.kubernetes.io/revision"])
            if progress.status == "failed":
                raise _NotReadyError(_explained(cluster, endpoint, reason))
        if reason != said:
            log.info("%s/%s: %s", endpoint.namespace, endpoint.name, reason)
            said = reason
        if time.monotonic() > deadline:
            raise _NotReadyError(_explained(cluster, endpoint, reason))
        time.sleep(poll_seconds)


def _explained(cluster: Cluster, endpoint: KubernetesEndpoint, reason: str) -> str:
    troubles = cluster.why_not_ready(endpoint.selector, endpoint.model_version)
    return f"{reason} ({troubles})" if troubles else reason


def _take_back(
    cluster: Cluster,
    endpoint: KubernetesEndpoint,
    actor: str,
    why: str,
    started: float,
    poll_seconds: float,
) -> RolledOut:
    """Put back what served before and see it serve."""
    begun = time.monotonic()
    where = f"{endpoint.namespace}/{endpoint.name}"
    what = f"version {endpoint.model_version} of {endpoint.model_name} did not become ready in {where}: {why}"
    version = _undo(cluster, endpoint, actor)
    if version is None:
        raise RolloutError(f"{what}. Nothing served before; it was left as it is, to be looked at")
    try:
        revision = _wait(cluster, endpoint, poll_seconds)
    except _NotReadyError as err:
        raise RolloutError(
            f"{what}. Version {version} was asked for again, and is not wholly ready either: {err}"
        ) from err
    return RolledOut(
        state="rolled_back",
        serving_version=version,
        previous_version=None,
        revision=revision,
        seconds=time.monotonic() - started,
        started=False,
        restore_seconds=time.monotonic() - begun,
        reason=what,
    )


def _undo(cluster: Cluster, endpoint: KubernetesEndpoint, actor: str) -> str | None:
    """Ask for the template of the former ReplicaSet again, unless somebody else has deployed since.

    :returns: the version that serves; ``None`` where there is no former one.
    """
    template = endpoint.template()["metadata"]["annotations"][TEMPLATE]
    for _ in range(_UNDO_ATTEMPTS):
        found = cluster.deployment(endpoint.name)
        if found is None:
            return None
        if (found["metadata"].get("annotations") or {}).get(ACTOR) != actor:
            return annotation_of_template(found, VERSION)  # theirs
        if annotation_of_template(found, TEMPLATE) != template:
            return annotation_of_template(found, VERSION)  # not applied, or put back already
        former = former_of(cluster.replica_sets(found, endpoint.selector), template)
        if former is None:
            return None
        manifest = endpoint.deployment(actor=actor, template=template_of(former))
        # Only if nobody has written since: the cluster's controllers do, with every pod that changes.
        manifest["metadata"]["resourceVersion"] = found["metadata"]["resourceVersion"]
        try:
            cluster.apply(manifest)
        except _ConflictError:
            continue
        return annotation_of_template(former, VERSION)
    raise TransientError(
        f"{endpoint.namespace}/{endpoint.name} changes all the time and can't be put back: kubectl rollout undo deployment "
        f"{endpoint.name} does it"
    )


def _previous_version(cluster: Cluster, endpoint: KubernetesEndpoint) -> str | None:
    found = cluster.deployment(endpoint.name)
    template = endpoint.template()["metadata"]["annotations"][TEMPLATE]
    former = former_of(cluster.replica_sets(found, endpoint.selector), template) if found else None
    return annotation_of_template(former, VERSION) if former else None


def _troubles(pod: Manifest) -> Iterator[str]:
    status = pod.get("status") or {}
    for condition in status.get("conditions") or ():
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            yield f"not scheduled: {condition.get('message', condition.get('reason', ''))}"
    for container in status.get("containerStatuses") or ():
        waiting = container["state"].get("waiting") or {}
        ended = container["state"].get("terminated") or (container.get("lastState") or {}).get("terminated")
        if waiting.get("reason") not in (None, "ContainerCreating"):
            yield f"{waiting['reason']}: {waiting.get('message', '')}".rstrip(": ")
        if ended:
            yield f"its container ended with {ended['exitCode']} ({ended.get('reason', '')})"
        elif "running" in container["state"] and not container["ready"]:
            yield "its container runs and is not ready: /readyz does not answer 200; kubectl logs says why"


def _said(err: Any) -> str:
    """Give the API server's own sentence."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return str(json.loads(err.body)["message"])
    return f"{err.status} {err.reason}"
