"""Wait for the model service."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from airflow_mlops.hooks.bentoml import BentoMLHook
from airflow_mlops.sensors.base import PollSensor

if TYPE_CHECKING:
    from collections.abc import Sequence


class EndpointReadySensor(PollSensor):
    """Wait until the model service answers, with a certain model and version if they are given.

    :param model_name: model it has to serve; default any. (templated)
    :param model_version: version it has to serve, or the whole output of a register or deploy task; default any. (templated)
    :param bentoml_conn_id: connection of the model service.
    """

    poll = "airflow_mlops.sensors.polls:endpoint_ready"
    template_fields: Sequence[str] = ("model_name", "model_version")

    def __init__(
        self,
        *,
        model_name: str | None = None,
        model_version: str | Mapping[str, Any] | None = None,
        bentoml_conn_id: str = BentoMLHook.default_conn_name,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.model_name = model_name
        self.model_version = model_version
        self.bentoml_conn_id = bentoml_conn_id

    def poll_arguments(self) -> dict[str, Any]:
        """Give the arguments of :func:`~airflow_mlops.sensors.polls.endpoint_ready`."""
        version = self.model_version
        if isinstance(version, Mapping):
            version = version["model_version"]
        return {
            "model_name": self.model_name or None,
            "model_version": str(version) if version else None,
            "bentoml_conn_id": self.bentoml_conn_id,
        }
