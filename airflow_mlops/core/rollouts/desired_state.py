"""Desired state: which versions an endpoint should serve, and in which shares, as one small document."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, replace

from airflow_mlops.core.codec import from_dict, to_dict
from airflow_mlops.core.model.package import is_plain_name
from airflow_mlops.exceptions import ArtifactIntegrityError, RolloutError


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedVersion:
    """One version that an endpoint has loaded.

    :param model_version: its version.
    :param package_digest: digest of the package that carries it.
    :param share: of the requests that it answers, in ``[0, 1]``.
    """

    model_version: str
    package_digest: str
    share: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class DesiredState:
    """What one endpoint is to serve.

    :param model_name: registered model; an endpoint serves one model for its whole life.
    :param versions: what is loaded, the safe one first: it answers everything when whoever steers a rollout is gone. The
        shares add up to 1.
    :param mirror: version that computes an answer to every request as well, which is compared and never returned.
    :param sticky: requests with the same ``x-sticky-key`` are answered by the same version.
    :param leased: the shares hold only while somebody who steers the rollout says that he is there.
    :param rollout: name of the rollout that this is a part of.
    :param previous_version: the version served before; ``None`` at the first deployment.
    :param revision: counts the changes of this document, from 1.
    :raises ValueError: when a name cannot be a folder name, a version is there twice, or shares do not add up to 1.
    """

    model_name: str
    versions: tuple[ServedVersion, ...]
    mirror: str | None = None
    sticky: bool = False
    leased: bool = False
    rollout: str | None = None
    previous_version: str | None
    revision: int

    def __post_init__(self) -> None:
        names = [version.model_version for version in self.versions]
        for name in (self.model_name, *names):
            if not is_plain_name(name):
                raise ValueError(
                    f"{name!r} cannot be served: a model name and version must be plain file names"
                )
        if not names or len({*names}) != len(names):
            raise ValueError(f"versions {names}: each version once, and one at least")
        shares = [version.share for version in self.versions]
        if min(shares) < 0.0 or not math.isclose(sum(shares), 1.0, abs_tol=1e-9):
            raise ValueError(f"shares {shares} must not be negative, and add up to 1")
        if self.mirror is not None and self.mirror not in names:
            raise ValueError(f"mirror is version {self.mirror!r}, which is not among {names}")

    @property
    def stable(self) -> ServedVersion:
        """The version that answers everything when nobody steers."""
        return self.versions[0]

    @property
    def fallback(self) -> DesiredState:
        """The same with everything answered by the stable version."""
        return replace(self, versions=(replace(self.stable, share=1.0),), mirror=None, leased=False)

    def find(self, model_version: str) -> ServedVersion | None:
        """Find a version that is loaded."""
        return next((one for one in self.versions if one.model_version == model_version), None)

    def folder(self, version: ServedVersion) -> str:
        """Where the verified copy of a version lives, relative to the serving folder."""
        return version_folder(self.model_name, version.model_version)

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


def require_same_model(
    current: DesiredState | None, *, model_name: str, model_version: str, package_digest: str
) -> None:
    """See that a version may be served where ``current`` is.

    :raises RolloutError: the endpoint belongs to another model.
    :raises ArtifactIntegrityError: the same version comes from a different package.
    """
    if current is None:
        return
    if current.model_name != model_name:
        raise RolloutError(
            f"this endpoint serves model {current.model_name!r} (version {current.stable.model_version}), not "
            f"{model_name!r}: give each model its own serving folder and port"
        )
    there = current.find(model_version)
    if there is not None and there.package_digest != package_digest:
        raise ArtifactIntegrityError(
            f"{model_name} version {model_version} is deployed from package {there.package_digest}, but "
            f"{package_digest} was given: a version never changes, register the new package as a new version"
        )


def serve_alone(
    current: DesiredState | None, *, model_name: str, model_version: str, package_digest: str
) -> DesiredState:
    """Give the state in which one version answers everything; the same state when it already does.

    :param current: what the endpoint is to serve now; ``None`` when nothing was ever deployed there.
    :raises RolloutError: when the endpoint belongs to another model.
    :raises ArtifactIntegrityError: when the same version comes from a different package.
    """
    require_same_model(
        current, model_name=model_name, model_version=model_version, package_digest=package_digest
    )
    alone = ServedVersion(model_version=model_version, package_digest=package_digest)
    if current is None:
        return DesiredState(model_name=model_name, versions=(alone,), previous_version=None, revision=1)
    if current.versions == (alone,):
        return current
    stable = current.stable.model_version
    return DesiredState(
        model_name=model_name,
        versions=(alone,),
        previous_version=current.previous_version if stable == model_version else stable,
        revision=current.revision + 1,
    )


def share_point(key: bytes) -> float:
    """Give a key's point in ``[0, 1)``: the same wherever and whenever it is asked.

    >>> round(share_point(b"customer 17"), 4)
    0.5998
    """
    return int.from_bytes(hashlib.blake2b(key, digest_size=7).digest()) / 2.0**56
