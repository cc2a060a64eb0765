"""Every step for real, in this process and by its command; and what is said when something is wrong."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from airflow_mlops.demo import stream
from airflow_mlops.exceptions import (
    ConnectionConfigError,
    DatasetNotFoundError,
    InsufficientDataError,
    ModelVersionNotFoundError,
    PromotionConflictError,
    RegistryUnavailableError,
    SchemaMismatchError,
    StorageError,
)
from airflow_mlops.hooks.bentoml import BentoMLHook
from airflow_mlops.hooks.mlflow import MLflowHook
from airflow_mlops.integrations import delta
from airflow_mlops.integrations.bentoml import EndpointClient, LocalServer
from airflow_mlops.runners.python import PythonRunner
from airflow_mlops.sensors import polls
from airflow_mlops.services import Services
from airflow_mlops.steps.base import STEP_MODULES, run_step
from tests.disks import small_disk

pytestmark = pytest.mark.integration

WINDOW = {"start": "2018-07-01T00:00:00Z", "end": "2018-08-01T00:00:00Z"}
NEXT = {"start": "2018-08-01T00:00:00Z", "end": "2018-09-01T00:00:00Z"}
NUMERIC = [name for name in stream.FEATURES if name != "rate_code_id"]
TRAIN = {
    "estimator": "sklearn.ensemble.HistGradientBoostingRegressor",
    "estimator_params": {"max_iter": 20},
    "target": stream.TARGET,
    "numeric": NUMERIC,
    "categorical": ["rate_code_id"],
    "time_column": stream.TIME,
    "window": WINDOW,
}
SUITE = {
    "name": "trips",
    "expectations": [{"type": "expect_column_values_to_be_unique", "kwargs": {"column": stream.ID}}],
}


class Loop:
    """A folder, three services and the steps between them; what ran is kept."""

    def __init__(self, folder: Path, mlflow_url: str, model_name: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.folder, self.model_name, self.port = folder, model_name, port
        self.table = str(folder / "trips")
        self.services = Services(
            tracking_uri=mlflow_url,
            ledger_url=f"sqlite:///{folder / 'ledger.db'}",
            endpoint_url=f"http://127.0.0.1:{port}",
            serving_dir=str(folder / "serving"),
        )
        trips = stream.simulate(1, trips_per_month=1500)
        (folder / "landing").mkdir(parents=True)
        trips.write_parquet(folder / "landing" / "trips.parquet")
        self.trips = trips
        self.specs: dict[str, dict[str, Any]] = {}
        self.results: dict[str, dict[str, Any]] = {}

    def run(self, name: str, **spec: Any) -> dict[str, Any]:
        self.specs[name] = spec
        self.results[name] = run_step(name, spec, self.services)
        return self.results[name]

    def ingest(self, window: dict[str, str] = WINDOW) -> dict[str, Any]:
        source = str(self.folder / "landing" / "*.parquet")
        return self.run(
            "ingest",
            source=source,
            table=self.table,
            time_column=stream.TIME,
            window=window,
            id_column=stream.ID,
        )

    def ask(self, window: dict[str, str]) -> None:
        """Send a window's trips to the service, and wait until they are in its log."""
        import time

        rows = self.trips.filter(
            pl.col(stream.TIME).is_between(
                pl.lit(window["start"]).str.to_datetime(time_zone="UTC"),
                pl.lit(window["end"]).str.to_datetime(time_zone="UTC"),
                closed="left",
            )
        )
        with EndpointClient(str(self.services.endpoint_url)) as client:
            client.predict(
                rows.select(stream.FEATURES).to_dicts(),
                prediction_ids=rows[stream.ID].to_list(),
                times=[time.isoformat() for time in rows[stream.TIME]],
            )
        time.sleep(1.6)


@pytest.fixture(scope="module")
def loop(mlflow_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    """The whole chain, once."""
    made = Loop(tmp_path_factory.mktemp("loop"), mlflow_server, "steps_fare")
    ingested = made.ingest()
    made.run("validate", dataset=ingested["dataset"], suite=SUITE, time_column=stream.TIME, window=WINDOW)
    made.run("infer-expectations", dataset=ingested["dataset"], suite=str(made.folder / "suite.json"))
    trained = made.run("train", dataset=ingested["dataset"], model_name=made.model_name, **TRAIN)
    candidates = [
        run_step(
            "train",
            {
                "dataset": ingested["dataset"],
                "model_name": "steps_candidates",
                **TRAIN,
                "estimator_params": {"max_iter": iterations},
                "search": {"trials": 1, "folds": 2},
            },
            made.services,
        )
        for iterations in (2, 20)
    ]
    made.run("select", trainings=candidates)
    made.run(
        "evaluate",
        dataset=trained["dataset"],
        model_name=made.model_name,
        run_id=trained["run_id"],
        window=trained["holdout"],
        time_column=stream.TIME,
    )
    made.run(
        "explain",
        dataset=trained["dataset"],
        model_name=made.model_name,
        run_id=trained["run_id"],
        window=trained["holdout"],
        time_column=stream.TIME,
        explained_rows=20,
        counterfactual_shift=5.0,
    )
    registered = made.run(
        "register",
        model_name=made.model_name,
        run_id=trained["run_id"],
        package_digest=trained["package_digest"],
        model_id=trained["model_id"],
    )
    made.run(
        "promote",
        model_name=made.model_name,
        model_version=registered["model_version"],
        actor="test",
        now="2018-08-01T00:00:00Z",
    )
    made.run("build", model_name=made.model_name, destination=str(made.folder / "bentos"))
    try:
        made.run("deploy", model_name=made.model_name)
        made.ask(NEXT)
        made.ingest(NEXT)
        labels = {"labels": made.table, "id_column": stream.ID}
        made.run("performance", model_name=made.model_name, window=NEXT, target=stream.TARGET, **labels)
        made.run(
            "new-labels",
            model_name=made.model_name,
            target=stream.TARGET,
            **labels,
            windows=[
                {
                    "window": WINDOW,
                    "version": 1,
                    "known_at": "2100-01-01T00:00:00Z",
                },  # of which nothing was asked
                {"window": NEXT, "version": 1, "known_at": "2100-01-01T00:00:00Z"},
            ],
        )
        made.run("drift", model_name=made.model_name, window=NEXT)
        made.run("skew", model_name=made.model_name, window=NEXT, table=made.table, id_column=stream.ID)
        made.run(
            "screen",
            dataset=made.table,
            window=NEXT,
            time_column=stream.TIME,
            target=stream.TARGET,
            id_column=stream.ID,
        )
        made.run(
            "challengers",
            model_name=made.model_name,
            window=NEXT,
            dataset=labels["labels"],
            time_column=stream.TIME,
        )
        made.run(
            "score",
            dataset=made.table,
            table=str(made.folder / "predictions"),
            model_name=made.model_name,
            id_column=stream.ID,
            time_column=stream.TIME,
            window=NEXT,
        )
        made.run("retraining", model_name=made.model_name, actor="test", now="2018-09-01T00:00:00Z")
        made.run("incidents", model_name=made.model_name, actor="test", now="2018-09-01T00:00:00Z")
        yield made
    finally:
        LocalServer(made.folder / "serving", port=made.port).stop()


def test_the_chain_says_what_it_did(loop: Loop) -> None:
    results = loop.results
    assert results["validate"]["success"]
    assert results["train"]["serving_form"] == "onnx"
    assert results["select"]["training"]["estimator_params"] == {"max_iter": 20}
    assert results["evaluate"]["verdict"] == "promote"
    assert results["explain"]["importances"][0]["name"] == "trip_distance"
    assert results["explain"]["headline"].startswith("most important: trip_distance (MAE gets worse by ")
    assert results["promote"]["moved"]
    assert results["deploy"]["model_version"] == "1"
    assert results["performance"]["measured"]
    assert not results["performance"]["degraded"]
    assert results["new-labels"]["unchanged"] == [WINDOW]
    assert not results["drift"]["drifted"]
    assert results["skew"]["success"]
    assert results["skew"]["compared_rows"] == results["skew"]["row_count"] > 1000
    assert results["screen"]["verdict"] == "undecided"  # of one month before it nothing can be told
    assert results["incidents"]["headline"] == "nothing new; 0 open"
    assert results["score"]["row_count"] == results["performance"]["row_count"] > 1000


def test_a_champion_that_has_learned_from_the_window_is_not_compared_on_it(loop: Loop) -> None:
    compared = loop.results["challengers"]
    assert compared["check"]["champion"] == "1"
    seen = {**loop.specs["challengers"], "window": loop.specs["train"]["window"]}
    told = run_step("challengers", seen, loop.services)
    assert told["check"] is None
    assert told["reason"].startswith("not compared: champion, version 1, has learned from rows until 2018-07")


# What differs between two runs of the same step: times, and what a second run finds done.
VOLATILE = {"seconds", "reused", "moved", "started", "dataset", "predictions", "report_url", "artifact"}


def lasting(result: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in result.items() if key not in VOLATILE}
    if "checks" in kept:
        kept["checks"] = [check for check in kept["checks"] if check["name"] != "artifact"]
    return kept


@pytest.mark.parametrize("name", sorted(set(STEP_MODULES) - {"roll-back"}))
def test_a_step_by_its_command_gives_the_same(loop: Loop, name: str, tmp_path: Path) -> None:
    spec, result = tmp_path / "spec.json", tmp_path / "result.json"
    spec.write_text(json.dumps(loop.specs[name]))
    command = [
        sys.executable,
        "-m",
        "airflow_mlops.steps",
        name,
        "--spec",
        str(spec),
        "--result",
        str(result),
    ]
    environment = {**os.environ, **loop.services.to_environment()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    again = json.loads(result.read_text())
    # Run here once more as well: a second evaluation finds a champion where the first found none.
    first = run_step(name, loop.specs[name], loop.services)
    assert set(again) == set(first)
    assert lasting(again) == lasting(first)


def test_roll_back_by_its_command(loop: Loop, tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(
        json.dumps({"model_name": loop.model_name, "actor": "test", "now": "2018-09-02T00:00:00Z"})
    )
    with pytest.raises(ModelVersionNotFoundError, match="version 1 is the first champion"):
        run_step("roll-back", json.loads(spec.read_text()), loop.services)
    with pytest.raises(ModelVersionNotFoundError, match="version 1 is the first champion"):
        PythonRunner(sys.executable).run("roll-back", json.loads(spec.read_text()), loop.services)


def test_promote_and_roll_back(loop: Loop, mlflow_server: str, tmp_path: Path) -> None:
    from airflow_mlops.integrations.mlflow import Registry
    from airflow_mlops.ledger import Ledger

    name = "two_versions"
    versions = []
    for iterations in (5, 9):
        params = TRAIN | {"estimator_params": {"max_iter": iterations}}
        trained = run_step("train", {"dataset": loop.table, "model_name": name, **params}, loop.services)
        spec = {"model_name": name, "run_id": trained["run_id"], "package_digest": trained["package_digest"]}
        versions.append(run_step("register", spec, loop.services)["model_version"])
        assert run_step("register", spec, loop.services)["model_version"] == versions[-1]  # the same package
    promotion = {"model_name": name, "actor": "test", "now": "2018-09-01T00:00:00Z"}
    run_step("promote", promotion | {"model_version": versions[0]}, loop.services)
    run_step(
        "promote", promotion | {"model_version": versions[1], "expected_version": versions[0]}, loop.services
    )
    with pytest.raises(PromotionConflictError, match="test moved it to version 2"):
        run_step(
            "promote", promotion | {"model_version": versions[0], "expected_version": "7"}, loop.services
        )
    registry = Registry.connect(loop.services)
    assert registry.version_by_alias(name, "champion").model_version == versions[1]
    assert registry.version_by_alias(name, "previous").model_version == versions[0]
    back = {"model_name": name, "actor": "test", "now": "2018-09-02T00:00:00Z", "reason": "drill"}
    assert run_step("roll-back", back, loop.services)["model_version"] == versions[0]
    assert (
        run_step("roll-back", back, loop.services)["model_version"] == versions[0]
    )  # a retry is no second step
    assert registry.version_by_alias(name, "champion").model_version == versions[0]
    with Ledger.open(str(loop.services.ledger_url)) as ledger:
        assert ledger.aliases(name)["champion"] == versions[0]


def test_training_twice_is_one_run_and_one_model(loop: Loop) -> None:
    again = run_step("train", loop.specs["train"], loop.services)
    assert again["reused"]
    assert again["run_id"] == loop.results["train"]["run_id"]
    elsewhere = run_step("train", loop.specs["train"] | {"experiment": "another"}, loop.services)
    assert elsewhere["run_id"] != again["run_id"]
    assert elsewhere["package_digest"] == again["package_digest"]  # bit for bit the same model and manifest


def test_the_version_is_a_plain_mlflow_model_too(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code = """
import sys, json, mlflow, pandas as pd
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
print(json.dumps(model.predict(pd.DataFrame(json.load(open(sys.argv[3])))).tolist()))
"""
    rows = loop.trips.select(
        *(pl.col(name).cast(pl.Float64) for name in NUMERIC), pl.col("rate_code_id").cast(pl.String)
    ).head(3)
    (tmp_path / "rows.json").write_text(
        json.dumps([{k: float(v) if k in NUMERIC else v for k, v in row.items()} for row in rows.to_dicts()])
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(loop.services.tracking_uri)]
    done = subprocess.run(
        [*command, f"models:/{loop.model_name}@champion", str(tmp_path / "rows.json")],
        capture_output=True, text=True, timeout=120, env={**os.environ, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "true"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    with EndpointClient(str(loop.services.endpoint_url)) as served:
        expected = served.predict(rows.to_dicts())["predictions"]
    assert np.allclose(json.loads(done.stdout.splitlines()[-1]), expected, rtol=1e-4)


def test_ingesting_a_window_again_changes_nothing(loop: Loop) -> None:
    before = delta.describe(loop.table, time_column=stream.TIME)
    loop.ingest()
    after = delta.describe(loop.table, time_column=stream.TIME)
    assert after.version == before.version + 1
    assert after.dataset_digest == before.dataset_digest


class TestBadInput:
    """Each is a clear error that names the thing."""

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"target": "tip"}, SchemaMismatchError, "has no column tip; it has trip_id"),
            ({"estimator": "sklearn.ensemble.Forest"}, ValueError, "has no 'Forest'"),
            ({"estimator": "no_such_module:make"}, ValueError, "can't be imported"),
            ({"estimator_params": {"max_iterations": 3}}, ValueError, "does not take these params"),
            ({"window": {"start": "2030-01-01", "end": "2030-02-01"}}, InsufficientDataError, "has no rows"),
            ({"window": {"start": "2018-08-01", "end": "2018-07-01"}}, ValueError, "end must be after start"),
            ({"holdout_share": 0.9}, ValueError, "must be in"),
            ({"metric": "brilliance"}, ValueError, "no metric named 'brilliance'; built in: mae"),
            ({"dataset": "/nowhere/table"}, DatasetNotFoundError, "no Delta table at /nowhere/table"),
        ],
    )
    def test_train(self, loop: Loop, change: dict, error: type[Exception], words: str) -> None:
        with pytest.raises(error, match=words.replace("(", r"\(")):
            run_step("train", loop.specs["train"] | {"experiment": "bad input"} | change, loop.services)

    def test_a_failed_training_leaves_no_running_run(self, loop: Loop) -> None:
        from airflow_mlops.integrations.mlflow import Registry

        registry = Registry.connect(loop.services)
        experiment = registry.experiment_id("bad input")
        assert registry.client.search_runs([experiment], "attributes.status = 'RUNNING'") == []
        assert registry.client.search_runs([experiment], "attributes.status = 'FINISHED'") == []

    def test_a_model_or_alias_that_is_not_there(self, loop: Loop) -> None:
        with pytest.raises(ModelVersionNotFoundError, match="model 'nobody' alias 'champion'"):
            run_step("deploy", {"model_name": "nobody"}, loop.services)

    def test_a_window_nobody_asked_about(self, loop: Loop) -> None:
        spec = loop.specs["performance"] | {"window": {"start": "2020-01-01", "end": "2020-02-01"}}
        with pytest.raises(InsufficientDataError, match="nothing was predicted"):
            run_step("performance", spec, loop.services)

    def test_a_window_without_labels(self, loop: Loop, tmp_path: Path) -> None:
        table = str(tmp_path / "labels")
        delta.replace_window(
            table, pl.DataFrame({stream.ID: ["other"], stream.TARGET: [1.0]}), time_column=None, window=None
        )
        result = run_step("performance", loop.specs["performance"] | {"labels": table}, loop.services)
        assert (result["measured"], result["awaits_labels"]) == (False, True)
        assert "do labels and predictions not share their ids?" in result["reason"]

    @pytest.mark.parametrize("change", [{"target": "tip"}, {"id_column": "ride"}])
    def test_labels_without_the_column(self, loop: Loop, change: dict) -> None:
        (name,) = change.values()
        with pytest.raises(SchemaMismatchError, match=f"{loop.table} has no column {name}; it has trip_id"):
            run_step("performance", loop.specs["performance"] | change, loop.services)

    def test_mlflow_that_does_not_answer(self, loop: Loop) -> None:
        nowhere = replace(loop.services, tracking_uri="http://127.0.0.1:9")
        with pytest.raises(
            RegistryUnavailableError, match=r"MLflow at http://127\.0\.0\.1:9 does not answer"
        ):
            run_step("deploy", {"model_name": loop.model_name}, nowhere)

    def test_a_service_that_is_not_configured(self, loop: Loop) -> None:
        with pytest.raises(ConnectionConfigError, match="export AIRFLOW_MLOPS_TRACKING_URI"):
            run_step("deploy", {"model_name": loop.model_name}, replace(loop.services, tracking_uri=None))

    def test_a_source_that_is_not_there(self, loop: Loop, tmp_path: Path) -> None:
        spec = loop.specs["ingest"] | {"source": str(tmp_path / "*.parquet")}
        with pytest.raises(DatasetNotFoundError, match=r"no readable file matches"):
            run_step("ingest", spec, loop.services)

    def test_a_column_of_another_type(self, loop: Loop, tmp_path: Path) -> None:
        loop.trips.with_columns(pl.col("hour").cast(pl.String)).write_parquet(tmp_path / "trips.parquet")
        before = delta.describe(loop.table)
        with pytest.raises(SchemaMismatchError, match="hour is String, the table has Int64"):
            run_step(
                "ingest", loop.specs["ingest"] | {"source": str(tmp_path / "trips.parquet")}, loop.services
            )
        assert delta.describe(loop.table) == before

    def test_ids_that_repeat(self, loop: Loop, tmp_path: Path) -> None:
        pl.concat([loop.trips, loop.trips]).write_parquet(tmp_path / "trips.parquet")
        with pytest.raises(SchemaMismatchError, match=r"id column 'trip_id' has \d+ repeated values"):
            run_step(
                "ingest", loop.specs["ingest"] | {"source": str(tmp_path / "trips.parquet")}, loop.services
            )

    def test_a_spec_that_does_not_fit(self, loop: Loop) -> None:
        with pytest.raises(ValueError, match="TrainSpec: target: Field required"):
            run_step(
                "train",
                {key: value for key, value in loop.specs["train"].items() if key != "target"},
                loop.services,
            )


class TestSensorsOnRealServers:
    """The polls behind the sensors, asked of the servers the chain ran on."""

    @pytest.fixture(autouse=True)
    def connections(self, loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
        host, port = str(loop.services.tracking_uri).removeprefix("http://").split(":")
        mlflow = {"conn_type": "mlflow", "host": host, "port": int(port), "schema": "http"}
        bentoml = {
            "conn_type": "bentoml",
            "host": "127.0.0.1",
            "port": loop.port,
            "extra": {"serving_dir": loop.services.serving_dir},
        }
        monkeypatch.setenv("AIRFLOW_CONN_MLFLOW_DEFAULT", json.dumps(mlflow))
        monkeypatch.setenv("AIRFLOW_CONN_BENTOML_DEFAULT", json.dumps(bentoml))

    def test_model_version(self, loop: Loop) -> None:
        found = {"model_name": loop.model_name, "alias": "champion", "mlflow_conn_id": "mlflow_default"}
        assert polls.model_version(**found, not_version=None)["model_version"] == "1"
        assert polls.model_version(**found, not_version="1") is None
        for missing in ({"model_name": "nobody"}, {"alias": "nobody"}):
            assert polls.model_version(**found | missing, not_version=None) is None

    def test_endpoint(self, loop: Loop) -> None:
        found = {"model_name": loop.model_name, "bentoml_conn_id": "bentoml_default"}
        assert polls.endpoint_ready(**found, model_version="1")["model_version"] == "1"
        assert polls.endpoint_ready(**found, model_version="2") is None

    def test_labels(self, loop: Loop) -> None:
        asked = {
            "model_name": loop.model_name,
            "labels": loop.table,
            "id_column": stream.ID,
            "target": stream.TARGET,
        }
        window = {
            "window_start": NEXT["start"],
            "window_end": NEXT["end"],
            "bentoml_conn_id": "bentoml_default",
        }
        assert polls.labels_arrived(**asked, **window, minimum_labelled_share=1.0)["labelled_share"] == 1.0

    def test_hooks_answer_when_tested(self) -> None:
        assert MLflowHook().test_connection() == (True, "MLflow answers")
        assert BentoMLHook().test_connection()[0]


class TestStorage:
    """A disk that refuses: a clear error, and what was there stays."""

    ROWS = pl.DataFrame(
        {"id": [str(index) for index in range(50_000)], "x": np.random.default_rng(0).random(50_000)}
    )

    def test_a_folder_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(
            StorageError, match=r"could not write .*file/table.*check free space and write permission"
        ):
            delta.replace_window(str(tmp_path / "file" / "table"), self.ROWS, time_column=None, window=None)

    def test_a_full_disk_leaves_the_old_version(self, tmp_path: Path) -> None:
        with small_disk(tmp_path):
            table = str(tmp_path / "table")
            delta.replace_window(table, self.ROWS.head(10), time_column=None, window=None)
            before = delta.describe(table)
            with pytest.raises(StorageError, match="previous version is untouched"):
                delta.replace_window(table, self.ROWS, time_column=None, window=None)
            assert delta.describe(table) == before
