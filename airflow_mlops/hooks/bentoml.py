"""The connection of the model service."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseHook

from airflow_mlops.exceptions import MLOpsError
from airflow_mlops.hooks.base import extra_of, http_address, read_connection
from airflow_mlops.services import Services

if TYPE_CHECKING:
    from airflow_mlops.integrations.bentoml import EndpointClient


class BentoMLHook(BaseHook):
    """Turn a BentoML connection into the endpoint's address, its token and the local service's folder.

    Fields: Host, Port, Schema (``http`` or ``https``), Password (bearer token of the service; empty: no authentication),
    and in Extra ``serving_dir``: folder of the local service, with desired state, model copies and inference log, and
    ``steering_token``: bearer token rollouts are steered with (empty: the one that the folder holds).

    :param bentoml_conn_id: the connection.
    """

    conn_name_attr = "bentoml_conn_id"
    default_conn_name = "bentoml_default"
    conn_type = "bentoml"
    hook_name = "BentoML service"

    def __init__(self, *, bentoml_conn_id: str = default_conn_name, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bentoml_conn_id = bentoml_conn_id

    def services(self) -> Services:
        """Give the fields this connection fills.

        :raises ConnectionConfigError: it is missing or incomplete.
        """
        connection = read_connection(self.bentoml_conn_id, self.conn_type)
        extra = extra_of(connection, "serving_dir", "steering_token")
        return Services(
            endpoint_url=http_address(connection, purpose="the model service"),
            endpoint_token=connection.password,
            steering_token=extra["steering_token"],
            serving_dir=extra["serving_dir"],
        )

    def get_conn(self) -> EndpointClient:
        """Give a client of the endpoint; the caller closes it."""
        from airflow_mlops.integrations.bentoml import EndpointClient, steering_token_of

        services = self.services()
        folder = Path(services.serving_dir) if services.serving_dir else None
        return EndpointClient(
            services.require("endpoint_url"),
            services.endpoint_token,
            steering_token=services.steering_token or (steering_token_of(folder) if folder else None),
        )

    def test_connection(self) -> tuple[bool, str]:
        """Ask the service what it serves."""
        try:
            with self.get_conn() as client:
                return True, f"serves {client.ready()}"
        except (MLOpsError, ValueError) as err:
            return False, str(err)
