"""The MLflow connection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
from airflow.sdk import BaseHook

from airflow_mlops.core.addresses import require_http_url
from airflow_mlops.hooks.base import extra_of, http_address, read_connection
from airflow_mlops.services import Services

if TYPE_CHECKING:
    from airflow_mlops.integrations.mlflow import Registry

_MODELS = "api/2.0/mlflow/registered-models/search?max_results=1"
_REFUSED = "MLflow refuses the login ({}): check Login and Password, or the token in Extra"


class MLflowHook(BaseHook):
    """Turn an MLflow connection into an address, credentials and a registry client.

    Fields: Host, Port, Schema (``http`` or ``https``), Login and Password (basic auth), and in Extra ``tracking_uri``
    (the whole address, instead of Host and Port) and ``token`` (bearer token, instead of Login and Password).

    :param mlflow_conn_id: the connection.
    """

    conn_name_attr = "mlflow_conn_id"
    default_conn_name = "mlflow_default"
    conn_type = "mlflow"
    hook_name = "MLflow"

    def __init__(self, *, mlflow_conn_id: str = default_conn_name, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mlflow_conn_id = mlflow_conn_id

    def services(self) -> Services:
        """Give the fields this connection fills.

        :raises ConnectionConfigError: it is missing or incomplete.
        """
        connection = read_connection(self.mlflow_conn_id, self.conn_type)
        extra = extra_of(connection, "tracking_uri", "token")
        uri = extra["tracking_uri"] or http_address(connection, purpose="MLflow")
        return Services(
            tracking_uri=require_http_url(uri, purpose=f"connection {self.mlflow_conn_id!r}"),
            tracking_username=connection.login,
            tracking_password=connection.password,
            tracking_token=extra["token"],
        )

    def get_conn(self) -> Registry:
        """Connect to the registry.

        :raises RegistryUnavailableError: it does not answer.
        """
        from airflow_mlops.integrations.mlflow import Registry

        return Registry.connect(self.services())

    def test_connection(self) -> tuple[bool, str]:
        """Ask MLflow for its health and for a model: health may be open where everything else needs the login."""
        try:
            services = self.services()
            uri = services.require("tracking_uri").rstrip("/")
        except ValueError as err:
            return False, str(err)
        try:
            with httpx.Client(headers=services.tracking_headers(), timeout=10) as client:
                client.get(f"{uri}/health").raise_for_status()
                answer = client.get(f"{uri}/{_MODELS}").raise_for_status()
            answer.json()
        except httpx.HTTPStatusError as err:
            status = err.response.status_code
            return False, _REFUSED.format(status) if status in {401, 403} else str(err)
        except httpx.HTTPError as err:
            return False, str(err)
        except ValueError:
            return False, f"what answers at {uri} is no MLflow, or a page to log in: check the address"
        return True, "MLflow answers"
