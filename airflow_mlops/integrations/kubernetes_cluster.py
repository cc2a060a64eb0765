"""A Kubernetes cluster, as far as a model's service needs it: its objects, and its errors in our words."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from airflow_mlops.exceptions import ConnectionConfigError, TransientError
from airflow_mlops.integrations.kubernetes_manifests import VERSION, Manifest

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

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

#: Who applies the objects; and who, once, the number of pods, which from then on is whoever changes it: the autoscaler.
MANAGER, SIZE_MANAGER = "airflow-mlops", "airflow-mlops-size"

_REQUEST_SECONDS = 30.0


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

    def apply(self, manifest: Manifest, manager: str = MANAGER) -> Manifest:
        """Make an object what a manifest says, by server-side apply; unknown fields are refused."""
        query = [("fieldManager", manager), ("force", "true"), ("fieldValidation", "Strict")]
        path = self._path(manifest["apiVersion"], _PLURALS[manifest["kind"]], manifest["metadata"]["name"])
        return self._call("PATCH", path, query, manifest, content="application/apply-patch+yaml")

    def create(self, manifest: Manifest) -> None:
        """Create an object that never changes; it may be there already."""
        path = self._path(manifest["apiVersion"], _PLURALS[manifest["kind"]])
        with contextlib.suppress(ConflictError):
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
            return ConflictError(said)
        if err.status in (400, 422):
            return ValueError(f"the cluster refuses what was to be applied: {said}")
        return TransientError(f"the cluster of {self.conn_id!r} failed: {said}")


class ConflictError(TransientError):
    """Somebody else wrote the object first, or it is there already."""


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
