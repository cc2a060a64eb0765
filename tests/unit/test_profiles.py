"""Profiles and drift against scipy and against Evidently's own scores on a real stream; validation against Great Expectations."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats
from scipy.spatial.distance import jensenshannon

from airflow_mlops.core.codec import canonical_json, from_dict, to_dict
from airflow_mlops.core.digest import RowDigest
from airflow_mlops.core.drift import compare_profiles, jensen_shannon, wasserstein
from airflow_mlops.core.profile import Profile, merge_profiles, profile_frame
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import ExpectationError, InsufficientDataError
from airflow_mlops.integrations.great_expectations import validate_frame

RANDOM = np.random.default_rng(5)


def frame(count: int, *, shift: float = 0.0) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "x": RANDOM.gamma(2.0, 3.0, count) + shift,
            "flag": RANDOM.choice([0, 1, 2], count),
            "kind": RANDOM.choice(["a", "b", "c"], count, p=[0.6, 0.3, 0.1]),
        }
    )


def profile(rows: pl.DataFrame, like: Profile | None = None) -> Profile:
    return profile_frame(rows, numeric=["x", "flag"], categorical=["kind"], like=like)


class TestDrift:
    @pytest.mark.parametrize("shift", [0.0, 0.4, 3.0, 40.0])
    def test_the_normed_wasserstein_distance(self, shift: float) -> None:
        before, after = frame(6000), frame(4000, shift=shift)
        reference = profile(before)
        exact = stats.wasserstein_distance(before["x"], after["x"]) / np.std(before["x"].to_numpy())
        got = wasserstein(reference.numeric[0], profile(after, reference).numeric[0])
        assert got == pytest.approx(exact, abs=2e-3, rel=2e-3)

    def test_the_jensen_shannon_distance(self) -> None:
        before, after = frame(6000), frame(500)
        reference = profile(before)
        shares = [
            side["kind"].value_counts(normalize=True).sort("kind")["proportion"] for side in (before, after)
        ]
        got = jensen_shannon(reference.categorical[0], profile(after, reference).categorical[0])
        assert got == pytest.approx(jensenshannon(*shares), abs=1e-9)

    def test_a_moved_column_is_named_with_its_means(self) -> None:
        before = frame(5000)
        report = compare_profiles(profile(before), profile(frame(5000, shift=5.0), profile(before)))
        assert [item.feature for item in report.features if item.drifted] == ["x"]
        assert report.headline.startswith("1 of 3 inputs moved (x: mean 6")
        assert not report.drifted  # a third of the columns is below the share of one half

    def test_an_empty_window_is_not_no_drift(self) -> None:
        reference = profile(frame(100))
        with pytest.raises(InsufficientDataError, match="no rows"):
            compare_profiles(reference, profile(frame(100).clear(), reference))

    def test_a_sites_own_detector(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "plugins"))
        before = frame(3000).select("x")
        reference = profile_frame(before, numeric=["x"], categorical=[])
        current = profile_frame(before + 2.0, numeric=["x"], categorical=[], like=reference)
        report = compare_profiles(reference, current, detector="site_extensions:mean_shift")
        assert (report.features[0].threshold, report.features[0].drifted) == (0.25, True)

    def test_a_detector_that_is_not_there(self) -> None:
        reference = profile(frame(100))
        with pytest.raises(ValueError, match="no detector named 'magic'; built in: wasserstein"):
            compare_profiles(reference, reference, detector="magic")

    def test_evidentlys_scores_and_verdicts_on_33_real_months(self, shared_data: Path) -> None:
        expected = json.loads((shared_data / "expected.json").read_text())["datasets"]["nyc_taxi"]
        rows = pl.read_parquet(shared_data / "nyc_taxi.parquet").with_columns(
            pl.col("file_month").cast(pl.String)
        )
        roles = {"numeric": expected["features_num"], "categorical": expected["features_cat"]}
        reference = profile_frame(
            rows.filter(pl.col("file_month").is_in(["2018-01", "2018-02", "2018-03"])), **roles
        )
        assert len(canonical_json(to_dict(reference))) < 60_000
        for month in expected["windows"]:
            current = profile_frame(
                rows.filter(pl.col("file_month") == month["window"]), **roles, like=reference
            )
            report, theirs = compare_profiles(reference, current), month["ev_vs_reference"]
            for item in report.features:
                assert item.statistic == pytest.approx(theirs["scores"][item.feature], abs=1e-3), month[
                    "window"
                ]
            assert report.drifted == theirs["verdict"]
            assert {item.feature for item in report.features if item.drifted} == set(
                theirs["drifted_columns"]
            )


class TestProfile:
    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.floats(-1e6, 1e6) | st.none(), max_size=60), st.integers(0, 60))
    def test_merged_equals_one_shot(self, values: list[float | None], cut: int) -> None:
        reference = profile_frame(pl.DataFrame({"v": [-1.0, 0.0, 5.0, 1e5]}), numeric=["v"], categorical=[])
        rows = pl.DataFrame({"v": values}, schema={"v": pl.Float64})
        parts = [
            profile_frame(part, numeric=["v"], categorical=[], like=reference)
            for part in (rows.head(cut), rows.slice(min(cut, rows.height)))
        ]
        merged, whole = (
            merge_profiles(*parts).numeric[0],
            profile_frame(rows, numeric=["v"], categorical=[], like=reference).numeric[0],
        )
        assert (merged.counts, merged.null_count, merged.minimum) == (
            whole.counts,
            whole.null_count,
            whole.minimum,
        )
        assert merged.mean == pytest.approx(whole.mean, rel=1e-9, abs=1e-6)
        assert merged.m2 == pytest.approx(whole.m2, rel=1e-6, abs=1e-3)

    def test_a_round_trip_through_json(self) -> None:
        made = profile(frame(500))
        assert from_dict(Profile, json.loads(canonical_json(to_dict(made)))) == made


class TestDigest:
    @staticmethod
    def digest(rows: pl.DataFrame) -> str:
        digest = RowDigest({name: str(dtype) for name, dtype in rows.schema.items()})
        digest.update({name: rows[name].to_numpy() for name in rows.columns})
        return digest.hexdigest()

    def test_order_does_not_matter_content_does(self) -> None:
        rows = frame(300)
        assert self.digest(rows) == self.digest(rows.sample(fraction=1.0, shuffle=True, seed=1))
        changed = rows.with_columns(
            pl.when(pl.int_range(pl.len()) == 7).then(pl.col("x") + 1e-9).otherwise("x").alias("x")
        )
        assert self.digest(rows) != self.digest(changed)
        assert self.digest(rows) != self.digest(rows.head(299))

    def test_values_must_not_trade_places(self) -> None:
        rows = pl.DataFrame({"a": [1.0, 2.0], "b": [3.0, 4.0]})
        assert self.digest(rows) != self.digest(pl.DataFrame({"a": [1.0, 2.0], "b": [4.0, 3.0]}))


EXPECTATIONS = [
    {"type": "expect_table_row_count_to_be_between", "kwargs": {"min_value": 3, "max_value": 100}},
    {"type": "expect_column_to_exist", "kwargs": {"column": "n"}},
    {"type": "expect_column_values_to_not_be_null", "kwargs": {"column": "n"}},
    {"type": "expect_column_values_to_not_be_null", "kwargs": {"column": "n", "mostly": 0.7}},
    {"type": "expect_column_values_to_be_between", "kwargs": {"column": "n", "min_value": 0, "max_value": 5}},
    {"type": "expect_column_values_to_be_between", "kwargs": {"column": "n", "min_value": 0, "strict_min": True}},
    {"type": "expect_column_values_to_be_between", "kwargs": {"column": "n", "max_value": 5, "mostly": 0.5}},
    {"type": "expect_column_values_to_be_in_set", "kwargs": {"column": "s", "value_set": ["a", "b"]}},
    {"type": "expect_column_values_to_be_unique", "kwargs": {"column": "s"}},
]  # fmt: skip
FRAMES = {
    "clean": pl.DataFrame({"n": [1.0, 2.0, 3.0, 4.0], "s": ["a", "b", "a", "b"]}),
    "dirty": pl.DataFrame({"n": [-1.0, 0.0, 5.0, 9.0, 5.0], "s": ["a", "x", "a", "b", "y"]}),
    "null-ridden": pl.DataFrame({"n": [None, 1.0, float("nan"), 7.0], "s": [None, "a", None, "x"]}),
    "all null": pl.DataFrame(
        {"n": [None, None, None], "s": [None, None, None]}, schema={"n": pl.Float64, "s": pl.String}
    ),
}


class TestValidation:
    @pytest.mark.parametrize("name", FRAMES)
    def test_both_engines_agree(self, name: str) -> None:
        suite = {"name": "both", "expectations": EXPECTATIONS}
        ours = validate_frame(FRAMES[name], suite)
        theirs = validate_frame(FRAMES[name], suite, engine="great_expectations")
        assert {item["meta"]["engine"] for item in ours["results"]} == {"polars"}
        assert {item["meta"]["engine"] for item in theirs["results"]} == {"great_expectations"}
        for mine, other in zip(ours["results"], theirs["results"], strict=True):
            config = mine["expectation_config"]
            assert mine["success"] == other["success"], config
            for key in ("element_count", "unexpected_count", "observed_value"):
                assert mine["result"].get(key) == other["result"].get(key), (key, config)

    def test_what_is_not_compiled_is_left_to_great_expectations(self) -> None:
        suite = {
            "name": "one",
            "expectations": [
                {"type": "expect_column_values_to_match_regex", "kwargs": {"column": "s", "regex": "^[ab]$"}}
            ],
        }
        (result,) = validate_frame(FRAMES["dirty"], suite)["results"]
        assert (result["success"], result["meta"]["engine"], result["result"]["unexpected_count"]) == (
            False,
            "great_expectations",
            2,
        )

    def test_an_expectation_that_cannot_be_evaluated_is_an_error(self) -> None:
        suite = {
            "name": "one",
            "expectations": [{"type": "expect_column_values_to_be_unique", "kwargs": {"column": "gone"}}],
        }
        with pytest.raises(
            ExpectationError, match=r"expect_column_values_to_be_unique.*gone.*could not be evaluated"
        ):
            validate_frame(FRAMES["clean"], suite)

    def test_an_expectation_nobody_knows_is_an_error(self) -> None:
        suite = {"name": "one", "expectations": [{"type": "expect_miracles", "kwargs": {}}]}
        with pytest.raises(ExpectationError, match=r"expect_miracles|does not accept"):
            validate_frame(FRAMES["clean"], suite)


class TestWindow:
    def test_it_is_half_open_and_in_utc(self) -> None:
        window = Window.parse("2019-02-01", "2019-03-01T02:00:00+02:00")
        assert window.contains(datetime(2019, 2, 1, tzinfo=UTC))
        assert not window.contains(datetime(2019, 3, 1, tzinfo=UTC))
        assert Window.from_key(window.key) == window
        assert str(window) == "[2019-02-01, 2019-03-01)"

    @pytest.mark.parametrize(
        ("start", "end", "words"),
        [("2019-02-01", "2019-02-01", "is empty"), ("soon", "later", "window start 'soon'")],
    )
    def test_what_is_no_window(self, start: str, end: str, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            Window.parse(start, end)
