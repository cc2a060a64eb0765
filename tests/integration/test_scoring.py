"""Batch scoring for real: killed and gone on with, the same answers as the service's, in any form of model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from airflow_mlops.core.windows import Window
from airflow_mlops.demo import stream
from airflow_mlops.exceptions import InsufficientDataError, SchemaMismatchError, SignatureMismatchError
from airflow_mlops.integrations import delta
from airflow_mlops.integrations.mlflow import Registry
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step
from airflow_mlops.steps.common import model_columns
from airflow_mlops.steps.registry.packages import load_version

pytestmark = pytest.mark.integration

JULY = Window.parse("2018-07-01", "2018-08-01")
WINDOW = {"start": "2018-07-01T00:00:00Z", "end": "2018-08-01T00:00:00Z"}


class World:
    """A table, a model that learned from it, and the step that scores."""

    def __init__(self, folder: Path, mlflow_url: str) -> None:
        self.folder, self.name = folder, "scored_fare"
        self.services = Services(tracking_uri=mlflow_url)
        trips = stream.simulate(1, trips_per_month=3000)
        july = trips.filter(pl.col(stream.TIME).is_between(JULY.start, JULY.end, closed="left"))
        # Enough rows that a kill hits the step at work.
        self.trips = pl.concat(
            july.with_columns(pl.col(stream.ID).cast(pl.String) + f"-{copy}") for copy in range(60)
        ).sort(stream.TIME)
        self.table = str(folder / "trips")
        delta.replace_window(self.table, self.trips, time_column=stream.TIME, window=None)
        self.small = str(folder / "small")
        delta.replace_window(self.small, july, time_column=stream.TIME, window=None)
        self.version = self.register("sklearn.ensemble.HistGradientBoostingRegressor", max_iter=20)

    def register(self, estimator: str, **params: Any) -> str:
        trained = run_step(
            "train",
            {
                "dataset": self.small,
                "model_name": self.name,
                "estimator": estimator,
                "estimator_params": params,
                "target": stream.TARGET,
                "numeric": [name for name in stream.FEATURES if name != "rate_code_id"],
                "categorical": ["rate_code_id"],
                "time_column": stream.TIME,
                "window": WINDOW,
            },
            self.services,
        )
        spec = {
            "model_name": self.name,
            "run_id": trained["run_id"],
            "package_digest": trained["package_digest"],
        }
        return run_step("register", spec, self.services)["model_version"]

    def spec(self, table: str, **more: Any) -> dict[str, Any]:
        return {
            "dataset": self.table,
            "table": str(self.folder / table),
            "model_name": self.name,
            "model_version": self.version,
            "id_column": stream.ID,
            "time_column": stream.TIME,
            "window": WINDOW,
        } | more

    def score(self, table: str, **more: Any) -> dict[str, Any]:
        return run_step("score", self.spec(table, **more), self.services)

    def predictions(self, table: str) -> pl.DataFrame:
        return delta.read_table(str(self.folder / table)).collect()

    def predictions_of_whole(self) -> pl.DataFrame:
        """What one commit for all gives."""
        self.score("whole")
        return self.predictions("whole").sort(stream.ID)


@pytest.fixture(scope="module")
def world(mlflow_server: str, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("scoring"), mlflow_server)


@pytest.mark.parametrize(
    ("renamed", "more", "words"),
    [
        ({stream.ID: "prediction"}, {"id_column": "prediction"}, "two columns would have one name"),
        ({stream.TIME: "model_version"}, {"time_column": "model_version"}, "two columns would have one name"),
        ({}, {"id_column": stream.TIME}, "two columns would have one name"),
        ({}, {"time_column": "naive"}, "'naive' of .* holds Datetime.*time_zone=None.*instants in UTC"),
        ({}, {"time_column": "text"}, "'text' of .* holds String, .*instants in UTC"),
        ({}, {"time_column": "text", "window": None, "partition": "day"}, "holds String, .*instants in UTC"),
    ],
)
def test_columns_that_can_not_be_copied_or_windowed_are_named(
    world: World, tmp_path: Path, renamed: dict[str, str], more: dict[str, Any], words: str
) -> None:
    odd = world.trips.head(50).with_columns(
        naive=pl.col(stream.TIME).dt.replace_time_zone(None), text=pl.col(stream.TIME).dt.to_string()
    )
    uri = str(tmp_path / "odd")
    columns = odd.rename(renamed)
    delta.replace_window(uri, columns, time_column=renamed.get(stream.TIME, stream.TIME), window=None)
    with pytest.raises(SchemaMismatchError, match=words):
        world.score(str(tmp_path / "scored"), dataset=uri, **more)


def test_rows_keep_their_answers(world: World) -> None:
    result = world.score("whole")
    assert (result["row_count"], result["partitions"], result["reused"]) == (world.trips.height, 1, 0)
    registry = Registry.connect(world.services)
    model = load_version(registry, registry.version(world.name, world.version), world.services)
    expected = model.predict_columns(model_columns(world.trips, model.manifest.signature))
    scored = world.predictions("whole").sort(stream.ID)
    wanted = world.trips.with_columns(prediction=pl.Series(expected)).sort(stream.ID)
    assert scored[stream.ID].to_list() == wanted[stream.ID].to_list()
    assert (scored["prediction"] - wanted["prediction"]).abs().max() == 0.0
    assert set(scored["model_version"]) == {world.version}
    again = world.score("whole")
    assert (again["reused"], again["predictions"]) == (1, result["predictions"])


def test_by_day_is_the_same(world: World) -> None:
    result = world.score("days", partition="day")
    assert (result["partitions"], result["reused"]) == (31, 0)
    assert world.predictions("days").sort(stream.ID).equals(world.predictions_of_whole())
    half = world.score("days", partition="day", window=WINDOW | {"end": "2018-07-16T00:00:00Z"})
    assert (half["partitions"], half["reused"]) == (15, 15)
    everything = world.score("days", partition="month", window=None)
    assert (everything["partitions"], everything["row_count"]) == (1, world.trips.height)
    assert world.predictions("days").height == world.trips.height


def test_killed_again_and_again_every_row_is_there_once(world: World, tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(world.spec("killed", partition="day")))
    command = [sys.executable, "-m", "airflow_mlops.steps", "score", "--spec", str(spec)]
    command += ["--result", str(tmp_path / "result.json")]
    environment = {**os.environ, **world.services.to_environment()}
    table, per_day = str(world.folder / "killed"), world.trips.group_by(pl.col(stream.TIME).dt.date()).len()
    days = dict(per_day.rows())
    seen = 0
    for further in (1, 3, 4, 6):  # killed when so many more days are committed
        child = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while child.poll() is None and committed(table) < seen + further and time.monotonic() < deadline:
            time.sleep(0.002)
        child.kill()
        child.wait()
        counts = dict(world.predictions("killed").group_by(pl.col(stream.TIME).dt.date()).len().rows())
        assert all(
            days[day] == count for day, count in counts.items()
        )  # a day is there as a whole or not at all
        assert len(counts) >= seen
        seen = len(counts)
    assert 0 < seen < 31
    result = world.score("killed", partition="day")
    assert result["reused"] >= seen
    assert world.predictions("killed").sort(stream.ID).equals(world.predictions_of_whole())


def committed(table: str) -> int:
    """Count commits after the one that made the table."""
    return max(0, len(list((Path(table) / "_delta_log").glob("*.json"))) - 1)


def test_a_table_that_was_made_anew_is_scored_anew(world: World, tmp_path: Path) -> None:
    """Its versions have the same numbers."""
    few = world.trips.head(40)
    source = {"dataset": str(tmp_path / "trips")}
    delta.replace_window(source["dataset"], few.head(10), time_column=stream.TIME, window=None)
    first = world.score("anew", **source)
    assert first["reused"] == 0
    assert world.score("anew", **source)["reused"] == 1
    shutil.rmtree(source["dataset"])
    delta.replace_window(source["dataset"], few.tail(20), time_column=stream.TIME, window=None)
    result = world.score("anew", **source)
    assert result["dataset"]["version"] == first["dataset"]["version"]
    assert (result["reused"], result["row_count"]) == (0, 20)
    assert set(world.predictions("anew")[stream.ID]) == set(few.tail(20)[stream.ID])


def test_a_stray_time_is_one_part_more(world: World) -> None:
    days = world.trips.filter(pl.col(stream.TIME) < JULY.start + timedelta(days=3))
    stray = days.head(1).with_columns(pl.col(stream.TIME) - timedelta(days=8_000))
    table = str(world.folder / "astray")
    delta.replace_window(table, pl.concat([stray, days]), time_column=stream.TIME, window=None)
    result = world.score("astray_scored", dataset=table, partition="day", window=None)
    assert (result["partitions"], result["row_count"]) == (4, days.height + 1)
    assert world.predictions("astray_scored").height == days.height + 1
    # The second day goes from the source, and so do its predictions; those outside of the rows' days stay.
    second = pl.col(stream.TIME).dt.day() == 2
    delta.replace_window(table, days.filter(~second), time_column=stream.TIME, window=None)
    result = world.score("astray_scored", dataset=table, partition="day", window=None)
    assert (result["partitions"], result["reused"]) == (2, 0)
    assert world.predictions("astray_scored").height == days.filter(~second).height + 1
    again = world.score("astray_scored", dataset=table, partition="day", window=None)
    assert (again["reused"], again["predictions"]) == (2, result["predictions"])


def test_no_number_is_no_prediction(world: World) -> None:
    days = world.trips.filter(pl.col(stream.TIME) < JULY.start + timedelta(days=3)).sort(stream.TIME)
    broken = days.filter(pl.col(stream.TIME).dt.day() == 2).gather([7, 70])
    far = pl.when(pl.col(stream.ID).is_in(broken[stream.ID].to_list())).then(1e300)
    rows = days.with_columns(far.otherwise(pl.col("trip_distance")).alias("trip_distance"))
    table = str(world.folder / "far")
    delta.replace_window(table, rows, time_column=stream.TIME, window=None)
    version = world.register("sklearn.linear_model.LinearRegression")
    with pytest.raises(
        SignatureMismatchError, match=r"no finite number for 2 rows of \[2018-07-02"
    ) as caught:
        world.score("far_scored", dataset=table, partition="day", window=None, model_version=version)
    assert repr(broken[stream.ID][0]) in str(caught.value)
    scored = world.predictions("far_scored")
    assert scored.height == days.filter(pl.col(stream.TIME).dt.day() == 1).height
    assert scored["prediction"].is_finite().all()


def test_what_is_missing_is_said(world: World) -> None:
    later = {"start": "2030-01-01T00:00:00Z", "end": "2030-02-01T00:00:00Z"}
    with pytest.raises(
        InsufficientDataError, match=r"window \[2030-01-01.*has no rows; ingest the window first"
    ):
        world.score("none", window=later)
    narrow = str(world.folder / "narrow")
    delta.replace_window(narrow, world.trips.drop("trip_distance"), time_column=stream.TIME, window=None)
    with pytest.raises(SchemaMismatchError, match="has no column trip_distance"):
        world.score("none", dataset=narrow)
    text = str(world.folder / "text")
    rows = world.trips.with_columns(pl.lit("far").alias("trip_distance"))
    delta.replace_window(text, rows, time_column=stream.TIME, window=None)
    with pytest.raises(SchemaMismatchError, match="'trip_distance' holds String, the model takes a number"):
        world.score("none", dataset=text)
    timeless = str(world.folder / "timeless")
    gap = (
        pl.when(pl.col(stream.TIME) > JULY.start + timedelta(days=30))
        .then(None)
        .otherwise(pl.col(stream.TIME))
    )
    delta.replace_window(
        timeless, world.trips.with_columns(gap.alias(stream.TIME)), time_column=stream.TIME, window=None
    )
    with pytest.raises(SchemaMismatchError, match=r"rows of .* belong to no day: give a window"):
        world.score("none", dataset=timeless, partition="day", window=None)
    assert world.score("none", dataset=timeless, window=None)["row_count"] == world.trips.height
