"""The BentoML service: BentoML owns process, health and scaling; requests for us pass its middleware by."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import bentoml

from airflow_mlops.serving.app import EndpointApp, Scope
from airflow_mlops.serving.drain import Drain
from airflow_mlops.serving.settings import ServiceSettings

if TYPE_CHECKING:
    from airflow_mlops.serving.requests import Receive
    from airflow_mlops.serving.responses import Send

# uvicorn puts a line together for each request, as long as there is anybody who could want it.
logging.getLogger("uvicorn.access").propagate = False

SETTINGS = ServiceSettings.from_environment()
APP = EndpointApp(SETTINGS)

#: What BentoML answers itself.
_BENTOML_PATHS = frozenset({"/livez", "/healthz", "/metrics"})


class _DirectService(bentoml.Service):  # type: ignore[misc]
    """A service whose own application answers before BentoML's middleware.

    Of that, OpenTelemetry costs most of a request's time even when nothing is sampled, and the timeout leaves a timer behind
    for a minute after each request: tens of thousands at once, through which every garbage collection walks.
    """

    def to_asgi(self, is_main: bool = True) -> Any:
        behind = super().to_asgi(is_main)

        async def front(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":  # start and stop
                await behind(scope, receive, send)
            elif scope["path"] not in _BENTOML_PATHS:
                await APP(scope, receive, send)
            else:
                if scope["path"] == "/metrics":
                    await asyncio.to_thread(APP.publish_metrics)
                await behind(scope, receive, send)

        return front


@bentoml.service(
    name="model_endpoint",
    service_class=_DirectService,
    workers=SETTINGS.workers,
    logging={"access": {"enabled": False}},
)
class ModelEndpoint:
    """Serves the version that the serving folder asks for."""

    def __init__(self) -> None:
        APP.start()
        Drain(APP, SETTINGS.serving_dir, SETTINGS.drain_seconds)
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    def stop(self) -> None:
        """Flush the inference log."""
        APP.stop()


def _end_with_parent(parent: int) -> None:
    """End this worker when BentoML's main process is gone: an orphan would hold the port and serve what nobody steers."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
