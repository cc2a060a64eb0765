"""What the ledger and MLflow know about a model, as the tests read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from airflow_mlops.core.windows import Window

#: How the id of a Dag run begins that Airflow started by itself; a backfill is asked for by a person.
_UNATTENDED = ("scheduled__", "asset_triggered__", "operator_triggered__")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    """A ledger entry, as the rules read it.

    :param kind: of the entry.
    :param entry_id: its number.
    :param key: unique within the kind.
    :param subject: what it is about within the model: a run, a version, a table.
    :param actor: ``dag_id/dag_run_id/task_id``, or a person.
    """

    kind: str
    entry_id: int
    key: str
    subject: str | None
    window: Window | None
    payload: dict[str, Any]
    summary: str
    actor: str
    at: datetime

    @property
    def of_a_dag(self) -> bool:
        """Whether a Dag wrote it."""
        return self.actor.count("/") >= 2

    @property
    def scheduled(self) -> bool:
        """Whether a Dag wrote it that no person started; as in Airflow, a run with an id of its own was started by hand."""
        return self.of_a_dag and self.actor.partition("/")[2].startswith(_UNATTENDED)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFacts:
    """What MLflow says of the run that made the champion.

    :param run_id: the run; ``None``: MLflow was not, or could not be asked.
    :param git_commit: commit of the code; ``None``: not known.
    :param git_clean: whether all of the code was in it.
    :param importances: per feature what the loss gains without it, and the deviation of that; empty: not measured.
    :param explained_rows: rows whose answers are shared out among the features.
    :param trouble: why nothing, or not all, is known.
    """

    run_id: str | None = None
    git_commit: str | None = None
    git_clean: bool = False
    importances: dict[str, tuple[float, float]] = field(default_factory=dict)
    explained_rows: int = 0
    trouble: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """All that the rules read.

    :param champion: version; ``None``: nothing was promoted.
    :param champion_runs: runs that made its package.
    :param windows: the newest ones that anybody looked at, newest first.
    :param facts: entries about the model and its tables, newest first.
    :param run: what MLflow says.
    """

    model_name: str
    now: datetime
    champion: str | None = None
    champion_runs: frozenset[str] = frozenset()
    windows: tuple[Window, ...] = ()
    facts: tuple[Fact, ...] = ()
    run: RunFacts = field(default_factory=RunFacts)

    def of(self, kind: str) -> list[Fact]:
        """List the entries of a kind, newest first."""
        return [fact for fact in self.facts if fact.kind == kind]
