"""Ingest of queries on a real Postgres, through an Airflow connection."""

# ruff: noqa: F811 - fixtures of another module are named as arguments here

from __future__ import annotations

import json
import subprocess
import sys
import traceback
from collections.abc import Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from airflow_mlops.exceptions import SourceUnavailableError
from airflow_mlops.integrations import delta
from airflow_mlops.operators.ingest import IngestDatasetOperator
from airflow_mlops.steps.base import run_step
from tests.integration.test_ledger_postgres import server, url  # noqa: F401 - fixtures

pytestmark = pytest.mark.integration

PASSWORD = "not-in-any-log"  # noqa: S105


@pytest.fixture
def database(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[sa.Connection]:
    """A database that lives in another time zone."""
    connect(monkeypatch, url)
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        connection.execute(sa.text(f"ALTER DATABASE {engine.url.database} SET timezone TO 'Asia/Tokyo'"))
        connection.execute(
            sa.text("CREATE TABLE sales (id int PRIMARY KEY, amount numeric(10, 2), sold_at timestamp)")
        )
        yield connection


def connect(monkeypatch: pytest.MonkeyPatch, url: str, **extra: Any) -> None:
    parts = sa.make_url(url)
    connection = {
        "conn_type": "postgres",
        "host": parts.host,
        "port": parts.port,
        "login": parts.username,
        "password": PASSWORD,
        "schema": parts.database,
        "extra": extra,
    }
    monkeypatch.setenv("AIRFLOW_CONN_SHOP", json.dumps(connection))


def sell(database: sa.Connection, number: int, amount: str | None, at: str) -> None:
    database.execute(
        sa.text("INSERT INTO sales VALUES (:n, :a, :t)"), {"n": number, "a": amount, "t": f"2024-01-01 {at}"}
    )


def ingest(sql: str, table: str, **arguments: Any) -> dict[str, Any]:
    task = IngestDatasetOperator(task_id="t", sql=sql, source_conn_id="shop", table=table, **arguments)
    spec, services = task.build_spec({}), task.services()
    assert PASSWORD not in json.dumps(spec) + repr(services)
    return run_step("ingest", spec, services)


def rows(table: str, by: str = "id") -> dict[str, list[Any]]:
    return delta.read_table(table).collect().sort(by).to_dict(as_series=False)


def test_increments_by_a_time_without_a_zone(database: sa.Connection, tmp_path: Path) -> None:
    table = str(tmp_path / "table")
    how: dict[str, Any] = {
        "sql": "SELECT * FROM sales WHERE sold_at > :watermark",
        "table": table,
        "mode": "incremental",
        "watermark_column": "sold_at",
        "time_column": "sold_at",
        "first_watermark": "2024-01-01 00:30",
    }
    sell(database, 0, "1", "00:00")
    sell(database, 1, "1.50", "01:00")
    assert ingest(**how)["row_count"] == 1
    sell(database, 2, None, "02:00")
    assert [ingest(**how)["row_count"] for _ in range(2)] == [1, 0]
    assert rows(table) == {
        "id": [1, 2],
        "amount": [Decimal("1.50"), None],
        "sold_at": [datetime(2024, 1, 1, hour, tzinfo=UTC) for hour in (1, 2)],
    }
    database.execute(sa.text("UPDATE sales SET id = id + 100 WHERE id < 2"))
    assert ingest(**how)["row_count"] == 0  # what lies below was not asked for


@pytest.mark.parametrize("mode", ["replace", "upsert", "append"])
def test_twice_is_once(database: sa.Connection, tmp_path: Path, mode: Any) -> None:
    sell(database, 1, "1.50", "01:00")
    how = {"mode": mode, "keys": "id", "work_key": "monday" if mode == "append" else None}
    for _ in range(2):
        ingest("SELECT id, amount FROM sales", str(tmp_path / "table"), **how)
    assert rows(str(tmp_path / "table")) == {"id": [1], "amount": [Decimal("1.50")]}


def test_types(database: sa.Connection, tmp_path: Path) -> None:
    sql = """SELECT * FROM (VALUES
        (1, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL),
        (2, 1.5, '2024-01-01 12:00+09'::timestamptz, '2024-01-01'::date, '01:02'::time, true, '\\x00ff'::bytea,
         '{"a"\\:1}'::jsonb, 'ünï'::text)
    ) AS v (id, dec, at, day, clock, flag, raw, doc, name)""".replace("::", r"\:\:")
    ingest(sql, str(tmp_path / "table"))
    found = delta.read_table(str(tmp_path / "table")).collect().sort("id").row(1, named=True)
    assert found == {
        "id": 2,
        "dec": Decimal("1.5"),
        "at": datetime(2024, 1, 1, 3, tzinfo=UTC),
        "day": date(2024, 1, 1),
        "clock": "01:02:00",
        "flag": True,
        "raw": b"\x00\xff",
        "doc": '{"a": 1}',
        "name": "ünï",
    }


def test_memory_does_not_grow_with_the_rows(database: sa.Connection, url: str, tmp_path: Path) -> None:
    code = """
import json, resource, sys
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step
spec, url = json.loads(sys.argv[1]), sys.argv[2]
run_step("ingest", spec, Services(connections={"shop": {"kind": "sql", "url": url}}))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    peaks = []
    for count in (200_000, 1_200_000):
        sql = f"SELECT i, 'some text of a row ' || i AS y FROM generate_series(1, {count}) AS n (i)"  # noqa: S608
        spec = {"sql": sql, "source_conn_id": "shop", "table": str(tmp_path / str(count))}
        command = [sys.executable, "-c", code, json.dumps(spec), url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        assert delta.describe_files(spec["table"]).row_count == count
        peaks.append(int(done.stdout) // 1024)
    assert peaks[1] - peaks[0] < 120, peaks  # all rows at once are 200 MB more as Python objects alone


def test_a_server_that_is_away_or_refuses(
    database: sa.Connection,
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connect(monkeypatch, url, sslmode="require")
    with pytest.raises(SourceUnavailableError, match=r"does not support SSL"):
        ingest("SELECT 1 AS x", str(tmp_path / "table"))
    connect(monkeypatch, sa.make_url(url).set(port=9).render_as_string(hide_password=False))
    with pytest.raises(SourceUnavailableError, match=r"'shop': the database does not answer") as refused:
        ingest("SELECT 1 AS x", str(tmp_path / "table"))
    assert PASSWORD not in str(refused.value)
    connect(monkeypatch, url)
    with pytest.raises(ValueError, match=r'refuses the query: .*"missing" does not exist'):
        ingest("SELECT * FROM missing", str(tmp_path / "table"))


def test_a_server_that_goes_away(database: sa.Connection, tmp_path: Path) -> None:
    """The session is ended from within while rows come; the table stays missing, and a retry may go on."""
    sql = (
        "SELECT i, CASE i WHEN 150000 THEN pg_terminate_backend(pg_backend_pid()) END AS y "
        "FROM generate_series(1, 200000) AS n (i)"
    )
    with pytest.raises(SourceUnavailableError, match=r"does not answer"):
        ingest(sql, str(tmp_path / "table"))
    assert not delta.table_exists(str(tmp_path / "table"))


def test_a_value_that_the_database_cannot_read_is_not_shown(
    database: sa.Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = {"conn_type": "airflow_mlops_hashing", "password": "k" * 32}
    monkeypatch.setenv("AIRFLOW_CONN_HASHING_DEFAULT", json.dumps(connection))
    database.execute(sa.text("CREATE TABLE people (id int, email text)"))
    database.execute(sa.text("INSERT INTO people VALUES (1, 'canary@example.org')"))
    how = {"table": str(tmp_path / "table"), "hash_columns": "email"}
    with pytest.raises(ValueError, match="what stands there is not shown") as refused:
        ingest("SELECT id, CAST(email AS int) AS email FROM people", **how)
    assert "canary" not in "".join(traceback.format_exception(refused.value))
    with pytest.raises(ValueError, match='column "mail" does not exist'):
        ingest("SELECT id, mail AS email FROM people", **how)
