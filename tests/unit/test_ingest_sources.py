"""The sources of an ingest beside plain files: queries, downloads, Delta tables, ORC and Avro."""

from __future__ import annotations

import hashlib
import hmac
import json
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from pyarrow import orc

from airflow_mlops.core.data.row_values import RowColumns
from airflow_mlops.exceptions import (
    ConnectionConfigError,
    DatasetNotFoundError,
    InsufficientDataError,
    SchemaMismatchError,
    SourceUnavailableError,
)
from airflow_mlops.integrations import delta
from airflow_mlops.integrations.download import download
from airflow_mlops.operators.ingest import IngestDatasetOperator
from airflow_mlops.steps.base import run_step

SECRET = "a-secret-of-the-source"  # noqa: S105


@pytest.fixture
def table(tmp_path: Path) -> str:
    return str(tmp_path / "table")


@pytest.fixture(autouse=True)
def spools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Whatever becomes of an ingest, what it fetched is gone afterwards."""
    folder = tmp_path / "spools"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


def ingest(table: str, **arguments: Any) -> dict[str, Any]:
    """Run the step on what the operator builds, and look whether a secret is in it."""
    task = IngestDatasetOperator(task_id="ingest", table=table, **arguments)
    spec, services = task.build_spec({}), task.services()
    result = run_step("ingest", spec, services)
    assert SECRET not in json.dumps([spec, result]) + repr(services)
    return result


def content(table: str, by: str = "x") -> dict[str, list[Any]]:
    return delta.read_table(table).collect().sort(by).to_dict(as_series=False)


class TestQuery:
    @pytest.fixture
    def database(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> sqlite3.Connection:
        path = tmp_path / "source.db"
        monkeypatch.setenv("AIRFLOW_CONN_SHOP", json.dumps({"conn_type": "sqlite", "host": str(path)}))
        made = sqlite3.connect(path, isolation_level=None)
        made.execute("CREATE TABLE sales (x INTEGER, y TEXT, t TEXT)")
        return made

    def fill(self, database: sqlite3.Connection, *rows: tuple[int, str | None, str]) -> None:
        database.executemany("INSERT INTO sales VALUES (?, ?, ?)", rows)

    ROWS = ((1, "a", "2024-01-01 01:00:00"), (2, None, "2024-01-01 02:00:00"))
    SALES: dict[str, Any] = {"sql": "SELECT x, y FROM sales", "source_conn_id": "shop"}  # noqa: RUF012

    def test_each_mode(self, database: sqlite3.Connection, table: str) -> None:
        self.fill(database, *self.ROWS)
        how: dict[str, Any] = self.SALES | {"keys": "x", "watermark_column": "x"}
        for mode in ("replace", "upsert", "incremental"):
            assert ingest(table, mode=mode, **how)["dataset"]["row_count"] == 2
            assert content(table) == {"x": [1, 2], "y": ["a", None]}
        for key in ("monday", "monday", "tuesday"):
            ingest(table, mode="append", work_key=key, **how)
        assert content(table)["x"] == [1, 1, 1, 2, 2, 2]

    def test_values_are_hashed_as_the_database_has_them(
        self, database: sqlite3.Connection, table: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also once the table knows the column, as text."""
        key = SECRET * 2
        connection = {"conn_type": "airflow_mlops_hashing", "password": key}
        monkeypatch.setenv("AIRFLOW_CONN_HASHING_DEFAULT", json.dumps(connection))
        self.fill(database, *self.ROWS)
        database.execute("CREATE VIEW riders AS SELECT x, x * 10 AS phone FROM sales")
        how = {"sql": "SELECT * FROM riders", "source_conn_id": "shop", "hash_columns": "phone"}
        for _ in range(2):
            ingest(table, mode="upsert", keys="x", **how)
        hashes = [hmac.new(key.encode(), text, hashlib.sha256).hexdigest() for text in (b"10", b"20")]
        assert content(table) == {"x": [1, 2], "phone": hashes}

    def test_append_needs_a_name_for_the_work(self, database: sqlite3.Connection, table: str) -> None:
        with pytest.raises(ValueError, match=r"connection 'shop' needs work_key, such as \{\{ run_id \}\}"):
            ingest(table, mode="append", **self.SALES)

    def test_the_watermark_is_asked_of_the_database(self, database: sqlite3.Connection, table: str) -> None:
        """Were it left to the ingest, the broken row below the watermark would be fetched, and refused."""
        query = "SELECT x, t FROM sales WHERE t > :watermark"
        how = {
            "sql": query,
            "source_conn_id": "shop",
            "mode": "incremental",
            "watermark_column": "t",
            "time_column": "t",
        }
        self.fill(database, *self.ROWS)
        assert ingest(table, first_watermark="2024-01-01 00:00:00", **how)["row_count"] == 2
        database.execute("UPDATE sales SET x = 'broken' WHERE x = 1")
        self.fill(database, (3, "c", "2024-01-01 03:00:00"))
        assert [ingest(table, **how)["row_count"] for _ in range(2)] == [1, 0]
        assert content(table)["x"] == [1, 2, 3]
        assert ingest(table, **how)["watermark"] == "2024-01-01T03:00:00+00:00"

    def test_the_overlap_is_below_the_watermark(self, database: sqlite3.Connection, table: str) -> None:
        query = "SELECT x, y FROM sales WHERE x >= :watermark"
        how = {
            "sql": query,
            "source_conn_id": "shop",
            "mode": "incremental",
            "watermark_column": "x",
            "keys": "x",
            "overlap": 1,
        }
        self.fill(database, (1, "a", ""), (5, "e", ""))
        ingest(table, first_watermark=0, **how)
        database.execute("UPDATE sales SET y = 'E' WHERE x = 5")
        self.fill(database, (3, "late", ""), (4, "d", ""))
        ingest(table, **how)
        assert content(table) == {"x": [1, 4, 5], "y": ["a", "d", "E"]}

    def test_the_tables_types_where_they_hold_the_values(
        self, database: sqlite3.Connection, table: str
    ) -> None:
        schema = {"x": pl.Int16, "y": pl.String, "z": pl.Decimal(10, 2)}
        delta.replace_window(table, pl.DataFrame(schema=schema), time_column=None, window=None)
        self.fill(database, (1, None, ""))
        how = {"source_conn_id": "shop", "mode": "upsert", "keys": "x"}
        ingest(table, sql="SELECT x, y, 5 AS z FROM sales", **how)
        assert content(table) == {"x": [1], "y": [None], "z": [Decimal("5.00")]}
        with pytest.raises(SchemaMismatchError, match=r"x is Int64, the table has Int16"):
            ingest(table, sql="SELECT 40000 AS x, y, 5 AS z FROM sales", **how)

    def test_values_that_make_no_column(self, database: sqlite3.Connection, table: str) -> None:
        self.fill(database, *self.ROWS)
        refused = {
            "SELECT CASE x WHEN 1 THEN 'a' ELSE 2 END AS z FROM sales": r"'z' holds text and whole number values.*CAST",
            "SELECT x, NULL AS z FROM sales": r"column z has no value in any row.*schema_policy='add_columns'",
            "SELECT x, y AS x FROM sales": r"two columns named x: rename one with AS",
            "SELECT x FROM sales WHERE x = :day": r"names :day, which has no value here",
            "SELECT missing FROM sales": r"refuses the query: no such column: missing",
            "DELETE FROM sales": r"gives no rows: a SELECT is needed",
        }
        for sql, message in refused.items():
            with pytest.raises(ValueError, match=message):
                ingest(table, sql=sql, source_conn_id="shop")
        with pytest.raises(InsufficientDataError, match="has the data arrived"):
            ingest(table, sql="SELECT x FROM sales WHERE x > 9", source_conn_id="shop")
        assert database.execute("SELECT count(*) FROM sales").fetchone() == (2,)
        assert not delta.table_exists(table)

    def test_connections_that_have_no_sql(self, table: str, monkeypatch: pytest.MonkeyPatch) -> None:
        for kind, message in {"http": "is no database's", "mongo": "no provider is installed"}.items():
            connection = {"conn_type": kind, "host": "h", "password": SECRET}
            monkeypatch.setenv("AIRFLOW_CONN_SHOP", json.dumps(connection))
            with pytest.raises(ConnectionConfigError, match=rf"'shop' .*type {kind}.*{message}"):
                ingest(table, **self.SALES)
        monkeypatch.delenv("AIRFLOW_CONN_SHOP")
        with pytest.raises(ConnectionConfigError, match=r"'shop' is not defined"):
            ingest(table, **self.SALES)
        monkeypatch.setattr("airflow.providers.sqlite.hooks.sqlite.SqliteHook.get_uri", lambda _: "odd://h")
        monkeypatch.setenv("AIRFLOW_CONN_SHOP", json.dumps({"conn_type": "sqlite", "host": "h"}))
        with pytest.raises(ConnectionConfigError, match=r"has no SQLAlchemy dialect here"):
            ingest(table, **self.SALES)

    @pytest.mark.integration  # seconds of rows, in two processes
    def test_memory_does_not_grow_with_the_rows(self, database: sqlite3.Connection, tmp_path: Path) -> None:
        database.execute(
            "INSERT INTO sales WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1200000) "
            "SELECT i, 'some text of a row ' || i, '2024-01-01 01:00:00' FROM n"
        )
        code = """
import json, resource, sys
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step
spec, url, rows = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
assert run_step("ingest", spec, Services(connections={"shop": {"kind": "sql", "url": url}}))["row_count"] == rows
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
        peaks = []
        for rows in (200_000, 1_200_000):
            sql = f"SELECT x, y FROM sales LIMIT {rows}"  # noqa: S608
            spec = {"sql": sql, "source_conn_id": "shop", "table": str(tmp_path / str(rows))}
            arguments = [json.dumps(spec), f"sqlite:///{tmp_path}/source.db", str(rows)]
            done = subprocess.run(
                [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120
            )
            assert done.returncode == 0, done.stderr
            peaks.append(int(done.stdout) // 1024)
        assert peaks[1] - peaks[0] < 120, peaks  # a million such rows are 200 MB as Python objects


def test_values_of_each_type_whatever_comes_first() -> None:
    instant = datetime(2024, 1, 1, 12, tzinfo=UTC)
    columns = RowColumns(["d", "t", "naive", "flag", "raw", "n", "j", "day"], "a query")
    columns.frame([(None,) * 8])
    columns.frame(
        [
            (
                Decimal("1.5"),
                instant,
                instant.replace(tzinfo=None),
                True,
                memoryview(b"x"),
                1,
                {"a": 1},
                instant.date(),
            )
        ]
    )
    columns.frame(
        [
            (7, None, None, False, b"y", 2.5, [1], None),
            (Decimal("0.125"), None, None, None, None, None, None, None),
        ]
    )
    assert {name: str(dtype) for name, dtype in columns.types.items()} == {
        "d": "Decimal(precision=38, scale=3)",
        "t": "Datetime(time_unit='us', time_zone='UTC')",
        "naive": "Datetime(time_unit='us', time_zone=None)",
        "flag": "Boolean",
        "raw": "Binary",
        "n": "Float64",
        "j": "String",
        "day": "Date",
    }
    for values, message in {
        (2**63,): "whole number values that no table column can hold",
        (Decimal("NaN"),): "NaN or infinity",
        (instant, instant.replace(tzinfo=None)): "some have a time zone and some have none",
        (object(),): "holds object, which no table column can hold",
    }.items():
        with pytest.raises(SchemaMismatchError, match=message):
            RowColumns(["x"], "a query").frame([(value,) for value in values])


class Web(BaseHTTPRequestHandler):
    """A server that breaks off, redirects, or refuses, as the path says; it knows ranges."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes]
    seen: list[dict[str, str]]

    def do_GET(self) -> None:
        self.seen.append({"path": self.path, **{name.lower(): value for name, value in self.headers.items()}})
        how, _, name = self.path.partition("?")[0].strip("/").partition("/")
        if how == "status":
            return self.answer(int(name.partition("/")[0]), b"no")
        if how == "moved":
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{self.server.server_port}/file/{name}")  # type: ignore[attr-defined]
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if (
            how == "closed"
            and self.headers.get("Authorization") is None
            and self.headers.get("X-Key") is None
        ):
            return self.answer(401, b"who?")
        data, start = self.files[name], 0
        tag = f'"{hashlib.sha256(data).hexdigest()[:8]}"'
        if how == "ranges" and self.headers.get("If-Range") == tag:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        cut = how in {"ranges", "breaks", "short"} and (how == "short" or len(self.seen) < 3)
        self.send_response(206 if start else 200)
        if how != "breaks":
            self.send_header("ETag", tag)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        rest = data[start:]
        self.wfile.write(rest[: len(rest) // 2] if cut else rest)
        self.close_connection = cut
        return None

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class TestDownload:
    @pytest.fixture
    def web(self) -> Iterator[str]:
        Web.files, Web.seen = {}, []
        server = ThreadingHTTPServer(("127.0.0.1", 0), Web)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        server.server_close()
        thread.join()

    @pytest.fixture(autouse=True)
    def hasty(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(download, "__kwdefaults__", {"attempts": 4, "pause_seconds": 0.01})

    def offer(self, tmp_path: Path, name: str = "a.parquet", *, rows: int = 20_000) -> None:
        pl.DataFrame({"x": range(rows)}).write_parquet(tmp_path / "offered", compression="uncompressed")
        Web.files[name] = (tmp_path / "offered").read_bytes()

    @pytest.mark.parametrize(
        ("how", "parts"), {"ranges": [True, True], "breaks": [False, False], "file": []}.items()
    )
    def test_a_server_that_breaks_off(
        self, web: str, tmp_path: Path, table: str, how: str, parts: list[bool]
    ) -> None:
        self.offer(tmp_path)
        assert ingest(table, source=f"{web}/{how}/a.parquet")["row_count"] == 20_000
        assert ["range" in request for request in Web.seen[1:]] == parts

    def test_once_per_content(
        self, web: str, tmp_path: Path, table: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """What comes behind the question mark is the address's secret, and no part of its name."""
        caplog.set_level("INFO", logger="httpx")
        added = []
        for rows in (10, 10, 20):
            self.offer(tmp_path, rows=rows)
            source = f"{web}/file/a.parquet?signature={rows}"
            added.append(ingest(table, source=source, mode="append")["row_count"])
        assert added == [10, 0, 20]
        assert "signature" not in "".join(path.read_text() for path in Path(table, "_delta_log").iterdir())
        assert "signature" not in caplog.text

    def test_a_login_goes_to_its_own_server_only(
        self, web: str, tmp_path: Path, table: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.offer(tmp_path)
        with pytest.raises(ConnectionConfigError, match=r"refuses the login \(401\): give source_conn_id"):
            ingest(table, source=f"{web}/closed/a.parquet")
        for secret in ({"login": "me", "password": SECRET}, {"extra": {"X-Key": SECRET, "verify": True}}):
            connection = {"conn_type": "http", "host": "127.0.0.1", **secret}
            monkeypatch.setenv("AIRFLOW_CONN_SHOP", json.dumps(connection))
            ingest(table, source=f"{web}/closed/a.parquet", source_conn_id="shop")
            Web.seen.clear()
            ingest(table, source=f"{web}/moved/a.parquet", source_conn_id="shop")
            (first, second) = Web.seen
            assert {"authorization", "x-key"} & first.keys()
            assert not {"authorization", "x-key", "verify"} & second.keys()
        with pytest.raises(
            ConnectionConfigError, match=r"is one of 127\.0\.0\.1: its login is not sent to localhost"
        ):
            ingest(table, source="http://localhost:1/a.parquet", source_conn_id="shop")

    @pytest.mark.parametrize(
        ("path", "error", "message"),
        [
            ("status/404/a.csv", DatasetNotFoundError, r"a\.csv is not there \(404\)"),
            ("status/418/a.csv", ValueError, r"answers 418, no file"),
            ("status/503/a.csv", SourceUnavailableError, r"the server answers 503; 0 bytes came"),
            (
                "short/a.parquet",
                SourceUnavailableError,
                r"could not be downloaded: .* bytes came, and no more",
            ),
            ("file/a.zip", ValueError, r"must end in one of \.parquet, "),
        ],
    )
    def test_what_is_refused(
        self, web: str, tmp_path: Path, table: str, path: str, error: type[Exception], message: str
    ) -> None:
        self.offer(tmp_path)
        with pytest.raises(error, match=message) as refused:
            ingest(table, source=f"{web}/{path}?token={SECRET}")
        assert SECRET not in str(refused.value)
        assert not delta.table_exists(table)

    def test_a_file_that_is_no_such_file(self, web: str, table: str) -> None:
        Web.files["a.parquet"] = b"<html>Sign in</html>"
        with pytest.raises(DatasetNotFoundError, match=rf"^{web}/file/a.parquet is there and can't be read"):
            ingest(table, source=f"{web}/file/a.parquet")

    def test_a_file_of_which_a_part_is_broken(self, web: str, tmp_path: Path, table: str) -> None:
        pl.DataFrame({"x": range(20_000)}).write_parquet(tmp_path / "offered", compression="zstd")
        data = (tmp_path / "offered").read_bytes()
        Web.files["a.parquet"] = data[:4] + bytes(2_000) + data[2_004:]
        with pytest.raises(SchemaMismatchError, match=r"a\.parquet can't be read as one table"):
            ingest(table, source=f"{web}/file/a.parquet")
        assert [request["path"] for request in Web.seen] == [
            "/file/a.parquet"
        ]  # not asked for files beside it
        assert not delta.table_exists(table)


class TestTable:
    def test_a_version_of_another_table(self, tmp_path: Path, table: str) -> None:
        other = str(tmp_path / "other")
        for rows in ([1], [1, 2]):
            delta.replace_window(other, pl.DataFrame({"x": rows}), time_column=None, window=None)
        assert (
            ingest(table, source=other)["dataset"]["dataset_digest"] == delta.describe(other).dataset_digest
        )
        ingest(table, source=other, source_version="1")
        assert content(table) == {"x": [1]}
        how: dict[str, Any] = {"source": other, "mode": "incremental", "watermark_column": "x"}
        assert [ingest(table, **how)["row_count"] for _ in range(2)] == [1, 0]
        with pytest.raises(ValueError, match=r"mode 'append' of .*other needs work_key"):
            ingest(table, source=other, mode="append")
        with pytest.raises(DatasetNotFoundError, match=r"has no version 9"):
            ingest(table, source=other, source_version=9)
        with pytest.raises(DatasetNotFoundError, match=r"has no version -1"):
            ingest(table, source=other, source_version=-1)

    def test_a_folder_that_is_none(self, tmp_path: Path, table: str) -> None:
        with pytest.raises(ValueError, match=r"must end in one of .*\.avro, or be a Delta table"):
            ingest(table, source=str(tmp_path))
        (tmp_path / "rows.csv.gz").write_bytes(b"")
        with pytest.raises(ValueError, match=r"must end in one of .*\.avro, or be a Delta table"):
            ingest(table, source=str(tmp_path / "rows.csv.gz"))


def write_orc(frame: pl.DataFrame, path: Path) -> None:
    orc.write_table(frame.to_arrow(compat_level=pl.CompatLevel.oldest()), path, stripe_size=1024)


@pytest.mark.parametrize(("suffix", "write"), [(".orc", write_orc), (".avro", pl.DataFrame.write_avro)])
def test_files_that_are_written_anew(
    tmp_path: Path, table: str, suffix: str, write: Callable[[pl.DataFrame, Path], None]
) -> None:
    for number in range(2):
        frame = pl.DataFrame(
            {"x": range(number * 50_000, (number + 1) * 50_000), "y": [f"{number}"] * 50_000}
        )
        write(frame, tmp_path / f"{number}{suffix}")
    source = str(tmp_path / f"*{suffix}")
    assert [ingest(table, source=source, mode="append")["row_count"] for _ in range(2)] == [100_000, 0]
    assert content(table)["x"] == list(range(100_000))
    (tmp_path / f"2{suffix}").write_bytes(b"broken")
    with pytest.raises(DatasetNotFoundError, match=rf"2{suffix} is no readable {suffix[1:]} file"):
        ingest(table, source=source, mode="append")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs either source or sql"),
        ({"source": "a.csv", "sql": "SELECT 1"}, "needs either source or sql"),
        ({"sql": "SELECT 1"}, "needs source_conn_id"),
        ({"source": "a.csv", "source_conn_id": "lake"}, r"s3://lake@bucket/key"),
        ({"source": "a.csv", "source_version": 3}, "belongs to a Delta table as source"),
        (
            {"sql": "SELECT :watermark", "source_conn_id": "shop"},
            "in mode 'incremental' only, not in 'replace'",
        ),
    ],
)
def test_arguments_that_do_not_go_together(
    table: str, arguments: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_SHOP", json.dumps({"conn_type": "sqlite", "host": "nowhere.db"}))
    with pytest.raises(ValueError, match=message):
        ingest(table, **arguments)
