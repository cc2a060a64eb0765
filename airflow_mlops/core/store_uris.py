"""Addresses in object stores, in the form of Airflow's ``ObjectStoragePath``: ``s3://conn_id@bucket/key``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

#: The kind of store behind a scheme; fsspec, polars and delta-rs know all of them.
STORES = {
    "s3": "s3",
    "s3a": "s3",
    "gs": "gcs",
    "gcs": "gcs",
    "az": "azure",
    "abfs": "azure",
    "abfss": "azure",
}
_ADDRESS = re.compile(r"(?P<scheme>[a-z0-9]+)://(?P<conn_id>[^/@\s]+)@(?P<place>[^\s/]+.*)", re.DOTALL)
#: In ``abfss://container@account.dfs.core.windows.net/...`` the first name is no connection.
_AZURE_HOST = re.compile(r"[^/]+\.(windows\.net|microsoft\.com)(/|$)")


class StoreUri(NamedTuple):
    """An address and the connection that opens it.

    :param uri: without the connection.
    :param conn_id: ``None``: the environment has the credentials.
    :param kind: ``s3``, ``gcs`` or ``azure``; ``None`` for anything else, such as a folder.
    """

    uri: str
    conn_id: str | None
    kind: str | None


def parse_store_uri(uri: str) -> StoreUri:
    """Take an address apart.

    :raises ValueError: it holds a password.

    >>> parse_store_uri("s3://aws_default@bucket/trips")
    StoreUri(uri='s3://bucket/trips', conn_id='aws_default', kind='s3')
    >>> parse_store_uri("abfss://trips@account.dfs.core.windows.net/2024").conn_id is None
    True
    """
    kind = STORES.get(uri.partition("://")[0])
    found = _ADDRESS.fullmatch(uri)
    if kind is None or found is None or (kind == "azure" and _AZURE_HOST.match(found["place"])):
        return StoreUri(uri, None, kind)
    if ":" in found["conn_id"]:
        raise ValueError(
            f"an address such as {found['scheme']}://...@{found['place']} may hold no password: put it into an Airflow "
            f"connection and write {found['scheme']}://conn_id@{found['place']}"
        )
    return StoreUri(f"{found['scheme']}://{found['place']}", found["conn_id"], kind)


def stores_in(value: Any) -> Iterator[StoreUri]:
    """Find the addresses with a connection, anywhere in a JSON value.

    >>> [found.conn_id for found in stores_in({"dataset": {"uri": "s3://lake@b/t"}, "table": "/data/t"})]
    ['lake']
    """
    if isinstance(value, str):
        found = parse_store_uri(value)
        if found.conn_id is not None:
            yield found
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from stores_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from stores_in(item)
