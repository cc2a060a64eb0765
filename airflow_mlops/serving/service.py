"""The BentoML service: BentoML owns process, health and scaling; our route is mounted in it as plain ASGI."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import bentoml

from airflow_mlops.serving.app import EndpointApp

APP = EndpointApp(
    Path(os.environ.get("AIRFLOW_MLOPS_SERVING_DIR", ".")),
    token=os.environ.get("AIRFLOW_MLOPS_ENDPOINT_TOKEN") or None,
    public_keys=os.environ.get("AIRFLOW_MLOPS_SIGNING_PUBLIC_KEYS") or None,
)


# The OpenTelemetry middleware costs most of a request's time even when nothing is sampled; access logging comes next.
@bentoml.service(
    name="model_endpoint",
    workers=1,
    logging={"access": {"enabled": False}},
    tracing={"excluded_urls": "predict,status"},
)
@bentoml.asgi_app(APP)
class ModelEndpoint:
    """Serves the version that the serving folder asks for."""

    def __init__(self) -> None:
        APP.start()
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()

    def __is_ready__(self) -> bool:
        """Whether a model version answers; behind BentoML's ``/readyz``."""
        return APP.ready

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    def stop(self) -> None:
        """Flush the inference log."""
        APP.stop()


def _end_with_parent(parent: int) -> None:
    """End this worker when BentoML's main process is gone: an orphan would hold the port and serve what nobody steers."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
