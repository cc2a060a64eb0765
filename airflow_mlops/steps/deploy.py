"""Deploy: a registered version becomes the one that the local BentoML service answers with."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from airflow_mlops.core.desired_state import ServedVersion
from airflow_mlops.exceptions import ConnectionConfigError
from airflow_mlops.integrations.bentoml import LocalServer
from airflow_mlops.integrations.mlflow import Registry
from airflow_mlops.serving.local import LocalEndpoint, deploy_package
from airflow_mlops.steps.base import Step

if TYPE_CHECKING:
    from airflow_mlops.services import Services


@dataclass(frozen=True, kw_only=True, slots=True)
class DeploySpec:
    """What to deploy.

    :param model_name: registered model.
    :param model_version: version number; ``None`` takes the one ``alias`` points at.
    :param alias: see ``model_version``.
    :param timeout_seconds: how long the service may take to answer with the new version.
    """

    model_name: str
    model_version: str | None = None
    alias: str = "champion"
    timeout_seconds: float = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class DeployResult:
    """What serves now."""

    model_name: str
    model_version: str
    previous_version: str | None
    endpoint_url: str
    package_digest: str
    revision: int
    seconds: float
    started: bool


def run(spec: DeploySpec, services: Services) -> DeployResult:
    """Replace the served version in one step; the old one answers until the new one has proved itself.

    :raises RolloutError: the new version did not come up; says what serves now.
    :raises ModelVersionNotFoundError: no such version or alias.
    """
    url = urlsplit(services.require("endpoint_url"))
    if url.hostname is None or url.port is None:
        raise ConnectionConfigError(
            f"endpoint {services.endpoint_url!r} needs a host and a port to start a service on"
        )
    registry = Registry.connect(services)
    version = (
        registry.version(spec.model_name, spec.model_version)
        if spec.model_version
        else registry.version_by_alias(spec.model_name, spec.alias)
    )
    server = LocalServer(
        Path(services.require("serving_dir")),
        host=url.hostname,
        port=url.port,
        token=services.endpoint_token,
        public_keys=services.signing_public_keys,
    )
    endpoint = LocalEndpoint(server, timeout_seconds=spec.timeout_seconds)
    served = ServedVersion(model_version=version.model_version, package_digest=version.package_digest)
    with tempfile.TemporaryDirectory() as temporary:
        folder = registry.download_version(version, Path(temporary))
        deployment = deploy_package(endpoint, folder, version.model_name, served)
    return DeployResult(
        model_name=version.model_name,
        model_version=version.model_version,
        previous_version=deployment.previous_version,
        endpoint_url=server.url,
        package_digest=version.package_digest,
        revision=deployment.revision,
        seconds=deployment.seconds,
        started=deployment.started,
    )


STEP = Step(name="deploy", spec=DeploySpec, result=DeployResult, run=run)
