"""The ledger: append-only entries that are written once, and alias pointers that move by compare-and-set."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError

from airflow_mlops.core.codec import json_safe
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import (
    ConnectionConfigError,
    LedgerUnavailableError,
    PromotionConflictError,
    StorageError,
)
from airflow_mlops.ledger.entries import EntryKind, LedgerEntry, Recorded
from airflow_mlops.ledger.tables import aliases, entries

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from datetime import datetime
    from types import TracebackType

_MIGRATIONS = Path(__file__).parent / "migrations"
_HEAD = "0001"

#: How long a writer waits for another one, in seconds.
_BUSY_SECONDS = 30

#: Any number no one else uses: the Postgres advisory lock under which the schema is brought up to date.
_MIGRATION_LOCK = 7_346_152_001


class Ledger:
    """A connection to the ledger; use :meth:`open`, and it as a context manager.

    :param engine: engine of a database whose schema is up to date.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    @classmethod
    def open(cls, url: str) -> Ledger:
        """Connect, creating or migrating the schema; safe when several processes do so at once.

        :param url: SQLAlchemy URL, ``sqlite:////folder/ledger.db`` or ``postgresql+psycopg2://...``.
        :raises ConnectionConfigError: the URL is malformed or its driver is not installed.
        :raises StorageError: the SQLite file can't be created or written.
        :raises LedgerUnavailableError: the database does not answer or stays locked.
        """
        engine = _engine(url)
        with _translated(engine):
            _require_writable(engine)
            _migrate(engine)
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

    # -- entries ------------------------------------------------------------------------------------------

    def record(self, entry: LedgerEntry) -> Recorded:
        """Append an entry, or find the one that was written under the same kind and key."""
        return self.record_all([entry])[0]

    def record_all(self, new: Sequence[LedgerEntry]) -> list[Recorded]:
        """Append several entries in one transaction."""
        with _translated(self._engine), self._engine.begin() as connection:
            return [_append(connection, entry) for entry in new]

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

    # -- aliases ------------------------------------------------------------------------------------------

    def aliases(self, model_name: str) -> dict[str, str]:
        """Give every alias of a model with the version it points at."""
        query = sa.select(aliases.c.alias, aliases.c.model_version).where(aliases.c.model_name == model_name)
        with _translated(self._engine), self._engine.connect() as connection:
            return {row.alias: row.model_version for row in connection.execute(query)}

    def move_alias(
        self,
        *,
        model_name: str,
        alias: str,
        model_version: str,
        expected_version: str | None,
        entry: LedgerEntry,
    ) -> Recorded:
        """Point an alias at a version if it still points where the caller believes; entry and pointer change together.

        An alias that is already there is left alone: a retry is no second promotion.

        :param expected_version: where the alias points now; ``None``: it is not set yet.
        :param entry: what to write; a revision is appended to its key, so that A to B to A to B is four entries.
        :raises PromotionConflictError: somebody else moved the alias; the message says who and where to.
        """
        with _translated(self._engine), self._engine.begin() as connection:
            row = connection.execute(
                sa.select(aliases)
                .where(aliases.c.model_name == model_name, aliases.c.alias == alias)
                .with_for_update()
            ).one_or_none()
            current = row.model_version if row else None
            if row is not None and current == model_version:
                standing = connection.execute(
                    sa.select(entries).where(entries.c.entry_id == row.entry_id)
                ).one()
                return Recorded(entry=_entry(standing), created=False)
            if current != expected_version:
                raise _conflict(connection, row, model_name, alias, model_version, expected_version)
            revision = row.revision + 1 if row else 1
            recorded = _append(connection, _with_key(entry, f"{entry.key}|{revision}"))
            values = {
                "model_version": model_version,
                "revision": revision,
                "entry_id": recorded.entry.entry_id,
            }
            if row is None:
                connection.execute(aliases.insert().values(model_name=model_name, alias=alias, **values))
                return recorded
            moved = connection.execute(
                aliases.update()
                .where(
                    aliases.c.model_name == model_name,
                    aliases.c.alias == alias,
                    aliases.c.revision == row.revision,
                )
                .values(**values)
            )
            if moved.rowcount != 1:
                raise _conflict(connection, row, model_name, alias, model_version, expected_version)
            return recorded

    def champion_at(self, model_name: str, at: datetime, *, alias: str = "champion") -> str | None:
        """Tell which version an alias pointed at, at a time; ``None``: at none yet."""
        query = (
            sa.select(entries)
            .where(
                entries.c.model_name == model_name,
                entries.c.kind.in_([str(EntryKind.PROMOTION), str(EntryKind.ROLLBACK)]),
                entries.c.recorded_at <= at,
            )
            .order_by(entries.c.recorded_at.desc(), entries.c.entry_id.desc())
        )
        moves = (entry for entry in self._query(query) if entry.payload.get("alias") == alias)
        move = next(moves, None)
        return str(move.payload["model_version"]) if move else None

    # -- the loop -----------------------------------------------------------------------------------------

    def undecided_windows(
        self, model_name: str, *, required: Sequence[EntryKind] = (EntryKind.PERFORMANCE_CHECK,)
    ) -> list[Window]:
        """List the windows whose required checks are all here and that no retraining decision covers, oldest first.

        This, not an event, is what a decider works from: an event that was lost, merged or sent twice changes nothing.
        """
        checks, decided = entries.alias("checks"), entries.alias("decided")
        query = (
            sa.select(checks.c.window_start, checks.c.window_end)
            .where(
                checks.c.model_name == model_name,
                checks.c.kind.in_([str(kind) for kind in required]),
                checks.c.window_start.is_not(None),
                ~sa.exists().where(
                    decided.c.kind == str(EntryKind.RETRAINING_DECISION),
                    decided.c.model_name == model_name,
                    decided.c.window_start == checks.c.window_start,
                    decided.c.window_end == checks.c.window_end,
                ),
            )
            .group_by(checks.c.window_start, checks.c.window_end)
            .having(sa.func.count(sa.distinct(checks.c.kind)) == len(set(required)))
            .order_by(checks.c.window_start, checks.c.window_end)
        )
        with _translated(self._engine), self._engine.connect() as connection:
            return [Window(start=row.window_start, end=row.window_end) for row in connection.execute(query)]

    def open_retraining(self, model_name: str) -> LedgerEntry | None:
        """Find the newest decision to retrain whose outcome is not written yet."""
        for decision in self.entries(kind=EntryKind.RETRAINING_DECISION, model_name=model_name):
            if decision.payload.get("outcome") == "retrain":
                closed = self.find(EntryKind.RETRAINING_OUTCOME, decision.key)
                return None if closed else decision
        return None

    def _query(self, query: sa.Select[Any]) -> list[LedgerEntry]:
        with _translated(self._engine), self._engine.connect() as connection:
            return [_entry(row) for row in connection.execute(query)]


def _append(connection: sa.Connection, entry: LedgerEntry) -> Recorded:
    """Insert, or read what stands under the same kind and key."""
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
    created = True
    try:
        with connection.begin_nested():
            connection.execute(entries.insert().values(**values))
    except IntegrityError:
        created = False
    standing = connection.execute(
        sa.select(entries).where(entries.c.kind == str(entry.kind), entries.c.key == entry.key)
    ).one()
    return Recorded(entry=_entry(standing), created=created)


def _entry(row: Any) -> LedgerEntry:
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


def _with_key(entry: LedgerEntry, key: str) -> LedgerEntry:
    from dataclasses import replace

    return replace(entry, key=key)


def _conflict(
    connection: sa.Connection, row: Any, model_name: str, alias: str, wanted: str, expected: str | None
) -> PromotionConflictError:
    believed = f"version {expected}" if expected else "no version"
    if row is None:
        return PromotionConflictError(
            f"{alias} of {model_name} was believed to be {believed}, but the ledger has none; "
            f"version {wanted} was not promoted. Evaluate against the present {alias} again"
        )
    winner = connection.execute(sa.select(entries).where(entries.c.entry_id == row.entry_id)).one()
    return PromotionConflictError(
        f"{alias} of {model_name} was believed to be {believed}, but {winner.actor} moved it to version "
        f"{row.model_version}; version {wanted} was not promoted. Evaluate against the present {alias} again"
    )


def _engine(url: str) -> sa.Engine:
    try:
        parsed = sa.make_url(url)
        connect_args: Mapping[str, Any] = (
            {"timeout": _BUSY_SECONDS} if parsed.get_backend_name() == "sqlite" else {"connect_timeout": 10}
        )
        engine = sa.create_engine(parsed, connect_args=dict(connect_args), pool_pre_ping=True)
    except (NoSuchModuleError, ModuleNotFoundError) as err:
        raise ConnectionConfigError(f"the driver of the ledger's database is not installed: {err}") from err
    except (ArgumentError, ValueError) as err:
        # The text of the URL is left out: it may hold a password.
        raise ConnectionConfigError(
            "the ledger's URL is not a SQLAlchemy URL such as sqlite:////folder/ledger.db "
            "or postgresql+psycopg2://user:password@host/database"
        ) from err
    if engine.dialect.name == "sqlite":
        _configure_sqlite(engine)
    return engine


def _configure_sqlite(engine: sa.Engine) -> None:
    """Let readers and one writer work at once, and take the write lock when a transaction begins.

    Without ``BEGIN IMMEDIATE`` two transactions may read first and then both want to write: one fails at once,
    whatever the timeout.
    """

    @sa.event.listens_for(engine, "connect")
    def on_connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    @sa.event.listens_for(engine, "begin")
    def on_begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _require_writable(engine: sa.Engine) -> None:
    """Say in plain words that a SQLite file can't be made; the driver says "unable to open database file"."""
    database = engine.url.database
    if engine.dialect.name != "sqlite" or not database or database == ":memory:":
        return
    path = Path(database)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
    except OSError as err:
        raise StorageError(
            f"the ledger file {path} can't be written: {err.strerror}; check the folder and its permissions"
        ) from err


def _migrate(engine: sa.Engine) -> None:
    """Bring the schema up to date, one process at a time."""
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(sa.text(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})"))
        if sa.inspect(connection).has_table("mlops_alembic_version"):
            standing = connection.execute(sa.text("SELECT version_num FROM mlops_alembic_version")).scalar()
            if standing == _HEAD:
                return
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


@contextmanager
def _translated(engine: sa.Engine) -> Iterator[None]:
    try:
        yield
    except DBAPIError as err:
        text = str(err.orig)
        if "readonly" in text or "disk is full" in text or "unable to open" in text:
            raise StorageError(f"the ledger at {engine.url!r} can't be written: {text}") from err
        raise LedgerUnavailableError(f"the ledger at {engine.url!r} does not answer: {text}") from err
