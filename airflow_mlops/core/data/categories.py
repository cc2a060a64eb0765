"""Categories as text: the same number is the same category, however a table or a request holds it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from airflow_mlops.exceptions import SchemaMismatchError

if TYPE_CHECKING:
    import polars as pl


def number_text(value: float) -> str:
    """Give the category that a number is: whole ones have no point, as pandas makes fractions of whole numbers beside gaps.

    >>> number_text(12.0), number_text(-0.0), number_text(0.1), number_text(1e20)
    ('12', '0', '0.1', '100000000000000000000')
    """
    return str(int(value)) if math.isfinite(value) and float(value).is_integer() else repr(value)


def as_text(column: pl.Series) -> pl.Series:
    """Give a column as text.

    :raises SchemaMismatchError: it holds what has no text, such as lists, durations, or bytes that are not UTF-8.
    """
    import polars as pl

    try:
        return column.cast(pl.String)
    except pl.exceptions.PolarsError as err:
        raise SchemaMismatchError(
            f"column {column.name!r} holds {column.dtype}, which has no text to tell categories by: leave it out, or make a text or a "
            "number of it when the data is ingested"
        ) from err


def category_texts(column: pl.Series) -> pl.Series:
    """Give the categories of a column of any type; NaN is a missing one.

    Training, evaluation, scoring, drift checks and tables that are sent to the service all take them from here.

    :raises SchemaMismatchError: it holds what has no text, such as lists or durations.
    """
    import polars as pl

    if column.dtype == pl.String:
        return column
    if column.dtype.is_decimal():
        return column.cast(pl.String).str.replace(r"(\.\d*?)0+$", "$1").str.strip_chars_end(".")
    if not column.dtype.is_float():
        return as_text(column)
    if column.dtype == pl.Float32:  # its digits as they are written: 0.1 is no 0.10000000149011612
        column = column.cast(pl.String).cast(pl.Float64)
    known = column.fill_nan(None).unique()
    texts = pl.Series([None if one is None else number_text(one) for one in known.to_list()], dtype=pl.String)
    return column.fill_nan(None).replace_strict(known, texts, return_dtype=pl.String).cast(pl.String)
