"""Leases: of several processes at the same work one does it, and a dead one loses it."""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from airflow_mlops.exceptions import TransientError
from airflow_mlops.integrations.mlflow.connection import patiently, translated
from airflow_mlops.integrations.mlflow.runs import STEP_KEY_TAG, Runs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

log = logging.getLogger(__name__)

#: Tag of a run that goes on: another number with every sign of life.
HEARTBEAT_TAG = "airflow_mlops.heartbeat"

#: Tag of a run: digest of what was asked for, without the inputs it found.
TASK_KEY_TAG = "airflow_mlops.task_key"
#: Tag of a run: the model it makes.
MODEL_NAME_TAG = "airflow_mlops.model_name"
#: Tag of a run: its place among runs that began the same work.
TURN_TAG = "airflow_mlops.turn"

#: A run without a sign of life for so long is dead. Long enough for a busy machine and a slow server; a retry after a
#: kill waits for it. The variable sets another number, the same for all processes of an installation.
LEASE_SECONDS = 10.0
LEASE_VARIABLE = "AIRFLOW_MLOPS_LEASE_SECONDS"
_BEATS_PER_LEASE = 5

#: Of a run at other work than one's own it takes so many leases: nobody waits for that one, and to close one that lives, with
#: its signs of life lost, would throw a training away.
_LEASES_OF_OTHERS = 3
#: So many runs of a model are looked at, those that began first.
_MOST_OTHERS = 50

#: A task whose work another process is at waits so long for that one, and then fails for a retry. The variable sets another.
WAIT_SECONDS = 3600.0
WAIT_VARIABLE = "AIRFLOW_MLOPS_WAIT_SECONDS"


class HeldElsewhereError(TransientError):
    """Another process that lives is at the same work."""

    @classmethod
    def by(cls, run_id: str, what: str) -> HeldElsewhereError:
        """Name the run that has the work."""
        return cls(
            f"{what} is being made by run {run_id}; try again when that has ended, to get what it made"
        )


class _Watch:
    """What a process has seen of runs while it looked: which of them live, and which gave no sign of it for a lease.

    :param lease_seconds: without a sign for so long a run is dead.
    """

    def __init__(self, lease_seconds: float) -> None:
        self.alive: set[str] = set()
        self._lease = lease_seconds
        self._beats: dict[str, tuple[str | None, float]] = {}
        self._first: dict[str, float] = {}

    @property
    def any(self) -> bool:
        """Whether there was any run."""
        return bool(self._first)

    def look(self, running: Iterable[Any]) -> list[str]:
        """Look at their heartbeats.

        :returns: those that are dead.
        """
        now, dead = time.monotonic(), []
        for run in running:
            run_id, beat = run.info.run_id, run.data.tags.get(HEARTBEAT_TAG)
            self._first.setdefault(run_id, now)
            last, since = self._beats.setdefault(run_id, (beat, now))
            if beat != last:
                self.alive.add(run_id)
                self._beats[run_id] = (beat, now)
            elif now - since >= self._lease:
                self.alive.discard(run_id)
                dead.append(run_id)
        return dead

    def older_than_a_lease(self, runs: Iterable[Any]) -> str | None:
        """Name one that lives and was there a lease ago."""
        limit = time.monotonic() - self._lease
        seen = (run.info.run_id for run in runs if run.info.run_id in self.alive)
        return next((run_id for run_id in seen if self._first[run_id] < limit), None)


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
        :raises HeldElsewhereError: another run was there first; the block is not entered.
        :raises TransientError: another run took this one for dead and replaced it.
        """
        with (
            self.run(experiment_id, name, {**tags, STEP_KEY_TAG: step_key}) as run_id,
            self.heartbeat(run_id),
        ):
            self.require_first(experiment_id, step_key, run_id, what)
            yield run_id
            patiently(self.require_running, run_id)

    def take_over_dead_runs(
        self,
        experiment_id: str,
        step_key: str,
        what: str,
        *,
        task_key: str | None = None,
        wait_seconds: float = 0.0,
    ) -> bool:
        """Mark runs of this same work whose process is dead as failed; those that live keep the work.

        A run lives while its heartbeat changes. Nothing is read from the clocks of two machines: this waits up to the
        lease for another heartbeat.

        :param what: what the work makes, for the error.
        :param task_key: digest of what was asked for, whatever it was asked of: dead runs with it are closed as well, so that
            none is left when the inputs changed between a kill and the retry; those that live are left alone.
        :param wait_seconds: wait so long for a run at the same work that lives.
        :returns: whether there was any, so that the caller looks again for a finished one.
        :raises HeldElsewhereError: naming the run that still lives.
        """
        lease, began = _lease_seconds(), time.monotonic()
        watch = _Watch(lease)
        told = False
        while running := self._running(experiment_id, step_key, task_key):
            for run_id in watch.look(running):
                with translated("close interrupted runs"):
                    self._fail(experiment_id, run_id)
            same = {run.info.run_id for run in running if run.data.tags.get(STEP_KEY_TAG) == step_key}
            if holders := sorted(watch.alive & same):
                if time.monotonic() - began >= wait_seconds:
                    raise HeldElsewhereError.by(holders[0], what)
                if not told:
                    log.info("%s is being made by run %s; waiting for its end", what, holders[0])
                told = True
            if {run.info.run_id for run in running} <= watch.alive - same:
                break  # the same asked of other inputs, and in good hands
            time.sleep(lease / (2 * _BEATS_PER_LEASE))
        return watch.any

    @contextmanager
    def closing_dead_runs(self, experiment_id: str, model_name: str) -> Iterator[None]:
        """Mark as failed what killed trainings of a model left, whatever their window; those that live are left alone.

        They are looked at before and after the block, so that a block of half a minute costs no waiting, nor do runs that live.
        After a block that raises nothing is closed.
        """
        watch = _Watch(_LEASES_OF_OTHERS * _lease_seconds())
        there = self._running_of(experiment_id, model_name)
        watch.look(there)
        yield
        try:
            self._close_dead(experiment_id, model_name, {run.info.run_id for run in there}, watch)
        except TransientError as err:  # the next training looks again; what this one made is stored
            log.warning("could not look for what killed trainings of %s left: %s", model_name, err)

    def _close_dead(self, experiment_id: str, model_name: str, suspected: set[str], watch: _Watch) -> None:
        """Look at runs until each has ended, gives a sign of life or is dead."""
        while suspected:
            running = [
                run for run in self._running_of(experiment_id, model_name) if run.info.run_id in suspected
            ]
            for run_id in watch.look(running):
                log.warning("run %s of %s gives no sign of life: it is marked as failed", run_id, model_name)
                with translated("close interrupted runs"):
                    self._fail(experiment_id, run_id)
            suspected = {run.info.run_id for run in running} - watch.alive
            if suspected:
                time.sleep(_lease_seconds() / (2 * _BEATS_PER_LEASE))

    def require_first(self, experiment_id: str, step_key: str, run_id: str, what: str) -> None:
        """See that of runs at the same work this one is the first. No clocks are compared: each takes a turn after those it sees.

        Source: Lamport, "A new solution of Dijkstra's concurrent programming problem", CACM 17, 1974: who comes while another
        has a turn gets a later one; of two that took theirs at once the run id decides; who has not yet taken one is waited for.

        :raises HeldElsewhereError: naming the run that is.
        """
        turn = 1 + max((_turn(run) or 0 for run in self._others(experiment_id, step_key, run_id)), default=0)
        with translated(f"run {run_id}"):
            self.client.set_tag(run_id, TURN_TAG, str(turn))
        watch = _Watch(_lease_seconds())
        while others := self._others(experiment_id, step_key, run_id):
            before = [run for run in others if ((_turn(run) or turn + 1), run.info.run_id) < (turn, run_id)]
            if before:
                raise HeldElsewhereError.by(before[0].info.run_id, what)
            choosing = [run for run in others if _turn(run) is None]
            if not choosing:
                break
            for dead in watch.look(choosing):
                with translated("close interrupted runs"):
                    self._fail(experiment_id, dead)
            if overdue := watch.older_than_a_lease(choosing):
                raise HeldElsewhereError.by(overdue, what)  # lives and takes no turn: of an older release
            time.sleep(_lease_seconds() / (4 * _BEATS_PER_LEASE))
        self.require_running(run_id)

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

    def _others(self, experiment_id: str, step_key: str, run_id: str) -> list[Any]:
        return [run for run in self._running(experiment_id, step_key) if run.info.run_id != run_id]

    def _running(self, experiment_id: str, step_key: str, task_key: str | None = None) -> list[Any]:
        tags = {STEP_KEY_TAG: step_key} | ({TASK_KEY_TAG: task_key} if task_key else {})
        found: dict[str, Any] = {}
        for tag, value in tags.items():  # MLflow's filters know no "or"
            with translated("search runs"):
                runs = self.client.search_runs(
                    [experiment_id], f"tags.`{tag}` = '{value}' and attributes.status = 'RUNNING'"
                )
            found |= {run.info.run_id: run for run in runs}
        return list(found.values())

    def _running_of(self, experiment_id: str, model_name: str) -> list[Any]:
        with translated("search runs"):
            found: list[Any] = self.client.search_runs(
                [experiment_id],
                f"tags.`{MODEL_NAME_TAG}` = '{model_name}' and attributes.status = 'RUNNING'",
                max_results=_MOST_OTHERS,
                order_by=["attributes.start_time ASC"],
            )
        return found


def _turn(run: Any) -> int | None:
    found = run.data.tags.get(TURN_TAG)
    return None if found is None else int(found)


def wait_seconds() -> float:
    """Give how long a task waits for another process at the same work."""
    return float(os.environ.get(WAIT_VARIABLE) or WAIT_SECONDS)


def _lease_seconds() -> float:
    return float(os.environ.get(LEASE_VARIABLE) or LEASE_SECONDS)
