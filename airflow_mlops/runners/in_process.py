"""Run a step in the task's own process: the default."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.data.batches import limit_read_ahead
from airflow_mlops.runners.base import StepCancelled
from airflow_mlops.steps.base import run_step

if TYPE_CHECKING:
    from airflow_mlops.services import Services


class InProcessRunner:
    """Call the step directly."""

    #: The thread that runs a step, until the step ends or is told to.
    _thread: int | None = None

    def run(self, name: str, spec: dict[str, Any], services: Services) -> dict[str, Any]:
        """Run the step here."""
        limit_read_ahead()
        self._thread = threading.get_ident()
        try:
            return run_step(name, spec, services)
        finally:
            self._thread = None

    def cancel(self) -> None:
        """End the step from within: Airflow calls this in the thread that runs it, from the handler of SIGTERM.

        Without it the step would go on until Airflow's SIGKILL five seconds later, which leaves everything as it is: an MLflow
        run that is RUNNING for ever, for example.

        :raises StepCancelled: where a step runs; once, so that what it does on its way out is not cut short.
        """
        if self._thread == threading.get_ident():
            self._thread = None
            raise StepCancelled("the task was killed")
