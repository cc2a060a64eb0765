"""Roll a model's service out to Kubernetes: apply what it needs, see it become ready, or put back what served before."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from airflow_mlops.exceptions import RolloutError, TransientError
from airflow_mlops.integrations.kubernetes_cluster import MANAGER, SIZE_MANAGER, ConflictError
from airflow_mlops.integrations.kubernetes_manifests import (
    TEMPLATE,
    VERSION,
    actor_of,
    annotation_of_template,
    former_of,
    is_ours,
    progress_of,
    sets_replicas,
    template_of,
)
from airflow_mlops.integrations.rollout import NotReadyError, Progress, RolledOut, carry_out, watch

if TYPE_CHECKING:
    from airflow_mlops.integrations.kubernetes_cluster import Cluster
    from airflow_mlops.integrations.kubernetes_manifests import KubernetesEndpoint, Manifest

#: How often an undo is tried while the cluster's own controllers write to the same object.
_UNDO_ATTEMPTS = 20


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
    outcome = carry_out(rollout)
    now = rollout.now
    return RolledOut(
        state=outcome.state,
        serving_version=outcome.serving_version,
        previous_version=rollout.previous_version if outcome.state == "serving" else None,
        deployment_uid=now["metadata"]["uid"],
        revision=int(now["metadata"]["annotations"]["deployment.kubernetes.io/revision"]),
        seconds=time.monotonic() - started,
        started=before is None,
        restore_seconds=outcome.restore_seconds,
        reason=outcome.reason,
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
        self.version = endpoint.model_version
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
        if self.before is not None and sets_replicas(self.before, MANAGER):
            self.cluster.apply(self.endpoint.size(self.before["spec"].get("replicas", 1)), SIZE_MANAGER)
        self._applied = True  # the answer may get lost
        self.cluster.apply(self.endpoint.deployment(actor=self.actor))
        if self.before is None:
            self.cluster.apply(self.endpoint.size(self.endpoint.minimum), SIZE_MANAGER)

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
        progress = watch(self._look, self.where, seconds=seconds, poll_seconds=self.poll_seconds)
        if progress.status != "done":
            raise NotReadyError(self._explained(progress.reason))

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
            except ConflictError:
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
        found = self.cluster.deployment(self.endpoint.name)
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
