"""The trigger of a rollout: it waits for the next look, and says all the while that somebody steers."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from airflow.triggers.base import BaseTrigger, TriggerEvent

from airflow_mlops.exceptions import TransientError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

logger = logging.getLogger(__name__)

#: How long the shares hold between the end of a wait and the worker that goes on.
HAND_OVER_SECONDS = 300.0


class RolloutTrigger(BaseTrigger):
    """Renew a rollout's lease until it is time to look; when the task is killed meanwhile, take the rollout back.

    :param bentoml_conn_id: connection of the model service.
    :param mlflow_conn_id: MLflow connection.
    :param ledger_conn_id: connection of the ledger.
    :param signing_conn_id: connection with the keys packages are verified with.
    :param revision: of the state that is served.
    :param until: when to look, ISO 8601.
    :param spec: of the deploy step, JSON; no credentials.
    """

    def __init__(
        self,
        *,
        bentoml_conn_id: str,
        mlflow_conn_id: str,
        ledger_conn_id: str,
        signing_conn_id: str,
        revision: int,
        until: str,
        spec: Mapping[str, Any],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bentoml_conn_id = bentoml_conn_id
        self.mlflow_conn_id = mlflow_conn_id
        self.ledger_conn_id = ledger_conn_id
        self.signing_conn_id = signing_conn_id
        self.revision = revision
        self.until = until
        self.spec = dict(spec)

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Say how to build this trigger again."""
        connections = ("bentoml_conn_id", "mlflow_conn_id", "ledger_conn_id", "signing_conn_id")
        return (
            f"{type(self).__module__}.{type(self).__qualname__}",
            {name: getattr(self, name) for name in (*connections, "revision", "until", "spec")},
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Wait; a lease that is lost ends the wait, for the step to see why."""
        until, seconds = datetime.fromisoformat(self.until), float(self.spec["lease_seconds"])
        while (left := (until - datetime.now(UTC)).total_seconds()) > 0.0:
            try:
                await asyncio.to_thread(renew_lease, self.bentoml_conn_id, self.revision, seconds)
            except TransientError as err:  # the service may be back before the lease runs out
                logger.warning("the lease could not be renewed: %s", err)
            except ValueError as err:
                yield TriggerEvent({"lease": str(err), "spec": self.spec})
                return
            await asyncio.sleep(min(left, seconds / 3.0))
        try:  # until a worker takes over, which a full queue may delay
            await asyncio.to_thread(
                renew_lease, self.bentoml_conn_id, self.revision, max(seconds, HAND_OVER_SECONDS)
            )
        except (TransientError, ValueError) as err:
            logger.warning("the lease could not be renewed for who takes over: %s", err)
        yield TriggerEvent({"lease": None, "spec": self.spec})

    async def on_kill(self) -> None:
        """Write down why, and let the stable version answer everything; at least the latter."""
        try:
            await asyncio.to_thread(self._take_back)
        except Exception:
            logger.exception("the rollout could not be taken back in order: its lease is ended")
            try:
                await asyncio.to_thread(renew_lease, self.bentoml_conn_id, self.revision, 0.0)
            except Exception:
                logger.exception("nor could its lease be: the stable version answers when it runs out")

    def _take_back(self) -> None:
        from airflow_mlops.hooks.services import services_from_connections
        from airflow_mlops.steps.base import run_step

        services = services_from_connections(
            mlflow_conn_id=self.mlflow_conn_id,
            bentoml_conn_id=self.bentoml_conn_id,
            ledger_conn_id=self.ledger_conn_id,
            signing_conn_id=self.signing_conn_id,
        )
        run_step("deploy", {**self.spec, "abort": "the task was killed while it waited"}, services)


def renew_lease(bentoml_conn_id: str, revision: int, seconds: float) -> None:
    """Say that somebody steers for so long; 0 seconds: nobody does any more."""
    from airflow_mlops.hooks.bentoml import BentoMLHook

    with BentoMLHook(bentoml_conn_id=bentoml_conn_id).get_conn() as client:
        client.renew_lease(revision, seconds)
