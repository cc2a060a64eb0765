"""Airflow's pod operator with what a step needs beside it: a secret of its own, its result, errors that say what to do.

The one module of the runners that knows Airflow; it is imported when a step goes to Kubernetes, and by nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from airflow.providers.cncf.kubernetes.kubernetes_helper_functions import generic_api_retry
from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from airflow.providers.cncf.kubernetes.pod_generator import PodGenerator
from airflow.providers.cncf.kubernetes.utils.container import container_is_running, get_container_status
from airflow.providers.cncf.kubernetes.utils.pod_manager import (
    PodLaunchTimeoutException,
    PodNotFoundException,
    detect_pod_terminate_early_issues,
)
from airflow.sdk import get_current_context
from airflow.sdk.exceptions import TaskDeferred

from airflow_mlops.core.codec import canonical_json
from airflow_mlops.core.errors import rebuild_error
from airflow_mlops.exceptions import ConnectionConfigError, TransientError

#: Under which key the trigger's event names the step.
STEP_OF_EVENT = "airflow_mlops_step"

#: Labels of our pods; the last says what a pod is at work on, so that a retry goes on with the same work only.
STEP_LABEL, TASK_LABEL, WORK_LABEL = "airflow-mlops/step", "airflow-mlops/task", "airflow-mlops/work"

#: What the API server has to allow in the namespace; ``deploy/kubernetes/role.yaml`` grants exactly this.
RIGHTS: Mapping[str, tuple[str, ...]] = {
    "pods": ("create", "get", "list", "patch", "delete"),
    "pods/log": ("get",),
    "pods/exec": ("get", "create"),
    "events": ("list", "watch"),
    "secrets": ("create",),
}

#: Lines of the step's log that an error repeats.
_LAST_LINES = 40

#: How long beyond its grace a pod of an earlier attempt may take to end.
_PATIENCE_SECONDS = 60

_POLL_SECONDS = 0.5

#: Reasons of a pod's end that are not the step's.
_TAKEN_AWAY = {"Evicted", "Preempting", "NodeLost", "NodeShutdown", "Shutdown", "Terminated"}

_ROLE = "the rules of deploy/kubernetes/role.yaml"


class StepPodOperator(KubernetesPodOperator):
    """A step's pod.

    :param step: name of the step.
    :param manifest: the pod; its name is also that of its secret. Only where a pod is started.
    :param work: digest of what the pod is to do. Only where a pod is started.
    :param secret: what the pod's secret holds. Only where a pod is started.
    :param image_name: for messages.
    :param sidecar_security: ``securityContext`` of the provider's sidecar.
    :param startup_seconds: how long the pod may take to start.
    :param grace_seconds: how long it may take to end.
    :param poll_seconds: how often the pod is looked at.
    """

    def __init__(
        self,
        *,
        step: str,
        manifest: Mapping[str, Any] | None = None,
        work: str | None = None,
        secret: Mapping[str, str] | None = None,
        image_name: str,
        sidecar_security: Mapping[str, Any],
        startup_seconds: int,
        grace_seconds: int,
        poll_seconds: float,
        **kwargs: Any,
    ) -> None:
        context = get_current_context()
        instance = context["ti"]
        task = [instance.dag_id, instance.run_id, instance.task_id, instance.map_index]
        labels = {
            STEP_LABEL: step,
            TASK_LABEL: hashlib.sha256(canonical_json(task).encode()).hexdigest()[:24],
        }
        super().__init__(
            task_id=instance.task_id,
            full_pod_spec=_pod(manifest) if manifest else None,
            random_name_suffix=False,
            labels=labels | ({WORK_LABEL: work} if work else {}),
            do_xcom_push=True,
            xcom_sidecar_container_security_context=dict(sidecar_security),
            container_name_log_prefix_enabled=False,
            log_pod_spec_on_failure=False,
            schedule_timeout_seconds=startup_seconds,
            startup_timeout_seconds=startup_seconds,
            startup_check_interval_seconds=max(1, round(poll_seconds)),
            base_container_status_polling_interval=poll_seconds,
            poll_interval=poll_seconds,
            logging_interval=30,  # while the task is deferred, the triggerer tells what the step says
            termination_grace_period=grace_seconds,
            execution_timeout=getattr(context.get("task"), "execution_timeout", None),
            trigger_kwargs={STEP_OF_EVENT: step},
            **kwargs,
        )
        self.step = step
        self.secret = dict(secret or {})
        self.image_name = image_name
        #: The step's result, or the error it describes; ``None`` as long as there is neither.
        self.outcome: dict[str, Any] | None = None
        #: The pod as it was before it was deleted, and the end of its log.
        self.last_seen: Any = None
        self.last_lines = ""
        #: What the trigger says of a pod that did not start or end in time.
        self.too_late: str | None = None

    def get_or_create_pod(self, pod_request_obj: Any, context: Any) -> Any:
        """Go on with the pod of an earlier attempt or start one, and give it its secret."""
        namespace = pod_request_obj.metadata.namespace
        self._check_rights(namespace)
        self._end_other_work(namespace)
        self.pod = super().get_or_create_pod(pod_request_obj, context)
        try:
            self._give_secret(self.pod_manager.read_pod(self.pod))
        except BaseException:
            if (
                self.pod is pod_request_obj
            ):  # just started; without its secret it would wait till its deadline
                self.process_pod_deletion(self.pod, reraise=False)
            raise
        return self.pod

    def extract_xcom(self, pod: Any, *, ignore_kill_failure: bool = True) -> None:
        """Take the result out of the pod, and keep it from the XComs: that of the task is the operator's business."""
        outcome = super().extract_xcom(pod, ignore_kill_failure=ignore_kill_failure)
        self.outcome = outcome if isinstance(outcome, dict) else None

    def cleanup(self, pod: Any, remote_pod: Any, *args: Any, **kwargs: Any) -> None:
        """Remember how the pod ended, then delete it; but not a running one only because the cluster did not answer."""
        problem = sys.exc_info()[1]  # what the provider is about to fail with: it cleans up on its way out
        if remote_pod is not None and not self._killed:
            with contextlib.suppress(Exception):  # it may be gone; what it said is a help, not the point
                self.last_seen = self.pod_manager.read_pod(remote_pod)
                if self.outcome is None or "error" in self.outcome:
                    lines = self.pod_manager.read_pod_logs(
                        remote_pod, self.base_container_name, tail_lines=_LAST_LINES, follow=False
                    )
                    self.last_lines = b"".join(lines).decode(errors="replace")
        if container_is_running(self.last_seen, self.base_container_name) and _is_transient(self, problem):
            self.log.warning(
                "leaving pod %s running: the next attempt goes on with it", self.last_seen.metadata.name
            )
            return
        super().cleanup(pod, remote_pod, *args, **kwargs)

    def _check_rights(self, namespace: str) -> None:
        """Say now what would fail later, when hours of work are done.

        :raises ConnectionConfigError: with every verb that is missing.
        """
        from kubernetes.client import AuthorizationV1Api
        from kubernetes.client.exceptions import ApiException

        api = AuthorizationV1Api(self.client.api_client)
        missing = []
        for name, verbs in RIGHTS.items():
            resource, _, part = name.partition("/")
            for verb in verbs:
                asked = {"namespace": namespace, "verb": verb, "resource": resource, "subresource": part}
                review = {"spec": {"resourceAttributes": asked}}
                try:
                    answer = api.create_self_subject_access_review(review)
                except ApiException as err:
                    if err.status == 401:
                        raise
                    self.log.info("the cluster does not say what we may do in it: %s", _said(err))
                    return
                if not answer.status.allowed:
                    missing.append(f"{verb} {name}")
        if missing:
            raise ConnectionConfigError(
                f"connection {self.kubernetes_conn_id!r} may not {', '.join(missing)} in namespace {namespace!r}: "
                f"give its service account {_ROLE}"
            )

    def _end_other_work(self, namespace: str) -> None:
        """See to it that no pod of an earlier attempt runs beside ours, unless it is the one to go on with.

        The provider goes on with any pod of the task, also with one that is just ending, or at work on an older spec.
        """
        of_task = f"{TASK_LABEL}={self.labels[TASK_LABEL]}"
        grace = self.termination_grace_period or 0
        deadline = time.monotonic() + grace + _PATIENCE_SECONDS
        while True:
            pods = self.client.list_namespaced_pod(namespace, label_selector=of_task).items
            others = [pod for pod in pods if not self._goes_on(pod)]
            if not others:
                return
            for pod in others:
                if pod.metadata.deletion_timestamp is None:
                    self.log.info("ending pod %s of an earlier attempt", pod.metadata.name)
                    self.pod_manager.delete_pod(pod)
            if time.monotonic() > deadline:
                raise TransientError(
                    f"pod {namespace}/{others[0].metadata.name} of an earlier attempt still runs "
                    f"{grace + _PATIENCE_SECONDS} s after it was deleted; is its node lost?"
                )
            time.sleep(_POLL_SECONDS)

    def _goes_on(self, pod: Any) -> bool:
        labels = pod.metadata.labels or {}
        return (
            labels.get(WORK_LABEL) == self.labels[WORK_LABEL]
            and pod.metadata.deletion_timestamp is None
            and pod.status.phase in ("Pending", "Running")
            and labels.get(self.POD_CHECKED_KEY) != "True"
        )

    @generic_api_retry  # type: ignore[untyped-decorator]
    def _give_secret(self, pod: Any) -> None:
        """Create the secret the pod waits for, as the pod's property; one of an earlier attempt stays."""
        from kubernetes.client.exceptions import ApiException

        meta = pod.metadata
        owner = {"apiVersion": "v1", "kind": "Pod", "name": meta.name, "uid": meta.uid}
        body = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": meta.name, "labels": self.labels, "ownerReferences": [owner]},
            "immutable": True,
            "stringData": self.secret,
        }
        try:
            self.client.create_namespaced_secret(meta.namespace, body)
        except ApiException as err:
            if err.status != 409:
                raise


def _pod(manifest: Mapping[str, Any]) -> Any:
    """Turn a manifest into the client's object.

    :raises ValueError: naming what Kubernetes does not know or takes for something else, which the client drops without a word.
    """
    from kubernetes.client import ApiClient

    made = PodGenerator.deserialize_model_dict(dict(manifest))
    lost = sorted(_lost(dict(manifest), ApiClient().sanitize_for_serialization(made)))
    if lost:
        raise ValueError(f"ResourceSpec says what no pod has: {', '.join(lost)}; write it as in a manifest")
    return made


def _lost(given: Any, understood: Any, path: str = "pod") -> Iterator[str]:
    if isinstance(given, dict) and isinstance(understood, dict):
        for key, value in given.items():
            yield from _lost(value, understood.get(key), f"{path}.{key}")
    elif isinstance(given, list) and isinstance(understood, list) and len(given) == len(understood):
        for index, (one, other) in enumerate(zip(given, understood, strict=True)):
            yield from _lost(one, other, f"{path}[{index}]")
    elif given != understood:
        yield f"{path}: {given!r}"


def run(operator: StepPodOperator) -> dict[str, Any]:
    """Run the pod to its result, or defer the task."""
    start = operator.execute_async if operator.deferrable else operator.execute_sync
    return _outcome(operator, start, get_current_context())


def resume(operator: StepPodOperator, event: dict[str, Any]) -> dict[str, Any]:
    """Go on with the deferred task."""
    operator.too_late = event["message"] if event["status"] == "timeout" else None
    return _outcome(operator, operator.trigger_reentry, get_current_context(), event)


def _outcome(operator: StepPodOperator, work: Callable[..., Any], *args: Any) -> dict[str, Any]:
    """Let the provider work; then what the step wrote decides, whatever the provider makes of the pod's end."""
    problem: Exception | None = None
    try:
        work(*args)
    except TaskDeferred as deferred:
        deferred.method_name = "execute_complete"  # of our operator, which comes back to the runner
        raise
    except Exception as err:  # noqa: BLE001 - told below in the step's terms
        problem = err
        for behind in _chain(err):
            if not isinstance(
                behind, Exception
            ):  # the task's own end, such as its timeout, which the clean-up hid
                raise behind from None
    if operator.outcome is None:
        raise _explained(operator, problem) from problem
    if "error" in operator.outcome:
        raise rebuild_error(operator.outcome["error"], details=_told(operator))
    if problem is not None:
        operator.log.warning("the step gave its result, but its pod did not end well: %s", problem)
    return operator.outcome


def _explained(operator: StepPodOperator, problem: Exception | None) -> Exception:
    """Find the reason there is no result, and say what to do about it."""
    stuck = detect_pod_terminate_early_issues(operator.last_seen) if operator.last_seen else None
    if stuck is not None:
        why = " ".join(stuck.split())
        return ValueError(
            f"image {operator.image_name!r} of step {operator.step!r} can't be started: {why}; give an image that the "
            "cluster can pull, and ResourceSpec(pull_secrets=...) if its registry asks who is there"
        )
    if operator.too_late is not None:
        return TransientError(f"the pod of step {operator.step!r} was not done in time: {operator.too_late}")
    for err in _chain(problem):
        if isinstance(err, ConnectionConfigError | TransientError):
            return err
        if isinstance(err, PodLaunchTimeoutException):
            return TransientError(
                f"the pod of step {operator.step!r} did not start: {err} Ask for less in ResourceSpec, or wait longer "
                "with startup_timeout"
            )
        if (answer := _refusal(operator, err)) is not None:
            return answer
    return _ended(operator, problem)


def _refusal(operator: StepPodOperator, err: BaseException) -> Exception | None:
    """Translate what the API server answered."""
    from kubernetes.client.exceptions import ApiException
    from urllib3.exceptions import HTTPError

    if isinstance(err, HTTPError):
        return TransientError(f"the cluster of {operator.kubernetes_conn_id!r} can't be reached: {err}")
    if not isinstance(err, ApiException):
        return None
    said = _said(err)
    if err.status == 401:
        return ConnectionConfigError(
            f"the cluster does not know connection {operator.kubernetes_conn_id!r}: {said}"
        )
    if err.status == 403 and "exceeded quota" in said:
        return TransientError(f"there is no room for step {operator.step!r} now: {said}")
    if err.status == 403 and " cannot " in said:
        return ConnectionConfigError(f"the cluster refuses: {said}; give the service account {_ROLE}")
    if err.status == 403:
        return ConnectionConfigError(
            f"a rule of the namespace refuses the pod of step {operator.step!r}: {said}"
        )
    if err.status == 404 and said.startswith("namespaces "):
        return ConnectionConfigError(f"{said}: name one that is there, in the runner or the connection")
    if err.status == 404:
        return _deleted(operator)
    if err.status in (400, 422):
        return ValueError(f"the cluster refuses the pod of step {operator.step!r}: {said}")
    return TransientError(f"the cluster of {operator.kubernetes_conn_id!r} failed: {said}")


def _is_transient(operator: StepPodOperator, problem: BaseException | None) -> bool:
    return any(isinstance(_refusal(operator, err), TransientError) for err in _chain(problem))


def _ended(operator: StepPodOperator, problem: Exception | None) -> Exception:
    """Say how a pod ended that gave no result."""
    if operator.last_seen is None and (problem is None or isinstance(problem, PodNotFoundException)):
        return _deleted(operator)
    if operator.last_seen is not None and operator.last_seen.metadata.deletion_timestamp is not None:
        return _deleted(operator)
    status = getattr(operator.last_seen, "status", None)
    reason = getattr(status, "reason", None)
    if status is not None and reason in _TAKEN_AWAY:
        return TransientError(f"the pod of step {operator.step!r} was taken away: {reason}: {status.message}")
    container = get_container_status(operator.last_seen, operator.base_container_name) if status else None
    end = container.state.terminated if container is not None else None
    how = "ended without a result"
    if reason == "DeadlineExceeded":
        how = "took longer than the runner's timeout"
    elif end is not None and (end.reason == "OOMKilled" or end.exit_code == 137):
        how = f"was killed ({end.reason}, exit code {end.exit_code}); out of memory? ResourceSpec(memory=...) gives more"
    elif end is not None:
        how = f"ended with {end.exit_code} and without a result"
    elif problem is not None:
        how = f"has no result: {problem}"
    return RuntimeError(f"{_named(operator)} {how}:\n{operator.last_lines}")


def _deleted(operator: StepPodOperator) -> Exception:
    return TransientError(
        f"{_named(operator)} was deleted before it had a result; drained node, or somebody?"
    )


def _told(operator: StepPodOperator) -> str:
    return f"{_named(operator)}:\n{operator.last_lines}"


def _named(operator: StepPodOperator) -> str:
    pod = f"{operator.pod.metadata.namespace}/{operator.pod.metadata.name} " if operator.pod else ""
    return f"step {operator.step!r} in pod {pod}of {operator.image_name}"


def _said(err: Any) -> str:
    """Give the API server's own sentence."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return str(json.loads(err.body)["message"])
    return f"{err.status} {err.reason}"


def _chain(err: BaseException | None) -> Iterator[BaseException]:
    """Give an error and those behind it: the provider raises its own while it cleans up after another."""
    seen: set[int] = set()
    while err is not None and id(err) not in seen:
        seen.add(id(err))
        yield err
        err = err.__cause__ or err.__context__
