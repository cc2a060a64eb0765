"""Reading what a champion was trained on and promised, from its package in the registry."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from airflow_mlops.core.codec import from_dict
from airflow_mlops.core.profile import Profile
from airflow_mlops.serving.package import read_package

if TYPE_CHECKING:
    from airflow_mlops.core.package import PackageManifest
    from airflow_mlops.integrations.mlflow import RegisteredVersion, Registry


def version_manifest(registry: Registry, version: RegisteredVersion) -> PackageManifest:
    """Read the manifest of a registered version."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = registry.download_package(version.run_id, Path(temporary))
        return read_package(folder, expected_digest=version.package_digest)


def champion_profile(registry: Registry, model_name: str, alias: str) -> tuple[PackageManifest, Profile]:
    """Read manifest and reference profile of the version an alias points at."""
    import json

    version = registry.version_by_alias(model_name, alias)
    with tempfile.TemporaryDirectory() as temporary:
        folder = registry.download_package(version.run_id, Path(temporary))
        manifest = read_package(folder, expected_digest=version.package_digest)
        profile = from_dict(Profile, json.loads((folder / "reference_profile.json").read_text()))
    return manifest, profile
