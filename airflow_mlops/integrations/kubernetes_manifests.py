"""Kubernetes manifests of a model service, and what a Deployment's status says; plain values, no cluster."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from airflow_mlops.core.codec import canonical_json
from airflow_mlops.core.names import distinct
from airflow_mlops.integrations.rollout import Progress

Manifest = dict[str, Any]

#: Annotations of the pods' template: what they serve; and a digest of all that we asked for, by which its ReplicaSet is found.
VERSION, PACKAGE, TEMPLATE = (
    "airflow-mlops/model-version",
    "airflow-mlops/package-digest",
    "airflow-mlops/template",
)
#: Annotations of the Deployment: which model it is of, and who deployed last.
MODEL, ACTOR = "airflow-mlops/model", "airflow-mlops/deployed-by"

MANAGED_BY = "app.kubernetes.io/managed-by"
_OURS = "airflow-mlops"

PORT = 3000
#: Seconds in which load balancers learn that a pod which is to end takes no more requests.
_GOODBYE_SECONDS = 5
#: User of the images BentoML's Dockerfile makes; a number, because a kubelet can't tell whether a name is root.
_USER = 1034


def _restricted() -> Manifest:
    return {
        "runAsNonRoot": True,
        "runAsUser": _USER,
        "runAsGroup": _USER,
        "fsGroup": _USER,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class KubernetesEndpoint:
    """A model's service in a cluster: one Deployment with a Service, an autoscaler and a disruption budget, all of one name.

    Sizes are Kubernetes quantities. The defaults satisfy the Pod Security Standard *restricted*.

    :param model_name: registered model; gives the name.
    :param model_version: that the image serves.
    :param package_digest: of that version.
    :param image: built from the version's Bento.
    :param namespace: of all objects.
    :param minimum: of pods.
    :param maximum: of pods; the same as ``minimum`` is a fixed number.
    :param cpu: what is set aside for a pod; the autoscaler measures against it.
    :param memory: what is set aside for a pod, and the most it may have.
    :param target_cpu: share of ``cpu`` in use, in percent, above which there are more pods.
    :param secret: name of the secret with the service's variables; ``None``: it has none.
    :param variables: names in the secret, each a variable of the service.
    :param env: variables that anybody may read.
    :param env_secrets: names of secrets of yours that are in the namespace, all of whose keys become variables: credentials of a store,
        the key of pseudonyms. A change of one does not replace the pods.
    :param pull_secrets: names of secrets for the image's registry.
    :param node_selector: labels a node must have.
    :param service_account: of the pods; no token of it is put into them.
    :param progress_seconds: without a further pod that is ready a rollout has failed.
    :param grace_seconds: in which a pod that is to end answers what it has accepted.
    """

    model_name: str
    model_version: str
    package_digest: str
    image: str
    namespace: str
    minimum: int = 2
    maximum: int = 4
    cpu: str = "500m"
    memory: str = "1Gi"
    target_cpu: int = 70
    secret: str | None = None
    variables: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    env_secrets: tuple[str, ...] = ()
    pull_secrets: tuple[str, ...] = ()
    node_selector: Mapping[str, str] = field(default_factory=dict)
    service_account: str | None = None
    progress_seconds: int = 300
    grace_seconds: int = 45

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.maximum:
            raise ValueError(
                f"from {self.minimum} to {self.maximum} pods: give at least one, and no fewer at most than at least"
            )

    @property
    def name(self) -> str:
        """Name of all objects, and of the service inside the cluster."""
        return object_name(self.model_name)

    @property
    def url(self) -> str:
        """Address of the service inside the cluster."""
        return f"http://{self.name}.{self.namespace}.svc"

    @property
    def selector(self) -> dict[str, str]:
        """Labels of its pods, which never change."""
        return {"app.kubernetes.io/name": "model-endpoint", "app.kubernetes.io/instance": self.name}

    def template(self) -> Manifest:
        """Give the pods' template."""
        spec: Manifest = {
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": _restricted(),
            "terminationGracePeriodSeconds": self.grace_seconds + _GOODBYE_SECONDS,
            "topologySpreadConstraints": [
                {
                    "maxSkew": 1,
                    "topologyKey": "kubernetes.io/hostname",
                    "whenUnsatisfiable": "ScheduleAnyway",
                    "labelSelector": {"matchLabels": self.selector},
                }
            ],
            "containers": [self._container()],
            "volumes": [{"name": name, "emptyDir": {}} for name in ("serving", "tmp")],
        }
        if self.node_selector:
            spec["nodeSelector"] = dict(self.node_selector)
        if self.pull_secrets:
            spec["imagePullSecrets"] = [{"name": name} for name in self.pull_secrets]
        if self.service_account:
            spec["serviceAccountName"] = self.service_account
        annotations = {VERSION: self.model_version, PACKAGE: self.package_digest}
        digest = hashlib.sha256(canonical_json([annotations, spec]).encode()).hexdigest()
        metadata = {"labels": self.selector, "annotations": annotations | {TEMPLATE: digest[:32]}}
        return {"metadata": metadata, "spec": spec}

    def deployment(self, *, actor: str, template: Manifest | None = None) -> Manifest:
        """Give the Deployment; without a number of pods, which is the autoscaler's.

        :param actor: who deploys.
        :param template: of the pods, when it is to be another than this version's.
        """
        wanted: Manifest = {
            "selector": {"matchLabels": self.selector},
            # Never fewer than before: what serves goes only when something in its place is ready.
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
            "progressDeadlineSeconds": self.progress_seconds,
            "revisionHistoryLimit": 5,
            "template": template or self.template(),
        }
        made = self._object("apps/v1", "Deployment", wanted)
        made["metadata"]["annotations"] = {MODEL: self.model_name, ACTOR: actor}
        return made

    def size(self, pods: int) -> Manifest:
        """Give the Deployment's number of pods and nothing else of it."""
        metadata = {"name": self.name, "namespace": self.namespace}
        return {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": metadata,
            "spec": {"replicas": pods},
        }

    def service(self) -> Manifest:
        """Give the Service: one address for all pods that are ready."""
        port = {"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP"}
        return self._object("v1", "Service", {"selector": self.selector, "ports": [port]})

    def autoscaler(self) -> Manifest:
        """Give the HorizontalPodAutoscaler; a fixed number of pods is its as well, so that it can change either way."""
        target = {"type": "Utilization", "averageUtilization": self.target_cpu}
        wanted = {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": self.name},
            "minReplicas": self.minimum,
            "maxReplicas": self.maximum,
            "metrics": [{"type": "Resource", "resource": {"name": "cpu", "target": target}}],
        }
        return self._object("autoscaling/v2", "HorizontalPodAutoscaler", wanted)

    def disruption_budget(self) -> Manifest:
        """Give the PodDisruptionBudget: nodes are drained one pod at a time."""
        wanted = {"maxUnavailable": 1, "selector": {"matchLabels": self.selector}}
        return self._object("policy/v1", "PodDisruptionBudget", wanted)

    def _container(self) -> Manifest:
        # The root is read-only; what the service writes goes into the two volumes.
        plain = {
            "AIRFLOW_MLOPS_SERVING_DIR": "/serving",
            "BENTOML_HOME": "/tmp/bentoml",  # noqa: S108 - of the container
            "BENTOML_PORT": str(PORT),
            "HOME": "/tmp",  # noqa: S108 - of the container
            **self.env,
        }
        env: list[Manifest] = [{"name": name, "value": value} for name, value in plain.items()]
        env += [
            {"name": name, "valueFrom": {"secretKeyRef": {"name": self.secret, "key": name}}}
            for name in self.variables
        ]
        container: Manifest = {
            "name": "endpoint",
            "image": self.image,
            "ports": [{"name": "http", "containerPort": PORT, "protocol": "TCP"}],
            "env": env,
            "resources": {
                "requests": {"cpu": self.cpu, "memory": self.memory},
                "limits": {"memory": self.memory},
            },
            "startupProbe": _probe("/livez", every=2, failures=60),
            "livenessProbe": _probe("/livez", every=10, failures=3),
            "readinessProbe": _probe("/readyz", every=2, failures=2),
            "lifecycle": {"preStop": {"sleep": {"seconds": _GOODBYE_SECONDS}}},
            "securityContext": {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
                "readOnlyRootFilesystem": True,
            },
            "volumeMounts": [
                {"name": "serving", "mountPath": "/serving"},
                {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - of the container
            ],
        }
        if self.env_secrets:
            container["envFrom"] = [{"secretRef": {"name": name}} for name in self.env_secrets]
        return container

    def _object(self, version: str, kind: str, spec: Manifest) -> Manifest:
        labels = self.selector | {MANAGED_BY: _OURS}
        metadata = {"name": self.name, "namespace": self.namespace, "labels": labels}
        return {"apiVersion": version, "kind": kind, "metadata": metadata, "spec": spec}


def secret_of(namespace: str, model_name: str, values: Mapping[str, str]) -> Manifest:
    """Give a secret that never changes: other values are another secret, so that they are rolled out, and taken back, as images are.

    :param values: variables of the service.
    """
    name = secret_name(model_name, values)
    metadata = {"name": name, "namespace": namespace, "labels": {MANAGED_BY: _OURS}}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": metadata,
        "immutable": True,
        "stringData": dict(values),
    }


def secret_name(model_name: str, values: Mapping[str, str]) -> str:
    """Give the name of the secret with these values, by which whoever sees it can check a guess at them.

    Its digest has 48 bits, and a salt that is the same everywhere: a random token stays unknown, one that people chose may not.
    """
    # Slow on purpose: a token that people chose could be guessed from a plain digest.
    salt = b"airflow-mlops kubernetes endpoint"
    digest = hashlib.scrypt(canonical_json(dict(values)).encode(), salt=salt, n=2**14, r=8, p=1, dklen=6)
    return f"{object_name(model_name)}-{digest.hex()}"


def object_name(model_name: str) -> str:
    """Give the name a model's objects have; two models never have the same.

    >>> object_name("taxi-fare"), object_name("Taxi_Fare"), object_name("taxi-fare-fe354d")
    ('model-taxi-fare', 'model-taxi-fare-fe354d', 'model-taxi-fare-fe354d-cba3a9')
    """
    plain = re.sub(r"[^a-z0-9]+", "-", model_name.lower()).strip("-")[:40].strip("-")
    return f"model-{distinct(plain, model_name)}"


def is_ours(found: Manifest, model_name: str) -> bool:
    """Tell whether a Deployment is this model's, made by us."""
    meta = found["metadata"]
    ours = (meta.get("labels") or {}).get(MANAGED_BY) == _OURS
    return ours and (meta.get("annotations") or {}).get(MODEL) == model_name


def actor_of(found: Manifest) -> str | None:
    """Tell who deployed last."""
    value: str | None = (found["metadata"].get("annotations") or {}).get(ACTOR)
    return value


def sets_replicas(found: Manifest, manager: str) -> bool:
    """Tell whether a field manager has applied a Deployment's number of pods: when it no longer does, that becomes 1."""
    return any(
        one.get("manager") == manager and "f:replicas" in (one.get("fieldsV1") or {}).get("f:spec", {})
        for one in found["metadata"].get("managedFields") or ()
    )


def annotation_of_template(found: Manifest, name: str) -> str | None:
    """Read an annotation of the pods' template of a Deployment or ReplicaSet."""
    value: str | None = (found["spec"]["template"].get("metadata", {}).get("annotations") or {}).get(name)
    return value


def progress_of(deployment: Manifest) -> Progress:
    """Read a Deployment's status.

    >>> progress_of({"metadata": {"generation": 2}, "spec": {"replicas": 1}, "status": {"observedGeneration": 1}})
    Progress(status='waiting', reason='the cluster has not looked at it yet')
    """
    status: Manifest = deployment.get("status") or {}
    if status.get("observedGeneration", 0) < deployment["metadata"].get("generation", 0):
        return Progress(status="waiting", reason="the cluster has not looked at it yet")
    conditions = {one["type"]: one for one in status.get("conditions") or ()}
    progressing, failure = conditions.get("Progressing", {}), conditions.get("ReplicaFailure", {})
    wanted = deployment["spec"].get("replicas", 1)
    total, updated, available = (
        status.get(name) or 0 for name in ("replicas", "updatedReplicas", "availableReplicas")
    )
    counted = f"{updated} of {wanted} pods are of the new version, {available} of {total} are available"
    if progressing.get("reason") == "ProgressDeadlineExceeded":
        why = failure.get("message") or progressing.get("message") or "no progress"
        return Progress(status="failed", reason=f"{counted}: {why}")
    if updated >= wanted and total <= updated and available >= updated:
        return Progress(status="done", reason=counted)
    return Progress(status="waiting", reason=counted)


def former_of(replica_sets: list[Manifest], template: str) -> Manifest | None:
    """Find what served before: of the other ReplicaSets the newest that still has pods that are ready, else the newest.

    :param replica_sets: of the Deployment.
    :param template: digest of the template that is not meant.
    """
    others = [one for one in replica_sets if annotation_of_template(one, TEMPLATE) != template]

    def rank(one: Manifest) -> tuple[bool, int]:
        revision = (one["metadata"].get("annotations") or {}).get("deployment.kubernetes.io/revision", "0")
        return bool((one.get("status") or {}).get("readyReplicas")), int(revision)

    return max(others, key=rank, default=None)


def template_of(replica_set: Manifest) -> Manifest:
    """Give a ReplicaSet's template as a Deployment has it."""
    template: Manifest = replica_set["spec"]["template"]
    meta = template.get("metadata") or {}
    labels = {key: value for key, value in (meta.get("labels") or {}).items() if key != "pod-template-hash"}
    return {
        "metadata": {"labels": labels, "annotations": dict(meta.get("annotations") or {})},
        "spec": template["spec"],
    }


def _probe(path: str, *, every: int, failures: int) -> Manifest:
    return {
        "httpGet": {"path": path, "port": "http"},
        "periodSeconds": every,
        "timeoutSeconds": 2,
        "failureThreshold": failures,
    }
