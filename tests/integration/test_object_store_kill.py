"""An ingest on S3 that is killed as it writes, or whose answer gets lost: the table has the rows once, or is as it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import pytest

from airflow_mlops.integrations import delta, storage
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step
from tests.integration.stalling_proxy import StallingProxy
from tests.object_stores import KEY, SECRET, Bucket, s3_server

pytestmark = pytest.mark.integration

OLD, NEW = {"x": [1, 2], "y": ["a", "b"]}, {"x": [2, 3], "y": ["B", "C"]}
AFTER = {
    "replace": NEW,
    "append": {"x": [1, 2, 2, 3], "y": ["a", "B", "b", "C"]},
    "upsert": {"x": [1, 2, 3], "y": ["a", "B", "C"]},
    "incremental": {"x": [1, 2, 3], "y": ["a", "b", "C"]},
}


class S3Proxy(StallingProxy):
    """Knows what S3's clients ask beside other clients, and may lose the chosen answer instead of holding it."""

    loses = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._server.RequestHandlerClass.do_HEAD = self.head  # type: ignore[attr-defined]

    def head(self, request: BaseHTTPRequestHandler) -> None:
        answer = httpx.head(self.target + request.path, timeout=60)
        request.send_response(answer.status_code)
        for name in ("Content-Length", "ETag", "Last-Modified"):
            if name in answer.headers:
                request.send_header(name, answer.headers[name])
        request.end_headers()

    def pass_on(self, request: BaseHTTPRequestHandler) -> None:
        try:
            super().pass_on(request)
        except ConnectionAbortedError:
            request.close_connection = True

    def _hold(self) -> None:
        if not self.loses:
            return super()._hold()
        self.held.set()
        raise ConnectionAbortedError


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_server(tmp_path_factory.mktemp("s3")) as url:
        yield url


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    monkeypatch.setattr(storage, "_connections", {})
    return Bucket(server, f"b-{uuid.uuid4().hex}")


def services(endpoint: str) -> Services:
    lake = {"kind": "s3", "key": KEY, "secret": SECRET, "region": "eu-central-1", "endpoint_url": endpoint}
    return Services(connections={"lake": lake})


def prepared(bucket: Bucket, folder: Path, mode: str) -> dict[str, Any]:
    """Write a table's first rows and give the spec of the next ones."""
    how = {"mode": mode, "keys": ["x"], "watermark_column": "x", "table": bucket.uri("table")}
    for name, rows in {"old": OLD, "new": NEW}.items():
        pl.DataFrame(rows).write_parquet(folder / f"{name}.parquet")
    run_step("ingest", how | {"source": str(folder / "old.parquet")}, services(bucket.endpoint))
    return how | {"source": str(folder / "new.parquet")}


def content(table: str) -> dict[str, list[Any]]:
    return delta.read_table(table).collect().sort("x", "y").to_dict(as_series=False)


def writes(part: str) -> Any:
    return lambda method, text: method == "PUT" and part in text.partition(" ")[0]


def started(spec: dict[str, Any], proxy: S3Proxy, folder: Path) -> subprocess.Popen[str]:
    """Run the step in a process of its own: some calls of delta-rs let no other thread run, not even the proxy's."""
    (folder / "spec.json").write_text(json.dumps(spec))
    command = [sys.executable, "-m", "airflow_mlops.steps", "ingest", "--spec", str(folder / "spec.json")]
    environment = os.environ | services(proxy.url).to_environment()
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("mode", AFTER)
@pytest.mark.parametrize(
    ("write", "answered", "there"),
    [("/part-", False, False), ("/part-", True, False), ("/_delta_log/", False, False), ("/_delta_log/", True, True)],
)  # fmt: skip
def test_killed_at_a_write(
    bucket: Bucket, tmp_path: Path, mode: str, write: str, answered: bool, there: bool
) -> None:
    spec = prepared(bucket, tmp_path, mode)
    with S3Proxy(bucket.endpoint, writes(write), answered=answered).serving() as proxy:
        process = started(spec, proxy, tmp_path)
        if not proxy.held.wait(60):
            process.kill()
            pytest.fail(process.communicate()[1])
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert content(spec["table"]) == (AFTER[mode] if there else OLD)
    run_step("ingest", spec, services(bucket.endpoint))
    assert content(spec["table"]) == AFTER[mode]


@pytest.mark.parametrize("mode", AFTER)
def test_a_commit_whose_answer_is_lost(bucket: Bucket, tmp_path: Path, mode: str) -> None:
    """The client asks again, is told that there is such a version, and can't know that it is its own."""
    spec = prepared(bucket, tmp_path, mode)
    with S3Proxy(bucket.endpoint, writes("/_delta_log/"), answered=True).serving() as proxy:
        proxy.loses = True
        process = started(spec, proxy, tmp_path)
        _, said = process.communicate(timeout=100)
        assert process.returncode == 0 or (mode != "append" and "CommitConflictError" in said), said
        assert proxy.held.is_set()
    assert content(spec["table"]) == AFTER[mode]
    run_step("ingest", spec, services(bucket.endpoint))
    assert content(spec["table"]) == AFTER[mode]
