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
    TEMPLATE,
    VERSION,
    KubernetesEndpoint,
    Manifest,
    Progress,
    actor_of,
    annotation_of_template,
    former_of,
    is_ours,
    progress_of,
    sets_replicas,
    template_of,
)
from airflow_mlops.integrations.way_back import NotReadyError, carry_out

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

#: Who applies the objects; and who, once, the number of pods, which from then on is whoever changes it: the autoscaler.
_MANAGER, _SIZE_MANAGER = "airflow-mlops", "airflow-mlops-size"

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

    def apply(self, manifest: Manifest, manager: str = _MANAGER) -> Manifest:
        """Make an object what a manifest says, by server-side apply; unknown fields are refused."""
        query = [("fieldManager", manager), ("force", "true"), ("fieldValidation", "Strict")]
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
    :param deployment_uid: of the Deployment: one that was deleted and made again, or of another cluster, has another.
    :param revision: of the Deployment.
    :param started: whether there was no such service.
    :param restore_seconds: that it took to see the former version serve again.
    :param reason: why the new version was taken back.
    """

    state: Literal["serving", "rolled_back"]
    serving_version: str
    previous_version: str | None
    deployment_uid: str
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
    rollout = _Rollout(cluster, endpoint, actor, before, poll_seconds)
    taken_back = carry_out(rollout)
    now = rollout.now
    return RolledOut(
        state="rolled_back" if taken_back else "serving",
        serving_version=taken_back.version if taken_back else endpoint.model_version,
        previous_version=None if taken_back else rollout.previous_version,
        deployment_uid=now["metadata"]["uid"],
        revision=int(now["metadata"]["annotations"]["deployment.kubernetes.io/revision"]),
        seconds=time.monotonic() - started,
        started=before is None,
        restore_seconds=taken_back.seconds if taken_back else None,
        reason=taken_back.reason if taken_back else "",
    )


class _Rollout:
    """One attempt: what it found, what it asks for, and the way back.

    :param before: the Deployment as it was found.
    """

    def __init__(
        self,
        cluster: Cluster,
        endpoint: KubernetesEndpoint,
        actor: str,
        before: Manifest | None,
        poll_seconds: float,
    ) -> None:
        self.cluster, self.endpoint, self.actor = cluster, endpoint, actor
        self.before, self.poll_seconds = before, poll_seconds
        self.where = f"{endpoint.namespace}/{endpoint.name}"
        self.what = f"version {endpoint.model_version} of {endpoint.model_name}"
        #: The Deployment when its rollout was seen done.
        self.now: Manifest = {}
        self.previous_version: str | None = None
        self._wanted = endpoint.template()["metadata"]["annotations"][TEMPLATE]
        self._asked_for = self._wanted
        self._applied = False

    def ask(self) -> None:
        """Ask for the version; the address first, which leads to whatever is ready."""
        self.cluster.apply(self.endpoint.service())
        if self.before is not None and sets_replicas(self.before, _MANAGER):
            self.cluster.apply(self.endpoint.size(self.before["spec"].get("replicas", 1)), _SIZE_MANAGER)
        self._applied = True  # the answer may get lost
        self.cluster.apply(self.endpoint.deployment(actor=self.actor))
        if self.before is None:
            self.cluster.apply(self.endpoint.size(self.endpoint.minimum), _SIZE_MANAGER)

    def settle(self) -> None:
        """Do what is left when the new pods serve: how many there are is changed for no version that may be taken back."""
        former = self.before
        if former is not None and annotation_of_template(former, TEMPLATE) == self._wanted:
            former = self._newest_other(self.now)
        self.previous_version = annotation_of_template(former, VERSION) if former else None
        self.cluster.apply(self.endpoint.disruption_budget())
        self.cluster.apply(self.endpoint.autoscaler())

    def wait(self) -> None:
        """Wait until the rollout of what was asked for last is done.

        :raises NotReadyError: it failed; says why.
        :raises RolloutError: the Deployment is not asked to be this any more.
        """
        # The cluster says itself when there is no progress; this is for a cluster that says nothing.
        pods = max(self.endpoint.maximum, self.before["spec"].get("replicas", 1) if self.before else 1)
        seconds = self.endpoint.progress_seconds * (pods + 1) + 60.0
        deadline = time.monotonic() + seconds
        said = ""
        while True:
            progress = self._look()
            if progress.status == "done":
                return
            if progress.status == "failed":
                raise NotReadyError(self._explained(progress.reason))
            if progress.reason != said:
                log.info("%s: %s", self.where, progress.reason)
                said = progress.reason
            if time.monotonic() > deadline:
                raise NotReadyError(self._explained(progress.reason))
            time.sleep(self.poll_seconds)

    def undo(self) -> str | None:
        """Ask for the template that was there before again, unless somebody else has deployed since.

        :returns: the version that is asked for now; ``None`` where none is known to have served.
        """
        if not self._applied:
            return annotation_of_template(self.before, VERSION) if self.before else None
        for _ in range(_UNDO_ATTEMPTS):
            found = self.cluster.deployment(self.endpoint.name)
            if found is None:
                return None
            asked_for = annotation_of_template(found, TEMPLATE)
            if actor_of(found) != self.actor or asked_for != self._wanted:
                self._asked_for = asked_for or ""
                return annotation_of_template(found, VERSION)  # theirs, not applied, or put back already
            former = self._former(found)
            if former is None or annotation_of_template(former, TEMPLATE) == self._wanted:
                return None
            manifest = self.endpoint.deployment(actor=self.actor, template=template_of(former))
            # Only if nobody has written since: the cluster's controllers do, with every pod that changes.
            manifest["metadata"]["resourceVersion"] = found["metadata"]["resourceVersion"]
            try:
                self.cluster.apply(manifest)
            except _ConflictError:
                continue
            self._asked_for = annotation_of_template(former, TEMPLATE) or ""
            return annotation_of_template(former, VERSION)
        raise TransientError(
            f"{self.where} changes all the time and can't be put back: kubectl rollout undo deployment "
            f"{self.endpoint.name} does it"
        )

    def _former(self, found: Manifest) -> Manifest | None:
        """Find what has the template that was there before this attempt.

        :returns: a Deployment or ReplicaSet; ``None`` where nothing was, or nobody knows.
        """
        if self.before is None:
            return None
        if annotation_of_template(self.before, TEMPLATE) != self._wanted:
            return self.before
        if actor_of(self.before) != self.actor or progress_of(self.before).status == "done":
            return None
        # An attempt of ours before this one was lost in the middle: what it found can only be guessed. Old pods go when new ones
        # are there in their place: where none is left, the rollout was over, and it is the number of pods that changes.
        former = self._newest_other(found)
        return former if former and (former.get("status") or {}).get("readyReplicas") else None

    def _newest_other(self, found: Manifest) -> Manifest | None:
        return former_of(self.cluster.replica_sets(found, self.endpoint.selector), self._wanted)

    def _look(self) -> Progress:
        try:
            found = self.cluster.deployment(self.endpoint.name)
        except TransientError as err:
            log.warning("%s; looking again", err)
            return Progress(status="waiting", reason=str(err))
        if found is None:
            raise RolloutError(f"Deployment {self.where} was deleted meanwhile")
        if annotation_of_template(found, TEMPLATE) != self._asked_for:
            version, by = annotation_of_template(found, VERSION), actor_of(found)
            who = f"by {by}" if by != self.actor else "not by this task: kubectl rollout undo, perhaps"
            raise RolloutError(
                f"{self.what} does not serve in {self.where}: meanwhile version {version} was asked for, {who}. "
                "It was left as it is"
            )
        self.now = found
        return progress_of(found)

    def _explained(self, reason: str) -> str:
        troubles = self.cluster.why_not_ready(self.endpoint.selector, self.endpoint.model_version)
        return f"{reason} ({troubles})" if troubles else reason


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
