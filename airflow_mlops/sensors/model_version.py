"""Wait for a model version."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_mlops.hooks.mlflow import MLflowHook
from airflow_mlops.sensors.base import PollSensor

if TYPE_CHECKING:
    from collections.abc import Sequence


class ModelVersionSensor(PollSensor):
    """Wait until an alias points at a version, or at another one than before.

    :param model_name: registered model. (templated)
    :param alias: the alias. (templated)
    :param not_version: a version that does not count: the one already known. (templated)
    :param mlflow_conn_id: MLflow connection.
    """

    poll = "airflow_mlops.sensors.polls:model_version"
    template_fields: Sequence[str] = ("model_name", "alias", "not_version")

    def __init__(
        self,
        *,
        model_name: str,
        alias: str = "champion",
        not_version: str | None = None,
        mlflow_conn_id: str = MLflowHook.default_conn_name,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.model_name = model_name
        self.alias = alias
        self.not_version = not_version
        self.mlflow_conn_id = mlflow_conn_id

    def poll_arguments(self) -> dict[str, Any]:
        """Give the arguments of :func:`~airflow_mlops.sensors.polls.model_version`."""
        return {
            "model_name": self.model_name,
            "alias": self.alias,
            "not_version": str(self.not_version) if self.not_version else None,
            "mlflow_conn_id": self.mlflow_conn_id,
        }
