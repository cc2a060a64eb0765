"""A version on a real service, in one call."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from airflow_mlops.serving.local import Deployment, deploy_package

if TYPE_CHECKING:
    from airflow_mlops.integrations.bentoml import LocalServer


def deploy(server: LocalServer, package: Path, digest: str, version: str = "1") -> Deployment:
    """Let a service answer with a version of model ``m``."""
    return deploy_package(
        serving_dir=server.serving_dir,
        package_folder=package,
        model_name="m",
        model_version=version,
        package_digest=digest,
        host=server.host,
        port=server.port,
        token=server.token,
        timeout_seconds=60,
    )
