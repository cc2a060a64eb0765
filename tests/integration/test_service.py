"""The model service for real: BentoML processes on the loopback address."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from airflow_mlops.core.rollouts.desired_state import ServedVersion
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import (
    ArtifactIntegrityError,
    EndpointUnavailableError,
    RolloutError,
    SignatureMismatchError,
    StorageError,
)
from airflow_mlops.integrations.bentoml import EndpointClient, LocalServer
from airflow_mlops.serving.inference_log import read_inference_log
from airflow_mlops.serving.local import Deployment, LocalEndpoint, deploy_package
from tests.disks import immutable, small_disk
from tests.packages import ROWS, build_package, build_unimportable

pytestmark = pytest.mark.integration


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Endpoint:
    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.server = LocalServer(folder, port=self.port, token="token")
        self.client = EndpointClient(self.server.url, "token")

    def deploy(self, package: Path, digest: str, version: str, timeout_seconds: float = 60) -> Deployment:
        served = ServedVersion(model_version=version, package_digest=digest)
        return deploy_package(
            LocalEndpoint(self.server, timeout_seconds=timeout_seconds), package, "m", served
        )


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    root = tmp_path_factory.mktemp("packages")
    return {
        version: (root / version, build_package(root / version, slope=slope, form=form))
        for version, slope, form in (("1", 2.0, "onnx"), ("2", 5.0, "sklearn"), ("3", 7.0, "onnx"))
    }


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[Endpoint]:
    made = Endpoint(tmp_path / "serving")
    yield made
    made.client.close()
    made.server.stop()


def first(endpoint: Endpoint) -> float:
    return endpoint.client.predict(ROWS[:1])["predictions"][0]


def test_deploy_swap_and_log(endpoint: Endpoint, packages: dict[str, tuple[Path, str]]) -> None:
    started = endpoint.deploy(*packages["1"], "1")
    assert (started.started, started.previous_version) == (True, None)
    assert first(endpoint) == pytest.approx(2.0, abs=0.6)
    with pytest.raises(SignatureMismatchError, match=r"rows\[0\]\.kind: field is missing"):
        endpoint.client.predict([{"x": 1.0}])
    with (
        EndpointClient(endpoint.server.url, "wrong") as stranger,
        pytest.raises(ValueError, match="bearer token"),
    ):
        stranger.ready()

    # A swap under load: every request is answered, by one version or the other.
    stop, versions, failures = threading.Event(), [], []

    def keep_asking() -> None:
        with EndpointClient(endpoint.server.url, "token") as client:
            while not stop.is_set():
                try:
                    answer = client.predict(ROWS, times=["2019-01-05T00:00:00"] * len(ROWS))
                    versions.append(answer["model_version"])
                except Exception as err:  # noqa: BLE001 - any failure counts
                    failures.append(err)

    threads = [threading.Thread(target=keep_asking) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        swapped = endpoint.deploy(*packages["2"], "2")
        time.sleep(0.5)
    finally:  # threads left asking would keep the test run alive and fill the memory with their failures
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert set(versions) == {"1", "2"}
    assert (swapped.started, swapped.previous_version, swapped.pid) == (False, "1", started.pid)
    assert first(endpoint) == pytest.approx(5.0, abs=1.5)

    time.sleep(1.5)
    logged = read_inference_log(
        endpoint.folder / "inference_log", "m", Window.parse("2019-01-01", "2019-02-01")
    )
    assert logged.height == len(versions) * len(ROWS)
    assert set(logged["model_version"]) == {"1", "2"}


def test_a_broken_version_leaves_the_old_one_serving(
    endpoint: Endpoint, packages: dict[str, tuple[Path, str]], tmp_path: Path
) -> None:
    endpoint.deploy(*packages["1"], "1")
    broken = tmp_path / "broken"
    digest = build_package(broken, slope=9.0)
    (broken / "model.onnx").write_bytes(b"garbage")
    with pytest.raises(ArtifactIntegrityError, match=r"model\.onnx"):
        endpoint.deploy(broken, digest, "2")
    assert endpoint.client.ready()["model_version"] == "1"
    assert first(endpoint) == pytest.approx(2.0, abs=0.6)


def test_a_version_that_only_the_task_can_load_is_not_waited_for(
    endpoint: Endpoint,
    packages: dict[str, tuple[Path, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both workers say that they can't import its class; the deployment ends with that, long before its time is over."""
    monkeypatch.setenv("AIRFLOW_MLOPS_SERVICE_WORKERS", "2")
    own = tmp_path / "own"
    digest = build_unimportable(own, monkeypatch)
    began = time.monotonic()
    with pytest.raises(
        RolloutError, match=r"(?s)version 1 of m: .*No module named 'only_here'.*Nothing serves"
    ):
        endpoint.deploy(own, digest, "1", timeout_seconds=3_600)
    assert endpoint.server.running() is None
    endpoint.deploy(*packages["1"], "1")
    with pytest.raises(RolloutError, match=r"(?s)version 2 of m: .*No module named.*Version 1 serves on"):
        endpoint.deploy(own, digest, "2", timeout_seconds=3_600)
    assert time.monotonic() - began < 600
    assert endpoint.client.predict(ROWS[:1])["model_version"] == "1"
    endpoint.deploy(*packages["2"], "2")  # what was refused before does not stand in its way
    assert endpoint.client.predict(ROWS[:1])["model_version"] == "2"


def test_a_killed_service_is_started_again(endpoint: Endpoint, packages: dict[str, tuple[Path, str]]) -> None:
    before = endpoint.deploy(*packages["1"], "1")
    family = [psutil.Process(before.pid), *psutil.Process(before.pid).children(recursive=True)]
    os.kill(before.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(family, timeout=15)
    assert alive == []  # a worker does not outlive the process that steers it
    with pytest.raises(EndpointUnavailableError, match="does not answer"):
        endpoint.client.ready()
    again = endpoint.deploy(*packages["1"], "1")
    assert again.started
    assert again.pid != before.pid
    assert first(endpoint) == pytest.approx(2.0, abs=0.6)


def test_a_port_in_use_is_found_before_anything_is_touched(
    endpoint: Endpoint, packages: dict[str, tuple[Path, str]]
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", endpoint.port))
        other.listen()
        with pytest.raises(RolloutError, match=f"port {endpoint.port} on 127.0.0.1 is in use"):
            endpoint.deploy(*packages["1"], "1")
    assert not (endpoint.folder / "desired.json").exists()
    assert endpoint.server.running() is None


def test_a_host_that_is_not_ours_is_said(tmp_path: Path) -> None:
    server = LocalServer(tmp_path, host="192.0.2.1", port=free_port())
    with pytest.raises(RolloutError, match=r"192\.0\.2\.1 is no address of this machine"):
        server.start()


def test_a_new_token_is_taken_by_what_runs_and_a_new_port_starts_it_again(
    endpoint: Endpoint, packages: dict[str, tuple[Path, str]]
) -> None:
    first_pid = endpoint.deploy(*packages["1"], "1").pid
    assert endpoint.deploy(*packages["1"], "1").pid == first_pid
    package, digest = packages["1"]

    def deploy_to(port: int) -> tuple[LocalServer, Deployment]:
        server = LocalServer(endpoint.folder, port=port, token="another")
        served = ServedVersion(model_version="1", package_digest=digest)
        return server, deploy_package(LocalEndpoint(server, timeout_seconds=60), package, "m", served)

    _, changed = deploy_to(endpoint.port)
    assert changed.pid == first_pid
    with pytest.raises(ValueError, match="bearer token is missing or wrong"):
        endpoint.client.ready()
    server, moved = deploy_to(free_port())
    try:
        assert moved.pid != first_pid
        with EndpointClient(server.url, "another") as client:
            assert client.ready()["model_version"] == "1"
        with pytest.raises(EndpointUnavailableError):
            endpoint.client.ready()
        assert (endpoint.folder / "endpoint.json").stat().st_mode & 0o077 == 0
    finally:
        server.stop()


def test_the_service_sees_no_secret_of_the_task(
    endpoint: Endpoint, packages: dict[str, tuple[Path, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AIRFLOW__CORE__FERNET_KEY", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "s3cret")
    process = psutil.Process(endpoint.deploy(*packages["1"], "1").pid)
    for member in [process, *process.children(recursive=True)]:
        assert "s3cret" not in member.environ().values()


def test_a_full_disk_leaves_the_old_version_serving(
    endpoint: Endpoint, packages: dict[str, tuple[Path, str]]
) -> None:
    """The second version's folder is on a disk with no room for it."""
    endpoint.deploy(*packages["1"], "1")
    (live,) = (path for path in endpoint.folder.glob("*/m/1") if path.is_dir())
    with small_disk(versions := live.parent):
        (versions / "filler").write_bytes(b"0" * 390_000)
        with pytest.raises(StorageError, match="free space on that disk"):
            endpoint.deploy(*packages["2"], "2")
        assert [path.name for path in versions.iterdir()] == ["filler"]
    assert endpoint.client.ready()["model_version"] == "1"
    assert first(endpoint) == pytest.approx(2.0, abs=0.6)


def test_a_folder_that_may_not_be_written(tmp_path: Path, packages: dict[str, tuple[Path, str]]) -> None:
    denied = tmp_path / "denied"
    denied.mkdir()
    with immutable(denied), pytest.raises(StorageError, match="give this user write permission there"):
        Endpoint(denied / "serving").deploy(*packages["1"], "1")


def test_stop_leaves_no_process(endpoint: Endpoint, packages: dict[str, tuple[Path, str]]) -> None:
    deployed = endpoint.deploy(*packages["1"], "1")
    family = [psutil.Process(deployed.pid), *psutil.Process(deployed.pid).children(recursive=True)]
    endpoint.server.stop()
    assert [process for process in family if process.is_running() and process.status() != "zombie"] == []
    assert endpoint.server.running() is None
