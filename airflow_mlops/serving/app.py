"""The predict route as a plain ASGI application, and the reconciler that swaps versions under it."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import math
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.codec import to_dict
from airflow_mlops.core.rollout import DesiredState
from airflow_mlops.core.signing import Trust
from airflow_mlops.exceptions import SignatureMismatchError
from airflow_mlops.serving.inference_log import InferenceLog
from airflow_mlops.serving.metrics import EndpointMetrics
from airflow_mlops.serving.model import ServedModel, load_model

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

DESIRED_FILE = "desired.json"
LOG_FOLDER = "inference_log"

MAXIMUM_ROWS = 10_000
MAXIMUM_BYTES = 16 * 1024 * 1024
#: Characters of a prediction id.
MAXIMUM_ID = 256
#: From this many rows on a prediction leaves the event loop, so that small requests are not held up.
THREAD_ROWS = 64


class RequestError(Exception):
    """A request that gets an answer other than 200."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveVersion:
    """The version that answers."""

    state: DesiredState
    model: ServedModel


class EndpointApp:
    """Answer ``POST /predict`` and ``GET /status`` with whatever version the serving folder's desired state names.

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
        self.public_keys = public_keys
        self.poll_seconds = poll_seconds
        self.live: LiveVersion | None = None
        self.error: str | None = None
        self.log = InferenceLog(serving_dir / LOG_FOLDER)
        self.metrics: EndpointMetrics | None = None
        self._seen: tuple[int, int] | None = None
        self._stopped = threading.Event()
        self._reconciler = threading.Thread(target=self._reconcile_regularly, name="reconciler", daemon=True)

    # -- life ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Load what is desired, then watch for changes."""
        self.metrics = EndpointMetrics()
        self.log.start()
        self.reconcile()
        self._reconciler.start()

    def stop(self) -> None:
        """Flush the log and end the threads."""
        self._stopped.set()
        self.log.stop()

    @property
    def ready(self) -> bool:
        """Whether a version answers."""
        return self.live is not None

    def reconcile(self) -> None:
        """Load the desired version beside the live one and swap one reference; a version that fails leaves the old one."""
        path = self.serving_dir / DESIRED_FILE
        try:
            stat = path.stat()
        except FileNotFoundError:
            return
        if (stat.st_mtime_ns, stat.st_ino) == self._seen:
            return
        self._seen = (stat.st_mtime_ns, stat.st_ino)
        try:
            desired = DesiredState.from_bytes(path.read_bytes())
            if self.live and self.live.state.serves(desired.model_version, desired.package_digest):
                self.live = LiveVersion(state=desired, model=self.live.model)
            else:
                model = load_model(
                    self.serving_dir / desired.folder,
                    expected_digest=desired.package_digest,
                    trust=Trust.of(self.public_keys, desired.model_name),
                )
                self.live = LiveVersion(state=desired, model=model)
            self.error = None
            logger.info("serving %s version %s", desired.model_name, desired.model_version)
        except Exception as err:
            self.error = f"{type(err).__name__}: {err}"
            logger.exception("the desired version can't be served")

    def _reconcile_regularly(self) -> None:
        while not self._stopped.wait(self.poll_seconds):
            self.reconcile()

    def status(self) -> dict[str, Any]:
        """Say what answers now, and why not what was asked for."""
        live = self.live
        return {
            "ready": live is not None,
            "model_name": live.state.model_name if live else None,
            "model_version": live.state.model_version if live else None,
            "revision": live.state.revision if live else None,
            "error": self.error,
            "shed_log_rows": self.log.shed_rows,
            "inputs": [to_dict(field) for field in live.model.manifest.signature.inputs] if live else [],
        }

    # -- requests -----------------------------------------------------------------------------------------

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"").decode("latin-1")[:100] or uuid.uuid4().hex
        try:
            status, body = await self._answer(scope, headers, receive)
        except RequestError as err:
            status, body = err.status, {"error": str(err)}
        except Exception:
            logger.exception("request %s failed", request_id)
            status, body = 500, {"error": f"the service failed on request {request_id}; its log says why"}
        if self.metrics is not None and scope["path"] == "/predict":
            self.metrics.count_request(self.live.state.model_version if self.live else "none", status)
        await _respond(send, status, body, request_id)

    async def _answer(
        self, scope: Scope, headers: Mapping[bytes, bytes], receive: Receive
    ) -> tuple[int, dict[str, Any]]:
        route = (scope["method"], scope["path"])
        if route not in {("POST", "/predict"), ("GET", "/status")}:
            raise RequestError(404, f"{scope['method']} {scope['path']}: try POST /predict or GET /status")
        self._authorize(headers)
        if route == ("GET", "/status"):
            return 200, self.status()
        return 200, await self._predict(await _read_json(headers, receive))

    def _authorize(self, headers: Mapping[bytes, bytes]) -> None:
        if self.token is None:
            return
        given = headers.get(b"authorization", b"")
        if not hmac.compare_digest(given, b"Bearer " + self.token.encode()):
            raise RequestError(401, "the bearer token is missing or wrong")

    async def _predict(self, body: Any) -> dict[str, Any]:
        live = self.live
        if live is None:
            raise RequestError(503, self.error or "no model version is live yet")
        started = time.perf_counter()
        rows, prediction_ids, times = _parse(body)
        try:
            columns = live.model.manifest.signature.columns_from_records(rows)
        except (SignatureMismatchError, AttributeError) as err:
            raise RequestError(422, str(err)) from err
        predict = live.model.predict_columns
        predictions = (
            await asyncio.to_thread(predict, columns) if len(rows) >= THREAD_ROWS else predict(columns)
        )
        if any(isinstance(value, float) and not math.isfinite(value) for value in predictions):
            raise RequestError(
                422, "the model gives no finite number for these rows; are the values in range?"
            )
        elapsed = time.perf_counter() - started
        kept = self.log.append(
            model_name=live.state.model_name,
            model_version=live.state.model_version,
            signature=live.model.manifest.signature,
            prediction_ids=prediction_ids,
            times=times,
            columns=columns,
            predictions=predictions,
            latency_ms=1000.0 * elapsed,
        )
        if self.metrics is not None:
            self.metrics.observe(live.state.model_version, rows=len(rows), seconds=elapsed, kept=kept)
        return {
            "model_name": live.state.model_name,
            "model_version": live.state.model_version,
            "prediction_ids": prediction_ids,
            "predictions": predictions,
        }


def _parse(body: Any) -> tuple[list[dict[str, Any]], list[str], list[datetime] | None]:
    """Take a request apart and check what does not depend on the model."""
    rows = body.get("rows") if isinstance(body, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise RequestError(422, 'the body must be {"rows": [{"field": value, ...}, ...]}')
    if len(rows) > MAXIMUM_ROWS:
        raise RequestError(413, f"{len(rows)} rows; at most {MAXIMUM_ROWS} in one request")
    ids = body.get("prediction_ids")
    if ids is None:
        ids = [uuid.uuid4().hex for _ in rows]
    elif not isinstance(ids, list) or len(ids) != len(rows):
        raise RequestError(422, f"prediction_ids: a list of {len(rows)} ids is needed, one per row")
    return (
        rows,
        [_parse_id(index, item) for index, item in enumerate(ids)],
        _parse_times(body.get("times"), len(rows)),
    )


def _parse_id(index: int, item: Any) -> str:
    text = str(item)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = ""
    if not isinstance(item, str | int) or not 0 < len(text) <= MAXIMUM_ID:
        raise RequestError(
            422,
            f"prediction_ids[{index}]: a text of 1 to {MAXIMUM_ID} characters is needed, got {item!r:.60}",
        )
    return text


def _parse_times(times: Any, count: int) -> list[datetime] | None:
    if times is None:
        return None
    if not isinstance(times, list) or len(times) != count:
        raise RequestError(422, f"times: a list of {count} ISO 8601 times is needed, one per row")
    parsed = []
    for index, item in enumerate(times):
        try:
            instant = datetime.fromisoformat(item)
            parsed.append(instant.replace(tzinfo=UTC) if instant.tzinfo is None else instant.astimezone(UTC))
        except (TypeError, ValueError, OverflowError) as err:
            raise RequestError(422, f"times[{index}]: {item!r:.60} is not an ISO 8601 time") from err
    return parsed


async def _read_json(headers: Mapping[bytes, bytes], receive: Receive) -> Any:
    """Read the body, at most :data:`MAXIMUM_BYTES` of it."""
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length) > MAXIMUM_BYTES:
        raise RequestError(413, f"{int(length)} bytes; at most {MAXIMUM_BYTES} in one request")
    chunks, size = [], 0
    while True:
        message = await receive()
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > MAXIMUM_BYTES:
            raise RequestError(413, f"more than {MAXIMUM_BYTES} bytes in one request")
        chunks.append(chunk)
        if not message.get("more_body"):
            break
    try:
        return json.loads(b"".join(chunks), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as err:
        raise RequestError(422, f"the body is not JSON: {err}") from err


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON; send null for a missing number")


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
