"""The service under 16 connections: swaps, killed workers, its end."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from airflow_mlops import cli
from airflow_mlops.integrations.bentoml import EndpointClient, LocalServer, wait_until
from airflow_mlops.serving.local import Deployment
from tests import endpoints
from tests.callers import Callers
from tests.packages import ROWS, build_package

pytestmark = pytest.mark.integration

Deploy = Callable[[str], Deployment]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    root = tmp_path_factory.mktemp("packages")
    return {
        version: (root / version, build_package(root / version, slope=slope))
        for version, slope in (("1", 2.0), ("2", 5.0))
    }


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def server(tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalServer]:
    monkeypatch.setenv("AIRFLOW_MLOPS_SERVICE_WORKERS", "2")
    server = LocalServer(tmp_path / "serving", port=port, token="token")
    yield server
    server.stop()


@pytest.fixture
def deploy(server: LocalServer, packages: dict[str, tuple[Path, str]]) -> Deploy:
    def run(version: str) -> Deployment:
        return endpoints.deploy(server, *packages[version], version)

    return run


def workers(server: LocalServer) -> list[psutil.Process]:
    """Give the processes that listen."""
    running = server.running()
    assert running is not None
    return [one for one in psutil.Process(running.pid).children() if listens(one)]


def listens(process: psutil.Process) -> bool:
    try:
        is_worker = any("_bentoml_impl.worker" in word for word in process.cmdline())
        return is_worker and any(one.status == psutil.CONN_LISTEN for one in process.net_connections("tcp"))
    except psutil.Error:  # gone, or a zombie
        return False


def test_swaps_lose_no_request_and_every_worker_follows(server: LocalServer, deploy: Deploy) -> None:
    deploy("1")
    with Callers(server.port, ROWS[:1]) as callers:
        for version in ("2", "1", "2"):
            deploy(version)
            callers.until(sum(callers.answers.values()) + 500)
        time.sleep(0.5)  # the slower worker has followed as well
        callers.answers.clear()
        callers.until(500)
        assert set(callers.answers) == {(200, "2")}
    assert callers.lost == []


def test_tokens_rotate_under_traffic_without_a_restart(server: LocalServer, deploy: Deploy) -> None:
    pid = deploy("1").pid
    with Callers(server.port, ROWS[:1]) as old:
        old.until(500)
        server.token = "new token"  # noqa: S105 - of a test
        assert deploy("1").pid == pid
        with Callers(server.port, ROWS[:1], token="new") as new:
            new.until(500)
            old.until(sum(old.answers.values()) + 500)
            assert (old.lost, set(old.answers)) == ([], {(200, "1")})
            server.token = "new"  # noqa: S105 - of a test
            assert deploy("1").pid == pid
            old.answers.clear()
            old.until(500)  # by both workers
            new.until(sum(new.answers.values()) + 500)
    assert set(old.answers) == {(401, None)}
    assert (new.lost, set(new.answers)) == ([], {(200, "1")})
    held = server.serving_dir / "tokens.json"
    assert held.stat().st_mode & 0o077 == 0


def test_its_end_loses_nothing(server: LocalServer, deploy: Deploy) -> None:
    deploy("1")
    with Callers(server.port, ROWS[:1], go_home_when_refused=True) as callers:
        callers.until(500)
        server.stop()
        callers.wait()  # refused, they have gone home
    assert callers.lost == []
    assert set(callers.answers) == {(200, "1")}


def test_the_command_ends_it_and_the_next_deployment_starts_it(
    server: LocalServer, deploy: Deploy, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["stop-service", str(server.serving_dir)]
    assert cli.main(command) == 1
    assert "runs on this machine" in capsys.readouterr().err
    deploy("1")
    assert cli.main(command) == 0
    assert server.url in capsys.readouterr().out
    assert server.running() is None
    server.require_free_port()
    assert deploy("1").started


def test_one_worker_that_is_asked_to_end_loses_nothing_while_the_other_goes_on(
    server: LocalServer, deploy: Deploy
) -> None:
    deploy("1")
    assert wait_until(lambda: len(workers(server)) == 2, timeout_seconds=30)
    one = workers(server)[0]
    with Callers(server.port, ROWS[:1]) as callers:
        callers.until(500)
        one.send_signal(signal.SIGTERM)
        one.wait(timeout=20)
        callers.until(sum(callers.answers.values()) + 500)
    assert callers.lost == []
    assert set(callers.answers) == {(200, "1")}


def test_a_worker_that_is_asked_to_end_is_replaced_on_the_same_port(
    server: LocalServer, deploy: Deploy
) -> None:
    deploy("1")
    assert wait_until(lambda: len(workers(server)) == 2, timeout_seconds=30)
    before = workers(server)
    for worker in before:  # both: the last one closes the port, which the next has to open again
        worker.send_signal(signal.SIGTERM)
    psutil.wait_procs(before, timeout=20)
    with httpx.Client(base_url=server.url, headers={"Authorization": "Bearer token"}) as client:

        def answers() -> bool:
            try:
                return client.get("/readyz").status_code == 200
            except httpx.HTTPError:
                return False

        assert wait_until(answers, timeout_seconds=40)
        assert client.post("/predict", json={"rows": ROWS[:1]}).json()["model_version"] == "1"
    assert not {one.pid for one in before} & {one.pid for one in workers(server)}


def test_a_killed_worker_comes_back_with_the_version_that_is_desired_now(
    server: LocalServer, deploy: Deploy
) -> None:
    deploy("1")
    assert wait_until(lambda: len(workers(server)) == 2, timeout_seconds=30)
    victim, other = workers(server)
    with Callers(server.port, ROWS[:1]) as callers:
        callers.until(200)
        victim.kill()
        deploy("2")
        # Those on its connections lose what was under way, at most one each; the other worker goes on.
        assert wait_until(lambda: len(workers(server)) == 2, timeout_seconds=40)
    assert len(callers.lost) <= 16
    other.suspend()  # so that the new one answers
    try:
        with httpx.Client(
            base_url=server.url, timeout=10, headers={"Authorization": "Bearer token"}
        ) as client:
            answer = client.post("/predict", json={"rows": ROWS[:1]}).json()
            assert answer["model_version"] == "2"
    finally:
        other.resume()


def test_our_client_loses_nothing_when_a_worker_is_killed(server: LocalServer, deploy: Deploy) -> None:
    deploy("1")
    assert wait_until(lambda: len(workers(server)) == 2, timeout_seconds=30)
    victim, answered, broken, over = workers(server)[0], [0] * 16, list[Exception](), threading.Event()

    def ask(caller: int) -> None:
        with EndpointClient(server.url, "token") as client:
            while not over.is_set():
                try:
                    assert client.predict(ROWS[:1])["model_version"] == "1"
                except Exception as err:  # noqa: BLE001 - handed to the test
                    broken.append(err)
                answered[caller] += 1

    def all_go_on(much: int) -> bool:
        until = [count + much for count in answered]
        return wait_until(
            lambda: all(now >= then for now, then in zip(answered, until, strict=True)), timeout_seconds=60
        )

    callers = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(16)]
    for caller in callers:
        caller.start()
    try:
        assert all_go_on(10)
        victim.kill()
        assert all_go_on(10)
    finally:
        over.set()
        for caller in callers:
            caller.join(timeout=60)
    assert broken == []
