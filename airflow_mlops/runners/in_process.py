"""Run a step in the task's own process: the default."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_mlops.core.data.batches import limit_read_ahead
from airflow_mlops.steps.base import run_step

if TYPE_CHECKING:
    from airflow_mlops.services import Services


class InProcessRunner:
    """Call the step directly."""

    def run(self, name: str, spec: dict[str, Any], services: Services) -> dict[str, Any]:
        """Run the step here."""
        limit_read_ahead()
        return run_step(name, spec, services)

    def cancel(self) -> None:
        """Nothing to end: the step ends with the task's process."""
