"""Labels and answers that are no numbers: counted, named and left out, and the rest is graded."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import polars as pl
import pytest

from airflow_mlops.demo import stream
from airflow_mlops.exceptions import SchemaMismatchError
from airflow_mlops.integrations import delta
from airflow_mlops.serving.log_rows import FEATURE_PREFIX
from airflow_mlops.steps.base import run_step
from tests.integration.test_loop import AUGUST, MODEL, SEPTEMBER, World, manifest, trips_of, world

pytestmark = pytest.mark.integration

__all__ = ["manifest", "world"]  # fixtures


def land(world: World, values: dict[int, Any], *, share: float = 1.0) -> None:
    """Let labels arrive, of which some rows have other values."""
    rows = trips_of(AUGUST)
    labels = rows[stream.TARGET].cast(pl.Float64).to_numpy().copy()
    labels[list(values)] = list(values.values())
    rows = rows.with_columns(pl.Series(stream.TARGET, labels)).head(int(rows.height * share))
    delta.replace_window(world.labels, rows, time_column=stream.TIME, window=AUGUST)


def spoil_answers(world: World, count: int, value: float, column: str = "prediction") -> None:
    """Put a value into the log's first rows, as a service of an older release may have."""
    (file,) = (world.folder / "serving" / "inference_log").rglob("part-*.parquet")
    rows = pl.read_parquet(file)
    spoiled = pl.when(pl.int_range(pl.len()) < count).then(value).otherwise(pl.col(column))
    rows.with_columns(spoiled.alias(column)).write_parquet(file)


def grade(world: World, **more: Any) -> dict[str, Any]:
    spec = {
        "model_name": MODEL, "window": AUGUST, "labels": world.labels, "id_column": stream.ID, "target": stream.TARGET,
    }  # fmt: skip
    return run_step("performance", spec | more, world.services)


class TestGrades:
    def test_an_infinite_label_costs_its_row_and_not_the_window(self, world: World) -> None:
        world.answer(AUGUST, error=3.0)
        land(world, {})
        plain = grade(world)
        land(world, {0: math.inf, 1: -math.inf, 2: 1e200})
        result = grade(world)
        assert result["measured"]
        assert result["degraded"]
        assert (result["invalid_count"], result["row_count"]) == (3, plain["row_count"] - 3)
        assert result["value"] == pytest.approx(plain["value"], rel=1e-6)
        assert result["reason"].endswith(
            "; 3 rows have a label that is infinite or too large and are not graded"
        )
        assert result["labelled_share"] == 1.0  # they have one, and another will not come
        assert result["final"]
        assert result["change"]  # the search for a lasting change reads what is left
        assert math.isfinite(result["loss_deviation"])

    @pytest.mark.parametrize("value", [math.inf, math.nan])
    def test_an_answer_that_is_no_number_costs_its_row(self, world: World, value: float) -> None:
        world.answer(AUGUST)
        spoil_answers(world, 1, value)
        land(world, {5: math.inf}, share=0.9)
        result = grade(world)
        assert result["measured"]
        assert result["invalid_count"] == 2
        assert (
            "; 1 row has a label that is infinite or too large and 1 row has an answer that is no finite number and are not graded"
            in result["reason"]
        )
        assert math.isfinite(result["early_labels"]["difference"])

    def test_more_than_a_few_are_no_grade(self, world: World) -> None:
        world.answer(AUGUST, error=3.0)
        rows = trips_of(AUGUST).height
        spoiled = rows // 10
        land(world, dict.fromkeys(range(spoiled), math.inf))
        result = grade(world)
        assert not result["measured"]
        assert result["reason"].startswith(
            f"performance not measured: {spoiled} rows have a label that is infinite or too large, more than 5% of {rows} "
            "labelled rows: correct them, or raise maximum_invalid_share; estimated"
        )
        assert not result["awaits_labels"]

    def test_a_check_on_more_labels_is_another_one_also_when_no_more_can_be_graded(
        self, world: World
    ) -> None:
        world.answer(AUGUST)
        rows = trips_of(AUGUST).height
        half, most = rows // 2, int(rows * 0.9)
        world.land(AUGUST, share=(half + 0.5) / rows)
        first = world.check_performance(AUGUST)
        land(world, dict.fromkeys(range(most - half), math.inf), share=(most + 0.5) / rows)
        second = world.check_performance(AUGUST)
        assert first["row_count"] == second["row_count"] == half
        assert f"more than 5% of {most} labelled rows" in second["reason"]


class TestEarlierWindows:
    def test_one_that_can_not_be_graded_any_more_costs_this_one_nothing(self, world: World) -> None:
        world.answer(AUGUST)
        world.land(AUGUST, share=0.5)
        assert world.check_performance(AUGUST)["awaits_labels"]
        rows = trips_of(AUGUST)
        contradicting = pl.concat([rows, rows.head(1).with_columns(pl.col(stream.TARGET) + 1.0)])
        delta.replace_window(world.labels, contradicting, time_column=stream.TIME, window=AUGUST)
        with pytest.raises(SchemaMismatchError, match="contradict each other"):
            world.check_performance(AUGUST)
        world.answer(SEPTEMBER)
        world.land(SEPTEMBER)
        assert world.check_performance(SEPTEMBER)["measured"]


class TestEstimates:
    def test_it_leaves_out_answers_that_are_no_numbers(self, world: World) -> None:
        world.answer(AUGUST)
        plain = grade(world, labels=None)
        spoil_answers(world, 3, math.inf)
        result = grade(world, labels=None)
        assert result["estimated"]
        assert result["estimated_value"] == pytest.approx(plain["estimated_value"], rel=0.02)
        assert result["reason"].endswith("; the estimate leaves out 3 answers that are no finite numbers")

    def test_an_infinite_input_in_the_log_is_left_out(self, world: World) -> None:
        world.answer(AUGUST)
        spoil_answers(world, 2, math.inf, FEATURE_PREFIX + "trip_distance")
        result = grade(world, labels=None)
        assert result["estimated"]
        assert result["reason"].endswith("; the estimate leaves out 2 answers that are no finite numbers")

    def test_too_many_are_no_estimate(self, world: World) -> None:
        world.answer(AUGUST)
        rows = trips_of(AUGUST).height
        spoil_answers(world, rows // 2, math.nan)
        result = grade(world, labels=None)
        assert not result["estimated"]
        assert result["reason"].endswith(
            f"not estimated: {rows // 2} of {rows} answers are no finite numbers"
        )


class TestDrift:
    def test_infinite_values_are_said_and_the_rest_is_compared(self, world: World) -> None:
        world.answer(SEPTEMBER)
        spoil_answers(world, trips_of(SEPTEMBER).height // 2, np.inf, FEATURE_PREFIX + "trip_distance")
        result = world.check_drift(SEPTEMBER)
        (found,) = (item for item in result["features"] if item["feature"] == "trip_distance")
        assert "infinite 0.0% → 50.0%" in found["sentence"]
        assert not found["drifted"]
        assert ("trip_distance", "infinite") in {(item["feature"], item["kind"]) for item in result["skew"]}
