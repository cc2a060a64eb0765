"""The connection of BentoCloud."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseHook

from airflow_mlops.core.addresses import require_http_url
from airflow_mlops.exceptions import ConnectionConfigError, MLOpsError
from airflow_mlops.hooks.base import extra_of, read_connection

if TYPE_CHECKING:
    from airflow_mlops.integrations.bentocloud import BentoCloud


class BentoCloudHook(BaseHook):
    """Turn a BentoCloud connection into a client of the organization.

    Fields: Host (the organization's address, with or without ``https://``), Password (API token for developer operations), and in
    Extra ``cluster`` (default the organization's). The token stays with the client; BentoML's own file of contexts is neither read
    nor written.

    :param bentocloud_conn_id: the connection.
    """

    conn_name_attr = "bentocloud_conn_id"
    default_conn_name = "bentocloud_default"
    conn_type = "bentocloud"
    hook_name = "BentoCloud"

    def __init__(self, *, bentocloud_conn_id: str = default_conn_name, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bentocloud_conn_id = bentocloud_conn_id

    def get_conn(self) -> BentoCloud:
        """Give a client; the caller closes it.

        :raises ConnectionConfigError: the connection is missing or incomplete.
        """
        from airflow_mlops.integrations.bentocloud import BentoCloud

        connection = read_connection(self.bentocloud_conn_id, self.conn_type)
        cluster = extra_of(connection, "cluster")["cluster"]
        host, token = connection.host or "", connection.password or ""
        fields = {"Host": host, "Password (API token)": token}
        missing = [name for name, value in fields.items() if not value]
        if missing:
            raise ConnectionConfigError(
                f"connection {self.bentocloud_conn_id!r} does not say how to reach BentoCloud: {', '.join(missing)} empty"
            )
        url = host if "://" in host else f"{connection.schema or 'https'}://{host}"
        if connection.port:
            url = f"{url.rstrip('/')}:{connection.port}"
        url = require_http_url(url, purpose=f"connection {self.bentocloud_conn_id!r}")
        return BentoCloud(url, token, self.bentocloud_conn_id, cluster=cluster)

    def test_connection(self) -> tuple[bool, str]:
        """Ask BentoCloud whose the token is."""
        try:
            cloud = self.get_conn()
            try:
                cloud.require_access()
            finally:
                cloud.close()
        except (MLOpsError, ValueError) as err:
            return False, str(err)
        return True, "BentoCloud knows the token"
