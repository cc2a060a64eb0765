"""Where a step runs: the one thing a runner has to know how to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from airflow_mlops.services import Services


class StepCancelled(BaseException):
    """The task was killed: a step in its process unwinds; like KeyboardInterrupt no error that anything may catch by accident."""


class Runner(Protocol):
    """Carries a step's spec to where it runs and its result back."""

    def run(self, name: str, spec: dict[str, Any], services: Services) -> dict[str, Any]:
        """Run step ``name`` on a JSON spec and give its JSON result."""

    def cancel(self) -> None:
        """End what is running, because the task was killed."""


@runtime_checkable
class DeferringRunner(Runner, Protocol):
    """A runner whose :meth:`run` may end in Airflow's ``TaskDeferred``, with ``execute_complete`` as the method to come back to."""

    def resume(self, event: Mapping[str, Any]) -> dict[str, Any]:
        """Give the step's JSON result after the trigger fired; it may defer again."""
