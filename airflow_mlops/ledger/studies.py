"""Where the trials of a search are kept: beside the ledger, so that a retry goes on where the last attempt stopped."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import sqlalchemy as sa

from airflow_mlops.ledger.database import lock, make_engine, require_writable, translated

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Postgres schema of the studies; Optuna's tables must not meet Airflow's, which may be in the same database.
STUDIES_SCHEMA = "mlops_studies"

#: Name of the lock under which their tables are made.
_MAKING = "airflow_mlops studies"


def studies_url(ledger_url: str | None) -> str | None:
    """Give the SQLAlchemy URL of the studies.

    :param ledger_url: of the ledger; ``None`` keeps studies in memory only.
    :returns: on SQLite a file beside the ledger's; elsewhere the same database, on Postgres in a schema of its own.

    >>> studies_url("sqlite:////data/ledger.db")
    'sqlite:////data/ledger-studies.db'
    """
    if not ledger_url:
        return None
    url = sa.make_url(ledger_url)
    if url.get_backend_name() == "sqlite":
        if not url.database or url.database == ":memory:":
            return None
        stem = url.database.removesuffix(".db")
        return url.set(database=f"{stem}-studies.db").render_as_string(hide_password=False)
    if url.get_backend_name() == "postgresql":
        _create_schema(url)
        url = url.update_query_dict({"options": f"-csearch_path={STUDIES_SCHEMA}"})
    return url.render_as_string(hide_password=False)


@contextmanager
def making_studies(ledger_url: str | None) -> Iterator[str | None]:
    """Hold a lock while the tables of the studies are made: Optuna takes none, and of two that make them at once one fails.

    :param ledger_url: of the ledger, whose lock it is.
    :returns: what :func:`studies_url` gives.
    :raises LedgerUnavailableError: the database does not answer or stays locked.
    """
    if not ledger_url:
        yield None
        return
    engine = make_engine(ledger_url)
    require_writable(engine, create=True)
    try:
        with translated(engine), engine.begin() as connection:
            lock(connection, _MAKING)
            yield studies_url(ledger_url)
    finally:
        engine.dispose()


def _create_schema(url: sa.URL) -> None:
    engine = sa.create_engine(url)
    try:
        with engine.begin() as connection:
            connection.execute(sa.text(f"CREATE SCHEMA IF NOT EXISTS {STUDIES_SCHEMA}"))
    finally:
        engine.dispose()
