"""The connection to MLflow, and its errors in our words."""

from __future__ import annotations

import logging
import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, ParamSpec, Self, TypeVar

from airflow_mlops.core.addresses import require_http_url
from airflow_mlops.exceptions import (
    ConnectionConfigError,
    ModelVersionNotFoundError,
    RegistryUnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mlflow import MlflowClient

    from airflow_mlops.services import Services

log = logging.getLogger(__name__)

# MLflow's own defaults retry for about four minutes; a task should fail soon and let Airflow retry it.
_HTTP_LIMITS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}


#: What a training made is stored again and again for so long while MLflow is away: hours of work may be in it.
PATIENCE_SECONDS = 600.0
_PAUSE_SECONDS = 5.0

_P = ParamSpec("_P")
_T = TypeVar("_T")


def patiently(call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Call, and while MLflow is away call again, for ten minutes (:data:`PATIENCE_SECONDS`).

    :raises TransientError: it stayed away.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return call(*args, **kwargs)
        except RegistryUnavailableError as err:
            if time.monotonic() > deadline:
                raise
            log.warning("%s; trying again, up to %.0f s", err, PATIENCE_SECONDS)
        time.sleep(_PAUSE_SECONDS)


class Connected:
    """A connection to MLflow.

    :param client: a connected client.
    :param tracking_uri: address of the server, for links.
    """

    def __init__(self, client: MlflowClient, tracking_uri: str) -> None:
        self.client = client
        self.tracking_uri = tracking_uri.rstrip("/")

    @classmethod
    def connect(cls, services: Services) -> Self:
        """Connect and see that the server answers.

        :raises ConnectionConfigError: the address is none, or not MLflow's.
        :raises RegistryUnavailableError: naming the address.
        """
        import httpx

        uri = require_http_url(services.require("tracking_uri"), purpose="MLflow")
        try:
            # Behind a proxy that asks for a login, the health check needs it as well.
            answer = httpx.get(f"{uri.rstrip('/')}/health", headers=services.tracking_headers(), timeout=10)
            if 300 <= answer.status_code < 500 and answer.status_code != 429:
                raise ConnectionConfigError(
                    f"{uri} answered {answer.status_code} to MLflow's health check: it is no MLflow, or its path or login "
                    "is wrong; check the MLflow connection"
                )
            answer.raise_for_status()
        except httpx.HTTPError as err:
            raise RegistryUnavailableError(
                f"MLflow at {uri} does not answer ({err}); check that it runs and the MLflow connection's address"
            ) from err
        _configure_process(services)
        from mlflow import MlflowClient

        return cls(MlflowClient(tracking_uri=uri, registry_uri=uri), uri)

    def _fail_models(self, experiment_id: str, run_id: str) -> None:
        """End the models that a run logged as failed."""
        for model in self.client.search_logged_models([experiment_id], f"source_run_id = '{run_id}'"):
            self.client.finalize_logged_model(model.model_id, "FAILED")


def _configure_process(services: Services) -> None:
    """Hand over what MLflow reads only from the environment: credentials, limits, and no telemetry.

    A task is a process of its own, so this reaches nobody else.
    """
    settings = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_TRACKING_USERNAME": services.tracking_username,
        "MLFLOW_TRACKING_PASSWORD": services.tracking_password,
        "MLFLOW_TRACKING_TOKEN": services.tracking_token,
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }
    os.environ.update({name: value for name, value in settings.items() if value})
    for name, value in _HTTP_LIMITS.items():
        os.environ.setdefault(name, value)


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Translate MLflow's one exception into ours: not there, not allowed, not right, or not reachable."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as err:
        if err.error_code in {"RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"} or (
            err.error_code == "INVALID_PARAMETER_VALUE" and "not found" in str(err)
        ):
            raise ModelVersionNotFoundError(f"MLflow has no {what}: {err}") from err
        if err.error_code in {"UNAUTHENTICATED", "PERMISSION_DENIED"}:
            raise ConnectionConfigError(
                f"MLflow refuses {what}: {err}; check Login and Password, or the token, of the MLflow connection"
            ) from err
        if err.error_code == "INVALID_PARAMETER_VALUE":
            raise ValueError(f"MLflow refused {what}: {err}") from err
        raise RegistryUnavailableError(f"MLflow failed on {what}: {err}") from err
