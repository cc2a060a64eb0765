"""What a running service shows: its metrics, beside the rules and the board made for them, and its OpenAPI, fuzzed."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from airflow_mlops.integrations.bentoml import LocalServer, wait_until
from airflow_mlops.serving.package import read_package, write_manifest
from tests import endpoints
from tests.packages import ROWS, build_package

pytestmark = pytest.mark.integration

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = DEPLOY / "prometheus" / "rules.yaml"
BOARD = DEPLOY / "grafana" / "serving.json"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("service")
    digest = build_package(folder / "package", background_rows=20)
    manifest = read_package(folder / "package", expected_digest=digest)
    window = {"time_column": "t", "window_start": datetime(2024, 1, 1, tzinfo=UTC)}
    trained_on = replace(manifest.trained_on, **window, window_end=datetime(2024, 2, 1, tzinfo=UTC))
    digest = write_manifest(folder / "package", replace(manifest, trained_on=trained_on))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIRFLOW_MLOPS_SERVICE_WORKERS", "2")
        patch.setenv("AIRFLOW_MLOPS_SERVICE_MAXIMUM_CONCURRENCY", "8")
        patch.setenv("AIRFLOW_MLOPS_SERVICE_BODY_SECONDS", "3")
        server = LocalServer(folder / "serving", port=port, token="token")
        endpoints.deploy(server, folder / "package", digest)
        try:
            headers = {"Authorization": "Bearer token"}
            with httpx.Client(base_url=server.url, headers=headers, timeout=30) as client:
                yield client
        finally:
            server.stop()


def samples(service: httpx.Client) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(service.get("/metrics").text)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
        if sample.name.startswith("airflow_mlops_")
    }


def asked_for(text: str) -> set[str]:
    return set(re.findall(r"\bairflow_mlops_[a-z0-9_]+", text))


def test_rules_and_board_ask_for_what_two_workers_really_expose(service: httpx.Client) -> None:
    for _ in range(60):  # each on a connection of its own, so that both workers answer some
        answer = httpx.post(service.base_url.join("/predict"), headers=service.headers, json={"rows": ROWS})
        assert answer.status_code == 200
    service.post("/predict", json={"rows": [{}]})
    explained = service.post("/predict/explain", json={"rows": ROWS})
    assert explained.status_code == 200, explained.text
    service.post("/predict/explain", json={"rows": [{}]})
    good = ("airflow_mlops_requests_total", (("model_version", "1"), ("status", "200")))
    assert wait_until(lambda: samples(service).get(good) == 60, timeout_seconds=10), samples(service)
    exposed = samples(service)
    version = (("model_version", "1"),)
    assert exposed["airflow_mlops_predictions_total", version] == 180
    assert exposed["airflow_mlops_predict_seconds_count", version] == 60
    assert exposed["airflow_mlops_inspected_rows_total", version] == 180
    assert exposed["airflow_mlops_null_inputs_total", (("field", "x"), ("model_version", "1"))] == 60
    assert exposed["airflow_mlops_requests_total", (("model_version", "none"), ("status", "422"))] == 1
    assert exposed["airflow_mlops_explained_rows_total", version] == 3
    assert exposed["airflow_mlops_explain_seconds_count", version] == 1
    by_status = {
        dict(labels)["status"]: value
        for (name, labels), value in exposed.items()
        if "explanation_req" in name
    }
    assert by_status == {"200": 1, "422": 1}
    assert exposed["airflow_mlops_version_share", version] == 1.0
    until = exposed["airflow_mlops_model_trained_until_timestamp_seconds", version]
    assert datetime.fromtimestamp(until, UTC) == datetime(2024, 2, 1, tzinfo=UTC)
    cells = [value for (name, _), value in exposed.items() if name == "airflow_mlops_prediction_cells_total"]
    assert sum(cells) == 180
    assert 0 in cells  # those that were never answered are there as well, to be compared with a day ago

    names = {name for name, _ in exposed}
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    recorded = {rule["record"] for rule in rules if "record" in rule}
    for rule in rules:
        assert asked_for(rule["expr"]) <= names, rule
        assert set(re.findall(r"airflow_mlops:[a-z0-9_:]+", rule["expr"])) <= recorded
        assert "record" in rule or rule["annotations"]["remedy"]
    expressions = [
        target["expr"] for panel in json.loads(BOARD.read_text())["panels"] for target in panel["targets"]
    ]
    assert len(expressions) >= 10
    for expression in expressions:
        assert asked_for(expression)
        assert asked_for(expression) <= names, expression


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
@pytest.mark.parametrize(
    "command", [["check", "rules", RULES], ["test", "rules", RULES.with_name("rules_test.yaml")]]
)
def test_promtool_accepts_the_rules(command: list) -> None:
    ended = subprocess.run([str(shutil.which("promtool")), *command], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_who_never_ends_a_body_is_hung_up_on_and_shuts_nobody_out(service: httpx.Client) -> None:
    request = (
        b"POST /predict HTTP/1.1\r\nHost: m\r\nAuthorization: Bearer token\r\nContent-Length: 10\r\n\r\n{"
    )
    with ExitStack() as stack:
        where = (service.base_url.host, service.base_url.port)
        slow = [stack.enter_context(socket.create_connection(where, timeout=30)) for _ in range(40)]
        for one in slow:
            one.sendall(request)
        for _ in range(20):
            url = service.base_url.join("/predict")
            assert httpx.post(url, headers=service.headers, json={"rows": ROWS}).status_code == 200
        for one in slow:
            with one.makefile("rb") as answer:  # to its end, which is that of the connection
                assert b" 408 " in answer.readline()
                assert b"was not there within 3 seconds" in answer.read()


def test_nothing_its_own_openapi_allows_or_forbids_makes_it_fail(service: httpx.Client) -> None:
    import schemathesis

    document = service.get("/openapi.json").json()
    answered: Counter = Counter()
    for found in schemathesis.openapi.from_dict(document).get_all_operations():
        operation = found.ok()
        documented = {
            int(status) for status in document["paths"][operation.path][operation.method]["responses"]
        }
        for mode in schemathesis.GenerationMode:
            fuzz(service, operation, mode, documented, answered)
    for path in ("/predict", "/predict/explain"):
        assert answered[path, "positive", 200] >= 10, answered
        assert answered[path, "negative", 422] >= 10, answered


def fuzz(service: httpx.Client, operation: Any, mode: Any, documented: set[int], answered: Counter) -> None:
    from hypothesis import HealthCheck, given, settings
    from hypothesis.errors import Unsatisfiable

    @settings(max_examples=80, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        answer = case.call(base_url=str(service.base_url).rstrip("/"), headers=dict(service.headers))
        answered[case.path, mode.value, answer.status_code] += 1
        assert answer.status_code < 500, case.as_curl_command()
        assert answer.status_code in {*documented, 405}, case.as_curl_command()

    with contextlib.suppress(Unsatisfiable):  # nothing about the operation can be made wrong
        ask()
