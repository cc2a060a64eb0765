"""Drift: bounds that hold, Evidently's own scores and verdicts, verdicts that stand up to many columns, and what is to blame."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import pendulum
import polars as pl
import pytest
from hypothesis import example, given, settings, strategies as st
from scipy import stats

from airflow_mlops.core.checks.skew import find_skew
from airflow_mlops.core.monitoring.detectors import DETECTORS, ColumnRows
from airflow_mlops.core.monitoring.distances import kolmogorov_smirnov_distance, wasserstein
from airflow_mlops.core.monitoring.drift import (
    DriftReport,
    FeatureDrift,
    adjusted_p_values,
    compare_profiles,
)
from airflow_mlops.core.monitoring.drift_policy import DriftPolicy
from airflow_mlops.core.monitoring.drift_windows import last_year, next_year, window_after, windows_before
from airflow_mlops.core.monitoring.p_values import chi_square_p_value, kolmogorov_p_value, normal_p_value
from airflow_mlops.core.profiles.profile import Profile, merge_profiles, profile_frame, widen_profile
from airflow_mlops.core.profiles.profile_columns import NumericProfile
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import DatasetNotFoundError, InsufficientDataError
from airflow_mlops.integrations.domain_classifier import tell_apart

if TYPE_CHECKING:
    from airflow_mlops.core.monitoring.statistics import Measured

EVIDENTLY = DriftPolicy(rule="evidently")


def sides(first: Any, second: Any) -> tuple[Profile, Profile]:
    kind = "numeric" if np.asarray(first).dtype.kind in "fi" else "categorical"
    reference = profile_frame(pl.DataFrame({"v": first}), **{kind: ["v"]})
    return reference, profile_frame(pl.DataFrame({"v": second}), **{kind: ["v"]}, like=reference)


def _needs_rows(detector: Any, first: Any, second: Any) -> bool:
    columns = (side.column("v") for side in sides(first, second))
    return detector.rows is not None and detector.profiles(*columns) is None


def filled(rows: int, values: int) -> pl.Series:
    return pl.Series([float(value) for value in range(values)] + [None] * (rows - values), dtype=pl.Float64)


def compare(first: Any, second: Any, **arguments: Any) -> FeatureDrift:
    return compare_profiles(*sides(first, second), **arguments).features[0]


def not_a_number(reference: Any, current: Any) -> float:
    return float("nan")


def broken(reference: Any, current: Any) -> float:
    raise KeyError("mode")


def numbers(first: Any, second: Any) -> tuple[NumericProfile, NumericProfile]:
    reference, current = (side.column("v") for side in sides(first, second))
    assert isinstance(reference, NumericProfile)
    assert isinstance(current, NumericProfile)
    return reference, current


def rows_of(first: Any, second: Any) -> Callable[[str], ColumnRows]:
    return lambda _: ColumnRows(np.asarray(first), np.asarray(second))


def holds(measured: Measured, exact: float, rounding: float = 0.0) -> bool:
    slack = 1e-9 * max(1.0, abs(exact)) + rounding
    return (
        measured.low - slack <= exact <= measured.high + slack
        and measured.low <= measured.value <= measured.high
    )


#: Shapes whose rows lie in a profile's cells in every way there is.
SHAPES: dict[str, Callable[[np.random.Generator, int], Any]] = {
    "normal": lambda random, n: random.normal(0.0, 1.0, n),
    "lognormal": lambda random, n: random.lognormal(0.0, 1.5, n),
    "Cauchy": lambda random, n: random.standard_cauchy(n),
    "Pareto": lambda random, n: random.pareto(1.5, n),
    "half zeros": lambda random, n: np.where(random.random(n) < 0.5, 0.0, random.exponential(1.0, n)),
    "rounded": lambda random, n: np.round(random.normal(0.0, 1.0, n), 1),
    "whole": lambda random, n: random.integers(0, 200, n).astype(float),
    "clock": lambda random, n: 1.6e9 + random.normal(0.0, 1.0, n),
    "six": lambda random, n: random.integers(0, 6, n).astype(float),
    "few": lambda random, n: random.choice([0.0, 1.0, 2.0], n),
    "two": lambda random, n: random.choice([0.0, 1.0], n),
    "neighbors": lambda random, n: random.choice([0.1, 0.2, 0.3, 0.1 + 0.2], n),
    "one": lambda random, n: np.full(n, 3.0),
    "words": lambda random, n: random.choice(["a", "b", "c", "d"], n, p=[0.6, 0.3, 0.09, 0.01]),
    "yes and no": lambda random, n: random.choice(["yes", "no"], n, p=[0.7, 0.3]),
    "codes": lambda random, n: random.zipf(1.5, n).clip(0, 900).astype(str),
}
SIZES = [(400, 300), (1000, 700), (1001, 700), (6000, 900)]


def pairs(size: tuple[int, int]) -> Iterator[tuple[str, Any, Any]]:
    random = np.random.default_rng(size[0])
    for name, shape in SHAPES.items():
        first, second = shape(random, size[0]), shape(random, size[1])
        yield name, first, second
        if first.dtype.kind == "f":
            for shift in (0.03, 0.1, 0.4):
                yield f"{name} + {shift}", first, second + shift * (first.std() if name != "Cauchy" else 1.0)
        else:
            yield f"{name}, fewer", first, np.where(random.random(size[1]) < 0.15, first[0], second)
            yield f"{name}, new", first, np.where(random.random(size[1]) < 0.02, "new", second)


class TestBounds:
    @settings(max_examples=300)
    @example(first=[0.0], second=[0.0, 0.0], edges=[1.0, -2.2250738585e-313])
    @example(first=[0.0], second=[0.0, 0.0, 0.03125], edges=[262145.0])
    @given(
        st.lists(st.floats(-1e6, 1e6) | st.integers(-3, 3).map(float), min_size=1, max_size=60),
        st.lists(st.floats(-1e6, 1e6) | st.integers(-3, 3).map(float), min_size=1, max_size=60),
        st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8, unique=True),
    )
    def test_the_exact_value_is_between_them(
        self, first: list[float], second: list[float], edges: list[float]
    ) -> None:
        # Cells that have nothing to do with either side: of a third table.
        cells = profile_frame(pl.DataFrame({"v": edges}), numeric=["v"])
        profiles = [
            profile_frame(pl.DataFrame({"v": side}), numeric=["v"], like=cells).column("v")
            for side in (first, second)
        ]
        reference, current = profiles
        assert isinstance(reference, NumericProfile)
        assert isinstance(current, NumericProfile)
        scale = max(float(np.std(first)), 0.001)
        exact = stats.wasserstein_distance(first, second) / scale
        # Cells far from every value cost digits: sums are kept as distances from the cell's edge.
        rounding = 4.0 * float(np.spacing(max(map(abs, [*first, *second, *edges])))) / scale
        assert holds(wasserstein(reference, current), exact, rounding)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            distance = stats.ks_2samp(first, second).statistic
        assert holds(kolmogorov_smirnov_distance(reference, current), distance)

    @pytest.mark.parametrize("size", SIZES)
    def test_they_are_narrow_and_say_how_far_off_the_estimate_may_be(self, size: tuple[int, int]) -> None:
        checked = 0
        for name, first, second in pairs(size):
            if first.dtype.kind != "f":
                continue
            measured = wasserstein(*numbers(first, second))
            exact = stats.wasserstein_distance(first, second) / max(float(np.std(first)), 0.001)
            assert holds(measured, exact), name
            assert abs(measured.value - exact) <= max(measured.error, 1e-9 * max(1.0, exact)), name
            checked += 1
        assert checked >= 40

    def test_a_kolmogorov_smirnov_distance_from_a_thousand_rows_is_exact(self) -> None:
        random = np.random.default_rng(1)
        first, second = random.normal(size=1000), np.round(random.normal(size=5000), 2)
        measured = kolmogorov_smirnov_distance(*numbers(first, second))
        assert measured.exact
        assert measured.value == pytest.approx(stats.ks_2samp(first, second).statistic, abs=1e-12)

    def test_the_rows_are_read_where_only_they_can_tell(self) -> None:
        # Cells can't tell these: in each of them the current rows may lie on either side of the reference's.
        random = np.random.default_rng(2)
        first, second = random.normal(size=50_000), random.normal(size=40_000)
        profile_only = compare(first, second, policy=EVIDENTLY)
        exact = stats.wasserstein_distance(first, second) / np.std(first)
        assert not profile_only.exact
        assert profile_only.low < exact < profile_only.high
        limit = (profile_only.low + profile_only.high) / 2.0
        asked: list[str] = []

        def read(name: str) -> ColumnRows:
            asked.append(name)
            return ColumnRows(first, second)

        told = compare(first, second, policy=EVIDENTLY, thresholds={"v": limit}, read_rows=read)
        assert asked == ["v"]
        assert told.exact
        assert told.statistic == pytest.approx(exact)
        assert told.drifted == (exact >= limit)
        far = compare(first, second + 0.5, policy=EVIDENTLY, read_rows=read)
        assert asked == ["v"]  # here the cells are enough
        assert far.drifted

    def test_where_the_rows_are_gone_the_profiles_stand(self) -> None:
        random = np.random.default_rng(2)
        first, second = random.normal(size=50_000), random.normal(size=40_000)
        alone = compare(first, second, policy=EVIDENTLY)
        limit = (alone.low + alone.high) / 2.0

        def vacuumed(name: str) -> ColumnRows:
            raise DatasetNotFoundError(f"files of version 3 are gone: {name}")

        report = compare_profiles(
            *sides(first, second), policy=EVIDENTLY, thresholds={"v": limit}, read_rows=vacuumed
        )
        assert report.features[0].statistic == alone.statistic
        assert not report.features[0].exact
        assert report.headline.endswith("; by profiles alone, as the rows are gone: v")
        needs_rows = next(name for name, one in DETECTORS.items() if _needs_rows(one, first, second))
        with pytest.raises(DatasetNotFoundError):
            compare(first, second, detector=needs_rows, read_rows=vacuumed)

    @pytest.mark.parametrize(
        ("first", "second", "told"),
        [
            ([2010.0, 2015.0], [2017.0, 2022.0], "v: mean 2012.5 → 2019.5"),
            ([100_100.0, 100_300.0], [100_349.0, 100_549.0], "v: mean 100200 → 100449"),
            ([2.8, 3.0], [4.0, 4.2], "v: mean 2.9 → 4.1"),
        ],
    )
    def test_the_sentence_shows_the_difference(
        self, first: list[float], second: list[float], told: str
    ) -> None:
        assert compare(first * 100, second * 100).sentence.startswith(told)

    def test_where_mean_and_spread_are_as_they_were_it_says_what_moved(self) -> None:
        """Two peaks that become one: "standard deviation 1.0003 → 0.9968" was told as the whole shift."""
        random = np.random.default_rng(0)
        peaks = random.choice([-1.0, 1.0], 3000) + random.normal(0.0, 0.05, 3000)
        told = compare(peaks, random.normal(0.0, 1.0, 3000)).sentence
        assert re.fullmatch(r"v: below 0\.884: 48\.\d% → 80\.\d%; 100% of the shift", told)


class TestPValues:
    @pytest.mark.parametrize("freedom", [1, 2, 3, 10, 33, 1000])
    def test_chi_square_is_scipys(self, freedom: int) -> None:
        for statistic in (0.0, 0.1, freedom / 2, freedom, 1.3 * freedom, 3.0 * freedom, 40.0 * freedom):
            wanted = stats.chi2.sf(statistic, freedom)
            assert chi_square_p_value(statistic, freedom) == pytest.approx(wanted, rel=1e-9, abs=1e-300)

    def test_kolmogorovs_is_scipys_for_large_samples(self) -> None:
        # Where the sample is small the formula is off where nobody decides: at p-values near one.
        for rows, off in (
            ((30, 30), 0.015),
            ((200, 1000), 8e-3),
            ((50_000, 3_000), 2e-3),
            ((10**6, 10**6), 1e-3),
        ):
            size = rows[0] * rows[1] / sum(rows)
            for at in (0.2, 0.5, 0.9, 0.999, 1.001, 1.36, 1.63, 2.5):
                wanted = stats.kstwo.sf(at / np.sqrt(size), round(size))
                assert kolmogorov_p_value(at / np.sqrt(size), *rows) == pytest.approx(wanted, abs=off)
        assert kolmogorov_p_value(0.0, 10, 10) == 1.0

    def test_normal_is_scipys(self) -> None:
        for deviation in (0.0, -0.3, 1.96, 7.0, -30.0):
            assert normal_p_value(deviation) == pytest.approx(2 * stats.norm.sf(abs(deviation)), rel=1e-9)


def evidently_says(first: Any, second: Any, name: str | None) -> tuple[float, bool]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from evidently.legacy.calculations import stattests  # noqa: F401 - registers them
        from evidently.legacy.calculations.stattests.registry import get_stattest
        from evidently.legacy.core import ColumnType

        kind = ColumnType.Numerical if first.dtype.kind == "f" else ColumnType.Categorical
        columns = pd.Series(first), pd.Series(second)
        result = get_stattest(*columns, kind, name)(*columns, kind, None)
    return float(result.drift_score), bool(result.drifted)


#: Ours and Evidently's names, and what they apply to.
NAMES = {
    "wasserstein": ("wasserstein", "f"), "jensen_shannon": ("jensenshannon", "fU"), "psi": ("psi", "fU"),
    "kl": ("kl_div", "fU"), "hellinger": ("hellinger", "fU"), "ks": ("ks", "f"), "chi_square": ("chisquare", "U"),
    "cramer_von_mises": ("cramer_von_mises", "f"), "anderson": ("anderson", "f"),
}  # fmt: skip


class TestEvidently:
    """The same score to 1e-3 and the same verdict as the installed Evidently."""

    @pytest.mark.parametrize("size", SIZES)
    def test_its_default_tests(self, size: tuple[int, int]) -> None:
        checked = 0
        for name, first, second in pairs(size):
            score, drifted = evidently_says(first, second, None)
            got = compare(first, second, policy=EVIDENTLY, read_rows=rows_of(first, second))
            assert got.statistic == pytest.approx(score, abs=1e-3), name
            assert got.drifted == drifted, name
            checked += 1
        assert checked >= 50

    @pytest.mark.parametrize("ours", NAMES)
    @pytest.mark.parametrize("size", [(900, 700), (6000, 900)])
    def test_each_of_its_tests(self, ours: str, size: tuple[int, int]) -> None:
        theirs, kinds = NAMES[ours]
        checked = 0
        for name, first, second in pairs(size):
            if first.dtype.kind not in kinds or (name.startswith("one") and ours == "anderson"):
                continue
            score, drifted = evidently_says(first, second, theirs)
            got = compare(first, second, detector=ours, policy=EVIDENTLY, read_rows=rows_of(first, second))
            assert got.statistic == pytest.approx(score, abs=1e-3, rel=1e-3), name
            assert got.drifted == drifted, name
            checked += 1
        assert checked >= 9

    @pytest.mark.parametrize("size", [(5000, 3000), (60_000, 40_000)])
    @pytest.mark.parametrize(
        "name", ["normal", "lognormal", "Cauchy", "Pareto", "half zeros", "whole", "words"]
    )
    def test_columns_at_the_threshold(self, name: str, size: tuple[int, int]) -> None:
        random = np.random.default_rng(7)
        first, second = (SHAPES[name](random, n) for n in size)
        move = _mover(second, first[0])
        low, high = 0.0, 1.0
        for _ in range(30):  # halve until the score is at the threshold
            middle = (low + high) / 2.0
            low, high = (low, middle) if evidently_says(first, move(middle), None)[1] else (middle, high)
        for far in (1e-2, 1e-4, 1e-8):
            for at in (low * (1 - far), high * (1 + far)):
                moved = move(at)
                score, drifted = evidently_says(first, moved, None)
                assert abs(score - 0.1) < 2e-2
                got = compare(first, moved, policy=EVIDENTLY, read_rows=rows_of(first, moved))
                assert got.statistic == pytest.approx(score, abs=1e-3)
                assert got.drifted == drifted

    @pytest.mark.parametrize("stream", ["elec2", "bike_sharing", "nyc_taxi"])
    def test_every_window_of_real_streams(self, shared_data: Path, stream: str) -> None:
        expected = json.loads((shared_data / "expected.json").read_text())["datasets"][stream]
        rows = _windowed(shared_data, stream)
        categorical = [name for name in expected["drift_columns"] if name in expected["features_cat"]]
        numeric = [name for name in expected["drift_columns"] if name not in categorical]
        first, last = expected["reference_windows"][0], expected["reference_windows"][-1]
        names = rows["window"].unique(maintain_order=True).to_list()
        trained = rows.filter(pl.col("window").is_in(names[names.index(first) : names.index(last) + 1]))
        reference = profile_frame(trained, numeric=numeric, categorical=categorical)
        for window in expected["windows"]:
            at = rows.filter(pl.col("window") == str(window["window"]))
            current = profile_frame(at, numeric=numeric, categorical=categorical, like=reference)
            report = compare_profiles(reference, current, policy=EVIDENTLY)
            theirs = window["ev_vs_reference"]
            for item in report.features:
                assert item.statistic == pytest.approx(theirs["scores"][item.feature], abs=1e-3)
            assert report.drifted == theirs["verdict"]
            assert {item.feature for item in report.features if item.drifted} == set(
                theirs["drifted_columns"]
            )

    def test_its_preset_as_a_whole(self) -> None:
        random = np.random.default_rng(4)
        kinds: dict[str, Any] = {"numeric": [], "categorical": []}
        tables: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
        for name in ("normal", "lognormal", "few", "words", "yes and no"):
            for table, size in zip(tables, (3000, 2000), strict=True):
                table[name] = SHAPES[name](random, size)
            kinds["numeric" if tables[0][name].dtype.kind == "f" else "categorical"].append(name)
        tables[1]["normal"] = tables[1]["normal"] + 0.3
        scores, verdict = _preset(*tables, **kinds)
        frames = [pl.DataFrame(table) for table in tables]
        reference = profile_frame(frames[0], **kinds)
        report = compare_profiles(
            reference, profile_frame(frames[1], **kinds, like=reference), policy=EVIDENTLY
        )
        assert {item.feature for item in report.features} == set(scores)
        for item in report.features:
            assert item.statistic == pytest.approx(scores[item.feature], abs=1e-3)
        assert report.drifted == verdict


def _mover(values: Any, category: Any) -> Callable[[float], Any]:
    """Give what moves a column the further, the larger its argument; at 0 not at all."""
    if values.dtype.kind == "f":
        spread = float(np.std(values))
        return lambda by: values + by * spread
    order = np.random.default_rng(0).random(len(values))
    other = "d" if category != "d" else "c"
    return lambda by: np.where(order < by, other, values)


def _windowed(folder: Path, stream: str) -> pl.DataFrame:
    rows = pl.read_parquet(folder / f"{stream}.parquet")
    named = {
        "elec2": (pl.int_range(pl.len()) // 1344).cast(pl.String),
        "bike_sharing": pl.col("timestamp").dt.strftime("%Y-%m") if "timestamp" in rows.columns else None,
        "nyc_taxi": pl.col("file_month").cast(pl.String) if "file_month" in rows.columns else None,
    }
    return rows.with_columns(named[stream].alias("window"))


def _preset(
    first: dict[str, Any], second: dict[str, Any], *, numeric: list[str], categorical: list[str]
) -> tuple[dict[str, float], bool]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from evidently import DataDefinition, Dataset, Report
        from evidently.presets import DataDriftPreset

        definition = DataDefinition(numerical_columns=numeric, categorical_columns=categorical)
        current, reference = (
            Dataset.from_pandas(pd.DataFrame(side), data_definition=definition) for side in (second, first)
        )
        snapshot = Report([DataDriftPreset()], include_tests=True).run(current, reference).dict()
    scores = {
        item["config"]["column"]: float(item["value"])
        for item in snapshot["metrics"]
        if "ValueDrift" in item["config"]["type"]
    }
    counted = next(item for item in snapshot["metrics"] if "DriftedColumnsCount" in item["config"]["type"])
    return scores, counted["value"]["share"] >= 0.5


class TestVerdict:
    def test_a_moved_column_is_named_with_its_means_and_its_share(self) -> None:
        random = np.random.default_rng(5)
        first = pl.DataFrame({"x": random.gamma(2.0, 3.0, 5000), "y": random.normal(size=5000)})
        second = first.with_columns(x=pl.col("x") + 5.0, y=pl.Series(random.normal(size=5000)))
        reference = profile_frame(first, numeric=["x", "y"])
        report = compare_profiles(reference, profile_frame(second, numeric=["x", "y"], like=reference))
        assert report.headline.startswith("1 of 2 inputs moved (x: mean 6")
        assert "→ 11" in report.headline
        assert "100% of the shift" in report.headline
        assert report.drifted  # half of the columns
        assert sum(item.share_of_shift for item in report.features) == pytest.approx(1.0)
        assert report.features[0].p_value == pytest.approx(0.0, abs=1e-9)

    def test_an_accident_of_a_small_window_is_no_drift(self) -> None:
        random = np.random.default_rng(6)
        fired = {"tested": 0, "evidently": 0}
        for _ in range(100):
            first, second = random.normal(size=3000), random.normal(size=60)
            for rule in ("tested", "evidently"):
                fired[rule] += compare(first, second, policy=DriftPolicy(rule=rule)).drifted
        assert fired["evidently"] > 80  # a distance has no idea of the number of rows
        assert fired["tested"] <= 3  # 1 % expected; 4 of 100 would be a chance of 2 %

    def test_a_significant_trifle_is_no_drift(self) -> None:
        random = np.random.default_rng(8)
        first, second = random.normal(size=300_000), random.normal(0.03, 1.0, 300_000)
        got = compare(first, second)
        assert got.p_value is not None
        assert got.p_value < 1e-6
        assert not got.drifted

    def test_a_hundred_columns_are_tested_as_a_hundred(self) -> None:
        random = np.random.default_rng(9)
        names = [f"c{number}" for number in range(100)]
        first, second = (pl.DataFrame({name: random.normal(size=n) for name in names}) for n in (2000, 150))
        reference = profile_frame(first, numeric=names)
        current = profile_frame(second, numeric=names, like=reference)
        found = {
            correction: compare_profiles(
                reference, current, policy=DriftPolicy(correction=correction, significance=0.05)
            ).drifted_count
            for correction in ("none", "holm", "benjamini_hochberg")
        }
        assert found["none"] >= 1
        assert found["holm"] == found["benjamini_hochberg"] == 0

    @pytest.mark.parametrize("correction", ["holm", "benjamini_hochberg"])
    def test_corrections_are_statsmodels(self, correction: str) -> None:
        statsmodels = pytest.importorskip("statsmodels.stats.multitest", reason="comes with Evidently")
        p_values = np.random.default_rng(0).uniform(0, 0.2, 25).round(3)
        method = {"holm": "holm", "benjamini_hochberg": "fdr_bh"}[correction]
        assert adjusted_p_values(p_values, correction) == pytest.approx(
            statsmodels.multipletests(p_values, method=method)[1]
        )

    def test_an_empty_or_tiny_window_is_not_no_drift(self) -> None:
        first = np.arange(100.0)
        for rows, words in ((0, "no rows"), (12, "12 rows, 30 are needed")):
            with pytest.raises(InsufficientDataError, match=words):
                compare(first, first[:rows])
        with pytest.raises(InsufficientDataError, match="reference has no rows"):
            compare(first[:0], first)

    def test_a_column_that_is_never_sent_has_drifted(self) -> None:
        reference = profile_frame(pl.DataFrame({"v": np.arange(100.0)}), numeric=["v"])
        gone = profile_frame(pl.DataFrame({"v": [None] * 100}), numeric=["v"], like=reference)
        item = compare_profiles(reference, gone).features[0]
        assert item.drifted
        assert item.sentence == "v: nulls 0.0% → 100.0%; 100% of the shift"
        assert not compare_profiles(gone, gone).features[0].drifted

    @pytest.mark.parametrize(("rows", "values"), [(40, 0), (40, 1), (200, 0), (200, 20)])
    def test_rare_values_that_a_small_window_has_none_or_few_of_are_not_measured(
        self, rows: int, values: int
    ) -> None:
        rare = filled(2000, 200 if rows == 40 else 20)
        frames = [
            {"v": rare, "w": np.arange(2000.0)},
            {"v": filled(rows, values), "w": np.linspace(0, 2e3, rows)},
        ]
        reference = profile_frame(pl.DataFrame(frames[0]), numeric=["v", "w"])
        window = profile_frame(pl.DataFrame(frames[1]), numeric=["v", "w"], like=reference)
        for first, second, side in ((reference, window, "window"), (window, reference, "reference")):
            report = compare_profiles(first, second)
            got = next(item for item in report.features if item.feature == "v")
            assert (got.measured, got.drifted, got.p_value, got.share_of_shift) == (False, False, None, 0.0)
            assert report.measured_count == 1
            why = f"not measured: v (0 values in the {side}, so few rows may have none by accident"
            assert (why in report.headline) == (values == 0)

    def test_a_column_alone_that_may_have_no_values_by_accident_is_no_verdict(self) -> None:
        with pytest.raises(
            InsufficientDataError,
            match=r"none of 1 inputs can be judged: not measured: v \(0 values in the window.*longer",
        ):
            compare(filled(2000, 20), filled(200, 0))
        never = compare(filled(2000, 20), filled(2000, 0))
        assert (never.drifted, never.sentence) == (True, "v: nulls 99.0% → 100.0%; 100% of the shift")
        assert never.p_value == pytest.approx(2 * stats.hypergeom.pmf(0, 4000, 20, 2000))

    def test_an_accident_only_by_the_correction_takes_no_share_of_the_shift(self) -> None:
        assert 0.01 / 41 < compare(filled(2000, 200), filled(60, 0)).p_value < 0.01  # type: ignore[operator]
        random = np.random.default_rng(16)
        names = [f"c{index}" for index in range(40)]
        many, few = ({name: random.normal(size=rows) for name in names} for rows in (2000, 60))
        few["c0"] = few["c0"] + 3.0
        frames = [
            pl.DataFrame(many | {"rare": filled(2000, 200)}),
            pl.DataFrame(few | {"rare": filled(60, 0)}),
        ]
        for first, second in (frames, frames[::-1]):
            reference = profile_frame(first, numeric=[*names, "rare"])
            report = compare_profiles(
                reference, profile_frame(second, numeric=[*names, "rare"], like=reference)
            )
            found = {item.feature: item for item in report.features}
            assert (found["rare"].measured, found["rare"].share_of_shift) == (False, 0.0)
            assert found["c0"].drifted
            assert found["c0"].share_of_shift > 0.5

    def test_a_side_of_nulls_against_one_of_infinite_values(self) -> None:
        """Neither has values: an accident is no change, and no part of the shift."""
        nothing, one = pl.Series([None] * 60, dtype=pl.Float64), pl.Series([np.inf] * 5 + [None] * 55)
        got = compare(nothing, one)
        assert (got.measured, got.drifted, got.statistic, got.share_of_shift) == (True, False, 0.0, 0.0)

    def test_a_side_without_values_has_no_mean_and_infinite_values_are_not_nulls(self) -> None:
        nothing, endless = pl.Series([None] * 200, dtype=pl.Float64), np.full(200, np.inf)
        assert compare(nothing, np.ones(200)).sentence == "v: nulls 100.0% → 0.0%; 100% of the shift"
        assert compare(nothing, endless).drifted
        assert compare(endless, nothing).drifted
        rare = pl.Series([1.0] * 20 + [None] * 180)
        assert compare(rare, endless).drifted

    def test_a_handful_of_values_is_not_judged_and_not_fine(self) -> None:
        random = np.random.default_rng(13)
        first = pl.DataFrame({"x": random.normal(size=1000), "y": random.normal(size=1000)})
        second = first.with_columns(y=pl.Series([5.0, 5.1, 5.2] + [None] * 997))
        reference = profile_frame(first, numeric=["x", "y"])
        report = compare_profiles(reference, profile_frame(second, numeric=["x", "y"], like=reference))
        assert report.headline == "none of 1 inputs moved; 1 could not be judged (y)"
        few = next(item for item in report.features if item.feature == "y")
        assert (few.measured, few.drifted, few.p_value, few.share_of_shift) == (False, False, None, 0.0)
        alone = profile_frame(second.select("y"), numeric=["y"], like=reference)
        with pytest.raises(
            InsufficientDataError, match="none of 1 inputs can be judged: fewer than 30 values of y"
        ):
            compare_profiles(reference, alone)

    def test_what_was_not_judged_does_not_water_down_the_share(self) -> None:
        random = np.random.default_rng(14)
        names = ["a", "b", "c"]
        first = pl.DataFrame({name: random.normal(size=1000) for name in names})
        nothing = pl.Series([1.0] * 5 + [None] * 995)
        second = first.with_columns(pl.col("a") + 5.0, b=nothing, c=nothing)
        reference = profile_frame(first, numeric=names)
        report = compare_profiles(reference, profile_frame(second, numeric=names, like=reference))
        assert report.drifted
        assert (report.drifted_share, report.measured_count, report.feature_count) == (1.0, 1, 3)

    def test_a_reference_of_a_few_rows_judges_nothing(self) -> None:
        with pytest.raises(InsufficientDataError, match="the reference has 3 rows, 30 are needed"):
            compare(np.array([1.0, 2.0, 3.0]), np.arange(1000.0))

    @pytest.mark.parametrize(
        ("name", "value", "words"),
        [
            ("significance", 5.0, "significance is 5.0: give a probability"),
            ("share_threshold", 50.0, "share_threshold is 50.0: give a share of the inputs"),
            ("minimum_rows", 0, "minimum_rows is 0: give a number of rows"),
            ("correction", "holms", "correction is 'holms': choose holm or benjamini_hochberg or none"),
            ("rule", "strict", "rule is 'strict': choose tested or evidently"),
        ],
    )
    def test_a_policy_that_would_judge_nothing_is_refused(self, name: str, value: Any, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            DriftPolicy(**{name: value})

    def test_a_choice_for_a_column_that_is_not_there_is_refused(self) -> None:
        first = np.arange(100.0)
        with pytest.raises(
            ValueError, match="a threshold is given for 'w', which is not compared; there are v"
        ):
            compare(first, first, thresholds={"w": 0.5})
        with pytest.raises(ValueError, match="a detector is given for 'w'"):
            compare(first, first, detector={"w": "psi"})
        with pytest.raises(ValueError, match=r"the threshold of 'v' is 0\.0: give a number above zero"):
            compare(first, first, thresholds={"v": 0.0})

    def test_a_sites_own_detector_that_gives_no_number(self) -> None:
        first = np.random.default_rng(3).normal(size=3000)
        reference, current = sides(first, first + 2.0)
        path = f"{__name__}:not_a_number"
        with pytest.raises(
            InsufficientDataError,
            match=r"none of 1 inputs can be judged: the detector gave no number for v \(",
        ):
            compare_profiles(reference, current, detector=path, policy=EVIDENTLY)
        with pytest.raises(
            ValueError, match=r"detector '.*:broken' failed on column 'v': KeyError: 'mode'; it takes"
        ):
            compare_profiles(reference, current, detector=f"{__name__}:broken")

    def test_a_sites_own_detector(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "plugins"))
        first = np.random.default_rng(3).normal(size=3000)
        got = compare(first, first + 2.0, detector={"v": "site_extensions:mean_shift"})
        assert (got.threshold, got.drifted) == (0.25, True)

    def test_a_detector_that_is_not_there_or_does_not_fit(self) -> None:
        first = np.arange(100.0)
        with pytest.raises(ValueError, match="no detector named 'magic'; built in: wasserstein"):
            compare(first, first, detector="magic")
        with pytest.raises(ValueError, match="'v' is no number: ks needs one"):
            compare(np.array(["a", "b"] * 50), np.array(["a", "b"] * 50), detector="ks")
        with pytest.raises(InsufficientDataError, match="anderson of column 'v' needs the rows"):
            compare(first, first, detector="anderson")

    def test_a_test_that_was_asked_for_needs_an_effect_as_well(self) -> None:
        random = np.random.default_rng(11)
        first, near, far = (
            random.normal(size=50_000),
            random.normal(0.04, 1, 50_000),
            random.normal(0.2, 1, 50_000),
        )
        assert compare(first, near, detector="ks", policy=EVIDENTLY).drifted
        assert not compare(first, near, detector="ks").drifted
        assert compare(first, far, detector="ks").drifted

    def test_columns_that_go_together_differently(self) -> None:
        random = np.random.default_rng(12)
        shared = random.normal(size=20_000)
        first = pl.DataFrame({"a": shared, "b": shared + 0.3 * random.normal(size=20_000)})
        second = first.with_columns(pl.col("b").shuffle(seed=1))  # each column as before
        kinds: dict[str, Any] = {"numeric": ["a", "b"], "pairs": [("a", "b")]}
        reference = profile_frame(first, **kinds)
        report = compare_profiles(reference, profile_frame(second, **kinds, like=reference))
        assert {item.feature: item.drifted for item in report.features} == {
            "a": False,
            "b": False,
            "a*b": True,
        }
        assert report.feature_count == 2  # a pair is no input
        assert not report.drifted
        assert report.headline == "none of 2 inputs moved; columns that go together differently: a*b"


class TestSkew:
    def test_requests_unlike_training(self) -> None:
        trained = pl.DataFrame(
            {
                "x": np.linspace(0, 10, 1000),
                "y": np.linspace(0, 1, 1000),
                "k": ["a", "b"] * 500,
                "z": [1.0] * 1000,
            }
        )
        served = pl.DataFrame(
            {
                "x": [5.0] * 90 + [11.0] * 10,
                "y": [0.5] * 80 + [None] * 20,
                "k": ["a"] * 95 + ["new"] * 5,
                "z": [None] * 100,
            },
            schema_overrides={"z": pl.Float64},
        )
        kinds: dict[str, Any] = {"numeric": ["x", "y", "z"], "categorical": ["k"]}
        reference = profile_frame(trained, **kinds)
        found = find_skew(reference, profile_frame(served, **kinds, like=reference))
        assert {(item.feature, item.kind, round(item.current_share, 2)) for item in found} == {
            ("x", "out_of_range", 0.1), ("y", "nulls", 0.2), ("k", "unseen", 0.05), ("z", "missing", 1.0),
        }  # fmt: skip
        assert "k: 5.0% new categories, such as new" in {item.sentence for item in found}
        assert find_skew(reference, profile_frame(trained, **kinds, like=reference)) == ()

    def test_rare_categories_of_the_training_are_not_called_new(self) -> None:
        words = [f"u{number}" for number in range(5000)]
        reference = profile_frame(pl.DataFrame({"v": words}), categorical=["v"])
        current = profile_frame(pl.DataFrame({"v": sorted(words)[-500:]}), categorical=["v"], like=reference)
        (found,) = find_skew(reference, current)
        assert found.kind == "unseen"
        assert "in categories beyond the 1000 most frequent ones" in found.sentence
        assert found.sentence.endswith("80.0% in training: rare, or new")


class TestWindows:
    def test_months_are_calendar_months_and_weeks_are_weeks(self) -> None:
        march = Window(start=datetime(2024, 3, 1), end=datetime(2024, 4, 1))
        assert [str(item) for item in windows_before(march, 3)][-1] == "[2023-12-01, 2024-01-01)"
        quarter = Window(start=datetime(2024, 1, 1), end=datetime(2024, 4, 1))
        assert str(windows_before(quarter, 1)[0]) == "[2023-10-01, 2024-01-01)"
        assert str(last_year(quarter)) == "[2023-01-01, 2023-04-01)"
        day = Window(start=datetime(2024, 2, 29), end=datetime(2024, 3, 1))
        assert str(windows_before(day, 1)[0]) == "[2024-02-28, 2024-02-29)"
        assert last_year(day).start.weekday() == day.start.weekday()

    @pytest.mark.parametrize(
        ("window", "before", "year_before"),
        [
            (("2024-03-01T00+01", "2024-04-01T00+02"), ("2024-02-01T00+01", "2024-03-01T00+01"), ("2023-03-01T00+01", "2023-04-01T00+02")),
            (("2024-10-01T00+02", "2024-11-01T00+01"), ("2024-09-01T00+02", "2024-10-01T00+02"), ("2023-10-01T00+02", "2023-11-01T00+01")),
            # a week with the begin of summer time, one after it, and the day of 23 hours
            (("2024-03-25T00+01", "2024-04-01T00+02"), ("2024-03-18T00+01", "2024-03-25T00+01"), ("2023-03-27T00+02", "2023-04-03T00+02")),
            (("2024-04-01T00+02", "2024-04-08T00+02"), ("2024-03-25T00+01", "2024-04-01T00+02"), ("2023-04-03T00+02", "2023-04-10T00+02")),
            (("2024-03-31T00+01", "2024-04-01T00+02"), ("2024-03-30T00+01", "2024-03-31T00+01"), ("2023-04-02T00+02", "2023-04-03T00+02")),
            # in UTC, as partition keys are: a month, and the day after summer time begins
            (("2024-03-01T00Z", "2024-04-01T00Z"), ("2024-02-01T00Z", "2024-03-01T00Z"), ("2023-03-01T00Z", "2023-04-01T00Z")),
            (("2024-02-01T00Z", "2024-03-01T00Z"), ("2024-01-01T00Z", "2024-02-01T00Z"), ("2023-02-01T00Z", "2023-03-01T00Z")),
            (("2024-04-01T00Z", "2024-04-02T00Z"), ("2024-03-31T00Z", "2024-04-01T00Z"), ("2023-04-03T00Z", "2023-04-04T00Z")),
            # a month and a day from four o'clock on
            (("2024-03-01T04+01", "2024-04-01T04+02"), ("2024-02-01T04+01", "2024-03-01T04+01"), ("2023-03-01T04+01", "2023-04-01T04+02")),
            (("2024-04-01T04+02", "2024-04-02T04+02"), ("2024-03-31T04+02", "2024-04-01T04+02"), ("2023-04-03T04+02", "2023-04-04T04+02")),
            # the hour that comes twice when summer time ends
            (("2024-10-27T00Z", "2024-10-27T01Z"), ("2024-10-26T23Z", "2024-10-27T00Z"), ("2023-10-29T00Z", "2023-10-29T01Z")),
            (("2024-10-27T01Z", "2024-10-27T02Z"), ("2024-10-27T00Z", "2024-10-27T01Z"), ("2023-10-29T01Z", "2023-10-29T02Z")),
        ],
    )  # fmt: skip
    def test_windows_follow_the_calendar_of_a_zone(
        self, window: tuple[str, str], before: tuple[str, str], year_before: tuple[str, str]
    ) -> None:
        berlin = ZoneInfo("Europe/Berlin")
        given = Window.parse(*window)
        assert windows_before(given, 1, berlin) == [Window.parse(*before)]
        assert window_after(Window.parse(*before), berlin) == given
        assert last_year(given, berlin) == Window.parse(*year_before)
        assert next_year(Window.parse(*year_before), berlin) == given

    def test_months_of_utc_from_four_o_clock_on_are_months(self) -> None:
        given = Window.parse("2024-03-01T04Z", "2024-04-01T04Z")
        for zone in (UTC, ZoneInfo("Europe/Berlin")):
            assert windows_before(given, 1, zone) == [Window.parse("2024-02-01T04Z", "2024-03-01T04Z")]
            assert last_year(given, zone) == Window.parse("2023-03-01T04Z", "2023-04-01T04Z")
        new_york = ZoneInfo("America/New_York")
        given = Window.parse("2024-02-01T04Z", "2024-03-01T04Z")  # 29 days from 23:00 on there
        assert windows_before(given, 1, new_york) == [Window.parse("2024-01-01T04Z", "2024-02-01T04Z")]

    @pytest.mark.parametrize("hours", [24, 5])
    def test_the_times_airflow_gives_are_times(self, hours: int) -> None:
        start = pendulum.datetime(2024, 3, 2)
        given = Window(start=start, end=start.add(hours=hours))
        before = Window(start=datetime(2024, 3, 2) - timedelta(hours=hours), end=datetime(2024, 3, 2))
        assert windows_before(given, 1) == [before]
        assert str(last_year(given)).startswith("[2023-03-04")

    def test_a_season_is_no_drift_from_the_season_before(self) -> None:
        random = np.random.default_rng(0)
        months = [10.0 * np.sin(2 * np.pi * month / 12) + random.normal(size=1000) for month in range(24)]
        reference = profile_frame(pl.DataFrame({"v": np.concatenate(months[:3])}), numeric=["v"])
        profiles = [
            profile_frame(pl.DataFrame({"v": month}), numeric=["v"], like=reference) for month in months
        ]

        def verdict(base: Profile, month: int) -> bool:
            return compare_profiles(base, profiles[month]).drifted

        assert all(verdict(reference, month) for month in range(17, 22))
        assert all(verdict(merge_profiles(profiles[month - 3 : month]), month) for month in range(17, 22))
        assert not any(verdict(profiles[month - 12], month) for month in range(12, 24))


class TestDomainClassifier:
    def test_a_broken_correlation_is_found(self) -> None:
        random = np.random.default_rng(1)
        shared = random.normal(size=2000)
        first = pl.DataFrame(
            {"a": shared, "b": shared + random.normal(size=2000), "k": random.choice(["u", "v"], 2000)}
        )
        verdict = tell_apart(first, first.with_columns(pl.col("b").shuffle(seed=2)))
        assert verdict.drifted
        assert verdict.auc > 0.6
        assert verdict.p_value < 1e-6

    def test_it_raises_no_more_false_alarms_than_it_says(self) -> None:
        random = np.random.default_rng(2)
        p_values = []
        for seed in range(40):
            first, second = (
                pl.DataFrame({"a": random.normal(size=n), "b": random.random(n)}) for n in (100, 60)
            )
            p_values.append(tell_apart(first, second, seed=seed).p_value)
        # At a rate of 5 %, 6 or more of 40 have a chance of 1 %.
        assert sum(p <= 0.05 for p in p_values) <= 5

    def test_too_few_rows_are_refused(self) -> None:
        rows = pl.DataFrame({"a": [1.0] * 30})
        with pytest.raises(InsufficientDataError, match="needs 50 rows in each; they have 30"):
            tell_apart(rows, rows)


def test_every_detector_is_compared_with_evidently() -> None:
    assert set(DETECTORS) - set(NAMES) == {
        "z",
        "total_variation",
    }  # z: by default; Evidently permutes the other


def test_columns_that_are_absent_for_different_reasons_are_told_apart() -> None:
    one = profile_frame(pl.DataFrame(dict.fromkeys("abcd", [1.0] * 50)), numeric=list("abcd"))
    absent = {"a": "not in the log", "b": "text in the log", "c": "not in the log"}
    window = widen_profile(one.select(["d"]), one.layout, row_count=50)
    report = compare_profiles(one, window, absent=absent)
    assert "not measured: a, c (not in the log), b (text in the log)" in report.headline


def test_a_report_of_nothing_moved() -> None:
    first = np.random.default_rng(0).normal(size=500)
    report: DriftReport = compare_profiles(*sides(first, first))
    assert report.headline == "none of 1 inputs moved"
    assert not report.drifted


def test_a_column_that_counts_the_season_is_not_named_with_a_threshold_it_never_reaches() -> None:
    reference = profile_frame(pl.DataFrame({"month": [1.0] * 500 + [2.0] * 500}), numeric=["month"])
    current = profile_frame(pl.DataFrame({"month": [7.0] * 1000}), numeric=["month"], like=reference)
    assert compare_profiles(reference, current).drifted
    assert not compare_profiles(reference, current, thresholds={"month": 100.0}).drifted


class TestManyCategories:
    """More categories than have names of their own, or than the reference has rows for."""

    @staticmethod
    def found(seed: int, *, count: int, rows: tuple[int, int], new: float = 0.0) -> FeatureDrift:
        """Compare rows drawn alike; ``new``: share of the current ones in a category nobody has seen."""
        random = np.random.default_rng(seed)
        sides = [[f"zip {place}" for place in random.integers(0, count, size)] for size in rows]
        sides[1] = ["new" if random.random() < new else name for name in sides[1]]
        first, second = (pl.DataFrame({"zip": side}) for side in sides)
        reference = profile_frame(first, categorical=["zip"])
        return compare_profiles(
            reference, profile_frame(second, categorical=["zip"], like=reference)
        ).features[0]

    @pytest.mark.parametrize("rows", [(8000, 8000), (2000, 500)])
    def test_the_rarest_named_ones_are_no_drift(self, rows: tuple[int, int]) -> None:
        """At a significance of 1 % three or more of 30 are chance once in 300 times; before, all were called drifted."""
        assert sum(self.found(seed, count=4000, rows=rows).drifted for seed in range(30)) <= 2

    @pytest.mark.parametrize("rows", [(8000, 8000), (2000, 500)])
    def test_a_new_one_among_them_is(self, rows: tuple[int, int]) -> None:
        assert all(self.found(seed, count=4000, rows=rows, new=0.15).drifted for seed in range(10))
