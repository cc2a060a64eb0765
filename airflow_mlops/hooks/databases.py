"""From a connection of any of Airflow's database hooks to SQLAlchemy's URL."""

from __future__ import annotations

from typing import Any

from airflow_mlops.exceptions import ConnectionConfigError
from airflow_mlops.hooks.base import read_connection


def database_of(conn_id: str) -> dict[str, Any]:
    """Resolve a connection whose hook is a ``DbApiHook``.

    :returns: for :attr:`~airflow_mlops.services.Services.connections`.
    :raises ConnectionConfigError: it is missing, its provider is not installed, or its hook has no SQLAlchemy dialect.
    """
    import sqlalchemy as sa
    from airflow.providers.common.sql.hooks.sql import DbApiHook

    connection = read_connection(conn_id, "of a database, such as postgres")
    try:
        hook = connection.get_hook()
    except Exception as err:  # Airflow raises its base class here for an unknown type
        raise ConnectionConfigError(
            f"connection {conn_id!r} is of type {connection.conn_type}, for which no provider is installed: {err}"
        ) from err
    if not isinstance(hook, DbApiHook):
        raise ConnectionConfigError(
            f"connection {conn_id!r} is of type {connection.conn_type}, which is no database's: sql needs a DbApiHook"
        )
    try:
        try:
            url = sa.make_url(hook.sqlalchemy_url)
        except NotImplementedError:
            url = sa.make_url(hook.get_uri())
        url.get_dialect()
    except (sa.exc.ArgumentError, NotImplementedError, ImportError) as err:
        raise ConnectionConfigError(
            f"connection {conn_id!r} of type {connection.conn_type} has no SQLAlchemy dialect here ({type(err).__name__}): install it, "
            "or unload the table to files and ingest those"
        ) from err
    if url.get_backend_name() == "postgresql":
        # The hook gives these to its driver beside the URL.
        extra = connection.extra_dejson
        url = url.update_query_dict({name: str(extra[name]) for name in extra if name.startswith("ssl")})
    return {"kind": "sql", "url": url.render_as_string(hide_password=False)}
