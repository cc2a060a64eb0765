"""What an expectation comes to: rules over rows, over values that must differ, and over numbers about the whole table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import polars as pl

Kwargs = Mapping[str, Any]
#: ``judge(measures) -> (success, what a result shows)``.
Judge = Callable[[Mapping[str, Any]], tuple[bool, dict[str, Any]]]

#: Whole numbers beyond it are no longer themselves as the floats that pandas keeps them as beside nulls.
_EXACT = 2**53

#: Name of the measure that every judge is given: how many rows there are.
ROWS = "rows"

_NO_GUARDS: Mapping[str, pl.Expr] = MappingProxyType({})


class RowRule(NamedTuple):
    """What every row has to fulfill.

    :param considered: true on rows that count; ``None``: all do.
    :param broken: true on rows that break it; where a row is not considered it says nothing.
    :param shown: columns whose values are the evidence.
    :param mostly: share of the considered rows that must be as expected.
    :param guards: true if these rows can't be judged as pandas would.
    """

    considered: pl.Expr | None
    broken: pl.Expr
    shown: tuple[str, ...]
    mostly: float = 1.0
    guards: Mapping[str, pl.Expr] = _NO_GUARDS

    def unexpected(self) -> pl.Expr:
        """Give the rows that count and break it."""
        broken = self.broken.fill_null(value=False)
        return broken if self.considered is None else self.considered & broken


class UniqueRule(NamedTuple):
    """Columns whose values, taken together, no two rows may share.

    :param columns: their names.
    :param considered: true on rows that count.
    :param mostly: share of the considered rows that must be alone with their values.
    :param guards: true if these rows can't be judged as pandas would.
    """

    columns: tuple[str, ...]
    considered: pl.Expr
    mostly: float = 1.0
    guards: Mapping[str, pl.Expr] = _NO_GUARDS

    @property
    def shown(self) -> tuple[str, ...]:
        """Columns whose values are the evidence."""
        return self.columns


class TableRule(NamedTuple):
    """What some numbers about all rows have to fulfill.

    :param measures: the numbers by name; the same name is the same number.
    :param judge: what they mean.
    :param guards: true if these rows can't be judged as pandas would.
    :param apart: gives further numbers, which need a column as a whole, from the rows and how many values may be held at once.
    """

    measures: Mapping[str, pl.Expr]
    judge: Judge
    guards: Mapping[str, pl.Expr] = _NO_GUARDS
    apart: Callable[[pl.LazyFrame, int], Mapping[str, Any]] | None = None


Rule = RowRule | UniqueRule | TableRule
Compiler = Callable[[Kwargs, "pl.Schema"], Rule | None]


def missing(column: str, schema: pl.Schema) -> pl.Expr:
    """Null or NaN: pandas, and so Great Expectations, does not tell them apart."""
    import polars as pl

    value = pl.col(column)
    return value.is_null() | value.is_nan() if schema[column].is_float() else value.is_null()


def enough(considered: int, unexpected: int, mostly: float) -> bool:
    """Tell whether enough of the considered rows are as expected.

    >>> enough(10, 1, 0.9), enough(0, 0, 1.0)
    (True, True)
    """
    return considered == 0 or (float(considered) - float(unexpected)) / float(considered) >= mostly


def kind_of(dtype: pl.DataType) -> str | None:
    """Name what a column holds, where pandas holds it as plainly as polars does."""
    import polars as pl

    if dtype.is_integer() or dtype.is_float():
        return None if dtype in (pl.UInt64, pl.Int128) else "number"
    if dtype == pl.String:
        return "text"
    if isinstance(dtype, pl.Datetime):
        return "time" if dtype.time_zone == "UTC" and dtype.time_unit != "ns" else None
    return "truth" if dtype == pl.Boolean else None


def value_of(column: str, schema: pl.Schema) -> pl.Expr:
    """Give a column's values, floats in full width and without NaN, times in microseconds."""
    import polars as pl

    value, dtype = pl.col(column), schema[column]
    if isinstance(dtype, pl.Datetime):
        # Polars compares two units in the coarser one, and would cut a bound to it.
        return value.cast(pl.Datetime("us", dtype.time_zone))
    return value.cast(pl.Float64).fill_nan(None) if dtype.is_float() else value


def guards_of(schema: pl.Schema, *columns: str) -> dict[str, pl.Expr]:
    """Find whole numbers that pandas would round: it keeps a column that has nulls as floats."""
    import polars as pl

    def rounded(name: str) -> pl.Expr:
        value = pl.col(name)
        return value.is_null().any() & ((value > _EXACT) | (value < -_EXACT)).any()

    return {f"rounded:{name}": rounded(name) for name in columns if schema[name] in (pl.Int64,)}


def known_columns(names: Sequence[Any], schema: pl.Schema, *kinds: str) -> tuple[str, ...] | None:
    """Take columns that are there and hold one of some kinds."""
    if not names or not all(isinstance(name, str) and name in schema for name in names):
        return None
    return tuple(names) if all(kind_of(schema[name]) in kinds for name in names) else None


def is_number(value: Any) -> bool:
    """Tell whether an argument is a number that floats hold exactly."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < _EXACT if isinstance(value, int) else not math.isnan(value)


def is_whole(value: Any) -> bool:
    """Tell whether an argument is a whole number; of another one Great Expectations takes the whole part where it counts.

    >>> is_whole(2), is_whole(2.0), is_whole(0.5), is_whole(True)
    (True, True, False, False)
    """
    return is_number(value) and float(value).is_integer()
