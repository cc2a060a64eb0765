"""SQLAlchemy: the rows of a query, some at a time, of any database it has a dialect for."""

from __future__ import annotations

from contextlib import closing, contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from airflow_mlops.exceptions import ConnectionConfigError, SourceUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sqlalchemy.engine import Connection, CursorResult

#: Rows that are asked for at a time.
_CHUNK_ROWS = 50_000


class QueryRows(NamedTuple):
    """Rows of a query that runs.

    :param names: of the columns.
    :param chunks: the rows, some at a time.
    """

    names: list[str]
    chunks: Iterator[Sequence[Any]]


@contextmanager
def run_query(url: str, query: str, *, source: str, parameters: dict[str, Any]) -> Iterator[QueryRows]:
    """Run a query with a cursor of the server's, so neither side holds all rows.

    :param url: SQLAlchemy URL.
    :param source: for messages.
    :param parameters: values by the names that the query has them under (``:name``); those it doesn't name are left out.
    :raises ConnectionConfigError: no dialect or driver for the URL is installed.
    :raises SourceUnavailableError: the database does not answer, or broke off.
    :raises ValueError: the database refuses the query.
    """
    import sqlalchemy as sa

    try:
        engine = sa.create_engine(url, poolclass=sa.NullPool)
    except (sa.exc.ArgumentError, ImportError) as err:
        raise ConnectionConfigError(
            f"{source}: SQLAlchemy has no dialect or driver for this connection ({err}). Install its provider with SQLAlchemy support"
        ) from err
    dialect = engine.dialect.name
    with _errors(source):
        connection = engine.connect()
    with connection, _errors(source):
        if dialect == "postgresql":
            connection.execute(sa.text("SET TIME ZONE 'UTC'"))  # what a naive time is compared in
        values = {name: _bound(value, dialect) for name, value in parameters.items()}
        with closing(_run(connection, query, values)) as result:
            yield QueryRows(list(result.keys()), result.partitions(_CHUNK_ROWS))


def _run(connection: Connection, query: str, parameters: dict[str, Any]) -> CursorResult[Any]:
    import sqlalchemy as sa

    text = sa.text(query)
    named = text.compile(dialect=connection.dialect).params
    unknown = sorted(set(named) - set(parameters))
    if unknown:
        raise ValueError(
            f"the query names :{', :'.join(unknown)}, which has no value here: only :watermark has one, in mode 'incremental'; "
            "put others in by templating, and write \\: for a colon"
        )
    options = {"stream_results": True, "max_row_buffer": _CHUNK_ROWS}
    given = {name: parameters[name] for name in named}
    result = connection.execution_options(**options).execute(text, given)
    if not result.returns_rows:
        raise ValueError("the statement gives no rows: a SELECT is needed")
    return result


def _bound(value: Any, dialect: str) -> Any:
    """Give an instant in a form the database compares with its own."""
    if not isinstance(value, datetime) or dialect == "postgresql":
        return value
    naive = value.astimezone(UTC).replace(tzinfo=None) if value.tzinfo else value
    # SQLite compares texts, and a blank comes before the T that others write.
    return naive.isoformat(sep=" ") if dialect == "sqlite" else naive


@contextmanager
def _errors(source: str) -> Iterator[None]:
    """Tell a database that is away from a query that is wrong; the URL with its password is in neither."""
    import sqlalchemy as sa

    try:
        yield
    except sa.exc.DBAPIError as err:
        text = " ".join(str(err.orig).split())
        if err.statement is None or err.connection_invalidated:
            raise SourceUnavailableError(f"{source}: the database does not answer: {text:.300}") from err
        raise ValueError(f"{source}: the database refuses the query: {text:.300}") from err
    except sa.exc.SQLAlchemyError as err:
        raise ValueError(f"{source}: {str(err).splitlines()[0]:.300}") from err
