"""Validation: what polars judges is what Great Expectations would have judged."""

from __future__ import annotations

import math
import re
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import great_expectations as gx
import polars as pl
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings, strategies as st

from airflow_mlops.core.checks import validation
from airflow_mlops.core.checks.expectations import COVERED, compile_expectation
from airflow_mlops.core.checks.patterns import for_ascii
from airflow_mlops.core.checks.validation import judge_compiled
from airflow_mlops.exceptions import ExpectationError
from airflow_mlops.integrations.great_expectations import load_suite, validate_frame

START = datetime(2024, 1, 1, tzinfo=UTC)
TEXTS = ["", "a", "ab", "b\n", "ünï", "A1", "x y", "١٢", "a.b"]
PATTERNS = ["a", "^a", "b$", r"\d", r"\w\w", "^[a-c]+", "(?i)A", r"a\.b", "", "^.$", "[ab]{2}", r"\bx"]
KINDS = {
    "i": pl.Int64,
    "j": pl.Int32,
    "f": pl.Float64,
    "g": pl.Float32,
    "s": pl.String,
    "t": pl.Datetime("us", "UTC"),
    "m": pl.Datetime("ms", "UTC"),
    "z": pl.Datetime("us", "Europe/Berlin"),
    "u": pl.UInt8,
    "b": pl.Boolean,
    "d": pl.Date,
}


def _value(name: str) -> st.SearchStrategy[Any]:
    numbers = st.integers(-4, 4)
    floats = st.sampled_from([0.0, -0.0, 0.1, 0.5, 1.0, 2.0, -3.0, math.nan, math.inf, -math.inf])
    times = st.integers(0, 4).map(lambda hours: START + timedelta(hours=hours))
    return {
        "i": numbers | st.sampled_from([2**53 + 1, -(2**60)]) if name == "i" else numbers,
        "j": numbers,
        "f": floats,
        "g": floats,
        "s": st.sampled_from(TEXTS),
        "t": times,
        "m": times,
        "z": times,
        "u": st.integers(0, 4) | st.just(255),
        "b": st.booleans(),
        "d": times.map(datetime.date),
    }[name]


@st.composite
def frames(draw: st.DrawFn) -> pl.DataFrame:
    count = draw(st.integers(0, 8))
    columns = {}
    for name in KINDS:
        nulls = draw(st.sampled_from([0, 1, 2]))  # none, some, all
        value = st.none() if nulls == 2 else _value(name) | st.none() if nulls else _value(name)
        columns[name] = draw(st.lists(value, min_size=count, max_size=count))
    return pl.DataFrame(columns, schema=KINDS)


NUMBERS = st.sampled_from([-3, -1, 0, 0.1, 0.5, 1, 2, 2.0, 3])
NAMES = st.sampled_from([*KINDS, *"iffss", "gone"])
INSTANTS = st.sampled_from(["2024-01-01T01:00:00Z", "2024-01-01T02:30:00+01:00", "2024-01-01 03:00", START])


def optional(**strategies: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=strategies)


BOUNDS = optional(min_value=NUMBERS, max_value=NUMBERS, strict_min=st.booleans(), strict_max=st.booleans())
MOSTLY = optional(mostly=st.sampled_from([0, 0.25, 0.5, 0.75, 1]))
COLUMN = st.fixed_dictionaries({"column": NAMES})
SETS = st.lists(st.sampled_from([-1, 0, 0.5, 1, 2.0]), max_size=3) | st.lists(
    st.sampled_from([*TEXTS, 1]), max_size=3
)
PAIR = st.fixed_dictionaries({"column_A": NAMES, "column_B": NAMES})
ONE_NUMBER = st.fixed_dictionaries({"value": st.integers(0, 9)})


def merged(*parts: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.tuples(*parts).map(lambda dicts: {name: value for one in dicts for name, value in one.items()})


def _arguments(kind: str) -> st.SearchStrategy[dict[str, Any]]:
    ignored = st.sampled_from(["both_values_are_missing", "either_value_is_missing", "neither"])
    never = st.sampled_from(["all_values_are_missing", "any_value_is_missing", "never"])
    patterns = st.sampled_from(PATTERNS)
    special = {
        "expect_column_values_to_be_between": merged(
            COLUMN, MOSTLY, BOUNDS | optional(min_value=INSTANTS, max_value=INSTANTS)
        ),
        "expect_column_values_to_be_in_set": merged(
            COLUMN, MOSTLY, st.fixed_dictionaries({"value_set": SETS})
        ),
        "expect_column_values_to_not_be_in_set": merged(
            COLUMN, MOSTLY, st.fixed_dictionaries({"value_set": SETS})
        ),
        "expect_column_values_to_match_regex": merged(
            COLUMN, MOSTLY, st.fixed_dictionaries({"regex": patterns})
        ),
        "expect_column_values_to_not_match_regex": merged(
            COLUMN, MOSTLY, st.fixed_dictionaries({"regex": patterns})
        ),
        "expect_column_values_to_match_regex_list": merged(
            COLUMN,
            MOSTLY,
            st.fixed_dictionaries({"regex_list": st.lists(patterns, min_size=1, max_size=3)}),
            optional(match_on=st.sampled_from(["any", "all"])),
        ),
        "expect_column_values_to_not_match_regex_list": merged(
            COLUMN, MOSTLY, st.fixed_dictionaries({"regex_list": st.lists(patterns, min_size=1, max_size=3)})
        ),
        "expect_column_value_lengths_to_be_between": merged(COLUMN, MOSTLY, BOUNDS),
        "expect_column_value_lengths_to_equal": merged(COLUMN, MOSTLY, ONE_NUMBER),
        "expect_compound_columns_to_be_unique": merged(
            st.fixed_dictionaries({"column_list": st.lists(NAMES, min_size=2, max_size=3)}),
            MOSTLY,
            optional(ignore_row_if=never),
        ),
        "expect_column_pair_values_a_to_be_greater_than_b": merged(
            PAIR, MOSTLY, optional(or_equal=st.booleans(), ignore_row_if=ignored)
        ),
        "expect_column_pair_values_to_be_equal": merged(PAIR, MOSTLY, optional(ignore_row_if=ignored)),
        "expect_table_row_count_to_be_between": BOUNDS,
        "expect_table_column_count_to_be_between": BOUNDS,
        "expect_table_row_count_to_equal": ONE_NUMBER,
        "expect_table_column_count_to_equal": ONE_NUMBER,
        "expect_column_to_exist": COLUMN,
    }
    if kind in special:
        return special[kind]
    return merged(COLUMN, MOSTLY) if "_values_to_" in kind else merged(COLUMN, BOUNDS)


def expectations(kind: str) -> st.SearchStrategy[dict[str, Any]]:
    return _arguments(kind).map(lambda kwargs: {"type": kind, "kwargs": kwargs})


def plain(value: Any) -> Any:
    """Write values as both engines do: 1 and 1.0 are one number, NaN and null one gap, times are texts."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return None if math.isnan(value) else pytest.approx(value, rel=1e-12, abs=1e-12)
    if isinstance(value, str) and re.match(r"\d{4}-\d\d-\d\d[T ]", value):
        value = datetime.fromisoformat(value)
    if isinstance(value, date):
        value = value if isinstance(value, datetime) else datetime.combine(value, time.min)
        return (value.astimezone(UTC) if value.tzinfo else value).replace(tzinfo=None).isoformat()
    return None if value == "NaT" else value


#: What both say of an expectation. Values beside a gap are counted by Great Expectations as often as they come, and so in another order.
COMPARED = (
    "element_count",
    "unexpected_count",
    "unexpected_percent",
    "unexpected_percent_total",
    "unexpected_percent_nonmissing",
    "missing_count",
    "missing_percent",
    "partial_unexpected_list",
    "partial_unexpected_index_list",
    "observed_value",
)


def require_same(rows: pl.DataFrame, items: list[dict[str, Any]]) -> list[str]:
    """Judge by both; gives the expectations that polars judged."""
    ours = judge_compiled(rows.lazy(), items)
    judged = [(item, mine) for item, mine in zip(items, ours, strict=True) if mine is not None]
    if judged:
        suite = {"name": "both", "expectations": [item for item, _ in judged]}
        theirs = validate_frame(rows.lazy(), suite, engine="great_expectations")["results"]
        for (item, mine), other in zip(judged, theirs, strict=True):
            assert other["meta"]["engine"] == "great_expectations"
            assert mine["success"] == other["success"], item
            for key in COMPARED:
                assert plain(mine["result"].get(key)) == plain(other["result"].get(key)), (key, item)
    return [item["type"] for item, _ in judged]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities
@pytest.mark.parametrize("kind", COVERED)
def test_polars_judges_as_great_expectations_does(kind: str) -> None:
    compiled: list[str] = []

    @given(rows=frames(), items=st.lists(expectations(kind), min_size=4, max_size=8))
    # Making a failing example smaller asks Great Expectations for minutes.
    @settings(
        max_examples=25,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def agree(rows: pl.DataFrame, items: list[dict[str, Any]]) -> None:
        compiled.extend(require_same(rows, items))

    agree()
    assert compiled  # and was not left to Great Expectations each time


def test_decimals_and_bytes_are_shown_as_great_expectations_shows_them() -> None:
    values = {
        "d": [Decimal("1.50"), Decimal("0.10"), None, Decimal("1.50")],
        "b": [b"ab", b"\xff", None, b"ab"],
    }
    rows = pl.DataFrame(values)
    for kind in ("expect_column_values_to_be_null", "expect_column_values_to_not_be_null"):
        items = [{"type": kind, "kwargs": {"column": name}} for name in values]
        assert require_same(rows, items) == [kind, kind]
    null = [{"type": "expect_column_values_to_be_null", "kwargs": {"column": name}} for name in values]
    shown = judge_compiled(rows.lazy(), null)
    assert [one["result"]["partial_unexpected_list"] for one in shown if one] == [
        [1.5, 0.1, 1.5],
        ["b'ab'", r"b'\xff'", "b'ab'"],
    ]


SUITE: list[dict[str, Any]] = [
    {"type": "expect_table_row_count_to_be_between", "kwargs": {"min_value": 9_000, "max_value": 11_000}},
    {"type": "expect_column_to_exist", "kwargs": {"column": "congestion_surcharge"}},
    {"type": "expect_column_values_to_not_be_null", "kwargs": {"column": "passenger_count", "mostly": 0.99}},
    {"type": "expect_column_values_to_not_be_null", "kwargs": {"column": "congestion_surcharge", "mostly": 0.9}},
    {"type": "expect_column_values_to_be_between", "kwargs": {"column": "passenger_count", "min_value": 1, "max_value": 6, "mostly": 0.98}},
    {"type": "expect_column_values_to_be_between", "kwargs": {"column": "trip_distance", "min_value": 0, "strict_min": True, "max_value": 200}},
    {"type": "expect_column_values_to_be_between", "kwargs": {"column": "fare_amount", "min_value": 0, "mostly": 0.999}},
    {"type": "expect_column_values_to_be_in_set", "kwargs": {"column": "payment_type", "value_set": [1, 2, 3, 4]}},
    {"type": "expect_column_values_to_match_regex", "kwargs": {"column": "store_and_fwd_flag", "regex": "^[YN]$"}},
    {"type": "expect_column_value_lengths_to_equal", "kwargs": {"column": "store_and_fwd_flag", "value": 1}},
    {"type": "expect_column_pair_values_a_to_be_greater_than_b", "kwargs": {"column_A": "total_amount", "column_B": "fare_amount", "or_equal": True}},
    {"type": "expect_column_mean_to_be_between", "kwargs": {"column": "trip_distance", "min_value": 2, "max_value": 4}},
    {"type": "expect_column_median_to_be_between", "kwargs": {"column": "total_amount", "min_value": 10, "max_value": 13}},
    {"type": "expect_column_stdev_to_be_between", "kwargs": {"column": "fare_amount", "max_value": 20}},
    {"type": "expect_column_proportion_of_unique_values_to_be_between", "kwargs": {"column": "total_amount", "max_value": 0.5}},
    {"type": "expect_compound_columns_to_be_unique", "kwargs": {"column_list": ["trip_distance", "total_amount", "pickup_location_id", "dropoff_location_id"]}},
]  # fmt: skip


def test_real_months_are_judged_alike(shared_data: Path) -> None:
    raw = pl.read_parquet(shared_data / "nyc_taxi_raw.parquet")
    for month in ("2018-01", "2019-07", "2020-04"):
        rows = raw.filter(pl.col("file_month") == month)
        assert require_same(rows, SUITE) == [item["type"] for item in SUITE]


PIECES = ["a", "b", "1", "_", " ", r"\d", r"\w", r"\.", r"\$", r"\\", ".", "[ab]", "[^a1]", r"[\d-]", "[a-z_]", "(", "(?:", ")", "|", "^", "$", "*", "+", "?", "{2}", "{1,}", "(?i)", r"\s"]  # fmt: skip


@given(
    pattern=st.lists(st.sampled_from(PIECES), min_size=1, max_size=7).map("".join),
    texts=st.lists(st.text("aA1_b .$\\\n-", max_size=5), min_size=1, max_size=12),
)
@settings(max_examples=1_500)
def test_patterns_mean_to_polars_what_they_mean_to_python(pattern: str, texts: list[str]) -> None:
    try:
        search = re.compile(pattern).search
    except re.error:
        assume(False)
    translated = for_ascii(pattern)
    assume(translated is not None)
    found = pl.Series(texts).str.contains(translated).to_list()
    assert found == [search(text) is not None for text in texts], (pattern, translated)


@pytest.mark.parametrize("pattern", [r"^K-\d{5}$", "^[YN]$", r"[\w.+-]+@[\w-]+\.[a-z]{2,}", "^(a|b|cd)+$"])
def test_common_patterns_are_translated(pattern: str) -> None:
    assert for_ascii(pattern) is not None


CLEAN = pl.LazyFrame({"n": [1.0, 2.0, 3.0, 4.0], "s": ["a", "b", "a", "b"]})


def suite_of(kind: str, **kwargs: Any) -> dict[str, Any]:
    return {"name": "one", "expectations": [{"type": kind, "kwargs": kwargs}]}


@pytest.mark.filterwarnings("ignore:.*(condition_parser|row_condition):DeprecationWarning")
def test_what_is_not_compiled_is_left_to_great_expectations() -> None:
    for kind, kwargs in (
        ("expect_column_values_to_match_like_pattern", {"column": "s", "like_pattern": "a%"}),
        ("expect_column_values_to_be_of_type", {"column": "n", "type_": "float64"}),
        ("expect_column_values_to_be_between", {"column": "n", "min_value": 2, "row_condition": "n > 1", "condition_parser": "pandas"}),
    ):  # fmt: skip
        assert compile_expectation(kind, kwargs, CLEAN.collect_schema()) is None
    suite = suite_of("expect_column_values_to_be_between", column="n", min_value=2, row_condition="n > 1", condition_parser="pandas")  # fmt: skip
    (result,) = validate_frame(CLEAN, suite)["results"]
    assert (result["success"], result["meta"]["engine"]) == (True, "great_expectations")


def test_an_expectation_that_cannot_be_evaluated_is_an_error() -> None:
    with pytest.raises(
        ExpectationError, match=r"expect_column_values_to_be_unique.*gone.*could not be evaluated"
    ):
        validate_frame(CLEAN, suite_of("expect_column_values_to_be_unique", column="gone"))


def test_an_expectation_nobody_knows_is_an_error() -> None:
    with pytest.raises(ExpectationError, match=r"expect_miracles|does not accept"):
        validate_frame(CLEAN, suite_of("expect_miracles"))


def test_repeated_values_are_found_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pl.LazyFrame({"k": [7, 1, 2, 3, 1, 4, 5, 7, 6, 2, 1]})
    suite = suite_of("expect_column_values_to_be_unique", column="k")
    (whole,) = validate_frame(rows, suite)["results"]
    monkeypatch.setattr(validation, "_ROWS_AT_ONCE", 2)
    (parts,) = validate_frame(rows, suite)["results"]
    assert whole == parts
    assert whole["result"]["partial_unexpected_list"] == [7, 1, 2, 1, 7, 2, 1]
    assert whole["result"]["unexpected_count"] == 7


def _edge(*values: Any, dtype: Any) -> pl.Series:
    return pl.Series(values, dtype=dtype)


MICROSECONDS = [START + timedelta(microseconds=number) for number in (0, 500, 1000, 1500)]
EDGES = pl.DataFrame(
    {
        "i": _edge(2**31 - 1, 2**31 - 1, 5, 7, dtype=pl.Int32),
        "u": _edge(2**32 - 1, 2**32 - 1, None, 7, dtype=pl.UInt32),
        "g": _edge(0.1, 0.1, 0.7, 16777217.0, dtype=pl.Float32),
        "h": _edge(0.1, None, math.nan, 0.7, dtype=pl.Float32),
        "f": _edge(1e200, -0.0, 0.0, 0.5, dtype=pl.Float64),
        "k": _edge(1, 2, 2, 3, dtype=pl.Int64),
        "m": _edge(*MICROSECONDS, dtype=pl.Datetime("us", "UTC")).cast(pl.Datetime("ms", "UTC")),
        "t": _edge(*MICROSECONDS, dtype=pl.Datetime("us", "UTC")),
    }
)


def _all_edges() -> list[dict[str, Any]]:
    half = "2024-01-01T00:00:00.000500Z"
    found: list[tuple[str, dict[str, Any]]] = [
        ("column_values_to_be_between", {"column": "m", "min_value": half}),
        ("column_values_to_be_between", {"column": "m", "max_value": half, "strict_max": True}),
        ("column_pair_values_to_be_equal", {"column_A": "m", "column_B": "t"}),
        ("column_pair_values_a_to_be_greater_than_b", {"column_A": "t", "column_B": "m"}),
        ("compound_columns_to_be_unique", {"column_list": ["k", "h"]}),
    ]
    found += [
        (f"column_{kind}_to_be_between", {"column": column, bound: value})
        for kind in ("min", "max", "mean", "median", "sum", "stdev")
        for column in "iugf"
        for bound in ("min_value", "max_value")
        for value in (0.1, 2**31)
    ]
    return [{"type": f"expect_{kind}", "kwargs": kwargs} for kind, kwargs in found]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the deviation
def test_sums_beyond_32_bits_and_times_finer_than_the_column() -> None:
    judged = require_same(EDGES, _all_edges())
    # Floats of 32 bits are left to Great Expectations, and the deviation of values whose squares are none.
    assert judged.count("expect_column_sum_to_be_between") == 3 * 4
    assert judged.count("expect_column_stdev_to_be_between") == 2 * 4
    assert len(judged) == 5 + 6 * 3 * 4 - 4


def test_values_that_cannot_be_counted_are_shown() -> None:
    rows = pl.DataFrame({"l": [[1, 2], [1, 2], None], "s": [{"a": 1}, None, {"a": 2}]})
    for column in rows.columns:
        (mine,) = validate_frame(rows.lazy(), suite_of("expect_column_values_to_be_null", column=column))["results"]  # fmt: skip
        assert mine["meta"]["engine"] == "polars"
        assert mine["result"]["unexpected_count"] == 2
        assert mine["result"]["partial_unexpected_list"] == rows[column].drop_nulls().to_list()


def test_an_error_shows_no_private_value_and_no_whole_column() -> None:
    rows = pl.LazyFrame(
        {"email": [f"u{number}@example.org" for number in range(1000)], "n": list(range(1000))}
    )
    suite = suite_of("expect_column_mean_to_be_between", column="email", min_value=1)
    with pytest.raises(ExpectationError) as shown:
        validate_frame(rows, suite)
    assert "@example.org" in str(shown.value)
    assert len(str(shown.value)) < 1200
    with pytest.raises(ExpectationError, match=r"expect_column_mean_to_be_between.*private column") as hidden:
        validate_frame(rows, suite, private=["email"])
    assert "@example.org" not in str(hidden.value)
    asked = suite_of("expect_column_mean_to_be_between", column="email", min_value="u1@example.org")
    with pytest.raises(ExpectationError) as hidden:
        validate_frame(rows, asked, private=["email"])
    assert "@example.org" not in str(hidden.value)


@pytest.mark.parametrize(
    ("column", "bound", "written"),
    [("day", "2024-01-01", "like 2024-01-31T00:00:00"), ("at", "2024-01-01T00:00:00", "like 2024-01-31T00:00:00Z")],
)  # fmt: skip
def test_an_error_of_a_time_says_how_to_write_it(column: str, bound: str, written: str) -> None:
    rows = pl.LazyFrame({"day": [date(2024, 1, 1)], "at": [START]})
    with pytest.raises(ExpectationError, match=f"{written}$"):
        validate_frame(rows, suite_of("expect_column_max_to_be_between", column=column, min_value=bound))
    right = written.removeprefix("like ")
    (result,) = validate_frame(rows, suite_of("expect_column_max_to_be_between", column=column, max_value=right))["results"]  # fmt: skip
    assert result["success"]


def test_a_parameter_of_a_suite_is_an_error_with_the_remedy() -> None:
    suite = suite_of("expect_column_values_to_be_between", column="n", min_value={"$PARAMETER": "lowest"})
    with pytest.raises(ExpectationError, match=r"\$PARAMETER lowest; .*write the value itself"):
        validate_frame(CLEAN, suite)


def test_a_suite_names_types_as_great_expectations_writes_them() -> None:
    with pytest.raises(ExpectationError, match=r"'ExpectColumnValuesToNotBeNull'.*small letters"):
        validate_frame(CLEAN, suite_of("ExpectColumnValuesToNotBeNull", column="n"))


def test_severity_among_the_arguments_counts_as_it_does_there() -> None:
    suite = load_suite(suite_of("expect_column_values_to_be_null", column="n", severity="warning"))
    (result,) = validate_frame(CLEAN, suite)["results"]
    assert not result["success"]
    assert result["expectation_config"]["severity"] == "warning"
    assert result["expectation_config"]["kwargs"] == {"column": "n"}


@pytest.mark.parametrize(
    "item", ["expect_column_to_exist", {"type": "expect_column_to_exist", "kwargs": "n"}]
)
def test_what_is_no_expectation_is_refused(item: Any) -> None:
    with pytest.raises(ValueError, match=r"no object with 'type' and 'kwargs': .*expect_column_to_exist"):
        load_suite({"expectations": [item]})


def test_a_column_whose_name_is_a_pattern_is_itself() -> None:
    rows = pl.LazyFrame({"^n$": [1.0, 2.0], "n": [7.0, 8.0]})
    (result,) = validate_frame(rows, suite_of("expect_column_max_to_be_between", column="^n$", max_value=2))["results"]  # fmt: skip
    assert (result["success"], result["result"]["observed_value"]) == (True, 2.0)


def untouched(values: pl.Series) -> pl.Series:
    if len(values):
        raise AssertionError(f"column {values.name} was loaded")
    return values


NAMED = ["n", "m", "ü x", "big"]
ROWS_OF_THREE = pl.LazyFrame({"n": [1, 2, 3], "m": [3, 2, 1], "ü x": ["a", "b", "b"], "big": [0.1, 0.2, 0.3]})
OF_NAMES = [
    ("table_columns_to_match_set", {"column_set": [*reversed(NAMED)]}, True),
    ("table_columns_to_match_set", {"column_set": ["n", "big"]}, False),
    ("table_columns_to_match_set", {"column_set": ["n", "big"], "exact_match": False}, True),
    ("table_columns_to_match_ordered_list", {"column_list": NAMED}, True),
    ("table_columns_to_match_ordered_list", {"column_list": ["m", "n", "gone"]}, False),
]
WITH_CONDITION = [
    ("column_values_to_be_between", {"column": "n", "max_value": 1, "row_condition": "m > 2"}, True),
    ("column_values_to_be_between", {"column": "n", "max_value": 2, "row_condition": '`ü x` == "b"'}, False),
    ("table_row_count_to_equal", {"value": 2, "row_condition": "n < 3"}, True),
    (
        "column_values_to_be_between",
        {
            "column": "n",
            "max_value": 1,
            "row_condition": {
                "type": "comparison",
                "column": {"name": "ü x"},
                "operator": "==",
                "parameter": "a",
            },
        },
        True,
    ),
]


@pytest.mark.filterwarnings(
    "ignore:.* row_condition:DeprecationWarning", "ignore:The condition_parser:DeprecationWarning"
)
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(("kind", "kwargs", "success"), OF_NAMES + WITH_CONDITION)
def test_great_expectations_is_given_the_columns_that_are_asked_for(
    kind: str, kwargs: dict[str, Any], success: bool, together: bool
) -> None:
    more = {"condition_parser": "pandas"} if isinstance(kwargs.get("row_condition"), str) else {}
    asked = [{"type": f"expect_{kind}", "kwargs": kwargs | more}]
    if together:  # with one that needs rows
        asked.append({"type": "expect_column_quantile_values_to_be_between", "kwargs": {"column": "n", "quantile_ranges": {"quantiles": [0.5], "value_ranges": [[2, 2]]}}})  # fmt: skip
    suite = {"name": "s", "expectations": asked}
    guarded = ROWS_OF_THREE.with_columns(pl.col("big").map_batches(untouched, return_dtype=pl.Float64))
    report = validate_frame(guarded, suite)
    assert [result["success"] for result in report["results"]] == [success, True][: len(asked)]
    # What it says of all rows, in the order of its own sets.
    assert in_order(report["results"]) == in_order(_whole(ROWS_OF_THREE, suite))


def in_order(results: list[dict[str, Any]]) -> list[Any]:
    def sorted_lists(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: sorted_lists(item) for key, item in value.items()}
        return sorted(map(repr, value)) if isinstance(value, list) else value

    return [sorted_lists(result["result"]) for result in results]


def _whole(frame: pl.LazyFrame, suite: dict[str, Any]) -> list[dict[str, Any]]:
    """Great Expectations by itself, on all columns and rows."""
    context = gx.get_context(mode="ephemeral")
    asset = context.data_sources.add_pandas("whole").add_dataframe_asset("rows")
    batch = asset.add_batch_definition_whole_dataframe("all").get_batch(
        {"dataframe": frame.collect().to_pandas()}
    )
    return [
        batch.validate(gx.ExpectationSuite(name="s", expectations=[item]).expectations[0]).to_json_dict()
        for item in suite["expectations"]
    ]
