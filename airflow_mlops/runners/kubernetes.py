"""Run a step in a pod of a Kubernetes cluster: another image, more memory, a GPU."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.codec import canonical_json

if TYPE_CHECKING:
    from airflow_mlops.runners.pods import StepPodOperator
    from airflow_mlops.services import Services

#: Where the container finds its spec. The result goes to where the provider's sidecar looks for it.
SPEC_FOLDER, SPEC_FILE = "/airflow-mlops/spec", "spec.json"

#: A Kubernetes secret holds 1 MiB, of which some is for credentials.
_LARGEST_SPEC = 1_000_000
RESULT_FILE = "/airflow/xcom/return.json"


def _no_root() -> dict[str, Any]:
    # A number, because a kubelet can't tell whether an image's user of some name is root.
    return {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}}


def _no_privileges() -> dict[str, Any]:
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


@dataclass(frozen=True, kw_only=True, slots=True)
class ResourceSpec:
    """What a step's pod may use, where it may run, and as whom.

    Sizes are Kubernetes quantities: ``"500m"``, ``"4"``, ``"16Gi"``. Mappings are as in a manifest. The defaults satisfy the
    Pod Security Standard *restricted*.

    :param cpu: what is set aside for the step; default what the namespace gives.
    :param memory: what is set aside for the step; default what the namespace gives.
    :param cpu_limit: beyond this it is throttled; default nothing.
    :param memory_limit: beyond this it is killed; default ``memory``, because a pod that takes more than it asked for is the
        first one to be evicted.
    :param gpus: number of whole GPUs.
    :param gpu_resource: what the cluster's device plugin calls them.
    :param node_selector: labels a node must have.
    :param tolerations: taints of nodes it may run on all the same.
    :param service_account: of the pod, not of Airflow; default the namespace's own. No token of it is put into the pod.
    :param priority_class: name of a PriorityClass.
    :param pull_secrets: names of secrets for the image's registry.
    :param pod_security: ``securityContext`` of the pod; default user 1000, never root.
    :param container_security: ``securityContext`` of each container; default no privileges and no way to them.
    """

    cpu: str | None = None
    memory: str | None = None
    cpu_limit: str | None = None
    memory_limit: str | None = None
    gpus: int = 0
    gpu_resource: str = "nvidia.com/gpu"
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Mapping[str, Any], ...] = ()
    service_account: str | None = None
    priority_class: str | None = None
    pull_secrets: tuple[str, ...] = ()
    pod_security: Mapping[str, Any] = field(default_factory=_no_root)
    container_security: Mapping[str, Any] = field(default_factory=_no_privileges)

    def of_container(self) -> dict[str, Any]:
        """Give ``resources`` of a container.

        >>> ResourceSpec(cpu="2", memory="8Gi", gpus=1).of_container()["limits"]
        {'memory': '8Gi', 'nvidia.com/gpu': '1'}
        """
        requests = {"cpu": self.cpu, "memory": self.memory}
        limits = {"cpu": self.cpu_limit, "memory": self.memory_limit or self.memory}
        if self.gpus:
            limits[self.gpu_resource] = str(self.gpus)  # which is also what is asked for
        return _given({"requests": _given(requests), "limits": _given(limits)})

    def of_pod(self) -> dict[str, Any]:
        """Give what the pod's spec says beside its containers."""
        return _given(
            {
                "nodeSelector": dict(self.node_selector),
                "tolerations": [dict(item) for item in self.tolerations],
                "serviceAccountName": self.service_account,
                "priorityClassName": self.priority_class,
                "imagePullSecrets": [{"name": name} for name in self.pull_secrets],
                "securityContext": dict(self.pod_security),
            }
        )


class KubernetesRunner:
    """Run ``python -m airflow_mlops.steps`` in a pod, by Airflow's ``KubernetesPodOperator``.

    Spec and credentials travel in a secret that belongs to the pod: whoever deletes the pod deletes it as well. The pod's log is
    the task's log; its result comes back through the provider's sidecar, which also keeps it for a retry when the task died
    meanwhile. A retry goes on with the running pod of the attempt before, if that is at work on the same thing.

    :param image: has ``airflow-mlops`` and the step's tools.
    :param resources: what the pod may use, and as whom it runs.
    :param namespace: default the connection's, else the one Airflow runs in, else ``default``.
    :param kubernetes_conn_id: how to reach the cluster; without such a connection, as Airflow's own pod or by ``~/.kube/config``.
    :param python: interpreter in the image.
    :param env: variables of the container that anybody may read, such as ``OMP_NUM_THREADS``.
    :param pod_template_file: a pod's manifest for everything that has no argument here: volumes, affinity, a registry's mirror.
    :param deferrable: wait in the triggerer, where a waiting task takes no worker's place.
    :param startup_timeout: how long the pod may wait for a node, and again for its image.
    :param timeout: how long the pod may run, also when no task is there any more to end it.
    :param grace_seconds: between asking the step to end and ending it.
    :param poll_seconds: how often the pod is looked at.
    """

    def __init__(
        self,
        *,
        image: str,
        resources: ResourceSpec | None = None,
        namespace: str | None = None,
        kubernetes_conn_id: str = "kubernetes_default",
        python: str = "python",
        env: Mapping[str, str] | None = None,
        pod_template_file: str | None = None,
        deferrable: bool = False,
        startup_timeout: timedelta = timedelta(minutes=10),
        timeout: timedelta = timedelta(days=1),
        grace_seconds: int = 10,
        poll_seconds: float = 2.0,
    ) -> None:
        self.image = image
        self.resources = resources or ResourceSpec()
        self.namespace = namespace
        self.kubernetes_conn_id = kubernetes_conn_id
        self.python = python
        self.env = dict(env or {})
        self.pod_template_file = pod_template_file
        self.deferrable = deferrable
        self.startup_timeout = startup_timeout
        self.timeout = timeout
        self.grace_seconds = grace_seconds
        self.poll_seconds = poll_seconds
        self._operator: StepPodOperator | None = None

    def run(self, name: str, spec: dict[str, Any], services: Services) -> dict[str, Any]:
        """Run the step there; an error of this package's tree is raised again here as what it was.

        With ``deferrable``, this ends in Airflow's ``TaskDeferred``, and :meth:`resume` gives the result.

        :raises ConnectionConfigError: the cluster does not know us, or does not let us do what this takes.
        :raises TransientError: the pod was taken away, or did not start in time.
        :raises ValueError: the image can't be pulled, or the cluster refuses the manifest.
        :raises RuntimeError: with the end of the step's log, when it failed otherwise.
        """
        from airflow_mlops.runners import pods

        credentials = services.to_environment()
        pod_name = f"{re.sub('[^a-z0-9]+', '-', name)}-{secrets.token_hex(6)}"
        work = canonical_json([name, spec, self.image, self.python, self.env, asdict(self.resources)])
        given = json.dumps(spec, allow_nan=False)
        if len(given) > _LARGEST_SPEC:
            raise ValueError(
                f"the spec of step {name!r} has {len(given):,} bytes, and a pod takes {_LARGEST_SPEC:,} from its secret: let this task run "
                "its step elsewhere (runner=InProcessRunner() or PythonRunner(...)), or give it less, such as fewer columns"
            )
        self._operator = self._pod_operator(
            name,
            manifest=self.manifest(name, pod_name, sorted(credentials)),
            work=hashlib.sha256(work.encode()).hexdigest()[:24],
            secret={**credentials, SPEC_FILE: given},
        )
        return pods.run(self._operator)

    def resume(self, event: Mapping[str, Any]) -> dict[str, Any]:
        """Take the result of the pod that the task was deferred for.

        :param event: what the trigger says.
        """
        from airflow_mlops.runners import pods

        self._operator = self._pod_operator(str(event[pods.STEP_OF_EVENT]))
        return pods.resume(self._operator, dict(event))

    def cancel(self) -> None:
        """Delete the pod, and with it the secret."""
        if self._operator is not None:
            self._operator.on_kill()

    def manifest(self, name: str, pod_name: str, variables: list[str]) -> dict[str, Any]:
        """Say what the pod is to be, without what the provider adds: the sidecar and labels of the task.

        :param name: the step's.
        :param pod_name: also the name of its secret.
        :param variables: names of the environment variables that are in the secret.
        """
        # Libraries ask who they are and where they may write; a bare user number has no answer to that.
        plain = {"HOME": "/tmp", "USER": "step", **self.env}  # noqa: S108 - of the container
        env: list[dict[str, Any]] = [{"name": key, "value": value} for key, value in plain.items()]
        env += [
            {"name": key, "valueFrom": {"secretKeyRef": {"name": pod_name, "key": key}}} for key in variables
        ]
        command = [self.python, "-m", "airflow_mlops.steps", name]
        command += ["--spec", f"{SPEC_FOLDER}/{SPEC_FILE}", "--result", RESULT_FILE]
        container = {
            "name": "base",
            "image": self.image,
            "command": command,
            "env": env,
            "resources": self.resources.of_container(),
            "securityContext": dict(self.resources.container_security),
            "volumeMounts": [{"name": "spec", "mountPath": SPEC_FOLDER, "readOnly": True}],
        }
        volume = {"secretName": pod_name, "items": [{"key": SPEC_FILE, "path": SPEC_FILE}]}
        spec = {
            **self.resources.of_pod(),
            "automountServiceAccountToken": False,
            "restartPolicy": "Never",
            "activeDeadlineSeconds": round(self.timeout.total_seconds()),
            "terminationGracePeriodSeconds": self.grace_seconds,
            "containers": [container],
            "volumes": [{"name": "spec", "secret": volume}],
        }
        return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": pod_name}, "spec": spec}

    def _pod_operator(self, name: str, **what: Any) -> StepPodOperator:
        from airflow_mlops.runners.pods import StepPodOperator

        return StepPodOperator(
            step=name,
            **what,
            image_name=self.image,
            sidecar_security=dict(self.resources.container_security),
            kubernetes_conn_id=self.kubernetes_conn_id,
            namespace=self.namespace,
            pod_template_file=self.pod_template_file,
            deferrable=self.deferrable,
            startup_seconds=round(self.startup_timeout.total_seconds()),
            grace_seconds=self.grace_seconds,
            poll_seconds=self.poll_seconds,
        )


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value not in (None, {}, [])}
