"""A Kubernetes API server for tests: real HTTP and WebSockets, RBAC, strict schemas; pods are processes here.

It knows what running a step takes: pods with logs and ``exec``, secrets, events, roles, ownership; and what a model's service
takes: Deployments with ReplicaSets, readiness, server-side apply, autoscalers that keep to their limits. It has one node, schedules at once, enforces no
security context and no limits, scales by no metric, restarts nothing and routes nothing: passing here is not having run on Kubernetes.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import signal
import socket
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import uvicorn
import yaml
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from tests.fakekube.deployments import DeploymentController, is_ready
from tests.fakekube.kubelet import NSENTER, Kubelet
from tests.fakekube.objects import KINDS, ApiError, Object, Store, fits

if TYPE_CHECKING:
    from starlette.requests import Request

ADMIN = "admin"


class FakeKube:
    """The server and what a test wants to know of it.

    :param namespace: the one namespace there is.
    :param images: name of every image that can be pulled, and its environment variables.
    """

    def __init__(self, folder: Path, *, namespace: str, images: Mapping[str, Mapping[str, str]]) -> None:
        self.store, self.namespace = Store(namespaces={namespace}), namespace
        self.kubelet = Kubelet(self.store, folder, images)
        self.controller = DeploymentController(self.store, self.kubelet)
        #: Bearer tokens and whose they are; a token that is not here is nobody's.
        self.tokens: dict[str, str] = {}
        #: How many requests are still to be answered with 503; see :meth:`stumble`.
        self.failures = 0
        #: What fails once with 500 when it is asked for next: verb and resource.
        self.faults: list[tuple[str, str]] = []
        self._cut = 0
        self.url = ""

    @contextlib.contextmanager
    def running(self) -> Iterator[FakeKube]:
        """Serve on a free port of this machine until the block ends; no process outlives it."""
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(
            self._application(), log_level="error", ws="wsproto", lifespan="on", timeout_graceful_shutdown=2
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive(), "the fake API server did not start"
            assert time.monotonic() < deadline, "the fake API server did not start"
            time.sleep(0.02)
        try:
            yield self
        finally:
            server.should_exit = True
            thread.join(timeout=30)
            listener.close()

    def apply(self, manifests: Path) -> None:
        """Create what a file of YAML documents describes, as an administrator."""
        groups = {kind: (group, resource) for (group, resource), (kind, _) in KINDS.items()}
        for manifest in yaml.safe_load_all(manifests.read_text()):
            if manifest["kind"] in groups:
                group, resource = groups[manifest["kind"]]
                where = manifest["metadata"].get("namespace", self.namespace)
                self.store.create(group, resource, where, manifest)

    def kubeconfig(self, user: str = ADMIN) -> dict[str, Any]:
        """What a client needs to be this user; a service account is ``system:serviceaccount:NAMESPACE:NAME``."""
        token = self._header(user)["authorization"].removeprefix("Bearer ")
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "fake",
            "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake"}}],
            "clusters": [{"name": "fake", "cluster": {"server": self.url}}],
            "users": [{"name": "fake", "user": {"token": token}}],
        }

    def _header(self, user: str) -> dict[str, str]:
        self.tokens[f"token-of-{user}"] = user
        return {"authorization": f"Bearer token-of-{user}"}

    def stumble(self, failures: int) -> None:
        """End every log that is followed, and answer the next requests with 503, as a restarting server does."""
        self.failures, self._cut = failures, self._cut + 1

    def pods(self) -> list[Object]:
        return self._all("pods")

    def secrets(self) -> list[Object]:
        return self._all("secrets")

    def kill(self, pod: Object, container: str = "base") -> None:
        """End a container as the kernel does when there is no memory left."""
        found = self.kubelet.container(pod, container)
        assert found is not None, f"{container} was never started"
        found.signal(signal.SIGKILL)

    def delete(self, pod: Object) -> None:
        """Delete a pod, as an administrator does or a node that is drained."""
        path = f"/api/v1/namespaces/{self.namespace}/pods/{pod['metadata']['name']}"
        httpx.delete(self.url + path, headers=self._header(ADMIN)).raise_for_status()

    def started(self) -> list[Object]:
        """Every pod that was ever asked for."""
        return [sent for sent in list(self.store.sent) if sent["kind"] == "Pod"]

    def get(self, resource: str, name: str) -> Object | None:
        """An object as it is now."""
        return copy.deepcopy(self.store.objects.get((resource, self.namespace, name)))

    def addresses(self, service: str) -> list[str]:
        """Where the pods are that a Service leads to: those it selects that are ready."""
        found = self.get("services", service)
        assert found is not None, f"there is no Service {service}"
        wanted = found["spec"]["selector"].items()
        return [
            f"http://127.0.0.1:{self.kubelet.ports[pod['metadata']['uid']]}"
            for pod in self.pods()
            if wanted <= pod["metadata"]["labels"].items() and is_ready(pod)
        ]

    def _all(self, resource: str) -> list[Object]:
        return [copy.deepcopy(one) for key, one in list(self.store.objects.items()) if key[0] == resource]

    def _application(self) -> Starlette:
        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            yield
            await self.controller.close()
            await self.kubelet.close()

        namespaced = "/namespaces/{namespace}/{resource}"
        routes: list[Any] = [
            WebSocketRoute("/api/v1/namespaces/{namespace}/pods/{name}/exec", self._exec),
            Route("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", self._review, methods=["POST"]),
        ]
        for prefix in ("/api/v1", "/apis/{group}/{version}"):
            routes += [
                Route(f"{prefix}{namespaced}/{{name}}/log", self._log, methods=["GET"]),
                Route(f"{prefix}{namespaced}/{{name}}", self._one, methods=["GET", "PATCH", "DELETE"]),
                Route(f"{prefix}{namespaced}", self._many, methods=["GET", "POST"]),
            ]

        async def refuse(_: Request, err: Exception) -> Response:
            assert isinstance(err, ApiError)
            return JSONResponse(err.body(), status_code=err.status)

        return Starlette(routes=routes, lifespan=lifespan, exception_handlers={ApiError: refuse})

    def _admit(self, request: Request | WebSocket, verb: str, sub: str = "") -> tuple[str, str, str]:
        """Say which resource is meant, after it is clear that the caller may."""
        path = request.path_params
        group, resource = path.get("group", ""), path.get("resource", "pods")
        if (group, resource) not in KINDS:
            raise ApiError(404, "NotFound", "the server could not find the requested resource")
        self.store.authorize(self._user(request), verb, group, resource + sub, path["namespace"])
        if (verb, resource) in self.faults:
            self.faults.remove((verb, resource))
            raise ApiError(500, "InternalError", "etcdserver: leader changed")
        return group, resource, path["namespace"]

    def _user(self, request: Request | WebSocket) -> str:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.failures > 0:
            self.failures -= 1
            raise ApiError(503, "ServiceUnavailable", "apiserver not ready")
        if token not in self.tokens:
            raise ApiError(401, "Unauthorized", "Unauthorized")
        return self.tokens[token]

    async def _many(self, request: Request) -> Response:
        query = request.query_params
        watch = query.get("watch") in {"true", "True", "1"}
        verb = "create" if request.method == "POST" else "watch" if watch else "list"
        group, resource, namespace = self._admit(request, verb)
        if verb == "create":
            made = self.store.create(group, resource, namespace, await request.json())
            if resource == "pods":
                self.kubelet.start(made)
            return JSONResponse(made, status_code=201)
        chosen = query.get("labelSelector", ""), query.get("fieldSelector", "")
        if watch:
            until = time.monotonic() + float(query.get("timeoutSeconds") or 30)
            since = int(query.get("resourceVersion") or 0)
            return StreamingResponse(self._changes(resource, chosen, since, until))
        kind, version = KINDS[group, resource]
        items = list(self.store.matching(resource, namespace, *chosen))
        meta = {"resourceVersion": str(len(self.store.changes))}
        return JSONResponse({"kind": f"{kind}List", "apiVersion": version, "metadata": meta, "items": items})

    async def _changes(
        self, resource: str, chosen: tuple[str, str], since: int, until: float
    ) -> AsyncIterator[str]:
        while time.monotonic() < until:
            for version, how, of, what in self.store.changes[since:]:
                since = version
                if of == resource and fits(what, *chosen):
                    yield json.dumps({"type": how, "object": what}) + "\n"
            await asyncio.sleep(0.05)

    async def _one(self, request: Request) -> Response:
        verb = request.method.lower()
        group, resource, namespace = self._admit(request, verb)
        name = request.path_params["name"]
        if request.headers.get("content-type") == "application/apply-patch+yaml":
            return self._apply(request, group, resource, namespace, yaml.safe_load(await request.body()))
        found = self.store.get(resource, namespace, name)
        if verb == "patch":
            found = self.store.patch(resource, namespace, name, await request.json())
        elif verb == "delete" and resource == "pods":
            options = await request.body()
            grace = request.query_params.get("gracePeriodSeconds")
            grace = grace or (json.loads(options) if options else {}).get("gracePeriodSeconds")
            usual = found["spec"].get("terminationGracePeriodSeconds", 30)
            self.kubelet.stop(found, float(usual if grace is None else grace))
        elif verb == "delete":
            self.store.remove(resource, namespace, name)
        return JSONResponse(found)

    def _apply(self, request: Request, group: str, resource: str, namespace: str, wanted: Object) -> Response:
        """Server-side apply; of what is not there, that takes ``create`` as well."""
        name = request.path_params["name"]
        manager = request.query_params["fieldManager"]
        assert request.query_params["fieldValidation"] == "Strict", "unknown fields would be dropped"
        there = (resource, namespace, name) in self.store.objects
        if not there:
            self._admit(request, "create")
        found = self.store.apply(group, resource, namespace, name, wanted, manager)
        if resource == "deployments":
            self.controller.look_at(found)
        return JSONResponse(found, status_code=200 if there else 201)

    async def _review(self, request: Request) -> Response:
        """Whether the caller may do something; everybody may ask that."""
        asked = await request.json()
        what = asked["spec"]["resourceAttributes"]
        resource = "/".join(filter(None, (what["resource"], what.get("subresource"))))
        may = self.store.allowed(
            self._user(request), what["verb"], what.get("group", ""), resource, what["namespace"]
        )
        return JSONResponse(asked | {"status": {"allowed": may}}, status_code=201)

    async def _log(self, request: Request) -> Response:
        _, _, namespace = self._admit(request, "get", "/log")
        pod = self.store.get("pods", namespace, request.path_params["name"])
        query = request.query_params
        container = self.kubelet.container(
            pod, query.get("container") or pod["spec"]["containers"][0]["name"]
        )
        if container is None:
            raise ApiError(400, "BadRequest", "container is waiting to start: ContainerCreating")
        since = datetime.min.replace(tzinfo=UTC)
        if "sinceSeconds" in query:
            since = datetime.now(UTC) - timedelta(seconds=float(query["sinceSeconds"]))
        follow, stamped = query.get("follow") in {"true", "True"}, query.get("timestamps") in {"true", "True"}

        async def lines() -> AsyncIterator[bytes]:
            cut = self._cut
            at = max(len(container.lines) - int(query.get("tailLines") or 2**31), 0)
            while True:
                ended = container.ended
                for when, line in container.lines[at:]:
                    at += 1
                    if when >= since:
                        stamp = when.strftime("%Y-%m-%dT%H:%M:%S.%f000Z ").encode() if stamped else b""
                        yield stamp + line
                if ended or not follow or cut != self._cut:
                    return
                await asyncio.sleep(0.05)

        return StreamingResponse(lines(), media_type="text/plain")

    async def _exec(self, socket: WebSocket) -> None:
        """Run a command in a container; as since Kubernetes 1.35, that takes ``create`` as well."""
        query = socket.query_params
        try:
            for verb in ("get", "create"):
                _, _, namespace = self._admit(socket, verb, "/exec")
            pod = self.store.get("pods", namespace, socket.path_params["name"])
            container = self.kubelet.container(pod, query["container"])
            if container is None or container.ended:
                raise ApiError(500, "InternalError", f"container not found ({query['container']})")
        except ApiError as err:
            await socket.send_denial_response(JSONResponse(err.body(), status_code=err.status))
            return
        await socket.accept(subprotocol="v4.channel.k8s.io")
        process = await asyncio.create_subprocess_exec(
            *NSENTER,
            f"--target={container.pid}",
            *query.getlist("command"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None

        async def send(stream: asyncio.StreamReader, channel: bytes) -> None:
            while data := await stream.read(65536):
                await socket.send_bytes(channel + data)

        async def receive(stdin: asyncio.StreamWriter) -> None:
            with contextlib.suppress(WebSocketDisconnect, ConnectionError):
                while True:
                    message = await socket.receive()
                    if message["type"] == "websocket.disconnect":
                        break
                    data = message.get("bytes") or (message.get("text") or "").encode()
                    if data[:1] == b"\0":
                        stdin.write(data[1:])
                        await stdin.drain()
            stdin.close()

        listening = asyncio.get_running_loop().create_task(receive(process.stdin))
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):
            await asyncio.gather(send(process.stdout, b"\1"), send(process.stderr, b"\2"))
            status = {"metadata": {}, "status": "Success" if await process.wait() == 0 else "Failure"}
            await socket.send_bytes(b"\3" + json.dumps(status).encode())
            await socket.close()
        listening.cancel()
        await process.wait()


@contextlib.contextmanager
def fake_kube(*, namespace: str, images: Mapping[str, Mapping[str, str]]) -> Iterator[FakeKube]:
    """Start a cluster of one node, this machine, and end it with everything that runs in it."""
    with (
        tempfile.TemporaryDirectory(prefix="fakekube-") as folder,
        FakeKube(Path(folder), namespace=namespace, images=images).running() as kube,
    ):
        yield kube
