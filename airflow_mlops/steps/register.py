"""Register: a finished run's package becomes a model version; the same package twice gives the same version."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from airflow_mlops.core.signing import SigningKey
from airflow_mlops.exceptions import ConnectionConfigError
from airflow_mlops.integrations.mlflow import SIGNATURE_TAG, Registry
from airflow_mlops.serving.package import read_package
from airflow_mlops.steps.base import Step

if TYPE_CHECKING:
    from airflow_mlops.core.package import PackageManifest
    from airflow_mlops.services import Services


@dataclass(frozen=True, kw_only=True, slots=True)
class RegisterSpec:
    """What to register.

    :param model_name: registered model; created when missing.
    :param run_id: MLflow run that holds the package.
    :param package_digest: digest the package must have.
    :param model_id: MLflow logged model of the same run, which ``mlflow.pyfunc`` loads.
    :param alias: set on the version; ``None`` sets none.
    :param verdict_reason: sentence of the evaluation, for the model card.
    """

    model_name: str
    run_id: str
    package_digest: str
    model_id: str | None = None
    alias: str | None = "challenger"
    verdict_reason: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RegisterResult:
    """The version.

    :param signed_by: id of the key it is signed with; ``None`` when it is not.
    """

    model_name: str
    model_version: str
    run_id: str
    package_digest: str
    signed_by: str | None
    version_url: str


def run(spec: RegisterSpec, services: Services) -> RegisterResult:
    """Verify the package, then register it.

    :raises ArtifactIntegrityError: the stored package is not the one with ``package_digest``.
    :raises ModelVersionNotFoundError: the run has no package.
    :raises ConnectionConfigError: signatures are asked for, and there is no key to sign with.
    """
    signature = _sign(spec, services)
    registry = Registry.connect(services)
    with tempfile.TemporaryDirectory() as temporary:
        folder = registry.download_package(spec.run_id, Path(temporary))
        manifest = read_package(folder, expected_digest=spec.package_digest)
    version = registry.register(
        spec.model_name,
        run_id=spec.run_id,
        model_id=spec.model_id,
        package_digest=spec.package_digest,
        tags={
            "airflow_mlops.dataset_digest": manifest.trained_on.dataset_digest,
            "airflow_mlops.serving_form": manifest.serving_form,
            **signature,
        },
        description=model_card(spec, manifest),
    )
    if spec.alias is not None:
        registry.set_alias(spec.model_name, spec.alias, version.model_version)
    return RegisterResult(
        model_name=spec.model_name,
        model_version=version.model_version,
        run_id=version.run_id,
        package_digest=version.package_digest,
        signed_by=signed.key_id if (signed := version.package_signature()) else None,
        version_url=registry.version_url(version),
    )


def _sign(spec: RegisterSpec, services: Services) -> dict[str, str]:
    """Give the tag that vouches for the package, or none where nothing is signed."""
    if services.signing_key:
        key = SigningKey.parse(services.signing_key)
        signed = key.sign(model_name=spec.model_name, package_digest=spec.package_digest)
        return {SIGNATURE_TAG: signed.to_text()}
    if services.signing_public_keys:
        raise ConnectionConfigError(
            f"{spec.model_name} was not registered: versions must be signed here, and the signing connection holds public "
            "keys only. Put the private key into its Password where models are registered"
        )
    return {}


def model_card(spec: RegisterSpec, manifest: PackageManifest) -> str:
    """Write the version's description: what it is, learned from what, how good, served how."""
    trained, holdout = manifest.trained_on, manifest.holdout
    inputs = ", ".join(f"`{field.name}` ({field.type})" for field in manifest.signature.inputs)
    lines = [
        f"**{spec.model_name}** predicts `{manifest.target}` ({manifest.task}) from {inputs}.",
        "",
        f"* Learned from {trained.rows} rows of `{trained.dataset_uri}` version {trained.dataset_version}, "
        f"{trained.window_start} to {trained.window_end} (`{trained.dataset_digest}`).",
        f"* {holdout.metric.upper()} {holdout.value:.4g} on {holdout.row_count} newer rows it never saw.",
        f"* Served as {manifest.serving_form}: {manifest.serving_reason}.",
    ]
    if spec.verdict_reason:
        lines.append(f"* Evaluation: {spec.verdict_reason}")
    return "\n".join(lines)


STEP = Step(name="register", spec=RegisterSpec, result=RegisterResult, run=run)
