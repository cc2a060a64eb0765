"""Expectations of numbers about all rows, and of the table itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.checks.expectation_rules import (
    ROWS,
    Compiler,
    Judge,
    Kwargs,
    Rule,
    TableRule,
    guards_of,
    is_number,
    is_whole,
    known_columns,
    missing,
    value_of,
)
from airflow_mlops.core.checks.whole_columns import count_distinct, exact_median

if TYPE_CHECKING:
    import polars as pl


#: The largest numbers of which many, or many squares, can be added up.
_LARGEST = {"stdev": 1e150, "mean": 1e290, "sum": 1e290}


def _within(observed: Any, kwargs: Kwargs) -> bool:
    low, high = kwargs.get("min_value"), kwargs.get("max_value")
    above = low is None or (observed > low if kwargs.get("strict_min") else observed >= low)
    below = high is None or (observed < high if kwargs.get("strict_max") else observed <= high)
    return bool(above and below)


def _bounds_are_numbers(kwargs: Kwargs, fits: Callable[[Any], bool] = is_number) -> bool:
    return all(fits(kwargs[name]) for name in ("min_value", "max_value") if name in kwargs)


def _judge_number(name: str, kwargs: Kwargs) -> Judge:
    def judge(measures: Mapping[str, Any]) -> tuple[bool, dict[str, Any]]:
        observed = measures[name]
        if observed is None or (isinstance(observed, float) and math.isnan(observed)):
            return False, {"observed_value": None}
        return _within(observed, kwargs), {"observed_value": observed}

    return judge


def _of_numbers(kwargs: Kwargs, schema: pl.Schema) -> tuple[str, ...] | None:
    """Take the column, where pandas computes in the same width: of floats in 32 bits it computes, and compares, in 32."""
    import polars as pl

    columns = known_columns([kwargs.get("column")], schema, "number")
    narrow = columns is not None and schema[columns[0]] == pl.Float32
    return None if narrow or not _bounds_are_numbers(kwargs) else columns


def _aggregate(name: str, aggregated: Callable[[pl.Expr], pl.Expr]) -> Compiler:
    def compile_rule(kwargs: Kwargs, schema: pl.Schema) -> Rule | None:
        import polars as pl

        columns = _of_numbers(kwargs, schema)
        if columns is None:
            return None
        key, value = f"{name}:{columns[0]}", value_of(columns[0], schema)
        if schema[columns[0]].is_integer():
            value = value.cast(
                pl.Int64
            )  # else numbers of 32 bits are added up in 32, and begin anew beyond them
        return TableRule(
            measures={key: aggregated(value)},
            judge=_judge_number(key, kwargs),
            guards=guards_of(schema, *columns) | _too_large(name, columns[0], value),
        )

    return compile_rule


def _too_large(name: str, column: str, value: pl.Expr) -> dict[str, pl.Expr]:
    """Find finite values whose squares, or sums, are not: pandas then says infinite where polars says nothing, or the other way round."""
    largest = _LARGEST.get(name)
    if largest is None:
        return {}
    return {f"large:{name}:{column}": (value.is_finite() & (value.abs() > largest)).any()}


def _median(kwargs: Kwargs, schema: pl.Schema) -> Rule | None:
    columns = _of_numbers(kwargs, schema)
    if columns is None:
        return None
    key, value = f"median:{columns[0]}", value_of(columns[0], schema)
    guards = guards_of(schema, *columns)
    if schema[columns[0]].is_float():
        guards[f"infinite:{columns[0]}"] = value.is_infinite().any()
    return TableRule(
        measures={},
        judge=_judge_number(key, kwargs),
        guards=guards,
        apart=lambda frame, at_once: {key: exact_median(frame, value, rows_at_once=at_once)},
    )


def _distinct(*, share: bool) -> Compiler:
    """Judge how many distinct values there are, or what share of the values that are there they make."""

    def compile_rule(kwargs: Kwargs, schema: pl.Schema) -> Rule | None:
        columns = known_columns([kwargs.get("column")], schema, "number", "text", "time", "truth")
        if columns is None or not _bounds_are_numbers(kwargs, is_number if share else is_whole):
            return None
        distinct, there = f"distinct:{columns[0]}", f"there:{columns[0]}"

        def judge(measures: Mapping[str, Any]) -> tuple[bool, dict[str, Any]]:
            observed = measures[distinct]
            if share:
                observed = observed / measures[there] if measures[there] else 0
            return _within(observed, kwargs), {"observed_value": observed}

        return TableRule(
            measures={there: (~missing(columns[0], schema)).sum()},
            judge=judge,
            guards=guards_of(schema, *columns),
            apart=lambda frame, at_once: {
                distinct: count_distinct(frame, value_of(columns[0], schema), rows_at_once=at_once)
            },
        )

    return compile_rule


def _share_there(kwargs: Kwargs, schema: pl.Schema) -> Rule | None:
    column = kwargs.get("column")
    if not isinstance(column, str) or column not in schema or not _bounds_are_numbers(kwargs):
        return None
    there = f"there:{column}"

    def judge(measures: Mapping[str, Any]) -> tuple[bool, dict[str, Any]]:
        observed = measures[there] / measures[ROWS] if measures[ROWS] else 0
        return _within(observed, kwargs), {"observed_value": observed}

    return TableRule(measures={there: (~missing(column, schema)).sum()}, judge=judge)


def _ordered(kwargs: Kwargs) -> bool:
    bounds = [kwargs[name] for name in ("min_value", "max_value") if name in kwargs]
    return _bounds_are_numbers(kwargs, is_whole) and bounds == sorted(bounds)


def _rows_between(kwargs: Kwargs, schema: pl.Schema) -> Rule | None:
    if not _ordered(kwargs):
        return None
    return TableRule(measures={}, judge=_judge_number(ROWS, kwargs))


def _rows_equal(kwargs: Kwargs, schema: pl.Schema) -> Rule | None:
    wanted = kwargs.get("value")
    if not is_whole(wanted):
        return None
    return TableRule(
        measures={}, judge=lambda measures: (measures[ROWS] == wanted, {"observed_value": measures[ROWS]})
    )


def _columns_between(kwargs: Kwargs, schema: pl.Schema) -> Rule | None:
    if not _ordered(kwargs):
        return None
    count = len(schema)
    return TableRule(measures={}, judge=lambda _: (_within(count, kwargs), {"observed_value": count}))


def _columns_equal(kwargs: Kwargs, schema: pl.Schema) -> Rule | None:
    wanted, count = kwargs.get("value"), len(schema)
    if not is_whole(wanted):
        return None
    return TableRule(measures={}, judge=lambda _: (count == wanted, {"observed_value": count}))


def _column_exists(kwargs: Kwargs, schema: pl.Schema) -> Rule | None:
    column = kwargs.get("column")
    if not isinstance(column, str):
        return None
    return TableRule(measures={}, judge=lambda _: (column in schema, {}))


_MIN_MAX = frozenset({"min_value", "max_value", "strict_min", "strict_max"})
_NUMBER = frozenset({"column"}) | _MIN_MAX

#: How each is compiled, and with which arguments.
TABLE_EXPECTATIONS: dict[str, tuple[Compiler, frozenset[str]]] = {
    "expect_column_min_to_be_between": (_aggregate("min", lambda value: value.min()), _NUMBER),
    "expect_column_max_to_be_between": (_aggregate("max", lambda value: value.max()), _NUMBER),
    "expect_column_mean_to_be_between": (_aggregate("mean", lambda value: value.mean()), _NUMBER),
    "expect_column_median_to_be_between": (_median, _NUMBER),
    "expect_column_sum_to_be_between": (_aggregate("sum", lambda value: value.sum()), _NUMBER),
    "expect_column_stdev_to_be_between": (_aggregate("stdev", lambda value: value.std()), _NUMBER),
    "expect_column_unique_value_count_to_be_between": (_distinct(share=False), _NUMBER),
    "expect_column_proportion_of_unique_values_to_be_between": (_distinct(share=True), _NUMBER),
    "expect_column_proportion_of_non_null_values_to_be_between": (_share_there, _NUMBER),
    "expect_table_row_count_to_be_between": (_rows_between, frozenset({"min_value", "max_value"})),
    "expect_table_row_count_to_equal": (_rows_equal, frozenset({"value"})),
    "expect_table_column_count_to_be_between": (_columns_between, frozenset({"min_value", "max_value"})),
    "expect_table_column_count_to_equal": (_columns_equal, frozenset({"value"})),
    "expect_column_to_exist": (_column_exists, frozenset({"column"})),
}
