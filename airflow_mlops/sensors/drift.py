"""Wait for a check of a window."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from airflow_mlops.hooks.ledger import LedgerHook
from airflow_mlops.run_windows import RUN_WINDOW
from airflow_mlops.sensors.base import WindowSensor

if TYPE_CHECKING:
    from collections.abc import Sequence


class DriftSensor(WindowSensor):
    """Wait until a window was checked, or until the check found something.

    Of performance the grade that stands counts: one on a part of the labels is followed by others. Where there are no labels to
    wait for it is the estimate, if it is trusted.

    :param model_name: the model. (templated)
    :param window_start: first instant of the window; default the run's data interval, or what its partition key names. (templated)
    :param window_end: first instant after it. (templated)
    :param check: ``drift_check`` or ``performance_check``.
    :param only_if_found: go on waiting when the check found nothing.
    :param ledger_conn_id: connection of the ledger.
    """

    poll = "airflow_mlops.sensors.polls:check_recorded"
    template_fields: Sequence[str] = ("model_name", "window_start", "window_end")

    def __init__(
        self,
        *,
        model_name: str,
        window_start: str = RUN_WINDOW[0],
        window_end: str = RUN_WINDOW[1],
        check: Literal["drift_check", "performance_check"] = "drift_check",
        only_if_found: bool = False,
        ledger_conn_id: str = LedgerHook.default_conn_name,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.model_name = model_name
        self.window_start = window_start
        self.window_end = window_end
        self.check = check
        self.only_if_found = only_if_found
        self.ledger_conn_id = ledger_conn_id

    def poll_arguments(self) -> dict[str, Any]:
        """Give the arguments of :func:`~airflow_mlops.sensors.polls.check_recorded`."""
        return {
            "model_name": self.model_name,
            "window_start": str(self.window_start),
            "window_end": str(self.window_end),
            "check": self.check,
            "only_if_found": bool(self.only_if_found),
            "ledger_conn_id": self.ledger_conn_id,
        }
