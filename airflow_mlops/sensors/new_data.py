"""Wait for files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_mlops.sensors.base import PollSensor

if TYPE_CHECKING:
    from collections.abc import Sequence


class NewDataSensor(PollSensor):
    """Wait until files match and have been written to the end, or a Delta table has rows.

    A file counts once its size and time of change stand still for ``settle_seconds``; an object in a store is there as a
    whole or not at all. Hidden files (``.name``) don't count. What is waited for is said in the
    log, and again every ten minutes (in mode ``reschedule`` at each look). ``source`` in the output is without its query.

    A web server that refuses the file (401, 403) or says that it is gone (410) ends the wait with an error; one that does not
    answer, or whose name is not found, is waited for.

    :param source: path, glob, URI, ``http(s)://`` address of a file without a login, or URI of a Delta table, as the triggerer (or
        worker) sees it; ``s3://conn_id@bucket/key`` is opened by that connection. No pattern in a web
        address. (templated)
    :param min_files: how many files have to match; a web address or a table is one. (templated)
    :param settle_seconds: longer than whoever writes the files pauses between two writes. (templated)
    """

    poll = "airflow_mlops.sensors.polls:new_data"
    template_fields: Sequence[str] = ("source", "min_files", "settle_seconds")

    def __init__(
        self, *, source: str, min_files: int | str = 1, settle_seconds: float | str = 0.5, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.source = source
        self.min_files = min_files
        self.settle_seconds = settle_seconds

    def poll_arguments(self) -> dict[str, Any]:
        """Give the arguments of :func:`~airflow_mlops.sensors.polls.new_data`."""
        return {
            "source": self.source,
            "min_files": int(self.min_files),
            "settle_seconds": float(self.settle_seconds),
        }
