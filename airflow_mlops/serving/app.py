"""The service as a plain ASGI application: it answers requests with whatever versions the reconciler has loaded."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.codec import to_dict
from airflow_mlops.exceptions import RolloutError, SignatureMismatchError
from airflow_mlops.serving.inference_log import InferenceLog
from airflow_mlops.serving.lease import end_lease, renew_lease
from airflow_mlops.serving.metrics import EndpointMetrics
from airflow_mlops.serving.mirror import Answered, Mirror
from airflow_mlops.serving.model import all_finite
from airflow_mlops.serving.observer import Observer
from airflow_mlops.serving.reconciler import LiveVersion, Reconciler, Routes
from airflow_mlops.serving.requests import Receive, RequestError, parse, read_json

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

LOG_FOLDER = "inference_log"

#: From this many rows on a prediction leaves the event loop, so that small requests are not held up.
THREAD_ROWS = 64

_ROUTES = {
    ("POST", "/predict"),
    ("GET", "/status"),
    ("GET", "/rollout"),
    ("POST", "/rollout/lease"),
}

#: Longest lease of a rollout, in seconds.
MAXIMUM_LEASE = 3_600

#: How often what was observed during a rollout is added up and written.
OBSERVE_SECONDS = 0.5


class EndpointApp:
    """Answer ``POST /predict``, ``GET /status``, and, for whoever steers a rollout, ``/rollout`` and ``/rollout/lease``.

    :param serving_dir: serving folder.
    :param token: bearer token every request must bring; ``None``: no authentication.
    :param poll_seconds: how often the desired state is looked at.
    :param public_keys: keys a package must be signed with before it is loaded; ``None`` checks digests only.
    """

    def __init__(
        self,
        serving_dir: Path,
        *,
        token: str | None = None,
        poll_seconds: float = 0.2,
        public_keys: str | None = None,
    ) -> None:
        self.serving_dir = serving_dir
        self.token = token
        self.log = InferenceLog(serving_dir / LOG_FOLDER)
        self.observer = Observer(serving_dir)
        self.mirror = Mirror(self.observer)
        self.reconciler = Reconciler(
            serving_dir, on_change=self.observer.begin, poll_seconds=poll_seconds, public_keys=public_keys
        )
        self.metrics: EndpointMetrics | None = None
        self._stopped = threading.Event()
        self._observing = threading.Thread(target=self._observe_regularly, name="observer", daemon=True)

    # -- life ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Load what is desired, then watch for changes."""
        self.metrics = EndpointMetrics()
        self.log.start()
        self.mirror.start()
        self.reconciler.start()
        self._observing.start()

    def stop(self) -> None:
        """Write what is left and end the threads."""
        self._stopped.set()
        self.reconciler.stop()
        self.mirror.stop()
        self.observer.flush()
        self.log.stop()

    @property
    def ready(self) -> bool:
        """Whether a version answers."""
        return self.reconciler.routes is not None

    def status(self) -> dict[str, Any]:
        """Say what answers now, and why not what was asked for."""
        routes = self.reconciler.routes
        state = routes.state if routes else None
        return {
            "ready": routes is not None,
            "model_name": state.model_name if state else None,
            "model_version": state.stable.model_version if state else None,
            "versions": [to_dict(one) for one in state.versions] if state else [],
            "mirror": state.mirror if state else None,
            "revision": state.revision if state else None,
            "error": self.reconciler.error,
            "shed_log_rows": self.log.shed_rows,
            "inputs": [to_dict(field) for field in routes.stable.model.manifest.signature.inputs]
            if routes
            else [],
        }

    def _observe_regularly(self) -> None:
        while not self._stopped.wait(OBSERVE_SECONDS):
            self.observer.flush()

    # -- requests -----------------------------------------------------------------------------------------

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"").decode("latin-1")[:100] or uuid.uuid4().hex
        version = "none"
        try:
            status, body = await self._answer(scope, headers, receive)
            version = body.get("model_version", version)
        except RequestError as err:
            status, body, version = err.status, {"error": str(err)}, err.model_version or version
        except Exception:
            logger.exception("request %s failed", request_id)
            status, body = 500, {"error": f"the service failed on request {request_id}; its log says why"}
        if self.metrics is not None and scope["path"] == "/predict":
            self.metrics.count_request(version, status)
        await _respond(send, status, body, request_id)

    async def _answer(
        self, scope: Scope, headers: Mapping[bytes, bytes], receive: Receive
    ) -> tuple[int, dict[str, Any]]:
        route = (scope["method"], scope["path"])
        if route not in _ROUTES:
            raise RequestError(404, f"{scope['method']} {scope['path']}: try POST /predict or GET /status")
        self._authorize(headers)
        if route == ("GET", "/status"):
            return 200, self.status()
        if route == ("GET", "/rollout"):
            return 200, to_dict(await asyncio.to_thread(self.observer.read))
        body = await read_json(headers, receive)
        if route == ("POST", "/rollout/lease"):
            return 200, await asyncio.to_thread(self._lease, body)
        return 200, await self._predict(body, headers.get(b"x-sticky-key"))

    def _lease(self, body: Any) -> dict[str, Any]:
        """Renew the lease of a rollout, or end it."""
        revision, seconds = (
            body.get(name) if isinstance(body, dict) else None for name in ("revision", "seconds")
        )
        if (
            not isinstance(revision, int)
            or not isinstance(seconds, int | float)
            or not 0 <= seconds <= MAXIMUM_LEASE
        ):
            raise RequestError(
                422,
                f'the body must be {{"revision": 3, "seconds": 60}}, with 0 to {MAXIMUM_LEASE} seconds; 0 ends the lease',
            )
        try:
            if seconds:
                renew_lease(self.serving_dir, revision, seconds)
            else:
                end_lease(self.serving_dir, revision)
        except RolloutError as err:
            raise RequestError(409, str(err)) from err
        return {"revision": revision, "seconds": seconds}

    def _authorize(self, headers: Mapping[bytes, bytes]) -> None:
        if self.token is None:
            return
        given = headers.get(b"authorization", b"")
        if not hmac.compare_digest(given, b"Bearer " + self.token.encode()):
            raise RequestError(401, "the bearer token is missing or wrong")

    async def _predict(self, body: Any, sticky_key: bytes | None) -> dict[str, Any]:
        routes = self.reconciler.routes
        if routes is None:
            raise RequestError(503, self.reconciler.error or "no model version is live yet")
        version = routes.choose(sticky_key)
        signature = version.model.manifest.signature
        rows, prediction_ids, times = parse(body)
        try:
            columns = signature.columns_from_records(rows)
        except (SignatureMismatchError, AttributeError) as err:
            raise RequestError(422, str(err)) from err
        started = time.perf_counter()
        try:
            predictions = await self._predictions(version, columns, len(rows))
        except RequestError:
            self.observer.failed(version.model_version)
            raise
        seconds = time.perf_counter() - started
        if self.observer.active:
            self.observer.answered(version.model_version, seconds, predictions)
        note = partial(self._log, routes=routes, prediction_ids=prediction_ids, times=times, columns=columns)
        kept = note(version, predictions, seconds)
        if routes.mirror is not None and routes.mirror is not version:
            self.mirror.offer(routes.mirror, Answered(columns, predictions, partial(note, shadow=True)))
        if self.metrics is not None:
            self.metrics.observe(version.model_version, rows=len(rows), seconds=seconds, kept=kept)
        return {
            "model_name": routes.state.model_name,
            "model_version": version.model_version,
            "prediction_ids": prediction_ids,
            "predictions": predictions,
        }

    async def _predictions(
        self, version: LiveVersion, columns: Mapping[str, Sequence[Any]], count: int
    ) -> Sequence[Any]:
        predict = version.model.predict_columns
        try:
            predictions = (
                await asyncio.to_thread(predict, columns) if count >= THREAD_ROWS else predict(columns)
            )
        except Exception as err:
            logger.exception("version %s failed", version.model_version)
            message = f"version {version.model_version} failed on these rows; the service's log says why"
            raise RequestError(500, message, model_version=version.model_version) from err
        if not all_finite(predictions):
            message = "the model gives no finite number for these rows; are the values in range?"
            raise RequestError(422, message, model_version=version.model_version)
        return predictions

    def _log(
        self,
        version: LiveVersion,
        predictions: Sequence[Any],
        seconds: float,
        *,
        routes: Routes,
        shadow: bool = False,
        **request: Any,
    ) -> bool:
        """Write what a version answered to a request into the inference log."""
        if shadow:  # until the log knows what was never returned
            return True
        return self.log.append(
            model_name=routes.state.model_name,
            model_version=version.model_version,
            signature=version.model.manifest.signature,
            predictions=predictions,
            latency_ms=1000.0 * seconds,
            **request,
        )


async def _respond(send: Send, status: int, body: Mapping[str, Any], request_id: str) -> None:
    data = json.dumps(body, allow_nan=False).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(data)).encode()),
        (b"x-request-id", request_id.encode("latin-1")),
    ]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})
