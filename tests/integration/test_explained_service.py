"""A service that explains its answers, for real: beside predictions, and when it is asked to end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import numpy as np
import pytest

from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import SignatureMismatchError
from airflow_mlops.integrations.bentoml import EndpointClient, LocalServer
from airflow_mlops.serving.inference_log import read_inference_log
from tests import endpoints
from tests.callers import Callers
from tests.packages import build_package
from tests.ports import free_port

pytestmark = pytest.mark.integration

IDLE = 12


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """A model of many inputs, with so much work for an explanation that it takes a while."""
    folder = tmp_path_factory.mktemp("explained")
    digest = build_package(folder / "package", background_rows=50, idle=IDLE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIRFLOW_MLOPS_SERVICE_EXPLAIN_EVALUATIONS", "60000")
        server = LocalServer(folder / "serving", port=free_port(), token="token")
        endpoints.deploy(server, folder / "package", digest)
        try:
            yield server
        finally:
            server.stop()


@pytest.fixture
def client(served: LocalServer) -> Iterator[EndpointClient]:
    with EndpointClient(served.url, "token", timeout_seconds=60) as client:
        yield client


def row(x: float) -> dict[str, Any]:
    return {"x": x, "kind": "a", **{f"idle_{number}": 0.5 for number in range(IDLE)}}


def test_a_client_asks_why(client: EndpointClient, served: LocalServer) -> None:
    answer = client.explain([row(1.0), row(9.0)], prediction_ids=["p", "q"])
    assert (answer["model_version"], answer["prediction_ids"]) == ("1", ["p", "q"])
    low, high = answer["explanations"]
    assert low["contributions"]["x"] < -5.0 < 5.0 < high["contributions"]["x"]
    for one in (low, high):
        assert one["base_value"] + sum(one["contributions"].values()) == pytest.approx(one["prediction"])
    assert client.explain([row(9.0)])["explanations"] == [high]
    with pytest.raises(SignatureMismatchError, match=r"rows\[0\]\.kind: field is missing"):
        client.explain([{"x": 1.0}])
    with pytest.raises(SignatureMismatchError, match="'high' is none; the model answers with numbers"):
        client.explain([row(1.0)], label="high")
    with pytest.raises(ValueError, match="11 rows; at most 10 in one request"):
        client.explain([row(1.0)] * 11)
    httpx.post(f"{served.url}/predict", headers={"Authorization": "Bearer token"}, json={"row": row(1.0)})

    def logged() -> int:
        now = datetime.now(UTC)
        window = Window(start=now - timedelta(hours=1), end=now + timedelta(hours=1))
        return read_inference_log(served.serving_dir / "inference_log", "m", window).height

    time.sleep(1.5)
    assert logged() == 1, "explanations are not in the log, predictions are"


def test_predictions_go_on_while_answers_are_explained(served: LocalServer) -> None:
    stop, statuses = threading.Event(), []

    def keep_explaining() -> None:
        with httpx.Client(
            base_url=served.url, headers={"Authorization": "Bearer token"}, timeout=60
        ) as client:
            while not stop.is_set():
                statuses.append(client.post("/predict/explain", json={"rows": [row(2.0)] * 10}).status_code)
                time.sleep(0.005 if statuses[-1] == 429 else 0.0)

    def p99(answered: int) -> float:
        with Callers(served.port, [row(1.0)], count=4) as callers:
            callers.until(answered)
        assert callers.lost == []
        assert {*callers.answers} == {(200, "1")}
        return float(np.quantile(callers.times, 0.99))

    alone = p99(2_000)
    threads = [threading.Thread(target=keep_explaining) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        beside = p99(2_000)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert {*statuses} == {200, 429}, "one is worked out at a time"
    assert beside < max(0.1, 10.0 * alone)


def test_an_explanation_under_way_is_finished_before_the_service_ends(served: LocalServer) -> None:
    answers: list[httpx.Response] = []

    def explain() -> None:
        url = f"{served.url}/predict/explain"
        body = {"rows": [row(3.0)] * 10}
        answers.append(httpx.post(url, headers={"Authorization": "Bearer token"}, json=body, timeout=60))

    asking = threading.Thread(target=explain)
    asking.start()
    time.sleep(0.1)
    began = time.monotonic()
    served.stop()
    asking.join()
    assert [answer.status_code for answer in answers] == [200]
    assert time.monotonic() - began < 14.0, "it was killed"
