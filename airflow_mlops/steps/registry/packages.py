"""Packages from the registry: loaded when they are who they should be, or read for what the model was trained on."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from airflow_mlops.core.model.signing import Trust
from airflow_mlops.core.profiles.profile_format import REFERENCE_PROFILE_FILE, profile_from_json
from airflow_mlops.exceptions import ArtifactIntegrityError
from airflow_mlops.integrations.mlflow import PACKAGE_FOLDER
from airflow_mlops.serving.model import ServedModel, load_model, open_model
from airflow_mlops.serving.package import read_package, read_verified, write_signature
from airflow_mlops.steps.registry.aliases import resolve_alias

if TYPE_CHECKING:
    from collections.abc import Iterator

    from airflow_mlops.core.model.package import PackageManifest
    from airflow_mlops.core.profiles.profile import Profile
    from airflow_mlops.integrations.mlflow import RegisteredVersion, Registry
    from airflow_mlops.services import Services


def load_version(registry: Registry, version: RegisteredVersion, services: Services) -> ServedModel:
    """Load a registered version: its digest is the registered one and, where keys are configured, it is signed.

    :raises ArtifactIntegrityError: it is not, or the file is not safe.
    """
    with tempfile.TemporaryDirectory() as temporary:
        return load_model(
            registry.download_version(version, Path(temporary)),
            expected_digest=version.package_digest,
            trust=Trust.of(services.signing_public_keys, version.model_name),
        )


@contextmanager
def run_package(
    registry: Registry,
    run_id: str,
    services: Services,
    *,
    model_name: str,
    package_digest: str | None,
    artifact_folder: str = PACKAGE_FOLDER,
) -> Iterator[tuple[Path, ServedModel]]:
    """Get the package of a run that is not registered yet, and so not signed: what the training reported vouches for it.

    For a pickle that is not enough: it must be registered, and is loaded with the signature of its version.

    :param model_name: model it is, or will be, a version of.
    :param artifact_folder: where the run has it; that of its twin, for example.
    :param package_digest: digest from the training's result, which does not come from MLflow.
    :returns: its folder, which is gone afterwards, and the loaded model.
    :raises ArtifactIntegrityError: it is another package; keys are configured and no digest is given; or it is a pickle that
        is not signed, or not accepted here.
    """
    if package_digest is None and services.signing_public_keys:
        raise ArtifactIntegrityError(
            f"the package of run {run_id} is not signed, as it is not registered; give package_digest (from the training's "
            "result), so that it can be verified before it is loaded"
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder = registry.download_package(run_id, Path(temporary), artifact_folder=artifact_folder)
        manifest, contents = read_verified(folder, package_digest)
        if manifest.serving_form != "pickle":
            yield folder, open_model(manifest, contents, folder, signed_as=None)
            return
        trust = Trust.of(services.signing_public_keys, model_name)
        version = registry.find_package(model_name, package_digest) if package_digest else None
        signature = version.package_signature() if version else None
        if trust is not None and signature is None:
            raise ArtifactIntegrityError(
                f"the package of run {run_id} is a pickle, and no version of {model_name!r} was signed with it: register it "
                "before it is evaluated or explained (RegisterModelOperator without evaluation), or train without allow_pickle"
            )
        if signature is not None:
            write_signature(folder, signature)
        yield folder, load_model(folder, expected_digest=package_digest, trust=trust)


def require_signed(version: RegisteredVersion, services: Services) -> None:
    """Refuse a version nobody trusted has signed, where keys are configured.

    :raises ArtifactIntegrityError: saying what is wrong with its signature.
    """
    trust = Trust.of(services.signing_public_keys, version.model_name)
    if trust is not None:
        trust.require(
            version.package_signature(),
            package_digest=version.package_digest,
            where=f"{version.model_name} version {version.model_version}",
        )


def version_manifest(registry: Registry, version: RegisteredVersion) -> PackageManifest:
    """Read the manifest of a registered version."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = registry.download_package(version.run_id, Path(temporary))
        return read_package(folder, expected_digest=version.package_digest)


def champion_profile(
    registry: Registry, services: Services, model_name: str, alias: str
) -> tuple[PackageManifest, Profile]:
    """Read manifest and reference profile of the version an alias points at."""
    version = resolve_alias(registry, services, model_name, alias)
    with tempfile.TemporaryDirectory() as temporary:
        folder = registry.download_package(version.run_id, Path(temporary))
        manifest = read_package(folder, expected_digest=version.package_digest)
        profile = profile_from_json((folder / REFERENCE_PROFILE_FILE).read_text())
    return manifest, profile
