"""From the connection in ``s3://conn_id@bucket/key`` to what opens the store."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.store_uris import parse_store_uri, stores_in
from airflow_mlops.exceptions import ConnectionConfigError
from airflow_mlops.hooks.base import extra_of, read_connection
from airflow_mlops.integrations import storage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from airflow.sdk import Connection

#: Connection types of Airflow's providers, and what kind of store each opens.
_KINDS = {"aws": "s3", "google_cloud_platform": "gcs", "wasb": "azure", "adls": "azure"}


def stores_of(value: Any, conn_ids: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """Resolve the connections of all addresses in a JSON value, and further ones.

    :param conn_ids: connections of stores that no address in the value names.
    :returns: for :attr:`~airflow_mlops.services.Services.connections`.
    :raises ConnectionConfigError: a connection is missing, of the wrong type, or its provider is not installed.
    """
    wanted: dict[str, str | None] = dict.fromkeys(conn_ids)
    for found in stores_in(value):
        wanted[str(found.conn_id)] = found.kind
    return {conn_id: _resolve(conn_id, kind) for conn_id, kind in wanted.items()}


def remember_stores(*uris: str) -> None:
    """Make addresses open in this process: for what runs in no step, such as a sensor."""
    storage.remember(stores_of([uri for uri in uris if parse_store_uri(uri).conn_id]))


def _resolve(conn_id: str, kind: str | None) -> dict[str, Any]:
    types = [name for name, opened in _KINDS.items() if kind in (None, opened)]
    connection = read_connection(conn_id, " or ".join(types))
    found = _KINDS.get(connection.conn_type or "")
    if found is None or kind not in (None, found):
        raise ConnectionConfigError(
            f"connection {conn_id!r} is of type {connection.conn_type}, which opens no such store: make it {' or '.join(types)}"
        )
    return {"kind": found, **_FACTS[found](connection)}


def _s3(connection: Connection) -> dict[str, Any]:
    """Ask the amazon provider, which knows profiles, roles and endpoints."""
    try:
        from airflow.providers.amazon.aws.hooks.s3 import S3Hook
    except ImportError as err:
        raise ConnectionConfigError(
            f"connection {connection.conn_id!r} needs Airflow's amazon provider: pip install 'airflow-mlops[s3]'"
        ) from err
    hook = S3Hook(aws_conn_id=connection.conn_id)
    credentials = hook.get_session().get_credentials()
    frozen = credentials.get_frozen_credentials() if credentials is not None else None
    config = extra_of(connection).get("config_kwargs") or {}
    return {
        "key": frozen and frozen.access_key,
        "secret": frozen and frozen.secret_key,
        "token": frozen and frozen.token,
        "region": hook.region_name,
        "endpoint_url": hook.conn_config.get_service_endpoint_url("s3"),
        "addressing_style": config.get("s3", {}).get("addressing_style"),
    }


def _gcs(connection: Connection) -> dict[str, Any]:
    extra = extra_of(connection)
    key = extra.get("keyfile_dict") or extra.get("extra__google_cloud_platform__keyfile_dict")
    return {
        "service_account_key": json.dumps(key) if isinstance(key, dict) else key,
        "service_account_path": extra.get("key_path"),
    }


def _azure(connection: Connection) -> dict[str, Any]:
    extra = extra_of(connection, "tenant_id", "sas_token")
    if extra["tenant_id"]:
        # As in the provider: with a tenant, login and password are those of an application and Host names the account.
        account = (connection.host or "").removeprefix("https://").partition(".")[0]
        login = {"client_id": connection.login, "client_secret": connection.password}
    else:
        account, login = connection.login or "", {"account_key": connection.password}
    return {
        "account_name": account or None,
        "tenant_id": extra["tenant_id"],
        "sas_token": extra["sas_token"],
        **{name: value or None for name, value in login.items()},
    }


_FACTS: dict[str, Callable[[Connection], dict[str, Any]]] = {"s3": _s3, "gcs": _gcs, "azure": _azure}
