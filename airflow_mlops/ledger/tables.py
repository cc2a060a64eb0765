"""Tables of the ledger."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import JSON, Column, DateTime, Index, Integer, MetaData, String, Table, Text, UniqueConstraint
from sqlalchemy.types import TypeDecorator

if TYPE_CHECKING:
    from sqlalchemy.engine import Dialect

metadata = MetaData()


class UtcDateTime(TypeDecorator[datetime]):
    """Stores UTC and gives aware values back, also on SQLite, which knows no time zones."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Turn an aware value into naive UTC."""
        if value is None or value.tzinfo is None:
            return value
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        """Put the zone back."""
        return None if value is None else value.replace(tzinfo=UTC)


entries = Table(
    "mlops_ledger_entries",
    metadata,
    Column("entry_id", Integer, primary_key=True, autoincrement=True),
    Column("kind", String(40), nullable=False),
    Column("key", String(500), nullable=False),
    Column("model_name", String(250)),
    Column("window_start", UtcDateTime),
    Column("window_end", UtcDateTime),
    Column("subject", String(250)),
    Column("summary", Text, nullable=False),
    Column("payload", JSON, nullable=False),
    Column("actor", String(750), nullable=False),
    Column("recorded_at", UtcDateTime, nullable=False),
    UniqueConstraint("kind", "key", name="mlops_ledger_entries_kind_key"),
    Index("mlops_ledger_entries_window", "model_name", "kind", "window_start", "window_end"),
    Index("mlops_ledger_entries_subject", "subject", "kind", "entry_id"),
)

aliases = Table(
    "mlops_aliases",
    metadata,
    Column("model_name", String(250), primary_key=True),
    Column("alias", String(100), primary_key=True),
    Column("model_version", String(50), nullable=False),
    Column("revision", Integer, nullable=False),
    Column("entry_id", Integer, nullable=False),
)
