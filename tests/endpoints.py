"""A version on a real service, in one call."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from airflow_mlops.core.rollouts.desired_state import ServedVersion
from airflow_mlops.serving.local import Deployment, LocalEndpoint, deploy_package

if TYPE_CHECKING:
    from airflow_mlops.integrations.bentoml import LocalServer


def deploy(server: LocalServer, package: Path, digest: str, version: str = "1") -> Deployment:
    """Let a service answer with a version of model ``m``."""
    served = ServedVersion(model_version=version, package_digest=digest)
    return deploy_package(LocalEndpoint(server, timeout_seconds=60), package, "m", served)
