"""Runs the containers of a pod as real processes of this machine, each in namespaces of its own."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import httpx

from tests.fakekube.objects import ApiError, Object, Store, now
from tests.ports import free_port

#: New mount and process namespaces; without root, also a user namespace in which one is.
UNSHARE = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
UNSHARE += [] if os.getuid() == 0 else ["--user", "--map-root-user"]
NSENTER = ["nsenter", "--mount", "--pid", "--root", "--wd"] + (
    [] if os.getuid() == 0 else ["--user", "--preserve-credentials"]
)

#: The container sees the machine's files, its own processes, and its volumes where it asked for them.
#: Arguments: pairs of folder and mount point, ``--``, the command.
ENTER = """
set -e
mount --make-rprivate /
mount -t tmpfs root /mnt
for entry in /*; do
  case "$entry" in /mnt|/proc) continue;; esac
  if [ -L "$entry" ]; then cp -P "$entry" "/mnt$entry"
  elif [ -d "$entry" ]; then mkdir "/mnt$entry"; mount --rbind "$entry" "/mnt$entry"
  fi
done
mkdir /mnt/proc
mount -t proc proc /mnt/proc
while [ "$1" != -- ]; do mkdir -p "/mnt$2"; mount --bind "$1" "/mnt$2"; shift 2; done
shift
cd /mnt
exec chroot /mnt "$@"
"""


@cache
def why_not() -> str | None:
    """Say why containers can't run here, if they can't."""
    if not sys.platform.startswith("linux"):
        return "containers run in Linux namespaces, and this is no Linux"
    if missing := [
        name for name in ("unshare", "nsenter", "chroot") if shutil.which(name, path=PATH) is None
    ]:
        return f"containers need {', '.join(missing)} (util-linux, coreutils)"
    done = subprocess.run(
        [*UNSHARE, "sh", "-c", ENTER, "sh", "--", "true"], capture_output=True, text=True, timeout=30
    )
    return None if done.returncode == 0 else f"namespaces are not allowed here: {done.stderr.strip()}"


PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass
class Container:
    """One container: its process and everything it printed."""

    process: asyncio.subprocess.Process
    lines: list[tuple[datetime, bytes]] = field(default_factory=list)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def ended(self) -> bool:
        return self.over.is_set()

    @property
    def pid(self) -> int:
        """The container's first process; its parent waits in the namespace outside."""
        outer = self.process.pid
        return int(Path(f"/proc/{outer}/task/{outer}/children").read_text().split()[0])

    def signal(self, number: int) -> None:
        if number == signal.SIGKILL:  # its parent dies of it as well, and tells us by what
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            return
        with contextlib.suppress(ProcessLookupError, FileNotFoundError, IndexError):
            os.kill(self.pid, number)


class Kubelet:
    """Brings the pods of a store to life, and to their end.

    :param images: name of every image that can be pulled, and its environment variables.
    """

    def __init__(self, store: Store, folder: Path, images: Mapping[str, Mapping[str, str]]) -> None:
        self.store, self.folder, self.images = store, folder, images
        self.containers: dict[tuple[str, str], Container] = {}
        #: Images that were built from a Bento, and its folder; they start as its Dockerfile says.
        self.bentos: dict[str, Path] = {}
        #: Images of which nothing is started, and whether their pods say that they are ready.
        self.still: dict[str, bool] = {}
        #: Where on this machine each pod listens: they share its addresses, and are told another port in ``PORT``.
        self.ports: dict[str, int] = {}
        #: How long it takes to get an image.
        self.pull_seconds = 0.0
        #: Held for a pod while its containers are being started: whoever ends it ends all of them.
        self._starting: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, pod: Object) -> None:
        self._in_background(self._live(pod))

    def stop(self, pod: Object, grace: float) -> None:
        """Ask the containers to end, insist after the grace, then let the object go."""
        if "deletionTimestamp" not in pod["metadata"]:
            pod["metadata"].update(deletionTimestamp=now(), deletionGracePeriodSeconds=int(grace))
            self.store.changed("MODIFIED", "pods", pod)
            self._in_background(self._end(pod, grace))

    def container(self, pod: Object, name: str) -> Container | None:
        return self.containers.get((pod["metadata"]["uid"], name))

    async def close(self) -> None:
        for container in self.containers.values():
            container.signal(signal.SIGKILL)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for container in self.containers.values():
            await container.process.wait()

    def _in_background(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _end(self, pod: Object, grace: float) -> None:
        async with self._starting[pod["metadata"]["uid"]]:
            uid = pod["metadata"]["uid"]
            mine = [container for (its, _), container in self.containers.items() if its == uid]
        hooks = [one.get("lifecycle", {}).get("preStop", {}) for one in pod["spec"]["containers"]]
        await asyncio.sleep(max(hook.get("sleep", {}).get("seconds", 0) for hook in hooks))
        for container in mine:
            container.signal(signal.SIGTERM)
        everything = asyncio.gather(*(container.over.wait() for container in mine))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(everything), grace)
        for container in mine:
            container.signal(signal.SIGKILL)
        await everything
        meta = pod["metadata"]
        if ("pods", meta["namespace"], meta["name"]) in self.store.objects:
            self.store.remove("pods", meta["namespace"], meta["name"])

    async def _live(self, pod: Object) -> None:
        spec, meta = pod["spec"], pod["metadata"]
        scheduled = {"type": "PodScheduled", "status": "True", "lastTransitionTime": now()}
        self._tell(pod, phase="Pending", conditions=[scheduled])
        statuses = {
            one["name"]: {"name": one["name"], "image": one["image"], "imageID": "", "ready": False}
            | {"restartCount": 0, "state": {"waiting": {"reason": "ContainerCreating"}}}
            for one in spec["containers"]
        }
        self._tell(pod, containerStatuses=list(statuses.values()), startTime=now())
        missing = [one for one in spec["containers"] if one["image"] not in self.images]
        for one in missing:
            message = f'Back-off pulling image "{one["image"]}": not found'
            statuses[one["name"]]["state"] = {"waiting": {"reason": "ImagePullBackOff", "message": message}}
            self._event(pod, "Failed", f'Failed to pull image "{one["image"]}"')
        if missing:
            self._tell(pod)
            return
        await asyncio.sleep(self.pull_seconds)
        if "deletionTimestamp" in meta:
            return
        volumes = await self._volumes(pod)
        if volumes is None:
            return
        async with self._starting[meta["uid"]]:
            for one in spec["containers"]:
                if "deletionTimestamp" in meta:
                    return
                if one["image"] in self.still:
                    state = {"running": {"startedAt": now()}}
                    statuses[one["name"]].update(ready=self.still[one["image"]], state=state)
                    continue
                started = await self._start(pod, one, volumes)
                self.containers[meta["uid"], one["name"]] = started
                probe = one.get("readinessProbe")
                statuses[one["name"]].update(ready=probe is None, state={"running": {"startedAt": now()}})
                if probe is not None:
                    self._in_background(self._probe(pod, statuses[one["name"]], probe, started))
                self._in_background(self._watch(pod, statuses[one["name"]], started))
            self._tell(pod, phase="Running")
            self._event(pod, "Started", "Started containers")
        if limit := spec.get("activeDeadlineSeconds"):
            self._in_background(self._deadline(pod, limit))

    async def _deadline(self, pod: Object, limit: float) -> None:
        await asyncio.sleep(limit)
        if pod["status"]["phase"] == "Running":
            self._tell(
                pod, reason="DeadlineExceeded", message="Pod was active longer than specified deadline"
            )
            for (uid, _), container in self.containers.items():
                if uid == pod["metadata"]["uid"]:
                    container.signal(signal.SIGKILL)

    async def _watch(self, pod: Object, status: Object, container: Container) -> None:
        """Keep what the container prints, then note how it ended."""
        begun = now()
        output = container.process.stdout
        assert output is not None
        async for line in output:
            container.lines.append((datetime.now(UTC), line))
        code = await container.process.wait()
        container.over.set()
        ended = {"exitCode": 128 - code if code < 0 else code, "startedAt": begun, "finishedAt": now()}
        ended["reason"] = "Completed" if code == 0 else "Error"
        status.update(ready=False, state={"terminated": ended})
        if (
            pod["spec"].get("restartPolicy", "Always") == "Always"
            and "deletionTimestamp" not in pod["metadata"]
        ):
            waiting = {"reason": "CrashLoopBackOff", "message": "back-off restarting failed container"}
            status.update(state={"waiting": waiting}, lastState={"terminated": ended})
            self._tell(pod)
            return
        ends = [one["state"].get("terminated") for one in pod["status"]["containerStatuses"]]
        phase = "Running"
        if all(ends):
            phase = "Succeeded" if all(one["exitCode"] == 0 for one in ends) else "Failed"
        self._tell(pod, phase=phase)

    async def _probe(self, pod: Object, status: Object, probe: Object, container: Container) -> None:
        """Ask a container over HTTP whether it takes requests, as long as it runs."""
        port, failures = self.ports[pod["metadata"]["uid"]], 0
        async with httpx.AsyncClient(timeout=probe.get("timeoutSeconds", 1), trust_env=False) as client:
            while not container.ended:
                await asyncio.sleep(probe.get("periodSeconds", 10))
                try:
                    answer = await client.get(f"http://127.0.0.1:{port}{probe['httpGet']['path']}")
                    failures = 0 if 200 <= answer.status_code < 400 else failures + 1
                except httpx.HTTPError:
                    failures += 1
                ready = not container.ended and (
                    failures == 0 or (status["ready"] and failures < probe.get("failureThreshold", 3))
                )
                if ready != status["ready"]:
                    status["ready"] = ready
                    self._tell(pod)

    async def _volumes(self, pod: Object) -> dict[str, str] | None:
        """Fill the pod's volumes; wait for secrets that are not there yet, as long as the pod is."""
        made = {}
        for volume in pod["spec"].get("volumes", []):
            if "hostPath" in volume:
                made[volume["name"]] = volume["hostPath"]["path"]
                continue
            folder = self.folder / pod["metadata"]["uid"] / volume["name"]
            folder.mkdir(parents=True)
            made[volume["name"]] = str(folder)
            if "secret" in volume:
                data = await self._secret(pod, volume["secret"]["secretName"])
                if data is None:
                    return None
                for item in volume["secret"].get("items") or [{"key": key, "path": key} for key in data]:
                    (folder / item["path"]).write_text(data[item["key"]])
        return made

    async def _secret(self, pod: Object, name: str) -> dict[str, str] | None:
        meta, told = pod["metadata"], False
        while "deletionTimestamp" not in meta:
            with contextlib.suppress(ApiError):
                data = self.store.get("secrets", meta["namespace"], name)["data"]
                return {key: base64.b64decode(value).decode() for key, value in data.items()}
            if not told:
                self._event(pod, "FailedMount", f'secret "{name}" not found')
                told = True
            await asyncio.sleep(0.1)
        return None

    async def _start(self, pod: Object, spec: Object, volumes: Mapping[str, str]) -> Container:
        environment = {"PATH": PATH, "HOSTNAME": pod["metadata"]["name"], **self.images[spec["image"]]}
        for source in spec.get("envFrom", []):
            environment |= await self._secret(pod, source["secretRef"]["name"]) or {}
        for variable in spec.get("env", []):
            source = variable.get("valueFrom", {}).get("secretKeyRef")
            data = await self._secret(pod, source["name"]) if source else None
            environment[variable["name"]] = data[source["key"]] if data else variable.get("value", "")
        mounts = [(volumes[one["name"]], one["mountPath"]) for one in spec.get("volumeMounts", [])]
        entrypoint: list[str] = []
        if bento := self.bentos.get(spec["image"]):
            environment["BENTO_PATH"] = "/bento"
            mounts.insert(0, (str(bento), "/bento"))
            entrypoint = ["bash", "/bento/env/docker/entrypoint.sh"]
        # A volume over /tmp hides what an image would have elsewhere, where this checkout lies in there.
        image = (sys.prefix, sys.base_prefix, str(Path(__file__).parents[2]))
        hidden = [path for path in image if any(Path(path).is_relative_to(at) for _, at in mounts)]
        mounts += [(path, path) for path in hidden]
        if spec.get("ports"):
            port = self.ports[pod["metadata"]["uid"]] = free_port()
            environment["PORT"] = str(port)
        command = [*UNSHARE, "sh", "-c", ENTER, "sh", *(part for pair in mounts for part in pair), "--"]
        process = await asyncio.create_subprocess_exec(
            *command,
            *spec.get("command", entrypoint),
            *spec.get("args", []),
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            limit=2**22,
        )
        return Container(process)

    def _tell(self, pod: Object, **status: Any) -> None:
        pod.setdefault("status", {}).update(status)
        self.store.changed("MODIFIED", "pods", pod)

    def _event(self, pod: Object, reason: str, message: str) -> None:
        meta = pod["metadata"]
        about = {"kind": "Pod", "name": meta["name"], "namespace": meta["namespace"], "uid": meta["uid"]}
        event = {"involvedObject": about, "reason": reason, "message": message, "type": "Normal", "count": 1}
        event |= {"metadata": {"name": f"{meta['name']}.{uuid.uuid4().hex[:12]}"}, "firstTimestamp": now()}
        self.store.create("", "events", meta["namespace"], event)
