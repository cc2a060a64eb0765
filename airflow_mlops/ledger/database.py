"""The ledger's database: connect, bring the schema up to date, and its errors in our words."""

from __future__ import annotations

import re
import sqlite3
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    DBAPIError,
    NoSuchModuleError,
    PendingRollbackError,
    StatementError,
)

from airflow_mlops.exceptions import ConnectionConfigError, LedgerUnavailableError, StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator

MIGRATIONS = Path(__file__).parent / "migrations"
HEAD = "0002"

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

#: What Postgres says when waiting does not help, by SQLSTATE, and the remedy.
_REFUSED = {
    "42501": "its user lacks a right: it must be allowed to read and write the ledger's tables, and, when the ledger is made or "
    "brought up to date, to create tables in the schema (GRANT USAGE, CREATE ON SCHEMA ... TO ...)",
    "28P01": "the password is wrong: check the connection's",
    "28000": "the login is refused: check user and password, that the user may log in, and the server's pg_hba.conf",
    "3D000": "there is no such database: create it, or check its name",
}

#: The same by text: an error of connecting has no SQLSTATE.
_REFUSED_TEXTS = {
    "password authentication failed": "28P01",
    "no password supplied": "28P01",
    "no pg_hba.conf entry": "28000",
    "is not permitted to log in": "28000",
    "permission denied for database": "42501",
}
_MISSING = re.compile(r'FATAL:\s+(role|database) "[^"]*" does not exist')

_DRIVERS = {"sqlite": "", "postgresql": "pip install psycopg2-binary"}


def make_engine(url: str) -> sa.Engine:
    """Make the engine of a ledger; nothing is connected yet.

    :raises ConnectionConfigError: the URL is malformed, or its driver is not installed.
    """
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
def reading(engine: sa.Engine) -> Iterator[sa.Connection]:
    """Connect for reading only: no queue for SQLite's write lock."""
    with engine.connect() as connection:
        yield connection.execution_options(**{_READS_ONLY: True})


def lock(connection: sa.Connection, name: str) -> None:
    """Let one transaction at a time do what has this name; on SQLite every writer is alone anyway."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtextextended(name, 0))))


def require_writable(engine: sa.Engine, *, create: bool) -> None:
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


def migrate(engine: sa.Engine) -> None:
    """Bring the schema up to date, one process at a time."""
    with reading(engine) as connection:
        if _schema(connection) == HEAD:
            return
    with _alone(engine) as (asking, writing):
        standing = _schema(asking)
        if standing == HEAD:  # another process was faster
            return
        from alembic import command
        from alembic.config import Config
        from alembic.script import ScriptDirectory

        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        config.attributes["connection"] = writing
        known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
        if standing is not None and standing not in known:
            raise ConnectionConfigError(
                f"the ledger at {engine.url!r} has schema {standing}, this airflow-mlops knows {HEAD}: "
                "a newer release has written it; upgrade airflow-mlops here as well"
            )
        command.upgrade(config, "head")


@contextmanager
def _alone(engine: sa.Engine) -> Iterator[tuple[sa.Connection, sa.Connection]]:
    """Let one process at a time change the schema: by a connection to ask with, and one to write with."""
    if engine.dialect.name != "postgresql":
        with engine.begin() as connection:  # takes SQLite's write lock
            yield connection, connection
        return
    # An index is built concurrently: outside of a transaction, and not before statements end that were there first. So the lock
    # is another connection's, and is asked for again and again: a statement that waits for it would be waited for.
    with engine.connect() as asking, engine.connect() as writing:
        free = sa.select(sa.func.pg_try_advisory_xact_lock(sa.func.hashtextextended(_MIGRATION, 0)))
        while not asking.execute(free).scalar():
            asking.rollback()
            time.sleep(_LOCK_SECONDS)
        yield asking, writing


def _schema(connection: sa.Connection) -> str | None:
    """Give the schema revision the database is at; ``None`` when there is no ledger yet."""
    if not sa.inspect(connection).has_table("mlops_alembic_version"):
        return None
    standing: str | None = connection.execute(
        sa.text("SELECT version_num FROM mlops_alembic_version")
    ).scalar()
    return standing


@contextmanager
def translated(engine: sa.Engine) -> Iterator[None]:
    """Say what the database says in our words.

    :raises ConnectionConfigError: it refuses the login, its user lacks a right, or there is no such database.
    :raises LedgerUnavailableError: it does not answer or stays locked.
    :raises StorageError: its file or disk can't be used.
    :raises ValueError: it can't store the entry.
    """
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
        remedy = _remedy(err.orig)
        if remedy is not None:
            raise ConnectionConfigError(
                f"the ledger at {engine.url!r} can't be used ({text.strip()}): {remedy}"
            ) from err
        raise LedgerUnavailableError(f"the ledger at {engine.url!r} does not answer: {text}") from err
    except PendingRollbackError as err:  # what is said of a block that a lost connection ended
        raise LedgerUnavailableError(f"the ledger at {engine.url!r} ended the connection") from err
    except StatementError as err:  # before the database saw it: a value that has no JSON form
        raise ValueError(f"the ledger can't store this entry: {err.orig}") from err


def _remedy(refusal: BaseException | None) -> str | None:
    """Say what to do about a refusal of Postgres; ``None``: it may answer later."""
    code = getattr(refusal, "pgcode", None) or getattr(refusal, "sqlstate", None)
    if code is not None:
        return _REFUSED.get(code)
    text = str(refusal)
    missing = _MISSING.search(text)
    if missing is not None:
        return _REFUSED["3D000" if missing[1] == "database" else "28000"]
    found = next((state for words, state in _REFUSED_TEXTS.items() if words in text), None)
    return _REFUSED[found] if found else None
