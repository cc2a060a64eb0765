"""Aliases: where the ledger says they point, shown in MLflow, which is what people and services look at."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from airflow_mlops.exceptions import ModelVersionNotFoundError

if TYPE_CHECKING:
    from airflow_mlops.integrations.mlflow import Registry
    from airflow_mlops.ledger import Ledger

log = logging.getLogger(__name__)

CHAMPION = "champion"
#: Points at the version that was champion before; it follows from the ledger and is never moved by itself.
PREVIOUS = "previous"


def show_aliases(registry: Registry, ledger: Ledger, model_name: str) -> None:
    """Point MLflow's aliases where the ledger says.

    MLflow has no compare-and-set, so a process that was slow could write what is no longer true: after writing, the ledger
    is read again, and whoever writes last has read last. A process that is killed leaves the rest to the next one.
    """
    wanted = _wanted(ledger, model_name)
    while True:
        shown = registry.aliases(model_name) if wanted else {}
        for alias, version in wanted.items():
            if shown.get(alias) == version:
                continue
            try:
                registry.set_alias(model_name, alias, version)
            except ModelVersionNotFoundError:
                log.warning("%s of %s is version %s, which MLflow no longer has", alias, model_name, version)
        newest = _wanted(ledger, model_name)
        if newest == wanted:
            return
        wanted = newest


def _wanted(ledger: Ledger, model_name: str) -> dict[str, str]:
    """Give the aliases, the last one to be written first: who sees the new champion finds the previous one."""
    wanted: dict[str, str] = {}
    move = ledger.last_move(model_name, CHAMPION)
    if move is not None and move.payload.get("previous_version"):
        wanted[PREVIOUS] = str(move.payload["previous_version"])
    return wanted | ledger.aliases(model_name)
