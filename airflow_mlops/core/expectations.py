"""The common Great Expectations expectations as polars expressions, instead of a pandas copy of the rows.

An expectation whose type or arguments are not covered here is judged by Great Expectations itself; the two are held together by
a parity test. Semantics (nulls left out of the count except by ``not_be_null``, ``mostly`` as a share of
non-null rows) are those of Great Expectations 1.x.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import polars as pl

Kwargs = Mapping[str, Any]

#: How many offending values a result shows; Great Expectations shows as many.
PARTIAL_LIST_SIZE = 20

_NOT_NULL = "expect_column_values_to_not_be_null"
_COMMON = {"column", "mostly", "severity", "strict_min", "strict_max", "meta", "notes"}


def unexpected_expression(kind: str, kwargs: Kwargs, schema: pl.Schema) -> pl.Expr | None:
    """Give a boolean expression that is true on rows that break the expectation, or ``None`` if not covered.

    Null rows are neither expected nor unexpected (except for ``not_be_null``): the expression is null there.
    """
    import polars as pl

    if not set(kwargs) <= _COMMON | _OWN_ARGUMENTS.get(kind, set()):
        return None
    if kind == _NOT_NULL:
        return missing_expression(kwargs["column"], schema)
    if kind not in _ROW_RULES:
        return None
    broken = _ROW_RULES[kind](pl.col(kwargs["column"]), kwargs)
    return pl.when(~missing_expression(kwargs["column"], schema)).then(broken)


def missing_expression(column: str, schema: pl.Schema) -> pl.Expr:
    """Null or NaN: pandas, and so Great Expectations, does not tell them apart."""
    import polars as pl

    value = pl.col(column)
    return value.is_null() | value.is_nan() if schema[column].is_float() else value.is_null()


def table_check(kind: str, kwargs: Kwargs) -> Callable[[int, list[str]], tuple[bool, Any]] | None:
    """Give a check over (row count, column names) that returns (success, observed value), or ``None``."""
    if kind == "expect_table_row_count_to_be_between" and set(kwargs) <= {
        "min_value",
        "max_value",
        "severity",
    }:
        low, high = kwargs.get("min_value"), kwargs.get("max_value")
        return lambda rows, _: ((low is None or rows >= low) and (high is None or rows <= high), rows)
    if kind == "expect_column_to_exist" and set(kwargs) <= {"column", "severity"}:
        return lambda _, columns: (kwargs["column"] in columns, None)
    return None


def success_by_share(*, element_count: int, null_count: int, unexpected_count: int, mostly: float) -> bool:
    """Tell whether enough non-null rows are as expected.

    >>> success_by_share(element_count=10, null_count=0, unexpected_count=1, mostly=0.9)
    True
    >>> success_by_share(element_count=10, null_count=10, unexpected_count=0, mostly=1.0)
    True
    """
    considered = element_count - null_count
    if considered == 0:
        return True
    return (considered - unexpected_count) / considered >= mostly


def _between(value: pl.Expr, kwargs: Kwargs) -> pl.Expr:
    import polars as pl

    low, high = kwargs.get("min_value"), kwargs.get("max_value")
    outside = pl.lit(value=False)
    if low is not None:
        outside = outside | (value <= low if kwargs.get("strict_min") else value < low)
    if high is not None:
        outside = outside | (value >= high if kwargs.get("strict_max") else value > high)
    return outside


def _in_set(value: pl.Expr, kwargs: Kwargs) -> pl.Expr:
    return ~value.is_in(list(kwargs["value_set"]))


def _unique(value: pl.Expr, kwargs: Kwargs) -> pl.Expr:
    return value.is_duplicated()


_ROW_RULES: dict[str, Callable[[pl.Expr, Kwargs], pl.Expr]] = {
    "expect_column_values_to_be_between": _between,
    "expect_column_values_to_be_in_set": _in_set,
    "expect_column_values_to_be_unique": _unique,
}
_OWN_ARGUMENTS = {
    "expect_column_values_to_be_between": {"min_value", "max_value"},
    "expect_column_values_to_be_in_set": {"value_set"},
}
