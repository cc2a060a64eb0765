"""Where the outside services are: what a step needs beside its spec, kept out of the spec.

A spec is written to files, XCom and the ledger; this object holds credentials and is written nowhere.
An operator builds it from Airflow connections, ``python -m airflow_mlops.steps`` from the environment.
"""

from __future__ import annotations

import base64
import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from airflow_mlops.exceptions import ConnectionConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, kw_only=True, slots=True)
class Services:
    """Addresses and credentials of the services a step may talk to.

    :param tracking_uri: MLflow server, ``http(s)://host:port``.
    :param tracking_username: MLflow basic-auth user.
    :param tracking_password: its password.
    :param tracking_token: MLflow bearer token (instead of user and password).
    :param ledger_url: SQLAlchemy URL of the ledger.
    :param endpoint_url: model service, ``http(s)://host:port``.
    :param endpoint_token: bearer token of the model service.
    :param steering_token: bearer token rollouts are steered with; without one, that of the local service's folder.
    :param serving_dir: folder of the local service: desired state, verified model copies, inference log.
    :param signing_key: private key packages are signed with when they are registered.
    :param signing_public_keys: keys a package must be signed with before it is loaded, separated by white space;
        without any, digests are checked and signatures are not.
    :param connections: what opens the stores and sources that a spec names by connection, by connection id.
    :param hash_key: secret that values are hashed with before they are written.
    """

    tracking_uri: str | None = None
    tracking_username: str | None = None
    tracking_password: str | None = field(default=None, repr=False)
    tracking_token: str | None = field(default=None, repr=False)
    ledger_url: str | None = field(default=None, repr=False)
    endpoint_url: str | None = None
    endpoint_token: str | None = field(default=None, repr=False)
    steering_token: str | None = field(default=None, repr=False)
    serving_dir: str | None = None
    signing_key: str | None = field(default=None, repr=False)
    signing_public_keys: str | None = None
    connections: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)
    hash_key: str | None = field(default=None, repr=False)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Services:
        """Read ``AIRFLOW_MLOPS_<FIELD>`` (``AIRFLOW_MLOPS_TRACKING_URI``, ...); ``connections`` is JSON.

        :raises ConnectionConfigError: ``AIRFLOW_MLOPS_CONNECTIONS`` is no JSON object of objects.
        """
        source = os.environ if environ is None else environ
        values: dict[str, Any] = {name: source.get(variable) for name, variable in _VARIABLES.items()}
        return cls(**values, connections=_read_connections(source.get(_CONNECTIONS)))

    def to_environment(self) -> dict[str, str]:
        """Inverse of :meth:`from_environment`: how a runner hands the services to another process."""
        values = {variable: getattr(self, name) for name, variable in _VARIABLES.items()}
        given = {variable: value for variable, value in values.items() if value is not None}
        return given | ({_CONNECTIONS: json.dumps(self.connections)} if self.connections else {})

    def tracking_headers(self) -> dict[str, str]:
        """Give the headers that MLflow's own client logs in with: user and password, else the token."""
        if self.tracking_username and self.tracking_password:
            login = f"{self.tracking_username}:{self.tracking_password}".encode()
            return {"Authorization": f"Basic {base64.b64encode(login).decode()}"}
        return {"Authorization": f"Bearer {self.tracking_token}"} if self.tracking_token else {}

    def require(self, name: str) -> str:
        """Give the field, or say which one is missing and how to set it.

        :raises ConnectionConfigError: when the field is not set.
        """
        value: str | None = getattr(self, name)
        if not value:
            raise ConnectionConfigError(
                f"{name} is not set: fill in the Airflow connection that gives it, or export {_VARIABLES[name]}"
            )
        return value


def _read_connections(text: str | None) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(text or "{}")
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(facts, dict) for facts in found.values()):
        raise ConnectionConfigError(  # without the text, which holds credentials
            f'{_CONNECTIONS} must be a JSON object such as {{"lake": {{"kind": "s3", "key": "..."}}}}'
        )
    return found


_CONNECTIONS = "AIRFLOW_MLOPS_CONNECTIONS"
_VARIABLES = {name: f"AIRFLOW_MLOPS_{name.upper()}" for name in Services.__slots__ if name != "connections"}
