"""Entries of the ledger: appended once each, and read."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from airflow_mlops.core.codec import json_safe
from airflow_mlops.core.windows import Window
from airflow_mlops.integrations.storage import same_place
from airflow_mlops.ledger.database import make_engine, migrate, reading, require_writable, translated
from airflow_mlops.ledger.entries import EntryKind, LedgerEntry, Recorded
from airflow_mlops.ledger.tables import entries

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import TracebackType


class Entries:
    """A connection to the ledger's entries.

    :param engine: engine of a database whose schema is up to date.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    @classmethod
    def open(cls, url: str, *, create: bool = True) -> Self:
        """Connect, creating or migrating the schema; safe when several processes do so at once.

        :param url: SQLAlchemy URL, ``sqlite:////folder/ledger.db`` or ``postgresql+psycopg2://...``.
        :param create: make a SQLite file that is not there; who only asks would take an empty one for an answer.
        :raises ConnectionConfigError: the URL is malformed, its driver is not installed, or a newer release of this
            package has changed the schema.
        :raises StorageError: the SQLite file can't be created or written, or is no database.
        :raises LedgerUnavailableError: the database does not answer or stays locked.
        """
        engine = make_engine(url)
        try:
            with translated(engine):
                require_writable(engine, create=create)
                migrate(engine)
        except BaseException:
            engine.dispose()  # nobody gets the ledger, so nobody would close it
            raise
        return cls(engine)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the connections back."""
        self._engine.dispose()

    def record(self, entry: LedgerEntry) -> Recorded:
        """Append an entry, or find the one that was written under the same kind and key."""
        return self.record_all([entry])[0]

    def record_all(self, new: Sequence[LedgerEntry]) -> list[Recorded]:
        """Append several entries in one transaction.

        :raises ValueError: an entry can't be stored: a text is too long, the payload is not JSON, or it is the outcome of
            a retraining that nobody decided. None is written.
        """
        with self._writing() as connection:
            return [append(connection, entry) for entry in new]

    def find(self, kind: EntryKind, key: str) -> LedgerEntry | None:
        """Find the entry with this kind and key."""
        query = sa.select(entries).where(entries.c.kind == kind, entries.c.key == key)
        found = self._query(query)
        return found[0] if found else None

    def entries(
        self,
        *,
        kind: EntryKind | Sequence[EntryKind] | None = None,
        model_name: str | None = None,
        window: Window | None = None,
        subject: str | None = None,
        limit: int = 100,
        newest_first: bool = True,
    ) -> list[LedgerEntry]:
        """List entries; every argument given narrows the list.

        :param limit: at most so many.
        :param newest_first: order of writing, newest first or oldest first.
        """
        query = sa.select(entries)
        if kind is not None:
            kinds = [kind] if isinstance(kind, EntryKind) else list(kind)
            query = query.where(entries.c.kind.in_([str(item) for item in kinds]))
        if model_name is not None:
            query = query.where(entries.c.model_name == model_name)
        if window is not None:
            query = query.where(entries.c.window_start == window.start, entries.c.window_end == window.end)
        if subject is not None:
            query = query.where(entries.c.subject == subject)
        order = entries.c.entry_id.desc() if newest_first else entries.c.entry_id
        return self._query(query.order_by(order).limit(limit))

    def entries_of_table(self, uri: str, *, kind: EntryKind, limit: int = 100) -> list[LedgerEntry]:
        """List entries about one table, newest first, however its address was written: by whatever connection, link or slash.

        :param kind: one whose subject is a table.
        :param limit: at most so many.
        """
        query = sa.select(entries.c.subject).where(entries.c.kind == kind, entries.c.subject.is_not(None))
        with self._reading() as connection:
            known = connection.execute(query.distinct()).scalars().all()
        spelled = [one for one in known if one == uri or same_place(one, uri)]
        about = sa.select(entries).where(entries.c.kind == kind, entries.c.subject.in_(spelled))
        return self._query(about.order_by(entries.c.entry_id.desc()).limit(limit))

    def _query(self, query: sa.Select[Any]) -> list[LedgerEntry]:
        with self._reading() as connection:
            return [entry_of(row) for row in connection.execute(query)]

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        with translated(self._engine), reading(self._engine) as connection:
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        with translated(self._engine), self._engine.begin() as connection:
            yield connection


def append(connection: sa.Connection, entry: LedgerEntry) -> Recorded:
    """Insert, or read what stands under the same kind and key."""
    if entry.kind is EntryKind.RETRAINING_OUTCOME:
        require_decision_of(connection, entry.key, entry.model_name)
    values = {
        "kind": str(entry.kind),
        "key": entry.key,
        "model_name": entry.model_name,
        "window_start": entry.window.start if entry.window else None,
        "window_end": entry.window.end if entry.window else None,
        "subject": entry.subject,
        "summary": entry.summary,
        "payload": json_safe(entry.payload),
        "actor": entry.actor,
        "recorded_at": entry.recorded_at,
    }
    _require_fits(entry, values)
    try:
        with connection.begin_nested():
            connection.execute(entries.insert().values(**values))
    except IntegrityError as err:
        standing = standing_entry(connection, entry)
        if standing is None:  # it was not the key that is taken
            raise ValueError(f"the {entry.kind} entry {entry.key!r} can't be stored: {err.orig}") from err
        return Recorded(entry=entry_of(standing), created=False)
    return Recorded(entry=entry_of(standing_entry(connection, entry)), created=True)


def standing_entry(connection: sa.Connection, entry: LedgerEntry) -> Any:
    """Read the row that stands under an entry's kind and key; ``None``: there is none."""
    same = (entries.c.kind == str(entry.kind), entries.c.key == entry.key)
    return connection.execute(sa.select(entries).where(*same)).one_or_none()


def require_decision_of(connection: sa.Connection, key: str, model_name: str | None) -> None:
    """Refuse a key that names no decision, such as a template that rendered to "None"."""
    query = sa.select(entries.c.model_name).where(
        entries.c.kind == str(EntryKind.RETRAINING_DECISION), entries.c.key == key
    )
    decision = connection.execute(query).one_or_none()
    if decision is None or decision.model_name != model_name:
        raise ValueError(
            f"decision key {key!r} names no retraining decision of {model_name}: "
            "pass the decision_key that DecideRetrainingOperator returned"
        )


def _require_fits(entry: LedgerEntry, values: Mapping[str, Any]) -> None:
    """Refuse what Postgres would refuse, also on SQLite, which has no limits: both behave the same."""
    for column in entries.columns:
        limit = getattr(column.type, "length", None)
        if limit is not None and len(values[column.name] or "") > limit:
            raise ValueError(
                f"{column.name} of the {entry.kind} entry {entry.key!r:.80} has {len(values[column.name])} characters; "
                f"the ledger takes {limit}"
            )


def entry_of(row: Any) -> LedgerEntry:
    """Read an entry from its row."""
    window = Window(start=row.window_start, end=row.window_end) if row.window_start is not None else None
    return LedgerEntry(
        kind=EntryKind(row.kind),
        key=row.key,
        model_name=row.model_name,
        window=window,
        subject=row.subject,
        summary=row.summary,
        payload=row.payload,
        actor=row.actor,
        recorded_at=row.recorded_at,
        entry_id=row.entry_id,
    )
