"""The connection with the key that values are hashed with."""

from __future__ import annotations

from typing import Any

from airflow.sdk import BaseHook

from airflow_mlops.core.data.cleaning import ValueHasher
from airflow_mlops.exceptions import ConnectionConfigError
from airflow_mlops.hooks.base import read_connection
from airflow_mlops.services import Services


class HashingHook(BaseHook):
    """Turn a connection into the key that an ingest hashes values with.

    Field: Password (the key: at least 32 characters, made by ``openssl rand -hex 32``).

    :param hash_conn_id: the connection.
    """

    conn_name_attr = "hash_conn_id"
    default_conn_name = "hashing_default"
    conn_type = "airflow_mlops_hashing"
    hook_name = "Hashing key"

    def __init__(self, *, hash_conn_id: str = default_conn_name, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hash_conn_id = hash_conn_id

    def services(self) -> Services:
        """Give the key.

        :raises ConnectionConfigError: the connection is missing, or its key is missing or too short.
        """
        connection = read_connection(self.hash_conn_id, self.conn_type)
        try:
            ValueHasher(connection.password or "")
        except ConnectionConfigError as err:
            raise ConnectionConfigError(f"connection {self.hash_conn_id!r}: Password: {err}") from err
        return Services(hash_key=connection.password)

    def get_conn(self) -> Services:
        """Give the key."""
        return self.services()

    def test_connection(self) -> tuple[bool, str]:
        """Read the key."""
        try:
            key = self.services().hash_key
        except ConnectionConfigError as err:
            return False, str(err)
        return True, f"key {ValueHasher(key or '').key_id}"
