"""Evaluation on real streams and a real MLflow server: what decides, what is reported, and who is turned away."""

from __future__ import annotations

import json
import os
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
from sklearn import metrics as oracle

from airflow_mlops.core.codec import to_dict
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import (
    ArtifactIntegrityError,
    InsufficientDataError,
    PromotionRejectedError,
    SchemaMismatchError,
)
from airflow_mlops.integrations import delta
from airflow_mlops.integrations.mlflow import Registry
from airflow_mlops.operators.evaluate import EvaluateModelOperator
from airflow_mlops.operators.promotion import PromoteModelOperator
from airflow_mlops.operators.register import RegisterModelOperator
from airflow_mlops.services import Services
from airflow_mlops.serving.model import load_model
from airflow_mlops.steps.base import run_step
from airflow_mlops.steps.common import model_columns

pytestmark = pytest.mark.integration

INPUTS = ["nswprice", "nswdemand", "vicprice", "vicdemand", "transfer", "period"]


@pytest.fixture
def services(mlflow_server: str, tmp_path: Path) -> Services:
    return Services(tracking_uri=mlflow_server, ledger_url=f"sqlite:///{tmp_path / 'ledger.db'}")


@pytest.fixture(scope="module")
def electricity(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, pl.DataFrame]:
    """Half-hourly prices, up or down; the last 12,000 half hours."""
    frame = pl.read_parquet(shared_data / "elec2.parquet").tail(12_000)
    frame = frame.with_columns(
        pl.col("timestamp").dt.replace_time_zone("UTC").dt.cast_time_unit("us"),
        pl.when(pl.col("day_of_week") > 5).then(pl.lit("weekend")).otherwise(pl.lit("weekday")).alias("week"),
    )
    uri = str(tmp_path_factory.mktemp("tables") / "electricity")
    delta.replace_window(uri, frame, time_column="timestamp", window=window_of(frame, "timestamp"))
    return uri, frame


def window_of(frame: pl.DataFrame, time: str) -> Window:
    times = frame[time].dt.convert_time_zone("UTC")
    first, last = times.min(), times.max()
    assert isinstance(first, datetime)
    assert isinstance(last, datetime)
    return Window(start=first, end=last + timedelta(seconds=1))


def train(services: Services, table: str, name: str, **more: Any) -> dict[str, Any]:
    return run_step(
        "train",
        {
            "dataset": table,
            "model_name": name,
            "estimator": "sklearn.ensemble.HistGradientBoostingClassifier",
            "estimator_params": {"max_iter": 60},
            "target": "target",
            "numeric": INPUTS,
            "time_column": "timestamp",
            "metric": "log_loss",
            **more,
        },
        services,
    )


def evaluate(services: Services, training: dict[str, Any], **more: Any) -> dict[str, Any]:
    return run_step(
        "evaluate",
        {
            "dataset": training["dataset"],
            "model_name": training["model_name"],
            "run_id": training["run_id"],
            "window": training["holdout"],
            "time_column": training["dataset"]["time_column"],
            "metric": training["metric"],
            **more,
        },
        services,
    )


def crown(services: Services, training: dict[str, Any], *, expected: str | None = None) -> None:
    version = run_step(
        "register",
        {key: training[key] for key in ("model_name", "run_id", "package_digest", "model_id")},
        services,
    )
    promotion = {
        "model_name": training["model_name"],
        "model_version": version["model_version"],
        "expected_version": expected,
        "actor": "test",
        "now": datetime.now(UTC).isoformat(),
    }
    run_step("promote", promotion, services)


def outcomes(result: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["outcome"] for check in result["checks"]}


def test_a_classifier_on_a_real_stream(
    electricity: tuple[str, pl.DataFrame], services: Services, tmp_path: Path
) -> None:
    table, frame = electricity
    weak = train(services, table, "electricity", numeric=["nswprice"], estimator_params={"max_iter": 3})
    first = evaluate(services, weak)
    assert first["verdict"] == "promote", first["reason"]
    assert first["reason"].startswith("first model: LOG_LOSS ")
    crown(services, weak)
    strong = train(services, table, "electricity")
    second = evaluate(services, strong, groups=["week"])
    assert second["verdict"] == "promote", second["checks"]
    assert outcomes(second) == dict.fromkeys(
        ["champion", "baseline", "slices", "groups by week", "artifact"], "pass"
    )
    assert second["slices"]["looked_at"] > 50
    assert {group["group"] for group in second["groups"][0]["groups"]} == {"weekday", "weekend"}

    # Every number, computed again without any of the code that is tested.
    registry = Registry.connect(services)
    model = load_model(registry.download_package(strong["run_id"], tmp_path))
    held_out = frame.filter(
        pl.col("timestamp").is_between(
            datetime.fromisoformat(strong["holdout"]["start"]),
            datetime.fromisoformat(strong["holdout"]["end"]),
            closed="left",
        )
    )
    truth = held_out["target"].to_numpy()
    columns = model_columns(held_out, model.manifest.signature)
    assert model.probabilities is not None
    up = model.probabilities(columns)[:, 1]
    label = np.array(model.predict_columns(columns)).astype(int)
    expected = {
        "log_loss": oracle.log_loss(truth, up),
        "accuracy": oracle.accuracy_score(truth, label),
        "balanced_accuracy": oracle.balanced_accuracy_score(truth, label),
        "precision": oracle.precision_score(truth, label),
        "recall": oracle.recall_score(truth, label),
        "f1": oracle.f1_score(truth, label),
        "roc_auc": oracle.roc_auc_score(truth, up),
        "pr_auc": oracle.average_precision_score(truth, up),
        "brier": oracle.brier_score_loss(truth, up),
    }
    report = second["report"]
    measured = {item["metric"]: item for item in [report["deciding"], *report["others"]]}
    assert set(measured) == {*expected, "calibration_error"}
    assert {name: measured[name]["challenger"]["value"] for name in expected} == pytest.approx(expected)
    assert all(
        item["challenger"]["low"] < item["challenger"]["value"] < item["challenger"]["high"]
        for name, item in measured.items()
        if name != "calibration_error"  # resampling adds noise to every bin, so it is biased upwards
    )
    guess = measured["log_loss"]["baselines"]["a simple guess"]["value"]["value"]
    share = first["report"]["deciding"]["baselines"]["a simple guess"]["value"]["value"]
    assert guess == pytest.approx(share)
    assert 0.6 < guess < 0.75  # of a coin: 0.693

    # And on the run, for people.
    run = registry.client.get_run(strong["run_id"])
    assert run.data.metrics["evaluation_roc_auc"] == pytest.approx(expected["roc_auc"])
    assert run.data.metrics["artifact_p99_milliseconds"] < 100
    assert run.data.tags["airflow_mlops.verdict"] == "promote"
    page = Path(
        registry.client.download_artifacts(strong["run_id"], "evaluation/evaluation.html", str(tmp_path))
    )
    assert "Groups of week" in page.read_text()
    stored = Path(
        registry.client.download_artifacts(strong["run_id"], "evaluation/evaluation.json", str(tmp_path))
    )
    assert json.loads(stored.read_text()) == second


def test_the_same_model_again_is_no_improvement(
    electricity: tuple[str, pl.DataFrame], services: Services
) -> None:
    table, _ = electricity
    champion = train(services, table, "electricity_again")
    crown(services, champion)
    again = evaluate(
        services, train(services, table, "electricity_again", seed=7, estimator_params={"max_iter": 61})
    )
    assert again["verdict"] == "reject"
    assert outcomes(again)["champion"] == "fail"


def test_better_on_the_whole_and_worse_somewhere(services: Services, tmp_path: Path) -> None:
    """The new model does not know one of the shops, where the old one was right."""
    random, count = np.random.default_rng(0), 8_000
    times = [datetime(2024, 1, 1, tzinfo=UTC) + timedelta(minutes=place) for place in range(count)]
    shop = random.choice(np.array(["a", "b", "c"]), count, p=[0.4, 0.4, 0.2])
    level = np.select([shop == "a", shop == "b"], [10.0, 20.0], 30.0)
    price = random.uniform(0, 10, count)
    frame = pl.DataFrame(
        {"t": times, "shop": shop, "price": price, "sold": level + 2.0 * price + random.normal(0, 0.5, count)}
    )
    frame = frame.with_columns(
        pl.when(pl.col("shop") == "c").then(pl.lit("b")).otherwise(pl.col("shop")).alias("region"),
    )
    table = str(tmp_path / "shops")
    delta.replace_window(table, frame, time_column="t", window=window_of(frame, "t"))
    common: dict[str, Any] = {
        "estimator": "sklearn.linear_model.LinearRegression",
        "estimator_params": {},
        "target": "sold",
        "time_column": "t",
        "metric": "mae",
    }
    old = train(services, table, "shops", numeric=[], categorical=["shop"], **common)
    crown(services, old)
    new = train(services, table, "shops", numeric=["price"], categorical=["region"], **common)
    result = evaluate(services, new, slices=["shop"])
    assert outcomes(result)["champion"] == "pass"
    assert outcomes(result)["slices"] == "fail"
    assert result["verdict"] == "reject"
    assert result["reason"].startswith("worse than the champion where shop c: mae ")
    assert evaluate(services, new, slices=[])["verdict"] == "promote"
    tolerant = evaluate(services, new, slices=["shop"], slice_policy={"maximum_regression": 50.0})
    assert tolerant["verdict"] == "promote"
    by_time = evaluate(services, new, slices=["t"])["slices"]
    assert by_time["looked_at"] == 5
    assert re.fullmatch(r"2024-01-0\d \d\d:\d\d to 2024-01-0\d \d\d:\d\d", by_time["worst"][0]["where"]["t"])


def test_a_time_series_has_to_beat_the_value_before(
    shared_data: Path, services: Services, tmp_path: Path
) -> None:
    """Bicycles per hour: a model of the weather alone beats any constant, and not the hour before."""
    frame = pl.read_parquet(shared_data / "bike_sharing.parquet").with_columns(
        pl.col("timestamp").dt.replace_time_zone("UTC").dt.cast_time_unit("us"), pl.col("cnt").cast(float)
    )
    table = str(tmp_path / "bikes")
    delta.replace_window(table, frame, time_column="timestamp", window=window_of(frame, "timestamp"))
    weather = train(
        services,
        table,
        "bikes",
        estimator="sklearn.ensemble.HistGradientBoostingRegressor",
        target="cnt",
        numeric=["temp", "hum", "windspeed"],
        metric="mae",
    )
    assert evaluate(services, weather)["verdict"] == "promote"
    result = evaluate(services, weather, last_value=True)
    assert result["verdict"] == "reject"
    assert "for the value before" in result["reason"]
    held_out = frame.filter(pl.col("timestamp") >= datetime.fromisoformat(weather["holdout"]["start"]))
    steps = held_out["cnt"].diff().abs().drop_nulls()
    measured = result["report"]["deciding"]["baselines"]["the value before"]["value"]["value"]
    assert measured == pytest.approx(steps.mean(), rel=0.01)


def test_labels_that_stay_are_a_guess_to_beat_by_any_metric(services: Services, tmp_path: Path) -> None:
    """The row before knows nearly all, the model little: also where the metric needs probabilities."""
    random, count = np.random.default_rng(1), 2_000
    times = [datetime(2024, 1, 1, tzinfo=UTC) + timedelta(minutes=place) for place in range(count)]
    label = np.repeat(random.random(count // 20) > 0.5, 20)
    frame = pl.DataFrame(
        {
            "timestamp": times,
            "x": label + random.normal(0, 1.2, count),
            "y": np.where(label, "yes", "no"),
            "code": [1.0, float("nan"), None, 1.0] * (count // 4),
        }
    )
    table = str(tmp_path / "sticky")
    delta.replace_window(table, frame, time_column="timestamp", window=window_of(frame, "timestamp"))
    training = train(
        services,
        table,
        "sticky",
        estimator="sklearn.linear_model.LogisticRegression",
        estimator_params={},
        target="y",
        numeric=["x"],
    )
    for metric in ("log_loss", "brier", "roc_auc", "accuracy"):
        result = evaluate(services, training, metric=metric, last_value=True)
        assert set(result["report"]["deciding"]["baselines"]) == {"a simple guess", "the value before"}
        assert result["verdict"] == "reject", metric
        assert "for the value before" in result["reason"]
    policy = {"minimum_group_rows": 200}
    (grouped,) = evaluate(services, training, metric="accuracy", groups=["code"], policy=policy)["groups"]
    # Null and not a number are both missing.
    counts = {(group["group"], group["row_count"]) for group in grouped["groups"]}
    assert counts == {("(empty)", 200), ("1.0", 200)}
    assert grouped["minimum_rows"] == 200


@pytest.mark.parametrize("decides", ["rmse", "quantile_loss@0.9", "f1"])
def test_a_model_that_knows_nothing_is_no_first_model_by_any_metric(
    services: Services, tmp_path: Path, decides: str
) -> None:
    """The training's own constant is not the best one by another metric, so a model could beat it without knowing a thing."""
    random, count = np.random.default_rng(0), 3_000
    labels = decides == "f1"
    numbers = np.exp(random.normal(size=count))
    frame = pl.DataFrame(
        {
            "t": [datetime(2024, 1, 1, tzinfo=UTC) + timedelta(minutes=place) for place in range(count)],
            "x": random.normal(size=count),
            "y": (numbers > 2.0).astype(int) if labels else numbers,
        }
    )
    table = str(tmp_path / "noise")
    delta.replace_window(table, frame, time_column="t", window=window_of(frame, "t"))
    training = train(
        services,
        table,
        f"noise_{decides.partition('@')[0]}",
        estimator=f"sklearn.dummy.{'DummyClassifier' if labels else 'DummyRegressor'}",
        estimator_params={
            "rmse": {"strategy": "mean"},
            "quantile_loss@0.9": {"strategy": "quantile", "quantile": 0.9},
        }.get(decides, {"strategy": "constant", "constant": 1}),
        metric="accuracy" if labels else "mae",
        target="y",
        numeric=["x"],
        time_column="t",
    )
    result = evaluate(services, training, metric=decides)
    assert outcomes(result)["baseline"] == "fail", result["reason"]
    if labels:
        with pytest.raises(ValueError, match=r"recall can't decide between two labels: .* Choose f1"):
            evaluate(services, training, metric="recall")


def test_an_explanation_leaves_rows_without_a_label_out(services: Services, tmp_path: Path) -> None:
    random, count = np.random.default_rng(0), 1_000
    times = [datetime(2024, 1, 1, tzinfo=UTC) + timedelta(minutes=place) for place in range(count)]
    x = random.normal(size=count)
    frame = pl.DataFrame({"timestamp": times, "x": x, "y": 2.0 * x})
    table = str(tmp_path / "unlabelled")
    delta.replace_window(table, frame, time_column="timestamp", window=window_of(frame, "timestamp"))
    training = train(
        services,
        table,
        "unlabelled",
        estimator="sklearn.linear_model.LinearRegression",
        estimator_params={},
        target="y",
        numeric=["x"],
        metric="mae",
    )
    partly = frame.with_columns(
        y=pl.when(pl.int_range(pl.len()) % 2 == 0).then(float("nan")).otherwise(pl.col("y"))
    )
    delta.replace_window(table, partly, time_column="timestamp", window=window_of(frame, "timestamp"))
    spec = {
        "dataset": table,
        "model_name": "unlabelled",
        "run_id": training["run_id"],
        "window": training["holdout"],
        "time_column": "timestamp",
        "explained_rows": 5,
    }
    assert run_step("explain", spec, services)["row_count"] == 100
    with pytest.raises(ValueError, match="explained_label is 'yes', and the model answers numbers"):
        run_step("explain", spec | {"explained_label": "yes"}, services)
    with pytest.raises(ValueError, match="explained_rows is 0: give at least 1"):
        run_step("explain", spec | {"explained_rows": 0}, services)
    delta.replace_window(
        table,
        frame.with_columns(y=pl.lit(None, dtype=pl.Float64)),
        time_column="timestamp",
        window=window_of(frame, "timestamp"),
    )
    with pytest.raises(
        InsufficientDataError, match=r"none of the 200 rows .* in .*2024.* has a 'y': wait for the labels"
    ):
        run_step("explain", spec, services)


def test_the_rival_is_the_champion_of_the_ledger(
    electricity: tuple[str, pl.DataFrame], services: Services
) -> None:
    """A promotion whose process died between the ledger and MLflow is completed before anything is compared."""
    first = train(services, electricity[0], "electricity_cut_short")
    crown(services, first)
    second = train(
        services, electricity[0], "electricity_cut_short", seed=1, estimator_params={"max_iter": 5}
    )
    crown(services, second, expected="1")
    registry = Registry.connect(services)
    registry.set_alias("electricity_cut_short", "champion", "1")
    assert evaluate(services, first)["champion_version"] == "2"
    assert registry.version_by_alias("electricity_cut_short", "champion").model_version == "2"


def test_rows_a_champion_has_learned_by_heart_prove_nothing(
    electricity: tuple[str, pl.DataFrame], services: Services
) -> None:
    """A champion trained until later: only what came after its training is judged, or nothing if nothing did."""
    table, frame = electricity
    whole = window_of(frame, "timestamp")
    until = whole.start + 0.85 * (whole.end - whole.start)
    early = {"start": whole.start.isoformat(), "end": until.isoformat()}
    challenger = train(services, table, "electricity_heart", window=early)
    champion = train(services, table, "electricity_heart", holdout_share=0.12)
    crown(services, champion)
    later = {"start": challenger["holdout"]["start"], "end": whole.end.isoformat()}
    result = evaluate(services, challenger, window=later)
    assert result["window"]["start"] == champion["holdout"]["start"] > challenger["holdout"]["start"]
    with pytest.raises(
        InsufficientDataError, match=r"the champion was trained on rows until .* judge on later rows"
    ):
        evaluate(services, challenger)


def test_rows_are_told_apart_by_the_column_the_model_was_trained_by(
    services: Services, tmp_path: Path
) -> None:
    """Rows arrive in another order than they happened, and nobody can tell what they are: one neighbor knows those it has seen."""
    chance, count = np.random.default_rng(0), 600
    arrived = [datetime(2024, 1, 1, tzinfo=UTC) + timedelta(hours=hour) for hour in range(count)]
    event = [arrived[place] - timedelta(days=3) for place in chance.permutation(count)]
    noise = {"x": chance.normal(size=count), "y": chance.normal(size=count)}
    frame = pl.DataFrame(
        {"arrived": arrived, "event": event, "night": [hour % 2 == 0 for hour in range(count)], **noise}
    )
    table = str(tmp_path / "table")
    delta.replace_window(table, frame, time_column="arrived", window=None)
    ingested = to_dict(delta.describe(table, time_column="arrived"))
    asked = {"estimator": "sklearn.neighbors.KNeighborsRegressor", "estimator_params": {"n_neighbors": 1}, "metric": "mae",
             "target": "y", "numeric": ["x", "night"], "time_column": "event", "rows": "all",
             "window": {"start": "2023-01-01", "end": "2025-01-01"}}  # fmt: skip
    training = run_step("train", {"dataset": ingested, "model_name": "two times", **asked}, services)
    assert training["training_rows"] + training["holdout_rows"] == count
    assert training["dataset"]["time_column"] == "event"
    operator = EvaluateModelOperator(task_id="evaluate", training=training)
    result = run_step("evaluate", operator.build_spec(task_context()), services)
    assert result["verdict"] == "reject"
    assert result["report"]["deciding"]["challenger"]["value"] == pytest.approx(training["metric_value"])
    with pytest.raises(
        SchemaMismatchError, match=r"challenger of two times .* in 'event'.*'arrived'.*Evaluate by 'event'"
    ):
        evaluate(services, training, time_column="arrived")
    crown(services, training)
    other = run_step(
        "train", {"dataset": ingested, "model_name": "two times", **asked, "time_column": "arrived"}, services
    )
    with pytest.raises(SchemaMismatchError, match=r"champion of two times .* in 'event'.*by hand"):
        evaluate(services, other)


def test_labels_that_are_not_there_yet(services: Services, tmp_path: Path) -> None:
    times = [datetime(2024, 1, 1, tzinfo=UTC) + timedelta(minutes=place) for place in range(600)]
    x = np.random.default_rng(0).normal(size=600)
    frame = pl.DataFrame({"timestamp": times, "x": x, "y": 2.0 * x})
    table = str(tmp_path / "late")
    delta.replace_window(table, frame, time_column="timestamp", window=window_of(frame, "timestamp"))
    training = train(
        services,
        table,
        "late",
        estimator="sklearn.linear_model.LinearRegression",
        estimator_params={},
        target="y",
        numeric=["x"],
        metric="mae",
    )
    empty = frame.with_columns(y=pl.lit(None, dtype=pl.Float64))
    delta.replace_window(table, empty, time_column="timestamp", window=window_of(frame, "timestamp"))
    with pytest.raises(
        InsufficientDataError, match=r"none of the 120 rows .* has a 'y': wait for the labels"
    ):
        evaluate(services, training, dataset=table)


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"memory_mb": 10}, r"the packaged model takes \d+ MB of memory \(limit 10\)"),
        ({"cold_start_seconds": 0.001}, r"s to the first answer \(limit 0.001\)"),
        ({"size_mb": 0.001}, r"MB on disk \(limit 0.001\)"),
    ],
)
def test_a_model_that_costs_too_much(
    electricity: tuple[str, pl.DataFrame], services: Services, limits: dict[str, float], reason: str
) -> None:
    training = train(services, electricity[0], "electricity_costs")
    result = evaluate(services, training, artifact_limits=limits)
    assert result["verdict"] == "reject"
    assert re.search(reason, result["reason"]), result["reason"]


def test_a_model_that_only_loads_where_it_was_made(
    electricity: tuple[str, pl.DataFrame],
    services: Services,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its class is on this process' path alone; a service would not find it."""
    (tmp_path / "homemade.py").write_text(
        "from sklearn.linear_model import LogisticRegression\nclass Homemade(LogisticRegression):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("AIRFLOW_MLOPS_TRUSTED_TYPES", "homemade.Homemade")
    training = train(
        services, electricity[0], "electricity_homemade", estimator="homemade.Homemade", estimator_params={}
    )
    assert training["serving_form"] == "sklearn"
    result = evaluate(services, training)
    assert result["verdict"] == "reject"
    assert "could not be used in a new process" in result["reason"]
    assert re.search("homemade.*name its folder in PYTHONPATH", result["reason"]), result["reason"]
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    )
    assert outcomes(evaluate(services, training))["artifact"] == "pass"


def test_a_champion_of_another_kind_is_named(
    electricity: tuple[str, pl.DataFrame], services: Services
) -> None:
    crown(services, train(services, electricity[0], "electricity_kinds"))
    number = train(
        services,
        electricity[0],
        "electricity_kinds",
        estimator="sklearn.linear_model.LinearRegression",
        estimator_params={},
        target="nswprice",
        numeric=["nswdemand"],
        metric="mae",
    )
    with pytest.raises(
        SchemaMismatchError, match="the challenger is a regression and the champion a classification"
    ):
        evaluate(services, number)


def test_an_input_of_the_champion_that_is_gone_is_named(
    electricity: tuple[str, pl.DataFrame], services: Services, tmp_path: Path
) -> None:
    name = "electricity_lost"
    plain = {"estimator": "sklearn.linear_model.LogisticRegression", "estimator_params": {}}
    crown(services, train(services, electricity[0], name, numeric=["nswdemand", "transfer"], **plain))
    narrower = str(tmp_path / "narrower")
    rows = electricity[1].drop("transfer")
    delta.replace_window(narrower, rows, time_column="timestamp", window=None)
    challenger = train(services, narrower, name, numeric=["nswdemand"], **plain)
    with pytest.raises(
        SchemaMismatchError,
        match=r"the champion of electricity_lost reads transfer, which .* bring the column back",
    ):
        evaluate(services, challenger)
    other = str(tmp_path / "other")
    rows = electricity[1].with_columns(pl.format("about {}", "transfer").alias("transfer"))
    delta.replace_window(other, rows, time_column="timestamp", window=None)
    challenger = train(services, other, name, numeric=["nswdemand"], **plain)
    with pytest.raises(
        SchemaMismatchError,
        match=r"'transfer' holds String.*the champion of electricity_lost that does.*former type back",
    ):
        evaluate(services, challenger)


def test_a_model_of_all_rows_is_held_against_the_champion_by_its_twin(
    electricity: tuple[str, pl.DataFrame], services: Services
) -> None:
    table, frame = electricity
    before = {"end": frame["timestamp"][6000].isoformat(), "start": frame["timestamp"][0].isoformat()}
    crown(services, train(services, table, "twin", window=before))
    alone = train(services, table, "twin", holdout_share=0.1)
    whole = train(services, table, "twin", holdout_share=0.1, refit=True, keep_twin=True, recipe="all")
    assert whole["twin_digest"] not in {None, whole["package_digest"]}
    assert (alone["twin_digest"], whole["metric_value"]) == (None, alone["metric_value"])
    assert whole["training_rows"] == alone["training_rows"] + alone["holdout_rows"]
    with pytest.raises(InsufficientDataError, match="challenger was trained on rows until"):
        evaluate(services, whole)
    told = evaluate(services, whole, twin_digest=whole["twin_digest"])
    expected = evaluate(services, alone)
    # The twin is the model that has not seen the rows: every number is that model's.
    assert told["report"] == expected["report"]
    assert (told["verdict"], told["run_id"]) == (expected["verdict"], whole["run_id"])
    assert (told["measured"], expected["measured"]) == ("twin", "model")
    with pytest.raises(ArtifactIntegrityError):
        evaluate(services, whole, twin_digest=whole["package_digest"])


def test_through_the_operators_a_challenger_takes_the_place_of_the_shadow(
    electricity: tuple[str, pl.DataFrame], services: Services
) -> None:
    """What is champion is another version, which it is not held against and which stays."""
    table, _ = electricity
    name, context = "electricity_shadow", task_context()
    crown(services, train(services, table, name))
    weak = train(services, table, name, numeric=["nswprice"], estimator_params={"max_iter": 3})
    shadow = RegisterModelOperator(task_id="shadow", training=weak, alias="shadow")
    run_step("register", shadow.build_spec(context), services)

    strong = train(services, table, name, estimator_params={"max_iter": 40})
    told = {
        alias: run_step(
            "evaluate",
            EvaluateModelOperator(
                task_id="evaluate", training=strong, champion_alias=alias, slices=[]
            ).build_spec(context),
            services,
        )
        for alias in ("champion", "shadow")
    }
    found = {alias: (one["champion_alias"], one["champion_version"]) for alias, one in told.items()}
    assert found == {"champion": ("champion", "1"), "shadow": ("shadow", "2")}
    register = RegisterModelOperator(
        task_id="register", training=strong, evaluation=told["shadow"], alias=None
    )
    version = run_step("register", register.build_spec(context), services)

    def promoting(evaluation: dict[str, Any]) -> PromoteModelOperator:
        return PromoteModelOperator(
            task_id="promote", model_name=name, model_version=version, evaluation=evaluation, alias="shadow"
        )

    with pytest.raises(PromotionRejectedError, match=r"compared with the champion .*champion_alias='shadow'"):
        promoting(told["champion"]).build_spec(context)
    assert run_step("promote", promoting(told["shadow"]).build_spec(context), services)["moved"]
    assert Registry.connect(services).aliases(name) == {"champion": "1", "challenger": "1", "shadow": "3"}


def task_context() -> Any:
    return {"ti": SimpleNamespace(dag_id="dag", run_id="run", task_id="task", map_index=-1)}
