"""From an Airflow http connection to what a download needs."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from airflow_mlops.exceptions import ConnectionConfigError
from airflow_mlops.hooks.base import extra_of, read_connection

#: Fields of Extra that Airflow's own hook takes for settings; the others are headers.
_SETTINGS = frozenset(
    [
        "stream",
        "cert",
        "proxies",
        "proxy",
        "timeout",
        "verify",
        "verify_ssl",
        "allow_redirects",
        "max_redirects",
        "trust_env",
        "check_response",
        "srv_lookup",
    ]
)


def web_of(conn_id: str, url: str) -> dict[str, Any]:
    """Resolve a connection: Login and Password are basic auth, Extra holds headers.

    :param url: what is to be downloaded.
    :returns: for :attr:`~airflow_mlops.services.Services.connections`.
    :raises ConnectionConfigError: it is missing, of another type, or one of another server.
    """
    connection = read_connection(conn_id, "http")
    if connection.conn_type != "http":
        raise ConnectionConfigError(
            f"connection {conn_id!r} is of type {connection.conn_type}: a download needs one of type http"
        )
    host = urlsplit(connection.host or "").hostname or (connection.host or "").partition("/")[0]
    if host and host != urlsplit(url).hostname:
        raise ConnectionConfigError(
            f"connection {conn_id!r} is one of {host}: its login is not sent to {urlsplit(url).hostname}. Correct the address, or its Host"
        )
    headers = {name: str(value) for name, value in extra_of(connection).items() if name not in _SETTINGS}
    login = [connection.login, connection.password or ""] if connection.login else None
    return {"kind": "http", "headers": headers, "login": login}
