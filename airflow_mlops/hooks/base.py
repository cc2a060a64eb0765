"""Reading a connection: what is missing is said in the words of the form, all at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseHook
from airflow.sdk.exceptions import AirflowNotFoundException

from airflow_mlops.exceptions import ConnectionConfigError

if TYPE_CHECKING:
    from airflow.sdk import Connection


def read_connection(conn_id: str, conn_type: str) -> Connection:
    """Get a connection.

    :raises ConnectionConfigError: it is not defined; says how to define it.
    """
    try:
        return BaseHook.get_connection(conn_id)
    except AirflowNotFoundException as err:
        raise ConnectionConfigError(
            f"connection {conn_id!r} is not defined: create it under Admin > Connections (type {conn_type}), with "
            f"`airflow connections add {conn_id} --conn-type {conn_type} ...`, or export AIRFLOW_CONN_{conn_id.upper()}"
        ) from err


def extra_of(connection: Connection) -> dict[str, Any]:
    """Read the connection's extra fields.

    :raises ConnectionConfigError: they are not JSON.
    """
    try:
        return dict(connection.extra_dejson)
    except ValueError as err:
        raise ConnectionConfigError(f"connection {connection.conn_id!r}: Extra is not a JSON object") from err


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
    return f"{scheme}://{connection.host}:{connection.port}"
