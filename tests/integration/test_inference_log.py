"""The inference log of a real service: killed under load, with a disk that refuses, and uploaded."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl
import psutil
import pytest

from airflow_mlops.core.windows import Window
from airflow_mlops.integrations.bentoml import EndpointClient
from airflow_mlops.serving.inference_log import read_inference_log
from tests.disks import immutable
from tests.integration.test_service import Endpoint
from tests.packages import ROWS, build_package

pytestmark = pytest.mark.integration

JANUARY = Window.parse("2019-01-01", "2019-02-01")


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[Endpoint]:
    made = Endpoint(tmp_path / "serving")
    yield made
    made.client.close()
    made.server.stop()


def deploy(endpoint: Endpoint, folder: Path) -> str:
    package = folder / "package"
    digest = build_package(package)
    endpoint.deploy(package, digest, "1")
    return digest


@contextmanager
def load(endpoint: Endpoint, answered: list[tuple[float, str]]) -> Iterator[None]:
    """Ask from four threads; notes when each prediction was answered."""
    stop = threading.Event()

    def ask_on(thread: int) -> None:
        number = 0
        with EndpointClient(endpoint.server.url, "token") as client:
            while not stop.is_set():
                ids = [f"{thread}-{number}-{row}" for row in range(len(ROWS))]
                try:
                    client.predict(ROWS, prediction_ids=ids, times=["2019-01-05T00:00:00"] * len(ROWS))
                except Exception:  # noqa: BLE001 - it was killed
                    return
                answered.extend((time.time(), item) for item in ids)
                number += 1

    threads = [threading.Thread(target=ask_on, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def kill(endpoint: Endpoint) -> float:
    """Kill all processes of the service; gives when that began."""
    running = endpoint.server.running()
    assert running is not None
    family = [psutil.Process(running.pid), *psutil.Process(running.pid).children(recursive=True)]
    began = time.time()
    for process in family:
        process.kill()
    psutil.wait_procs(family, timeout=10)
    return began


def ids_in(root: Path | str) -> list[str]:
    return read_inference_log(root, "m", JANUARY)["prediction_id"].to_list()


def test_killed_under_load_it_loses_one_interval_at_most(endpoint: Endpoint, tmp_path: Path) -> None:
    deploy(endpoint, tmp_path)
    log, answered = endpoint.folder / "inference_log", []
    with load(endpoint, answered):
        time.sleep(4)
        killed = kill(endpoint)
    logged = ids_in(log)
    assert len(set(logged)) == len(logged)
    # One second between flushes, and half a second for a flush in work on a busy machine.
    settled = {item for at, item in answered if at < killed - 1.5}
    assert len(settled) > 1000
    assert settled <= set(logged)
    for file in log.rglob("part-*.parquet"):
        assert pl.read_parquet(file).height > 0


def test_a_folder_that_refuses_costs_no_request(endpoint: Endpoint, tmp_path: Path) -> None:
    deploy(endpoint, tmp_path)
    log = endpoint.folder / "inference_log"
    endpoint.client.predict(ROWS, times=["2019-01-05T00:00:00"] * len(ROWS))
    _until(lambda: list(log.rglob("*.parquet")))
    (hour,) = (log / "m").iterdir()
    with immutable(hour):
        answered: list[tuple[float, str]] = []
        with load(endpoint, answered):
            time.sleep(2.5)
        shed = _until(lambda: endpoint.client.ready()["shed_log_rows"])
    assert 0 < shed <= len(answered)
    text = (endpoint.folder / "service.log").read_text()
    assert "predictions of m are not logged: cannot write the inference log" in text
    assert text.count("are not logged") == 1  # not once a second
    endpoint.client.predict(ROWS, prediction_ids=list("xyz"), times=["2019-01-05T00:00:00"] * len(ROWS))
    _until(lambda: {"x", "y", "z"} <= set(ids_in(log)))


def test_what_was_not_uploaded_when_it_was_killed_is_uploaded_later(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    """The service is told where its log goes, and what not to write, by a file in the log's folder."""
    far, log = tmp_path / "far", endpoint.folder / "inference_log"
    far.write_text("not there yet")
    log.mkdir(parents=True)
    (log / "settings.json").write_text(
        json.dumps({"uri": f"file://{far}", "drop": ["kind"], "flush_seconds": 0.2})
    )
    digest = deploy(endpoint, tmp_path)
    answered: list[tuple[float, str]] = []
    with load(endpoint, answered):
        time.sleep(1)
    _until(lambda: len(ids_in(log)) == len(answered))
    assert "stays in" in (endpoint.folder / "service.log").read_text()
    kill(endpoint)
    far.unlink()
    endpoint.deploy(tmp_path / "package", digest, "1")
    _until(lambda: not list(log.rglob("*.parquet")))
    rows = read_inference_log(f"file://{far}", "m", JANUARY)
    assert sorted(rows["prediction_id"]) == sorted(item for _, item in answered)
    assert "feature_kind" not in rows.columns


def _until(look, seconds: float = 20.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            found = look()
        except ValueError:  # nothing is logged yet
            found = None
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError("it did not happen")
