"""The connection of the ledger."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from airflow.sdk import BaseHook

from airflow_mlops.exceptions import ConnectionConfigError
from airflow_mlops.hooks.base import extra_of, find_connection, read_connection
from airflow_mlops.services import Services

if TYPE_CHECKING:
    from datetime import datetime

    from airflow.sdk import Connection

    from airflow_mlops.ledger import ChampionPeriod, Ledger

#: File of the default ledger, in ``AIRFLOW_HOME``.
DEFAULT_FILE = "airflow_mlops_ledger.db"


class LedgerHook(BaseHook):
    """Turn a ledger connection into an open ledger.

    Fields: in Extra ``url`` (a SQLAlchemy URL), or Host, Port, Login, Password and Schema (the database's name), with the
    driver in Extra ``dialect`` (default ``postgresql+psycopg2``). When the default connection is not defined, the ledger is a
    SQLite file in ``AIRFLOW_HOME``: enough for one machine.

    :param ledger_conn_id: the connection.
    """

    conn_name_attr = "ledger_conn_id"
    default_conn_name = "ledger_default"
    conn_type = "mlops_ledger"
    hook_name = "MLOps ledger"

    def __init__(self, *, ledger_conn_id: str = default_conn_name, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ledger_conn_id = ledger_conn_id

    def services(self) -> Services:
        """Give the field this connection fills.

        :raises ConnectionConfigError: a connection other than the default is missing, or it is incomplete.
        """
        if self.ledger_conn_id == self.default_conn_name and find_connection(self.ledger_conn_id) is None:
            home = Path(os.environ.get("AIRFLOW_HOME", "~/airflow")).expanduser()
            return Services(ledger_url=f"sqlite:///{home / DEFAULT_FILE}")
        connection = read_connection(self.ledger_conn_id, self.conn_type)
        return Services(ledger_url=extra_of(connection, "url")["url"] or _url_from_fields(connection))

    def get_conn(self) -> Ledger:
        """Open the ledger; use it as a context manager."""
        from airflow_mlops.ledger import Ledger

        return Ledger.open(self.services().require("ledger_url"))

    def who_was_champion(self, model_name: str, at: datetime) -> ChampionPeriod | None:
        """Tell which version was champion at a time, since and until when, and who made it so.

        :param at: the time; naive values are taken as UTC.
        :returns: ``None`` when there was no champion yet.
        """
        with self.get_conn() as ledger:
            return ledger.who_was_champion(model_name, at)

    def test_connection(self) -> tuple[bool, str]:
        """Open the ledger and read a line."""
        from airflow_mlops.exceptions import MLOpsError

        try:
            with self.get_conn() as ledger:
                newest = ledger.entries(limit=1)
        except MLOpsError as err:
            return False, str(err)
        return True, f"newest entry: {newest[0].summary}" if newest else "the ledger is empty"


def _url_from_fields(connection: Connection) -> str:
    missing = [
        label
        for label, value in (("Host", connection.host), ("Database (Schema)", connection.schema))
        if not value
    ]
    if missing:
        raise ConnectionConfigError(
            f"connection {connection.conn_id!r} does not say where the ledger is: {', '.join(missing)} empty; "
            "fill them in, or put a SQLAlchemy URL into Extra as url"
        )
    dialect = extra_of(connection, "dialect")["dialect"] or "postgresql+psycopg2"
    login = quote(connection.login or "", safe="")
    password = f":{quote(connection.password, safe='')}" if connection.password else ""
    port = f":{connection.port}" if connection.port else ""
    return f"{dialect}://{login}{password}@{connection.host}{port}/{connection.schema}"
