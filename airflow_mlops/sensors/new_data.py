"""Wait for files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_mlops.sensors.base import PollSensor

if TYPE_CHECKING:
    from collections.abc import Sequence


class NewDataSensor(PollSensor):
    """Wait until files match and have been written to the end.

    :param source: path or glob on a file system the triggerer (or worker) sees. (templated)
    :param min_files: how many files have to match. (templated)
    """

    poll = "airflow_mlops.sensors.polls:new_data"
    template_fields: Sequence[str] = ("source", "min_files")

    def __init__(self, *, source: str, min_files: int | str = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.source = source
        self.min_files = min_files

    def poll_arguments(self) -> dict[str, Any]:
        """Give the arguments of :func:`~airflow_mlops.sensors.polls.new_data`."""
        return {"source": self.source, "min_files": int(self.min_files)}
