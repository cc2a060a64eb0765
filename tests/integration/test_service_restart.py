"""A service that is started again, or started at all, by somebody who is killed in the middle of it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from airflow_mlops.exceptions import ConnectionConfigError, RolloutError
from airflow_mlops.integrations.bentoml import EndpointClient, LocalServer, wait_until
from tests import endpoints
from tests.packages import ROWS, build_package
from tests.ports import free_port

pytestmark = pytest.mark.integration

#: Deploys as a task does, in which a signal raises an error.
DEPLOY = """
import signal, sys
from pathlib import Path
from airflow_mlops.exceptions import RolloutError
from airflow_mlops.integrations.bentoml import LocalServer
from tests import endpoints

def end(number, frame):
    raise RolloutError("the task was killed")

signal.signal(signal.SIGTERM, end)
folder, port, package, digest, version = sys.argv[1:]
endpoints.deploy(LocalServer(Path(folder), port=int(port), token="token"), Path(package), digest, version)
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    root = tmp_path_factory.mktemp("packages")
    return {
        version: (root / version, build_package(root / version, slope=slope))
        for version, slope in (("1", 2.0), ("2", 5.0))
    }


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LocalServer]:
    server = LocalServer(tmp_path / "serving", port=free_port(), token="token")
    yield server
    server.stop()


def deploying(server: LocalServer, package: tuple[Path, str], version: str) -> subprocess.Popen[bytes]:
    arguments = [str(server.serving_dir), str(server.port), *map(str, package), version]
    return subprocess.Popen([sys.executable, "-c", DEPLOY, *arguments])


def ready(server: LocalServer) -> bool:
    try:
        return httpx.get(f"{server.url}/readyz").status_code == 200
    except httpx.HTTPError:
        return False


def answering(server: LocalServer) -> str:
    with EndpointClient(server.url, "token") as client:
        return client.predict(ROWS[:1])["model_version"]


def of_folder(server: LocalServer) -> list[psutil.Process]:
    """Give the processes that are, or are about to become, this folder's service."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(server.serving_dir) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_kill_while_it_is_started_again_leaves_it_serving(
    server: LocalServer,
    packages: dict[str, tuple[Path, str]],
    number: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As long as the old process still answers those who ask, the new one has not taken its place: long enough to be killed in.
    monkeypatch.setenv("AIRFLOW_MLOPS_SERVICE_DRAIN_SECONDS", "8")
    before = endpoints.deploy(server, *packages["1"])
    monkeypatch.setenv("AIRFLOW_MLOPS_SERVICE_CACHE_ROWS", "5")
    task = deploying(server, packages["2"], "2")
    assert wait_until(lambda: not ready(server), timeout_seconds=60, interval_seconds=0.01)
    task.send_signal(number)
    if number is signal.SIGTERM:
        task.send_signal(number)  # once more: what it puts back is put back all the same
    assert task.wait(timeout=60) != 0
    assert wait_until(lambda: ready(server), timeout_seconds=60)
    assert answering(server) == "1"
    running = server.running()
    assert running is not None
    assert running.pid != before.pid
    assert {process.pid for process in of_folder(server)} == {
        running.pid,
        *(process.pid for process in psutil.Process(running.pid).children(recursive=True)),
    }
    # What was asked for is there: the next deployment has nothing to start again.
    assert endpoints.deploy(server, *packages["2"], "2").pid == running.pid
    assert answering(server) == "2"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_kill_while_it_is_first_started_leaves_no_process_that_nobody_finds(
    server: LocalServer, packages: dict[str, tuple[Path, str]], number: signal.Signals
) -> None:
    task = deploying(server, packages["1"], "1")
    assert wait_until(lambda: of_folder(server) != [], timeout_seconds=60, interval_seconds=0.001)
    task.send_signal(number)
    task.wait(timeout=60)
    found = of_folder(server)
    assert number is signal.SIGKILL or found == []
    assert wait_until(lambda: bool(server.running()) or not of_folder(server), timeout_seconds=60)
    server.stop()
    assert of_folder(server) == []
    assert endpoints.deploy(server, *packages["1"]).started
    assert answering(server) == "1"


def test_settings_it_would_not_start_with_leave_it_running(
    server: LocalServer, packages: dict[str, tuple[Path, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = endpoints.deploy(server, *packages["1"])
    with monkeypatch.context() as spoiled:
        spoiled.setenv("AIRFLOW_MLOPS_SERVICE_WORKERS", "two")
        with pytest.raises(ValueError, match="AIRFLOW_MLOPS_SERVICE_WORKERS='two'"):
            endpoints.deploy(server, *packages["2"], "2")
    monkeypatch.setenv("AIRFLOW_MLOPS_LOG_SHARE", "3")
    with pytest.raises(ConnectionConfigError, match="share"):
        endpoints.deploy(server, *packages["2"], "2")
    assert ready(server)
    assert answering(server) == "1"
    running = server.running()
    assert running is not None
    assert running.pid == before.pid


def test_two_who_start_it_at_once_start_one(tmp_path: Path) -> None:
    """The second finds the first, whose starter may have been killed before he knew."""
    server = LocalServer(tmp_path, port=free_port(), token="token")
    other = LocalServer(tmp_path, port=server.port, token="token")
    try:
        first = server.start()
        assert other._launch(None) == first
        stranger = LocalServer(tmp_path, port=free_port(), token="another")
        with pytest.raises(RolloutError, match=f"process {first.pid} serves .* already"):
            stranger._launch(None)
    finally:
        server.stop()
