"""The connection with the keys of model packages."""

from __future__ import annotations

from typing import Any

from airflow.sdk import BaseHook

from airflow_mlops.core.model.signing import SigningKey, parse_public_keys
from airflow_mlops.exceptions import ConnectionConfigError
from airflow_mlops.hooks.base import extra_of, find_connection, read_connection
from airflow_mlops.services import Services


class SigningHook(BaseHook):
    """Turn a signing connection into the keys packages are signed and verified with.

    Fields: Password (the private key; empty where packages are only verified) and in Extra ``public_keys`` (keys that are
    trusted as well, separated by spaces: the one before the last change, or other teams'). The private key's own public key
    is always trusted. When the default connection is not defined, packages are neither signed nor are signatures asked for; a
    connection that is named must be there.

    :param signing_conn_id: the connection.
    """

    conn_name_attr = "signing_conn_id"
    default_conn_name = "signing_default"
    conn_type = "airflow_mlops_signing"
    hook_name = "Model signing"

    def __init__(self, *, signing_conn_id: str = default_conn_name, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.signing_conn_id = signing_conn_id

    def services(self) -> Services:
        """Give the fields this connection fills.

        :raises ConnectionConfigError: a connection other than the default is missing, a key is none, or there is no key.
        """
        if self.signing_conn_id == self.default_conn_name and find_connection(self.signing_conn_id) is None:
            return Services()
        connection = read_connection(self.signing_conn_id, self.conn_type)
        public = [extra_of(connection, "public_keys")["public_keys"] or ""]
        try:
            if connection.password:
                public.append(SigningKey.parse(connection.password).public_text())
            keys = " ".join(filter(None, public))
            parse_public_keys(keys)
        except ConnectionConfigError as err:
            raise ConnectionConfigError(f"connection {self.signing_conn_id!r}: {err}") from err
        return Services(signing_key=connection.password or None, signing_public_keys=keys)

    def get_conn(self) -> Services:
        """Give the keys."""
        return self.services()

    def test_connection(self) -> tuple[bool, str]:
        """Read the keys."""
        try:
            keys = self.services()
        except ConnectionConfigError as err:
            return False, str(err)
        if keys.signing_public_keys is None:
            return False, f"connection {self.signing_conn_id!r} is not defined: nothing is signed or verified"
        trusted = ", ".join(parse_public_keys(keys.signing_public_keys))
        return True, f"{'signs and verifies' if keys.signing_key else 'verifies'}; trusted keys: {trusted}"
