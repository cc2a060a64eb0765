"""A model that only a pickle can hold, on real servers: refused at every door until each of them was opened for it."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import polars as pl
import pytest

from airflow_mlops.core.model.signing import SigningKey
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import ArtifactIntegrityError, ConnectionConfigError, UnsafeModelError
from airflow_mlops.integrations import delta
from airflow_mlops.integrations.bentoml import EndpointClient, LocalServer
from airflow_mlops.integrations.mlflow import Registry
from airflow_mlops.services import Services
from airflow_mlops.serving.model import PICKLED_MODELS_VARIABLE, TRUSTED_TYPES_VARIABLE
from airflow_mlops.steps.base import run_step

pytestmark = pytest.mark.integration

KEY = SigningKey.generate()
START, DAYS = datetime(2024, 1, 1, tzinfo=UTC), 60
WINDOW = {"start": START.isoformat(), "end": (START + timedelta(days=DAYS)).isoformat()}
ACTOR = {"actor": "test", "now": (START + timedelta(days=DAYS + 1)).isoformat()}

#: skops writes no dictionary whose keys are pairs, whoever vouches for the class.
LOOKUP = '''
import numpy as np
from sklearn.base import BaseEstimator, RegressorMixin

class Lookup(RegressorMixin, BaseEstimator):
    """The mean of each pair of a kind and a rounded number."""

    def fit(self, X, y):
        groups = {}
        for pair, value in zip(self._pairs(X), y):
            groups.setdefault(pair, []).append(float(value))
        self.means_ = {pair: sum(values) / len(values) for pair, values in groups.items()}
        self.mean_ = float(np.mean(y))
        return self

    def predict(self, X):
        return np.array([self.means_.get(pair, self.mean_) for pair in self._pairs(X)])

    @staticmethod
    def _pairs(X):
        return [(kind, None if x != x else int(x)) for kind, x in zip(X["kind"], X["x"])]

class Closed(Lookup):
    """Holds a function without a name, which no pickle can name either."""

    def fit(self, X, y):
        self.of_ = lambda pair: pair
        return super().fit(X, y)
'''


def expected(rows: list[dict[str, Any]]) -> list[float]:
    """What the model has to answer, without the model: the data has no noise."""
    return [10.0 * int(row["x"]) + (5.0 if row["kind"] == "b" else 0.0) for row in rows]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    count = 20 * DAYS
    rng = np.random.default_rng(0)
    frame = pl.DataFrame(
        {
            "t": [START + timedelta(days=DAYS * i / count) for i in range(count)],
            "id": range(count),
            "x": rng.uniform(0.0, 6.0, count),
            "kind": rng.choice(["a", "b"], count).tolist(),
        }
    )
    frame = frame.with_columns(y=pl.Series(expected(frame.to_dicts())))
    uri = str(tmp_path_factory.mktemp("table") / "rows")
    window = Window(start=START, end=START + timedelta(days=DAYS))
    delta.replace_window(uri, frame, time_column="t", window=window)
    return uri


@pytest.fixture
def services(mlflow_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Services]:
    """The module of the estimator is installed where tasks, probe and service run; nothing else is opened."""
    (tmp_path / "lookup_model.py").write_text(LOOKUP)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.delenv(PICKLED_MODELS_VARIABLE, raising=False)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    yield Services(
        tracking_uri=mlflow_server,
        ledger_url=f"sqlite:///{tmp_path / 'ledger.db'}",
        serving_dir=str(tmp_path / "serving"),
        endpoint_url=f"http://127.0.0.1:{port}",
        signing_public_keys=KEY.public_text(),
    )
    LocalServer(tmp_path / "serving", port=port).stop()


def train(table: str, name: str, services: Services, **more: Any) -> dict[str, Any]:
    spec = {
        "dataset": table,
        "model_name": name,
        "estimator": "lookup_model.Lookup",
        "preprocessing": "none",
        "target": "y",
        "numeric": ["x"],
        "categorical": ["kind"],
        "time_column": "t",
        "id_column": "id",
        "window": WINDOW,
    }
    return run_step("train", spec | more, services)


def register(training: dict[str, Any], services: Services) -> dict[str, Any]:
    given = {name: training[name] for name in ("model_name", "run_id", "package_digest", "model_id")}
    return run_step("register", given, services)


def evaluate(table: str, training: dict[str, Any], services: Services) -> dict[str, Any]:
    spec = {name: training[name] for name in ("model_name", "run_id", "package_digest")}
    more = {"dataset": table, "window": training["holdout"], "time_column": "t"}
    return run_step("evaluate", spec | more, services)


def test_without_the_opt_in_it_is_refused(
    table: str, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnsafeModelError, match=r"lookup_model\.Lookup has no ONNX form.*allow_pickle=True"):
        train(table, "lookup_refused", services)
    monkeypatch.setenv(TRUSTED_TYPES_VARIABLE, "lookup_model.Lookup")
    with pytest.raises(UnsafeModelError, match=r"can't be written by skops.*allow_pickle=True"):
        train(table, "lookup_refused", services)
    with pytest.raises(UnsafeModelError, match="instead of a lambda or a local one"):
        train(table, "lookup_closed", services, estimator="lookup_model.Closed", allow_pickle=True)


def test_the_opt_in_changes_nothing_where_there_is_a_safe_form(table: str, services: Services) -> None:
    told = train(
        table,
        "lookup_linear",
        services,
        estimator="sklearn.linear_model.LinearRegression",
        preprocessing="auto",
        allow_pickle=True,
    )
    assert (told["serving_form"], told["model_id"] is None) == ("onnx", False)


def test_each_door_is_opened_for_this_model_alone(
    table: str, services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, signing = "lookup", replace(services, signing_key=KEY.to_text())
    training = train(table, name, services, allow_pickle=True)
    assert (training["serving_form"], training["model_id"], training["copy_digest"]) == ("pickle", None, None)
    assert "runs whatever code it names" in training["serving_reason"]
    assert training["metric_value"] == 0.0
    registry = Registry.connect(services)
    folder = registry.download_package(training["run_id"], tmp_path / "package")
    assert {path.suffix for path in folder.iterdir() if path.stem == "model"} == {".pkl"}
    assert registry.client.search_logged_models([registry.experiment_id(name)]) == []

    with pytest.raises(ConnectionConfigError, match="is a pickle, which nothing loads without a signature"):
        register(training, replace(services, signing_public_keys=None))
    with pytest.raises(ArtifactIntegrityError, match="register it before it is evaluated"):
        evaluate(table, training, services)
    version = register(training, signing)["model_version"]
    described = registry.client.get_model_version(name, version)
    assert described.tags["airflow_mlops.serving_form"] == "pickle"
    assert "Stored as a pickle: loading it runs whatever code it names" in described.description

    # Signed, and still nobody here was told to load it.
    with pytest.raises(ArtifactIntegrityError, match=f"accepts no pickles of '{name}'"):
        evaluate(table, training, services)
    monkeypatch.setenv(PICKLED_MODELS_VARIABLE, f"{name}_refused,{name}_linear")
    with pytest.raises(ArtifactIntegrityError, match=f"accepts no pickles of '{name}'"):
        evaluate(table, training, services)
    monkeypatch.setenv(PICKLED_MODELS_VARIABLE, name)
    with pytest.raises(ArtifactIntegrityError, match="no key was there to verify a signature with"):
        evaluate(table, training, replace(services, signing_public_keys=None))
    with pytest.raises(ArtifactIntegrityError, match="which is not trusted here"):
        evaluate(table, training, replace(services, signing_public_keys=SigningKey.generate().public_text()))

    result = evaluate(table, training, services)
    assert result["artifact"]["timed_answers"] > 0  # measured in a new process that asked for the same
    assert result["verdict"] == "promote", result["reason"]
    run_step("promote", {"model_name": name, "model_version": version, **ACTOR}, services)
    scored = run_step(
        "score",
        {
            "dataset": table,
            "table": str(tmp_path / "predictions"),
            "model_name": name,
            "id_column": "id",
            "time_column": "t",
            "window": WINDOW,
        },
        services,
    )
    assert scored["row_count"] == 20 * DAYS

    rows = [{"x": x, "kind": kind} for x in (0.5, 3.2, 5.9) for kind in ("a", "b")]
    run_step("deploy", {"model_name": name}, services)
    with EndpointClient(str(services.endpoint_url), None) as client:
        assert client.predict(rows)["predictions"] == expected(rows)

    # Where it is not accepted any more, the deployment is refused, and so is the service that starts by itself.
    monkeypatch.delenv(PICKLED_MODELS_VARIABLE)
    with pytest.raises(ArtifactIntegrityError, match=f"accepts no pickles of '{name}'"):
        run_step("deploy", {"model_name": name}, services)
    port = int(str(services.endpoint_url).rpartition(":")[2])
    server = LocalServer(tmp_path / "serving", port=port, public_keys=services.signing_public_keys)
    server.stop()
    server.start()
    assert f"accepts no pickles of '{name}'" in status(server)["error"]
    server.stop()


def status(server: LocalServer) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while True:
        try:
            return dict(httpx.get(f"{server.url}/status", timeout=2).json())
        except (httpx.HTTPError, ValueError):
            assert time.monotonic() < deadline, server.log_tail()
            time.sleep(0.2)
