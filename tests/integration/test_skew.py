"""What a service was asked against the contract of the training: quiet where nothing is wrong, and each kind of skew by name."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pytest
from airflow.sdk import Asset

from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import DataQualityError, InsufficientDataError, SchemaMismatchError
from airflow_mlops.integrations import delta
from airflow_mlops.integrations.mlflow import Registry
from airflow_mlops.ledger import EntryKind, Ledger
from airflow_mlops.operators.check_skew import CheckSkewOperator
from airflow_mlops.services import Services
from airflow_mlops.serving.inference_log import InferenceLog
from airflow_mlops.serving.log_settings import LogSettings
from airflow_mlops.steps.base import run_step
from airflow_mlops.steps.registry.packages import load_version

pytestmark = pytest.mark.integration

MODEL = "fares"
START = datetime(2024, 1, 1, tzinfo=UTC)


def trips(count: int, day: int) -> pl.DataFrame:
    """Trips of a day, with a code that is a number in the table and a category to the model."""
    random = np.random.default_rng(day)
    distance = np.round(random.uniform(0.5, 20.0, count), 2)
    return pl.DataFrame(
        {
            "id": [f"{day}-{place}" for place in range(count)],
            "t": [START + timedelta(days=day, seconds=20 * place) for place in range(count)],
            "distance": distance,
            "people": pl.Series(random.integers(1, 6, count), dtype=pl.Float64),
            "rate": random.integers(1, 4, count),
            "fare": 3.0 + 2.5 * distance,
        }
    )


SUITE = {
    "name": "trips",
    "expectations": [
        {"type": "expect_column_values_to_be_between", "kwargs": {"column": "distance", "min_value": 0, "max_value": 30}},
        {"type": "expect_column_values_to_be_in_set", "kwargs": {"column": "rate", "value_set": [1, 2, 3]}},
        {"type": "expect_column_values_to_not_be_null", "kwargs": {"column": "people", "mostly": 0.9}, "severity": "warning"},
        {"type": "expect_column_values_to_not_be_null", "kwargs": {"column": "fare"}},
        {"type": "expect_table_row_count_to_equal", "kwargs": {"value": 7}},
    ],
}  # fmt: skip


class Service(NamedTuple):
    folder: Path
    services: Services
    served: Any

    def ask(
        self,
        rows: pl.DataFrame,
        *,
        names: tuple[str, ...] = ("distance", "people", "rate"),
        settings: Any = None,
    ) -> Window:
        """Let the service's own writer log what a caller sends."""
        kinds = {item.name: item.type for item in self.served.manifest.signature.inputs}
        columns = {
            name: (rows[name].cast(pl.String) if kinds[name] == "string" else rows[name]).to_list()
            for name in names
        }
        signature = self.served.manifest.signature
        if len(names) < len(signature.inputs):
            kept = tuple(item for item in signature.inputs if item.name in names)
            signature = type(signature)(inputs=kept, output=signature.output)
        log = InferenceLog(self.folder / "serving" / "inference_log", settings=settings)
        log.append(
            model_name=MODEL, model_version="1", signature=signature, prediction_ids=rows["id"].to_list(),
            times=rows["t"].to_list(), columns=columns, predictions=[1.0] * rows.height, latency_ms=1.0,
        )  # fmt: skip
        log.flush()
        return Window(start=rows["t"].min(), end=rows["t"].max() + timedelta(seconds=1))  # type: ignore[operator,arg-type]

    def check(self, window: Window, **more: Any) -> dict[str, Any]:
        return run_step("skew", {"model_name": MODEL, "window": window, "suite": SUITE} | more, self.services)


@pytest.fixture(scope="module")
def service(mlflow_server: str, tmp_path_factory: pytest.TempPathFactory) -> Service:
    folder = tmp_path_factory.mktemp("skew")
    services = Services(
        tracking_uri=mlflow_server,
        ledger_url=f"sqlite:///{folder}/ledger.db",
        serving_dir=str(folder / "serving"),
    )
    delta.replace_window(str(folder / "rows"), trips(3000, 0), time_column="t", window=None)
    spec = {
        "dataset": str(folder / "rows"), "model_name": MODEL, "estimator": "sklearn.linear_model.LinearRegression",
        "target": "fare", "numeric": ["distance", "people"], "categorical": ["rate"], "time_column": "t", "id_column": "id",
        "metric": "mae",
    }  # fmt: skip
    trained = run_step("train", spec, services)
    spec = {"model_name": MODEL, "run_id": trained["run_id"], "package_digest": trained["package_digest"]}
    run_step("register", spec, services)
    registry = Registry.connect(services)
    registry.set_alias(MODEL, "champion", "1")
    served = load_version(registry, registry.version_by_alias(MODEL, "champion"), services)
    return Service(folder, services, served)


def failed(result: dict[str, Any]) -> set[tuple[str, str]]:
    return {
        (item["expectation"], item["kwargs"].get("column") or item["kwargs"]["column_A"])
        for item in result["failures"]
    }


class TestContract:
    def test_requests_like_the_training_pass(self, service: Service) -> None:
        result = service.check(service.ask(trips(2000, 1)))
        assert (result["success"], result["failed"], result["row_count"]) == (True, 0, 2000)
        assert result["not_judged"] == [
            "expect_column_values_to_not_be_null: about no input that is logged",
            "expect_table_row_count_to_equal: about no input that is logged",
        ]
        assert result["evaluated"] == 3 * 3 + 3  # of the package per input, and of the suite

    @pytest.mark.parametrize(
        ("day", "column", "value", "broken"),
        [
            (2, "distance", 99.0, {("expect_column_values_to_be_between", "distance")}),
            (3, "people", None, {("expect_column_values_to_not_be_null", "people")}),
            (4, "rate", 7, {("expect_column_values_to_be_in_set", "rate")}),
        ],
    )
    def test_requests_unlike_the_training(
        self, service: Service, day: int, column: str, value: Any, broken: set[tuple[str, str]]
    ) -> None:
        rows = trips(1000, day)
        some = pl.int_range(pl.len()) % 5 == 0
        rows = rows.with_columns(pl.when(some).then(pl.lit(value)).otherwise(pl.col(column)).alias(column))
        result = service.check(service.ask(rows))
        assert not result["success"]
        assert failed(result) == broken
        first = result["failures"][0]
        assert (
            200 <= first["unexpected_count"] <= 205
        )  # a longer trip than any in the training may be among the others
        assert first["row_ids"][:2] == [f"{day}-0", f"{day}-5"]

    def test_an_input_that_is_not_sent(self, service: Service) -> None:
        result = service.check(service.ask(trips(500, 5), names=("distance", "rate")))
        assert failed(result) == {("expect_column_to_exist", "people")}
        assert "expect_column_values_to_not_be_null: about no input that is logged" in result["not_judged"]

    def test_an_input_of_another_type(self, service: Service) -> None:
        """Of a version with another signature, as of a canary: the log has text where the champion takes a number."""
        rows = trips(500, 6)
        window = service.ask(rows)
        part = next((service.folder / "serving" / "inference_log" / MODEL).glob("**/part-20240107*.parquet"))
        logged = pl.read_parquet(part)
        text = (
            pl.when(pl.int_range(pl.len()) < 50)
            .then(pl.lit("far"))
            .otherwise(pl.col("feature_distance").cast(pl.String))
        )
        logged.with_columns(text.alias("feature_distance")).write_parquet(part)
        result = service.check(window)
        found = next(item for item in result["failures"] if "of_type" in item["expectation"])
        assert (found["kwargs"]["column"], found["unexpected_count"], found["examples"][0]) == (
            "distance",
            50,
            "far",
        )

    def test_an_input_the_model_does_not_take(self, service: Service) -> None:
        """Of another version, which took one more."""
        rows = trips(100, 8)
        signature = service.served.manifest.signature
        tip = type(signature.inputs[0])(name="tip", type="number")
        columns = {name: rows[name].to_list() for name in ("distance", "people")}
        log = InferenceLog(service.folder / "serving" / "inference_log")
        log.append(
            model_name=MODEL, model_version="0", signature=type(signature)(inputs=(*signature.inputs, tip), output="fare"),
            prediction_ids=[f"{one}-tip" for one in rows["id"]], times=rows["t"].to_list(), predictions=[1.0] * rows.height,
            columns={**columns, "rate": rows["rate"].cast(pl.String).to_list(), "tip": [1.0] * rows.height}, latency_ms=1.0,
        )  # fmt: skip
        log.flush()
        result = service.check(service.ask(rows))
        (found,) = result["failures"]
        assert (found["severity"], found["observed_value"]) == ("warning", ["tip"])
        assert result["success"]

    def test_inputs_the_log_hides_are_not_judged(self, service: Service) -> None:
        root = service.folder / "serving" / "inference_log"
        settings = LogSettings(drop=("people",))
        window = service.ask(trips(500, 7), settings=settings)
        (root / "settings.json").write_text(json.dumps({"drop": ["people"]}))
        try:
            result = service.check(window)
        finally:
            (root / "settings.json").unlink()
        assert result["success"]
        assert "people: the log drops or hides it" in result["not_judged"]


class TestSameRows:
    def compare(self, service: Service, day: int, served: pl.DataFrame, **more: Any) -> dict[str, Any]:
        uri = str(service.folder / f"later-{day}")
        delta.replace_window(uri, trips(1000, day), time_column=None, window=None)
        return service.check(service.ask(served), table=uri, id_column="id", **more)

    def test_the_same_values_are_no_skew(self, service: Service) -> None:
        result = self.compare(service, 10, trips(1000, 10))
        assert (result["success"], result["compared_rows"], result["differences"]) == (True, 1000, [])

    @pytest.mark.parametrize(
        ("day", "column", "changed", "pattern", "value"),
        [
            (11, "distance", pl.col("distance") / 1.609344, "factor", "0.621371"),
            (12, "people", pl.col("people") * 0.0 + 1.0, "default", "1.0"),
            (13, "distance", pl.col("distance") * 0.9 + 1.0, "none", ""),
            (14, "people", pl.when(pl.col("people") > 4).then(None).otherwise(pl.col("people")), "missing", ""),
            (15, "rate", 4 - pl.col("rate"), "none", ""),
        ],
    )  # fmt: skip
    def test_values_within_the_contract_that_differ(
        self, service: Service, day: int, column: str, changed: pl.Expr, pattern: str, value: str
    ) -> None:
        rows = trips(1000, day)
        result = self.compare(service, day, rows.with_columns(changed.alias(column)))
        assert ("expect_column_pair_values_to_be_equal", column) in failed(result)
        (found,) = result["differences"]
        assert (found["feature"], found["pattern"], found["value"]) == (column, pattern, value)
        equal = next(item for item in result["failures"] if "pair" in item["expectation"])
        assert equal["unexpected_count"] == found["different"]
        example = found["examples"][0]
        assert example["served"] != example["table"]
        assert f"{column} differs from the table in" in result["headline"]

    def test_a_few_corrected_rows_are_tolerated_when_asked_for(self, service: Service) -> None:
        few = pl.when(pl.int_range(pl.len()) < 10).then(2.0).otherwise(pl.col("distance"))
        result = self.compare(
            service, 16, trips(1000, 16).with_columns(few.alias("distance")), different_share=0.02
        )
        assert (result["success"], result["differences"][0]["different"]) == (True, 10)

    def test_rows_that_are_not_there_yet(self, service: Service) -> None:
        with pytest.raises(InsufficientDataError, match="none of the 100 predictions is in"):
            service.check(service.ask(trips(100, 17)), table=str(service.folder / "rows"), id_column="id")

    def test_rows_that_contradict_each_other(self, service: Service) -> None:
        uri, rows = str(service.folder / "twice"), trips(10, 18)
        twice = pl.concat([rows, rows.with_columns(distance=pl.col("distance") + 1)])
        delta.replace_window(uri, twice, time_column=None, window=None)
        with pytest.raises(SchemaMismatchError, match="several rows with other inputs for 10 predictions"):
            service.check(service.ask(rows), table=uri, id_column="id")

    @pytest.mark.parametrize(
        ("wrong", "said"),
        [
            ({"table": "somewhere"}, "needs both: table, and id_column"),
            ({"share": 1.0}, r"share is in \[0, 1\)"),
        ],
    )
    def test_what_makes_no_sense(self, service: Service, wrong: dict[str, Any], said: str) -> None:
        with pytest.raises(ValueError, match=said):
            service.check(Window.parse("2024-01-02", "2024-01-03"), **wrong)


@pytest.fixture
def run(service: Service, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the operator, with connections; what it put into an event is the second thing given."""
    for name, connection in {
        "MLFLOW": {"conn_type": "mlflow", "extra": {"tracking_uri": service.services.tracking_uri}},
        "BENTOML": {"conn_type": "bentoml", "host": "127.0.0.1", "port": 1, "extra": {"serving_dir": str(service.folder / "serving")}},
        "LEDGER": {"conn_type": "mlops_ledger", "extra": {"url": service.services.require("ledger_url")}},
    }.items():  # fmt: skip
        monkeypatch.setenv(f"AIRFLOW_CONN_{name}_DEFAULT", json.dumps(connection))

    def run(window: Window, action: Any, **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        asset, extra = Asset("checked"), {}
        task = CheckSkewOperator(
            task_id="skew", model_name=MODEL, suite=SUITE, action=action, outlets=[asset],
            window_start=window.start.isoformat(), window_end=window.end.isoformat(), **more,
        )  # fmt: skip
        context = {
            "ti": SimpleNamespace(dag_id="d", run_id=action, task_id="skew", try_number=1),
            "outlet_events": {asset: SimpleNamespace(extra=extra)},
        }
        return task.execute(context), extra  # type: ignore[arg-type]

    return run


def test_operator(service: Service, run: Any) -> None:
    window = service.ask(trips(200, 20).with_columns(distance=pl.lit(99.0)))
    with pytest.raises(DataQualityError, match="Correct what the service is sent") as raised:
        run(window, "gate")
    assert raised.value.evidence["failures"]
    assert not run(window, "warn")[0]["success"]
    with Ledger.open(service.services.require("ledger_url")) as opened:
        entries = opened.entries(kind=EntryKind.SKEW_CHECK, model_name=MODEL)
    assert len(entries) == 2
    assert entries[0].payload["failed"] > 0


class TestPrivateColumns:
    """A category, a number and an id that nobody else has, looked for in all that is written."""

    SECRETS = ("Canary", "98765.4", "secret-id")

    @pytest.fixture
    def window(self, service: Service) -> Window:
        rows = trips(300, 30).with_columns(id=pl.format("secret-id-{}", pl.int_range(pl.len())))
        uri = str(service.folder / "private")
        delta.replace_window(uri, rows, time_column=None, window=None)
        delta.replace_window(
            f"{uri}-text", rows.with_columns(distance=pl.lit("Canary")), time_column=None, window=None
        )
        delta.replace_window(
            f"{uri}-twice", pl.concat([rows, rows.with_columns(people=9.0)]), time_column=None, window=None
        )
        return service.ask(rows.with_columns(rate=pl.lit("Canary"), distance=pl.lit(98765.4321)))  # fmt: skip

    def test_their_values_are_nowhere(
        self,
        service: Service,
        run: Any,
        window: Window,
        caplog: pytest.LogCaptureFixture,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        caplog.set_level("DEBUG")
        more = {"table": str(service.folder / "private"), "id_column": "id"}
        private = {"private_columns": "rate, distance, id"}
        result, extra = run(window, "warn", **more, **private)
        with pytest.raises(DataQualityError) as raised:
            run(window, "gate", **more, **private)
        error = f"{raised.value}{json.dumps(raised.value.evidence)}"
        log = "".join(capfd.readouterr())  # a task's own lines go there
        assert "expectations that failed:" in log
        told = [json.dumps(result), json.dumps(extra), error, caplog.text, log]
        told += [path.read_bytes().decode("latin-1") for path in service.folder.glob("ledger.db*")]
        assert [secret for secret in self.SECRETS for one in told if secret in one] == []
        # Nor do the training's own values, which the package asks for.
        assert {name for item in result["failures"] for name in item["kwargs"]} <= {
            "column", "column_A", "column_B", "mostly",
        }  # fmt: skip
        assert [(item["feature"], item["different"]) for item in result["differences"]] == [
            ("distance", 300),
            ("rate", 300),
        ]
        assert {item["unexpected_count"] for item in result["failures"]} == {300}
        shown = json.dumps(run(window, "warn", **more)[0])
        assert all(secret in shown for secret in self.SECRETS)  # else nothing above was proven

    @pytest.mark.parametrize("table", ["private-text", "private-twice"])
    def test_errors_show_none(self, service: Service, run: Any, window: Window, table: str) -> None:
        with pytest.raises(
            SchemaMismatchError, match=r"no numbers in one of distance|several rows"
        ) as raised:
            run(window, "warn", table=str(service.folder / table), id_column="id", private_columns="id")
        assert not any(secret in str(raised.value) for secret in self.SECRETS)
        assert raised.value.__suppress_context__ or raised.value.__context__ is None

    def test_a_column_that_is_none_is_refused(self, run: Any, window: Window) -> None:
        with pytest.raises(SchemaMismatchError, match="private_columns: length is no input of fares"):
            run(window, "warn", private_columns="length")


@pytest.mark.parametrize("seed", [0, 1])
def test_halves_of_real_trips_are_no_skew(service: Service, shared_data: Path, seed: int) -> None:
    """The halves differ by chance alone: one is trained on, and the suite inferred from it; the other one is asked for."""
    numeric, categorical = ["trip_distance", "hour", "passenger_count"], ["rate_code_id", "payment_type"]
    rows = (
        pl.read_parquet(shared_data / "nyc_taxi.parquet")
        .sample(12_000, shuffle=True, seed=seed)
        .with_row_index("id")
    )
    rows = rows.select(
        pl.format("r{}", "id").alias("id"), pl.col("pickup_datetime").cast(pl.Datetime("us")).dt.replace_time_zone("UTC").alias("t"),
        "total_ex_tip", *numeric, *categorical,
    )  # fmt: skip
    trained, asked = rows.head(6000), rows.tail(6000)
    uri, model = str(service.folder / f"real-{seed}"), f"real_{seed}"
    delta.replace_window(uri, trained, time_column="t", window=None)
    delta.replace_window(f"{uri}-later", asked, time_column="t", window=None)
    suite = str(service.folder / f"suite-{seed}.json")
    run_step("infer-expectations", {"dataset": uri, "suite": suite, "exclude": ["id", "t"]}, service.services)
    spec = {
        "dataset": uri, "model_name": model, "estimator": "sklearn.linear_model.LinearRegression", "target": "total_ex_tip",
        "numeric": numeric, "categorical": categorical, "time_column": "t", "id_column": "id", "metric": "mae",
        "holdout_share": 0.1,
    }  # fmt: skip
    done = run_step("train", spec, service.services)
    spec = {"model_name": model, "run_id": done["run_id"], "package_digest": done["package_digest"]}
    run_step("register", spec, service.services)
    registry = Registry.connect(service.services)
    registry.set_alias(model, "champion", "1")
    served = load_version(registry, registry.version_by_alias(model, "champion"), service.services)
    log = InferenceLog(service.folder / "serving" / "inference_log")
    columns = {name: asked[name].to_list() for name in numeric} | {
        name: asked[name].cast(pl.String).to_list() for name in categorical
    }
    log.append(
        model_name=model, model_version="1", signature=served.manifest.signature, prediction_ids=asked["id"].to_list(),
        times=asked["t"].to_list(), columns=columns, predictions=[1.0] * asked.height, latency_ms=1.0,
    )  # fmt: skip
    log.flush()
    spec = {
        "model_name": model, "window": Window.parse("2018-01-01", "2022-01-01"), "suite": suite, "table": f"{uri}-later",
        "id_column": "id",
    }  # fmt: skip
    result = run_step("skew", spec, service.services)
    assert result["success"], result["failures"]
    assert (result["row_count"], result["compared_rows"], result["differences"]) == (6000, 6000, [])
    assert result["evaluated"] > 25
