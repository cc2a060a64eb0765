from __future__ import annotations

import json
import re

import pytest
import yaml

from tests.conftest import REPOSITORY

TEXT = (REPOSITORY / "docker-compose.yaml").read_text()
STACK = yaml.safe_load(TEXT)
SERVICES = STACK["services"]
COMPONENTS = ["airflow-apiserver", "airflow-scheduler", "airflow-dag-processor", "airflow-triggerer"]


def test_every_part_of_the_stack_is_there():
    assert set(SERVICES) == {"postgres", "mlflow", "airflow-init", *COMPONENTS}
    assert "name" not in STACK, "docker-compose v1 refuses a top-level name"


@pytest.mark.parametrize("name", ["postgres", "mlflow", *COMPONENTS])
def test_what_keeps_running_has_a_health_check(name):
    assert SERVICES[name]["healthcheck"]["test"]


@pytest.mark.parametrize("name", COMPONENTS)
class TestComponent:
    def test_starts_after_what_it_needs(self, name):
        needs = {other: how["condition"] for other, how in SERVICES[name]["depends_on"].items()}
        assert needs["postgres"] == needs["mlflow"] == "service_healthy"
        assert needs["airflow-init"] == "service_completed_successfully"

    def test_shares_secrets_and_the_execution_api(self, name):
        environment = SERVICES[name]["environment"]
        assert environment == SERVICES["airflow-init"]["environment"]
        for key in ("AIRFLOW__API_AUTH__JWT_SECRET", "AIRFLOW__CORE__FERNET_KEY"):
            assert environment[key].startswith("${"), f"{key} must come from outside and be required"
            assert ":?" in environment[key]
        url = environment["AIRFLOW__CORE__EXECUTION_API_SERVER_URL"]
        assert url == "http://airflow-apiserver:8080/execution/"

    def test_sends_no_telemetry(self, name):
        environment = SERVICES[name]["environment"]
        assert environment["MLFLOW_DISABLE_TELEMETRY"] == "true"
        assert environment["BENTOML_DO_NOT_TRACK"] == "True"
        assert environment["DO_NOT_TRACK"] == "1"
        assert environment["AIRFLOW__USAGE_DATA_COLLECTION__ENABLED"] == "False"

    def test_runs_its_own_command_on_shared_folders(self, name):
        assert SERVICES[name]["command"] == [
            "airflow",
            name.removeprefix("airflow-").replace("apis", "api-s"),
        ]
        assert {"mlops:/opt/mlops", "logs:/opt/airflow/logs"} <= set(SERVICES[name]["volumes"])
        assert set(STACK["volumes"]) == {"postgres", "mlflow", "mlops", "logs"}


def test_connections_are_json_and_point_at_services_of_the_stack():
    environment = SERVICES["airflow-scheduler"]["environment"]
    values = {
        key: json.loads(re.sub(r"\$\{[^}]*\}", "x", text))
        for key, text in environment.items()
        if key.startswith("AIRFLOW_CONN_")
    }
    assert {value["conn_type"] for value in values.values()} == {"mlflow", "bentoml", "mlops_ledger"}
    assert values["AIRFLOW_CONN_MLFLOW_DEFAULT"]["host"] in SERVICES
    # The deploy task binds this address: with the LocalExecutor it runs in the scheduler's container and nowhere else.
    assert environment["AIRFLOW__CORE__EXECUTOR"] == "LocalExecutor"
    endpoint = values["AIRFLOW_CONN_BENTOML_DEFAULT"]
    assert endpoint["host"] == "airflow-scheduler"
    assert endpoint["extra"]["serving_dir"].startswith("/opt/mlops/")


def test_ports_are_published_on_the_loopback_address_only():
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(published) == 3
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_mounted_files_exist():
    mounts = [mount.split(":")[0] for service in SERVICES.values() for mount in service.get("volumes", [])]
    files = {mount for mount in mounts if mount.startswith("./")}
    assert files
    assert all((REPOSITORY / file).exists() for file in files)
    assert (REPOSITORY / "deploy" / "Dockerfile").is_file()


def test_every_required_variable_is_explained():
    page = (REPOSITORY / "docs" / "how-to" / "compose.md").read_text()
    required = set(re.findall(r"\$\{(\w+):\?", TEXT))
    assert required == {"AIRFLOW_JWT_SECRET", "AIRFLOW_FERNET_KEY", "POSTGRES_PASSWORD", "ENDPOINT_TOKEN"}
    assert all(name in page for name in required)
