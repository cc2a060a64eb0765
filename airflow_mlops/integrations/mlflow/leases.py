"""Leases: of several processes at the same work one does it, and a dead one loses it."""

from __future__ import annotations

import os
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from airflow_mlops.exceptions import TransientError
from airflow_mlops.integrations.mlflow.connection import translated
from airflow_mlops.integrations.mlflow.runs import STEP_KEY_TAG, Runs

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

#: Tag of a run that goes on: another number with every sign of life.
HEARTBEAT_TAG = "airflow_mlops.heartbeat"

#: A run without a sign of life for so long is dead. Long enough for a busy machine and a slow server; a retry after a
#: kill waits for it. The variable sets another number, the same for all processes of an installation.
LEASE_SECONDS = 10.0
LEASE_VARIABLE = "AIRFLOW_MLOPS_LEASE_SECONDS"
_BEATS_PER_LEASE = 5


class Leases(Runs):
    """Runs that hold their work as long as their process lives."""

    @contextmanager
    def leased_run(
        self, experiment_id: str, name: str, *, step_key: str, what: str, tags: Mapping[str, str]
    ) -> Iterator[str]:
        """Open the one run at a piece of work and hold it while the block goes on.

        Call :meth:`take_over_dead_runs` before, so that what a killed process left does not count as the first.

        :param step_key: digest of the work's inputs.
        :param what: what the work makes, for the errors.
        :param tags: further tags of the run.
        :raises TransientError: another run was there first, or took this one for dead and replaced it.
        """
        with (
            self.run(experiment_id, name, {**tags, STEP_KEY_TAG: step_key}) as run_id,
            self.heartbeat(run_id),
        ):
            self.require_first(experiment_id, step_key, run_id, what)
            yield run_id
            self.require_running(run_id)

    def take_over_dead_runs(self, experiment_id: str, step_key: str, what: str) -> bool:
        """Mark runs of this same work whose process is dead as failed; those that live keep the work.

        A run lives while its heartbeat changes. Nothing is read from the clocks of two machines: this waits up to the
        lease for another heartbeat.

        :param what: what the work makes, for the error.
        :returns: whether there was any, so that the caller looks again for a finished one.
        :raises TransientError: naming the run that lives.
        """
        lease = _lease_seconds()
        seen = {run.info.run_id: _heartbeat(run) for run in self._running(experiment_id, step_key)}
        deadline = time.monotonic() + lease
        waiting = bool(seen)
        while waiting and time.monotonic() < deadline:
            time.sleep(lease / (2 * _BEATS_PER_LEASE))
            running = self._running(experiment_id, step_key)
            for run in running:
                if run.info.run_id not in seen or _heartbeat(run) != seen[run.info.run_id]:
                    raise TransientError(
                        f"{what} is being made by run {run.info.run_id}; try again when that has ended, to get what it "
                        "made"
                    )
            waiting = bool(running)
        if waiting:
            with translated("close interrupted runs"):
                for run in self._running(experiment_id, step_key):
                    if run.info.run_id in seen and _heartbeat(run) == seen[run.info.run_id]:
                        self._fail(experiment_id, run.info.run_id)
        return bool(seen)

    def require_first(self, experiment_id: str, step_key: str, run_id: str, what: str) -> None:
        """See that of runs that began the same work at once this one is the first.

        :raises TransientError: naming the run that is.
        """
        runs = self._running(experiment_id, step_key)
        first = min(runs, key=lambda run: (run.info.start_time, run.info.run_id), default=None)
        if first is not None and first.info.run_id != run_id:
            raise TransientError(
                f"{what} is being made by run {first.info.run_id}; try again when that has ended, to get what it made"
            )

    def require_running(self, run_id: str) -> None:
        """See that no other attempt at the same work has closed this run: whoever closes a run takes its place.

        :raises TransientError: it is closed; trying again finds what the other attempt made.
        """
        with translated(f"run {run_id}"):
            status = self.client.get_run(run_id).info.status
        if status != "RUNNING":
            raise TransientError(
                f"run {run_id} is {status}: another attempt at the same work took this one for dead and closed it; "
                "try again to get what that one made"
            )

    @contextmanager
    def heartbeat(self, run_id: str) -> Iterator[None]:
        """Say again and again that the process of a run lives, while the block goes on."""
        from mlflow.exceptions import MlflowException

        stop = threading.Event()

        def beat() -> None:
            number = 0
            while not stop.wait(_lease_seconds() / _BEATS_PER_LEASE):
                number += 1
                # One that is lost does no harm; whether this run was closed meanwhile is asked before it ends.
                with suppress(MlflowException):
                    self.client.set_tag(run_id, HEARTBEAT_TAG, str(number))

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(timeout=_lease_seconds())

    def _running(self, experiment_id: str, step_key: str) -> list[Any]:
        with translated("search runs"):
            return list(
                self.client.search_runs(
                    [experiment_id],
                    f"tags.`{STEP_KEY_TAG}` = '{step_key}' and attributes.status = 'RUNNING'",
                )
            )


def _heartbeat(run: Any) -> str | None:
    found: str | None = run.data.tags.get(HEARTBEAT_TAG)
    return found


def _lease_seconds() -> float:
    return float(os.environ.get(LEASE_VARIABLE) or LEASE_SECONDS)
