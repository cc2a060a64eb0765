"""Stores behind connections: with what fsspec, polars and delta-rs open ``s3://conn_id@bucket/key``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

from airflow_mlops.core.store_uris import parse_store_uri
from airflow_mlops.exceptions import ConnectionConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

#: By connection id, of this process: tables are opened by address, in many places and in threads of the libraries. An id means
#: the same connection wherever it is written, so what is known of one is only ever replaced.
_connections: dict[str, dict[str, Any]] = {}


class Location(NamedTuple):
    """Where something is and how it is opened.

    :param uri: without the connection's id.
    :param options: of polars and delta-rs; ``None``: those of the environment.
    :param file_options: of fsspec.
    """

    uri: str
    options: dict[str, str] | None
    file_options: dict[str, Any]


def remember(connections: Mapping[str, Mapping[str, Any]]) -> None:
    """Take in what is known of connections, by id, as :class:`~airflow_mlops.services.Services` has it."""
    _connections.update({conn_id: dict(facts) for conn_id, facts in connections.items()})


def locate(uri: str) -> Location:
    """Say how an address is opened.

    :raises ConnectionConfigError: its connection is not known here, or is one of another kind of store.
    :raises ValueError: the address holds a password.
    """
    address = parse_store_uri(uri)
    if address.conn_id is None or address.kind is None:
        return Location(address.uri, None, {})
    facts = _connections.get(address.conn_id)
    if facts is None:
        raise ConnectionConfigError(
            f"{uri}: connection {address.conn_id!r} was not handed to this step. Name it in the operator's storage_conn_ids; "
            "outside Airflow put it into AIRFLOW_MLOPS_CONNECTIONS"
        )
    if facts.get("kind") != address.kind:
        raise ConnectionConfigError(f"{uri}: connection {address.conn_id!r} is no connection of such a store")
    options, file_options = _OPTIONS[address.kind](facts)
    return Location(address.uri, _given(options), _given(file_options))


def same_place(one: str, other: str) -> bool:
    """Tell whether two addresses are of the same table or file, by whatever connection, spelling or link.

    >>> same_place("s3://aws@lake/trips", "s3a://lake/trips/"), same_place("/lake/trips", "file:///lake/x/../trips")
    (True, True)
    """
    return _place(one) == _place(other)


def _place(uri: str) -> str:
    address = parse_store_uri(uri)
    scheme, separator, path = address.uri.partition("://")
    if not separator or scheme == "file":
        return os.path.realpath(path or uri)
    return f"{address.kind or scheme}://{path.rstrip('/')}"


def _s3(facts: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    endpoint, region, style = facts.get("endpoint_url"), facts.get("region"), facts.get("addressing_style")
    anonymous = not facts.get("key")
    options = {
        "aws_access_key_id": facts.get("key"),
        "aws_secret_access_key": facts.get("secret"),
        "aws_session_token": facts.get("token"),
        "aws_region": region,
        "aws_endpoint_url": endpoint,
        "aws_allow_http": "true" if str(endpoint).startswith("http://") else None,
        "aws_virtual_hosted_style_request": "true" if style == "virtual" else None,
        "aws_skip_signature": "true" if anonymous else None,
    }
    file_options = {
        "key": facts.get("key"),
        "secret": facts.get("secret"),
        "token": facts.get("token"),
        "anon": anonymous or None,
        "endpoint_url": endpoint,
        "client_kwargs": {"region_name": region} if region else None,
        "config_kwargs": {"s3": {"addressing_style": style}} if style else None,
    }
    return options, file_options


def _gcs(facts: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    import json

    key, path = facts.get("service_account_key"), facts.get("service_account_path")
    options = {"google_service_account_key": key, "google_service_account": path}
    return options, {"token": json.loads(key) if key else path}


def _azure(facts: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    names = ("account_name", "account_key", "tenant_id", "client_id", "client_secret")
    options = {f"azure_storage_{name}": facts.get(name) for name in names}
    file_options = {name: facts.get(name) for name in (*names, "sas_token")}
    return options | {"azure_storage_sas_key": facts.get("sas_token")}, file_options


_OPTIONS: dict[str, Callable[[Mapping[str, Any]], tuple[dict[str, Any], dict[str, Any]]]] = {
    "s3": _s3,
    "gcs": _gcs,
    "azure": _azure,
}


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
