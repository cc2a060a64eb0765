"""Types of the columns of CSV files: the table's own where all texts read as such, else what all rows have, not the first ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import polars as pl

#: Rows of each file that polars guesses a type from.
_GUESSED_ROWS = 100


def csv_types(
    files: Sequence[str],
    scan: Callable[..., pl.LazyFrame],
    *,
    table: Mapping[str, pl.DataType],
    texts: Sequence[str],
) -> dict[str, pl.DataType]:
    """Find what the columns are read as.

    Rows are looked at where the guess is not the table's type, so of a table with the same types no more than the first ones are.

    :param scan: of files, with options of ``polars.scan_csv``.
    :param table: types of the table that the rows are for, by column.
    :param texts: columns that are taken as they stand.
    """
    import polars as pl

    guessed = _guess(files, scan)
    types: dict[str, pl.DataType] = {}
    wanted: dict[str, list[pl.DataType]] = {}
    for name, dtype in guessed.items():
        types[name] = table.get(name, pl.String()) if name not in texts else pl.String()
        known = types[name]
        if name in texts or known == dtype or (name in table and known == pl.String):
            continue
        wanted[name] = [known, *_wider(dtype)] if name in table and _readable(known) else _wider(dtype)
        types[name] = pl.String()
    return types | _first_that_reads(files, scan, wanted)


def _guess(files: Sequence[str], scan: Callable[..., pl.LazyFrame]) -> dict[str, pl.DataType]:
    """Guess by the first rows of each file; a column without any value there is ``Null``."""
    import polars as pl

    guessed: dict[str, pl.DataType] = {}
    for file in files:
        rows = scan([file])
        schema = rows.collect_schema()
        counts = rows.head(_GUESSED_ROWS).select(pl.all().count()).collect().row(0, named=True)
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

    if dtype == pl.Int64:
        return [pl.Int64(), pl.Float64()]
    return [dtype] if _readable(dtype) else []


def _readable(dtype: pl.DataType) -> bool:
    import polars as pl

    return dtype == pl.Boolean or (dtype.is_numeric() and not isinstance(dtype, pl.Decimal))


def _first_that_reads(
    files: Sequence[str], scan: Callable[..., pl.LazyFrame], wanted: Mapping[str, Sequence[pl.DataType]]
) -> dict[str, pl.DataType]:
    """Give for each column the first of the types that all texts read as; those without one are left out."""
    tries = [(name, dtype) for name, dtypes in wanted.items() for dtype in dtypes]
    if not tries:
        return {}
    rows = scan(files, infer_schema=False)
    failed = rows.select(
        _unread(name, dtype).alias(str(number)) for number, (name, dtype) in enumerate(tries)
    )
    counts = failed.collect(engine="streaming").row(0)
    found: dict[str, pl.DataType] = {}
    for (name, dtype), count in zip(tries, counts, strict=True):
        if not count:
            found.setdefault(name, dtype)
    return found


def _unread(name: str, dtype: pl.DataType) -> pl.Expr:
    """Count the texts that are no value of a type."""
    import polars as pl

    text = pl.col(name)
    if dtype == pl.Boolean:
        return (~text.is_in(["", "true", "false"])).sum()
    return (text.cast(dtype, strict=False).is_null() & (text != "")).sum()
