"""The ledger: append-only entries that are written once, and alias pointers that move by compare-and-set."""

from __future__ import annotations

<<<<<<< HEAD
from airflow_mlops.ledger.retrainings import Retrainings
from airflow_mlops.ledger.windows import Windows
=======
import sqlite3
import time
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import sqlalchemy as sa
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    DBAPIError,
    IntegrityError,
    NoSuchModuleError,
    PendingRollbackError,
    StatementError,
)

from airflow_mlops.core.codec import json_safe
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import (
    ConnectionConfigError,
    LedgerUnavailableError,
    PromotionConflictError,
    StorageError,
)
from airflow_mlops.ledger.entries import ACTING, ChampionPeriod, EntryKind, LedgerEntry, Recorded, WindowGrade
from airflow_mlops.ledger.tables import aliases, entries

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import TracebackType

_MIGRATIONS = Path(__file__).parent / "migrations"
_HEAD = "0002"

#: How long a writer waits for another one, in seconds.
_BUSY_SECONDS = 30

#: Name of the lock under which the schema is brought up to date.
_MIGRATION = "airflow_mlops ledger schema"

#: How often it is asked for on Postgres, in seconds.
_LOCK_SECONDS = 0.05

#: Execution option of a connection that only reads, so that it does not queue for SQLite's write lock.
_READS_ONLY = "airflow_mlops_reads_only"

#: What SQLite says when waiting does not help, as the driver has no error classes for it.
_STORAGE_TROUBLE = ("readonly", "disk is full", "unable to open", "not a database", "malformed")

#: What is found out about a window.
_CHECKS = (str(EntryKind.PERFORMANCE_CHECK), str(EntryKind.DRIFT_CHECK))

_DRIVERS = {"sqlite": "", "postgresql": "pip install psycopg2-binary"}
>>>>>>> h2


class Ledger(Windows, Retrainings):
    """A connection to the ledger; use :meth:`open`, and it as a context manager.

    Entries, aliases, windows and retrainings are each in a file of their own.

    :param engine: engine of a database whose schema is up to date.
    """
<<<<<<< HEAD
=======

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    @classmethod
    def open(cls, url: str, *, create: bool = True) -> Ledger:
        """Connect, creating or migrating the schema; safe when several processes do so at once.

        :param url: SQLAlchemy URL, ``sqlite:////folder/ledger.db`` or ``postgresql+psycopg2://...``.
        :param create: make a SQLite file that is not there; who only asks would take an empty one for an answer.
        :raises ConnectionConfigError: the URL is malformed, its driver is not installed, or a newer release of this
            package has changed the schema.
        :raises StorageError: the SQLite file can't be created or written, or is no database.
        :raises LedgerUnavailableError: the database does not answer or stays locked.
        """
        engine = _engine(url)
        try:
            with _translated(engine):
                _require_writable(engine, create=create)
                _migrate(engine)
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

    # -- entries ------------------------------------------------------------------------------------------

    def record(self, entry: LedgerEntry) -> Recorded:
        """Append an entry, or find the one that was written under the same kind and key."""
        return self.record_all([entry])[0]

    def record_all(self, new: Sequence[LedgerEntry]) -> list[Recorded]:
        """Append several entries in one transaction.

        :raises ValueError: an entry can't be stored: a text is too long, the payload is not JSON, or it is the outcome of
            a retraining that nobody decided. None is written.
        """
        with self._writing() as connection:
            return [_append(connection, entry) for entry in new]

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
            _lock(connection, f"{model_name}|decisions")
            if _newest_decision(connection, model_name) != newest:
                return None
            return [_append(connection, entry).entry for entry in new]

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
        with self._reading() as connection:
            return {row.alias: row.model_version for row in connection.execute(query)}

    def move_alias(
        self,
        *,
        model_name: str,
        alias: str,
        model_version: str,
        expected_version: str | None,
        entry: LedgerEntry,
        request: str | None = None,
    ) -> Recorded:
        """Point an alias at a version if it still points where the caller believes; entry and pointer change together.

        An alias that is already there is left alone: a retry is no second promotion.

        :param expected_version: where the alias points now; ``None``: it is not set yet.
        :param entry: what to write. The request is appended to its key; without one a revision, so that A to B to A to B is
            four entries.
        :param request: names what is asked for, by whom. It is carried out once: asked for again after somebody moved the
            alias on, it is refused, also when the alias is back where the caller believes.
        :raises PromotionConflictError: somebody else moved the alias; the message says who and where to.
        """
        with self._writing() as connection:
            # A row that is not there yet can't be locked: the first promotion may be raced for, too.
            _lock(connection, f"{model_name}|{alias}")
            this = (aliases.c.model_name == model_name, aliases.c.alias == alias)
            row = connection.execute(sa.select(aliases).where(*this)).one_or_none()
            current = row.model_version if row else None
            if row is not None and current == model_version:
                return Recorded(entry=_entry(_last_move(connection, row)), created=False)
            revision = row.revision + 1 if row else 1
            keyed = replace(entry, key=f"{entry.key}|{request or revision}")
            carried_out = _standing(connection, keyed) if request else None
            if row is not None and carried_out is not None:
                raise _undone(_entry(carried_out), _entry(_last_move(connection, row)), alias)
            if current != expected_version:
                raise _conflict(connection, row, model_name, alias, model_version, expected_version)
            recorded = _append(connection, keyed)
            pointer = {
                "model_version": model_version,
                "revision": revision,
                "entry_id": recorded.entry.entry_id,
            }
            if row is None:
                connection.execute(aliases.insert().values(model_name=model_name, alias=alias, **pointer))
            else:
                connection.execute(aliases.update().where(*this).values(**pointer))
            return recorded

    def last_move(self, model_name: str, alias: str) -> LedgerEntry | None:
        """Find the entry that put an alias where it points now; ``None`` when it points nowhere."""
        query = (
            sa.select(entries)
            .join(aliases, aliases.c.entry_id == entries.c.entry_id)
            .where(aliases.c.model_name == model_name, aliases.c.alias == alias)
        )
        found = self._query(query)
        return found[0] if found else None

    def moves(self, model_name: str, alias: str = "champion") -> list[LedgerEntry]:
        """List every move of an alias, the first one first."""
        return self._query(_moves(model_name, alias).order_by(entries.c.entry_id))

    def standing_moves(self, model_name: str, alias: str = "champion") -> list[LedgerEntry]:
        """List the moves of an alias that nobody took back, the first one first: a rollback undoes those since its version came."""
        standing: list[LedgerEntry] = []
        for move in self.moves(model_name, alias):
            version = move.payload["model_version"]
            there = any(before.payload["model_version"] == version for before in standing)
            if move.kind is EntryKind.ROLLBACK and there:
                while standing[-1].payload["model_version"] != version:
                    standing.pop()
            else:
                standing.append(move)
        return standing

    def former_champions(self, model_name: str, *, alias: str = "champion", limit: int = 24) -> list[str]:
        """List the versions that were champion and are not, the one that left last first; not those that somebody took back.

        :param limit: at most so many: the first one there was, and those that left last.
        """
        left: dict[str, bool] = {}
        for move in self.moves(model_name, alias):
            version, before = str(move.payload["model_version"]), move.payload.get("previous_version")
            left.pop(version, None)
            if before is not None:
                left.pop(str(before), None)
                left[str(before)] = move.kind is not EntryKind.ROLLBACK
        found = [version for version, welcome in reversed(left.items()) if welcome]
        return found if len(found) <= limit else [*found[: limit - 1], found[-1]]

    def champion_at(self, model_name: str, at: datetime, *, alias: str = "champion") -> str | None:
        """Tell which version an alias pointed at, at a time; ``None``: at none yet."""
        found = self.who_was_champion(model_name, at, alias=alias)
        return found.model_version if found else None

    def who_was_champion(
        self, model_name: str, at: datetime, *, alias: str = "champion"
    ) -> ChampionPeriod | None:
        """Tell which version an alias pointed at, at a time, since and until when, and who moved it there.

        Moves are told apart by the order they were written in, not by the clocks of those who wrote them.

        :param at: the time; naive values are taken as UTC.
        :returns: ``None`` when it pointed at none yet.
        """
        before = self._query(
            _moves(model_name, alias)
            .where(entries.c.recorded_at <= at)
            .order_by(entries.c.entry_id.desc())
            .limit(1)
        )
        if not before:
            return None
        move = before[0]
        after = self._query(
            _moves(model_name, alias)
            .where(entries.c.entry_id > move.entry_id)
            .order_by(entries.c.entry_id)
            .limit(1)
        )
        return ChampionPeriod(
            model_name=model_name,
            model_version=str(move.payload["model_version"]),
            since=move.recorded_at,
            until=after[0].recorded_at if after else None,
            actor=move.actor,
            summary=move.summary,
        )

    # -- the loop -----------------------------------------------------------------------------------------

    def undecided_windows(
        self,
        model_name: str,
        *,
        required: Sequence[EntryKind] = (EntryKind.PERFORMANCE_CHECK,),
        overdue_since: datetime | None = None,
    ) -> list[Window]:
        """List the windows whose required checks are all here and that no retraining decision covers, oldest first.

        This, not an event, is what a decider works from: an event that was lost, merged or sent twice changes nothing.

        :param overdue_since: a window whose first check is older than this is listed with whatever checks it has.
        """
        checks = entries.alias("checks")
        wanted = {str(kind) for kind in required}
        query = (
            sa.select(checks.c.window_start, checks.c.window_end)
            .where(
                checks.c.model_name == model_name,
                checks.c.kind.in_(wanted | set(_CHECKS)),
                checks.c.window_start.is_not(None),
                ~_decided(checks),
            )
            .group_by(checks.c.window_start, checks.c.window_end)
            .order_by(checks.c.window_start, checks.c.window_end)
        )
        present = sa.case((checks.c.kind.in_(wanted), checks.c.kind))
        complete = sa.func.count(sa.distinct(present)) == len(wanted)
        overdue = sa.func.min(checks.c.recorded_at) <= overdue_since if overdue_since else sa.false()
        return self._windows(query.having(sa.or_(complete, overdue)))

    def ungraded_windows(self, model_name: str, *, before: datetime) -> list[Window]:
        """List the undecided windows that were checked, but whose performance could not be measured yet, oldest first.

        :param before: only those that ended by then.
        """
        checks, grades = entries.alias("checks"), entries.alias("grades")
        graded = sa.exists().where(
            grades.c.kind == str(EntryKind.PERFORMANCE_CHECK),
            grades.c.model_name == checks.c.model_name,
            grades.c.window_start == checks.c.window_start,
            grades.c.window_end == checks.c.window_end,
            sa.or_(
                grades.c.payload["measured"].as_boolean(), ~grades.c.payload["awaits_labels"].as_boolean()
            ),
        )
        query = (
            sa.select(checks.c.window_start, checks.c.window_end)
            .where(
                checks.c.model_name == model_name,
                checks.c.kind.in_(_CHECKS),
                checks.c.window_end <= before,
                ~graded,
                ~_decided(checks),
            )
            .distinct()
            .order_by(checks.c.window_start, checks.c.window_end)
        )
        return self._windows(query)

    def grades(
        self,
        model_name: str,
        *,
        window: Window | None = None,
        before: datetime | None = None,
        limit: int = 60,
    ) -> list[WindowGrade]:
        """List the performance checks that stand, one per window, oldest window first.

        :param window: only this window.
        :param before: only windows that ended by then.
        :param limit: the newest so many windows at most.
        """
        mine = [entries.c.kind == str(EntryKind.PERFORMANCE_CHECK), entries.c.model_name == model_name]
        if before is not None:
            mine.append(entries.c.window_end <= before)
        if window is not None:
            mine += [entries.c.window_start == window.start, entries.c.window_end == window.end]
        windows = (
            sa.select(entries.c.window_start, entries.c.window_end)
            .where(*mine, entries.c.window_start.is_not(None))
            .distinct()
            .order_by(entries.c.window_start.desc(), entries.c.window_end.desc())
            .limit(limit)
            .subquery()
        )
        same = sa.and_(
            entries.c.window_start == windows.c.window_start, entries.c.window_end == windows.c.window_end
        )
        query = (
            sa.select(entries)
            .join(windows, same)
            .where(*mine)
            .order_by(entries.c.window_start, entries.c.window_end, entries.c.entry_id.desc())
        )
        checks: dict[Window, list[LedgerEntry]] = {}
        for entry in self._query(query):
            if entry.window is not None:
                checks.setdefault(entry.window, []).append(entry)
        return [
            WindowGrade(
                window=checked,
                entry=next((entry for entry in found if entry.payload.get("measured")), found[0]),
                first_checked_at=min(entry.recorded_at for entry in found),
            )
            for checked, found in checks.items()
        ]

    def unfinished_windows(self, model_name: str, *, before: datetime) -> list[Window]:
        """List the windows whose labels are still awaited, oldest first: not graded yet, or graded on a part of them.

        :param before: only those that ended by then.
        """
        maturing = {grade.window for grade in self.grades(model_name, before=before) if not grade.final}
        return sorted(maturing | set(self.ungraded_windows(model_name, before=before)))

    def retrainings(
        self, model_name: str, *, outcomes: Sequence[str] = ("retrain",), limit: int = 1
    ) -> list[LedgerEntry]:
        """List the decisions to retrain, newest first.

        :param outcomes: what was decided; ``ACTING``: also to bring an earlier champion back.
        """
        query = (
            sa.select(entries)
            .where(
                entries.c.kind == str(EntryKind.RETRAINING_DECISION),
                entries.c.model_name == model_name,
                entries.c.payload["outcome"].as_string().in_(outcomes),
            )
            .order_by(entries.c.entry_id.desc())
            .limit(limit)
        )
        return self._query(query)

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
            _require_decision(connection, key, model_name)

    def world_since(self, model_name: str) -> datetime | None:
        """Find when the world last changed, as far as a promoted model was trained on what came after alone.

        A change did not last where a model from before it came back later, or the model of it was rolled back: the world before
        it is the present one.
        """
        undone: datetime | None = None
        standing = {move.payload.get("decision_key") for move in self.standing_moves(model_name)}
        for decision in self.retrainings(model_name, outcomes=ACTING, limit=100):
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

    # -- connections --------------------------------------------------------------------------------------

    def _windows(self, query: sa.Select[Any]) -> list[Window]:
        with self._reading() as connection:
            return [Window(start=row.window_start, end=row.window_end) for row in connection.execute(query)]

    def _query(self, query: sa.Select[Any]) -> list[LedgerEntry]:
        with self._reading() as connection:
            return [_entry(row) for row in connection.execute(query)]

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        with _translated(self._engine), _reader(self._engine) as connection:
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        with _translated(self._engine), self._engine.begin() as connection:
            yield connection


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text is not None else None


def _moves(model_name: str, alias: str) -> sa.Select[Any]:
    return sa.select(entries).where(
        entries.c.model_name == model_name,
        entries.c.kind.in_([str(EntryKind.PROMOTION), str(EntryKind.ROLLBACK)]),
        entries.c.payload["alias"].as_string() == alias,
    )


def _decided(checks: Any) -> sa.ColumnElement[bool]:
    """Tell whether a retraining decision covers a check's window."""
    decided = entries.alias("decided")
    return sa.exists().where(
        decided.c.kind == str(EntryKind.RETRAINING_DECISION),
        decided.c.model_name == checks.c.model_name,
        decided.c.window_start == checks.c.window_start,
        decided.c.window_end == checks.c.window_end,
    )


def _newest_decision(connection: sa.Connection, model_name: str) -> int:
    query = sa.select(sa.func.max(entries.c.entry_id)).where(
        entries.c.kind == str(EntryKind.RETRAINING_DECISION), entries.c.model_name == model_name
    )
    return connection.execute(query).scalar() or 0


def _append(connection: sa.Connection, entry: LedgerEntry) -> Recorded:
    """Insert, or read what stands under the same kind and key."""
    if entry.kind is EntryKind.RETRAINING_OUTCOME:
        _require_decision(connection, entry.key, entry.model_name)
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
        standing = _standing(connection, entry)
        if standing is None:  # it was not the key that is taken
            raise ValueError(f"the {entry.kind} entry {entry.key!r} can't be stored: {err.orig}") from err
        return Recorded(entry=_entry(standing), created=False)
    return Recorded(entry=_entry(_standing(connection, entry)), created=True)


def _standing(connection: sa.Connection, entry: LedgerEntry) -> Any:
    same = (entries.c.kind == str(entry.kind), entries.c.key == entry.key)
    return connection.execute(sa.select(entries).where(*same)).one_or_none()


def _require_decision(connection: sa.Connection, key: str, model_name: str | None) -> None:
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


def _last_move(connection: sa.Connection, pointer: Any) -> Any:
    """Give the entry of the move that put the pointer where it is."""
    return connection.execute(sa.select(entries).where(entries.c.entry_id == pointer.entry_id)).one()


def _conflict(
    connection: sa.Connection, row: Any, model_name: str, alias: str, wanted: str, expected: str | None
) -> PromotionConflictError:
    believed = f"version {expected}" if expected else "no version"
    if row is None:
        return PromotionConflictError(
            f"{alias} of {model_name} was believed to be {believed}, but the ledger has none; "
            f"version {wanted} was not promoted. Evaluate against the present {alias} again"
        )
    winner = _last_move(connection, row)
    return PromotionConflictError(
        f"{alias} of {model_name} was believed to be {believed}, but {winner.actor} moved it to version "
        f"{row.model_version}; version {wanted} was not promoted. Evaluate against the present {alias} again"
    )


def _undone(move: LedgerEntry, last: LedgerEntry, alias: str) -> PromotionConflictError:
    version = move.payload["model_version"]
    return PromotionConflictError(
        f"{move.actor} moved {alias} of {move.model_name} to version {version} at {move.recorded_at:%Y-%m-%d %H:%M} already, "
        f"and {last.actor} moved it on to version {last.payload['model_version']} ({last.summary}); a move is not repeated. "
        f"Whoever wants version {version} again promotes it by hand, with a reason of its own"
    )


def _engine(url: str) -> sa.Engine:
    try:
        parsed = sa.make_url(url)
    except (ArgumentError, ValueError):
        # Neither the text of the URL nor the error that quotes it is shown: they may hold a password.
        raise ConnectionConfigError(
            "the ledger's URL is not a SQLAlchemy URL such as sqlite:////folder/ledger.db "
            "or postgresql+psycopg2://user:password@host/database"
        ) from None
    backend = parsed.get_backend_name()
    if backend not in _DRIVERS:
        raise ConnectionConfigError(
            f"the ledger has no driver for {backend!r}: its URL begins with sqlite:/// or postgresql+psycopg2://"
        )
    try:
        timeout = {"timeout": _BUSY_SECONDS} if backend == "sqlite" else {"connect_timeout": 10}
        engine = sa.create_engine(parsed, connect_args=timeout, pool_pre_ping=True)
    except (NoSuchModuleError, ModuleNotFoundError) as err:
        raise ConnectionConfigError(
            f"the driver {parsed.drivername!r} of the ledger's database is not installed ({err}): {_DRIVERS[backend]}"
        ) from err
    if backend == "sqlite":
        _configure_sqlite(engine)
    return engine


def _configure_sqlite(engine: sa.Engine) -> None:
    """Let readers and one writer work at once; a writer takes the write lock when its transaction begins.

    Without ``BEGIN IMMEDIATE`` two transactions may read first and then both want to write: one fails at once,
    whatever the timeout. ``synchronous`` stays at ``FULL``: a decision that was told is on the disk.
    """

    @sa.event.listens_for(engine, "connect")
    def on_connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None
        _switch_to_wal(connection)
        connection.execute("PRAGMA synchronous=FULL")

    @sa.event.listens_for(engine, "begin")
    def on_begin(connection: sa.Connection) -> None:
        reads_only = connection.get_execution_options().get(_READS_ONLY, False)
        connection.exec_driver_sql("BEGIN" if reads_only else "BEGIN IMMEDIATE")


def _switch_to_wal(connection: sqlite3.Connection) -> None:
    """Switch the file to WAL, which stays so; SQLite's own timeout does not cover this, so the waiting is done here.

    Two processes that open a new file at once both hold a read lock and both want the exclusive one: SQLite sees the
    deadlock and refuses one of them at once.
    """
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as err:
            if err.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


@contextmanager
def _reader(engine: sa.Engine) -> Iterator[sa.Connection]:
    with engine.connect() as connection:
        yield connection.execution_options(**{_READS_ONLY: True})


def _lock(connection: sa.Connection, name: str) -> None:
    """Let one transaction at a time do what has this name; on SQLite every writer is alone anyway."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtextextended(name, 0))))


def _require_writable(engine: sa.Engine, *, create: bool) -> None:
    """Say in plain words that a SQLite file can't be made; the driver says "unable to open database file"."""
    database = engine.url.database
    if engine.dialect.name != "sqlite" or not database or database == ":memory:":
        return
    path = Path(database)
    if not create and not path.exists():
        raise StorageError(
            f"there is no ledger at {path}: check the URL, or make one with `airflow-mlops ledger {engine.url} --migrate`"
        )
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
    with _reader(engine) as connection:
        if _schema(connection) == _HEAD:
            return
    with _alone(engine) as (reading, writing):
        standing = _schema(reading)
        if standing == _HEAD:  # another process was faster
            return
        from alembic import command
        from alembic.config import Config
        from alembic.script import ScriptDirectory

        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
        config.attributes["connection"] = writing
        known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
        if standing is not None and standing not in known:
            raise ConnectionConfigError(
                f"the ledger at {engine.url!r} has schema {standing}, this airflow-mlops knows {_HEAD}: "
                "a newer release has written it; upgrade airflow-mlops here as well"
            )
        command.upgrade(config, "head")


@contextmanager
def _alone(engine: sa.Engine) -> Iterator[tuple[sa.Connection, sa.Connection]]:
    """Let one process at a time change the schema: by a connection to read with, and one to write with."""
    if engine.dialect.name != "postgresql":
        with engine.begin() as connection:  # takes SQLite's write lock
            yield connection, connection
        return
    # An index is built concurrently: outside of a transaction, and not before statements end that were there first. So the lock
    # is another connection's, and is asked for again and again: a statement that waits for it would be waited for.
    with engine.connect() as lock, engine.connect() as connection:
        asked = sa.select(sa.func.pg_try_advisory_xact_lock(sa.func.hashtextextended(_MIGRATION, 0)))
        while not lock.execute(asked).scalar():
            lock.rollback()
            time.sleep(_LOCK_SECONDS)
        yield lock, connection


def _schema(connection: sa.Connection) -> str | None:
    """Give the schema revision the database is at; ``None`` when there is no ledger yet."""
    if not sa.inspect(connection).has_table("mlops_alembic_version"):
        return None
    standing: str | None = connection.execute(
        sa.text("SELECT version_num FROM mlops_alembic_version")
    ).scalar()
    return standing


@contextmanager
def _translated(engine: sa.Engine) -> Iterator[None]:
    try:
        yield
    except DataError as err:
        raise ValueError(f"the ledger can't store this entry: {err.orig}") from err
    except DBAPIError as err:
        text = str(err.orig)
        if any(trouble in text for trouble in _STORAGE_TROUBLE):
            raise StorageError(
                f"the ledger at {engine.url!r} can't be used: {text}; check the file, its permissions and the disk"
            ) from err
        raise LedgerUnavailableError(f"the ledger at {engine.url!r} does not answer: {text}") from err
    except PendingRollbackError as err:  # what is said of a block that a lost connection ended
        raise LedgerUnavailableError(f"the ledger at {engine.url!r} ended the connection") from err
    except StatementError as err:  # before the database saw it: a value that has no JSON form
        raise ValueError(f"the ledger can't store this entry: {err.orig}") from err
>>>>>>> h2
