"""Expectations of every row: what its values must be, how two of them relate, and what no two rows may share."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.checks.expectation_rules import (
    Compiler,
    Kwargs,
    RowRule,
    Rule,
    UniqueRule,
    guards_of,
    is_number,
    is_whole,
    kind_of,
    known_columns,
    missing,
    value_of,
)
from airflow_mlops.core.checks.patterns import matches

if TYPE_CHECKING:
    import polars as pl


def _null_rule(*, wanted: bool) -> Compiler:
    def compile_rule(kwargs: Kwargs, schema: pl.Schema) -> Rule | None:
        column = kwargs.get("column")
        if not isinstance(column, str) or column not in schema:
            return None
        there = missing(column, schema)
        return RowRule(
            considered=None,
            broken=~there if wanted else there,
            shown=(column,),
            mostly=kwargs.get("mostly", 1.0),
        )

    return compile_rule


def _of_values(broken: Callable[[pl.Expr, str, Kwargs], pl.Expr | None], *kinds: str) -> Compiler:
    """Make a rule of what a column's values must not be."""

    def compile_rule(kwargs: Kwargs, schema: pl.Schema) -> Rule | None:
        columns = known_columns([kwargs.get("column")], schema, *kinds)
        if columns is None:
            return None
        kind = kind_of(schema[columns[0]]) or ""
        found = broken(value_of(columns[0], schema), kind, kwargs)
        if found is None:
            return None
        return RowRule(
            considered=~missing(columns[0], schema),
            broken=found,
            shown=columns,
            mostly=kwargs.get("mostly", 1.0),
            guards=guards_of(schema, *columns),
        )

    return compile_rule


def _outside(value: pl.Expr, kind: str, kwargs: Kwargs) -> pl.Expr | None:
    given = [kwargs.get("min_value"), kwargs.get("max_value")]
    bounds = [None if bound is None else _bound(bound, kind) for bound in given]
    if bounds == [None, None] or any(
        one is None and raw is not None for one, raw in zip(bounds, given, strict=True)
    ):
        return None
    low, high = bounds
    if low is not None and high is not None and low > high:
        return None  # an error, which Great Expectations words
    return _beyond(value, low, high, kwargs)


def _beyond(value: pl.Expr, low: Any, high: Any, kwargs: Kwargs) -> pl.Expr:
    import polars as pl

    outside = pl.lit(value=False)
    if low is not None:
        outside = outside | (value <= low if kwargs.get("strict_min") else value < low)
    if high is not None:
        outside = outside | (value >= high if kwargs.get("strict_max") else value > high)
    return outside


#: Times that dateutil, which Great Expectations asks, and Python read alike.
_INSTANT = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d(\.\d{3}|\.\d{6})?)?(Z|[+-]\d\d:\d\d)", re.ASCII)


def _bound(bound: Any, kind: str) -> Any:
    """Give a bound as the column's kind of value; ``None`` where it is another kind."""
    if kind == "number":
        return bound if is_number(bound) else None
    if isinstance(bound, str):
        if not _INSTANT.fullmatch(bound):
            return None
        try:
            bound = datetime.fromisoformat(bound)
        except ValueError:
            return None
    if not isinstance(bound, datetime) or bound.tzinfo is None:
        return None
    try:
        return bound.astimezone(UTC)
    except OverflowError:  # before the year 1, or after 9999
        return None


def _in_set(*, wanted: bool) -> Callable[[pl.Expr, str, Kwargs], pl.Expr | None]:
    def broken(value: pl.Expr, kind: str, kwargs: Kwargs) -> pl.Expr | None:
        import polars as pl

        allowed = kwargs.get("value_set")
        if not isinstance(allowed, list | tuple | set | frozenset):
            return None
        known = [item for item in allowed if item is not None]
        if kind == "text":
            if not all(isinstance(item, str) for item in known):
                return None
            found = value.is_in(pl.Series(known, dtype=pl.String).implode())
        else:
            if not all(map(is_number, known)):
                return None
            found = value.cast(pl.Float64).is_in(pl.Series(known, dtype=pl.Float64).implode())
        return ~found if wanted else found

    return broken


def _regex(*, wanted: bool) -> Callable[[pl.Expr, str, Kwargs], pl.Expr | None]:
    def broken(value: pl.Expr, kind: str, kwargs: Kwargs) -> pl.Expr | None:
        found = matches(value, kwargs.get("regex"))
        return None if found is None else ~found if wanted else found

    return broken


def _regex_list(*, wanted: bool) -> Callable[[pl.Expr, str, Kwargs], pl.Expr | None]:
    def broken(value: pl.Expr, kind: str, kwargs: Kwargs) -> pl.Expr | None:
        import polars as pl

        patterns, together = kwargs.get("regex_list"), kwargs.get("match_on", "any")
        if not isinstance(patterns, list | tuple) or not patterns or together not in ("any", "all"):
            return None
        found = [one for one in (matches(value, pattern) for pattern in patterns) if one is not None]
        if len(found) < len(patterns):
            return None
        matched = pl.any_horizontal(found) if together == "any" else pl.all_horizontal(found)
        return ~matched if wanted else matched

    return broken


def _length(value: pl.Expr, kind: str, kwargs: Kwargs) -> pl.Expr | None:
    low, high = kwargs.get("min_value"), kwargs.get("max_value")
    if (low is None and high is None) or not all(bound is None or is_whole(bound) for bound in (low, high)):
        return None
    return _beyond(value.str.len_chars(), low, high, kwargs)


def _length_equal(value: pl.Expr, kind: str, kwargs: Kwargs) -> pl.Expr | None:
    wanted = kwargs.get("value")
    return value.str.len_chars() != wanted if is_number(wanted) else None


def _pair(holds: Callable[[pl.Expr, pl.Expr, Kwargs], pl.Expr], *kinds: str) -> Compiler:
    """Make a rule of how two columns' values relate; one that is missing relates to nothing."""

    def compile_rule(kwargs: Kwargs, schema: pl.Schema) -> Rule | None:

        columns = known_columns([kwargs.get("column_A"), kwargs.get("column_B")], schema, *kinds)
        if columns is None or len(set(columns)) < 2 or len({kind_of(schema[name]) for name in columns}) > 1:
            return None
        first, second = (missing(name, schema) for name in columns)
        ignored = {
            "both_values_are_missing": first & second,
            "either_value_is_missing": first | second,
            "neither": first.is_null(),  # never
        }.get(kwargs.get("ignore_row_if", "both_values_are_missing"))
        if ignored is None:
            return None
        related = holds(value_of(columns[0], schema), value_of(columns[1], schema), kwargs)
        return RowRule(
            considered=~ignored,
            broken=~related.fill_null(value=False),
            shown=columns,
            mostly=kwargs.get("mostly", 1.0),
            guards=guards_of(schema, *columns),
        )

    return compile_rule


def _greater(first: pl.Expr, second: pl.Expr, kwargs: Kwargs) -> pl.Expr:
    return first >= second if kwargs.get("or_equal") else first > second


def _equal(first: pl.Expr, second: pl.Expr, kwargs: Kwargs) -> pl.Expr:
    return first == second


def _unique(kwargs: Kwargs, schema: pl.Schema) -> Rule | None:
    columns = known_columns([kwargs.get("column")], schema, "number", "text", "time")
    if columns is None:
        return None
    return UniqueRule(
        columns=columns,
        considered=~missing(columns[0], schema),
        mostly=kwargs.get("mostly", 1.0),
        guards=guards_of(schema, *columns),
    )


def _compound_unique(kwargs: Kwargs, schema: pl.Schema) -> Rule | None:
    import polars as pl

    names = kwargs.get("column_list")
    columns = known_columns(
        names if isinstance(names, list | tuple) else (), schema, "number", "text", "time", "truth"
    )
    if columns is None or len(set(columns)) < max(2, len(columns)):
        return None
    absent = [missing(name, schema) for name in columns]
    ignored = {
        "all_values_are_missing": pl.all_horizontal(absent),
        "any_value_is_missing": pl.any_horizontal(absent),
        "never": absent[0].is_null(),
    }.get(kwargs.get("ignore_row_if", "all_values_are_missing"))
    if ignored is None:
        return None
    return UniqueRule(
        columns=columns,
        considered=~ignored,
        mostly=kwargs.get("mostly", 1.0),
        guards=guards_of(schema, *columns),
    )


_MIN_MAX = frozenset({"min_value", "max_value", "strict_min", "strict_max"})
_ROW = frozenset({"column", "mostly"})
_PAIR = frozenset({"column_A", "column_B", "mostly", "ignore_row_if"})

#: How each is compiled, and with which arguments.
ROW_EXPECTATIONS: dict[str, tuple[Compiler, frozenset[str]]] = {
    "expect_column_values_to_not_be_null": (_null_rule(wanted=False), _ROW),
    "expect_column_values_to_be_null": (_null_rule(wanted=True), _ROW),
    "expect_column_values_to_be_between": (_of_values(_outside, "number", "time"), _ROW | _MIN_MAX),
    "expect_column_values_to_be_in_set": (
        _of_values(_in_set(wanted=True), "number", "text"),
        _ROW | {"value_set"},
    ),
    "expect_column_values_to_not_be_in_set": (
        _of_values(_in_set(wanted=False), "number", "text"),
        _ROW | {"value_set"},
    ),
    "expect_column_values_to_match_regex": (_of_values(_regex(wanted=True), "text"), _ROW | {"regex"}),
    "expect_column_values_to_not_match_regex": (_of_values(_regex(wanted=False), "text"), _ROW | {"regex"}),
    "expect_column_values_to_match_regex_list": (
        _of_values(_regex_list(wanted=True), "text"),
        _ROW | {"regex_list", "match_on"},
    ),
    "expect_column_values_to_not_match_regex_list": (
        _of_values(_regex_list(wanted=False), "text"),
        _ROW | {"regex_list"},
    ),
    "expect_column_value_lengths_to_be_between": (_of_values(_length, "text"), _ROW | _MIN_MAX),
    "expect_column_value_lengths_to_equal": (_of_values(_length_equal, "text"), _ROW | {"value"}),
    "expect_column_values_to_be_unique": (_unique, _ROW),
    "expect_compound_columns_to_be_unique": (
        _compound_unique,
        frozenset({"column_list", "mostly", "ignore_row_if"}),
    ),
    "expect_column_pair_values_a_to_be_greater_than_b": (
        _pair(_greater, "number", "time"),
        _PAIR | {"or_equal"},
    ),
    "expect_column_pair_values_to_be_equal": (_pair(_equal, "number", "text", "time"), _PAIR),
}
