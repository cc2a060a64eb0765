"""Reading a connection: what is missing or wrong is said in the words of the form, all at once."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseHook
from airflow.sdk.exceptions import AirflowNotFoundException

from airflow_mlops.core.addresses import require_http_url
from airflow_mlops.exceptions import ConnectionConfigError

if TYPE_CHECKING:
    from airflow.sdk import Connection


def find_connection(conn_id: str) -> Connection | None:
    """Get a connection, or ``None`` when nobody defined it.

    :raises ConnectionConfigError: somebody did, in a way Airflow can't read; it calls that "not defined".
    """
    try:
        return BaseHook.get_connection(conn_id)
    except AirflowNotFoundException as err:
        variable = f"AIRFLOW_CONN_{conn_id.upper()}"
        if os.environ.get(variable):
            raise ConnectionConfigError(
                f"connection {conn_id!r}: {variable} is set, but holds neither a JSON object nor a URI with a numeric port"
            ) from err
        return None


def read_connection(conn_id: str, conn_type: str) -> Connection:
    """Get a connection.

    :raises ConnectionConfigError: it is not defined; says how to define it.
    """
    connection = find_connection(conn_id)
    if connection is None:
        raise ConnectionConfigError(
            f"connection {conn_id!r} is not defined: create it under Admin > Connections (type {conn_type}), with "
            f"`airflow connections add {conn_id} --conn-type {conn_type} ...`, or export AIRFLOW_CONN_{conn_id.upper()}"
        )
    return connection


def extra_of(connection: Connection, *names: str) -> dict[str, Any]:
    """Read the connection's Extra; the named fields are there, as texts or ``None``.

    Airflow's own ``extra_dejson`` takes what it can't read for empty, so a typing error would look like a missing field.

    :raises ConnectionConfigError: Extra is no JSON object, or one of these fields no text.
    """
    try:
        fields: Any = json.loads(connection.extra or "{}")
    except ValueError as err:
        raise _no_object(connection) from err
    if not isinstance(fields, dict):
        raise _no_object(connection)
    wrong = [name for name in names if not isinstance(fields.get(name), str | None)]
    if wrong:
        raise ConnectionConfigError(
            f"connection {connection.conn_id!r}: Extra field {', '.join(wrong)} must be a text in quotes"
        )
    _ = connection.extra_dejson  # has Airflow mask the secrets in it
    return dict.fromkeys(names) | fields


def _no_object(connection: Connection) -> ConnectionConfigError:
    return ConnectionConfigError(
        f'connection {connection.conn_id!r}: Extra is not a JSON object such as {{"name": "value"}}; correct it'
    )


def http_address(connection: Connection, *, purpose: str) -> str:
    """Build ``scheme://host:port`` from the connection's fields.

    :raises ConnectionConfigError: naming every field that is missing or wrong.
    """
    problems = []
    if not connection.host:
        problems.append("Host is empty")
    if not connection.port:
        problems.append("Port is empty")
    scheme = connection.schema or "http"
    if scheme not in {"http", "https"}:
        problems.append(f"Schema is {scheme!r}, it must be http or https")
    if problems:
        raise ConnectionConfigError(
            f"connection {connection.conn_id!r} does not say where {purpose} is: {'; '.join(problems)}"
        )
    return require_http_url(
        f"{scheme}://{connection.host}:{connection.port}", purpose=f"connection {connection.conn_id!r}"
    )
