"""The parity page: what it says of each expectation is what the code does, with each case that is left to Great Expectations tried."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import polars as pl
import pytest

from airflow_mlops.core.checks.expectations import COVERED, compile_expectation
from airflow_mlops.core.checks.validation import judge_compiled
from airflow_mlops.exceptions import ExpectationError
from airflow_mlops.integrations.great_expectations import validate_frame
from tests.conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "reference" / "expectations.md").read_text()

#: What the page calls the types of columns that polars may judge.
JUDGED = {
    "whole numbers": [pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.UInt16, pl.UInt32],
    "floats": [pl.Float64],
    "narrow floats": [pl.Float32],
    "text": [pl.String],
    "times": [pl.Datetime("us", "UTC"), pl.Datetime("ms", "UTC")],
    "truth values": [pl.Boolean],
}
#: Types whose values only counting nulls and columns is not left to Great Expectations.
LEFT = [
    pl.UInt64(), pl.Int128(), pl.Date(), pl.Time(), pl.Duration("us"), pl.Datetime("us"), pl.Datetime("ns", "UTC"),
    pl.Datetime("us", "Europe/Berlin"), pl.Decimal(10, 2), pl.Binary(), pl.Categorical(), pl.Null(), pl.List(pl.Int64), pl.Struct({"a": pl.Int64}),
]  # fmt: skip
INSTANT = "2024-01-01T00:00:00Z"
#: Arguments that fit a column of some type.
ARGUMENTS: list[dict[str, Any]] = [
    {"min_value": 1, "value": 1, "value_set": [1], "regex": "a", "regex_list": ["a"]},
    {"min_value": INSTANT, "value_set": ["a"]},
    {},
]


def compiled(kind: str, dtype: Any) -> bool:
    schema = pl.Schema({"c": dtype, "d": dtype})
    columns = {"column": "c", "column_A": "c", "column_B": "d", "column_list": ["c", "d"]}
    return any(
        compile_expectation(
            kind,
            {name: value for name, value in (columns | more).items() if name in COVERED[kind]},
            schema,
        )
        is not None
        for more in ARGUMENTS
    )


def types_of(kind: str) -> str:
    if all(compiled(kind, dtype) for group in [*JUDGED.values(), LEFT] for dtype in group):
        return "any"
    assert not [dtype for dtype in LEFT if compiled(kind, dtype)]
    found = []
    for name, group in JUDGED.items():
        judged = {compiled(kind, dtype) for dtype in group}
        assert len(judged) == 1, (kind, name)
        found += [name] if judged == {True} else []
    return ", ".join(found)


def section(title: str) -> str:
    return PAGE.split(f"## {title}\n")[1].split("\n## ")[0]


def table(title: str) -> list[list[str]]:
    rows = re.findall(r"^\| (.*) \|$", section(title), re.MULTILINE)[1:]
    return [[cell.strip() for cell in row.split("|")] for row in rows]


def test_what_polars_judges() -> None:
    told = {
        row[0].strip("`"): (set(re.findall(r"`(\w+)`", row[1])), row[2]) for row in table("Judged by polars")
    }
    assert told == {kind: (set(known), types_of(kind)) for kind, known in COVERED.items()}
    assert f"{len(COVERED)} expectations" in PAGE


ROWS = pl.DataFrame(
    {
        "n": [1, 2, 3, 4],
        "m": [1, 2, 3, 5],
        "x": [0.5, 1.5, 2.5, 3.5],
        "s": ["a", "b", "c", "d"],
        "j": ["{}", "[]", "1", "2"],
        "when": ["2024-01-01", "2024-01-02", "2024-01-03", "2024-01-04"],
    }
)
#: The others, with arguments that fit.
OTHERS: dict[str, dict[str, Any]] = {
    "expect_column_distinct_values_to_be_in_set": {"column": "s", "value_set": ["a", "b", "c", "d"]},
    "expect_column_distinct_values_to_contain_set": {"column": "s", "value_set": ["a"]},
    "expect_column_distinct_values_to_equal_set": {"column": "s", "value_set": ["a", "b", "c", "d"]},
    "expect_column_kl_divergence_to_be_less_than": {
        "column": "s",
        "partition_object": {"values": ["a", "b", "c", "d"], "weights": [0.25] * 4},
        "threshold": 0.1,
    },
    "expect_column_most_common_value_to_be_in_set": {"column": "s", "value_set": ["a"]},
    "expect_column_pair_values_to_be_in_set": {"column_A": "n", "column_B": "m", "value_pairs_set": [(1, 1), (2, 2), (3, 3), (4, 5)]},
    "expect_column_quantile_values_to_be_between": {
        "column": "x",
        "quantile_ranges": {"quantiles": [0.5], "value_ranges": [[1, 3]]},
    },
    "expect_column_type_to_be": {"column": "x", "type_": "float64"},
    "expect_column_value_z_scores_to_be_less_than": {"column": "x", "threshold": 3, "double_sided": True},
    "expect_column_values_to_be_dateutil_parseable": {"column": "when"},
    "expect_column_values_to_be_decreasing": {"column": "n", "mostly": 0},
    "expect_column_values_to_be_in_type_list": {"column": "x", "type_list": ["float64"]},
    "expect_column_values_to_be_increasing": {"column": "n"},
    "expect_column_values_to_be_json_parseable": {"column": "j"},
    "expect_column_values_to_be_of_type": {"column": "x", "type_": "float64"},
    "expect_column_values_to_match_json_schema": {"column": "j", "json_schema": {}},
    "expect_column_values_to_match_like_pattern": {"column": "s", "like_pattern": "%"},
    "expect_column_values_to_match_like_pattern_list": {"column": "s", "like_pattern_list": ["%"]},
    "expect_column_values_to_match_strftime_format": {"column": "when", "strftime_format": "%Y-%m-%d"},
    "expect_column_values_to_not_be_outliers": {"column": "x", "method": "iqr", "multiplier": 3},
    "expect_column_values_to_not_match_like_pattern": {"column": "s", "like_pattern": "z"},
    "expect_column_values_to_not_match_like_pattern_list": {"column": "s", "like_pattern_list": ["z"]},
    "expect_multicolumn_sum_to_equal": {"column_list": ["n", "m"], "sum_total": 2, "mostly": 0},
    "expect_multicolumn_values_to_be_equal": {"column_list": ["n", "m"], "mostly": 0},
    "expect_query_results_to_match_comparison": {
        "base_query": "SELECT 1",
        "comparison_data_source_name": "frame",
        "comparison_query": "SELECT 1",
    },
    "expect_select_column_values_to_be_unique_within_record": {"column_list": ["n", "s"]},
    "expect_table_columns_to_match_ordered_list": {"column_list": ["n", "m", "x", "s", "j", "when"]},
    "expect_table_columns_to_match_set": {"column_set": ["n", "m", "x", "s", "j", "when"]},
    "expect_table_row_count_to_equal_other_table": {"other_table_name": "t"},
    "unexpected_rows_expectation": {"unexpected_rows_query": "SELECT * FROM {batch} WHERE n > 9"},
}  # fmt: skip


def outcome(kind: str) -> str:
    """Try one in this package's own way: ``Great Expectations`` judges it, or it can't."""
    try:
        (result,) = validate_frame(ROWS.lazy(), {"expectations": [{"type": kind, "kwargs": OTHERS[kind]}]})[
            "results"
        ]
    except ExpectationError:
        return "error"
    assert result["meta"]["engine"] == "great_expectations"
    return "Great Expectations"


def test_there_are_no_others() -> None:
    from great_expectations.expectations import registry

    known = {
        name
        for name in registry.list_registered_expectation_implementations()
        if registry.get_expectation_impl(name).__module__.startswith("great_expectations.")
    }
    assert known == set(COVERED) | set(OTHERS)


@pytest.mark.filterwarnings("ignore")
def test_all_others_are_judged_as_the_page_says() -> None:
    told = {row[0].strip("`"): row[1] for row in table("Judged by Great Expectations")}
    assert told == {kind: outcome(kind) for kind in OTHERS}


def _on(kind: str, **kwargs: Any) -> dict[str, Any]:
    return {"type": f"expect_{kind}", "kwargs": kwargs}


BIG = 2**53 + 1
AT = datetime(2024, 1, 1, tzinfo=UTC)
NARROW = pl.Series([0.1, 0.7], dtype=pl.Float32)
#: Cases of expectations that polars judges otherwise, by the page's words for them.
CASES: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    "`row_condition`, `condition_parser`": [
        ({"n": [1, 2]}, _on("column_values_to_be_between", column="n", min_value=2, row_condition="n > 1", condition_parser="pandas"))
    ],
    "any other argument that polars does not know": [
        ({"n": [1, 2]}, _on("column_values_to_be_between", column="n", min_value=0, parse_strings_as_datetimes=True))
    ],
    "an argument that is `null`, but for bounds and conditions": [
        ({"n": [1, 2]}, _on("column_values_to_not_be_null", column="n", nonsense=None)),
        ({"n": [1, 2]}, _on("column_values_to_be_between", column="n", min_value=0, strict_min=None)),
    ],
    "`strict_min`, `strict_max` or `or_equal` that is neither `true` nor `false`": [
        ({"n": [1, 2]}, _on("column_values_to_be_between", column="n", min_value=1, strict_min="false")),
        ({"n": [1, 2]}, _on("column_max_to_be_between", column="n", max_value=2, strict_max={"$PARAMETER": "strict"})),
        ({"n": [1], "m": [1]}, _on("column_pair_values_a_to_be_greater_than_b", column_A="n", column_B="m", or_equal="no")),
    ],
    "a column called `*`, or with a name from `^` to `$`": [
        ({"*": [1], "b": [2]}, _on("column_values_to_be_between", column="*", min_value=2)),
        ({"^b$": [1], "b": [2]}, _on("column_max_to_be_between", column="^b$", max_value=1)),
        ({"^b$": [1], "b": [2]}, _on("compound_columns_to_be_unique", column_list=["^b$", "b"])),
    ],
    "a column that is not there": [({"n": [1]}, _on("column_values_to_be_unique", column="gone"))],
    "`mostly` that is no share": [
        ({"n": [1]}, _on("column_values_to_be_unique", column="n", mostly=2)),
        ({"n": [1]}, _on("column_values_to_be_unique", column="n", mostly=True)),
    ],
    "bounds of another kind than the column's values": [
        ({"n": [1]}, _on("column_values_to_be_between", column="n", min_value="0")),
        ({"s": ["a"]}, _on("column_value_lengths_to_be_between", column="s", min_value="1")),
        ({"n": [1]}, _on("column_mean_to_be_between", column="n", min_value=INSTANT)),
        ({"n": [1]}, _on("column_values_to_be_between", column="n", min_value=float("nan"))),
    ],
    "whole numbers from 2^53 on as an argument": [
        ({"n": [BIG]}, _on("column_values_to_be_between", column="n", min_value=BIG)),
        ({"n": [BIG]}, _on("column_values_to_be_in_set", column="n", value_set=[BIG])),
    ],
    "whole numbers beyond 2^53 in a column with nulls": [
        ({"n": [BIG, None]}, _on("column_values_to_be_between", column="n", min_value=0)),
        ({"n": [BIG, None]}, _on("column_max_to_be_between", column="n", min_value=0)),
    ],
    "a bound that is no whole number, of lengths, distinct values, rows or columns": [
        ({"s": ["a"]}, _on("column_value_lengths_to_be_between", column="s", min_value=0.5)),
        ({"s": ["a"]}, _on("column_unique_value_count_to_be_between", column="s", min_value=0.5)),
        ({"s": ["a"]}, _on("table_row_count_to_be_between", min_value=0.5)),
        ({"s": ["a"]}, _on("table_row_count_to_equal", value=1.5)),
        ({"s": ["a"]}, _on("table_column_count_to_be_between", max_value=1.5)),
        ({"s": ["a"]}, _on("table_column_count_to_equal", value=1.5)),
    ],
    "a lower bound above the upper one, or no bound": [
        ({"n": [1]}, _on("column_values_to_be_between", column="n", min_value=2, max_value=1)),
        ({"n": [1]}, _on("column_values_to_be_between", column="n")),
        ({"n": [1]}, _on("table_row_count_to_be_between", min_value=2, max_value=1)),
    ],
    "times as bounds that are not `YYYY-MM-DD[T ]hh:mm[:ss[.fff]]` with `Z` or an offset, in UTC within the years 1 to 9999": [
        ({"t": [AT]}, _on("column_values_to_be_between", column="t", min_value="0001-01-01T00:00:00+05:00")),
        ({"t": [AT]}, _on("column_values_to_be_between", column="t", min_value="2024-01-01")),
        ({"t": [AT]}, _on("column_values_to_be_between", column="t", min_value="2024-01-01T00:00:00")),
        ({"t": [AT]}, _on("column_values_to_be_between", column="t", min_value="Jan 1 2024 UTC")),
        ({"t": [AT]}, _on("column_values_to_be_between", column="t", min_value="2024-02-30T00:00:00Z")),
    ],
    "a set of mixed kinds, or of another kind than the column's": [
        ({"s": ["a"]}, _on("column_values_to_be_in_set", column="s", value_set=["a", 1])),
        ({"n": [1]}, _on("column_values_to_not_be_in_set", column="n", value_set=["a"])),
        ({"b": [True]}, _on("column_values_to_be_in_set", column="b", value_set=[True])),
    ],
    "a pattern that is no regular expression of Python's": [
        ({"s": ["a"]}, _on("column_values_to_match_regex", column="s", regex="(")),
        ({"s": ["a"]}, _on("column_values_to_match_regex_list", column="s", regex_list=["a", "("])),
        ({"s": ["a"]}, _on("column_values_to_match_regex_list", column="s", regex_list=[])),
    ],
    "a pair of one column with itself, or of two kinds": [
        ({"n": [1]}, _on("column_pair_values_to_be_equal", column_A="n", column_B="n")),
        ({"n": [1], "s": ["a"]}, _on("column_pair_values_to_be_equal", column_A="n", column_B="s")),
        ({"n": [1]}, _on("compound_columns_to_be_unique", column_list=["n", "n"])),
    ],
    "`ignore_row_if` with an unknown word": [
        ({"n": [1], "m": [1]}, _on("column_pair_values_to_be_equal", column_A="n", column_B="m", ignore_row_if="maybe")),
    ],
    "minimum, maximum, mean, median, sum or deviation of narrow floats": [
        ({"x": NARROW}, _on(f"column_{kind}_to_be_between", column="x", min_value=0.1))
        for kind in ("min", "max", "mean", "median", "sum", "stdev")
    ],
    "a deviation of values beyond 1e150, a mean or sum beyond 1e290": [
        ({"x": [1e308, 1e308, -1e308]}, _on("column_mean_to_be_between", column="x", min_value=0)),
        ({"x": [1e308, 1e308, -1e308]}, _on("column_sum_to_be_between", column="x", min_value=0)),
        ({"x": [1e200, 1.0]}, _on("column_stdev_to_be_between", column="x", min_value=0)),
    ],
    "a median of a column with infinities": [
        ({"x": [1.0, float("inf")]}, _on("column_median_to_be_between", column="x", min_value=0)),
    ],
    "dates, times in another zone than UTC or without one, in nanoseconds": [
        ({"t": [datetime(2024, 1, 1)]}, _on("column_values_to_be_between", column="t", min_value=INSTANT)),
        ({"d": [AT.date()]}, _on("column_values_to_be_unique", column="d")),
    ],
    "decimals, lists, structures, binary, categories, UInt64": [
        ({"n": [Decimal("1.50")]}, _on("column_values_to_be_between", column="n", min_value=0)),
        ({"n": [[1]]}, _on("column_values_to_be_unique", column="n")),
    ],
}  # fmt: skip


def test_every_case_that_is_left_is_told() -> None:
    assert [row[0] for row in table("Left to Great Expectations all the same")] == list(CASES)


@pytest.mark.parametrize("case", CASES)
def test_what_is_left_is_not_judged_by_polars(case: str) -> None:
    for columns, expectation in CASES[case]:
        assert judge_compiled(pl.LazyFrame(columns), [expectation]) == [None], expectation


if __name__ == "__main__":  # writes the rows of both tables, to be pasted
    for name, known in COVERED.items():
        arguments = ", ".join(
            f"`{one}`" for one in sorted(known, key=lambda one: (not one.startswith("column"), one))
        )
        print(f"| `{name}` | {arguments} | {types_of(name)} |")  # noqa: T201
    for name in OTHERS:
        print(f"| `{name}` | {outcome(name)} |")  # noqa: T201
