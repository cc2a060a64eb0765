"""Types of the columns of CSV files: the table's own where all texts read as such, else what all rows have, not the first ones."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from airflow_mlops.exceptions import SchemaMismatchError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import polars as pl

#: Rows of each file that polars guesses a type from.
_GUESSED_ROWS = 100


def csv_types(
    files: Sequence[str],
    scan: Callable[..., pl.LazyFrame],
    *,
    name: str,
    table: Mapping[str, pl.DataType],
    texts: Sequence[str],
) -> dict[str, pl.DataType]:
    """Find what the columns are read as.

    Rows are looked at where the guess is not the table's type, so of a table with the same types no more than the first ones are.

    :param scan: of files, with options of ``polars.scan_csv``.
    :param name: what the files were found by, for messages.
    :param table: types of the table that the rows are for, by column.
    :param texts: columns that are taken as they stand.
    :raises SchemaMismatchError: two columns have the same name.
    """
    import polars as pl

    guessed = _guess(files, scan)
    _require_names(guessed, name)
    types: dict[str, pl.DataType] = {}
    wanted: dict[str, list[pl.DataType]] = {}
    for column, dtype in guessed.items():
        types[column] = known = pl.String() if column in texts else table.get(column, pl.String())
        if column in texts or known == dtype or (column in table and known == pl.String):
            continue
        wanted[column] = [known, *_wider(dtype)] if column in table and _readable(known) else _wider(dtype)
        types[column] = pl.String()
    return types | _first_that_reads(files, scan, wanted, table)


def _require_names(columns: Iterable[str], name: str) -> None:
    """Find what polars makes of a name that comes twice."""
    renamed = [re.fullmatch(r"(.*)_duplicated_\d+", column, re.DOTALL) for column in columns]
    twice = sorted({found[1] for found in renamed if found} & {*columns})
    if twice:
        raise SchemaMismatchError(
            f"{name} has two columns named {', '.join(twice)}: rename one at the source"
        )


def _guess(files: Sequence[str], scan: Callable[..., pl.LazyFrame]) -> dict[str, pl.DataType]:
    """Guess by the first rows of each file; a column without any value there is ``Null``."""
    import polars as pl

    guessed: dict[str, pl.DataType] = {}
    for file in files:
        schema = scan([file]).collect_schema()
        # As texts: polars reads on beyond the first rows, and those after them may not be what it guessed.
        first = scan([file], infer_schema=False).head(_GUESSED_ROWS)
        counts = first.select(pl.all().count()).collect().row(0, named=True)
        for name, dtype in schema.items():
            found, known = dtype if counts[name] else pl.Null(), guessed.get(name, pl.Null())
            if known in (found, pl.Null()):
                guessed[name] = found
            elif found != pl.Null:
                guessed[name] = pl.Float64() if {known, found} == {pl.Int64(), pl.Float64()} else pl.String()
    return guessed


def _wider(dtype: pl.DataType) -> list[pl.DataType]:
    """Give what a column may turn out to be that was guessed to be this; a text in the end."""
    import polars as pl

    if dtype == pl.Null:
        return [pl.Int64(), pl.Float64(), pl.Boolean()]
    if dtype == pl.Int64:
        return [pl.Int64(), pl.Float64()]
    return [dtype] if _readable(dtype) else []


def _readable(dtype: pl.DataType) -> bool:
    import polars as pl

    return dtype == pl.Boolean or (dtype.is_numeric() and not isinstance(dtype, pl.Decimal))


def _first_that_reads(
    files: Sequence[str],
    scan: Callable[..., pl.LazyFrame],
    wanted: Mapping[str, Sequence[pl.DataType]],
    table: Mapping[str, pl.DataType],
) -> dict[str, pl.DataType]:
    """Give for each column the first of the types that all texts read as.

    Those without one are left out; a column without any text has the table's.
    """
    from polars.selectors import by_name

    tries = [(name, dtype) for name, dtypes in wanted.items() for dtype in dtypes]
    if not tries:
        return {}
    rows = scan(files, infer_schema=False)
    failed = rows.select(
        _unread(by_name(name), dtype).alias(str(number)) for number, (name, dtype) in enumerate(tries)
    )
    counts = failed.collect(engine="streaming").row(0)
    found: dict[str, pl.DataType] = {}
    for (name, dtype), count in zip(tries, counts, strict=True):
        if count == 0 or (count is None and dtype == table.get(name)):
            found.setdefault(name, dtype)
    return found


def _unread(text: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    """Count the texts that are no value of a type; null where there is no text at all."""
    import polars as pl

    if dtype == pl.Boolean:
        unread = ~text.str.to_lowercase().is_in(["", "true", "false"])
    else:
        unread = text.cast(dtype, strict=False).is_null() & (text != "")
    if (
        dtype == pl.Float64
    ):  # which would take the last digits of a whole number that is too large for 64 bits
        unread |= text.str.contains(r"^[+-]?\d+$") & text.cast(pl.Int64, strict=False).is_null()
    return pl.when((text != "").sum() > 0).then(unread.sum())
