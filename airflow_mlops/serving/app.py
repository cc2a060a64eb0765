"""The service as a plain ASGI application: it answers requests with whatever versions the reconciler has loaded."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from airflow_mlops.core.codec import to_dict
from airflow_mlops.exceptions import RolloutError
from airflow_mlops.serving import arrow
from airflow_mlops.serving.authorization import Authorization
from airflow_mlops.serving.cache import AnswerCache
from airflow_mlops.serving.callers import Callers
from airflow_mlops.serving.explanations import Explanations, encode_explanations, explained_kind
from airflow_mlops.serving.inference_log import InferenceLog
from airflow_mlops.serving.inflate import Inflater
from airflow_mlops.serving.lease import MAXIMUM_LEASE, end_lease, renew_lease
from airflow_mlops.serving.log_settings import LOG_FOLDER
from airflow_mlops.serving.metrics import EndpointMetrics
from airflow_mlops.serving.mirror import Answered, Mirror
from airflow_mlops.serving.model import all_finite
from airflow_mlops.serving.observer import OBSERVED_FOLDER, Observer
from airflow_mlops.serving.openapi import openapi_document
from airflow_mlops.serving.reconciler import LiveVersion, Reconciler, Routes
from airflow_mlops.serving.requests import (
    BodyReader,
    IdMaker,
    NotJsonError,
    PredictionRequest,
    Receive,
    RequestError,
    parse_json,
)
from airflow_mlops.serving.responses import Response, Send, json_response, respond

if TYPE_CHECKING:
    from airflow_mlops.serving.settings import ServiceSettings

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Headers = Mapping[bytes, bytes]
_Answer = Callable[[Scope, Headers, Receive], Awaitable[Response]]


#: From this size on a body is read and answered outside of the event loop, so that small requests are not held up.
THREAD_BYTES = 8_192

#: Allocations after which Python looks for garbage in rings, and how seldom it looks at what has survived.
_COLLECTED_AFTER = (2_000, 250, 100)

#: How often what was counted is added up and written.
PUBLISH_SECONDS = 0.5


class EndpointApp:
    """Answer ``POST /predict``, explain what it answers, say which version does, and take part in rollouts.

    :param settings: what it runs with.
    """

    def __init__(self, settings: ServiceSettings) -> None:
        self.settings = settings
        self.log = InferenceLog(settings.serving_dir / LOG_FOLDER)
        self.callers = Callers(
            settings.serving_dir / OBSERVED_FOLDER, log_key=self.log.settings.key_of_callers()
        )
        self.observer = Observer(settings.serving_dir, self.callers)
        self.mirror = Mirror(self.observer)
        self._authorization = Authorization.of(settings)
        self.reconciler = Reconciler(
            settings.serving_dir,
            on_change=self._routes_changed,
            poll_seconds=settings.poll_seconds,
            public_keys=settings.public_keys,
            workers=settings.workers,
            authorization=self._authorization,
        )
        self.metrics: EndpointMetrics | None = None
        #: Whether callers are told to ask elsewhere, as this worker is about to end.
        self.draining = False
        self._cache = AnswerCache(settings.cache_rows)
        self._ids = IdMaker()
        self._bodies = BodyReader(settings.maximum_bytes, settings.body_seconds)
        self._inflater = Inflater(settings.maximum_bytes)
        self._explanations = Explanations(settings, self.observer.computing)
        self._at_hand = 0
        self._stopped = threading.Event()
        self._publishing = threading.Thread(target=self._publish_regularly, name="publisher", daemon=True)
        self._open: dict[tuple[str, str], _Answer] = {("GET", "/readyz"): self._answer_ready}
        self._guarded: dict[tuple[str, str], _Answer] = {
            ("POST", "/predict"): self._answer_predict,
            ("POST", "/predict/explain"): self._answer_explain,
            ("GET", "/status"): self._answer_status,
            ("GET", "/openapi.json"): self._answer_openapi,
            (
                "GET",
                "/docs.json",
            ): self._answer_openapi,  # where BentoML would have its own, which knows no model
        }
        self._steering: dict[tuple[str, str], _Answer] = {
            ("GET", "/rollout"): self._answer_rollout,
            ("POST", "/rollout/lease"): self._answer_lease,
        }

    def start(self) -> None:
        """Load what is desired, then watch for changes."""
        self.metrics = EndpointMetrics(
            waiting_rows=lambda: self.log.queued_rows, shed_rows=lambda: self.log.shed_rows
        )
        self.log.start()
        self.mirror.start()
        self.reconciler.start()
        self._publishing.start()
        # What was loaded stays, and what waits for the log goes by itself. Collections that walk through it let requests wait.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_COLLECTED_AFTER)

    def stop(self) -> None:
        """Write what is left and end the threads."""
        self._stopped.set()
        self._explanations.stop()
        self.reconciler.stop()
        self.mirror.stop()
        self._publish()
        self.observer.flush()
        self.log.stop()

    @property
    def ready(self) -> bool:
        """Whether a version answers, and will go on to."""
        return self.reconciler.routes is not None and not self.draining

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
            "deployment": self.settings.deployment,
            "error": self.reconciler.error,
            "shed_log_rows": self.log.shed_rows,
            "inputs": [to_dict(field) for field in routes.stable.model.manifest.signature.inputs]
            if routes
            else [],
        }

    def publish_metrics(self) -> None:
        """Bring what ``/metrics`` exposes up to date."""
        if self.metrics is not None:
            self.metrics.publish()

    def _routes_changed(self, routes: Routes) -> None:
        self.observer.begin(routes)
        if self.metrics is not None:
            self.metrics.began(routes, self.settings.serving_dir)

    def _publish(self) -> None:
        try:
            self.observer.flush_when_due()
            self.publish_metrics()
        except Exception:  # serving without metrics is better than not serving
            logger.exception("what was counted can't be published")

    def _publish_regularly(self) -> None:
        while not self._stopped.wait(PUBLISH_SECONDS):
            self._publish()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"")[:100] or self._ids.one().encode()
        headers[b"x-request-id"] = request_id
        version = "none"
        try:
            response = await self._route(scope["method"], scope["path"], headers)(scope, headers, receive)
        except RequestError as err:
            version = err.model_version or version
            response = _error_response(err, headers)
        except Exception:
            logger.exception("request %s failed", request_id.decode("latin-1"))
            message = f"the service failed on request {request_id.decode('latin-1')}; its log says why"
            response = json_response(500, {"error": message})
        if self.metrics is not None and response.status != 200:
            if scope["path"] == "/predict":
                self.metrics.count_request(version, response.status)
            elif scope["path"] == "/predict/explain":
                self.metrics.count_explanation(version, response.status)
        await respond(send, response, request_id, last=self.draining)

    def _route(self, method: str, path: str, headers: Headers) -> _Answer:
        answer = self._guarded.get((method, path))
        if answer is not None:
            self._authorization.require(headers)
            return answer
        answer = self._steering.get((method, path))
        if answer is not None:
            self._authorization.require_steering(headers)
            return answer
        answer = self._open.get((method, path))
        if answer is not None:
            return answer
        known = (*self._guarded, *self._steering, *self._open)
        allowed = [verb for verb, where in known if where == path]
        raise RequestError(
            405 if allowed else 404,
            f"{method} {path}: try POST /predict, POST /predict/explain, GET /status or GET /openapi.json",
        )

    async def _answer_ready(self, scope: Scope, headers: Headers, receive: Receive) -> Response:
        status = self.status()
        body = {name: status[name] for name in ("model_name", "model_version", "versions", "mirror", "error")}
        return json_response(200 if self.ready else 503, {"ready": self.ready, **body})

    async def _answer_status(self, scope: Scope, headers: Headers, receive: Receive) -> Response:
        return json_response(200, self.status())

    async def _answer_openapi(self, scope: Scope, headers: Headers, receive: Receive) -> Response:
        routes = self.reconciler.routes
        manifest = routes.stable.model.manifest if routes else None
        name = routes.state.model_name if routes else None
        explains = routes is not None and any(
            routes.versions[one.model_version].model.background is not None
            for one in routes.state.versions
            if one.share
        )
        document = openapi_document(
            manifest,
            name,
            self.settings,
            explains=explains,
            asks_tokens=self._authorization.asks_callers,
        )
        return json_response(200, document)

    async def _answer_rollout(self, scope: Scope, headers: Headers, receive: Receive) -> Response:
        return json_response(200, to_dict(await asyncio.to_thread(self.observer.read)))

    async def _answer_lease(self, scope: Scope, headers: Headers, receive: Receive) -> Response:
        body = parse_json(await self._bodies.read(headers, receive))
        return json_response(200, await asyncio.to_thread(self._lease, body))

    def _lease(self, body: Any) -> dict[str, Any]:
        """Renew the lease of a rollout, or end it."""
        revision, seconds = (
            body.get(name) if isinstance(body, dict) else None for name in ("revision", "seconds")
        )
        if (
            not isinstance(revision, int)
            or isinstance(revision, bool)
            or isinstance(seconds, bool)
            or not isinstance(seconds, int | float)
            or not 0 <= seconds <= MAXIMUM_LEASE
        ):
            raise RequestError(
                422,
                f'the body must be {{"revision": 3, "seconds": 60}}, with 0 to {MAXIMUM_LEASE} seconds; 0 ends the lease',
            )
        try:
            if seconds:
                renew_lease(self.settings.serving_dir, revision, seconds)
            else:
                end_lease(self.settings.serving_dir, revision)
        except RolloutError as err:
            raise RequestError(409, str(err)) from err
        return {"revision": revision, "seconds": seconds}

    async def _answer_predict(self, scope: Scope, headers: Headers, receive: Receive) -> Response:
        body = await self._bodies.read(headers, receive)  # first: who sends slowly takes nobody's place
        if self._at_hand >= self.settings.maximum_concurrency:
            raise RequestError(
                429, f"{self._at_hand} requests are at hand, which is what this worker takes; come again"
            )
        self._at_hand += 1
        try:
            encoding = headers.get(b"content-encoding")
            if encoding is None:
                return await self._predict(headers, body)
            async with self._inflater.unpacked(encoding, body) as plain:
                return await self._predict(headers, plain)
        finally:
            self._at_hand -= 1

    async def _predict(self, headers: Headers, body: bytes) -> Response:
        routes = self._live_routes()
        is_arrow = arrow.is_arrow(headers.get(b"content-type"))
        began = time.perf_counter()
        version, asked, predictions = await self._answer_by_some(
            routes, body, is_arrow, caller=headers.get(b"x-sticky-key")
        )
        ids = asked.prediction_ids or self._ids.many(asked.size)
        seconds = time.perf_counter() - began
        asked = asked._replace(prediction_ids=ids)
        self._note(routes, version, asked, predictions, seconds, headers=headers, body=body)
        if self.metrics is not None:
            self.metrics.count_request(version.model_version, 200)
            self.metrics.count_answer(
                version.model_version,
                columns=asked.columns,
                predictions=predictions,
                seconds=seconds,
            )
        if is_arrow or arrow.wants_arrow(headers.get(b"accept")):
            return _table_response(arrow.encode_arrow(ids, predictions), routes, version)
        return json_response(
            200,
            {
                "model_name": routes.state.model_name,
                "model_version": version.model_version,
                "prediction_ids": ids,
                "predictions": predictions,
            },
        )

    def _live_routes(self) -> Routes:
        routes = self.reconciler.routes
        if routes is None:
            raise RequestError(503, self.reconciler.error or "no model version is live yet")
        return routes

    async def _answer_by_some(
        self, routes: Routes, body: bytes, is_arrow: bool, *, caller: bytes | None
    ) -> tuple[LiveVersion, PredictionRequest, Sequence[Any]]:
        """Let a version answer, and count what it did; the one before it, where its own inputs refuse what callers send."""
        version, revision = routes.choose(caller), routes.state.revision
        try:
            asked, predictions, seconds = await self._ask(version, body, is_arrow)
        except RequestError as err:
            if err.model_version is not None:
                self.observer.failed(err.model_version, revision, caller)
                raise
            if version is routes.stable:
                self.observer.refused(version.model_version, revision, caller)
                raise
            try:
                asked, predictions, _ = await self._ask(routes.stable, body, is_arrow)
            except RequestError:
                self.observer.refused(version.model_version, revision, caller)
                raise
            self.observer.failed(version.model_version, revision, caller)
            return routes.stable, asked, predictions
        if self.observer.active:
            self.observer.answered(version.model_version, revision, seconds, predictions, caller)
        return version, asked, predictions

    async def _ask(
        self, version: LiveVersion, body: bytes, is_arrow: bool
    ) -> tuple[PredictionRequest, Sequence[Any], float]:
        """Let a version answer; outside of the event loop where that takes long."""
        if is_arrow or len(body) >= THREAD_BYTES:
            compute = partial(self._compute, version, body, is_arrow)
            return await asyncio.get_running_loop().run_in_executor(None, compute)
        return self._compute(version, body, is_arrow)

    def _compute(
        self, version: LiveVersion, body: bytes, is_arrow: bool
    ) -> tuple[PredictionRequest, Sequence[Any], float]:
        """Read a body and predict its rows; gives the seconds that the prediction took as well."""
        asked = self._read(version, body, is_arrow)
        started = time.perf_counter()
        predictions = self._predictions(version, asked)
        return asked, predictions, time.perf_counter() - started

    def _read(self, version: LiveVersion, body: bytes, is_arrow: bool) -> PredictionRequest:
        """Read a body as a version's inputs want it."""
        model, most_rows = version.model, self.settings.maximum_rows
        if not is_arrow:
            return model.decoder.decode(body, most_rows)
        return arrow.decode_arrow(body, model.manifest.signature, most_rows, self.settings.maximum_bytes)

    def _predictions(self, version: LiveVersion, asked: PredictionRequest) -> Sequence[Any]:
        # While versions are compared, all of them work for their answers.
        remembers = self._cache.size and asked.size == 1 and not self.observer.active
        key = (
            (version.package_digest, *(column[0] for column in asked.columns.values())) if remembers else None
        )
        known = self._cache.get(key) if key else None
        if known is not None:
            return known
        try:
            with self.observer.computing(version.model_version):
                predictions = version.model.predict_columns(asked.columns)
        except Exception as err:
            logger.exception("version %s failed", version.model_version)
            message = f"version {version.model_version} failed on these rows; the service's log says why"
            raise RequestError(500, message, model_version=version.model_version) from err
        if not all_finite(predictions):
            message = "the model gives no finite number for these rows; are the values in range?"
            raise RequestError(422, message, model_version=version.model_version)
        if key:
            self._cache.put(key, predictions)
        return predictions

    def _note(
        self,
        routes: Routes,
        version: LiveVersion,
        asked: PredictionRequest,
        predictions: Sequence[Any],
        seconds: float,
        *,
        headers: Headers,
        body: bytes,
    ) -> None:
        """Log an answer, and let the mirror answer as well."""
        log = partial(
            self._log,
            routes=routes,
            request_id=headers[b"x-request-id"].decode("latin-1"),
            caller=self._caller(routes, headers),
            prediction_ids=asked.prediction_ids,
            times=asked.times,
            columns=asked.columns,
        )
        log(version, predictions, seconds)
        mirror = routes.mirror
        if mirror is None or mirror is version:
            return
        answered = Answered(routes.state.revision, asked.columns, predictions, partial(log, shadow=True))
        if mirror.model.manifest.signature.inputs != version.model.manifest.signature.inputs:
            is_arrow = arrow.is_arrow(headers.get(b"content-type"))
            answered = answered._replace(
                read=lambda other: self._read(other, body, is_arrow).columns, body_bytes=len(body)
            )
        self.mirror.offer(mirror, answered)

    def _caller(self, routes: Routes, headers: Headers) -> str | None:
        """Give what stands for the sticky key in the log, while callers stay with their version."""
        key = headers.get(b"x-sticky-key") if routes.state.sticky else None
        return self.callers.pseudonym(routes.state.revision, key) if key else None

    def _log(
        self,
        version: LiveVersion,
        predictions: Sequence[Any],
        seconds: float,
        *,
        routes: Routes,
        **request: Any,
    ) -> bool:
        """Write what a version answered to a request into the inference log."""
        return self.log.append(
            model_name=routes.state.model_name,
            model_version=version.model_version,
            signature=version.model.manifest.signature,
            predictions=predictions,
            latency_ms=1000.0 * seconds,
            **request,
        )

    async def _answer_explain(self, scope: Scope, headers: Headers, receive: Receive) -> Response:
        """Say where answers come from; nobody acts on them, so they are neither logged, mirrored nor observed."""
        body = await self._bodies.read(headers, receive)
        encoding = headers.get(b"content-encoding", b"")
        async with self._inflater.unpacked(encoding, body) as plain:
            return await self._explain(scope, headers, plain)

    async def _explain(self, scope: Scope, headers: Headers, body: bytes) -> Response:
        routes = self._live_routes()
        is_arrow = arrow.is_arrow(headers.get(b"content-type"))
        explained = await self._explanations.explain(
            routes, body, is_arrow=is_arrow, label=_asked_label(scope), caller=headers.get(b"x-sticky-key")
        )
        version = explained.version
        if self.metrics is not None:
            rows = len(explained.rows)
            self.metrics.count_explanation(version.model_version, 200, rows=rows, seconds=explained.seconds)
        if is_arrow or arrow.wants_arrow(headers.get(b"accept")):
            return _table_response(encode_explanations(explained), routes, version)
        return json_response(
            200,
            {
                "model_name": routes.state.model_name,
                "model_version": version.model_version,
                "prediction_ids": explained.asked.prediction_ids,
                "explained": explained_kind(version.model),
                "explanations": [row._asdict() for row in explained.rows],
            },
        )


def _asked_label(scope: Scope) -> str | None:
    """Read ``?label=``.

    :raises RequestError: it is there several times, or is no text.
    """
    try:
        asked = parse_qs(
            scope.get("query_string", b"").decode(),
            keep_blank_values=True,
            errors="strict",
            max_num_fields=20,
        ).get("label", [])
    except ValueError as err:
        raise RequestError(422, f"the query can't be read: {err}") from err
    if len(asked) > 1:
        raise RequestError(422, "label: one label is needed, several are given")
    return asked[0] if asked else None


def _table_response(table: bytes, routes: Routes, version: LiveVersion) -> Response:
    about = (
        (b"x-model-name", routes.state.model_name.encode()),
        (b"x-model-version", version.model_version.encode()),
    )
    return Response(200, table, arrow.CONTENT_TYPE, about)


def _error_response(err: RequestError, headers: Headers) -> Response:
    message = str(err)
    if isinstance(err, NotJsonError) and b"json" not in headers.get(b"content-type", b"json").lower():
        kind = headers[b"content-type"].decode("latin-1")
        message += (
            f". Its Content-Type is {kind!r:.60}: send JSON, or a table as {arrow.CONTENT_TYPE.decode()}"
        )
    more = {
        401: ((b"www-authenticate", b"Bearer"),),
        408: ((b"connection", b"close"),),  # the rest of the body is not waited for
        415: ((b"accept-encoding", b"gzip"),),
        429: ((b"retry-after", b"1"),),
        503: ((b"retry-after", b"1"),),
    }
    return json_response(err.status, {"error": message}, *more.get(err.status, ()))
