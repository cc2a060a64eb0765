"""The drift check for real: a trained model's answers, earlier windows as reference, labels, requests unlike training."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from airflow_mlops.core.profiles.profile_format import PREDICTION
from airflow_mlops.core.windows import Window
from airflow_mlops.demo import stream
from airflow_mlops.exceptions import DriftDetectedError
from airflow_mlops.ledger import EntryKind
from airflow_mlops.steps.base import run_step
from tests.integration.test_loop import AUGUST, MODEL, World, manifest, world

pytestmark = pytest.mark.integration

__all__ = ["manifest", "world"]  # fixtures

WEEKS = [
    Window(start=AUGUST.start + timedelta(weeks=n), end=AUGUST.start + timedelta(weeks=n + 1))
    for n in range(5)
]


def check(world: World, window: Window, **spec: Any) -> dict[str, Any]:
    spec = {"report": "never"} | spec
    return run_step("drift", {"model_name": MODEL, "window": window, **spec}, world.services)


class TestReferences:
    def test_what_moved_long_ago_is_no_drift_from_the_weeks_before(self, world: World) -> None:
        for number, week in enumerate(WEEKS):
            world.answer(week, shift=30.0 if number >= 1 else 0.0)
        fixed = check(world, WEEKS[4])
        assert fixed["drifted"]
        assert fixed["reference"] == "training rows"
        trailing = check(world, WEEKS[4], reference="trailing", reference_windows=2)
        assert not trailing["drifted"]
        assert trailing["reference"] == f"predictions in {WEEKS[3]} and {WEEKS[2]}"
        assert check(world, WEEKS[1], reference="trailing", reference_windows=1)["drifted"]

    def test_where_the_log_does_not_go_back_it_says_so(self, world: World) -> None:
        world.answer(AUGUST)
        result = check(world, AUGUST, reference="last_year")
        assert result["reference"] == (
            "training rows, as there are no predictions in [2017-08-01, 2017-09-01)"
        )
        assert not result["drifted"]

    def test_one_bad_week_of_three_is_none_of_two(self, world: World) -> None:
        for number, week in enumerate(WEEKS[:4]):
            world.answer(week, shift=30.0 if number in {1, 3} else 0.0)
        once = check(world, WEEKS[1], at_least=2, of_windows=3)
        assert not once["drifted"]
        assert once["window_verdicts"] == [True, False]  # nothing was predicted before August
        assert once["headline"].endswith("1 of the last 2 windows drifted, 2 of 3 needed: not reached")
        twice = check(world, WEEKS[3], at_least=2, of_windows=3)
        assert twice["drifted"]
        assert twice["window_verdicts"] == [True, False, True]
        with pytest.raises(ValueError, match=r"at_least=4 of of_windows=3 can't be"):
            check(world, WEEKS[3], at_least=4, of_windows=3)


class TestKinds:
    def test_inputs_predictions_and_labels_are_told_apart(self, world: World) -> None:
        world.answer(AUGUST, error=40.0)  # the requests are as ever, the answers are not
        world.land(AUGUST)
        result = check(world, AUGUST, labels=world.labels, id_column=stream.ID)
        assert not result["drifted"]
        assert result["prediction"]["drifted"]
        assert result["prediction"]["feature"] == PREDICTION
        assert result["target"]["feature"] == stream.TARGET
        assert not result["target"]["drifted"]

    def test_labels_that_are_late_cost_no_verdict(self, world: World) -> None:
        world.answer(AUGUST)
        world.land(AUGUST, share=0.0)
        target = check(world, AUGUST, labels=world.labels, id_column=stream.ID)["target"]
        assert not target["measured"]
        assert "no label of loop_fare" in target["sentence"]

    def test_requests_unlike_training(self, world: World) -> None:
        world.answer(AUGUST, shift=1e4)
        found = {
            (item["feature"], item["kind"]): item["current_share"] for item in check(world, AUGUST)["skew"]
        }
        assert found["trip_distance", "out_of_range"] == 1.0

    def test_a_classifier_and_pairs_where_they_are_asked_for(self, world: World) -> None:
        world.answer(AUGUST, shift=30.0)
        result = check(
            world, AUGUST, domain_classifier=True, pairs=[["pickup_location_id", "dropoff_location_id"]]
        )
        assert result["classifier"]["drifted"]
        assert result["classifier"]["auc"] > 0.9
        pair = next(item for item in result["features"] if "*" in item["feature"])
        assert pair["feature"] == "pickup_location_id*dropoff_location_id"
        assert pair["drifted"]

    @pytest.mark.parametrize(
        ("pairs", "why"),
        [
            ([["trip_distance", stream.TARGET]], f"'{stream.TARGET}' is no numeric input"),
            ([["trip_distance", "vendor"]], "'vendor' is no numeric input; there are "),
            ([["trip_distance", "hour"], ["hour", "trip_distance"]], "each pair once"),
            ([["hour", "hour"]], "give two different inputs"),
        ],
    )
    def test_pairs_that_are_none(self, world: World, pairs: list[list[str]], why: str) -> None:
        world.answer(AUGUST)
        with pytest.raises(ValueError, match=why):
            check(world, AUGUST, pairs=pairs)

    def test_a_column_that_is_named_twice_is_compared_once(self, world: World) -> None:
        world.answer(AUGUST)
        found = check(world, AUGUST, columns=["hour", "hour"])["features"]
        assert [item["feature"] for item in found] == ["hour"]


class TestStanding:
    """A window has one verdict, and a task its own end."""

    def test_a_task_that_asks_for_something_else_is_judged_by_what_it_finds(
        self, world: World, capfd: pytest.CaptureFixture[str]
    ) -> None:
        world.answer(WEEKS[0])
        world.answer(WEEKS[1], shift=50.0)
        inputs = world.manifest.signature.names
        lenient = {"reference": "trailing", "reference_windows": 1, "thresholds": dict.fromkeys(inputs, 1e6)}
        first = world.check_drift(WEEKS[1], report="never", **lenient)
        assert not first["drifted"]
        with pytest.raises(DriftDetectedError):
            world.check_drift(WEEKS[1], report="never", fail_on_drift=True)
        assert world.check_drift(WEEKS[1], report="never")["drifted"]
        assert "with another thresholds, reference" in "".join(capfd.readouterr())
        assert world.check_drift(WEEKS[1], report="never", **lenient) == first
        (entry,) = world.entries(EntryKind.DRIFT_CHECK)
        assert not entry.payload["drifted"]


class TestRows:
    def test_a_second_check_reads_no_rows(self, world: World) -> None:
        world.answer(AUGUST)
        first = check(world, AUGUST)
        log = world.folder / "serving" / "inference_log"
        files = list(log.rglob("part-*.parquet"))
        assert files
        for file in files:
            Path(file).write_bytes(b"gone")
        assert check(world, AUGUST) == first

    def test_statistics_of_the_rows_themselves(self, world: World) -> None:
        world.answer(AUGUST, shift=30.0)
        result = check(world, AUGUST, detector={"trip_distance": "anderson", "hour": "cramer_von_mises"})
        found = {item["feature"]: item for item in result["features"]}
        for name, detector in (("trip_distance", "anderson"), ("hour", "cramer_von_mises")):
            assert found[name]["detector"] == detector
            assert found[name]["exact"]
            assert found[name]["statistic"] < 0.01
