"""What a table does about rows of another schema: refuse, take new columns, or widen types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from airflow_mlops.exceptions import SchemaMismatchError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import polars as pl

#: Decimal digits that a table can hold.
_DIGITS = 38

SchemaPolicy = Literal["strict", "add_columns", "widen"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SchemaFit:
    """How rows and a table come together.

    :param rows: polars type of each of the rows' columns as it is written.
    :param added: columns the table gets; its older rows are null there.
    :param widened: columns of the table that get another type, and which.
    """

    rows: dict[str, Any]
    added: tuple[str, ...] = ()
    widened: dict[str, Any]


def fit_schema(
    table: Mapping[str, pl.DataType],
    rows: Mapping[str, pl.DataType],
    *,
    policy: SchemaPolicy,
    where: str,
    remedy: str = "Fix the source, or ingest into a new table",
) -> SchemaFit:
    """Decide what becomes of columns that differ. A column that is missing is refused under every policy: it may have been renamed.

    :param where: URI of the table, for messages.
    :param remedy: what to do, for messages.
    :raises SchemaMismatchError: naming each column, both types, and the policy that allows it.
    """
    problems = [f"{name} is missing (table: {dtype})" for name, dtype in table.items() if name not in rows]
    added = tuple(name for name in rows if name not in table)
    if policy == "strict":
        problems += [f"{name} is new ({rows[name]}; schema_policy='add_columns' takes it)" for name in added]
    fitted, widened = dict(rows), {}
    for name, dtype in table.items():
        if name not in rows or rows[name] == dtype:
            continue
        wider = _holds_both(dtype, rows[name])
        if policy != "widen" or wider is None:
            hint = _hint(name, dtype, rows[name], wider)
            problems.append(f"{name} is {rows[name]}, the table has {dtype}{hint}")
            continue
        fitted[name] = wider
        if wider != dtype:
            widened[name] = wider
    if problems:
        raise SchemaMismatchError(f"rows do not fit {where}: {'; '.join(problems)}. {remedy}")
    return SchemaFit(rows=fitted, added=added, widened=widened)


def _hint(name: str, table: pl.DataType, rows: pl.DataType, wider: pl.DataType | None) -> str:
    """Say what would take such a column."""
    import polars as pl

    hint = "; schema_policy='widen' takes it" if wider is not None else ""
    if isinstance(table, pl.Decimal) and isinstance(rows, pl.Decimal):
        hint += f"{', or in' if hint else '; in'} a query CAST({name} AS NUMERIC({table.precision},{table.scale})) rounds it"
    return hint


def _holds_both(one: pl.DataType, other: pl.DataType) -> pl.DataType | None:
    """Find the narrowest type that holds every value of both, exactly; ``None`` when there is none.

    Of decimals that would need more than 38 digits it is the one with all digits after the point. A value that has too many
    before it is refused when it is written.
    """
    import polars as pl

    if isinstance(one, pl.Decimal) and isinstance(other, pl.Decimal):
        scale = max(one.scale, other.scale)
        whole = max((dtype.precision or _DIGITS) - dtype.scale for dtype in (one, other))
        return pl.Decimal(min(_DIGITS, whole + scale), scale)
    wider: dict[type[pl.DataType], tuple[type[pl.DataType], ...]] = {
        pl.Int8: (pl.Int16, pl.Int32, pl.Int64, pl.Float32, pl.Float64),
        pl.Int16: (pl.Int32, pl.Int64, pl.Float32, pl.Float64),
        pl.Int32: (pl.Int64, pl.Float64),
        pl.Float32: (pl.Float64,),
    }
    ours, theirs = ((type(dtype), *wider.get(type(dtype), ())) for dtype in (one, other))
    if ours[0] == theirs[0]:
        return None  # the same kind with other parameters, such as a time zone
    return next((dtype() for dtype in ours if dtype in theirs), None)
