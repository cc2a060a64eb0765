"""Columns of rows that come as Python values, some rows at a time: one type for each column, whatever comes first."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, time
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import UUID

from airflow_mlops.exceptions import SchemaMismatchError

if TYPE_CHECKING:
    import polars as pl

#: Decimal digits that Delta and polars can hold.
_DIGITS = 38


class RowColumns:
    """The columns of a query's rows.

    :param names: of the columns.
    :param source: for messages.
    :raises SchemaMismatchError: two columns have the same name.

    >>> columns = RowColumns(["x", "y"], "a query")
    >>> first, second = columns.frame([(None, 1)]), columns.frame([("a", 2.5)])
    >>> columns.types
    {'x': String, 'y': Float64}
    """

    def __init__(self, names: Sequence[str], source: str) -> None:
        import polars as pl

        twice = sorted({name for name in names if list(names).count(name) > 1})
        if twice:
            raise SchemaMismatchError(
                f"{source} gives two columns named {', '.join(twice)}: rename one with AS"
            )
        self.source = source
        self.types: dict[str, pl.DataType] = {name: pl.Null() for name in names}
        self._range: dict[str, tuple[int, int]] = {}

    def frame(self, rows: Sequence[Sequence[Any]]) -> pl.DataFrame:
        """Give the rows as a frame with the types of these rows alone; :attr:`types` takes them in.

        :raises SchemaMismatchError: values of a column are of types that don't go together, or of one no table has.
        """
        import polars as pl

        series = [
            self._series(name, list(values))
            for name, values in zip(
                self.types, zip(*rows, strict=True) if rows else [()] * len(self.types), strict=True
            )
        ]
        for one in series:
            self.types[one.name] = self._united(one.name, self.types[one.name], one.dtype)
            if one.dtype == pl.Int64 and one.null_count() < len(one):
                low, high = self._range.get(one.name, (0, 0))
                least: Any = one.min()
                most: Any = one.max()
                self._range[one.name] = (min(low, least), max(high, most))
        return pl.DataFrame(series)

    def fitted(self, table: dict[str, pl.DataType] | None) -> dict[str, pl.DataType]:
        """Give the types that the rows are stored with: a table's own wherever it can hold the values.

        :raises SchemaMismatchError: a column has no value at all, and there is no table to say what it is.
        """
        import polars as pl

        fitted = {
            name: table[name] if table and name in table and self._fits(name, table[name]) else dtype
            for name, dtype in self.types.items()
        }
        unknown = [name for name, dtype in fitted.items() if dtype == pl.Null]
        if unknown:
            raise SchemaMismatchError(
                f"{self.source}: column {', '.join(unknown)} has no value in any row and no type is known from the table. "
                "Leave it out of the query until it has values; schema_policy='add_columns' takes it then"
            )
        return fitted

    def _fits(self, name: str, stored: pl.DataType) -> bool:
        import polars as pl

        dtype = self.types[name]
        if dtype == pl.Null:
            return True
        if isinstance(dtype, pl.Decimal) and isinstance(stored, pl.Decimal):
            return stored.scale >= dtype.scale
        if dtype != pl.Int64:
            return False
        low, high = self._range.get(name, (0, 0))
        if isinstance(stored, pl.Decimal):
            whole_digits = (stored.precision or _DIGITS) - stored.scale
            return len(str(max(-low, high))) <= whole_digits
        if stored.is_float():
            return max(-low, high) <= 2**53
        bits = {"Int8": 7, "Int16": 15, "Int32": 31, "Int64": 63}.get(str(stored))
        return bits is not None and -(2**bits) <= low and high < 2**bits

    def _united(self, name: str, one: pl.DataType, other: pl.DataType) -> pl.DataType:
        import polars as pl

        if one == other or other == pl.Null:
            return one
        if one == pl.Null:
            return other
        if {one, other} == {pl.Int64(), pl.Float64()}:
            return pl.Float64()
        scales = [dtype.scale if isinstance(dtype, pl.Decimal) else 0 for dtype in (one, other)]
        if all(isinstance(dtype, pl.Decimal) or dtype == pl.Int64 for dtype in (one, other)):
            return pl.Decimal(_DIGITS, max(scales))
        raise self._mixed(name, [str(one), str(other)])

    def _series(self, name: str, values: list[Any]) -> pl.Series:
        import polars as pl

        kinds = {self._kind(name, kind) for kind in {type(value) for value in values} - {type(None)}}
        if not kinds:
            return pl.Series(name, values, dtype=pl.Null)
        kind = _TOGETHER.get(frozenset(kinds)) or (kinds.pop() if len(kinds) == 1 else None)
        if kind is None:
            raise self._mixed(name, sorted(kinds))
        try:
            return _BUILD[kind](name, values)
        except (ValueError, TypeError, OverflowError, pl.exceptions.PolarsError) as err:
            raise SchemaMismatchError(
                f"{self.source}: column {name!r} holds {kind} values that no table column can hold: "
                f"{str(err).splitlines()[0]}. Convert it in the query, with CAST"
            ) from err

    def _kind(self, name: str, kind: type) -> str:
        for known, told in _KINDS:
            if issubclass(kind, known):
                return told
        raise SchemaMismatchError(
            f"{self.source}: column {name!r} holds {kind.__name__}, which no table column can hold. Convert it in the query, with CAST"
        )

    def _mixed(self, name: str, kinds: Sequence[str]) -> SchemaMismatchError:
        return SchemaMismatchError(
            f"{self.source}: column {name!r} holds {' and '.join(kinds)} values. Make them one type in the query, with CAST"
        )


#: The first that fits: a bool is an int, and a datetime a date.
_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (bool, "boolean"),
    (int, "whole number"),
    (float, "float"),
    (Decimal, "decimal"),
    (str, "text"),
    (UUID, "uuid"),
    ((bytes, bytearray, memoryview), "binary"),
    (datetime, "timestamp"),
    (date, "date"),
    (time, "time"),
    ((dict, list), "json"),
)
_TOGETHER = {
    frozenset({"whole number", "float"}): "float",
    frozenset({"whole number", "decimal"}): "decimal",
}


def _plain(dtype: str) -> Callable[[str, list[Any]], pl.Series]:
    def build(name: str, values: list[Any]) -> pl.Series:
        import polars as pl

        return pl.Series(name, values, dtype=getattr(pl, dtype), strict=dtype != "Float64")

    return build


def _converted(dtype: str, convert: Callable[[Any], Any]) -> Callable[[str, list[Any]], pl.Series]:
    build = _plain(dtype)
    return lambda name, values: build(name, [None if value is None else convert(value) for value in values])


def _decimals(name: str, values: list[Any]) -> pl.Series:
    import polars as pl

    exact = [None if value is None else Decimal(value) for value in values]
    exponents = [value.as_tuple().exponent for value in exact if value is not None]
    if not all(isinstance(exponent, int) for exponent in exponents):
        raise ValueError("NaN or infinity")
    scale = max(0, *(-int(exponent) for exponent in exponents))
    return pl.Series(name, exact, dtype=pl.Decimal(_DIGITS, scale))


def _timestamps(name: str, values: list[Any]) -> pl.Series:
    import polars as pl

    zones = {value.tzinfo is not None for value in values if value is not None}
    if len(zones) > 1:
        raise ValueError("some have a time zone and some have none")
    if zones == {False}:
        return pl.Series(name, values, dtype=pl.Datetime("us"))
    instants = [None if value is None else value.astimezone(UTC) for value in values]
    return pl.Series(name, instants, dtype=pl.Datetime("us", "UTC"))


_BUILD: dict[str, Callable[[str, list[Any]], pl.Series]] = {
    "boolean": _plain("Boolean"),
    "whole number": _plain("Int64"),
    "float": _plain("Float64"),
    "decimal": _decimals,
    "text": _plain("String"),
    "uuid": _converted("String", str),
    "binary": _converted("Binary", bytes),
    "timestamp": _timestamps,
    "date": _plain("Date"),
    # Delta has neither a time of day nor a type for JSON.
    "time": _converted("String", time.isoformat),
    "json": _converted("String", json.dumps),
}
