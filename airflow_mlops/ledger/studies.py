"""Where the trials of a search are kept: beside the ledger, so that a retry goes on where the last attempt stopped."""

from __future__ import annotations

import sqlalchemy as sa

#: Postgres schema of the studies; Optuna's tables must not meet Airflow's, which may be in the same database.
STUDIES_SCHEMA = "mlops_studies"


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


def _create_schema(url: sa.URL) -> None:
    engine = sa.create_engine(url)
    try:
        with engine.begin() as connection:
            connection.execute(sa.text(f"CREATE SCHEMA IF NOT EXISTS {STUDIES_SCHEMA}"))
    finally:
        engine.dispose()
