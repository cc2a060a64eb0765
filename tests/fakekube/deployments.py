"""The controllers of a Deployment: ReplicaSets, a rolling update that waits for readiness, a deadline for progress.

It knows ``maxUnavailable: 0`` with ``maxSurge: 1``, which is all that is asked for here.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import json
import time
import uuid
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.fakekube.kubelet import Kubelet
    from tests.fakekube.objects import Object, Store

REVISION = "deployment.kubernetes.io/revision"
APPS = "apps"


class DeploymentController:
    """Keeps pods as Deployments want them, one step at a time."""

    def __init__(self, store: Store, kubelet: Kubelet) -> None:
        self.store, self.kubelet = store, kubelet
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def look_at(self, deployment: Object) -> None:
        uid = deployment["metadata"]["uid"]
        if uid not in self._tasks:
            self._tasks[uid] = asyncio.get_running_loop().create_task(self._reconcile(deployment))

    async def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _reconcile(self, deployment: Object) -> None:
        progress: tuple[object, ...] = ()
        since = time.monotonic()
        while deployment in self.store.objects.values():
            self._scale(deployment)
            seen = deployment["metadata"]["generation"]
            current = self._replica_set(deployment)
            new, old = self._pods(current), []
            for other in self._replica_sets(deployment):
                old += self._pods(other) if other is not current else []
            ready = [pod for pod in new + old if is_ready(pod)]
            known = (seen, len(new), len(old), len(ready))
            if known != progress:
                progress, since = known, time.monotonic()
            self._step(deployment, current, new, old)
            self._tell(deployment, seen, new, old, late=time.monotonic() - since)
            await asyncio.sleep(0.1)

    def _scale(self, deployment: Object) -> None:
        """Keep to the limits of the autoscaler, which needs no metrics for that."""
        meta = deployment["metadata"]
        found = self.store.objects.get(("horizontalpodautoscalers", meta["namespace"], meta["name"]))
        if found is not None:
            now, limits = deployment["spec"].get("replicas", 1), found["spec"]
            wanted = min(max(now, limits["minReplicas"]), limits["maxReplicas"])
            if wanted != now:
                self.store.scale("deployments", deployment, wanted)

    def _step(self, deployment: Object, current: Object, new: list[Object], old: list[Object]) -> None:
        wanted = deployment["spec"].get("replicas", 1)
        ready = sum(is_ready(pod) for pod in new + old)
        if len(new) < wanted and len(new) + len(old) <= wanted:
            self._start(current)
        elif len(new) > wanted:
            self._end(new[-1])
        elif old:
            broken = [pod for pod in old if not is_ready(pod)]
            if broken:
                self._end(broken[0])
            elif ready > wanted:
                self._end(old[0])

    def _tell(
        self, deployment: Object, seen: int, new: list[Object], old: list[Object], *, late: float
    ) -> None:
        for one in self._replica_sets(deployment):
            pods = self._pods(one)
            ready = sum(is_ready(pod) for pod in pods)
            self._status(one, "replicasets", {"replicas": len(pods), "readyReplicas": ready})
        wanted = deployment["spec"].get("replicas", 1)
        available = sum(is_ready(pod) for pod in new + old)
        done = len(new) == wanted and not old and available == wanted
        progressing = {"type": "Progressing", "status": "True", "reason": "ReplicaSetUpdated"}
        if done:
            progressing["reason"] = "NewReplicaSetAvailable"
        elif late > deployment["spec"].get("progressDeadlineSeconds", 600):
            progressing.update(status="False", reason="ProgressDeadlineExceeded")
            progressing["message"] = "ReplicaSet has timed out progressing."
        counts = {"replicas": len(new + old), "updatedReplicas": len(new), "availableReplicas": available}
        known = {"observedGeneration": seen, "readyReplicas": available, "conditions": [progressing]}
        self._status(deployment, "deployments", counts | known)

    def _status(self, what: Object, resource: str, status: Object) -> None:
        if what.get("status") != status:
            what["status"] = status
            self.store.changed("MODIFIED", resource, what)

    def _replica_set(self, deployment: Object) -> Object:
        """Find the ReplicaSet of the template, or make one; the newest has the highest revision."""
        template = deployment["spec"]["template"]
        digest = hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:10]
        meta, others = deployment["metadata"], self._replica_sets(deployment)
        highest = max((revision_of(one) for one in others), default=0)
        name = f"{meta['name']}-{digest}"
        found = next((one for one in others if one["metadata"]["name"] == name), None)
        if found is None:
            made = copy.deepcopy(template)
            made["metadata"]["labels"]["pod-template-hash"] = digest
            selector = deployment["spec"]["selector"]["matchLabels"] | {"pod-template-hash": digest}
            metadata = {"name": name, "labels": made["metadata"]["labels"]}
            metadata["ownerReferences"] = [owner(deployment)]
            spec = {"selector": {"matchLabels": selector}, "template": made}
            found = self.store.create(
                APPS, "replicasets", meta["namespace"], {"metadata": metadata, "spec": spec}
            )
        if revision_of(found) < highest or not highest:
            found["metadata"].setdefault("annotations", {})[REVISION] = str(highest + 1)
            meta.setdefault("annotations", {})[REVISION] = str(highest + 1)
            self.store.changed("MODIFIED", "replicasets", found)
            self.store.changed("MODIFIED", "deployments", deployment)
        return found

    def _replica_sets(self, deployment: Object) -> list[Object]:
        return self._owned("replicasets", deployment)

    def _pods(self, replica_set: Object) -> list[Object]:
        return [pod for pod in self._owned("pods", replica_set) if "deletionTimestamp" not in pod["metadata"]]

    def _owned(self, resource: str, by: Object) -> list[Object]:
        mine = owner(by)
        return [
            one
            for key, one in list(self.store.objects.items())
            if key[0] == resource and mine in one["metadata"].get("ownerReferences", [])
        ]

    def _start(self, replica_set: Object) -> None:
        meta = copy.deepcopy(replica_set["spec"]["template"]["metadata"])
        meta["name"] = f"{replica_set['metadata']['name']}-{uuid.uuid4().hex[:5]}"
        meta["ownerReferences"] = [owner(replica_set)]
        pod = {"metadata": meta, "spec": copy.deepcopy(replica_set["spec"]["template"]["spec"])}
        self.kubelet.start(self.store.create("", "pods", replica_set["metadata"]["namespace"], pod))

    def _end(self, pod: Object) -> None:
        self.kubelet.stop(pod, float(pod["spec"].get("terminationGracePeriodSeconds", 30)))


def is_ready(pod: Object) -> bool:
    """Whether a pod takes requests."""
    statuses = pod.get("status", {}).get("containerStatuses", [])
    return (
        bool(statuses)
        and all(one["ready"] for one in statuses)
        and "deletionTimestamp" not in pod["metadata"]
    )


def owner(what: Object) -> Object:
    meta = what["metadata"]
    who = {"apiVersion": what["apiVersion"], "kind": what["kind"], "controller": True}
    return who | {"name": meta["name"], "uid": meta["uid"]}


def revision_of(replica_set: Object) -> int:
    return int(replica_set["metadata"].get("annotations", {}).get(REVISION, "0"))
