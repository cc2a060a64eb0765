"""A BentoCloud for tests: real HTTP and WebSockets, one organization with one cluster; a deployment is a process of this machine.

It keeps what the API keeps (Bentos with their uploads, secrets, deployments with revisions), refuses what it does not know and
serves what was uploaded with ``bentoml serve``. It was written after BentoML's client, which says what it expects; passing here
is not having run on BentoCloud.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute

from tests.ports import free_port

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.websockets import WebSocket

Object = dict[str, Any]

CLUSTER = "a-cluster"
#: What a deployment may be asked to be; anything else is refused.
FIELDS = {"name", "bento", "access_authorization", "envs", "secrets", "services", "labels", "canary", "dev"}
OF_SERVICE = {
    "scaling",
    "instance_type",
    "deployment_strategy",
    "envs",
    "extras",
    "config_overrides",
    "cold_start_timeout",
}


class RefusedError(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def base(name: str, kind: str) -> Object:
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")
    times = {"created_at": now, "updated_at": now, "deleted_at": None}
    return {"uid": uuid.uuid4().hex, "name": name, "resource_type": kind, "labels": [], **times}


class FakeCloud:
    """The server, and what a test wants to know of it."""

    def __init__(self, folder: Path, token: str) -> None:
        self.folder, self.token, self.url = folder, token, ""
        self.bentos: dict[str, Object] = {}
        self.secrets: dict[str, Object] = {}
        self.deployments: dict[str, Object] = {}
        #: Every request that came with a token, and those for nothing that there is.
        self.asked: list[tuple[str, str]] = []
        self.unknown: list[str] = []
        #: Tag of a Bento to what becomes of it instead of serving: a status, at which it stays.
        self.fates: dict[str, str] = {}
        #: How many requests are still to be answered with 503.
        self.failures = 0
        #: Whether a deployment is said to run as soon as replicas of it do, be they those from before.
        self.hasty = False
        self._uploads: dict[str, str] = {}
        self._held: dict[str, tuple[str, str, Object]] = {}
        self._processes: dict[str, tuple[subprocess.Popen[bytes], str]] = {}
        self._lock = threading.RLock()
        self._over = threading.Event()

    @contextlib.contextmanager
    def running(self) -> Iterator[FakeCloud]:
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(
            self._application(), log_level="error", ws="wsproto", timeout_graceful_shutdown=2
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive(), "the fake BentoCloud did not start"
            assert time.monotonic() < deadline, "the fake BentoCloud did not start"
            time.sleep(0.02)
        try:
            yield self
        finally:
            self._over.set()
            server.should_exit = True
            thread.join(timeout=15)
            for process, _ in self._processes.values():
                _end(process)

    def _application(self) -> Starlette:
        repository, v2 = "/api/v1/bento_repositories", "/api/v2/deployments"
        one = f"{repository}/{{name}}/bentos/{{version}}"
        table: list[tuple[str, str, Any]] = [
            ("GET", "/api/v1/auth/current", lambda request, body: _user()),
            ("POST", repository, self._create_repository),
            ("GET", f"{repository}/{{name}}", self._get_repository),
            ("POST", f"{repository}/{{name}}/bentos", self._create_bento),
            ("GET", one, self._get_bento),
            ("PATCH", one, self._get_bento),
            ("PATCH", f"{one}/presign_upload_url", self._presign),
            ("PATCH", f"{one}/start_upload", self._get_bento),
            ("PATCH", f"{one}/finish_upload", self._finish),
            ("POST", "/api/v1/org_secrets", self._create_secret),
            ("GET", "/api/v1/org_secrets/{name}", self._get_secret),
            ("POST", v2, self._create_deployment),
            ("GET", f"{v2}/{{name}}", self._get_deployment),
            ("PUT", f"{v2}/{{name}}", self._update_deployment),
        ]
        routes: list[Any] = [
            Route(path, self._guarded(handler), methods=[method]) for method, path, handler in table
        ]
        routes.append(Route("/upload/{key}", self._upload, methods=["PUT"]))
        routes.append(Route("/endpoints/{name}/{path:path}", self._forward, methods=["GET", "POST"]))
        routes.append(WebSocketRoute("/ws/v2/deployments/{name}/pods", self._pods))
        routes.append(Route("/{path:path}", self._nothing, methods=["GET", "POST", "PUT", "PATCH", "DELETE"]))
        return Starlette(routes=routes)

    def _guarded(self, handler: Any) -> Any:
        async def answer(request: Request) -> Response:
            if request.headers.get("x-yatai-api-token") != self.token:
                return JSONResponse({"error": "invalid api token"}, 401)
            self.asked.append((request.method, request.url.path))
            if self.failures:
                self.failures -= 1
                return JSONResponse({"error": "come again"}, 503)
            body = await request.json() if await request.body() else None
            try:
                with self._lock:
                    return JSONResponse(handler(request, body))
            except RefusedError as err:
                return JSONResponse({"error": str(err)}, err.status)

        return answer

    async def _nothing(self, request: Request) -> Response:
        self.unknown.append(f"{request.method} {request.url.path}")
        return JSONResponse({"error": "no such path"}, 404)

    def _create_repository(self, request: Request, body: Object) -> Object:
        (self.folder / "bentos" / body["name"]).mkdir(parents=True)
        return self._repository(body["name"])

    def _get_repository(self, request: Request, body: None) -> Object:
        name = request.path_params["name"]
        if not (self.folder / "bentos" / name).is_dir():
            raise RefusedError(404, f"bento repository {name} not found")
        return self._repository(name)

    def _repository(self, name: str) -> Object:
        return base(name, "bento_repository") | {"description": "", "latest_bento": None}

    def _create_bento(self, request: Request, body: Object) -> Object:
        name, version = request.path_params["name"], body["version"]
        if f"{name}:{version}" in self.bentos:
            raise RefusedError(409, "there is one")
        facts = {"image_build_status": "pending", "upload_status": "pending", "upload_finished_reason": ""}
        facts |= {"presigned_upload_url": "", "presigned_download_url": "", "version": version}
        made = base(version, "bento") | facts
        made |= {"description": body["description"], "manifest": body["manifest"]}
        self.bentos[f"{name}:{version}"] = made
        return made

    def _get_bento(self, request: Request, body: Any) -> Object:
        tag = "{name}:{version}".format(**request.path_params)
        if tag not in self.bentos:
            raise RefusedError(404, f"bento {tag} not found")
        return self.bentos[tag]

    def _presign(self, request: Request, body: None) -> Object:
        found, key = self._get_bento(request, body), uuid.uuid4().hex
        self._uploads[key] = "{name}:{version}".format(**request.path_params)
        return found | {"presigned_upload_url": f"{self.url}/upload/{key}"}

    async def _upload(self, request: Request) -> Response:
        """As an object store: by a signed address, and no token."""
        tag = self._uploads.pop(request.path_params["key"], None)
        if tag is None or "x-yatai-api-token" in request.headers:
            return Response(status_code=403)
        name, _, version = tag.partition(":")
        archive, target = self.folder / f"{uuid.uuid4().hex}.tar", self.folder / "bentos" / name / version
        archive.write_bytes(await request.body())
        with tarfile.open(archive) as tar:
            tar.extractall(target, filter="data")
        archive.unlink()
        return Response(status_code=200)

    def _finish(self, request: Request, body: Object) -> Object:
        found = self._get_bento(request, body)
        found |= {"upload_status": body["status"], "upload_finished_reason": body["reason"]}
        return found

    def _create_secret(self, request: Request, body: Object) -> Object:
        if body["name"] in self.secrets:
            raise RefusedError(409, "there is one")
        content = body["content"]
        if content["type"] != "env" or not content["items"]:
            raise RefusedError(400, "a secret of variables has some")
        made = base(body["name"], "secret") | {"description": body["description"] or "", "creator": _user()}
        self.secrets[body["name"]] = made | {"content": content, "cluster": _cluster()}
        return self.secrets[body["name"]]

    def _get_secret(self, request: Request, body: None) -> Object:
        name = request.path_params["name"]
        if name not in self.secrets:
            raise RefusedError(404, f"secret {name} not found")
        return self.secrets[name]

    def _create_deployment(self, request: Request, body: Object) -> Object:
        name = body["name"]
        if name in self.deployments:
            raise RefusedError(409, f"deployment {name} exists")
        facts = {"kube_namespace": "models", "creator": _user(), "cluster": _cluster()}
        facts |= {"manifest": {"dev": False}, "urls": [], "revisions": 0}
        self.deployments[name] = base(name, "deployment") | facts
        return self._revise(name, body)

    def _update_deployment(self, request: Request, body: Object) -> Object:
        self._get_deployment(request, None)
        return self._revise(request.path_params["name"], body)

    def _get_deployment(self, request: Request, body: None) -> Object:
        name = request.path_params["name"]
        if name not in self.deployments:
            raise RefusedError(404, f"deployment {name} not found")
        return self.deployments[name]

    def _revise(self, name: str, body: Object) -> Object:
        strange = body.keys() - FIELDS
        strange |= {key for service in body["services"].values() for key in service.keys() - OF_SERVICE}
        bento = self.bentos.get(body["bento"])
        if strange or bento is None or bento["upload_status"] != "success":
            raise RefusedError(400, f"no such fields {sorted(strange)} or no such Bento {body['bento']}")
        missing = [secret for secret in body.get("secrets") or () if secret not in self.secrets]
        if missing:
            raise RefusedError(400, f"no such secrets: {missing}")
        (service,) = body["services"]
        if service != bento["manifest"]["entry_service"]:
            raise RefusedError(400, f"the Bento has no service {service}")
        config = {key: body.get(key) for key in ("access_authorization", "envs", "secrets", "services")}
        repository = self._repository(body["bento"].partition(":")[0])
        target = base("main", "deployment_target") | {"creator": _user(), "config": config}
        target["bento"] = bento | {"repository": repository}
        revision = base(uuid.uuid4().hex, "deployment_revision") | {"creator": _user(), "status": "active"}
        found = self.deployments[name]
        found |= {"latest_revision": revision | {"targets": [target]}, "status": "image-building"}
        found["revisions"] += 1
        arguments = (name, revision["uid"], body)
        threading.Thread(target=self._carry_out, args=arguments, daemon=True).start()
        return dict(found)

    def _carry_out(self, name: str, revision: str, body: Object) -> None:
        time.sleep(0.3)  # the image is built
        fate = self.fates.get(body["bento"])
        if fate is not None:
            self._say(name, revision, fate)
            self._held[name] = (name, revision, body)
            return
        self._say(name, revision, "running" if self.hasty and name in self._processes else "deploying")
        process, address = self._start(body)
        while not _serves(address):
            if process.poll() is not None or self._over.wait(0.2) or not self._is_latest(name, revision):
                _end(process)
                self._say(name, revision, "failed")
                return
        with self._lock:
            if not self._is_latest(name, revision):
                _end(process)
                return
            former = self._processes.get(name)
            self._processes[name] = (process, address)
            self.deployments[name]["urls"] = [f"{self.url}/endpoints/{name}"]
            self._say(name, revision, "running")
        if former is not None:
            _end(former[0])

    def release(self, name: str) -> None:
        """Let a deployment that met its fate go on after all."""
        arguments = self._held.pop(name)
        self.fates.clear()
        threading.Thread(target=self._carry_out, args=arguments, daemon=True).start()

    def _start(self, body: Object) -> tuple[subprocess.Popen[bytes], str]:
        name, _, version = body["bento"].partition(":")
        home = Path(tempfile.mkdtemp(dir=self.folder))
        shutil.copytree(self.folder / "bentos" / name / version, home / "bento")
        environment = {"PATH": os.environ["PATH"], "HOME": str(home), "BENTOML_HOME": str(home / "bentoml")}
        environment |= {"BENTOML_DO_NOT_TRACK": "True", "OMP_NUM_THREADS": "1"}
        environment |= {one["name"]: one["value"] for one in body.get("envs") or ()}
        for secret in body.get("secrets") or ():
            environment |= {one["key"]: one["value"] for one in self.secrets[secret]["content"]["items"]}
        port = free_port()
        command = [sys.executable, "-m", "bentoml", "serve", str(home / "bento"), "--host", "127.0.0.1"]
        with (home / "service.log").open("wb") as output:
            process = subprocess.Popen(
                [*command, "--port", str(port)],
                cwd=home,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return process, f"http://127.0.0.1:{port}"

    def _is_latest(self, name: str, revision: str) -> bool:
        return bool(self.deployments[name]["latest_revision"]["uid"] == revision)

    def _say(self, name: str, revision: str, status: str) -> None:
        with self._lock:
            if self._is_latest(name, revision):
                self.deployments[name]["status"] = status

    async def _forward(self, request: Request) -> Response:
        """Be the address of a deployment, whichever process serves it."""
        found = self._processes.get(request.path_params["name"])
        if found is None:
            return Response(status_code=503)
        headers = {key: value for key, value in request.headers.items() if key != "host"}
        async with httpx.AsyncClient(timeout=30, trust_env=False) as client:
            answer = await client.request(
                request.method,
                f"{found[1]}/{request.path_params['path']}",
                content=await request.body(),
                headers=headers,
            )
        return Response(answer.content, answer.status_code, media_type=answer.headers.get("content-type"))

    async def _pods(self, websocket: WebSocket) -> None:
        name = websocket.path_params["name"]
        if websocket.headers.get("x-yatai-api-token") != self.token or name not in self.deployments:
            await websocket.close()
            return
        await websocket.accept()
        running = self.deployments[name]["status"] == "running"
        pod = {"name": f"{name}-0", "namespace": "models", "labels": {}, "runner_name": ""}
        pod["status"] = {"phase": "Running" if running else "Pending", "ready": running}
        pod["pod_status"] = {
            "status": "Running" if running else "Pending",
            "reason": "" if running else "Insufficient cpu",
        }
        await websocket.send_json({"message": "", "type": "success", "payload": [pod]})
        await websocket.close()


def _user() -> Object:
    return {"name": "airflow", "email": "airflow@example.org", "first_name": "", "last_name": ""}


def _cluster() -> Object:
    facts = {"description": "", "organization_name": "team", "creator": _user(), "is_first": True}
    return base(CLUSTER, "cluster") | facts


def _serves(address: str) -> bool:
    try:
        return httpx.get(f"{address}/readyz", timeout=2, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
