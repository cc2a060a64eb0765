"""Retrainings of the ledger: what was decided, and what became of it."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from airflow_mlops.ledger.aliases import Aliases
from airflow_mlops.ledger.appending import append, require_decision_of
from airflow_mlops.ledger.database import lock
from airflow_mlops.ledger.entries import ACTING, EntryKind, LedgerEntry
from airflow_mlops.ledger.tables import entries

if TYPE_CHECKING:
    from collections.abc import Sequence


class Retrainings(Aliases):
    """Decisions to retrain, one decider at a time, and what answered them."""

    def newest_decision(self, model_name: str) -> int:
        """Give the position of a model's newest retraining decision, whatever it was; 0 where there is none."""
        with self._reading() as connection:
            return _newest_decision(connection, model_name)

    def record_decisions(
        self, model_name: str, new: Sequence[LedgerEntry], *, newest: int
    ) -> list[LedgerEntry] | None:
        """Append a model's retraining decisions, if nobody has decided anything since the decider read the ledger.

        What was decided meanwhile counts in budget, cool-down and what is covered, so the decider has to look again.

        :param newest: what :meth:`newest_decision` gave before anything else was read.
        :returns: the decisions as they stand; ``None``: somebody else decided meanwhile, and nothing is written.
        """
        with self._writing() as connection:
            lock(connection, f"{model_name}|decisions")
            if _newest_decision(connection, model_name) != newest:
                return None
            return [append(connection, entry).entry for entry in new]

    def retrainings(
        self, model_name: str, *, outcomes: Sequence[str] = ("retrain",), limit: int = 1
    ) -> list[LedgerEntry]:
        """List the decisions to retrain, newest first.

        :param outcomes: what was decided; ``ACTING``: also to bring an earlier champion back.
        """
        return self._query(_decisions(model_name, outcomes).limit(limit))

    def open_retraining(self, model_name: str) -> LedgerEntry | None:
        """Find the newest decision to replace the champion, unless its outcome is written: older ones are covered by it."""
        newest = self.retrainings(model_name, outcomes=ACTING)
        if not newest or self.find(EntryKind.RETRAINING_OUTCOME, newest[0].key):
            return None
        return newest[0]

    def require_decision(self, key: str, model_name: str) -> None:
        """Refuse a key that names no retraining decision of the model.

        :raises ValueError: it does not.
        """
        with self._reading() as connection:
            require_decision_of(connection, key, model_name)

    def world_since(self, model_name: str) -> datetime | None:
        """Find when the world last changed, as far as a promoted model was trained on what came after alone.

        A change did not last where a model from before it came back later, or the model of it was rolled back: the world before
        it is the present one.
        """
        undone: datetime | None = None
        standing = {move.payload.get("decision_key") for move in self.standing_moves(model_name)}
        payload = entries.c.payload
        about_a_change = sa.or_(
            payload["training", "change"].as_string().is_not(None),
            payload["undoes_since"].as_string().is_not(None),
        )
        for decision in self._query(_decisions(model_name, ACTING).where(about_a_change)):
            change = _time((decision.payload.get("training") or {}).get("change"))
            undoes = _time(decision.payload.get("undoes_since"))
            if (undoes or change) is None or decision.key not in standing:
                continue
            if change is not None and (undone is None or change < undone):
                return change
            undone = min((time for time in (undone, undoes) if time is not None), default=None)
        return None

    def promotion_for(self, decision: LedgerEntry) -> LedgerEntry | None:
        """Find the promotion that answered a decision."""
        query = (
            sa.select(entries)
            .where(
                entries.c.kind == str(EntryKind.PROMOTION),
                entries.c.model_name == decision.model_name,
                entries.c.payload["decision_key"].as_string() == decision.key,
            )
            .order_by(entries.c.entry_id.desc())
            .limit(1)
        )
        found = self._query(query)
        return found[0] if found else None


def _decisions(model_name: str, outcomes: Sequence[str]) -> sa.Select[Any]:
    """Select a model's decisions that came out so, newest first."""
    return (
        sa.select(entries)
        .where(
            entries.c.kind == str(EntryKind.RETRAINING_DECISION),
            entries.c.model_name == model_name,
            entries.c.payload["outcome"].as_string().in_(outcomes),
        )
        .order_by(entries.c.entry_id.desc())
    )


def _newest_decision(connection: sa.Connection, model_name: str) -> int:
    query = sa.select(sa.func.max(entries.c.entry_id)).where(
        entries.c.kind == str(EntryKind.RETRAINING_DECISION), entries.c.model_name == model_name
    )
    return connection.execute(query).scalar() or 0


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text is not None else None
