"""Rollout: which model version an endpoint should serve, as one small document."""

from __future__ import annotations

import json
from dataclasses import dataclass

from airflow_mlops.core.codec import from_dict, to_dict
from airflow_mlops.core.package import is_plain_name
from airflow_mlops.exceptions import ArtifactIntegrityError, RolloutError


@dataclass(frozen=True, kw_only=True, slots=True)
class DesiredState:
    """What one endpoint is to serve.

    :param model_name: registered model; an endpoint serves one model for its whole life.
    :param model_version: its version.
    :param package_digest: digest of the package that carries it.
    :param folder: the verified copy, relative to the serving folder.
    :param previous_version: the version served before; ``None`` at the first deployment.
    :param revision: counts the changes of this document, from 1.
    :raises ValueError: when a name cannot be a folder name.
    """

    model_name: str
    model_version: str
    package_digest: str
    folder: str
    previous_version: str | None
    revision: int

    def __post_init__(self) -> None:
        for name in (self.model_name, self.model_version):
            if not is_plain_name(name):
                raise ValueError(
                    f"{name!r} cannot be served: a model name and version must be plain file names"
                )
        if self.folder != version_folder(self.model_name, self.model_version):
            raise ValueError(
                f"folder {self.folder!r} does not belong to {self.model_name} {self.model_version}"
            )

    def serves(self, model_version: str, package_digest: str) -> bool:
        """Tell whether it is this version, from this package."""
        return (self.model_version, self.package_digest) == (model_version, package_digest)

    def to_bytes(self) -> bytes:
        """Give the bytes of ``desired.json``."""
        return json.dumps(to_dict(self), indent=2).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> DesiredState:
        """Inverse of :meth:`to_bytes`.

        :raises ValueError: when it is no JSON, or naming each field that does not fit.
        """
        return from_dict(cls, json.loads(data))


def version_folder(model_name: str, model_version: str) -> str:
    """Where the copy of a version lives, relative to the serving folder.

    >>> version_folder("taxi-fare", "3")
    'models/taxi-fare/3'
    """
    return f"models/{model_name}/{model_version}"


def next_state(
    current: DesiredState | None, *, model_name: str, model_version: str, package_digest: str
) -> DesiredState:
    """Decide the state that serves ``model_version``; the same state when it already does.

    :param current: what the endpoint is to serve now; ``None`` when nothing was ever deployed there.
    :raises RolloutError: when the endpoint belongs to another model.
    :raises ArtifactIntegrityError: when the same version comes from a different package.
    """
    if current is not None and current.model_name != model_name:
        raise RolloutError(
            f"this endpoint serves model {current.model_name!r} (version {current.model_version}), not "
            f"{model_name!r}: give each model its own serving folder and port"
        )
    if current is not None and current.model_version == model_version:
        if not current.serves(model_version, package_digest):
            raise ArtifactIntegrityError(
                f"{model_name} version {model_version} is deployed from package {current.package_digest}, but "
                f"{package_digest} was given: a version never changes, register the new package as a new version"
            )
        return current
    return DesiredState(
        model_name=model_name,
        model_version=model_version,
        package_digest=package_digest,
        folder=version_folder(model_name, model_version),
        previous_version=None if current is None else current.model_version,
        revision=1 if current is None else current.revision + 1,
    )
