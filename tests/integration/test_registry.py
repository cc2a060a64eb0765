"""What MLflow refuses or cannot give, told apart: not there, not writable here, not reachable."""

from __future__ import annotations

import base64
import json
import socket
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from airflow_mlops.exceptions import (
    ConnectionConfigError,
    ModelVersionNotFoundError,
    RegistryUnavailableError,
    StorageError,
)
from airflow_mlops.hooks.mlflow import MLflowHook
from airflow_mlops.integrations.mlflow import PACKAGE_FOLDER, Registry
from airflow_mlops.sensors import polls
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step
from tests.disks import immutable, small_disk
from tests.integration.stalling_proxy import StallingProxy

pytestmark = pytest.mark.integration

MODEL = "registry_errors"


@pytest.fixture(scope="module")
def registry(mlflow_server: str) -> Registry:
    return Registry.connect(Services(tracking_uri=mlflow_server))


@pytest.fixture(scope="module")
def run_id(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run with something large for a package, registered as version 1 without an alias."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "model.onnx").write_bytes(b"x" * 800_000)
    with registry.run(registry.experiment_id("registry errors"), "package", {}) as run_id:
        registry.upload(run_id, folder, PACKAGE_FOLDER)
    registry.register(
        MODEL, run_id=run_id, model_id=None, package_digest="sha256:0", tags={}, description="large"
    )
    return run_id


class BreakingProxy(StallingProxy):
    """Breaks the connection, or answers with a status, whenever a certain path is asked for."""

    def __init__(self, target: str, path: str, *, status: int | None) -> None:
        super().__init__(target, lambda method, text: False)
        self.path, self.status = path, status

    def pass_on(self, request: BaseHTTPRequestHandler) -> None:
        if self.path not in request.path:
            return super().pass_on(request)
        if self.status is None:
            return request.connection.shutdown(socket.SHUT_RDWR)
        request.send_response(self.status)
        request.send_header("Content-Length", "0")
        return request.end_headers()


class TestDownload:
    def test_a_run_without_a_package(self, registry: Registry, tmp_path: Path) -> None:
        with registry.run(registry.experiment_id("registry errors"), "empty", {}) as run_id:
            pass
        with pytest.raises(
            ModelVersionNotFoundError, match=f"run {run_id} .*was it trained by TrainModelOperator"
        ):
            registry.download_package(run_id, tmp_path)

    def test_a_run_that_is_not_there(self, registry: Registry, tmp_path: Path) -> None:
        with pytest.raises(ModelVersionNotFoundError, match="MLflow has no run 0000"):
            registry.download_package("0" * 32, tmp_path)

    def test_a_full_disk(self, registry: Registry, run_id: str, tmp_path: Path) -> None:
        with small_disk(tmp_path), pytest.raises(StorageError) as full:
            registry.download_package(run_id, tmp_path)
        assert f"could not write the model package of run {run_id} to {tmp_path}" in str(full.value)
        assert "No space left on device" in str(full.value)
        assert "Check free space and write permission" in str(full.value)

    def test_a_folder_that_denies(self, registry: Registry, run_id: str, tmp_path: Path) -> None:
        with immutable(tmp_path), pytest.raises(StorageError, match="Check free space and write permission"):
            registry.download_package(run_id, tmp_path)

    @pytest.mark.parametrize("status", [None, 503])
    def test_a_server_that_goes_away(
        self,
        registry: Registry,
        run_id: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        status: int | None,
    ) -> None:
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        with BreakingProxy(
            registry.tracking_uri, "/mlflow-artifacts/artifacts/", status=status
        ).serving() as proxy:
            through = Registry.connect(Services(tracking_uri=proxy.url))
            with pytest.raises(
                RegistryUnavailableError, match=f"did not give the model package of run {run_id}"
            ):
                through.download_package(run_id, tmp_path)


class TestNames:
    """The model is there; what was asked of it is not."""

    @pytest.mark.parametrize(
        ("asked", "words"),
        [
            ({"alias": "champoin"}, f"model '{MODEL}' alias 'champoin'"),
            ({"model_version": "7"}, f"model '{MODEL}' version '7'"),
        ],
    )
    def test_of_a_model_that_exists(
        self, registry: Registry, run_id: str, tmp_path: Path, asked: dict[str, str], words: str
    ) -> None:
        services = Services(tracking_uri=registry.tracking_uri, endpoint_url="http://127.0.0.1:9", serving_dir=str(tmp_path))  # fmt: skip
        with pytest.raises(ModelVersionNotFoundError, match=f"MLflow has no {words}"):
            run_step("deploy", {"model_name": MODEL, **asked}, services)


class TestAnswers:
    """A server that refuses is no outage: waiting for it would not help."""

    @pytest.mark.parametrize("status", [401, 403])
    def test_a_login_that_is_refused(self, registry: Registry, status: int) -> None:
        with BreakingProxy(registry.tracking_uri, "/registered-models/", status=status).serving() as proxy:
            through = Registry.connect(Services(tracking_uri=proxy.url))
            with pytest.raises(
                ConnectionConfigError, match=r"MLflow refuses model .*check Login and Password"
            ):
                through.version_by_alias(MODEL, "champion")

    @pytest.mark.parametrize(
        ("status", "error"),
        [
            (301, ConnectionConfigError),
            (404, ConnectionConfigError),
            (429, RegistryUnavailableError),
            (503, RegistryUnavailableError),
        ],
    )
    def test_a_health_check_that_is_not_answered_well(
        self, registry: Registry, status: int, error: type[Exception]
    ) -> None:
        with (
            BreakingProxy(registry.tracking_uri, "/health", status=status).serving() as proxy,
            pytest.raises(error, match=str(status)),
        ):
            Registry.connect(Services(tracking_uri=proxy.url))


class GuardedProxy(StallingProxy):
    """Passes on only what comes with the right login; health may be open to everybody."""

    def __init__(self, target: str, login: str, *, open_health: bool = False) -> None:
        super().__init__(target, lambda method, text: False)
        self.login, self.open_health = login, open_health

    def pass_on(self, request: BaseHTTPRequestHandler) -> None:
        is_open = self.open_health and request.path == "/health"
        if is_open or request.headers.get("Authorization") == self.login:
            return super().pass_on(request)
        request.rfile.read(int(request.headers.get("Content-Length") or 0))
        request.send_response(401)
        request.send_header("Content-Length", "0")
        return request.end_headers()


USER_AND_PASSWORD = "Basic " + base64.b64encode("anna:grün".encode()).decode()
LOGINS = {
    USER_AND_PASSWORD: {"login": "anna", "password": "grün"},
    "Bearer secret-token": {"extra": {"token": "secret-token"}},
}


class TestRuns:
    def test_a_run_that_is_gone_is_named(self, registry: Registry) -> None:
        gone = "0" * 32
        for asked in (
            lambda: registry.tag_run(gone, "airflow_mlops.selected", "true"),
            lambda: registry.run_tags(gone),
            lambda: registry.training_run(gone),
        ):
            with pytest.raises(ModelVersionNotFoundError, match=f"MLflow has no run {gone}"):
                asked()

    def test_no_step_asks_mlflows_client_itself(self) -> None:
        """Its errors would be MLflow's own, which no retry rule knows."""
        steps = list(Path(run_step.__code__.co_filename).parent.rglob("*.py"))
        assert len(steps) > 20
        assert not [step.name for step in steps if "registry.client." in step.read_text()]


class TestBehindALogin:
    """MLflow behind a proxy that lets nothing through without a login, the health check least of all."""

    @pytest.fixture(autouse=True)
    def _no_login_of_this_process(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # MLflow's client takes it from the environment, where a connection leaves it.
        for name in ("USERNAME", "PASSWORD", "TOKEN"):
            monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", "")

    def hook(self, monkeypatch: pytest.MonkeyPatch, url: str, **login: Any) -> MLflowHook:
        extra = {"tracking_uri": url, **login.pop("extra", {})}
        connection = {"conn_type": "mlflow", **login, "extra": extra}
        monkeypatch.setenv("AIRFLOW_CONN_MLFLOW_DEFAULT", json.dumps(connection))
        return MLflowHook()

    @pytest.mark.parametrize("login", LOGINS)
    @pytest.mark.usefixtures("run_id")
    def test_the_right_one(
        self, registry: Registry, login: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        with GuardedProxy(registry.tracking_uri, login).serving() as proxy:
            hook = self.hook(monkeypatch, proxy.url, **LOGINS[login])
            assert hook.test_connection() == (True, "MLflow answers")
            through = hook.get_conn()
            version = through.version(MODEL, "1")
            assert (through.download_version(version, tmp_path) / "model.onnx").stat().st_size == 800_000
            through.set_alias(MODEL, "guarded", "1")
            seen = polls.model_version(
                model_name=MODEL, alias="guarded", not_version=None, mlflow_conn_id="mlflow_default"
            )
            assert seen is not None
            assert seen["model_version"] == "1"

    @pytest.mark.parametrize("open_health", [False, True])
    @pytest.mark.parametrize("given", [{}, {"login": "anna", "password": "wrong"}])
    def test_a_wrong_one(
        self, registry: Registry, given: dict[str, str], open_health: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with GuardedProxy(
            registry.tracking_uri, USER_AND_PASSWORD, open_health=open_health
        ).serving() as proxy:
            hook = self.hook(monkeypatch, proxy.url, **given)
            worked, said = hook.test_connection()
            assert not worked
            assert said.startswith("MLflow refuses the login (401): check Login and Password")
            with pytest.raises(ConnectionConfigError, match=r"login|Login and Password"):
                hook.get_conn().version_by_alias(MODEL, "champion")

    def test_a_page_instead_of_mlflow(self, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
        worked, said = self.hook(monkeypatch, f"{registry.tracking_uri}/health?").test_connection()
        assert (worked, "is no MLflow" in said) == (False, True)


@pytest.mark.parametrize("uri", ["http://mlflow:port", "mlflow:5000", "http://http://mlflow:5000", "http://"])
def test_an_address_that_is_none(uri: str) -> None:
    with pytest.raises(ConnectionConfigError, match="is no address such as http://localhost:5000") as refused:
        Registry.connect(Services(tracking_uri=uri))
    assert uri in str(refused.value)


def test_an_experiment_that_another_task_makes_meanwhile_is_taken(
    mlflow_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry.connect(Services(tracking_uri=mlflow_server))
    create = registry.client.create_experiment
    first: list[str] = []

    def beaten(name: str) -> str:
        first.append(create(name))
        return create(name)

    monkeypatch.setattr(registry.client, "create_experiment", beaten)
    assert registry.experiment_id("made twice") == first[0]
